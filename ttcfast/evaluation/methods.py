"""The methods that a table compares, each as one rollout through the same controller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.core.base_fm import BaseFM
from ttcfast.models.ensemble import Blend, Ensemble, SolverStep
from ttcfast.rewards.composition import ScorerList
from ttcfast.rewards.oracle import OracleScorer
from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.runtime.errors import ArgumentError
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.result import RolloutResult

from .baselines import BASELINES, Indifferent, baseline_rollout

ORACLES: Mapping[str, str] = {"oracle": "argmax", "span_oracle": "span"}
"""Methods that know the truth, with the way in which they select the next state."""

BLEND = "surrogate_solver"
"""The method that takes the mean of the deterministic step and the classical solver's."""

SYMMETRIES = 8
"""Candidates of the means over symmetries: those of a square."""

ONE_BEAM: Mapping[str, Any] = {"approach": "greedy", "beam_width": 1, "score_aggregation": "sum", "lookahead": 0}
"""Options of a greedy search: one beam, no lookahead."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A reward together with a way to use it, evaluated as a method of its own.

    Args:
        scorer: The reward.
        options: Fields of ``TTCConfig`` that this method overrides.
        oracle: Let the truth choose, and use the reward only to move the candidates: the ceiling of choosing among them.
        projected_alone: Run a costly method only with projection where others are run with and without.
        model: Makes the model that is rolled out of the surrogate, such as its mean with a solver; None rolls out the surrogate.
    """

    scorer: Scorer
    options: Mapping[str, Any] = field(default_factory=dict)
    oracle: bool = False
    projected_alone: bool = False
    model: Callable[[Any], BaseFM] | None = None


def variants(
    rewards: Mapping[str, Scorer],
    config: TTCConfig,
    *,
    spec: StateSpec | None = None,
    search_candidates: int | None = None,
    search_projected: bool = False,
    solver: SolverStep | None = None,
) -> dict[str, Variant]:
    """Return every way to use each reward, by method name.

    ``<name>`` follows ``config``; ``<name>_refined`` takes the best candidate after refinement (at least one step);
    ``<name>_corrector`` makes the same number of full moves from the deterministic step, without candidates and without a choice;
    ``<name>_refined_oracle`` chooses among the refined candidates by true error; ``<name>_softmax`` takes the mean weighted by the softmax
    of the z-scores over ``config.temperature``; ``<name>_mean`` the mean, of refined candidates where ``config`` refines; ``<name>_span``
    the best point in the span of the candidates. If ``config`` asks for several beams or lookahead, ``<name>_beam`` (``_diverse_beam``,
    ``_particle``, ``_lookahead``) is that search; all others are greedy. Where the layout declares symmetries, ``symmetry_mean`` is the
    mean of ``SYMMETRIES`` deterministic steps under them (of B, if B is larger), and ``<name>_symmetry`` that of as many corrected ones.
    With a classical solver ``surrogate_solver`` is the mean of its step and the deterministic one, and ``<name>_solver`` that of as many
    corrected ones; ``<name>_solver_choice`` takes the better of both by the reward, ``<name>_solver_span`` the best point between them.

    Args:
        rewards: Rewards by name.
        config: Options that the methods share.
        spec: Layout of the states; None leaves out the rows of symmetries.
        search_candidates: Candidates per beam of the search; None takes ``config.branching_factor``.
        search_projected: Run rewards' choices, searches and means over symmetries only with projection.
        solver: A classical solver's step, for the rows that combine it with the surrogate.
    """
    plain = {"select": "argmax", "temperature": 1.0, **ONE_BEAM}
    softened = config.select == "softmax_mean"
    refined = {**plain, "refine_steps": max(1, config.refine_steps)}
    alone: Any = {**refined, "select": "mean", "refine_lengths": (1.0,), "include_deterministic": True, "score_floor": None, "shard": None}
    turned = {"branching_factor": max(SYMMETRIES, config.branching_factor), "stochastic": StochasticConfig(dropout=False, symmetry=True)}
    one = {"branching_factor": 1}
    found, symmetric = dict[str, Variant](), spec is not None and bool(spec.symmetries or spec.translations)
    if spec is not None and symmetric:
        found["symmetry_mean"] = Variant(Indifferent(spec.ndim), {**alone, "refine_steps": 0, **turned}, projected_alone=search_projected)
    for name, scorer in rewards.items():
        options = {**ONE_BEAM, **({} if softened else {"temperature": 1.0})}
        found[name] = Variant(scorer, options, projected_alone=search_projected)
        found[f"{name}_refined"] = Variant(scorer, refined, projected_alone=search_projected)
        found[f"{name}_corrector"] = Variant(scorer, {**alone, **one})
        if symmetric:
            found[f"{name}_symmetry"] = Variant(scorer, {**alone, **turned}, projected_alone=True)
        found[f"{name}_refined_oracle"] = Variant(scorer, refined, oracle=True)
        standardised = ScorerList({name: scorer}, zscore=True, ndim=scorer.ndim)
        found[f"{name}_softmax"] = Variant(standardised, {**ONE_BEAM, "select": "softmax_mean"})
        found[f"{name}_mean"] = Variant(scorer, {**ONE_BEAM, "select": "mean", "temperature": 1.0})
        found[f"{name}_span"] = Variant(scorer, {**plain, "select": "span"})
        if (search := search_options(config)) is not None:
            own = {} if search_candidates is None else {"branching_factor": search_candidates}
            found[f"{name}_{search_name(config)}"] = Variant(scorer, {**plain, **search, **own}, projected_alone=search_projected)
    if solver is not None:
        mixed, among = (partial(_beside, kind, solver) for kind in (Blend, Ensemble))
        both = {**plain, "branching_factor": 2, "stochastic": StochasticConfig(dropout=False)}
        found[BLEND] = Variant(Indifferent(solver.spec.ndim), {**alone, **one, "refine_steps": 0}, model=mixed)
        for name, scorer in rewards.items():
            found[f"{name}_solver"] = Variant(scorer, {**alone, **(turned if symmetric else one)}, projected_alone=True, model=mixed)
            found[f"{name}_solver_choice"] = Variant(scorer, both, model=among)
            found[f"{name}_solver_span"] = Variant(scorer, {**both, "select": "span"}, model=among)
    return found


