"""Values of wrong types and sizes, everywhere: each is a RequestError that names its field, and nothing else."""

from __future__ import annotations

import dataclasses
import warnings
from collections import UserList
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zimage_rt
from zimage_rt import limits
from zimage_rt.bundle.manifest import ShapeRange
from zimage_rt.errors import MAX_MESSAGE, BackendUnavailable, RequestError, ZImageError
from zimage_rt.explain import explain
from zimage_rt.request.codec import make_request
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import GenerateRequest, SecondPass

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 3}


class Failing(UserList):  # type: ignore[type-arg]
    """A list whose methods fail."""

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Endless(UserList):  # type: ignore[type-arg]
    """A list that reports a short length and never ends."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield 1


class FailingArray:
    """An object that numpy cannot convert."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("no array")


# Valid for no field but those of `TAKES`.
STRANGE: dict[str, Any] = {
    "text": "abc",
    "empty text": "",
    "nul": "a\0b",
    "half a character": "\ud800",
    "bytes": b"abc",
    "bool": True,
    "nan": float("nan"),
    "infinity": float("inf"),
    "negative": -1.5,
    "complex": 1 + 2j,
    "numpy complex": np.complex64(1 + 2j),
    "large integer": 10**400,
    "more digits than Python writes": 10**5000,
    "large float": 1e308,
    "0-d array": np.array(0.5),
    "array of objects": np.array([object()], dtype=object),
    "numpy nan": np.float32("nan"),
    "numpy text": np.array(["a", "b"]),
    "ragged": [[1.0, 2.0], [3.0]],
    "mixed": [1.0, "a", None],
    "list with nan": [1.0, float("nan")],
    "list of bools": [True],
    "dict": {"a": 1},
    "set": {1, 2},
    "object": object(),
    "type": int,
    "function": len,
    "long list": list(range(100_000)),
    "failing list": Failing([1]),
    "endless list": Endless([1]),
    "failing array": FailingArray(),
}
# What of STRANGE a field may take.
TEXT = {"text", "empty text"}
TAKES = {
    "prompt": {*TEXT, "numpy text"},
    "negative_prompt": TEXT,
    "seed": set(),
    "truncate_prompt": {"bool"},
    "literal_prompt": {"bool"},
    "cfg_truncation": {"large float"},
    "loras": {"dict"},  # names are looked up when it runs
}
FIELDS = [field.name for field in dataclasses.fields(GenerateRequest)]


def refused(run: Callable[[], object], *names: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zimage_rt.RequestWarning)
        with pytest.raises(RequestError) as caught:
            run()
    text = str(caught.value)
    assert text.startswith(names), text
    assert len(text) < 2000


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_of_a_request_takes_what_it_should_not(engine: zimage_rt.Engine, field: str) -> None:
    beside: dict[str, Any] = {"prompt": "a panda", **SMALL}
    if field == "denoise":
        beside["image_latents"] = np.zeros((1, 16, 8, 8), np.float32)
    if field == "mask":
        beside["image"] = np.zeros((64, 64, 3), np.uint8)
    for kind, value in STRANGE.items():
        request = GenerateRequest(**{**beside, field: value})
        if kind not in TAKES.get(field, set()):
            refused(lambda request=request: resolve(request, engine.manifest), field)
        elif kind != "empty text" or field != "prompt":
            resolve(request, engine.manifest)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SecondPass)])
def test_no_field_of_a_second_pass(engine: zimage_rt.Engine, field: str) -> None:
    for value in STRANGE.values():
        again = SecondPass(**{"scale": 1.0, field: value})
        request = GenerateRequest("a panda", second_pass=again, **SMALL)
        refused(lambda request=request: resolve(request, engine.manifest), f"second_pass.{field}")


