"""A grammar that describes scenes in Chinese, English or both, in very many phrasings."""

from __future__ import annotations

import functools
import random
import re

import grammar_en as en
import grammar_zh as zh
import phrases as P
from scenes import Scene, Subject, all_subjects, subjects
from spelling import HAN

LANGUAGES = ["zh", "en", "mixed"]
LANGUAGE_SHARES = [0.45, 0.40, 0.15]
STYLE_LEFT_OUT = 0.12  # then the scene must be in the first style
COLOUR_LEFT_OUT = 0.3  # then the background must be white
PLACE_LEFT_OUT = 0.05  # then a pair stands side by side in the order in which it is named
ORDER_ALONE = 0.08  # "side by side: …", "stacked: …"
SIGN_STYLE_SAID = 0.2
# In loose captions, whose omitted properties may have any value.
LOOSE_STYLE_LEFT_OUT = 0.4
LOOSE_COLOUR_LEFT_OUT = 0.4
LOOSE_SUBJECT_LEFT_OUT = 0.15  # of a single drawing
CHATTER = 0.22  # clauses with words that mean nothing here, to be ignored
ADJECTIVE = 0.12
SPACED_CHINESE = 0.12
_PLURAL_EXCEPTIONS = ("bus", "glass", "cactus", "dress", "octopus", "cross")
_CJK = r"[\u3400-\u9fff]"
_WHITE = P.COLOUR_NAMES.index("white")
_GRAMMARS = {"en": en, "zh": zh}
Parsed = list  # of strings and of lists of alternatives, each parsed


@functools.cache
def parse(template: str) -> Parsed:
    """Read ``[x|y]`` groups, which may be nested."""
    stack: list[list[Parsed]] = [[[]]]
    for piece in re.split(r"([\[\]|])", template):
        if piece == "[":
            stack.append([[]])
        elif piece == "|" and len(stack) > 1:
            stack[-1].append([])
        elif piece == "]":
            group = stack.pop()
            stack[-1][-1].append(group)
        elif piece:
            stack[-1][-1].append(piece)
    if len(stack) != 1:
        raise ValueError(f"unbalanced template {template!r}")
    return stack[0][0]


def expand(template: str, rng: random.Random) -> str:
    """Choose one alternative of every group; slots stay."""
    out: list[str] = []

    def walk(parts: Parsed) -> None:
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            else:
                walk(part[int(rng.random() * len(part))])

    walk(parse(template))
    return "".join(out)


def forms(template: str) -> int:
    """Count the expansions of a template, without filling slots."""

    def count(parts: Parsed) -> int:
        total = 1
        for part in parts:
            if not isinstance(part, str):
                total *= sum(count(option) for option in part)
        return total

    return count(parse(template))


def made_up(rng: random.Random, frame: str) -> str:
    """Return made-up words, which no scene contains."""
    if frame == "en":
        words = [
            "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.choice([1, 2, 2, 3])))
            for _ in range(rng.choice([1, 2, 3]))
        ]
        return " ".join(words)
    return "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(rng.randrange(1, 4)))


def _noun_en(rng: random.Random, name: str) -> str:
    """Return a noun phrase: determiner, maybe an irrelevant adjective, name."""
    plural = name.endswith("s") and not name.endswith(_PLURAL_EXCEPTIONS)
    words = f"{rng.choice(en.ADJECTIVES)} {name}" if rng.random() < ADJECTIVE else name
    roll = rng.random()
    if roll < 0.14:
        return words
    if roll < 0.24:
        return f"{rng.choice(['the', 'the', 'this', 'my', 'our', 'that'])} {words}"
    if plural:
        return f"some {words}"
    if roll < 0.30:
        return f"one {words}"
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def _noun_zh(rng: random.Random, name: str, measure: str) -> str:
    """Return a noun phrase: numeral and measure word, maybe an adjective, name."""
    roll = rng.random()
    head = ""
    if roll > 0.4:
        head = "一" + (measure if rng.random() > 0.15 else "个")
    elif roll > 0.36:
        head = "1" + measure
    elif roll > 0.31:
        head = rng.choice(["这", "那"]) + measure
    elif roll > 0.27:
        head = measure
    return f"{head}{rng.choice(zh.ADJECTIVES) if rng.random() < ADJECTIVE else ''}{name}"


