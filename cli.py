"""The command line: parse, import lazily, call. Every command prints for people, or one JSON object with --json.

Exit codes: 0; 1 failed, and says why in one line; 2 usage; 130 / 143 interrupted, and prints the line that resumes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

import cskd
from cskd.errors import CskdError, fitted, limit_said, one_line, printable, said
from cskd.files.paths import local_path
from cskd.machine.launch import command_line, launched

_leaving = threading.Lock()  # never given back

GRACE = 20.0  # seconds a run that was interrupted has to end by itself

app = typer.Typer(
    name="cskd",
    cls=TyperGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a CNN into a ViT from a teacher cache that is computed once (CSKD, arXiv 2307.08500).",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")]


def _path(name: str) -> Callable[[str], Path]:
    """The parser of a path: an address such as s3://... is refused by the name of its argument."""

    def path(text: str) -> Path:
        return local_path(text, name)

    return path


ConfigPath = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", parser=_path("CONFIG"), help="YAML config; the shipped ones are in configs/."),
]
CachePath = Annotated[
    Path, typer.Argument(metavar="CACHE", parser=_path("CACHE"), help="Folder made by cskd cache-teacher.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", parser=_path("--data"), help="Folder of the image shards, where they have moved."),
]
Classes = Annotated[
    Path | None, typer.Option("--classes", parser=_path("--classes"), help="Class names in label order, one a line.")
]

Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only that split of a source that holds several: train, val, ...")
]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(cskd.__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(parser=_path("OUT"), help="Folder for everything it makes.")] = Path("demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every student.")] = None,
    json_: Json = False,
) -> None:
    """Everything on real handwritten digits, in minutes on a CPU."""
    from cskd.pipeline.demo import render, run_demo

    _print(run_demo(out, epochs=epochs, quiet=json_), json_, render)


@app.command()
def pack(
    src: Annotated[
        Path,
        typer.Argument(
            parser=_path("SRC"),
            help="Folder of class folders, a tar, tar.gz or zip of one, parquet files, or webdataset shards.",
        ),
    ],
    out: Annotated[Path, typer.Argument(parser=_path("OUT"), help="Folder for the shards and their inventory.")],
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
    json_: Json = False,
) -> None:
    """A data set as it was downloaded to shuffled webdataset shards with an inventory."""
    from cskd.pipeline.pack import pack_data, render

    report = pack_data(src, out, classes, seed, shard_size, block, limit, short_side, raw, split, labels, quiet=json_)
    _print(report, json_, render)


@app.command()
def index(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARDS...",
            parser=_path("SHARDS"),
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
    label_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Where labels are: .id for NAME.id, else a key of NAME.json.")
    ] = None,
    key_prefix: Annotated[
        Literal["none", "shard"],
        typer.Option(help="shard: its name goes in front of each key, to tell equal ones apart."),
    ] = "none",
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Leave out samples without image or label.")
    ] = False,
    json_: Json = False,
) -> None:
    """The inventory of existing webdataset shards, which stay as they are."""
    from cskd.pipeline.pack import index_data, render

    prefix = None if key_prefix == "none" else key_prefix
    report = index_data(shards, out, classes, block, split, label_key, prefix, allow_incomplete, quiet=json_)
    _print(report, json_, render)


@app.command(name="cache-teacher")
def cache_teacher(config: ConfigPath, set_: Set = None, json_: Json = False) -> None:
    """Stage 1: run the teacher once over every view. The same command resumes."""
    from cskd.config import load_config
    from cskd.pipeline.cache_teacher import cache_teacher, render

    _print(cache_teacher(load_config(config, set_), quiet=json_), json_, render)


@app.command()
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


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(parser=_path("CHECKPOINT"), help="Result folder of cskd train.")],
    data: Annotated[Path, typer.Argument(parser=_path("DATA"), help="Folder made by cskd pack.")],
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


@app.command()
def inspect(
    cache: CachePath,
    data: Data = None,
    sample: Annotated[str | None, typer.Option(help="Key or number of a sample to show.")] = None,
    view: Annotated[int, typer.Option(help="Which view of it.")] = 0,
    blend: Annotated[float, typer.Option(help="1 = each cell's own logits, 0 = the whole image's.")] = 0.5,
    png: Annotated[Path | None, typer.Option(parser=_path("--png"), help="Write the sample's picture here.")] = None,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="List all samples without targets, one a line: key, shard, reason.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(parser=_path("--html"), help="Write a page of many samples here, for a browser.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the page.")] = 64,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 0,
    json_: Json = False,
) -> None:
    """What a cache holds: a table, one sample as text or as a picture, or many as a page for a browser."""
    from cskd.pipeline.look.inspect_cache import inspect, render
    from cskd.pipeline.look.quarantined import list_quarantined, render_list

    if quarantined:
        _print(list_quarantined(cache, data), json_, render_list)
        return
    facts = inspect(
        cache, data=data, sample=sample, view=view, blend=blend, png=png, html=html, samples=samples, seed=seed
    )
    _print(facts, json_, render)


