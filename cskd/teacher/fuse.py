"""On a CPU: each convolution with the activation behind it as one call of oneDNN, which saves a pass over memory.

Which activation follows which convolution is seen by running the network; that features and logits are the same is measured. A
forward of MobileNetV2 in bf16 takes 0.86 of the time that it takes with its norms folded alone, and 0.91 of folded and compiled
(`benchmarks/fold.py`), and starts in a second, without a C++ compiler.
The operator is the one Inductor calls (seen in torch 2.14), and not public: where it is missing, or refuses, nothing changes.
"""

# Shapes: B batch, H W pixels, C O channels in and out, k kernel

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cskd.teacher.fold import CONVOLUTIONS
from cskd.teacher.heads import Head

TOLERANCE = 1e-3  # of the root mean square of features and logits, as for folding

Act = tuple[str, list[float], str]  # an activation's name, numbers and algorithm, as Inductor hands them to oneDNN
_NOTHING: Act = "none", [], ""


class FusedConvolution(nn.Module):
    """A convolution over inputs of one size, and what follows it, in a dtype of its own.

    padding: of `_padded`; act: of `_act`; size: (H, W) of the input.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, convolution: nn.Conv2d, padding: tuple[Tensor, list[int]], act: Act, size: tuple[int, int]
    ) -> None:
        super().__init__()
        weight_OCkk, sides = padding
        self.register_buffer("weight", weight_OCkk.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if convolution.bias is None else convolution.bias.detach().clone())
        self.act, self.size = act, size
        self.settings = sides, list(convolution.stride), list(convolution.dilation), convolution.groups

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, O, H', W'], channels_last."""
        if x_BCHW.shape[2:] != self.size:
            raise ValueError(f"input of {list(x_BCHW.shape[2:])} pixels, expected {list(self.size)}")
        x = x_BCHW.to(self.weight.dtype, memory_format=torch.channels_last)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.settings, *self.act)
        return out


