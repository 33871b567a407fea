"""A small grammar that says a scene in Chinese, English or both, in many phrasings."""

from __future__ import annotations

import random
import re

import phrases as P
from scenes import Scene, Subject, all_subjects, subjects

LANGUAGES = ["zh", "en", "mixed"]
LANGUAGE_SHARES = [0.45, 0.40, 0.15]
STYLE_LEFT_OUT = 0.12  # then the scene must be in the first style
SPACED_CHINESE = 0.15
CHATTER = 0.2  # captions with words that mean nothing here, to be ignored
_PATTERNS = {
    "left_right": {"en": P.LEFT_RIGHT_EN, "zh": P.LEFT_RIGHT_ZH},
    "top_bottom": {"en": P.TOP_BOTTOM_EN, "zh": P.TOP_BOTTOM_ZH},
    "word": {"en": P.WORD_EN, "zh": P.WORD_ZH},
}
_PLURAL_EXCEPTIONS = ("bus", "glass", "cactus", "dress", "octopus", "cross")
_CJK = r"[\u3400-\u9fff]"


def _noun_en(rng: random.Random, name: str, size: str | None) -> str:
    """Return a noun phrase: determiner, size, name."""
    plural = name.endswith("s") and not name.endswith(_PLURAL_EXCEPTIONS)
    words = f"{size} {name}" if size else name
    roll = rng.random()
    if roll < 0.12:
        return words
    if roll < 0.2:
        return f"the {words}"
    if plural:
        return f"some {words}"
    if roll < 0.28:
        return f"one {words}"
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def _noun_zh(rng: random.Random, name: str, measure: str, size: str | None) -> str:
    """Return a noun phrase: numeral and measure word, size, name."""
    roll = rng.random()
    head = ""
    if roll > 0.35:
        head = "一" + (measure if rng.random() > 0.12 else "个")
    elif roll > 0.31:
        head = "1" + measure
    return f"{head}{size or ''}{name}"


class CaptionWriter:
    """Writes captions of scenes; every choice comes from the generator that is passed in."""

    def __init__(self) -> None:
        self._subjects = subjects()
        self._colours = [P.COLOURS[n] for n in P.COLOUR_NAMES]
        self._styles = [P.STYLES[n] for n in P.STYLE_NAMES]
        self._sizes = [P.SIZES[n] for n in P.SIZE_NAMES]

    def _noun(self, rng: random.Random, subject: Subject, frame: str, lang: str, size: int) -> str:
        """Name a subject in ``lang`` so that it fits a sentence in ``frame``."""
        english, chinese = self._sizes[size]
        adjective_lang = frame if frame != lang else lang
        adjectives = english if adjective_lang == "en" else chinese
        adjective = rng.choice(adjectives) if adjectives else None
        name = rng.choice(subject.english if lang == "en" else subject.chinese)
        if frame == "en":
            return _noun_en(rng, name, adjective)
        if lang == "en":
            name = f" {name} "
        return _noun_zh(rng, name, subject.measure, adjective)

    def write(
        self,
        scene: Scene,
        rng: random.Random,
        language: str | None = None,
        unseen: bool = False,
        say_all: bool = False,
    ) -> str:
        """Say the scene. ``unseen`` uses the phrasings kept from training; ``say_all`` leaves
        nothing out (the style may otherwise be left out when it is the first one)."""
        language = language or rng.choices(LANGUAGES, LANGUAGE_SHARES)[0]
        frame = rng.choice(["zh", "en"]) if language == "mixed" else language

        def pick() -> str:
            return frame if language != "mixed" else rng.choice(["zh", "en"])

        style_lang, colour_lang = pick(), pick()
        style = rng.choice(self._styles[scene.style][0 if style_lang == "en" else 1])
        colour = rng.choice(self._colours[scene.colour][1 if colour_lang == "en" else 2])
        noun_a = self._noun(rng, self._subjects[scene.a], frame, pick(), scene.size)
        slots = {"A": noun_a, "c": colour, "s": style}
        if scene.b >= 0:
            slots["B"] = self._noun(rng, self._subjects[scene.b], frame, pick(), scene.size)
        kind = scene.layout_name
        if unseen:
            return self._finish(rng.choice(P.UNSEEN[kind][frame]).format(**slots), rng, frame, True)
        if scene.word >= 0:
            slots["w"] = P.WORDS[scene.word]
        drawn = rng.choice(_PATTERNS[kind][frame]).format(**slots) if kind in _PATTERNS else noun_a
        backgrounds = P.BACKGROUND_EN if frame == "en" else P.BACKGROUND_ZH
        styles = P.STYLE_EN if frame == "en" else P.STYLE_ZH
        if rng.random() < CHATTER:
            drawn = self._interrupt(drawn, rng, frame)
        left_out = scene.style == 0 and not say_all and rng.random() < STYLE_LEFT_OUT
        text = rng.choice(P.FRAMES_EN if frame == "en" else P.FRAMES_ZH).format(
            o=rng.choice(P.OPENERS_EN if frame == "en" else P.OPENERS_ZH),
            x=drawn,
            bg=rng.choice(backgrounds).format(c=colour),
            st="" if left_out else rng.choice(styles).format(s=style),
        )
        return self._finish(text, rng, frame, False)

    def _interrupt(self, text: str, rng: random.Random, frame: str) -> str:
        """Put made-up words before or after ``text``: people say more than a scene holds."""
        if frame == "en":
            syllables = [rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(6)]
            noise = " ".join("".join(syllables[i : i + 2]) for i in range(0, rng.choice([2, 4, 6]), 2))
            return rng.choice([f"{noise} {text}", f"{text} {noise}", f"{text}, {noise}"])
        noise = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(rng.randrange(1, 4)))
        return rng.choice([f"{noise}{text}", f"{text}，{noise}", f"{noise}，{text}"])

    def _finish(self, text: str, rng: random.Random, frame: str, plain: bool) -> str:
        """Vary case, punctuation and spaces, and tidy what an empty slot left behind."""
        text = re.sub(r"\s+", " ", text)
        text = re.sub(r"([，。；：,;:.、]) ?(?=[，。；：,;.、])", "", text)
        text = text.strip(" ，；：,;:、")
        if frame == "en":
            text = re.sub(r" ([,;:.])", r"\1", text)
            if rng.random() < 0.4:
                text = text[0].upper() + text[1:]
            if rng.random() < 0.25 and text[-1].isalnum():
                text += "."
            return text
        # Chinese beside Latin letters is written with a space, without one, or anyhow.
        if rng.random() < 0.5:
            text = re.sub(rf" (?={_CJK})|(?<={_CJK}) ", "", text)
        if not plain:
            roll = rng.random()
            if roll < 0.12:
                text = text.replace("，", ",").replace("。", ".").replace("：", ":")
            elif roll < 0.22:
                text = re.sub("[，；]", " ", text)
            if rng.random() < SPACED_CHINESE:
                text = re.sub(r"(?<=[，。；：,])(?=\S)", " ", text)
            if rng.random() < 0.2 and text[-1].isalnum():
                text += "。"
        return re.sub(r" ?([，。；：]) ?", r"\1", text) if rng.random() < 0.7 else text


