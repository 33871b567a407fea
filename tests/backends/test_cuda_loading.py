"""Loading on the `cuda` backend: every tensor is checked then, and a refused module leaves nothing on the device."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_reference import require_gpu

from zimage_rt.backends.registry import load_backend
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.bundle.safetensors_file import TensorFile
from zimage_rt.errors import BundleMismatch

pytestmark = pytest.mark.gpu
cuda = require_gpu()
from zimage_rt.backends.cuda import CudaPipeline, weight_entries  # noqa: E402  it needs what was just required

MODULES = ("text_encoder", "context_refiner", "transformer", "tiny_vae_decoder", "tiny_vae_encoder")

# name, dtype, shape, offset in the file, whether it stays on the host: what `_cuda.Pipeline.load` is given.
Entry = tuple[str, str, list[int], int, bool]


def open_pipeline(bundle: Path, **options: Any) -> CudaPipeline:
    return load_backend("cuda", options).open(bundle, read_manifest(bundle), lambda name: None)


def load(pipeline: CudaPipeline, bundle: Path, module: str, change: Callable[[Entry], Entry] = lambda it: it) -> None:
    """Load a module as the backend does, with each tensor's entry as `change` makes it."""
    spec = read_manifest(bundle).module(module)
    path = bundle / spec.weights
    pipeline.native.load(module, str(path), [change(entry) for entry in weight_entries(path)], dict(spec.config))


def outputs(pipeline: CudaPipeline, module: str) -> bytes:
    """What a module computes of fixed inputs; loaded on first use."""
    rng = np.random.default_rng(1)
    config = read_manifest(pipeline._bundle).module(module).config

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    if module == "text_encoder":
        inputs = {"input_ids": np.arange(40)[None]}
    elif module == "context_refiner":
        inputs = {"prompt_embeds": normal(1, 40, config["cap_feat_dim"])}
    elif module == "transformer":
        context = normal(1, 32, config["dim"])
        inputs = {"latents": normal(1, 16, 16, 16), "timestep": np.full(1, 0.4, np.float32), "context": context}
    elif module == "tiny_vae_decoder":
        inputs = {"latents": normal(1, 16, 8, 8)}
    else:
        inputs = {"image": normal(1, 3, 64, 64)}
    return next(iter(pipeline.module(module)(inputs).values())).tobytes()


def renamed(name: str) -> Callable[[Entry], Entry]:
    return lambda entry: (entry[0] + ".gone", *entry[1:]) if entry[0] == name else entry


def reshaped(name: str) -> Callable[[Entry], Entry]:
    return lambda entry: (entry[0], entry[1], [1, *entry[2]], *entry[3:]) if entry[0] == name else entry


@pytest.mark.parametrize("options", [{}, {"text_encoder": "host"}], ids=["resident", "host"])
@pytest.mark.parametrize("module", MODULES)
def test_a_missing_or_misshapen_tensor_is_refused_when_its_module_is_loaded(cuda_bundles, module, options):
    """Each tensor of the file; afterwards the device holds what it did, and the right weights load and compute."""
    if options and module != "text_encoder":
        pytest.skip("the option concerns the text encoder alone")
    bundle = cuda_bundles["bf16"]
    pipeline = open_pipeline(bundle, **options)
    file = bundle / read_manifest(bundle).module(module).weights
    names = list(TensorFile(file).tensors)
    # Libraries and threads take their share of the device with the first upload.
    with pytest.raises(cuda.WeightError):
        load(pipeline, bundle, module, renamed(names[0]))
    before = pipeline.memory()
    for number, name in enumerate(names):
        with pytest.raises(cuda.WeightError, match=rf"{re.escape(name)} .*is missing"):
            load(pipeline, bundle, module, renamed(name))
        if number % 4 == 0:  # one function looks at both, and every load takes a tenth of a second
            with pytest.raises(cuda.WeightError, match=rf"{re.escape(name)}: expected .*, got "):
                load(pipeline, bundle, module, reshaped(name))
    after = pipeline.memory()
    assert after["weights"] == before["weights"] == 0
    assert after["workspace"] == before["workspace"]
    # More uploads than there are tensors: what stayed of each would add up to much more than one.
    if "PYTEST_XDIST_WORKER" not in os.environ:  # other test processes take memory of the same device
        assert before["free"] - after["free"] < max(file.stat().st_size, 8 << 20)

    pipeline.load([module])
    whole = open_pipeline(bundle, **options)
    assert outputs(pipeline, module) == outputs(whole, module)
    assert pipeline.memory()["weights"] == whole.memory()["weights"]


