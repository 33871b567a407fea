"""`zimage-export`: what it refuses, and what it leaves behind when it is stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from export_checkpoints import changed_transformer, copy_with, recipe  # noqa: E402
from zimage_rt.export.bundle import export  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.checkpoint.safetensors_file import tensor_names  # noqa: E402
from zimage_rt.export.errors import CheckpointError, DiskFullError, ExportError, ParityError, RecipeError, TensorError  # noqa: E402
from zimage_rt.export.recipe import read_recipe  # noqa: E402

from zimage_rt.bundle.manifest import read_manifest  # noqa: E402

# --- checkpoints and modules ------------------------------------------------------------------------------------------


def test_no_such_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_another_pipeline_is_named(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        open_checkpoint(tmp_path)


def test_damaged_file(small_checkpoint: Path, tmp_path: Path):
    broken = tmp_path / "transformer"
    broken.mkdir()
    (broken / "config.json").write_text((small_checkpoint / "transformer" / "config.json").read_text())
    data = (small_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(data[: len(data) // 2])
    folder = copy_with(small_checkpoint, tmp_path / "checkpoint", transformer=broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", "a web page.*: fetch it again"),
        (b"\x80\2}q\0." + bytes(64), "a pickle.*: convert it to safetensors"),
        (b"PK\3\4" + bytes(64), "a pickle or an archive.*: convert it to safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*: fetch it again"),
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file.*: GGUF is only read by zimage-export, as a transformer"),
    ],
)
def test_a_file_that_is_not_safetensors_is_called_what_it_is(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors cannot be read: it seems to be {message}"):
        tensor_names(path)


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
def test_missing_and_misshapen_tensors_are_named(small_checkpoint: Path, tmp_path: Path, change, message):
    folder = changed_transformer(small_checkpoint, tmp_path / "bad", change)
    out = tmp_path / "out"
    with pytest.raises(TensorError, match=message):
        export(recipe(folder, out, vae=(), parity=False))
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_a_wrong_module_stops_the_export_with_numbers(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("zimage_rt.export.modeling.text_encoder.swiglu", lambda g, u, p: g * u)
    monkeypatch.setattr(
        "zimage_rt.export.graph.cache.cached", lambda key, trace: trace()
    )  # nothing right, nothing kept
    with pytest.raises(ParityError, match=r"text_encoder at .*relative error .*tolerated"):
        export(recipe(small_checkpoint, tmp_path / "out", vae=()))
    assert list(tmp_path.iterdir()) == []


def test_full_disk(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space left"):
        export(recipe(small_checkpoint, tmp_path / "out", vae=(), parity=False))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_left_alone(small_checkpoint: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(ExportError, match="not a bundle"):
        export(recipe(small_checkpoint, tmp_path / "photos"))


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpont = 'x'", "unknown key 'checkpont'"),
        ("name = 'x'", "`checkpoint` is missing"),
        ("checkpoint = 'x'\nprecision = 'fp4'", "expected one of fp32, fp16, bf16"),
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
    for path in Path(__file__).parents[2].glob("engines/*.toml"):
        read_recipe(path)


# --- the command, killed ---------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "zimage_rt.export.cli", *map(str, arguments)]


def test_killed_export_leaves_the_old_bundle(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    out = shutil.copytree(small_bundle, tmp_path / "bundle")
    before = read_manifest(out).bundle_id
    arguments = command("--checkpoint", small_checkpoint, "--out", out, "--vae", "tiny", "--skip-parity")
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
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    assert summary["modules"].keys() == read_manifest(out).modules.keys()
    assert summary["bundle_id"] == read_manifest(out).bundle_id != before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_killed_first_export_leaves_no_bundle(small_checkpoint: Path, tmp_path: Path):
    """Killed while it measures a module that is written already: nothing has the bundle's name."""
    out = tmp_path / "bundle"
    process = subprocess.Popen(command("--checkpoint", small_checkpoint, "--out", out), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.new-*/text_encoder.onnx")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not out.exists()


def test_a_bundle_caught_between_two_renames_comes_back(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    """Killed between moving the old bundle aside and the new one in, even a failing export puts the old one back."""
    shutil.copytree(small_bundle, tmp_path / ".bundle.old-1")
    with pytest.raises(TensorError):
        spoilt = changed_transformer(small_checkpoint, tmp_path / "spoilt", lambda t: t.pop("x_pad_token"))
        export(recipe(spoilt, tmp_path / "bundle", vae=(), parity=False))
    assert read_manifest(tmp_path / "bundle").bundle_id == read_manifest(small_bundle).bundle_id


def test_progress_and_summary_are_on_stderr(small_checkpoint: Path, tmp_path: Path):
    arguments = command("--checkpoint", small_checkpoint, "--out", tmp_path / "b", "--vae", "tiny", "--skip-parity")
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "transformer: trace" in done.stderr
    assert read_manifest(tmp_path / "b").bundle_id in done.stderr
    assert done.stdout == ""


def test_exit_codes_and_json_errors(tmp_path: Path):
    done = subprocess.run(
        command("--checkpoint", tmp_path / "no", "--out", tmp_path / "out", "--json"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "CheckpointError"
    (tmp_path / "r.toml").write_text("checkpoint = 'x'\nprecison = 'fp16'\n")
    for arguments in ([tmp_path / "r.toml"], [], ["--checkpoint", tmp_path], ["--precision", "fp8"]):
        done = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert json.loads(done.stdout)["error"] == "RecipeError"
    done = subprocess.run(command("--presision", "fp16"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such option" in done.stderr
