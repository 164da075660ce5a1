"""Pickles of checkpoints as plain data: opcodes are interpreted here, and none of them calls, imports or allocates.

A class or function that a pickle names stays its name. What is made with it, a `Thing`, is that name with its arguments and its
state, whatever it is. Only what checkpoints consist of becomes more: mappings, tensors by the storage that they lie in, NumPy
arrays. Nothing of the module `pickle` is used. The opcodes are those that `pickletools` documents, protocols 0 to 5.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

MAX_OPCODES = (
    1 << 21
)  # a tensor takes about 25: 10,000 tensors of weights, averages and an optimiser's state take 250,000
MAX_COPIED = 1 << 29  # bytes
MAX_KEY = 1 << 60  # larger numbers can be made to collide in a mapping
_MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"}
_REBUILD = {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")}
_SAME = {f"torch._utils._rebuild_{name}" for name in ("parameter", "parameter_with_state")}
_SAME |= {"torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_TUPLES = {"torch.Size", "builtins.tuple"}
_MARK = object()


class NoPickleError(ValueError):
    """Bytes that are no whole pickle, or one beyond the limits."""


@dataclass(eq=False, slots=True)
class Thing:
    """An object of any class, or what a call would have returned: none of it was made or run."""

    name: str  # module and name, as in argparse.Namespace
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)  # of a class that is a mapping


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers that stand outside the pickle."""

    dtype: str  # FloatStorage, UntypedStorage, ...
    key: str
    start: int  # first number that is meant; other than 0 only before PyTorch 0.4


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor: which numbers of a storage it has, in its own words. Not checked."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any
    dtype: str | None  # where the storage does not say it


def read_pickle(file: IO[bytes], storages: dict[str, str] | None = None) -> Any:
    """The next pickle of a file as plain data.

    Args:    file holds few enough bytes to be read at once; storages gets the type of each storage by its key.
    Returns: None, bool, int, float, str, bytes, list, tuple, dict, or one of the classes above. Mappings have keys that are
             text, numbers or None; other keys are replaced.
    Raises:  NoPickleError.
    """
    try:
        return _Machine({} if storages is None else storages).run(file)
    except NoPickleError:
        raise
    except Exception as e:  # whatever opcodes in a wrong order come to
        raise NoPickleError("no whole pickle") from e


