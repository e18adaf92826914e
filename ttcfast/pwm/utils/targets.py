"""Objects from configurations that name their class by ``_target_``, as Hydra's ``instantiate`` does, without Hydra."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeVar

from ttcfast.runtime.errors import ArgumentError

T = TypeVar("T")

_registered: dict[str, type] = {}


def register(kind: type[T]) -> type[T]:
    """Let configurations and checkpoints name a class of yours; also a decorator.

    A file says which class it wants, and importing whatever it names would run code of its choosing. So nothing is ever imported for a
    name: classes of ttcfast are known, others are after this call, by ``module.Class`` as Python names them.

    Args:
        kind: a world model or a dynamics loss.

    Returns:
        ``kind``.
    """
    _registered[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return kind


def locate(path: Any, kind: type[T], where: str) -> type[T]:
    """The class that ``path`` names, checked to be a subclass of ``kind``; one of ttcfast or :func:`register`, and nothing is imported.

    Args:
        path: such as ``"ttcfast.pwm.models.world_model.MLPWorldModel"``.
        kind: what it must derive from.
        where: the key it comes from, for messages.

    Raises:
        ArgumentError: no such class, a class of another kind, or one that is neither ttcfast's nor registered.
    """
    if not isinstance(path, str) or "." not in path:
        raise ArgumentError(f"{where} is {path!r}; give the full path of a class that derives from {kind.__module__}.{kind.__qualname__}")
    module, _, name = path.rpartition(".")
    ours = module.partition(".")[0] == "ttcfast"
    found = _registered.get(path)
    if found is None and ours:
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if found is None:
            raise ArgumentError(f"{where} is {path!r}, which cannot be found; give {kind.__module__}'s, or register() your own class")
    if not (isinstance(found, type) and issubclass(found, kind)) or inspect.isabstract(found):
        remedy = f"call ttcfast.pwm.utils.targets.register({name}) before, if it is yours and you trust it"
        raise ArgumentError(f"{where} is {path!r}, which is no {kind.__name__} of ttcfast, nor registered; {remedy}")
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
