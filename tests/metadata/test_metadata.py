"""Records of images: written whole, read back, repeated to the byte; anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import random_lora_of
from PIL import Image
from safetensors.numpy import load_file, save_file
from shared import BUNDLE, copy_bundle

import zimage_rt
from zimage_rt.atomic_write import atomic_write
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.bundle.verify import hash_file
from zimage_rt.errors import LoraWarning, MetadataError, RequestError
from zimage_rt.metadata.image_file import read_record
from zimage_rt.request.types import SecondPass
from zimage_rt.sampling.samplers import FORMER_SAMPLERS, FORMER_SCHEDULES

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}


def zimage(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zimage_rt.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def saved_image(engine: zimage_rt.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "panda.png"
    return engine.generate("一只熊猫", seed=7, **SMALL).save(path)[0]


def test_an_image_and_its_sidecar_hold_the_whole_request(engine: zimage_rt.Engine, saved_image: Path) -> None:
    record = read_record(saved_image)
    assert record == read_record(saved_image.with_suffix(".json"))
    fields = {field.name for field in dataclasses.fields(zimage_rt.GenerateRequest)}
    assert set(record.request) == fields - {"loras"}  # the record has their files
    assert (record.request["prompt"], record.request["seed"], record.request["num_images"]) == ("一只熊猫", 7, 1)
    assert record.request["guidance_scale"] == engine.manifest.pipeline.guidance_scale  # a default, filled in
    assert record.request["vae"] == "tiny"
    assert (record.bundle_id, record.bundle_name, record.precision) == (engine.bundle_id, "zimage-nano", "fp32")
    assert (record.backend, record.version) == ("onnxruntime", zimage_rt.__version__)
    assert set(record.timings) == {"encode_prompt", "denoise", "decode", "total"}
    assert record.batch is None
    assert record.warnings == []


def test_default_steps_are_recorded(engine: zimage_rt.Engine) -> None:
    plain, custom = (
        engine.generate("a cat", height=64, width=64, **more).records[0].request
        for more in ({}, {"sigmas": np.array([1.0, 0.5, 0.2])})
    )
    assert plain["num_inference_steps"] == engine.manifest.pipeline.num_inference_steps
    assert (custom["num_inference_steps"], custom["sigmas"]) == (3, [1.0, 0.5, 0.2])


def test_other_tools_read_parameters(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    result = engine.generate("a cat", "text", seed=3, guidance_scale=2.5, sampler="dpmpp_2m", **SMALL)
    text = Image.open(result.save(tmp_path / "cat.png")[0]).info["parameters"].splitlines()
    assert text[:2] == ["a cat", "Negative prompt: text"]
    # Their scale counts from 1: negative + 3.5 (positive - negative) = positive + 2.5 (positive - negative).
    assert "Steps: 2, Sampler: DPM++ 2M, Schedule type: Simple, CFG scale: 3.5, Seed: 3, Size: 64x64" in text[2]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 2.0, "negative_prompt": "text", "cfg_truncation": 0.7, "sampler": "heun"},
        {"sigmas": (1.0, 0.6, 0.25), "num_inference_steps": None},
        {"second_pass": SecondPass(scale=1.5, strength=0.5, method="latent"), "vae": "full"},
        {"sampler": "dpmpp_2m_sde", "schedule": "karras", "shift": 2.0, "num_inference_steps": 4},
        {"second_pass": SecondPass(scale=1.0, denoise=0.5, method="latent"), "sampler": "er_sde"},
        {"height": 70, "fit_size": "nearest", "prompt": "", "guidance_scale": 1.0},
        {"prompt": "panda " * 600, "truncate_prompt": True},
    ],
)
def test_a_record_draws_the_same_bytes(engine: zimage_rt.Engine, tmp_path: Path, fields: dict[str, Any]) -> None:
    first = engine.generate(**{"prompt": "a panda", "seed": 2**63 + 5, **SMALL, **fields})
    request = read_record(first.save(tmp_path / "a.png")[0]).to_request()
    assert engine.run(request).images.tobytes() == first.images.tobytes()


def test_an_image_of_a_batch_is_drawn_with_its_batch(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    result = engine.generate(["a panda", "一只企鹅"], seed=5, num_images=2, **SMALL)
    record = read_record(result.save(tmp_path)[3])
    assert (record.request["prompt"], record.request["seed"]) == ("一只企鹅", 8)
    assert record.batch is not None
    again = engine.run(record.to_request())[record.batch["index"]]
    assert again.images.tobytes() == result.images[3].tobytes()
    assert again.seeds == (8,)
    alone = record.to_request(seed=8)
    assert (alone.prompt, alone.num_images) == ("一只企鹅", 1)


def test_a_batch_of_one_stream_is_drawn_whole(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    fields: dict[str, Any] = {**SMALL, "batch_noise": "comfyui", "sampler": "euler_ancestral"}
    result = engine.generate("a panda", seed=5, num_images=3, **fields)
    record = read_record(result.save(tmp_path)[2])
    for request in (record.to_request(), record.to_request(vae="tiny")):
        assert engine.run(request).images[2].tobytes() == result.images[2].tobytes()


@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize(("sampler", "schedule"), [("dpmpp_2m", "karras"), ("euler", "simple"), ("heun", "normal")])
def test_records_of_0_1_mean_diffusers_ways(
    engine: zimage_rt.Engine, tmp_path: Path, steps: int, sampler: str, schedule: str
) -> None:
    """0.1 called diffusers' ways by ComfyUI's names; its records have neither `shift` nor `warnings`."""
    fields: dict[str, Any] = {
        **SMALL,
        "num_inference_steps": steps,
        "sampler": FORMER_SAMPLERS.get(sampler, sampler),
        "schedule": FORMER_SCHEDULES.get(schedule, schedule),
    }
    drawn = engine.generate("a panda", seed=5, **fields)
    data = json.loads(drawn.save(tmp_path / "now.png")[0].with_suffix(".json").read_text())
    for name in ("shift", "denoise", "batch_noise", "fit_size", "truncate_prompt"):
        del data["request"][name]
    data["request"] |= {"sampler": sampler, "schedule": schedule}
    del data["warnings"]
    former = tmp_path / "former.json"
    former.write_text(json.dumps({**data, "schema_version": 1}))
    request = read_record(former).to_request()
    assert (request.sampler, request.schedule) == (fields["sampler"], fields["schedule"])
    assert engine.run(request).images.tobytes() == drawn.images.tobytes()


def test_inputs_are_recorded_by_path_and_hash(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    options = {"seed": 1, "strength": 0.5, "num_inference_steps": 4}
    result = engine.generate("a panda", image=tmp_path / "red.png", **options)
    record = read_record(result.save(tmp_path / "out.png")[0])
    assert record.request["image"]["path"] == str(tmp_path / "red.png")
    assert len(record.request["image"]["sha256"]) == 64
    assert engine.run(record.to_request()).images.tobytes() == result.images.tobytes()
    # Moved together with the image, it is found beside it.
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "red.png").rename(moved / "red.png")
    assert record.to_request(moved).image == moved / "red.png"
    with pytest.raises(MetadataError, match=r"image: expected .*red.png, which the image was made from, but it is"):
        record.to_request()
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "red.png")
    with pytest.raises(MetadataError, match="the file was changed since"):
        record.to_request()
    assert record.to_request(image="other.png").image == "other.png"


def test_inputs_from_memory_are_recorded_by_hash(engine: zimage_rt.Engine) -> None:
    image = Image.new("RGB", (64, 64), "red")
    both = [
        engine.generate("a panda", image=value, num_inference_steps=2).records[0]
        for value in (image, np.asarray(image))
    ]
    assert both[0].request["image"] == both[1].request["image"]
    assert "path" not in both[0].request["image"]
    with pytest.raises(MetadataError, match="image: came without a path"):
        both[0].to_request()


def test_files_replace_nothing_by_accident(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    result = engine.generate("a cat", seed=3, num_images=2, **SMALL)
    assert [path.name for path in result.save(tmp_path)] == ["000-3.png", "001-4.png"]
    assert [path.name for path in result.save(tmp_path)] == ["002-3.png", "003-4.png"]
    named = result.save(tmp_path / "deeper" / "cat.png", sidecar=False)
    assert [path.name for path in named] == ["cat-000.png", "cat-001.png"]
    assert sorted(path.name for path in named[0].parent.iterdir()) == ["cat-000.png", "cat-001.png"]
    with pytest.raises(RequestError, match=r"ends in \.png, .*, or a folder, got cat\.bmp"):
        result.save(tmp_path / "cat.bmp")


def test_several_who_save_at_once_replace_nothing(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    result = engine.generate("a cat", seed=3, **SMALL)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: result.save(tmp_path)[0], range(16)))
    assert sorted(path.name for path in paths) == [f"{i:03d}-3.png" for i in range(16)]
    assert all(read_record(path).pixels_sha256 for path in paths)
    assert len(list(tmp_path.iterdir())) == 32  # with the sidecars, and nothing else


def test_folders_without_links_replace_nothing(
    engine: zimage_rt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT says

    monkeypatch.setattr(os, "link", unsupported)
    result = engine.generate("a cat", seed=3, **SMALL)
    assert [result.save(tmp_path)[0].name for _ in range(2)] == ["000-3.png", "001-3.png"]
    atomic_write(tmp_path / "a", b"1", replace=False)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a", b"2", replace=False)
    assert (tmp_path / "a").read_bytes() == b"1"
    assert not list(tmp_path.glob(".*"))


def test_loras_are_recorded_and_put_on_again(engine: zimage_rt.Engine, bundle: Path, tmp_path: Path) -> None:
    files = [random_lora_of(engine.manifest, tmp_path / f"style{i}.safetensors", seed=i) for i in (1, 2, 3)]
    try:
        for file, weight in zip(files, (0.5, 1.0, 0.0), strict=True):
            engine.load_lora(file, weight)
        result = engine.generate("a cat", seed=3, **SMALL)
    finally:
        for name in list(engine.loras):
            engine.unload_lora(name)
    path = result.save(tmp_path / "cat.png")[0]
    record = read_record(path)
    assert record.find_loras() == [("style1", 0.5, files[0]), ("style2", 1.0, files[1])]
    assert Image.open(path).info["parameters"].startswith("a cat <lora:style1:0.5> <lora:style2:1>\n")
    run = zimage("generate", bundle, "--like", path, "-o", tmp_path / "again.png", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["same"] is True
    files[1].write_bytes(files[0].read_bytes())  # in place: a mapped file would show the new bytes
    with pytest.raises(MetadataError, match=r"LoRA 'style2': expected .* the file was changed since"):
        record.find_loras()


def test_a_record_has_pefts_settings_and_skipped_layers(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    file = random_lora_of(engine.manifest, folder / "adapter_model.safetensors", seed=1)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps({"r": 5, "lora_alpha": 5}))
    half = tmp_path / "half.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "transformer.layers.99.attention.to_q.lora_A.weight": np.ones((5, 384), np.float32)}, half)
    try:
        engine.load_lora(folder)
        with pytest.warns(LoraWarning, match="left out"):
            engine.load_lora(half, 0.5, strict=False)
        path = engine.generate("a cat", seed=3, **SMALL).save(tmp_path / "cat.png")[0]
    finally:
        for name in list(engine.loras):
            engine.unload_lora(name)
    record = read_record(path)
    assert [lora["strict"] for lora in record.loras] == [True, False]
    assert record.loras[0]["settings_sha256"] == hash_file(settings).sha256
    run = zimage("generate", BUNDLE, "--like", path, "-o", tmp_path / "again.png", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["same"] is True
    settings.write_text(json.dumps({"r": 5, "lora_alpha": 10}))  # twice the scale, by the same weights
    with pytest.raises(MetadataError, match=r"adapter_config.json was changed since"):
        record.find_loras()


def test_a_lora_is_recorded_as_it_was_loaded(engine: zimage_rt.Engine, tmp_path: Path) -> None:
    """Not as its file is when the image is drawn or saved."""
    file = random_lora_of(engine.manifest, tmp_path / "style.safetensors", seed=1)
    other = random_lora_of(engine.manifest, tmp_path / "other.safetensors", seed=2)
    loaded = hash_file(file).sha256
    try:
        engine.load_lora(file, 0.5)
        file.write_bytes(other.read_bytes())
        result = engine.generate("a cat", seed=3, **SMALL)
        file.unlink()
        records = [*result.records, read_record(result.save(tmp_path / "cat.png")[0])]
    finally:
        for name in list(engine.loras):
            engine.unload_lora(name)
    for record in records:
        assert [dict(lora) for lora in record.loras] == [
            {
                "name": "style",
                "weight": 0.5,
                "path": str(file),
                "sha256": loaded,
                "settings_sha256": "",
                "strict": True,
            }
        ]
    assert engine.active_loras == []


def test_a_bundle_is_recorded_as_it_was_loaded(bundle: Path, tmp_path: Path) -> None:
    copied = copy_bundle(bundle, tmp_path / "copy")
    engine = zimage_rt.Engine.load(copied)
    expected = read_manifest(bundle).bundle_id
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"name": "zimage-other"}))
    assert read_manifest(copied).bundle_id != expected
    record = engine.generate("a cat", seed=3, **SMALL).records[0]
    assert (record.bundle_id, record.bundle_name) == (expected, "zimage-nano")


def test_no_test_links_to_the_bundle(bundle: Path) -> None:
    """onnx refuses external data that has a second name, and pytest keeps its folders for a while."""
    assert {path.name: path.stat().st_nlink for path in bundle.iterdir() if path.stat().st_nlink != 1} == {}


def test_a_record_of_the_first_schema_is_read(saved_image: Path, tmp_path: Path) -> None:
    """It had no `warnings`."""
    data = json.loads(saved_image.with_suffix(".json").read_text(encoding="utf-8"))
    assert data.pop("warnings") == []
    old = tmp_path / "old.json"
    old.write_text(json.dumps(data | {"schema_version": 1, "version": "0.1.0"}), encoding="utf-8")
    record = read_record(old)
    assert record.warnings == []
    assert record.to_request() == read_record(saved_image).to_request()


def test_a_failed_write_leaves_what_was_there(
    engine: zimage_rt.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cat.png"
    result = engine.generate("a cat", seed=3, **SMALL)
    result.save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            result.save(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cat.json", "cat.png"]


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def without_text(path: Path) -> None:
    Image.fromarray(pixels(path)).save(path)


def text_changed(**changes: Any) -> Callable[[Path], None]:
    """The sidecar alone, with some of its keys changed."""

    def change(path: Path) -> None:
        without_text(path)
        sidecar = path.with_suffix(".json")
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def request_changed(**changes: Any) -> Callable[[Path], None]:
    """The sidecar alone, with some of its request's fields changed."""

    def change(path: Path) -> None:
        without_text(path)
        sidecar = path.with_suffix(".json")
        data = json.loads(sidecar.read_text(encoding="utf-8"))
        sidecar.write_text(json.dumps({**data, "request": data["request"] | changes}), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (without_text(path), path.with_suffix(".json").unlink()), "without its text `zimage_rt`"),
        (damaged(lambda content: content[: len(content) // 2]), "cut off or damaged"),
        (damaged(lambda content: content[:-9]), "cut off or damaged"),
        (damaged(lambda content: content[:30]), "cut off or damaged"),
        (damaged(lambda content: content.replace(b"panda", b"pandA").replace(b"seed", b"sEed")), "cut off or damaged"),
        (damaged(lambda content: b""), "expected a PNG, got something else"),
        (lambda path: Image.fromarray(pixels(path)).save(path, "JPEG"), "expected a PNG, got something else"),
        (lambda path: path.unlink(), "there is no such file"),
        (text_changed(schema_version=3), "expected a record of schema 2, got 3; upgrade zimage_rt"),
        (text_changed(warnings=[1]), "record.warnings[0]: expected a text, got int 1; it was damaged"),
        (text_changed(strange=1), "record: unknown key 'strange'"),
        (text_changed(timings={"total": "long"}), "record.timings.total: expected a number, got text 'long'"),
        (text_changed(backend=None), "record.backend: expected a text, got nothing"),
        (
            text_changed(request={"prompt": "a", "teleport": 1}, version="9.0"),
            "'teleport', which this version does not",
        ),
        (text_changed(request=[]), "record.request: expected an object, got a list"),
        (request_changed(seed="7"), "request.seed: expected a whole number or a list or nothing, got text '7'"),
        (request_changed(prompt=["a", 1]), "request.prompt[1]: expected a text, got int 1"),
        (request_changed(second_pass={"scale": [2]}), "request.second_pass.scale: expected a number, got a list"),
        (request_changed(image="/etc/passwd"), "request.image: expected nothing, or an input's sha256"),
        (request_changed(latents=[1.0]), "request.latents: expected nothing, or an input's sha256"),
        (request_changed(mask={"sha256": 1}), "request.mask.sha256: expected a text, got int 1"),
        (request_changed(sigmas=[1, "0.5"]), "request.sigmas[1]: expected a number, got text '0.5'"),
        (text_changed(loras=[{"name": "a"}]), "loras[0]: missing key 'weight'; its record was damaged"),
        (
            text_changed(loras=[{"name": "a", "weight": "1", "path": "a", "sha256": ""}]),
            "loras[0].weight: expected a number, got text '1'",
        ),
        (
            text_changed(batch={"index": 3, "prompts": [], "negative_prompts": [], "seeds": []}),
            "batch: it does not say which",
        ),
        (lambda path: (without_text(path), path.with_suffix(".json").write_text("{")), "its record cannot be read"),
        (lambda path: (without_text(path), path.with_suffix(".json").write_text("[" * 100_000)), "nested deeper than"),
        (lambda path: (without_text(path), path.with_suffix(".json").write_text("[1]")), "got other JSON"),
    ],
)
def test_what_holds_no_record_is_refused(
    saved_image: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    for suffix in (".png", ".json"):
        shutil.copy(saved_image.with_suffix(suffix), tmp_path)
    path = tmp_path / saved_image.name
    spoil(path)
    with pytest.raises(MetadataError) as caught:
        read_record(path)
    assert message in str(caught.value)


def test_a_stripped_image_is_read_from_its_sidecar(saved_image: Path, tmp_path: Path) -> None:
    for suffix in (".png", ".json"):
        shutil.copy(saved_image.with_suffix(suffix), tmp_path)
    without_text(tmp_path / saved_image.name)
    assert read_record(tmp_path / saved_image.name) == read_record(saved_image)


def test_like_repeats_to_the_byte_and_options_come_first(bundle: Path, saved_image: Path, tmp_path: Path) -> None:
    run = zimage("generate", bundle, "--like", saved_image, "-o", tmp_path / "again.png", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["same"] is True
    assert (pixels(tmp_path / "again.png") == pixels(saved_image)).all()
    run = zimage("generate", bundle, "--like", saved_image, "-o", tmp_path / "other.png", "--seed", 8, "--steps", 1)
    assert run.returncode == 0, run.stderr
    request = read_record(tmp_path / "other.png").request
    assert (request["prompt"], request["seed"], request["num_inference_steps"]) == ("一只熊猫", 8, 1)
    assert (request["height"], request["width"]) == (64, 64)


def test_like_with_another_bundle_warns_with_both_ids(bundle: Path, saved_image: Path, tmp_path: Path) -> None:
    other = copy_bundle(bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"name": "zimage-other"}))
    run = zimage("generate", other, "--like", saved_image, "-o", tmp_path / "again.png")
    assert run.returncode == 0, run.stderr
    ids = [read_record(path).bundle_id for path in (saved_image, tmp_path / "again.png")]
    assert ids[0] != ids[1]
    warning = next(line for line in run.stderr.splitlines() if line.startswith("warning: "))
    assert ids[0] in warning
    assert ids[1] in warning


def test_like_refuses_what_holds_nothing(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "bare.png")
    run = zimage("generate", bundle, "--like", tmp_path / "bare.png")
    assert run.returncode == 1
    assert run.stderr.startswith("MetadataError")
    run = zimage("generate", bundle)
    assert run.returncode == 1
    assert "give it with -p" in run.stderr