class _Machine:
    """A stack, marks and a memo, as the opcodes expect them."""

    def __init__(self, storages: dict[str, str]) -> None:
        self.storages = storages
        self.copied = 0  # bytes, about: a few opcodes can ask for one copy after the other
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        for n, (op, argument, _) in enumerate(pickletools.genops(file)):
            if n > MAX_OPCODES:
                raise NoPickleError(f"a pickle of more than {MAX_OPCODES} steps")
            if op.name == "STOP":
                return self.stack.pop()
            if op.name in _VALUES:
                self.stack.append(argument)
            else:
                step = _STEPS.get(op.name)
                if step is None:  # buffers outside the pickle, classes by the number of a registry
                    raise NoPickleError(f"the opcode {op.name}")
                step(self, argument)
        raise NoPickleError("a pickle without end")

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # an IndexError where there is none
            at -= 1
            if at < 0:
                raise NoPickleError("no mark")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def top(self, n: int) -> list[Any]:
        found = self.stack[-n:] if n else []
        if len(found) < n:
            raise NoPickleError("too short a stack")
        del self.stack[len(self.stack) - n :]
        return found

    def append(self, values: list[Any]) -> None:
        if isinstance(into := self.stack[-1], list):
            into.extend(values)

    def set_items(self, flat: list[Any]) -> None:
        into = self.stack[-1]
        items = into.items if isinstance(into, Thing) else into
        if isinstance(items, dict):
            items.update(_mapping(flat))

    def build(self) -> None:
        (state,) = self.top(1)
        if isinstance(into := self.stack[-1], Thing):  # attributes of mappings and tensors are of no use
            into.state = state

    def call(self, what: Any, args: Any) -> None:
        args = args if isinstance(args, tuple) else ()
        if args and isinstance(args[0], str | list | tuple | dict):
            self.copied += len(args[0]) * (1 if isinstance(args[0], str) else 64)
            if self.copied > MAX_COPIED:
                raise NoPickleError(f"a pickle of more than {MAX_COPIED} bytes")
        self.stack.append(_called(what, args))

    def global_(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise NoPickleError("a name that is no text")
        module = "builtins" if module == "__builtin__" else module
        self.stack.append(Name(f"{module}.{name}"))

    def storage(self, described: Any) -> None:
        """As torch.save describes one: ('storage', its type, its key, where it lay, how many numbers[, part of it]).

        In files of before 2020 a network's class comes with its source code, which is left alone.
        """
        if isinstance(described, tuple) and len(described) > 1 and described[0] == "module":
            self.stack.append(described[1])
            return
        if not isinstance(described, tuple) or len(described) < 5 or described[0] != "storage":
            raise NoPickleError("a reference to something outside the file")
        view = described[5] if len(described) > 5 else None
        start = view[1] if isinstance(view, tuple) and len(view) > 1 and isinstance(view[1], int) else 0
        kind = described[1].name.rpartition(".")[2] if isinstance(described[1], Name) else "?"
        self.storages[str(described[2])] = kind
        self.stack.append(Storage(kind, str(described[2]), start))


def _called(what: Any, args: tuple[Any, ...]) -> Any:
    """What what(*args) stands for."""
    name = what.name if isinstance(what, Name | Thing) else type(what).__name__
    first = args[0] if args else None
    if name in _MAPPINGS:
        pairs = first if isinstance(first, list) else []
        found = dict(first) if isinstance(first, dict) else {}
        return found | _mapping(
            [x for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 for x in pair]
        )
    if name in _REBUILD and len(args) >= 4 and isinstance(first, Storage):
        dtype = args[6] if name.endswith("_v3") and len(args) > 6 else None
        offset, size, stride = args[1:4]
        return Stored(first, offset, size, stride, dtype.name.rpartition(".")[2] if isinstance(dtype, Name) else None)
    if name in _SAME and isinstance(first, Stored):
        return first
    if name in _TUPLES and isinstance(first, list | tuple):
        return tuple(first)
    if name == "torch._tensor._rebuild_from_type_v2" and len(args) >= 3 and isinstance(args[2], tuple):
        return _called(first, args[2])  # a tensor with attributes of its own, or of a subclass
    if name == "_codecs.encode" and isinstance(first, str):  # bytes, as Python 3 writes them for Python 2
        return first.encode("latin1")
    if name in ("copyreg._reconstructor", "copy_reg._reconstructor") and isinstance(first, Name):
        return Thing(first.name)
    return Thing(name, args)


def _mapping(flat: list[Any]) -> dict[Any, Any]:
    """Of keys and values by turns."""

    def key(k: Any) -> Any:
        plain = k is None or isinstance(k, str | float | bytes) or (isinstance(k, int) and abs(k) < MAX_KEY)
        return k if plain else Thing("a key")

    return dict(zip(map(key, flat[::2]), flat[1::2], strict=True))


# A value that is the argument of its opcode.
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}


def _push(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(make())


def _tuple(n: int) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(tuple(m.top(n)))


def _get(m: _Machine, i: Any) -> None:
    m.stack.append(m.memo[int(i)])


def _put(m: _Machine, i: Any) -> None:
    m.memo[int(i)] = m.stack[-1]


def _instance(m: _Machine, values: list[Any]) -> None:
    m.call(values[0], tuple(values[1:]))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": _push(lambda: _MARK),
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_SET": _push(lambda: Thing("builtins.set")),
    "EMPTY_TUPLE": _tuple(0),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": lambda m, _: m.stack.append(_mapping(m.since_mark())),
    "FROZENSET": lambda m, _: m.stack.append(Thing("builtins.frozenset", tuple(m.since_mark()))),
    "POP": lambda m, _: m.top(1).clear(),
    "POP_MARK": lambda m, _: m.since_mark().clear(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "APPEND": lambda m, _: m.append(m.top(1)),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "ADDITEMS": lambda m, _: m.since_mark().clear(),
    "SETITEM": lambda m, _: m.set_items(m.top(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda m, _: _put(m, len(m.memo)),
    "GLOBAL": lambda m, name: m.global_(*str(name).split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.global_(*m.top(2)),
    "INST": lambda m, name: m.call(Name(str(name).replace(" ", ".")), tuple(m.since_mark())),
    "OBJ": lambda m, _: _instance(m, m.since_mark()),
    "REDUCE": lambda m, _: m.call(*m.top(2)),
    "NEWOBJ": lambda m, _: m.call(*m.top(2)),
    "NEWOBJ_EX": lambda m, _: m.call(*m.top(3)[:2]),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.storage(m.top(1)[0]),
}
