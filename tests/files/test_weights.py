"""Weights are found in the checkpoints of any training script by the names that fit, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pathlib
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cskd.files.inert import NoPickleError, Thing, read_pickle
from cskd.files.not_weights import one_part
from cskd.files.weights import misfit, read_weights

State = dict[str, Tensor]
torch_save: Any = torch.save


def network() -> nn.Module:
    return nn.Sequential(
        collections.OrderedDict(
            conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), inner=nn.Sequential(nn.Linear(4, 4)), fc=nn.Linear(4, 5)
        )
    )


MODEL: State = network().state_dict()
STATE: State = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in MODEL.items()}
OTHER: State = {k: v + 1 for k, v in STATE.items()}


def put(prefix: str, state: State = STATE) -> State:
    return {f"{prefix}{k}": v for k, v in state.items()}


def optimizer() -> dict[str, Any]:
    net = network()
    o = torch.optim.AdamW(net.parameters())
    net.requires_grad_(True)
    sum(p.sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    o.step()
    return o.state_dict()


ARGS = argparse.Namespace(model="resnet18", lr=0.1, out=pathlib.PurePosixPath("x"), at=datetime.timedelta(1))
CHECKPOINTS: dict[str, tuple[Any, str]] = {  # what is saved, and where its note says that the weights were taken
    "bare": (STATE, ""),
    "timm": (
        {"epoch": 3, "arch": "x", "state_dict": STATE, "optimizer": optimizer(), "version": 2, "args": ARGS}
        | {"amp_scaler": {"scale": 1.0}, "metric": np.float64(71.2)},
        "state_dict",
    ),
    "timm, averaged": ({"state_dict": OTHER, "state_dict_ema": STATE, "args": ARGS}, "state_dict_ema"),
    "torchvision": (
        {"model": OTHER, "model_ema": {"n_averaged": torch.tensor(3), **put("module.")}, "args": ARGS},
        "model_ema.module",
    ),
    "DeiT": ({"model": OTHER, "model_ema": STATE, "scaler": {}, "args": ARGS}, "model_ema"),
    "Lightning": (
        {
            "state_dict": put("model.") | {"criterion.weight": torch.ones(5)},
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.9), "dirpath": "x"}},
        },
        "state_dict.model",
    ),
    "Lightning, net": ({"state_dict": put("net.model.")}, "state_dict.net.model"),
    "DINO": ({"student": put("module.backbone.", OTHER), "teacher": put("backbone.")}, "teacher.backbone"),
    "tutorial": ({"model_state_dict": STATE, "optimizer_state_dict": optimizer()}, "model_state_dict"),
    "pytorch-cifar": ({"net": put("module."), "acc": 91.0}, "net.module"),
    "compiled and parallel": (put("_orig_mod.module."), "_orig_mod.module"),
    "parallel and compiled": ({"model": {"state_dict": put("module._orig_mod.backbone.")}}, "model.state_dict.module._orig_mod.backbone"),
    "wrapped inside": ({k.replace("inner.", "inner.module._orig_mod."): v for k, v in STATE.items()}, ""),
    "averaged by swa_utils": ({"swa_state": put("module."), "state": OTHER}, "swa_state.module"),
    "average without buffers": (
        {"state_dict": STATE, "ema": {k: v for k, v in OTHER.items() if "running" not in k}}, "state_dict",
    ),
    "the same under two keys": ({"model": STATE, "state_dict": STATE}, "model"),
    "thop's counters": (STATE | {"total_ops": torch.ones(1), "conv.total_params": torch.ones(1)}, ""),
    "no batch counter": ({k: v for k, v in STATE.items() if "num_batches" not in k}, ""),
    "a list": ([STATE, {"epoch": 3}], "0"),
    "parts in keys of their own": ({"inner": {"0": {k[8:]: v for k, v in STATE.items() if "inner" in k}}} | {k: v for k, v in STATE.items() if "inner" not in k}, ""),
    "parameters": ({"model": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in STATE.items()}}, "model"),
    "numpy arrays": ({"model": {k: v.numpy() for k, v in STATE.items()}, "best": np.float32(1)}, "model"),
    "float64": ({k: v.double() if v.is_floating_point() else v for k, v in STATE.items()}, ""),
    "views of one storage": ({k: torch.stack([v, v])[1].T.contiguous().T if v.ndim == 2 else v for k, v in STATE.items()}, ""),
}  # fmt: skip


def note_of(path: Path, model: State = MODEL, expected: State = STATE) -> str:
    """Read the weights, see that they are the expected ones, and give the notes as one text."""
    found = read_weights(path, model)
    assert misfit(found.tensors, model) is None
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor.to(expected[name].dtype), expected[name], rtol=0, atol=0)
    return " / ".join(found.notes)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "legacy", "protocol 4"],
)
def test_every_layout_in_every_form_gives_the_same_weights(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    value, where = CHECKPOINTS[name]
    torch_save(value, tmp_path / "w.pth", **options)
    note = note_of(tmp_path / "w.pth")
    assert f"weights taken from {where!r} of w.pth: 10 of 10 names fit" in note if where else note == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ""])
def test_the_form_is_seen_in_the_bytes_and_not_in_the_name(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}
    save_file(state, tmp_path / f"safe{suffix}")
    torch_save(state, tmp_path / f"torch{suffix}")
    for kind in ("safe", "torch"):
        assert note_of(tmp_path / f"{kind}{suffix}", expected=state) == ""


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_and_an_index_of_several_files_are_read(tmp_path: Path, form: str, whole: bool) -> None:
    save: Any = save_file if form.endswith("safetensors") else torch_save
    if whole:
        save(STATE, tmp_path / form)
    else:
        stem, _, end = form.rpartition(".")
        names = {k: f"{stem}-0000{1 + i % 2}-of-00002.{end}" for i, k in enumerate(STATE)}
        for file in set(names.values()):
            save({k: v for k, v in STATE.items() if names[k] == file}, tmp_path / file)
        (tmp_path / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        assert note_of(tmp_path / f"{form}.index.json") == ""
    assert note_of(tmp_path) == ""


def test_a_key_after_a_colon_says_which_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch_save({"state_dict": OTHER, "state_dict_ema": STATE}, path)
    assert "also there: state_dict (choose by w.pth:KEY)" in note_of(path)
    assert "'state_dict'" in note_of(tmp_path / "w.pth:state_dict", expected=OTHER)
    with pytest.raises(ValueError, match="under 'best'; there are tensors under state_dict, state_dict_ema"):
        read_weights(tmp_path / "w.pth:best", MODEL)


def test_of_two_that_fit_alike_none_is_guessed(tmp_path: Path) -> None:
    torch_save({"state_dict": put("a.") | put("b.", OTHER)}, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"2 sets of weights that fit: state_dict.a, state_dict.b; say which by w.pth:KEY"
    ):
        read_weights(tmp_path / "w.pth", MODEL)
    assert "'state_dict.b'" in note_of(tmp_path / "w.pth:state_dict.b", expected=OTHER)


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return out.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch_save(value, out, **options)
    return out.getvalue()


def arrays() -> bytes:
    out = io.BytesIO()
    np.savez(out, cls=np.ones(3), pos_embedding=np.ones(3))
    return out.getvalue()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a whole network": (lambda: saved(network()), "whole pickled torch.nn.modules.container.Sequential, .*state_dict"),
    "a whole network, old": (
        lambda: saved({"ema": network()}, _use_new_zipfile_serialization=False), "whole pickled .* under 'ema'",
    ),
    "TorchScript": (lambda: zipped(x__constants_dot_pkl=b"", x__code__a_dot_py=b""), "TorchScript"),
    "torch.export": (lambda: zipped(x__archive_format=b"pt2"), "torch.export"),
    "npz": (arrays, r"\.npz of NumPy arrays"),
    "a zip": (lambda: zipped(a=b"b"), r"without data\.pkl"),
    "Keras": (lambda: b"\x89HDF\r\n\x1a\n", "HDF5"),
    "gzip": (lambda: b"\x1f\x8b\x08", "unpack it first"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a web page": (lambda: b"\n<!DOCTYPE html>", "download it again"),
    "JSON": (lambda: b'{"a": 1}', "no weight_map"),
    "an index that leads out": (lambda: b'{"weight_map": {"fc.weight": "../w.pth"}}', "outside its folder"),
    "a tar": (lambda: b"x".ljust(257, b"\0") + b"ustar", "is a tar"),
    "nothing": (lambda: b"", "is empty: copy or download it again"),
    "pickle.dump": (lambda: b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n)Rs.", r"of pickle\.dump, .*: save it by torch\.save"),
    "XML": (lambda: b"<?xml version='1.0'?><net/>", "an XML file: only weights of PyTorch"),
    "other bytes": (lambda: b"\x08\x07\x12\x07pytorch", r"no checkpoint, or a damaged one \([a-z ]+\)$"),
    "no tensors": (lambda: saved({"epoch": 3}), "no state dict"),
    "objects": (lambda: saved({"args": ARGS}), "objects of argparse.Namespace"),
    "another network": (lambda: saved(nn.Linear(2, 2).state_dict()), "no name of this model, but 2: weight, bias; the model"),
    "cut off": (lambda: saved(STATE)[:-300], "damaged"),
    "cut off, old": (lambda: saved(STATE, _use_new_zipfile_serialization=False)[:-30], "damaged"),
    "sparse": (lambda: saved({"fc.weight": torch.ones(5, 4).to_sparse()}), "no tensor that has a name"),
    "quantised": (lambda: saved(STATE | {"fc.weight": torch.ones(5, 4, dtype=torch.int8)}), "not quantised"),
    "complex": (lambda: saved(STATE | {"fc.weight": torch.ones(5, 4, dtype=torch.complex64)}), "torch.complex64"),
    "one number repeated": (lambda: saved({"fc.weight": torch.ones(1).expand(5, 4)}), "repeats its numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_state_dict_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    (tmp_path / "w.pth").write_bytes(make())
    with pytest.raises(ValueError, match=reason) as e:
        read_weights(tmp_path / "w.pth", MODEL)
    assert len(str(e.value)) < 230 and "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", [".onnx", ".msgpack", ".engine", ".pdparams", ".tflite"])
def test_a_file_of_another_library_is_refused_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(ValueError, match=f"is a {suffix} file: only weights of PyTorch are read"):
        read_weights(tmp_path / f"w{suffix}", MODEL)


def test_parts_of_a_checkpoint_are_read_by_their_index_and_nothing_less(tmp_path: Path) -> None:
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(MODEL)}
    for part in set(names.values()):
        save_file({key: STATE[key] for key, name in names.items() if name == part}, tmp_path / part)
    with pytest.raises(ValueError, match=r"holds parts of a checkpoint without their index: copy or download that too"):
        read_weights(tmp_path, MODEL)
    one = tmp_path / names["fc.weight"]
    assert one_part(one) == "it is one of 2 parts: give model.safetensors.index.json, next to all of them"
    assert one_part(tmp_path / "model.safetensors") is None
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert read_weights(tmp_path, MODEL).tensors.keys() == MODEL.keys()
    one.unlink()
    with pytest.raises(ValueError, match=f"names {one.name}, which is not next to it: copy or download all 2 files"):
        read_weights(tmp_path, MODEL)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.setrecursionlimit, (12345,))


@pytest.mark.parametrize("legacy", [True, False])
def test_objects_besides_the_weights_are_named_and_never_run(tmp_path: Path, legacy: bool) -> None:
    limit = sys.getrecursionlimit()
    torch_save({"model": STATE, "x": Evil()}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert "w.pth names sys.setrecursionlimit, which were neither loaded nor run" in note_of(tmp_path / "w.pth")
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize("op", pickletools.opcodes, ids=lambda op: op.name)
def test_every_opcode_is_plain_data_or_refused(op: Any) -> None:
    """Alone, and after what it may expect on the stack; with an argument of zeros."""
    target = b"cos\nsystem\n"
    for before in (
        b"",
        b"(",
        target + b")",
        b"(" + target,
        target + b"}",
        b"](N",
        b"}(NN",
        b"X\2\0\0\0osX\6\0\0\0system",
    ):
        for argument in (b"", b"\1" + bytes(8), b"os\nsystem\n", struct.pack("<Q", 1 << 40)):
            try:
                value = read_pickle(io.BytesIO(before + op.code.encode("latin1") + argument + b"."))
            except NoPickleError:
                continue
            assert isinstance(
                value, None | bool | int | float | str | bytes | bytearray | list | tuple | dict | Thing
            ) or (type(value).__module__ == "cskd.files.inert" or type(value) is object)


def test_copies_that_a_few_bytes_ask_for_are_refused() -> None:
    big = b"\x80\x02]q\0(" + b"N" * 100_000 + b"e0"
    with pytest.raises(NoPickleError, match="more than"):
        read_pickle(io.BytesIO(big + b"ctorch\nSize\nq\x010h\1h\0\x85R" * 100 + b"."))
    with pytest.raises(NoPickleError, match="steps"):
        read_pickle(io.BytesIO(b"N0" * (1 << 20) + b"N."))
