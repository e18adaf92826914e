"""What a benchmark measures lies on the device that it names, at tiny sizes too; asked on the meta device, which holds no numbers."""

from __future__ import annotations

from bench.bench_prm import Shipped, Sizes
from bench.bench_step import Setting


def test_tiny_problems_are_made_on_the_device():
    assert {t.device.type for t in Shipped("meta", True).groups} == {"meta"}
    assert Sizes("meta", True).states.device.type == "meta"
    assert Setting(1, 4, "meta", True).x.device.type == "meta"
