"""Prompts to contexts: the tokenizer, the text encoder and the context refiner, with a cache over all three."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from .backends.base import Pipeline
from .bundle.tokenizer import PromptTokenizer
from .request.types import ResolvedRequest

# Contexts kept for reuse; each is a few hundred kilobytes at full size.
CACHE_SIZE = 64


class PromptEncoder:
    """Encodes prompts, with a cache: a context does not depend on the timestep and serves later requests too.

    Attributes:
        hits, misses: prompts that were in the cache, and those that were encoded.
    """

    def __init__(self, tokenizer: PromptTokenizer, pipeline: Pipeline, prompt_dim: int) -> None:
        self._tokenizer, self._pipeline = tokenizer, pipeline
        self._prompt_dim = prompt_dim  # of the text encoder's output
        self._contexts: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def encode(self, prompt: str, truncate: bool = False, literal: bool = False) -> np.ndarray:
        """The context `[1, context_tokens, dim]` of a prompt, read-only; see `Engine.encode_prompt`."""

        def compute() -> np.ndarray:
            return self._pipeline.context(self._tokenizer(prompt, truncate=truncate, literal=literal))

        return self._cached(("text", prompt, truncate, literal), compute)

    def zeroed(self, prompt: str) -> np.ndarray:
        """The context of as many zeros as the text encoder makes numbers of a prompt; see `denoise.Prompt`."""

        def compute() -> np.ndarray:
            tokens = self._tokenizer(prompt, truncate=False, literal=False).shape[1]
            embeds = np.zeros((1, tokens, self._prompt_dim), np.float32)
            return self._pipeline.module("context_refiner")({"prompt_embeds": embeds})["context"]

        return self._cached(("zeros", prompt), compute)

    def _cached(self, key: Hashable, compute: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if key in self._contexts:
                self._contexts.move_to_end(key)
                self.hits += 1
                return self._contexts[key]
        context = compute()
        context.flags.writeable = False
        with self._lock:
            self.misses += 1
            self._contexts[key] = context
            while len(self._contexts) > CACHE_SIZE:
                self._contexts.popitem(last=False)
        return context

    def clear(self) -> None:
        """Drop all contexts, because the weights that made them have changed."""
        with self._lock:
            self._contexts.clear()

    def lengths(self, request: ResolvedRequest) -> list[int]:
        """The number of tokens of each prompt, including the chat template."""
        return [
            self._tokenizer(prompt, truncate=request.truncate_prompt, literal=request.literal_prompt).shape[1]
            for prompt in request.prompts
        ]

    def checked(self, request: ResolvedRequest) -> ResolvedRequest:
        """The request with a warning for each prompt that will be cut. Raises RequestError if one is too long."""
        cut: list[str] = []
        negatives: Sequence[str] = request.negative_prompts if request.guidance_scale > 0 else ()
        for name, texts in (("prompt", request.prompts), ("negative_prompt", negatives)):
            for text in dict.fromkeys(texts):
                kept, tokens = self._tokenizer.count(
                    text, name, truncate=request.truncate_prompt, literal=request.literal_prompt
                )
                if kept < tokens:
                    cut.append(f"{name}: was cut to {kept} of {tokens} tokens, as truncate_prompt asks")
        return dataclasses.replace(request, warnings=(*request.warnings, *cut))
