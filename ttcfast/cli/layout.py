"""Mapping between the keys of a command and the fields of its dataclass."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ttcfast.runtime.files import strict

from .typed import build

MODEL = {"checkpoint": "fm.ckpt", "factory": "fm.factory", "args": "fm.args"}
"""Keys of the fields that name a surrogate."""
INSTEAD = {"fm.factory": {"fm.ckpt": "null"}}
"""A factory takes the place of the checkpoint that a command would take."""


def with_noise(key: str) -> dict[str, dict[str, str]]:
    """Like ``INSTEAD`` for a command whose noise lies below ``key``: the model's own, or else given without what our recipe adds."""
    return {"fm.factory": {**INSTEAD["fm.factory"], key: "null", f"{key}.latent_sigma": "0.0"}}


_MISSING = (dataclasses.MISSING, inspect.Parameter.empty)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The keys of a command.

    Args:
        source: Dataclass, or function, whose fields are the keys and whose defaults are theirs; None for a command without one.
        keys: Dotted key of each field that is not called by its own name. The fields of a nested dataclass join the group that its key
            names.
        groups: Defaults of dotted keys that the dataclass leaves open; ``"???"`` must be given.
        hidden: Dotted keys that the command does not offer.
        free: Dotted keys of mappings whose keys the user chooses.
        instead: Values of other keys where a key is given and they, what lies below them and what they lie in are not.
        aliases: Other names of keys, each with the key it stands for; a trailing dot stands for everything below.
        places: Fields that take one path or a list of paths, and keep a tuple.
        words: Key of the list that collects arguments which are not ``key=value``.
    """

    source: Callable[..., Any] | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    instead: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    places: tuple[str, ...] = ()
    words: str | None = None

    def defaults(self) -> dict[str, Any]:
        """Return the default of every key as nested plain containers; a value that must be given is ``"???"``, as in Hydra."""
        tree: dict[str, Any] = {}
        found = {} if self.source is None else plain_defaults(self.source)
        for key, value in [*((self.keys.get(name, name), value) for name, value in found.items()), *self.groups.items()]:
            *path, last = key.split(".")
            group = tree
            for part in path:
                group = group.setdefault(part, {})
            joins = isinstance(group.get(last), dict) and isinstance(value, Mapping)
            group[last] = group[last] | value if joins else value
        for key in self.hidden:
            _take(tree, key)
        return tree

    def build(self, values: Mapping[str, Any]) -> Any:
        """Make the dataclass from the command's configuration; see :func:`ttcfast.cli.typed.build` for the errors."""
        assert self.source is not None
        rest, fields = copy.deepcopy(dict(values)), {}
        for name, key in sorted(self.keys.items(), key=lambda item: -item[1].count(".")):  # a group is what its fields have left
            fields[name] = _take(rest, key)
        for name in self.places:
            fields[name] = [str(place) for place in (fields[name] if isinstance(fields[name], list) else [fields[name]])]
        emptied = {key.partition(".")[0] for key in self.keys.values()}
        rest = {name: value for name, value in rest.items() if value != {} or name not in emptied}
        return build(self.source, {**rest, **fields}, names=self.keys)


def plain_defaults(source: Callable[..., Any], *names: str) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields or a function's parameters as plain containers; ``names`` picks some of them."""
    found: dict[str, Any]
    if dataclasses.is_dataclass(source):
        found = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in dataclasses.fields(source)}
    else:
        found = {name: parameter.default for name, parameter in inspect.signature(source).parameters.items()}
    return {name: "???" if value in _MISSING else _plain(value) for name, value in found.items() if name in names or not names}


def _plain(value: Any) -> Any:
    return strict(dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value)


def _take(tree: dict[str, Any], key: str) -> Any:
    *path, last = key.split(".")
    for part in path:
        tree = tree[part]
    return tree.pop(last)
