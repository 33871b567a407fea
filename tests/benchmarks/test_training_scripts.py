"""The training scripts of zimage-nano, which run on other machines: here they must be importable."""

from __future__ import annotations

import subprocess
import sys

from shared import ROOT

FOLDER = ROOT / "checkpoints" / "training"


def test_every_script_can_be_imported() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert "train" in names
    subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], cwd=FOLDER, check=True)
