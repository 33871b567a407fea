"""Judge the weights of the work folder on the training machine, within a minute on a GPU.

    python judge_fast.py --work state --data quality-data --each 200

Draws held-out prompts of every kind with the training twins and the tiny decoder, and judges them on
all cores. The published figures come from ``benchmarks/quality`` with the saved checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
_judge: list[Any] = []


def _start(data: Path) -> None:
    sys.path.insert(0, str(QUALITY))
    from judge import Atlas, Judge

    _judge.append(Judge(Atlas.load(data)))


def _score(job: tuple[dict[str, Any], np.ndarray]) -> dict[str, list[bool]]:
    return _judge[0].score(job[1], job[0]["scene"])


def kind_of(prompt: dict[str, Any]) -> str:
    scene = prompt["scene"]
    layout = {"left_right": "pair", "top_bottom": "pair"}.get(scene["layout"], scene["layout"])
    return f"{layout}{'_unseen' if prompt['unseen'] else ''}_{scene['width']}x{scene['height']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--data", type=Path, required=True, help="what heldout.py wrote")
    parser.add_argument("--model", choices=["average", "base", "turbo"], default="average")
    parser.add_argument("--each", type=int, default=200, help="prompts of every kind")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--save", type=Path, help="write a sheet of the first images here")
    parser.add_argument("--processes", type=int, help="to judge with; all cores if left out")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    start = time.time()
    # A process per core; this module imports no torch, which they do not need.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    pool = multiprocessing.get_context("spawn").Pool(arguments.processes, _start, (arguments.data,))

    import torch
    from fast_models import CAPTION_LENGTHS, FastTextEncoder, FastTransformer, unpatchify
    from flow import encode_texts, noise_of, sample, widened
    from sheet import write_sheet
    from train import load_tiny

    device = torch.device(arguments.device)
    state = torch.load(arguments.work / "average.pt", map_location=device)
    encoder, transformer = FastTextEncoder().to(device), FastTransformer().to(device)
    encoder.load_state_dict(widened(state["text_encoder"]))
    if arguments.model != "average":
        state = torch.load(arguments.work / f"{arguments.model}.pt", map_location=device)
    transformer.load_state_dict(widened(state["transformer"]))
    decoder = load_tiny(arguments.work, device).decoder
    taken: dict[str, int] = defaultdict(int)
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in (arguments.data / "prompts.jsonl").read_text("utf-8").splitlines():
        prompt = json.loads(line)
        kind = kind_of(prompt)
        taken[kind] += 1
        if taken[kind] <= arguments.each:
            tokens, _ = encode_texts([prompt["caption"]], torch.device("cpu"))
            groups[(prompt["scene"]["width"], prompt["scene"]["height"], tokens.shape[1])].append(prompt)
    results, first, drawing = [], [], 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        empty_tokens, _ = encode_texts([""], device)
        empty = encoder(empty_tokens)
        for (width, height, padded), prompts in groups.items():
            assert padded in CAPTION_LENGTHS
            for i in range(0, len(prompts), arguments.batch):
                part = prompts[i : i + arguments.batch]
                before = time.time()
                tokens, lengths = encode_texts([p["caption"] for p in part], device)
                patches = sample(
                    transformer, noise_of([p["seed"] for p in part], (width, height), device), encoder(tokens), lengths,
                    (width, height), evaluations=arguments.evaluations, guidance=arguments.guidance, empty=empty,
                )  # fmt: skip
                latents = unpatchify(patches, (width, height))
                images = torch.cat([decoder(x) for x in latents.split(64)]).float().clamp(-1, 1)
                pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
                drawing += time.time() - before
                if (width, height) == (256, 256) and len(first) < 48:
                    first += list(images[:24].cpu())
                results.append((part, pool.map_async(_score, list(zip(part, pixels, strict=True)), chunksize=4)))
    judged = [pair for part, result in results for pair in zip(part, result.get(), strict=True)]
    sys.path.insert(0, str(QUALITY))
    from judge import summarise

    figures = summarise(judged)
    if arguments.save:
        write_sheet(torch.stack(first), arguments.save)
    name = f"{arguments.model}, {arguments.evaluations} evaluations, guidance {arguments.guidance}"
    print(f"{name}: {len(judged)} prompts, {drawing:.0f} s drawing, {time.time() - start:.0f} s in all")
    print(" ".join(f"{k} {100 * v:.1f}" for k, v in figures.items()), flush=True)
    out = {"model": name, "prompts": len(judged), "figures": figures}
    (arguments.work / f"judged-{arguments.model}.json").write_text(json.dumps(out, indent=1))
    pool.close()
    pool.join()


if __name__ == "__main__":
    main()
