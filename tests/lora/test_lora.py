"""LoRAs on zimage-nano: images against diffusers with PEFT, several at once, taken off to the byte, refusals."""

from __future__ import annotations

import copy
import dataclasses
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, ZImagePipeline, ZImageTransformer2DModel
from lora_files import LAYOUTS, Lora, changed, peft, random_lora, write
from shared import CHECKPOINT, SAME_IMAGE
from zimage_rt.benchmarks.fidelity import psnr

import zimage_rt
from zimage_rt.backends.base import LowRank
from zimage_rt.backends.merge import merged
from zimage_rt.backends.modules import ModulePipeline
from zimage_rt.backends.registry import load_backend
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.errors import LoraError, RequestError
from zimage_rt.lora.file import LoraFile, LoraLayer
from zimage_rt.lora.manager import LoraSet
from zimage_rt.lora.match import match_layers
from zimage_rt.rwlock import FairRWLock

PROMPT, SEED = "a panda on a blue background", 3


@pytest.fixture(scope="module")
def reference() -> Any:
    pipeline = ZImagePipeline.from_pretrained(str(CHECKPOINT), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def decoder() -> Any:
    return AutoencoderTiny.from_pretrained(str(CHECKPOINT / "tiny_vae"), dtype=torch.float32)


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(bundle)


@pytest.fixture
def engine(loaded: zimage_rt.Engine) -> Iterator[zimage_rt.Engine]:
    yield loaded
    for name in loaded.loras:
        loaded.unload_lora(name)


@pytest.fixture(scope="module")
def lora() -> Lora:
    # Not of the reference's: layers that PEFT has changed have other names.
    return random_lora(ZImageTransformer2DModel.from_pretrained(CHECKPOINT / "transformer"), seed=1)


@pytest.fixture(scope="module")
def plain(loaded: zimage_rt.Engine) -> np.ndarray:
    return ours(loaded)


@pytest.fixture(scope="module")
def small(loaded: zimage_rt.Engine) -> bytes:
    return sketch(loaded)


def ours(engine: zimage_rt.Engine) -> np.ndarray:
    return engine.generate(PROMPT, seed=SEED).images[0]


def sketch(engine: zimage_rt.Engine) -> bytes:
    """An image that depends on every weight and takes no time."""
    return engine.generate(PROMPT, seed=SEED, height=64, width=64, num_inference_steps=1).images.tobytes()


@torch.no_grad()
def theirs(pipeline: Any, decoder: Any) -> np.ndarray:
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(SEED))
    settings = {"height": 256, "width": 256, "num_inference_steps": 8, "guidance_scale": 0.0}
    latents = pipeline(PROMPT, latents=noise, output_type="latent", **settings).images
    image = (decoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    return np.rint(image * 255).astype(np.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_those_of_diffusers(engine, reference, decoder, lora, plain, tmp_path, layout):
    path = write(tmp_path / "style.safetensors", LAYOUTS[layout](lora))
    if layout == "comfyui":  # diffusers does not split this layout's packed qkv
        pipeline = copy.copy(reference)
        pipeline.transformer = copy.deepcopy(reference.transformer)
        changed(pipeline.transformer, lora)
        expected = theirs(pipeline, decoder)
    else:
        reference.load_lora_weights(str(path), adapter_name="style")
        expected = theirs(reference, decoder)
        reference.unload_lora_weights()
    assert engine.load_lora(path) == "style"
    image = ours(engine)
    assert psnr(image, expected) >= SAME_IMAGE
    assert psnr(image, plain) < 30


def test_what_peft_writes_with_its_settings_is_read(engine, reference, decoder, plain, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    settings = {"alpha_pattern": {"feed_forward.w2": 2}, "rank_pattern": {"to_q": 5}, "use_rslora": True}
    transformer = reference.transformer
    names = ["to_q", "to_v", "to_out.0", "w2"]
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=names, **settings), "written")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(transformer, adapter_name="written")
    metadata = transformer.peft_config["written"].to_dict()
    ZImagePipeline.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=metadata)
    expected = theirs(reference, decoder)
    reference.delete_adapters("written")
    engine.load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    image = ours(engine)
    assert psnr(image, expected) >= SAME_IMAGE
    assert psnr(image, plain) < 30


