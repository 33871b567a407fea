"""Files of upscale models: every format gives torch's numbers, and nothing of a file is ever run."""

from __future__ import annotations

import functools
import io
import os
import pickle
import random
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from shared import ROOT
from upscale_models import State, compact, renamed, rrdb, state_of

from zimage_rt.comfyui.inputs import InputError
from zimage_rt.comfyui.upscale.architectures import build
from zimage_rt.comfyui.upscale.model import load_upscaler
from zimage_rt.comfyui.upscale.pickled import Tensor
from zimage_rt.comfyui.upscale.torch_file import TorchFile
from zimage_rt.comfyui.upscale.weights import open_weights

DATA = ROOT / "tests" / "data" / "comfyui"
FORMATS = {"zip": True, "legacy": False}


def save(value: Any, path: Path, form: str = "zip") -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[form])
    return path


def tensors() -> dict[str, torch.Tensor]:
    """Views, number formats and shapes that files of torch may have."""
    base = torch.arange(-60, 60, dtype=torch.float32).reshape(2, 3, 4, 5) / 7
    return {
        "whole": base,
        "transposed": base.permute(3, 1, 0, 2),
        "slice": base[:, 1:, ::2, 3],
        "half": base.half(),
        "bfloat16": base.bfloat16().transpose(0, 3),
        "double": base.double(),
        "parameter": torch.nn.Parameter(base[1]),
        "scalar": torch.tensor(2.5),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_are_those_of_torch(form: str, tmp_path: Path) -> None:
    saved = tensors()
    file = TorchFile(save({"a": [saved], "count": torch.arange(3), "epoch": 7}, tmp_path / "x.pth", form))
    assert file.value["epoch"] == 7
    found = file.value["a"][0]
    assert list(found) == list(saved)
    for name, tensor in saved.items():
        read = file.read(found[name])
        assert read.dtype == np.float32 and read.flags.c_contiguous
        assert np.array_equal(read, tensor.detach().float().numpy()), name
    with pytest.raises(ValueError, match="expected floating-point numbers, got I64"):
        file.read(file.value["count"])


@pytest.mark.parametrize("name", ["upscale_compact.pth", "upscale_compact_legacy.pth"])
def test_stored_files_of_torch_are_read(name: str) -> None:
    weights = open_weights(DATA / name)
    for key, tensor in state_of(compact(4, features=4)).items():
        assert np.array_equal(weights.read(key, *tensor.shape), tensor.numpy())
    assert load_upscaler(DATA / name, name).scale == 4


def model_bytes(path: Path) -> bytes:
    return build(open_weights(path)).model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"params_ema": state, "params": {"x": torch.zeros(1)}},
        lambda state: {"params": state},
        lambda state: {"state_dict": state, "epoch": 3, "loss": 0.5, "name": "x", "betas": (0.9, 0.99), "best": None},
        lambda state: {"model_state_dict": {"module." + name: tensor for name, tensor in state.items()}},
        lambda state: {"anything": state},
        lambda state: {"state_dict": {"params_ema": state}},
        lambda state: OrderedDict((f"netG.{name}", tensor) for name, tensor in state.items()),
    ],
)
def test_the_weights_are_found_wherever_training_puts_them(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    state = state_of(compact(2))
    wanted = model_bytes(save(state, tmp_path / "plain.pth"))
    for form in FORMATS:
        assert model_bytes(save(wrap(state), tmp_path / "wrapped.pth", form)) == wanted


def test_a_modules_state_dict_and_safetensors_are_read(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.body = torch.nn.ModuleList(
        [torch.nn.Conv2d(3, 8, 3), torch.nn.PReLU(8), torch.nn.Conv2d(8, 8, 3), torch.nn.PReLU(8)]
    )
    module.body.append(torch.nn.Conv2d(8, 12, 3))
    state = module.state_dict()  # an OrderedDict with an attribute, _metadata
    assert hasattr(state, "_metadata")
    safetensors.torch.save_file(dict(state), tmp_path / "x.safetensors")
    wanted = model_bytes(tmp_path / "x.safetensors")
    for form in FORMATS:
        assert model_bytes(save(state, tmp_path / "x.pth", form)) == wanted


def test_an_archive_may_be_deflated(tmp_path: Path) -> None:
    source = save(state_of(compact(2)), tmp_path / "x.pth")
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
        again = tmp_path / f"{method}.pth"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(again, "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        if method == zipfile.ZIP_DEFLATED:
            assert model_bytes(again) == model_bytes(source)
        else:
            with pytest.raises(ValueError, match="stored or deflated, got method 14"):
                open_weights(again)


# --- refused ----------------------------------------------------------------------------------------------------------


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *values: Any) -> None:
        self.call = (function, values)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "touch ran"), "posix.system"),
        (Call(eval, "open('ran', 'w')"), "__builtin__.eval"),
        (Call(functools.partial, print), "functools.partial"),
        (torch.nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
        (np.float64(1), "numpy.*scalar"),
        (torch.float32, "torch.float32"),
    ],
)
def test_what_is_no_tensor_is_named_and_not_run(
    value: Any, name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save({"params": state_of(compact(1)), "more": value}, tmp_path / "x.pth", form)
    with pytest.raises(InputError, match=rf"x\.pth: expected tensors and plain values, got {name}, which is not run"):
        load_upscaler(path, "x.pth")
    assert not (tmp_path / "ran").exists()


def archive(pickled: bytes, path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, content in members.items():
            file.writestr(f"x/data/{name.removeprefix('_')}", content)
    return path


def tensor_code(shape: tuple[int, ...], strides: tuple[int, ...], size: int, offset: int = 0) -> bytes:
    """A pickle of one tensor of any measures over storage 0."""

    class Stored(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python calls persistent_id for all
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", size) if value == "STORAGE" else None

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, shape, strides, False, OrderedDict())

    content = io.BytesIO()
    Stored(content, 2).dump({"t": Rebuilt(), "body.0.weight": Rebuilt()})
    return content.getvalue()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (tensor_code((2, 2), (2, 1), 3), r"a tensor of \[2, 2\] is larger than its storage of 3"),
        (tensor_code((1 << 40,), (0,), 4), "is larger than its storage of 4"),
        (tensor_code((2,), (1,), 4, offset=3), "is larger than its storage of 4"),
        (tensor_code((2,), (1,), 4, offset=-1), "sizes are not whole numbers"),
        (tensor_code((2,), (-1,), 4), "sizes are not whole numbers"),
        (tensor_code((2, 2), (1,), 4), "shape and strides do not belong together"),
        (tensor_code((1 << 30,), (1,), 1 << 30), "an upscale model of at most 134217728 numbers"),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(code: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_weights(archive(code, tmp_path / "x.pth", _0=b"\0" * 16))


def test_a_storage_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = archive(tensor_code((4,), (1,), 4), tmp_path / "x.pth", _0=b"\0" * 15)
    file = TorchFile(path)
    with pytest.raises(ValueError, match="cut short: 15 bytes of 16 in storage 0"):
        file.read(file.value["t"])
    file = TorchFile(archive(tensor_code((4,), (1,), 4), path))
    with pytest.raises(ValueError, match="its archive lacks x/data/0"):
        file.read(file.value["t"])


def test_a_dicts_key_that_never_ends_is_refused_at_once(tmp_path: Path) -> None:
    # A tuple of a tuple twice, and so on for 100 levels: its hash would take 2^100 steps.
    code = b"\x80\x02}()" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(100))
    begun = time.monotonic()
    with pytest.raises(ValueError, match="keys of a dict, got a tuple"):
        TorchFile(archive(code + b"K\x01u.", tmp_path / "x.pth"))
    assert time.monotonic() - begun < 5


def test_a_pickle_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02" + b"N0" * (1 << 24) + b"N.")
    assert path.stat().st_size < 1 << 18
    with pytest.raises(ValueError, match=r"its data\.pkl has more than 16777216 bytes"):
        TorchFile(path)


@pytest.mark.parametrize(
    "code", [b".", b"N", b"(.", b"0.", b"t.", b"NN.", b"h\x05.", b"N}b.", b"NR.", b"Q.", b"NQ.", b"]Na"]
)
def test_damaged_pickles_are_refused(code: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        TorchFile(archive(b"\x80\x02" + code, tmp_path / "x.pth"))


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    path = archive(b"\x80\x02}.", tmp_path / "x.pt")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/constants.pkl", b"\x80\x02).")
    with pytest.raises(InputError, match=r"x\.pt: expected weights, got a TorchScript program; save"):
        load_upscaler(path, "x.pt")


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_1000_damaged_files_are_refused_or_read(form: str, tmp_path: Path) -> None:
    whole = save({"params": state_of(compact(1, features=2))}, tmp_path / "x.pth", form).read_bytes()
    path = tmp_path / "damaged.pth"
    refused = 0
    for seed in range(500):
        chance = random.Random(seed)
        content = bytearray(whole)
        if seed % 4 == 0:
            del content[chance.randrange(len(content)) :]
        for _ in range(chance.randint(1, 4)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            load_upscaler(path, "damaged.pth")
        except InputError as error:
            assert str(error).startswith("damaged.pth: ")
            refused += 1
    assert refused > 150


# --- models that are not served ---------------------------------------------------------------------------------------


def without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


BIG, SMALL = state_of(rrdb(2)), state_of(compact(2))
ATTENTION = "layers.0.residual_group.blocks.0.norm1.weight"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "expected tensors by name, got none"),
        ({"x.weight": torch.zeros(3)}, "expected an ESRGAN-type model .* got weights named x.weight; take one such as"),
        ({"conv_first.weight": torch.zeros(1), ATTENTION: torch.zeros(1)}, "got a SwinIR model"),
        ({"layers.0.blocks.0.attn.attns.0.pos.pos3.0.weight": torch.zeros(1)}, "got a DAT model"),
        (without(BIG, "model.1.sub.1.RDB2.conv3.0.bias"), r"expected .*RDB2.conv3.0.bias of \[32\], got nothing"),
        (without(BIG, "model.10.weight"), "expected model.10.weight of .* got nothing"),
        (BIG | {"model.6.weight": torch.zeros(16, 16, 1, 1)}, r"expected \[16, 16, 3, 3\], got \[16, 16, 1, 1\]"),
        (BIG | {"model.11.weight": torch.zeros(1)}, "expected the last layer at model.4, 7, 10 or 13, got 11"),
        (state_of(rrdb(2, inputs=4)), "model.0.weight: expected 3, 12 or 48 input channels, got 4"),
        (state_of(rrdb(0, inputs=12)), "expected 3, 12 or 48 input channels, got 12"),
        (SMALL | {"body.4.bias": torch.zeros(13)}, "expected a model of 3 colours, got 3 input and 13 output"),
        (SMALL | {"body.2.bias": torch.full((8,), float("nan"))}, "body.2.bias: expected finite numbers"),
        (SMALL | {"body.2.bias": torch.zeros(8, dtype=torch.int64)}, "body.2.bias: expected floating-point"),
        (renamed(without(BIG, "model.8.weight"), "basicsr"), "expected model.8.weight"),
        (BIG | {"model.1.sub.0.RDB1.conv1.1.weight": torch.zeros(32)}, "further weights: model.1.sub.0.RDB1.conv1.1"),
        (SMALL | {"body.3.bias": torch.zeros(8)}, "got one with further weights: body.3.bias"),
    ],
)
def test_a_model_that_is_not_served_is_named(state: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"x\.pth: .*{message}"):
        load_upscaler(save(state, tmp_path / "x.pth"), "x.pth")


def test_what_new_names_have_beside_the_network_is_left_out(tmp_path: Path) -> None:
    """As in ComfyUI, which takes the weights that it knows from such files."""
    state = renamed(BIG, "basicsr")
    more = save(state | {"discriminator.weight": torch.zeros(3)}, tmp_path / "more.pth")
    assert model_bytes(more) == model_bytes(save(state, tmp_path / "x.pth"))


def test_what_is_no_dict_is_refused(tmp_path: Path) -> None:
    for value in (torch.zeros(3), [torch.zeros(3)], 3):
        with pytest.raises(ValueError, match=r"expected a dict of tensors|expected tensors by name"):
            open_weights(save(value, tmp_path / "x.pth"))
    assert isinstance(TorchFile(save(torch.zeros(3), tmp_path / "x.pth")).value, Tensor)


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match=r"x\.safetensors: not a safetensors file, or cut short"):
        load_upscaler(tmp_path / "x.safetensors", "x.safetensors")