@pytest.mark.parametrize(
    "value",
    [np.float32(0.5), np.float64(0.5), np.int64(1), np.uint8(1), 1, 0.5],
    ids=lambda value: type(value).__name__,
)
def test_numpys_scalars_are_numbers(engine: zimage_rt.Engine, value: Any) -> None:
    request = GenerateRequest("a", guidance_scale=value, seed=np.uint64(2**64 - 1), num_images=np.int8(1))
    resolved = resolve(request, engine.manifest)
    assert resolved.guidance_scale == float(value)
    assert resolved.seeds == (2**64 - 1,)
    seeds = resolve(GenerateRequest("a", num_images=2, seed=np.array([5, 6])), engine.manifest).seeds
    assert seeds == (5, 6)
    sigmas = resolve(GenerateRequest("a", sigmas=np.array([1.0, 0.5]), shift=1.0), engine.manifest).sigmas
    np.testing.assert_array_equal(sigmas, [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_inference_steps": limits.MAX_STEPS + 1}, "num_inference_steps: expected 1 to 1000"),
        ({"sigmas": np.linspace(1, 0.001, limits.MAX_STEPS + 1)}, "sigmas: expected at most 1000 entries, got 1001"),
        ({"sigmas": [1.0, 1e-60]}, "sigmas: expected numbers that fall"),  # 0 in float32
        ({"sigmas": [0.5, 0.5 - 1e-12]}, "sigmas: expected numbers that fall"),  # the same in float32
        ({"shift": 1e-300}, "shift: expected more than 0"),
        (
            {"prompt": "a" * (limits.MAX_PROMPT_CHARACTERS + 1)},
            "prompt: expected at most 512 tokens, or 100000 characters to be cut, got 100001",
        ),
        ({"prompt": "a" * 10**8, "truncate_prompt": True}, "prompt: expected at most 512 tokens, or 100000"),
        ({"prompt": ["a"] * 10**6}, "prompt: expected at most "),
        ({"prompt": "a", "num_images": 10**9}, "num_images: expected 1 to "),
        ({"seed": [1] * 10**6}, "seed: expected at most 1024 entries, got 1000000"),
        ({"height": 2**40}, "height: expected 1 to 65536"),
        ({"guidance_scale": 1001}, "guidance_scale: expected at most 1000"),
        ({"mask_feather": 1e9}, "mask_feather: expected at most 1000"),
    ],
)
def test_limits_hold_before_anything_is_made(engine: zimage_rt.Engine, fields: dict[str, Any], name: str) -> None:
    request = GenerateRequest(**{"prompt": "a panda", **fields})
    refused(lambda: resolve(request, engine.manifest), name)


def test_limits_hold_for_a_bundle_without_any(engine: zimage_rt.Engine) -> None:
    """Whatever a manifest allows, a request's batch and its pixels are bounded."""
    sides = ShapeRange(64, 256, 1 << 30, 16)
    shapes = dataclasses.replace(engine.manifest.shapes, batch=ShapeRange(1, 1, 1 << 30), height=sides, width=sides)
    manifest = dataclasses.replace(engine.manifest, shapes=shapes)
    refused(lambda: resolve(GenerateRequest("a", num_images=1025), manifest), "num_images: expected 1 to 1024")
    refused(lambda: resolve(GenerateRequest(["a"] * 33, num_images=32), manifest), "batch: expected at most 1024")
    refused(lambda: resolve(GenerateRequest("a", height=8208, width=8192), manifest), "height and width: expected at")
    assert resolve(GenerateRequest("a", height=8192, width=8192), manifest).height == 8192


def test_a_share_too_small_for_a_step_runs_one(engine: zimage_rt.Engine) -> None:
    latents = np.zeros((1, 16, 8, 8), np.float32)
    request = GenerateRequest("a", image_latents=latents, strength=1e-20, num_inference_steps=8)
    assert len(resolve(request, engine.manifest).sigmas) == 2


LATENTS = np.zeros((1, 16, 8, 8), np.float32)
PANDA = GenerateRequest("a panda", **SMALL)
# What of STRANGE an argument may take.
RIGHT: dict[str, Callable[[Any], bool]] = {
    "callback": callable,
    "on_stage": callable,
    "on_image": callable,
    "truncate": lambda value: value is True,
    "literal": lambda value: value is True,
    "strict": lambda value: value is True,
    "times": lambda value: value is True,
    "prompt": lambda value: isinstance(value, str) and value in ("abc", ""),
    "weight": lambda value: isinstance(value, float) and abs(value) < 10,
    "LoRA 'x'": lambda value: isinstance(value, float) and abs(value) < 10,
}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda e, v: e.run(v), ("request",)),
        (lambda e, v: e.run(PANDA, callback=v), ("callback",)),
        (lambda e, v: e.run(PANDA, on_stage=v), ("on_stage",)),
        (lambda e, v: e.encode_prompt(v), ("prompt",)),
        (lambda e, v: e.encode_prompt("a", truncate=v), ("truncate",)),
        (lambda e, v: e.encode_prompt("a", literal=v), ("literal",)),
        (lambda e, v: e.decode(v, "tiny"), ("latents",)),
        (lambda e, v: e.decode(LATENTS, v), ("vae",)),
        (lambda e, v: e.decode(LATENTS, "tiny", v), ("vae_tile",)),
        (lambda e, v: e.load_lora("x.safetensors", v), ("weight",)),
        (lambda e, v: e.load_lora("x.safetensors", 1.0, "x", strict=v), ("strict",)),
        (lambda e, v: e.set_loras(v), ("weights", "no LoRA", "LoRA")),
        (lambda e, v: e.set_loras({"x": v}), ("LoRA 'x'",)),
        (lambda e, v: zimage_rt.Session(v), ("engines",)),
        (lambda e, v: zimage_rt.Session({"draft": v}), ("engines",)),
        (
            lambda e, v: explain(e, "a", steps=v, **{**SMALL, "num_inference_steps": 1}),
            ("steps", "num_inference_steps"),
        ),
        (lambda e, v: explain(e, "a", guidance_scales=v), ("guidance_scale",)),
        (lambda e, v: explain(e, "a", cell=v), ("cell",)),
        (lambda e, v: explain(e, "a", times=v), ("times",)),
        (lambda e, v: explain(e, "a", on_image=v), ("on_image",)),
        (lambda e, v: explain(v, "a"), ("engine",)),
    ],
)
def test_no_call_takes_what_it_should_not(
    engine: zimage_rt.Engine, call: Callable[[Any, Any], object], names: tuple[str, ...]
) -> None:
    for value in STRANGE.values():
        if not RIGHT.get(names[0], lambda value: False)(value):
            refused(lambda value=value: call(engine, value), *names)


