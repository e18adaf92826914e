"""Every reference in code and documents leads somewhere: decisions and plan sections to a heading, paths to a file of this repository."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESIGN = ROOT / "docs" / "design"
TEXTS = {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ""}
FOLDERS = "ttcfast|kernels|csrc|bench|tests|docs|examples"

DECISION = re.compile(r'docs/design/decisions\.md \(((?:"[^"]+"(?:, | and )?)+)\)')
PLAN = re.compile(r'\b(TTC|Flow) plan, ((?:"[^"]+"(?:, | and )?)+)')
FILE = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|csv|cpp|h|cu|hdf5|safetensors|json|png|webp|sh))(?!\w)")
FORBIDDEN = {  # what is not in the repository, and random seeds that are none
    r"\bDECISIONS\b": 'cite docs/design/decisions.md ("Title")',
    r"\bseeds/[\w-]+\.md": 'cite TTC plan, "Title" or Flow plan, "Title"',
    r"\bfacts/[\w-]+\.md": "give the figure itself, or the paper",
    r"\b(?:ARCHITECTURE|MOVES|STYLE|API)\.md": "cite docs/design",
    r"\b[Ss]eed'?s? (?:sketch|plan|section|dict|gather|switch|PRM|command|name|loop|contract)": 'a "seed" is a random seed',
}
ABSENT = {"ttcfast/kernels/__init__.py"}  # whose absence a test holds
HERE = Path(__file__).resolve().relative_to(ROOT)


def texts() -> Iterator[tuple[Path, str]]:
    """The files that git tracks, or will once they are added, as (path, text with line breaks of prose joined)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in TEXTS and path.is_file() and not path.is_symlink() and Path(name) != HERE and name != "LICENSE":
            yield Path(name), path.read_text(encoding="utf-8")


def joined(text: str) -> str:
    """A reference may break over lines, behind the marks of a comment too."""
    return re.sub(r"\s*\n\s*(?:#|//|\*)?\s*", " ", text)


def headings(name: str) -> dict[str, set[str]]:
    """By section (``##``), its subsections (``###``)."""
    found: dict[str, set[str]] = {}
    for line in (DESIGN / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            found[section := line[3:].strip()] = set()
        elif line.startswith("### "):
            found[section].add(line[4:].strip())
    return found


@pytest.fixture(scope="module")
def sources() -> list[tuple[Path, str]]:
    found = list(texts())
    if not found:
        pytest.skip("not a git checkout")
    return found


def test_the_patterns_see_what_they_are_for():
    text = joined('Source: TTC plan, "PRM Model" and "Training the\n    PRM"; docs/design/decisions.md ("Triplets",\n# "Splits").')
    assert PLAN.findall(text) == [("TTC", '"PRM Model" and "Training the PRM"')]
    assert DECISION.findall(text) == ['"Triplets", "Splits"']
    assert FILE.findall("see ``bench/results/arm-cpu.csv``, runs/x.csv") == ["bench/results/arm-cpu.csv"]


def test_decisions_resolve(sources):
    known = set().union(*headings("decisions.md").values())
    wrong = [
        f'{path}: "{title}"'
        for path, text in sources
        for group in DECISION.findall(joined(text))
        for title in re.findall(r'"([^"]+)"', group)
        if title not in known and title != "Title"
    ]
    assert not wrong, wrong


def test_every_mention_of_the_decisions_names_one(sources):
    """A bare file name would send the reader through forty decisions."""
    wrong = [
        str(path)
        for path, text in sources
        if path.suffix != ".md" and path.name != "mkdocs.yml" and joined(text).count("decisions.md") != len(DECISION.findall(joined(text)))
    ]
    assert not wrong, wrong


def test_plan_sections_resolve(sources):
    known = headings("plans.md")
    wrong = [
        f'{path}: {plan} plan, "{title}"'
        for path, text in sources
        for plan, group in PLAN.findall(joined(text))
        for title in re.findall(r'"([^"]+)"', group)
        if title not in known[f"{plan} plan"] and title != "Title"
    ]
    assert not wrong, wrong


def test_files_exist(sources):
    wrong = sorted(
        {
            f"{path}: {name}"
            for path, text in sources
            for name in FILE.findall(text)
            if not (ROOT / name).exists() and not path.name.startswith("CHANGELOG") and name not in ABSENT
        }
    )
    assert not wrong, wrong


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_outside_the_repository_is_cited(sources, pattern):
    wrong = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in sources
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not wrong, f"{FORBIDDEN[pattern]}:\n" + "\n".join(wrong)
