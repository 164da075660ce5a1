"""Promises about files that others made: read whole and small, or refused; nothing in them reaches a terminal or leads out."""

from __future__ import annotations

import io
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cskd.packing.payloads
from cskd.config import from_dict, load_config
from cskd.config.yaml_text import read_yaml
from cskd.dataset.image_limits import refuse_bombs
from cskd.dataset.images import decode
from cskd.errors import ConfigError, CskdError, DataError, ImageError, TeacherError, printable
from cskd.files.read import parse_json, read_file
from cskd.packing.pack import pack
from cskd.packing.payloads import Remake, payloads
from cskd.packing.sources import open_source
from cskd.packing.tars import decompressed, members
from cskd.pipeline.care.gc import gc
from cskd.pipeline.conflicts import own_output
from cskd.pipeline.pack import PackReport
from cskd.pipeline.show.report import shown
from cskd.store.cache import create_cache
from cskd.store.manifest import Manifest
from cskd.store.unit_layout import frame_size
from cskd.teacher.build import build_model
from tests.caches import make_tiny_cache


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    start = time.monotonic()
    with pytest.raises(OSError, match="expected a regular file"):
        read_file(tmp_path / "pipe")
    with pytest.raises(CskdError, match="expected a regular file"):
        load_config(tmp_path / "pipe")
    assert time.monotonic() - start < 30


def test_a_file_over_its_limit_is_refused_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 1 << 40)
    with pytest.raises(OSError, match="more than 100 bytes"):
        read_file(tmp_path / "large", 100)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "NaN", "-Infinity", "[" * 66 + "]" * 66, "{"])
def test_json_that_two_readers_could_take_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)
    assert parse_json("[" * 60 + "]" * 60)


def test_what_is_printed_controls_no_terminal() -> None:
    odd = "a\x1b[2J\n\r\x07\x9b\u202e\ud800\u2028é"
    assert printable(odd) == "a\\x1b[2J\\n\\r\\x07\\x9b\\u202e\\ud800\\u2028é"
    assert str(DataError(odd)) == printable(odd) == printable(printable(odd))
    report = PackReport(odd, "id", 1, 1, 1, 1, 1, 1, 1.0, [odd])
    assert shown(report) == PackReport(printable(odd), "id", 1, 1, 1, 1, 1, 1, 1.0, [printable(odd)])


def test_aliases_may_be_written_but_not_multiply() -> None:
    assert read_yaml("a: &a {x: 1}\nb: *a\n", "c") == {"a": {"x": 1}, "b": {"x": 1}}
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    start = time.process_time()
    with pytest.raises(CskdError, match="stands for more than 100000 values"):
        read_yaml("\n".join(lines), "c")
    with pytest.raises(CskdError, match="holds itself"):
        read_yaml("a: &a [*a]", "c")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "raw",
    [
        {"recipe": {"size": 10**6}},
        {"cache": {"views": 10**9}},
        {"train": {"output": "a\0b"}},
        {"train": {"output": "\x1b[2J"}},
        {"teacher": {"kwargs": {"a": {1, 2}}}},
        {"train": {"epochs": 1 << 70}},
        {"recipe": {"randaugment": "rand-n" + "9" * 400}},
    ],
)
def test_values_that_would_fill_the_memory_or_control_a_terminal_are_refused(raw: dict[str, dict[str, object]]) -> None:
    with pytest.raises(CskdError, match=r"expected|nothing in the config needs"):
        from_dict(raw)


def test_timm_is_never_told_to_read_a_file_of_its_own_choice() -> None:
    for key in ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        with pytest.raises(TeacherError, match=f"has {key}"):
            build_model("resnet18", {key: "x"})
    for name in ("hf-hub:x/y", "local-dir:x"):
        with pytest.raises(TeacherError, match=r"only done with teacher\.weights: hub"):
            build_model(name, {})


