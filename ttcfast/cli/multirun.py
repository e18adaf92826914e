"""``ttcfast <command> --multirun``: one run for every combination of swept values, each in a folder of its own."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ttcfast.runtime.errors import ArgumentError

from .configuration import CONFIGS, compose, quoted

_ABLATION = "ablation="


@dataclass(frozen=True)
class Job:
    """One run: its name, which is its folder below ``out``, and its configuration."""

    name: str
    values: Mapping[str, Any]


def multirun(command: str, arguments: Sequence[str], run: Callable[[Mapping[str, Any]], None]) -> None:
    """Run a command once per job of ``jobs``, in turn; all are composed, and so checked, before the first starts."""
    planned = jobs(command, arguments)
    for number, job in enumerate(planned, 1):
        print(f"[{number}/{len(planned)}] {job.name}: {job.values['out']}", flush=True)
        run(job.values)
    places = [str(job.values["out"]) for job in planned]
    folders = ",".join(place if re.fullmatch(r"[\w./+-]+", place) else quoted(place) for place in places)
    print(f"{len(planned)} runs; side by side: ttcfast report {shlex.quote(f'runs=[{folders}]')}")


def jobs(command: str, arguments: Sequence[str]) -> list[Job]:
    """The runs that the arguments ask for.

    An argument in Hydra's notation of a sweep (``ttc.branching_factor=1,3,5``, ``seed=range(0,3)``) stands for its values, several for all
    their combinations. ``ablation=<name>`` takes the named runs of ``configs/ablation/<name>.yaml``, each a list of ``key=value`` that the
    other arguments come before; several, separated by commas, follow each other.

    Raises:
        ArgumentError: nothing to sweep, a command without an output folder, an unknown ablation, or what ``compose`` refuses.
    """
    names = [name for a in arguments if a.startswith(_ABLATION) for name in a[len(_ABLATION) :].split(",")]
    plain, swept = [], []
    for argument in (a for a in arguments if not a.startswith(_ABLATION)):
        values = _sweep(argument)
        (plain.append(argument) if values is None else swept.append(values))
    if not names and not swept:
        known = ", ".join(sorted(path.stem for path in (CONFIGS / "ablation").glob("*.yaml")))
        raise ArgumentError(f"--multirun has nothing to sweep; give key=a,b,c or ablation=<name> ({known})")
    base = compose(command, plain)
    if "out" not in base:
        raise ArgumentError(f"ttcfast {command} has no out, so that its runs would not have a folder each; run it without --multirun")
    runs = [run for name in names for run in _ablation(name, several=len(names) > 1)] or [("", [])]
    plain = [argument for argument in plain if not argument.startswith("out=")]
    found = []
    for label, settings in runs:
        for combination in itertools.product(*swept):
            name = "/".join(part for part in (label, ",".join(map(_short, combination))) if part)
            given = _without(plain, [*settings, *combination])
            found.append(Job(name, compose(command, [*given, *settings, *combination, f"out={quoted(str(base['out']) + '/' + name)}"])))
    if len({job.name for job in found}) < len(found):
        raise ArgumentError(f"--multirun makes two runs of one name ({', '.join(job.name for job in found)}); sweep every value once")
    return found


def _sweep(argument: str) -> list[str] | None:
    """The ``key=value`` that a sweep stands for; None for an argument that is none."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return None  # compose says what is wrong with it
    if not override.is_sweep_override():
        return None
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


def _ablation(name: str, several: bool) -> list[tuple[str, list[str]]]:
    path = CONFIGS / "ablation" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ArgumentError(f"ablation is {name!r}; there are {known}")
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [(f"{name}/{run}" if several else str(run), [str(setting) for setting in settings]) for run, settings in held.items()]


def _without(plain: Sequence[str], stronger: Sequence[str]) -> list[str]:
    """``plain`` less what a run sets itself."""
    keys = {setting.partition("=")[0] for setting in stronger}
    return [argument for argument in plain if argument.partition("=")[0] not in keys]


def _short(setting: str) -> str:
    """A name for a folder: the last part of the key, and the value."""
    key, _, value = setting.partition("=")
    return re.sub(r"[^\w.+-]+", "_", f"{key.rpartition('.')[2]}-{value}").strip("_")
