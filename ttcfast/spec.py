"""Dataclasses that every layer uses: the weights of penalties, the noise of candidates, the search; and the layouts of ``states.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from typing import Any, Literal

from ttcfast.checks import at_least, one_of, whole
from ttcfast.searches import Refine, Search, as_refinement, as_search
from ttcfast.states import EulerSpec as EulerSpec
from ttcfast.states import FieldSpec as FieldSpec
from ttcfast.states import StateSpec as StateSpec

Momentum = Literal["sum", "components", "norm"]
Scale = Literal["absolute", "relative"]


@dataclass(frozen=True)
class ARMWeights:
    """Weights of the penalties of the analytical reward (TTC plan, "Analytical Reward Model (ARM)")."""

    w_mass: float = 1.0
    w_momentum: float = 1.0
    w_energy: float = 1.0
    w_bc: float = 0.1
    w_positivity: float = 0.1

    def __post_init__(self) -> None:
        for f in fields(self):
            if not 0 <= getattr(self, f.name) < float("inf"):
                raise ValueError(f"{f.name} is {getattr(self, f.name)}; a weight is finite and not negative")


@dataclass(frozen=True)
class StochasticConfig:
    """Noise that makes the candidates of one step differ (TTC plan, "Stochasticity at Test Time").

    Args:
        dropout: Whether the model's dropout stays active (MC dropout).
        dropout_p: Rate to set on every dropout module; None keeps the model's own rates.
        dropout_after: Names of modules after which dropout is injected, for models without any;
            ``"blocks.*.mlp"`` names one in every block.
        training_modules: Names of modules to hold in training mode, for dropout that is called as a function
            (``F.dropout(x, p, self.training)``, ``dropout_p`` of attention); ``""`` names the model itself. Normalisation and dropout
            modules inside them are excepted. Such noise cannot be keyed, so that other chunks draw other candidates. None finds, with
            ``dropout``, the modules whose source contains such a call; () names none.
        latent_sigma: Standard deviation of Gaussian noise added to the output of ``latent_at``, in units of that output.
        latent_at: Name of the module whose output is the latent; None uses the model's attribute ``latent_module``.
        input_eps: Standard deviation of Gaussian noise added to the normalised input.
        antithetic: Whether candidates (1, 2), (3, 4), ... are drawn with opposite noise: Gaussian noise is negated, the random bits of
            dropout are complemented. Each candidate keeps its distribution, and the mean of a pair has less noise.
        symmetry: Whether each candidate is computed under a symmetry of the layout and brought back, on top of any noise above: id 0 under
            the identity, the next under the others in random order (``ttcfast.states.symmetry.Frames``). With ``dropout=False`` and no
            other noise the candidates are the model's deterministic steps in other frames.
        directions: File written by ``ttcfast fit_directions``; candidates are moved along the fields in it, in addition to any noise above.
            With ``dropout=False`` and no other noise they are the deterministic step, moved, and need no call of the model.
        directions_scale: Factor on the learned standard deviations of the coefficients.
        directions_strength: Factor on the learned mean of the coefficients, a correction that all candidates share.
        directions_grid: Points per axis of the smooth random fields that the coefficients are; 1 means one number for the whole domain.

    Raises:
        ValueError: A value out of range, or a string where a list of module names is expected.
    """

    dropout: bool = True
    dropout_p: float | None = None
    dropout_after: tuple[str, ...] = ()
    training_modules: tuple[str, ...] | None = None
    latent_sigma: float = 0.0
    latent_at: str | None = None
    input_eps: float = 0.0
    antithetic: bool = False
    symmetry: bool = False
    directions: str | None = None
    directions_scale: float = 1.0
    directions_strength: float = 1.0
    directions_grid: int = 1

    def __post_init__(self) -> None:
        for name in ("dropout_after", "training_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name} is the string {value!r}; give a list of module names")
            object.__setattr__(self, name, None if value is None else tuple(value))
        if self.dropout_p is not None and not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p is {self.dropout_p}; a dropout rate lies in [0, 1)")
        at_least("latent_sigma", self.latent_sigma, 0)
        at_least("input_eps", self.input_eps, 0)
        at_least("directions_scale", self.directions_scale, 0)
        whole("directions_grid", self.directions_grid, 1)

    @property
    def active(self) -> bool:
        """Whether any noise is asked for."""
        drawn = self.dropout or bool(self.training_modules) or self.latent_sigma > 0 or self.input_eps > 0
        return drawn or self.directions is not None or self.symmetry

    @classmethod
    def of(cls, value: StochasticConfig | Mapping[str, Any] | None) -> StochasticConfig:
        """Convert the plan's plain dict, or None for the defaults, to a ``StochasticConfig``."""
        if isinstance(value, StochasticConfig):
            return value
        given: dict[str, Any] = dict(value) if value is not None else {}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(f"stochastic has unknown keys {unknown}; known: {sorted(known)}")
        return cls(**given)


@dataclass(frozen=True)
class Key:
    """Name of one stream of random numbers: a run's random seed, a step of its rollout, a site in the model.

    Source: docs/design/decisions.md ("Keyed candidates").
    """

    seed: int
    step: int = 0
    site: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            whole(f.name, getattr(self, f.name), 0)
            if getattr(self, f.name) >= 2**63:
                raise ValueError(f"{f.name} is {getattr(self, f.name)}; it must be below 2**63")


