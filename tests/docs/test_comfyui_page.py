"""docs/comfyui.md against the nodes that run, and its commands."""

from __future__ import annotations

import json
import re
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
    graphs = json.loads((ROOT / "tests" / "data" / "comfyui" / "graphs.json").read_text(encoding="utf-8"))
    text = (
        json.dumps(graphs["02_euler_simple"]).replace('"8"', '"3"').replace('"5"', '"6"').replace("zimage", "ComfyUI")
    )
    (tmp_path / "graph.json").write_text(text.replace("ComfyUI_nano", "zimage_nano"), encoding="utf-8")
    commands = [line.partition("#")[0].split() for line in TEXT.splitlines() if line.startswith("zimage workflow")]
    assert len(commands) == 4
    for command in commands:
        words = [str(bundle.absolute()) if word == "engines/nano" else word for word in command[1:]]
        words = " ".join(words).replace('6.text="a fox"', "6.text=fox").split()
        run = subprocess.run(
            [sys.executable, "-m", "zimage_rt.cli.main", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, (words, run.stderr)
    assert len(list((tmp_path / "out").glob("ComfyUI_0000?_.png"))) == 3