def test_pefts_own_folder_has_its_alpha_beside_it(engine, lora, tmp_path):
    tensors = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in peft(lora).items()}
    write(tmp_path / "adapter_model.safetensors", {**tensors})
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2.0, "r": 4, "use_dora": false}')
    engine.load_lora(tmp_path, name="half")
    half = sketch(engine)
    engine.unload_lora("half")
    engine.load_lora(write(tmp_path / "x.safetensors", peft(lora)), weight=0.5)
    assert sketch(engine) == half


def test_two_with_weights(engine, reference, decoder, lora, plain, small, tmp_path):
    other = random_lora(reference.transformer, seed=9, rank=7)
    paths = [write(tmp_path / f"{i}.safetensors", peft(one)) for i, one in enumerate((lora, other))]
    for path in paths:
        reference.load_lora_weights(str(path), adapter_name=f"adapter{path.stem}")
    weights = (0.7, -0.4)
    reference.set_adapters(["adapter0", "adapter1"], list(weights))
    expected = theirs(reference, decoder)
    reference.unload_lora_weights()
    for path in paths:
        engine.load_lora(path)
    engine.set_loras({"0": 0.7, "1": -0.4})
    assert engine.loras == {"0": 0.7, "1": -0.4}
    assert psnr(ours(engine), expected) >= SAME_IMAGE
    both = sketch(engine)
    engine.set_loras({"1": -0.4})
    assert engine.loras == {"0": 0.0, "1": -0.4}
    assert sketch(engine) != both
    engine.set_loras({})
    assert sketch(engine) == small
    engine.set_loras(dict(zip(("0", "1"), weights, strict=True)))
    assert sketch(engine) == both
    engine.unload_lora("0")
    engine.unload_lora("1")
    assert engine.loras == {}
    assert ours(engine).tobytes() == plain.tobytes()


def test_the_text_encoder_takes_one_and_no_old_context_is_kept(engine, reference, decoder, tmp_path):
    encoder = copy.deepcopy(reference.text_encoder)
    layers = {}
    for name, layer in encoder.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")) and "layers.4." not in name:
            down, up = torch.randn(2, layer.in_features) * 0.1, torch.randn(layer.out_features, 2) * 0.1
            layers[name.removeprefix("model.")] = down, up
            layer.weight.data += up @ down
    tensors = {}
    for name, (down, up) in layers.items():
        tensors[f"text_encoder.{name}.lora_A.weight"], tensors[f"text_encoder.{name}.lora_B.weight"] = down, up
    before = engine.encode_prompt(PROMPT)
    engine.load_lora(write(tmp_path / "text.safetensors", tensors))
    assert np.abs(engine.encode_prompt(PROMPT) - before).max() > 1e-2
    pipeline = copy.copy(reference)
    pipeline.text_encoder = encoder
    assert psnr(ours(engine), theirs(pipeline, decoder)) >= SAME_IMAGE
    engine.unload_lora("text")
    assert engine.encode_prompt(PROMPT).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    ("name", "module", "inputs", "columns"),
    [
        ("transformer.layers.1.attention.to_k", "transformer", 384, 384),
        ("base_model.model.layers.1.attention.to_k", "transformer", 384, 384),
        ("layers.1.attention.to_k", "transformer", 384, 384),
        ("model.diffusion_model.noise_refiner.0.feed_forward.w3", "transformer", 384, 1024),
        ("diffusion_model.final_layer.linear", "transformer", 384, 64),
        ("diffusion_model.x_embedder", "transformer", 64, 384),
        ("lora_unet_context_refiner_0_attention_to_out_0", "context_refiner", 384, 384),
        ("lora_unet_context_refiner_0_attention_out", "context_refiner", 384, 384),
        ("lora_unet_layers_0_attention_qkv", "transformer", 384, 1152),
        ("lycoris_cap_embedder_1", "context_refiner", 256, 384),
        ("lora_te_layers_3_self_attn_q_proj", "text_encoder", 256, 256),
        ("lora_te1_model_layers_3_mlp_up_proj", "text_encoder", 256, 576),
        ("text_encoder.model.layers.3.self_attn.v_proj", "text_encoder", 256, 128),
        ("text_encoders.qwen3_4b.transformer.model.layers.3.self_attn.o_proj", "text_encoder", 256, 256),
    ],
)
def test_every_name_of_a_layer_is_known(loaded, name, module, inputs, columns):
    layer = LoraLayer(name, np.ones((2, inputs), np.float32), np.ones((columns, 2), np.float32), (name,))
    placed = match_layers(LoraFile(Path("x"), [layer], [], []), loaded.manifest)
    assert list(placed.modules) == [module]
    assert sum(up.shape[1] for _, up in placed.modules[module].values()) == columns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_read_as_they_are(engine, lora, tmp_path, dtype):
    half = {name: value.to(dtype) for name, value in peft(lora).items()}
    engine.load_lora(write(tmp_path / "half.safetensors", half, dtype))
    image = sketch(engine)
    engine.unload_lora("half")
    engine.load_lora(write(tmp_path / "wide.safetensors", half))
    assert sketch(engine) == image


