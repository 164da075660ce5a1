"""Which timm families can be students of the dense method? Takes one step with one model of each, and prints a table.

    python -m benchmarks.student_families [--write docs/STUDENTS.md] [MODEL[:PIXELS] ...]

First weights, 10 classes, small images where the model takes them: 4 views, `cskd-hard` on random targets for all the cells it
has (7 x 7 at most), forward, backward and an AdamW step. `--write` puts the table between the two marks of that file. About 7
minutes on 2 cores. Prints the machine, the table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch

from cskd.config import LossConfig, StudentConfig, TrainConfig
from cskd.errors import StudentError
from cskd.method.losses import DistillationLoss, HardTargets, MixedLabels
from cskd.student import Student, build_student
from cskd.student.model import MapStudent
from cskd.student.optim import Optimisation

MARKS = ("<!-- families: begin -->", "<!-- families: end -->")
CLASSES, VIEWS, MOST_CELLS = 10, 4, 7
MODELS = {  # family -> a small member, and the pixels of the step
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", 64),
    "ViT": ("vit_tiny_patch16_224", 64),
    "DeiT III": ("deit3_small_patch16_224", 64),
    "ViT with registers": ("vit_medium_patch16_reg4_gap_256", 64),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", 56),
    "DINOv3": ("vit_small_patch16_dinov3", 64),
    "SigLIP": ("vit_base_patch16_siglip_224", 64),
    "EVA-02": ("eva02_tiny_patch14_224", 56),
    "BEiT": ("beit_base_patch16_224", 64),
    "CaiT": ("cait_xxs24_224", 64),
    "XCiT": ("xcit_nano_12_p16_224", 64),
    "ConViT": ("convit_tiny", 64),
    "MLP-Mixer": ("mixer_s32_224", 64),
    "Swin": ("swin_tiny_patch4_window7_224", 64),
    "Swin V2": ("swinv2_tiny_window8_256", 64),
    "Swin V2, CR": ("swinv2_cr_tiny_224", 64),
    "PVT v2": ("pvt_v2_b0", 64),
    "MViT v2": ("mvitv2_tiny", 64),
    "Hiera": ("hiera_tiny_224", 224),
    "NesT": ("nest_tiny", 64),
    "Twins": ("twins_svt_small", 64),
    "DaViT": ("davit_tiny", 64),
    "FocalNet": ("focalnet_tiny_srf", 64),
    "CoAtNet": ("coatnet_nano_rw_224", 64),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", 64),
    "EfficientFormer": ("efficientformer_l1", 224),
    "EfficientFormer V2": ("efficientformerv2_s0", 224),
    "EfficientViT": ("efficientvit_b0", 64),
    "LeViT": ("levit_128s", 224),
    "MobileViT": ("mobilevit_xxs", 64),
    "FastViT": ("fastvit_t8", 64),
    "EdgeNeXt": ("edgenext_xx_small", 64),
    "TinyViT": ("tiny_vit_5m_224", 224),
    "PoolFormer": ("poolformer_s12", 64),
    "ConvNeXt": ("convnext_atto", 64),
    "ConvNeXt V2": ("convnextv2_atto", 64),
    "ResNet": ("resnet18", 64),
    "MobileNetV3": ("mobilenetv3_small_050", 64),
    "PiT": ("pit_ti_224", 224),
    "CrossViT": ("crossvit_tiny_240", 240),
    "CoaT": ("coat_tiny", 224),
}


@dataclass(frozen=True)
class Row:
    family: str
    model: str
    pixels: int
    features: str  # as `forward_features` gives them, with the tokens before the grid
    cells: list[int] | None
    taught: bool  # whether a step was taken with the cells taught
    notes: str  # what is special about its head; or why it was refused
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm names, with :PIXELS; default: one of each family")
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    args = parser.parse_args()
    asked = {name: (name.partition(":")[0], int(name.partition(":")[2] or 224)) for name in args.models} or MODELS
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, ", end="")
    print(f"timm {timm.__version__}, Python {platform.python_version()}")
    rows = []
    for family, (name, pixels) in asked.items():
        rows.append(examine(family, name, pixels))
        print(line(rows[-1]), flush=True)
    if args.write:
        write(args.write, rows)
    print(json.dumps({"benchmark": "student_families", "timm": timm.__version__, "rows": [asdict(r) for r in rows]}))


def examine(family: str, name: str, pixels: int) -> Row:
    """Build a model as a student and take one step on all of its cells."""
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        student = build_student(StudentConfig(name), CLASSES, pixels)
        found = list(student.patch_grid)
        if found == [1, 1]:
            raise StudentError("one vector per image: no cells, so deit-* and none alone")
    except StudentError as e:
        seconds = round(time.perf_counter() - start, 1)
        return Row(family, name, pixels, "", None, False, reason(name, e), seconds)
    prefix = student.layout.prefix if isinstance(student, MapStudent) else student.backbone.num_prefix_tokens
    axes = student.layout.axes if isinstance(student, MapStudent) else "NLC"
    idle = take_step(student)
    special = [word for word in ("not linear", "batch norm", "norm before") if any(word in n for n in student.notes)]
    notes = ", ".join([*special, *([f"no gradient: {idle[0]}"] if idle else [])])
    seconds = round(time.perf_counter() - start, 1)
    return Row(family, name, pixels, axes + (f", {prefix} before" if prefix else ""), found, True, notes, seconds)


def reason(name: str, error: StudentError) -> str:
    return str(error).removeprefix(f"student.model {name} ").partition("; take another model")[0]


def take_step(student: Student) -> list[str]:
    """One update by cskd-hard. Returns the parameters that got no gradient. Raises ValueError for numbers that are not finite."""
    rows, columns = (min(MOST_CELLS, n) for n in student.patch_grid)
    made = torch.Generator().manual_seed(0)
    label, cells = (
        torch.randint(student.num_classes, shape, generator=made) for shape in [(VIEWS,), (VIEWS, rows, columns)]
    )
    optimisation = Optimisation(student, TrainConfig(epochs=1, warmup_epochs=0, autocast="none"), 1)
    output = student.train()(torch.randn(VIEWS, 3, *student.image_size, generator=made), (rows, columns))
    labels = MixedLabels(label, label.flip(0), torch.full((VIEWS,), 0.7))
    loss, _ = DistillationLoss(LossConfig())(output, labels, HardTargets(label.roll(1), cells))
    torch.autograd.backward(loss)
    idle = [name for name, p in student.named_parameters() if p.grad is None]
    optimisation.optimizer.step()
    if not all(p.isfinite().all() for p in student.parameters()):
        raise ValueError("the step gave weights that are not finite")
    return idle


def line(row: Row) -> str:
    cells = f"{row.cells[0]}x{row.cells[1]}" if row.cells else ""
    parts = (
        row.family,
        f"`{row.model}`",
        str(row.pixels),
        row.features,
        cells,
        "yes" if row.taught else "no",
        row.notes,
    )
    return "| " + " | ".join(parts) + " |"


def write(path: Path, rows: list[Row]) -> None:
    """Replace what stands between the marks by the table."""
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    head = [
        "| family | model | pixels | features | cells | taught | head, or why not |",
        "|---|---|---|---|---|---|---|",
    ]
    made = f"timm {timm.__version__}, torch {torch.__version__}:"
    table = "\n".join([MARKS[0], made, "", *head, *map(line, rows), MARKS[1]])
    path.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
