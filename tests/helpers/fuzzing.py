"""Shared by the fuzz tests: seeded mutations of bytes and of JSON values, and the outcomes of an input.

A `Kind` is a sort of input. `attempt(random)` makes a damaged input, passes it to the code and returns an `Outcome`:
refused with an error of this package, or accepted and correct. It raises `Wrong` if the input was accepted and the
result differs from an independent reading of the same bytes. Any other exception is a fault as well.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import json
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zimage_rt.errors import MAX_MESSAGE, ZImageError

# Time limit of an input in seconds.
TIME_LIMIT = 20

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), "", " ", "0", "1e999", "nan", "a\0b", "\ud83d", "\U0001f431", "../../x", "/dev/null",
    "x" * 5000, [], {}, [[]], [None], ["a"], [1, 2], {"a": 1}, {"": {}},
)  # fmt: skip


class Outcome(enum.Enum):
    """Outcome of an input."""

    REFUSED = "refused with a typed error"
    TAKEN = "taken, and right"


class Wrong(AssertionError):
    """An input was accepted with a wrong result."""


class Kind:
    """A sort of input.

    Args:
        folder: an empty folder for its files.
        bundle: the bundle of zimage-nano.
    """

    #: The errors that may be raised; their messages must not be empty.
    errors: tuple[type[BaseException], ...] = (ZImageError,)
    #: Characters of a message.
    longest = MAX_MESSAGE + 10

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self.bundle = folder, bundle

    def attempt(self, rng: random.Random) -> Outcome:
        """Makes an input and passes it to the code."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run(rng)
        except self.errors as error:
            if not str(error).strip():
                raise Wrong("an error without a message") from error
            if len(str(error)) > self.longest:
                raise Wrong(f"a message of {len(str(error))} characters") from error
            return Outcome.REFUSED
        return Outcome.TAKEN

    def run(self, rng: random.Random) -> None:
        """Tries an input; raises one of `errors`, or returns if it was accepted and is correct."""
        raise NotImplementedError


def check(condition: bool, what: str) -> None:
    """Raises Wrong unless a condition is true."""
    if not condition:
        raise Wrong(what)


def generator(kind: str, seed: int) -> random.Random:
    """Random generator of an input, the same in every process."""
    return random.Random(f"{kind}:{seed}")


@contextlib.contextmanager
def time_limit(seconds: int = TIME_LIMIT) -> Iterator[None]:
    """Raises TimeoutError in the main thread after the time limit."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_inputs(name: str, tried: Kind, count: int) -> None:
    """Tries the first inputs of a kind; raises AssertionError with the number of an input with another outcome."""
    for number in range(count):
        try:
            with time_limit():
                tried.attempt(generator(name, number))
        except Exception as error:
            raise AssertionError(f"{name}, input {number}: {type(error).__name__}: {error}") from error


def mutate_bytes(rng: random.Random, content: bytes, most: int = 4) -> bytes:
    """One to `most` changes of some bytes: other, missing, doubled, moved or added ones."""
    data = bytearray(content)
    for _ in range(rng.randint(1, most)):
        where = rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 2, 4, 8, 64, 1000)), len(data) - where)
        change = rng.randrange(8)
        if change == 0 and where < len(data):
            data[where] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[where : where + size] = rng.randbytes(size)
        elif change == 2:
            data[where : where + size] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * size
        elif change == 3:
            del data[where : where + size]
        elif change == 4:
            data[where:where] = data[where : where + size]
        elif change == 5:
            del data[where:]
        elif change == 6:
            data[where:where] = rng.randbytes(rng.choice((1, 8, 100)))
        elif data:
            other = rng.randrange(len(data))
            data[where : where + size] = data[other : other + size]
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a JSON value, itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate_json(rng: random.Random, value: Any, most: int = 2) -> Any:
    """A copy of a JSON value with one to `most` of its parts replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        path = rng.choice(list(places(value)))
        if not path:
            if rng.random() < 0.1:
                return copy.deepcopy(rng.choice(STRANGE))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key, change = path[-1], rng.randrange(6)
        if change == 0:
            del parent[key]
        elif change == 1 and isinstance(parent, dict):
            parent[rng.choice(("", "extra", "\ud83d", str(key) + " ", "__class__"))] = parent.pop(key)
        elif change == 2 and isinstance(parent, dict):
            parent[rng.choice(("extra", "x" * 300, "\0"))] = copy.deepcopy(rng.choice(STRANGE))
        elif change == 3:
            parent[key] = nearly(rng, parent[key])
        elif change == 4:
            parent[key] = deep(rng.choice((5, 40, 200)))
        else:
            parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def nearly(rng: random.Random, value: Any) -> Any:
    """A value of nearly the right type."""
    if isinstance(value, bool):
        return rng.choice((int(value), str(value).lower(), None))
    if isinstance(value, int):
        small = value % 1000
        return rng.choice((value + 1, -value, float(small), small + 0.5, str(small), [value], bool(value)))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, str(value), [value], str(value)[:3], complex_text(value)))
    if isinstance(value, str):
        return rng.choice((value.upper(), value + "\0", [value], len(value), value[: len(value) // 2], "../" + value))
    if isinstance(value, list):
        return rng.choice((value * 2, value[:1], dict(enumerate(map(str, value))), str(value)))
    if isinstance(value, dict):
        return rng.choice((list(value), str(value), list(value.values())))
    return rng.choice((0, "", [], False))


def complex_text(value: float) -> str:
    """A string that complex() accepts."""
    return f"{value}+1j"


def deep(levels: int) -> Any:
    """Lists inside one another."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def to_text(rng: random.Random, value: Any) -> str:
    """JSON of anything that `mutate_json` makes; now and then nested too deep for any parser, or with a key twice."""
    text = json.dumps(value)
    if rng.random() < 0.02:
        return text.replace("[", "[" * 100_000, 1)
    if rng.random() < 0.02 and isinstance(value, dict) and value:
        return text.replace("{", "{" + json.dumps(next(iter(value))) + ": 1, ", 1)
    return text


# name → the kind, filled by the modules that define them
KINDS: dict[str, Callable[[Path, Path], Kind]] = {}


def kind(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """Register a kind under a name."""

    def register(found: type[Kind]) -> type[Kind]:
        KINDS[name] = found
        return found

    return register
