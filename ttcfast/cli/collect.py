"""``ttcfast collect``: record a replay data set of dm_control or gymnasium tasks (resumable, deterministic in the seed)

Example: ``ttcfast collect episodes=80 out=data/cartpole80``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.pwm.collect import CollectConfig, collect
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(CollectConfig, free=("controllers",))


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        result = collect(config)
        save(config.out, values, "collect")
    print(f"{len(result.files)} shards with {result.steps} steps are in {config.out}; returns:")
    for (task, controller), found in result.returns.items():
        low, median, high = found.min(), found.median(), found.max()
        print(f"  {task}, {controller}: {len(found)} episodes, {low:.0f} to {high:.0f}, median {median:.0f}")
    if result.failures:
        where, why = next(iter(result.failures.items()))
        print(f"  {len(result.failures)} episodes were left out, in which the simulator failed; the first, {where}: {why}")


if __name__ == "__main__":
    sys.exit(main(["collect", *sys.argv[1:]]))
