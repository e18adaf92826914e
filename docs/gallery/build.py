"""Runs the scripts of the gallery and writes their pages: ``python docs/gallery/build.py [NAME...]``, into ``build/gallery``.

A script is a docstring in Markdown, whose first line is the title, and cells: ``# %%``, comments in Markdown, code. What a cell prints and
draws stands below it. A script runs in a process of its own, and again only if it, this file or the package has changed; one that takes
more than a minute of processor time fails. Beside each page lies the same as a notebook.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "gallery"
ORDER = ("rollout", "scorer", "neuraloperator", "kolmogorov", "beam", "calibration", "projection", "keyed", "esnr", "planning")
SECONDS = 60


class Cell(NamedTuple):
    """Markdown, the code below it, and the line on which the code begins."""

    text: str
    code: str
    line: int


def cells(source: str) -> list[Cell]:
    """Splits a script into its cells; the docstring is the text of the first."""
    module = ast.parse(source)
    first = module.body[0]
    text = ast.get_docstring(module)
    if text is None or not text.startswith("# "):
        raise ValueError("the script does not begin with a docstring whose first line is '# Title'")
    lines = source.splitlines()
    found, code, begun = [], list[str](), (first.end_lineno or 1) + 1
    number = begun - 1
    while number < len(lines):
        if lines[number].startswith("# %%"):
            found.append(Cell(text, "\n".join(code).strip("\n"), begun))
            said = []
            while number + 1 < len(lines) and lines[number + 1].startswith("#"):
                number += 1
                said.append(lines[number].removeprefix("#").removeprefix(" "))
            text, code, begun = "\n".join(said), [], number + 2
        else:
            code.append(lines[number])
        number += 1
    return [*found, Cell(text, "\n".join(code).strip("\n"), begun)]


def run(path: Path, out: Path) -> float:
    """Runs a script and writes its page, its pictures and its notebook; returns the seconds of processor time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["figure.constrained_layout.use"] = True
    names: dict[str, Any] = {"__name__": "__main__"}
    page, drawn, parts = list[str](), 0, cells(path.read_text(encoding="utf-8"))
    before = time.process_time()
    for cell in parts:
        page += [cell.text, ""]
        if not cell.code:
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("\n" * (cell.line - 1) + cell.code, str(path), "exec"), names)
        page += ["```python", cell.code, "```", ""]
        if said.getvalue():
            page += ["```text", said.getvalue().rstrip(), "```", ""]
        for number in plt.get_fignums():
            picture = f"{path.stem}_{drawn}.png"
            plt.figure(number).savefig(out / picture, dpi=80, facecolor="white")
            plt.close(number)
            page += [f"![{parts[0].text.splitlines()[0][2:]}]({picture})", ""]
            drawn += 1
    spent = time.process_time() - before
    page += [f"{spent:.0f} s of one core. [The script as a notebook]({path.stem}.ipynb).", ""]
    (out / f"{path.stem}.ipynb").write_text(json.dumps(notebook(parts), indent=1))
    (out / f"{path.stem}.md").write_text("\n".join(page), encoding="utf-8")
    return spent


def notebook(parts: list[Cell]) -> dict[str, Any]:
    """Returns the cells as a notebook without outputs."""
    found: list[dict[str, Any]] = []
    for cell in parts:
        found.append({"cell_type": "markdown", "metadata": {}, "source": cell.text})
        if cell.code:
            found.append({"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": cell.code})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    each = [{"id": str(i), **cell} for i, cell in enumerate(found)]
    return {"cells": each, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def index(out: Path) -> str:
    """Returns the page that leads to all others, each with its title, first sentences and first picture."""
    text = ["# Gallery", "", "Scripts of less than a minute, run by `make docs`; they lie in `docs/gallery`.", ""]
    for name in ORDER:
        title, _, rest = cells((HERE / f"{name}.py").read_text(encoding="utf-8"))[0].text.partition("\n")
        text += [f"## [{title[2:]}]({name}.md)", "", rest.strip().split("\n\n")[0], ""]
        if (out / f"{name}_0.png").exists():
            text += [f"[![{title[2:]}]({name}_0.png){{ width=420 }}]({name}.md)", ""]
    return "\n".join(text)


def state(path: Path) -> str:
    """Returns a digest of what a script's output depends on."""
    digest = hashlib.sha256()
    for source in (path, Path(__file__), *sorted((ROOT / "ttcfast").rglob("*.py"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def main(names: list[str]) -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names or ORDER:
        path, done = HERE / f"{name}.py", OUT / f"{name}.digest"
        if done.is_file() and done.read_text() == state(path):
            continue
        print(f"gallery: {name}", flush=True)
        if subprocess.run([sys.executable, __file__, "--run", str(path)], cwd=ROOT, check=False).returncode:
            print(f"gallery: {path} failed; pip install 'ttcfast[docs]' brings what the scripts need", file=sys.stderr)
            return 1
        done.write_text(state(path))
    (OUT / "index.md").write_text(index(OUT), encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        taken = run(Path(sys.argv[2]), OUT)
        sys.exit(f"{sys.argv[2]} took {taken:.0f} s of processor time, more than {SECONDS}" if taken > SECONDS else 0)
    sys.exit(main(sys.argv[1:]))
