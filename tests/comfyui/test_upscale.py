"""Upscale models: networks against spandrel and torch, tiles against ComfyUI, and the nodes.

`tests/data/comfyui/upscale.npz` has what spandrel 0.4.2 gave for the models of `upscale_models.CASES`, and every 17th
row and 29th column of what the tiles of ComfyUI 0.33.0 gave around `with_seams`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from PIL import Image
from shared import ROOT
from torch.nn import functional
from upscale_models import CASES, State, compact, image_of, renamed, rrdb, state_of, with_seams

import zimage_rt
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.nodes import upscale
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.run import Run
from zimage_rt.comfyui.upscale import model as models
from zimage_rt.comfyui.upscale.architectures import build
from zimage_rt.comfyui.upscale.model import UpscaleModel, load_upscaler
from zimage_rt.comfyui.upscale.tiles import upscale_in_tiles
from zimage_rt.comfyui.upscale.weights import Weights
from zimage_rt.comfyui.workflow_file import parse_workflow
from zimage_rt.errors import BackendUnavailable, OutOfMemory

DATA = ROOT / "tests" / "data" / "comfyui"
FILES = FolderFiles({}, None, None, (DATA,), DATA)


def weights_of(state: State) -> Weights:
    return Weights(
        {name: tuple(tensor.shape) for name, tensor in state.items()}, lambda name: state[name].float().numpy()
    )


def model_of(state: State) -> UpscaleModel:
    return UpscaleModel(build(weights_of(state)))


def run() -> Run:
    def engine(bundle: str) -> zimage_rt.Engine:
        raise AssertionError(f"upscaling needs no bundle, but {bundle} was asked for")

    return Run(engine, FILES)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_model_gives_spandrels_image(name: str) -> None:
    state = state_of(CASES[name])
    with np.load(DATA / "upscale.npz") as file:
        wanted = file[name]
    found = model_of(state)(image_of(6, 9))
    assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-5  # measured: 1e-6 at most
    assert wanted.std() > 0.01


@pytest.mark.parametrize("layout", ["basicsr", "bsrgan"])
@pytest.mark.parametrize("name", ["rrdb_x2", "rrdb_x4", "rrdb_x8", "rrdb_unshuffle_x2"])
def test_other_names_of_the_weights_are_the_same_model(name: str, layout: str) -> None:
    state = state_of(CASES[name])
    assert build(weights_of(renamed(state, layout))) == build(weights_of(state))


def rrdb_in_torch(state: State, image: torch.Tensor, doublings: int) -> torch.Tensor:
    """RRDBNet as its paper has it."""

    def conv(name: str, value: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(value, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def leaky(value: torch.Tensor) -> torch.Tensor:
        return functional.leaky_relu(value, 0.2)

    first = found = conv("model.0", image)
    for block in range(2):
        before = found
        for dense in (1, 2, 3):
            name, parts = f"model.1.sub.{block}.RDB{dense}", [found]
            for number in (1, 2, 3, 4):
                parts.append(leaky(conv(f"{name}.conv{number}.0", torch.cat(parts, 1))))
            found = found + 0.2 * conv(f"{name}.conv5.0", torch.cat(parts, 1))
        found = before + 0.2 * found
    found = first + conv("model.1.sub.2", found)
    for doubling in range(1, doublings + 1):
        found = leaky(conv(f"model.{3 * doubling}", functional.interpolate(found, scale_factor=2)))
    return conv(f"model.{3 * doublings + 4}", leaky(conv(f"model.{3 * doublings + 2}", found)))


@pytest.mark.parametrize(("features", "growth", "height", "width"), [(8, 4, 13, 31), (5, 3, 2, 2), (24, 16, 40, 7)])
def test_sizes_of_layers_are_those_of_the_weights(features: int, growth: int, height: int, width: int) -> None:
    state = state_of(rrdb(1, features=features, growth=growth))
    image = image_of(height, width)
    with torch.no_grad():
        wanted = rrdb_in_torch(state, torch.from_numpy(image), 1).clamp(0, 1).numpy()
    assert np.abs(model_of(state)(image) - wanted).max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_valid_onnx(name: str) -> None:
    network = build(weights_of(state_of(CASES[name])))
    found = onnx.load_model_from_string(network.model)
    onnx.checker.check_model(found, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(found, strict_mode=True, data_prop=True).graph
    for value in (*inferred.input, *inferred.output):
        shape = value.type.tensor_type.shape.dim
        assert [dim.dim_value for dim in shape] == [1, 3, 0, 0] and shape[2].dim_param and shape[3].dim_param
    assert not [tensor for tensor in inferred.initializer if tensor.external_data]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 1), (3, 6)])
def test_images_of_a_few_pixels_are_padded_and_cut(size: tuple[int, int]) -> None:
    """By reflection and then by the last pixel, to 4: as an image that was padded so before."""
    model, image = model_of(state_of(CASES["rrdb_unshuffle_x2"])), image_of(*size)
    rows, columns = (max(4, -(-side // 4) * 4) - side for side in size)
    reflected = [(0, 0), (0, 0), (0, min(rows, size[0] - 1)), (0, min(columns, size[1] - 1))]
    padded = np.pad(image, reflected, mode="reflect")
    last = [(0, 0), (0, 0), (0, size[0] + rows - padded.shape[2]), (0, size[1] + columns - padded.shape[3])]
    whole = model(np.pad(padded, last, mode="edge"))
    assert np.array_equal(model(image), whole[:, :, : 2 * size[0], : 2 * size[1]])


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "tiles"), [(150, 290, 6), (128, 129, 2), (300, 100, 3)])
def test_tiles_meet_as_comfyuis(height: int, width: int, tiles: int) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(tile: np.ndarray) -> np.ndarray:
        calls.append(tile.shape)
        return with_seams(tile)

    found = upscale_in_tiles(image_of(height, width), counted, 2, 128)
    with np.load(DATA / "upscale.npz") as file:
        wanted = file[f"tiles_{height}x{width}"]
    assert len(calls) == tiles and found.shape == (1, 3, 2 * height, 2 * width)
    assert np.abs(found[:, :, ::17, ::29] - wanted).max() < 1e-5


class Small:
    """A model for tiles up to a size; more do not fit in memory."""

    def __init__(self, most: int) -> None:
        self.scale, self.most, self.sizes = 2, most, list[tuple[int, int]]()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.sizes.append((image.shape[2], image.shape[3]))
        if max(image.shape) > self.most:
            raise OutOfMemory("no memory")
        return with_seams(image)


def test_smaller_tiles_are_taken_when_memory_does_not_suffice() -> None:
    image = np.moveaxis(image_of(150, 290), 1, -1)
    model: Any = Small(256)
    (found,) = upscale.upscale(run(), model, image)
    assert model.sizes == [(150, 290), (150, 256), (150, 66)] and found.shape == (1, 300, 580, 3)
    none: Any = Small(100)
    with pytest.raises(OutOfMemory, match=r"upscaling to 580 by 300 pixels: no memory; take a smaller image"):
        upscale.upscale(run(), none, image)
    assert none.sizes == [(150, 290), (150, 256), (128, 128)]


# --- nodes ------------------------------------------------------------------------------------------------------------


def graph(name: str = "upscale_compact.pth") -> dict[str, Any]:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "input_scene.png"}},
        "2": {"class_type": "UpscaleModelLoader", "inputs": {"model_name": name}},
        "3": {"class_type": "ImageUpscaleWithModel", "inputs": {"upscale_model": ["2", 0], "image": ["1", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
    }


def test_a_workflow_upscales_without_a_bundle() -> None:
    found = run()
    execute(plan(parse_workflow(graph()), FILES), found)
    image = np.asarray(Image.open(DATA / "input_scene.png").convert("RGB"), np.float32) / 255
    wanted = model_of(state_of(compact(4, features=4)))(np.moveaxis(image[None], -1, 1))[0]
    assert found.made[0].pixels.shape == (1024, 1024, 3)
    assert np.abs(found.made[0].pixels - 255 * np.moveaxis(wanted, 0, -1)).max() <= 1


def test_images_of_a_batch_are_upscaled_apart_and_alpha_bilinearly() -> None:
    model = model_of(state_of(CASES["compact_x3"]))
    images = np.moveaxis(np.concatenate([image_of(8, 10), image_of(8, 10)[:, ::-1]]), 1, -1)
    (both,) = upscale.upscale(run(), model, images)
    for number in (0, 1):
        assert np.array_equal(both[number], upscale.upscale(run(), model, images[number : number + 1])[0][0])
    alpha = image_of(8, 10)[:, :1]
    with_alpha = np.concatenate([images[:1], np.moveaxis(alpha, 1, -1)], axis=-1)
    (found,) = upscale.upscale(run(), model, with_alpha)
    wanted = functional.interpolate(torch.from_numpy(alpha), (24, 30), mode="bilinear").numpy()
    assert np.array_equal(found[..., :3], both[:1]) and np.abs(found[0, ..., 3] - wanted[0, 0]).max() < 1e-6


def test_a_result_of_too_many_pixels_is_refused() -> None:
    model: Any = Small(0)
    with pytest.raises(WorkflowError, match="at most 16384 pixels per side, got 40 by 16386 as a result"):
        upscale.upscale(run(), model, np.zeros((1, 8193, 20, 3), np.float32))


def test_a_missing_file_is_refused_before_anything_is_drawn() -> None:
    with pytest.raises(WorkflowError, match=r"model_name: there is no upscale model '4x.pth'"):
        plan(parse_workflow(graph("4x.pth")), FILES)
    with pytest.raises(WorkflowError, match="name their folder with --upscalers"):
        plan(parse_workflow(graph()), FolderFiles({}, None, None, (DATA,)))


def test_a_file_of_another_kind_is_refused_when_its_node_runs() -> None:
    with pytest.raises(WorkflowError, match=r"UpscaleModelLoader \(#2\): graphs.json: expected a file of torch.save"):
        execute(plan(parse_workflow(graph("graphs.json")), FILES), run())


def test_a_missing_onnxruntime_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(models, "_kept", type(models._kept)())
    with pytest.raises(BackendUnavailable, match=r"pip install 'zimage-rt\[onnxruntime\]'"):
        load_upscaler(DATA / "upscale_compact.pth", "upscale_compact.pth")


def test_models_are_kept_until_others_come_or_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_kept", type(models._kept)())

    def save(name: str, shapes: Any) -> Path:
        safetensors.torch.save_file(state_of(shapes), tmp_path / name)
        return tmp_path / name

    one, two, three = (save(f"{scale}.safetensors", compact(scale)) for scale in (1, 2, 3))
    first = load_upscaler(one, "one")
    assert load_upscaler(one, "one") is first
    load_upscaler(two, "two")
    assert load_upscaler(one, "one") is first
    load_upscaler(three, "three")
    assert load_upscaler(one, "one") is first and len(models._kept) == models.MAX_KEPT
    save("1.safetensors", compact(4))
    assert load_upscaler(one, "one").scale == 4


NO_TORCH = """
import sys
from pathlib import Path
import numpy as np
from zimage_rt.comfyui.nodes import upscale
from zimage_rt.comfyui.upscale.model import load_upscaler
assert load_upscaler(Path(sys.argv[1]), "x")(np.zeros((1, 3, 4, 4), np.float32)).shape == (1, 3, 16, 16)
loaded = {name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "safetensors", "spandrel"}
assert not loaded, loaded
"""


def test_upscaling_loads_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_TORCH, str(DATA / "upscale_compact_legacy.pth")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr


def test_the_command_takes_a_folder_of_upscale_models(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph()), encoding="utf-8")
    options = ["--input", DATA, "--upscalers", DATA, "-o", tmp_path / "out", "-b", "none"]
    command = [sys.executable, "-m", "zimage_rt.cli.main", "workflow", file, *options]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    (path,) = (tmp_path / "out").glob("*.png")
    assert Image.open(path).size == (1024, 1024)
