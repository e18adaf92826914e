"""Assembly of the page: sections in order, and pictures as far as space allows, in one file that needs no network."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttcfast.runtime.files import atomic_write, entries
from ttcfast.runtime.progress import bar

from .. import fields
from .ablation import ablation
from .animation import animation
from .breakeven import breakeven_section
from .html import Markup, facts, joined, number, table, tag, trusted
from .methods import explanation, gain, guardrail_table, headline, method_table, sweep_section
from .pictures import read_picture
from .policies import gathered, policies_section
from .rewards import calibration_section, frontier_section
from .runs import Run, flat, guarded
from .training import training_section

MOST_BYTES = 7_500_000
"""Limit on the size of the page, which mail and chat programs accept and a phone opens at once."""
_FIRST = ("error_time", "error_seconds", "drift_time", "gain_histogram", "error_branching", "drift_branching", "frontier", "calibration")
"""Order of the figures; others follow by name."""
_HERE = Path(__file__).parent


@dataclass
class _Room:
    """The rest of ``MOST_BYTES``, and the names of the parts that did not fit."""

    left: int = MOST_BYTES
    refused: list[str] = field(default_factory=list)

    def take(self, part: Markup, name: str) -> Markup | None:
        size = len(part.encode("utf-8"))
        if size > self.left:
            self.refused.append(name)
            return None
        self.left -= size
        return part


def write_page(path: str | os.PathLike[str], runs: Sequence[Run], comparison: Sequence[dict[str, Any]], notes: Sequence[str]) -> list[str]:
    """Write one HTML file with everything in it.

    Args:
        path: The file.
        runs: Runs, as returned by ``runs.load``.
        comparison: Rows of ``compare``; empty if no run compares methods.
        notes: Notes for readers.

    Returns:
        Names of the parts left out because the page is full.

    Raises:
        DataError: The numbers of a run are damaged or of another version.
        OutputError: The file cannot be written.
    """
    room = _Room()
    anchors = {run.folder: f"run-{i + 1}" for i, run in enumerate(runs)}
    head = [room.take(part, name) for name, part in _overview(runs, anchors, comparison, notes)]
    # Numbers first, of every run; then pictures and animations, as long as there is room.
    kinds: tuple[Callable[[Run], Markup | None], ...] = (
        lambda run: room.take(guarded(run.folder, _numbers, run), f"tables of {run.name}"),
        lambda run: room.take(guarded(run.folder, _provenance, run), f"provenance of {run.name}"),
        lambda run: _animations(run, room),
        lambda run: _stills(run, room),
    )
    parts: dict[Path, list[Markup | None]] = {run.folder: [] for run in runs}
    with bar(len(kinds) * len(runs), "report") as progress:
        for make in kinds:
            for run in runs:
                parts[run.folder].append(make(run))
                progress.advance(note=run.name)
    for made in parts.values():
        made[:] = made[2:] + made[:2]  # a reader sees the pictures first
    sections = [_section(run, anchors[run.folder], parts[run.folder], folded=len(runs) > 3) for run in runs]
    left_out = (
        tag("p", f"Left out, since the page is full: {', '.join(room.refused)}. Make a page of fewer runs.") if room.refused else None
    )
    title = f"ttcfast report: {', '.join(run.name for run in runs[:3])}{' and others' if len(runs) > 3 else ''}"
    with atomic_write(path) as file:
        file.write(_document(title, joined(_header(title, runs, anchors), head, left_out, sections)))
    return room.refused


def _document(title: str, body: Markup) -> str:
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    # Nothing may be fetched, and no script may run but ours: even a hole in the escaping would stay shut.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = joined(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", trusted(style)),
    )
    return (
        "<!doctype html>\n"
        + tag("html", tag("head", head), tag("body", tag("main", body), tag("script", trusted(script))), lang="en")
        + "\n"
    )


def _header(title: str, runs: Sequence[Run], anchors: dict[Path, str]) -> Markup:
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    links = [tag("li", tag("a", run.name, href=f"#{anchors[run.folder]}")) for run in runs]
    contents = tag("nav", tag("ul", links), aria_label="Runs") if len(runs) > 1 else None
    return tag("header", tag("h1", title), tag("p", f"{len(runs)} run{'s' * (len(runs) != 1)}, page made {made}", class_="note"), contents)


def _overview(
    runs: Sequence[Run], anchors: dict[Path, str], comparison: Sequence[dict[str, Any]], notes: Sequence[str]
) -> Iterator[tuple[str, Markup]]:
    """Yield the parts on several runs: notes, ablations by family, policies, and the table of all methods of all runs."""
    if notes:
        yield "notes", tag("ul", [tag("li", note) for note in notes], class_="notes")
    families: dict[Path | None, list[Run]] = {}
    for run in runs:
        if run.compares_methods:
            families.setdefault(run.family, []).append(run)
    for family, members in families.items():
        if len(members) > 1:
            title = "Runs side by side" if family is None else f"Ablation {family.name}"
            named = [anchors[run.folder] for run in members]
            yield title, tag("section", guarded(family or members[0].folder, ablation, members, title, named))
    trained = [run.policies for run in runs if run.policies]
    if len(trained) > 1 and (together := gathered(trained)):
        yield "policies side by side", tag("section", tag("h2", "Policies side by side"), policies_section(together))
    if len({row["run"] for row in comparison}) > 1:
        heads = list(comparison[0])
        names = {str(run.folder): run.name for run in runs}
        rows = []
        for row in comparison:
            cells = [gain(row[h]) if h == "gain %" else number(row[h]) for h in heads[2:]]
            rows.append([names[row["run"]], row["method"], *cells])
        held = table("Every method of every run", heads, rows, text_columns=2)
        yield (
            "the table of all methods of all runs",
            tag("section", tag("details", tag("summary", tag("h2", "All methods of all runs")), held)),
        )


def _numbers(run: Run) -> Markup:
    if not run.compares_methods:
        return joined(policies_section(run.policies) if run.policies else None, training_section(run))
    m = run.metrics
    told = (breakeven_section(run.folder), calibration_section(run.folder), frontier_section(run.folder))
    return joined(sweep_section(m), *told, guardrail_table(m))


def _section(run: Run, anchor: str, parts: Sequence[Markup | None], *, folded: bool) -> Markup:
    """Return the section of a run, folded under its name on request."""
    top = guarded(run.folder, _top, run.metrics) if run.compares_methods else None
    inside = joined(tag("p", str(run.folder), class_="path"), top, *parts)
    if folded:
        return tag("section", tag("details", tag("summary", tag("h2", run.name)), inside), id=anchor)
    return tag("section", tag("h2", run.name), inside, id=anchor)


def _top(metrics: Mapping[str, Any]) -> Markup:
    return joined(headline(metrics), method_table(metrics), explanation(metrics))


def _animations(run: Run, room: _Room) -> Markup | None:
    path = run.folder / fields.FILE
    if not run.compares_methods or not path.is_file():
        return None
    shown = fields.read_fields(path)
    moving = [room.take(animation(shown, i), f"animation of problem {p} of {run.name}") for i, p in enumerate(shown.problems)]
    return joined(tag("h3", "The fields in motion"), moving) if any(moving) else None


def _stills(run: Run, room: _Room) -> Markup | None:
    """Return the figures of the folder, each as SVG if there is one, or else as PNG."""
    if run.policies:  # drawn for the page, of all that is finished by now
        return None
    found: dict[str, Path] = {}
    for folder in (run.folder, run.folder / "figures"):
        for suffix in (".png", ".svg"):
            found |= {file.stem: file for file in entries(folder, suffix)}
    place = {name: i for i, name in enumerate(_FIRST)}
    stills = []
    for file in sorted(found.values(), key=lambda file: (place.get(file.stem, len(place)), file.stem)):
        picture = read_picture(file)
        if picture is None:
            stills.append(tag("p", f"{file.name} is no whole PNG or SVG picture and was left out.", class_="note"))
            continue
        kept = room.take(picture.still(file.stem.replace("_", " ")), f"{file.name} of {run.name}")
        stills += [kept] if kept is not None else []
    return joined(tag("h3", "Figures"), stills) if stills else None


def _provenance(run: Run) -> Markup:
    """Return configuration, random seeds, versions, commit and machine, folded."""
    p = run.provenance
    if not p:
        return tag("p", "This run kept no provenance.", class_="note")
    git = p.get("git") or {}
    about = [
        ("time", p.get("time")),
        ("command", " ".join(map(str, p.get("argv") or []))),
        ("commit", git.get("commit", "not from a checkout")),
    ]
    about += [("files differed from the commit", {True: "yes", False: "no", None: "unknown"}[git.get("dirty")])]
    about += list((p.get("seeds") or {}).items()) or [("seeds", "none recorded")]
    parts = [facts("Origin and seeds", about)]
    for key, title in (("versions", "Versions"), ("host", "Machine"), ("config", "Configuration")):
        held = p.get(key)
        if isinstance(held, dict) and held:
            parts.append(facts(title, [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in flat(held).items()]))
    return tag("details", tag("summary", "Configuration and provenance"), parts, class_="provenance")
