"""Kinds of strange input: request fields, arrays and image files, tables, journals, and checkpoints."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_files import SMALL, holds
from fuzzing import STRANGE, Kind, check, kind, mutate_bytes, mutate_json, to_text
from PIL import Image

import zimage_rt
from zimage_rt.batch.journal import Journal
from zimage_rt.batch.rows import RowReader
from zimage_rt.batch.table import Row, read_table
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.errors import RequestError, ZImageError
from zimage_rt.image.convert import read_image
from zimage_rt.request.codec import make_request
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import SecondPass


class Fails:
    """An object of somebody else's, every use of which fails."""

    def __len__(self) -> int:
        raise KeyError("no length")

    def __iter__(self) -> Any:
        raise KeyError("no items")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise KeyError("no array")

    def __repr__(self) -> str:
        raise KeyError("no text")


def strange(rng: random.Random) -> Any:
    """A value of any type."""
    more = (
        *(Fails(), 1 + 2j, b"bytes", object(), {1, 2}, range(3), type, ..., lambda: 1, "a" * 200_001),
        *(np.float32(0.5), np.int64(3), np.array(2), np.zeros((2, 3)), np.array([1, "a"], object)),
        *([[1], [2, 3]], [0.9, "0.5"], [float("nan")], np.full((2, 2), np.nan, np.float32)),
        *(Path("x\0y"), Path("/nowhere"), SecondPass(), Image.new("F", (4, 4))),
    )
    return rng.choice((*STRANGE, *more))


GOOD: dict[str, Any] = {
    **{"prompt": "a panda", "negative_prompt": "a cat", "seed": 7, "num_images": 2, "vae": "tiny", "vae_tile": 256},
    **{"height": 128, "width": 96, "fit_size": "nearest", "num_inference_steps": 3, "sampler": "euler"},
    **{"schedule": "simple", "shift": 2.0, "batch_noise": "comfyui", "second_pass": SecondPass(1.0, 0.5)},
    **{"guidance_scale": 1.5, "cfg_truncation": 0.5, "cfg_normalization": 1.0, "dynamic_cfg": 0.5},
    **{"image": np.zeros((64, 64, 3), np.uint8), "strength": 0.7, "mask_feather": 2.0, "fit": "pad"},
    **{"truncate_prompt": True, "literal_prompt": True},
}
MORE = ("mask", "latents", "image_latents", "sigmas", "control_image", "denoise")


@kind("request field")
class RequestField(Kind):
    """Fields of any type and number; what is taken is in the resolved request as it was given."""

    errors = (RequestError,)

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        self.manifest = read_manifest(bundle)

    def run(self, rng: random.Random) -> None:
        names = rng.sample(sorted(GOOD), rng.randint(1, 6))
        fields = {"prompt": "a panda"} | {name: GOOD[name] for name in names}
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(
                [*fields, *GOOD, "mask", "latents", "image_latents", "sigmas", "control_image", "denoise"]
            )
            fields[name] = strange(rng)
            if name == "second_pass" and rng.random() < 0.5:
                fields[name] = SecondPass(**{rng.choice(("scale", "strength", "denoise", "method")): strange(rng)})
        resolved = resolve(make_request(**fields), self.manifest)
        for name in ("height", "width"):
            if fields.get(name) is not None and fields.get("fit_size", "exact") == "exact":
                check(getattr(resolved, name) == fields[name], f"another {name}")
        for name in ("guidance_scale", "cfg_truncation", "shift", "dynamic_cfg"):
            if fields.get(name) is not None:
                check(getattr(resolved, name) == float(fields[name]), f"another {name}")
        prompts = (fields["prompt"],) if isinstance(fields["prompt"], str) else tuple(fields["prompt"])
        check(set(resolved.prompts) == set(prompts), "other prompts")


@kind("image file")
class ImageFile(Kind):
    """Files of every format, changed in some bytes; the judge is Pillow, which decodes what is taken alike."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 4), np.uint8)
        self.files: dict[str, bytes] = {}
        names = (
            "RGBA.png",
            "L.png",
            "P.png",
            "RGB.jpg",
            "RGB.webp",
            "RGBA.webp",
            "RGB.tif",
            "CMYK.tif",
            "RGB.bmp",
            "P.gif",
        )
        for mode, suffix in (name.split(".") for name in names):
            content = io.BytesIO()
            name = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
            Image.fromarray(pixels).convert(mode).save(content, name)
            self.files[f"{mode}.{suffix}"] = content.getvalue()
        deep = io.BytesIO()
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(deep, "PNG")
        self.files["16.png"] = deep.getvalue()

    def run(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self.files))
        path = self.folder / name
        path.write_bytes(mutate_bytes(rng, self.files[name]))
        image = read_image(path, "image")
        check(image.mode in ("L", "LA", "RGB", "RGBA"), f"mode {image.mode}")
        with Image.open(path) as theirs:
            theirs.load()
            check(sorted(theirs.size) == sorted(image.size), "another size")
            if theirs.mode == image.mode == "RGB" and theirs.getexif().get(274, 1) == 1:
                check(np.array_equal(np.asarray(theirs), np.asarray(image)), "other pixels")


@kind("image array")
class ImageArray(Kind):
    """Arrays of any type, shape and range; what is taken is scaled by its type's range."""

    errors = (RequestError,)
    TYPES = "uint8 uint16 uint32 int8 int16 int32 int64 float16 float32 float64 bool complex64 object S3 datetime64[s]"

    def run(self, rng: random.Random) -> None:
        shape = [rng.choice((0, 1, 2, 3, 4, 5, 9)) for _ in range(rng.choice((0, 1, 2, 3, 3, 3, 4)))]
        if len(shape) == 3 and rng.random() < 0.7:
            shape[2] = rng.choice((1, 3, 4))
        dtype = np.dtype(rng.choice(self.TYPES.split()))
        numbers = np.random.default_rng(rng.randrange(2**32))
        if dtype.kind == "f":
            high = rng.choice((1.0, 1.0, 255.0, np.nan, np.inf, -1.0))
            array = (numbers.random(shape) * high).astype(dtype)
        elif dtype.kind in "iub":
            low, most = (0, 2) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            array = numbers.integers(low, most, shape, np.int64 if dtype.kind != "u" else np.uint64).astype(dtype)
        else:
            array = np.zeros(shape, dtype)
        image = np.asarray(read_image(array, "image"))
        scale = {"uint8": 1.0, "uint16": 255 / 65535, "bool": 255.0}.get(dtype.name, 255.0)
        expected = array.astype(np.float64).reshape(image.shape) * scale
        check(bool((np.abs(image - expected) <= 0.51).all()), "not by its range")


