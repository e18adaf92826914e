"""What a GPU machine runs first, on the fake device: the gates of every group of benchmarks, and bench/smoke.py."""

from __future__ import annotations

import pytest

from bench import groups
from bench.__main__ import main
from tests.fake_cuda import FakeCuda

GROUPS = [name for name in groups.names() if next(groups.cases(name, "cuda", tiny=True), None) is not None]


@pytest.mark.parametrize("group", GROUPS)
def test_the_gates_of_a_group_pass(group, capsys):
    with FakeCuda() as gpu:
        assert main([group, "--gates", "--device", "cuda"]) == 0, capsys.readouterr().out
    assert gpu.launches or group in ("planning", "search"), "nothing of ttcfast ran on the device"
