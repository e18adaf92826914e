"""Objects from configurations that name their class by ``_target_``, as Hydra's ``instantiate`` does, without Hydra."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar

from ttcfast.runtime.errors import ArgumentError

T = TypeVar("T")


def locate(path: Any, kind: type[T], where: str) -> type[T]:
    """The class that ``path`` names, checked to be a subclass of ``kind``.

    Args:
        path: such as ``"ttcfast.pwm.models.world_model.MLPWorldModel"``.
        kind: what it must derive from.
        where: the key it comes from, for messages.

    Raises:
        ArgumentError: no such module or class, or a class of another kind.
    """
    if not isinstance(path, str) or "." not in path:
        raise ArgumentError(f"{where} is {path!r}; give the full path of a class that derives from {kind.__module__}.{kind.__qualname__}")
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"{where} is {path!r}, which cannot be found ({error})") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ArgumentError(f"{where} is {path!r}, which is no {kind.__name__}")
    return found


def build(kind: type[T], where: str, config: Mapping[str, Any], *positional: Any, **extra: Any) -> T:
    """``kind(*positional, **config, **extra)`` without the entry ``_target_``; every key is checked before.

    Raises:
        ArgumentError: a key that the class does not take, or a value that is no number where it wants one.
    """
    given = {key: value for key, value in config.items() if key != "_target_"}
    known = _parameters(kind)
    for key, value in given.items():
        if key not in known:
            raise ArgumentError(f"{where}.{key} is unknown; {kind.__name__} takes {', '.join(known)}")
        if known[key] in ("int", "float") and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ArgumentError(f"{where}.{key} is {value!r}; give a number")
    return kind(*positional, **{**given, **extra})


def _parameters(kind: type) -> dict[str, str]:
    """What the class's ``__init__`` takes and the annotations, with those of its base classes where it hands on ``**others``."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        found = {p.name: str(p.annotation) for p in named} | found
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return found
