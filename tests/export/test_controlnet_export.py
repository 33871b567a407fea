"""Export of ControlNets: outputs against diffusers', both file layouts, and refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from controlnet_files import KINDS, WEIGHTS, make_controlnet, tensors_of
from export_checkpoints import recipe
from safetensors import safe_open
from safetensors.torch import save_file
from zimage_rt.export import bundle, weights
from zimage_rt.export.builders import onnxruntime
from zimage_rt.export.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from zimage_rt.export.checkpoint.controlnet import open_controlnet
from zimage_rt.export.errors import CheckpointError, ExportError, RecipeError, TensorError
from zimage_rt.export.parity.measure import measure, sample
from zimage_rt.export.parity.reference import ReferenceCache
from zimage_rt.export.plan import ModulePlan, plan_modules
from zimage_rt.export.precision import FP16, FP32, Precision
from zimage_rt.export.recipe import read_recipe

# Sizes of `small_checkpoint`.
SMALL: dict[str, Any] = {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "control_layers_places": [0, 1]}
# fp32 sums in another order differ by some 1e-6 on any processor; a missing layer changes the output by a tenth.
FP32_ERROR = 2e-5
SIZES = {"batch": 2, "latent_height": 10, "latent_width": 14, "context_tokens": 32}


def plan_of(checkpoint: Checkpoint, precision: Precision = FP32) -> ModulePlan:
    return next(plan for plan in plan_modules(checkpoint, precision, ()) if plan.name == "controlnet")


def in_torch(plan: ModulePlan, *inputs: torch.Tensor) -> torch.Tensor:
    assert plan.base is not None
    tensors = {**plan.base.component.tensors, **plan.component.tensors}
    module = weights.load(plan.build(), dataclasses.replace(plan.component, tensors=tensors))
    with torch.no_grad():
        return module(*inputs)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def checkpoint(request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small checkpoint with a ControlNet of each kind."""
    folder = make_controlnet(tmp_path_factory.mktemp("net"), request.param, **SMALL)
    return open_checkpoint(small_checkpoint, {"controlnet": folder})


def test_every_kind_computes_what_diffusers_does(checkpoint: Checkpoint):
    plan = plan_of(checkpoint)
    reference, name = ReferenceCache().get(plan)
    assert "ZImageControlNetModel" in name
    inputs = [torch.from_numpy(sample(spec, SIZES, 1, 3)) for spec in plan.inputs]
    with torch.no_grad():
        wanted = reference(*inputs)
        plain = reference(*inputs[:-1], torch.zeros(2))
    assert (in_torch(plan, *inputs) - wanted).norm() / wanted.norm() < FP32_ERROR
    assert (wanted - plain).norm() / plain.norm() > 0.1  # larger than any rounding error
    assert (in_torch(plan, *inputs[:-1], torch.zeros(2)) - plain).norm() / plain.norm() < FP32_ERROR
    # fp16 rounds by 2^-11 = 5e-4, in the branches of about ten blocks.
    assert (in_torch(plan_of(checkpoint, FP16), *inputs) - wanted).norm() / wanted.norm() < 5e-3


def test_a_control_stream_beyond_fp16_draws_what_fp32_does(checkpoint: Checkpoint):
    """The projections have no norm before them; here the stream's values are about 1e5."""
    net = checkpoint.controlnet
    assert net is not None

    def loud(name: str, tensor: Any) -> Any:
        begins = name.endswith(("2-1.bias", "before_proj.bias"))
        factor = 2.0**19 if begins else 2.0**-8 if "_proj.weight" in name else 1.0
        return CheckpointTensor.plain(tensor.shape, lambda: tensor.load() * factor)

    tensors = {name: loud(name, tensor) for name, tensor in net.tensors.items()}
    changed = dataclasses.replace(checkpoint, controlnet=dataclasses.replace(net, tensors=tensors))
    plan = plan_of(changed)
    inputs = [torch.from_numpy(sample(spec, SIZES, 1, 3)) for spec in plan.inputs]
    wanted, got = (in_torch(plan_of(changed, precision), *inputs) for precision in (FP32, FP16))
    # fp16's 5e-4 of a stream of 1e5 that later hints, a hundredth as large, are added to.
    assert (got - wanted).norm() / wanted.norm() < 2e-2
    plain = dataclasses.replace(FP16, attention_scale=1.0)
    assert not torch.isfinite(in_torch(plan_of(changed, plain), *inputs)).all()


