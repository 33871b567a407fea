"""The limit of concurrent requests, and callbacks that report progress."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zimage_rt
from zimage_rt.gate import Gate
from zimage_rt.request.types import SecondPass

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}


def test_a_gate_admits_its_limit_and_queues_the_others_in_order() -> None:
    gate, entered, leave = Gate(2), [], [threading.Event() for _ in range(6)]
    inside = [threading.Event() for _ in range(6)]

    def visit(number: int) -> None:
        with gate.place():
            entered.append(number)
            inside[number].set()
            leave[number].wait()

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(6)]
    for number, thread in enumerate(threads):
        thread.start()
        if number < 2:
            assert inside[number].wait(10)
        else:
            while len(gate._waiting) < number - 1:  # so that the order in which they ask is known
                pass
    assert sorted(entered) == [0, 1]
    for number in range(6):
        leave[number].set()
        threads[number].join()
        if number + 2 < 6:
            assert inside[number + 2].wait(10)
    assert entered == [*sorted(entered[:2]), 2, 3, 4, 5]
    assert gate._free == 2


def test_a_thread_keeps_its_slot_and_frees_it_when_it_fails() -> None:
    gate = Gate(1)
    with pytest.raises(ValueError, match="inside"), gate.place(), gate.place():
        raise ValueError("inside")
    with gate.place():
        assert gate._free == 0
    assert gate._free == 1


def test_an_engine_computes_no_more_than_it_may(bundle: Path) -> None:
    engine = zimage_rt.Engine.load(bundle, max_concurrency=2, verify=False)
    engine.generate("a panda", **SMALL)  # loads the VAE
    lock, running, most, images = threading.Lock(), set[int](), [0], []

    def draw(seed: int) -> None:
        def on_step(info: zimage_rt.StepInfo) -> None:
            with lock:
                running.add(threading.get_ident())
                most[0] = max(most[0], len(running))
            if info.step + 1 == info.num_steps:
                info.preview()  # takes no second place
                with lock:
                    running.discard(threading.get_ident())

        images.append(engine.generate("a panda", **{**SMALL, "seed": seed}, callback=on_step).images)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(draw, range(16)))
    assert len(images) == 16 and 1 <= most[0] <= 2
    # A request from a callback runs in its own request's place.
    inner = []
    engine.generate(
        "a cat", **SMALL, callback=lambda info: bool(inner.append(engine.generate("a dog", **SMALL))) or None
    )
    assert len(inner) == 2


def told(engine: zimage_rt.Engine, **fields: Any) -> list[tuple[str, int, int]]:
    calls: list[tuple[str, int, int]] = []
    engine.generate(on_stage=lambda *call: calls.append(call), **{"prompt": "a panda", **SMALL, **fields})
    return calls


def test_stages_of_a_request_are_reported(engine: zimage_rt.Engine) -> None:
    two = [("denoise", 0, 2), ("denoise", 1, 2), ("denoise", 2, 2)]
    assert told(engine) == [
        ("encode_prompt", 0, 1),
        ("encode_prompt", 1, 1),
        *two,
        ("decode", 0, 1),
        ("decode", 1, 1),
    ]
    batch = told(engine, num_images=2, guidance_scale=1.0, num_inference_steps=1)
    assert batch[4] == ("encode_prompt", 4, 4) and batch[-2:] == [("decode", 0, 2), ("decode", 2, 2)]
    grey = np.full((64, 64, 3), 128, np.uint8)
    begun = told(engine, image=grey, strength=0.5, second_pass=SecondPass(scale=2.0, strength=0.5))
    names = [name for index, (name, _, _) in enumerate(begun) if index == 0 or begun[index - 1][0] != name]
    assert names == ["encode_prompt", "encode_image", "denoise", "decode", "upscale", "denoise", "decode"]


def test_tiles_are_counted_and_a_callback_is_called_too(engine: zimage_rt.Engine) -> None:
    steps: list[int] = []
    calls = told(engine, height=256, vae_tile=128, callback=lambda info: steps.append(info.step))
    assert [call for call in calls if call[0] == "decode"] == [("decode", done, 3) for done in range(4)]
    assert steps == [0, 1]
    plain = engine.generate("a panda", **{**SMALL, "height": 256}, vae_tile=128).images
    seen = engine.generate("a panda", **{**SMALL, "height": 256}, vae_tile=128, on_stage=lambda *_: None).images
    assert plain.tobytes() == seen.tobytes()


def test_an_exception_in_a_stage_ends_the_request(engine: zimage_rt.Engine) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done == 1:
            raise KeyError(stage)

    with pytest.raises(KeyError, match="denoise"):
        engine.generate("a panda", **SMALL, on_stage=stop)
    assert engine._gate._free == sys.modules["zimage_rt.engine"].MAX_CONCURRENCY
    assert engine.generate("a panda", **SMALL).images.std() > 0


def test_stages_of_loading_are_reported(bundle: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    engine = zimage_rt.Engine.load(bundle, progress=lambda *call: calls.append(call))
    hashed = [call for call in calls if call[0] == "hash"]
    manifest = engine.manifest
    files = {manifest.tokenizer}
    for name in ("text_encoder", "context_refiner", "transformer"):
        files.update(manifest.module_files(name))
    total = sum(manifest.files[name].size for name in files)
    assert hashed[0] == ("hash", 0, total) and hashed[-1] == ("hash", total, total)
    assert [done for _, done, _ in hashed] == sorted(done for _, done, _ in hashed)
    assert [call for call in calls if call[0] == "load"] == [("load", done, 3) for done in range(4)]
    count = len(calls)
    engine.generate("a panda", **SMALL)  # the VAE is hashed and loaded now, which is the request's
    assert len(calls) == count
    calls.clear()
    zimage_rt.Engine.load(bundle, verify=False, progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == {"load"}
