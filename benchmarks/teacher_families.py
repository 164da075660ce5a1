"""Which timm families have exact dense logits? Builds one model of each, tries its head, and prints a table.

    python -m benchmarks.teacher_families [--features] [--write docs/TEACHERS.md] [MODEL ...]

Weights are random, 1000 classes, each model at its own input size: whether a head is linear in the mean of the cells
does not depend on what was learnt. With `--features` the other table: which families keep their last map or tokens in rows and
columns, for `teacher.dense: none`; of small models, since depth does not matter for that. `--write` puts the table between the two marks of that file. 3 minutes on 2 cores.
Prints the machine, the table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from cskd.config import TeacherConfig
from cskd.errors import TeacherError
from cskd.teacher.model import Teacher, load_teacher

NAMES = [str(i) for i in range(1000)]
MARKS = ("<!-- families: begin -->", "<!-- families: end -->")
FEATURE_MARKS = ("<!-- features: begin -->", "<!-- features: end -->")
SHALLOW: dict[str, Any] = {"depth": 2}
BARE: dict[str, Any] = {"num_classes": 0}
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {  # family -> model, and what makes it small
    "ViT": ("vit_tiny_patch16_224", SHALLOW),
    "DINOv2": ("vit_small_patch14_dinov2", SHALLOW | BARE | {"img_size": 70}),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", SHALLOW | BARE | {"img_size": 70}),
    "DeiT": ("deit_tiny_patch16_224", SHALLOW),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", SHALLOW),
    "DeiT III": ("deit3_small_patch16_224", SHALLOW),
    "Mixer": ("mixer_s32_224", {}),
    "ResNet, no classifier": ("resnet10t", BARE),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1)}),
    "Swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
    "EVA-02": ("eva02_tiny_patch14_224", SHALLOW),
    "BEiT": ("beit_base_patch16_224", {"depth": 1}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"depth": 1} | BARE),
    "CLIP ViT": ("vit_base_patch32_clip_224", {"depth": 1}),
    "DINOv3": ("vit_small_patch16_dinov3", SHALLOW | BARE),
    "XCiT": ("xcit_nano_12_p16_224", SHALLOW),
    "CaiT": ("cait_xxs24_224", SHALLOW),
    "PVT v2": ("pvt_v2_b0", {}),
    "PiT": ("pit_ti_224", {}),
    "LeViT": ("levit_128s", {}),
    "EfficientFormer": ("efficientformer_l1", {}),
    "Hiera": ("hiera_tiny_224", {}),
    "MViT v2": ("mvitv2_tiny", {}),
    "CrossViT": ("crossvit_9_240", {}),
}
MODELS = {  # family -> its smallest member, or nearly so
    "ResNet": "resnet18",
    "ResNeXt": "resnext50_32x4d",
    "Wide ResNet": "wide_resnet50_2",
    "ResNetV2": "resnetv2_50",
    "Res2Net": "res2net50_14w_8s",
    "ResNeSt": "resnest14d",
    "SENet": "seresnet50",
    "SKNet": "skresnet18",
    "RegNet": "regnety_002",
    "EfficientNet": "efficientnet_b0",
    "EfficientNet (TF)": "tf_efficientnet_b0",
    "EfficientNetV2": "tf_efficientnetv2_b0",
    "MixNet": "mixnet_s",
    "MnasNet": "mnasnet_small",
    "MobileNetV2": "mobilenetv2_100",
    "MobileNetV3": "mobilenetv3_small_100",
    "MobileNetV4": "mobilenetv4_conv_small",
    "LCNet": "lcnet_050",
    "GhostNet": "ghostnet_100",
    "MobileOne": "mobileone_s0",
    "RepVGG": "repvgg_a0",
    "RepViT": "repvit_m1",
    "ReXNet": "rexnet_100",
    "DenseNet": "densenet121",
    "DLA": "dla34",
    "DPN": "dpn48b",
    "HRNet": "hrnet_w18_small",
    "Inception v3": "inception_v3",
    "Inception v4": "inception_v4",
    "Inception-ResNet": "inception_resnet_v2",
    "Xception": "legacy_xception",
    "Xception (aligned)": "xception41",
    "NASNet": "nasnetalarge",
    "PNASNet": "pnasnet5large",
    "NFNet": "nfnet_l0",
    "CSPNet": "cspresnet50",
    "VoVNet": "ese_vovnet19b_dw",
    "TResNet": "tresnet_m",
    "SelecSLS": "selecsls42b",
    "HGNet": "hgnet_tiny",
    "VGG": "vgg11_bn",
    "FastViT": "fastvit_t8",
    "StarNet": "starnet_s1",
    "NextViT": "nextvit_small",
    "ConvNeXt": "convnext_atto",
    "ConvNeXt V2": "convnextv2_atto",
    "InceptionNeXt": "inception_next_atto",
    "EdgeNeXt": "edgenext_xx_small",
    "MambaOut": "mambaout_femto",
    "PoolFormer": "poolformer_s12",
    "CoAtNet": "coatnet_nano_rw_224",
    "CLIP ResNet": "resnet50_clip",
    "Swin": "swin_tiny_patch4_window7_224",
    "EfficientFormer": "efficientformer_l1",
    "DeiT": "deit_tiny_patch16_224",
}


@dataclass(frozen=True)
class Row:
    family: str
    model: str
    pixels: int | None
    grid: list[int] | None
    gap: float | None
    verdict: str  # exact, per_cell or refused
    head: str  # its layers, or why there is none
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm names; default: one of each family")
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--features", action="store_true", help="the table of teacher.dense: none")
    args = parser.parse_args()
    if args.features:
        return features(args.models, args.write)
    asked = {name: name for name in args.models} or MODELS
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, ", end="")
    print(f"timm {timm.__version__}, Python {platform.python_version()}")
    rows = []
    for family, name in asked.items():
        rows.append(examine(family, name))
        print(line(rows[-1]), flush=True)
    if args.write:
        head = ["| family | model | pixels | grid | gap | dense | head |", "|---|---|---|---|---|---|---|"]
        write(args.write, head, list(map(line, rows)))
    print(json.dumps({"benchmark": "teacher_families", "timm": timm.__version__, "rows": [asdict(r) for r in rows]}))


def features(names: list[str], path: Path | None) -> None:
    """Print the table of maps and tokens, and write it."""
    rows = []
    for family, (name, kwargs) in FEATURES.items() if not names else {n: (n, {}) for n in names}.items():
        rows.append(feature_line(family, name, kwargs))
        print(rows[-1], flush=True)
    if path:
        head = [
            "| family | model | pixels | grid | channels | map | logits of the image |",
            "|---|---|---|---|---|---|---|",
        ]
        write(path, head, rows, FEATURE_MARKS)


def feature_line(family: str, name: str, kwargs: dict[str, Any]) -> str:
    """A row of that table: what `teacher.dense: none` gives, or why it does not."""
    torch.manual_seed(0)
    kwargs = {"num_classes": len(NAMES), **kwargs}
    config = TeacherConfig(model=name, kwargs=kwargs, dense="none", batch=4, input_size=kwargs.get("img_size"))
    try:
        teacher = load_teacher(config, NAMES, torch.device("cpu"), 224)
    except TeacherError as e:
        reason = str(e).partition("; take")[0].removeprefix("the teacher").removeprefix("'s").strip()
        return f"| {family} | `{name}` | | | | refused | {reason} |"
    logits = "yes" if teacher.has_classes else "no: no classifier"
    channels, (h, w) = teacher.feature_channels("the table"), teacher.grid
    return (
        f"| {family} | `{name}` | {teacher.preprocess.size} | {h}x{w} | {channels} | {teacher.head.layers} | {logits} |"
    )


def examine(family: str, name: str) -> Row:
    """Load a model as a teacher, exactly if that goes, else cell by cell."""
    start = time.perf_counter()
    try:
        teacher, verdict = load(name, "exact"), "exact"
    except TeacherError:
        try:
            teacher, verdict = load(name, "per_cell"), "per_cell"
        except TeacherError as e:
            reason = str(e).partition(", expected")[0].partition(":")[0].removeprefix("the teacher's ")
            return Row(family, name, None, None, None, "refused", reason, round(time.perf_counter() - start, 1))
    head, layers = teacher.head, " > ".join(layer.rpartition(" ")[2] for layer in teacher.head.layers.split(" > "))
    seconds = round(time.perf_counter() - start, 1)
    return Row(family, name, teacher.preprocess.size, list(teacher.grid), head.gap, verdict, layers, seconds)


def load(name: str, dense: str) -> Teacher:
    torch.manual_seed(0)
    config = TeacherConfig(model=name, kwargs={"num_classes": len(NAMES)}, dense=dense)  # type: ignore[arg-type]
    return load_teacher(config, NAMES, torch.device("cpu"), 224)


def line(row: Row) -> str:
    grid = f"{row.grid[0]}x{row.grid[1]}" if row.grid else ""
    gap = "" if row.gap is None else f"{row.gap:.1e}"
    cells = (row.family, f"`{row.model}`", str(row.pixels or ""), grid, gap, row.verdict, row.head)
    return "| " + " | ".join(cells) + " |"


def write(path: Path, head: list[str], rows: list[str], marks: tuple[str, str] = MARKS) -> None:
    """Replace what stands between the marks by the table."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    made = f"timm {timm.__version__}, torch {torch.__version__}:"
    table = "\n".join([marks[0], made, "", *head, *rows, marks[1]])
    path.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
