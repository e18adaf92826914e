"""Defines one-step surrogates, which map a state in physical units to several possible next states."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttcfast.checks import at_least, one_of
from ttcfast.runtime.turns import in_turn, interruptible, turn
from ttcfast.spec import Key, StateSpec, StochasticConfig
from ttcfast.states.symmetry import Frames
from ttcfast.stochastic_sampling.directions import load_directions
from ttcfast.stochastic_sampling.distinct import PROBES, all_same, require_stochastic
from ttcfast.stochastic_sampling.keyed import Draw
from ttcfast.stochastic_sampling.sites import Site, noise_sites
from ttcfast.transfer import sent

from .candidate_forward import CandidateForward
from .compiled import MODES
from .context import Inputs, StepContext, candidate_rows, conditions, require_taken, rows_of
from .normalizer import Normalizer
from .seeds import hash_seed, temp_seed

__all__ = ["BaseFM", "Surrogate", "temp_seed"]


class BaseFM(nn.Module):
    """Base class of models; a search can roll out any subclass that implements ``forward``.

    Source: TTC plan, "Minimal Interfaces (Copy-Paste Stubs)".
    """

    def forward(self, x_t: Tensor) -> Tensor:
        """Returns the next state of ``x_t``, ``[C, *S]``, or ``[B, C, *S]`` for a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x_t); write one that returns the next state")

    @torch.no_grad()
    def sample_next(self, x_t: Tensor, seed: int | None = None, multi: bool = False) -> Tensor:
        """Returns one stochastic next state of ``[C, *S]``, or of every state in ``[B, C, *S]`` with ``multi=True``.

        The same random ``seed`` gives the same sample; None draws from the global streams. Threads take turns at calls with a seed.
        """
        with temp_seed(seed):
            return self.forward(x_t)


