"""Count the forms of the grammar, and check that none contains a phrasing held out for the judge.

python check_captions.py --count 200000
"""

from __future__ import annotations

import argparse
import random
import re

import grammar_en as en
import grammar_zh as zh
import phrases as P
from captions import CaptionWriter, forms
from scenes import training_scene


def signatures() -> list[re.Pattern[str]]:
    """Return a pattern per unseen phrasing that finds its words in order in any caption.

    Slots and punctuation match anything; all words before and after the slots must match.
    """
    found = []
    for kinds in P.UNSEEN.values():
        for patterns in kinds.values():
            for pattern in patterns:
                pieces = [p for p in re.split(r"\{\w+\}|[\s,，、；;:：？?。]+", pattern) if p]
                found.append(re.compile(r".*".join(re.escape(p) for p in pieces), re.IGNORECASE))
    return found


def skeleton(caption: str, names: re.Pattern[str]) -> str:
    """Return a caption without its names, so that captions of one form are equal."""
    return names.sub("#", caption.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000)
    arguments = parser.parse_args()
    rng, writer = random.Random("check"), CaptionWriter()
    patterns = signatures()
    words = [n for s in writer._subjects for n in (*s.english, *s.chinese)]
    words += [n for _, e, z in P.COLOURS.values() for n in (*e, *z)]
    words += [n for e, z in P.STYLES.values() for n in (*e, *z)]
    names = re.compile("|".join(re.escape(w.lower()) for w in sorted(words, key=len, reverse=True)))
    seen, broken = set(), []
    for _ in range(arguments.count):
        scene = training_scene(rng)
        caption = writer.write(scene, rng)
        if "{" in caption or "[" in caption:
            broken.append(caption)
        broken += [f"{caption}   <- {p.pattern}" for p in patterns if p.search(caption)]
        seen.add(skeleton(caption, names))
    for name, grammar in (("English", en), ("Chinese", zh)):
        parts = {
            "pairs": sum(forms(t) for t in grammar.PAIR),
            "words": sum(forms(t) for t in grammar.WORD + grammar.SIGN),
            "backgrounds": sum(forms(t) for t in grammar.BACKGROUND),
            "styles": sum(forms(t) for t in grammar.STYLE),
            "openers": sum(forms(t) for t in grammar.OPENERS),
        }
        print(name, parts)
    print(f"{arguments.count} captions have {len(seen)} forms without subjects, colours and styles")
    print(f"{len(broken)} captions broken or the judge's", broken[:20])
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
