"""Construction of dataclasses from configuration values, with their types checked against the annotations."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ttcfast.runtime.errors import ArgumentError

T = TypeVar("T")


def build(kind: Callable[..., T], values: Mapping[str, Any], where: str = "", names: Mapping[str, str] | None = None) -> T:
    """Make the dataclass ``kind`` from configuration values, whose types are checked against its annotations.

    Args:
        kind: A dataclass; nested dataclasses are built from nested mappings.
        values: Values by field name.
        where: Dotted prefix of the keys, for messages.
        names: Keys of the fields that users know by another name.

    Raises:
        ArgumentError: A key is unknown, a value has another type, or the dataclass itself refuses a value.
    """
    names = names or {}
    fitted = fit(kind, values, where, names)
    try:
        return kind(**fitted)
    except (TypeError, ValueError) as error:
        text, field = str(error), str(error).partition(" ")[0]
        if field in values:
            text = names.get(field, where + field) + text[len(field) :]
        raise ArgumentError(text) from error


def fit(target: Callable[..., Any], values: Mapping[str, Any], where: str = "", names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Convert configuration values to the arguments of a function or dataclass, by its annotations; see ``build``."""
    hints = typing.get_type_hints(target)  # of a dataclass: its fields
    known = list(inspect.signature(target).parameters)
    names = names or {}
    for name in values:
        if name not in known:
            raise ArgumentError(unknown(f"{where}{name}", [where + k for k in known]))
    return {name: _fit(hints[name], value, names.get(name, where + name)) for name, value in values.items()}


def unknown(key: str, known: Sequence[str]) -> str:
    """Return the message for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if len(known) < 12 else "")


def _fit(hint: Any, value: Any, key: str) -> Any:
    """Convert ``value`` to the annotation ``hint``, or raise ``ArgumentError``."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if value == "???":
        raise ArgumentError(f"{key} is not given; add {key}=...")
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _fit_union(inside, value, key)
    if origin is typing.Literal:
        if value in inside:
            return value
        raise ArgumentError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, inside))}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return build(hint, value, f"{key}.")
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, (list, tuple)) and isinstance(value, (list, tuple)):
        item = inside[0] if inside else Any
        return kind(_fit(item, each, f"{key}[{i}]") for i, each in enumerate(value))
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        _require_machine_number(key, value)
        if kind is float:
            return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise ArgumentError(f"{key} is {value!r}; expected {_in_words(hint)}")


def _require_machine_number(key: str, value: float) -> None:
    """Reject integers beyond 64 bits, NaN and infinities, which would slip past range checks."""
    if not math.isfinite(value) if isinstance(value, float) else not -(2**63) <= value < 2**63:
        raise ArgumentError(f"{key} is {value}; give a finite number" + (" of at most 64 bits" if isinstance(value, int) else ""))


def _fit_union(choices: Sequence[Any], value: Any, key: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    errors = []
    for choice in choices:
        try:
            return _fit(choice, value, key)
        except ArgumentError as error:
            errors.append(error)
    if len(errors) == 2 and types.NoneType in choices:  # X | None: what is wrong is what X says
        raise errors[0] if choices[1] is types.NoneType else errors[1]
    raise ArgumentError(f"{key} is {value!r}; expected {' or '.join(map(_in_words, choices))}")


def _in_words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null", Path: "a path"}
    kind = typing.get_origin(hint) or hint
    if hint in names:
        return names[hint]
    return "a list [a,b]" if kind in (list, tuple) else "a mapping {key: value}"
