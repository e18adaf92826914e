"""``ttcfast ceiling``: what the best of B candidates gains over the deterministic step, for every way of making candidates

Example: ``ttcfast ceiling fm.ckpt=examples/surrogate.safetensors data.root=examples data.split=null``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.experiments.ceiling import CeilingConfig, ceiling, print_ceiling
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import INSTEAD, MODEL, Layout
from .main import main

LAYOUT = Layout(
    CeilingConfig,
    keys={**MODEL, "data": "data.root", "problems": "data.n", "split": "data.split", "reading": "data"},
    free=("sources", "fm.args"),
    instead={"fm.factory": {**INSTEAD["fm.factory"], "sources": "null"}},  # the noise of the model
    places=("data",),
)


def run(values: Mapping[str, Any]) -> None:
    sources = {name: source for name, source in (values["sources"] or {}).items() if source is not None}
    config = LAYOUT.build({**values, "sources": sources})
    with run_lock(config.out):
        save(config.out, values, "ceiling")
        print_ceiling(ceiling(config))
    print(f"Numbers: {config.out}/ceiling.csv")


if __name__ == "__main__":
    sys.exit(main(["ceiling", *sys.argv[1:]]))
