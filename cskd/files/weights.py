"""Weights of a model out of the files that others made: which of a checkpoint's tensors fit its names, and how they are called.

A training script puts weights under a key of its choice and wrappers put prefixes before each name. Neither is looked for by name:
what is taken is what fits the model, and the caller gets words for it. No code of a file is run, see `cskd.files.inert`. No timm
in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cskd.errors import one_line
from cskd.files.checkpoint import Contents, Entry, contents, find_file

# Arguments of timm.create_model by which timm would read a file of its own choice.
READ_BY_TIMM = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
    *("checkpoint_path", "cache_dir"),
)
# What wrappers put before the names of their parts: torch.compile, checkpointing, FSDP, DataParallel.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}
_COUNTERS = (
    "num_batches_tracked",
    "total_ops",
    "total_params",
    "n_averaged",
)  # in no model's function: torch's, thop's
# How averaged weights are called: state_dict_ema, model_ema, ema_model, swa_state; DINO's teacher is its student's average.
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg)([._\d]|$)|momentum_encoder")
_MAX_PARTS = 40  # of a name
# Modules whose objects are in checkpoints of well-known training scripts; others are named in a note.
_HARMLESS = re.compile(
    r"(argparse|collections|pathlib|datetime|enum|numpy|torch|timm|omegaconf|pytorch_lightning|lightning|functools\.partial)\."
    r"|builtins\.(set|frozenset|object|int|float|bool|str|list|tuple|complex|slice|range)$|(a key|\w+)$"
)


@dataclass(frozen=True)
class Weights:
    """The tensors of a file that are for a model, on the CPU."""

    path: Path  # of the file itself
    tensors: dict[str, Tensor]  # by the model's names; also those under the same prefix that the model has not
    taken: str  # where they lay in the file, in words; empty where that is its top level
    notes: list[str]  # what a user should know, a line each


@dataclass(frozen=True)
class _Choice:
    """Weights in a file: all tensors whose names begin with a prefix."""

    prefix: str  # of keys and wrappers, with a dot at the end, or nothing
    fits: dict[str, Entry]  # by the model's names
    same: int  # how many of them have the model's shape

    @property
    def label(self) -> str:
        return self.prefix.rstrip(".") or "the top level"

    @property
    def places(self) -> frozenset[tuple[str, tuple[object, ...]]]:
        return frozenset((name, entry.place) for name, entry in self.fits.items())

    def rank(self) -> tuple[int, int]:
        """The more names have the model's shape, and the more there are at all, the better it fits."""
        return self.same, sum(not k.endswith(_COUNTERS) for k in self.fits)

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED.search(self.prefix.lower()))


def read_weights(path: Path, model: Mapping[str, Tensor]) -> Weights:
    """The weights for a model in a checkpoint of any training script.

    Taken are those of which most names and shapes are the model's, whatever keys and prefixes lead to them. Of several that
    fit equally well the averaged ones are taken; where that leaves a choice, it is refused.

    Args:    path of a file, or of a folder with one by a usual name; with `:KEY` at its end, the weights under that key;
             model the state dict that they are for. On the meta device it will do.
    Raises:  ValueError: what is wrong with the file, in words that follow its name.
    """
    path, key = find_file(path)
    with ExitStack() as opened:
        try:
            found = contents(path, sum(t.nbytes for t in model.values()), opened)
            choice, others = _choose(path, found, model, key)
            entries, left = _under(choice, found)
            for name, entry in entries.items():
                own = model.get(name)
                if own is not None and _kind(own.dtype) != _kind(entry.dtype):
                    raise ValueError(
                        f"holds {name[:80]} in {entry.dtype}, the model in {own.dtype}: give weights that are not quantised"
                    )
            tensors = {name: entry.load() for name, entry in entries.items()}
        except SafetensorError as e:
            raise ValueError(f"can't be read: {one_line(e)}") from None
        except OSError as e:
            raise ValueError(f"can't be read: {e.strerror or e}") from None
    taken = repr(choice.prefix.rstrip(".")) if choice.prefix else ""
    return Weights(path, tensors, taken, _notes(path, choice, others, left, found, model))


