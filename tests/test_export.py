"""`zimage-export` on small random checkpoints: what it writes, what it refuses, what it survives."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from zimage_rt.export import weights  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.errors import (  # noqa: E402
    CheckpointError,
    DiskFullError,
    ExportError,
    ParityError,
    RecipeError,
    TensorError,
)
from zimage_rt.export.modules import plan_modules  # noqa: E402
from zimage_rt.export.parity import load_reference, reference_function, session  # noqa: E402
from zimage_rt.export.precision import FP16, FP32  # noqa: E402
from zimage_rt.export.recipe import ExportRecipe, read_recipe  # noqa: E402

from zimage_rt.manifest import check_file, read_manifest  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(folder: Path, *, full_vae: bool = True) -> Path:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        dim=256, n_heads=2, n_kv_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=64
    )
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name or name.endswith(("norm1.weight", "norm2.weight", "bias")):
            parameter.data.normal_(0.2, 0.3)
    transformer.save_pretrained(folder / "transformer")
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        )
    )
    encoder.save_pretrained(folder / "text_encoder")
    if full_vae:
        diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).save_pretrained(folder / "vae")
    diffusers.AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(folder / "tiny_vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(folder / "scheduler")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def recipe(checkpoint: Path, out: Path, **changes: object) -> ExportRecipe:
    return dataclasses.replace(ExportRecipe(checkpoint, out, "test"), **changes)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "fp32"
    export(recipe(checkpoint, out))
    return out


def copy_with(checkpoint: Path, folder: Path, **replaced: Path) -> Path:
    """The checkpoint through links, with some parts replaced or (None) left out."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        target = replaced.get(path.name, path)
        if target is not None:
            (folder / path.name).symlink_to(target)
    return folder


def changed_transformer(checkpoint: Path, folder: Path, change) -> Path:
    """A checkpoint whose transformer tensors were changed in place by `change`."""
    folder.mkdir()
    new = folder / "transformer"
    new.mkdir()
    old = checkpoint / "transformer"
    (new / "config.json").write_text((old / "config.json").read_text())
    tensors = load_file(old / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, new / "diffusion_pytorch_model.safetensors")
    return copy_with(checkpoint, folder / "checkpoint", transformer=new)


# --- what a bundle is -----------------------------------------------------------------------------------------------


def test_bundle_is_complete_and_every_module_equals_its_reference(bundle: Path):
    manifest = read_manifest(bundle)
    assert set(manifest.modules) == {
        "text_encoder",
        "context_refiner",
        "transformer",
        "tiny_vae_decoder",
        "tiny_vae_encoder",
        "full_vae_decoder",
        "full_vae_encoder",
    }
    assert {path.name for path in bundle.iterdir()} == {*manifest.files, "manifest.json"}
    for name, entry in manifest.files.items():
        check_file(bundle, name, entry)
    for module in manifest.modules.values():
        assert module.parity is not None
        assert len(module.parity.cases) >= 2
        assert max(case.relative_error for case in module.parity.cases) < 2e-5


def test_pipeline_numbers_come_from_the_checkpoint(bundle: Path):
    pipeline = read_manifest(bundle).pipeline
    assert pipeline.shift == 2.5
    assert pipeline.prompt_prefix == "<|im_start|>user\n"
    assert pipeline.prompt_suffix == "<|im_end|>\n<|im_start|>assistant\n"
    assert (pipeline.latent_channels, pipeline.vae_scale_factor) == (16, 8)


def test_graphs_hold_no_weights_and_no_paths(bundle: Path):
    manifest = read_manifest(bundle)
    for name, module in manifest.modules.items():
        graph = (bundle / module.graph).read_bytes()
        assert len(graph) < 200_000, name
        assert b"site-packages" not in graph
        assert str(Path.home()).encode() not in graph or str(Path.home()) == "/"
        with safe_open(bundle / module.weights, "pt") as file:
            assert len(list(file.keys())) > 10


