"""A search in several processes is the search in one."""

import dataclasses
import re
import socket
import warnings

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.scorers import last_cell
from tests.surrogates import brittle, drop_surrogate, euler_state
from ttcfast.models.ensemble import Blend, Ensemble, SolverStep
from ttcfast.rewards.common import ScorerList
from ttcfast.runtime import distributed
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget

FIELDS = ("trajectory", "scores", "chosen", "fallbacks", "resamples", "nonfinite", "collapsed", "frozen")


def several():
    """A surrogate's mean with a solver, another surrogate, and the solver by itself."""
    solver = SolverStep(lambda x: x + 0.01 * x.roll(1, -1), StateSpec.euler2d())
    return Ensemble([Blend([drop_surrogate(), solver]), drop_surrogate(p=0.5), solver])


CASES = {  # name: (surrogate, config, further arguments of rollout)
    "beam": (drop_surrogate, {"beam_width": 3, "approach": "beam", "chunk_size": 5}, {}),
    "lookahead": (
        drop_surrogate,
        {"beam_width": 2, "approach": "beam", "lookahead": 1, "chunk_size": 3, "seed": 4},
        {"budget": Budget(150)},
    ),
    "subtrees": (brittle, {"beam_width": 3, "approach": "diverse_beam", "chunk_size": 4, "score_floor": 1.05}, {}),
    "deaths": (brittle, {"beam_width": 2, "approach": "beam", "chunk_size": 4, "max_resample": 1}, {}),
    "groups": (drop_surrogate, {"beam_width": 2, "approach": "beam", "chunk_size": 14}, {}),
    "collapse": (drop_surrogate, {"beam_width": 3, "approach": "beam", "chunk_size": 4, "min_score_spread": 5e-3}, {}),
    "several": (several, {"beam_width": 2, "approach": "beam", "lookahead": 1, "chunk_size": 4}, {"budget": Budget(150)}),
}
BY_PROBLEM = {**CASES, "particle": (drop_surrogate, {"beam_width": 3, "approach": "particle", "chunk_size": 5}, {})}


def roll(case, shard, x0):
    if case in ("single", "few"):
        case, x0 = "beam", x0[0] if case == "single" else x0[:1]
    surrogate, options, further = BY_PROBLEM[case]
    cfg = TTCConfig(branching_factor=7, memory_budget=1 << 34, **options, shard=shard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        scorer = ScorerList([last_cell], zscore=True) if case == "groups" else last_cell
        result = TTCBeam(surrogate(), scorer, cfg, drop_duplicates=case == "beam").rollout(x0, 3, return_info=True, **further)
    return {name: getattr(result, name) for name in FIELDS} | {"counts": torch.tensor([result.nfe, result.solver_steps])}


def process(rank, ranks, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    x0, found = euler_state(3), {}
    for case in CASES:
        found[case, "candidates"] = roll(case, "candidates", x0)
    for case in BY_PROBLEM:
        if not BY_PROBLEM[case][2]:
            found[case, "problems"] = roll(case, "problems", x0)
    found["single", "candidates"] = roll("single", "candidates", x0)
    found["few", "problems"] = roll("few", "problems", x0)  # fewer than ranks
    cfg = TTCConfig(branching_factor=4, seed=rank % 2, shard="problems")
    same, weighed = dataclasses.replace(cfg, seed=0), ScorerList([last_cell], [1.0 + rank % 2])
    for name, controller, x, scorer, options in (
        ("seed", cfg, x0, last_cell, {}),
        ("x0", same, x0 + rank, last_cell, {}),
        ("scorer", same, x0, weighed, {}),
        ("duplicates", same, x0, last_cell, {"drop_duplicates": rank == 0}),
        ("surrogate", same, x0, last_cell, {}),
    ):
        surrogate = drop_surrogate(scale=0.01 if name != "surrogate" or rank == 0 else 0.02)
        try:
            TTCBeam(surrogate, scorer, controller, **options).rollout(x, 2)
        except ValueError as error:
            found[name, "error"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def same(ours, theirs, what):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def run_processes(ranks, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])  # imported once, in a process that has computed nothing
    multiprocessing.start_processes(process, (ranks, port, folder), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture
def one_thread():
    """As in the processes below: convolutions round otherwise on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_has_the_result_of_one_process(ranks, tmp_path, one_thread):
    found = run_processes(ranks, tmp_path)
    x0, events = euler_state(3), set()
    for (case, shard), _ in [item for item in found[0].items() if item[0][1] != "error"]:
        alone = roll(case, None, x0)
        events |= {name for name in ("fallbacks", "resamples", "nonfinite", "collapsed", "frozen") if alone[name].any()}
        for rank in range(ranks):
            for name, value in alone.items():
                same(found[rank][case, shard][name], value, f"{case}, shard={shard}, {name}")
    assert events == {"fallbacks", "resamples", "nonfinite", "collapsed", "frozen"}
    for rank in range(ranks):
        assert found[rank]["seed", "error"].startswith(f"the ranks 0 to {ranks - 1} have unequal configurations: seed is 0, 1")
        assert re.search(r"x0 is 'torch.float32 \(3, 4, 8, 8\) \w+', 'torch", found[rank]["x0", "error"])
        assert ": scorer.weights.last_cell is 1.0, 2.0" in found[rank]["scorer", "error"]
        assert ": drop_duplicates is True, False" in found[rank]["duplicates", "error"]
        assert re.search(r": model.weights is '\w+', '\w+'", found[rank]["surrogate", "error"])


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    with distributed.process_group() as device:
        assert device.type in ("cpu", "cuda")
    x0 = euler_state(3)
    for case in CASES:
        for name, value in roll(case, "candidates", x0).items():
            same(value, roll(case, None, x0)[name], name)
            break
