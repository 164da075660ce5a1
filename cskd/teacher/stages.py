"""Maps of the teacher's earlier stages, seen by forward hooks in the very pass that makes its logits.

A stage is a module by its path in the network, such as `layer2`, or the number of one that timm lists in `feature_info`.
"""

# Shapes: B batch, C channels, h w of the stage

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cskd.codecs.base import Outputs
from cskd.errors import TeacherError, shortened
from cskd.near import did_you_mean

FUSED = (
    0.1  # of a map's root mean square: how far folding, in half precision, may take it from the network as it was built
)


class Enough(BaseException):
    """Raised inside a forward that has gone as far as it was asked to."""


@dataclass
class Stages:
    """Of one network, which several threads may run at once: each sees its own maps.

    run: takes a few images through the network; built: gives the network as it was built, where `model` is a changed form of it,
    and an input for it; compiled: its hooks are not run.
    """

    model: nn.Module
    run: Callable[[], Any]
    built: Callable[[], tuple[nn.Module, Tensor]] | None = None
    compiled: bool = False
    _watched: dict[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)  # channels and grid
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: threading.local = field(default_factory=threading.local)

    def watch(self, names: Sequence[str]) -> None:
        """Have the maps of these stages seen from now on, before other threads run the network. TeacherError for a stage that there
        is not, that gives no map, or that folding has changed."""
        with self._lock:
            new = [name for name in names if name not in self._watched]
            if not new:
                return
            if self.compiled:
                raise TeacherError(
                    f"stage {new[0]} of a compiled teacher can't be read; set teacher.compile: false, or leave the stage out"
                )
            handles = [stage_of(self.model, name).register_forward_hook(self._hook(name)) for name in new]
            try:
                with self._watching(new) as maps:
                    self.run()
                _refuse_odd(new, maps, self._seen.times)
                if self.built is not None:
                    self._refuse_changed(new, maps)
            except BaseException:
                for handle in handles:
                    handle.remove()
                raise
            self._watched |= {n: (maps[n].shape[1], (maps[n].shape[2], maps[n].shape[3])) for n in new}

    def shape(self, name: str) -> tuple[int, tuple[int, int]]:
        """Channels and grid of a stage. TeacherError as `watch`."""
        self.watch([name])
        return self._watched[name]

    @contextlib.contextmanager
    def seen(self, names: Sequence[str], alone: bool = False) -> Iterator[dict[str, Tensor]]:
        """Around a forward in this thread: float32 [B, C, h, w], by stage. alone: it ends where all have been seen."""
        if not names:
            yield {}
            return
        self.watch(names)
        with self._watching(names, alone) as maps, contextlib.suppress(Enough):
            yield maps

    def truncate(self, names: Sequence[str]) -> tuple[int, int]:
        """Let go of the numbers of all modules that a forward up to these stages does not enter: after that `seen` must be asked for
        these `alone`. Returns: how many numbers of parameters and buffers are left, and how many there were."""
        self.watch(names)  # which runs all of it
        entered, used = set[nn.Module](), {part for name in names for part in stage_of(self.model, name).modules()}
        every = _numbers(self.model)
        handles = [m.register_forward_pre_hook(lambda module, _: entered.add(module)) for m in self.model.modules()]
        # A module that came to its end may have read numbers of parts that it did not call, as torch's attention does.
        handles += [m.register_forward_hook(lambda m, *_: used.update(m.modules())) for m in self.model.modules()]
        try:
            with self.seen(names, alone=True) as before:
                self.run()
        finally:
            for handle in handles:
                handle.remove()
        idle = [m for m in self.model.modules() if m not in used and entered.isdisjoint(m.modules())]
        kept = {id(t) for m in self.model.modules() if m not in idle for t in _own(m).values()}
        for module in idle:
            for name, tensor in _own(module).items():
                if id(tensor) in kept:  # another module shares it
                    continue
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(tensor.to("meta"), requires_grad=False)
                else:
                    module._buffers[name] = tensor.to("meta")
        with self.seen(names, alone=True) as after:
            self.run()
        if not all(torch.equal(before[name], after[name]) for name in names):
            raise TeacherError(
                f"the teacher gives another map of stage {names[0]} without its later layers; cache the stage instead"
            )
        return _numbers(self.model), every

    @contextlib.contextmanager
    def _watching(self, names: Sequence[str], alone: bool = False) -> Iterator[dict[str, Tensor]]:
        self._seen.maps, self._seen.names, self._seen.times = {}, set(names), Counter[str]()
        self._seen.alone = alone
        try:
            yield self._seen.maps
        finally:
            self._seen.maps = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        nhwc = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

        def see(module: nn.Module, inputs: Any, out: Any) -> None:
            maps = getattr(self._seen, "maps", None)
            if maps is None or name not in self._seen.names:
                return
            with torch._C.DisableTorchFunction():  # else a backbone that is watched would see these calls, too
                maps[name] = as_map(out, name, nhwc)
            self._seen.times[name] += 1
            if self._seen.alone and maps.keys() == self._seen.names:
                raise Enough

        return see

    def _refuse_changed(self, names: Sequence[str], maps: dict[str, Tensor]) -> None:
        """TeacherError where a stage gives something else than in the network as it was built."""
        assert self.built is not None
        model, x = self.built()
        plain = Stages(model, lambda: model(x))
        with torch.no_grad():
            plain.watch(names)
            with plain.seen(names) as before:
                model(x)
        for name in names:
            a, b = maps[name].cpu(), before[name].cpu()
            if a.shape != b.shape or float((a - b).square().mean().sqrt()) > FUSED * float(b.square().mean().sqrt()):
                raise TeacherError(
                    f"stage {name} of the folded teacher is not what the network gives there: what follows it was fused into it; name "
                    "the module around it, or set teacher.fold: false"
                )


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _numbers(model: nn.Module) -> int:
    """In parameters and buffers that are in memory, each once."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() for t in held.values() if not t.is_meta)


def stage_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a stage. TeacherError where there is none, with the names of some."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    modules.pop("", None)
    if name in modules:
        return modules[name]
    listed = [str(info.get("module")) for info in stated(model)]
    if name.isdecimal():
        if int(name) < len(listed) and listed[int(name)] in modules:
            return modules[listed[int(name)]]
        has = (
            f"timm lists {len(listed)} stages of it, from 0" if listed else "it states no stages (timm's feature_info)"
        )
        raise TeacherError(f"the teacher has no stage {name}: {has}; name a module, such as {_some(model, listed)}")
    hint = did_you_mean(name, list(modules)) or f"some are {_some(model, listed)}"
    raise TeacherError(f"the teacher has no module {shortened(repr(name), 60)}; {hint}")


def stated(model: Any) -> list[dict[str, Any]]:
    """What timm's models state of their stages; empty of others."""
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    return [one for one in info if isinstance(one, dict)] if isinstance(info, list | tuple) else []


