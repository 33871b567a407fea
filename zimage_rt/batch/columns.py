"""Columns of a table by name: which request field each one is, also by the names that people give them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..metadata.record import PICTURES
from ..request.types import GenerateRequest
from .cells import FILE, FLAG, NUMBER, NUMBERS, TEXT, WHOLE

# Names beside the fields' own. They are compared without case, and with `_` for spaces and hyphens.
ALIASES: Mapping[str, str] = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "提示词": "prompt",
    "正面提示词": "prompt",
    "正向提示词": "prompt",
    "负面提示词": "negative_prompt",
    "负向提示词": "negative_prompt",
    "反向提示词": "negative_prompt",
    "种子": "seed",
    "随机种子": "seed",
    "宽": "width",
    "宽度": "width",
    "高": "height",
    "高度": "height",
    "步数": "num_inference_steps",
    "采样步数": "num_inference_steps",
    "引导": "guidance_scale",
    "引导系数": "guidance_scale",
    "张数": "num_images",
    "图片数量": "num_images",
    "图像数量": "num_images",
    "图片": "image",
    "图像": "image",
    "蒙版": "mask",
    "遮罩": "mask",
    "控制图": "control_image",
    "强度": "strength",
    "采样器": "sampler",
    "调度器": "schedule",
}
_OTHER_SCALE = (
    "other programs count it from 1, where 1 is none; guidance_scale is one less, and 0 is none: subtract 1 and call "
    "it guidance_scale"
)
# Names that would be understood wrongly by somebody, and what to do about each.
AMBIGUOUS: Mapping[str, str] = {
    "cfg": _OTHER_SCALE,
    "cfg_scale": _OTHER_SCALE,
    "scale": "call it guidance_scale, control_scale or second_pass.scale",
    "scheduler": "call it schedule (the sigmas) or sampler (the steps between them)",
    "数量": "it may be a number of images or of goods: call it 张数 for images, or 库存 for goods",
}
# How alike a column's name and a field's are where one is taken for a slip of the other: `stepz`, `promt`.
SLIP = 0.8


def field_of(column: str) -> str | None:
    """The request field that a column is, `second_pass.scale` for a part of one; None if it is none."""
    name = _normalized(column)
    name = ALIASES.get(name, name)
    return name if name in column_kinds() else None


def is_own_name(column: str) -> bool:
    """Whether a column has a field's very name, not another one for it."""
    return column in column_kinds()


@functools.cache
def check_extra(column: str) -> None:
    """Raise RequestError for a column that is no request field but looks as if it were meant as one."""
    kinds, name = column_kinds(), _normalized(column)
    if name in AMBIGUOUS:
        raise RequestError(
            f"column {column!r}: {AMBIGUOUS[name]}; to keep it as it is, put it into --name or rename it"
        )
    slip = next(iter(difflib.get_close_matches(name, [*kinds, *ALIASES], 1, SLIP)), None)
    if slip is not None or name.partition(".")[0] in GenerateRequest.__dataclass_fields__:
        meant = "" if slip is None else f"; {slip!r} is one"
        raise RequestError(f"column {column!r}: expected a request field ({', '.join(kinds)}), or another name{meant}")


@functools.cache
def column_kinds() -> Mapping[str, str]:
    """What each request field that a table can hold is, by column; a part of a field of parts is `field.part`."""
    kinds: dict[str, str] = {}
    for name, hint in typing.get_type_hints(GenerateRequest).items():
        if name in PICTURES:
            kinds[name] = FILE
            continue
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                parts = typing.get_type_hints(member).items()
                kinds |= {f"{name}.{part}": kind for part, inner in parts if (kind := _kind(inner)) is not None}
        kind = _kind(hint)
        if kind is not None:
            kinds[name] = kind
    return kinds


@functools.cache
def parts_of(field: str) -> Collection[str]:
    """The parts of a field that has some, e.g. `scale` of second_pass."""
    return tuple(name.partition(".")[2] for name in column_kinds() if name.startswith(f"{field}."))


@functools.cache
def dataclass_of(field: str) -> Any:
    """What the parts of a field make."""
    hint = typing.get_type_hints(GenerateRequest)[field]
    return next(member for member in _members(hint) if dataclasses.is_dataclass(member))


def _normalized(column: str) -> str:
    return "_".join(unicodedata.normalize("NFKC", column).casefold().replace("-", " ").split())


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(hint: Any) -> str | None:
    members = _members(hint)
    for member, kind in ((str, TEXT), (bool, FLAG), (int, WHOLE), (float, NUMBER), (Sequence[float], NUMBERS)):
        if member in members:
            return kind
    return None