def test_a_tar_is_read_as_tarfile_reads_it(tmp_path: Path) -> None:
    """The rules are our own, the answers must not be."""
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for name in ("a/b.png", "long/" * 15 + "x" * 90 + ".png", "é/ü.png", "a/empty.png", "./c.png"):
                if form == tarfile.USTAR_FORMAT and len(name) > 155:
                    name = "p" * 80 + "/" + "x" * 90 + ".png"
                info = tarfile.TarInfo(name)
                data = b"" if "empty" in name else name.encode() * 50
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        with tarfile.open(path) as tar:
            expected = [(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isreg()]
        assert [tuple(m) for m in members(path)] == expected


def test_a_bomb_is_stopped_long_before_the_disk_is_full(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "bomb").write_bytes(gzip.compress(bytes(300_000_000), 9))
    with pytest.raises(DataError, match="expected at most 200 from one"):
        decompressed(tmp_path / "bomb", tmp_path)
    assert (tmp_path / "source.tar").stat().st_size < 150_000_000


def test_large_images_are_read_when_their_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads read ahead, only small images wait in memory."""
    for name in "ab":
        (tmp_path / "src" / name).mkdir(parents=True)
    for i in range(20):
        (tmp_path / "src" / "ab"[i % 2] / f"{i:02d}.png").write_bytes(bytes(1000 + i))
    source = open_source(tmp_path / "src", None, tmp_path, 0, None)
    order = np.argsort(source.listing.size, kind="stable")
    whole = [payload.data for _, payload in payloads(source.listing, order, Remake(), 2)]
    monkeypatch.setattr(cskd.packing.payloads, "TASK_BYTES", 3500)
    places = [source.listing.place(int(i)) for i in order]
    assert len(cskd.packing.payloads._read_all(places, Remake())) == 3
    assert [payload.data for _, payload in payloads(source.listing, order, Remake(), 2)] == whole


def test_a_pack_removes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "src" / name / "0.png")
    (tmp_path / "precious").write_text("x")
    (tmp_path / "out" / ".packing").mkdir(parents=True)
    (tmp_path / "out" / ".packing" / "publishing").write_text(f"../precious\n{tmp_path / 'precious'}\n")
    pack(tmp_path / "src", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "x"


def test_gc_removes_nothing_outside_its_cache(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, views=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (cache.root / "units" / "b99999").symlink_to(tmp_path / "elsewhere")
    (cache.root / "units" / "b00000" / "left").write_text("x")
    assert gc(cache.root, older_than=0).removed == ["units/b00000/left"]
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_images_of_usual_structure_pass_and_bombs_do_not() -> None:
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        out = io.BytesIO()
        Image.new("RGB", (5, 4)).save(out, kind)
        refuse_bombs(out.getvalue())
    for options in ({"progressive": True}, {"subsampling": 0}, {"quality": 1}):
        out = io.BytesIO()
        Image.new("RGB", (500, 400)).save(out, "JPEG", **options)
        refuse_bombs(out.getvalue())
    out = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    with pytest.raises(ImageError, match="scans of 3000 x 3000 pixels"):
        decode(data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 200 + b"\xff\xd9")


def test_what_stands_between_the_segments_of_a_jpeg_is_limited_to_the_byte() -> None:
    out = io.BytesIO()
    Image.new("RGB", (5, 4)).save(out, "JPEG")
    start, rest = out.getvalue()[:2], out.getvalue()[2:]
    for allowed, refused, reason in (
        (b"\xff" * 65535, b"\xff" * 65536, "filling bytes"),  # the segment's own comes to them
        (b"\xff\xd0" + bytes(65536), b"\xff\xd0" + bytes(65537), "belong to no segment"),
        (b"\xff\xd0" * 4080, b"\xff\xd0" * 4096, "segments of metadata"),
    ):
        refuse_bombs(start + allowed + rest)
        with pytest.raises(ImageError, match=reason):
            refuse_bombs(start + refused + rest)
        refuse_bombs(start + refused[:20])  # cut off: the decoder says so


def test_the_size_of_a_frame_is_read_as_zstd_states_it() -> None:
    from numcodecs import Zstd

    for n in (0, 1, 255, 256, 65_791, 65_792, 1_000_000):
        assert frame_size(Zstd().encode(bytes(n))[:18]) == n or n == 0
    assert frame_size(b"no frame at all") is None


def test_a_config_can_t_make_the_program_write_outside_its_output_folder(tmp_path: Path) -> None:
    """Every name in an output folder is the program's; none of them may be a link, and foreign files are not replaced."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds config\.json of something else than a run"):
        own_output(tmp_path / "project")
    assert (tmp_path / "project" / "config.json").read_text() == "precious"
    (tmp_path / "run").mkdir()
    for name in ("resolved.yaml", "resume", "scratch", "config.json"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "project")
        with pytest.raises(OSError, match=r"a link inside train\.output"):
            own_output(tmp_path / "run")
        (tmp_path / "run" / name).unlink()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    own_output(tmp_path / "link")  # the folder itself may be one

    cache = make_tiny_cache(tmp_path / "tiny", views=1)
    (cache.root / "claims").symlink_to(tmp_path / "project")
    with pytest.raises(OSError, match=r"a link inside cache\.path"):
        create_cache(cache.root, cache.manifest, cache.inventory)


def test_a_number_of_the_recipe_that_is_written_as_a_text_is_refused(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path)
    identity = replace(cache.identity, recipe={**cache.identity.recipe, "flip": "0.5"})
    with pytest.raises(ValueError, match=r"its recipe\.flip is '0\.5'"):
        Manifest.read(replace(cache.manifest, identity=identity).sealed)
