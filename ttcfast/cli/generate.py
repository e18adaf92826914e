"""``ttcfast generate``: make a data set with our own Euler solver (resumable, deterministic in the seed)"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.locks import run_lock

from .configuration import build, save
from .main import main


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.data.generate import GenerateConfig, generate

    config = build(GenerateConfig, values)
    with run_lock(config.out):
        files = generate(config)
        save(config.out, values, f"generate_{config.split}")
    print(f"{len(files)} files of split {config.split} are under {config.out}/data")


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