def test_a_graph_reads_the_transformers_own_weight_file(small_checkpoint: Path, tmp_path: Path):
    """Nothing is stored twice. Tests version 2.1 with consecutive layers; test_controlnet.py runs a graph of 2.0."""
    net = make_controlnet(tmp_path / "net", "control_noise_refiner", **SMALL)
    plan = plan_of(open_checkpoint(small_checkpoint, {"controlnet": net}))
    path = tmp_path / "controlnet.safetensors"
    for part in (plan.base, plan):
        assert part is not None
        weights.write(part.meta_module(), part.component, tmp_path / f"{part.name}.safetensors", shared=part.shared())
    graph = bundle._write_graph(plan, tmp_path, onnxruntime.simplify)
    parity = measure(plan, graph, *ReferenceCache().get(plan))
    assert max(case.relative_error for case in parity.cases) < FP32_ERROR
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert all(name.startswith("control_") for name in names)
    assert "control_layers.0.before_proj.weight" in names
    assert path.stat().st_size < 1.01 * (net / WEIGHTS).stat().st_size + 8192


def test_a_module_too_large_for_memory_is_measured_on_its_first_layers(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    net, transformer = checkpoint.controlnet, checkpoint.transformer
    assert net is not None
    # A transformer of nine layers: the shortened one must not keep places beyond its last layer.
    tensors = {
        name.replace("layers.1.", f"layers.{i}."): tensor
        for i in range(1, 9)
        for name, tensor in transformer.tensors.items()
    }
    longer = dataclasses.replace(transformer, config={**transformer.config, "n_layers": 9}, tensors=tensors)
    spread = dataclasses.replace(net, config={**net.config, "control_layers_places": [0, 5]})
    whole = dataclasses.replace(checkpoint, transformer=longer, controlnet=spread)
    short = plan_of(ReferenceCache().shortened(whole))
    assert short.config["n_layers"] == 2
    assert short.config["control_layers_places"] == (0, 1)
    inputs = [torch.from_numpy(sample(spec, SIZES, 1, 3)) for spec in short.inputs]
    with torch.no_grad():
        wanted = ReferenceCache().get(short)[0](*inputs)
    assert (in_torch(short, *inputs) - wanted).norm() / wanted.norm() < FP32_ERROR


def test_a_single_file_gives_the_same_config(checkpoint: Checkpoint, small_checkpoint: Path, tmp_path: Path):
    net = checkpoint.controlnet
    assert net is not None
    tensors = tensors_of(net.files[0].parent)
    if net.config["add_control_noise_refiner"] == "control_layers":  # untrained, as in the file of 2.0
        block = {name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if "control_layers.0." in name}
        tensors |= {f"control_noise_refiner.0.{name}": torch.zeros_like(tensor) for name, tensor in block.items()}
    path = tmp_path / "Z-Image-Turbo-Fun-Controlnet-Union.safetensors"
    save_file(tensors, path)
    single = plan_of(open_checkpoint(small_checkpoint, {"controlnet": path}))
    assert single.config == plan_of(checkpoint).config
    changed = open_checkpoint(
        small_checkpoint, {"controlnet": path}, {"controlnet": {"control_layers_places": [0, 1], "norm_eps": 1e-5}}
    )
    assert plan_of(changed).config == single.config


def test_layers_of_a_single_file_are_spaced_evenly(small_checkpoint: Path, tmp_path: Path):
    net = make_controlnet(tmp_path / "net", None, **{**SMALL, "control_layers_places": [0, 5, 10]})
    path = tmp_path / "net.safetensors"
    save_file(tensors_of(net), path)
    transformer = open_checkpoint(small_checkpoint).transformer
    longer = dataclasses.replace(transformer, config={**transformer.config, "n_layers": 15})
    assert open_controlnet(path, longer).config["control_layers_places"] == [0, 5, 10]


def test_other_components_of_a_saved_pipeline_are_ignored(checkpoint: Checkpoint):
    net = checkpoint.controlnet
    assert net is not None
    tensors = {**net.tensors, "x_pad_token": checkpoint.transformer.tensors["x_pad_token"]}
    plan_of(dataclasses.replace(checkpoint, controlnet=dataclasses.replace(net, tensors=tensors)))


# --- refusals ---------------------------------------------------------------------------------------------------------


def spoilt(folder: Path, tensors: Callable[[dict[str, Any]], object], config: dict[str, Any]) -> Path:
    """A faulty ControlNet of version 2.1."""
    net = make_controlnet(folder, "control_noise_refiner", **SMALL)
    found = tensors_of(net)
    tensors(found)
    save_file(found, net / WEIGHTS)
    written = {**json.loads((net / "config.json").read_text()), **config}
    (net / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not ...}))
    return net


