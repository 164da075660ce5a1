"""Which shards a user means by a folder, a glob or braces, and which of them are of one split."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cskd.errors import DataError
from cskd.packing.split_words import chosen, in_order, some, words_in, written_word
from cskd.packing.tally import is_compressed_tar, plain_tar_name

MAX_BRACES = 16
MAX_SHARDS = 1 << 20  # that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
_NUMBERED = re.compile(r"(.*?)(\d{1,9})(?:-of-(\d{1,7}))?(\D*)")


def find_all_shards(specs: Sequence[Path], split: str | None = None) -> tuple[list[Path], str | None]:
    """`find_shards` of several: folders, globs, braces and files; compressed shards are taken. In the order of their paths.

    Files that are given one by one are of one split, as those of a glob are; several folders or patterns may be of several.
    Raises:  DataError as there, and where a split is told by the names of some shards and the keys of others.
    """
    files = [spec for spec in specs if spec.is_file()]
    found: list[list[Path]] = []
    key_splits = set()
    for spec in [spec for spec in specs if spec not in files]:
        paths, key_split = find_shards(spec, split, compressed=True)
        found.append(paths)
        key_splits.add(key_split)
    if files:
        base = Path(os.path.commonpath([path.parent for path in files]))
        paths, key_split = _of_one_split(base / "*", sorted(set(files)), split, base, spelled_out=False)
        found.append(paths)
        key_splits.add(key_split)
    if len(key_splits) > 1:
        raise DataError(
            f"some of the {len(specs)} sources say in their names which are of '{split}' and some do not; give those only"
        )
    every = sorted({path for paths in found for path in paths})
    for one, other in pairwise(every):
        if one.with_name(plain_tar_name(one.name)) == other.with_name(plain_tar_name(other.name)):
            raise DataError(f"{one} and {other} are one shard, compressed and not; give one of them")
    return every, key_splits.pop()


def find_shards(spec: Path, split: str | None = None, compressed: bool = False) -> tuple[list[Path], str | None]:
    """The shards that a folder, a glob, a {000..146} or a {a,b} names, sorted; with `split` those of that split.

    Returns: the shards; `split` again where neither their names nor their folders tell it, so that the keys must.
    Raises:  DataError when there are none, they are compressed (where that is no matter), of several splits (unless braces name
             each), or of none like `split`.
    """
    found = _in_folder(spec) if spec.is_dir() else expand_shards(spec)
    if not compressed and (packed := [path for path in found if is_compressed_tar(path.name)]):
        raise DataError(
            f"{spec} holds {len(packed)} compressed shard(s), {packed[0].name} for one; samples are read where they lie: "
            "decompress them (gunzip *.tar.gz), or have 'cskd index --out DIR' do it, and run again"
        )
    base = spec if spec.is_dir() else Path(os.path.commonpath([path.parent for path in found]))
    spelled_out = any("," in braces for braces in _BRACES.findall(str(spec)))
    return _of_one_split(spec, found, split, base, spelled_out)


def _of_one_split(
    spec: Path, found: list[Path], split: str | None, base: Path, spelled_out: bool
) -> tuple[list[Path], str | None]:
    groups: dict[str | None, list[Path]] = {}
    for path in found:
        groups.setdefault(_split_name(path.relative_to(base)), []).append(path)
    if split is not None:
        return _pick(spec, split, groups, base)
    if len(groups) > 1 and not spelled_out:
        _refuse_splits(spec, groups)
    if spec.is_dir() and (deep := [path for path in found if path.parent != spec]):
        folders = sorted({path.parent.relative_to(spec).as_posix() for path in deep})
        which = "only in folders of it" if len(deep) == len(found) else "and in folders of it"
        raise DataError(
            f"{spec} holds shards {which}: {some(folders)}; give the folder of one data set, or a glob: "
            f"'{spec.name}/{folders[0]}/*.tar'"
        )
    return found, None


def expand_shards(spec: Path) -> list[Path]:
    """The files that a glob, a {000..146} or a {a,b} names, sorted. Raises DataError when there are none."""
    spelled = _braces(str(spec))
    found = [Path(name) for text in spelled for name in (glob.glob(text) if glob.has_magic(text) else [text])]
    if not found:
        raise DataError(f"no .tar files at {spec}; expected webdataset shards (decompressed)")
    for shard in found:
        if not shard.is_file():
            raise DataError(f"no shard at {shard}; expected a folder, glob or {{000..999}} of webdataset shards")
    return sorted(set(found))


def is_pattern(src: Path) -> bool:
    """Whether a source is a glob or braces, and no file or folder of that name."""
    return bool(set("*?[{") & set(str(src))) and not src.exists()


def missing_numbers(shards: Sequence[Path]) -> list[str]:
    """A note where the numbers of shards have holes, or say how many there should be: a download that was cut short."""
    series: dict[tuple[str, str], tuple[set[int], int]] = {}
    for path in shards:
        if parts := _NUMBERED.fullmatch(plain_tar_name(path.name).removesuffix(".tar")):
            numbers, of = series.get((parts[1], parts[4]), (set(), 0))
            series[parts[1], parts[4]] = numbers | {int(parts[2])}, max(of, int(parts[3] or 0))
    notes = []
    for (head, tail), (numbers, of) in sorted(series.items()):
        if len(numbers) < max(numbers) + 1 - min(numbers) <= 2 * len(numbers) or of:
            first = int(of in numbers and 0 not in numbers)  # some count from 1
            expected = range(first, first + of) if of else range(min(numbers), max(numbers))
            if missing := [str(n) for n in expected if n not in numbers]:
                notes.append(f"{len(missing)} of the shards {head}*{tail} are not there: number {some(missing)}")
    return notes


def _in_folder(spec: Path) -> list[Path]:
    """The tars of a folder and of folders in it, sorted; compressed ones, too, so that they can be refused."""
    found = []
    for pattern in ("*", "*/*", "*/*/*"):
        for path in spec.glob(f"{pattern}.tar*") if pattern == "*" else spec.glob(f"{pattern}.tar"):
            hidden = any(part.startswith(".") for part in path.relative_to(spec).parts)
            if not hidden and (path.suffix == ".tar" or is_compressed_tar(path.name)) and path.is_file():
                found.append(path)
    for ending in ("tgz", "tbz", "tbz2", "txz"):
        found += [path for path in spec.glob(f"*.{ending}") if path.is_file()]
    if not found:
        with os.scandir(spec) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        more = f" (folders: {some(folders)}; class folders are for 'cskd pack')" if folders else ""
        raise DataError(f"no .tar files at {spec}{more}; expected webdataset shards (decompressed)")
    return sorted(set(found))


def _split_name(path: Path) -> str | None:
    """The split that a shard's name says, in the word it uses, else the nearest folder that says one."""
    if word := written_word(path.stem):
        return word
    return next((part for part in reversed(path.parent.parts) if words_in(part)), None)


