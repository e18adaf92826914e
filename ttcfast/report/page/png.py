"""PNG pictures: those of a run, checked before they are embedded, and small ones with a palette, written here."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode(indices: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG of ``indices`` uint8 ``[rows, columns]`` into ``palette`` uint8 ``[n, 3]``, n at most 256."""
    rows, columns = indices.shape
    lines = np.zeros((rows, columns + 1), np.uint8)  # each line begins with its filter, 0: none
    lines[:, 1:] = indices
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(name, data) for name, data in parts)


def data_url(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def read_picture(path: Path) -> tuple[bytes, int, int, str | None] | None:
    """A PNG file's bytes, width, height and title; None where it is no whole PNG."""
    if not path.is_file():  # a named pipe would be waited for without end
        return None
    try:
        data = path.read_bytes()
        chunks = list(_chunks(data))
        width, height = struct.unpack(">II", chunks[0][1][:8])
        if chunks[0][0] != b"IHDR" or chunks[-1][0] != b"IEND":
            return None
    except (OSError, ValueError, struct.error, IndexError):
        return None
    return data, width, height, _title(chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    if not data.startswith(_SIGNATURE):
        raise ValueError("no PNG signature")
    place = len(_SIGNATURE)
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        if struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] != zlib.crc32(name + body):
            raise ValueError("a damaged chunk")
        yield name, body
        place += 12 + length


def _title(chunks: list[tuple[bytes, bytes]]) -> str | None:
    """The text under ``Title``, which ``figures.save`` writes (tEXt, or iTXt where it is not Latin-1)."""
    for name, body in chunks:
        key, _, rest = body.partition(b"\0")
        if key == b"Title" and name == b"tEXt":
            return rest.decode("latin-1") or None
        if key == b"Title" and name == b"iTXt" and rest[:2] == b"\0\0":
            return rest[2:].split(b"\0", 2)[-1].decode("utf-8", "replace") or None
    return None
