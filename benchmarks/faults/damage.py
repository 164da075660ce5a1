"""Damaged files: bits, lengths and exchanged files of a cache, bits of the images. Does `verify` find each, and name its unit?"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from benchmarks.children import in_child
from benchmarks.faults.bench import Bench, files, flipped
from cskd.dataset.inventory import open_inventory
from cskd.pipeline.care.repair import repair

# One damage in so many is repaired, and the cache compared with what it was, byte for byte.
REPAIRED = {"flips": 100, "truncations": 20, "swaps": 4}


def flips(bench: Bench, count: int) -> Counter[str]:
    """Single bits, in every file of a cache in turn."""
    counts: Counter[str] = Counter()
    names = sorted(bench.whole)
    for i in range(count):
        name = names[i % len(names)]
        counts.update(found(bench, "flips", {name: flipped(bench.whole[name], bench.rng)}, i))
    return counts


def truncations(bench: Bench, count: int) -> Counter[str]:
    """Files cut short, to nothing too."""
    counts: Counter[str] = Counter()
    for i in range(count):
        name = bench.rng.choice(sorted(bench.whole))
        length = bench.rng.choice((0, bench.rng.randrange(len(bench.whole[name]))))
        counts.update(found(bench, "truncations", {name: bench.whole[name][:length]}, i))
    return counts


def swaps(bench: Bench, count: int) -> Counter[str]:
    """Valid files in each other's place: of two blocks or views, of one kind or several, or of another cache."""
    counts: Counter[str] = Counter()
    while counts["swaps"] < count:
        kind = bench.rng.choice(("units", "commits", "inventory", "any", "cache", "unit of another cache"))
        if kind == "cache":
            name = bench.rng.choice(sorted(bench.whole.keys() & bench.elsewhere.keys()))
            damage = {name: bench.elsewhere[name]}
        elif kind == "unit of another cache":  # its bytes under the name that the record gives, or its record with it
            block, view = bench.rng.randrange(2), bench.rng.randrange(3)
            place = f"b{block:05d}/v{view:04d}"
            there = {n: d for n, d in bench.elsewhere.items() if place in n}
            here = next(n for n in bench.whole if n.startswith(f"units/{place}"))
            unit = next(d for n, d in there.items() if n.startswith("units"))
            damage = there if bench.rng.random() < 0.5 else {here: unit}
        else:
            a, b = bench.rng.sample([n for n in sorted(bench.whole) if kind in ("any", n.split("/")[0])], 2)
            damage = {a: bench.whole[b], b: bench.whole[a]}
        if any(bench.whole.get(n) != data for n, data in damage.items()):  # else the files are equal
            counts.update(found(bench, "swaps", damage, counts["swaps"]))
    return counts


def images(bench: Bench, count: int) -> Counter[str]:
    """Single bits of images in the shards; `verify --images` names the image."""
    inventory, counts = open_inventory(bench.folder / "data"), Counter[str]()
    for _ in range(count):
        i = bench.rng.randrange(len(inventory))
        path = inventory.shard_path(int(inventory.shard[i]))
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, bench.rng, int(inventory.offset[i]), int(inventory.size[i])))
        errors = bench.errors(bench.cache, images=True)
        path.write_bytes(whole)
        counts.update(Counter(images=1, images_missed=not (len(errors) == 1 and inventory.key(i) in errors[0])))
    return counts


def found(bench: Bench, part: str, damage: dict[str, bytes], number: int) -> Counter[str]:
    """Damage files of the cache: does `verify` say so, and name every unit? Then put them back, or have them repaired."""
    for name, data in damage.items():
        (bench.cache / name).write_bytes(data)
    errors = bench.errors(bench.cache)
    missed = not all_named(damage, bench.whole, errors)
    counts = Counter({part: 1, f"{part}_missed": int(missed)})
    if missed:
        print(f"{part}: {sorted(damage)} were damaged; verify says {errors}", file=sys.stderr)
    if number % REPAIRED[part] == 0:
        _, answer = in_child(lambda: repair(bench.cache, quiet=True).rebuilt)
        left = {n for n in damage if n not in bench.whole}  # a file of another cache: no record speaks of it now
        now = {n: d for n, d in files(bench.cache).items() if n not in left}
        counts.update({f"{part}_repaired": 1, f"{part}_repaired_wrong": int(now != bench.whole)})
        if now != bench.whole:
            odd = sorted(n for n in now.keys() | bench.whole.keys() if now.get(n) != bench.whole.get(n))
            print(f"{part}: {sorted(damage)} were damaged; after the repair ({answer}) {odd} differ", file=sys.stderr)
    for name in damage:
        if name in bench.whole:
            (bench.cache / name).write_bytes(bench.whole[name])
        else:
            (bench.cache / name).unlink()
    return counts


def all_named(damage: dict[str, bytes], whole: dict[str, bytes], errors: list[str]) -> bool:
    """Is each damaged file spoken of, by its unit or its name? Where the manifest can't be read, nothing else is."""
    named = [is_named(name, errors) for name in damage if name in whole]
    return all(named) or (any(named) and len(errors) == 1)


def is_named(name: str, errors: list[str]) -> bool:
    """Does one of the lines name the unit of that file, or the file?"""
    parts = Path(name).parts
    if parts[0] not in ("units", "commits"):
        return any(parts[0] in e for e in errors)
    unit = f"block {int(parts[1][1:])}, view {int(parts[2][1:5])}:"
    return any(e.startswith(unit) for e in errors)
