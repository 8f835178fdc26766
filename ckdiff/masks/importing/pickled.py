"""What a torch file says about its tensors, read from its pickle without an unpickler.

A pickle is a program. ``weights_only`` keeps it from calling what it likes, and still lets it ask
for as much memory as it likes. Here the few instructions that ``torch.save`` writes move words
around: nothing is looked up, nothing is called, and there is a bound on everything it can make.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from ckdiff.masks.importing.maskfile import METADATA_LIMIT

#: instructions that are followed: a tensor takes about 28, and models have at most 90,000
_MOST_STEPS = 1 << 23
_MOST_MADE = 1 << 22  # texts, numbers and tuples; a tensor takes about 11
_MOST_CONTAINERS = 1 << 20  # a tensor takes one
_MOST_WORDS = 1 << 10  # classes and functions; torch.save names each once
_BYTE, _SHORT, _LONG = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<L")
_SIGNED, _FLOAT = struct.Struct("<l"), struct.Struct(">d")
_LONGEST_NUMBER = 16  # bytes; torch needs 9

#: storage classes of old -> dtype names as numpy has them; what no mask can be is in it for sizes
STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8",
    "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32",
    "DoubleStorage": "float64", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_DTYPES = {"bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}


@dataclass(slots=True, frozen=True)
class Word:
    """A class or function that the pickle names; it is never looked up."""

    name: str  #: with its module


@dataclass(slots=True, frozen=True)
class Storage:
    """Bytes of the archive."""

    key: str
    dtype: str | None  #: None where the tensors say it
    size: int  #: in elements, of bytes where there is no dtype


@dataclass(slots=True, frozen=True)
class Tensor:
    """A view of a storage; the numbers are as the file has them."""

    storage: Storage
    dtype: str
    offset: int  #: in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(raw: bytes) -> Any:
    """What the pickle of a torch file holds: dicts, texts, numbers, tensors.

    Raises ValueError, with a phrase that says why, for whatever tensors and texts do not need.
    """
    if len(raw) > METADATA_LIMIT:
        _refuse(f"{len(raw):,} bytes of names are too many")
    try:
        return _Machine(raw).run()
    except (IndexError, struct.error):  # takes what is not on the stack, or ends early
        raise ValueError("it is damaged") from None


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


class _Machine:
    """The stack, the memo, and what each instruction does."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks that a mark put aside
        self._memo: list[Any] = []
        self._words: dict[str, Word] = {}
        self._containers = self._made = 0

    def run(self) -> Any:
        raw = self._raw
        for _ in range(_MOST_STEPS):
            code = raw[self._at]
            self._at += 1
            if code == _STOP:
                if self._below or len(self._stack) != 1 or self._at != len(raw):
                    _refuse("it is damaged")
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                _refuse(f"the instruction {bytes([code])!r} is none that tensors need")
            step(self)
        _refuse("it takes more steps than any model needs")

    # what instructions are made of

    def _take(self, size: int) -> bytes:
        data = self._raw[self._at : self._at + size]
        if len(data) < size or not size:
            _refuse("it is damaged")
        self._at += size
        return data

    def _unpack(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self._raw, self._at)
        self._at += form.size
        return value

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._at, self._at + 200)
        if end < 0:
            _refuse("it is damaged")
        text = self._raw[self._at : end].decode("ascii", "backslashreplace")
        self._at = end + 1
        return text

    def _container(self, what: Any) -> None:
        self._containers += 1
        if self._containers > _MOST_CONTAINERS:
            _refuse("it takes more memory than any model needs")
        self._stack.append(what)

    def _new(self, what: Any) -> None:
        self._made += 1
        if self._made > _MOST_MADE:
            _refuse("it takes more memory than any model needs")
        self._stack.append(what)

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    # instructions

    def mark(self) -> None:
        self._container(None)
        self._stack.pop()
        self._below.append(self._stack)
        self._stack = []

    def protocol(self) -> None:
        self._take(1)

    def global_name(self) -> None:
        module = self._line()
        name = f"{module}.{self._line()}"
        if len(self._words) >= _MOST_WORDS and name not in self._words:
            _refuse("it names more classes than tensors need")
        self._stack.append(self._words.setdefault(name, Word(name)))

    def number(self, form: struct.Struct) -> None:
        self._new(self._unpack(form))

    def long(self) -> None:
        size = self._take(1)[0]
        if size > _LONGEST_NUMBER:
            _refuse("it has an impossible number")
        data = self._take(size) if size else b""
        self._new(int.from_bytes(data, "little", signed=True))

    def text(self) -> None:
        size = self._unpack(_LONG)
        data = self._take(size) if size else b""
        try:
            self._new(data.decode("utf-8"))
        except UnicodeDecodeError:
            _refuse("it has a name that is not valid text")

    def put(self, form: struct.Struct) -> None:
        place = self._unpack(form)
        if place < len(self._memo):
            self._memo[place] = self._stack[-1]
        elif place == len(self._memo):  # every pickler numbers what it may need again
            self._memo.append(self._stack[-1])
        else:
            _refuse("it is damaged")

    def get(self, form: struct.Struct) -> None:
        self._stack.append(self._memo[self._unpack(form)])

    def tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            _refuse("it is damaged")
        del self._stack[-count:]
        self._new(items)

    def marked_tuple(self) -> None:
        items = self._to_mark()
        self._new(tuple(items))

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            _refuse("it is damaged")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # hashing a deep tuple overflows the stack, and numbers can be chosen to collide
            if type(key) is not str:
                _refuse("it has a name that is no text")
            if key in target:
                _refuse("it has two values for one name")
            target[key] = value

    def set_item(self) -> None:
        value = self._stack.pop()
        self.set_items([self._stack.pop(), value])

    def append(self) -> None:
        self.extend([self._stack.pop()])

    def extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            _refuse("it is damaged")
        self._stack[-1].extend(items)

    def storage(self) -> None:
        match self._stack.pop():
            case ("storage", Word(name=kind), str(key), str(), int(size)):
                dtype = STORAGES.get(kind.removeprefix("torch."))
                if dtype is None and kind != "torch.storage.UntypedStorage":
                    _refuse(f"it has elements of a type that is not known: {kind}")
                self._new(Storage(key, dtype, size))
            case _:
                _refuse("it names bytes in a way that is not known")

    def call(self) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        if type(what) is not Word or type(arguments) is not tuple:
            _refuse("it is damaged")
        if what.name == "collections.OrderedDict" and not arguments:
            self._container({})
        else:
            self._new(_called(what.name, arguments))

    def build(self) -> None:
        self._stack.pop()  # the attributes of a dict, such as versions; not ours to look at
        if type(self._stack[-1]) is not dict:
            _refuse("it sets what no tensor has")


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    """What a call means, for the few that make tensors."""
    match name, arguments:
        case "torch._utils._rebuild_tensor_v2", (
            Storage(dtype=str(dtype)) as storage, offset, shape, strides, bool(), {}, *rest,
        ) if not any(rest):  # fmt: skip
            return _tensor(storage, dtype, offset, shape, strides)
        case "torch._utils._rebuild_tensor_v3", (
            Storage() as storage, offset, shape, strides, bool(), {}, Word(name=dtype), *rest,
        ) if not any(rest) and dtype.removeprefix("torch.") in _DTYPES:  # fmt: skip
            return _tensor(storage, dtype.removeprefix("torch."), offset, shape, strides)
        case "torch._utils._rebuild_tensor", (
            Storage(dtype=str(dtype)) as storage, offset, shape, strides,
        ):  # fmt: skip
            return _tensor(storage, dtype, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (Tensor() as tensor, bool(), {}):
            return tensor
        case "torch._utils._rebuild_parameter_with_state", (Tensor() as tensor, bool(), {}, _):
            return tensor
        case "torch._tensor._rebuild_from_type_v2", (
            Word(name=function), Word(name="torch.Tensor" | "torch.nn.parameter.Parameter"),
            tuple(inner), _,
        ) if function.startswith("torch._utils."):  # fmt: skip
            return _called(function, inner)
        case "torch.Size", (tuple(dims),):
            return dims
    return _refuse(f"it holds something else than tensors: {name}")


def _tensor(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> Tensor:
    numbers = (offset, *shape, *strides) if type(shape) is type(strides) is tuple else (None,)
    if not all(type(number) is int for number in numbers) or len(shape) != len(strides):
        _refuse("it has a tensor without a shape")
    return Tensor(storage, dtype, offset, shape, strides)


def _pushed(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine._stack.append(value)


_STOP = ord(b".")
_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(b"\x80"): _Machine.protocol,
    ord(b"("): _Machine.mark,
    ord(b"}"): lambda machine: machine._container({}),
    ord(b"]"): lambda machine: machine._container([]),
    ord(b")"): _pushed(()),
    ord(b"N"): _pushed(None),
    ord(b"\x88"): _pushed(True),
    ord(b"\x89"): _pushed(False),
    ord(b"c"): _Machine.global_name,
    ord(b"X"): _Machine.text,
    ord(b"K"): lambda machine: machine.number(_BYTE),
    ord(b"M"): lambda machine: machine.number(_SHORT),
    ord(b"J"): lambda machine: machine.number(_SIGNED),
    ord(b"G"): lambda machine: machine.number(_FLOAT),
    ord(b"\x8a"): _Machine.long,
    ord(b"q"): lambda machine: machine.put(_BYTE),
    ord(b"r"): lambda machine: machine.put(_LONG),
    ord(b"h"): lambda machine: machine.get(_BYTE),
    ord(b"j"): lambda machine: machine.get(_LONG),
    ord(b"\x85"): lambda machine: machine.tuple_of(1),
    ord(b"\x86"): lambda machine: machine.tuple_of(2),
    ord(b"\x87"): lambda machine: machine.tuple_of(3),
    ord(b"t"): _Machine.marked_tuple,
    ord(b"u"): lambda machine: machine.set_items(machine._to_mark()),
    ord(b"s"): _Machine.set_item,
    ord(b"a"): _Machine.append,
    ord(b"e"): lambda machine: machine.extend(machine._to_mark()),
    ord(b"Q"): _Machine.storage,
    ord(b"R"): _Machine.call,
    ord(b"b"): _Machine.build,
}
