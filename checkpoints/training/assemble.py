"""Put the trained weights into the checkpoint's folder."""

from __future__ import annotations

import argparse
from pathlib import Path

import architecture
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    arguments = parser.parse_args()
    average = torch.load(arguments.work / "average.pt", map_location="cpu")
    vaes = torch.load(arguments.work / "vaes.pt", map_location="cpu")
    parts = architecture.fresh()
    parts.transformer.load_state_dict({k: v.float() for k, v in average["transformer"].items()})
    parts.text_encoder.load_state_dict({k: v.float() for k, v in average["text_encoder"].items()})
    parts.tiny_vae.load_state_dict(vaes["tiny"])
    parts.vae.load_state_dict(vaes["full"])
    parts.vae.register_to_config(scaling_factor=vaes["scaling_factor"], shift_factor=vaes["shift_factor"])
    architecture.save(parts, arguments.out)
    total = sum(f.stat().st_size for f in arguments.out.rglob("*") if f.is_file())
    print(f"{arguments.out}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
