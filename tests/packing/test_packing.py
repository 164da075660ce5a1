"""`cskd pack` and `cskd index`: one data set, one id; nothing dropped in silence; whole or not at all."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import cskd.packing.pack
import cskd.packing.payloads
from cskd.dataset.images import decode, image_size
from cskd.dataset.inventory import open_inventory
from cskd.dataset.shard_reader import ShardReader
from cskd.errors import DataError, PathError
from cskd.packing.index import index
from cskd.packing.names import sample_key
from cskd.packing.pack import pack
from cskd.store.shard_writer import ShardWriter
from tests.data_sources import EXPECTED, FILES, SMALL, as_webdataset_reads, contents, folder, names, prefixed, tar

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return folder(tmp_path / "source", FILES)


def test_one_data_set_has_one_id_in_whatever_it_comes(tmp_path: Path, source: Path) -> None:
    with tarfile.open(tmp_path / "h.tar", "w") as out:
        out.add(source, ".")  # as `tar cf h.tar .`: the first member is the folder itself
    sources = {
        "folder": source,
        "tar of .": tmp_path / "h.tar",
        "parent": folder(tmp_path / "parent", prefixed("deep/train/")) and tmp_path / "parent",
        "tar": tar(tmp_path / "a.tar", FILES),
        "tar of a folder": tar(tmp_path / "b.tar", prefixed("data/train/")),
        "tar with ./": tar(tmp_path / "c.tar", prefixed("./")),
        "gnu tar": tar(tmp_path / "d.tar", FILES, format=tarfile.GNU_FORMAT),
        "tar.gz": tar(tmp_path / "e.tar.gz", prefixed("train/"), "w:gz"),
        "tar.bz2": tar(tmp_path / "f.tbz", FILES, "w:bz2"),
        "tar.xz": tar(tmp_path / "g.bin", FILES, "w:xz"),
    }
    made = {name: pack(src, tmp_path / "out" / name, **SMALL) for name, src in sources.items()}
    assert contents(made["folder"]) == EXPECTED
    assert {inventory.id for inventory in made.values()} == {made["folder"].id}
    shards = {name: [inventory.shard_path(i).read_bytes() for i in range(7)] for name, inventory in made.items()}
    assert all(shards[name] == shards["folder"] for name in shards)
    for name in made:
        assert names(tmp_path / "out" / name) - {f"shard-{i:06d}.tar" for i in range(7)} == {"classes.txt"} | {
            f"inventory/{path.name}" for path in made[name].path.iterdir()
        }, "a spool or a work file was left"


def test_webdataset_reads_what_pack_writes_in_the_order_of_the_inventory(tmp_path: Path, source: Path) -> None:
    inventory = pack(source, tmp_path / "out", **SMALL)
    shards = [inventory.shard_path(i) for i in range(len(inventory.shards))]
    read = [sample for shard in shards for sample in as_webdataset_reads(shard)]
    assert [sample["__key__"] for sample in read] == [inventory.key(i) for i in range(inventory.n)]
    assert [int(sample["cls"]) for sample in read] == inventory.label.tolist()
    assert [sample["jpeg"] for sample in read] == [ShardReader(inventory).read(i) for i in range(inventory.n)]
    with tarfile.open(shards[0]) as shard:
        assert [member.name.rpartition(".")[2] for member in shard][:4] == ["jpeg", "cls"] * 2
    assert [inventory.shard_path(i).stat().st_size for i in range(7)] == [shard.bytes for shard in inventory.shards]


def test_order_depends_on_seed_and_key_only(tmp_path: Path, source: Path) -> None:
    def order(seed: int, name: str) -> list[str]:
        inventory = pack(source, tmp_path / name, seed=seed)
        return [inventory.key(i) for i in range(inventory.n)]

    first = order(0, "a")
    assert first != sorted(first)
    assert order(1, "b") != first
    for path in list(source.rglob("*_0[1357].JPEG")):
        path.unlink()
    assert order(0, "c") == [key for key in first if int(key[-1]) not in (1, 3, 5, 7)]


@pytest.mark.parametrize("workers", [1, 3])
def test_images_come_in_that_order_whatever_the_workers(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    expected = pack(source, tmp_path / "a")
    monkeypatch.setattr(cskd.packing.payloads, "CHUNK", 2)
    inventory = pack(source, tmp_path / "b", workers=workers)
    assert inventory.id == expected.id and contents(inventory) == EXPECTED


def test_limit_takes_the_first_of_the_shuffled(tmp_path: Path, source: Path) -> None:
    whole, part = pack(source, tmp_path / "a"), pack(source, tmp_path / "b", limit=5)
    assert [part.key(i) for i in range(part.n)] == [whole.key(i) for i in range(5)]
    assert part.classes == whole.classes == ["ant", "bee", "cat"]
    assert {part.key(i)[:3] for i in range(5)} == {"bee", "cat"}
    assert part.notes == [
        "5 of 27 images taken, as limited; labels stay those of all 3 classes",
        "2 of 3 classes have images; none: ant",
    ]
    assert "nothing was written" in pack(source, tmp_path / "b", limit=5).notes[-1]


def test_long_and_foreign_names_survive(tmp_path: Path) -> None:
    files = {f"{'é' * 60}/{'x' * 120}.JPG": b"long", "a.b class/1.2.3.png": b"dots", "z/plain.webp": b"w"}
    inventory = pack(folder(tmp_path / "src", files), tmp_path / "out")
    assert set(contents(inventory)) == {f"{'é' * 60}/{'x' * 120}", "a.b class/1_2_3", "z/plain"}
    read = {sample["__key__"]: sample for sample in as_webdataset_reads(inventory.shard_path(0))}
    assert set(read) == set(contents(inventory))
    assert read["a.b class/1_2_3"]["png"] == b"dots"
    assert index(tmp_path / "out").id == inventory.id


def test_keys_end_at_the_first_dot_as_webdataset_has_it() -> None:
    for path in ("a/b.jpg", "a.b/c.d.e.JPEG", "x y/ü.png"):
        key = sample_key(path)
        assert webdataset.tariterators.base_plus_ext(key + ".jpg") == (key, "jpg")


def test_labels_are_the_sorted_class_names(tmp_path: Path, source: Path) -> None:
    inventory = pack(source, tmp_path / "out")
    assert inventory.classes == ["ant", "bee", "cat"]
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nbee\ncat\n"


@pytest.mark.parametrize("place", ["classes.txt", "train/classes.txt"])
def test_a_class_file_fixes_the_labels_given_or_found_at_the_top(tmp_path: Path, place: str) -> None:
    listed = b"zebra\ncat\nbee\nyak\nant\n\n"
    own = pack(tar(tmp_path / "own.tar", {**prefixed("train/"), place: listed}), tmp_path / "a")
    (tmp_path / "list").write_bytes(listed)
    given = pack(tar(tmp_path / "plain.tar", FILES), tmp_path / "b", classes=tmp_path / "list")
    for inventory in (own, given):
        assert inventory.classes == ["zebra", "cat", "bee", "yak", "ant"]
        assert contents(inventory) == EXPECTED
        assert "3 of 5 classes have images; none: zebra, yak" in inventory.notes
    assert own.notes[0] == f"class order from {place} of own.tar"
    assert own.id == given.id


def test_other_files_are_counted_and_shown(tmp_path: Path, source: Path) -> None:
    folder(
        source,
        {"README": b"", "ant/notes.md": b"", "ant/._ant_01.JPEG": b"", ".git/x.jpg": b"", "bee/classes.txt": b"x"},
    )
    inventory = pack(source, tmp_path / "out")
    assert contents(inventory) == EXPECTED
    assert inventory.notes == ["5 other files passed over (2 hidden, 1 .md, 1 .txt, 1 without extension): .git ..."]


def test_links_in_folders_are_followed(tmp_path: Path, source: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "bee").mkdir(parents=True)
    (linked / "ant").symlink_to(source / "ant")
    (linked / "cat").symlink_to(source / "cat")
    for path in (source / "bee").iterdir():
        (linked / "bee" / path.name).symlink_to(path)
    assert pack(linked, tmp_path / "a").id == pack(source, tmp_path / "b").id


def photo(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG", quality=80)
    return out.getvalue()


def test_short_side_re_encodes_larger_images_only_whatever_the_workers(tmp_path: Path) -> None:
    files = {f"a/{i}.png": photo(60 + i, 90, i) for i in range(20)}
    files |= {"b/small.jpg": photo(40, 300), "b/exact.jpg": photo(48, 48), "b/bad.png": b"no image"}
    src = folder(tmp_path / "src", files)
    one, two = (pack(src, tmp_path / str(n), short_side=48, workers=n) for n in (1, 2))
    assert one.id == two.id
    read = {key: data for key, (_, data) in contents(one).items()}
    assert [read[f"b/{name}"] for name in ("small", "exact", "bad")] == [
        files["b/small.jpg"],
        files["b/exact.jpg"],
        b"no image",
    ]
    assert image_size(read["a/5"]) == (48, round(90 * 48 / 65))
    assert np.abs(decode(read["a/5"]).astype(int).mean() - decode(files["a/5.png"]).mean()) < 3
    assert one.notes == [
        "20 images re-encoded to a short side of 48 pixels",
        "1 images can't be decoded and stay as they are; stage 1 will quarantine them",
    ]
    with tarfile.open(one.shard_path(0)) as shard:
        assert [name for name in shard.getnames() if name.startswith("a/5")] == ["a/5.jpg", "a/5.cls"]


def test_raw_stores_the_pixels_that_decoding_gives_and_says_so(tmp_path: Path) -> None:
    files = {f"a/{i}.png": photo(60 + i, 90, i) for i in range(4)} | {"b/small.jpg": photo(40, 30), "b/bad.png": b"no"}
    src = folder(tmp_path / "src", files)
    whole, short = pack(src, tmp_path / "whole", raw=True), pack(src, tmp_path / "short", raw=True, short_side=48)
    read = {key: data for key, (_, data) in contents(whole).items()}
    assert read["b/bad"] == b"no"
    for name, data in files.items():
        if name != "b/bad.png":
            assert np.array_equal(decode(read[name.partition(".")[0]]), decode(data))
    sizes = {key: image_size(data) for key, (_, data) in contents(short).items() if key != "b/bad"}
    assert sizes["b/small"] == (40, 30) and sizes["a/0"] == (48, 72)
    assert short.notes[0] == "5 images re-encoded to a short side of 48 pixels as raw pixels"
    assert whole.notes[0] == "5 images re-encoded as raw pixels"
    with tarfile.open(whole.shard_path(0)) as shard:
        assert [name for name in shard.getnames() if name.startswith("a/1")] == ["a/1.ppm", "a/1.cls"]
    assert pack(src, tmp_path / "whole", raw=True).id == whole.id  # nothing is written
    with pytest.raises(DataError, match="made with --raw, asked for without"):
        pack(src, tmp_path / "whole")
    pack(src, tmp_path / "plain")
    with pytest.raises(DataError, match="made without --raw, asked for with it"):
        pack(src, tmp_path / "plain", raw=True)


def test_shards_are_cut_at_a_number_of_bytes_too(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cskd.store.shard_writer as writer

    monkeypatch.setattr(writer.ShardWriter.__init__, "__defaults__", (200,))
    inventory = pack(source, tmp_path / "out")
    sizes = [inventory.size[inventory.shard == i] for i in range(len(inventory.shards))]
    assert all(size.sum() <= 200 or len(size) == 1 for size in sizes)
    assert contents(inventory) == EXPECTED


def test_packing_again_changes_nothing_and_another_data_set_is_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    first = pack(source, out, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = pack(tar(tmp_path / "a.tar.gz", prefixed("train/"), "w:gz"), out, **SMALL)
    assert again.id == first.id and "nothing was written" in again.notes[-1]
    changes: dict[str, dict[str, Any]] = {
        "made with seed = 0, asked for 1": {"seed": 1},
        "made with block = 8, asked for 16": {"block": 16},
        "made with short_side = None, asked for 9": {"short_side": 9},
    }
    for difference, change in changes.items():
        with pytest.raises(DataError, match=f"holds the data set {first.id[:12]}, {difference}"):
            pack(source, out, **{**SMALL, **change})
    (source / "bee" / "bee_03.JPEG").write_bytes(b"changed")
    with pytest.raises(DataError, match="whose 'bee/bee_03' is not"):
        pack(source, out, **SMALL)
    (source / "bee" / "bee_03.JPEG").unlink()
    with pytest.raises(DataError, match="of 27 images, and the source has 26"):
        pack(source, out, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    (out / "shard-000002.tar").unlink()
    folder(source, FILES)
    with pytest.raises(DataError, match=r"shard-000002.tar is not in"):
        pack(source, out, **SMALL)


def test_shards_of_others_are_never_overwritten(tmp_path: Path, source: Path) -> None:
    out = folder(tmp_path / "out", {"shard-000000.tar": b"precious"})
    (out / ".packing").mkdir()  # as if a pack had been killed here before it moved anything
    with pytest.raises(DataError, match=r"holds shard-000000.tar but no inventory"):
        pack(source, out)
    assert (out / "shard-000000.tar").read_bytes() == b"precious"
    with pytest.raises(DataError, match="is the source"):
        pack(source, source)


def test_two_packs_at_once_are_refused(tmp_path: Path, source: Path) -> None:
    with cskd.packing.pack._workspace(tmp_path), pytest.raises(PathError, match=f"written to by process {os.getpid()}"):
        pack(source, tmp_path)


@pytest.mark.parametrize("fails", range(9))
def test_a_failure_while_files_are_moved_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    real, calls = os.rename, []

    def rename(a: Path, b: Path) -> None:
        calls.append(b)
        if len(calls) > fails:
            raise OSError(28, "No space left on device", str(b))
        real(a, b)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(DataError, match="No space left on device"):
        pack(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from cskd.packing.pack import pack
real, left = os.rename, [int(sys.argv[3])]
def rename(a, b):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(a, b)
os.rename = rename
pack(Path(sys.argv[1]), Path(sys.argv[2]), shard_size=4, block=8)
"""


