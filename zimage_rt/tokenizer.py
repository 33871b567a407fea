"""Prompt to token ids: the checkpoint's chat template around `tokenizers.Tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .checks import shown
from .errors import BundleMismatch, RequestError
from .limits import MAX_PROMPT_CHARACTERS
from .manifest import Manifest


class PromptTokenizer:
    """Puts a prompt into the chat template and tokenizes it."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._prefix = manifest.pipeline.prompt_prefix
        self._suffix = manifest.pipeline.prompt_suffix
        self._max_tokens = manifest.shapes.prompt_tokens.max
        path = bundle / manifest.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleMismatch(f"{path}: not a tokenizer: {error}; export the bundle again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, prompt: str, name: str = "prompt", *, truncate: bool = False) -> np.ndarray:
        """Token ids `[1, prompt_tokens]`, int64.

        A prompt that is too long is refused, or with `truncate` cut as diffusers does: what is behind the bundle's
        length goes, the chat template's last tokens among it.

        Raises:
            RequestError: it is too long, or no text; `name` is the request's field.
        """
        ids = self._ids(prompt, name, truncate)
        return np.asarray(ids[: self._max_tokens], dtype=np.int64)[None]

    def count(self, prompt: str, name: str = "prompt", *, truncate: bool = False) -> tuple[int, int]:
        """How many tokens a prompt is cut to, and how many it has; they are the same unless it is cut.

        Of a prompt that is very much too long the second is a lower bound. Raises RequestError as a call does.
        """
        tokens = len(self._ids(prompt, name, truncate))
        return min(tokens, self._max_tokens), tokens

    def _ids(self, prompt: str, name: str, truncate: bool) -> list[int]:
        check_text(prompt, name)
        # A token is at most a few dozen bytes, so this bound costs no valid prompt and saves
        # tokenizing megabytes only to refuse or cut them.
        bound = 64 * self._max_tokens
        hint = "shorten it, or let truncate_prompt cut it"
        if len(prompt) > bound:
            if not truncate:
                raise RequestError(
                    f"{name}: expected at most {self._max_tokens} tokens, got {len(prompt)} characters; {hint}"
                )
            prompt = prompt[:bound]
        text = self._prefix + prompt + self._suffix
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise RequestError(f"{name}: the tokenizer cannot read it: {error}; write it otherwise") from error
        if len(ids) > self._max_tokens and not truncate:
            raise RequestError(
                f"{name}: expected at most {self._max_tokens} tokens with the chat template, got {len(ids)}; {hint}"
            )
        return ids


def check_prompt(text: Any, name: str, max_tokens: int) -> str:
    """A prompt of a request.

    Raises RequestError for another type, for more characters than are cut on request, and for what is no text: a NUL,
    or half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise RequestError(f"{name}: expected text, got {shown(text)}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"{name}: expected at most {max_tokens} tokens, or {MAX_PROMPT_CHARACTERS} characters to be cut, got "
            f"{len(text)} characters; shorten it"
        )
    if "\0" in text:
        raise RequestError(
            f"{name}: expected text, got a NUL character at position {text.index(chr(0))}; was a file read that is no "
            "text, or one in UTF-16?"
        )
    check_text(text, name)
    return str(text)


def check_text(text: str, name: str) -> None:
    """Raise RequestError for a string that is no text: one half of a surrogate pair, as cut UTF-16 leaves it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: expected text, got half of a character (U+{ord(text[error.start]):04X}) at position "
            f"{error.start}; it was cut inside of an emoji or a rare character: take it out, or paste the text again"
        ) from None
