"""The teacher's network: built by timm or by a function in the user's own file, with its weights loaded strictly."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.errors import TeacherError, one_line
from cskd.files.read import read_file
from cskd.files.weights import READ_BY_TIMM, read_weights
from cskd.near import absent, did_you_mean


@dataclass
class Built:
    """A network in float32, eval mode, on the CPU, and where it came from."""

    model: nn.Module
    source: dict[str, Any]  # constructor and kwargs, or the hash of the user's file: part of the fingerprint
    stated: dict[str, Any]  # what the network says of itself: input_size, mean, std, interpolation, crop_pct
    notes: list[str] = field(default_factory=list)  # what a user should know, one line each


def build(config: TeacherConfig) -> Built:
    """Build `config.model` and load `config.weights`.

    Raises:  TeacherError for an unknown name, a missing file or function, kwargs the constructor refuses, weights that
             can't be read or don't fit.
    """
    own = ".py:" in config.model
    built = _from_file(config) if own else _from_timm(config)
    if config.weights is None:
        note = "the weights are those that build() gave" if own else "the weights are random: set teacher.weights"
        built.notes.append(note)
    elif config.weights != "hub":
        built.notes += load_weights(built.model, Path(config.weights))
    elif own:
        raise TeacherError("teacher.weights: 'hub' is for timm models; give a file, or load the weights in build()")
    else:
        tag = (getattr(built.model, "pretrained_cfg", None) or {}).get("tag")
        built.notes.append(f"the weights are timm's own{f', {tag}' if tag else ''}")
    built.model = built.model.float().eval().requires_grad_(False)
    return built


def build_model(name: str, kwargs: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm model by its name, in training mode, with random weights unless `pretrained` (needs a network).

    Raises:  TeacherError for an unknown name (with the nearest known one), kwargs it refuses, weights out of reach.
    """
    for key in kwargs.keys() & READ_BY_TIMM:
        raise TeacherError(
            f"teacher.kwargs has {key}: {kwargs[key]!r}, by which timm would read a file of its own choice; leave it out, "
            "set teacher.weights"
        )
    if ":" in name and not pretrained:
        raise TeacherError(
            f"teacher.model {name!r} names a place to load from, which is only done with teacher.weights: hub; give a timm "
            "name, or path/to/file.py:build"
        )
    known = timm.list_models()
    if ":" not in name and name.partition(".")[0] not in known:
        hint = did_you_mean(name, known) or "timm.list_models() lists them"
        raise TeacherError(f"teacher.model {name!r} is no timm model; {hint}; your own is path/to/file.py:build")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as e:  # timm, the hub's client and constructors raise whatever they like
        if pretrained:
            raise TeacherError(
                f"timm's weights of {name} can't be had ({one_line(e)}); give a file in teacher.weights, downloaded "
                "elsewhere if need be"
            ) from None
        raise TeacherError(f"timm can't build {name} with teacher.kwargs {kwargs}: {one_line(e)}") from None
    return model


def _from_timm(config: TeacherConfig) -> Built:
    if not config.model:
        raise TeacherError("teacher.model is empty; give a timm name such as resnet50, or path/to/file.py:build")
    model = build_model(config.model, config.kwargs, pretrained=config.weights == "hub")
    resolve: Callable[..., dict[str, Any]] = resolve_model_data_config
    stated = resolve(model)
    stated["input_size"] = stated["input_size"][-1]
    return Built(model, {"model": config.model, "kwargs": dict(config.kwargs)}, stated)


def _from_file(config: TeacherConfig) -> Built:
    """Import path/to/file.py under a name made of its hash, and call the function after the colon."""
    where, _, function = config.model.rpartition(":")
    path = Path(where).expanduser()
    try:
        digest = hashlib.sha256(read_file(path)).hexdigest()
    except OSError as e:
        said = f"no file {absent(path)}" if not path.exists() else f"{path} can't be read ({e.strerror})"
        raise TeacherError(f"teacher.model: {said}; give path/to/file.py:build") from None
    name = f"cskd_teacher_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.compile look modules up by name
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[name]
        raise TeacherError(f"teacher.model: importing {path} failed: {one_line(e)}") from None
    maker = getattr(module, function, None)
    if not callable(maker):
        hint = did_you_mean(function, [name for name, one in vars(module).items() if callable(one)])
        raise TeacherError(
            f"teacher.model: {path} has no function {function!r}; {hint or 'it must return a torch.nn.Module'}"
        )
    try:
        model = maker(**config.kwargs)
    except Exception as e:
        raise TeacherError(f"teacher.model: {path}:{function} with {config.kwargs} failed: {one_line(e)}") from None
    if not isinstance(model, nn.Module):
        raise TeacherError(f"teacher.model: {path}:{function} returned a {type(model).__name__}, not a torch.nn.Module")
    stated = dict(getattr(model, "pretrained_cfg", None) or {})
    if isinstance(stated.get("input_size"), tuple | list):
        stated["input_size"] = stated["input_size"][-1]
    source = {"model": function, "file_sha256": digest, "kwargs": dict(config.kwargs)}
    return Built(model, source, stated)


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a .safetensors, .pt, .pth or .tar file into `model`, strictly; other float types are cast to the model's.

    Returns: notes: which part of a wrapped checkpoint was taken.
    Raises:  TeacherError where the file can't be read, holds pickled objects, or does not fit the model.
    """
    path = weight_file(path)
    expected = model.state_dict()
    try:
        weights, keys = read_weights(path, sum(t.nbytes for t in expected.values()))
    except ValueError as e:
        raise TeacherError(f"teacher.weights: {path} {e}; save model.state_dict() as .safetensors, give that") from None
    # Checkpoints older than PyTorch 0.4.1 lack this counter, which eval mode never reads.
    missing = [k for k in expected if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in expected]
    shapes = [
        f"{k} {list(weights[k].shape)} for {list(v.shape)}"
        for k, v in expected.items()
        if k in weights and weights[k].shape != v.shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise TeacherError(
            f"teacher.weights: {path} does not fit the model ({'; '.join(faults)}); check teacher.model and "
            "teacher.kwargs, such as num_classes"
        )
    model.load_state_dict(weights, strict=False)  # only counters can be missing here
    return [f"weights taken from {key!r} of {path.name}" for key in keys]


def weight_file(path: Path) -> Path:
    """The file that `teacher.weights` names. TeacherError where there is none."""
    path = path.expanduser()
    if not path.is_file():
        raise TeacherError(f"teacher.weights: no file {absent(path)}; give a .safetensors or .pth file, or 'hub'")
    return path


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, sorted by name: name, dtype, shape and bytes of each."""
    h = hashlib.sha256()
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
