from __future__ import annotations

import pytest
import torch

from bench.clocks import HostClock, clock_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.fixture
def clock():
    return clock_for("cuda")


def test_a_graph_replays_the_call(clock):
    x = torch.zeros(1000, device="cuda")
    replay, reason = clock.graph_of(lambda: x.add_(1))
    assert reason == ""
    before = x.clone()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(x, before + 1)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda: None, "graph is empty"),  # whose replay would take no time at all
        (lambda: torch.ones(3, device="cuda").sum().item(), "captur"),
    ],
)
def test_what_cannot_be_captured_is_told_and_does_no_harm(clock, run, why):
    replay, reason = clock.graph_of(run)
    assert replay is None and reason.startswith("not capturable: ") and why in reason
    assert float(torch.ones(3, device="cuda").sum()) == 3
    assert clock.graph_of(lambda: torch.ones(3, device="cuda") * 2)[0] is not None


def test_events_tell_a_time_no_longer_than_the_host_sees(clock):
    x = torch.rand(2**26, device="cuda")

    def run() -> None:
        x.mul_(1.0)

    run()
    cold, hot = clock.sample(run, 5), clock.hot_sample(run, 5)
    host = HostClock().sample(lambda: (run(), torch.cuda.synchronize()), 5)
    assert 0 < cold < 2 * host and 0 < hot < 2 * host
