"""Pictures of the page as data URLs: figures of a run, checked before they are embedded, and those drawn for the page itself."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ttcfast.report.figures.style import svg_of

from .html import Markup, tag

_SVG_SIZE = re.compile(r'<svg[^>]*\swidth="([\d.]+)pt"[^>]*\sheight="([\d.]+)pt"|<svg[^>]*\sheight="([\d.]+)pt"[^>]*\swidth="([\d.]+)pt"')
_SVG_TITLE = re.compile(r"<dc:title>(.*?)</dc:title>", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """A PNG or SVG picture: its bytes, media type, size in pixels or points, and title (empty if it has none)."""

    data: bytes
    kind: str
    width: int
    height: int
    title: str

    @property
    def url(self) -> str:
        return f"data:image/{self.kind};base64," + base64.b64encode(self.data).decode("ascii")

    def still(self, name: str) -> Markup:
        """Return the picture captioned by its title, or else ``name``. An ``img`` element runs no script of an SVG file."""
        caption = self.title or name
        image = tag("img", src=self.url, alt=caption, width=self.width, height=self.height)
        return tag("figure", tag("figcaption", caption), image, class_="still")


def read_picture(path: Path) -> Picture | None:
    """Read a PNG or SVG file; None if it is not a complete picture."""
    if not path.is_file():  # a named pipe would be waited for without end
        return None
    try:
        data = path.read_bytes()
        return _svg(data) if path.suffix == ".svg" else _png(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def drawn(figure: Figure) -> Markup:
    """Return a figure made for the page itself."""
    picture = _svg(svg_of(figure))
    assert picture is not None
    return picture.still("")


def palette_url(indices: np.ndarray, palette: np.ndarray) -> str:
    """Return a PNG of ``indices`` uint8 ``[rows, columns]`` into ``palette`` uint8 ``[n, 3]``, n at most 256, as a data URL."""
    rows, columns = indices.shape
    image = Image.frombytes("P", (columns, rows), np.ascontiguousarray(indices).tobytes())
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=9)
    return Picture(file.getvalue(), "png", columns, rows, "").url


def _png(data: bytes) -> Picture:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        (width, height), title = image.size, str(image.info.get("Title", ""))
        image.verify()  # every chunk's checksum, to the end
    return Picture(data, "png", width, height, title)


def _svg(data: bytes) -> Picture | None:
    text = data.decode("utf-8")
    size, title = _SVG_SIZE.search(text), _SVG_TITLE.search(text)
    if size is None or not text.rstrip().endswith("</svg>"):
        return None
    width, height = (size[1], size[2]) if size[1] else (size[4], size[3])
    return Picture(data, "svg+xml", round(float(width)), round(float(height)), html.unescape(title[1]) if title else "")