class CaptionWriter:
    """Writes captions of scenes; every choice comes from the generator that is passed in."""

    def __init__(self) -> None:
        self._subjects = subjects()
        self._colours = [P.COLOURS[n] for n in P.COLOUR_NAMES]
        self._styles = [P.STYLES[n] for n in P.STYLE_NAMES]

    def write(
        self,
        scene: Scene,
        rng: random.Random,
        language: str | None = None,
        unseen: bool = False,
        say_all: bool = False,
        loose: bool = False,
    ) -> str:
        """Describe a scene. ``unseen`` uses held-out phrasings; ``say_all`` also names properties with
        their default value; ``loose`` also omits properties that have no default."""
        language = language or rng.choices(LANGUAGES, LANGUAGE_SHARES)[0]
        frame = rng.choice(["zh", "en"]) if language == "mixed" else language
        mixed = language == "mixed"

        def pick() -> str:
            return rng.choice(["zh", "en"]) if mixed else frame

        slots = {
            "s": rng.choice(self._styles[scene.style][0 if pick() == "en" else 1]),
            "c": rng.choice(self._colours[scene.colour][1 if pick() == "en" else 2]),
        }
        if unseen:
            for slot, number in (("A", scene.a), ("B", scene.b)):
                slots[slot] = self._noun(rng, number, frame, pick())
            pattern = rng.choice(P.UNSEEN[scene.layout_name][frame])
            return self._finish(pattern.format(**slots), rng, frame, True)
        # Whole clauses may be in the other language too.
        clause = pick if mixed and rng.random() < 0.5 else lambda: frame
        drawn_frame = clause()
        drawn = self._drawn(scene, rng, drawn_frame, pick, say_all)
        opener = self._fill(rng.choice(_GRAMMARS[drawn_frame].OPENERS), rng, slots)
        if loose:
            colourless, unsaid = rng.random() < LOOSE_COLOUR_LEFT_OUT, rng.random() < LOOSE_STYLE_LEFT_OUT
        else:
            colourless = scene.colour == _WHITE and not say_all and rng.random() < COLOUR_LEFT_OUT
            unsaid = scene.style == 0 and not say_all and rng.random() < STYLE_LEFT_OUT
        parts = [] if colourless else [self._fill(rng.choice(_GRAMMARS[clause()].BACKGROUND), rng, slots)]
        if scene.a < 0:
            unsaid = rng.random() >= SIGN_STYLE_SAID
        nothing = colourless and unsaid
        if loose and not nothing and scene.layout_name == "single" and rng.random() < LOOSE_SUBJECT_LEFT_OUT:
            style = [] if unsaid else [self._fill(rng.choice(_GRAMMARS[clause()].STYLE), rng, slots)]
            first, *rest = parts + style
            return self._finish(self._join(first, rest, rng, frame), rng, frame, False)
        if not unsaid and rng.random() < 0.2:
            grammar = _GRAMMARS[drawn_frame]
            pattern = rng.choice(grammar.HEADS)
            drawn = self._fill(pattern, rng, slots | {"x": drawn, "k": rng.choice(grammar.KINDS)})
            opener = opener if rng.random() < 0.3 else ""
        elif not unsaid:
            parts.append(self._fill(rng.choice(_GRAMMARS[clause()].STYLE), rng, slots))
        text = self._join(opener + drawn, parts, rng, frame)
        return self._finish(text, rng, frame, False, scene.text)

    def _noun(self, rng: random.Random, number: int, frame: str, lang: str) -> str:
        """Name a subject in ``lang`` so that it fits a sentence in ``frame``."""
        if number < 0:
            return ""
        subject: Subject = self._subjects[number]
        name = rng.choice(subject.english if lang == "en" else subject.chinese)
        if frame == "en":
            return _noun_en(rng, name)
        return _noun_zh(rng, f" {name} " if lang == "en" else name, subject.measure)

    def _fill(self, template: str, rng: random.Random, slots: dict[str, str]) -> str:
        """Expand a template and put the slots in."""
        text = expand(template, rng)
        for _ in range(2):  # a place may hold a group, a head the style
            for name, value in slots.items():
                text = text.replace(f"{{{name}}}", value)
        return text

    def _drawn(self, scene: Scene, rng: random.Random, frame: str, pick, say_all: bool) -> str:
        """Describe the drawings and their places."""
        grammar, kind = _GRAMMARS[frame], scene.layout_name
        slots: dict[str, str] = {}
        if scene.a >= 0:
            slots["A"] = self._noun(rng, scene.a, frame, pick())
        if scene.b >= 0:
            slots["B"] = self._noun(rng, scene.b, frame, pick())
        slots["v"] = rng.choice(en.VERBS) if rng.random() < 0.7 else made_up(rng, "en").split()[0]
        slots["x1"] = chr(rng.randrange(0x4E00, 0x9FA0))
        if kind in ("left_right", "top_bottom"):
            slots["A2"], slots["B2"] = "the first", "the second"
            roll = rng.random()
            if kind == "left_right" and scene.canvas == 0 and roll < PLACE_LEFT_OUT and not say_all:
                pattern = rng.choice(grammar.BARE_PAIR)
            elif PLACE_LEFT_OUT < roll < PLACE_LEFT_OUT + ORDER_ALONE:
                pattern = rng.choice(grammar.ORDERED[kind])
            else:
                pattern = rng.choice(grammar.PAIR)
            slots |= {k: expand(rng.choice(v), rng) for k, v in grammar.PLACE[kind].items()}
        elif kind == "single":
            pattern = rng.choice(grammar.SINGLE)
        else:
            quotes = rng.choice(grammar.QUOTES)
            slots["w"] = quotes.format(scene.text)
            pattern = rng.choice(grammar.WORD if kind == "word" else grammar.SIGN)
        return self._fill(pattern, rng, slots)

    def _join(self, drawn: str, parts: list[str], rng: random.Random, frame: str) -> str:
        """Join the clauses in random order, with separators, and with chatter around them."""
        grammar = _GRAMMARS[frame]
        if frame == "en" and rng.random() < 0.35:  # "a cat on a red background in flat style"
            rng.shuffle(parts)
            texts = [" ".join([drawn, *parts])]
        else:
            texts = [drawn, *parts]
            rng.shuffle(texts)
        if rng.random() < CHATTER:
            texts.insert(rng.randrange(len(texts) + 1), made_up(rng, frame))
        if rng.random() < 0.6:
            text = rng.choice(grammar.SEPARATORS).join(texts)
        else:
            text = "".join(t + rng.choice(grammar.SEPARATORS) for t in texts[:-1]) + texts[-1]
        if rng.random() < 0.12:
            text = rng.choice(grammar.BEFORE) + text
        if rng.random() < 0.15:
            text += rng.choice(grammar.AFTER)
        return text

    def _finish(self, text: str, rng: random.Random, frame: str, plain: bool, word: str = "") -> str:
        """Vary case, punctuation and spaces, and clean up around empty slots."""
        text = re.sub(r"\s+", " ", text)
        text = re.sub(r"([，。；：,;:.、]) ?(?=[，。；：,;.、])", "", text)
        text = text.strip(" ，；：,;:、-|/")
        if frame == "en":
            text = re.sub(r" ([,;:.!?])", r"\1", text)
            roll = rng.random()
            if roll < 0.36:
                text = text[0].upper() + text[1:]
            elif not plain and not word and roll < 0.40:
                text = text.title()
            elif not plain and not word and roll < 0.42 and len(text) < 46:
                text = text.upper()
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
            elif roll < 0.26:
                text = re.sub("[，；。：、]", "", text)
            if rng.random() < SPACED_CHINESE:
                text = re.sub(r"(?<=[，。；：,])(?=\S)", " ", text)
            if rng.random() < 0.2 and text[-1].isalnum():
                text += "。"
        return re.sub(r" ?([，。；：]) ?", r"\1", text) if rng.random() < 0.7 else text


