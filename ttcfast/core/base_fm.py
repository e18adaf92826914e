"""One-step surrogates as the controllers see them: a state in physical units in, several next states out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttcfast.spec import StateSpec, StochasticConfig, at_least, one_of
from ttcfast.stochastic_sampling.distinct import all_same, require_distinct
from ttcfast.stochastic_sampling.dropout_wrap import active_rates, eval_mode, mc_dropout
from ttcfast.stochastic_sampling.input_perturb import perturb_state
from ttcfast.stochastic_sampling.latent_noise import latent_noise

from .normalizer import Normalizer
from .seeds import hash_seed, temp_seed

__all__ = ["BaseFM", "Surrogate", "temp_seed"]

PROBES = 16  # samples drawn before a model whose candidates coincide is called deterministic


class BaseFM(nn.Module):
    """The seed's contract: subclass it, write ``forward``, and the controllers can roll it out.

    Source: seeds/ttc-integration-plan.md section 15.
    """

    def forward(self, x_t: Tensor) -> Tensor:
        """Next state of ``[C, *S]`` or, for a batch, of ``[B, C, *S]``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x_t); write one that returns the next state")

    @torch.no_grad()
    def sample_next(self, x_t: Tensor, seed: int | None = None, multi: bool = False) -> Tensor:
        """One stochastic next state of ``[C, *S]``, or of every state in ``[B, C, *S]`` with ``multi=True``.

        The same ``seed`` gives the same sample; None draws from the global streams.
        """
        with temp_seed(seed):
            return self.forward(x_t)


