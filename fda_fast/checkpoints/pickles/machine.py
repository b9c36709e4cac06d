"""The pickle machine, without the part that makes pickles programs.

Python's own runs ``getattr(import_module(m), n)`` for GLOBAL and calls what it gets for REDUCE.
Here GLOBAL looks a name up in a fixed list (``allowed``) and REDUCE does what that list says, in
functions of ours; a name outside it ends the reading. No module is imported, no class is made, no
method of the pickle's objects exists that could be called.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from fda_fast.checkpoints.pickles.arrays import PickledArray, PickledDtype
from fda_fast.checkpoints.pickles.source import Budget, Source
from fda_fast.checkpoints.pickles.values import (
    Blob,
    Malformed,
    Record,
    Reference,
    Refused,
    describe,
)

# Byte strings up to this size are kept; longer ones are left in the file.
_SHORT = 4096
_LINE = 1 << 16
_MAX_LONG = 64
# Integers beyond have equal hashes by construction: a dict of such keys takes time squared.
_MAX_KEY = (1 << 61) - 2

# Looked up here, or the first file with such a text would have Python import it.
_RAW_UNICODE = codecs.lookup("raw-unicode-escape")

Reducer = Callable[["Machine", tuple[Any, ...]], Any]
Persistent = Callable[[Any], Any]


class Machine:
    """Interprets one pickle after the other from a source.

    Args:
        source: where the bytes are.
        budget: what may still be spent on this file.
        find: what a global's name stands for: a value, or a ``Reference``; raises Refused.
        reducers: {name: what calling it with these arguments gives}.
        persistent: what a persistent id stands for; None where the format has none.
        instantiable: whether instances of a class of this name may be made (as a ``Record``).
    """

    def __init__(
        self,
        source: Source,
        budget: Budget,
        find: Callable[[str, str], Any],
        reducers: dict[str, Reducer],
        instantiable: Callable[[str], bool],
        persistent: Persistent | None = None,
    ) -> None:
        self.source, self.budget = source, budget
        self._find, self._reducers, self._instantiable = find, reducers, instantiable
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The object of the pickle at the source's position, which is left behind it.

        Raises:
            Malformed: not a pickle, or one that asks for something absurd.
            Refused: it names code outside the list.
        """
        self._stack, self._marks, self._memo = [], [], {}
        try:
            while True:
                code = self.source.take(1)[0]
                if code == _STOP:
                    break
                self.budget.spend()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise Malformed(f"byte {code:#04x} where a pickle opcode belongs")
                operation(self)
            if self._marks or len(self._stack) != 1:
                raise Malformed("a pickle that leaves no single object")
            return self._stack[0]
        except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
            # What operations that do not fit together come to.
            reason = f"{type(error).__name__}: {error}"
            raise Malformed(f"a broken pickle ({reason:.100})") from error

    def call(self, function: Any, args: Any) -> Any:
        """What ``function(*args)`` would be, for the few functions that have a meaning here."""
        if not isinstance(function, Reference):
            raise Malformed(f"a call of {describe(function)}")
        if not isinstance(args, tuple):
            raise Malformed(f"arguments that are a {type(args).__name__}")
        reducer = self._reducers.get(function.name)
        if reducer is None:
            raise Refused(function.name)
        return reducer(self, args)

    def instance(self, kind: Any, args: Any) -> Record:
        """An object of class ``kind`` as a record."""
        if not isinstance(kind, Reference):
            raise Malformed(f"an instance of {describe(kind)}")
        if not self._instantiable(kind.name):
            raise Refused(kind.name)
        if not isinstance(args, tuple):
            raise Malformed(f"arguments that are a {type(args).__name__}")
        return Record(kind.name, args)

    # Reading arguments.

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self.source.take(struct.calcsize(layout)))[0]

    def _text(self, count: int, encoding: str) -> str:
        self.source.check(count)
        self.budget.spend(text=count)
        errors = "surrogatepass" if encoding == "utf-8" else "strict"
        return self.source.take(count).decode(encoding, errors)

    def _blob(self, count: int) -> Blob:
        if count > _SHORT:
            return Blob(self.source.skip(count), count)
        self.budget.spend(text=count)
        position = self.source.position
        return Blob(position, count, self.source.take(count))

    def _decimal(self) -> str:
        return self.source.line(_MAX_LONG).decode("ascii")

    # The stack.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise Malformed("a pickle that takes from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise Malformed("a pickle that looks at an empty stack")
        return self._stack[-1]

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise Malformed("a pickle without the mark it goes back to")
        items, self._stack = self._stack, self._marks.pop()
        return items

    # Operations with more to them than a push.

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top()

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise Malformed(f"object {index} before it was made")
        self._push(self._memo[index])

    def _drop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _integer(self) -> None:
        text = self._decimal()
        self._push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def _long(self, count: int) -> None:
        if not 0 <= count <= _MAX_LONG:
            raise Malformed(f"an integer of {count} bytes")
        self._push(int.from_bytes(self.source.take(count), "little", signed=True))

    def _quoted(self) -> None:
        text = self.source.line(_LINE).strip()
        if len(text) < 2 or text[:1] not in b"'\"" or text[-1:] != text[:1] or b"\\" in text:
            raise Malformed("a text of Python 2 with escapes")
        self.budget.spend(text=len(text))
        self._push(text[1:-1].decode("latin-1"))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise Malformed("a pickle that takes from an empty stack")
        items = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._push(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise Malformed(f"appending to {describe(target)}")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict):
            raise Malformed(f"setting items of {describe(target)}")
        if len(items) % 2:
            raise Malformed("a key without its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def _add_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, set):
            raise Malformed(f"adding to {describe(target)}")
        target.update(map(hashable, items))

    def _look_up(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Malformed("a global whose name is no text")
        self._push(self._find(module, name))

    def _global_lines(self) -> tuple[str, str]:
        return self.source.line(1000).decode(), self.source.line(1000).decode()

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            if target.state is not None:
                raise Malformed(f"a second state for {describe(target)}")
            target.state = self._state_of(state)
        elif isinstance(target, (PickledArray, PickledDtype)):
            target.set_state(state)
        elif not (isinstance(target, dict) and isinstance(state, dict)):
            raise Malformed(f"a state for {describe(target)}")
        # The attributes of a dict (``_metadata`` of a state dict) say nothing needed here.

    def _state_of(self, state: Any) -> dict[str, Any]:
        """Attributes by name; classes with slots keep theirs in the second half of a pair."""
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            first = state[0] if state[0] is not None else {}
            if isinstance(first, dict):
                self.budget.spend(len(first) + len(state[1]))
                state = {**first, **state[1]}
        if not isinstance(state, dict):
            return {"": state}
        for name in state:
            if not isinstance(name, str):
                raise Malformed(f"an attribute named by a {type(name).__name__}")
        self.budget.spend(len(state))
        return state

    def _identified(self, identifier: Any) -> None:
        if self._persistent is None:
            raise Malformed("a reference to something outside the pickle")
        self._push(self._persistent(identifier))

    def _refuse_extension(self) -> None:
        raise Refused("a class by extension code")

    def _refuse_buffer(self) -> None:
        raise Malformed("a buffer outside the pickle")


def hashable(key: Any) -> Any:
    """A key of dicts and sets: text, a number, None; others are refused.

    Hashing nested tuples recurses in C without a limit, and large integers collide at will.
    """
    if isinstance(key, int) and not -_MAX_KEY <= key <= _MAX_KEY:
        raise Malformed("a key that is an integer beyond 61 bits")
    if key is None or isinstance(key, (str, int, float, Reference)):
        return key
    raise Malformed(f"a key that is {describe(key)}")


def _pair(machine: Machine) -> list[Any]:
    value = machine._pop()
    return [machine._pop(), value]


def _dict_of(machine: Machine) -> None:
    items = machine._pop_mark()
    machine._push({})
    machine._set_items(items)


def _object(machine: Machine) -> None:
    """OBJ, protocol 1: class and arguments since the mark."""
    kind, *args = machine._pop_mark()
    machine._push(machine.call(kind, tuple(args)))


def _instance(machine: Machine) -> None:
    """INST, protocol 0: the class by name, arguments since the mark."""
    machine._look_up(*machine._global_lines())
    kind = machine._pop()
    machine._push(machine.call(kind, tuple(machine._pop_mark())))


def _reduce(machine: Machine) -> None:
    args = machine._pop()
    machine._push(machine.call(machine._pop(), args))


def _new(machine: Machine) -> None:
    args = machine._pop()
    machine._push(machine.instance(machine._pop(), args))


def _new_with_keywords(machine: Machine) -> None:
    keywords, args = machine._pop(), machine._pop()
    if keywords != {}:
        raise Malformed("an instance made with keywords")
    machine._push(machine.instance(machine._pop(), args))


def _stack_global(machine: Machine) -> None:
    name = machine._pop()
    machine._look_up(machine._pop(), name)


_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[Machine], Any]] = {
    0x80: lambda m: m.source.take(1),  # PROTO
    0x95: lambda m: m.source.take(8),  # FRAME: what it groups is read as it comes
    ord("("): Machine._mark,
    ord("0"): Machine._drop,
    ord("1"): Machine._pop_mark,
    ord("2"): lambda m: m._push(m._top()),
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("I"): Machine._integer,
    ord("J"): lambda m: m._push(m._number("<i")),
    ord("K"): lambda m: m._push(m._number("<B")),
    ord("M"): lambda m: m._push(m._number("<H")),
    ord("L"): lambda m: m._push(int(m._decimal().rstrip("L"))),
    0x8A: lambda m: m._long(m._number("<B")),
    0x8B: lambda m: m._long(m._number("<i")),
    ord("F"): lambda m: m._push(float(m._decimal())),
    ord("G"): lambda m: m._push(m._number(">d")),
    ord("S"): Machine._quoted,
    ord("T"): lambda m: m._push(m._text(m._number("<i"), "latin-1")),
    ord("U"): lambda m: m._push(m._text(m._number("<B"), "latin-1")),
    ord("X"): lambda m: m._push(m._text(m._number("<I"), "utf-8")),
    0x8C: lambda m: m._push(m._text(m._number("<B"), "utf-8")),
    0x8D: lambda m: m._push(m._text(m._number("<Q"), "utf-8")),
    ord("V"): lambda m: m._push(_RAW_UNICODE.decode(m.source.line(_LINE))[0]),
    ord("B"): lambda m: m._push(m._blob(m._number("<I"))),
    ord("C"): lambda m: m._push(m._blob(m._number("<B"))),
    0x8E: lambda m: m._push(m._blob(m._number("<Q"))),
    0x96: lambda m: m._push(m._blob(m._number("<Q"))),
    ord("]"): lambda m: m._push([]),
    ord("a"): lambda m: m._extend([m._pop()]),
    ord("e"): lambda m: m._extend(m._pop_mark()),
    ord("l"): lambda m: m._push(m._pop_mark()),
    ord(")"): lambda m: m._push(()),
    ord("t"): lambda m: m._push(tuple(m._pop_mark())),
    0x85: lambda m: m._tuple_of(1),
    0x86: lambda m: m._tuple_of(2),
    0x87: lambda m: m._tuple_of(3),
    ord("}"): lambda m: m._push({}),
    ord("d"): _dict_of,
    ord("s"): lambda m: m._set_items(_pair(m)),
    ord("u"): lambda m: m._set_items(m._pop_mark()),
    0x8F: lambda m: m._push(set()),
    0x90: lambda m: m._add_items(m._pop_mark()),
    0x91: lambda m: m._push(frozenset(map(hashable, m._pop_mark()))),
    ord("g"): lambda m: m._recall(int(m._decimal())),
    ord("h"): lambda m: m._recall(m._number("<B")),
    ord("j"): lambda m: m._recall(m._number("<I")),
    ord("p"): lambda m: m._remember(int(m._decimal())),
    ord("q"): lambda m: m._remember(m._number("<B")),
    ord("r"): lambda m: m._remember(m._number("<I")),
    0x94: lambda m: m._remember(len(m._memo)),
    ord("c"): lambda m: m._look_up(*m._global_lines()),
    0x93: _stack_global,
    ord("R"): _reduce,
    ord("b"): Machine._build,
    ord("i"): _instance,
    ord("o"): _object,
    0x81: _new,
    0x92: _new_with_keywords,
    ord("P"): lambda m: m._identified(m.source.line(_LINE).decode("ascii")),
    ord("Q"): lambda m: m._identified(m._pop()),
    0x82: Machine._refuse_extension,
    0x83: Machine._refuse_extension,
    0x84: Machine._refuse_extension,
    0x97: Machine._refuse_buffer,
    0x98: Machine._refuse_buffer,
}