def named_variants(
    methods: Sequence[str],
    known: Mapping[str, Variant],
    *,
    rewards: Mapping[str, Scorer],
    give_reward: str,
    give_solver: str,
    besides: Sequence[str] = (),
) -> dict[str, Variant]:
    """Return the variants that ``methods`` names; those of ``BASELINES`` and ``ORACLES`` have none.

    Args:
        methods: Names of rows.
        known: What ``variants`` returned for these rewards.
        rewards: Rewards by name.
        give_reward, give_solver: Remedies where a learned reward or a classical solver is missing.
        besides: Further names that have no variant.

    Raises:
        ArgumentError: A name is unknown; its reward, solver or symmetries are missing; or its reward has no moves.
    """
    others = (*BASELINES, *ORACLES, *besides)
    for name in methods:
        if name in others:
            continue
        reward = max((each for each in rewards if name.startswith(f"{each}_")), key=len, default=None)
        if name in known:
            scorer = None if reward is None or not known[name].options.get("refine_steps", 0) else rewards[reward]
            if scorer is not None and scorer.maximum is None and type(scorer).ascent is Scorer.ascent:
                raise ArgumentError(
                    f"methods names {name}, which moves states along {reward}, a reward without moves; set its maximum (0.0 for a negated "
                    "error), implement ascent, or give a learned reward"
                )
            continue
        ending = max((end for end in _USES if name.endswith(end) and name != end), key=len, default="")
        if name == "symmetry_mean" or (reward is not None and ending == "_symmetry"):
            needs = "symmetries, which the layout does not declare; give StateSpec symmetries= or translations="
        elif name in ("solver", BLEND) or (reward is not None and ending.startswith("_solver")):
            needs = f"a classical solver; {give_solver}"
        elif (ending and reward is None) or "prm" in name.split("_"):
            needs = f"the reward {name.removesuffix(ending)}; there are {', '.join(rewards) or 'none'}; {give_reward}"
        else:
            raise ArgumentError(f"methods names {name}; here there are {', '.join([*others, *known])}")
        raise ArgumentError(f"methods names {name}, which needs {needs}")
    return {name: known[name] for name in methods if name in known}


_USES = (
    *("_refined", "_refined_oracle", "_corrector", "_symmetry", "_softmax", "_mean", "_span"),
    *("_solver", "_solver_choice", "_solver_span"),
)


def _beside(kind: type[Blend] | type[Ensemble], solver: SolverStep, surrogate: BaseFM) -> BaseFM:
    """Return a surrogate together with a solver."""
    return kind([surrogate, solver])


