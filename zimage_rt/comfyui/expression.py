"""Math expressions of workflows: a part of Python's syntax, evaluated without `eval`, in bounded time and memory.

Numbers, names, arithmetic, bits, comparisons, `and`, `or`, `not`, `if … else`, indices and the functions of FUNCTIONS.
The rules are those of ComfyMathExpression, which hands its text to the package simpleeval.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..checks import shown
from .graph import WorkflowError

# Characters of an expression, and bits of a whole number in it: what is larger is no use as a float.
MAX_LENGTH, MAX_BITS = 4096, 1 << 14


def _sum(*values: Any) -> Any:
    """Python's sum, of one list or of its arguments."""
    return sum(values[0] if len(values) == 1 and isinstance(values[0], list) else values)


def _power(base: Any, exponent: Any) -> Any:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and abs(exponent) * max(1, base.bit_length()) > MAX_BITS:
        raise WorkflowError(f"expression: expected powers of at most {MAX_BITS} bits, got {base} ** {exponent}")
    return base**exponent


def _shifted_left(value: Any, bits: Any) -> Any:
    if isinstance(bits, int) and bits > MAX_BITS:
        raise WorkflowError(f"expression: expected shifts of at most {MAX_BITS} bits, got {bits}")
    return value << bits


def _rounded(value: Any, digits: int = 0) -> Any:
    # Python makes 10 ** -digits of a whole number's negative digits.
    digits = min(max(digits, -MAX_BITS), MAX_BITS)
    return round(value, digits) if digits else round(value)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "sum": _sum, "min": min, "max": max, "abs": abs, "round": _rounded, "pow": _power, "sqrt": math.sqrt,
    "ceil": math.ceil, "floor": math.floor, "log": math.log, "log2": math.log2, "log10": math.log10,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "int": int, "float": float,
}  # fmt: skip
BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: _shifted_left, ast.RShift: operator.rshift,
}  # fmt: skip
UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_, ast.Invert: operator.invert,
}  # fmt: skip
COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
}  # fmt: skip


def evaluate(text: str, names: Mapping[str, float]) -> float:
    """The value of an expression.

    Args:
        text: at most `MAX_LENGTH` characters.
        names: the values of its names; the name `values` is the list of them.

    Raises:
        WorkflowError: it is no expression of that kind, has an unknown name, or its value is no finite number.
    """
    if not text.strip() or len(text) > MAX_LENGTH:
        raise WorkflowError(f"expression: expected 1 to {MAX_LENGTH} characters, got {len(text.strip())}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, {**names, "values": list(names.values())})
        if not isinstance(value, (int, float)) or not math.isfinite(float(value)):
            raise WorkflowError(f"expression: expected a finite number, got {shown(value)} of {shown(text)}")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise WorkflowError(f"expression: {shown(text)} cannot be read: {error}") from error
    except (ArithmeticError, ValueError, TypeError, IndexError) as error:
        raise WorkflowError(f"expression: {shown(text)} has no value: {error}") from error
    return value


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    value = _whole_value(node, names)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise WorkflowError(f"expression: expected whole numbers of at most {MAX_BITS} bits, got a larger one")
    if not isinstance(value, (int, float, list)):  # a root of a negative number is complex
        raise WorkflowError(f"expression: expected numbers, got {shown(value)}")
    return value


def _whole_value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise WorkflowError(f"expression: expected one of {', '.join(names)}, got {shown(name)}")
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](_number(operand, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](_number(left, names), _number(right, names))
        case ast.BoolOp(op=op, values=values):
            for each in values[:-1]:
                value = _value(each, names)
                if bool(value) == isinstance(op, ast.Or):
                    return value
            return _value(values[-1], names)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in COMPARISONS for op in ops):
            return _compared(left, ops, others, names)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(each, names) for each in arguments))
        case ast.Subscript(value=values, slice=index):
            return _value(values, names)[_number(index, names)]
    raise WorkflowError(
        f"expression: expected numbers, names, operators and {', '.join(FUNCTIONS)}, got {shown(ast.unparse(node))}"
    )


def _number(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """A value that is no list: lists are not added or repeated."""
    value = _value(node, names)
    if isinstance(value, list):
        raise WorkflowError("expression: expected a number, got the list `values`; take values[0] or sum(values)")
    return value


def _compared(left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr], names: Mapping[str, Any]) -> bool:
    before = _value(left, names)
    for op, other in zip(ops, others, strict=True):
        after = _value(other, names)
        if not COMPARISONS[type(op)](before, after):
            return False
        before = after
    return True
