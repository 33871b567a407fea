"""Texts: joined, cut, searched and replaced."""

from __future__ import annotations

import json
import re
import string
from typing import Annotated, Any

from ...checks import shown
from ..graph import WorkflowError
from ..inputs import Choice, Text, Whole
from ..regex import MAX_TEXT, PatternError, run_regex
from ..registry import node
from ..run import Run
from .dynamic import AnyIn, filled, growing_node
from .logic import as_text
from .primitives import LIMIT
from .sockets import Prompt, YesNo

Line = Annotated[str, Text()]
Place = Annotated[int, Whole(-LIMIT, LIMIT)]
Count = Annotated[int, Whole(0, 100)]
# The largest width or precision in StringFormat, and the characters that JsonExtractString reads in all its tries.
MAX_WIDTH, MAX_READ = 1000, 1 << 25


@node("StringConcatenate", "STRING", category="utils/string")
def concatenate(run: Run, string_a: Prompt, string_b: Prompt, delimiter: Line = "") -> tuple[Any, ...]:
    """Two texts with another between them."""
    del run
    return (_checked(delimiter.join((string_a, string_b))),)


@node("StringSubstring", "STRING", category="utils/string")
def substring(run: Run, string: Prompt, start: Place, end: Place) -> tuple[Any, ...]:
    """The characters from a place up to another; negative places count from the end."""
    del run
    return (string[start:end],)


@node("StringLength", "INT", category="utils/string")
def length(run: Run, string: Prompt) -> tuple[Any, ...]:
    """The number of characters."""
    del run
    return (len(string),)


@node("CaseConverter", "STRING", category="utils/string")
def case(
    run: Run, string: Prompt, mode: Annotated[str, Choice(("UPPERCASE", "lowercase", "Capitalize", "Title Case"))]
) -> tuple[Any, ...]:
    """A text in capitals, without them, or with some."""
    del run
    methods = {"UPPERCASE": str.upper, "lowercase": str.lower, "Capitalize": str.capitalize, "Title Case": str.title}
    return (_checked(methods[mode](string)),)


@node("StringTrim", "STRING", category="utils/string")
def trim(run: Run, string: Prompt, mode: Annotated[str, Choice(("Both", "Left", "Right"))]) -> tuple[Any, ...]:
    """A text without white space at its ends."""
    del run
    return ({"Both": str.strip, "Left": str.lstrip, "Right": str.rstrip}[mode](string),)


@node("StringReplace", "STRING", category="utils/string")
def replace(run: Run, string: Prompt, find: Prompt, replace: Prompt) -> tuple[Any, ...]:
    """A text with every part that is `find` replaced."""
    del run
    _check_length(len(string) + string.count(find) * (len(replace) - len(find)))  # before it is made
    return (string.replace(find, replace),)


@node("StringContains", "BOOLEAN", category="utils/string")
def contains(run: Run, string: Prompt, substring: Prompt, case_sensitive: YesNo = True) -> tuple[Any, ...]:
    """Whether a text has another in it."""
    del run
    return (substring in string if case_sensitive else substring.lower() in string.lower(),)


@node("StringCompare", "BOOLEAN", category="utils/string")
def compare(
    run: Run,
    string_a: Prompt,
    string_b: Prompt,
    mode: Annotated[str, Choice(("Starts With", "Ends With", "Equal"))],
    case_sensitive: YesNo = True,
) -> tuple[Any, ...]:
    """Whether a text begins with another, ends with it, or is it."""
    del run
    if not case_sensitive:
        string_a, string_b = string_a.lower(), string_b.lower()
    if mode == "Equal":
        return (string_a == string_b,)
    return (string_a.startswith(string_b) if mode == "Starts With" else string_a.endswith(string_b),)


@node("RegexMatch", "BOOLEAN", category="utils/string")
def regex_match(
    run: Run,
    string: Prompt,
    regex_pattern: Prompt,
    case_insensitive: YesNo = True,
    multiline: YesNo = False,
    dotall: YesNo = False,
) -> tuple[Any, ...]:
    """Whether a pattern is somewhere in a text; a malformed one is nowhere, as in ComfyUI."""
    del run
    flags = _flags(case_insensitive, multiline, dotall)
    try:
        return (run_regex(regex_pattern, string, kind="match", flags=flags),)
    except PatternError:
        return (False,)


