"""Searches to be made on the host and on the fake device: every source of candidates, reward and way to choose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import foreign
from tests.rewards.prm.test_model import NORMALIZER, networks
from tests.scorers import last_cell
from tests.surrogates import Foreign, brittle, drop_surrogate, euler_state, shift_surrogate, shifted, vit_surrogate
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.models.ensemble import Blend, Ensemble, SolverStep
from ttcfast.rewards.common import ARMScorer, EulerResidualScorer, OracleScorer, PRMScorer, Residual, ScorerList, VorticityResidual
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.search import Search

N = 3  # problems
DIRECTIONS = str(Path(__file__).resolve().parents[2] / "examples" / "directions.safetensors")
SPEC = StateSpec.euler2d()


@dataclass(frozen=True)
class Case:
    """One search: makers of its model and reward, the options of ``TTCConfig``, of the controller and of ``rollout``, and its states."""

    fm: Callable[[], Any] = drop_surrogate
    scorer: Callable[[], Any] = ARMScorer
    options: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    start: Callable[[], Tensor] = lambda: euler_state(N)

    def search(self, device: str) -> Search:
        """The controller, with model and reward on the device."""
        torch.manual_seed(0)  # the weights are the same every time
        fm, scorer = (made.to(device) if isinstance(made := make(), nn.Module) else made for make in (self.fm, self.scorer))
        cfg = TTCConfig(**{"seed": 3, "branching_factor": 4, **self.options})
        if cfg.approach == "greedy" and not cfg.lookahead:
            return TTCGreedy(fm, scorer, cfg, **self.controller)
        return TTCBeam(fm, scorer, cfg, **self.controller)


def beam(k: int = 2, **options: Any) -> dict[str, Any]:
    return {"approach": "beam", "beam_width": k, **options}


def noisy(**stochastic: Any) -> Callable[[], Surrogate]:
    return lambda: drop_surrogate(stochastic=stochastic)


def two_frames() -> Tensor:
    return torch.stack([euler_state(N), euler_state(N).roll(1, -1)], 1)


def masked() -> ARMScorer:
    """With a boundary, a volume of each cell, a gamma and a budget of each problem."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0] = True
    values = {"boundary_mask": mask, "boundary_value": torch.ones(4, 1, 1), "cell_volume": torch.rand(8, 8) + 0.5}
    return ARMScorer(spec=StateSpec.euler2d(gamma=torch.full((N,), 1.4), **values), budgets={"mass": 0.01 * torch.arange(N)})


def oracle() -> OracleScorer:
    return OracleScorer(shifted(euler_state(N), 8))


def prm(number: int) -> PRMScorer:
    return PRMScorer(copy.deepcopy(networks()[number]).requires_grad_(False).eval(), chunk=8)


def informed() -> PRMScorer:
    """A reward model that sees the residual of the equations, as the shipped one does."""
    torch.manual_seed(1)
    around = {"normalizer": copy.deepcopy(NORMALIZER), "spec": SPEC, "residual": {"dt": 0.1, "cell": (1 / 8, 1 / 8)}}
    network = DensePRM(8, 4, levels=2, **around)
    nn.init.normal_(network.out.weight, std=0.05)
    return PRMScorer(network.requires_grad_(False).eval())


def residual(x_t: Tensor, candidates: Tensor, context: Any) -> Tensor:
    return candidates - x_t.unsqueeze(1)


def solver() -> SolverStep:
    return SolverStep(lambda x: x + 0.01 * x.roll(1, -1), SPEC)


def normalized() -> Surrogate:
    """With everything that a surrogate may have around its model."""
    plain = drop_surrogate()
    scales = Normalizer(torch.tensor([1.0, 0, 0, 2.5]), torch.ones(4), delta_mean=torch.full((4,), 1e-3))
    return Surrogate(plain.model, SPEC, normalizer=scales, predicts="delta", stochastic={"input_eps": 0.01, "latent_sigma": 0.01})


def vorticity() -> Surrogate:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.Dropout(0.1))
    return Surrogate(model, StateSpec.fields("w", mean_zero="w", symmetries=({"order": (1, 0), "odd": ("w",)},)), predicts="delta")


def fields(projected: bool = False) -> Surrogate:
    """Of physics that is no gas, with a given channel, and with all that can be imposed."""
    if not projected:
        return foreign.make()
    spec = StateSpec.fields(
        *("tracer", "velocity_x", "velocity_y", "mask"), conserved="tracer", bounds={"tracer": (0.0, 4.0)}, given="mask",
        divergence_free=("velocity_x", "velocity_y"), mean_zero=("velocity_x", "velocity_y"),
    )  # fmt: skip
    return Surrogate(foreign.Drift(), spec, stochastic={"dropout_p": 0.4})


