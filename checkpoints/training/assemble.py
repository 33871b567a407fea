"""Write the trained weights as checkpoints: Turbo, and Base in a folder next to it."""

from __future__ import annotations

import argparse
from pathlib import Path

import architecture
import torch
from flow import widened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; Base is written to OUT-base")
    arguments = parser.parse_args()
    base = torch.load(arguments.work / "average.pt", map_location="cpu")
    vaes = torch.load(arguments.work / "vaes.pt", map_location="cpu")
    turbo, loose = arguments.work / "turbo.pt", arguments.work / "base.pt"
    shipped = torch.load(turbo, map_location="cpu") if turbo.exists() else base
    parts = architecture.fresh()
    parts.transformer.load_state_dict(widened(shipped["transformer"]))
    parts.text_encoder.load_state_dict(widened(base["text_encoder"]))
    parts.tiny_vae.load_state_dict(widened(vaes["tiny"]))
    parts.vae.load_state_dict(widened(vaes["full"]))
    parts.vae.register_to_config(scaling_factor=vaes["scaling_factor"], shift_factor=vaes["shift_factor"])
    architecture.save(parts, arguments.out)
    folders = [arguments.out]
    if turbo.exists():
        sibling = arguments.out.with_name(arguments.out.name + "-base")
        own = torch.load(loose, map_location="cpu") if loose.exists() else base
        parts.transformer.float().load_state_dict(widened(own["transformer"]))
        architecture.save_sibling(parts.transformer, sibling, arguments.out)
        folders.append(sibling)
    for folder in folders:
        own = [f for f in folder.rglob("*") if f.is_file() and f.resolve().is_relative_to(folder.resolve())]
        print(f"{folder}: {sum(f.stat().st_size for f in own) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
