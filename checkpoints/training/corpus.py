"""Scenes and their captions as arrays, written by all cores before training starts."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import tokenizer as tokenizer_module
from captions import CaptionWriter
from scenes import draw_jitter, training_scene

MAX_TOKENS = 64
BLOCK = 2000  # scenes a job; each block has its own seed, so the result does not depend on cores


def write_block(job: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Return scenes, jitter, tokens and lengths of one block."""
    block, variants = job
    rng = random.Random(f"corpus-{block}")
    writer, tokenizer = CaptionWriter(), tokenizer_module.train()
    scenes = [training_scene(rng) for _ in range(BLOCK)]
    jitter = [draw_jitter(rng) for _ in scenes]
    tokens = np.zeros((BLOCK * variants, MAX_TOKENS), np.uint16)
    lengths = np.zeros(BLOCK * variants, np.uint8)
    texts = [tokenizer_module.chat(writer.write(s, rng)) for s in scenes for _ in range(variants)]
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids = encoding.ids
        while len(ids) > MAX_TOKENS:  # hardly ever; say it again in fewer words
            ids = tokenizer.encode(tokenizer_module.chat(writer.write(scenes[row // variants], rng))).ids
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    return (
        np.array([s.as_tuple() for s in scenes], np.int16),
        np.array(jitter, np.int8),
        tokens.reshape(BLOCK, variants, MAX_TOKENS),
        lengths.reshape(BLOCK, variants),
    )


def build(count: int, variants: int) -> dict[str, np.ndarray]:
    """Return ``scenes`` [n, 7], ``jitter`` [n, 4], ``tokens`` [n, variants, 64], ``lengths``."""
    jobs = [(block, variants) for block in range((count + BLOCK - 1) // BLOCK)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        blocks = pool.map(write_block, jobs, chunksize=1)
    names = ("scenes", "jitter", "tokens", "lengths")
    return {n: np.concatenate(part)[:count] for n, part in zip(names, zip(*blocks, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=400_000)
    parser.add_argument("--variants", type=int, default=6, help="captions a scene")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    arguments = parser.parse_args()
    start = time.time()
    arrays = build(arguments.scenes, arguments.variants)
    np.savez(arguments.out, **arrays)
    short = (arrays["lengths"] <= 32).mean()
    print(f"{arguments.scenes} scenes in {time.time() - start:.0f} s, {short:.1%} of captions short")


if __name__ == "__main__":
    main()
