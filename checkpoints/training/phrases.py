"""Names of colours and styles, and the phrasings that only the judge uses.

The patterns of ``UNSEEN`` are plain strings with slots: ``{A}`` and ``{B}`` are noun phrases, ``{c}``
a colour, ``{s}`` a style. They are never trained on; the judge uses them to test whether the text
encoder learned the language instead of the templates. ``check_captions.py`` verifies that the grammar
of ``grammar_en.py`` and ``grammar_zh.py`` does not contain them.
"""

from __future__ import annotations

# name: (sRGB, English names, Chinese names)
COLOURS: dict[str, tuple[tuple[int, int, int], list[str], list[str]]] = {
    "red": ((214, 48, 49), ["red", "bright red"], ["红色", "红", "大红色"]),
    "orange": ((243, 146, 55), ["orange"], ["橙色", "橘色", "橙黄色"]),
    "yellow": ((250, 219, 80), ["yellow"], ["黄色", "黄"]),
    "green": ((70, 170, 90), ["green"], ["绿色", "绿"]),
    "cyan": ((64, 200, 205), ["cyan", "turquoise", "teal"], ["青色", "蓝绿色"]),
    "blue": ((58, 110, 220), ["blue"], ["蓝色", "蓝"]),
    "purple": ((140, 80, 190), ["purple", "violet"], ["紫色", "紫"]),
    "pink": ((247, 160, 190), ["pink"], ["粉色", "粉红色"]),
    "brown": ((130, 85, 55), ["brown"], ["棕色", "褐色", "咖啡色"]),
    "black": ((24, 24, 26), ["black"], ["黑色", "黑"]),
    "white": ((250, 250, 250), ["white", "plain white"], ["白色", "白", "纯白色"]),
    "grey": ((150, 152, 155), ["grey", "gray"], ["灰色", "灰"]),
}
COLOUR_NAMES: list[str] = list(COLOURS)

STYLES: dict[str, tuple[list[str], list[str]]] = {
    "noto": (
        ["noto style", "classic emoji style", "classic style"],
        ["诺托风格", "经典风格", "经典表情风格"],
    ),
    "flat": (
        ["flat style", "fluent flat style", "flat vector style"],
        ["扁平风格", "扁平化风格", "平面风格"],
    ),
}
STYLE_NAMES: list[str] = list(STYLES)

# Never trained on: kind → language → patterns of whole captions.
UNSEEN: dict[str, dict[str, list[str]]] = {
    "single": {
        "en": [
            "could you make me {A}? use a {c} background and {s}, thanks",
            "{s}, and nothing but {A} in front of something {c}",
            "my daughter would love {A}, all {c} behind it, {s} please",
        ],
        "zh": [
            "能不能来张{A}的图？背景要{c}的，{s}就好",
            "想看{A}，后面全是{c}，{s}，谢谢",
            "麻烦用{s}给我做{A}，底下衬{c}",
        ],
    },
    "left_right": {
        "en": [
            "{A} stands left, {B} stands right, everything {c} behind, {s}",
            "from left to right: {A}, then {B}; {s}; {c} background",
        ],
        "zh": [
            "从左到右依次是{A}、{B}，{c}的底，{s}",
            "{s}，{c}背景，{A}靠左，{B}靠右",
        ],
    },
    "top_bottom": {
        "en": [
            "{A} floats above and {B} stays below, {c} behind them, {s}",
            "from top to bottom: {A}, then {B}; {s}; {c} background",
        ],
        "zh": [
            "从上到下依次是{A}、{B}，{c}的底，{s}",
            "{s}，{c}背景，{A}靠上，{B}靠下",
        ],
    },
}
