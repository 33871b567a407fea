"""`zimage-export` on small random checkpoints: contents of a bundle, in every precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from export_checkpoints import changed_transformer, recipe  # noqa: E402
from safetensors import safe_open  # noqa: E402
from shared import CHECKPOINT  # noqa: E402
from zimage_rt.benchmarks.fidelity import psnr  # noqa: E402
from zimage_rt.benchmarks.random_checkpoint import random_checkpoint, read_configs  # noqa: E402
from zimage_rt.export import weights  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.errors import TensorError  # noqa: E402
from zimage_rt.export.parity.measure import session  # noqa: E402
from zimage_rt.export.parity.reference import load_reference, reference_function  # noqa: E402
from zimage_rt.export.plan import plan_modules  # noqa: E402
from zimage_rt.export.precision import FP16, FP32, Precision  # noqa: E402

from zimage_rt.bundle.manifest import read_manifest  # noqa: E402
from zimage_rt.bundle.verify import check_file  # noqa: E402
from zimage_rt.sampling.schedules import flow_match_sigmas  # noqa: E402


def test_bundle_is_complete_and_every_module_equals_its_reference(small_bundle: Path):
    manifest = read_manifest(small_bundle)
    assert set(manifest.modules) == {
        "text_encoder",
        "context_refiner",
        "transformer",
        "tiny_vae_decoder",
        "tiny_vae_encoder",
        "full_vae_decoder",
        "full_vae_encoder",
    }
    assert {path.name for path in small_bundle.iterdir()} == {*manifest.files, "manifest.json"}
    for name, entry in manifest.files.items():
        check_file(small_bundle, name, entry)
    for module in manifest.modules.values():
        assert module.parity is not None
        assert len(module.parity.cases) >= 2
        # fp32 sums in another order: 1e-6 or less is measured; a wrong epsilon or activation gives 1e-3 or more.
        assert max(case.relative_error for case in module.parity.cases) < 2e-5


def test_a_second_export_of_a_process_has_the_same_graphs(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    export(recipe(small_checkpoint, tmp_path / "again", parity=False))
    graphs = sorted(small_bundle.glob("*.onnx"))
    assert graphs
    for graph in graphs:
        assert graph.read_bytes() == (tmp_path / "again" / graph.name).read_bytes(), graph.name


def test_pipeline_numbers_come_from_the_checkpoint(small_bundle: Path):
    pipeline = read_manifest(small_bundle).pipeline
    assert pipeline.shift == 2.5
    assert pipeline.prompt_prefix == "<|im_start|>user\n"
    assert pipeline.prompt_suffix == "<|im_end|>\n<|im_start|>assistant\n"
    assert (pipeline.latent_channels, pipeline.vae_scale_factor) == (16, 8)


def test_graphs_hold_no_weights_and_no_paths(small_bundle: Path):
    manifest = read_manifest(small_bundle)
    for name, module in manifest.modules.items():
        graph = (small_bundle / module.graph).read_bytes()
        assert len(graph) < 200_000, name
        assert b"site-packages" not in graph
        assert str(Path.home()).encode() not in graph or str(Path.home()) == "/"
        with safe_open(small_bundle / module.weights, "pt") as file:
            assert len(list(file.keys())) > 10


@pytest.mark.parametrize(
    ("height", "width", "prompt_tokens"), [(512, 768, 40), (1024, 1024, 33), (208, 1120, 1), (64, 64, 32)]
)
def test_one_graph_serves_every_shape(
    small_bundle: Path, small_checkpoint: Path, height: int, width: int, prompt_tokens: int
):
    """The chained modules against the whole reference transformer, which takes prompt_embeds instead of context."""
    model = load_reference(open_checkpoint(small_checkpoint).transformer)
    rng = np.random.default_rng(1)
    embeds = rng.standard_normal((1, prompt_tokens, 64), dtype=np.float32)
    latents = rng.standard_normal((1, 16, height // 8, width // 8), dtype=np.float32)
    timestep = np.array([0.3], np.float32)
    (context,) = session(small_bundle / "context_refiner.onnx").run(None, {"prompt_embeds": embeds})
    (got,) = session(small_bundle / "transformer.onnx").run(
        None, {"latents": latents, "timestep": timestep, "context": context}
    )
    with torch.no_grad():
        wanted = model(
            [torch.from_numpy(latents[0]).unsqueeze(1)],
            torch.from_numpy(timestep),
            [torch.from_numpy(embeds[0])],
        ).sample[0]
    # As above, for each of up to a million numbers of size 1.
    np.testing.assert_allclose(got[0], -wanted.squeeze(1).numpy(), atol=2e-5, rtol=1e-4)


def test_bf16_bundle_is_half_as_large_and_close(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    manifest = export(recipe(small_checkpoint, tmp_path / "bf16", precision="bf16", vae=()))
    for name, module in manifest.modules.items():
        assert module.precision == "bf16"
        assert module.config["compute"] == "float32"
        size = manifest.files[module.weights].size
        assert size < 0.65 * (small_bundle / f"{name}.safetensors").stat().st_size


# --- a component too large for memory ---------------------------------------------------------------------------------


def test_a_component_too_large_for_memory_is_measured_on_its_first_layers(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The reference is never loaded with all of its weights."""
    # With one or two more layers than the small checkpoint; shortened, its graphs are those of the small bundle.
    configs = {**read_configs(small_checkpoint)}
    del configs["vae"], configs["tiny_vae"]
    configs["transformer"] = {**configs["transformer"], "n_layers": 4}
    kinds = configs["text_encoder"]["layer_types"]
    configs["text_encoder"] = {**configs["text_encoder"], "num_hidden_layers": 4, "layer_types": [*kinds, kinds[0]]}
    checkpoint = random_checkpoint(CHECKPOINT / "tokenizer", configs)
    loaded = []
    monkeypatch.setattr("zimage_rt.export.bundle.WHOLE_PARITY_ELEMENTS", 0)
    monkeypatch.setattr(
        "zimage_rt.export.parity.reference.load_reference", lambda part: loaded.append(part) or load_reference(part)
    )
    manifest = export(recipe(tmp_path, tmp_path / "out", vae=()), checkpoint=checkpoint)
    assert [(part.name, part.config.get("n_layers") or part.config["num_hidden_layers"]) for part in loaded] == [
        ("text_encoder", 3),
        ("transformer", 2),
    ]
    assert manifest.modules["transformer"].config["n_layers"] == 4
    for name, whole in (("text_encoder", False), ("context_refiner", True), ("transformer", False)):
        parity = manifest.modules[name].parity
        assert parity is not None
        assert parity.reference.endswith("fp32" if whole else "fp32, first layers only")


