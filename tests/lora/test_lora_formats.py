"""LoRA files in common layouts: changes of the weights against formulas in float64, and refusals by name."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from lora_files import peft, random_lora, write
from lora_layouts import ADALN, READ, TO_K, TO_OUT, TO_Q, W2, Base, Example, Maker, changes_of, product
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared import CHECKPOINT
from torch import Tensor
from zimage_rt.benchmarks.fidelity import psnr

import zimage_rt
from zimage_rt.backends.base import Dense, LowRank
from zimage_rt.bundle.manifest import Manifest, read_manifest
from zimage_rt.bundle.modules import LORA_MODULES
from zimage_rt.bundle.safetensors_file import _FP8
from zimage_rt.errors import LoraError, LoraWarning
from zimage_rt.lora.file import read_lora
from zimage_rt.lora.manager import combine
from zimage_rt.lora.match import match_layers

PROMPT = "a panda on a blue background"


@pytest.fixture(scope="module")
def base() -> Base:
    """The checkpoint's own tensors, by the names of its layers."""
    files = [*CHECKPOINT.glob("transformer/*.safetensors"), *CHECKPOINT.glob("text_encoder/*.safetensors")]
    where = {key.removeprefix("model."): (path, key) for path in files for key in load_file(path)}

    def read(name: str) -> Tensor:
        path, key = where[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(key).float()

    return read


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(bundle)


@pytest.fixture
def engine(loaded: zimage_rt.Engine) -> Iterator[zimage_rt.Engine]:
    yield loaded
    for name in loaded.loras:
        loaded.unload_lora(name)


def sketch(engine: zimage_rt.Engine) -> np.ndarray:
    """An image that depends on every weight and takes no time."""
    return engine.generate(PROMPT, seed=3, height=64, width=64, num_inference_steps=1).images


def save(path: Path, example: Example) -> Path:
    tensors = {name: value.clone().contiguous() for name, value in example.tensors.items()}
    save_file(tensors, path, example.metadata or None)
    return path


def assert_close(got: dict[str, np.ndarray], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        want = value.double().numpy()
        # fp32 sums of weights of size 1e-2 to 1: nothing but their last bits differs.
        assert np.linalg.norm(got[name] - want) <= 1e-5 * np.linalg.norm(want), name


@pytest.mark.parametrize("layout", READ)
def test_a_layout_changes_the_weights_as_its_formula_says(base, bundle, manifest, tmp_path, layout):
    example = READ[layout](Maker(base))
    placed = match_layers(read_lora(save(tmp_path / "a.safetensors", example)), manifest, bundle)
    matrices, vectors = changes_of(placed, manifest, bundle)
    assert_close(matrices, example.deltas)
    assert_close(vectors, example.vectors)
    assert bool(example.warns) == bool(placed.notes)


PICTURES = ("LoKr, both whole, alpha 1e10, lycoris_", "LoHa", "DoRA, dora_scale [1, in]", ".set_weight")


@pytest.mark.parametrize("layout", PICTURES)
def test_an_image_is_that_of_a_plain_lora_of_the_same_change(engine, base, tmp_path, layout):
    example = READ[layout](Maker(base))
    plain = {}
    for name, delta in example.deltas.items():
        plain[f"{name}.lora_A.weight"] = torch.eye(delta.shape[1])
        plain[f"{name}.lora_B.weight"] = delta.float()
    for name, delta in example.vectors.items():
        plain[f"{name.rpartition('.')[0]}.{'diff' if name.endswith('weight') else 'diff_b'}"] = delta.float()
    before = sketch(engine)
    # A few layers, changed a little: more than their file says is seen better.
    engine.load_lora(save(tmp_path / "layout.safetensors", example), weight=6.0)
    image = sketch(engine)
    engine.unload_lora("layout")
    assert sketch(engine).tobytes() == before.tobytes()
    engine.load_lora(write(tmp_path / "plain.safetensors", plain), weight=6.0)
    assert psnr(image, sketch(engine)) >= 55
    assert psnr(image, before) < 45


@pytest.mark.parametrize("layout", ["layers that never run", "metadata lora_alpha", "metadata ss_network_alpha"])
def test_what_is_not_certain_is_said_once(engine, base, tmp_path, layout):
    example = READ[layout](Maker(base))
    path = save(tmp_path / "a.safetensors", example)
    with pytest.warns(LoraWarning, match=example.warns) as told:
        engine.load_lora(path)
    assert len(told) == 1
    assert Path(told[0].filename).name == Path(__file__).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.set_loras({"a": 0.5})


def test_weights_and_loras_of_different_kinds_sum(engine, base, bundle, manifest, tmp_path):
    """A weight scales the change, and changes of one matrix by several files are added before they are rounded."""
    kinds = ("LoKr, both whole, alpha 1e10, lycoris_", "DoRA, magnitude", "1x1 convolutions")
    examples = [READ[kind](Maker(base)) for kind in kinds]
    loras = [
        match_layers(read_lora(save(tmp_path / f"{i}.safetensors", one)), manifest, bundle)
        for i, one in enumerate(examples)
    ]
    changes = combine(list(zip(loras, (0.5, -0.25, 2.0), strict=True)), "transformer")
    where = manifest.module("transformer").linears[W2]
    (change,) = [change for change in changes if change.tensor == where.tensor]
    assert isinstance(change, Dense)
    expected = sum(w * one.deltas[W2] for w, one in zip((0.5, -0.25, 2.0), examples, strict=True))
    np.testing.assert_allclose(change.make().T, expected.numpy(), atol=1e-6)
    # What only thin matrices change stays their product.
    assert all(isinstance(one, LowRank) for one in combine([(loras[2], 1.0)], "transformer"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dora_takes_the_norms_of_what_a_bundle_stores(base, bundle, manifest, tmp_path, dtype):
    """A half-precision bundle's own numbers are the weight, so a magnitude of its norms changes nothing."""
    spec = manifest.module("transformer")
    stored = load_file(bundle / spec.weights)
    for name, value in stored.items():
        if value.ndim == 2 and name.endswith(".weight"):
            stored[name] = value.to(dtype)
    for module in LORA_MODULES:
        other = manifest.module(module).weights
        (tmp_path / other).symlink_to(bundle / other) if module != "transformer" else save_file(
            stored, tmp_path / other
        )
    weight = stored["layers.1.feed_forward.w2.weight"].double()
    norms = weight.norm(dim=0).float()
    down, up = torch.ones(1, 1024), torch.zeros(384, 1)
    tensors = {f"{W2}.lora_A.weight": down, f"{W2}.lora_B.weight": up, f"{W2}.lora_magnitude_vector": norms}
    placed = match_layers(read_lora(write(tmp_path / "a.safetensors", tensors)), manifest, tmp_path)
    (change,) = combine([(placed, 1.0)], "transformer")
    # The norms of the fp32 numbers differ by 1e-5.
    assert (np.abs(change.make()) <= 4e-7 * weight.abs().numpy()).all()


def test_a_folder_of_diffusers_is_read(engine, base, tmp_path):
    example = READ["transformer.base_model.model."](Maker(base))
    (tmp_path / "style").mkdir()
    save(tmp_path / "style" / "pytorch_lora_weights.safetensors", example)
    assert engine.load_lora(tmp_path / "style") == "style"
    result = engine.generate(PROMPT, seed=3, height=64, width=64, num_inference_steps=1)
    result.save(tmp_path / "out.png")
    (record,) = [zimage_rt.read_record(tmp_path / "out.png")]
    assert len(record.loras[0]["sha256"]) == 64


# PEFT's settings as diffusers writes them.


def pattern_scale(
    base: Base, tmp_path: Path, settings: dict[str, object], prefix: str = "transformer."
) -> dict[str, float]:
    """Layer → the scale that the file's settings give it."""
    make, tensors = Maker(base), {}
    names = (TO_Q, TO_K, W2)
    for name in names:
        tensors[f"{prefix}{name}.lora_A.weight"], tensors[f"{prefix}{name}.lora_B.weight"] = make.pair(name, rank=4)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    file = read_lora(path)
    plain = {name: tensors[f"{prefix}{name}.lora_B.weight"].numpy() for name in names}
    return {
        layer.name.removeprefix(prefix): float((layer.up / plain[layer.name.removeprefix(prefix)]).mean())
        for layer in file.layers
    }


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("^layers.0.attention.to_k", True),
        (r"^layers\.0\.attention\.to_k", True),
        ("layers.0.attention.to_k", True),
        ("to_k", True),
        ("^to_k", False),
        ("o_k", False),
        ("^transformer.layers.0.attention.to_k", False),
        ("attention.to_", False),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "transformer.base_model.model."])
def test_a_pattern_means_what_peft_means(base, tmp_path, pattern, matches, prefix):
    assert (get_pattern_key([pattern], TO_K) == pattern) == matches
    settings = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 12}}
    scales = pattern_scale(base, tmp_path, settings, prefix)
    assert scales == pytest.approx({TO_Q: 1.0, TO_K: 3.0 if matches else 1.0, W2: 1.0})


