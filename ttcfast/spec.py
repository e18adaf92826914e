"""Dataclasses that every layer uses: the layout of a state, the weights of its penalties, the noise of candidates, the search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of, whole
from ttcfast.searches import Refine, Search, as_refinement, as_search

Momentum = Literal["sum", "components", "norm"]
Scale = Literal["absolute", "relative"]


@dataclass(frozen=True, eq=False)
class StateSpec:
    """Layout of a state: the meaning of its channels and the grid they live on.

    Args:
        density: Channel of the density.
        momentum: Channels of the momentum (conserved variables) or velocity (primitive variables), one per component.
        energy: Channel of the total energy density, or None if it is computed from the pressure.
        pressure: Channel of the pressure. Required for ``variables="primitive"``, optional otherwise.
        variables: ``"conserved"`` (rho, rho u, E) or ``"primitive"`` (rho, u, p).
        gamma: Ratio of specific heats: a number above 1, or a tensor ``[N]`` with one value per problem.
        cell_volume: Volume of a cell: a positive number, or a tensor ``[*S]``.
        ndim: Number of space dimensions, 1 to 3.
        periodic: Whether the domain is periodic: True, or one flag per dimension. Conservation can be imposed only where every dimension
            is periodic or the domain is ``closed``.
        closed: Whether every non-periodic side is a wall, so that mass and energy (but not momentum) are conserved.
        boundary_mask: Bool ``[*S]``, cells whose value is prescribed; None for no boundary penalty.
        boundary_value: Prescribed values: a number, or a tensor that broadcasts to ``[C, *S]``; None means 0.
        extra: Channels that no physical term reads, such as tracers.

    Raises:
        ValueError: A channel that is named twice or is negative, a missing pressure, gamma <= 1, a cell volume <= 0, ndim outside 1..3.

    Source: TTC plan, "Analytical Reward Model (ARM)"; docs/design/decisions.md ("Declared layouts").
    """

    density: int = 0
    momentum: tuple[int, ...] = (1, 2)
    energy: int | None = 3
    _: KW_ONLY
    pressure: int | None = None
    variables: Literal["conserved", "primitive"] = "conserved"
    gamma: float | Tensor = 1.4
    cell_volume: float | Tensor = 1.0
    ndim: int = 2
    periodic: bool | tuple[bool, ...] = True
    closed: bool = False
    boundary_mask: Tensor | None = None
    boundary_value: float | Tensor | None = None
    extra: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "momentum", tuple(self.momentum))
        object.__setattr__(self, "extra", tuple(self.extra))
        one_of("variables", self.variables, ("conserved", "primitive"))
        one_of("ndim", self.ndim, (1, 2, 3))
        used = self.channels
        if min(used) < 0 or len(set(used)) != len(used):
            raise ValueError(f"channels are {used}; each must be a different index of 0 or more")
        if not self.momentum:
            raise ValueError("momentum is (); name at least one momentum or velocity channel")
        if self.variables == "primitive" and self.pressure is None:
            raise ValueError("pressure is None; with variables='primitive' name the pressure channel")
        if self.variables == "conserved" and self.energy is None:
            raise ValueError("energy is None; with variables='conserved' name the energy channel")
        if not torch.is_tensor(self.gamma) and not 1 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; it must be above 1")
        if torch.is_tensor(self.gamma) and (self.gamma.ndim > 1 or not bool((self.gamma > 1).all())):
            raise ValueError(f"gamma has shape {tuple(self.gamma.shape)} and minimum {self.gamma.min():g}; give [N] values above 1")
        volume = self.cell_volume
        if torch.is_tensor(volume) and volume.ndim not in (0, self.ndim):
            raise ValueError(f"cell_volume has shape {tuple(volume.shape)}; give a number or one value per cell in {self.ndim} dimensions")
        if not (bool(((volume > 0) & (volume < math.inf)).all()) if torch.is_tensor(volume) else 0 < volume < math.inf):
            raise ValueError(
                f"cell_volume is {volume if not torch.is_tensor(volume) else float(volume.min())}; it must be positive and finite"
            )
        mask = self.boundary_mask
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != self.ndim):
            raise ValueError(f"boundary_mask is {mask.dtype} {tuple(mask.shape)}; give a bool mask over the {self.ndim} space dimensions")
        if isinstance(self.periodic, (tuple, list)):
            object.__setattr__(self, "periodic", tuple(bool(p) for p in self.periodic))
            if len(self.periodic_axes) != self.ndim:
                raise ValueError(f"periodic is {self.periodic}; give one flag or {self.ndim} of them")

    @property
    def channels(self) -> tuple[int, ...]:
        """All named channels, in the order density, momentum, energy, pressure, extra."""
        named = [self.density, *self.momentum]
        named += [c for c in (self.energy, self.pressure) if c is not None]
        return (*named, *self.extra)

    @property
    def num_channels(self) -> int:
        """The smallest number of channels that a state of this layout can have."""
        return max(self.channels) + 1

    @property
    def periodic_axes(self) -> tuple[bool, ...]:
        return self.periodic if isinstance(self.periodic, tuple) else (self.periodic,) * self.ndim

    @property
    def conserved_channels(self) -> tuple[int, ...]:
        """Channels whose integral is conserved: all on a periodic domain, density and energy between walls, otherwise none."""
        if self.variables != "conserved":
            return ()
        assert self.energy is not None
        if all(self.periodic_axes):
            return (self.density, *self.momentum, self.energy)
        return (self.density, self.energy) if self.closed else ()

    def replace(self, **changes: Any) -> StateSpec:
        """Return a copy with some fields changed and checked."""
        return dataclasses.replace(self, **changes)

    def check_state(self, name: str, x: Tensor, *, channel_axis: int) -> None:
        """Raise ``ValueError`` unless ``x`` has this layout's channels at ``channel_axis``, followed by the space axes."""
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; give a floating-point tensor")
        if x.ndim != channel_axis + 1 + self.ndim:
            lead = ["N", "B"][:channel_axis] if channel_axis <= 2 else ["..."]
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} ({x.ndim} axes); expected [{', '.join([*lead, 'C', '*S'])}] with {self.ndim} space axes"
            )
        if x.shape[channel_axis] < self.num_channels:
            raise ValueError(
                f"{name} has {x.shape[channel_axis]} channels (shape {tuple(x.shape)}); the spec names channel {self.num_channels - 1}, "
                f"so at least {self.num_channels} are needed"
            )

    @classmethod
    def euler1d(cls, **changes: Any) -> StateSpec:
        """rho, rho u, E in one dimension."""
        return cls(**{"momentum": (1,), "energy": 2, "ndim": 1, **changes})

    @classmethod
    def euler2d(cls, **changes: Any) -> StateSpec:
        """rho, rho u, rho v, E in two dimensions: the layout of our own solver and files."""
        return cls(**{"ndim": 2, **changes})

    @classmethod
    def euler3d(cls, **changes: Any) -> StateSpec:
        """rho, rho u, rho v, rho w, E in three dimensions."""
        return cls(**{"momentum": (1, 2, 3), "energy": 4, "ndim": 3, **changes})

    @classmethod
    def pdegym(cls, **changes: Any) -> StateSpec:
        """rho, u, v, p, as in PDEGym and Poseidon; name a fifth channel (E, or the tracer of CE-RM) by ``energy`` or ``extra``."""
        return cls(**{"energy": None, "pressure": 3, "variables": "primitive", **changes})

    @classmethod
    def well(cls, **changes: Any) -> StateSpec:
        """energy, density, pressure, momentum_x, momentum_y of The Well's Euler sets."""
        return cls(**{"density": 1, "momentum": (3, 4), "energy": 0, "pressure": 2, **changes})

    @classmethod
    def pdebench(cls, **changes: Any) -> StateSpec:
        """Vx, Vy, density, pressure in PDEBench's loader order, gamma 5/3."""
        return cls(**{"density": 2, "momentum": (0, 1), "energy": None, "pressure": 3, "variables": "primitive", "gamma": 5 / 3, **changes})


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
        dropout_after: Names of modules after which dropout is injected, for models without any.
        training_modules: Names of modules to hold in training mode, for dropout that is called as a function
            (``F.dropout(x, p, self.training)``, ``dropout_p`` of attention); ``""`` names the model itself. Normalisation and dropout
            modules inside them are excepted. Such noise cannot be keyed, so that other chunks draw other candidates. None finds, with
            ``dropout``, the modules whose source contains such a call; () names none.
        latent_sigma: Standard deviation of Gaussian noise added to the output of ``latent_at``, in units of that output.
        latent_at: Name of the module whose output is the latent; None uses the model's attribute ``latent_module``.
        input_eps: Standard deviation of Gaussian noise added to the normalised input.
        antithetic: Whether candidates (1, 2), (3, 4), ... are drawn with opposite noise: Gaussian noise is negated, the random bits of
            dropout are complemented. Each candidate keeps its distribution, and the mean of a pair has less noise.
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
        return drawn or self.directions is not None

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
        select: ``"argmax"`` takes the best candidate. Experimental: ``"softmax_mean"`` takes the mean weighted by
            softmax(score / temperature), ``"span"`` the best point in the span of the candidates by a differentiable reward.
        project: ``"conservation"`` removes the mean residual of every conserved variable from the chosen state.
        refine_steps: Number of moves of every candidate along the reward, which must be differentiable.
        refine_lengths: Lengths of each move, relative to a full step; each length makes a copy of every candidate.
        trust: Limit of a move or a combination, relative to the size of the candidate's own time step; None for no limit.
        include_deterministic: Whether candidate 0 is the deterministic step. None means True for a ``Surrogate``, False for other models.
        chunk_size: Candidates generated at once, over all problems. None derives it from ``memory_budget``, or generates all at once. A
            ``Surrogate`` draws the same candidates whatever the chunks; other models may not.
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
        one_of("project", self.project, (None, "conservation"))
        one_of("approach", self.approach, ("greedy", "beam", "diverse_beam", "particle"))
        one_of("select", self.select, ("argmax", "softmax_mean", "span"))
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
