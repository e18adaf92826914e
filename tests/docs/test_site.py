"""What the site adds to docs/: led links, measured rows, and the gallery's pages, without mkdocs."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "docs" / f"{path}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


hooks, build = module("hooks"), module("gallery/build")


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("index.md", "(docs/start.md)", "(start.md)"),
        ("start.md", "(../examples/README.md#kolmogorov-flow)", "(examples.md#kolmogorov-flow)"),
        ("design/extend.md", "(../../CONTRIBUTING.md)", "(../contributing.md)"),
        ("design/extend.md", "(../physics.md#a-gas)", "(../physics.md#a-gas)"),
        ("world-models.md", "(../examples/world_models.png)", "(assets/examples/world_models.png)"),
        ("index.md", "(docs/tasks/netcdf_data.py)", "(tasks/netcdf_data.md)"),
        ("data.md", "(tasks/netcdf_data.py)", "(tasks/netcdf_data.md)"),
        ("start.md", "(https://arxiv.org/abs/1)", "(https://arxiv.org/abs/1)"),
    ],
)
def test_links_lead_to_the_sites_pages(uri, link, expected):
    assert hooks.LINK.sub(lambda match: hooks.led(match, uri), f"[a]{link}") == f"[a]{expected}"


SCRIPT = '''"""# A title

First words."""
import matplotlib.pyplot as plt

x = 2
# %%
# Said in
# between.
print(x)
plt.plot([0, x])
'''


def test_a_script_becomes_a_page_and_a_notebook(tmp_path):
    first, second = build.cells(SCRIPT)
    assert first.text.startswith("# A title") and first.code.endswith("x = 2") and first.line == 4
    assert second == ("Said in\nbetween.", "print(x)\nplt.plot([0, x])", 10)
    (tmp_path / "one.py").write_text(SCRIPT)
    assert build.run(tmp_path / "one.py", tmp_path) < build.SECONDS
    page = (tmp_path / "one.md").read_text()
    assert "```text\n2\n```" in page and "![A title](one_0.png)" in page and (tmp_path / "one_0.png").stat().st_size > 1000
    made = json.loads((tmp_path / "one.ipynb").read_text())
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "markdown", "code"]
    with pytest.raises(ValueError, match="does not begin with a docstring"):
        build.cells("x = 1\n")


def test_every_script_has_its_place():
    assert {path.stem for path in (ROOT / "docs" / "gallery").glob("*.py")} == {*build.ORDER, "build"}
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [f"gallery/{name}.md" for name in build.ORDER] == [line.split("- ")[1] for line in nav.splitlines() if "gallery/" in line][1:]
    for name in build.ORDER:
        assert len(build.cells((ROOT / "docs" / "gallery" / f"{name}.py").read_text())) > 1


TASKS = sorted((ROOT / "docs" / "tasks").glob("*.py"))


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_is_a_page(path):
    page = hooks.task(path)
    code = page.partition("```python\n")[2]
    assert page.startswith("# ") and page.count("```") % 2 == 0 and "import ttcfast" in code
    for link in hooks.LINK.finditer(page):
        assert (path.parent / link["path"]).is_file(), link["path"]


def test_every_page_is_in_the_navigation():
    lines = (ROOT / "mkdocs.yml").read_text().splitlines()
    named = {line.split(": ")[-1].strip().removeprefix("- ") for line in lines if line.endswith(".md")}
    made = {"index.md", "gallery/index.md", "benchmark-rows.md", *hooks.PAGES.values(), *(f"gallery/{name}.md" for name in build.ORDER)}
    made |= {f"tasks/{path.stem}.md" for path in TASKS}
    pages = (path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
    assert named == made | {str(page) for page in pages if page.parts[0] != "evidence"}
