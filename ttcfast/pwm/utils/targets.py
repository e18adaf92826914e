"""Builds objects from configurations that name their class by ``_target_``, like Hydra's ``instantiate`` but without imports."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, TypeVar

from ttcfast.runtime.errors import ArgumentError

T = TypeVar("T")

_registered: dict[str, type] = {}


def register(kind: type[T]) -> type[T]:
    """Let configurations and checkpoints name the class ``kind``, a world model or a dynamics loss; also works as a decorator.

    Importing whatever a file names would run code of the file's choosing, so nothing is imported for a name: classes of ttcfast are known,
    and others after this call, by ``module.Class``.
    """
    _registered[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return kind


def locate(path: Any, kind: type[T], where: str) -> type[T]:
    """Return the subclass of ``kind`` that ``path`` names, without importing anything.

    Args:
        path: Path such as ``"ttcfast.pwm.models.world_model.MLPWorldModel"``.
        kind: Class from which it must derive.
        where: Key of ``path``, for error messages.

    Raises:
        ArgumentError: There is no such class, it does not derive from ``kind``, or it is neither ttcfast's nor registered.
    """
    if not isinstance(path, str) or "." not in path:
        raise ArgumentError(f"{where} is {path!r}; give the full path of a class that derives from {kind.__module__}.{kind.__qualname__}")
    module, _, name = path.rpartition(".")
    found = _registered.get(path)
    if found is None and module.partition(".")[0] == "ttcfast" and module in sys.modules:
        found = vars(sys.modules[module]).get(name)
    if not (isinstance(found, type) and issubclass(found, kind)) or inspect.isabstract(found):
        remedy = f"call ttcfast.pwm.utils.targets.register({name}) before, if it is yours and you trust it"
        raise ArgumentError(f"{where} is {path!r}, which is no {kind.__name__} of ttcfast, nor registered; {remedy}")
    return found


def group(config: Mapping[str, Any], name: str, known: Collection[str] | None = None, inside: str = "alg.") -> dict[str, Any]:
    """Return a copy of the group ``config[name]``, empty if it is missing or None.

    Args:
        config: Configuration that holds the group.
        name: Key of the group.
        known: Keys that the group may have; None for any.
        inside: Prefix of ``name`` in error messages.

    Raises:
        ArgumentError: The entry is no group, or has an unknown key.
    """
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ArgumentError(f"{inside}{name} is {found!r}; give a group of keys and values")
    for key in found or ():
        if known is not None and key not in known:
            raise ArgumentError(f"{inside}{name}.{key} is unknown; {inside}{name} takes {', '.join(known)}")
    return dict(found or {})


def build(kind: type[T], where: str, config: Mapping[str, Any], *positional: Any, **extra: Any) -> T:
    """Return ``kind(*positional, **config, **extra)``, leaving out the entry ``_target_``.

    Raises:
        ArgumentError: The class does not take a key, or a value that should be a number is none.
    """
    given = {key: value for key, value in config.items() if key != "_target_"}
    known = _parameters(kind)
    for key, value in given.items():
        if key not in known:
            raise ArgumentError(f"{where}.{key} is unknown; {kind.__name__} takes {', '.join(known)}")
        optional = value is None and known[key].endswith(" | None")
        number = known[key].removesuffix(" | None") in ("int", "float")
        if number and not optional and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ArgumentError(f"{where}.{key} is {value!r}; give a number")
    return kind(*positional, **{**given, **extra})


def _parameters(kind: type) -> dict[str, str]:
    """Return the parameters of ``__init__`` and their annotations, with those of base classes if it passes on ``**others``."""
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
