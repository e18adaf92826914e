"""Every Python block of README and docs runs as it is printed, the blocks of a page in one namespace; README is a page."""

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/README.md", "bench/results/README.md")
BLOCK = re.compile(r"(?P<marks>(?:<!-- (?:needs|slow): [^\n]*-->\n\n?)*)^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (?P<kind>needs|slow): (?P<what>[^\n]*?) -->")


class Block(NamedTuple):
    """A block of a page: its first line, its code, and the packages it needs."""

    page: str
    line: int
    code: str
    needs: tuple[str, ...]
    slow: bool


def pages() -> list[Path]:
    return sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})


def blocks(page: str, text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        marks = [(mark["kind"], mark["what"]) for mark in MARK.finditer(match["marks"])]
        needs = tuple(what for kind, what in marks if kind == "needs")
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["code"], needs, any(kind == "slow" for kind, _ in marks)))
    return found


ALL = {page: blocks(page, path.read_text()) for path in pages() for page in [str(path.relative_to(ROOT))]}
NAMES: dict[str, dict[str, Any]] = {}
RUN: set[Block] = set()


def missing(block: Block) -> list[str]:
    return [name for name in block.needs if importlib.util.find_spec(name) is None]


def run(block: Block) -> None:
    """Run a block once, after those above it on its page that can run and are not slow."""
    for each in ALL[block.page]:
        if each not in RUN and (each == block or not (each.slow or missing(each))):
            RUN.add(each)
            code = compile("\n" * (each.line - 1) + each.code, str(ROOT / each.page), "exec")
            exec(code, NAMES.setdefault(each.page, {"__name__": "__main__"}))
        if each == block:
            return


EVERY = [
    pytest.param(block, id=f"{page}:{block.line}", marks=[pytest.mark.slow] if block.slow else [])
    for page, found in ALL.items()
    for block in found
]


@pytest.mark.parametrize("block", EVERY)
def test_the_block_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    if lacking := missing(block):
        pytest.skip(f"needs {', '.join(lacking)}")
    run(block)


def test_blocks_are_found_with_their_marks():
    text = "a\n<!-- needs: torch -->\n<!-- slow: why -->\n\n```python\nx = 1\n```\n\n```\nno\n```\n\n```python\ny = x\n```\n"
    first, second = blocks("page", text)
    assert (first.code, first.needs, first.slow, first.line) == ("x = 1\n", ("torch",), True, 6)
    assert (second.code, second.needs, second.slow) == ("y = x\n", (), False)
    assert {page for page, found in ALL.items() if found} >= {"README.md", "docs/choose.md", "docs/models.md", "docs/scorers.md"}


def test_readme_is_a_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    wide = [n for n, line in enumerate(lines, 1) if len(line) > 100 and not line.startswith(("|", "<!-- evidence:"))]
    assert len(lines) <= 150 and not wide, wide
    assert sum(line.startswith("<!-- evidence:") for line in lines) == 1 and any("solver" in line for line in lines if line[0:1] == "|")


def test_links_of_pages_lead_to_files():
    wrong = []
    for path in pages():
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
            made = (path.parent / target).resolve()
            generated = target in ("benchmark-rows.md", "gallery/index.md", "../gallery/index.md")
            if not target.startswith("https://") and not generated and not made.is_file():
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
    assert not wrong, wrong
