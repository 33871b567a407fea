"""The examples run on the demo's bundle and do what their docstrings say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

import zimage_rt

CYANOTYPE = ROOT / "checkpoints" / "zimage-nano-cyanotype" / "cyanotype.safetensors"


def run(example: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an example as a user would; it must exit with 0."""
    command = [sys.executable, ROOT / "examples" / example, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("service_example", ROOT / "examples" / "one_process_service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_service_finishes_cancels_and_times_out(bundle: Path, tmp_path: Path) -> None:
    output = run("one_process_service.py", bundle, "--out", tmp_path).stdout
    assert [f"fox: {i}/8" in output for i in range(1, 9)] == [True] * 8
    assert "cancelled: Cancelled: the job was cancelled" in output
    assert "late: TimeoutError: the job's deadline passed" in output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["fox.png", "panda.png"]


def test_a_job_of_the_service_returns_the_engines_image(example: ModuleType, engine: zimage_rt.Engine) -> None:
    fields = {"seed": 6, "num_inference_steps": 2}
    with example.Service(engine) as service:
        job = service.submit("a panda", **fields)
        wrong = service.submit("a panda", height=17)
        after = service.submit("a panda", **fields)
        with pytest.raises(zimage_rt.RequestError, match="height"):
            wrong.result()
        drawn = [job.result().images, after.result().images]
    expected = engine.generate("a panda", **fields).images
    assert all(np.array_equal(images, expected) for images in drawn), "a failed job must not stop or change the others"


def test_a_full_queue_refuses_and_a_waiting_job_can_be_cancelled(example: ModuleType, engine: zimage_rt.Engine) -> None:
    service = example.Service(engine, max_waiting=1)
    waiting = service.submit("a panda")  # the worker has not been started
    with pytest.raises(example.Busy, match="1 jobs are waiting"):
        service.submit("a fox")
    waiting.cancel()
    with service, pytest.raises(zimage_rt.Cancelled):
        waiting.result()


def test_the_batch_draws_every_row_once(bundle: Path, tmp_path: Path) -> None:
    arguments = ("batch_from_table.py", bundle, ROOT / "examples" / "animals.csv", "--out", tmp_path)
    first = run(*arguments)
    assert "0 of 3 rows are done" in first.stdout and "a penguin, green background" in first.stdout
    images = sorted(tmp_path.glob("*.png"))
    records = [zimage_rt.read_record(path) for path in images]
    assert [record.request["seed"] for record in records] == [3, 4, 5]
    written = [path.stat().st_mtime_ns for path in images]
    assert "3 of 3 rows are done" in run(*arguments).stdout
    assert [path.stat().st_mtime_ns for path in images] == written, "a second run draws nothing anew"


def test_the_lora_changes_images_and_leaves_no_trace(bundle: Path, tmp_path: Path) -> None:
    run("lora_swap.py", bundle, CYANOTYPE, "--out", tmp_path)
    plain, half, full, off = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("plain", "half", "full", "off"))
    assert np.array_equal(off, plain)
    assert 0 < np.abs(half - plain).mean() < np.abs(full - plain).mean()
    assert [lora["weight"] for lora in zimage_rt.read_record(tmp_path / "half.png").loras] == [0.5]
