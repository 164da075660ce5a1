"""`cskd export`: targets that stock webdataset joins to the images, and the same cache in another container."""

from __future__ import annotations

import gc
import io
import json
import re
import runpy
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numcodecs.zstd
import numpy as np
import pytest
import torch

from cskd.codecs import get_codec
from cskd.codecs.base import Outputs, quantise_blend
from cskd.codecs.measured import BLENDS as MEASURED_AT
from cskd.codecs.measured import Measured, MeasuredMap, measure
from cskd.config import RecipeConfig
from cskd.dataset.inventory import Inventory, Sample, ShardFile, write_inventory
from cskd.errors import CskdError, PathError
from cskd.pipeline.care.export import _shard_keys, export, export_cache, export_targets, nearest_logits
from cskd.pipeline.care.export_out import FACTS, SUMS, begin
from cskd.pipeline.care.verify import verify
from cskd.pipeline.look.inspect_cache import inspect
from cskd.storage import open_storage
from cskd.storage.objects import Objects
from cskd.store.cache import Cache, open_cache
from cskd.store.seal import seal_cache
from cskd.store.unit import read_unit
from cskd.views.mixing import NONE
from cskd.views.recipe import sample_params
from tests.caches import make_tiny_cache

QUARANTINED = 6
CODECS = ("envelope", "int8", "topk2")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "webdataset.md"
BLENDS = (1.0, 0.5, 0.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    made = make_tiny_cache(tmp_path_factory.mktemp("export"), CODECS, quarantine=(QUARANTINED,))
    seal_cache(made, 1.0)
    return made


@pytest.fixture(scope="module")
def targets(cache: Cache) -> Path:
    out = cache.root.parent / "targets"
    export_targets(cache.root, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def tars(cache: Cache) -> Cache:
    """The same cache with its units in tars."""
    out = cache.root.parent / "tars"
    export_cache(cache.root, out, "webdataset", quiet=True)
    return open_cache(out)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def upload(folder: Path, location: str) -> None:
    storage = open_storage(location)
    for name, content in contents(folder).items():
        storage.put(name, content)


def objects(location: str) -> dict[str, bytes]:
    storage = open_storage(location)
    names = sorted(about.key for about in storage.list())
    return dict(zip(names, storage.get_many(names), strict=True))


def test_each_tar_has_the_keys_of_its_shard_in_order_and_what_the_cache_holds(cache: Cache, targets: Path) -> None:
    inventory = cache.inventory
    for shard, view in np.ndindex(2, 3):
        unit = cache.read(shard, view, "envelope")
        found = members(targets / f"{shard:05d}.view{view:03d}.tar")
        keys = list(dict.fromkeys(name.partition(".")[0] for name in found))
        assert keys == [name.partition(".")[0] for name in members(inventory.shard_path(shard))]
        first = inventory.block_range(shard)[0]
        hard = [cache.codecs["envelope"].hard(unit.targets, quantise_blend(a)) for a in BLENDS]
        for row, position in enumerate(unit.position.tolist()):
            key = keys[position]
            about = json.loads(found[f"{key}.paug.json"])
            assert (about["sample"], about["seed"]) == (
                inventory.key(first + position),
                f"{unit.fields['seed'][row]:016x}",
            )
            size = about["image"]["height"], about["image"]["width"]
            params = sample_params(int(about["seed"], 16), *size, RecipeConfig(size=32, seed=7))
            assert about["flip"] == params.flip and about["crop"]["top"] == params.crop.top
            assert (about["mixing"]["mode"] == "unmixed") == (unit.fields["mode"][row] == NONE)
            if about["mixing"]["mode"] != "unmixed":
                assert about["mixing"]["partner"] == inventory.key(first + int(unit.fields["partner"][row]))
                assert about["mixing"]["own_share"] == pytest.approx(unit.fields["lam"][row] / 65536)
            cells = np.load(io.BytesIO(found[f"{key}.cells.npy"]), allow_pickle=False)
            np.testing.assert_array_equal(cells, np.stack([at_blend[row] for at_blend in hard]))
            image = json.loads(found[f"{key}.global.json"])
            assert image["class"] == unit.targets["global_class"][row]
            logits = cache.codecs["int8"].logits(cache.read(shard, view, "int8").targets)[1][row]
            np.testing.assert_allclose(image["logits"], logits, rtol=1e-5, atol=1e-5)


def test_logits_are_of_the_codec_with_the_smallest_error_that_was_measured() -> None:
    codecs = {name: get_codec(name, 5, (3, 3)) for name in ("envelope", "topk:2", "topk:3", "global:8")}
    kl = [{"topk:2": 0.5, "topk:3": 0.1}, {"topk:2": 0.1, "topk:3": 0.2}]
    commits = [
        SimpleNamespace(errors={name: Measured(4, value, 0.0, 0.0) for name, value in one.items()} | lost)
        for one, lost in zip(kl, ({"stage": MeasuredMap(4, 0.0, 0.0)}, {}), strict=True)
    ]
    cache: Any = SimpleNamespace(codecs=codecs)
    assert [nearest_logits(cache, some) for some in (commits, commits[1:], [])] == ["topk:3", "topk:2", "topk:2"]  # type: ignore[arg-type]
    for of_cells, best in (
        (0.05, "topk:2"),
        (0.1, "global:8"),
    ):  # a mean over five blends: the image's may be all of it
        errors = {"topk:2": Measured(4, of_cells, 0.0, 0.0), "global:8": Measured(4, 0.3, 0.0, 0.0)}
        assert nearest_logits(cache, [SimpleNamespace(errors=errors)]) == best  # type: ignore[list-item]
    cache.codecs = {"envelope": codecs["envelope"]}
    assert nearest_logits(cache, []) is None


@pytest.mark.parametrize("name", ["topk:1", "topk:20", "int8"])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_the_image_s_error_is_at_most_the_number_of_blends_times_the_one_that_was_measured(
    name: str, spread: float
) -> None:
    rng = np.random.default_rng(1)  # of cells alike the image's error is as large as theirs
    dense = torch.from_numpy(rng.normal(0, 3, (8, 100, 1, 1)) + spread * rng.normal(0, 1, (8, 100, 4, 4))).float()
    outputs = Outputs(dense=dense, image=dense.mean((2, 3)))
    codec = get_codec(name, 100, (4, 4))
    stored = codec.encode_outputs(outputs)
    found = codec.global_logits_torch({key: torch.from_numpy(a) for key, a in stored.items()}).log_softmax(1)
    true, measured = outputs.image.log_softmax(1), measure(codec, stored, outputs, 8)
    assert isinstance(measured, Measured)
    assert float((true.exp() * (true - found)).sum(1).mean()) <= len(MEASURED_AT) * measured.kl * 1.0001 + 1e-6


@pytest.mark.parametrize("names", [("global:8", "int8"), ("int8", "global:8"), ("topk:2", "global:8", "global:16")])
def test_the_error_of_cells_does_not_hide_which_codec_has_the_image_s_logits_best(names: tuple[str, ...]) -> None:
    dense = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (8, 100, 4, 4))).float()
    outputs = Outputs(dense=dense, image=dense.mean((2, 3)))
    codecs = {name: get_codec(name, 100, (4, 4)) for name in names}
    stored = {name: codec.encode_outputs(outputs) for name, codec in codecs.items()}
    found = {
        name: codec.global_logits_torch({key: torch.from_numpy(a) for key, a in stored[name].items()})
        for name, codec in codecs.items()
    }
    errors = {name: measure(codec, stored[name], outputs, 8) for name, codec in codecs.items()}
    cache: Any = SimpleNamespace(codecs=codecs)
    best = min(names, key=lambda name: float((found[name] - outputs.image).square().sum()))
    assert nearest_logits(cache, [SimpleNamespace(errors=errors)]) == best  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("names", "old"),
    [(("int8", "topk2"), "int8"), (("topk2", "int8"), "topk2"), (("global8", "int8"), None)],
)
def test_an_export_that_goes_on_keeps_its_logits_also_where_an_older_version_began_it(
    names: tuple[str, ...], old: str | None, tmp_path: Path
) -> None:
    codecs = {name: get_codec(name, 5, (3, 3)) for name in names}
    cache: Any = SimpleNamespace(codecs=codecs, fingerprint="f", inventory=SimpleNamespace(id="i"), grid=(3, 3))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / FACTS).write_text('{"fingerprint": "f", "inventory": "i", "grid": [3, 3]}')
    assert begin(cache, open_storage(tmp_path / "old"), {}, names[-1]) == old
    assert [begin(cache, open_storage(tmp_path / "new"), {}, name) for name in (*names, None)] == [names[0]] * 3
    (tmp_path / "new" / FACTS).write_text('{"fingerprint": "f", "inventory": "i", "grid": [3, 3], "logits": "topk9"}')
    with pytest.raises(CskdError, match="holds an export with logits = topk9, this one has"):
        begin(cache, open_storage(tmp_path / "new"), {}, names[0])


