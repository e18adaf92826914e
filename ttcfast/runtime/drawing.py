"""The one door to matplotlib."""

from __future__ import annotations

import contextlib
import os
import sys


def import_matplotlib() -> None:
    """Import matplotlib whatever MPLBACKEND says.

    A command that a notebook starts inherits its backend, which may be unknown here, and matplotlib raises at import for one that is. Our
    figures need none. A backend that is known is set as matplotlib would have done, for the other figures of the process.
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
