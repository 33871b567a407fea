"""Quantised checkpoints: a bundle's weights are number x scale, rotated back; unsupported layers are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from export_checkpoints import copy_with, recipe  # noqa: E402
from quantized_files import LAYOUTS, Written, block_fp8, fp8, int8, nvfp4, quantize  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from single_files import check_second_reader, comfyui_names  # noqa: E402
from zimage_rt.export import weights  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import layouts, open_checkpoint  # noqa: E402
from zimage_rt.export.errors import CheckpointError, ParityError, RecipeError, TensorError  # noqa: E402
from zimage_rt.export.parity.measure import session  # noqa: E402
from zimage_rt.export.plan import plan_modules  # noqa: E402
from zimage_rt.export.precision import BF16  # noqa: E402
from zimage_rt.export.recipe import DEFAULT_SHAPES  # noqa: E402

from zimage_rt.bundle.manifest import ShapeRange  # noqa: E402

PREFIX = "model.diffusion_model."
# Comfy-Org quantises five matrices and the modulation of every block.
MATRICES = ("qkv.weight", "out.weight", "w1.weight", "w2.weight", "w3.weight", "adaLN_modulation.0.weight")


def wanted(name: str) -> bool:
    return ".final_layer." not in name and "final_layer" not in name and name.endswith(MATRICES)


@pytest.fixture(scope="session")
def transformer(small_checkpoint: Path) -> dict[str, Any]:
    """The small checkpoint's transformer as ComfyUI names it."""
    return comfyui_names(load_file(small_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"), PREFIX)


@pytest.fixture
def parts(small_checkpoint: Path) -> dict[str, Path]:
    return {name: small_checkpoint / name for name in ("text_encoder", "tokenizer", "tiny_vae")}


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(tensors: dict[str, Any], metadata: dict[str, str] | None = None, name: str = "file") -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return path

    return save


def stored_weights(path: Path, parts: dict[str, Path]) -> dict[str, Any]:
    """The transformer's tensors in a bf16 bundle's weight files."""
    stored = {}
    for plan in plan_modules(open_checkpoint(path, parts), BF16, ()):
        if plan.component.name == "transformer":
            module = weights.load(plan.meta_module(), plan.component)
            stored |= {f"{plan.name}/{name}": tensor for name, tensor in module.state_dict().items()}
    return stored


# --- every layout of the transformer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_stores_number_times_scale(layout: str, transformer, parts, save: Save):
    """To the last bit of bf16; parity's reader, which shares no code, reads the same."""
    file, plain, _ = quantize(transformer, layout, wanted)
    changed = [name for name in plain if not torch.equal(plain[name], transformer[name].float())]
    assert len(changed) >= 12
    path = save(file)
    got, expected = stored_weights(path, parts), stored_weights(save(plain, name="plain"), parts)
    assert len(expected) > 30
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    rotates = "convrot" in layout or "asym" in layout
    check_second_reader(open_checkpoint(path, parts).transformer, exact=not rotates)


def test_fp32_bundles_hold_the_exact_products(transformer, parts, save: Save):
    """Rotating back sums integers, which is exact in fp32, so values are rounded once."""
    for layout in ("int8_convrot", "nvfp4", "mxfp8", "float8_e4m3fn"):
        file, plain, _ = quantize(transformer, layout, wanted)
        tensors = open_checkpoint(save(file), parts).transformer.tensors
        for name in ("layers.1.attention.to_out.0.weight", "layers.0.feed_forward.w1.weight"):
            own = PREFIX + name.replace("to_out.0", "out")
            rows, columns = plain[own].shape
            assert torch.equal(tensors[name].load()[:rows, :columns], plain[own]), (layout, name)


def test_stored_numbers_and_scales_stay_reachable(transformer, parts, save: Save):
    file, _, _ = quantize(transformer, "int8_convrot", wanted)
    stored = open_checkpoint(save(file), parts).transformer.tensors["layers.0.attention.to_k.weight"].stored()
    layer = f"{PREFIX}layers.0.attention.qkv"
    assert stored.format == "int8_tensorwise"
    assert torch.equal(stored.numbers, file[f"{layer}.weight"][256:512])
    assert torch.equal(stored.scale, file[f"{layer}.weight_scale"][256:512])
    assert stored.rotation == 256


@pytest.mark.parametrize("layout", ["int8_convrot", "nvfp4"])
def test_metadata_in_the_header_may_omit_the_prefix(layout: str, transformer, parts, save: Save):
    file, _, metadata = quantize(transformer, layout, wanted, header=True)
    marked, _, _ = quantize(transformer, layout, wanted)
    by_header = open_checkpoint(save(file, metadata, "header"), parts).transformer
    by_tensor = open_checkpoint(save(marked, name="tensors"), parts).transformer
    for name, tensor in by_tensor.tensors.items():
        assert torch.equal(by_header.tensors[name].load(), tensor.load()), name
    check_second_reader(by_header, exact=layout == "nvfp4")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_prefixes(prefix: str, transformer, parts, save: Save):
    tensors = {prefix + name.removeprefix(PREFIX): tensor for name, tensor in transformer.items()}
    component = open_checkpoint(save(tensors), parts).transformer
    assert "all_x_embedder.2-1.weight" in component.tensors
    check_second_reader(component)


def test_diffusers_names_in_a_single_file(small_checkpoint: Path, parts, save: Save):
    tensors = load_file(small_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    component = open_checkpoint(save(tensors), parts).transformer
    assert component.tensors.keys() == tensors.keys()
    check_second_reader(component)


def test_norm_final_is_never_read(transformer, parts, save: Save):
    """One published file has NaN in it."""
    path = save({**transformer, f"{PREFIX}norm_final.weight": torch.full((256,), float("nan"))})
    assert "norm_final.weight" not in open_checkpoint(path, parts).transformer.tensors


def test_a_full_size_single_file_has_tongyis_rotary_tables(transformer, parts, save: Save):
    """1536 rows for the 6 B model's width; others keep diffusers' default."""
    assert open_checkpoint(save(transformer), parts).transformer.config["axes_lens"] == [1024, 512, 512]
    wide = {name: torch.zeros(0) for name in transformer if "norm" in name}
    wide |= {
        f"{PREFIX}x_embedder.weight": torch.zeros(3840, 64),
        f"{PREFIX}cap_embedder.1.weight": torch.zeros(3840, 2),
        f"{PREFIX}layers.0.attention.qkv.weight": torch.zeros(3, 1),
    }
    assert open_checkpoint(save(wide), parts).transformer.config["axes_lens"] == [1536, 512, 512]


# --- parity catches a misreading --------------------------------------------------------------------------------------


def test_parity_catches_numbers_that_were_misread(
    transformer, parts, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without the rotation, which the reference applies."""
    monkeypatch.setattr(layouts, "_rotation", lambda layer, shape: 0)
    path = save(quantize(transformer, "int8_convrot", wanted)[0])
    with pytest.raises(ParityError, match=r"context_refiner at .*relative error"):
        export(recipe(path, tmp_path / "out", parts=parts, vae=()))


# --- text encoders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoder(small_checkpoint: Path) -> dict[str, Any]:
    tensors = load_file(small_checkpoint / "text_encoder" / "model.safetensors")
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "layout", ["float8_e4m3fn", "nvfp4", "int8_convrot", "mxfp8", "legacy-scaled-fp8", "block-fp8", "plain-fp8"]
)
def test_text_encoders(layout: str, transformer, encoder, parts, save: Save):
    file, plain, _ = quantize(encoder, layout, lambda name: "mlp." in name or "attn.o_proj" in name)
    if layout == "legacy-scaled-fp8":
        file["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    path, main = save(file, name="encoder"), save(transformer)
    component = open_checkpoint(main, {**parts, "text_encoder": path}).text_encoder
    for name, values in plain.items():
        assert torch.equal(component.read(name.removeprefix("model."), tuple(values.shape)).float(), values), name
    check_second_reader(component, exact="convrot" not in layout)


def test_fp8_and_fp4_in_one_text_encoder(transformer, encoder, parts, save: Save):
    """`qwen_3_4b_fp4_mixed`: nvfp4 in the MLP, fp8 in the attention, bf16 elsewhere."""
    file, first, _ = quantize(encoder, "nvfp4", lambda name: "mlp." in name)
    file, second, _ = quantize(file, "float8_e4m3fn", lambda name: "attn" in name and "norm" not in name)
    expected = {name: first[name] if "mlp." in name else second[name] for name in encoder}
    path = save(file, name="encoder")
    component = open_checkpoint(save(transformer), {**parts, "text_encoder": path}).text_encoder
    for name, values in expected.items():
        assert torch.equal(component.read(name.removeprefix("model."), tuple(values.shape)).float(), values.float()), (
            name
        )
    check_second_reader(component)


def test_block_fp8_of_a_transformers_folder(small_checkpoint: Path, encoder, tmp_path: Path, monkeypatch):
    """Parity's reference is transformers' own loader, which dequantises it."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    config = json.loads((small_checkpoint / "text_encoder" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    file, expected = dict[str, Any](), dict[str, Any]()
    for name, tensor in encoder.items():
        expected[name] = tensor
        file[name] = tensor
        if "proj" in name:
            written: Written = block_fp8(tensor.double().numpy(), 32)
            expected[name] = written.values
            file.update({name.replace("weight", ending): part for ending, part in written.tensors.items()})
    save_file(file, folder / "model.safetensors")
    component = open_checkpoint(copy_with(small_checkpoint, tmp_path / "all", text_encoder=folder)).text_encoder
    for name, values in expected.items():
        assert torch.equal(component.tensors[name.removeprefix("model.")].load(), values), name
    check_second_reader(component)
    # transformers keeps the fp8 numbers where it sees a GPU that computes with them.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    check_second_reader(component)


# --- the VAE ----------------------------------------------------------------------------------------------------------


def test_a_vae_in_diffusers_names(small_checkpoint: Path, transformer, parts, save: Save):
    path = small_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    changes = {"vae": {"norm_num_groups": 8}}
    vae = open_checkpoint(save(transformer), {**parts, "vae": path}, changes).vae
    folder = open_checkpoint(small_checkpoint).vae
    assert vae is not None and folder is not None
    assert vae.tensors.keys() == folder.tensors.keys()
    for name, tensor in folder.tensors.items():
        assert torch.equal(vae.tensors[name].load(), tensor.load()), name
    for name, value in vae.config.items():
        assert folder.config[name] == value, name
    check_second_reader(vae)


# --- refusals ---------------------------------------------------------------------------------------------------------

QKV = f"{PREFIX}layers.0.attention.qkv"


def layer(written: Written, **changes: Any) -> dict[str, Any]:
    """Tensors of layers.0's qkv with `changes` by ending; None omits a tensor."""
    tensors = dict(written.tensors)
    if written.mark is not None:
        tensors["comfy_quant"] = comfy_quant(written.mark)
    tensors |= changes
    return {f"{QKV}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


def comfy_quant(value: object) -> Any:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


W = np.random.default_rng(0).standard_normal((768, 256))
BYTES = torch.zeros(768, 128, dtype=torch.uint8)
REFUSED = {
    "an unknown format": (
        layer(int8(W), comfy_quant=comfy_quant({"format": "int8_blockwise"})),
        "'int8_blockwise' is not read",
    ),
    "an unknown setting": (
        layer(nvfp4(W), comfy_quant=comfy_quant({"format": "nvfp4", "convrot": True})),
        r"nvfp4 metadata has 'convrot', which is not supported",
    ),
    "metadata that is no JSON": (layer(int8(W), comfy_quant=torch.zeros(3, dtype=torch.uint8)), "is no JSON"),
    "a group that does not fit": (
        layer(
            int8(W), comfy_quant=comfy_quant({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024})
        ),
        "256 columns are no multiple of its groups of 1024",
    ),
    "a group that is no power of 4": (
        layer(
            int8(W), comfy_quant=comfy_quant({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 128})
        ),
        "expected a power of 4, got 128",
    ),
    "integers without metadata": (layer(int8(W), comfy_quant=None), "I8 with 'weight_scale' and no metadata"),
    "integers without anything": (
        {f"{QKV}.weight": torch.zeros(768, 256, dtype=torch.int8)},
        r"tensor '.*qkv\.weight': its number format I8 has no metadata",
    ),
    "a missing scale": (layer(int8(W), weight_scale=None), "needs 'weight_scale', which is missing"),
    "a scale of another shape": (layer(int8(W), weight_scale=torch.ones(5, 1)), r"768 rows, got \[5, 1\]"),
    "another dtype than the metadata's": (
        layer(fp8(W), weight=torch.zeros(768, 256, dtype=torch.int8)),
        "expected F8_E4M3 or U8, got I8",
    ),
    "a scale that nothing reads": (
        {f"{QKV}.weight": torch.zeros(768, 256), f"{QKV}.weight_zero_scale": torch.ones(1)},
        r"tensor '.*weight_zero_scale': it is a scale or metadata that its layer does not use",
    ),
    "fp8 without a scale beside fp8 with one": (
        {**layer(fp8(W)), f"{PREFIX}layers.0.feed_forward.w1.weight": torch.zeros(682, 256, dtype=torch.float8_e4m3fn)},
        r"w1\.weight': it is F8_E4M3 without a scale, where other layers have one",
    ),
    "metadata without a weight": (
        {f"{PREFIX}layers.0.feed_forward.w4.comfy_quant": comfy_quant(int8(W).mark)},
        "int8_tensorwise needs 'weight', which is missing",
    ),
    "block scales in no tiles": (
        layer(nvfp4(W), weight_scale=torch.zeros(768, 5, dtype=torch.float8_e4m3fn)),
        r"expected 12288 numbers in tiles of 128 x 4, got \[768, 5\]",
    ),
    "nunchaku": ({f"{QKV}.qweight": BYTES, f"{QKV}.wscales": torch.zeros(4, 768)}, "quantised by nunchaku SVDQuant"),
    "bitsandbytes nf4": (
        {f"{QKV}.weight": BYTES, f"{QKV}.weight.quant_state.bitsandbytes__nf4": BYTES.clone()},
        "quantised by bitsandbytes nf4",
    ),
    "bitsandbytes int8": (
        {f"{QKV}.weight": torch.zeros(768, 256, dtype=torch.int8), f"{QKV}.SCB": torch.ones(768)},
        "quantised by bitsandbytes int8",
    ),
    "SDNQ": (
        {f"{QKV}.weight": BYTES, f"{QKV}.scale": torch.ones(768, 1), f"{QKV}.svd_up": torch.ones(768, 4)},
        "by SDNQ",
    ),
    "quanto": ({f"{QKV}.weight._data": BYTES, f"{QKV}.weight._scale": torch.ones(768, 1)}, "by optimum-quanto"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_layer_is_refused_by_name(case: str, transformer, parts, save: Save):
    """Each message names the file, the layer or tensor, the fault, and supported files."""
    changes, message = REFUSED[case]
    tensors = {name: tensor for name, tensor in transformer.items() if not name.startswith(QKV)}
    if f"{QKV}.weight" not in changes and case != "nunchaku":
        tensors[f"{QKV}.weight"] = transformer[f"{QKV}.weight"]
    path = save({**tensors, **changes})
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path, parts)
    assert str(path) in str(error.value)
    assert "give the model's bf16, fp8, int8 (convrot), mxfp8, nvfp4 or GGUF file" in str(error.value)


def test_a_header_that_names_no_layer_of_the_file(transformer, parts, save: Save):
    metadata = {"_quantization_metadata": json.dumps({"layers": {"layers.77.attention.qkv": {"format": "nvfp4"}}})}
    with pytest.raises(TensorError, match=r"layer 'layers\.77\.attention\.qkv': no such layer is in the file"):
        open_checkpoint(save(transformer, metadata), parts)


def test_nunchakus_header(transformer, parts, save: Save):
    metadata = {"quantization_config": json.dumps({"method": "svdquant", "rank": 32})}
    with pytest.raises(CheckpointError, match="quantised by nunchaku SVDQuant"):
        open_checkpoint(save(transformer, metadata), parts)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes nf4"),
        ({"quant_method": "sdnq"}, "quantised by SDNQ"),
        ({"quant_method": "torchao"}, "quantised by torchao"),
        ({"quant_method": "of tomorrow"}, "quantised by of tomorrow"),
        ({}, None),
    ],
)
def test_quantization_config_of_a_folder(config: dict[str, Any], message: str | None, small_checkpoint, tmp_path: Path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    old = small_checkpoint / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").symlink_to(old / "diffusion_pytorch_model.safetensors")
    own = {**json.loads((old / "config.json").read_text()), "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(own))
    checkpoint = copy_with(small_checkpoint, tmp_path / "all", transformer=folder)
    if message is None:
        open_checkpoint(checkpoint)
        return
    with pytest.raises(CheckpointError, match=f"{message} .*config.json.*not read; give the model's bf16"):
        open_checkpoint(checkpoint)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_tokens": ShapeRange(1, 64, 993)},
            r"prompt_tokens\.max: expected at most 992, .* of 1024 rows .* 993",
        ),
        (
            {"height": ShapeRange(64, 64, 8208, 16)},
            r"height\.max: expected at most 8192, .* of 512 rows serves, got 8208",
        ),
    ],
)
def test_shapes_beyond_the_rotary_tables_are_refused(changes: dict[str, Any], message: str, small_checkpoint, tmp_path):
    shapes = dataclasses.replace(DEFAULT_SHAPES, **changes)
    with pytest.raises(RecipeError, match=message):
        export(recipe(small_checkpoint, tmp_path / "out", shapes=shapes, parity=False))
    assert list(tmp_path.iterdir()) == []


def test_the_longest_prompt_of_a_rotary_table_runs(small_checkpoint: Path, tmp_path: Path):
    """992 tokens with 1024 rows, in the graphs that serve them."""
    shapes = dataclasses.replace(DEFAULT_SHAPES, prompt_tokens=ShapeRange(1, 64, 992))
    out = tmp_path / "out"
    export(recipe(small_checkpoint, out, shapes=shapes, parity=False, vae=()))
    embeds = np.ones((1, 992, 64), np.float32)
    (context,) = session(out / "context_refiner.onnx").run(None, {"prompt_embeds": embeds})
    inputs = {"latents": np.ones((1, 16, 8, 8), np.float32), "timestep": np.ones(1, np.float32), "context": context}
    (noise_pred,) = session(out / "transformer.onnx").run(None, inputs)
    assert np.isfinite(noise_pred).all()