@pytest.mark.parametrize("kind", ["nul", "half a character", "bytes", "nan", "object", "dict", "failing list"])
def test_paths_and_names_are_checked(engine: zimage_rt.Engine, kind: str, tmp_path: Path) -> None:
    value = STRANGE[kind]
    refused(lambda: zimage_rt.Engine.load(value), "bundle")
    refused(lambda: engine.load_lora(value), "path")
    refused(lambda: explain(engine, "a", font=value), "font")
    result = engine.generate("a panda", **SMALL)
    refused(lambda: result.save(value), "output")
    refused(lambda: result.save(tmp_path, sidecar=value), "sidecar")
    if not isinstance(value, str):
        refused(lambda: engine.unload_lora(value), "name")
        refused(lambda: engine.load_lora("x", 1.0, value), "name")


@pytest.mark.parametrize("kind", STRANGE)
def test_options_of_the_engine_are_checked(bundle: Path, kind: str) -> None:
    value = STRANGE[kind]

    def load(**fields: Any) -> zimage_rt.Engine:
        return zimage_rt.Engine.load(bundle, **fields)

    with pytest.raises(BackendUnavailable, match="backend: expected one of"):
        load(backend=value)
    refused(lambda: load(backend_options=value), "backend_options", "backend 'onnxruntime'")
    refused(lambda: load(max_concurrency=value), "max_concurrency")
    if value is not True:
        refused(lambda: load(verify=value), "verify")
        refused(lambda: load(backend_options={"io_binding": value}), "io_binding")
    if not callable(value):
        refused(lambda: load(progress=value), "progress")
    for name in ("num_threads", "provider", "provider_options", "device", "allow_cpu"):
        if not (name == "allow_cpu" and kind == "numpy text"):
            refused(lambda name=name: load(backend_options={name: value}), name)
    refused(lambda: load(backend_options={"provider_options": {"a": value}}), "provider_options")


def test_a_session_names_its_fields(engine: zimage_rt.Engine) -> None:
    work = zimage_rt.Session(engine)
    refused(lambda: work.generate(["a", "b"]), "prompt")  # type: ignore[arg-type]
    refused(lambda: work.generate("a", num_images=np.array([1, 2])), "num_images")
    refused(lambda: work.generate("a", num_images=2), "num_images: expected 1, as a session")
    work.generate("a panda", **SMALL)
    for value in STRANGE.values():
        refused(lambda value=value: work.refine(scale=value), "scale", "height")
        refused(lambda value=value: work.refine(value), "strength")
        refused(lambda value=value: work.edit("a", strength=value), "strength")
        refused(lambda value=value: work.edit("a", mask=value, strength=1.0), "mask")
    assert len(work.turns) == 1


def test_images_of_a_caller_that_cannot_be_read(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as cut:
        for field in ("image", "mask"):
            fields = {"image": np.zeros((64, 64, 3), np.uint8), field: cut}
            refused(lambda fields=fields: engine.generate("a", **SMALL, **fields), field)


def test_what_does_not_fit_into_memory_is_typed(engine: zimage_rt.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_rt import generation as module

    def no_room(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 4.00 TiB")

    monkeypatch.setattr(module, "step_noise", no_room)
    with pytest.raises(zimage_rt.OutOfMemory, match=r"Unable to allocate 4.00 TiB; ask for a smaller") as caught:
        engine.generate("a panda", **SMALL)
    assert isinstance(caught.value, ZImageError)


def test_a_message_is_no_longer_than_a_screen(bundle: Path) -> None:
    long = "x" * 200_000
    for call in (
        lambda: zimage_rt.Engine.load(bundle, backend=long),
        lambda: zimage_rt.Engine.load(bundle, backend_options={long: 1}),
        lambda: make_request(prompt="a", **{long: 1}),
    ):
        with pytest.raises(ZImageError) as caught:
            call()
        assert 20 < len(str(caught.value)) <= MAX_MESSAGE + 3