@pytest.mark.parametrize("module", MODULES)
def test_one_file_has_one_number_format(cuda_bundles, module):
    """Whichever matrix disagrees, the first or the last: both it and one that it disagrees with are named."""
    bundle = cuda_bundles["bf16"]
    pipeline = open_pipeline(bundle)
    tensors = weight_entries(bundle / read_manifest(bundle).module(module).weights)
    halves = [name for name, dtype, *_ in tensors if dtype != "F32"]

    def as_fp16(name: str) -> Callable[[Entry], Entry]:
        return lambda entry: (entry[0], "F16", *entry[2:]) if entry[0] == name else entry

    for odd, other in ((halves[-1], halves[0]), (halves[len(halves) // 2], halves[0])):
        message = rf"tensor {re.escape(odd)} is fp16, but {re.escape(other)} is bf16"
        with pytest.raises(cuda.WeightError, match=message):
            load(pipeline, bundle, module, as_fp16(odd))
    message = rf"tensor {re.escape(halves[1])} is bf16, but {re.escape(halves[0])} is fp16"
    with pytest.raises(cuda.WeightError, match=message):
        load(pipeline, bundle, module, as_fp16(halves[0]))
    with pytest.raises(cuda.WeightError, match="expected matrices in fp16 or bf16, got fp32 alone"):
        load(pipeline, bundle, module, lambda entry: (entry[0], "F32", *entry[2:]))
    assert pipeline.memory()["weights"] == 0


def test_a_module_is_loaded_once(cuda_bundles):
    bundle = cuda_bundles["bf16"]
    pipeline = open_pipeline(bundle)
    drawn = outputs(pipeline, "tiny_vae_decoder")
    before = pipeline.memory()["weights"]
    with pytest.raises(cuda.ArgumentError, match="tiny_vae_decoder is loaded already"):
        load(pipeline, bundle, "tiny_vae_decoder")
    with pytest.raises(cuda.ArgumentError, match="no program runs the module huge_vae_decoder"):
        pipeline.native.load("huge_vae_decoder", "nowhere", [], {})
    assert pipeline.memory()["weights"] == before
    assert outputs(pipeline, "tiny_vae_decoder") == drawn


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a safetensors file's header; the bytes behind it stay."""
    file = TensorFile(path)
    content = path.read_bytes()[file.data_start :]
    header = {name: dict(entry) for name, entry in file.tensors.items()}
    change(header)
    text = json.dumps(header).encode()
    text += b" " * ((56 - len(text)) % 64)  # the tensors begin at a multiple of 64 bytes
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def test_a_bundle_that_is_mended_loads_into_the_same_pipeline(cuda_bundles, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(cuda_bundles["bf16"], bundle)
    transformer = bundle / "transformer.safetensors"

    def mix(header: dict[str, Any]) -> None:
        header["layers.0.feed_forward.w2.weight"]["dtype"] = "F16"

    def lose(header: dict[str, Any]) -> None:
        header["something.else"] = header.pop("all_x_embedder.2-1.weight")

    pipeline = open_pipeline(bundle)
    pipeline.load(["text_encoder", "context_refiner"])
    before = pipeline.memory()["weights"]
    for change, message in ((mix, r"w2\.weight is fp16"), (lose, r"all_x_embedder\.2-1\.weight .* is missing")):
        rewrite(transformer, change)
        with pytest.raises(BundleMismatch, match=rf"loading transformer: .*{message}"):
            pipeline.load(["transformer"])
        assert pipeline.memory()["weights"] == before
        shutil.copyfile(cuda_bundles["bf16"] / "transformer.safetensors", transformer)
    pipeline.load(["transformer"])
    whole = open_pipeline(cuda_bundles["bf16"])
    assert outputs(pipeline, "transformer") == outputs(whole, "transformer")
