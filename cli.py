"""The command line: parse, import lazily, call. Every command prints for people, or one JSON object with --json.

Exit codes: 0; 1 failed, and says why in one line; 2 usage; 130 / 143 interrupted, and prints the line that resumes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]  # it imports both
from typer.core import TyperGroup

import cskd
from cskd.files.paths import is_remote, local_path
from cskd.machine.ending import ended
from cskd.pipeline.launch.options import Cluster, Options, takes
from cskd.pipeline.show.arguments import (
    OF_CACHE,
    OF_CONFIG,
    OF_DATA,
    OF_RUN,
    AllowIncomplete,
    CachePath,
    Classes,
    ConfigPath,
    Data,
    HubCachePath,
    Json,
    KeyPrefix,
    LabelKey,
    Set,
    Split,
    of_their_kinds,
)
from cskd.pipeline.show.arguments import path_of as _path
from cskd.pipeline.show.report import print_report as _print

COMPLETE = "_CSKD_COMPLETE"  # by which the script of `cskd completion` asks for what may come next

app = typer.Typer(
    name="cskd",
    cls=TyperGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a CNN into a ViT from a teacher cache that is computed once (CSKD, arXiv 2307.08500).",
)

START, DATA, STAGES, CACHES, CONFIGS = "Begin", "Data", "Stages", "Caches", "Configs and shell"  # groups of --help


def _command(group: str, example: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of a group, with a line of its help that can be typed as it is."""
    register = app.command(name, rich_help_panel=group, epilog=f"Example: {example}")
    return lambda command: register(of_their_kinds(command, example.split()[1]))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(cskd.__version__)
        raise typer.Exit


@_command(START, "cskd demo")
def demo(
    out: Annotated[Path, typer.Argument(parser=_path("OUT"), help="Folder for everything it makes.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every student.")] = None,
    json_: Json = False,
) -> None:
    """Everything on real handwritten digits, in minutes on a CPU."""
    from cskd.pipeline.demo import render, run_demo

    _print(run_demo(out, epochs=epochs, quiet=json_), json_, render)


@_command(DATA, "cskd pack /data/imagenet/train data/imagenet/train")
def pack(
    src: Annotated[
        Path,
        typer.Argument(
            parser=_path("SRC", takes=("images", "tar", *OF_DATA)),
            help="Folder of class folders, a tar, tar.gz or zip of one, parquet files, or webdataset shards.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(parser=_path("OUT", objects=True), help="Folder or address for the shards and their inventory."),
    ],
    classes: Classes = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 4096,
    block: Annotated[int, typer.Option(min=1, help="Images a block of whole shards: the unit of the cache.")] = 8192,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many of the shuffled images.")] = None,
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Re-encode images whose short side is larger, pixels.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Store pixels as they are (PPM): nothing is left to decode, more to read.")
    ] = False,
    split: Split = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            parser=_path("--labels"),
            metavar="FILE",
            help="CSV, TSV or JSONL of paths and labels, or ImageNet's devkit; of parquet: the label column.",
        ),
    ] = None,
    label_key: LabelKey = None,
    key_prefix: KeyPrefix = "none",
    allow_incomplete: AllowIncomplete = False,
    json_: Json = False,
) -> None:
    """A data set as it was downloaded to shuffled webdataset shards with an inventory."""
    from cskd.pipeline.pack import pack_data, render

    prefix = None if key_prefix == "none" else key_prefix
    report = pack_data(
        *(src, out, classes, seed, shard_size, block, limit, short_side, raw, split, labels),
        label_key=label_key,
        key_prefix=prefix,
        allow_incomplete=allow_incomplete,
        quiet=json_,
    )
    _print(report, json_, render)


@_command(DATA, "cskd index /data/shards --classes names.txt")
def index(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARDS...",
            parser=_path("SHARDS", takes=("shards", "tar", *OF_DATA)),
            help="webdataset shards: folders, .tar files, quoted globs, or names with {000..146}.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=_path("--out"), help="Folder for the inventory; by default that of the shards."),
    ] = None,
    classes: Classes = None,
    block: Annotated[int, typer.Option(min=1, help="Images a block of whole shards: the unit of the cache.")] = 8192,
    split: Split = None,
    label_key: LabelKey = None,
    key_prefix: KeyPrefix = "none",
    allow_incomplete: AllowIncomplete = False,
    json_: Json = False,
) -> None:
    """The inventory of existing webdataset shards, which stay as they are."""
    from cskd.pipeline.pack import index_data, render

    prefix = None if key_prefix == "none" else key_prefix
    report = index_data(shards, out, classes, block, split, label_key, prefix, allow_incomplete, quiet=json_)
    _print(report, json_, render)


