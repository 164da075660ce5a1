"""What a cache holds, as facts: a table, one sample as text, and its dense maps as a picture.

    open      manifest and inventory; the image shards may be elsewhere, or absent
    list      every commit record: what exists, its bytes, what is quarantined
    measure   a few units: how often the cells agree with the label, segments per cell
    show      samples, in the terminal, as a PNG and as a page for a browser; a student next to the teacher

Nothing in the cache is changed. Launch: `cskd inspect caches/imagenet_sample --sample 3 --png sample.png`.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cskd.codecs.base import quantise_blend
from cskd.codecs.measured import AnyMeasured, together
from cskd.codecs.stages import StageCodec
from cskd.dataset.inventory import evenly
from cskd.errors import CacheError, CodecError, CskdError, counted, printable
from cskd.loading.cached_views import find_sample
from cskd.pipeline.look.html_page import write_page
from cskd.pipeline.look.inspect_sample import refuse_view
from cskd.pipeline.look.inspection import (
    Agreement,
    CodecFacts,
    Inspection,
    InventoryFacts,
    Quarantined,
    Segments,
    TeacherFacts,
    UnitCounts,
    UnitPlace,
    Unreadable,
)
from cskd.pipeline.look.sheets import contact_sheet, refuse_tiles, sample_picture
from cskd.pipeline.look.student_look import Compared
from cskd.pipeline.look.terminal import render_samples, render_student
from cskd.pipeline.look.views_shown import Look, draw_samples, look_at, sample_facts
from cskd.pipeline.outputs import refuse_file, save_file
from cskd.store.cache import Cache, open_cache
from cskd.store.commit import Commit
from cskd.store.format import MANIFEST_FORMATS, Unit
from cskd.store.records import records
from cskd.store.seal import read_seal
from cskd.store.usable import refuse_no_classes
from cskd.teacher.arithmetic import BLENDS, in_words
from cskd.views.mixing import NONE

MEASURED_UNITS = 12  # spread evenly over the cache; 45,000 units would take a quarter of an hour
SHEET_SAMPLES = 16
PAGE_SAMPLES = 64
LISTED = 5  # of missing units, errors and quarantined samples
AGREEMENT = ("own", "own_or_partner")  # labels a cell's target is compared with


def inspect(
    cache: Path,
    *,
    data: Path | None = None,
    sample: str | int | Sequence[str | int] | None = None,
    view: int = 0,
    blend: float | None = None,
    png: Path | None = None,
    html: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    student: Path | None = None,
    measured_units: int = MEASURED_UNITS,
) -> Inspection:
    """Facts about a cache.

    Args:    data, folder of the image shards where they have moved; sample, keys or numbers of those to show, in this view and at
             this blend (by default 0.5, with a student 1); png, where to write the picture of one sample, or a sheet of several;
             html, where to write a page of many samples; samples, how many in all, those named first, the others a function of
             seed: by default PAGE_SAMPLES of a page, and SHEET_SAMPLES of a sheet and for a student where none is named;
             student, a run, or weights in it, to set next to the teacher; measured_units, how many units are read for the figures
             that need targets.
    Raises:  CacheError, DataError, ReplayError, with the reason why a cache can't be opened or a picture not be made; StudentError
             for a student that does not fit the cache. What is wrong with single units is listed under `errors` instead.
    """
    if png is not None:
        refuse_file(png, "--png")
    if html is not None:
        refuse_file(html, "--html")
    opened = open_cache(cache, data)
    if not all(option is None for option in (sample, samples, png, html, student)):
        refuse_no_classes(opened, "leave --sample, --samples, --png, --html and --student out")
    asked = _asked(opened, blend, student is not None)  # refuses before any work is done
    compared = None if student is None else Compared(opened, student)
    commits, errors = _commits(opened)
    measured, agreement, segments = _measure(opened, commits, measured_units, errors)
    identity, manifest = opened.identity, opened.manifest
    named = [] if sample is None else [sample] if isinstance(sample, str | int) else list(sample)
    chosen = list(dict.fromkeys(find_sample(opened, one) for one in named))
    found = Inspection(
        cache=opened.location,
        format=MANIFEST_FORMATS[opened.container],
        container=opened.container,
        fingerprint=opened.fingerprint,
        inventory=InventoryFacts(opened.inventory.id, opened.inventory.n, len(opened.classes), opened.blocks),
        teacher=TeacherFacts(
            model=identity.teacher.get("model"),
            weights_sha256=identity.teacher.get("weights_sha256"),
            clean_top1=manifest.clean_top1,
            clean_images=manifest.clean_images,
            clean_data=manifest.clean_data,
            notes=manifest.notes or [],
            precision=manifest.precision,
        ),
        grid=list(opened.grid),
        recipe=identity.recipe,
        units=_units(opened, commits, errors),
        sealed=not errors and _is_sealed(opened, len(commits)),
        codecs=_codecs(opened, [commit for unit, commit in commits.items() if unit not in errors]),
        quarantined=_quarantined(opened, commits),
        measured_units=measured,
        agreement=agreement,
        segments_per_cell=segments,
        errors=[f"block {b}, view {v}: {reason}" for (b, v), reason in sorted(errors.items())],
    )
    shown, judged = chosen, list[int]()
    if png is not None or student is not None or (samples is not None and html is None):
        many = SHEET_SAMPLES if samples is None else samples
        drawn = _drawn(opened, commits, errors, max(many, len(chosen)), seed, view, chosen)
        shown = chosen if samples is None and chosen else drawn
        judged = drawn if student is not None else []
    if png is not None:
        refuse_tiles(len(shown))
    looks = look_at(opened, [*shown, *(one for one in judged if one not in shown)], view, asked)
    if compared is not None:
        looks, of_student = compared.compare(looks)
        found = replace(found, student=of_student)
    looks = looks[: len(shown)]
    if looks:
        found = replace(found, samples=[sample_facts(opened, look) for look in looks])
    if png is not None:
        found = replace(found, png=str(_write_png(opened, looks, png)))
    if html is not None:
        usable = {unit: commit for unit, commit in commits.items() if unit not in errors}
        many = PAGE_SAMPLES if samples is None else samples
        found = replace(
            found,
            html=write_page(
                opened, usable, found, html, many, seed, chosen, view, data, None if compared is None else compared.say
            ),
        )
    return found


def _asked(cache: Cache, blend: float | None, with_student: bool) -> int:
    """The blend to show, in 1/65536. CodecError for one of cells where the cache has none."""
    cells = cache.codecs[cache.hard_codec].cells
    asked = quantise_blend((1.0 if with_student else 0.5) * cells if blend is None else blend)
    if asked and not cells:
        raise CodecError(
            f"{cache.location} holds the image's targets alone, which are those of blend 0; leave --blend out, or cache a codec with cells "
            "as well, such as envelope"
        )
    return asked


def _commits(cache: Cache) -> tuple[dict[tuple[int, int], Commit], dict[tuple[int, int], str]]:
    """All commit records by (block, view), and why those that can't be used can't."""
    commits: dict[tuple[int, int], Commit] = {}
    errors: dict[tuple[int, int], str] = {}
    web = cache.location.startswith(("http:", "https:"))  # a web server has no list of its files
    there = set() if web else {about.key for about in cache.storage.list("units")}
    for block, view, record in records(cache):
        unit = block, view
        try:
            commit = record()
        except CacheError as e:
            errors[unit] = str(e)
            continue
        if commit is not None:
            commits[unit] = commit
            if not web and (absent := [file.path for file in commit.files if file.path not in there]):
                errors[unit] = f"{absent[0]} is not there; run `cskd repair {cache.location}`"
    return commits, errors


def _units(cache: Cache, commits: dict[tuple[int, int], Commit], errors: dict[tuple[int, int], str]) -> UnitCounts:
    everything = [(b, v) for b in range(cache.blocks) for v in range(cache.views)]
    missing = [unit for unit in everything if unit not in commits and unit not in errors]
    return UnitCounts(
        views=cache.views,
        total=len(everything),
        present=len(everything) - len(missing) - len(errors),
        missing=len(missing),
        first_missing=[UnitPlace(b, v) for b, v in missing[:LISTED]],
    )


def _is_sealed(cache: Cache, present: int) -> bool:
    try:
        seal = read_seal(cache)
    except CacheError:
        return False
    return seal is not None and seal.views == cache.views and seal.units == present


def _codecs(cache: Cache, commits: Iterable[Commit]) -> dict[str, CodecFacts]:
    size, targets, rows = Counter[str](), Counter[str](), Counter[str]()
    errors: defaultdict[str, list[AnyMeasured]] = defaultdict(list)
    for commit in commits:
        for name, error in commit.errors.items():
            errors[name].append(error)
        for file in commit.files:
            size[file.codec] += file.size
            targets[file.codec] += file.target_bytes
            rows[file.codec] += commit.cached
    return {
        name: CodecFacts(
            bytes=size[name],
            target_bytes_per_view=targets[name] / max(1, rows[name]),
            unit_bytes_per_view=size[name] / max(1, rows[name]),
            exact_hard=codec.exact_hard,
            soft=codec.soft,
            cells=codec.cells,
            has_classes=codec.has_classes,
            features=codec.reads_features,
            stage=codec.stage if isinstance(codec, StageCodec) else None,
            error=codec.error,
            measured=None if (over_all := together(errors[name])) is None else over_all.facts,
        )
        for name, codec in cache.codecs.items()
    }


def _quarantined(cache: Cache, commits: dict[tuple[int, int], Commit]) -> Quarantined:
    reasons = {
        cache.inventory.block_range(block)[0] + int(position): reason
        for (block, _), commit in commits.items()
        for position, reason in commit.quarantine.items()
    }
    first = sorted(reasons)[:LISTED]
    return Quarantined(len(reasons), [Unreadable(cache.inventory.key(i), reasons[i]) for i in first])


def _measure(
    cache: Cache, commits: dict[tuple[int, int], Commit], count: int, errors: dict[tuple[int, int], str]
) -> tuple[int, dict[str, Agreement], Segments | None]:
    """Figures that need targets, from `count` units spread over the cache; a unit that can't be read joins `errors`.

    Returns: how many units were read, and what they hold.
    """
    usable = sorted(unit for unit in commits if unit not in errors)
    picked = [usable[i] for i in evenly(len(usable), count)]
    name = cache.hard_codec
    cells: dict[str, Counter[str]] = {"mixed": Counter(), "unmixed": Counter()}
    segments, most, read = Counter[str](), 0, 0
    for block, view in picked:
        try:
            unit = cache.read(block, view, name)
        except CskdError as e:
            errors[block, view] = str(e)
            continue
        read += 1
        if not cache.codecs[name].has_classes:
            continue
        _count_agreement(cache, block, unit, name, cells)
        if name == "envelope":
            extra = unit.targets["n_extra"]
            segments.update(cells=extra.size, extra=int(extra.sum()))
            most = max(most, 1 + int(extra.max(initial=0)))
    agreement = {}
    for kind, count_of in cells.items():
        if count_of["samples"]:
            own, own_or_partner = (
                {f"{a:g}": count_of[f"{labels} {a:g}"] / count_of["cells"] for a in _blends(cache, name)}
                for labels in AGREEMENT
            )
            agreement[kind] = Agreement(count_of["samples"], own, own_or_partner)
    found = Segments(1 + segments["extra"] / segments["cells"], most) if segments["cells"] else None
    return read, agreement, found


def _count_agreement(cache: Cache, block: int, unit: Unit, name: str, cells: dict[str, Counter[str]]) -> None:
    """Count the cells of one unit that agree with their sample's label, or with its own or its partner's."""
    own = unit.fields["label"]
    unmixed = unit.fields["mode"] == NONE
    first, stop = cache.inventory.block_range(block)
    partner = np.where(unmixed, own, cache.inventory.label[first:stop][np.where(unmixed, 0, unit.fields["partner"])])
    for blend in _blends(cache, name):
        hard = cache.codecs[name].hard(unit.targets, quantise_blend(blend))
        is_own = hard == own[:, None, None]
        is_either = is_own | (hard == partner[:, None, None])
        for kind, rows in (("mixed", ~unmixed), ("unmixed", unmixed)):
            for what, agrees in zip(AGREEMENT, (is_own, is_either), strict=True):
                cells[kind][f"{what} {blend:g}"] += int(agrees[rows].sum())
    for kind, rows in (("mixed", ~unmixed), ("unmixed", unmixed)):
        cells[kind].update(samples=int(rows.sum()), cells=int(rows.sum()) * cache.grid[0] * cache.grid[1])


def _blends(cache: Cache, codec: str) -> tuple[float, ...]:
    """Where classes are counted: a codec of the image's alone gives every cell that one, at any blend."""
    return BLENDS if cache.codecs[codec].cells else (0.0,)


