"""Files in which one bit has flipped.

Not in HDF5's heap of texts (``GCOL``): HDF5 itself keeps no checksum of that, and may go round in circles in a damaged one (seen with 2.0)
before anybody can look at what it holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ttcfast.runtime.errors import UserError


def flipped(path: Path, count: int, seed: int = 0, last: int | None = None) -> Iterator[int]:
    """Flip one bit after the other in the first ``last`` bytes of ``path`` (None: in all), each alone; yields its byte."""
    whole = path.read_bytes()
    random = np.random.default_rng(seed)
    heaps = [(m.start(), m.start() + int.from_bytes(whole[m.start() + 8 : m.start() + 16], "little")) for m in re.finditer(b"GCOL", whole)]
    for place in random.integers(0, last or len(whole), count).tolist():
        if any(start <= place < stop for start, stop in heaps):
            continue
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        yield place
    path.write_bytes(whole)


def unnoticed(path: Path, read: Callable[[], Any], count: int, seed: int = 0, last: int | None = None) -> list[int]:
    """Bytes of which a flipped bit makes ``read`` return something else than before, and not raise an error that names the file."""
    expected, missed = read(), []
    for place in flipped(path, count, seed, last):
        try:
            if read() != expected:
                missed.append(place)
        except UserError as error:
            assert path.name in str(error) or path.parent.name in str(error)
    return missed
