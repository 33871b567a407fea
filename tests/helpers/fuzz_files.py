"""Kinds of damaged input: manifests, bundles, safetensors files, LoRAs, graphs, and images' records."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors
from fuzzing import Kind, Wrong, check, kind, mutate_bytes, mutate_json, to_text
from google.protobuf.message import DecodeError
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load as load_safetensors
from shared import copy_bundle

import zimage_rt
from zimage_rt.bundle.json_codec import parse_json, to_json
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.bundle.onnx_files import external_files
from zimage_rt.bundle.safetensors_file import TensorFile
from zimage_rt.errors import ZImageError
from zimage_rt.lora.file import read_lora
from zimage_rt.lora.manager import combine
from zimage_rt.lora.match import match_layers
from zimage_rt.metadata.image_file import KEY, read_record

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 1}


def holds(value: Any, said: Any) -> bool:
    """Whether a JSON value says all that another does; fields with defaults may be added."""
    if isinstance(said, dict):
        return isinstance(value, dict) and all(key in value and holds(value[key], item) for key, item in said.items())
    if isinstance(said, list):
        return isinstance(value, list) and len(value) == len(said) and all(map(holds, value, said))
    return value == said


@kind("json text")
class JsonText(Kind):
    """Any text; the judge is Python's own parser."""

    errors = (ValueError,)

    def run(self, rng: random.Random) -> None:
        sample = {"a": [1, 2.5, "x", None, True], "b": {"c": "猫"}}
        text = to_text(rng, mutate_json(rng, sample)).encode("utf-8", "surrogatepass")
        if rng.random() < 0.5:
            text = mutate_bytes(rng, text)
        value = parse_json(text)
        check(json.dumps(value) == json.dumps(json.loads(text)), "another value than json.loads")


@kind("manifest")
class ManifestText(Kind):
    """A manifest with changed values; what is read again is what was written, and it serves or is refused."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        self.copy = copy_bundle(bundle, folder / "bundle")
        self.data = json.loads((bundle / "manifest.json").read_bytes())

    def run(self, rng: random.Random) -> None:
        path = self.copy / "manifest.json"
        if rng.random() < 0.2:
            path.write_bytes(mutate_bytes(rng, json.dumps(self.data).encode()))
        else:
            changed = mutate_json(rng, self.data)
            path.write_text(to_text(rng, changed), encoding="utf-8", errors="surrogatepass")
        manifest = read_manifest(self.copy)
        again, written = to_json(manifest), json.loads(path.read_bytes())
        check(holds(again, written), "another manifest than was written")
        if rng.random() < 0.1:
            engine = zimage_rt.Engine.load(self.copy, verify=False)
            images = engine.generate("a panda", **SMALL).images
            check(images.shape == (1, 64, 64, 3), "an image of another size")


@kind("bundle file")
class BundleFile(Kind):
    """A changed byte in any file that a manifest names is found before it is used."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        self.names = sorted(read_manifest(bundle).files, key=lambda name: (bundle / name).stat().st_size)[:9]

    def run(self, rng: random.Random) -> None:
        from zimage_rt.bundle.verify import check_file

        name = rng.choice(self.names)
        content = (self.bundle / name).read_bytes()
        changed = mutate_bytes(rng, content)
        path = self.folder / name
        path.write_bytes(changed)
        check_file(self.folder, name, read_manifest(self.bundle).files[name])
        check(changed == content, "a changed file passed")


@kind("safetensors")
class Safetensors(Kind):
    """A file that is taken has the numbers that the safetensors library reads."""

    errors = (ValueError,)

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        rng = np.random.default_rng(0)
        shapes = {"a": ((3, 4), np.float32), "b.weight": ((5,), np.float16), "c": ((2, 2, 2), np.float64)}
        arrays = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}
        arrays["d"] = np.full((), 2.5, np.float32)
        self.content = safetensors.numpy.save(arrays, {"format": "pt"})

    def run(self, rng: random.Random) -> None:
        content = self._changed(rng)
        path = self.folder / "file.safetensors"
        path.write_bytes(content)
        file = TensorFile(path, content if rng.random() < 0.5 else None)
        ours = {name: file.read(name) for name in file.tensors}
        try:
            theirs = load_safetensors(content)
        except Exception as error:
            raise Wrong(f"taken, and the library says: {error}") from error
        check(ours.keys() == theirs.keys(), "other tensors")
        for name, array in theirs.items():
            with np.errstate(over="ignore"):
                expected = array.astype(np.float32)
            check(np.array_equal(ours[name], expected, equal_nan=True), f"other numbers of {name}")

    def _changed(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, self.content)
        length = struct.unpack("<Q", self.content[:8])[0]
        header = json.loads(self.content[8 : 8 + length])
        text = to_text(rng, mutate_json(rng, header)).encode("utf-8", "surrogatepass")
        stated = len(text) if rng.random() < 0.9 else rng.choice((0, 1, length, len(text) + 1, 2**40, 2**64 - 1))
        return struct.pack("<Q", stated) + text + self.content[8 + length :]


