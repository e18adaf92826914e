"""``ttcfast fit_directions``: learn fields along which candidates are spread, from the surrogate's errors in a triplet file"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .configuration import build
from .main import main


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.rewards.prm.fit_directions import FitDirectionsConfig, fit_directions

    made = fit_directions(build(FitDirectionsConfig, values))
    print(
        f"squared error left on trajectories kept out: {made.mean:.3f} by the mean, {made.spread:.3f} at best within the spread, "
        f"{made.span:.3f} at best in the span of all fields"
    )
    print(f"directions: {made.path}; give it as ttc.stochastic.directions={made.path}")


if __name__ == "__main__":
    sys.exit(main(["fit_directions", *sys.argv[1:]]))