def _pick(spec: Path, split: str, groups: dict[str | None, list[Path]], base: Path) -> tuple[list[Path], str | None]:
    every = sorted(path for paths in groups.values() for path in paths)
    asked = split.strip("/")
    by_folder = [path for path in every if asked in (path.parent.name, path.parent.relative_to(base).as_posix())]
    if by_folder and any(path.parent != base for path in by_folder):
        return by_folder, None
    known = {name for name in groups if name is not None}
    taken = chosen(known, split)
    if len(taken) == 1:
        return groups[taken.pop()], None
    if not known:
        return every, split
    what = f"shards of more than one split like '{split}'" if taken else f"no shards of a split '{split}'"
    raise DataError(f"{spec} holds {what}; its splits are {some(in_order(known))}; name one of them, or give a glob")


def _refuse_splits(spec: Path, groups: dict[str | None, list[Path]]) -> None:
    names = in_order(name for name in groups if name is not None)
    shown = some([f"{name} ({len(groups[name])})" for name in names])
    more = f" and others ({groups[None][0].name})" if None in groups else ""
    raise DataError(
        f"{spec} holds shards of the split{'s' * (len(names) > 1)} {shown}{more}; pick one with --split {names[0]}, "
        f"or give {_glob_of(names[0], groups)}"
    )


def _glob_of(split: str, groups: dict[str | None, list[Path]]) -> str:
    """A glob that finds the shards of a split alone, if it is a simple one."""
    first = groups[split][0]
    start = first.name[: first.stem.lower().find(split) + len(split)] if written_word(first.stem) else ""
    others = [path for name, paths in groups.items() if name != split for path in paths]
    if any(path.parent == first.parent and path.name.startswith(start) for path in others):
        return "a glob"
    return f"'{first.parent / start}*.tar'" if start else f"'{first.parent}/*.tar'"


def _braces(text: str) -> list[str]:
    """`a{0..2}` is a0, a1, a2 and `a{x,y}` is ax, ay; leading zeros keep the width."""
    _refuse_many(MAX_SHARDS + 1 if text.count("{") > MAX_BRACES else 1, text)
    found = _BRACES.search(text)
    if found is None:
        return [text]
    if bounds := _RANGE.fullmatch(found[1]):
        width = len(bounds[1])
        _refuse_many(int(bounds[2]) - int(bounds[1]) + 1, text)
        options = [f"{number:0{width}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        options = found[1].split(",")
    head, tails = text[: found.start()], _braces(text[found.end() :])
    _refuse_many(len(options) * len(tails), text)
    return [head + option + tail for option in options for tail in tails]


def _refuse_many(count: int, text: str) -> None:
    if count > MAX_SHARDS:
        raise DataError(f"{text} stands for {count} shards or more, expected at most {MAX_SHARDS}; name their folder")
