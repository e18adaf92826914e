"""A command's configuration: Hydra composes it from ``ttcfast/configs`` and ``key=value``; dataclasses check it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttcfast.checks import one_of
from ttcfast.runtime import provenance
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import atomic_write, output_folder

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
T = TypeVar("T")

# The seed's section 8 writes the left, its section 9 the right; both mean the same key. A trailing dot stands for everything below.
_ALIASES = {
    "run_ttc": {
        "stochastic": "ttc.stochastic",
        "stochastic.": "ttc.stochastic.",
        "prm.ckpt": "reward.prm_ckpt",
        "use_prm": "reward.type",
        "finetuned.ckpt": "fm.finetuned",
    },
    "train_prm_on_policy": {"fm.ckpt": "fm", "data.": "reading."},
    "train_fm": {"data.": "reading."},  # as run_ttc calls them; data itself is the folder
}
_WORDS = {"report": "runs"}  # arguments that are no key=value, and the list that they go into
_FREE = {"generate": ("ranges",), "ceiling": ("sources",)}  # mappings whose keys are the user's own
# Keys that name a file or a folder: their text is taken as it stands, so that out=20240101 is no number and a blank or comma no syntax.
_PATHS = {
    *("out", "data", "data.root", "fm", "fm.ckpt", "fm.finetuned", "reward.prm_ckpt", "init", "model.init", "checkpoint", "examples"),
    *("ttc.stochastic.directions", "stochastic.directions"),
}
_VALUES = {"use_prm": {True: "prm", False: "arm"}}


def compose(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration of ``command`` after ``arguments`` (``key=value``, aliases allowed), as plain containers.

    Raises:
        ArgumentError: an argument is not ``key=value``, a key is unknown, an alias and its key disagree, a value cannot be parsed.
    """
    if not (CONFIGS / f"{command}.yaml").is_file():
        if arguments:
            raise ArgumentError(f"ttcfast {command} takes no keys; it was given {' '.join(arguments)}")
        return {}
    defaults = _defaults(command)
    overrides = _without_aliases(command, [_split(argument) for argument in _words_as_list(command, arguments, defaults)])
    overrides = [(key, _as_path(key, value) if key in _PATHS else value) for key, value in overrides]
    for key, value in overrides:
        if (CONFIGS / key).is_dir():
            one_of(key, value, tuple(sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))))
        if not key.startswith(tuple(f"{free}." for free in _FREE.get(command, ()))):
            _check_key(command, key, defaults)
    # ++: free keys may be new. A folder of configs/ is a group, and its key names one of its files.
    return _hydra(command, [f"{'' if (CONFIGS / key).is_dir() else '++'}{key}={value}" for key, value in overrides])


def defaults_text(command: str) -> str:
    """The keys of ``command`` with their defaults, as YAML; shown by ``--help``."""
    if not (CONFIGS / f"{command}.yaml").is_file():
        return "(none)"
    text = yaml.safe_dump(_defaults(command), sort_keys=False, default_flow_style=None, width=100).rstrip()
    aliases = [f"{alias}{'*' * alias.endswith('.')} for {key}{'*' * key.endswith('.')}" for alias, key in _ALIASES.get(command, {}).items()]
    return f"{text}\n\nAlso understood: {', '.join(aliases)}" if aliases else text