@pytest.mark.parametrize("renames", [0, 8])
def test_a_pack_killed_while_files_are_moved_is_made_whole_by_the_next(
    tmp_path: Path, source: Path, renames: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(renames)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not (out / "inventory").exists() and len(list(out.glob("shard-*.tar"))) == min(renames, 7)
    assert contents(pack(source, out, **SMALL)) == EXPECTED
    assert not (out / ".packing").exists()


@pytest.mark.slow
def test_a_pack_killed_anywhere_is_made_whole_by_the_next(tmp_path: Path) -> None:
    files = {f"{i % 7}/{i}.jpg": os.urandom(500) for i in range(3000)}
    src, out = tar(tmp_path / "a.tar.gz", files, "w:gz"), tmp_path / "out"
    code = "import sys; from cskd.packing.pack import pack; pack(sys.argv[1], sys.argv[2], shard_size=100)"
    expected = pack(src, tmp_path / "whole", shard_size=100).id
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(src), str(tmp_path / "timed")], cwd=ROOT, check=True)
    length, finished = time.monotonic() - began, 0
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", code, str(src), str(out)], cwd=ROOT)
        time.sleep(length * (0.5 + 0.05 * attempt))
        process.kill()
        process.wait()
        finished += (out / "inventory" / "inventory.json").is_file()
        if finished:
            assert open_inventory(out, verify=True).id == expected
    assert pack(src, out, shard_size=100).id == expected
    assert open_inventory(out, verify=True).id == expected
    open_inventory(out).check_shards()


