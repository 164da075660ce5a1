"""Which file has the labels of a source: the one that `--labels` names, metadata.csv of an imagefolder, ImageNet's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cskd.packing.imagenet import beside, is_kit, read_kit
from cskd.packing.labels import Labels, has_label_column, merged, parse_labels, read_labels
from cskd.packing.listing import Listing
from cskd.packing.places import Place, read_place


def find_labels(
    listing: Listing, src: Path, metadata: Mapping[str, Place], picked: str, given: Path | None, work: Path
) -> tuple[Labels, Path | None] | None:
    """What says the labels of the images, and the file it is in where paths may be relative to it; None: their folders do.

    Args:    metadata: Hugging Face's files of that name in the source; picked: the folder of it that --split means;
             given: what --labels says; work: a folder for what must be unpacked.
    """
    if given is None:
        folders = {path: path.rpartition("/")[0] for path in sorted(metadata)}
        inside = [path for path, folder in folders.items() if f"{folder}/".startswith(f"{picked}/") or not picked]
        above = [path for path, folder in folders.items() if not folder or f"{picked}/".startswith(f"{folder}/")]
        data = {path: read_place(metadata[path]) for path in inside or above}
        tables = [
            parse_labels(text, path, folders[path]) for path, text in data.items() if has_label_column(text, path)
        ]
        if tables:
            return merged(tables), None
        given = beside(listing, src)
    if given is None:
        return None
    return (read_kit(given, work / "kit") if is_kit(given) else read_labels(given)), given