class Surrogate(BaseFM):
    """Any ``nn.Module`` as a stochastic one-step surrogate: normalise, stack the history, call, un-normalise.

    The model is put in evaluation mode, and calls leave it unchanged: dropout, hooks and flags are restored, also after an exception or
    Ctrl-C, which takes effect while the model runs and waits while something is restored.

    Several threads may use one surrogate, or several around one model or parts of it. They take turns call by call
    (``ttcfast.runtime.turns``) and get the results they would get alone, but no more throughput; on a CPU give torch the cores, or use
    processes. Another thread that calls the model itself meanwhile gets its output without noise, in evaluation mode.

    The first candidates of each kind of noise and state are preceded by a trace of the model on two and on four states. It finds the axis
    of the states in each noisy tensor, however they are folded, and verifies that candidates do not depend on the others in their batch
    (``ttcfast.core.row_trace``); if they do, a ``RuntimeWarning`` names the likely reason.

    Args:
        model: Maps normalised ``[M, h*C, *S]`` (oldest frame first) to ``[M, C, *S]``, of which the layout's given channels may be left
            out; they are carried on from the latest frame. It is called in its own dtype on its own device;
            results have the state's dtype. An attribute ``latent_module: str`` names the module that takes latent noise.
        spec: Layout of the physical state.
        normalizer: Converts between physical and model units; None passes states as they are.
        history: Number of frames that the model sees, h >= 1.
        predicts: ``"state"`` if the model returns the normalised next state; ``"delta"`` if it returns the change in units of
            ``delta_std``.
        stochastic: What makes candidates differ, also as a dict with the plan's keys; None is MC dropout at the model's rates.
        unpack: Takes the next state out of a tuple or output object that the model returns.
        inputs: Further keyword arguments of the model, a function of a ``StepContext`` for N states that returns numbers for all of them
            or tensors ``[N, ...]``: ``lambda context: {"time": context.time, "nu": nu[context.problem_ids]}``. Each state's candidates
            get its entries, whatever the chunks, beams and processes. With history, step 0 is that of the latest frame at the start.
        time_step: Time between a state and the next, by which ``context.time`` counts; a checkpoint records it, and a command takes that
            of its data where a factory leaves it open. None where it is not known.
        compile: Compile the model for candidates and the deterministic step, by torch.compile in its default mode or in the one named
            (``ttcfast.core.compiled.MODES``). Each number of problems and candidates is compiled once, for half a minute or more on a CPU;
            ``TTCConfig.chunk_size`` keeps them few. Draws of the model without a key then depend on the compiler.
        dtype: torch.bfloat16 or torch.float16 computes the matrix products of candidates in that precision, in a copy of the model, and
            corrects the candidates by the deterministic step in the model's own precision (see ``CandidateForward``). On a CPU it pays with
            AMX or other bfloat16 instructions and dozens of candidates; without them it is several times slower than float32. None keeps
            the model's precision.
        graph: On a GPU, have a greedy search record its step as a CUDA graph (``ttcfast.ttc.step_graph``), which pays where launching
            kernels takes longer than they do: small models. It takes a scorer that is ``timeless``; other searches, and steps in which a
            problem finds no candidate, are made as without it, with the same results. No GPU has measured it yet: experimental.

    Attributes:
        origin: The factory and its arguments that made the model, where a command called one; None otherwise.

    Raises:
        ValueError: ``predicts``, ``compile`` or ``dtype`` is unknown, ``history`` is below 1, or the normalizer has another number of
            channels.

    Source: TTC plan, "Integration Notes for Common Bases"; TTC plan, "Minimal Interfaces (Copy-Paste Stubs)";
    docs/design/decisions.md ("Declared layouts"), docs/design/decisions.md ("Dropout that acts").
    """

    origin: Mapping[str, Any] | None = None
    _taken: tuple[Any, ...] = ()  # class of the model and names of the inputs that it is known to take

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
        inputs: Inputs | None = None,
        time_step: float | None = None,
        compile: bool | str = False,
        dtype: torch.dtype | None = None,
        graph: bool = False,
    ) -> None:
        super().__init__()
        one_of("predicts", predicts, ("state", "delta"))
        one_of("compile", compile, (False, True, *MODES))
        at_least("history", history, 1)
        if normalizer is not None and normalizer.num_channels != spec.num_channels:
            raise ValueError(
                f"normalizer has {normalizer.num_channels} channels and the StateSpec {spec.num_channels}; "
                "name channels that no physical term reads in StateSpec(extra=...)"
            )
        self.model, self.spec, self.normalizer = model, spec, normalizer
        self._candidates = CandidateForward(model, compile=compile, dtype=dtype)
        self.history, self.unpack, self.inputs, self.time_step, self.graph = int(history), unpack, inputs, time_step, bool(graph)
        self.predicts: Literal["state", "delta"] = predicts
        self.stochastic = StochasticConfig.of(stochastic)
        self.eval()

    def forward(self, x_t: Tensor, *, step: int = 0, problem_ids: Tensor | None = None) -> Tensor:
        """Returns the next state ``[M, C, *S]`` of ``[M, C, *S]`` (``[M, h, C, *S]`` with history), differentiable, in the model's mode.

        ``step`` and ``problem_ids [M]`` are for ``inputs``; None counts the problems from 0.
        """
        self._check("x_t", x_t)
        encoded = self._encode(x_t)
        given = self._given(encoded, step, problem_ids)
        if self.normalizer is None:  # it may be x_t itself, and the model may work in place
            encoded = encoded.clone()
        return self._decoded(self._unpacked(self._plain_call(encoded, given)), self._latest(x_t))

    @in_turn
    @torch.no_grad()
    def deterministic(self, x: Tensor, *, step: int = 0, problem_ids: Tensor | None = None) -> Tensor:
        """Returns the step without noise, ``[N, C, *S]`` (``[N, h, C, *S]`` with history) -> ``[N, C, *S]``.

        ``step`` and ``problem_ids [N]`` are for ``inputs``; None counts the problems from 0.
        """
        self._check("x", x)
        encoded = self._encode(x)
        given = self._given(encoded, step, problem_ids)
        return self._decoded(self._calls().deterministic(encoded, self._unpacked, given=given, of=x), self._latest(x))

    @in_turn
    @torch.no_grad()
    def sample_next(self, x_t: Tensor, seed: int | None = None, multi: bool = False) -> Tensor:
        """Returns one stochastic next state of ``[C, *S]``, or of every state in ``[B, C, *S]`` with ``multi=True``.

        With history, states are ``[h, C, *S]``. A batch holds candidates 0 to B - 1 of problem 0 at step 0 under the random ``seed``;
        None draws one from torch's stream.
        """
        x = x_t if multi else x_t.unsqueeze(0)
        self._check("x_t", x)
        rows = candidate_rows(torch.arange(len(x)), None, 1, x.device)
        key = int(torch.randint(2**63 - 1, ())) if seed is None else int(seed) % 2**63
        with temp_seed(seed):
            draw = Draw.of(key, 0, rows, self.stochastic.antithetic)
            out = self._sample(x, draw, self.stochastic, self._given(x, 0, None))[:, 0]
        return out if multi else out[0]

    @in_turn
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
        include_deterministic: bool = False,
    ) -> Tensor:
        """Returns stochastic next states from one forward pass of ``N*B`` states.

        Each is a function of its state, problem, candidate id, random seed and step: the other states of the call, and their order, chunk,
        batch or process, change it by no more than the rounding of the model's arithmetic. Noise is keyed site by site
        (``ttcfast.stochastic_sampling.keyed_noise``). What cannot be keyed (dropout called by function, a forward that draws from torch,
        numpy or ``random``) draws from streams set by seed, step, first problem and first id: it repeats for the same call, but another
        chunking draws other candidates. A model that drew no such number when it was traced is taken for one that never does.

        Args:
            x: States ``[N, C, *S]`` (``[N, h, C, *S]`` with history) in physical units on the model's device.
            ids: int64 ``[B]``, candidate ids, at least 0; or ``[N, B]``, ids for each state, for the beams of one problem.
            problem_ids: int64 ``[N]``, problem ids, at least 0 and below 2^32; None counts from 0.
            seed: Random seed, 0 to 2^63 - 1.
            step: Step of the rollout, at least 0.
            stochastic: Replaces the surrogate's own for this call.
            include_deterministic: Put the deterministic step before them, as a state without noise of the same forward pass. Where the
                noise does not allow that (it is not keyed, or is the same for all states), in low precision, and under symmetries, it
                is computed by itself.

        Returns:
            ``[N, B, C, *S]`` in the dtype of ``x``; ``[N, 1 + B, C, *S]`` with the deterministic step.

        Raises:
            ValueError: Axes, channels, device, ids or problems do not fit, the random seed is out of range, or no module takes latent
                noise.
            DeterministicModelError: At step 0 there is more than one candidate and all are the same. At later steps rounding may swallow
                the noise of states that have grown large, which is no reason to end a rollout.

        Source: docs/design/decisions.md ("Keyed candidates").
        """
        config = self.stochastic if stochastic is None else StochasticConfig.of(stochastic)
        self._check("x", x)
        Key(seed, step)  # raises if the streams cannot tell them apart
        rows = candidate_rows(ids, problem_ids, len(x), x.device)
        if config.symmetry and not include_deterministic:
            return self._in_frames(x, ids, problem_ids, seed, step, config)
        given, encoded, sites = self._given(x, step, problem_ids), self._encode(x), noise_sites(self.model, config)
        if include_deterministic:
            if config.symmetry or not self._calls().spares(encoded, sites, given, self._unpacked):
                still = self.deterministic(x, step=step, problem_ids=problem_ids).unsqueeze(1)
                return torch.cat([still, self.candidates(x, ids, problem_ids=problem_ids, seed=seed, step=step, stochastic=config)], 1)
            each = rows.unflatten(0, (len(x), -1))
            rows = torch.cat([each[:, :1], each], 1).flatten(0, 1)  # what the name of a state without noise draws is thrown away
        # numbers of ids on a device are waited for
        keyed = step > 0 and (include_deterministic or self._calls().keyed(encoded, sites, given))
        first = 0 if problem_ids is None or keyed else int(problem_ids[0])
        with temp_seed(None if keyed else hash_seed(seed, step, first, int(ids.flatten()[0]))):
            draw = Draw.of(seed, step, rows, config.antithetic, still=len(rows) // len(x) if include_deterministic else 0)
            out = self._sample(x, draw, config, given, encoded=encoded, sites=sites)
            drawn = out[:, 1:] if include_deterministic else out
            if step == 0 and drawn.shape[1] > 1 and all_same(drawn[:, 0], drawn[:, 1:]):
                self._require_stochastic(x[:1], first, int(ids.max()) + 1, config, seed, rows_of(given, [0]))
        return out

    def _in_frames(self, x: Tensor, ids: Tensor, problem_ids: Tensor | None, seed: int, step: int, config: StochasticConfig) -> Tensor:
        """Candidates each under a symmetry of its own, in one call of the model."""
        each = ids.expand(len(x), -1)
        problems = torch.arange(len(x)) if problem_ids is None else problem_ids
        (n, b), cells = each.shape, x.shape[-self.spec.ndim :]
        if fields := [name for name, value in self._given(x[:1], step, problems[:1]).items() if value.shape[1:][-len(cells) :] == cells]:
            raise ValueError(f"inputs gives fields ({', '.join(fields)}), which no symmetry turns; make them given channels of the state")
        frames = Frames(self.spec, cells, each, problems, seed=seed, step=step)
        seen, own = frames.into(x.unsqueeze(1).expand(n, b, *x.shape[1:])).flatten(0, 1), problems.repeat_interleave(b)
        plain = dataclasses.replace(config, symmetry=False)
        if plain.active:
            options: Any = {"seed": seed, "step": step, "stochastic": plain}
            made = self.candidates(seen, each.reshape(-1, 1), problem_ids=own, **options)[:, 0]
        else:
            made = self.deterministic(seen, step=step, problem_ids=own)
        return frames.back(made.unflatten(0, (n, b)))

    def _require_stochastic(
        self, x: Tensor, problem: int, after: int, config: StochasticConfig, seed: int, given: Mapping[str, Tensor]
    ) -> None:
        """Raise ``DeterministicModelError`` if all candidates of a state ``[1, C, *S]`` with ids from ``after`` are equal at step 0."""
        draws: list[Draw] = []

        def draw(ids: Tensor) -> Tensor:
            draws.append(Draw.of(seed, 0, candidate_rows(ids, torch.tensor([problem]), 1, x.device), config.antithetic))
            return self._sample(x, draws[-1], config, given, compile=False)

        def sites() -> dict[str, list[Site]]:
            found, unseen = noise_sites(self.model, config), ("own", "training")  # these draw noise themselves
            return {"sites": found, "acting": [site for site in found if site.number in draws[-1].calls or site.kind in unseen]}

        require_stochastic(draw, after, PROBES, self.model, sites)

    def variant(
        self,
        *,
        stochastic: StochasticConfig | Mapping[str, Any] | None = None,
        compile: bool | str | None = None,
        dtype: torch.dtype | None = None,
        graph: bool | None = None,
    ) -> Surrogate:
        """Returns another surrogate around the same model; None keeps the option of this one.

        It serves checkpoints (``load_surrogate(path).variant(compile=True)``) and comparisons of ways to compute the same candidates.
        """
        other = Surrogate(
            self.model,
            self.spec,
            normalizer=self.normalizer,
            history=self.history,
            predicts=self.predicts,
            stochastic=self.stochastic if stochastic is None else stochastic,
            unpack=self.unpack,
            inputs=self.inputs,
            time_step=self.time_step,
            compile=self._candidates.compile if compile is None else compile,
            dtype=self._candidates.dtype if dtype is None else dtype,
            graph=self.graph if graph is None else graph,
        )
        other.origin = self.origin
        return other

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled, so that a new number of problems or candidates costs a compilation."""
        return bool(self._candidates.compile)

    @property
    def corrected(self) -> bool:
        """Whether candidates are computed in low precision and corrected by the deterministic step."""
        return self._candidates.dtype is not None

    @torch.no_grad()
    def draws_by_key(
        self,
        x: Tensor,
        *,
        problem_ids: Tensor | None = None,
        step: int,
        stochastic: StochasticConfig | Mapping[str, Any] | None = None,
    ) -> bool:
        """Returns whether candidates of states like ``x`` have been made and are the same in every chunk, up to rounding.

        Arguments as for ``candidates``.
        """
        config = self.stochastic if stochastic is None else StochasticConfig.of(stochastic)
        return self._calls().keyed(self._encode(x), noise_sites(self.model, config), self._given(x, step, problem_ids))

    def dropout_rates(self, stochastic: StochasticConfig | Mapping[str, Any] | None = None) -> list[float]:
        """Returns the positive dropout rates that act in ``candidates``, one per site; ``stochastic`` and errors as there."""
        config = self.stochastic if stochastic is None else StochasticConfig.of(stochastic)
        return [site.amount for site in noise_sites(self.model, config) if site.is_dropout and site.amount > 0]

    def _sample(
        self,
        x: Tensor,
        draw: Draw,
        config: StochasticConfig,
        given: Mapping[str, Tensor],
        *,
        encoded: Tensor | None = None,
        sites: Sequence[Site] | None = None,
        compile: bool = True,
    ) -> Tensor:
        """Return next states ``[N, B, C, *S]`` for a new ``draw`` of ``N * B`` rows; row n * B + b is candidate b of state n.

        ``encoded`` and ``sites`` are those of ``x`` and ``config`` where the caller has them.
        """
        n, count = x.shape[0], draw.rows.shape[0] // x.shape[0]
        sites, latest = noise_sites(self.model, config) if sites is None else sites, self._latest(x)
        wide = latest.unsqueeze(1).expand(n, count, *latest.shape[1:])
        encoded = self._encode(x) if encoded is None else encoded
        options: Any = {"given": given, "compile": compile, "of": x}
        if config.directions is None:
            return self._decoded(self._calls()(encoded, sites, draw, self._unpacked, **options), wide)
        still = self._decoded(self._calls().deterministic(encoded, self._unpacked, **options), latest)
        moves = self._moves(encoded, still - latest, draw, config)
        if draw.still:
            moves[:, 0] = 0
        if sites:
            draw.start(draw.rows, draw.stream)
            still = self._decoded(self._calls()(encoded, sites, draw, self._unpacked, **options), wide)
        else:
            still = still.unsqueeze(1)
        return self.spec.carried(still + moves, wide, channel_axis=2)

    def _moves(self, encoded: Tensor, change: Tensor, draw: Draw, config: StochasticConfig) -> Tensor:
        """Return moves ``[N, B, C, *S]`` along ``config.directions`` in physical units; ``change [N, C, *S]`` is the deterministic step."""
        assert config.directions is not None
        directions = load_directions(config.directions, encoded.device)
        state = encoded[:, -self.spec.num_channels :]  # the latest frame, if the model takes several
        step = change if self.normalizer is None else self.normalizer.encode_delta(change)
        moves = directions.moves(
            state.float(),
            step.float(),
            draw,
            scale=config.directions_scale,
            strength=config.directions_strength,
            grid=config.directions_grid,
        )
        if self.normalizer is not None:
            moves = moves * self.normalizer.unit_of_delta(moves, channel_axis=2)
        return moves.to(change.dtype)

    def _given(self, x: Tensor, step: int, problem_ids: Tensor | None) -> dict[str, Tensor]:
        """Return the model's keyword arguments for each state."""
        if self.inputs is None:
            return {}
        problems = torch.arange(len(x)) if problem_ids is None else problem_ids
        parameter = self._parameter()
        dtype = x.dtype if parameter is None else parameter.dtype
        on_host = None if problems.is_cuda else problems
        context = StepContext.at(step, sent(problems, x.device), self.time_step, on_host)
        found = conditions(self.inputs, context, x.device, dtype)
        if (known := (type(self.model), *found)) != self._taken and not torch.compiler.is_compiling():  # a signature is read once
            require_taken(self.model, found)
            self._taken = known
        return found

    def _plain_call(self, encoded: Tensor, given: Mapping[str, Tensor]) -> Any:
        """Call the model in a turn, so that no other thread has its noise installed."""
        if torch.compiler.is_compiling():
            return self.model(encoded, **given)
        with turn("Surrogate.forward"), interruptible():
            return self.model(encoded, **given)

    def _calls(self) -> CandidateForward:
        """Return the calls of the current model; state of a replaced model is dropped."""
        if self._candidates.model is not self.model:
            self._candidates = self._candidates.of(self.model)
        return self._candidates

    def _decoded(self, out: Tensor, latest: Tensor) -> Tensor:
        """Return the model's output for ``M`` states in physical units, with shape and dtype of ``latest`` ([M, ...] or [N, B, ...])."""
        axis, given = latest.ndim - self.spec.ndim - 1, self.spec.given_channels
        expected = (latest.shape[:axis].numel(), *latest.shape[axis:])
        if given and out.shape == (expected[0], expected[1] - len(given), *expected[2:]):
            absent, predicted = out.new_zeros(expected[0], *expected[2:]), iter(out.unbind(1))
            out = torch.stack([absent if c in given else next(predicted) for c in range(expected[1])], 1)
        if out.shape != expected:
            raise ValueError(
                f"{type(self.model).__name__} returned shape {tuple(out.shape)} for {expected[0]} states; expected {expected}; "
                "take the next state out with Surrogate(unpack=...)"
            )
        out = out.to(latest.dtype).reshape(latest.shape)
        if self.predicts == "state":
            out = out if self.normalizer is None else self.normalizer.decode(out, channel_axis=axis)
        else:
            out = latest + (out if self.normalizer is None else self.normalizer.decode_delta(out, channel_axis=axis))
        return self.spec.carried(out, latest, channel_axis=axis)

    def _encode(self, x: Tensor) -> Tensor:
        """Return the normalised model input ``[N, h*C, *S]`` in the model's dtype."""
        z = x if self.normalizer is None else self.normalizer.encode(x, channel_axis=-self.spec.ndim - 1)
        z = z.flatten(1, 2) if self.history > 1 else z
        parameter = self._parameter()
        return z if parameter is None else z.to(parameter.dtype)

    def _latest(self, x: Tensor) -> Tensor:
        return x[:, -1] if self.history > 1 else x

    def _unpacked(self, out: Any) -> Tensor:
        out = out if self.unpack is None else self.unpack(out)
        if not isinstance(out, Tensor):
            raise ValueError(
                f"{type(self.model).__name__} returned a {type(out).__name__}; take the next state out of it with Surrogate(unpack=...)"
            )
        return out

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
