"""Resume states: all that the next step depends on, in one safetensors file without pickle.

A state is finite: NaN would be resumed from for ever. A file holds `model/NAME`, `ema/NAME`, `projection/NAME` where a loss has terms of
features, `optimizer/NAME/KEY` and, where an optimiser has them, `group/INDEX/KEY`; its metadata a JSON of the rest and a digest
over all of it. A state is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from cskd.errors import NotFiniteError, StudentError
from cskd.files.checkpoint import MAX_HEADER, check_safetensors
from cskd.files.durable import put
from cskd.files.read import open_regular, parse_json
from cskd.files.weights import first_not_finite
from cskd.student.model import Student
from cskd.student.optim import Optimisation

STATE_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_ASIDE = re.compile(r"diverged-(\d{8,})\.safetensors")
# What config and device decide again; any other value in an optimiser's groups may be its state.
_CHOSEN_HERE = {"lr", "initial_lr", "weight_decay", "fused", "foreach", "capturable", "differentiable", "maximize"}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: `step` updates are done. `info` is JSON of the caller's."""

    step: int
    info: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # of loading; not saved


class ResumeStates:
    """The resume states in a folder, the newest `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, student: Student, optimisation: Optimisation, state: TrainState, good: int | None = None) -> Path:
        """Write the state after `state.step` updates, then remove all but the newest `keep`, and that of step `good`.

        States of later steps are removed too: they are damaged ones that this run could not resume from.

        Raises: StudentError for an optimiser whose state is not tensors and numbers, or when the disk refuses;
                NotFiniteError for weights, averages or an optimiser's tensors with NaN or an infinity. Nothing was written.
        """
        live, groups, numbers = _flatten(student, optimisation)
        if odd := first_not_finite(live):
            raise NotFiniteError(f"{odd} is not finite", "resume from the last state that is", state.step)
        tensors = {k: v.detach().cpu().contiguous() for k, v in live.items()}
        body = {
            "format": STATE_FORMAT,
            "step": state.step,
            "info": state.info,
            "optimizer": type(optimisation.optimizer).__name__,
            "groups": groups,
            "numbers": numbers,
        }
        if optimisation.scaler is not None:
            body["scaler"] = optimisation.scaler.state_dict()
        metadata = {"cskd": json.dumps(body, sort_keys=True)}
        metadata["sha256"] = digest(tensors, metadata["cskd"])
        path = self.folder / f"step-{state.step:08d}.safetensors"
        for left_over in self.folder.glob(".step-*.tmp"):  # of a run that was killed while it wrote
            left_over.unlink(missing_ok=True)
        put_file(path, lambda temp: _write_state(temp, tensors, metadata))
        earlier = [step for step, _ in self._found() if step <= state.step]
        for step, p in self._found():
            if step not in earlier[: self.keep] and step != good:
                p.unlink(missing_ok=True)
        for step, p in self._found(_ASIDE):
            if step <= state.step:
                p.unlink(missing_ok=True)
        return path

    def set_aside(self, steps: Collection[int]) -> None:
        """Rename states so that none of them is resumed from; they go when a run has come as far again."""
        for step, path in self._found():
            if step in steps:
                path.replace(path.with_name(f"diverged-{step:08d}.safetensors"))

    def infos(self) -> dict[int, dict[str, Any]]:
        """`info` of each state by step, newest first; one whose header can't be read is left out."""
        return {step: body["info"] for step, path in self._found() if (body := _header(path, step)) is not None}

    def load(self, student: Student, optimisation: Optimisation) -> TrainState | None:
        """Continue from the newest state that is whole; student and optimisation are those of the same config.

        Returns: None where there is no state; else the state, with a warning for each damaged one that was passed over.
        Raises:  StudentError when all are damaged, or one is of another student or optimiser. Then nothing was changed.
        """
        found, warnings = self._found(), []
        for step, path in found:
            try:
                check_safetensors(path, 4 * sum(p.nbytes for p in _parameters(student, optimisation).values()))
                tensors, body = _read(path)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
                warnings.append(f"{path} is damaged ({' '.join(str(e).split())}); continuing from an earlier state")
                continue
            if body.get("format") != STATE_FORMAT:
                raise StudentError(f"{path} has format {body.get('format')}, expected {STATE_FORMAT}; update cskd")
            if not _is_state(body, step):
                warnings.append(f"{path} is no state of step {step}; continuing from an earlier state")
                continue
            if odd := first_not_finite(tensors):  # of a version that wrote such states
                warnings.append(f"{path} holds values in {odd} that are not finite; continuing from an earlier state")
                continue
            _restore(path, student, optimisation, tensors, body)
            optimisation.set_lr(max(0, body["step"] - 1))
            return TrainState(body["step"], body["info"], warnings=warnings)
        if found:
            why = "not finite" if all("not finite" in w for w in warnings) else "damaged"
            raise StudentError(f"every state in {self.folder} is {why}, {found[0][1]} too; remove them to start again")
        return None

    def weights(self, step: int, part: str, student: Student) -> Tensors:
        """The weights of a student in one state, by their names in timm's model, nothing else of it.

        Args:    part 'model', the live ones, or 'ema', their average.
        Raises:  StudentError for a state that is missing, damaged, or of another student.
        """
        path, own = self.folder / f"step-{step:08d}.safetensors", student.backbone.state_dict()
        try:
            check_safetensors(path, 4 * sum(t.nbytes for t in own.values()))
            tensors = {k.removeprefix(f"{part}/"): t for k, t in _read(path)[0].items() if k.startswith(f"{part}/")}
            if odd := sorted(
                k
                for k in own.keys() | tensors.keys()
                if k not in own or k not in tensors or own[k].shape != tensors[k].shape
            ):
                raise ValueError(f"its {part} {odd[0]} is not that of this student")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise StudentError(
                f"{path} can't be read as a state of this run ({' '.join(str(e).split())[:120]}); remove it"
            ) from e
        return tensors

    def _found(self, name: re.Pattern[str] = _NAME) -> list[tuple[int, Path]]:
        """(step, path), newest first."""
        names = ((name.fullmatch(p.name), p) for p in self.folder.glob("*.safetensors"))
        return sorted(((int(m[1]), p) for m, p in names if m), reverse=True)


