"""What the calls in a pickle mean: the few that make tensors and containers; others are records.

Nothing is called. A call that is not known, whatever it names, becomes a :class:`Record` of its
name and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckdiff.checkpoints.formats.pickledvalues import Odd, Record, Row, Storage, Tensor, Word

#: storage classes of old -> torch's names of dtypes; others' tensors say it themselves
STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8",
    "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
    "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "FloatStorage": "float32",
    "DoubleStorage": "float64", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip
_UNTYPED = {"torch.storage.UntypedStorage", "torch.UntypedStorage"}
_MOST_ARGUMENTS = 16  # that a tensor is made of: a longer tuple is not looked through at each call
MAX_DIMS = 64  #: dimensions of the deepest tensor that is accepted, as in numpy
_SMALL = (1 << 61) - 1  # Python's hashes of smaller numbers are themselves: they do not collide


def key_of(key: Any) -> Any:
    """A key as Python's own dict may have it.

    To hash a deep tuple overflows the stack, and large numbers can be chosen to collide.
    """
    kind = type(key)
    if kind in (str, bytes, bool, Row) or key is None or (kind is int and -_SMALL < key < _SMALL):
        return key
    return Odd(key)


def storage_of(reference: Any) -> Storage | None:
    """The storage that a persistent reference names; None where it is none."""
    match reference:
        case ("storage", Word() as kind, str(key), _, int(size), *_) if type(size) is int:
            if kind.name in _UNTYPED:
                return Storage(key, None, size)
            dtype = STORAGES.get(kind.qualname) if kind.module.startswith("torch") else None
            return Storage(key, dtype, size) if dtype else None
    return None


def called(what: Word, args: tuple[Any, ...]) -> Any:
    """What ``what(*args)`` stands for."""
    meaning = _MEANINGS.get(what.name)
    found = meaning(args) if meaning is not None else None
    if found is not None:
        return found
    return Record(what, args, tensor=what.name.startswith("torch._utils._rebuild_"))


# what each function means, or None where its arguments are not those that it takes


def _tensor_v2(args: tuple[Any, ...]) -> Any:
    if len(args) > _MOST_ARGUMENTS:
        return None
    match args:
        case (Storage(dtype=str(dtype)) as storage, offset, shape, strides, _, _, *rest):
            return _tensor(storage, dtype, offset, shape, strides, rest)
        case (Storage(dtype=str(dtype)) as storage, offset, shape, strides):
            return _tensor(storage, dtype, offset, shape, strides, [])
    return None


def _tensor_v3(args: tuple[Any, ...]) -> Any:
    if len(args) > _MOST_ARGUMENTS:
        return None
    match args:
        case (Storage() as storage, offset, shape, strides, _, _, Word() as kind, *rest) if (
            kind.module == "torch"
        ):
            return _tensor(storage, kind.qualname, offset, shape, strides, rest)
    return None


def _tensor(
    storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, rest: list[Any]
) -> Tensor | None:
    if not (type(shape) is type(strides) is tuple and len(shape) == len(strides) <= MAX_DIMS):
        return None
    if not all(type(number) is int for number in (offset, *shape, *strides)):
        return None
    marks: tuple[str, ...] = ()
    for more in rest:  # metadata
        if more is not None and (type(more) is not dict or len(more) > _MOST_ARGUMENTS):
            return None
        marks += tuple(name for name, value in (more or {}).items() if value and type(name) is str)
    return Tensor(storage, dtype, offset, shape, strides, marks)


def _first(args: tuple[Any, ...]) -> Any:
    """A parameter: the tensor that it is made of."""
    return args[0] if args and type(args[0]) in (Tensor, Record) else None


def _of_device(args: tuple[Any, ...]) -> Any:
    match args:
        case (Tensor() as tensor, Word(module="torch", qualname=dtype), *_):
            return tensor if dtype == tensor.dtype else None
    return None


def _of_type(args: tuple[Any, ...]) -> Any:
    """A tensor of some class: a view of a storage, or what its class makes of its state."""
    match args:
        case (Word(module="torch._utils") as function, Word() as kind, tuple(inner), state, *_):
            made = called(function, inner)
            if type(made) is Tensor:
                return made
            return Record(kind, inner, state=state, tensor=True)
    return None


def _size(args: tuple[Any, ...]) -> Any:
    match args:
        case (tuple(dims),) | (list(dims),):
            return dims
    return None


def _dict(args: tuple[Any, ...]) -> Any:
    match args:
        case ():
            return {}
        case (dict() as given,):
            return given
        case (list(pairs),) if all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
            found = {key_of(key): value for key, value in pairs}
            return found if len(found) == len(pairs) else None
    return None


def _set(args: tuple[Any, ...]) -> Any:
    match args:
        case ():
            return []
        case (list() | tuple() as items,):
            return items
    return None


def _new_object(args: tuple[Any, ...]) -> Any:
    match args:
        case (Word() as kind, *rest):
            return Record(kind, tuple(rest))
    return None


def _reconstructed(args: tuple[Any, ...]) -> Any:
    match args:
        case (Word() as kind, Word(), _):
            return Record(kind, args[2:])
    return None


_MEANINGS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _of_device,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch.tensor._rebuild_from_type": _of_type,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda args: _dict(args[1:]),
    "builtins.dict": _dict,
    "__builtin__.dict": _dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.frozenset": _set,
    "__builtin__.frozenset": _set,
    "copyreg.__newobj__": _new_object,
    "copy_reg.__newobj__": _new_object,
    "copyreg._reconstructor": _reconstructed,
    "copy_reg._reconstructor": _reconstructed,
}