def vocabulary() -> list[str]:
    """Return the pieces that captions are made of, for the tokenizer to learn from.

    Chinese is written without spaces, and the byte-level BPE sees a run of it as one word. Trained
    on whole captions, it would merge across words and make tokens of our templates. Trained on
    the pieces, its merges stay inside words, and a new phrasing splits like the known ones.
    """
    pieces: list[str] = []
    for subject in all_subjects():
        pieces += list(subject.english) * 4
        pieces += [f" {word}" for name in subject.english for word in name.split()] * 4
        pieces += list(subject.chinese) * 6
    for _, english, chinese in P.COLOURS.values():
        pieces += (english + [f" {e}" for e in english] + chinese) * 8
    for english, chinese in list(P.STYLES.values()) + list(P.SIZES.values()):
        pieces += ([f" {word}" for e in english for word in e.split()] + chinese) * 8
    pieces += P.WORDS * 4
    for table in (
        P.OPENERS_EN, P.BACKGROUND_EN, P.STYLE_EN, P.LEFT_RIGHT_EN, P.TOP_BOTTOM_EN, P.WORD_EN
    ):  # fmt: skip
        for pattern in table:
            for word in re.sub(r"\{\w+\}", " ", pattern).split():
                pieces += [word, f" {word}"] * 4
    for table in (
        P.OPENERS_ZH, P.BACKGROUND_ZH, P.STYLE_ZH, P.LEFT_RIGHT_ZH, P.TOP_BOTTOM_ZH, P.WORD_ZH
    ):  # fmt: skip
        for pattern in table:
            pieces += re.findall(rf"{_CJK}{{1,2}}", re.sub(r"\{\w+\}", " ", pattern)) * 4
    # Every character alone, so that a name met inside an unknown word is still spelt in characters.
    characters = sorted({c for piece in pieces for c in piece if re.match(_CJK, c)})
    measures = sorted({subject.measure for subject in all_subjects()})
    return pieces + (characters + measures + list("，。；：、“”「」？！（）一两三")) * 4
