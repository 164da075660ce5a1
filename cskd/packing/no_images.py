"""What a source is that holds no images that can be read: the files that people have in place of class folders."""

from __future__ import annotations

from pathlib import Path

from cskd.errors import DataError
from cskd.packing.names import IMAGE_EXTENSIONS, UNREAD_IMAGES
from cskd.packing.shard_samples import is_shard, why_no_shard
from cskd.packing.tally import Tally, is_compressed_tar

_WRITE = "write its images to class folders or webdataset shards first"
_FOREIGN = {
    ".7z": ("7z archives", "unpack them, and give the folder that holds the class folders"),
    ".rar": ("rar archives", "unpack them, and give the folder that holds the class folders"),
    ".parquet": ("parquet files", "unpack the tar, and give their folder"),
    ".arrow": ("Arrow files", "unpack the tar, and give their folder"),
    ".tfrecord": ("TFRecord files", _WRITE),
    ".rec": ("RecordIO files", _WRITE),
    ".mdb": ("an LMDB", _WRITE),
    ".lmdb": ("an LMDB", _WRITE),
    ".h5": ("HDF5 files", _WRITE),
    ".hdf5": ("HDF5 files", _WRITE),
    ".npy": ("NumPy arrays", _WRITE),
    ".npz": ("NumPy arrays", _WRITE),
    ".beton": ("FFCV files", _WRITE),
    ".mat": ("MATLAB files", _WRITE),
    ".pkl": ("pickles", _WRITE),
}


def why_no_images(src: Path, ignored: Tally) -> str:
    """One line for the user: what the source holds in place of images, and what to do with it."""
    for kind, (count, first) in sorted(ignored.kinds.items(), key=lambda item: -item[1][0]):
        if is_compressed_tar(f"x{kind}"):
            return (
                f"{src} holds {count} compressed tar(s), {first} for one; decompress shards first (gunzip *.tar.gz), or give "
                "one tar of class folders alone"
            )
        if kind == ".tar":
            return _tars(src, count, first)
        if kind in _FOREIGN:
            what, cure = _FOREIGN[kind]
            return f"{src} holds {count} file(s) like {first}: {what}, which are not read; {cure}"
        if kind[1:] in UNREAD_IMAGES:
            return f"{src} holds {count} file(s) like {first}, a kind of image that is not read; convert them to JPEG or PNG"
    found = f"{ignored.count} other file(s): {ignored.by_kind()}" if ignored.count else "it is empty"
    return (
        f"{src} holds no images in class folders ({found}); "
        f"expected CLASS/NAME with one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
    )


def _tars(src: Path, count: int, first: str) -> str:
    try:
        if not is_shard(src / first, src / first):
            return why_no_shard(src / first, src / first)
    except DataError as e:
        return str(e)
    return f"{src} holds shards only in folders, {first} for one; give one of those folders"
