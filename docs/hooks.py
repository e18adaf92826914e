"""Adds to the site what does not stand in docs/: README, other texts and pictures, the measured rows, the gallery, and the tasks.

mkdocs calls the ``on_`` functions. Links between files of the repository are written as they must be on a code host, relative to the
file, and are led to the pages here.
"""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench lies in the checkout alone

from bench import report  # noqa: E402

BUILT = ROOT / "build" / "gallery"
TASKS = ROOT / "docs" / "tasks"
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/results/README.md": "benchmark-columns.md",
}
PICTURES = ("examples/world_models.png", "examples/cartpole/learning_curves.png")
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that lie elsewhere."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in PICTURES:
        files.append(File.generated(config, "assets/" + source, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "benchmark-rows.md", content=report.everything(report.load())))
    for path in sorted(TASKS.glob("*.py")):
        files.append(File.generated(config, f"tasks/{path.stem}.md", content=task(path)))
    if not (BUILT / "index.md").is_file():
        raise PluginError("the gallery is not built; run python docs/gallery/build.py, or make docs")
    for path in sorted(BUILT.iterdir()):
        if path.suffix in (".md", ".png", ".ipynb"):
            files.append(File.generated(config, f"gallery/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links to files of the repository to their pages."""
    uri = page.file.src_uri
    if uri.startswith("gallery/"):
        return markdown
    parts = CODE.split(markdown)  # text and code in turns
    return "".join(part if i % 2 else LINK.sub(lambda m: led(m, uri), part) for i, part in enumerate(parts))


def led(match: re.Match[str], uri: str) -> str:
    """Returns the link of a page at ``uri`` with its path relative to that page."""
    here = posixpath.dirname(SOURCES.get(uri, "docs/" + uri))
    target = posixpath.normpath(posixpath.join(here, match["path"]))
    if target in PAGES:
        target = PAGES[target]
    elif target in PICTURES:
        target = "assets/" + target
    elif target.startswith("docs/"):
        if target.startswith("docs/tasks/") and target.endswith(".py"):
            target = target.removesuffix(".py") + ".md"
        target = target.removeprefix("docs/")
    else:
        return match[0]  # mkdocs says that it leads nowhere
    return posixpath.relpath(target, posixpath.dirname(uri) or ".") + (match["anchor"] or "")


def task(path: Path) -> str:
    """Returns the page of a script of ``docs/tasks``: its docstring, and its cells as the gallery's are, without what they print."""
    spec = importlib.util.spec_from_file_location("gallery_build", TASKS.parent / "gallery" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    text = list[str]()
    for cell in build.cells(path.read_text(encoding="utf-8")):
        text += [cell.text, "", *(["```python", cell.code, "```", ""] if cell.code else [])]
    return "\n".join(text)


def on_config(config: Any) -> Any:
    """Runs from the checkout, wherever mkdocs was called: mkdocstrings reads its paths from there."""
    os.chdir(ROOT)
    return config