@pytest.mark.parametrize(("height", "width", "prompt_tokens"), [(512, 768, 40), (208, 1120, 1), (64, 64, 33)])
def test_one_graph_serves_every_shape(bundle: Path, checkpoint: Path, height: int, width: int, prompt_tokens: int):
    """The modules chained, against the whole reference transformer (which gets prompt_embeds, not context)."""
    model = load_reference(open_checkpoint(checkpoint).transformer)
    rng = np.random.default_rng(1)
    embeds = rng.standard_normal((1, prompt_tokens, 64), dtype=np.float32)
    latents = rng.standard_normal((1, 16, height // 8, width // 8), dtype=np.float32)
    timestep = np.array([0.3], np.float32)
    (context,) = session(bundle / "context_refiner.onnx").run(None, {"prompt_embeds": embeds})
    (got,) = session(bundle / "transformer.onnx").run(
        None, {"latents": latents, "timestep": timestep, "context": context}
    )
    with torch.no_grad():
        wanted = model(
            [torch.from_numpy(latents[0]).unsqueeze(1)],
            torch.from_numpy(timestep),
            [torch.from_numpy(embeds[0])],
        ).sample[0]
    np.testing.assert_allclose(got[0], -wanted.squeeze(1).numpy(), atol=2e-5, rtol=1e-4)


def test_bf16_bundle_is_half_as_large_and_close(bundle: Path, checkpoint: Path, tmp_path: Path):
    manifest = export(recipe(checkpoint, tmp_path / "bf16", precision="bf16", vae=()))
    for name, module in manifest.modules.items():
        assert module.precision == "bf16"
        assert module.config["compute"] == "float32"
        size = manifest.files[module.weights].size
        assert size < 0.65 * (bundle / f"{name}.safetensors").stat().st_size


# --- fp16 -----------------------------------------------------------------------------------------------------------


def loud(tensors: dict) -> None:
    """Weights all well inside fp16, activations in front of the post-norms far outside of it."""
    for name in tensors:
        if name.endswith(("attention.to_v.weight", "attention.to_out.0.weight")):
            tensors[name] *= 2000.0
        if name.endswith(("feed_forward.w1.weight", "feed_forward.w3.weight")):
            tensors[name] *= 60.0
        if name.endswith("feed_forward.w2.weight"):
            tensors[name] *= 2500.0


def test_fp16_survives_post_norm_inputs_of_a_million(checkpoint: Path, tmp_path: Path):
    folder = changed_transformer(checkpoint, tmp_path / "loud", loud)
    component = open_checkpoint(folder).transformer
    model = load_reference(component)
    peaks: list[float] = []
    for name, module in model.named_modules():
        if name.endswith(("attention_norm2", "ffn_norm2")):
            module.register_forward_pre_hook(lambda _, x: peaks.append(float(x[0].abs().max())))
    torch.manual_seed(1)
    inputs = (torch.randn(1, 16, 16, 24), torch.tensor([0.4]), torch.randn(1, 32, 256))
    with torch.no_grad():
        wanted = reference_function("transformer", model)(*inputs)
    assert max(peaks) > 1e6

    def run(precision):
        plans = plan_modules(open_checkpoint(folder), precision, ())
        plan = next(plan for plan in plans if plan.name == "transformer")
        module = weights.load(plan.build(), component)
        with torch.no_grad():
            return module(*inputs)

    def error(out):
        return float((out - wanted).norm() / wanted.norm())

    # The same fp16 arithmetic in torch, with and without the scales: ONNX Runtime's CPU computes fp16 graphs in fp32.
    assert error(run(FP32)) < 1e-4
    assert error(run(FP16)) < 1e-2
    plain = run(dataclasses.replace(FP16, attention_scale=1.0, gate_scale=1.0, up_scale=1.0))
    assert not torch.isfinite(plain).all()

    manifest = export(recipe(folder, tmp_path / "fp16", precision="fp16", vae=("full",)))
    assert manifest.modules["transformer"].precision == "fp16"
    assert manifest.modules["full_vae_decoder"].precision == "fp32"
    parity = manifest.modules["transformer"].parity
    assert parity is not None
    assert max(case.relative_error for case in parity.cases) < 5e-3


def test_fp16_names_a_weight_that_does_not_fit(checkpoint: Path, tmp_path: Path):
    def change(tensors: dict) -> None:
        tensors["layers.1.feed_forward.w2.weight"][0, 0] = 1e5

    folder = changed_transformer(checkpoint, tmp_path / "big", change)
    with pytest.raises(TensorError, match=r"layers\.1\.feed_forward\.w2.*100000.*65504"):
        export(recipe(folder, tmp_path / "out", precision="fp16", vae=(), parity=False))


# --- single files ---------------------------------------------------------------------------------------------------


def ldm_vae(name: str) -> str:
    """diffusers' name of a VAE tensor -> ldm's (as ComfyUI has it)."""
    for i in range(4):
        name = name.replace(f"up_blocks.{i}.", f"up.{3 - i}.").replace(f"down_blocks.{i}.", f"down.{i}.")
    for i in range(2):
        name = name.replace(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.")
    for old, new in (
        ("mid_block.attentions.0.", "mid.attn_1."),
        ("resnets.", "block."),
        ("upsamplers.0.", "upsample."),
        ("downsamplers.0.", "downsample."),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ):
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="session")
def single_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {}
    source = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in source.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [source[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            name, tensor = name.replace("to_q", "qkv"), torch.cat(parts)
        for old, new in (
            ("all_x_embedder.2-1", "x_embedder"),
            ("all_final_layer.2-1", "final_layer"),
            ("to_out.0", "out"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ):
            name = name.replace(old, new)
        tensors[f"model.diffusion_model.{name}"] = tensor
    for name, tensor in load_file(checkpoint / "text_encoder" / "model.safetensors").items():
        tensors[f"text_encoders.qwen3_4b.transformer.model.{name}"] = tensor
    for name, tensor in load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors").items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors["vae." + ldm_vae(name)] = tensor
    path = tmp_path_factory.mktemp("single") / "z_image.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_single_file_gives_the_same_weights_as_the_folder(
    single_file: Path, checkpoint: Path, bundle: Path, tmp_path: Path
):
    manifest = export(
        recipe(
            single_file,
            tmp_path / "out",
            vae=("full",),
            parts={"tokenizer": checkpoint / "tokenizer"},
            config={
                "vae": {"norm_num_groups": 8},
                "text_encoder": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
            },
        )
    )
    original = read_manifest(bundle)
    assert manifest.source["format"] == "single-file"
    for module in manifest.modules.values():
        assert manifest.files[module.weights] == original.files[module.weights]
        assert manifest.files[module.graph] == original.files[module.graph]


def test_single_file_without_tokenizer_says_what_to_add(single_file: Path):
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*\[parts\]"):
        open_checkpoint(single_file)


def test_other_models_files_are_named(tmp_path: Path):
    path = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="looks like a Flux transformer"):
        open_checkpoint(path)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_no_such_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_another_pipeline_is_named(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        open_checkpoint(tmp_path)


def test_damaged_file(checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "transformer"
    broken.mkdir()
    (broken / "config.json").write_text((checkpoint / "transformer" / "config.json").read_text())
    data = (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(data[: len(data) // 2])
    folder = copy_with(checkpoint, tmp_path / "checkpoint", transformer=broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("layers.1.attention.to_k.weight"),
            r"'layers\.1\.attention\.to_k\.weight' of shape \[256, 256\] is missing",
        ),
        (
            lambda t: t.update({"x_pad_token": torch.zeros(1, 255)}),
            r"'x_pad_token': expected \[1, 256\], got \[1, 255\]",
        ),
    ],
)
def test_missing_and_misshapen_tensors_are_named(checkpoint: Path, tmp_path: Path, change, message):
    folder = changed_transformer(checkpoint, tmp_path / "bad", change)
    out = tmp_path / "out"
    with pytest.raises(TensorError, match=message):
        export(recipe(folder, out, vae=(), parity=False))
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_a_wrong_module_stops_the_export_with_numbers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("zimage_rt.export.modeling.text_encoder.swiglu", lambda g, u, p: g * u)
    with pytest.raises(ParityError, match=r"text_encoder at .*relative error .*tolerated"):
        export(recipe(checkpoint, tmp_path / "out", vae=()))
    assert list(tmp_path.iterdir()) == []


def test_full_disk(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space left"):
        export(recipe(checkpoint, tmp_path / "out", vae=(), parity=False))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_left_alone(checkpoint: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(ExportError, match="not a bundle"):
        export(recipe(checkpoint, tmp_path / "photos"))


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpont = 'x'", "unknown key 'checkpont'"),
        ("name = 'x'", "`checkpoint` is missing"),
        ("checkpoint = 'x'\nprecision = 'fp8'", "expected one of fp32, fp16, bf16"),
        ("checkpoint = 'x'\nvae = ['huge']", "expected any of tiny, full"),
        ("checkpoint = 'x'\n[shapes.height]\nmin = 60", "multiples of 16"),
        ("checkpoint = 'x'\n[shapes.depth]\nmin = 1", "unknown key 'depth'"),
        ("checkpoint = 'x'\nnum_inference_steps = true", "expected int"),
        ("checkpoint = ", "cannot be read"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_committed_recipes_are_valid():
    for path in Path(__file__).parents[1].glob("engines/*.toml"):
        read_recipe(path)


# --- the command, killed --------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "zimage_rt.export.cli", *map(str, arguments)]


def test_killed_export_leaves_the_old_bundle(bundle: Path, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    out.mkdir()
    for path in bundle.iterdir():
        (out / path.name).hardlink_to(path)
    before = read_manifest(out).bundle_id
    arguments = command("--checkpoint", checkpoint, "--out", out, "--vae", "tiny", "--skip-parity")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.new-*/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_manifest(out).bundle_id == before
    assert list(tmp_path.glob(".bundle.new-*"))
    # The next export clears what was left and replaces the bundle.
    done = subprocess.run([*arguments, "--json"], capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["bundle_id"] == read_manifest(out).bundle_id != before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_exit_codes_and_json_errors(tmp_path: Path):
    done = subprocess.run(
        command("--checkpoint", tmp_path / "no", "--out", tmp_path / "out", "--json"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "CheckpointError"
    done = subprocess.run(command(), capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_a_module_too_large_for_memory_is_measured_on_its_first_layers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("zimage_rt.export.bundle.WHOLE_PARITY_ELEMENTS", 0)
    manifest = export(recipe(checkpoint, tmp_path / "out", vae=()))
    parity = manifest.modules["transformer"].parity
    assert parity is not None
    assert parity.reference.endswith("first layers only")
    assert manifest.modules["transformer"].config["n_layers"] == 2
