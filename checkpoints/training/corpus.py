"""Write scenes and their captions as arrays, on all cores, before training starts."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import tokenizer as tokenizer_module
from captions import CaptionWriter
from scenes import COLUMNS, Scene, training_scene

MAX_TOKENS = 64
BLOCK = 2000  # scenes per job; each block has its own seed, so the result does not depend on the number of cores


def write_block(job: tuple[int, int, float]) -> tuple[np.ndarray, ...]:
    """Return scenes, tokens and lengths of one block."""
    block, variants, loose = job
    rng = random.Random(f"corpus-{block}")
    writer, tokenizer = CaptionWriter(), tokenizer_module.cached()
    scenes = [training_scene(rng) for _ in range(BLOCK)]
    tokens = np.zeros((BLOCK * variants, MAX_TOKENS), np.uint16)
    lengths = np.zeros(BLOCK * variants, np.uint8)

    def say(scene: Scene) -> str:
        return tokenizer_module.chat(writer.write(scene, rng, loose=loose > 0 and rng.random() < loose))

    texts = [say(s) for s in scenes for _ in range(variants)]
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids = encoding.ids
        while len(ids) > MAX_TOKENS:  # rare; write a shorter one
            ids = tokenizer.encode(say(scenes[row // variants])).ids
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return (
        np.array([s.as_row() for s in scenes], np.int16).reshape(BLOCK, COLUMNS),
        tokens.reshape(BLOCK, variants, MAX_TOKENS),
        lengths.reshape(BLOCK, variants),
    )


def build(count: int, variants: int, loose: float = 0.0) -> dict[str, np.ndarray]:
    """Return ``scenes`` [n, COLUMNS], ``tokens`` [n, variants, 64], ``lengths`` [n, variants]."""
    jobs = [(block, variants, loose) for block in range((count + BLOCK - 1) // BLOCK)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    with multiprocessing.get_context("spawn").Pool() as pool:
        blocks = pool.map(write_block, jobs, chunksize=1)
    names = ("scenes", "tokens", "lengths")
    return {n: np.concatenate(part)[:count] for n, part in zip(names, zip(*blocks, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=400_000)
    parser.add_argument("--variants", type=int, default=6, help="captions a scene")
    parser.add_argument("--loose", type=float, default=0.0, help="share of captions that leave out what they like")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    arguments = parser.parse_args()
    start = time.time()
    arrays = build(arguments.scenes, arguments.variants, arguments.loose)
    temporary = arguments.out.with_suffix(".part.npz")
    np.savez(temporary, **arrays)
    temporary.rename(arguments.out)  # atomic, for processes that wait for the file
    short = (arrays["lengths"] <= 32).mean()
    print(f"{arguments.scenes} scenes in {time.time() - start:.0f} s, {short:.1%} of captions short")


if __name__ == "__main__":
    main()
