"""The pickle inside a `torch.save` file, read as data: nothing that it names is imported or called.

Torch writes dicts, lists, tuples, numbers, strings and tensors with about thirty opcodes of pickle protocol 2, and
names a handful of functions. This module interprets that subset and refuses everything else. Tensors are returned as
descriptions (`StoredTensor`), which allocate nothing.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import torch

from loader.errors import ShardsError
from model.torchfile.stored import Storage, StoredTensor

MAX_BYTES = 4 << 20  # of a pickle; each tensor takes about 150
MAX_DIMENSIONS = 8
MAX_DEPTH = 16
MAX_NUMBER = (1 << 48) - 1  # of sizes, strides and offsets
MAX_ENTRIES = 1_000_000  # in all containers, counted once for each path to them
DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
ORDERED_DICT, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
GLOBALS = {*DTYPES, ORDERED_DICT, TENSOR, PARAMETER}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OTHERS = {
    "PROTO", "STOP", "MARK", "TUPLE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "EMPTY_DICT", "EMPTY_LIST",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL", "BINPERSID", "REDUCE", "BUILD",
}  # fmt: skip
OPCODES = {
    opcode.code.encode("latin-1"): opcode
    for opcode in pickletools.opcodes
    if opcode.name in CONSTANTS.keys() | NUMBERS | TUPLES.keys() | OTHERS
}


class PickleError(ShardsError):
    """A pickle that is damaged, or holds more than containers, numbers, strings and tensors."""


@dataclass(frozen=True)
class _Global:
    name: str


def read_pickle(data: bytes) -> Any:
    """Return the content of a `torch.save` pickle, a StoredTensor for each tensor and a dict for each OrderedDict.

    Raises PickleError if the pickle is damaged, or holds something that torch does not write.
    """
    if len(data) > MAX_BYTES:
        raise PickleError(f"expected a pickle of at most {MAX_BYTES} bytes, got {len(data)}")
    try:
        content = _Machine().run(data)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise PickleError(f"a damaged pickle ({type(error).__name__})") from error
    _check_extent(content)
    return content


class _Machine:
    """Pickle's stack machine. MARK starts a new stack and keeps the previous one in `below`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        while code := stream.read(1):
            opcode = OPCODES.get(code)
            if opcode is None:
                raise PickleError(f"expected opcodes that torch writes, got {code!r}")
            argument: Any
            if opcode.name == "GLOBAL":  # its own reader would interpret escapes
                argument = b" ".join(stream.readline()[:-1] for _ in range(2)).decode("latin-1")
            else:
                argument = opcode.arg.reader(stream) if opcode.arg is not None else None
            if opcode.name == "STOP":
                (content,) = self.stack
                if self.below:
                    raise PickleError("a damaged pickle (mark without end)")
                return content
            self.step(opcode.name, argument)
        raise PickleError("a damaged pickle (no end)")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in NUMBERS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            stack.append(self.pop(TUPLES[name]))
        else:
            match name:
                case "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "MARK":
                    self.below.append(stack)
                    self.stack = []
                case "TUPLE":
                    items = tuple(self.marked())
                    self.stack.append(items)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    _list(stack[-2]).append(stack.pop())
                case "APPENDS":
                    items_ = self.marked()
                    _list(self.stack[-1]).extend(items_)
                case "SETITEM":
                    key, value = self.pop(2)
                    _set(stack[-1], [key, value])
                case "SETITEMS":
                    pairs = self.marked()
                    _set(self.stack[-1], pairs)
                case "GLOBAL":
                    if argument not in GLOBALS:
                        raise PickleError(f"expected names that torch writes, got {argument[:100].replace(' ', '.')}")
                    stack.append(_Global(argument))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    function, arguments = self.pop(2)
                    stack.append(_call(function, arguments))
                case "BUILD":  # the `_metadata` of a state dict (versions of modules), which is dropped
                    _, target = stack.pop(), stack[-1]
                    if not isinstance(target, dict):
                        raise PickleError(f"expected a state for a dict, got one for a {type(target).__name__}")
                case "PROTO":
                    if argument != 2:
                        raise PickleError(f"expected pickle protocol 2, which torch writes, got {argument}")

    def pop(self, count: int) -> tuple[Any, ...]:
        """Pop `count` values; return them in the order in which they were pushed."""
        if len(self.stack) < count:
            raise PickleError("a damaged pickle (an empty stack)")
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def marked(self) -> list[Any]:
        """Pop all values since the last MARK."""
        items, self.stack = self.stack, self.below.pop()
        return items


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise PickleError(f"expected a list to append to, got a {type(value).__name__}")
    return value


def _set(target: Any, pairs: list[Any]) -> None:
    if not isinstance(target, dict) or len(pairs) % 2:
        raise PickleError(f"expected a dict and pairs to set in it, got a {type(target).__name__}")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Small integers only: with large ones, a file could choose many keys of equal hash.
        if not isinstance(key, str) and not (type(key) is int and 0 <= key < 1 << 31):
            raise PickleError(f"expected strings or small integers as keys, got {type(key).__name__}")
        target[key] = value


def _storage(value: Any) -> Storage:
    kind, stored, key, location, elements = value
    if kind != "storage" or not isinstance(key, str) or not isinstance(location, str):
        raise PickleError("a damaged reference to a storage")
    return Storage(key, DTYPES[stored.name], _size(elements))


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise PickleError("expected a call of a function, got one of something else")
    if function.name == ORDERED_DICT and not arguments:
        return {}
    if function.name == PARAMETER and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    if function.name == TENSOR and isinstance(arguments[0], Storage):
        storage, offset, shape, stride = arguments[:4]
        return _tensor(storage, offset, tuple(shape), tuple(stride))
    raise PickleError(f"expected calls that torch writes, got one of {function.name.replace(' ', '.')}")


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
    for number in (offset, *shape, *stride):
        _size(number)
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise PickleError(f"expected a tensor of at most {MAX_DIMENSIONS} dimensions, got {len(shape)}")
    elements = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if elements else 0
    if elements > storage.elements or (elements and last >= storage.elements):
        raise PickleError(f"expected a tensor within its storage of {storage.elements} values, got {elements} or more")
    return StoredTensor(storage, offset, shape, stride)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise PickleError(f"expected sizes and offsets from 0 to {MAX_NUMBER}, got {str(value)[:40]}")
    return value


def _check_extent(content: Any) -> None:
    """Check that containers are nested at most MAX_DEPTH levels, without cycles, with at most MAX_ENTRIES entries."""
    level, entries = [content], 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list | tuple):
                entries += len(value)
                if entries > MAX_ENTRIES:
                    raise PickleError(f"expected at most {MAX_ENTRIES} entries, got more")
                inner.extend(value.values() if isinstance(value, dict) else value)
        if not inner:
            return
        level = inner
    raise PickleError(f"expected containers at most {MAX_DEPTH} levels deep, got more")
