"""Prompts to token ids, with the checkpoint's chat template and `tokenizers.Tokenizer`."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..checks import shown
from ..errors import BundleMismatch, RequestError
from ..limits import MAX_PROMPT_CHARACTERS
from .manifest import Manifest


class PromptTokenizer:
    """Applies the chat template to a prompt and tokenizes it."""

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
        self._markers = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._plain: Tokenizer | None = None  # the same tokenizer without markers, made on first use
        self._lock = threading.Lock()

    def __call__(
        self, prompt: str, name: str = "prompt", *, truncate: bool = False, literal: bool = False
    ) -> np.ndarray:
        """Token ids `[1, prompt_tokens]`, int64.

        A prompt that is too long is refused. With `truncate` it is cut to the bundle's length as in diffusers,
        including the chat template's last tokens.

        Markers of the chat template in a prompt, such as `<|im_end|>`, act as markers, as in diffusers; with `literal`
        they are text.

        Raises:
            RequestError: the prompt is too long, or not encodable; `name` is the request's field.
        """
        ids = self._ids(prompt, name, truncate, literal)
        return np.asarray(ids[: self._max_tokens], dtype=np.int64)[None]

    def count(
        self, prompt: str, name: str = "prompt", *, truncate: bool = False, literal: bool = False
    ) -> tuple[int, int]:
        """Numbers of tokens that are used and that the prompt has, which are equal unless it is cut.

        The second number is a lower bound for prompts that are far too long. Raises RequestError as `__call__` does.
        """
        tokens = len(self._ids(prompt, name, truncate, literal))
        return min(tokens, self._max_tokens), tokens

    def _ids(self, prompt: str, name: str, truncate: bool, literal: bool) -> list[int]:
        check_text(prompt, name)
        # A token is at most a few dozen bytes, so that no valid prompt exceeds this bound; it avoids tokenizing
        # megabytes only to refuse or cut them.
        bound = 64 * self._max_tokens
        hint = "shorten it, or let truncate_prompt cut it"
        if len(prompt) > bound:
            if not truncate:
                raise RequestError(
                    f"{name}: expected at most {self._max_tokens} tokens, got {len(prompt)} characters; {hint}"
                )
            prompt = prompt[:bound]
        try:
            ids = self._encode(self._tokenizer, self._prefix + prompt + self._suffix)
            if literal and self._count_markers(ids) > self._count_markers(
                self._encode(self._tokenizer, self._prefix + self._suffix)
            ):
                ids = self._literal_ids(prompt)
        except Exception as error:  # the library raises bare Exception
            raise RequestError(f"{name}: the tokenizer cannot read it: {error}; write it otherwise") from error
        if len(ids) > self._max_tokens and not truncate:
            raise RequestError(
                f"{name}: expected at most {self._max_tokens} tokens with the chat template, got {len(ids)}; {hint}"
            )
        return ids

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def _count_markers(self, ids: list[int]) -> int:
        return sum(token in self._markers for token in ids)

    def _literal_ids(self, prompt: str) -> list[int]:
        """Token ids with the template's markers, and without any markers in the prompt.

        The template's text next to the prompt, up to the nearest marker on each side, is tokenized together with it:
        `user`, a line break and the prompt may share tokens.
        """
        with self._lock:
            if self._plain is None:
                data = json.loads(self._tokenizer.to_str())
                self._plain = Tokenizer.from_str(json.dumps({**data, "added_tokens": []}))
        before, behind = (self._marker_ends(text) for text in (self._prefix, self._suffix))
        first, last = max((end for _, end in before), default=0), min((start for start, _ in behind), default=None)
        last = len(self._suffix) if last is None else last
        return [
            *self._encode(self._tokenizer, self._prefix[:first]),
            *self._encode(self._plain, self._prefix[first:] + prompt + self._suffix[:last]),
            *self._encode(self._tokenizer, self._suffix[last:]),
        ]

    def _marker_ends(self, text: str) -> list[tuple[int, int]]:
        """Begin and end, in characters, of the markers in a part of the template."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [ends for token, ends in zip(encoded.ids, encoded.offsets, strict=True) if token in self._markers]


def check_prompt(text: Any, name: str, max_tokens: int) -> str:
    """Check a prompt of a request and return it as str.

    Raises RequestError for another type, for more characters than `MAX_PROMPT_CHARACTERS`, and for a NUL or a lone
    surrogate.
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
    """Raise RequestError for a string with a lone surrogate, as in UTF-16 text that was cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: expected text, got half of a character (U+{ord(text[error.start]):04X}) at position "
            f"{error.start}; it was cut inside of an emoji or a rare character: take it out, or paste the text again"
        ) from None
