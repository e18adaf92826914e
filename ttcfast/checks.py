"""Checks of arguments that every layer makes: one error that names the argument, its value and what is allowed."""

from __future__ import annotations

import numbers
from collections.abc import Sequence


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise one ``ValueError`` that names the argument, the value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ``ValueError`` unless ``value`` is at least ``least``, which NaN is not."""
    if not value >= least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def whole(name: str, value: int, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number of at least ``least``."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")
    at_least(name, int(value), least)


def each_once(name: str, values: Sequence[object]) -> None:
    """Raise ``ValueError`` if ``values`` is empty or holds a value twice."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} is {list(values)}; give at least one, each once")
