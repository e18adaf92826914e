"""``ttcfast fit_directions``: learn fields along which candidates are spread, from the surrogate's errors in a triplet file

Example: ``ttcfast fit_directions data=runs/triplets out=runs/directions/directions.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.experiments.fit_directions import FitDirectionsConfig, fit_directions
from ttcfast.runtime.locks import run_lock

from .layout import Layout
from .main import main

LAYOUT = Layout(FitDirectionsConfig)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out, file=True):
        made = fit_directions(config)
    print(
        f"squared error left on trajectories kept out: {made.mean:.3f} by the mean, {made.spread:.3f} at best within the spread, "
        f"{made.span:.3f} at best in the span of all fields"
    )
    print(f"directions: {made.path}; give it as ttc.stochastic.directions={made.path}")


if __name__ == "__main__":
    sys.exit(main(["fit_directions", *sys.argv[1:]]))
