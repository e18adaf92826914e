"""``ttcfast ceiling``: what the best of B candidates gains over the deterministic step, for every way of making candidates"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.locks import run_lock

from .configuration import build, save
from .main import main

_NAMES = {"checkpoint": "fm.ckpt", "problems": "data.n", "split": "data.split", "reading": "data"}


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.experiments.ceiling import CeilingConfig, ceiling, print_ceiling

    data = dict(values["data"])
    config = build(
        CeilingConfig,
        {
            "checkpoint": values["fm"]["ckpt"],
            "data": [str(data.pop("root"))],
            "problems": data.pop("n"),
            "split": data.pop("split"),
            "reading": data,
            "sources": {name: source for name, source in values["sources"].items() if source is not None},
            **{key: values[key] for key in ("factors", "states", "steps", "seed", "out", "device")},
        },
        names=_NAMES,
    )
    with run_lock(config.out):
        save(config.out, values, "ceiling")
        print_ceiling(ceiling(config))
    print(f"Numbers: {config.out}/ceiling.csv")


if __name__ == "__main__":
    sys.exit(main(["ceiling", *sys.argv[1:]]))
