"""LoRAs as a field of a request: requests of one set run together, a change waits for those that run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared import ROOT

import zimage_rt
from zimage_rt.errors import RequestError
from zimage_rt.rwlock import FairRWLock

STYLE = ROOT / "checkpoints" / "zimage-nano-cyanotype" / "cyanotype.safetensors"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 5}


@pytest.fixture(scope="module")
def engine(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zimage_rt.Engine]:
    """An engine with two LoRAs: `style` is on, `other` is off."""
    other = tmp_path_factory.mktemp("loras") / "other.safetensors"
    save_file({name: tensor * np.float32(-1) for name, tensor in load_file(STYLE).items()}, other)
    with zimage_rt.Engine.load(bundle) as engine:
        engine.load_lora(STYLE, 1.0, "style")
        engine.load_lora(other, 0.0, "other")
        yield engine


def sketch(engine: zimage_rt.Engine, **fields: Any) -> bytes:
    return engine.generate("a panda", **SMALL, **fields).images.tobytes()


def test_a_request_has_its_own_loras(engine: zimage_rt.Engine) -> None:
    engine.set_loras({})
    plain = sketch(engine)
    engine.set_loras({"other": 0.5})
    other = sketch(engine)
    engine.set_loras({"style": 1.0})
    styled = sketch(engine)
    assert len({plain, other, styled}) == 3
    # The engine's own weights stay what they are.
    assert sketch(engine, loras={}) == plain
    assert sketch(engine) == styled
    assert sketch(engine, loras={"other": 0.5}) == other
    assert sketch(engine, loras={"other": 0.0, "style": 1.0}) == styled
    assert engine.loras == {"style": 1.0, "other": 0.0}
    assert [lora.name for lora in engine.active_loras] == ["style"]


def test_a_record_has_the_loras_of_its_request(engine: zimage_rt.Engine) -> None:
    engine.set_loras({"style": 1.0})
    record = engine.generate("a panda", **SMALL, loras={"other": 0.5}).records[0]
    assert [(lora["name"], lora["weight"]) for lora in record.loras] == [("other", 0.5)]
    assert "loras" not in record.request  # one truth: the files, by their hashes
    assert engine.generate("a panda", **SMALL, loras={}).records[0].loras == []
    assert record.to_request().loras is None


def test_an_unknown_lora_is_refused_before_anything_changes(engine: zimage_rt.Engine) -> None:
    engine.set_loras({"style": 1.0})
    styled = sketch(engine)
    with pytest.raises(
        RequestError, match=r"^loras: no LoRA named 'stile' is loaded; there are: style, other"
    ) as caught:
        sketch(engine, loras={"stile": 1.0})
    assert caught.value.field == "loras"
    with pytest.raises(RequestError, match=r"^loras\.style: expected a finite weight"):
        sketch(engine, loras={"style": "much"})
    assert sketch(engine) == styled


def test_many_sets_at_once_each_draw_their_own(engine: zimage_rt.Engine) -> None:
    engine.set_loras({"style": 1.0})
    sets: list[dict[str, float] | None] = [None, {}, {"other": 0.5}, {"style": 0.5, "other": 0.5}]
    alone = [sketch(engine, loras=chosen) for chosen in sets]
    assert len(set(alone)) == len(sets)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda number: sketch(engine, loras=sets[number % len(sets)]), range(24)))
    assert drawn == [alone[number % len(sets)] for number in range(24)]


def test_a_callback_cannot_change_the_loras_of_its_request(engine: zimage_rt.Engine) -> None:
    errors: list[BaseException] = []

    def on_step(info: zimage_rt.StepInfo) -> None:
        sketch(engine)  # with the LoRAs of the request that runs
        for change in (
            lambda: sketch(engine, loras={"other": 1.0}),
            lambda: engine.set_loras({}),
            lambda: engine.close(),
        ):
            with pytest.raises(RequestError, match="while a request runs") as caught:
                change()
            errors.append(caught.value)

    engine.generate("a panda", **SMALL, loras={"style": 0.5}, callback=on_step)
    assert len(errors) == 3


def test_readers_of_one_state_share_the_lock_and_others_wait_in_order() -> None:
    lock, order, waiting = FairRWLock(), [], []
    first_inside, leave = threading.Barrier(3), threading.Event()

    def read(name: str, state: str, *, holds: bool = False) -> None:
        with lock.read(state):
            order.append(name)
            if holds:
                first_inside.wait(10)
                leave.wait(10)

    def start(target: Any, *arguments: Any, **keywords: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, kwargs=keywords)
        thread.start()
        waiting.append(thread)

    for name in ("a1", "a2"):
        start(read, name, "a", holds=True)
    first_inside.wait(10)  # both share it
    for number, (name, state) in enumerate((("b1", "b"), ("a3", "a"), ("b2", "b"))):
        start(read, name, state)
        while len(lock._states) < number + 3:  # so that the order of arrival is known
            pass
    leave.set()
    for thread in waiting:
        thread.join(10)
    assert sorted(order[:2]) == ["a1", "a2"] and order[2:] == ["b1", "a3", "b2"]
    assert not lock._states
