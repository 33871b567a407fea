# ruff: noqa: E501, SIM905 - tables of phrases read better in long lines
"""Templates of English captions.

``[x|y|]`` is one of the alternatives, which may be nested. Slots: ``{A}`` and ``{B}`` noun
phrases, ``{c}`` a colour, ``{s}`` a style, ``{w}`` a quoted word, ``{v}`` any verb. In ``PAIR`` A has the
first place (left, top) and B the second; ``{l}`` and ``{r}`` say these places in full ("on the left"), ``{ls}``
and ``{rs}`` in short ("left"), ``{al}`` and ``{ar}`` as relations ("to the left of"), ``{li}`` and ``{ri}`` as seen
from the other ("to its left").
"""

from __future__ import annotations

OPENERS = [
    "", "", "",
    "[please |kindly |][draw|paint|sketch|make|create|generate|render|show|give|design|produce|print][ me| us|] ",
    "[a |an |one |the |][picture|image|drawing|illustration|icon|sketch|painting|graphic|sticker|print] "
    "[of|with|showing|containing|that has|that shows|depicting] ",
    "[draw|make|create|generate|paint|show me|give me|i want|i need] [a|an|one|the] "
    "[picture|image|drawing|illustration|icon|sketch] [of|with|showing|that shows] ",
    "i [want|need|would like|wish for|am looking for|want to see|would like to see] ",
    "[can|will|could|would] you [please |][draw|paint|sketch|show me|create] ",
    "[there is|here is|this is|it is|let me see|just|only|we see|you see|imagine|it shows|how about|what about] ",
    "[picture|image|drawing|prompt|scene|content|subject|object|task]: ",
]  # fmt: skip
BEFORE = ["please, ", "hello, ", "hi, ", "hey, ", "ok, ", "well, ", "now ", "next: ", "dear artist, ", "good morning, "]
AFTER = [
    ", please", " please", ", thanks", ", thank you", " if you can", " for me", " for my son", "!", ", ok?", "?", ", cheers",
    " today", " for a friend", ", as you like", " as soon as possible", ", nothing else", ", keep it simple", " this time",
]  # fmt: skip
ADJECTIVES = (
    "cute lovely nice beautiful pretty simple funny good fine neat plain single little tidy charming great perfect "
    "happy ordinary typical clean modern old famous".split()
)
VERBS = (
    "sits goes rests waits hangs lies lives comes appears is shines looks sleeps plays smiles hides belongs remains "
    "happens occurs works lands moves walks turns shows".split()
)
BACKGROUND = [
    "[on|over|against] [a|the|one|some|] [plain |solid |simple |flat |]{c} [background|backdrop|ground|canvas|surface|wall|"
    "page|sheet|field]",
    "on {c}", "on plain {c}", "over {c}", "against {c}",
    "with [a |the |]{c} [background|backdrop|ground|canvas|wall]",
    "with {c} [behind|behind it|in the back|as the background|around|around it|underneath|as backdrop]",
    "in front of [a|the] {c} [background|wall|backdrop|curtain|screen]",
    "[the |its |][background|backdrop|ground|canvas|back] [is|should be|must be|will be|being|shall be|has to be] {c}",
    "[background|backdrop|bg|ground|back|canvas][:| =| -| in| is|] {c}",
    "[a |]{c} [background|backdrop|ground|bg|canvas|wall]",
    "[make|keep|colour|paint] [the|its] [background|backdrop|back|ground] {c}",
    "{c} [behind|all around|in the background|in the back|for the background|as the background colour]",
    "[background|backdrop] [colour|color][:| is| =|] {c}", "the {c} [one|version|background|backdrop]",
    "i want [the background|the back|it] [to be |]{c}", "have the background {c}", "filled with {c}", "in a {c} room",
    "choose {c} for the [background|backdrop|rest]", "everything else [is |]{c}", "the rest [is |in |]{c}",
]  # fmt: skip
STYLE = [
    "in [the |a |]{s}", "{s}", "[drawn|painted|made|done|rendered|shown|designed] in [the |a |]{s}", "{s} [art|look|drawing|picture]",
    "[style|look][:| =| -|] {s}", "[with|using|as|of] [a |the |]{s}", "the style [is|should be|must be|will be] {s}",
    "[go for|choose|take|pick|follow|keep to] [a |the |]{s}", "i like {s}", "{s} if possible", "[want|prefer] {s}", "{s} only",
    "it [is|should be] [in |]{s}", "make it {s}",
]  # fmt: skip
# {k} is what kind of picture; {x} is what is drawn.
HEADS = [
    "[a |the |one |][{s} ]{k} [of|with|showing] {x}", "[a |the |]{k} [of|with] {x} in [the |]{s}", "{k} in {s}: {x}",
    "[a |]{k} in {s} [of|showing] {x}", "{s}: {x}", "{s} - {x}", "in {s}, {x}", "here is {s}: {x}",
]  # fmt: skip
KINDS = "picture image drawing illustration icon sketch painting graphic sticker emoji poster card".split()