@kind("lora")
class LoraFile(Kind):
    """A LoRA that is taken changes each layer by what its own numbers say in float64."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        self.manifest = read_manifest(bundle)
        generator = np.random.default_rng(1)
        tensors: dict[str, np.ndarray] = {}
        linears = self.manifest.modules["transformer"].linears
        for layer in sorted(linears)[:4]:
            at = linears[layer]
            tensors[f"transformer.{layer}.lora_A.weight"] = generator.standard_normal((2, at.in_features), np.float32)
            tensors[f"transformer.{layer}.lora_B.weight"] = generator.standard_normal((at.columns, 2), np.float32)
        self.tensors = tensors
        self.settings = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 3},
                         "transformer.use_rslora": False, "transformer.use_dora": False}  # fmt: skip

    def run(self, rng: random.Random) -> None:
        tensors, metadata = dict(self.tensors), {"lora_adapter_metadata": json.dumps(self.settings)}
        scale = {layer: 1.5 if layer.endswith("to_q") else 2.0 for layer in self._layers(tensors)}
        change = rng.randrange(5)
        if change == 0:  # the settings say something else
            metadata["lora_adapter_metadata"] = to_text(rng, mutate_json(rng, self.settings))
            scale = {}
        elif change == 1:  # a tensor of another shape, name or content
            key = rng.choice(list(tensors))
            array = tensors.pop(key)
            spoilt = rng.choice(
                (array[:, :-1], array.T, array[None], array.astype(np.int32), array * np.nan, array[:0], array.ravel())
            )
            tensors[rng.choice((key, key.replace("lora_A", "lora_down"), key + ".x", key[12:]))] = np.ascontiguousarray(
                spoilt
            )
        elif change == 2:
            del tensors[rng.choice(list(tensors))]
        elif change == 3:
            metadata = {
                rng.choice(("lora_alpha", "ss_network_alpha", "alpha", "x")): rng.choice(("4", "nan", "-1", ""))
            }
            scale = {}
        try:
            content = safetensors.numpy.save(tensors, metadata)
        except Exception:  # half a surrogate pair, which the library cannot write
            return
        if change == 4:
            content = mutate_bytes(rng, content[:4000], 2) + content[4000:]
            scale = {}
        path = self.folder / "lora.safetensors"
        path.write_bytes(content)
        placed = match_layers(read_lora(path), self.manifest, self.bundle, strict=rng.random() < 0.8)
        if scale:
            self._compare(placed, tensors, scale)

    def _layers(self, tensors: dict[str, np.ndarray]) -> set[str]:
        return {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in tensors}

    def _compare(self, placed: Any, tensors: dict[str, np.ndarray], scale: dict[str, float]) -> None:
        linears = self.manifest.modules["transformer"].linears
        found = {(change.tensor, change.first_column): change for change in combine([(placed, 1.0)], "transformer")}
        for layer in self._layers(tensors) & linears.keys():
            at = linears[layer]
            change = found.get((at.tensor, at.first_column))
            pair = [tensors.get(f"transformer.{layer}.lora_{half}.weight") for half in "AB"]
            if change is None or pair[0] is None or pair[1] is None:
                continue
            expected = pair[1].astype(np.float64) @ pair[0].astype(np.float64) * scale.get(layer, np.nan)
            size = np.linalg.norm(change.down.T.astype(np.float64) @ change.up)
            check(bool(np.isclose(size, np.linalg.norm(expected), rtol=1e-4)), f"another size of the change of {layer}")


@kind("graph")
class Graph(Kind):
    """The files that a graph names; the judge is the onnx package."""

    errors = (ValueError,)

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        self.content = (bundle / "tiny_vae_decoder.onnx").read_bytes()

    def run(self, rng: random.Random) -> None:
        content = mutate_bytes(rng, self.content)
        found = external_files(content)
        try:
            model = onnx.load_model_from_string(content)
        except (DecodeError, ValueError):
            return
        named = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        check(named <= found, f"{named - found} was not found")


@kind("record")
class Record(Kind):
    """A record that is taken is the one that the file holds."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        engine = zimage_rt.Engine.load(bundle)
        source = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
        result = engine.generate("一只熊猫", image=source, strength=0.5, **{**SMALL, "num_inference_steps": 2})
        self.image = result.save(folder / "image.png")[0].read_bytes()
        self.data = json.loads((folder / "image.json").read_bytes())
        self.data["loras"] = [{"name": "a", "weight": 1.0, "path": "a.safetensors", "sha256": "0" * 64}]
        self.data["batch"] = {"index": 0, "prompts": ["a"], "negative_prompts": [""], "seeds": [1]}

    def run(self, rng: random.Random) -> None:
        path = self.folder / "changed.png"
        sidecar = path.with_suffix(".json")
        sidecar.unlink(missing_ok=True)
        written = None
        if rng.random() < 0.3:
            path.write_bytes(mutate_bytes(rng, self.image))
        else:
            text = to_text(rng, mutate_json(rng, self.data))
            written = text
            if rng.random() < 0.5:
                path = sidecar
                path.write_text(text, encoding="utf-8")
            else:
                info = PngInfo()
                info.add_text(KEY, text)
                content = io.BytesIO()
                Image.new("RGB", (8, 8)).save(content, "PNG", pnginfo=info)
                path.write_bytes(content.getvalue())
        record = read_record(path)
        kept = json.loads(json.dumps(dataclasses.asdict(record)))
        if written is None:
            check(kept["request"]["prompt"] == "一只熊猫", "another prompt")
        else:
            said = json.loads(written)
            check(all(kept[key] == value for key, value in said.items() if key != "request"), "another record")
        for use in (record.to_request, record.find_loras):
            try:
                use()
            except ZImageError as error:
                check(bool(str(error)), "no message")
