"""Names of a table's columns: the request field of each, by its name or an alias."""

from __future__ import annotations

import difflib
import functools
import unicodedata
from collections.abc import Mapping

from ..errors import RequestError
from ..request.codec import DIFFUSERS_NAMES, field_kinds
from ..request.types import GenerateRequest

# Aliases of the fields, diffusers' names included. They are compared without case, and with `_` for spaces and hyphens.
ALIASES: Mapping[str, str] = {
    **DIFFUSERS_NAMES,
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
# Ambiguous names, with advice about each.
AMBIGUOUS: Mapping[str, str] = {
    "cfg": _OTHER_SCALE,
    "cfg_scale": _OTHER_SCALE,
    "scale": "call it guidance_scale, control_scale or second_pass.scale",
    "scheduler": "call it schedule (the sigmas) or sampler (the steps between them)",
    "数量": "it may be a number of images or of goods: call it 张数 for images, or 库存 for goods",
}
# Similarity from which a column's name counts as a misspelt field: `stepz`, `promt`.
SLIP = 0.8


def field_of(column: str) -> str | None:
    """The request field of a column, `second_pass.scale` for a part of a field; None for other columns."""
    name = normalized(column)
    name = ALIASES.get(name, name)
    return name if name in field_kinds() else None


def is_own_name(column: str) -> bool:
    """Whether a column has a field's own name, not an alias."""
    return column in field_kinds()


@functools.cache
def check_extra(column: str) -> None:
    """Raise RequestError for a column whose name is ambiguous or looks like a misspelt request field."""
    kinds, name = field_kinds(), normalized(column)
    if name in AMBIGUOUS:
        raise RequestError(
            f"column {column!r}: {AMBIGUOUS[name]}; to keep it as it is, put it into --name or rename it"
        )
    slip = next(iter(difflib.get_close_matches(name, [*kinds, *ALIASES], 1, SLIP)), None)
    if slip is not None or name.partition(".")[0] in GenerateRequest.__dataclass_fields__:
        meant = "" if slip is None else f"; {slip!r} is one"
        raise RequestError(f"column {column!r}: expected a request field ({', '.join(kinds)}), or another name{meant}")


def normalized(column: str) -> str:
    """A column's name without what is not compared: case, width of characters, hyphens and spaces."""
    return "_".join(unicodedata.normalize("NFKC", column).casefold().replace("-", " ").split())
