"""The cookbook is what its script writes: every recipe runs, and the page and its pictures are up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT
from PIL import Image
from zimage_rt.benchmarks.fidelity import psnr


def test_the_page_is_up_to_date(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "docs/cookbook.py", "--bundle", bundle, "--out", tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "cookbook.md").read_text(encoding="utf-8")
    assert page == (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8"), "run docs/cookbook.py and commit"
    pictures = sorted((tmp_path / "cookbook").glob("*.png"))
    assert [path.name for path in pictures] == sorted(path.name for path in (ROOT / "docs" / "cookbook").glob("*.png"))
    for path in pictures:
        new, old = (np.asarray(Image.open(place)) for place in (path, ROOT / "docs" / "cookbook" / path.name))
        # Another processor rounds otherwise, and eight evaluations carry it on.
        assert psnr(new, old) > 35, f"{path.name}: run docs/cookbook.py and commit"