def test_a_bf16_bundle_rounds_the_sum(small_checkpoint, small_bundle, tmp_path):
    from diffusers import ZImageTransformer2DModel
    from export_checkpoints import recipe
    from zimage_rt.export.bundle import export

    half = tmp_path / "bf16"
    export(recipe(small_checkpoint, half, precision="bf16", parity=False, vae=()))
    model = ZImageTransformer2DModel.from_pretrained(small_checkpoint / "transformer")
    path = write(tmp_path / "lora.safetensors", peft(random_lora(model, seed=4)))
    rng = np.random.default_rng(0)
    inputs = {
        "latents": rng.standard_normal((1, 16, 8, 8)).astype(np.float32),
        "timestep": np.full(1, 0.5, np.float32),
        "context": rng.standard_normal((1, 32, 256)).astype(np.float32),
    }
    outputs = []
    for bundle in (small_bundle, half):
        manifest = read_manifest(bundle)
        pipeline = load_backend("onnxruntime", {}).open(bundle, manifest, lambda name: None)
        loras = LoraSet(manifest, pipeline, FairRWLock(), lambda modules: None)
        before = pipeline.module("transformer")(inputs)["noise_pred"]
        loras.load(path, 1.0, None)
        outputs.append(pipeline.module("transformer")(inputs)["noise_pred"])
        loras.unload("lora")
        assert pipeline.module("transformer")(inputs)["noise_pred"].tobytes() == before.tobytes()
        assert np.linalg.norm(outputs[-1] - before) > 0.03 * np.linalg.norm(before)
    error = np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0])
    # Weights in bf16, computed in fp32: 2^-9 = 2e-3 a weight, over four blocks, the same on every processor.
    assert error < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_is_made_in_fp32_and_rounded_once(tmp_path, dtype):
    """Of whole numbers, whose sums fp32 holds exactly in every order: each processor must find the same bits."""
    generator = torch.Generator().manual_seed(3)
    weight, down, up = (
        torch.randint(-100, 101, shape, generator=generator).float() for shape in ((70, 48), (3, 70), (3, 16))
    )
    path = write(tmp_path / "w.safetensors", {"w": weight, "other": weight.clone()}, dtype)
    result = merged(path, [LowRank("w", 8, down.numpy(), up.numpy()), LowRank("w", 32, down.numpy(), up.numpy())])
    expected = weight.clone()
    for first in (8, 32):
        expected[:, first : first + 16] += down.T @ up
    assert list(result) == ["w"]
    stored = torch.from_numpy(result["w"].copy())
    ours = (stored.view(torch.bfloat16) if dtype == torch.bfloat16 else stored).float()
    assert torch.equal(ours, expected.to(dtype).float())
    # A product that is rounded before it is added gives other numbers.
    twice = weight.to(dtype)
    for first in (8, 32):
        twice[:, first : first + 16] += (down.T @ up).to(dtype)
    assert torch.equal(ours, twice.float()) == (dtype == torch.float32)


def test_a_sum_that_fp16_cannot_hold_is_refused(tmp_path):
    path = write(tmp_path / "w.safetensors", {"w": torch.ones(4, 4)}, torch.float16)
    with pytest.raises(LoraError, match=r"w: .* fp16, which holds 65504"):
        merged(path, [LowRank("w", 0, np.full((1, 4), 300, np.float32), np.full((1, 4), 300, np.float32))])