def test_a_quarantined_sample_says_why_and_has_no_targets(cache: Cache, targets: Path) -> None:
    found = members(targets / "00001.view002.tar")
    names = [name for name in found if name.startswith(f"image{QUARANTINED:03d}.")]
    assert names == [f"image{QUARANTINED:03d}.paug.json"]
    assert json.loads(found[names[0]])["quarantined"] == "not an image"


def test_an_envelope_gives_the_classes_at_every_blend(cache: Cache, tmp_path: Path) -> None:
    export_targets(cache.root, tmp_path / "out", envelope=True, views=1, quiet=True)
    unit, found = cache.read(0, 0, "envelope"), members(tmp_path / "out" / "00000.view000.tar")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "page.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "page.py"))
    packed = [content for name, content in found.items() if name.endswith(".env.zst")]
    for blend in (0, 1, 20_000, 32_768, 65_536):
        expected = cache.codecs["envelope"].hard(unit.targets, blend)
        for row, data in enumerate(packed):
            np.testing.assert_array_equal(names["classes_at"](data, blend), expected[row])


def test_the_same_command_makes_what_is_absent_and_the_same_bytes(cache: Cache, targets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(targets, out)
    (out / "00001.view001.tar").unlink()
    (out / SUMS).unlink()
    assert export_targets(cache.root, out, quiet=True).made == 1
    assert contents(out) == contents(targets)
    assert export_targets(cache.root, out, quiet=True).made == 0
    export_targets(cache.root, out, views=1, quiet=True)
    assert contents(out) == contents(targets)


def indexed(folder: Path, members: dict[str, str]) -> Inventory:
    """A shard of empty images with an inventory: name in the tar -> key."""
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in members:
            tar.addfile(tarfile.TarInfo(name))
    samples = [Sample(key, 0, 0, 0, 512 * (i + 1), 0) for i, key in enumerate(members.values())]
    shards = [ShardFile("a.tar", (folder / "a.tar").stat().st_size)]
    return write_inventory(folder, samples, classes=["one"], shards=shards)


def test_keys_are_those_of_the_image_shards_not_of_the_inventory(tmp_path: Path) -> None:
    """An inventory may put a prefix before keys that occur in several shards; webdataset knows none of it."""
    found = indexed(tmp_path / "data", {"x/b.c.png": "a/x/b_c", "d.png": "a/d"})
    assert _shard_keys(found, 0, 0, 2) == ["x/b", "d"]
    twice = indexed(tmp_path / "twice", {"b.1.png": "b_1", "b.2.png": "b_2"})
    with pytest.raises(CskdError, match=r"'b_2' in .*a\.tar: webdataset reads a second sample 'b' there"):
        _shard_keys(twice, 0, 0, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blends": ["2"]}, "outside"),
        ({"blends": ["nan"]}, "outside"),
        ({"blends": ["half"]}, "no list of numbers"),
        ({"blends": [" "]}, "names no blend"),
        ({"blends": ["1"], "envelope": True}, "leave one of them out"),
        ({"more_blends": ["0.5"]}, "one word too many"),
        ({"views": 4}, "--views is 4"),
        ({"container": "zarr", "envelope": True}, "leave one of them out"),
        ({"container": "zarr", "views": 9}, "--views is 9"),
        ({"data": Path("nowhere")}, "nowhere"),
    ],
)
def test_options_that_can_not_be_are_refused_in_a_line(
    cache: Cache, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(CskdError, match=said) as caught:
        export(cache.root, tmp_path / "out", quiet=True, **options)  # type: ignore[arg-type]
    assert len(str(caught.value)) <= 300 and not (tmp_path / "out").exists()


def test_an_out_of_something_else_is_refused(cache: Cache, targets: Path, tars: Cache, tmp_path: Path) -> None:
    with pytest.raises(CskdError, match=r"blends = \[1\.0, 0\.5, 0\.0\], this one has \[1\.0\]"):
        export_targets(cache.root, targets, blends=[1.0], quiet=True)
    for out in (cache.root, cache.inventory.root, tars.root):
        with pytest.raises(CskdError, match="give"):
            export_targets(cache.root, out, quiet=True)
    for out, container in ((cache.root, "webdataset"), (targets, "webdataset"), (tars.root, "zarr")):
        with pytest.raises(CskdError, match="give"):
            export_cache(cache.root, out, container, quiet=True)
    (tmp_path / FACTS).write_text("[1]")
    with pytest.raises(CskdError, match="damaged"):
        export_targets(cache.root, tmp_path, quiet=True)


def test_blends_may_be_written_in_every_way(cache: Cache, targets: Path, tmp_path: Path) -> None:
    for blends, more in (
        (["1,0.5,0"], []),
        (["1 0.5 0"], []),
        (["1"], ["0.5", "0"]),
        (["1", "0.5", "0"], []),
        (None, []),
    ):
        assert export(cache.root, targets, blends=blends, more_blends=more, quiet=True).made == 0


def test_a_cache_in_tars_is_read_by_all_and_has_the_same_content(cache: Cache, tars: Cache) -> None:
    assert not list(tars.root.rglob("*.zip"))
    report = verify(tars.root, replay=5, quiet=True)
    assert (report.errors, report.sealed, report.replayed) == ([], True, 5)
    assert report.content_root == cache.content_root()
    assert (tars.root / "sealed.json").read_bytes() == (cache.root / "sealed.json").read_bytes()
    facts = inspect(tars.root)
    assert (facts.container, facts.errors) == ("webdataset", [])
    assert facts.codecs.keys() == set(CODECS)
    for block, view, codec in ((0, 0, "envelope"), (1, 2, "int8"), (1, 1, "topk2")):
        one, other = cache.read(block, view, codec), tars.read(block, view, codec)
        for name in one.targets:
            np.testing.assert_array_equal(one.targets[name], other.targets[name])
            assert other.targets[name].dtype == one.targets[name].dtype


def test_and_back_in_zarr_its_units_are_the_bytes_they_were(cache: Cache, tars: Cache, tmp_path: Path) -> None:
    export_cache(tars.root, tmp_path / "back", "zarr", quiet=True)
    for folder in ("units", "commits", "inventory"):
        assert contents(tmp_path / "back" / folder) == contents(cache.root / folder)


def test_an_interrupted_copy_goes_on_and_an_unfinished_cache_is_copied_as_far_as_it_is(tmp_path: Path) -> None:
    cache = make_tiny_cache(tmp_path, skip=[(1, 1)])
    out = tmp_path / "out"
    report = export_cache(cache.root, out, "webdataset", quiet=True)
    assert (report.made, report.missing) == (5, 1)
    assert not (out / "sealed.json").exists()
    next(out.glob("commits/b00000/v0001.json")).unlink()
    assert export_cache(cache.root, out, "webdataset", quiet=True).made == 1


def test_an_export_to_a_store_and_from_one_has_the_bytes_of_one_to_a_folder(
    cache: Cache, targets: Path, tars: Cache, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for source, name in ((cache.root, "caches/mine"), (cache.inventory.root, "data")):
        upload(source, f"{s3}/{name}")
    there, data, out = (Path(f"{s3}/{name}") for name in ("caches/mine", "data", "targets"))
    report = export_targets(cache.root, out, quiet=True)
    assert (report.out, report.tars, report.made) == (f"{s3}/targets", 6, 6)
    assert objects(report.out) == contents(targets)
    storage = open_storage(report.out)
    storage.delete("00001.view001.tar")
    storage.delete(SUMS)
    puts, real = list[str](), Objects.put

    def put(self: Objects, key: str, data: bytes) -> None:
        puts.append(key)
        real(self, key, data)

    monkeypatch.setattr(Objects, "put", put)
    again = export_targets(there, out, data=data, quiet=True)  # by a cache and images on the store
    assert again.made == 1 and puts == ["00001.view001.tar", SUMS] and again.bytes == report.bytes
    assert objects(report.out) == contents(targets)
    export_targets(there, tmp_path / "out", data=data, quiet=True)
    assert contents(tmp_path / "out") == contents(targets)
    root = export_cache(there, Path(f"{s3}/caches/tars"), "webdataset", quiet=True).content_root
    assert root == cache.content_root() and export_cache(there, Path(f"{s3}/caches/tars"), "webdataset").made == 0
    of_config = {"manifest.json", "manifest.copy.json", "resolved.yaml"}  # they hold cache.path
    mine, theirs = objects(f"{s3}/caches/tars"), contents(tars.root)
    assert mine.keys() == theirs.keys()
    assert {key for key in mine if mine[key] != theirs[key]} == of_config


def test_an_out_on_a_store_that_is_of_something_else_is_refused(cache: Cache, s3: str, tmp_path: Path) -> None:
    shutil.copytree(cache.root, tmp_path / "mine", ignore=shutil.ignore_patterns("units", "commits"))
    upload(tmp_path / "mine", f"{s3}/caches/mine")
    open_storage(f"{s3}/photos").put("photos/a.jpg", b"x")
    before = objects(s3)
    for out, container, said in (
        (f"{s3}/caches/mine", None, "OUT and CACHE are both"),
        (f"{s3}/caches/mine/units", "zarr", "lies in CACHE"),
        (f"{s3}/caches", "webdataset", "CACHE s3://.*/caches/mine lies in OUT"),
        (s3, None, "CACHE s3://.*/caches/mine lies in OUT"),
        (f"{s3}/photos", None, r"holds photos/a\.jpg, which is no file of an export"),
        (f"{s3}/photos", "zarr", r"holds photos/a\.jpg, which is no file of a cache"),
        ("http://host/x", None, "is on a web server, which is only read"),
    ):
        with pytest.raises(PathError, match=said) as caught:
            export(Path(f"{s3}/caches/mine"), Path(out), container=container, quiet=True)
        assert len(str(caught.value)) <= 300
    assert objects(s3) == before


def test_damage_of_a_units_tar_is_found(tars: Cache, tmp_path: Path) -> None:
    """Each bit of a header, a frame or the end that reading depends on, and by `verify` every one."""
    path = next((tars.root / "units/b00000").glob("v0000.envelope.*"))
    data = path.read_bytes()
    whole = read_unit(path)
    for bit in range(0, 8 * len(data), 1511):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = read_unit(path, bytes(damaged))
        except CskdError as e:
            assert "damaged" in str(e)
        else:  # of the names of dimensions, which nobody reads
            for one, other in zip(whole, found, strict=True):
                assert all(np.array_equal(array, other[name]) for name, array in one.items())
    for cut in (0, 511, 512, len(data) - 1, len(data) // 2):
        with pytest.raises(CskdError, match="damaged"):
            read_unit(path, data[:cut])
    shutil.copytree(tars.root, tmp_path / "cache")
    copy = tmp_path / "cache" / path.relative_to(tars.root)
    copy.write_bytes(data.replace(b'"block": 0', b'"block": 1'))
    assert [error[:16] for error in verify(tmp_path / "cache", quiet=True).errors] == ["block 0, view 0:"]


@pytest.fixture
def open_files_of_webdataset() -> Iterator[None]:
    """It leaves files to be closed when they are collected: that is done before the next test."""
    yield
    gc.collect()


LEFT_OPEN = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@LEFT_OPEN
@pytest.mark.usefixtures("open_files_of_webdataset")
def test_stock_webdataset_joins_every_image_with_its_target(
    cache: Cache, targets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "webdataset_join.py"
    shards = str(cache.inventory.root / "{00000..00001}.tar")
    monkeypatch.setattr("sys.argv", ["webdataset_join.py", shards, str(targets), "2"])
    joined = runpy.run_path(str(example), run_name="__main__")["joined"]
    assert capsys.readouterr().out == "10 of 10 images joined with their targets (100%)\n"
    for sample in joined(shards, str(targets), 2):
        assert sample["png"].startswith(b"\x89PNG") and sample["paug.json"]["view"] == 2
        assert ("quarantined" in sample["paug.json"]) == ("cells.npy" not in sample)
        assert "cells.npy" not in sample or sample["cells.npy"].shape == (3, 3, 3)
    assert "cskd" not in example.read_text().partition('"""\n\n')[2]


@LEFT_OPEN
@pytest.mark.usefixtures("open_files_of_webdataset")
def test_stock_webdataset_reads_a_units_tar_as_one_sample(tars: Cache) -> None:
    import webdataset

    path = next((tars.root / "units/b00001").glob("v0001.topk2.*"))
    (sample,) = webdataset.WebDataset(str(path), shardshuffle=False)
    assert sample["__key__"] == "b00001-v0001" and json.loads(sample["about.json"])["codec"] == "topk2"
    unit = tars.read(1, 1, "topk2")
    for name, array in {**unit.fields, **{f"targets.{n}": a for n, a in unit.targets.items()}}.items():
        stored = np.load(io.BytesIO(numcodecs.zstd.decompress(sample[f"{name}.npy.zst"])), allow_pickle=False)
        np.testing.assert_array_equal(stored, array)