def nothing(_: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        (
            lambda t: t.pop("control_layers.1.after_proj.weight"),
            {},
            TensorError,
            r"'control_layers\.1\.after_proj\.weight' of shape \[256, 256\] is missing",
        ),
        (
            lambda t: t.update({"control_layers.0.before_proj.bias": torch.zeros(255)}),
            {},
            TensorError,
            r"'control_layers\.0\.before_proj\.bias': expected \[256\], got \[255\]",
        ),
        (
            lambda t: t.update({"control_layers.2.after_proj.weight": torch.zeros(256, 256)}),
            {},
            TensorError,
            r"no place for 'control_layers\.2\.after_proj\.weight' in ",
        ),
        (nothing, {"dim": 3840}, CheckpointError, "dim: expected 256, the transformer's, got 3840"),
        (nothing, {"n_heads": 3}, CheckpointError, "n_heads: expected 2"),
        (nothing, {"control_layers_places": [0, 2]}, CheckpointError, r"rising numbers below 2, got \[0, 2\]"),
        (nothing, {"control_layers_places": [1]}, CheckpointError, "expected 0 first"),
        (nothing, {"control_layers_places": [0, 0]}, CheckpointError, "control_layers_places: expected rising"),
        (
            nothing,
            {"control_layers_places": ["0"]},
            CheckpointError,
            "control_layers_places.0.: expected a whole number",
        ),
        (nothing, {"control_refiner_layers_places": [1]}, CheckpointError, "control_refiner_layers_places: expected"),
        (nothing, {"add_control_noise_refiner": "magic"}, CheckpointError, "expected one of None, 'control_layers'"),
        (nothing, {"control_in_dim": 8}, CheckpointError, "control_in_dim: expected 16 channels or more, got 8"),
        (nothing, {"control_in_dim": ...}, CheckpointError, "the config of controlnet: missing key 'control_in_dim'"),
        (nothing, {"_class_name": "FluxControlNetModel"}, CheckpointError, "is a FluxControlNetModel"),
    ],
)
def test_a_fault_is_named(
    small_checkpoint: Path,
    tmp_path: Path,
    tensors: Callable[[dict[str, Any]], object],
    config: dict[str, Any],
    error: type[ExportError],
    message: str,
):
    net = spoilt(tmp_path / "net", tensors, config)
    with pytest.raises(error, match=message):
        plan = plan_of(open_checkpoint(small_checkpoint, {"controlnet": net}))
        weights.write(plan.meta_module(), plan.component, tmp_path / "x.safetensors", shared=plan.shared())


def test_another_file_is_refused(small_checkpoint: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder or file \(part `controlnet`\)"):
        open_checkpoint(small_checkpoint, {"controlnet": tmp_path / "nowhere"})
    path = tmp_path / "lora.safetensors"
    save_file({"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="not a ControlNet for Z-Image: it looks like a LoRA"):
        open_checkpoint(small_checkpoint, {"controlnet": path})


def test_a_recipe_names_it_among_the_parts(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text('checkpoint = "x"\n[parts]\ncontrolnet = "nets/union.safetensors"\n')
    assert read_recipe(path).parts["controlnet"] == tmp_path / "nets" / "union.safetensors"


def test_a_cuda_bundle_has_a_weight_file_of_the_controlnet(small_checkpoint: Path, tmp_path: Path):
    """No graph, and no tensor of the transformer's file."""
    net = make_controlnet(tmp_path / "net", "control_noise_refiner", **SMALL)
    wanted = recipe(
        small_checkpoint, tmp_path / "out", backend="cuda", precision="bf16", vae=(), parts={"controlnet": net}
    )
    manifest = bundle.export(wanted)
    assert manifest.module_files("controlnet") == ("controlnet.safetensors", "transformer.safetensors")
    with safe_open(tmp_path / "out" / "controlnet.safetensors", "pt") as file:
        assert all(name.startswith("control_") for name in file.keys())  # noqa: SIM118
        assert file.get_tensor("control_layers.1.after_proj.weight").dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="controlnet: the tensorrt_rtx backend builds no plan of it"):
        bundle.export(dataclasses.replace(wanted, backend="tensorrt_rtx"))
