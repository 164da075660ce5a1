"""Views of samples in a terminal: the class of each cell as a coloured grid, or as names where there are no colours.

A cell is twice as many columns wide as it is lines high, which is a square in most fonts. Where that does not fit, two rows of cells
share a line: the upper half of a character is one, its ground the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from cskd.dataset.inventory import evenly
from cskd.errors import counted, printable
from cskd.pipeline.draw.pictures import INK, PAPER, Paint, is_bright
from cskd.pipeline.look.inspection import ClassFacts, EpochAgreement, SampleFacts, StudentFacts, percent

NAME_CELLS = 14  # terminal columns a class name may take
LEAST_NAME = 6  # columns of a name below which cells get letters
MAPS = 8  # samples that are shown as maps; of more there is a line each
LARGE = 9  # rows and columns of the largest grid whose cells are 4 x 2 characters
GAP = 3  # columns between two maps
FAINTEST = 0.5  # brightness of a cell whose shade is 0
REST = "·"  # letter of classes that have none
BAR = 30  # columns of the longest bar of the curve
EPOCHS = 20  # that the curve has about, of a long run; --json has all

Cells = Sequence[Sequence[str]]
Shade = Sequence[Sequence[float]]


def shows_colours(console: Console) -> bool:
    """Whether class colours can be told apart: 256 or more of them, on a terminal, and nobody asked for none."""
    plain = console.no_color or console.is_dumb_terminal or not console.is_terminal
    return not plain and console.color_system in ("truecolor", "256")


def render_samples(samples: Sequence[SampleFacts], console: Console) -> None:
    """Each sample with its maps; of many a line each."""
    for sample in samples:
        if len(samples) > MAPS:
            console.print(Text(printable(_line(sample))), soft_wrap=True)
            continue
        console.print()
        for line in _about(sample):
            console.print(Text(printable(line)), soft_wrap=True)
        if not sample.of_image or sample.student is not None:  # else all cells are alike
            (_coloured if shows_colours(console) else _plain)(sample, console)
    if len(samples) > MAPS:
        console.print(Text("maps: --sample KEY, --png FILE or --html FILE"), soft_wrap=True)


def render_student(facts: StudentFacts, console: Console) -> None:
    """The student, its agreement, and how that went from epoch to epoch."""
    done = "" if facts.epochs_done is None else f", {facts.epochs_done} of {facts.epochs} epochs"
    rows, columns = facts.patch_grid
    lines = [
        f"student {facts.run} ({facts.weights}){done}, {rows} x {columns} patches",
        f"agreement {percent(facts.agreement, 1)} of the cells of {counted(facts.views, 'view')}",
        *(f"({note})" for note in facts.notes),
    ]
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    if facts.by_epoch:
        console.print(Text("epoch  in training  these views"))
    logged = any(row.trained is not None for row in facts.by_epoch)
    values = {row.epoch: row.trained if logged else row.shown for row in facts.by_epoch}
    most = max((v for v in values.values() if v is not None), default=0.0)
    for row in _thinned(facts.by_epoch):
        trained, shown = ("-" if v is None else percent(v, 1) for v in (row.trained, row.shown))
        wide = max(0, min(BAR, console.width - 34))
        bar = "#" * round(wide * (values[row.epoch] or 0.0) / max(most, 1e-9))
        console.print(Text(f"{row.epoch:>5}  {trained:>11}  {shown:>11}  {bar}".rstrip()), soft_wrap=True)


def _thinned(rows: Sequence[EpochAgreement]) -> list[EpochAgreement]:
    """At most about EPOCHS of them: those whose weights were looked at, then others spread evenly."""
    kept = {i for i, row in enumerate(rows) if row.shown is not None}
    kept |= {*evenly(len(rows), max(1, EPOCHS - len(kept))), len(rows) - 1}
    return [row for i, row in enumerate(rows) if i in kept]


def _words(sample: SampleFacts) -> dict[str, str]:
    return {one.name: one.words for one in sample.classes}


def _mixed(sample: SampleFacts) -> str:
    mixing, words = sample.mixing, _words(sample)
    if mixing.partner is None or mixing.partner_label is None:
        return mixing.mode
    return f"{mixing.mode} with '{mixing.partner}' ({words[mixing.partner_label]}), own share {mixing.own_share:.2f}"


def _line(sample: SampleFacts) -> str:
    """One of many samples."""
    words = _words(sample)
    share = next(one.share for one in sample.classes if "image" in one.roles)
    text = f"sample {sample.sample} '{sample.key}', label {words[sample.label]}, view {sample.view}, {_mixed(sample)}: "
    text += f"teacher {words[sample.image_class]}" + ("" if sample.of_image else f", {percent(share)} of cells")
    return text + ("" if sample.student is None else f"; student agrees in {percent(sample.student.agreement)}")


def _about(sample: SampleFacts) -> Iterable[str]:
    words = _words(sample)
    yield f"sample {sample.sample} '{sample.key}', label {words[sample.label]}, view {sample.view}, {_mixed(sample)}"
    yield f"replay: {sample.replay}"
    if sample.of_image:
        yield f"target {words[sample.image_class]}, of the image alone"
    else:
        yield f"targets at blend {sample.blend:g} (1 = each cell's own, 0 = the image's: {words[sample.image_class]})"


def _legend_words(one: ClassFacts) -> str:
    roles = {"image": "the image's", "label": "label", "partner": "partner's label"}
    return f"{one.words} ({', '.join(roles[role] for role in one.roles)})" if one.roles else one.words


def _plain(sample: SampleFacts, console: Console) -> None:
    """Maps without colours: names, or letters where a terminal is too narrow for names. A pipe gets names."""
    columns = console.width if console.is_terminal else None
    words = _words(sample)
    letters = columns is not None and columns // len(sample.cells[0]) - 2 < LEAST_NAME
    shares = ", ".join(
        f"{f'{one.letter or REST} ' if letters else ''}{_legend_words(one)} {percent(one.share)}"
        for one in sample.classes
    )
    console.print(Text(printable(f"cells: {shares}")), soft_wrap=True)
    if letters:
        words = {one.name: one.letter or REST for one in sample.classes}
    for cells in [sample.cells] if sample.student is None else [sample.cells, sample.student.cells]:
        if sample.student is not None:
            title = "teacher:" if cells is sample.cells else f"student, agrees in {percent(sample.student.agreement)}:"
            console.print(Text(title))
        for line in _names(cells, words, 1 if letters else None, columns):
            console.print(Text(line), soft_wrap=True)


def _names(cells: Cells, words: dict[str, str], width: int | None, columns: int | None) -> Iterable[str]:
    """Aligned columns of names."""
    shown = [[printable(words[c]) for c in row] for row in cells]
    if width is None:
        width = min(NAME_CELLS, max(cell_len(word) for row in shown for word in row))
        if columns is not None:
            width = max(LEAST_NAME, min(width, columns // len(shown[0]) - 2))
    gap = " " if width == 1 else "  "
    for row in shown:
        yield "  " + gap.join(_fit(word, width) for word in row).rstrip()


def _fit(word: str, width: int) -> str:
    """The word in exactly `width` terminal columns."""
    return set_cell_size(word, width) if cell_len(word) <= width else set_cell_size(word, width - 1) + "…"


def _coloured(sample: SampleFacts, console: Console) -> None:
    """Maps next to each other where they fit, a legend below."""
    image = sample.image_class
    # Of a cell with the image's class the share of blends at which it has that, of another one the rest.
    shade = [
        [m if c == image else 1 - m for c, m in zip(*both, strict=True)]
        for both in zip(sample.cells, sample.margin, strict=True)
    ]
    maps: list[tuple[str, Cells, Shade]] = [("teacher", sample.cells, shade)]
    if sample.student is not None:
        title = f"student, agrees in {percent(sample.student.agreement)}"
        most = max(max(row) for row in sample.student.probability)
        maps.append((title, sample.student.cells, [[p / most for p in row] for row in sample.student.probability]))
    room = console.width - 2
    wide, high = _cell_size(sample.cells, room)
    if wide * len(sample.cells[0]) > room:
        grid = f"{len(sample.cells)} x {len(sample.cells[0])}"
        console.print(
            Text(f"a map of {grid} cells does not fit {console.width} columns: --png FILE draws it"), soft_wrap=True
        )
        maps = []
    titles = [title for title, *_ in maps] if sample.student is not None else []
    blocks = [_grid(cells, shades, sample.classes, wide, high) for _, cells, shades in maps]
    if (
        len(blocks) == 2
        and 2 * wide * len(sample.cells[0]) + GAP <= room
        and _fits(titles, wide * len(sample.cells[0]))
    ):
        width = wide * len(sample.cells[0]) + GAP
        console.print(Text(f"  {titles[0]:<{width}}{titles[1]}"))
        for left, right in zip(*blocks, strict=True):
            console.print(Text("  ") + left + Text(" " * GAP) + right, soft_wrap=True)
    else:
        for i, block in enumerate(blocks):
            if titles:
                console.print(Text(f"  {titles[i]}"))
            for line in block:
                console.print(Text("  ") + line, soft_wrap=True)
    for line in _legend(sample, console.width):
        console.print(line)


def _fits(titles: Sequence[str], width: int) -> bool:
    return len(titles[0]) < width + GAP


def _cell_size(cells: Cells, room: int) -> tuple[int, int]:
    """Columns and lines of a cell; (1, 0): two rows of cells to a line."""
    h, w = len(cells), len(cells[0])
    for wide, high, most in ((6, 3, 3), (4, 2, LARGE), (2, 1, max(h, w))):
        if max(h, w) <= most and wide * w <= room:
            return wide, high
    return 1, 0


def _grid(cells: Cells, shades: Shade, classes: Sequence[ClassFacts], wide: int, high: int) -> list[Text]:
    """The lines of one map."""
    known = {one.name: one for one in classes}
    paint = [
        [_shaded(_paint(known[c].colour), s) for c, s in zip(*both, strict=True)]
        for both in zip(cells, shades, strict=True)
    ]
    lines = []
    if high == 0:
        for i in range(0, len(cells), 2):
            line = Text()
            for j, upper in enumerate(paint[i]):
                lower = paint[i + 1][j] if i + 1 < len(cells) else None
                line.append("▀", Style(color=_colour(upper), bgcolor=None if lower is None else _colour(lower)))
            lines.append(line)
        return lines
    for row, colours in zip(cells, paint, strict=True):
        for k in range(high):
            line = Text()
            for name, colour in zip(row, colours, strict=True):
                letter = known[name].letter if k == (high - 1) // 2 else ""
                ink = INK if is_bright(colour) else PAPER
                line.append(f"{letter:^{wide}}", Style(color=_colour(ink), bgcolor=_colour(colour), bold=True))
            lines.append(line)
    return lines


def _legend(sample: SampleFacts, columns: int) -> Iterable[Text]:
    """A line for each class with a colour of its own, one for the rest, and what the shade means."""
    student = sample.student is not None
    yield Text(f"  {'':4}{'cells':>5}{'  student' if student else ''}", "dim")
    rest = [one for one in sample.classes if not one.letter]
    for one in sample.classes:
        if one.letter:
            yield _entry(one.colour, one.letter, _legend_words(one), one.share, one.student_share, columns)
    if rest:
        shares = sum(one.share for one in rest), sum(one.student_share or 0 for one in rest)
        words = counted(len(rest), "other class").replace("classs", "classes")
        yield _entry(rest[0].colour, "", words, shares[0], shares[1] if student else None, columns)
    yield Text("  bright: as here at nearly all blends", "dim")
    if sample.student is not None:
        most = max(max(row) for row in sample.student.probability)
        yield Text(f"  of the student: its probability, bright is {most:.2f}", "dim")


def _entry(colour: str, letter: str, words: str, share: float, student: float | None, columns: int) -> Text:
    paint = _paint(colour)
    line = Text("  ").append(
        f"{letter:^3}", Style(color=_colour(INK if is_bright(paint) else PAPER), bgcolor=_colour(paint), bold=True)
    )
    line.append(f" {percent(share):>5}")
    if student is not None:
        line.append(f"  {percent(student):>7}")
    room = max(4, columns - line.cell_len - 2)
    words = printable(words)
    return line.append("  " + (words if cell_len(words) <= room else _fit(words, room)))


def _paint(colour: str) -> Paint:
    r, g, b = bytes.fromhex(colour.removeprefix("#"))
    return r, g, b


def _shaded(paint: Paint, strength: float) -> Paint:
    """Darker the weaker it is."""
    r, g, b = (round(v * (FAINTEST + (1 - FAINTEST) * strength)) for v in paint)
    return r, g, b


def _colour(paint: Paint) -> Color:
    return Color.from_rgb(*paint)
