"""GGUF checkpoints; the reference is `dequantize` of the `gguf` package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import gguf  # noqa: E402
from export_checkpoints import recipe  # noqa: E402
from gguf import GGMLQuantizationType as Kind  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from single_files import check_second_reader, comfyui_names  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.errors import CheckpointError, ReaderUnavailable, TensorError  # noqa: E402

from zimage_rt.bundle.manifest import read_manifest  # noqa: E402

# Offsets of fp16 scales in a block of 256. gguf-py writes none of these formats, so their bytes are random.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def stored(values: np.ndarray, kind: Kind, seed: int) -> np.ndarray:
    """Bytes of a tensor in one of ggml's formats."""
    if kind not in SCALES:
        return gguf.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (values.size // block, size)).astype(np.uint8)
    for place in SCALES[kind]:
        scale = rng.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


class File:
    """Writes a GGUF file like the converters of ComfyUI-GGUF and llama.cpp, and keeps the dequantised values."""

    def __init__(self, path: Path, architecture: str | None) -> None:
        self.path = path
        self.writer = gguf.GGUFWriter(path, architecture or "none")
        if architecture is None:
            del self.writer.kv_data[0]["general.architecture"]
        self.values: dict[str, np.ndarray] = {}

    def add(
        self, name: str, values: np.ndarray, kind: Kind | None = None, shape: tuple[int, ...] | None = None
    ) -> None:
        if kind is None:
            self.writer.add_tensor(name, values)
            self.values[name] = values.astype(np.float32)
            return
        data = stored(values, kind, len(self.values))
        self.writer.add_tensor(name, data, raw_dtype=kind)
        self.values[name] = gguf.dequantize(data, kind).reshape(shape or values.shape)
        if shape is not None:
            self.writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))

    def close(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


@pytest.fixture(scope="session")
def transformer(small_checkpoint: Path) -> Mapping[str, np.ndarray]:
    tensors = load_file(small_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in comfyui_names(tensors, "").items()}


@pytest.fixture
def parts(small_checkpoint: Path) -> dict[str, Path]:
    return {name: small_checkpoint / name for name in ("text_encoder", "tokenizer", "tiny_vae")}


def written(file: File, tensors: Mapping[str, np.ndarray], kind: Kind, prefix: str = "") -> Path:
    """Matrices of the blocks in `kind`, or F16 if its blocks do not fit; vectors and small tensors in F32."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for name, values in tensors.items():
        if values.ndim < 2 or values.size < 4096 or "embedder" in name or "pad_token" in name:
            file.add(prefix + name, values)
        elif values.shape[1] % block:
            file.add(prefix + name, values.astype(np.float16))
        else:
            file.add(prefix + name, values, kind)
    return file.close()


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_1, Kind.Q4_0, Kind.BF16, *SCALES], ids=lambda kind: kind.name)
def test_transformers(kind: Kind, transformer, parts, tmp_path: Path):
    file = File(tmp_path / "z.gguf", "lumina2")
    component = open_checkpoint(written(file, transformer, kind), parts).transformer
    for name, values in file.values.items():
        if name.endswith("qkv.weight"):
            three = [component.tensors[name.replace("qkv", part)].load() for part in ("to_q", "to_k", "to_v")]
            assert torch.equal(torch.cat(three), torch.from_numpy(values)), name
    for own, theirs in (("w1", "w1"), ("w2", "w2"), ("attention.to_out.0", "attention.out")):
        middle = "" if "attention" in own else "feed_forward."
        name = f"layers.1.{middle}{theirs}.weight"
        got = component.tensors[f"layers.1.{middle}{own}.weight"].load().float()
        assert torch.equal(got, torch.from_numpy(file.values[name])), name
    check_second_reader(component, exact=False)


def test_stable_diffusion_cpps_files_have_no_architecture(transformer, parts, tmp_path: Path):
    """They may also have the prefix, and pad tokens as vectors."""
    tensors = {name: values[0] if "pad_token" in name else values for name, values in transformer.items()}
    file = File(tmp_path / "z.gguf", None)
    checkpoint = open_checkpoint(written(file, tensors, Kind.Q8_0, "model.diffusion_model."), parts)
    assert checkpoint.format == "gguf"
    assert checkpoint.transformer.tensors["x_pad_token"].shape == (1, 256)
    check_second_reader(checkpoint.transformer, exact=False)


def test_the_original_shape_of_rearranged_tensors(transformer, parts, tmp_path: Path):
    """ComfyUI-GGUF stores rows of 682 columns as rows of 256, with the original shape in the metadata."""
    name = "layers.0.feed_forward.w2.weight"
    file = File(tmp_path / "z.gguf", "lumina2")
    for other, values in transformer.items():
        if other == name or other.endswith("layers.0.attention.qkv.weight"):
            file.add(other, values.reshape(-1, 128 if "qkv" in other else 256), Kind.Q8_0, values.shape)
        else:
            file.add(other, values)
    component = open_checkpoint(file.close(), parts).transformer
    assert torch.equal(component.tensors[name].load(), torch.from_numpy(file.values[name]))
    fused = torch.from_numpy(file.values["layers.0.attention.qkv.weight"])
    assert torch.equal(component.tensors["layers.0.attention.to_k.weight"].load(), fused[256:512])
    check_second_reader(component, exact=False)


@pytest.fixture(scope="session")
def encoder(small_checkpoint: Path) -> dict[str, np.ndarray]:
    """The text encoder's tensors under llama.cpp's names."""
    tensors = load_file(small_checkpoint / "text_encoder" / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    result = {}
    for name, tensor in tensors.items():
        own = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        assert own is not None
        result[own] = tensor.float().numpy()
    return result


def encoder_file(path: Path, architecture: str = "qwen3") -> File:
    file = File(path, architecture)
    file.writer.add_rope_freq_base(10000.0)
    file.writer.add_layer_norm_rms_eps(1e-6)
    file.writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    return file


def test_text_encoders(small_checkpoint: Path, transformer, encoder, parts, tmp_path: Path):
    """Config values come from the file's metadata; the last layer and the head are unused."""
    file = encoder_file(tmp_path / "qwen.gguf")
    file.add("output.weight", encoder["token_embd.weight"])
    path = written(file, encoder, Kind.Q8_0)
    main = written(File(tmp_path / "z.gguf", "lumina2"), transformer, Kind.Q4_0)
    component = open_checkpoint(main, {**parts, "text_encoder": path}).text_encoder
    assert component.config["rope_parameters"]["rope_theta"] == 10000.0
    assert component.config["rms_norm_eps"] == 1e-6
    assert (component.config["num_hidden_layers"], component.config["num_key_value_heads"]) == (3, 2)
    got = component.tensors["layers.1.self_attn.k_proj.weight"].load()
    assert torch.equal(got, torch.from_numpy(file.values["blk.1.attn_k.weight"]))
    got = component.tensors["layers.2.post_attention_layernorm.weight"].load()
    assert torch.equal(got, torch.from_numpy(file.values["blk.2.ffn_norm.weight"]))
    check_second_reader(component, exact=False)


def test_a_bundle_stores_what_gguf_dequantises(small_checkpoint: Path, transformer, parts, tmp_path: Path):
    file = File(tmp_path / "z.gguf", "lumina2")
    path = written(file, transformer, Kind.Q4_K)
    plain = tmp_path / "plain.safetensors"
    save_file({name: torch.from_numpy(values) for name, values in file.values.items()}, plain)
    for source in (path, plain):
        out = tmp_path / source.stem
        export(recipe(source, out, parts=parts, precision="bf16", backend="cuda", vae=()))
    got, expected = read_manifest(tmp_path / "z"), read_manifest(tmp_path / "plain")
    for name, module in expected.modules.items():
        assert got.files[module.weights] == expected.files[module.weights], name


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_without_the_package_the_error_names_the_extra(
    transformer, parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = written(File(tmp_path / "z.gguf", "lumina2"), transformer, Kind.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ReaderUnavailable, match=r"package 'gguf' reads; it is not installed: .*zimage-rt\[gguf\]"):
        open_checkpoint(path, parts)


def test_another_models_file(transformer, parts, tmp_path: Path):
    path = written(File(tmp_path / "flux.gguf", "flux"), transformer, Kind.Q8_0)
    with pytest.raises(CheckpointError, match="is a GGUF of 'flux'; expected 'lumina2'"):
        open_checkpoint(path, parts)


def test_another_encoder(transformer, encoder, parts, tmp_path: Path):
    path = written(encoder_file(tmp_path / "llama.gguf", "llama"), encoder, Kind.Q8_0)
    main = written(File(tmp_path / "z.gguf", "lumina2"), transformer, Kind.Q8_0)
    with pytest.raises(CheckpointError, match="is a GGUF of 'llama'; Z-Image's text encoder is a 'qwen3'"):
        open_checkpoint(main, {**parts, "text_encoder": path})


def test_integers_are_not_weights(transformer, parts, tmp_path: Path):
    file = File(tmp_path / "z.gguf", "lumina2")
    file.writer.add_tensor("layers.0.attention.extra.weight", np.zeros((2, 2), np.int32))
    path = written(file, transformer, Kind.Q8_0)
    with pytest.raises(TensorError, match=r"'layers\.0\.attention\.extra\.weight': ggml's I32 is not read"):
        open_checkpoint(path, parts)


def test_a_damaged_file(transformer, parts, tmp_path: Path):
    path: Any = written(File(tmp_path / "z.gguf", "lumina2"), transformer, Kind.Q8_0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(path, parts)