def put_weights(path: Path, weights: Tensors) -> None:
    """Put weights into a file for timm, durably. StudentError when the disk refuses."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    put_file(path, lambda temp: save_file(tensors, temp, {"format": "pt"}))


def put_file(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """`put` of a run's file. StudentError when the disk refuses."""
    try:
        put(path, content)
    except (OSError, SafetensorError) as e:
        raise StudentError(f"{path} can't be written ({e}); mend that and run the same command again") from e


def _write_state(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """As `save_file`, which writes the metadata in an order of chance: the same state is the same bytes."""
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header = {"__metadata__": metadata} | {k: v for k, v in header.items() if k != "__metadata__"}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:  # the same characters in another order
            file.seek(8)
            file.write(text)


def _flatten(student: Student, optimisation: Optimisation) -> tuple[Tensors, list[dict[str, Any]], dict[str, Any]]:
    """Tensors by name; the optimiser's groups and those of its values that are no tensors, as JSON."""
    tensors = {f"model/{k}": v for k, v in student.backbone.state_dict().items()}
    if optimisation.averaged is not None:
        tensors |= {f"ema/{k}": v for k, v in optimisation.averaged.backbone.state_dict().items()}
    if optimisation.projections is not None:
        tensors |= {f"projection/{k}": v for k, v in optimisation.projections.state_dict().items()}
    groups: list[dict[str, Any]] = []
    numbers: dict[str, Any] = {}
    for i, (names, group) in enumerate(_groups(student, optimisation)):
        values = {k: v for k, v in group.items() if k != "params" and k not in _CHOSEN_HERE}
        tensors |= {f"group/{i}/{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        groups.append({"names": names, "values": {k: v for k, v in values.items() if not isinstance(v, Tensor)}})
        for name, parameter in zip(names, group["params"], strict=True):
            for key, value in optimisation.optimizer.state.get(parameter, {}).items():
                target: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
                target[f"optimizer/{name}/{key}"] = value
    try:
        json.dumps([groups, numbers], allow_nan=False)
    except (TypeError, ValueError) as e:
        kind = type(optimisation.optimizer).__name__
        raise StudentError(f"{kind} can't be resumed ({e}); set train.opt to another optimiser, such as adamw") from e
    return tensors, groups, numbers


def state_tensors(student: Student, optimisation: Optimisation) -> Tensors:
    """Weights, averages and the optimiser's tensors where they are, by the names they have in a state."""
    return _flatten(student, optimisation)[0]


def _parameters(student: Student, optimisation: Optimisation) -> dict[str, torch.nn.Parameter]:
    """All that is optimised, by name."""
    own = optimisation.projections
    found = {f"projection/{name}": p for name, p in own.named_parameters()} if own is not None else {}
    return dict(student.backbone.named_parameters()) | found


def _groups(student: Student, optimisation: Optimisation) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Each parameter group with its parameters' names."""
    name_of = {id(p): name for name, p in _parameters(student, optimisation).items()}
    for group in optimisation.optimizer.param_groups:
        yield [name_of[id(p)] for p in group["params"]], group


def _read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and JSON of a state whose digest is right. Raises ValueError and others where it is not."""
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  not a dict
    if digest(tensors, metadata["cskd"]) != metadata["sha256"]:
        raise ValueError("its digest is not that of its content")
    body: dict[str, Any] = parse_json(metadata["cskd"])
    return tensors, body


def _header(path: Path, step: int) -> dict[str, Any] | None:
    """The JSON of a state, its tensors unread and its digest unchecked; None where it is none."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            body = parse_json(parse_json(file.read(length))["__metadata__"]["cskd"]) if length <= MAX_HEADER else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return body if isinstance(body, dict) and _is_state(body, step) else None


def _is_state(body: dict[str, Any], step: int) -> bool:
    """Whether a JSON has what `save` puts into it: a digest that is right says only that nothing was damaged since."""
    groups, kinds = body.get("groups"), (("info", dict), ("numbers", dict), ("optimizer", str))
    return (
        type(body.get("step")) is int
        and body["step"] == step
        and all(isinstance(body.get(name), kind) for name, kind in kinds)
        and isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("values"), dict) and "names" in g for g in groups)
        and all(not isinstance(v, str | bool | dict | list) for v in body["numbers"].values())
    )