@_command(STAGES, "cskd plan my.yaml --students 4")
def plan(
    config: ConfigPath,
    set_: Set = None,
    students: Annotated[int, typer.Option(min=1, help="Students that will be trained from the cache.")] = 1,
    images: Annotated[
        int | None, typer.Option(min=4, help="Training images, where they are not packed yet; default: ImageNet's.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that each stage is watched for.")] = 8.0,
    json_: Json = False,
) -> None:
    """What a config will take on this machine, measured in about a minute, and whether a cache pays; caches nothing."""
    from cskd.config import load_config
    from cskd.pipeline.planning.plan import plan, render

    _print(plan(load_config(config, set_), students, images, seconds, quiet=json_), json_, render)


@_command(STAGES, "cskd cache-teacher my.yaml --set cache.device=cuda:1", name="cache-teacher")
def cache_teacher(
    config: ConfigPath,
    more: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MORE",
            parser=_path("CONFIG", takes=OF_CONFIG),
            help="Configs of more teachers, in the same pass over the images.",
        ),
    ] = None,
    set_: Set = None,
    devices: Annotated[
        str | None,
        typer.Option(metavar="WHICH", help="A process a device: all, 4, cuda:0,2 or cpu:2; instead of cache.device."),
    ] = None,
    json_: Json = False,
) -> None:
    """Stage 1: run the teacher once over every view. The same command resumes."""
    from cskd.config import load_config
    from cskd.pipeline.cache_teacher import cache_joint, cache_teacher, render, render_joint
    from cskd.pipeline.many_devices import cache_teacher_on

    settings = load_config(config, set_)
    if more:
        joint = cache_joint([settings, *(load_config(one, set_) for one in more)], devices, quiet=json_)
        _print(joint, json_, render_joint)
        return
    report = cache_teacher_on(settings, devices, json_) if devices else cache_teacher(settings, quiet=json_)
    _print(report, json_, render)


@_command(STAGES, "cskd train my.yaml --set train.epochs=100")
def train(
    config: ConfigPath,
    set_: Set = None,
    verify_replay: Annotated[bool, typer.Option(help="Check the digest of every sample.")] = True,
    online: Annotated[bool, typer.Option("--online", help="No cache: run the teacher at every step.")] = False,
    json_: Json = False,
) -> None:
    """Stage 2: train the student from the cache; the teacher never runs (but see --online). The same command resumes."""
    from cskd.config import load_config
    from cskd.pipeline.train import render, train

    _print(train(load_config(config, set_), verify_replay=verify_replay, online=online, quiet=json_), json_, render)


