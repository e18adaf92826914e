"""Adapts the models that candidates come from: a ``Surrogate``, or any object with ``sample_next``."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import whole
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.context import StepContext
from ttcfast.core.seeds import hash_seed, temp_seed
from ttcfast.runtime.lent import lent
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig
from ttcfast.states.symmetry import Frames

logger = logging.getLogger(__name__)


class Source:
    """Base class of the sources of candidates: what the search needs of a model.

    Ids of candidates and problems are on the host, whatever the device of the states: they name random streams and members of ensembles.

    Attributes:
        model: The network itself, for messages about it.
        spec: Layout of the states; None if unknown.
        ndim: Number of space axes.
        history: Number of frames that the model sees.
        has_deterministic: Whether there is a step without noise.
        keyed: Whether a candidate is independent of what else is drawn with it.
        fixed_shapes: Whether a new number of problems or candidates costs more than drawing some in vain.
        mixed: Whether the cost of a candidate depends on its id; otherwise it is one model evaluation.
        graph: Whether a step may be recorded as a CUDA graph.
        joint: Whether the deterministic step comes best from the call that makes the candidates.
    """

    model: object
    spec: StateSpec | None
    ndim: int
    history: int = 1
    has_deterministic: bool = False
    keyed: bool = False
    fixed_shapes: bool = False
    mixed: bool = False
    graph: bool = False
    joint: bool = False

    @property
    def time_step(self) -> float | None:
        """Time between a state and the next; None where it is not known."""
        return None

    def context(self, step: int, problem_ids: Tensor, known: Tensor | None = None) -> StepContext:
        """Returns where these problems stand at a step; ``known`` are their ids on the host."""
        return StepContext.at(step, problem_ids, self.time_step, known)

    @property
    def stochastic(self) -> StochasticConfig | None:
        """Noise in force; None for a model that draws in its own way."""
        return None

    @property
    def timed(self) -> Surrogate | None:
        """The surrogate that makes all candidates, whose speed may be measured; None for other sources."""
        return None

    def dropout_rates(self) -> list[float]:
        """Returns the rates of the dropout that acts on candidates."""
        return []

    def cost(self, ids: Tensor) -> tuple[int, int]:
        """Returns the model evaluations, and the steps of classical solvers, that candidates with ids ``[N, B]`` take."""
        return ids.numel(), 0

    def deterministic(self, x: Tensor, problem_ids: Tensor, *, step: int) -> Tensor:
        """Returns the step without noise, ``[N, C, *S]`` (``[N, h, C, *S]`` with history) -> ``[N, C, *S]``."""
        raise NotImplementedError

    def frames(self, cells: Sequence[int], ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Frames | None:
        """Returns the symmetries under which candidates with ids ``[N, B]`` are computed; None where there are none."""
        noise = self.stochastic
        if noise is None or not noise.symmetry or self.spec is None:
            return None
        return Frames(self.spec, cells, self._own_ids(ids), problem_ids, seed=seed, step=step)

    def _own_ids(self, ids: Tensor) -> Tensor:
        """Ids under which the parts of a model draw its candidates."""
        return ids

    def candidates(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        """Returns stochastic next states ``[N, B, C, *S]`` for ids ``[B]``, or ``[N, B]`` with ids for each state."""
        raise NotImplementedError

    def group(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        """Returns the deterministic step and then ``candidates``, ``[N, 1 + B, C, *S]``."""
        still = self.deterministic(x, problem_ids, step=step).unsqueeze(1)
        return torch.cat([still, self.candidates(x, ids, problem_ids, seed=seed, step=step)], 1)


def as_source(fm: Any, cfg: TTCConfig) -> Source:
    """Wrap a model as a ``Source``; raise ``TypeError`` unless it has ``candidates`` and ``deterministic``, or ``sample_next``."""
    complete = callable(getattr(fm, "candidates", None)) and callable(getattr(fm, "deterministic", None))
    if complete and isinstance(getattr(fm, "spec", None), StateSpec):
        return _SurrogateSource(fm, cfg)
    if callable(getattr(fm, "sample_next", None)):
        return _ForeignSource(fm, cfg)
    raise TypeError(f"fm is a {type(fm).__name__}; give a Surrogate, or an object with sample_next(x_t, seed=None, multi=False)")


def log_noise(source: Source, stochastic: bool, seed: int) -> None:
    """Log what makes candidates differ; ``stochastic`` tells whether anything does."""
    noise = source.stochastic
    if not logger.isEnabledFor(logging.INFO):  # asking for the rates takes a walk through the model
        return
    if not stochastic:
        logger.info("noise: none, the only candidate is the deterministic step; seed %d", seed)
    elif noise is None:
        logger.info("noise: that of %s.sample_next; seed %d", type(source.model).__name__, seed)
    else:
        rates = source.dropout_rates()
        logger.info(
            "noise: dropout rates %s at %d sites, latent_sigma %g, input_eps %g, seed %d; %s",
            *(sorted(set(rates)), len(rates), noise.latent_sigma, noise.input_eps, seed, noise),
        )


class _SurrogateSource(Source):
    has_deterministic = True

    def __init__(self, fm: Surrogate, cfg: TTCConfig) -> None:
        self.fm, self.ndim, self.history = fm, fm.spec.ndim, getattr(fm, "history", 1)
        own = [fm] if isinstance(fm, Surrogate) else getattr(fm, "surrogates", None)  # of an ensemble
        self.model = own[0].model if own else fm
        self.spec = fm.spec
        self.keyed = isinstance(fm, Surrogate) or bool(getattr(fm, "keyed", False))
        self.fixed_shapes = self.keyed and bool(getattr(fm, "compiled", False))
        self._costs = getattr(fm, "cost", None) if self.keyed else None  # of ttcfast.models.ensemble
        self.mixed = callable(self._costs)
        self._located = "problem_ids" in inspect.signature(fm.deterministic).parameters  # not in every subclass or foreign class
        self._override = None if cfg.stochastic is None else StochasticConfig.of(cfg.stochastic)
        steady = isinstance(fm, Surrogate) and fm.graph and fm.inputs is None  # whose values may depend on the step
        turned = self.stochastic is not None and self.stochastic.symmetry
        self.graph = steady and not turned  # which the host works out
        self.joint = type(fm) is Surrogate and not turned and not fm.corrected

    @property
    def time_step(self) -> float | None:
        return getattr(self.fm, "time_step", None)

    @property
    def stochastic(self) -> StochasticConfig | None:
        return getattr(self.fm, "stochastic", None) if self._override is None else self._override

    @property
    def timed(self) -> Surrogate | None:
        return self.fm if type(self.fm) is Surrogate else None

    def cost(self, ids: Tensor) -> tuple[int, int]:
        return self._costs(ids) if callable(self._costs) else super().cost(ids)

    def _own_ids(self, ids: Tensor) -> Tensor:
        own = getattr(self.fm, "own_ids", None)
        return own(ids) if self.keyed and callable(own) else ids

    def dropout_rates(self) -> list[float]:
        rates = getattr(self.fm, "dropout_rates", None)
        return rates(self._override) if self.keyed and callable(rates) else []

    def deterministic(self, x: Tensor, problem_ids: Tensor, *, step: int) -> Tensor:
        with self._lent("deterministic", state=x):
            return self.fm.deterministic(x, problem_ids=problem_ids, step=step) if self._located else self.fm.deterministic(x)

    def candidates(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        if ids.ndim == 2 and not self.keyed:  # a foreign class, which takes ids [B] only
            parts = zip(x.unsqueeze(1), ids, problem_ids.unsqueeze(1))
            return torch.cat([self.candidates(one, own, problem, seed=seed, step=step) for one, own, problem in parts])
        with self._lent("candidates", state=x, ids=ids, problem_ids=problem_ids):
            return self.fm.candidates(x, ids, problem_ids=problem_ids, seed=seed, step=step, stochastic=self._override)

    def group(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        if not self.joint:
            return super().group(x, ids, problem_ids, seed=seed, step=step)
        own: Any = {"stochastic": self._override, "include_deterministic": True}
        return self.fm.candidates(x, ids, problem_ids=problem_ids, seed=seed, step=step, **own)

    def _lent(self, method: str, **given: Tensor) -> AbstractContextManager[None]:
        """Raise if a foreign class writes into its input tensors; our own classes are known not to."""
        kind = type(self.fm)
        return nullcontext() if kind.__module__.partition(".")[0] == "ttcfast" else lent(f"{kind.__name__}.{method}", given)


class _ForeignSource(Source):
    """Draws sequentially under one random seed per call, so other chunks give other candidates.

    Two optional members of the model count: ``history``, the number of frames in its states ``[M, h, C, *S]``, and ``deterministic(x)``,
    the step without noise ``[N, C, *S]``, which becomes candidate 0.
    """

    def __init__(self, fm: Any, cfg: TTCConfig) -> None:
        self.fm = self.model = fm
        self.spec = getattr(fm, "spec", None)
        found = getattr(fm, "history", 1)
        self.history = found if isinstance(found, int) else 1  # some classes keep a log of their training by that name
        whole(f"{type(fm).__name__}.history", self.history, 1)
        self.has_deterministic = callable(getattr(fm, "deterministic", None))
        self.ndim = cfg.ndim if self.spec is None else self.spec.ndim
        if cfg.stochastic is not None:
            warnings.warn(
                f"stochastic={cfg.stochastic} is left to {type(fm).__name__}.sample_next, which draws in its own way; wrap the model in a "
                "Surrogate to have it applied",
                stacklevel=4,
            )

    def deterministic(self, x: Tensor, problem_ids: Tensor, *, step: int) -> Tensor:
        if not self.has_deterministic:
            raise ValueError(
                f"{type(self.fm).__name__} has only sample_next and no deterministic step; give it a method deterministic(x), wrap the "
                "model in a Surrogate, or use include_deterministic=False"
            )
        with lent(f"{type(self.fm).__name__}.deterministic", {"state": x}):
            found = self.fm.deterministic(x)
        return self._checked("deterministic", found, self._latest(x))

    def candidates(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        key, count = hash_seed(seed, step, int(problem_ids[0]), int(ids.flatten()[0])), ids.shape[-1]
        batch = x.repeat_interleave(count, 0)  # [N*B, C, *S], problem-major
        with temp_seed(key):
            out = self.fm.sample_next(batch, seed=key % 2**32, multi=True)  # numpy's seeds are below 2**32
        latest = self._latest(batch)
        return self._checked("sample_next", out, latest).reshape(x.shape[0], count, *latest.shape[1:])

    def _latest(self, x: Tensor) -> Tensor:
        return x[:, -1] if self.history > 1 else x

    def _checked(self, method: str, out: Any, like: Tensor) -> Tensor:
        if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != (like.shape, like.dtype, like.device):
            got = f"{out.dtype} {tuple(out.shape)} on {out.device}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(
                f"{type(self.fm).__name__}.{method} returned {got}; expected what it was given, {like.dtype} {tuple(like.shape)} "
                f"on {like.device}"
            )
        return out
