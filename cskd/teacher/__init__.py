"""The CNN that is run once: built, checked, folded, and run in batches of a fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cskd.teacher.model import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]


def __getattr__(name: str) -> Any:
    """`load_teacher` and `Teacher`, which need torch, where somebody asks for them: the rest of the package is read without."""
    if name in __all__:
        from cskd.teacher import model

        return getattr(model, name)
    raise AttributeError(f"module 'cskd.teacher' has no attribute '{name}'")