def _templates(grammar) -> list[str]:
    """Return every template string of a grammar."""
    found: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif isinstance(value, list):
            for item in value:
                walk(item)

    for name in vars(grammar):
        if name.isupper():
            walk(getattr(grammar, name))
    return found


def vocabulary() -> list[str]:
    """Return the vocabulary of captions, on which the tokenizer is trained.

    On whole captions, the BPE would learn tokens of our templates. On English words and single
    Chinese characters, new phrasings split like known ones. Capitals are separate, so that words
    in quotes are spelt letter by letter.
    """
    english: list[str] = []
    chinese: set[str] = set(HAN)
    for subject in all_subjects():
        english += [word for name in subject.english for word in name.split()] * 2
        chinese |= set("".join(subject.chinese) + subject.measure)
    for _, names, others in P.COLOURS.values():
        english += [word for name in names for word in name.split()] * 4
        chinese |= set("".join(others))
    for names, others in P.STYLES.values():
        english += [word for name in names for word in name.split()] * 4
        chinese |= set("".join(others))
    for template in _templates(en):
        english += re.findall(r"[A-Za-z'-]+", re.sub(r"\{\w+\}", " ", template)) * 2
    for template in _templates(zh):
        chinese |= set(re.findall(_CJK, template))
    pieces: list[str] = []
    for word in english:
        for part in re.findall(r"[a-z]+", word):
            pieces += [part] * 2 + [f" {part}"] * 4
    pieces += sorted(c for c in chinese if re.match(_CJK, c)) * 8
    return pieces + list("，。；：、“”‘’「」『』《》【】«»？！（）—ABCDEFGHIJKLMNOPQRSTUVWXYZ") * 8