def search_options(config: TTCConfig) -> dict[str, Any] | None:
    """Return the options of the search over several beams or with lookahead that ``config`` asks for, or None."""
    if config.approach == "greedy" and not config.lookahead and config.beam_width == 1:
        return None
    options: dict[str, Any] = {name: getattr(config, name) for name in ONE_BEAM}
    return {**options, "temperature": config.temperature} if config.approach == "particle" else options


def search_name(config: TTCConfig) -> str:
    """Return the suffix of the methods of ``config``'s search: ``"beam"``, ``"diverse_beam"``, ``"particle"`` or ``"lookahead"``."""
    return "lookahead" if config.approach == "greedy" else config.approach


def roll_method(
    name: str,
    surrogate: BaseFM,
    truth: Tensor,
    steps: int,
    scorer: Scorer | Variant | None,
    config: TTCConfig,
    *,
    start: Tensor | None = None,
    scale: Tensor | None = None,
    resume: Path | None = None,
) -> RolloutResult:
    """Roll out one method from the initial conditions.

    Args:
        name: One of ``BASELINES``; ``"oracle"``, the candidate of least true error; ``"span_oracle"``, the least-squares fit to the
            truth in the span of the candidates; or any other name for the choice of ``scorer``.
        surrogate: The model; states are moved to its device.
        truth: ``[N, K+1, C, *S]``, frame 0 the initial condition; the oracle stops after K steps.
        steps: T.
        scorer: What chooses among the candidates; None for the methods above.
        config: B, noise, random seed, guardrails, projection and ``shard``, the work that several processes divide, all of which must make
            this call. Baselines and combinations of candidates are rolled out by every process.
        start: ``[N, h, C, *S]``, frames up to frame 0 for a surrogate with history; None takes frame 0 of the truth.
        scale: ``[C]``, units of the oracle's error.
        resume: Folder that keeps the state of the rollout after every step, and from which an interrupted rollout continues. Baselines
            and combinations of candidates start again, with the same result.

    Raises:
        ValueError: A scorer is missing, or as ``TTCGreedy.rollout``.
    """
    device = next((p.device for p in surrogate.parameters()), torch.device("cpu"))
    x0 = (truth[:, 0] if start is None else start).to(device)
    if name in BASELINES:
        return baseline_rollout(name, surrogate, x0, steps, dataclasses.replace(config, shard=None, **ONE_BEAM))
    units, layout = None if scale is None else scale.to(device), getattr(surrogate, "spec", None)
    if name in ORACLES:
        config = dataclasses.replace(config, refine_steps=0, temperature=1.0, select=ORACLES[name], trust=None, **ONE_BEAM)
        scorer = OracleScorer(truth.to(device), scale=units, spec=layout)
    if isinstance(scorer, Variant):
        surrogate = surrogate if scorer.model is None else scorer.model(surrogate)
        config = dataclasses.replace(config, **scorer.options)
        scorer = _ChosenByTruth(truth.to(device), units, layout, scorer.scorer) if scorer.oracle else scorer.scorer
    if isinstance(scorer, OracleScorer):
        steps = min(steps, truth.shape[1] - 1)
    if scorer is None:
        raise ValueError(f"method {name!r} comes without a scorer; give one, or use one of {', '.join((*BASELINES, *ORACLES))}")
    searched = resume is not None or config.shard is not None or search_options(config) is not None  # one beam is the greedy search
    if config.select == "argmax" and searched:
        return TTCBeam(surrogate, scorer, config).rollout(x0, steps, return_info=True, resume=resume)
    return TTCGreedy(surrogate, scorer, dataclasses.replace(config, shard=None)).rollout(x0, steps, return_info=True)


def starts_deterministic(surrogate: BaseFM, config: TTCConfig) -> bool:
    """Whether candidate 0 is the deterministic step, so that B = 1 is the deterministic rollout.

    Source: docs/design/decisions.md ("Candidate 0").
    """
    known = callable(getattr(surrogate, "deterministic", None))
    return known if config.include_deterministic is None else config.include_deterministic


class _ChosenByTruth(OracleScorer):
    """Chooses by the truth among candidates that another reward has moved."""

    ascent_to_best = False

    def __init__(self, truth: Tensor, scale: Tensor | None, spec: StateSpec | None, reward: Scorer) -> None:
        super().__init__(truth, scale=scale, spec=spec)
        self.reward = reward

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self.reward.ascent(state, candidates, context)
