"""A machine for the pickles of torch files. It knows tensors and plain values, and calls nothing that a file names."""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

# Storage classes of torch with their formats, in safetensors' names.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# Opcodes that push their argument, or a value without one.
_ARGUMENTS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Storage:
    """Numbers of a file.

    Attributes:
        dtype: their format, in safetensors' names.
        key: their name in the file.
        size: how many there are.
    """

    dtype: str
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; `offset` and `strides` count numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = (self.offset, *self.shape, *self.strides)
        if not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
            raise ValueError("a tensor's sizes are not whole numbers")
        if len(self.shape) != len(self.strides) or len(self.shape) > 8:
            raise ValueError("a tensor's shape and strides do not belong together")
        count = math.prod(self.shape)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        # No weight repeats numbers of its storage, and views that do could need any amount of memory.
        if count and (last >= self.storage.size or count > self.storage.size):
            raise ValueError(f"a tensor of {list(self.shape)} is larger than its storage of {self.storage.size}")


def load(content: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle from where the file stands: dicts, lists, tuples, numbers, texts and `Tensor`.

    `storages` gets the storages that it names, by their keys.

    Raises ValueError: it is damaged, or names anything but what tensors consist of; the message has that name.
    """
    machine = _Machine({} if storages is None else storages)
    for opcode, argument, _ in pickletools.genops(content):
        machine.step(opcode.name, argument)
    return machine.result()


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name of the closed list; `make` is what calling it means here."""

    name: str
    make: Callable[..., Any] | None = None
    dtype: str = ""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    del rest  # whether it needs a gradient, and hooks
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise ValueError("a tensor has no storage, shape or strides")
    return Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *rest: Any) -> Tensor:
    del rest
    if not isinstance(data, Tensor):
        raise ValueError("a parameter has no tensor")
    return data


def _ordered(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (list, tuple)) for item in items):
        raise ValueError("an OrderedDict's items are not pairs")
    found: dict[Any, Any] = {}
    _set_items(found, iter([each for item in items for each in item]))
    return found


_GLOBALS = {
    "collections OrderedDict": _Global("OrderedDict", _ordered),
    "torch._utils _rebuild_tensor": _Global("_rebuild_tensor", _tensor),
    "torch._utils _rebuild_tensor_v2": _Global("_rebuild_tensor_v2", _tensor),
    "torch._utils _rebuild_parameter": _Global("_rebuild_parameter", _parameter),
    **{f"torch {name}": _Global(name, dtype=dtype) for name, dtype in _STORAGES.items()},
}


class _Machine:
    """The stack, its marks and the memo of a pickle."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """The value that is left at the end."""
        if len(self._stack) != 1 or self._marks:
            raise ValueError("it does not end with one value")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Do what an opcode says."""
        if name in _ARGUMENTS:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[name])])))
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise ValueError(f"it has the opcode {name}, which no file of tensors needs")

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes a value from an empty stack")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0) or not isinstance(self._stack[-1], kind):
            raise ValueError(f"it fills a {kind.__name__} that is not there")
        return self._stack[-1]

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("it goes back to a mark that is not there")
        first = self._marks.pop()
        found = self._stack[first:]
        del self._stack[first:]
        return found

    def mark(self, argument: Any) -> None:
        self._marks.append(len(self._stack))

    def store(self, argument: Any) -> None:
        self._memo[len(self._memo) if argument is None else int(argument)] = self._top(object)

    def recall(self, argument: Any) -> None:
        if int(argument) not in self._memo:
            raise ValueError("it recalls a value that it did not store")
        self._stack.append(self._memo[int(argument)])

    def tuple(self, argument: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def list(self, argument: Any) -> None:
        self._stack.append(self._since_mark())

    def append(self, argument: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self, argument: Any) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def empty_list(self, argument: Any) -> None:
        self._stack.append([])

    def empty_dict(self, argument: Any) -> None:
        self._stack.append({})

    def dict(self, argument: Any) -> None:
        found: dict[Any, Any] = {}
        _set_items(found, iter(self._since_mark()))
        self._stack.append(found)

    def set_item(self, argument: Any) -> None:
        value, key = self._pop(), self._pop()
        _set_items(self._top(dict), iter((key, value)))

    def set_items(self, argument: Any) -> None:
        values = self._since_mark()
        _set_items(self._top(dict), iter(values))

    def find(self, argument: str) -> None:
        if argument not in _GLOBALS:
            raise ValueError(
                f"expected tensors and plain values, got {argument.replace(' ', '.', 1)}, which is not run; "
                "save the model's state_dict alone"
            )
        self._stack.append(_GLOBALS[argument])

    def find_named(self, argument: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it names something without a text")
        self.find(f"{module} {name}")

    def call(self, argument: Any) -> None:
        values, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or function.make is None or not isinstance(values, tuple):
            raise ValueError("it calls what is no function of tensors")
        try:
            self._stack.append(function.make(*values))
        except TypeError as error:
            raise ValueError(f"it calls {function.name} with {len(values)} values") from error

    def build(self, argument: Any) -> None:
        state = self._pop()
        # An OrderedDict's attributes: torch keeps version numbers of modules there.
        if not isinstance(state, dict):
            raise ValueError("it gives a value a state that is no dict")
        self._top(dict)

    def persistent(self, argument: Any) -> None:
        entry = self._pop()
        if not isinstance(entry, tuple) or len(entry) not in (5, 6) or entry[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        kind, key, _, size = entry[1:5]
        if not isinstance(kind, _Global) or not kind.dtype or not isinstance(key, str) or type(size) is not int:
            raise ValueError("a storage has no format, name or size")
        if entry[5:] not in ((), (None,)):
            raise ValueError("it has views of storages, as torch before 0.4 wrote them; save it with a later one")
        storage = Storage(kind.dtype, key, size)
        if size < 0 or self._storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key[:40]} has two sizes or formats")
        self._stack.append(storage)


def _set_items(found: dict[Any, Any], items: Iterator[Any]) -> None:
    for key in items:
        # The hash of tuples in tuples may take for ever.
        if not isinstance(key, (str, int, float, bytes, type(None))):
            raise ValueError(f"expected texts and numbers as the keys of a dict, got a {type(key).__name__}")
        try:
            found[key] = next(items)
        except StopIteration:
            raise ValueError("a dict's last key has no value") from None


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "STOP": lambda machine, argument: None,
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.store,
    "PUT": _Machine.store,
    "BINPUT": _Machine.store,
    "LONG_BINPUT": _Machine.store,
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "TUPLE": _Machine.tuple,
    "LIST": _Machine.list,
    "EMPTY_LIST": _Machine.empty_list,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "DICT": _Machine.dict,
    "EMPTY_DICT": _Machine.empty_dict,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_named,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
