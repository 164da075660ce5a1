"""Which output of the teacher stands for which label of the data set: a permutation or a subset of its classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cskd.errors import TeacherError
from cskd.untrusted import read_file

MAX_BYTES = 1 << 23  # of a file of class names
MAX_CLASSES = 65535  # labels and argmaxes are stored as uint16


def class_map(
    classes: str | Sequence[int] | None, class_names: Sequence[str], outputs: int
) -> NDArray[np.int64] | None:
    """Teacher output of every label.

    Args:    classes what `teacher.classes` says: None, K output indices, or the path of a text file with the teacher's
             class names in output order, one a line; class_names the data set's K names in label order; outputs how
             many logits the teacher gives.
    Returns: int64 [K], or None where label k is output k for all of them.
    Raises:  TeacherError for sizes that disagree, duplicates, indices out of range, names the teacher does not have.
    """
    count = len(class_names)
    if not 1 <= count <= MAX_CLASSES:
        raise TeacherError(
            f"the data set has {count} classes, expected 1 to {MAX_CLASSES} (labels are stored as uint16)"
        )
    if classes is None:
        if outputs != count:
            raise TeacherError(
                f"the teacher gives {outputs} logits and the data set has {count} classes; say which are meant with "
                f"teacher.classes (a list of {count} output indices, or a file of the teacher's class names), or build "
                f"a teacher of that size (for a timm model teacher.kwargs: {{num_classes: {count}}})"
            )
        return None
    indices = _from_file(Path(classes), class_names, outputs) if isinstance(classes, str) else list(classes)
    if len(indices) != count:
        raise TeacherError(
            f"teacher.classes has {len(indices)} indices and the data set {count} classes; give one index a label"
        )
    _refuse_duplicates([str(i) for i in indices], "teacher.classes")
    outside = [i for i in indices if not 0 <= i < outputs]
    if outside:
        raise TeacherError(
            f"teacher.classes names output {outside[0]}, expected 0 to {outputs - 1}: the teacher's logits"
        )
    identity = indices == list(range(outputs))
    return None if identity else np.array(indices, dtype=np.int64)


def _from_file(path: Path, class_names: Sequence[str], outputs: int) -> list[int]:
    try:
        text = read_file(path.expanduser(), MAX_BYTES).decode("utf-8-sig")
        lines = [line.strip() for line in text.splitlines()]
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: no home folder for a ~
        reason = " ".join(str(e).split())
        raise TeacherError(f"teacher.classes: {path} can't be read as text, one class name a line: {reason}") from None
    names = [line for line in lines if line]
    if len(names) != outputs:
        raise TeacherError(
            f"teacher.classes: {path} names {len(names)} classes and the teacher gives {outputs} logits; the file must "
            "name every output of the teacher, in order, one a line"
        )
    _refuse_duplicates(names, f"teacher.classes: {path}")
    index = {name: i for i, name in enumerate(names)}
    unknown = [name for name in class_names if name not in index]
    if unknown:
        near = difflib.get_close_matches(unknown[0][:512], [name[:512] for name in names[:1000]], n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise TeacherError(
            f"teacher.classes: {len(unknown)} of the data set's {len(class_names)} classes are not in {path}, the "
            f"first is {unknown[0]!r}{hint}; the names must be spelt alike"
        )
    return [index[name] for name in class_names]


def _refuse_duplicates(values: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise TeacherError(f"{where} lists {value!r} twice; a label and an output belong together only once")
        seen.add(value)