class Surrogate(BaseFM):
    """Any ``nn.Module`` as a stochastic one-step surrogate: normalise, stack the history, call, un-normalise.

    The model is put in evaluation and is never changed by a call: dropout, hooks and flags are as before afterwards.

    Args:
        model: maps normalised ``[M, h*C, *S]`` (oldest frame first) to ``[M, C, *S]``. It is called in its own dtype, on its own
            device; results come back in the state's dtype. An attribute ``latent_module: str`` names where latent noise goes.
        spec: layout of the physical state.
        normalizer: between physical units and the model's; None passes states as they are.
        history: frames that the model sees, h >= 1.
        predicts: ``"state"``: the model returns the normalised next state; ``"delta"``: the change, in units of ``delta_std``.
        stochastic: what makes candidates differ; a dict with the seed's keys is accepted; None is MC dropout at the model's rates.
        unpack: takes the next state out of what the model returns, for models that return tuples or output objects.

    Raises:
        ValueError: an unknown ``predicts``, ``history`` below 1, or a normalizer of another number of channels.

    Source: seeds/ttc-integration-plan.md sections 10 and 15; DECISIONS 5, 8.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: StateSpec,
        *,
        normalizer: Normalizer | None = None,
        history: int = 1,
        predicts: Literal["state", "delta"] = "state",
        stochastic: StochasticConfig | Mapping[str, Any] | None = None,
        unpack: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        one_of("predicts", predicts, ("state", "delta"))
        at_least("history", history, 1)
        if normalizer is not None and normalizer.num_channels != spec.num_channels:
            raise ValueError(
                f"normalizer has {normalizer.num_channels} channels and the StateSpec {spec.num_channels}; "
                "name channels that no physical term reads in StateSpec(extra=...)"
            )
        self.model, self.spec, self.normalizer = model, spec, normalizer
        self.history, self.predicts, self.unpack = int(history), predicts, unpack
        self.stochastic = StochasticConfig.of(stochastic)
        self.eval()

    def forward(self, x_t: Tensor) -> Tensor:
        """Next state ``[M, C, *S]`` of ``[M, C, *S]`` (``[M, h, C, *S]`` with history), in the mode the model is in; differentiable."""
        self._check("x_t", x_t)
        return self._advance(self._latest(x_t), self._encode(x_t))

    @torch.no_grad()
    def deterministic(self, x: Tensor) -> Tensor:
        """The step with every noise off, ``[N, C, *S]`` (``[N, h, C, *S]`` with history) -> ``[N, C, *S]``."""
        self._check("x", x)
        with eval_mode(self.model, quiet=True):
            return self._advance(self._latest(x), self._encode(x))

    @torch.no_grad()
    def sample_next(self, x_t: Tensor, seed: int | None = None, multi: bool = False) -> Tensor:
        """One stochastic next state of ``[C, *S]``, or of every state in ``[B, C, *S]`` with ``multi=True``; [h, C, *S] with history."""
        x = x_t if multi else x_t.unsqueeze(0)
        self._check("x_t", x)
        with temp_seed(seed), self._noise(self.stochastic):
            out = self._advance(self._latest(x), self._perturbed(self._encode(x), self.stochastic))
        return out if multi else out[0]

    @torch.no_grad()
    def candidates(
        self,
        x: Tensor,
        ids: Tensor,
        *,
        problem_ids: Tensor | None = None,
        seed: int,
        step: int,
        stochastic: StochasticConfig | Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Stochastic next states, all of them in one forward of ``N*B`` states.

        Args:
            x: states ``[N, C, *S]`` (``[N, h, C, *S]`` with history), physical units, on the model's device.
            ids: int64 ``[B]``, which candidates. Only their number and the first of them enter the draws: another first id draws others,
                other ids behind it do not.
            problem_ids: int64 ``[N]``, which problems; None counts from 0.
            seed: of the run.
            step: of the rollout.
            stochastic: replaces the surrogate's own for this call.

        Returns:
            ``[N, B, C, *S]`` in the dtype of ``x``. The same for the same arguments; one stream, seeded by seed, step, first problem
            and first id, serves the whole call, so another chunking draws others.

        Raises:
            ValueError: axes, channels or device that do not fit, no ids, latent noise without a module that takes it.
            DeterministicModelError: at step 0, more than one candidate, and all the same. Later on states may have grown so large that
                rounding swallows the noise, which is no reason to end a rollout.
        """
        config = self.stochastic if stochastic is None else StochasticConfig.of(stochastic)
        self._check("x", x)
        if ids.ndim != 1 or ids.numel() == 0 or ids.is_floating_point():
            raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}; give at least one integer id, [B]")
        first = 0 if problem_ids is None else int(problem_ids[0])
        out = self._sample(x, ids.numel(), config, hash_seed(seed, step, first, int(ids[0])))
        if step == 0 and out.shape[1] > 1 and all_same(out[:, 0], out[:, 1:]):
            # a few entries and a low rate may leave candidates alike by chance: look at more of them before saying so
            probes = self._sample(x[:1], PROBES, config, hash_seed(seed, step, first, int(ids[0]), PROBES))
            require_distinct(probes, self.model, what="probes")
        return out

    def dropout_rates(self, stochastic: StochasticConfig | Mapping[str, Any] | None = None) -> list[float]:
        """Rates above 0, one per site, of the dropout that ``candidates`` pass through. ``stochastic`` and errors as there."""
        with self._noise(self.stochastic if stochastic is None else StochasticConfig.of(stochastic)):
            return active_rates(self.model)

    def _sample(self, x: Tensor, count: int, config: StochasticConfig, seed: int) -> Tensor:
        n = x.shape[0]
        batch = self._encode(x).repeat_interleave(count, 0)  # problem-major: row n * count + b
        latest = self._latest(x).unsqueeze(1).expand(n, count, *self._latest(x).shape[1:])
        with temp_seed(seed), self._noise(config):
            return self._advance(latest, self._perturbed(batch, config))

    def _advance(self, latest: Tensor, encoded: Tensor) -> Tensor:
        """Call the model on ``[M, h*C, *S]`` and bring what it says to physical units, shaped and typed like ``latest``."""
        out = self._unpacked(self.model(encoded))
        expected = (encoded.shape[0], self.spec.num_channels, *encoded.shape[2:])
        if out.shape != expected:
            raise ValueError(
                f"{type(self.model).__name__} returned shape {tuple(out.shape)} for an input of shape {tuple(encoded.shape)}; "
                f"expected {expected}; take the next state out with Surrogate(unpack=...)"
            )
        out = out.to(latest.dtype).reshape(latest.shape)
        axis = -self.spec.ndim - 1
        if self.predicts == "state":
            return out if self.normalizer is None else self.normalizer.decode(out, channel_axis=axis)
        return latest + (out if self.normalizer is None else self.normalizer.decode_delta(out, channel_axis=axis))

    def _encode(self, x: Tensor) -> Tensor:
        """Normalised model input ``[N, h*C, *S]`` in the model's dtype."""
        z = x if self.normalizer is None else self.normalizer.encode(x, channel_axis=-self.spec.ndim - 1)
        z = z.flatten(1, 2) if self.history > 1 else z
        parameter = self._parameter()
        return z if parameter is None else z.to(parameter.dtype)

    def _latest(self, x: Tensor) -> Tensor:
        return x[:, -1] if self.history > 1 else x

    def _perturbed(self, encoded: Tensor, config: StochasticConfig) -> Tensor:
        return perturb_state(encoded, config.input_eps) if config.input_eps > 0 else encoded

    def _unpacked(self, out: Any) -> Tensor:
        out = out if self.unpack is None else self.unpack(out)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returned a {type(out).__name__}; take the next state out of it with Surrogate(unpack=...)"
            )
        return out

    @contextmanager
    def _noise(self, config: StochasticConfig) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model, quiet=not config.dropout))
            if config.dropout:
                stack.enter_context(mc_dropout(self.model, config.dropout_p, config.dropout_after))
            if config.latent_sigma > 0:
                stack.enter_context(latent_noise(self.model, self._latent_name(config), config.latent_sigma))
            yield

    def _latent_name(self, config: StochasticConfig) -> str:
        name = config.latent_at or getattr(self.model, "latent_module", None)
        if not isinstance(name, str):
            raise ValueError(
                f"latent_sigma is {config.latent_sigma} but {type(self.model).__name__} does not say where its latent is; "
                "name the module in StochasticConfig(latent_at=...) or set model.latent_module, or set latent_sigma=0"
            )
        return name

    def _parameter(self) -> Tensor | None:
        return next((p for p in self.model.parameters() if p.is_floating_point()), None)

    def _check(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; give a floating-point tensor")
        frames = [] if self.history == 1 else [self.history]
        expected = ["N", *map(str, frames), str(self.spec.num_channels), *["S"] * self.spec.ndim]
        fits = x.ndim == len(expected) and list(x.shape[1 : -self.spec.ndim]) == [*frames, self.spec.num_channels]
        if not fits or x.shape[0] == 0:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected [{', '.join(expected)}] (channels and space axes as the StateSpec says)"
            )
        parameter = self._parameter()
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{name} is on {x.device} and {type(self.model).__name__} on {parameter.device}; move one of them with .to()")