def spoil_layer(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    key = "transformer.layers.0.attention.to_q.lora_A.weight"
    tensors[key.replace(".0.", ".7.", 1)] = tensors.pop(key)
    other = key.replace("lora_A", "lora_B")
    tensors[other.replace(".0.", ".7.", 1)] = tensors.pop(other)
    return key.replace(".0.", ".7.", 1), r"layers\.0…\d+\.attention\.to_q"


def spoil_half(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    key = "transformer.layers.1.feed_forward.w1.lora_B.weight"
    del tensors[key]
    return key.replace("lora_B", "lora_A"), f"expected {key} beside it"


def spoil_shape(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    key = "transformer.layers.1.feed_forward.w1.lora_A.weight"
    tensors[key] = torch.ones(4, 3840)
    return key, r"expected \[rank, 384\] and \[1024, rank\], got \[4, 3840\] and \[1024, 4\]"


def spoil_rank(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    key = "transformer.layers.1.feed_forward.w1.lora_A.weight"
    tensors[key] = tensors[key][:3]
    return key, r"expected \[rank, in\] and \[out, rank\]"


def spoil_numbers(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    key = "transformer.layers.1.feed_forward.w1.lora_A.weight"
    tensors[key] = tensors[key] * torch.nan
    return key, "finite"


def spoil_twice(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    for half in ("lora_A", "lora_B"):
        key = f"transformer.layers.1.attention.to_out.0.{half}.weight"
        tensors[key.replace("transformer.", "diffusion_model.").replace("to_out.0", "out")] = tensors[key] * 1.2
    return key.replace("lora_B", "lora_A"), "a second time"


def spoil_unknown(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    tensors["transformer.layers.1.attention.to_q.weight"] = torch.ones(2)
    return "transformer.layers.1.attention.to_q.weight", r"expected ….lora_A.weight"


def other_kind(key: str, kind: str) -> Any:
    def spoil(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
        tensors[key] = torch.ones(2, 2)
        return key, kind

    return spoil


SPOILS = {
    "layer": spoil_layer,
    "half": spoil_half,
    "shape": spoil_shape,
    "rank": spoil_rank,
    "numbers": spoil_numbers,
    "twice": spoil_twice,
    "unknown": spoil_unknown,
    "oft": other_kind("transformer.layers.0.attention.to_q.oft_R.weight", "this is OFT"),
    "tucker": other_kind("lora_unet_layers_0_attention_to_q.lora_mid.weight", "Tucker"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_wrong_or_partial_file_names_its_keys_and_changes_nothing(engine, lora, small, tmp_path, spoil):
    tensors = peft(lora)
    key, message = SPOILS[spoil](tensors)
    with pytest.raises(LoraError, match=message) as error:
        engine.load_lora(write(tmp_path / "bad.safetensors", tensors))
    assert key in error.value.keys
    assert key in str(error.value)
    assert engine.loras == {}
    assert sketch(engine) == small


def test_every_wrong_key_is_named_at_once(engine, lora, tmp_path):
    tensors = peft(lora)
    keys = [spoil(tensors)[0] for spoil in (spoil_layer, spoil_half, spoil_twice, spoil_unknown)]
    with pytest.raises(LoraError) as error:
        engine.load_lora(write(tmp_path / "bad.safetensors", tensors))
    assert set(keys) <= set(error.value.keys)
    assert all(key in str(error.value) for key in keys)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def text(path: Path) -> None:
    path.write_text("<html>404</html>")


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def no_offsets(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 8) + b'{"a":{}}')


def list_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2) + b"[]")


def empty(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2) + b"{}")


@pytest.mark.parametrize("damage", [cut, text, long_header, no_offsets, list_header, empty, Path.unlink])
def test_a_damaged_file_is_refused(engine, lora, tmp_path, damage):
    path = write(tmp_path / "bad.safetensors", peft(lora))
    damage(path)
    with pytest.raises(LoraError, match=r"bad\.safetensors"):
        engine.load_lora(path)
    assert engine.loras == {}


def test_a_file_in_another_format_is_refused(engine, lora, tmp_path):
    path = write(tmp_path / "bad.safetensors", peft(lora), torch.int8)
    with pytest.raises(LoraError, match="expected F32, F16, BF16, F64, F8_E4M3, F8_E5M2, got I8"):
        engine.load_lora(path)


def test_names_and_weights_are_checked(engine, lora, tmp_path):
    path = write(tmp_path / "style.safetensors", peft(lora))
    with pytest.raises(RequestError, match="finite weight"):
        engine.load_lora(path, weight=float("nan"))
    engine.load_lora(path, weight=0)
    with pytest.raises(RequestError, match="'style' is loaded already"):
        engine.load_lora(path)
    with pytest.raises(RequestError, match="no LoRA named 'stile' is loaded; there are: style"):
        engine.set_loras({"stile": 1.0})
    with pytest.raises(RequestError, match="no LoRA named 'other'"):
        engine.unload_lora("other")
    assert engine.loras == {"style": 0.0}


def test_a_callback_cannot_change_the_weights_it_runs_on(engine, lora, tmp_path):
    path = write(tmp_path / "style.safetensors", peft(lora))
    with pytest.raises(RequestError, match="load_lora: cannot be called while a request runs"):
        engine.generate(PROMPT, seed=SEED, callback=lambda info: engine.load_lora(path))
    assert engine.loras == {}


def test_no_request_sees_half_a_lora(engine, lora, small, tmp_path):
    engine.load_lora(write(tmp_path / "style.safetensors", peft(lora)))
    styled = sketch(engine)
    stop = threading.Event()

    def draw() -> list[bytes]:
        return [sketch(engine) for _ in range(4)]

    def swap() -> int:
        for count in range(40):
            if stop.is_set():
                break
            engine.set_loras({"style": float(count % 2)})
        return count

    with ThreadPoolExecutor(3) as pool:
        swaps = pool.submit(swap)
        seen = {image for task in [pool.submit(draw) for _ in range(2)] for image in task.result()}
        stop.set()
        assert swaps.result() > 1  # requests and changes took turns
    assert seen <= {small, styled}


def test_a_bundle_without_the_layers_places_says_to_export_again(loaded, lora, tmp_path):
    modules = {name: dataclasses.replace(spec, linears={}) for name, spec in loaded.manifest.modules.items()}
    manifest = dataclasses.replace(loaded.manifest, modules=modules)
    loras = LoraSet(manifest, loaded.pipeline, FairRWLock(), lambda modules: None)
    with pytest.raises(LoraError, match="export it again"):
        loras.load(write(tmp_path / "style.safetensors", peft(lora)), 1.0, None)


def test_a_backend_that_cannot_says_so(loaded, lora, tmp_path):
    pipeline = ModulePipeline(lambda name: loaded.pipeline.module(name), lambda name: None)
    loras = LoraSet(loaded.manifest, pipeline, FairRWLock(), lambda modules: None)
    with pytest.raises(RequestError, match="backend='onnxruntime' or 'cuda'"):
        loras.load(write(tmp_path / "style.safetensors", peft(lora)), 1.0, None)
    assert loras.weights == {}


def test_what_was_there_comes_back_where_a_change_fails(loaded, lora, tmp_path):
    class Failing:
        def __init__(self) -> None:
            self.now: dict[str, Any] = {}

        def patch(self, changes: dict[str, Any]) -> None:
            for module, found in changes.items():
                self.now[module] = [(change.tensor, change.up.tobytes()) for change in found]
                if len(self.now) == 2 and any(change.down.shape[0] > 4 for change in found):
                    raise zimage_rt.OutOfMemory("no room")

    pipeline: Any = Failing()
    loras = LoraSet(loaded.manifest, pipeline, FairRWLock(), lambda modules: None)
    path = write(tmp_path / "style.safetensors", peft(lora))
    loras.load(path, 1.0, "one")
    before = dict(pipeline.now)
    assert set(before) == {"context_refiner", "transformer"}
    with pytest.raises(zimage_rt.OutOfMemory):
        loras.load(path, 1.0, "two")
    assert pipeline.now == before
    assert loras.weights == {"one": 1.0}