def fuse_activations(model: nn.Module, head: Head, x: Tensor, dtype: torch.dtype) -> int:
    """Replace the convolutions of the backbone in place, and compute in `dtype` those that autocast computes in it.

    Args:    model float32, in eval mode, on a CPU, and its head; x float32 [B, 3, H, W], the only size it will be given.
    Returns: how many were replaced. All or none: 0 where oneDNN can't, or the logits would be others; then the model is as it
             was.
    """
    with contextlib.ExitStack() as undo:
        try:
            before = _logits(head, x)
            features = before[0]
            with _autocast(dtype):
                rough = _distance(head.backbone(x).float(), features)
            new = _replacements(model, head, x)
            places = [
                (p, name, child) for p in model.modules() for name, child in p.named_children() if id(child) in new
            ]
            for parent, name, child in places:
                undo.callback(setattr, parent, name, child)
                setattr(parent, name, new[id(child)][0])
            off = max(_distance(a, b) for a, b in zip(_logits(head, x), before, strict=True))
            for module, own in new.values():
                module.to(dtype if own == dtype else torch.float32)
            with _autocast(dtype):  # a processor may have the one dtype and not the other
                still = _distance(head.backbone(x).float(), features)
        # An operator that is missing, or not for these sizes; and code of the user's own may raise anything.
        except Exception:
            return 0
        if not (off <= TOLERANCE and still <= 2 * rough + TOLERANCE and places):
            return 0
        undo.pop_all()
    return sum(isinstance(module, FusedConvolution) for module, _ in new.values())


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def _logits(head: Head, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, dense and global logits."""
    features = head.backbone(x)
    return features, *head.dense(features)


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of b's root mean square."""
    return float((a - b).abs().max() / b.square().mean().sqrt().clamp_min(1e-30))


def _replacements(model: nn.Module, head: Head, x: Tensor) -> dict[int, tuple[nn.Module, torch.dtype]]:
    """By the id of the module: what takes its place, and the dtype that autocast gives its output."""
    new: dict[int, tuple[nn.Module, torch.dtype]] = {}
    for seen in _seen(model, head, x):
        padding = _padded(seen.convolution, seen.size)
        if padding is None:
            continue
        act = None if seen.activation is None else _act(seen.activation)
        new[id(seen.convolution)] = (
            FusedConvolution(seen.convolution, padding, act or _NOTHING, seen.size),
            seen.dtype,
        )
        if act:
            new[id(seen.activation)] = nn.Identity(), seen.dtype
    return new


@dataclass
class _Seen:
    """A convolution that ran: (H, W) and dtype, under autocast, of its input and output; the activation that read it."""

    convolution: nn.Conv2d
    size: tuple[int, int]
    dtype: torch.dtype
    activation: nn.Module | None = None


def _seen(model: nn.Module, head: Head, x: Tensor) -> list[_Seen]:
    """The convolutions that run once, in the backbone, with one batch as their only argument."""
    wrote: dict[int, tuple[_Seen, int]] = {}  # by the tensor: who wrote it, and its version then
    runs: Counter[nn.Module] = Counter()
    found: dict[nn.Module, _Seen] = {}
    alive: list[Tensor] = []  # keeps addresses from being used again

    def after_convolution(module: nn.Conv2d, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        runs[module] += 1
        if len(inputs) == 1 and inputs[0].ndim == 4:
            found[module] = _Seen(module, (inputs[0].shape[2], inputs[0].shape[3]), out.dtype)
            wrote[id(out)] = found[module], out._version
            alive.append(out)

    def before_activation(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        read, version = wrote.get(id(inputs[0]), (None, 0)) if inputs else (None, 0)
        # A sum in place, as in ResNet, writes the same tensor.
        if read is not None and inputs[0]._version == version and read.activation is None:
            read.activation = module

    hooks: list[RemovableHandle] = []
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            continue  # somebody else watches it
        if type(module) in CONVOLUTIONS and module.padding_mode == "zeros":
            hooks.append(module.register_forward_hook(after_convolution))
        elif _act(module):
            hooks.append(module.register_forward_pre_hook(before_activation))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            features = head.backbone(x).float()
        backbone = list(found.values())
        head.dense(features)  # what runs here, too, stays
    finally:
        for hook in hooks:
            hook.remove()
    single = [seen for seen in backbone if runs[seen.convolution] == 1]
    for seen in single:
        if seen.activation is not None and runs[seen.activation] != 1:
            seen.activation = None
    return single


def _act(module: nn.Module) -> Act | None:
    """An activation as oneDNN names it; None for what is none, or is not known."""
    if type(module) is nn.ReLU:
        return "relu", [], ""
    if type(module) is nn.ReLU6:
        return "hardtanh", [0.0, 6.0], ""
    if type(module) is nn.SiLU:
        return "swish", [], ""
    if type(module) is nn.Hardswish:
        return "hardswish", [], ""
    return None


def _padded(convolution: nn.Conv2d, size: tuple[int, int]) -> tuple[Tensor, list[int]] | None:
    """Weight [O, C, k, k] and padding of the same convolution that pads both sides alike; None where there is none.

    TensorFlow's 'same' pads one more behind than before where the numbers ask for it: a kernel with a line of zeros in front,
    and that one more on both sides, reads the same pixels.
    """
    weight_OCkk = convolution.weight.detach()
    if isinstance(convolution.padding, str):
        return None
    if not isinstance(convolution, Conv2dSame):
        return weight_OCkk.clone(), list(convolution.padding)
    kernel, stride, dilation = convolution.kernel_size, convolution.stride, convolution.dilation
    total = [get_same_padding(*numbers) for numbers in zip(size, kernel, stride, dilation, strict=True)]
    top, left = (n % 2 for n in total)
    if (top and dilation[0] > 1) or (left and dilation[1] > 1):
        return None
    return F.pad(weight_OCkk, (left, 0, top, 0)), [-(-n // 2) for n in total]