@app.command()
def verify(
    cache: Annotated[
        Path,
        typer.Argument(
            metavar="CACHE|DATA", parser=_path("CACHE"), help="Folder made by cskd cache-teacher, pack or index."
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


@app.command()
def repair(cache: CachePath, data: Data = None, json_: Json = False) -> None:
    """Withdraw what is damaged in a cache, and make only that again; exit code 0 when it is whole."""
    from cskd.pipeline.care.repair import render, repair

    _print(repair(cache, data=data, quiet=json_), json_, render)


@app.command()
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


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", parser=_path("CONFIG"), help="YAML config of the run to look at it for."),
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


@app.command()
def check(config: ConfigPath, set_: Set = None, json_: Json = False) -> None:
    """All that both stages will ask of a config, before days of the teacher; exit code 1 when something is wrong."""
    from cskd.pipeline.look.check_config import check_config, render

    report = check_config(config, set_)
    _print(report, json_, render)
    if not report.ok:
        raise typer.Exit(1)


def _print(report: Any, as_json: bool, render: Any) -> None:
    import dataclasses

    if not launched().speaks:
        return
    if as_json:
        print(json.dumps(report.facts if hasattr(report, "facts") else dataclasses.asdict(report)))
    else:
        from rich.console import Console

        render(_printable(report), Console())


def _printable(value: Any) -> Any:
    """A report whose texts can be shown: names come from other people's files, and may hold what controls a terminal."""
    import dataclasses

    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _printable(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    """The first Ctrl-C or SIGTERM unwinds; see `_second_signal` for what ends a run that does not."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _leave)
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what runs inside, in GRACE seconds at most; a second one ends it at once.

    Python runs handlers between two steps of the main thread, which a long call into a library holds up; a signal's number
    is written to a socket at once, and a thread reads it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_second_signal, args=(reader,), name="interrupts", daemon=True)
    watch.start()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _interrupted)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watch.join()
        reader.close()


def _second_signal(reader: socket.socket) -> None:
    """Leave at the second signal, or when the first was GRACE seconds ago: a library may have swallowed it, or hang while it
    ends its threads. Every file of a run is whole or absent at any moment, so nothing is lost."""
    first = 0
    while True:
        try:
            numbers = reader.recv(64)
        except TimeoutError:
            _leave(first, None)
        if not numbers:  # the run has ended
            return
        for number in numbers:
            if number in (signal.SIGINT, signal.SIGTERM):
                if first:
                    _leave(number, None)
                first = number
                reader.settimeout(GRACE)


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    """At once, and with one line: the handler and the thread that watches may both come here."""
    if _leaving.acquire(timeout=1.0):
        _say_how_to_go_on()
    os._exit(128 + signum)


def _say_how_to_go_on() -> None:
    """One line, by the first of several ranks."""
    if launched().speaks:
        print(f"\ninterrupted; go on with: {command_line(sys.argv[1:])}", file=sys.stderr, flush=True)


def _leave_ranks(code: object) -> None:
    """End here where this is a rank that others wait for, or that waits for others: it has said what it had to say."""
    if (ranks := sys.modules.get("cskd.machine.ranks")) is not None:
        ranks.leave(code if isinstance(code, int) else 1)


def _debugged(error: Exception) -> None:
    """With --debug, raise it again; in a rank, show it and leave."""
    if "--debug" in sys.argv:
        if "cskd.machine.ranks" in sys.modules:
            traceback.print_exception(error)
            _leave_ranks(1)
        raise error


def main() -> None:
    """Entry point of the `cskd` script."""
    code: object = 0
    try:
        with _interrupts():
            code = app(standalone_mode=False) or 0
    except (CskdError, OSError) as e:
        _debugged(e)
        print(fitted(f"cskd: {e if isinstance(e, CskdError) else said(e)}"), file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as e:
        code = e.code or 0
    except Exception as e:
        code = _usage_or_bug(e)
    if code in (130, 143):
        _say_how_to_go_on()
    _leave_ranks(code)
    sys.exit(code if isinstance(code, int) else 1)


def _usage_or_bug(error: Exception) -> int:
    """Click's own errors show themselves; anything else is ours: a line that names the file with the traceback."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):
        error.show()
        return int(error.exit_code)
    if type(error).__name__ in ("Exit", "Abort"):
        return 130 if type(error).__name__ == "Abort" else int(getattr(error, "exit_code", 0))
    _debugged(error)
    if limit := limit_said(error):
        print(fitted(f"cskd: {limit}"), file=sys.stderr)
        return 1
    print(fitted(f"cskd: unexpected {one_line(error, 100)}; {_logged(error)}"), file=sys.stderr)
    return 1


def _logged(error: Exception) -> str:
    """Where the traceback of a bug is, in words: a file of its own among the temporary ones."""
    import tempfile

    told = "".join(traceback.format_exception(error))
    try:
        number, name = tempfile.mkstemp(prefix="cskd-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"cskd {cskd.__version__}, Python {sys.version}\n{command_line(sys.argv[1:])}\n\n{told}")
    except OSError:
        return "run `cskd --debug ...` for the traceback"
    return f"the traceback is in {name}, please report it"


if __name__ == "__main__":
    main()