GREEDY = {
    "dropout": Case(),
    "whole problems in chunks": Case(options={"branching_factor": 5, "chunk_size": 10}),
    "chunks": Case(options={"branching_factor": 5, "chunk_size": 3}),
    "memory budget": Case(options={"branching_factor": 5, "memory_budget": 1 << 34}),
    "latent and input noise, antithetic": Case(noisy(latent_sigma=0.05, input_eps=0.01, antithetic=True)),
    "vision transformer": Case(vit_surrogate, options={"branching_factor": 6}),
    "bfloat16": Case(lambda: vit_surrogate().variant(dtype=torch.bfloat16), options={"branching_factor": 6}),
    "normalised": Case(normalized),
    "two frames": Case(lambda: drop_surrogate(history=2), start=two_frames),
    "directions": Case(noisy(dropout=False, directions=DIRECTIONS)),
    "directions on a grid, and dropout": Case(noisy(directions=DIRECTIONS, directions_grid=2)),
    "symmetries": Case(noisy(dropout=False, symmetry=True)),
    "ensemble": Case(lambda: Ensemble([drop_surrogate(), drop_surrogate(scale=0.05), solver()]), options={"branching_factor": 7}),
    "blend": Case(lambda: Blend([drop_surrogate(), drop_surrogate(scale=0.05)])),
    "foreign model": Case(Foreign),
    "conditions": Case(foreign.conditioned, lambda: ARMScorer(spec=foreign.SPEC), start=lambda: foreign.trajectories(N)[:, 0]),
    "mask, volumes, gamma, budgets": Case(scorer=masked),
    "oracle": Case(shift_surrogate, oracle),
    "reward model": Case(scorer=lambda: prm(0)),
    "dense reward model": Case(scorer=lambda: prm(1)),
    "reward model with a residual": Case(scorer=informed),
    "sum of rewards": Case(scorer=lambda: ScorerList([ARMScorer(), prm(2)])),
    "z-scores": Case(scorer=lambda: ScorerList([ARMScorer(), last_cell], zscore=True)),
    "callable": Case(scorer=lambda: last_cell),
    "residual of the equations": Case(scorer=lambda: EulerResidualScorer(0.1, 1 / 8)),
    "residual by finite volumes": Case(scorer=lambda: EulerResidualScorer(0.1, 1 / 8, form="finite_volume")),
    "residual of vorticity": Case(
        vorticity, lambda: VorticityResidual(0.01, viscosity=0.01), start=lambda: euler_state(N)[:, :1] - euler_state(N)[:, :1].mean()
    ),
    "residual of one's own": Case(scorer=lambda: Residual(residual)),
    "fields": Case(fields, lambda: ARMScorer(spec=foreign.SPEC), start=lambda: foreign.trajectories(N)[:, 0]),
    "mean": Case(options={"select": "mean"}),
    "softmax": Case(options={"select": "softmax_mean", "temperature": 0.5}),
    "span of the oracle": Case(scorer=oracle, options={"select": "span"}),
    "span": Case(options={"select": "span"}),
    "refined": Case(options={"branching_factor": 3, "refine_steps": 2}),
    "refined by the oracle": Case(scorer=oracle, options={"branching_factor": 3, "refine_steps": 2, "refine_lengths": (1.0,)}),
    "refined by a reward model": Case(scorer=lambda: prm(2), options={"branching_factor": 3, "refine_steps": 1}),
    "refined in their frames": Case(noisy(symmetry=True), oracle, {"branching_factor": 3, "refine_steps": 1, "select": "mean"}),
    "projected": Case(options={"project": "conservation"}),
    "projected, oracle": Case(shift_surrogate, oracle, {"project": "conservation"}),
    "all declared imposed": Case(
        lambda: fields(True), lambda: last_cell, {"project": "declared"}, start=lambda: foreign.trajectories(N)[:, 0]
    ),
    "fallbacks": Case(scorer=lambda: last_cell, options={"score_floor": 1.19}),
    "dying problems": Case(brittle, lambda: last_cell, {"branching_factor": 3}),
    "budget": Case(rollout={"budget": Budget(evaluations=50)}),
    "without the deterministic step": Case(options={"include_deterministic": False}),
}
BEAMS = {
    "one beam": Case(options=beam(1)),
    "beams": Case(options=beam(3)),
    "beams in chunks": Case(options=beam(3, branching_factor=5, chunk_size=4)),
    "ties and duplicates": Case(
        options=beam(3, score_aggregation="mean"), controller={"tie_breaker": ARMScorer(), "drop_duplicates": True}
    ),
    "lookahead": Case(options=beam(lookahead=2, score_aggregation="discounted")),
    "greedy lookahead": Case(options={"lookahead": 1}),
    "diverse beams": Case(options={"approach": "diverse_beam", "beam_width": 3}),
    "particles": Case(options={"approach": "particle", "beam_width": 3, "temperature": 0.1}),
    "particles in chunks": Case(options={"approach": "particle", "beam_width": 3, "temperature": 0.1, "chunk_size": 4}),
    "beams of two frames": Case(lambda: drop_surrogate(history=2), options=beam(), start=two_frames),
    "beams of a reward model": Case(scorer=lambda: prm(1), options=beam()),
    "beams refined, projected": Case(scorer=oracle, options=beam(branching_factor=3, refine_steps=1, project="conservation")),
    "beams of an ensemble": Case(lambda: Ensemble([drop_surrogate(), solver()]), options=beam()),
    "beams with fallbacks": Case(scorer=lambda: last_cell, options=beam(score_floor=1.19)),
    "dying beams": Case(brittle, lambda: last_cell, beam(branching_factor=3)),
    "beams on a budget": Case(options=beam(), rollout={"budget": Budget(evaluations=60)}),
    "candidates shared by one process": Case(options=beam(shard="candidates")),
}
CASES = {**GREEDY, **BEAMS}
