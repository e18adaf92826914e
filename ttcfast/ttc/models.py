"""Where candidates come from: a ``Surrogate``, or any model that has the sketch's ``sample_next``."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ttcfast.core.base_fm import PROBES, Surrogate
from ttcfast.core.seeds import hash_seed, temp_seed
from ttcfast.runtime.lent import lent
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig
from ttcfast.stochastic_sampling.distinct import all_same, deterministic_error, require_distinct


class Source(Protocol):
    """What a controller needs of a model."""

    spec: StateSpec | None
    ndim: int
    history: int
    has_deterministic: bool
    keyed: bool  # a candidate does not depend on what else is drawn with it
    fixed_shapes: bool  # another number of problems or candidates costs more than to draw some in vain

    @property
    def stochastic(self) -> StochasticConfig | None:
        """The noise in force; None for a model that draws in its own way."""
        ...

    def dropout_rates(self) -> list[float]:
        """Rates of the dropout sites that act on candidates."""
        ...

    def deterministic(self, x: Tensor) -> Tensor:
        """``[N, C, *S]`` (with history ``[N, h, C, *S]``) -> ``[N, C, *S]``."""
        ...

    def candidates(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        """Stochastic next states ``[N, B, C, *S]`` for ids ``[B]``, or ``[N, B]`` where each state has its own."""
        ...


def as_source(fm: Any, cfg: TTCConfig) -> Source:
    """Raises ``TypeError`` for a model that can neither give candidates nor sample a next state."""
    complete = callable(getattr(fm, "candidates", None)) and callable(getattr(fm, "deterministic", None))
    if complete and isinstance(getattr(fm, "spec", None), StateSpec):
        return _SurrogateSource(fm, cfg)
    if callable(getattr(fm, "sample_next", None)):
        return _ForeignSource(fm, cfg)
    raise TypeError(f"fm is a {type(fm).__name__}; give a Surrogate, or an object with sample_next(x_t, seed=None, multi=False)")


def probe(source: Source, x: Tensor, problem_ids: Tensor, after: int, at_once: int, *, seed: int) -> int:
    """Look at more candidates of the first problem, with ids from ``after`` on, drawn ``at_once`` as in the group that looked alike.

    Returns:
        How many were drawn.

    Raises:
        DeterministicModelError: they are all the same still. With ``at_once`` above 1 only those drawn together are compared, so that
            noise drawn once per call, which leaves a group without choice, counts as none.
    """
    fm = getattr(source, "fm", source)
    model = fm.model if isinstance(fm, Surrogate) else fm
    ids = torch.arange(after, after + max(PROBES, at_once)).split(at_once)
    count = sum(len(part) for part in ids)
    drawn = [source.candidates(x[:1], part, problem_ids[:1], seed=seed, step=0) for part in ids]
    if at_once == 1:
        require_distinct(torch.cat(drawn, 1), model, what="probes")
    elif all(all_same(d[:, 0], d[:, 1:]) for d in drawn):
        raise deterministic_error(model, f"{count} probes, drawn {at_once} at once, are the same within a draw")
    return count


class _SurrogateSource:
    has_deterministic = True

    def __init__(self, fm: Surrogate, cfg: TTCConfig) -> None:
        self.fm, self.ndim, self.history = fm, fm.spec.ndim, getattr(fm, "history", 1)
        self.spec: StateSpec | None = fm.spec
        self.keyed = isinstance(fm, Surrogate)
        self.fixed_shapes = self.keyed and fm.compiled
        self._override = None if cfg.stochastic is None else StochasticConfig.of(cfg.stochastic)

    @property
    def stochastic(self) -> StochasticConfig | None:
        return getattr(self.fm, "stochastic", None) if self._override is None else self._override

    def dropout_rates(self) -> list[float]:
        return self.fm.dropout_rates(self._override) if isinstance(self.fm, Surrogate) else []

    def deterministic(self, x: Tensor) -> Tensor:
        with self._lent("deterministic", state=x):
            return self.fm.deterministic(x)

    def candidates(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        if ids.ndim == 2 and not self.keyed:  # somebody else's class, which knows ids [B]
            parts = zip(x.split(1), ids, problem_ids.split(1))
            return torch.cat([self.candidates(one, own, problem, seed=seed, step=step) for one, own, problem in parts])
        with self._lent("candidates", state=x, ids=ids, problem_ids=problem_ids):
            return self.fm.candidates(x, ids, problem_ids=problem_ids, seed=seed, step=step, stochastic=self._override)

    def _lent(self, method: str, **given: Tensor) -> AbstractContextManager[None]:
        """Holds somebody else's class, unlike ours, to leave what it is given as it is."""
        kind = type(self.fm)
        return nullcontext() if kind.__module__.partition(".")[0] == "ttcfast" else lent(f"{kind.__name__}.{method}", given)


class _ForeignSource:
    """Draws in sequence, under a seed for each call: another chunking draws others."""

    has_deterministic = keyed = fixed_shapes = False
    history = 1
    stochastic = None

    def __init__(self, fm: Any, cfg: TTCConfig) -> None:
        self.fm = fm
        self.spec: StateSpec | None = getattr(fm, "spec", None)
        self.ndim = cfg.ndim if self.spec is None else self.spec.ndim
        if cfg.stochastic is not None:
            warnings.warn(
                f"stochastic={cfg.stochastic} is left to {type(fm).__name__}.sample_next, which draws in its own way; wrap the model in a "
                "Surrogate to have it applied",
                stacklevel=4,
            )

    def dropout_rates(self) -> list[float]:
        return []

    def deterministic(self, x: Tensor) -> Tensor:
        raise ValueError(
            f"{type(self.fm).__name__} has only sample_next and no deterministic step; wrap the model in a Surrogate, or use "
            "include_deterministic=False"
        )

    def candidates(self, x: Tensor, ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> Tensor:
        key, count = hash_seed(seed, step, int(problem_ids[0]), int(ids.flatten()[0])), ids.shape[-1]
        batch = x.repeat_interleave(count, 0)  # [N*B, C, *S], problem-major
        with temp_seed(key):
            out = self.fm.sample_next(batch, seed=key % 2**32, multi=True)  # what numpy takes as a seed
        if not isinstance(out, Tensor) or (out.shape, out.dtype, out.device) != (batch.shape, batch.dtype, batch.device):
            got = f"{out.dtype} {tuple(out.shape)} on {out.device}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(
                f"{type(self.fm).__name__}.sample_next returned {got}; expected what it was given, {batch.dtype} {tuple(batch.shape)} "
                f"on {batch.device}"
            )
        return out.reshape(x.shape[0], count, *x.shape[1:])
