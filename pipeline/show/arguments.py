"""Arguments and options that several commands have, as types of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from cskd.files.paths import is_remote, local_path, local_text, location_text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")]


def path_of(name: str, hub: bool = False, objects: bool = False) -> Callable[[str], Path]:
    """The parser of a path: an address such as s3://... is refused by the name of its argument. hub: one of the hub is checked, and
    downloaded by `local_path` when the command begins. objects: one of an object store is checked and kept."""

    def path(text: str) -> Path:
        if objects and is_remote(text):
            return Path(location_text(text, name))
        return Path(local_text(text, name, hub)) if hub and text else local_path(text, name)

    return path


ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", parser=path_of("CONFIG"), help="YAML config; `cskd configs` lists those to begin from."
    ),
]
CachePath = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE",
        parser=path_of("CACHE", objects=True),
        help="Folder made by cskd cache-teacher, or its s3://, gs:// or az:// address.",
    ),
]
HubCachePath = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE",
        parser=path_of("CACHE", hub=True, objects=True),
        help="Folder made by cskd cache-teacher, or its hf://, s3://, gs:// or az:// address.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=path_of("--data", objects=True),
        help="Folder or address of the image shards, where they have moved.",
    ),
]
Classes = Annotated[
    Path | None, typer.Option("--classes", parser=path_of("--classes"), help="Class names in label order, one a line.")
]

Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only that split of a source that holds several: train, val, ...")
]

LabelKey = Annotated[
    str | None,
    typer.Option(
        "--label-key", metavar="KEY", help="Of shards, where labels are: .id for NAME.id, else a key of NAME.json."
    ),
]

KeyPrefix = Annotated[
    Literal["none", "shard"],
    typer.Option("--key-prefix", help="shard: its name goes in front of each key, to tell equal ones apart."),
]

AllowIncomplete = Annotated[
    bool, typer.Option("--allow-incomplete", help="Leave out samples of shards without image or label.")
]
