"""Pack the training state into files of at most 15 MiB, to move it between machines.

    python pack_state.py split --work state --out parts     # weights as 16-bit floats, everything else as it is
    python pack_state.py join --work state --parts parts

With ``--tiny-only`` the parts lack the full autoencoder, which the joint and the turbo stage do not need. The state
contains all that stages need to resume: the average of the joint stage (from which ``train.py joint --resume`` starts
without a ``live.pt``), the turbo and base transformers, both autoencoders, the curves and the last sheets. The corpus
and the atlas are made again, from the same seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from pathlib import Path

import torch

PART_BYTES = 15 * 2**20
NAMES = ["average.pt", "turbo.pt", "base.pt", "vaes.pt", "vaes.json", "curves.json", "samples.png"]
NAMES += [f"samples-{name}.png" for name in ("turbo", "base")]
NAMES += [f"judged-{name}.json" for name in ("average", "turbo", "base")]


def halve(value: object, kind: torch.dtype) -> object:
    """Return a state with its fp32 tensors converted to ``kind``."""
    if isinstance(value, dict):
        return {k: halve(v, kind) for k, v in value.items()}
    return value.to(kind) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def split(work: Path, out: Path, names: list[str], tiny_only: bool) -> None:
    """Write the state as numbered parts with a list of checksums."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in [n for n in names if (work / n).exists()]:
            data = (work / name).read_bytes()
            if name == "vaes.pt":  # they ship in fp16, the rest in bf16
                state = torch.load(work / name, map_location="cpu")
                if tiny_only:
                    del state["full"]
                small = io.BytesIO()
                torch.save(halve(state, torch.half), small)
                data = small.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    sums = []
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        part = data[start : start + PART_BYTES]
        (out / f"state-{number:02d}.part").write_bytes(part)
        sums.append(f"{hashlib.sha256(part).hexdigest()}  state-{number:02d}.part\n")
    (out / "SHA256SUMS").write_text("".join(sums))
    print(f"{len(sums)} parts, {len(data) / 2**20:.1f} MiB, in {out}")


def join(work: Path, parts: Path) -> None:
    """Verify the parts and unpack them into the work folder."""
    data = b""
    for line in (parts / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split()
        part = (parts / name).read_bytes()
        if hashlib.sha256(part).hexdigest() != checksum:
            raise SystemExit(f"{name} is damaged")
        data += part
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(work, filter="data")
        print("in the work folder now:", ", ".join(archive.getnames()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["split", "join"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder to write the parts to, for split")
    parser.add_argument("--parts", type=Path, help="folder of the parts, for join")
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--tiny-only", action="store_true", help="leave the full autoencoder out")
    arguments = parser.parse_args()
    if arguments.action == "split":
        split(arguments.work, arguments.out, arguments.names, arguments.tiny_only)
    else:
        join(arguments.work, arguments.parts)


if __name__ == "__main__":
    main()
