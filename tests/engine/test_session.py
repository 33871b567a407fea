"""A session of several turns on zimage-nano."""

from __future__ import annotations

import numpy as np
import pytest

import zimage_rt
from zimage_rt.errors import RequestError

PROMPT = "a cat on the left and a house on the right, purple background"


@pytest.fixture
def session(engine: zimage_rt.Engine) -> zimage_rt.Session:
    return zimage_rt.Session(engine)


def test_draw_edit_refine_undo_redo(session: zimage_rt.Session) -> None:
    first = session.generate(PROMPT, seed=3).images[0]
    mask = np.zeros((256, 256), np.uint8)
    mask[:, :128] = 255
    edited = session.edit("a panda on the left and a house on the right, purple background", mask=mask).images[0]
    assert (edited[:, 128:] == first[:, 128:]).all()
    assert (edited[:, :128] != first[:, :128]).any()
    refined = session.refine(0.3).images[0]
    larger = session.refine(0.3, scale=1.5).images
    assert larger.shape == (1, 384, 384, 3)
    assert [turn.task for turn in session.turns] == ["generate", "edit", "refine", "refine"]
    undone = session.undo()
    assert undone is not None
    assert (undone.images[0] == refined).all()
    assert session.redo().images.tobytes() == larger.tobytes()
    assert session.undo() is not None
    assert session.undo() is not None
    assert (session.current.result.images[0] == edited).all()
    session.refine(0.2)
    with pytest.raises(RequestError, match="nothing to redo"):
        session.redo()


def test_a_refinement_continues_from_the_latents(session: zimage_rt.Session, engine: zimage_rt.Engine) -> None:
    drawn = session.generate(PROMPT, seed=3)
    refined = session.refine(0.4)
    by_hand = engine.generate(PROMPT, seed=3, image_latents=drawn.latents, strength=0.4)
    assert refined.images.tobytes() == by_hand.images.tobytes()
    assert engine.decode(refined.latents, "tiny").tobytes() == refined.images.tobytes()


def test_tasks_choose_their_engine(engine: zimage_rt.Engine) -> None:
    session = zimage_rt.Session({"draft": engine, "final": engine})
    session.generate(PROMPT, seed=1, num_inference_steps=2)
    session.edit("a panda", strength=0.5, num_inference_steps=2)
    session.refine(num_inference_steps=4)
    assert [turn.engine for turn in session.turns] == ["draft", "draft", "final"]


def test_nonsense_is_refused(session: zimage_rt.Session, engine: zimage_rt.Engine) -> None:
    for call in (session.undo, session.refine, lambda: session.edit("x")):
        with pytest.raises(RequestError, match="no image yet"):
            call()
    with pytest.raises(RequestError, match="one image per turn"):
        session.generate(PROMPT, num_images=2)
    with pytest.raises(RequestError, match="known fields"):
        session.generate(PROMPT, colour="red")
    with pytest.raises(RequestError, match="engines: expected any of draft, final, edit, got turbo"):
        zimage_rt.Session({"turbo": engine})
    assert session.turns == ()