@_command(STAGES, "cskd launch slurm my.yaml --workers 16 --time 4:00:00")
@takes(Options, typer.Option)
def launch(
    cluster: Annotated[Cluster, typer.Argument(metavar="slurm|k8s|ray", help="What the cluster is run by.")],
    config: ConfigPath,
    set_: Set = None,
    output: Annotated[
        Path | None, typer.Option(parser=_path("--output"), help="Folder for the files; default: launch/NAME.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit them, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show them, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """The files with which a cluster runs both stages: an array or a pool of workers, and torchrun after it."""
    from cskd.pipeline.launch.launch import launch, render

    _print(launch(cluster, config, set_, output, Options(**options), force, dry_run, submit), json_, render)


@_command(STAGES, "cskd eval runs/mine data/imagenet/val", name="eval")
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=_path("CHECKPOINT", hub=True, objects=True, takes=OF_RUN),
            help="Result folder of cskd train, or its hf:// or s3:// address.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            parser=_path("DATA", objects=True, takes=OF_DATA), help="Folder made by cskd pack, or its address."
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 2,
    crop_pct: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of the short side; default: as in training.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    autocast: Annotated[
        Literal["none", "bf16", "fp16", "auto"],
        typer.Option(help="none: float32; auto: bf16, or fp16, where the device gains by it."),
    ] = "none",
    confusion: Annotated[
        Path | None,
        typer.Option(
            parser=_path("--confusion"), help="Write here what each class is taken for: a PNG, and a CSV of its name."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Top-1 and top-5 of every head of a trained student, and of their averages."""
    from cskd.pipeline.evaluate import evaluate_checkpoint, render

    report = evaluate_checkpoint(checkpoint, data, batch, workers, crop_pct, device, json_, autocast, confusion)
    _print(report, json_, render)


@_command(CACHES, "cskd inspect caches/mine --sample 0 --png map.png")
def inspect(
    cache: HubCachePath,
    data: Data = None,
    sample: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Key or number of a sample to show; repeatable.")
    ] = None,
    view: Annotated[int, typer.Option(help="Which view of it.")] = 0,
    blend: Annotated[
        float | None,
        typer.Option(help="1 = each cell's own logits, 0 = the whole image's; default 0.5, with --student 1."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(parser=_path("--png"), help="Write the sample's picture here, or a sheet of several samples."),
    ] = None,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="List all samples without targets, one a line: key, shard, reason.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(parser=_path("--html"), help="Write a page of many samples here, for a browser.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show N samples in all; default 64 of a page, 16 of a sheet."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 0,
    student: Annotated[
        Path | None,
        typer.Option(
            parser=_path("--student", takes=OF_RUN),
            metavar="RUN",
            help="Compare a run of cskd train, or weights in it, cell by cell.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """What a cache holds: a table; samples in the terminal, as a picture, or as a page; a student next to the teacher."""
    from cskd.pipeline.look.inspect_cache import inspect, render
    from cskd.pipeline.look.quarantined import list_quarantined, render_list

    cache = cache if is_remote(cache) else local_path(cache, "CACHE", hub=True)
    if quarantined:
        _print(list_quarantined(cache, data), json_, render_list)
        return
    what: dict[str, Any] = dict(sample=sample, view=view, blend=blend, samples=samples, seed=seed, student=student)
    facts = inspect(cache, data=data, png=png, html=html, **what)
    _print(facts, json_, render)


@_command(CACHES, "cskd verify caches/mine --images --replay 100")
def verify(
    cache: Annotated[
        Path,
        typer.Argument(
            metavar="CACHE|DATA",
            parser=_path("CACHE|DATA", hub=True, objects=True, takes=(*OF_CACHE, *OF_DATA)),
            help="Folder made by cskd cache-teacher, pack or index, or its s3:// address; of a cache its hf:// address, too.",
        ),
    ],
    data: Data = None,
    images: Annotated[
        bool, typer.Option("--images", help="Read every image of the shards too; of a data folder, decode each.")
    ] = False,
    replay: Annotated[int, typer.Option(min=0, metavar="N", help="Make N views again, compare their digests.")] = 0,
    recompute: Annotated[int, typer.Option(min=0, metavar="N", help="Run the teacher on N views again.")] = 0,
    device: Annotated[str, typer.Option(help="For --recompute: auto, cpu, cuda, ...")] = "auto",
    json_: Json = False,
) -> None:
    """Read every byte of a cache, or every image of a data folder; exit code 1 names what is missing or damaged."""
    from cskd.pipeline.care import verify, verify_images

    report: Any
    cache = cache if is_remote(cache) else local_path(cache, "CACHE", hub=True)
    if verify_images.is_data(cache, images):
        report = verify_images.verify_images(cache, images, data, bool(replay or recompute), quiet=json_)
        _print(report, json_, verify_images.render)
    else:
        report = verify.verify(
            cache, data=data, images=images, replay=replay, again=recompute, device=device, quiet=json_
        )
        _print(report, json_, verify.render)
    if not report.sound:
        raise typer.Exit(1)


@_command(CACHES, "cskd repair caches/mine")
def repair(cache: CachePath, data: Data = None, json_: Json = False) -> None:
    """Withdraw what is damaged in a cache, and make only that again; exit code 0 when it is whole."""
    from cskd.pipeline.care.repair import render, repair

    _print(repair(cache, data=data, quiet=json_), json_, render)


@_command(CACHES, "cskd export caches/mine targets --blends 1 0.5 0")
def export(
    cache: CachePath,
    out: Annotated[
        Path,
        typer.Argument(
            parser=_path("OUT", objects=True), help="Folder or address for the tars, or for the other cache."
        ),
    ],
    more_blends: Annotated[
        list[str] | None, typer.Argument(metavar="BLEND", hidden=True, help="Further blends.")
    ] = None,
    data: Data = None,
    blends: Annotated[
        list[str] | None,
        typer.Option(metavar="A B ...", help="Of the cells' classes: 1 = each cell's own, 0 = the image's; 1 0.5 0."),
    ] = None,
    envelope: Annotated[bool, typer.Option("--envelope", help="The classes at every blend, not at some.")] = False,
    views: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N views.")] = None,
    container: Annotated[
        Literal["webdataset", "zarr"] | None,
        typer.Option(help="Write a cache that `cskd train` reads, its units in this container; no image is needed."),
    ] = None,
    json_: Json = False,
) -> None:
    """Targets as webdataset tars that join the image shards by key; or the cache in another container."""
    from cskd.pipeline.care.export import export, render

    _print(export(cache, out, data, blends, more_blends or [], envelope, views, container, json_), json_, render)


@_command(CACHES, "cskd gc caches/mine --dry-run")
def gc(
    cache: CachePath,
    older_than: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Leave younger files alone.")] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Remove files that killed writers left behind in a cache."""
    from cskd.pipeline.care.gc import gc, render

    _print(gc(cache, older_than=older_than, dry_run=dry_run, data=data), json_, render)


@_command(CACHES, "cskd push runs/mine OWNER/NAME --dry-run")
def push(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CACHE",
            parser=_path("RUN|CACHE", objects=True, takes=("run", "cache")),
            help="Folder of cskd train or cskd cache-teacher, or its s3://, gs:// or az:// address.",
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="A run goes to a model repository, a cache to a data set.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is new.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Made where there is none.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="A cache that is not sealed, too: what there is of it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list files and sizes; nothing is sent.")] = False,
    json_: Json = False,
) -> None:
    """Put a run or a cache on the Hugging Face hub. The same command resumes, and sends only what differs."""
    from cskd.pipeline.hub.push import push, render

    how: dict[str, Any] = dict(private=private, revision=revision, message=message, allow_incomplete=allow_incomplete)
    report = push(source, repo, dry_run=dry_run, quiet=json_, **how)
    _print(report, json_, render)


@_command(START, "cskd doctor my.yaml")
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", parser=_path("CONFIG", takes=OF_CONFIG), help="YAML config of the run to look at it for."
        ),
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Versions, decoder, cores, threads, disk and GPU of this machine; exit code 1 when something is broken."""
    from cskd.config import load_config
    from cskd.pipeline.doctor import doctor, render

    report = doctor(load_config(config, set_) if config else None)
    _print(report, json_, render)
    if not report.ok:
        raise typer.Exit(1)


@_command(CONFIGS, "cskd config my.yaml --set train.epochs=100")
def config(config: ConfigPath, set_: Set = None, json_: Json = False) -> None:
    """Every value of a config with where it comes from: a default, a line of the file, or --set; YAML that can be used again."""
    from cskd.config.origins import as_yaml, resolve

    resolved = resolve(config, set_)
    _print(resolved, json_, lambda report, console: print(as_yaml(report), end=""))


@_command(CONFIGS, "cskd configs cifar10 > my.yaml")
def configs(
    name: Annotated[str | None, typer.Argument(help="Print that one; without it all are listed.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Write it to NAME.yaml in the current folder.")] = False,
    json_: Json = False,
) -> None:
    """The configs that come with the program: a list, the text of one, or a copy of it to change."""
    from cskd.config.shipped import as_text, copy_config, shipped, shipped_config

    if copy:
        print(copy_config(name, Path()))
    elif name and not json_:
        print(shipped_config(name).text, end="")
    else:
        _print(
            shipped_config(name) if name else shipped(), json_, lambda report, console: print(as_text(report), end="")
        )


@_command(CONFIGS, "cskd completion bash > ~/.local/share/bash-completion/completions/cskd")
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell that completes.")],
) -> None:
    """The script that has a shell complete commands and options: to be sourced, or put where the shell looks for such."""
    # No call of a shell, as `shell=` says elsewhere
    names = {"prog_name": "cskd", "complete_var": COMPLETE, "shell": shell}
    print(get_completion_script(**names))


@_command(START, "cskd check my.yaml")
def check(config: ConfigPath, set_: Set = None, json_: Json = False) -> None:
    """All that both stages will ask of a config, before days of the teacher; exit code 1 when something is wrong."""
    from cskd.pipeline.look.check_config import check_config, render

    report = check_config(config, set_)
    _print(report, json_, render)
    if not report.ok:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `cskd` script."""
    if COMPLETE in os.environ:
        completion_init()
        app(prog_name="cskd", complete_var=COMPLETE)  # answers, and ends the process
    ended(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
