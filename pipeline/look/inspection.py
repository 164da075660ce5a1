"""What `cskd inspect` finds of a cache: the same for the table and, by `facts`, for --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_OPTIONAL = frozenset(
    ["segments_per_cell", "samples", "student", "png", "html", "partner", "partner_label", "box", "student_share"]
)  # not null but absent


def percent(share: float, digits: int = 0) -> str:
    """'27 %'."""
    return f"{100 * share:.{digits}f} %"


@dataclass(frozen=True)
class InventoryFacts:
    """The images a cache is of: `classes`, `samples` and `blocks` are counts."""

    id: str
    samples: int
    classes: int
    blocks: int


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher, as the manifest knows it; None: it does not."""

    model: str | None
    weights_sha256: str | None
    clean_top1: float | None  # a share, of `clean_images` of data.`clean_data`
    clean_images: int | None
    clean_data: str | None
    notes: Sequence[str]
    precision: Mapping[str, Any] | None  # `cskd.teacher.arithmetic.Precision.facts`


@dataclass(frozen=True)
class UnitPlace:
    """Where a unit belongs."""

    block: int
    view: int


@dataclass(frozen=True)
class UnitCounts:
    """How many units there are of those that there should be; the rest of `total` is broken."""

    views: int
    total: int
    present: int
    missing: int
    first_missing: Sequence[UnitPlace]


@dataclass(frozen=True)
class CodecFacts:
    """Bytes of a codec over all units that exist, and what it can do."""

    bytes: int
    target_bytes_per_view: float
    unit_bytes_per_view: float
    exact_hard: bool
    soft: bool
    cells: bool  # False: the image's targets alone
    has_classes: bool  # False: of a teacher without a classifier
    features: bool  # the teacher's feature map is kept
    error: str
    measured: Mapping[str, float] | None = (
        None  # `facts` of `Measured` or `MeasuredMap` in `cskd.codecs.measured`, of when its units were made; None: exact, or made by an older version
    )
    stage: str | None = None  # of the teacher, whose map is all that it holds

    @property
    def gives(self) -> str:
        """The targets that training can read from it, in words."""
        if self.stage is not None:
            return f"the map of the teacher's stage {self.stage}"
        if not self.cells:
            of_image = "its class, its logits" if self.soft else "its class" if self.has_classes else "no class"
            return f"features; of the image {of_image}" if self.features else f"of the image alone: {of_image}"
        return f"{'exact' if self.exact_hard else 'approximate'} hard targets{', soft ones' if self.soft else ''}"


@dataclass(frozen=True)
class Unreadable:
    """A sample without targets."""

    key: str
    reason: str


@dataclass(frozen=True)
class Quarantined:
    """How many samples have no targets, and the first of them."""

    samples: int
    first: Sequence[Unreadable]


@dataclass(frozen=True)
class Agreement:
    """Share of the cells of so many views whose target is the sample's label, or its or its partner's: blend -> share."""

    samples: int
    own: Mapping[str, float]
    own_or_partner: Mapping[str, float]


@dataclass(frozen=True)
class Segments:
    """Pieces of a cell's upper envelope."""

    mean: float
    most: int


@dataclass(frozen=True)
class MixingFacts:
    """How a view was mixed; without a partner where it was not, with a box [top, bottom, left, right] where it was cut."""

    mode: str
    own_share: float
    partner: str | None = None  # its key
    partner_label: str | None = None
    box: Sequence[int] | None = None


@dataclass(frozen=True)
class ClassFacts:
    """A class of one view: its letter and colour in every picture of it, and its share of the cells.

    letter: '' for a class that shares the grey of the rest; colour: '#rrggbb'; roles: of 'image' (the teacher's class of the
    whole image), 'label', 'partner'; student_share: None without a student.
    """

    name: str
    words: str  # for people; another text than `name` for WordNet ids
    letter: str
    colour: str
    roles: Sequence[str]
    share: float
    student_share: float | None = None


@dataclass(frozen=True)
class StudentCells:
    """What a student says of the view: the class of its largest patch logit in each cell, [h][w] names, and the softmax
    probability of that class, [h][w]; `agreement`: share of the cells whose class is that of the teacher's `cells`."""

    cells: Sequence[Sequence[str]]
    probability: Sequence[Sequence[float]]
    agreement: float


@dataclass(frozen=True)
class SampleFacts:
    """One view of one sample: what it is, whether it replays, and the class of each cell at a blend.

    cells: names, [h][w], rows from the top; margin: [h][w], blend up to which the cell has the image's class, 1: at every one;
    classes: all that occur, in the order of their letters.
    """

    sample: int
    key: str
    view: int
    seed: str
    label: str
    mixing: MixingFacts
    replay: str  # 'equal', or why not
    codec: str
    blend: float
    image_class: str
    cells: Sequence[Sequence[str]]
    margin: Sequence[Sequence[float]]
    classes: Sequence[ClassFacts]
    student: StudentCells | None = None  # None: none was asked for
    of_image: bool = False  # the target is of the image alone, and stands in every cell


@dataclass(frozen=True)
class EpochAgreement:
    """Agreement after an epoch, counted from 1.

    trained: over the views of that epoch with its targets, as training logged it; shown: of the weights that were saved after it,
    over the views that are shown, with their targets at the blend that is shown. None: not logged, or not saved.
    """

    epoch: int
    trained: float | None
    shown: float | None


@dataclass(frozen=True)
class StudentFacts:
    """A student that is compared with the teacher, and its agreement over all cells of the views that are shown."""

    run: str
    weights: str  # which, in words
    epochs_done: int | None  # None: there is no log next to the weights
    epochs: int | None  # of its whole training
    patch_grid: Sequence[int]  # rows, columns of its patches; they are pooled to the teacher's grid
    agreement: float
    views: int
    by_epoch: Sequence[EpochAgreement]
    notes: Sequence[str]


@dataclass(frozen=True)
class PageFacts:
    """A page that was written: its path, its length, and how many samples and views it shows, how many without a picture."""

    path: str
    bytes: int
    samples: int
    views: int
    without_picture: int


@dataclass(frozen=True)
class Inspection:
    """All of it. `errors`: what is wrong with single units, one line each."""

    cache: str
    format: int
    container: str  # of its units: zarr or webdataset
    fingerprint: str
    inventory: InventoryFacts
    teacher: TeacherFacts
    grid: Sequence[int]
    recipe: Mapping[str, Any]
    units: UnitCounts
    sealed: bool
    codecs: Mapping[str, CodecFacts]
    quarantined: Quarantined
    measured_units: int  # that agreement and segments are from
    agreement: Mapping[str, Agreement]  # of 'mixed' and 'unmixed' views, where there are any
    segments_per_cell: Segments | None  # None: no envelope was read
    errors: Sequence[str]
    samples: Sequence[SampleFacts] | None = None  # None: none was asked for
    student: StudentFacts | None = None
    png: str | None = None
    html: PageFacts | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON; a key of what there is not is absent."""
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if v is not None or k not in _OPTIONAL})