def test_a_listing_takes_little_memory(tmp_path: Path) -> None:
    from cskd.packing.sources import open_source

    files = {f"train/n{i % 50:08d}/n{i % 50:08d}_{i:06d}.JPEG": b"" for i in range(5000)}
    listing = open_source(tar(tmp_path / "a.tar", files), None, tmp_path, 0, None).listing
    columns = [
        listing._name,
        listing._name_end,
        listing.folder,
        listing.file,
        listing.offset,
        listing.size,
        listing.label,
    ]
    assert sum(map(sys.getsizeof, columns)) / len(listing) < 80


def test_progress_ends_at_the_total(tmp_path: Path, source: Path) -> None:
    calls: list[tuple[int, int]] = []
    pack(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (27, 27)


def test_the_imagenet_sample_has_its_labels_from_its_own_class_file(tmp_path: Path, sample_data: Path) -> None:
    inventory = pack(sample_data / "data" / "imagenet-sample.tar", tmp_path / "out")
    assert (inventory.n, len(inventory.classes)) == (500, 1000)
    for i in range(0, 500, 50):
        assert inventory.key(i).split("/")[0] == inventory.classes[inventory.label[i]]
        assert decode(ShardReader(inventory).read(i)).shape[2] == 3


def test_a_writer_that_is_abandoned_leaves_nothing_that_complains(tmp_path: Path) -> None:
    """An unraisable exception of a half-written tar is an error here."""
    writer = ShardWriter(tmp_path, shard_size=10)
    writer.add("a", "png", b"1234", 0)
    writer.abandon()
    del writer
    gc.collect()


def test_a_file_where_a_folder_goes_is_named(tmp_path: Path) -> None:
    source, out = tmp_path / "src" / "a", tmp_path / "out"
    source.mkdir(parents=True)
    (source / "x.png").write_bytes(b"1")
    out.write_text("mine")
    with pytest.raises(PathError, match="out is a file, expected a folder"):
        pack(tmp_path / "src", out)
    assert out.read_text() == "mine"
