"""A candidate is a function of its state, its ids, the seed and the step: chunks, order, batch and process do not enter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.surrogates import DropNet, drop_surrogate, euler_state
from ttcfast import ops
from ttcfast.core.base_fm import Surrogate, candidate_rows
from ttcfast.models import load_surrogate
from ttcfast.spec import Key, StateSpec, StochasticConfig
from ttcfast.stochastic_sampling import noise_sites

ROOT = Path(__file__).resolve().parents[2]
SPEC, B, N = StateSpec.euler2d(), 12, 3
IDS, PROBLEMS = torch.arange(1, B + 1), torch.tensor([4, 0, 70_000])
NOISES = {
    "dropout": {},
    "injected": {"dropout_p": 0.2, "dropout_after": ("2",)},
    "latent": {"dropout": False, "latent_sigma": 0.1, "latent_at": "2"},
    "input": {"dropout": False, "input_eps": 0.1},
    "all": {"dropout_p": 0.2, "dropout_after": ("2",), "latent_sigma": 0.1, "latent_at": "2", "input_eps": 0.1, "antithetic": True},
}


def revealing(noise: str) -> Surrogate:
    """Entry by entry, so that equal masks and noise give equal bits whatever the batch."""
    model = nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.2), nn.Identity(), nn.Dropout(0.1))
    return Surrogate(model, SPEC, stochastic=NOISES[noise])


def draw(fm: Surrogate, x: Tensor, ids: Tensor = IDS, problem_ids: Tensor = PROBLEMS, **changes) -> Tensor:
    return fm.candidates(x, ids, problem_ids=problem_ids, **{"seed": 5, "step": 2, **changes})


@pytest.mark.parametrize("noise", NOISES)
def test_masks_and_noise_are_the_same_bit_for_bit_in_any_chunk_order_and_batch(noise):
    fm, x = revealing(noise), euler_state(N)
    whole = draw(fm, x)
    for size in (1, 5, 12):
        assert torch.equal(torch.cat([draw(fm, x, part) for part in IDS.split(size)], 1), whole)
    order, shuffled = torch.tensor([2, 0, 1]), torch.randperm(B)
    assert torch.equal(draw(fm, x[order], IDS[shuffled], PROBLEMS[order]), whole[order][:, shuffled])
    for n in range(N):
        assert torch.equal(draw(fm, x[n : n + 1], problem_ids=PROBLEMS[n : n + 1]), whole[n : n + 1])
    again = torch.cat([IDS[3:5], IDS + B])  # drawn again under other ids, beside some of the first
    assert torch.equal(draw(fm, x, again)[:, :2], whole[:, 3:5])
    flat = draw(fm, x[:1].expand(N, -1, -1, -1)).flatten(0, 1)
    assert len({tuple(row.flatten().tolist()) for row in flat}) == N * B
    for change in ({"seed": 6}, {"step": 3}, {"ids": IDS + 2 * B}, {"problem_ids": PROBLEMS + 1}):
        other = draw(fm, x, **change)
        assert all(not torch.equal(other[n, b], whole[n, b]) for n in range(N) for b in range(B)), change


def test_outputs_are_the_same_to_rounding_in_any_chunk():
    fm = drop_surrogate(stochastic={"latent_sigma": 0.1, "input_eps": 0.1, "dropout_p": 0.2, "dropout_after": ["lift"]})
    whole = draw(fm, x := euler_state(N))
    for size in (1, 5):
        torch.testing.assert_close(torch.cat([draw(fm, x, part) for part in IDS.split(size)], 1), whole)
    torch.testing.assert_close(draw(fm, x.flip(0), problem_ids=PROBLEMS.flip(0)), whole.flip(0))


def test_the_shipped_surrogate_too():
    fm = load_surrogate(ROOT / "examples/surrogate.safetensors", stochastic={"latent_sigma": 0.01})
    x = 0.1 * torch.rand(1, 4, 64, 64) + torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(1, 4, 1, 1)
    ids = torch.arange(3)
    whole = fm.candidates(x, ids, seed=0, step=0)
    parts = [fm.candidates(x, part, seed=0, step=0) for part in ids.split(1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert (whole[:, 0] - whole[:, 1]).abs().max() > 1e-3


def test_another_process_draws_the_same(tmp_path):
    program = (
        "import sys, torch; from tests.core.test_keyed_candidates import *\n"
        "torch.save({noise: draw(revealing(noise), torch.load(sys.argv[1]), IDS[6:]) for noise in NOISES}, sys.argv[2])"
    )
    torch.save(x := euler_state(N), tmp_path / "x.pt")
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", program, tmp_path / "x.pt", tmp_path / "out.pt"], check=True, env=environment, cwd=ROOT)
    drawn = torch.load(tmp_path / "out.pt")
    for noise in NOISES:
        fm = revealing(noise)
        assert torch.equal(torch.cat([draw(fm, x, IDS[:6]), drawn[noise]], 1), draw(fm, x)), noise


def test_the_draws_are_those_of_the_keyed_operations():
    x, rows = euler_state(N), candidate_rows(IDS, PROBLEMS, N)
    noise = Surrogate(nn.Identity(), SPEC, stochastic={"dropout": False, "input_eps": 0.5})
    (site,) = noise_sites(noise.model, noise.stochastic)
    assert torch.equal(draw(noise, x), ops.add_noise(x, B, 0.5, key=Key(5, 2, site.number), rows=rows))
    drop = Surrogate(nn.Dropout(0.3), SPEC)
    (site,) = noise_sites(drop.model, drop.stochastic)
    expected = ops.keyed_dropout(x.repeat_interleave(B, 0), 0.3, key=Key(5, 2, site.number), rows=rows)
    assert torch.equal(draw(drop, x).flatten(0, 1), expected)


def test_antithetic_candidates_come_in_pairs():
    x, eps = torch.zeros(N, 4, 8, 8), StochasticConfig(dropout=False, input_eps=0.1)
    alone = draw(Surrogate(nn.Identity(), SPEC, stochastic=eps), x)
    fm = Surrogate(nn.Identity(), SPEC, stochastic=StochasticConfig(dropout=False, input_eps=0.1, antithetic=True))
    pairs = draw(fm, x)  # ids 1 to 12: (1, 2), (3, 4), ...
    assert torch.equal(pairs[:, 0::2], alone[:, 0::2]) and torch.equal(pairs[:, 1::2], -pairs[:, 0::2])
    assert torch.equal(draw(fm, x, IDS[1:2]), pairs[:, 1:2])  # the other one need not be there


def test_a_sample_is_a_candidate_and_its_seed_fixes_it():
    fm, x = drop_surrogate(), euler_state(N)
    batch = fm.sample_next(x[:1].expand(4, -1, -1, -1), seed=3, multi=True)
    torch.testing.assert_close(batch, fm.candidates(x[:1], torch.arange(4), seed=3, step=0)[0])
    torch.testing.assert_close(fm.sample_next(x[0], seed=3), batch[0])
    assert torch.equal(fm.sample_next(x[0], seed=-(2**70)), fm.sample_next(x[0], seed=-(2**70)))
    torch.manual_seed(1)
    first, second = fm.sample_next(x[0]), fm.sample_next(x[0])
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(fm.sample_next(x[0]), first)


def test_functional_noise_runs_under_the_seed_of_the_call():
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    fm, x = Surrogate(Functional(), SPEC), euler_state(N)
    assert torch.equal(draw(fm, x), draw(fm, x)) and not torch.equal(draw(fm, x, IDS + 1), draw(fm, x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": torch.rand(3)}, r"ids are torch.float32 \(3,\); give at least one integer id, \[B\]"),
        ({"ids": torch.ones(3, dtype=torch.bool)}, "ids are torch.bool"),
        ({"ids": torch.ones(5, 2, dtype=torch.int64)}, r"ids are torch.int64 \(5, 2\)"),
        ({"ids": torch.tensor([3, -1])}, "ids are -1 to 3; give numbers from 0 to"),
        ({"problem_ids": torch.arange(2)}, r"problem_ids are torch.int64 \(2,\); give one integer for each of the 3 problems"),
        ({"problem_ids": torch.rand(3)}, "problem_ids are torch.float32"),
        ({"problem_ids": torch.tensor([0, -2, 1])}, "problem_ids are -2 to 1; give numbers from 0 to 4294967295"),
        ({"problem_ids": torch.tensor([0, 2**32, 1])}, "problem_ids are 0 to 4294967296"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; it must be below 2\*\*63"),
        ({"step": -1}, "step is -1"),
        ({"step": 1.5}, "step is 1.5; give a whole number"),
        ({"stochastic": {"dropout_p": 1.0}}, r"dropout_p is 1.0; a dropout rate lies in \[0, 1\)"),
        ({"stochastic": {"input_eps": -0.1}}, "input_eps is -0.1"),
        ({"stochastic": {"latent_sigma": -0.1}}, "latent_sigma is -0.1"),
        ({"stochastic": {"dropout_p": 0.1, "dropout_after": "head"}}, "dropout_after is the string 'head'; give a list"),
        ({"stochastic": {"dropout_p": 0.1, "dropout_after": ["nowhere"]}}, "after names .*nowhere.*, which DropNet does not have"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        draw(drop_surrogate(), euler_state(N), **change)


def test_whole_numbers_of_any_width_are_ids():
    fm, x = Surrogate(DropNet(), SPEC), euler_state(N)
    assert torch.equal(draw(fm, x, IDS.int(), PROBLEMS.to(torch.int32)), draw(fm, x))
