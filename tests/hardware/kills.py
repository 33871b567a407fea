"""Kills batches and exports at random instants, and checks the files that are left.

    python tests/hardware/kills.py engines/nano --times 100

After each `kill -9` of a batch, every image under its final name must be whole and have its record, and the same
command must end with every row drawn once, to the byte as an undisturbed batch draws it. After each of an export, the
old bundle must still be read and hash as before, or the new one must; the next export must remove what was left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from zimage_rt.bundle.folders import find_leftovers
from zimage_rt.bundle.manifest import read_manifest
from zimage_rt.bundle.verify import check_file
from zimage_rt.metadata.image_file import read_record
from zimage_rt.metadata.references import pixels_sha256

ROWS = 12


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it was killed before it ended."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def images(folder: Path) -> dict[str, bytes]:
    """The pixels of every image; each must be whole and be the one that its record says."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(path))
        assert read_record(path).pixels_sha256 == pixels_sha256(pixels), path
        assert path.with_suffix(".json").is_file(), path
        found[path.name] = pixels.tobytes()
    return found


def kill_batches(bundle: Path, folder: Path, times: int, rng: random.Random) -> int:
    table = folder / "rows.csv"
    table.write_text("prompt,seed\n" + "".join(f"a panda {i},{i}\n" for i in range(ROWS)))

    def command(out: Path) -> subprocess.Popen[bytes]:
        sizes = ("--height", 64, "--width", 64, "--steps", 1)
        return start("zimage_rt.cli.main", "batch", table, "-b", bundle, "-o", out, *sizes)

    begun = time.perf_counter()
    assert command(folder / "whole").wait() == 0
    longest = time.perf_counter() - begun
    whole = images(folder / "whole")
    assert len(whole) == ROWS
    killed = 0
    while killed < times:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        while kill_after(command(out), rng.uniform(0.3, longest * 1.1)):
            killed += 1
            assert images(out).items() <= whole.items()
        assert images(out) == whole
        assert not list(out.glob(".*.tmp"))
    return killed


def kill_exports(checkpoint: Path, folder: Path, times: int, rng: random.Random) -> int:
    out = folder / "bundle"

    def command(steps: int) -> subprocess.Popen[bytes]:
        recipe = folder / "recipe.toml"
        recipe.write_text(
            f'checkpoint = "{checkpoint}"\nout = "bundle"\nvae = ["tiny"]\nparity = false\nbackend = "cuda"\n'
            f'precision = "bf16"\nnum_inference_steps = {steps}\n'
        )
        return start("zimage_rt.export.cli", recipe)

    begun = time.perf_counter()
    assert command(1).wait() == 0
    longest = time.perf_counter() - begun
    killed, attempt = 0, 1
    known = {read_manifest(out).bundle_id}
    while killed < times:
        attempt += 1
        ended = not kill_after(command(attempt % 1000 + 1), rng.uniform(longest * 0.5, longest * 1.02))
        manifest = read_manifest(out)
        for name, entry in manifest.files.items():
            check_file(out, name, entry)
        killed += not ended
        known.add(manifest.bundle_id)
    assert command(1000).wait() == 0
    assert read_manifest(out).pipeline.num_inference_steps == 1000
    assert not find_leftovers(out)
    return killed


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    from export_checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("batches killed:", kill_batches(options.bundle.absolute(), folder, options.times, rng), flush=True)
        checkpoint = make_checkpoint(folder / "checkpoint")
        print("exports killed:", kill_exports(checkpoint, folder, options.times, rng), flush=True)
    print("nothing lost, nothing half-written")


if __name__ == "__main__":
    main()