def _drawn(
    cache: Cache,
    commits: dict[tuple[int, int], Commit],
    errors: dict[tuple[int, int], str],
    count: int,
    seed: int,
    view: int,
    first: Sequence[int],
) -> list[int]:
    """Samples that have targets in this view, `first` and as many others as make `count`. CacheError where there is none."""
    refuse_view(cache, view)
    bad = np.zeros(cache.inventory.n, bool)
    blocks = [b for (b, v) in sorted(commits) if v == view and (b, v) not in errors]
    for block in blocks:
        bad[[cache.inventory.block_range(block)[0] + int(i) for i in commits[block, view].quarantine]] = True
    drawn = [*first]
    for chosen in draw_samples(cache, bad, blocks, count, seed, first).values():
        drawn += [sample for sample in chosen if sample not in first]
    if not drawn:
        raise CacheError(f"{cache.location} has no unit of view {view}; give another one with --view")
    return drawn


def _write_png(cache: Cache, looks: Sequence[Look], path: Path) -> Path:
    """The picture of one sample, or a sheet of several."""
    if len(looks) == 1:
        picture = sample_picture(cache, looks[0])
    else:
        title = f"{Path(cache.location).name}: {len(looks)} samples, view {looks[0].cached.view}"
        picture = contact_sheet(cache, looks, title)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    save_file(path, "--png", encoded.getvalue())
    return path


