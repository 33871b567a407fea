"""The words of the captions: colours, styles, drawn words and sentence patterns.

Patterns are plain strings with slots: ``{A}`` and ``{B}`` are noun phrases, ``{bg}`` a background
phrase, ``{st}`` a style phrase, ``{c}`` a colour, ``{s}`` a style name, ``{w}`` a drawn word. The
patterns of ``UNSEEN`` are never trained on; the judge uses them to see whether the text encoder
learned the language rather than the templates.
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

SIZES: dict[str, tuple[list[str], list[str]]] = {
    "small": (
        ["small", "tiny", "little"],
        ["很小的", "小小的", "小号的", "迷你的"],
    ),
    "medium": ([], []),
    "large": (
        ["large", "big", "huge"],
        ["很大的", "大大的", "大号的", "巨大的"],
    ),
}
SIZE_NAMES: list[str] = list(SIZES)

WORDS: list[str] = [
    "你好",
    "谢谢",
    "生日快乐",
    "加油",
    "福",
    "家",
    "HELLO",
    "LOVE",
    "OK",
    "WOW",
    "HAPPY",
    "YES",
]

OPENERS_EN = [
    "", "", "", "", "a picture of ", "an image of ", "draw ", "please draw ", "show me ",
    "generate ", "i want ", "a drawing of ", "an illustration of ", "please make ", "there is ",
    "i would like ", "create an image with ", "paint ", "can you draw ", "an icon of ",
]  # fmt: skip
OPENERS_ZH = [
    "", "", "", "", "画", "请画", "帮我画", "请帮我画", "生成", "我想要", "来", "图片：", "一张图，",
    "请生成一张图片，", "画面上有", "给我画", "这里有", "做一张图：", "请给我", "画个图，",
]  # fmt: skip

BACKGROUND_EN = [
    "on a {c} background", "against a {c} backdrop", "with a {c} background", "{c} background",
    "the background is {c}", "on {c}", "with {c} behind", "{c} backdrop", "background: {c}",
    "in front of a {c} background", "over a {c} background", "on a {c} canvas",
]  # fmt: skip
BACKGROUND_ZH = [
    "{c}背景", "背景是{c}", "在{c}背景上", "{c}的背景", "底色为{c}", "{c}底", "背景为{c}", "背景{c}",
    "放在{c}的背景上", "背景用{c}", "底色是{c}的", "配{c}背景",
]  # fmt: skip
STYLE_EN = [
    "in {s}", "drawn in {s}", "{s}", "in the {s}", "{s} art", "made in {s}", "style: {s}",
]  # fmt: skip
STYLE_ZH = [
    "{s}", "用{s}画", "画成{s}", "{s}的图", "采用{s}", "风格：{s}", "以{s}绘制", "要{s}",
]  # fmt: skip

# What stands where. The scene's own order: A is left of B, or above B.
LEFT_RIGHT_EN = [
    "{A} on the left and {B} on the right", "{A} to the left of {B}", "{B} to the right of {A}",
    "left: {A}, right: {B}", "on the right {B}, on the left {A}", "{A} at left, {B} at right",
    "on the left is {A} and on the right is {B}", "{B} right of {A}", "{A} left of {B}",
    "{B} on the right side and {A} on the left side", "{A} on the left side of {B}",
    "to the right of {A} there is {B}", "to the left of {B} there is {A}",
    "{A} (left) and {B} (right)", "{B} is on the right of {A}",
]  # fmt: skip
TOP_BOTTOM_EN = [
    "{A} above {B}", "{B} below {A}", "{B} under {A}", "{A} at the top and {B} at the bottom",
    "top: {A}, bottom: {B}", "{B} beneath {A}", "{A} over {B}", "{A} on top of {B}",
    "at the bottom {B}, at the top {A}", "on the top is {A} and on the bottom is {B}",
    "above {B} there is {A}", "below {A} there is {B}", "{A} (top) and {B} (bottom)",
    "{B} underneath {A}", "{B} is under {A}",
]  # fmt: skip
WORD_EN = [
    '{A} with the word "{w}" below', '{A} above the text "{w}"', '{A} captioned "{w}"',
    "{A} and the word '{w}' underneath", '{A} with "{w}" written under it', '{A}, text: "{w}"',
    'the word "{w}" below {A}', "{A} that says {w}",
]  # fmt: skip
LEFT_RIGHT_ZH = [
    "左边是{A}，右边是{B}", "{A}在{B}的左边", "{B}在{A}的右边", "{A}在左，{B}在右", "{B}的左边是{A}",
    "{A}的右边有{B}", "左侧{A}，右侧{B}", "右边画{B}，左边画{A}", "左：{A}，右：{B}", "右边{B}，左边{A}",
    "{A}在左边，{B}在右边", "{B}位于{A}右侧", "{A}位于{B}左侧", "左面有{A}，右面有{B}",
    "{A}左边，{B}右边", "{B}在{A}右边",
]  # fmt: skip
TOP_BOTTOM_ZH = [
    "上面是{A}，下面是{B}", "{A}在{B}的上面", "{B}在{A}的下面", "{A}在上，{B}在下", "{B}的上方是{A}",
    "{A}的下方有{B}", "上方{A}，下方{B}", "下面画{B}，上面画{A}", "上：{A}，下：{B}", "顶部{A}，底部{B}",
    "{A}在上边，{B}在下边", "{B}位于{A}下方", "{A}位于{B}上方", "上边有{A}，下边有{B}", "{B}在{A}底下",
    "{A}上面，{B}下面", "{B}在{A}下面",
]  # fmt: skip
WORD_ZH = [
    "{A}，下面写着“{w}”", "{A}和文字「{w}」", "{A}，配字“{w}”", "{A}，文字：{w}", "{A}下方有“{w}”的字",
    "“{w}”写在{A}下面", "{A}，下面的字是「{w}」", "写着{w}的{A}",
]  # fmt: skip

# How the parts stand together. {x} is what is drawn, {o} an opener.
FRAMES_EN = [
    "{o}{x} {bg} {st}", "{o}{x} {st} {bg}", "{o}{x}, {bg}, {st}", "{o}{x}, {st}, {bg}",
    "{bg}, {o}{x}, {st}", "{st}, {o}{x}, {bg}", "{x}. {bg}. {st}.", "{st}: {x}, {bg}",
    "{bg}, {st}, {x}", "{o}{x} {bg}, {st}", "{st}, {bg}: {o}{x}", "{o}{x}; {bg}; {st}",
]  # fmt: skip
FRAMES_ZH = [
    "{o}{x}，{bg}，{st}", "{o}{x}，{st}，{bg}", "{bg}，{o}{x}，{st}", "{st}，{o}{x}，{bg}",
    "{x}。{bg}。{st}。", "{st}，{bg}，{x}", "{bg}，{st}，{o}{x}", "{o}{x}，{bg}{st}", "{st}：{x}，{bg}",
    "{o}{x}，{st}{bg}", "{bg}，{x}，{st}", "{o}{x}；{bg}；{st}",
]  # fmt: skip

# Never trained on: kind → language → patterns that hold the whole caption.
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
