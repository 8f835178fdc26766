"""Pickles, read without an unpickler.

A pickle is a program. ``weights_only`` keeps it from calling what it likes, and still lets it ask
for as much memory as it likes. Here the instructions of all protocols move values around: nothing
is looked up, nothing is called, and what is not known to make a tensor or a container becomes an
inert record (see pickledvalues). Time and memory are bounded by the pickle's length: every value
is charged for, and nothing that is shared is ever copied without being charged for again.
"""

from __future__ import annotations

import codecs
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ckdiff.checkpoints.formats.picklebytes import PickleBytes, refuse
from ckdiff.checkpoints.formats.picklecalls import called, key_of, storage_of
from ckdiff.checkpoints.formats.pickledvalues import Odd, Record, Tensor, Word
from ckdiff.errors import CheckpointError, printable

#: bytes of the longest pickle that is read, if not said: the largest models' tensors take 20 MB
LIMIT = 1 << 26
CONTAINER, TUPLE, OBJECT, NUMBER, PAIR = 80, 56, 180, 32, 110  #: bytes that these take, about
_LONGEST = 1 << 20  # bytes of the longest text, or data, that is kept
_LONGEST_NUMBER = 255  # bytes
_CALL = Word("", "call")
_LONG = Word("", "long text or data")
_REFERENCE = Word("", "reference")
_U1, _U2, _U4, _U8 = (struct.Struct(f"<{kind}") for kind in "BHLQ")
_SIGNED, _FLOAT = struct.Struct("<l"), struct.Struct(">d")
_HINT = "ckdiff reads what torch.save writes since torch 1.6: load it with torch and save it again"


def read_pickle(
    pieces: Iterable[bytes], size: int, where: str, limit: int = LIMIT,
    machine: type[Machine] | None = None,
) -> Any:  # fmt: skip
    """What a pickle of ``size`` bytes holds, as pickledvalues has it; ``pieces`` are its bytes.

    All pieces are taken, so that whoever gives them can check them. ``where`` names the pickle in
    messages. Raises CheckpointError for what is damaged, goes on after its end, takes more memory
    than its length explains, or refers to what no file holds (extensions, other buffers).
    """
    try:
        return (machine or Machine)(PickleBytes(pieces, size, limit)).run()
    except (IndexError, struct.error):  # takes what is not on the stack, or ends early
        reason = "it is damaged"
    except ValueError as refused:
        reason = printable(str(refused))
    raise CheckpointError(f"{where}: its pickle cannot be read: {reason}", hint=_HINT)