@kind("table")
class TableFile(Kind):
    """CSV and JSON lines, changed; what is read as a row holds what Python's own readers find there."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        super().__init__(folder, bundle)
        self.rows: list[dict[str, Any]] = [
            {"prompt": "a cat", "seed": 1, "second_pass": {"scale": 1.0}, "SKU": "a-1"},
            {"prompt": "一只猫，“好”", "guidance_scale": 1.5, "truncate_prompt": True},
            {"prompt": "c", "sigmas": [1.0, 0.5], "备注": None},
        ]
        self.csv = 'prompt,seed,价格,strength\r\n"a, cat",1,9.9,0.5\r\n一只猫,2,,\r\n"two\nlines",3,"1 ""x""",1\r\n'

    def _compare(self, content: bytes, row: Row) -> None:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:  # read as GB18030
            return
        check(holds(row.values, json.loads(text.split("\n")[row.line - 1])), "another row than json.loads")

    def run(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            path = self.folder / "t.jsonl"
            lines = [to_text(rng, mutate_json(rng, row) if rng.random() < 0.7 else row) for row in self.rows]
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        else:
            path = self.folder / "t.csv"
            content = self.csv.replace(",", rng.choice((",", ";", "\t"))).encode(
                rng.choice(("utf-8", "utf-8-sig", "gb18030", "utf-16"))
            )
        if rng.random() < 0.4:
            content = mutate_bytes(rng, content)
        path.write_bytes(content)
        table = read_table(path)
        reader = RowReader(table, None, {}, 1)
        manifest = read_manifest(self.bundle)
        for row in table.rows:
            if path.suffix == ".jsonl" and row.problem is None:
                self._compare(content, row)
            try:
                resolve(reader.request(row), manifest)
            except ZImageError as error:
                check(bool(str(error)), "no message")
        if path.suffix == ".csv" and content.isascii() and b"sep=" not in content[:20]:
            text = content.decode()
            counts = {mark: len(next(csv.reader([text.splitlines()[0]], delimiter=mark))) for mark in ",;\t"}
            found = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(counts, key=counts.__getitem__)))
            check(len(table.rows) <= max(len(found) - 1, 0), "more rows than csv.reader")


@kind("journal")
class JournalFile(Kind):
    """A journal with changed lines; no row counts as drawn that it does not say was."""

    def run(self, rng: random.Random) -> None:
        header = {"bundle": "b", "loras": [], "options": {}}
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        path = out / "journal.jsonl"
        path.unlink(missing_ok=True)
        with Journal(out, header) as journal:
            for row in (1, 2, 3):
                journal.add(
                    row,
                    key="k",
                    images=[f"0000{row}.png"],
                    sizes=[10],
                    inputs={"image": "0" * 64},
                    extra={"sku": "x"},
                )
            journal.add(4, key="k", error="no")
        lines = path.read_bytes().splitlines()
        if rng.random() < 0.5:
            at = rng.randrange(len(lines))
            lines[at] = to_text(rng, mutate_json(rng, json.loads(lines[at]))).encode("utf-8", "surrogatepass")
            content = b"\n".join(lines) + b"\n"
        else:
            content = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
        restart = rng.random() < 0.1
        with Journal(out, header, restart=restart) as journal:
            said = []
            for line in content.split(b"\n")[1:]:
                try:
                    said.append(json.loads(line))
                except ValueError:
                    continue
            rows = {line["row"] for line in said if isinstance(line, dict) and "pictures" in line}
            check(restart or set(journal.images) <= rows, "a row that was never drawn")


@kind("backend option")
class BackendOption(Kind):
    """Options of ONNX Runtime's backend and of loading, of any type."""

    def run(self, rng: random.Random) -> None:
        names = ("provider", "num_threads", "device", "allow_cpu", "io_binding", "provider_options", "nothing")
        options = {rng.choice(names): strange(rng) for _ in range(rng.randint(1, 2))}
        more: dict[str, Any] = {}
        if rng.random() < 0.3:
            more[rng.choice(("max_concurrency", "verify", "backend"))] = strange(rng)
        taken = rng.random() < 0.9
        engine = zimage_rt.Engine.load(
            self.bundle, **{"verify": False, "backend_options": options if taken else strange(rng), **more}
        )
        check(engine.generate("a", **SMALL).images.shape == (1, 64, 64, 3), "another size")