# --- fp16 ------------------------------------------------------------------------------------------------------------


def loud(tensors: dict) -> None:
    """Weights within fp16's range, inputs of the post-norms far beyond it."""
    for name in tensors:
        if name.endswith(("attention.to_v.weight", "attention.to_out.0.weight")):
            tensors[name] *= 2000.0
        if name.endswith(("feed_forward.w1.weight", "feed_forward.w3.weight")):
            tensors[name] *= 60.0
        if name.endswith("feed_forward.w2.weight"):
            tensors[name] *= 2500.0


def draw_image(denoise: Callable[[Any, Any, Any], Any], context: Any, decoder: Path) -> np.ndarray:
    """Image of fixed noise after 8 evaluations of `denoise` and the decoder, [height, width, 3] in 0 … 255."""
    latents = torch.randn((1, 16, 16, 24), generator=torch.Generator().manual_seed(1))
    levels = flow_match_sigmas(8, 3.0)
    for sigma, following in pairwise(levels.tolist()):
        latents = latents + (following - sigma) * denoise(latents, torch.tensor([1 - sigma]), context)
    (image,) = session(decoder).run(None, {"latents": latents.numpy()})
    return np.clip((image[0] + 1) / 2, 0, 1).transpose(1, 2, 0) * 255


def test_fp16_survives_post_norm_inputs_of_a_million(small_checkpoint: Path, tmp_path: Path):
    """The fp16 bundle draws the image of fp32; without the scales the same arithmetic gives NaN."""
    folder = changed_transformer(small_checkpoint, tmp_path / "loud", loud)
    component = open_checkpoint(folder).transformer
    model = load_reference(component)
    peaks: list[float] = []
    for name, module in model.named_modules():
        if name.endswith(("attention_norm2", "ffn_norm2")):
            module.register_forward_pre_hook(lambda _, x: peaks.append(float(x[0].abs().max())))

    manifest = export(recipe(folder, tmp_path / "fp16", precision="fp16"))
    assert manifest.modules["transformer"].precision == "fp16"
    assert manifest.modules["full_vae_decoder"].precision == "fp32"
    parity = manifest.modules["transformer"].parity
    assert parity is not None
    assert max(case.relative_error for case in parity.cases) < 5e-3

    context = torch.randn((1, 32, 256), generator=torch.Generator().manual_seed(2))
    decoder = tmp_path / "fp16" / "full_vae_decoder.onnx"
    with torch.no_grad():
        wanted = draw_image(reference_function("transformer", model), context, decoder)
    assert max(peaks) > 1e6
    assert wanted.std() > 1

    def in_torch(precision: Precision) -> np.ndarray:
        plans = plan_modules(open_checkpoint(folder), precision, ())
        plan = next(plan for plan in plans if plan.name == "transformer")
        module = weights.load(plan.build(), component)
        with torch.no_grad():
            return draw_image(module, context, decoder)

    def in_runtime(latents: Any, timestep: Any, context: Any) -> Any:
        inputs = {"latents": latents.numpy(), "timestep": timestep.numpy(), "context": context.numpy()}
        return torch.from_numpy(graph.run(None, inputs)[0])

    graph = session(tmp_path / "fp16" / "transformer.onnx")
    # torch rounds to fp16 like a GPU; ONNX Runtime computes parts of fp16 graphs in fp32, depending on the processor.
    # fp16 rounds by up to 2^-11 = 5e-4, which accumulates over 8 evaluations: 35 dB are 1.8 % of the range. fp32 rounds
    # by 6e-8; 70 dB are 0.03 %.
    assert psnr(in_torch(FP32), wanted) > 70
    assert psnr(in_torch(FP16), wanted) > 35
    assert psnr(draw_image(in_runtime, context, decoder), wanted) > 35
    plain = in_torch(dataclasses.replace(FP16, attention_scale=1.0, gate_scale=1.0, up_scale=1.0))
    assert np.isnan(plain).all()


def test_fp16_names_a_weight_that_does_not_fit(small_checkpoint: Path, tmp_path: Path):
    def change(tensors: dict) -> None:
        tensors["layers.1.feed_forward.w2.weight"][0, 0] = 1e5

    folder = changed_transformer(small_checkpoint, tmp_path / "big", change)
    with pytest.raises(TensorError, match=r"layers\.1\.feed_forward\.w2.*100000.*65504"):
        export(recipe(folder, tmp_path / "out", precision="fp16", vae=(), parity=False))