class Machine:
    """The stack, the memo, and what each instruction does."""

    def __init__(self, source: PickleBytes) -> None:
        self.bytes = source
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks that a mark put aside
        self._memo: list[Any] = []
        self._far: dict[int, Any] = {}  # of the memo, what was not numbered in order
        self._words: dict[tuple[str, str], Word] = {}

    def run(self) -> Any:
        source = self.bytes
        while True:
            if source.at >= len(source.raw):
                source.check(len(self._stack))
                source.refill(1)
            code = source.raw[source.at]
            source.at += 1
            if code == _STOP:
                source.finish()
                if self._below or len(self._stack) != 1:
                    refuse("it is damaged")
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                refuse(f"the instruction {bytes([code])!r} is not known")
            step(self)

    def _new(self, what: Any, size: int) -> None:
        self.bytes.charge(size)
        self._stack.append(what)

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        self.bytes.charge(-CONTAINER - 8 * len(self._stack))
        return items

    # marks, and what only moves things

    def mark(self) -> None:
        self.bytes.charge(CONTAINER + 8 * len(self._stack))
        self._below.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def put(self, place: int) -> None:
        value = self._stack[-1]
        if place == len(self._memo):  # every pickler numbers what it may need again
            self.bytes.charge(8)
            self._memo.append(value)
        elif 0 <= place < len(self._memo):
            self._memo[place] = value
        elif 0 <= place < 1 << 32:
            self.bytes.charge(PAIR)
            self._far[place] = value
        else:
            refuse("it is damaged")

    def get(self, place: int) -> None:
        if 0 <= place < len(self._memo):
            self._stack.append(self._memo[place])
        elif place in self._far:
            self._stack.append(self._far[place])
        else:
            refuse("it is damaged")

    # plain values

    def number(self, form: struct.Struct) -> None:
        self._new(self.bytes.unpack(form), NUMBER)

    def long(self, size: int) -> None:
        if not 0 <= size <= _LONGEST_NUMBER:
            refuse("it has an impossible number")
        self._new(int.from_bytes(self.bytes.take(size), "little", signed=True), NUMBER + size)

    def decimal(self) -> None:
        line = self.bytes.line().removesuffix(b"L")
        if line in (b"00", b"01"):
            self._stack.append(line == b"01")
        else:
            self._new(self._parsed(int, line), NUMBER + len(line))

    def real(self) -> None:
        self._new(self._parsed(float, self.bytes.line()), NUMBER)

    def _parsed(self, kind: Callable[[str], Any], line: bytes) -> Any:
        if len(line) > 2 * _LONGEST_NUMBER:
            refuse("it has an impossible number")
        try:
            return kind(line.decode("ascii"))
        except ValueError:
            refuse("it has an impossible number")

    def _kept(self, form: struct.Struct) -> bytes | None:
        """The bytes that a length precedes; None where they are too many for a name."""
        size: int = self.bytes.unpack(form)
        if size <= _LONGEST:
            return self.bytes.take(size)
        self.bytes.skip(size)
        self._new(Record(_LONG), OBJECT)
        return None

    def text(self, form: struct.Struct) -> None:
        if (data := self._kept(form)) is not None:
            self._text(data, "utf-8")

    def text_line(self) -> None:
        self._text(self.bytes.line(), "raw-unicode-escape")

    def _text(self, data: bytes, encoding: str) -> None:
        try:
            text = data.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
        except UnicodeDecodeError:
            refuse("it has a name that is not valid text")
        self._new(text, sys.getsizeof(text))

    def data(self, form: struct.Struct) -> None:
        if (data := self._kept(form)) is not None:
            self._new(data, TUPLE + len(data))

    def old_text(self, form: struct.Struct) -> None:
        if (data := self._kept(form)) is not None:
            self._either(data)

    def _either(self, data: bytes) -> None:
        """A text of Python 2, which did not tell texts from bytes."""
        try:
            self._text(data, "utf-8")
        except ValueError:
            self._new(data, TUPLE + len(data))

    def quoted(self) -> None:
        line = self.bytes.line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b'"', b"'"):
            refuse("it is damaged")
        try:
            data, _ = codecs.escape_decode(line[1:-1])
        except ValueError:
            refuse("it is damaged")
        self._either(data)

    # containers

    def tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            refuse("it is damaged")
        del self._stack[-count:]
        self._new(items, TUPLE + 8 * count)

    def marked_tuple(self) -> None:
        items = self._to_mark()
        self._new(tuple(items), TUPLE + 8 * len(items))

    def marked_list(self) -> None:
        items = self._to_mark()
        self._new(items, CONTAINER + 8 * len(items))

    def marked_dict(self) -> None:
        items = self._to_mark()
        self._new({}, CONTAINER)
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Record:
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        if type(target) is not dict or len(items) % 2:
            refuse("it is damaged")
        self.bytes.charge(PAIR * (len(items) // 2))
        for key, value in zip(items[::2], items[1::2], strict=True):
            safe = key_of(key)
            if safe in target:
                refuse("it has two values for one name")
            target[safe] = value
            if type(safe) is Odd:
                self.bytes.charge(NUMBER)

    def set_item(self) -> None:
        value = self._stack.pop()
        self.set_items([self._stack.pop(), value])

    def extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Record:
            if target.items is None:
                target.items = []
            target = target.items
        if type(target) is not list:
            refuse("it is damaged")
        self.bytes.charge(8 * len(items))
        target.extend(items)

    # what would be looked up, or called

    def _word(self, module: str, name: str) -> Word:
        word = self._words.get((module, name))
        if word is None:
            self.bytes.charge(2 * OBJECT + sys.getsizeof(module) + sys.getsizeof(name))
            word = self._words[module, name] = Word(module, name)
        return word

    def _named(self) -> Word:
        module, name = (self.bytes.line().decode("utf-8", "backslashreplace") for _ in range(2))
        return self._word(module, name)

    def global_name(self) -> None:
        self._stack.append(self._named())

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            refuse("it is damaged")
        self._stack.append(self._word(module, name))

    def reference(self) -> None:
        what = self._stack.pop()
        self._new(storage_of(what) or Record(_REFERENCE, (what,)), OBJECT)

    def call(self) -> None:
        args, what = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple:
            refuse("it is damaged")
        self.bytes.charge(8 * len(args))
        if args and type(args[0]) is list:
            self.bytes.charge(PAIR * len(args[0]))
        made = called(what, args) if type(what) is Word else Record(_CALL, (what, args))
        self._new(made, OBJECT)

    def new_object(self, *, with_names: bool) -> None:
        names = self._stack.pop() if with_names else None
        args, kind = self._stack.pop(), self._stack.pop()
        self._object(kind, args, names)

    def instance(self) -> None:
        kind = self._named()
        self._object(kind, tuple(self._to_mark()), None)

    def marked_object(self) -> None:
        kind, *args = self._to_mark()
        self._object(kind, tuple(args), None)

    def _object(self, kind: Any, args: Any, names: Any) -> None:
        if type(args) is not tuple or type(names) not in (dict, type(None)):
            refuse("it is damaged")
        what = kind if type(kind) is Word else _CALL
        self._new(Record(what, args if what is kind else (kind, args), names), OBJECT)
        self.bytes.charge(8 * len(args))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Record:
            if target.state is not None:
                refuse("it sets the state of one object twice")
            target.state = state
        elif type(target) not in (dict, Tensor):  # attributes of those, such as versions, are not
            refuse("it sets what no object has")  # ours to look at

    def refused(self) -> None:
        refuse("it refers to something that is not in the file")


def _pushed(value: Any) -> Callable[[Machine], None]:
    return lambda machine: machine._stack.append(value)


_STOP = ord(b".")
_STEPS: dict[int, Callable[[Machine], None]] = {
    code[0]: step
    for code, step in {
        b"\x80": lambda m: m.bytes.take(1),
        b"\x95": lambda m: m.bytes.take(8),  # frames: how the bytes were to be fetched
        b"(": Machine.mark,
        b"0": Machine.pop,
        b"1": lambda m: m._to_mark(),
        b"2": lambda m: m._stack.append(m._stack[-1]),
        b"p": lambda m: m.put(m._parsed(int, m.bytes.line())),
        b"q": lambda m: m.put(m.bytes.unpack(_U1)),
        b"r": lambda m: m.put(m.bytes.unpack(_U4)),
        b"\x94": lambda m: m.put(len(m._memo)),
        b"g": lambda m: m.get(m._parsed(int, m.bytes.line())),
        b"h": lambda m: m.get(m.bytes.unpack(_U1)),
        b"j": lambda m: m.get(m.bytes.unpack(_U4)),
        b"N": _pushed(None),
        b"\x88": _pushed(True),
        b"\x89": _pushed(False),
        b"I": Machine.decimal,
        b"L": Machine.decimal,
        b"F": Machine.real,
        b"K": lambda m: m.number(_U1),
        b"M": lambda m: m.number(_U2),
        b"J": lambda m: m.number(_SIGNED),
        b"G": lambda m: m.number(_FLOAT),
        b"\x8a": lambda m: m.long(m.bytes.unpack(_U1)),
        b"\x8b": lambda m: m.long(m.bytes.unpack(_SIGNED)),
        b"V": Machine.text_line,
        b"X": lambda m: m.text(_U4),
        b"\x8c": lambda m: m.text(_U1),
        b"\x8d": lambda m: m.text(_U8),
        b"S": Machine.quoted,
        b"T": lambda m: m.old_text(_U4),
        b"U": lambda m: m.old_text(_U1),
        b"B": lambda m: m.data(_U4),
        b"C": lambda m: m.data(_U1),
        b"\x8e": lambda m: m.data(_U8),
        b"\x96": lambda m: m.data(_U8),
        b")": _pushed(()),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"t": Machine.marked_tuple,
        b"\x91": Machine.marked_tuple,
        b"]": lambda m: m._new([], CONTAINER),
        b"\x8f": lambda m: m._new([], CONTAINER),
        b"l": Machine.marked_list,
        b"a": lambda m: m.extend([m._stack.pop()]),
        b"e": lambda m: m.extend(m._to_mark()),
        b"\x90": lambda m: m.extend(m._to_mark()),
        b"}": lambda m: m._new({}, CONTAINER),
        b"d": Machine.marked_dict,
        b"s": Machine.set_item,
        b"u": lambda m: m.set_items(m._to_mark()),
        b"c": Machine.global_name,
        b"\x93": Machine.stack_global,
        b"P": Machine.refused,
        b"Q": Machine.reference,
        b"R": lambda m: m.call(),
        b"b": lambda m: m.build(),
        b"i": Machine.instance,
        b"o": Machine.marked_object,
        b"\x81": lambda m: m.new_object(with_names=False),
        b"\x92": lambda m: m.new_object(with_names=True),
        **dict.fromkeys((b"\x82", b"\x83", b"\x84", b"\x97", b"\x98"), Machine.refused),
    }.items()
}