def _some(model: nn.Module, listed: Sequence[str]) -> str:
    names = listed or [name for name, child in model.named_children() if list(child.children())]
    return shortened(", ".join(names), 80) or "none: it has no parts"


def as_map(out: Any, name: str, nhwc: bool = False) -> Tensor:
    """What a module gave as a map of its own: float32 [B, C, h, w]. TeacherError for what is no map."""
    if not isinstance(out, Tensor) or out.ndim != 4 or not out.is_floating_point():
        found = f"a tensor {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise TeacherError(
            f"stage {name} of the teacher gives {found}, expected a map [images, channels, rows, columns]; name another module"
        )
    x = out.detach().permute(0, 3, 1, 2) if nhwc else out.detach()
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _refuse_odd(names: Sequence[str], maps: dict[str, Tensor], times: Counter[str]) -> None:
    for name in names:
        if times[name] > 1:
            raise TeacherError(
                f"stage {name} of the teacher runs {times[name]} times in a pass; name the module around it"
            )
        if name not in maps:
            raise TeacherError(f"stage {name} of the teacher is not run when it takes an image; name another module")
        if not bool(maps[name].isfinite().all()):
            raise TeacherError(f"stage {name} of the teacher holds NaN or an infinity; check teacher.weights")


def joined(parts: Sequence[Outputs]) -> Outputs:
    """One batch of several."""
    if len(parts) == 1:
        return parts[0]
    features = [part.features for part in parts if part.features is not None]
    return Outputs(
        torch.cat([part.dense for part in parts]),
        torch.cat([part.image for part in parts]),
        None,
        torch.cat(features) if features else None,
        {name: torch.cat([part.stages[name] for part in parts]) for name in parts[0].stages},
    )


def taken(outputs: Outputs, rows: Tensor | slice) -> Outputs:
    """Some rows of a batch, as an index or a slice."""
    return Outputs(
        outputs.dense[rows],
        outputs.image[rows],
        None,
        None if outputs.features is None else outputs.features[rows],
        {name: maps[rows] for name, maps in outputs.stages.items()},
    )
