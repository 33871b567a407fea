"""Token ids of prompts: markers of the chat template act as such, or are text on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import zimage_rt

SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 3}


@pytest.fixture(scope="module")
def markers(bundle: Path) -> dict[str, int]:
    added = json.loads((bundle / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def ids(engine: zimage_rt.Engine, prompt: str, **flags: bool) -> list[int]:
    return engine._prompts._tokenizer(prompt, **flags)[0].tolist()


@pytest.mark.parametrize(
    "prompt", ["a panda", "", "\n\n  a panda", "  ", "一只熊猫", "e\u0301\u0338<", "a <|im_en d|>", "|im_end|>", "<"]
)
def test_without_markers_literal_is_the_same(engine: zimage_rt.Engine, prompt: str) -> None:
    assert ids(engine, prompt, literal=True) == ids(engine, prompt)


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>"])
@pytest.mark.parametrize("around", ["{}", "a {} b", "{}a", "a{}", "\n{}{}\n", "熊{}猫"])
def test_markers_are_text_on_request(
    engine: zimage_rt.Engine, bundle: Path, markers: dict[str, int], marker: str, around: str
) -> None:
    prompt = around.replace("{}", marker)
    template = [token for token in ids(engine, "") if token in markers.values()]
    acting = ids(engine, prompt)
    assert acting.count(markers[marker]) == template.count(markers[marker]) + prompt.count(marker)
    literal = ids(engine, prompt, literal=True)
    assert [token for token in literal if token in markers.values()] == template
    # The text is whole, and the template is where it was.
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    pipeline = engine.manifest.pipeline
    assert tokenizer.decode(literal, skip_special_tokens=False) == (
        f"{pipeline.prompt_prefix}{prompt}{pipeline.prompt_suffix}"
    )
    # As if each `<` of the prompt had never been part of a marker: the same text in pieces that are none.
    assert engine._prompts._tokenizer.count(prompt, literal=True) == (len(literal), len(literal))


def test_a_text_with_markers_has_the_tokens_of_its_letters(engine: zimage_rt.Engine, bundle: Path) -> None:
    """By the library's own switch, which leaves out the special ones of the markers."""
    plain = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    plain.encode_special_tokens = True
    middle = plain.encode("user\nsay <|im_end|> twice", add_special_tokens=False).ids
    literal = ids(engine, "say <|im_end|> twice", literal=True)
    assert literal[1 : 1 + len(middle)] == middle


def test_a_request_takes_markers_as_text(engine: zimage_rt.Engine) -> None:
    acting = engine.generate("a panda <|im_end|>", **SMALL)
    literal = engine.generate("a panda <|im_end|>", literal_prompt=True, **SMALL)
    assert acting.latents.tobytes() != literal.latents.tobytes()
    assert literal.records[0].request["literal_prompt"] is True
    again = engine.run(literal.records[0].to_request())
    assert again.images.tobytes() == literal.images.tobytes()
    # The cache of contexts keeps the two apart, and one without markers is the same.
    assert acting.latents.tobytes() == engine.generate("a panda <|im_end|>", **SMALL).latents.tobytes()
    plain = [engine.generate("a panda", literal_prompt=value, **SMALL).latents.tobytes() for value in (False, True)]
    assert plain[0] == plain[1]
