"""What an object does, as far as its settings tell: for comparing a model or a scorer with that of another process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import os
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LONG = 32  # entries from which a sequence is one setting
_OPAQUE = {*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"}  # packages whose objects say no more than their class


def settings_of(name: str, value: Any) -> dict[str, Any]:
    """All that tells ``value`` from another of its kind, as JSON values by path (``"scorer.weights.w_mass"``).

    Followed are the attributes of objects, modules and dataclasses, items, and what functions close over. A tensor counts by its bytes, a
    function by its place, code and constants, an object of torch's or Python's own by its class. Private attributes count where they are
    numbers, strings, functions or objects: containers and tensors there are taken for caches. An object that says by ``__reduce__`` what
    it is made of is described by that.
    """
    walk = _Walk()
    walk.add(name, value)
    return walk.found


def checksum_of(tensor: Tensor) -> str:
    """Dtype, shape and a checksum of the bytes."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(flat.numpy()):08x}"  # type: ignore[arg-type]


class _Walk:
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._around: list[Any] = []  # what is being described now
        self._modules: dict[int, str] = {}  # those described, which take longest

    def add(self, path: str, value: Any) -> None:
        if (text := _plain(value)) is not NotImplemented:
            self.found[path] = text
            return
        if id(value) in self._modules or any(outer is value for outer in self._around):
            self.found[path] = f"the same as {self._modules.get(id(value), type(value).__name__)}"
            return
        if isinstance(value, nn.Module):
            self._modules[id(value)] = path
        self._around.append(value)
        self._add(path, value)
        self._around.pop()

    def _add(self, path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            self.found[path] = f"{type(value).__name__} of {len(value)}"
            self._items(path, [(str(_plain(key)), item) for key, item in value.items()])
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            self.found[path] = f"{type(value).__name__} of {len(value)}"
            self._items(path, [(str(i), item) for i, item in enumerate(items)])
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self.found[path] = value.__func__.__qualname__
            self.add(f"{path}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self.found[path] = "partial"
            self._items(path, [("func", value.func), ("args", value.args), ("keywords", value.keywords)])
        else:
            self._object(path, value)

    def _items(self, path: str, items: list[tuple[str, Any]]) -> None:
        if len(items) <= _LONG:
            for name, item in items:
                self.add(f"{path}.{name}", item)
            return
        inner = _Walk()
        inner._around, inner._modules = self._around, self._modules
        for name, item in items:
            inner.add(f"{path}.{name}", item)
        self.found[path] += f" {zlib.crc32(repr(sorted(inner.found.items())).encode()):08x}"

    def _function(self, path: str, function: types.FunctionType) -> None:
        self.found[path] = f"{function.__module__}.{function.__qualname__}"
        if _opaque(str(function.__globals__.get("__name__"))):  # such as what torch.compile returns
            return
        self.found[path] += f" {_code(function.__code__):08x}"
        cells = zip(function.__code__.co_freevars, function.__closure__ or ())
        for name, value in (*_filled(cells), *(function.__kwdefaults__ or {}).items()):
            self.add(f"{path}.{name}", value)
        for number, value in enumerate(function.__defaults__ or ()):
            self.add(f"{path}.default{number}", value)

    def _object(self, path: str, value: Any) -> None:
        kind = type(value)
        self.found[path] = kind.__name__
        if isinstance(value, nn.Module):
            own = {**value._parameters, **value._buffers}
            tensors = {name: checksum_of(t) for name, t in own.items() if t is not None}
            if tensors:
                self.found[f"{path}.weights"] = f"{zlib.crc32(repr(sorted(tensors.items())).encode()):08x}"
            for name, child in value._modules.items():  # before attributes, through which they may be met again
                self.add(f"{path}.{name}", child)
        elif _opaque(kind.__module__):
            return
        elif kind.__reduce__ is not object.__reduce__:
            self._items(path, _made_of(value))
            return
        plain = {}
        for name, item in sorted(_attributes(value).items()):
            if not _counts(name, item):
                continue
            if isinstance(value, nn.Module) and _opaque(kind.__module__):  # a layer's sizes, of which there are many, are one setting
                plain[name] = _plain(item)
            else:
                self.add(f"{path}.{name}", item)
        if plain := {name: text for name, text in plain.items() if text is not NotImplemented}:
            self.found[path] += f" {zlib.crc32(repr(plain).encode()):08x}"


def _plain(value: Any) -> Any:
    """A JSON value for what needs no more than one; NotImplemented for all else."""
    if isinstance(value, enum.Enum):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor):
        return checksum_of(value)
    if isinstance(value, (bytes, complex, range, slice, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return f"{value.dtype} {value.shape} {zlib.crc32(value.tobytes()):08x}"
    return NotImplemented


def _counts(name: str, value: Any) -> bool:
    if name == "training":  # a surrogate puts its model in evaluation
        return False
    container = value is None or isinstance(value, (Tensor, Mapping, list, tuple, set, frozenset))
    return not name.startswith("_") or not container


def _attributes(value: Any) -> dict[str, Any]:
    held = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        held |= {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return held


def _made_of(value: Any) -> list[tuple[str, Any]]:
    try:
        make, given = value.__reduce__()[:2]
        return list(zip(inspect.signature(make).parameters, given))
    except Exception:  # of somebody else's class, which cannot be pickled or says it otherwise: its name must do
        return []


def _filled(cells: Any) -> Iterator[tuple[str, Any]]:
    for name, cell in cells:
        try:
            yield name, cell.cell_contents
        except ValueError:  # not yet bound
            continue


def _opaque(module: str) -> bool:
    return module.partition(".")[0] in _OPAQUE


def _code(code: types.CodeType, total: int = 0) -> int:
    total = zlib.crc32(code.co_code + repr(code.co_names).encode(), total)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            total = _code(constant, total)
        else:  # a set's order is another in every process
            total = zlib.crc32(repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant).encode(), total)
    return total