PAIR = [
    "{A} {l}[,| and|;| while|, and|, with| but|. then] {B} {r}", "{B} {r}[,| and|;| while|, and|, with|.] {A} {l}",
    "{l}[:| is| there is| we see| you find|,| goes| has|] {A}[,|;| and|.|, and] {r}[:| is| there is| we see| you find|,| goes|"
    " has|] {B}",
    "{r}[:| is| there is| we see| you find|,| goes|] {B}[,|;| and|.|, and] {l}[:| is| there is| we see| you find|,| goes|] {A}",
    "{A} [is |{v} |which is |placed |seen |located |just |somewhere |]{al} {B}",
    "{B} [is |{v} |which is |placed |seen |located |just |somewhere |]{ar} {A}",
    "{al} {B}[ is| there is|,| we see| you find| {v}|:] {A}", "{ar} {A}[ is| there is|,| we see| you find| {v}|:] {B}",
    "{A}[,| and|, and| then|;] {ri}[,| is|:| there is|] {B}", "{B}[,| and|, and|;] {li}[,| is|:| there is|] {A}",
    "{A} with {B} {ri}", "{B} with {A} {li}", "{A} [has|sees|and] {B} {ri}", "{B} [has|sees|and] {A} {li}",
    "{ls}[:| =| -| is| for|] {A}[,|;| and|.| /|] {rs}[:| =| -| is| for|] {B}",
    "{rs}[:| =| -| is| for|] {B}[,|;| and|.| /|] {ls}[:| =| -| is| for|] {A}",
    "{A} ({ls})[ and|,| +| &|;] {B} ({rs})", "{B} ({rs})[ and|,| +| &|;] {A} ({ls})", "({ls}) {A}[ and|,|;] ({rs}) {B}",
    "{A} [is |]{ls}[,| and|;|, and] {B} [is |]{rs}", "{B} [is |]{rs}[,| and|;|, and] {A} [is |]{ls}",
    "{A} {v} [{l}|{ls}][,| and|;| while|, and] {B} {v} [{r}|{rs}]", "{B} {v} [{r}|{rs}][,| and|;| while|, and] {A} {v} [{l}|{ls}]",
    "the [{l1}] [one|thing|object|half|part|side|item] [is|shows|has|must be] {A}[,| and|;] the [{r1}] [one|thing|object|half|part|"
    "side|item] [is|shows|has|must be] {B}",
    "the [{r1}] [one|thing|object|half|part] [is|shows|has] {B}[,| and|;] the [{l1}] [one|thing|object|half|part] [is|shows|has] {A}",
    "{A} and {B}, the [first|former] [one |]{l}[ and the [second|latter|other] {r}|]", "{A} and {B}, the [second|latter] {r}",
    "{B} and {A}, the [first|former] [one |]{r}[ and the [second|latter|other] {l}|]", "{B} and {A}, the [second|latter] {l}",
    "two things: {A} {l}, {B} {r}", "two things: {B} {r}, {A} {l}", "[put|place|set|draw] {A} {l} and {B} {r}",
    "[put|place|set|draw] {B} {r}[ and|,] {A} {l}", "[put|place|set|draw] {A} {al} {B}", "[put|place|set|draw] {B} {ar} {A}",
    "first {A}[,| and] then[,|] {ri}, {B}", "{A}, next {B} {ri}", "both {A} and {B}, with {A2} {l}", "{B} and {A}, with {A2} {l}",
    "{A} and {B}, with {B2} {r}", "{l} i want {A}, {r} {B}", "{r} i want {B}, {l} {A}", "only {A} {v} {al} {B}",
]  # fmt: skip
PLACE = {
    "left_right": {
        "l": ["[on|at|to|in|by|along] the left[ side| hand side|-hand side| half| part| edge|]", "on the left", "at left"],
        "r": ["[on|at|to|in|by|along] the right[ side| hand side|-hand side| half| part| edge|]", "on the right", "at right"],
        "ls": ["left", "left", "left side", "on the left", "leftmost", "left-hand side", "the left", "leftwards"],
        "rs": ["right", "right", "right side", "on the right", "rightmost", "right-hand side", "the right", "rightwards"],
        "l1": ["left", "left", "left-hand", "leftmost"],
        "r1": ["right", "right", "right-hand", "rightmost"],
        "al": ["[to|on|at] the left[ side| hand|] of", "left of", "to the left of", "[beside|next to|by] and left of"],
        "ar": ["[to|on|at] the right[ side| hand|] of", "right of", "to the right of", "[beside|next to|by] and right of"],
        "li": ["[to|on|at] its left[ side| hand|]", "on the left of it", "next to it on the left", "beside it to the left"],
        "ri": ["[to|on|at] its right[ side| hand|]", "on the right of it", "next to it on the right", "beside it to the right"],
    },
    "top_bottom": {
        "l": ["[at|on|in|near] the top[ half| part| edge| side|]", "on top", "up high", "in the upper [half|part]", "above",
              "at the upper end"],
        "r": ["[at|on|in|near] the bottom[ half| part| edge| side|]", "down low", "in the lower [half|part]", "below",
              "underneath", "at the lower end"],
        "ls": ["top", "top", "above", "up", "on top", "upper half", "the top", "overhead", "upper"],
        "rs": ["bottom", "bottom", "below", "down", "underneath", "lower half", "the bottom", "beneath", "lower"],
        "l1": ["top", "upper", "topmost", "higher"],
        "r1": ["bottom", "lower", "bottommost", "lowest"],
        "al": ["above", "over", "on top of", "higher than", "above", "up above", "right above"],
        "ar": ["below", "under", "beneath", "underneath", "lower than", "below", "down below", "right below"],
        "li": ["above it", "over it", "on top of it", "higher up"],
        "ri": ["below it", "under it", "beneath it", "underneath it", "underneath", "lower down"],
    },
}  # fmt: skip
# Order alone says it: the first of a row is left, the first of a stack on top.
ORDERED = {
    "left_right": [
        "side by side[:|, in this order:| are|,] {A}[ and|, then|,] {B}", "a row of two: {A}[ and| then|,] {B}", "in a row {A}[ and|,] {B}",
        "{A} followed [on the right |]by {B}", "next to each other: {A}[,| and] {B}", "{A}, then {B} [beside it|next to it]",
        "{A} beside {B}",
    ],
    "top_bottom": [
        "stacked[:|, in this order:| are|,] {A}[ and|, then|,] {B}", "a stack of two: {A}[ and| then|,] {B}", "a column: {A}[ and|,] {B}",
        "{A}, then {B} underneath", "one over the other: {A}[,| and] {B}", "{A} resting on {B}",
    ],
}  # fmt: skip
BARE_PAIR = ["{A} and {B}", "{A}, {B}", "{A} & {B}", "{A} with {B}", "{A} + {B}", "{A} as well as {B}"]
SINGLE = [
    "{A}", "{A}", "{A}", "{A}", "{A} in the [middle|centre|center]", "{A} [alone|by itself|and no more]", "just {A}", "one thing: {A}",
    "in the [middle|centre|center] {A}", "{A} {v} in the [middle|centre|center]", "only {A}", "{A} {v}",
]  # fmt: skip
_TEXT = "[the |a |][word|text|letters|caption|writing|words|title|name|sign|label|lettering|inscription]"
_UNDER = (
    "[below|underneath|under it|below it|beneath it|beneath|at the bottom|at its foot|in the lower part|as a caption]"
)
WORD = [
    f"{{A}} [with|and|plus|over|,] {_TEXT} {{w}} {_UNDER}", f"{{A}} [with|and|,] {{w}} [written |printed |lettered |]{_UNDER}",
    f"{_TEXT} {{w}} [under|below|beneath|underneath] {{A}}", "{A} [above|over|on top of] [the |][word|text|letters|] {w}",
    "{A} [captioned|labelled|titled|named] {w}", "{A}[,|;] [text|caption|word|words|title|letters][:| =] {w}",
    "{A} [saying|that says|which says|reading|that reads] {w}", "{w} [is |][written|printed|set] [under|below|beneath] {A}",
    f"{_UNDER} {_TEXT} {{w}}, {{A}} above", "{A} [and|with] the [text|word] {w}", "write {w} [under|below] {A}",
    f"{{A}}, {_UNDER} it [says|reads] {{w}}",
]  # fmt: skip
SIGN = [
    f"{_TEXT} {{w}}", "a [sign|poster|board|banner|card|label|plate|shop sign] [that says|reading|saying|with|that reads|:] {w}",
    f"[just|only|nothing more than] {_TEXT} {{w}}", "[write|print|letter|spell] {w}", "{w} [in big letters|in large letters|as text|written large]",
    "[text|word|sign|letters|caption][:| =] {w}", f"{_TEXT} {{w}} in the [middle|centre|center]", "no [picture|drawing|object], [just|only] {w}",
    "{w}", "it [says|reads|should say] {w}", "big letters[:| saying|] {w}", "{w} [written |]in the [middle|centre|center]",
]  # fmt: skip
QUOTES = ['"{}"', '"{}"', "'{}'", "“{}”", "‘{}’", "{}", "«{}»", "*{}*"]
SEPARATORS = [", ", ", ", ", ", "; ", ". ", " - ", " | ", " / ", " -- ", " and ", ", and ", ": "]
