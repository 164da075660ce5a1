"""The teacher's network: built by timm or by a function in the user's own file, with its weights loaded strictly."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from cskd.config import TeacherConfig
from cskd.errors import CskdError, TeacherError, one_line
from cskd.files.checkpoint import given_file
from cskd.files.folders import called
from cskd.files.hub import is_hub, local_copy, parse_address, pin, quiet_hub, refusal_of, waiting_for_hub
from cskd.files.not_weights import one_part
from cskd.files.own_code import OwnCode, entry_point_names, load_own, names_own_code, neighbours_of
from cskd.files.waiting import said_when_long
from cskd.files.weights import READ_BY_TIMM, misfit, read_weights
from cskd.near import did_you_mean
from cskd.storage.fetch import fetched

TORCHVISION = "torchvision:"
GROUP = "cskd.teachers"  # of entry points
_OFFLINE = "a file: --set teacher.weights=FILE"


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
    hub, torchvision = is_hub(config.model), config.model.startswith(TORCHVISION)
    code = None if hub else _own(config.model)
    own = code is not None
    if code is not None:
        built = _from_own(config, code)
    else:
        built = (_from_hub if hub else _from_torchvision if torchvision else _from_timm)(config)
    if config.weights is None:
        note = "the weights are those that build() gave" if own else "the weights are random: set teacher.weights"
        built.notes.append(note)
    elif config.weights != "hub":
        built.notes += load_weights(built.model, Path(config.weights))
    elif hub:
        built.notes += load_weights(built.model, Path(built.source["model"]))
    elif own:
        raise TeacherError("teacher.weights: 'hub' is for timm models; give a file, or load the weights in build()")
    else:
        tag = (getattr(built.model, "pretrained_cfg", None) or {}).get("tag")
        whose = "torchvision" if torchvision else "timm"
        built.notes.append(f"the weights are {whose}'s own{f', {tag}' if tag else ''}")
    built.model = built.model.float().eval().requires_grad_(False)
    return built


def build_model(name: str, kwargs: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm model by its name, in training mode, with random weights unless `pretrained` (needs a network).

    Raises:  TeacherError for an unknown name (with the nearest known one), kwargs it refuses, weights out of reach.
    """
    _refuse_files(kwargs)
    if ":" in name and not pretrained:
        raise TeacherError(
            f"teacher.model {name!r} names a place to load from, which is only done with teacher.weights: hub; give a timm "
            "name, or path/to/file.py:build"
        )
    known = timm.list_models()
    if ":" not in name and name.partition(".")[0] not in known:
        hint = did_you_mean(name, [*known, *entry_point_names(GROUP)]) or "timm.list_models() lists them"
        if Path(name).exists():
            hint = f"it is {called(name) or 'a path'}: weights are given by teacher.weights, next to the name of their model"
        raise TeacherError(
            f"teacher.model {name!r} is no timm model; {hint.rstrip('?')}; torchvision's are torchvision:NAME, your own is path/to/file.py:build"
        )
    try:
        with (
            quiet_hub(),
            waiting_for_hub(f"timm's weights of {name}", _OFFLINE) if pretrained else contextlib.nullcontext(),
        ):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as e:  # timm, the hub's client and constructors raise whatever they like
        if pretrained:
            repo = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None) or name
            why = refusal_of(e, repo) or one_line(e, 100)
            raise TeacherError(
                f"timm's weights of {name} can't be had: {why}; or give a file in teacher.weights, downloaded elsewhere"
            ) from None
        raise TeacherError(f"timm can't build {name} with teacher.kwargs {kwargs}: {one_line(e)}") from None
    return model


def _refuse_files(kwargs: dict[str, Any]) -> None:
    for key in kwargs.keys() & READ_BY_TIMM:
        raise TeacherError(
            f"teacher.kwargs has {key}: {kwargs[key]!r}, by which timm would read a file of its own choice; leave it out, "
            "set teacher.weights"
        )


def _from_hub(config: TeacherConfig) -> Built:
    """A timm model by the config.json of a repository of the hub, with random weights: no code of a repository is run."""
    _refuse_files(config.kwargs)
    address = parse_address(config.model, "teacher.model")
    if ".py" in address.path:
        raise TeacherError(
            f"teacher.model {str(address)[:100]!r} is code, and no code of a repository is run; download the file, read it, and "
            "give its own path: path/to/file.py:build"
        )
    address = pin(address, "teacher.model")
    try:
        model: nn.Module = timm.create_model(f"local-dir:{local_copy(address, 'teacher.model')}", **config.kwargs)
    except CskdError:
        raise
    except Exception as e:  # a config.json of anything, kwargs that a constructor refuses
        raise TeacherError(
            f"teacher.model {str(address)[:100]!r} is no repository of a timm model with teacher.kwargs {config.kwargs}: "
            f"{one_line(e, 100)}; give one whose config.json names an architecture of timm"
        ) from None
    return _built_by_timm(model, str(address), config.kwargs)


def _from_timm(config: TeacherConfig) -> Built:
    if not config.model:
        raise TeacherError("teacher.model is empty; give a timm name such as resnet50, or path/to/file.py:build")
    model = build_model(config.model, config.kwargs, pretrained=config.weights == "hub")
    return _built_by_timm(model, config.model, config.kwargs)


