"""Which output of the teacher stands for which label of the data set: a permutation or a subset of its classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cskd.dataset.classes import MAX_CLASS_BYTES, MAX_CLASSES, parse_classes
from cskd.errors import DataError, TeacherError
from cskd.files.folders import called
from cskd.files.read import read_file
from cskd.near import absent, did_you_mean
from cskd.storage.fetch import fetched

_SHIFT = re.compile(r"shift:([+-]?\d{1,5})")


def natural_key(name: str) -> list[str | int]:
    """What timm's folder reader sorts class names by: without regard to case, runs of digits as numbers."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


# Words that `teacher.classes` may be: what other programs sort a folder's class names by to number them.
ORDERS: dict[str, Callable[[str], object]] = {
    "timm": natural_key,
    "sorted": str,  # torchvision, Keras, Hugging Face
    "caseless": str.lower,
}


def class_map(
    classes: str | Sequence[int] | None, class_names: Sequence[str], outputs: int
) -> NDArray[np.int64] | None:
    """Teacher output of every label.

    Args:    classes what `teacher.classes` says: None, K output indices, a word of ORDERS, shift:N for output k + N of
             label k, or the path of a text file with the teacher's class names in output order, one per line;
             class_names the data set's K names in label order; outputs how many logits the teacher gives.
    Returns: int64 [K], or None where label k is output k for all of them.
    Raises:  TeacherError for sizes that disagree, duplicates, indices out of range, names the teacher does not have.
    """
    count = len(class_names)
    if not 1 <= count <= MAX_CLASSES:
        raise TeacherError(f"the data set has {count} classes, expected 1 to {MAX_CLASSES} (labels are kept as uint16)")
    if classes is None:
        if outputs != count:
            raise TeacherError(
                f"the teacher gives {outputs} logits and the data set has {count} classes; {_which(outputs, count)}"
            )
        return None
    if not isinstance(classes, str):
        indices = list(classes)
    elif classes in ORDERS:
        indices = _ranks(classes, class_names, outputs)
    elif shift := _SHIFT.fullmatch(classes):
        indices = [(k + int(shift[1])) % outputs for k in range(count)]
    else:
        indices = _from_file(Path(classes), class_names, outputs)
    if len(indices) != count:
        raise TeacherError(f"teacher.classes has {len(indices)} indices, the data set {count} classes; give one each")
    if twice := [i for i, times in Counter(indices).items() if times > 1]:
        raise TeacherError(f"teacher.classes lists '{twice[0]}' twice; a label and an output belong together only once")
    outside = [i for i in indices if not 0 <= i < outputs]
    if outside:
        raise TeacherError(
            f"teacher.classes names output {outside[0]}, expected 0 to {outputs - 1}: the teacher's logits"
        )
    identity = indices == list(range(outputs))
    return None if identity else np.array(indices, dtype=np.int64)


def _which(outputs: int, count: int) -> str:
    """How to say which of the outputs are meant."""
    if outputs == count + 1:
        return (
            "where its first output is a background class set teacher.classes: shift:1, where the last one is, shift:0; else "
            "give a file of the teacher's class names"
        )
    if outputs == count - 1:
        return (
            "if the labels count from 1, make them count from 0; else build a teacher of that size (for a timm model "
            f"teacher.kwargs: {{num_classes: {count}}})"
        )
    return (
        f"say which are meant with teacher.classes (a list of {count} output indices, or a file of the teacher's class "
        f"names), or build a teacher of that size (for a timm model teacher.kwargs: {{num_classes: {count}}})"
    )


def _ranks(word: str, class_names: Sequence[str], outputs: int) -> list[int]:
    """The place of each class name once they are sorted as ORDERS says."""
    if outputs != len(class_names):
        raise TeacherError(
            f"teacher.classes: {word} numbers the data set's {len(class_names)} class names and the teacher gives {outputs} "
            "logits; give a list of output indices, or a file of the teacher's class names"
        )
    keys = [ORDERS[word](PurePosixPath(name).name) for name in class_names]
    order = sorted(range(len(keys)), key=lambda k: keys[k])  # type: ignore[arg-type, return-value]
    for a, b in pairwise(order):
        if keys[a] == keys[b]:
            raise TeacherError(
                f"teacher.classes: {word} sorts {class_names[a][:40]!r} and {class_names[b][:40]!r} alike; give a file of the "
                "teacher's class names in the order of its outputs"
            )
    return [int(rank) for rank in np.argsort(order)]


def _from_file(path: Path, class_names: Sequence[str], outputs: int) -> list[int]:
    try:
        path = fetched(path, "teacher.classes")
        names = parse_classes(read_file(path, MAX_CLASS_BYTES), str(path))
    except DataError as e:
        raise TeacherError(f"teacher.classes: {e}") from None
    except FileNotFoundError:
        raise TeacherError(
            f"teacher.classes: no file {absent(path)}; give one class name a line, a list of outputs, shift:N, or one "
            f"of {', '.join(ORDERS)}"
        ) from None
    except IsADirectoryError:
        raise TeacherError(
            f"teacher.classes: {path} is {called(path) or 'a folder'}, expected a file with one class name a line"
        ) from None
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: no home folder for a ~
        reason = " ".join(str(e).split())
        raise TeacherError(f"teacher.classes: {path} can't be read as text, one class name a line: {reason}") from None
    if len(names) != outputs:
        raise TeacherError(
            f"teacher.classes: {path} names {len(names)} classes and the teacher gives {outputs} logits; the file must "
            "name every output of the teacher, in order, one a line"
        )
    index = {name: i for i, name in enumerate(names)}
    unknown = [name for name in class_names if name not in index]
    if unknown:
        hint = f" ({near})" if (near := did_you_mean(unknown[0], names)) else ""
        raise TeacherError(
            f"teacher.classes: {len(unknown)} of the data set's {len(class_names)} classes are not in {path}, the "
            f"first is {unknown[0]!r}{hint}; the names must be spelt alike"
        )
    return [index[name] for name in class_names]