def misfit(weights: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> str | None:
    """How names and shapes of weights differ from the model's, the first of each kind; None where they are its own.

    Counters that eval mode never reads may be missing, as in checkpoints older than PyTorch 0.4.1.
    """
    missing = [k for k in model if k not in weights and not k.endswith(_COUNTERS)]
    unexpected = [k for k in weights if k not in model]
    shapes = [
        f"{_cut(k)} {list(weights[k].shape)} for {list(v.shape)}"
        for k, v in model.items()
        if k in weights and weights[k].shape != v.shape
    ]
    faults = [
        f"{len(names)} {what}: {_few(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return "; ".join(faults) or None


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None where all are finite, or hold whole numbers.

    One pass over the values (smallest and largest: NaN spreads to both) and one transfer per device.
    """
    ends: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            t = tensor.detach()
            t = t.float() if t.element_size() == 1 else t  # of float8 there are no smallest and largest
            ends.setdefault(t.device, []).append((name, torch.stack(torch.aminmax(t)).isfinite().all()))
    bad = set()
    for found in ends.values():
        finite = torch.stack([ok for _, ok in found]).tolist()
        bad |= {name for (name, _), ok in zip(found, finite, strict=True) if not ok}
    return next((name for name in tensors if name in bad), None)


def _choose(path: Path, found: Contents, model: Mapping[str, Tensor], key: str | None) -> tuple[_Choice, list[_Choice]]:
    """The weights that are taken, and others that fit half of that or more."""
    fits: dict[str, dict[str, Entry]] = {}
    for entry in found.entries:
        parts = entry.name.split(".")
        for i in range(len(parts)) if len(parts) <= _MAX_PARTS else ():
            if (own := _own_name(parts[i:], model)) is not None:
                fits.setdefault("".join(f"{part}." for part in parts[:i]), {}).setdefault(own, entry)
    choices = [
        _Choice(prefix, own, sum(e.shape == model[k].shape for k, e in own.items() if not k.endswith(_COUNTERS)))
        for prefix, own in fits.items()
        if key is None or prefix.startswith(f"{key}.")
    ]
    if not choices:
        raise ValueError(_nothing(found, model, key))
    choices.sort(key=_Choice.rank, reverse=True)  # of equal ones the first in the file stays first
    best = choices[0]
    rivals = [c for c in choices if 2 * c.same >= best.same > 0 and c.places != best.places]
    equal = [c for c in rivals if c.rank() == best.rank()]
    if equal:
        by_student = any("student" in c.prefix.split(".") for c in (best, *equal))
        averaged = [c for c in (best, *equal) if c.averaged or (by_student and "teacher" in c.prefix.split("."))]
        if len({c.places for c in averaged}) != 1:
            known = _few([c.label for c in (best, *equal)], 4)
            raise ValueError(f"holds {1 + len(equal)} sets of weights that fit: {known}; say which by {path.name}:KEY")
        best, rivals = averaged[0], [c for c in (best, *rivals) if c is not averaged[0]]
    return best, rivals


def _own_name(parts: list[str], model: Mapping[str, Tensor]) -> str | None:
    """The model's name for what a file calls so; wrappers may stand between the parts of it."""
    name = ".".join(parts)
    if name in model:
        return name
    if parts[0] in _WRAPPERS or _WRAPPERS.isdisjoint(parts):
        return None
    name = ".".join(part for part in parts if part not in _WRAPPERS)
    return name if name in model else None


def _under(choice: _Choice, found: Contents) -> tuple[dict[str, Entry], list[str]]:
    """All tensors that lie under what was chosen, by name; and the names of those that lie beside it in the same mapping."""
    homes, own = {e.home for e in choice.fits.values()}, {e.name for e in choice.fits.values()}
    entries, left = dict(choice.fits), []
    for entry in found.entries:
        if entry.home in homes and entry.name not in own and not entry.name.endswith(_COUNTERS):
            if entry.name.startswith(choice.prefix):
                entries.setdefault(entry.name.removeprefix(choice.prefix), entry)
            else:
                left.append(entry.name)
    return entries, left


def _nothing(found: Contents, model: Mapping[str, Tensor], key: str | None) -> str:
    """Why there are no weights for the model."""
    if found.networks:
        where, network = found.networks[0]
        return (
            f"holds a whole pickled {_cut(network)}{f' under {_cut(where)!r}' if where else ''}, and no code of a file is run: load "
            "it where its class is, and save its state_dict()"
        )
    if not found.entries:
        objects = f", but objects of {_few(found.objects)}" if found.objects else ""
        if "torch._utils._rebuild_tensor_v2" in found.objects:
            return "is of pickle.dump, which does not keep tensors apart from objects: save it by torch.save"
        return f"holds no state dict, and no tensor that has a name{objects}"
    names = [e.name for e in found.entries]
    if key is not None:
        under = list(dict.fromkeys(e.home.rstrip(".") or "the top level" for e in found.entries))
        return f"holds no weights of this model under {_cut(key)!r}; there are tensors under {_few(under, 5)}"
    return f"holds no name of this model, but {len(names)}: {_few(names)}; the model has {_few(list(model))}"


def _notes(
    path: Path, choice: _Choice, others: list[_Choice], left: list[str], found: Contents, model: Mapping[str, Tensor]
) -> list[str]:
    notes = []
    if choice.prefix or others:
        size = sum(not k.endswith(_COUNTERS) for k in model)
        note = f"weights taken from {choice.label!r} of {path.name}: {choice.rank()[1]} of {size} names fit"
        if others:
            note += f"; also there: {_few([c.label for c in others], 4)} (choose by {path.name}:KEY)"
        if left:
            note += f"; left out there: {len(left)}: {_few(left)}"
        notes.append(note)
    if odd := [name for name in found.objects if not _HARMLESS.match(name)]:
        notes.append(f"{path.name} names {_few(odd)}, which were neither loaded nor run")
    return notes


def _kind(dtype: torch.dtype) -> str:
    return "real" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"


def _cut(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}"


def _few(names: list[str], n: int = 3) -> str:
    return ", ".join(map(_cut, names[:n])) + (", ..." if len(names) > n else "")
