"""Previews of a job's steps: in their order, and no more of them than their share of the time allows."""

from __future__ import annotations

import io

from PIL import Image

import zimage_rt
from zimage_rt.request.types import StepInfo
from zimage_rt.server.previews import Previews, encode_preview


def draw(
    engine: zimage_rt.Engine, previews: Previews, every: int, size: int = 64, steps: int = 5
) -> list[bytes | None]:
    """The previews of a drawing's steps."""
    sent: list[tuple[int, bytes | None]] = []

    def send(info: StepInfo, preview: bytes | None) -> None:
        sent.append((info.step, preview))

    job = previews.of_job(every, ("nano", size), send)
    engine.generate("a panda", height=size, width=size, num_inference_steps=steps, seed=3, callback=job.step)
    job.flush()
    assert [step for step, _ in sent] == list(range(steps))
    return [preview for _, preview in sent]


def test_every_preview_is_made_if_they_may_take_all_the_time(engine: zimage_rt.Engine) -> None:
    previews = Previews(1.0)
    found = draw(engine, previews, every=2, size=416)
    assert [preview is not None for preview in found] == [False, True, False, True, False]
    assert Image.open(io.BytesIO(found[1] or b"")).size == (208, 208)  # every second pixel, for at most 384
    previews.stop()


def test_none_is_made_without_a_share_or_a_wish(engine: zimage_rt.Engine) -> None:
    for previews, every in ((Previews(0.0), 1), (Previews(1.0), 0)):
        assert not any(draw(engine, previews, every))
        previews.stop()


def test_previews_that_would_take_longer_than_their_share_are_left_out(engine: zimage_rt.Engine) -> None:
    # On a CPU a preview of the small model takes as long as a step.
    previews = Previews(0.05)
    counts = [sum(preview is not None for preview in draw(engine, previews, every=1)) for _ in range(3)]
    assert counts[0] >= 1, "the first is made to learn what it costs"
    assert counts[-1] == 0
    generous = Previews(0.9)
    counts = [sum(preview is not None for preview in draw(engine, generous, every=1)) for _ in range(3)]
    assert counts[-1] >= 1
    for each in (previews, generous):
        each.stop()


def test_a_preview_is_a_small_jpeg(engine: zimage_rt.Engine) -> None:
    pixels = engine.generate("a panda", height=64, width=96, num_inference_steps=1, seed=3).images[0]
    image = Image.open(io.BytesIO(encode_preview(pixels)))
    assert (image.format, image.size) == ("JPEG", (96, 64))
