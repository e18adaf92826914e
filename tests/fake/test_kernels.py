"""On the fake device with Triton's interpreter: the kernels themselves, launched as for a GPU, compute what the host computes."""

from __future__ import annotations

import pytest
import torch

from tests.fake.cases import CASES
from tests.fake.test_device import every_operation
from tests.fake.test_world_models import agent, sequences
from tests.fake_cuda import FakeCuda, on_host
from ttcfast.ops import registry

pytestmark = pytest.mark.skipif(not registry.interpreting(), reason="Triton interprets only if TRITON_INTERPRET=1 before Python starts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operation_is_that_of_the_host(dtype):
    with FakeCuda():
        found = every_operation("cuda", dtype)
    for ours, theirs in zip(on_host(found), every_operation("cpu", dtype)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dropout", "latent and input noise, antithetic", "fields", "beams"])
def test_a_search_chooses_as_on_the_host(name):
    case = CASES[name]
    expected = case.search("cpu").rollout(case.start(), 2, return_info=True)
    with FakeCuda():
        found = on_host(case.search("cuda").rollout(case.start().cuda(), 2, return_info=True))
    assert torch.equal(found.chosen, expected.chosen)
    torch.testing.assert_close(found.trajectory, expected.trajectory, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-6)


def test_an_update_of_a_world_model_is_that_of_the_host():
    with FakeCuda():
        found = agent("flow", "cuda").update_wm(*sequences("cuda"))
    assert found == pytest.approx(agent("flow", "cpu").update_wm(*sequences("cpu")), rel=1e-4)


def test_a_recorded_graph_launches_its_kernels_again():
    case = CASES["dropout"]
    with FakeCuda():
        scorer, x = case.scorer(), case.start().cuda()
        candidates = x.unsqueeze(1) + 0.1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores = scorer.score_group(x, candidates, None)
        candidates.mul_(1.5)
        graph.replay()
    expected = scorer.score_group(on_host(x), on_host(candidates), None)
    torch.testing.assert_close(on_host(scores), expected, rtol=1e-5, atol=1e-6)
