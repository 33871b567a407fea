"""Nodes of logic, numbers and texts, against Python's values, and the bounds of what a stranger may ask for."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from zimage_rt.comfyui import expression, regex
from zimage_rt.comfyui.execute import execute
from zimage_rt.comfyui.expression import evaluate
from zimage_rt.comfyui.files import FolderFiles
from zimage_rt.comfyui.graph import WorkflowError
from zimage_rt.comfyui.nodes import logic
from zimage_rt.comfyui.plan import plan
from zimage_rt.comfyui.registry import NODES
from zimage_rt.comfyui.resize import MAX_NUMBERS
from zimage_rt.comfyui.run import Events, Run, Said
from zimage_rt.comfyui.values import Latent
from zimage_rt.comfyui.workflow_file import parse_workflow


def no_engine(bundle: str) -> Any:
    raise AssertionError(bundle)


RUN = Run(no_engine, FolderFiles({}, None, None, ()))


def call(name: str, **inputs: Any) -> Any:
    """The first output of a node; inputs with a dot are given with two underscores."""
    given = {key.replace("__", "."): value for key, value in inputs.items()}
    return NODES[name].function(RUN, **given)[0]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": {key.replace("__", "."): value for key, value in inputs.items()}}


def shown_texts(graph: dict[str, Any], events: Events | None = None) -> list[str]:
    run = Run(no_engine, FolderFiles({}, None, None, ()), events)
    execute(plan(parse_workflow(graph), run.files), run)
    return [each.text for each in run.shown if isinstance(each, Said)]


# --- logic ------------------------------------------------------------------------------------------------------------


class Begun(Events):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def begins(self, node: str) -> None:
        self.kinds.append(node)


@pytest.mark.parametrize(("value", "text"), [(False, "no"), (True, "yes")])
def test_only_the_branch_that_is_taken_runs(value: bool, text: str) -> None:
    graph = {
        "flag": node("PrimitiveBoolean", value=value),
        "no": node("PrimitiveString", value="no"),
        "yes": node("PrimitiveString", value="yes"),
        "switch": node("ComfySwitchNode", switch=["flag", 0], on_false=["no", 0], on_true=["yes", 0]),
        "text": node("StringConcatenate", string_a=["switch", 0], string_b="!", delimiter=""),
        "out": node("PreviewAny", source=["text", 0]),
    }
    begun = Begun()
    assert shown_texts(graph, begun) == [f"{text}!"]
    assert text in begun.kinds and ("yes" if text == "no" else "no") not in begun.kinds


def test_values_are_true_as_in_python() -> None:
    assert call("ComfyNotNode", value="") and not call("ComfyNotNode", value=0.1)
    assert call("ComfyAndNode", values__value0=1, values__value1="x") is True
    assert call("ComfyAndNode", values__value0=1, values__value1=0) is False
    assert call("ComfyOrNode", values__value0=0, values__value1="") is False
    assert call("ComfyOrNode", values__value0=0, values__value9=2) is True
    assert logic.pass_or_none(RUN, None, 5) == (5, False) and logic.pass_or_none(RUN) == (None, True)
    assert logic.combo(RUN, "9:16", 1) == ("9:16", 1)
    with pytest.raises(WorkflowError, match="expected a number, a text or yes or no, got 4 numbers"):
        call("ComfyNotNode", value=np.zeros((1, 2, 2)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "a\nb"),
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        (10**20, "1" + "0" * 20),
        ({"a": [1, "ü"]}, '{\n    "a": [\n        1,\n        "\\u00fc"\n    ]\n}'),
        (Latent(np.zeros((1, 16, 2, 2), np.float32)), "<Latent>"),
    ],
)
def test_values_are_shown_as_texts(value: Any, text: str) -> None:
    assert logic.as_text(value) == text


def test_arrays_are_shown_shortly() -> None:
    text = logic.as_text(np.zeros((1, 512, 512, 3), np.float32))
    assert text.startswith("1x512x512x3 numbers:\n[[[[0. 0. 0.]") and len(text) < 2000


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # From ComfyUI's templates.
        ("a > 2048", False),
        ("a & ~1", 46),
        ("a & -8", 40),
        ("floor(a/32)*32", 32),
        ("max(((a + 15) // 16) * 16, 256)", 256),
        ("ceil(1.5 * log2(max(a, b))) + 2", 11),
        ("a % b if b > 0 else 0", 47 % 1.5),
        ("(a % 4 == 3) and ((b - 1) % 4 == 0.5)", True),
        ("max(5, round(a * 24)) + (5 - (max(5, round(a * 24)) % 17)) % 17", 1144),
        ("max(4, (int(a) // 16) * 16)", 32),
        # The rest of the syntax.
        (" -a + +b ", -45.5),
        ("2 ** 0.5 * 2 ** -1", math.sqrt(2) / 2),
        ("not a or b", 1.5),
        ("a and 0", 0),
        ("1 < b < 2 != a", True),
        ("sum(values) + sum(1, 2) + values[0] + values[-1]", 48.5 + 3 + 48.5),
        ("a in values and 3 not in values", True),
        ("min(values) + pow(2, 10) + abs(-3) + sqrt(16)", 1.5 + 1024 + 3 + 4),
        ("round(b * 1.23456, 2) + log(8, 2) + log10(1000)", 1.85 + 3 + 3),
        ("1 << 4 | 1 ^ 3", 18),
        ("sin(0) + cos(0) + tan(0) + float(2)", 3.0),
        ("10 ** 400 // 10 ** 399", 10),
    ],
)
def test_expressions_have_pythons_values(text: str, value: float) -> None:
    found = evaluate(text, {"a": 47, "b": 1.5})
    assert type(found) is type(value) and found == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 1 to 4096 characters"),
        ("1" * 5000, "expected 1 to 4096 characters"),
        ("1; 2", "cannot be read"),
        ("a +", "cannot be read"),
        ("-" * 4000 + "1", "cannot be read|expected"),
        ("(" * 4000, "cannot be read"),
        ("c", "expected one of a, b, values, got 'c'"),
        ("__import__('os')", "expected numbers, names"),
        ("a.real", "expected numbers, names"),
        ("[1][0]", "expected numbers, names"),
        ("'a' * 3", "expected numbers, names"),
        ("(lambda: 1)()", "expected numbers, names"),
        ("open(a)", "expected numbers, names"),
        ("values", "expected a finite number"),
        ("values * 1000", "expected a number, got the list"),
        ("values[9]", "has no value"),
        ("1 / 0", "has no value: division by zero"),
        ("1e400", "expected a finite number"),
        ("10 ** 400", "has no value|finite"),
        ("10.0 ** 400", "has no value"),
        ("9 ** 9 ** 9", "expected powers of at most"),
        ("pow(9, 9 ** 9)", "expected powers of at most"),
        ("1 << 10 ** 9", "expected shifts of at most"),
        ("(-8) ** 0.5", "expected numbers, got"),
        ("*".join(["(2 ** 8000)"] * 9), "expected whole numbers of at most"),
        ("round(5, -10 ** 9) + 1 / 0", "has no value: division by zero"),
        ("float(1) if a else b if", "cannot be read"),
    ],
)
def test_what_is_no_expression_is_refused_at_once(text: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=message):
        evaluate(text, {"a": 47, "b": 1.5})
    assert time.monotonic() - begun < 1


def test_an_expression_gives_each_type_of_number() -> None:
    function = NODES["ComfyMathExpression"].function
    assert function(RUN, "a / 2", **{"values.a": 7}) == (3.5, 3, True)
    assert function(RUN, "a and b", **{"values.a": True, "values.b": False}) == (0.0, 0, False)
    with pytest.raises(WorkflowError, match=r"values\.a: expected a number, got 'x'"):
        function(RUN, "a", **{"values.a": "x"})
    graph = {
        "size": node("PrimitiveInt", value=1000),
        "math": node("ComfyMathExpression", expression="a // 16 * 16 + b", values__a=["size", 0], values__b=8),
        "out": node("PreviewAny", source=["math", 1]),
    }
    assert shown_texts(graph) == ["1000"]
    graph["math"]["inputs"]["values.b"] = "8"
    with pytest.raises(WorkflowError, match=r"values\.b: expected a number, got a str"):
        shown_texts(graph)


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (True, (1.0, 1)),
        (2.9, (2.9, 2)),
        (-2.9, (-2.9, -2)),
        (" 12 ", (12.0, 12)),
        ("1e3", (1000.0, 1000)),
        ("9007199254740993", (9007199254740992.0, 9007199254740993)),
    ],
)
def test_numbers_are_converted(value: Any, numbers: tuple[float, int]) -> None:
    found = NODES["ComfyNumberConvert"].function(RUN, value)
    assert found == numbers and [type(each) for each in found] == [float, int]


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "1" * 5000, None, [1], 10**400])
def test_what_is_no_number_is_not_converted(value: Any) -> None:
    with pytest.raises(WorkflowError, match="value: expected a finite number"):
        call("ComfyNumberConvert", value=value)


# --- texts ------------------------------------------------------------------------------------------------------------


def abc(*values: Any) -> dict[str, Any]:
    return {f"values__{name}": value for name, value in zip("abc", values, strict=False)}


@pytest.mark.parametrize(
    ("kind", "inputs", "wanted"),
    [
        ("StringConcatenate", {"string_a": "a", "string_b": "b", "delimiter": ", "}, "a, b"),
        ("StringSubstring", {"string": "a red fox", "start": 2, "end": -4}, "red"),
        ("StringLength", {"string": "füchse"}, 6),
        ("CaseConverter", {"string": "a RED fox", "mode": "Title Case"}, "A Red Fox"),
        ("CaseConverter", {"string": "a RED fox", "mode": "Capitalize"}, "A red fox"),
        ("CaseConverter", {"string": "straße", "mode": "UPPERCASE"}, "STRASSE"),
        ("CaseConverter", {"string": "A", "mode": "lowercase"}, "a"),
        ("StringTrim", {"string": " \n a ", "mode": "Both"}, "a"),
        ("StringTrim", {"string": " a ", "mode": "Left"}, "a "),
        ("StringTrim", {"string": " a ", "mode": "Right"}, " a"),
        ("StringReplace", {"string": "aXbX", "find": "X", "replace": "--"}, "a--b--"),
        ("StringReplace", {"string": "ab", "find": "", "replace": "-"}, "-a-b-"),
        ("StringContains", {"string": "A Fox", "substring": "fox"}, False),
        ("StringContains", {"string": "A Fox", "substring": "fox", "case_sensitive": False}, True),
        ("StringCompare", {"string_a": "A Fox", "string_b": "A", "mode": "Starts With"}, True),
        ("StringCompare", {"string_a": "A Fox", "string_b": "x", "mode": "Ends With"}, True),
        ("StringCompare", {"string_a": "A", "string_b": "a", "mode": "Equal"}, False),
        ("StringCompare", {"string_a": "A", "string_b": "a", "mode": "Equal", "case_sensitive": False}, True),
        ("RegexMatch", {"string": "a FOX", "regex_pattern": "f.x"}, True),
        ("RegexMatch", {"string": "a FOX", "regex_pattern": "f.x", "case_insensitive": False}, False),
        ("RegexMatch", {"string": "a", "regex_pattern": "("}, False),
        ("RegexMatch", {"string": "a\nb", "regex_pattern": "^b$", "multiline": True}, True),
        ("RegexMatch", {"string": "a\nb", "regex_pattern": "a.b", "dotall": True}, True),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=(\d+)", "mode": "First Match"}, "x=1"),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=(\d+)", "mode": "First Group"}, "1"),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=(\d+)", "mode": "All Matches"}, "1\n22"),
        ("RegexExtract", {"string": "x=1 y=22", "regex_pattern": r"\w=\d+", "mode": "All Matches"}, "x=1\ny=22"),
        ("RegexExtract", {"string": "a1b", "regex_pattern": r"(a)|(b)", "mode": "All Matches"}, "a\n"),
        ("RegexExtract", {"string": "a1b", "regex_pattern": r"(a)|(b)", "mode": "All Groups", "group_index": 2}, "b"),
        ("RegexExtract", {"string": "ab", "regex_pattern": "a", "mode": "All Groups", "group_index": 0}, ""),
        ("RegexExtract", {"string": "ab", "regex_pattern": "(a)", "mode": "First Group", "group_index": 3}, ""),
        ("RegexExtract", {"string": "ab", "regex_pattern": "(", "mode": "First Match"}, ""),
        ("RegexExtract", {"string": "ab", "regex_pattern": "c", "mode": "First Match"}, ""),
        ("RegexReplace", {"string": "```json\n{}", "regex_pattern": r"^```(?:json)?\s*\n?", "replace": ""}, "{}"),
        ("RegexReplace", {"string": "", "regex_pattern": "^$", "replace": "[]"}, "[]"),
        ("RegexReplace", {"string": "aXaX", "regex_pattern": "x", "replace": "", "count": 1}, "aaX"),
        ("RegexReplace", {"string": "ab", "regex_pattern": "(a)(b)", "replace": r"\2\g<1>ü"}, "baü"),
        ("JsonExtractString", {"json_string": 'x {"no} {"k": [1]} {"k": 2}', "key": "k"}, "[1]"),
        ("JsonExtractString", {"json_string": '{"k": null}', "key": "k"}, ""),
        ("JsonExtractString", {"json_string": "none", "key": "k"}, ""),
        ("StringFormat", {"f_string": "{a}{{}}{b:.2f}{c!r:>5}", **abc("x", 1, "y")}, "x{}1.00  'y'"),
        ("StringFormat", {"f_string": "{a:>{b}}", "values__a": "x", "values__b": 3}, "  x"),
        ("StringFormat", {"f_string": "{a}", "values__a": np.float32}, "<type>"),
    ],
)  # fmt: skip
def test_texts_are_comfyuis(kind: str, inputs: dict[str, Any], wanted: Any) -> None:
    found = call(kind, **inputs)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("RegexReplace", {"string": "a", "regex_pattern": "(", "replace": ""}, "Python's re, got .*: missing"),
        ("RegexReplace", {"string": "b", "regex_pattern": "a", "replace": r"\1"}, "invalid group reference 1"),
        ("RegexReplace", {"string": "b" * 2000, "regex_pattern": "", "replace": "c" * 2000}, "text of at most"),
        ("RegexExtract", {"string": "b" * 5000, "regex_pattern": "(?=(.*))", "mode": "All Matches"}, "shorter text"),
        ("RegexMatch", {"string": "a", "regex_pattern": "a" * 10_001}, "regex_pattern: expected at most 10000"),
        ("RegexMatch", {"string": "a" * (1 << 21), "regex_pattern": "a"}, "string: expected at most 1048576"),
        ("StringReplace", {"string": "b" * 2000, "find": "", "replace": "c" * 2000}, "expected a text of at most"),
        ("StringConcatenate", {"string_a": "a" * (1 << 20), "string_b": "b"}, "expected a text of at most"),
        ("StringFormat", {"f_string": "{a:>100000000}", "values__a": "x"}, "expected a width of at most 1000"),
        ("StringFormat", {"f_string": "{a:.100000000f}", "values__a": 1.0}, "expected a width of at most 1000"),
        ("StringFormat", {"f_string": "{a}" * 2000, "values__a": "x" * 2000}, "expected a text of at most"),
        ("StringFormat", {"f_string": "{a.__class__}", "values__a": "x"}, "f_string: expected"),
        ("StringFormat", {"f_string": "{a[0]}", "values__a": "x"}, "f_string: expected"),
        ("StringFormat", {"f_string": "{}", "values__a": "x"}, "f_string: expected"),
        ("StringFormat", {"f_string": "{b}", "values__a": "x"}, "f_string: expected"),
        ("JsonExtractString", {"json_string": '{"a":' * 9000, "key": "a"}, "too many braces"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_made_are_refused_at_once(kind: str, inputs: dict[str, Any], message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=message):
        call(kind, **inputs)
    assert time.monotonic() - begun < 2


def test_a_search_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(WorkflowError, match=r"regex_pattern: expected a search of at most 0.5 seconds, got more"):
        call("RegexMatch", string="a" * 40 + "!", regex_pattern="(a+)+$")
    assert time.monotonic() - begun < 5


def test_limits_are_what_the_documents_say() -> None:
    assert (MAX_NUMBERS, expression.MAX_LENGTH, regex.MAX_TEXT) == (268_435_456, 4096, 1_048_576)
