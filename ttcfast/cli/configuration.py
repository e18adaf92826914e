"""The configuration of a command: Hydra composes it from the defaults of a dataclass, ``ttcfast/configs`` and ``key=value``."""

from __future__ import annotations

import functools
import importlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttcfast.checks import one_of
from ttcfast.runtime import provenance
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import atomic_write, output_folder
from ttcfast.runtime.terminal import wrapped

from .layout import Layout
from .typed import unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Values = dict[str, str | list[str]]
"""Values by key in Hydra's notation; a list holds the values of a sweep."""

# Keys that name a file or a folder: their text is taken as it stands, so that out=20240101 is no number and a blank or comma no syntax.
_PATHS = {
    *("out", "data", "data.root", "fm", "fm.ckpt", "fm.finetuned", "reward.prm_ckpt", "init", "model.init", "checkpoint", "examples"),
    *("ttc.stochastic.directions", "stochastic.directions"),
}
_MEANINGS = {"use_prm": {True: "prm", False: "arm"}}  # aliases whose values are called otherwise, too


def compose(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of ``command`` after ``arguments`` (``key=value``, aliases allowed) as plain containers.

    Raises:
        ArgumentError: An argument is not ``key=value``, a key is unknown, an alias and its key disagree, or a value cannot be parsed.
    """
    return resolve(command, settle(command, arguments))


def settle(command: str, arguments: Sequence[str], *, sweeps: bool = False) -> Values:
    """Return the value that the arguments assign to each key, aliases resolved; ``sweeps`` parses ``a,b`` and the like as several values.

    Raises:
        ArgumentError: As ``compose``, but for values that cannot be parsed.
    """
    layout, defaults = layout_of(command), _defaults(command)
    if arguments and not defaults:
        raise ArgumentError(f"ttcfast {command} takes no keys; it was given {' '.join(arguments)}")
    given = [_split(argument) for argument in _words_as_list(layout, command, arguments, defaults)]
    settled: dict[str, tuple[str, Any]] = {}
    values: Values = {}
    for name, text in given:
        key, value = _canonical(layout, name, text, sweeps)
        meaning = [_parse(each) for each in value] if isinstance(value, list) else _parse(value)
        if key in settled and not settled[key][0].startswith(f"{name}=") and settled[key][1] != meaning:
            raise ArgumentError(f"{settled[key][0]} and {name}={text} mean the same key ({key}) and disagree; give one of them")
        settled[key] = (settled[key][0] if key in settled else f"{name}={text}", meaning)
        values[key] = value
    for key, value in values.items():
        if (CONFIGS / key).is_dir():
            for each in value if isinstance(value, list) else [value]:
                one_of(key, each, tuple(sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))))
        if not key.startswith(tuple(f"{free}." for free in layout.free)):
            _check_key(command, key, defaults)
    for key, others in layout.instead.items():
        for other, value in others.items() if values.get(key, "null") != "null" else ():
            if not any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for name in values):
                values[other] = value
    return values


def overrides(command: str, values: Values) -> list[str]:
    """Write settled values as Hydra's overrides; what may hold new keys is forced (``++``)."""
    free = layout_of(command).free
    written = []
    for key, value in values.items():
        text = value if isinstance(value, str) else ",".join(value) if len(value) > 1 else f"choice({value[0]})"
        forced = text.startswith("{") or f"{key}.".startswith(tuple(f"{name}." for name in free))
        written.append(f"{'++' * forced}{key}={text}")
    return written


def resolve(command: str, values: Values) -> dict[str, Any]:
    """Return the configuration of ``command`` after settled values as plain containers; ``ArgumentError`` if Hydra cannot parse one."""
    return _hydra(command, overrides(command, values))


def layout_of(command: str) -> Layout:
    """Return the ``LAYOUT`` of the command's file."""
    return typing.cast("Layout", importlib.import_module(f"ttcfast.cli.{command}").LAYOUT)


def register(command: str) -> str:
    """Register the command's defaults with Hydra and return the name of its configuration there."""
    ConfigStore.instance().store(f"{command}_defaults", layout_of(command).defaults())
    return command if (CONFIGS / f"{command}.yaml").is_file() else f"{command}_defaults"


def defaults_text(command: str) -> str:
    """Return the keys of ``command`` with their defaults for ``--help``: a paragraph per group, in lines that fit the terminal.

    Values are written as a command line takes them.
    """
    defaults = _defaults(command)
    if not defaults:
        return "  (none)"
    lines = []
    for group, keys in _groups(defaults):
        text = "  ".join(f"{key}={_written(value)}" for key, value in keys.items())
        lines += wrapped(f"{group}. {text}", "  ", " " * 6) if group else wrapped(text, "  ", "  ")
    aliases = [
        f"{alias}{'*' * alias.endswith('.')} for {key}{'*' * key.endswith('.')}" for alias, key in layout_of(command).aliases.items()
    ]
    if aliases:
        lines += ["", *wrapped(f"Also understood: {', '.join(aliases)}")]
    return "\n".join(lines)


def _groups(defaults: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each group's dotted name with its own keys, those without a group first."""
    yield from [(name, own)] if (own := {key: value for key, value in defaults.items() if not (isinstance(value, dict) and value)}) else []
    for key, value in defaults.items():
        if isinstance(value, dict) and value:
            yield from _groups(value, f"{name}.{key}" if name else key)


def _written(value: Any) -> str:
    """Write a default as an argument holds it, without blanks."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value) or "''"


def save(folder: str | Path, config: Mapping[str, Any], name: str) -> Path:
    """Write the run's configuration and provenance to ``folder``, as ``<name>.yaml`` and ``<name>.provenance.json``.

    Raises:
        OutputError: The folder cannot be made or written.
    """
    place = output_folder(folder)
    with atomic_write(place / f"{name}.yaml") as file:
        yaml.safe_dump(dict(config), file, sort_keys=False)
    provenance.write(place, config, f"{name}.provenance.json")
    return place


def quoted(word: str) -> str:
    """Quote a word for Hydra's grammar: backslashes before a quote, and at the end, are doubled."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), word) + "'"


def _split(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or not key or key[0] in "+~-" or " " in key:
        raise ArgumentError(f"{argument!r} is not key=value; write for example seed=1 or ttc.branching_factor=8")
    return key, value


def _words_as_list(layout: Layout, command: str, arguments: Sequence[str], defaults: Mapping[str, Any]) -> list[str]:
    """Rewrite ``report a b out=c`` as ``report runs=[a,b] out=c``; an existing folder called ``ttc.seed=1`` counts as a word."""
    key = layout.words
    if key is None:
        return list(arguments)
    words = [a for a in arguments if "=" not in a or (a.partition("=")[0] not in defaults and Path(a).exists())]
    if words and (given := next((a for a in arguments if a.startswith(f"{key}=")), None)):
        raise ArgumentError(f"{given} and {words[0]!r} both name what {command} takes; give one list, with or without {key}=")
    return [a for a in arguments if a not in words] + ([f"{key}=[{','.join(map(quoted, words))}]"] if words else [])


def _canonical(layout: Layout, name: str, text: str, sweeps: bool) -> tuple[str, str | list[str]]:
    """Resolve an alias and return the key with its value, or values, in Hydra's notation."""
    found = (a for a in layout.aliases if name == a or (a.endswith(".") and name.startswith(a)))
    alias = next(found, "")
    key = layout.aliases[alias] + name[len(alias) :] if alias else name
    several = _swept(text) if sweeps else None
    written = [text] if several is None else several
    if alias in _MEANINGS:
        if not all(isinstance(_parse(each), bool) for each in written):
            raise ArgumentError(f"{name} is {text!r}; it must be true or false")
        written = [_MEANINGS[alias][_parse(each)] for each in written]
    if key in _PATHS:
        written = [_as_path(key, each) for each in written]
    return key, written[0] if several is None else written


def _swept(text: str) -> list[str] | None:
    """Return the values of a discrete sweep; None for a plain value and for sweeps that only the sweeper can resolve."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return None  # Hydra reports the error later
    listed = override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP
    return list(override.sweep_string_iterator()) if listed else None


def _as_path(key: str, text: str) -> str:
    """Quote a path for Hydra, with a leading ``~`` expanded."""
    if text.strip() in ("", "''", '""'):
        raise ArgumentError(f"{key} is empty; give a path, as {key}=runs/mine")
    if "\0" in text:
        raise ArgumentError(f"{key} is {text!r}, which holds a NUL byte; no file has such a name")
    if text in ("null", "???") or text[0] in "['\"" or "${" in text:  # Hydra's own notation
        return text
    return quoted(str(Path(text).expanduser()) if text.startswith("~") else text)


def _parse(text: str) -> Any:
    """Parse a value, so that ``true`` and ``True`` do not count as a conflict."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text  # Hydra reports the error later


def _check_key(command: str, key: str, defaults: Mapping[str, Any]) -> None:
    if key.startswith(("hydra.", "hydra/")):
        raise ArgumentError(f"{key} is a key of Hydra's launchers and sweeps; add --multirun, and a key=a,b to sweep")
    node: Any = defaults
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise ArgumentError(unknown(key, list(_paths(defaults))) + f"; ttcfast {command} --help lists the keys")
        node = node[part]


def _paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


@functools.cache  # Hydra takes a tenth of a second, and every run of a sweep asks
def _defaults(command: str) -> Mapping[str, Any]:
    return _hydra(command, [])


def _hydra(command: str, written: list[str]) -> dict[str, Any]:
    name = register(command)
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            config = hydra_compose(name, written)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    except (HydraException, OmegaConfBaseException) as error:
        raise refused(error, written) from error


def refused(error: Exception, written: Sequence[str]) -> ArgumentError:
    """Return Hydra's complaint about overrides as a one-line error."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    given = " ".join(override.removeprefix("++") for override in written)
    return ArgumentError(f"{text.replace('++', '')} (given: {given}); quote a value with spaces or signs: 'key=\"a b\"'")
