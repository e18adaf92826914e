"""``ttcfast demo``: the shipped surrogate on the shipped test trajectories, every method in one table, with figures

Example: ``ttcfast demo problems=2 steps=8``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.experiments.demo import run_demo
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main
from .typed import fit

LAYOUT = Layout(run_demo, hidden=("scorers", "quiet"))


def run(values: Mapping[str, Any]) -> None:
    arguments = fit(run_demo, values)
    with run_lock(values["out"]):
        save(values["out"], values, "demo")
        run_demo(**arguments)


if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
