"""``ttcfast generate``: make a data set with our own solvers (resumable, deterministic in the seed)

Example: ``ttcfast generate split=test n=8 out=data/mine``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.data.generate import GenerateConfig, generate
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(GenerateConfig, free=("ranges",))


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        files = generate(config)
        save(config.out, values, f"generate_{config.split}")
    print(f"{len(files)} files of split {config.split} are under {config.out}/data")


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
