"""``ttcfast info``: which backends, builds and devices are here, and why the others are not

Example: ``ttcfast info``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.terminal import wrapped

from .layout import Layout
from .main import main

LAYOUT = Layout()


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.ops import info

    for line in str(info()).splitlines():
        print("\n".join(wrapped(line.lstrip(), " " * (len(line) - len(line.lstrip())), "    ")))


if __name__ == "__main__":
    sys.exit(main(["info", *sys.argv[1:]]))