def _built_by_timm(model: nn.Module, name: str, kwargs: dict[str, Any]) -> Built:
    resolve: Callable[..., dict[str, Any]] = resolve_model_data_config
    stated = resolve(model)
    stated["input_size"] = stated["input_size"][-1]
    return Built(model, {"model": name, "kwargs": dict(kwargs)}, stated)


def _from_torchvision(config: TeacherConfig) -> Built:
    """A classifier of torchvision.models; what it states is what its published weights were evaluated with."""
    try:
        models: Any = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as e:  # RuntimeError: built for another torch
        raise TeacherError(f"teacher.model {config.model!r} needs torchvision ({one_line(e)}); install it") from None
    name, hub = config.model.removeprefix(TORCHVISION), config.weights == "hub"
    known = models.list_models(module=models)
    if name not in known:
        hint = did_you_mean(name, known) or "torchvision.models.list_models() lists them"
        raise TeacherError(f"teacher.model {config.model!r}: no classifier of torchvision has that name; {hint}")
    published = models.get_model_weights(name).DEFAULT
    # Two that would otherwise draw slow random weights, with a warning.
    plain = {} if hub or name not in ("googlenet", "inception_v3") else {"init_weights": False}
    whence = f"the weights of {config.model} from {published.url.partition('/models')[0]}"
    try:
        with said_when_long(whence, f"without a network give {_OFFLINE}") if hub else contextlib.nullcontext():
            model = models.get_model(name, weights=published if hub else None, **plain | config.kwargs)
    except Exception as e:  # a download, or a constructor
        if hub:
            raise TeacherError(
                f"the weights of {config.model} can't be had ({one_line(e)}); give a file in teacher.weights"
            ) from None
        raise TeacherError(
            f"{config.model} can't be built with teacher.kwargs {config.kwargs}: {one_line(e)}"
        ) from None
    how = published.transforms()
    stated = {"mean": how.mean, "std": how.std, "interpolation": how.interpolation.value}
    stated |= {"input_size": how.crop_size[0], "crop_pct": min(1.0, how.crop_size[0] / how.resize_size[0])}
    return Built(model, {"model": config.model, "kwargs": dict(config.kwargs)}, stated)


def _own(model: str) -> OwnCode | None:
    """The code that `teacher.model` names by its place, or by an entry point that has no timm name."""
    if model.startswith(TORCHVISION):
        return None
    if names_own_code(model) or (model and ":" not in model and model.partition(".")[0] not in timm.list_models()):
        return load_own(model, "teacher.model", GROUP, "function", TeacherError)
    return None


def _from_own(config: TeacherConfig, code: OwnCode) -> Built:
    """Call the user's function."""
    where, maker = code.where, code.value
    if not callable(maker):  # of an entry point
        raise TeacherError(f"teacher.model: {where} is no function; it must return a torch.nn.Module")
    with neighbours_of(code.file) if code.file else contextlib.nullcontext(dict[str, str]()) as called:
        try:
            model = maker(**config.kwargs)
        except (Exception, SystemExit) as e:
            raise TeacherError(f"teacher.model: {where} with {config.kwargs} failed: {one_line(e)}") from None
    neighbours = code.neighbours | called
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; teacher.compile does that
    if isinstance(model, torch.jit.ScriptModule):
        raise TeacherError(f"teacher.model: {where} returned a TorchScript module; return the plain nn.Module")
    if not isinstance(model, nn.Module):
        raise TeacherError(f"teacher.model: {where} returned a {type(model).__name__}, not a torch.nn.Module")
    stated = dict(getattr(model, "pretrained_cfg", None) or {})
    if isinstance(stated.get("input_size"), tuple | list):
        stated["input_size"] = stated["input_size"][-1]
    source = {"model": code.name, "file_sha256": code.sha256, "kwargs": dict(config.kwargs)}
    return Built(model, source | ({"neighbours": neighbours} if neighbours else {}), stated)


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a file of weights into `model`, strictly; other float types are cast to the model's.

    Args:    path as `cskd.files.weights.read_weights` takes it.
    Returns: notes: which part of a checkpoint was taken.
    Raises:  TeacherError where the file can't be read, or does not fit the model.
    """
    path = weight_file(path)
    expected = model.state_dict()
    try:
        weights = read_weights(path, expected)
    except ValueError as e:
        raise TeacherError(f"teacher.weights: {path} {e}; give a state dict, .safetensors or of torch.save") from None
    if faults := misfit(weights.tensors, expected):
        taken = f"{weights.taken}: " if weights.taken else ""
        raise TeacherError(
            f"teacher.weights: {path} does not fit the model ({taken}{faults}); "
            + (one_part(path) or "check teacher.model and teacher.kwargs, such as num_classes")
        )
    model.load_state_dict(weights.tensors, strict=False)  # only counters can be missing here
    return weights.notes


def weight_file(path: Path) -> Path:
    """The file that `teacher.weights` names. TeacherError where there is none."""
    try:
        return given_file(fetched(path, "teacher.weights"))
    except ValueError as e:
        raise TeacherError(f"teacher.weights: {e}; give a .safetensors or .pth file, or 'hub'") from None


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, sorted by name: name, dtype, shape and bytes of each."""
    h = hashlib.sha256()
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