def test_settings_are_those_of_the_component(base, tmp_path):
    settings = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}
    assert pattern_scale(base, tmp_path, settings) == pytest.approx({TO_Q: 2.0, TO_K: 2.0, W2: 2.0})


@pytest.mark.parametrize("pattern", [r"layers\.\d+\.attention", "(a+)+$", "to_(k|q)", "^", "to_k\\", r"\w"])
def test_another_regular_expression_is_refused_by_name(base, tmp_path, pattern):
    with pytest.raises(LoraError, match="expected a layer's name or the end of one") as error:
        pattern_scale(base, tmp_path, {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 8}})
    assert repr(pattern) in str(error.value)


# Refusals.

PAIR = "transformer.layers.0.attention.to_q"


def plain_pair(make: Maker, name: str = TO_Q) -> dict[str, Tensor]:
    down, up = make.pair(name)
    return {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}


def different_twice(make: Maker) -> dict[str, Tensor]:
    down, up = make.random(4, 384), make.random(1152, 4)
    key = "diffusion_model.layers.0.attention.qkv"
    return {**plain_pair(make), f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}


REFUSED: dict[str, tuple[Callable[[Maker], dict[str, Tensor]], str, str]] = {
    "a bias where the layer has none": (
        lambda make: {**plain_pair(make), f"{PAIR}.lora_B.bias": torch.ones(384)},
        f"{PAIR}.lora_B.bias",
        "this layer has no bias in this model",
    ),
    "a bias of another size": (
        lambda make: {f"transformer.{ADALN}.diff_b": torch.ones(5)},
        f"transformer.{ADALN}.diff_b",
        r"expected \[1536\], got \[5\]",
    ),
    "a norm that is not there": (
        lambda make: {"transformer.layers.0.attention_norm3.diff": torch.ones(384)},
        "transformer.layers.0.attention_norm3.diff",
        "no such layer",
    ),
    "a packed layer beside other split ones": (
        different_twice,
        f"{PAIR}.lora_A.weight",
        "a second time",
    ),
    "a magnitude of another size": (
        lambda make: {**plain_pair(make), f"{PAIR}.magnitude": torch.ones(5)},
        f"{PAIR}.magnitude",
        r"a magnitude of \[384\], \[384, 1\] or \[1, 384\]",
    ),
    "a magnitude alone": (
        lambda make: {**plain_pair(make), "transformer.layers.1.attention.to_q.dora_scale": torch.ones(384, 1)},
        "transformer.layers.1.attention.to_q.dora_scale",
        "two matrices beside it",
    ),
    "half a LoKr": (
        lambda make: {f"{PAIR}.lokr_w1": torch.ones(4, 4), f"{PAIR}.lokr_w2_a": torch.ones(96, 4)},
        f"{PAIR}.lokr_w2_a",
        "expected lokr_w2 beside it, or lokr_w2_a and lokr_w2_b",
    ),
    "a LoKr of another size": (
        lambda make: {f"{PAIR}.lokr_w1": torch.ones(4, 4), f"{PAIR}.lokr_w2": torch.ones(960, 960)},
        f"{PAIR}.lokr_w1",
        r"got \[3840, 3840\]: it is of a model of another size",
    ),
    "two kinds for one layer": (
        lambda make: {**plain_pair(make), f"{PAIR}.diff": torch.ones(384, 384)},
        f"{PAIR}.diff",
        "one way to change a layer, got LoRA and a difference",
    ),
    "whole numbers": (
        lambda make: {
            f"{PAIR}.lora_A.weight": torch.ones(2, 384, dtype=torch.int8),
            f"{PAIR}.lora_B.weight": torch.ones(384, 2),
        },
        f"{PAIR}.lora_A.weight",
        "got I8",
    ),
    "fp8 with scales": (
        lambda make: {**plain_pair(make), f"{PAIR}.lora_A.weight_scale": torch.ones(1)},
        f"{PAIR}.lora_A.weight_scale",
        "this is a quantised layer",
    ),
    "numbers that are not finite": (
        lambda make: {f"{PAIR}.lokr_w1": torch.full((4, 4), torch.inf), f"{PAIR}.lokr_w2": torch.ones(96, 96)},
        f"{PAIR}.lokr_w1",
        "finite",
    ),
    "two alphas": (
        lambda make: {**plain_pair(make), f"{PAIR}.alpha": torch.ones(2)},
        f"{PAIR}.alpha",
        r"expected one number, got \[2\]",
    ),
    "GLoRA": (
        lambda make: {**plain_pair(make), f"{PAIR}.a1.weight": torch.ones(2, 2)},
        f"{PAIR}.a1.weight",
        "this is GLoRA",
    ),
    "OFT": (
        lambda make: {**plain_pair(make), f"{PAIR}.oft_blocks": torch.ones(2, 2)},
        f"{PAIR}.oft_blocks",
        "this is OFT",
    ),
    "only layers that never run": (
        lambda make: {
            "siglip_embedder.1.lora_A.weight": torch.ones(2, 8),
            "siglip_embedder.1.lora_B.weight": torch.ones(8, 2),
        },
        "siglip_embedder.1.lora_A.weight",
        "never run, so it changes nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(base, bundle, manifest, tmp_path, case):
    make_tensors, key, message = REFUSED[case]
    path = tmp_path / "a.safetensors"
    save_file({name: value.clone().contiguous() for name, value in make_tensors(Maker(base)).items()}, path)
    with pytest.raises(LoraError, match=message) as error:
        match_layers(read_lora(path), manifest, bundle)
    assert key in error.value.keys
    assert key in str(error.value)
    assert len(str(error.value).splitlines()) <= 10


FOREIGN: dict[str, tuple[Callable[[int], dict[str, Tensor]], str]] = {
    "Flux": (
        lambda i: {
            f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")
        },
        "a LoRA of Flux",
    ),
    "Qwen-Image": (
        lambda i: {
            f"transformer.transformer_blocks.{i}.img_mlp.net.2.lora_{half}.weight": torch.ones(2, 2) for half in "AB"
        },
        "a LoRA of Qwen-Image",
    ),
    "SDXL": (
        lambda i: {f"lora_unet_down_blocks_{i}_attn.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")},
        "a LoRA of Stable Diffusion",
    ),
    "another size": (
        lambda i: {
            f"transformer.layers.{i % 5}.attention.to_q.lora_A.weight": torch.ones(2, 3840),
            f"transformer.layers.{i % 5}.attention.to_q.lora_B.weight": torch.ones(3840, 2),
            f"transformer.layers.{i}.attention.to_v.lora_A.weight": torch.ones(2, 3840),
        },
        "of a model of another size",
    ),
    "a transformer": (
        lambda i: {f"model.diffusion_model.layers.{i}.attention.qkv.weight": torch.ones(2, 2)},
        "a checkpoint of Z-Image's transformer",
    ),
    "a text encoder": (lambda i: {f"model.layers.{i}.self_attn.q_proj.weight": torch.ones(2, 2)}, "a language model's"),
    "a VAE": (
        lambda i: {f"decoder.mid.block_{i}.weight": torch.ones(2), "encoder.conv_in.weight": torch.ones(2)},
        "a VAE's",
    ),
    "a ControlNet": (lambda i: {f"control_layers.{i}.attention.to_q.weight": torch.ones(2)}, "a ControlNet's"),
    "an embedding": (lambda i: {"emb_params": torch.ones(2)}, "a textual inversion's embedding"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_called_what_it_is_in_ten_lines(engine, tmp_path, kind):
    make_tensors, message = FOREIGN[kind]
    tensors = {name: value for i in range(40) for name, value in make_tensors(i).items()}
    path = write(tmp_path / "a.safetensors", tensors)
    for strict in (True, False):
        with pytest.raises(LoraError, match=message) as error:
            engine.load_lora(path, strict=strict)
        assert len(str(error.value).splitlines()) <= 10
        assert set(error.value.keys) == set(tensors)
    assert engine.loras == {}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file.*: GGUF is only read by zimage-export"),
        (b"PK\3\4" + bytes(64), "a pickle or an archive.*: convert it to safetensors"),
        (b"\x80\2}q\0." + bytes(64), "a pickle.*: convert it to safetensors"),
        (b"<html>", "a web page.*: fetch it again"),
    ],
)
def test_a_file_of_another_format_is_called_what_it_is(engine, tmp_path, content, kind):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(LoraError, match=f"it seems to be {kind}"):
        engine.load_lora(tmp_path / "a.safetensors")


# Reads the LoRAs that its arguments name, as a user to whom permissions apply: root reads everything.
READ_AS_USER = """
import mmap, os, sys  # mmap: numpy imports it late, perhaps from a folder that is closed to the user
from pathlib import Path
from zimage_rt.errors import LoraError
from zimage_rt.lora.file import is_folder, read_lora
if os.geteuid() == 0:
    os.seteuid(65534)
for path in map(Path, sys.argv[1:]):
    try:
        is_folder(path)
        read_lora(path)
        print("read")
    except LoraError as error:
        print(error)
"""


def test_what_may_not_be_read_is_said():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose folders are closed to other users
        root = Path(name)
        root.chmod(0o755)
        (file := root / "style.safetensors").touch(0o000)
        for folder in (closed := root / "closed", unlisted := root / "unlisted"):
            (folder / "lora").mkdir(parents=True)
            (folder / "lora" / "adapter_model.safetensors").write_bytes(b"")
        peft = root / "peft"
        peft.mkdir()
        halves = {"lora_A": torch.ones(2, 384), "lora_B": torch.ones(384, 2)}
        tensors = {f"transformer.{TO_OUT}.{half}.weight": value for half, value in halves.items()}
        write(peft / "adapter_model.safetensors", tensors)
        (peft / "adapter_model.safetensors").chmod(0o644)
        (config := peft / "adapter_config.json").touch(0o000)
        closed.chmod(0o000)
        (unlisted / "lora").chmod(0o000)
        paths = [file, closed / "style.safetensors", closed / "lora", unlisted / "lora", peft]
        command = [sys.executable, "-c", READ_AS_USER, *map(str, paths)]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        finally:
            closed.chmod(0o755)
            (unlisted / "lora").chmod(0o755)
    assert run.returncode == 0, run.stderr
    meant = [*paths[:3], unlisted / "lora" / "adapter_model.safetensors", config]
    for line, path in zip(run.stdout.splitlines(), meant, strict=True):
        assert line.startswith(f"{path} cannot be read: permission denied; let this user")


def half_foreign(make: Maker) -> Example:
    """One layer that fits, one of another size, one without a place, and a key that means nothing."""
    down, up = make.pair(TO_OUT)
    tensors = {f"transformer.{TO_OUT}.lora_A.weight": down, f"transformer.{TO_OUT}.lora_B.weight": up}
    bad = {"transformer.layers.77.attention.to_q.lora_A.weight": torch.ones(2, 384)}
    bad["transformer.layers.77.attention.to_q.lora_B.weight"] = torch.ones(384, 2)
    bad[f"transformer.{W2}.lora_A.weight"], bad[f"transformer.{W2}.lora_B.weight"] = (
        torch.ones(2, 5),
        torch.ones(384, 2),
    )
    bad["transformer.layers.0.attention.to_q.oft_R"] = torch.ones(2)
    return Example({**tensors, **bad}, {TO_OUT: product(down, up)})


def test_partly_uses_what_fits_and_lists_what_does_not(engine, base, tmp_path):
    example = half_foreign(Maker(base))
    path = save(tmp_path / "half.safetensors", example)
    fits = {name: value for name, value in example.tensors.items() if TO_OUT in name}
    with pytest.raises(LoraError, match=r"1 of its layers fit \(strict=False or --lora-partial"):
        engine.load_lora(path)
    assert engine.loras == {}
    with pytest.warns(LoraWarning, match=r"used 1 of 4 layers; left out:") as told:
        engine.load_lora(path, strict=False)
    assert set(told[0].message.keys) == set(example.tensors) - set(fits)
    assert all(key in str(told[0].message) for key in told[0].message.keys)
    image = sketch(engine)
    engine.unload_lora("half")
    engine.load_lora(write(tmp_path / "fits.safetensors", fits))
    assert sketch(engine).tobytes() == image.tobytes()


def test_the_command_takes_part_of_a_file(bundle, base, tmp_path):
    path = save(tmp_path / "half.safetensors", half_foreign(Maker(base)))
    command = [sys.executable, "-m", "zimage_rt.cli.main", "generate", str(bundle), "-p", PROMPT]
    command += ["--steps", "1", "--height", "64", "--width", "64", "--lora"]
    command += [f"{path}=0.5", "-o", str(tmp_path / "out.png")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--lora-partial" in refused.stderr
    partly = subprocess.run([*command, "--lora-partial"], capture_output=True, text=True)
    assert partly.returncode == 0, partly.stderr
    assert "warning: " in partly.stderr
    assert "used 1 of 4 layers; left out:" in partly.stderr
    assert (tmp_path / "out.png").is_file()


def test_a_plain_lora_stays_a_product_of_thin_matrices(base, bundle, manifest, tmp_path):
    """What was read before takes the same way to the weights: nothing of it is made whole."""
    model = ZImageTransformer2DModel.from_pretrained(CHECKPOINT / "transformer")
    path = write(tmp_path / "a.safetensors", peft(random_lora(model, seed=1)))
    placed = match_layers(read_lora(path), manifest)
    for module in LORA_MODULES:
        assert all(isinstance(change, LowRank) for change in combine([(placed, 1.0)], module))


def test_fp8_numbers_are_torchs():
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
        np.testing.assert_array_equal(_FP8[name], theirs)