@dataclass(frozen=True)
class TTCConfig:
    """How a rollout spends compute at test time.

    Args:
        branching_factor: B, candidates per step (and per beam), including the deterministic one.
        use_prm: Switch of the plan, read by ``ttcfast run_ttc``; the controllers take any scorer.
        stochastic: Noise of the candidates; None keeps the surrogate's own.
        approach: ``"greedy"``, ``"beam"``, and the experimental ``"diverse_beam"`` and ``"particle"``; see ``TTCBeam``.
        beam_width, score_aggregation, discount, lookahead, temperature: Settings of a search over several beams; see ``TTCBeam``.
        select: ``"argmax"`` takes the best candidate, ``"mean"`` the mean of the usable ones, or of their last copies if they are refined.
            Experimental: ``"softmax_mean"`` takes the mean weighted by
            softmax(score / temperature), ``"span"`` the best point in the span of the candidates by a differentiable reward.
        project: ``"conservation"`` removes the mean residual of every conserved variable from the chosen state. ``"declared"`` imposes
            all that ``StateSpec.fields`` declares: zero divergence, totals, bounds.
        refine_steps: Number of moves of every candidate along the reward, which must be differentiable.
        refine_lengths: Lengths of each move, relative to a full step; each length makes a copy of every candidate.
        trust: Limit of a move or a combination, relative to the size of the candidate's own time step; None for no limit.
        include_deterministic: Whether candidate 0 is the deterministic step. None means True for a ``Surrogate``, False for other models.
        chunk_size: Candidates generated at once, over all problems. None derives it from ``memory_budget``; without one, a CPU makes as
            many of a ``Surrogate``'s 64 or more at once as is fastest, measured once (``RolloutResult.chunk_size``), and all else is
            generated at once. A ``Surrogate`` draws the same candidates whatever the chunks, to rounding; other models may not.
        memory_budget: Bytes that generating and scoring one chunk may take. The memory of a candidate is measured once per controller.
        shard: What the processes of a ``torchrun`` divide among them: ``"problems"``, or the ``"candidates"`` of each step. All processes
            must set the same.
        max_resample: How often a step without a usable candidate is drawn again before it falls back to the deterministic step.
        min_score_spread: Relative spread of the scores below which a step takes candidate 0.
        score_floor: Scores below it are not usable; None for no floor.
        seed: Random seed of the candidates.
        ndim: Number of space axes, for models without a ``StateSpec``.
        search, refine: The same settings as one object each, such as ``Beam(width=4)`` and ``Refine(steps=2)`` (``ttcfast.searches``).
            They set the plain fields above and are not stored.

    Raises:
        ValueError: A value out of range, or a plain field that contradicts ``search`` or ``refine``.

    Source: TTC plan, "TTC Greedy Inference Controller"; docs/design/decisions.md ("Candidate 0", "Refinement").
    """

    branching_factor: int = 5
    use_prm: bool = True
    stochastic: StochasticConfig | Mapping[str, Any] | None = None
    approach: str = "greedy"
    beam_width: int = 1
    score_aggregation: str = "sum"
    select: str = "argmax"
    project: str | None = None
    refine_steps: int = 0
    refine_lengths: tuple[float, ...] = (0.5, 1.0)
    trust: float | None = 0.5
    lookahead: int = 0
    discount: float = 0.9
    temperature: float = 1.0
    include_deterministic: bool | None = None
    chunk_size: int | None = None
    memory_budget: int | None = None
    seed: int = 0
    shard: str | None = None
    max_resample: int = 2
    min_score_spread: float = 1e-6
    score_floor: float | None = None
    ndim: int = 2
    search: InitVar[str | Search | None] = None
    refine: InitVar[int | Refine | None] = None

    def __post_init__(self, search: str | Search | None, refine: int | Refine | None) -> None:
        if search is not None:
            self._set("search", search, as_search(search).options())
        if refine is not None:
            self._set("refine", refine, as_refinement(refine).options())
        for name, least in (("branching_factor", 1), ("beam_width", 1), ("max_resample", 0), ("chunk_size", 1), ("memory_budget", 1)):
            if (value := getattr(self, name)) is not None:
                whole(name, value, least)
        whole("lookahead", self.lookahead, 0)
        whole("refine_steps", self.refine_steps, 0)
        object.__setattr__(self, "refine_lengths", tuple(self.refine_lengths))
        if not self.refine_lengths or not all(0 < length < math.inf for length in self.refine_lengths):
            raise ValueError(f"refine_lengths is {self.refine_lengths}; give one or more lengths above 0")
        if self.trust is not None and not 0 < self.trust < math.inf:
            raise ValueError(f"trust is {self.trust}; it must be above 0 and finite, or None for no limit")
        at_least("min_score_spread", self.min_score_spread, 0)
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount is {self.discount}; it lies between 0 (the last score alone) and 1 (the sum)")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive and finite")
        at_least("seed", self.seed, 0)
        one_of("project", self.project, (None, "conservation", "declared"))
        one_of("approach", self.approach, ("greedy", "beam", "diverse_beam", "particle"))
        one_of("select", self.select, ("argmax", "mean", "softmax_mean", "span"))
        one_of("score_aggregation", self.score_aggregation, ("sum", "last", "mean", "discounted"))
        one_of("shard", self.shard, (None, "problems", "candidates"))
        one_of("ndim", self.ndim, (1, 2, 3))
        if self.stochastic is not None:
            object.__setattr__(self, "stochastic", StochasticConfig.of(self.stochastic))

    def _set(self, name: str, given: object, options: Mapping[str, Any]) -> None:
        """Set the plain fields that an object stands for, unless one of them was given another value."""
        defaults = {f.name: f.default for f in fields(self)}
        for field, value in options.items():
            plain = getattr(self, field)
            if plain not in (defaults[field], value):
                raise ValueError(f"{field} is {plain!r} and {name} is {given!r}, which sets it to {value!r}; give one of them")
            object.__setattr__(self, field, value)