def render(facts: Inspection, console: Console) -> None:
    """The facts for people."""
    lines = [(name, Text(printable(value))) for name, value in _lines(facts)]
    if console.is_terminal:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in lines:
            table.add_row(name, value)
        console.print(table)
    else:
        for name, value in lines:
            console.print(Text(f"{name}: ").append(value), soft_wrap=True)
    if facts.samples is not None:
        render_samples(facts.samples, console)
    if facts.student is not None:
        console.print()
        render_student(facts.student, console)
    if facts.png is not None:
        console.print(Text(f"picture in {printable(facts.png)}"), soft_wrap=True)
    if (page := facts.html) is not None:
        lost = f", {page.without_picture:,} of them without a picture" if page.without_picture else ""
        shown = f"{counted(page.samples, 'sample')}, {counted(page.views, 'view')}{lost}, {page.bytes / 1e6:.1f} MB"
        console.print(Text(f"page in {printable(page.path)}: {shown}; open it in a browser"), soft_wrap=True)


def _lines(facts: Inspection) -> Iterable[tuple[str, str]]:
    inventory, units, teacher = facts.inventory, facts.units, facts.teacher
    yield "cache", f"{facts.cache}, fingerprint {facts.fingerprint[:12]}"
    yield (
        "inventory",
        f"{inventory.samples:,} samples, {inventory.classes:,} classes, {counted(inventory.blocks, 'block')}, "
        f"id {inventory.id[:12]}",
    )
    top1 = teacher.clean_top1
    measured = "" if top1 is None else f", top-1 {100 * top1:.1f} % on {teacher.clean_images} clean images"
    measured += f" of data.{teacher.clean_data}" if teacher.clean_data else ""
    yield "teacher", f"{teacher.model}, grid {facts.grid[0]} x {facts.grid[1]}{measured}"
    if teacher.precision and not any(in_words(teacher.precision) in note for note in teacher.notes):
        yield "", f"({in_words(teacher.precision)})"
    for note in teacher.notes:
        yield "", f"({note})"
    state = f"{units.present:,} of {units.total:,} present ({counted(units.views, 'view')})"
    if units.missing:
        first = units.first_missing[0]
        state += f", {units.missing:,} missing, the first block {first.block}, view {first.view}"
    elif not facts.errors:
        state += ", sealed" if facts.sealed else ", not sealed"
    yield "units", state
    for name, codec in facts.codecs.items():
        yield (
            f"codec {name}",
            f"{codec.target_bytes_per_view:,.0f} bytes per view, {codec.unit_bytes_per_view:,.0f} with seeds and "
            f"digests, {codec.bytes / 1e6:,.1f} MB in all; {codec.gives}",
        )
        if (off := codec.measured) is not None and "lost" in off:
            lost = f"{100 * off['lost']:.2g} % of the variance lost, a number off by {off['largest']:.2g} at most"
            yield "", f"(measured on {off['views']:,} views: {lost})"
        elif off is not None:
            wrong = f", {100 * off['wrong']:.2g} % of hard targets wrong" if codec.cells else ""
            largest = f"logits off by {off['largest']:.2g} at most"
            yield "", f"(measured on {off['views']:,} views: KL {off['kl']:.2g} nats{wrong}, {largest})"
    bad = facts.quarantined
    more = "; all: --quarantined" if bad.samples > len(bad.first) else ""
    yield "quarantined", f"{bad.samples:,}" + "".join(f"; '{one.key}': {one.reason}" for one in bad.first) + more
    if (segments := facts.segments_per_cell) is not None:
        yield "segments", f"{segments.mean:.2f} per cell, {segments.most} at most"
    for kind, agreement in facts.agreement.items():
        shares = {"own label": agreement.own}
        if kind == "mixed":
            shares["own or partner's"] = agreement.own_or_partner
        values = [f"{label} {' / '.join(f'{100 * s:.1f}' for s in of.values())} %" for label, of in shares.items()]
        of_cells = any(codec.cells for codec in facts.codecs.values())
        blends = f" at blends {' / '.join(agreement.own)}" if of_cells else ""
        yield (
            f"{'cells' if of_cells else 'images'}, {kind}",
            f"{', '.join(values)}{blends} ({agreement.samples:,} views)",
        )
    if facts.measured_units < units.present and facts.agreement:
        what = "agreement" if facts.segments_per_cell is None else "segments and agreement"
        yield "", f"({what} from {facts.measured_units} of the units)"
    for error in facts.errors[:LISTED]:
        yield "error", error
    if len(facts.errors) > LISTED:
        yield "error", f"and {len(facts.errors) - LISTED} more; see --json"