@node("RegexExtract", "STRING", category="utils/string")
def regex_extract(
    run: Run,
    string: Prompt,
    regex_pattern: Prompt,
    mode: Annotated[str, Choice(("First Match", "All Matches", "First Group", "All Groups"))],
    case_insensitive: YesNo = True,
    multiline: YesNo = False,
    dotall: YesNo = False,
    group_index: Annotated[int, Whole(0, 100)] = 1,
) -> tuple[Any, ...]:
    """The finds of a pattern or of a group of it: the first, or all in lines of their own; empty if there are none."""
    del run
    task = {"First Match": "first", "All Matches": "all", "First Group": "first", "All Groups": "every"}[mode]
    group = 0 if mode == "First Match" else group_index
    flags = _flags(case_insensitive, multiline, dotall)
    try:
        found = run_regex(regex_pattern, string, kind=task, flags=flags, group=group)
    except PatternError:
        return ("",)
    return (found if isinstance(found, str) else _checked("\n".join(found)),)


@node("RegexReplace", "STRING", category="utils/string")
def regex_replace(
    run: Run,
    string: Prompt,
    regex_pattern: Prompt,
    replace: Prompt,
    case_insensitive: YesNo = True,
    multiline: YesNo = False,
    dotall: YesNo = False,
    count: Count = 0,
) -> tuple[Any, ...]:
    r"""A text with what a pattern finds replaced; `\1` is its first group. A count of 0 replaces all."""
    del run
    flags = _flags(case_insensitive, multiline, dotall)
    try:
        return (run_regex(regex_pattern, string, kind="replace", flags=flags, replace=replace, count=count),)
    except PatternError as error:
        raise WorkflowError(
            f"regex_pattern or replace: expected a pattern of Python's re, got one with: {error}"
        ) from None


@node("JsonExtractString", "STRING", category="utils/string")
def json_value(run: Run, json_string: Prompt, key: Line) -> tuple[Any, ...]:
    """A value of the first JSON object in a text; empty if there is none."""
    del run
    decoder, left = json.JSONDecoder(), MAX_READ
    for brace in re.finditer(r"\{", json_string):
        try:
            data, _ = decoder.raw_decode(json_string, brace.start())
        except json.JSONDecodeError as error:
            left -= error.pos - brace.start() + 1
        except (ValueError, RecursionError):
            left -= len(json_string)
        else:
            value = data.get(key)
            return ("" if value is None else _checked(str(value)),)
        if left < 0:
            raise WorkflowError("json_string: expected an object of JSON, got too many braces that begin none")
    return ("",)


@growing_node("StringFormat", "STRING", category="utils/string", names=string.ascii_lowercase, least=0)
def fill_in(run: Run, f_string: Prompt = "{a}", **values: AnyIn) -> tuple[Any, ...]:
    """A text with values at `{a}` and so on, in the notation of Python's `str.format`."""
    del run
    try:
        return (_checked(_Formatter().vformat(f_string, (), filled(values))),)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise WorkflowError(
            f"f_string: expected {{a}} to {{z}} of inputs that are filled, got {shown(str(error))}"
        ) from error


class _Formatter(string.Formatter):
    """`str.format` without a way to attributes and items, and with narrow fields."""

    def __init__(self) -> None:
        self._length = 0

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """The value of a field, whose name is one letter."""
        value = kwargs[field_name]
        return (value if isinstance(value, (bool, int, float, str)) else as_text(value)), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """A value by its format."""
        if any(int(number) > MAX_WIDTH for number in re.findall(r"\d{1,9}", format_spec)) or len(format_spec) > 100:
            raise WorkflowError(f"f_string: expected a width of at most {MAX_WIDTH}, got {shown(format_spec)}")
        text = format(value, format_spec)
        self._length += len(text)
        _check_length(self._length)  # before the parts are joined
        return text


def _flags(case_insensitive: bool, multiline: bool, dotall: bool) -> int:
    given = ((re.IGNORECASE, case_insensitive), (re.MULTILINE, multiline), (re.DOTALL, dotall))
    return sum(int(flag) for flag, is_on in given if is_on)


def _check_length(count: int) -> None:
    if count > MAX_TEXT:
        raise WorkflowError(f"string: expected a text of at most {MAX_TEXT} characters, got {count}")


def _checked(text: str) -> str:
    _check_length(len(text))
    return text
