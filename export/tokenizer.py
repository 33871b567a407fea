"""Finds the tokenizer's file, and reduces the chat template to the text around a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import read_json
from .errors import CheckpointError

_SENTINEL = "\u2063zimage-prompt\u2063"


def tokenizer_file(folder: Path) -> Path:
    """Path of `tokenizer.json`. Raises CheckpointError: there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; name a folder that has it as `tokenizer` under [parts] "
            "(ComfyUI's single files have none)"
        )
    return path


def chat_template(folder: Path) -> tuple[str, str]:
    """(prefix, suffix) of the chat template around a prompt, as `ZImagePipeline._encode_prompt` renders it.

    Raises CheckpointError: the template is missing or fails.
    """
    import jinja2.sandbox

    file = folder / "chat_template.jinja"
    if file.is_file():
        template: Any = file.read_text(encoding="utf-8")
    else:
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{folder}: the tokenizer has no chat template")
    # As transformers renders chat templates (`utils/chat_template_utils.py`).
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        text = environment.from_string(template).render(
            messages=[{"role": "user", "content": _SENTINEL}],
            add_generation_prompt=True,
            enable_thinking=True,
        )
    except jinja2.TemplateError as error:
        raise CheckpointError(f"{folder}: the chat template fails: {error}") from error
    prefix, found, suffix = text.partition(_SENTINEL)
    if not found:
        raise CheckpointError(f"{folder}: the chat template drops the user's message")
    return prefix, suffix
