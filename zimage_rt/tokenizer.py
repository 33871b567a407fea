"""Prompt to token ids: the checkpoint's chat template around `tokenizers.Tokenizer`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .errors import BundleMismatch, RequestError
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

    def __call__(self, prompt: str) -> np.ndarray:
        """Token ids `[1, prompt_tokens]`, int64. Raises RequestError for a prompt that is too long."""
        # A token is at most a few dozen bytes, so this bound costs no valid prompt and saves
        # tokenizing megabytes only to refuse them.
        if len(prompt) > 64 * self._max_tokens:
            raise RequestError(
                f"prompt: expected at most {self._max_tokens} tokens, got {len(prompt)} characters; shorten it"
            )
        text = self._prefix + prompt + self._suffix
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > self._max_tokens:
            raise RequestError(
                f"prompt: expected at most {self._max_tokens} tokens with the chat template, got {len(ids)}; shorten it"
            )
        return np.asarray(ids, dtype=np.int64)[None]