def digest(tensors: Tensors, body: str) -> str:
    """Hex sha256 over the JSON and every tensor's name, dtype, shape and bytes."""
    h = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"\n{name} {t.dtype} {list(t.shape)}\n".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def _restore(path: Path, student: Student, optimisation: Optimisation, tensors: Tensors, body: dict[str, Any]) -> None:
    """Put a state into student and optimisation, once it is certain that it fits both."""
    averaged = None if optimisation.averaged is None else optimisation.averaged.backbone
    every = {"model": student.backbone, "ema": averaged, "projection": optimisation.projections}
    parts = {name: module for name, module in every.items() if module is not None}
    for part in every:
        own = {k: v.shape for k, v in parts[part].state_dict().items()} if part in parts else {}
        saved = {k.removeprefix(f"{part}/"): v.shape for k, v in tensors.items() if k.startswith(f"{part}/")}
        if own != saved:
            odd = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))[0]
            raise StudentError(
                f"{path} is of another config ({part} {odd}: {_size(saved, odd)} there, {_size(own, odd)} here); "
                "restore student, train.ema and loss.terms as they were, or set another train.output"
            )
    kind = type(optimisation.optimizer).__name__
    if body["optimizer"] != kind:
        raise StudentError(f"{path} is a state of {body['optimizer']}, train.opt makes {kind}; restore train.opt")
    groups = list(_groups(student, optimisation))
    if [names for names, _ in groups] != [group["names"] for group in body["groups"]]:
        raise StudentError(f"{path} groups parameters otherwise; restore train.opt and train.weight_decay as they were")
    values = {**tensors, **body["numbers"]}
    state: dict[int, dict[str, Any]] = {}
    for i, name in enumerate(name for names, _ in groups for name in names):
        prefix = f"optimizer/{name}/"
        found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        if found:
            state[i] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}  # not the file's memory
    scaler = _scaler_state(path, body.get("scaler")) if optimisation.scaler is not None else None
    live = optimisation.optimizer.state_dict()
    for i, (group, saved_group) in enumerate(zip(live["param_groups"], body["groups"], strict=True)):
        for key, value in saved_group["values"].items():
            as_saved = list(group[key]) if isinstance(group.get(key), tuple) else group.get(key)
            if type(value) is not type(as_saved):
                raise StudentError(
                    f"{path} has {key} {str(value)[:80]}, this run {as_saved}; restore train.opt as it was"
                )
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        prefix = f"group/{i}/"
        group |= {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
    try:
        optimisation.optimizer.load_state_dict({"state": state, "param_groups": live["param_groups"]})
    except (ValueError, KeyError, RuntimeError) as e:
        raise StudentError(f"{path} does not fit the optimiser ({e}); restore train.opt as it was") from e
    if optimisation.scaler is not None and scaler is not None:
        optimisation.scaler.load_state_dict(scaler)
    for part, module in parts.items():
        module.load_state_dict({k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")})


def _scaler_state(path: Path, state: Any) -> dict[str, Any] | None:
    """The loss scale of a state; None where it has none, which leaves that of a new run. StudentError for one that is none."""
    if state is None:
        return None
    own = GradScaler("cpu").state_dict()
    sound = isinstance(state, dict) and state.keys() == own.keys()
    if (
        not sound
        or not all(type(v) is type(own[k]) and 0 <= v < 2.0**128 for k, v in state.items())
        or not state["scale"]
    ):
        raise StudentError(f"{path} has the loss scale {str(state)[:80]}, expected {own}; remove the state")
    return dict(state)


def _size(shapes: dict[str, torch.Size], name: str) -> str:
    return "x".join(map(str, shapes[name])) or "scalar" if name in shapes else "none"
