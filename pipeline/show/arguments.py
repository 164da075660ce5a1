"""Arguments and options that several commands have, as types of their parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cskd.files.folders import OF_DATA as OF_DATA
from cskd.files.folders import kind_of_input, refuse_other_kind
from cskd.files.hub import is_hub
from cskd.files.paths import is_remote, local_path, local_text, location_text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable.")]


@dataclass(frozen=True)
class path_of:  # noqa: N801  # it is called as the function that parses
    """The parser of a path: an address such as s3://... is refused by the name of its argument.

    hub: one of the hub is checked, and downloaded by `local_path` when the command begins. objects: one of an object store is checked
    and kept. takes: kinds of `cskd.files.folders`; what is of another one is refused by `of_their_kinds`.
    """

    name: str
    hub: bool = False
    objects: bool = False
    takes: tuple[str, ...] = ()
    __name__ = "path"  # of a parser, for typer

    def __call__(self, text: str) -> Path:
        if self.objects and is_remote(text):
            return Path(location_text(text, self.name))
        return Path(local_text(text, self.name, self.hub)) if self.hub and text else local_path(text, self.name)

    def refuse_other_kind(self, path: Path, command: str) -> None:
        """PathError for a path of another kind. What lies on the hub or on a web server is not looked at."""
        if is_hub(path):
            return
        if not is_remote(path):
            refuse_other_kind(path, kind_of_input(path), self.name, self.takes, command)
        elif not (address := location_text(str(path), self.name)).startswith("http"):
            from cskd.storage.places import kind_of_objects

            refuse_other_kind(address, kind_of_objects(address, self.name), self.name, self.takes, command)


def of_their_kinds(command: Callable[..., None], name: str) -> Callable[..., None]:
    """A command that first refuses paths of other kinds than its parameters take."""
    parsers = {
        parameter.name: parser
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        for about in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(parser := getattr(about, "parser", None), path_of) and parser.takes
    }

    @functools.wraps(command)
    def checked(**given: Any) -> None:
        for key, parser in parsers.items():
            for path in given[key] if isinstance(given[key], list) else [given[key]]:
                if path is not None:
                    parser.refuse_other_kind(path, name)
        command(**given)

    return checked


# Kinds that an argument may be of.
OF_CONFIG, OF_CACHE, OF_RUN = ("config",), ("cache",), ("run", "weights")
ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        parser=path_of("CONFIG", takes=OF_CONFIG),
        help="YAML config; `cskd configs` lists those to begin from.",
    ),
]
CachePath = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE",
        parser=path_of("CACHE", objects=True, takes=OF_CACHE),
        help="Folder made by cskd cache-teacher, or its s3://, gs:// or az:// address.",
    ),
]
HubCachePath = Annotated[
    Path,
    typer.Argument(
        metavar="CACHE",
        parser=path_of("CACHE", hub=True, objects=True, takes=OF_CACHE),
        help="Folder made by cskd cache-teacher, or its hf://, s3://, gs:// or az:// address.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=path_of("--data", objects=True, takes=OF_DATA),
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
