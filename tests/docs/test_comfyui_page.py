"""docs/comfyui.md against the nodes that run, and its commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from shared import ROOT

from zimage_rt.comfyui import nodes
from zimage_rt.comfyui.registry import NODES

TEXT = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")


def test_the_page_has_every_node() -> None:
    assert nodes.__all__
    table = TEXT.partition("## Nodes\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(NODES)


def test_the_commands_work(tmp_path: Path, bundle: Path) -> None:
    commands = [line.partition("#")[0] for line in TEXT.splitlines() if line.startswith("zimage workflow")]
    assert len(commands) == 3
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # The last one runs what the second one saved.
    for command in (*commands, "zimage workflow out/fox_00001_.png -b engines/nano"):
        words = [str(bundle.absolute()) if word == "engines/nano" else word for word in shlex.split(command)[1:]]
        run = subprocess.run(
            [sys.executable, "-m", "zimage_rt.cli.main", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, (words, run.stderr)
    files = [(tmp_path / "out" / f"fox_0000{number}_.png").read_bytes() for number in (1, 2, 3)]
    assert files[0] == files[2] != files[1]