def build(kind: type[T], values: Mapping[str, Any], where: str = "", names: Mapping[str, str] | None = None) -> T:
    """Make the dataclass ``kind`` from configuration values, whose types are checked against its annotations.

    Args:
        kind: a dataclass; nested dataclasses are built from nested mappings.
        values: by field name.
        where: dotted prefix of the keys, for messages.
        names: keys of fields that the user knows by another name.

    Raises:
        ArgumentError: an unknown key, a value of another type, or the dataclass's own checks.
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
    """The arguments of a function or dataclass, made from configuration values by its annotations; see :func:`build`."""
    hints = typing.get_type_hints(target)  # of a dataclass: its fields
    known = list(inspect.signature(target).parameters)
    names = names or {}
    for name in values:
        if name not in known:
            raise ArgumentError(_unknown(f"{where}{name}", [where + k for k in known]))
    return {name: _fit(hints[name], value, names.get(name, where + name)) for name, value in values.items()}


def save(folder: str | Path, config: Mapping[str, Any], name: str) -> Path:
    """Make the output folder and put the run's configuration and provenance there, as ``<name>.yaml`` and ``<name>.provenance.json``.

    Raises:
        OutputError: the folder cannot be written.
    """
    place = output_folder(folder)
    with atomic_write(place / f"{name}.yaml") as file:
        yaml.safe_dump(dict(config), file, sort_keys=False)
    provenance.write(place, config, f"{name}.provenance.json")
    return place


def _split(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or not key or key[0] in "+~-" or " " in key:
        raise ArgumentError(f"{argument!r} is not key=value; write for example seed=1 or ttc.branching_factor=8")
    return key, value


def _words_as_list(command: str, arguments: Sequence[str], defaults: Mapping[str, Any]) -> list[str]:
    """``report a b out=c`` as ``report runs=[a,b] out=c``. A folder called ``ttc.seed=1`` (a multirun's) is a word too."""
    key = _WORDS.get(command)
    if key is None:
        return list(arguments)
    words = [a for a in arguments if "=" not in a or (a.partition("=")[0] not in defaults and Path(a).exists())]
    if words and (given := next((a for a in arguments if a.startswith(f"{key}=")), None)):
        raise ArgumentError(f"{given} and {words[0]!r} both name what {command} takes; give one list, with or without {key}=")
    return [a for a in arguments if a not in words] + ([f"{key}=[{','.join(map(quoted, words))}]"] if words else [])


def _as_path(key: str, text: str) -> str:
    """A path as the user wrote it, quoted for Hydra; ``~`` is the home folder, as shells expand it elsewhere."""
    if text.strip() in ("", "''", '""'):
        raise ArgumentError(f"{key} is empty; give a path, as {key}=runs/mine")
    if "\0" in text:
        raise ArgumentError(f"{key} is {text!r}, which holds a NUL byte; no file has such a name")
    if text in ("null", "???") or text[0] in "['\"" or "${" in text:  # Hydra's own notation
        return text
    return quoted(str(Path(text).expanduser()) if text.startswith("~") else text)


def quoted(word: str) -> str:
    """As Hydra's grammar reads it back: backslashes before a quote, and at the end, are doubled."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), word) + "'"


def _without_aliases(command: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rename aliased keys; the same key by two names with two values raises."""
    settled: dict[str, tuple[str, Any, str]] = {}
    for given, written in pairs:
        key, value, text = _canonical(command, given, written)
        if key in settled and not settled[key][0].startswith(f"{given}=") and settled[key][1] != value:
            raise ArgumentError(f"{settled[key][0]} and {given}={written} mean the same key ({key}) and disagree; give one of them")
        settled[key] = (f"{given}={written}", value, text) if key not in settled else (settled[key][0], value, text)
    return [(key, text) for key, (_, _, text) in settled.items()]


def _canonical(command: str, given: str, text: str) -> tuple[str, Any, str]:
    value = _parse(text)
    for alias, key in _ALIASES.get(command, {}).items():
        if given == alias or (alias.endswith(".") and given.startswith(alias)):
            if alias in _VALUES:
                if not isinstance(value, bool):
                    raise ArgumentError(f"{given} is {text!r}; it must be true or false")
                text = value = _VALUES[alias][value]
            return key + given[len(alias) :], value, text
    return given, value, text


def _parse(text: str) -> Any:
    """What a value means, so that ``true`` and ``True`` do not count as a conflict."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text  # Hydra says what is wrong with it, in its place


def _check_key(command: str, key: str, defaults: Mapping[str, Any]) -> None:
    node: Any = defaults
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise ArgumentError(_unknown(key, list(_paths(defaults))) + f"; ttcfast {command} --help lists the keys")
        node = node[part]


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}" if len(known) < 12 else "")


def _paths(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _defaults(command: str) -> dict[str, Any]:
    return _hydra(command, [])


def _hydra(command: str, overrides: list[str]) -> dict[str, Any]:
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            config = hydra_compose(command, overrides)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
    except (HydraException, OmegaConfBaseException) as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        given = " ".join(override.removeprefix("++") for override in overrides)
        raise ArgumentError(f"{text.replace('++', '')} (given: {given}); quote a value with spaces or signs: 'key=\"a b\"'") from error


def _fit(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the annotation ``hint`` wants it, or one clear error."""
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
    """Counts, seeds and sizes go into 64-bit integers; NaN and infinities have no use as a setting and pass every comparison or none."""
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
