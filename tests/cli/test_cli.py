"""The zimage command, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from lora_files import random_lora_of
from PIL import Image

from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.metadata.image_file import read_record


def zimage(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zimage_rt.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_generate_writes_images_and_json_lines(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    run = zimage("generate", bundle, "-p", "a panda", "-p", "一只猫", "-o", out, "--seed", 4, "--steps", 2, "--json")
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert [record["seed"] for record in records] == [4, 5]
    assert records[1]["prompt"] == "一只猫"
    for record in records:
        assert Image.open(record["file"]).size == (256, 256)
    one = tmp_path / "one.png"
    assert zimage("generate", bundle, "-p", "a panda", "-o", one, "--steps", 1).returncode == 0
    assert one.is_file()


def test_errors_are_one_line(bundle: Path, tmp_path: Path) -> None:
    run = zimage("generate", bundle, "-p", "a panda", "--height", 100)
    assert run.returncode == 1
    assert "RequestError: height: expected" in run.stderr.replace("\n", " ")
    assert "Traceback" not in run.stderr
    run = zimage("inspect", tmp_path)
    assert run.returncode == 1
    assert "ManifestError" in run.stderr


def test_backend_options_are_names_and_values(bundle: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.png"
    run = zimage(
        "generate", bundle, "-p", "a cat", "-o", one, "--steps", 1, "-O", "provider=cpu", "-O", "num_threads=1"
    )
    assert run.returncode == 0, run.stderr
    assert one.is_file()
    for option, message in (("provider", "expected name=value"), ("provider=teapot", "provider: expected one of cpu")):
        run = zimage("generate", bundle, "-p", "a cat", "-O", option)
        assert run.returncode == 1
        assert message in run.stderr.replace("\n", " ")


def test_every_field_of_a_request_has_an_option(bundle: Path, tmp_path: Path) -> None:
    """But those that hold arrays: what the command records is what was asked for."""
    path = tmp_path / "one.png"
    guidance = ("--guidance-scale", 2, "--cfg-truncation", 0.8, "--cfg-normalization", 1, "--dynamic-cfg", 0.5)
    again = ("--second-pass", "scale=2, strength=0.5,method=latent", "--vae-tile", 128, "--sigmas", "1, 0.5")
    run = zimage("generate", bundle, "-p", "a cat", "-o", path, "--height", 64, "--width", 64, *guidance, *again)
    assert run.returncode == 0, run.stderr
    assert Image.open(path).size == (128, 128)
    asked = json.loads(path.with_suffix(".json").read_text("utf-8"))["request"]
    assert [asked[name] for name in ("cfg_truncation", "cfg_normalization", "dynamic_cfg", "vae_tile", "sigmas")] == [
        0.8,
        1.0,
        0.5,
        128,
        [1.0, 0.5],
    ]
    assert asked["second_pass"] == {
        "scale": 2.0,
        "strength": 0.5,
        "method": "latent",
        "num_inference_steps": None,
        "denoise": None,
    }
    for option, message in (
        (("--second-pass", "size=2"), "expected name=value of scale, strength, method"),
        (("--second-pass", "scale=x"), "second_pass.scale: expected a number, got 'x'"),
        (("--sigmas", "1,x"), "sigmas: expected numbers, got '1,x'"),
    ):
        run = zimage("generate", bundle, "-p", "a cat", *option)
        assert run.returncode != 0
        assert message in " ".join(run.stderr.replace("│", " ").split())


def test_loras_are_put_on_and_repeated(bundle: Path, tmp_path: Path) -> None:
    lora = random_lora_of(read_manifest(bundle), tmp_path / "style.safetensors", seed=1, modules=("transformer",))
    settings = ("-p", "a panda", "--seed", 4, "--steps", 2, "--height", 128, "--width", 128)
    drawn = {}
    for name, options in {"plain": (), "whole": ("--lora", lora), "half": ("--lora", f"{lora}=0.5")}.items():
        run = zimage("generate", bundle, *settings, "-o", tmp_path / f"{name}.png", *options)
        assert run.returncode == 0, run.stderr
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
    assert len(set(drawn.values())) == 3
    run = zimage("generate", bundle, "--like", tmp_path / "half.png", "-o", tmp_path / "again.png")
    assert run.returncode == 0, run.stderr
    assert "the same image to the byte" in run.stderr
    run = zimage("generate", bundle, *settings, "--lora", tmp_path / "none.safetensors=0.5")
    assert run.returncode == 1
    assert "none.safetensors" in run.stderr.replace("\n", "")


def test_inspect_says_what_is_damaged(bundle: Path, tmp_path: Path) -> None:
    run = zimage("inspect", bundle, "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["ok"] is True
    assert "transformer" in report["modules"]
    assert zimage("inspect", bundle).returncode == 0
    copied = shutil.copytree(bundle, tmp_path / "copy")
    with (copied / "tiny_vae_decoder.safetensors").open("ab") as file:
        file.write(b"x")
    run = zimage("inspect", copied, "--json")
    assert run.returncode == 1
    assert "expected" in json.loads(run.stdout)["file_states"]["tiny_vae_decoder.safetensors"]


def test_loras_of_one_file_name_are_used_together(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    files = [tmp_path / folder / "pytorch_lora_weights.safetensors" for folder in ("one", "two", "three")]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        random_lora_of(manifest, file, seed=seed)
    arguments = [argument for file in files for argument in ("--lora", file)]
    run = zimage(
        "generate", bundle, "-p", "a", "-o", tmp_path / "a.png", "--steps", 1, "--width", 64, "--height", 64, *arguments
    )
    assert run.returncode == 0, run.stderr
    names = [lora["name"] for lora in read_record(tmp_path / "a.png").loras]
    assert names == ["pytorch_lora_weights", "pytorch_lora_weights-2", "pytorch_lora_weights-3"]
