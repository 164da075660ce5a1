"""What `cskd inspect` finds of a cache: the same for the table and, by `facts`, for --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_OPTIONAL = frozenset(
    ["segments_per_cell", "sample", "png", "html", "partner", "partner_label", "box"]
)  # not null but absent


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
    error: str
    measured: Mapping[str, float] | None = (
        None  # `cskd.codecs.measured.Measured.facts`, of when its units were made; None: exact, or made by an older version
    )

    @property
    def gives(self) -> str:
        """The targets that training can read from it, in words."""
        if not self.cells:
            return "of the image alone: its class, its logits"
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
class SampleFacts:
    """One view of one sample: what it is, whether it replays, and the class of each cell at a blend."""

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
    names: Mapping[str, str]  # of every class that occurs, for people


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
    sample: SampleFacts | None = None  # None: none was asked for
    png: str | None = None
    html: PageFacts | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON; a key of what there is not is absent."""
        return asdict(self, dict_factory=lambda items: {k: v for k, v in items if v is not None or k not in _OPTIONAL})
