"""The only module that imports matplotlib."""

from __future__ import annotations

import contextlib
import os
import sys


def import_matplotlib() -> None:
    """Import matplotlib whatever MPLBACKEND is.

    A command started from a notebook inherits its backend, and matplotlib raises at import if that is unknown here. Our figures need no
    backend. A known one is set as matplotlib would have done, for other figures of the process.
    """
    if "matplotlib" in sys.modules:
        return
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = asked
