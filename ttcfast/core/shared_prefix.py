"""Runs work that the candidates of a problem have in common once per problem: everything before the first noise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.runtime.turns import in_turn, interruptible

from .context import repeated
from .row_outputs import Uses, close, first_line, map_tensors, repeat_rows, same_structure, stand_in, tensors_of, with_each
from .seeds import temp_seed

Forward = Callable[..., Any]
Noise = Callable[[], AbstractContextManager[Any]]
Axes = tuple[int | None, ...]  # for each tensor of an output, the axis of the rows; None without rows

_PAIR, CHECKED_ROWS = 2, 4  # problems, and candidates per problem, in the check; and all of them


class OtherPathError(RuntimeError):
    """Raised if a model does not call its modules as it did when it was checked."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__(
            f"{type(model).__name__} took another path through its modules than when it was checked ({what}), so what its candidates have "
            "in common is not known; use share_prefix=False"
        )


@dataclass(frozen=True, eq=False)
class Start:
    """Place where candidates may begin to differ: a module's call or, with ``after``, the forward hooks on its output."""

    module: nn.Module
    after: bool = False


class SharedPrefix:
    """Forward of ``N*B`` rows, B candidates of N problems, in which everything before the first noise runs on N rows.

    The model is called twice. The first call has N rows and stops at the first noise; the outputs of modules that are complete by then are
    kept, the largest modules standing for all they contain. The second call has ``N*B`` rows; these modules are not run again but return
    their outputs with each row repeated B times. What lies between them (residual additions, reshapes) is computed again, so that work in
    the forward of the very module that contains the noise is not shared: put it into a module of its own.

    This is valid for a model that treats rows independently, takes the same path through its modules for any number of rows, and passes
    activations on by returning them. ``check`` verifies this on two problems of two candidates, module by module: one whose output cannot
    be divided into rows, that draws noise, or that modifies its input runs again. If the result would differ, nothing is shared and
    ``reason`` says why. A path that depends on values may pass the check and change later; ``__call__`` then raises.

    With a fraction f of the work before the first noise, the speed-up is 1 / (1 - f (1 - 1/B)).

    Args:
        model: Any module, in the mode in which it will be called; unchanged after every call.
        starts: All places where rows may begin to differ. Omit modules without effect (rate 0). If the model's input is noisy, nothing can
            be shared.
        precision: Precision of the model's arithmetic, if it differs from the dtype of its outputs; it defines rounding.
    """

    def __init__(self, model: nn.Module, starts: Sequence[Start], *, precision: torch.dtype | None = None) -> None:
        self.model, self.precision = model, precision
        # A compiled module runs as a whole, so that noise within it starts at the module.
        doors = {m: outer for outer in model.modules() if _opaque(outer) for m in outer.modules()}
        self._starts: dict[nn.Module, bool] = {}  # whether after the module
        for start in starts:
            module = doors.get(start.module, start.module)
            self._starts[module] = start.after and module is start.module and self._starts.get(module, True)
        self._visible = [m for m in model.modules() if doors.get(m, m) is m]
        self._steps: list[_Step] = []
        self._hooks = self._count_hooks()
        self.reason: str | None = "check() has not been called"

    @in_turn
    def check(self, pair: Tensor, noise: Noise = nullcontext, given: Mapping[str, Tensor] | None = None) -> str | None:
        """Finds what can be shared, and verifies that sharing changes results by rounding at most. Costs about 15 rows of a forward.

        Args:
            pair: Two different problems ``[2, ...]`` as the model takes them.
            noise: Returns a context for one forward of ``[4, ...]`` in which row ``2 n + b`` is candidate b of problem n, with the same
                noise every time. Also entered for two rows, which stop before any noise.
            given: Keyword arguments of the model for the two problems, ``[2, ...]`` each.

        Returns:
            ``reason``: None, or why nothing is shared.
        """
        with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version counters
            try:
                self.reason = self._find(pair.clone(), noise, given or {})
            except BaseException as error:
                self.reason = f"the check ended with {type(error).__name__}: {first_line(error)}"
                if not isinstance(error, Exception):  # the model's own errors recur in the unshared call
                    raise
        return self.reason

    @property
    def shared(self) -> list[str]:
        """Names of the modules that run once per problem, in call order, without the modules inside them."""
        names = {m: name for name, m in self.model.named_modules()}
        return [names.get(step.module, type(step.module).__name__) for step in self._steps if step.axes is not None]

    @property
    def outdated(self) -> bool:
        """Whether hooks were added or removed since the check; new ones may use outputs that were unused then."""
        return self._hooks != self._count_hooks()

    def _count_hooks(self) -> list[int]:
        return [len(m._forward_hooks) for m in self._visible]

    @in_turn
    def __call__(self, x: Tensor, count: int, given: Mapping[str, Tensor] | None = None) -> Any:
        """Return the model's output for ``x.repeat_interleave(count, 0)``, up to rounding; shares nothing if ``reason`` is not None.

        Args:
            x: One row per problem, ``[N, ...]``.
            count: B, candidates per problem. The caller's context provides the noise, for ``N*B`` rows, problem-major.
            given: Keyword arguments of the model for each problem, ``[N, ...]``.

        Raises:
            OtherPathError: The model took another path through its modules than when it was checked.
        """
        given = given or {}
        if self.reason is not None or count == 1:
            with interruptible():
                return self.model(x.repeat_interleave(count, 0), **repeated(given, count))
        return self._resume(self.run_prefix(x, given), x, count, [], given)

    @in_turn
    def run_prefix(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> list[Any]:
        """Runs only the first call, on ``[N, ...]``, and returns the kept outputs. Benches derive f from its time."""
        path, kept = _Path(self.model, self._steps), []

        def wrap(module: nn.Module, forward: Forward) -> Forward:
            after = self._starts.get(module)

            def run(*args: Any, **kwargs: Any) -> Any:
                if after is False:
                    raise _Stop(path)
                with path.step(module) as step:
                    out = forward(*args, **kwargs)
                if step is not None and step.axes is not None:
                    # cloned, since the model may change it in place later
                    kept.append(with_each(step.used, out, lambda t, used: t.clone() if used else stand_in(t, t.shape)))
                if after:
                    raise _Stop(path)
                return out

            return run

        try:
            with _wrapped({*path.modules, *self._starts}, wrap), interruptible():
                self.model(x, **(given or {}))
        except _Stop as stop:
            if stop.of is not path:  # from an enclosing call, whose noise is within this model
                raise
            path.require_end(len(kept))
            return kept
        raise OtherPathError(self.model, "it reached no noise")

    def _resume(self, outputs: list[Any], x: Tensor, count: int, handed: list[Any], given: Mapping[str, Tensor]) -> Any:
        """Make the second call: all rows, with kept outputs replacing their modules; appends the repeated outputs to ``handed``."""
        path = _Path(self.model, self._steps)

        def wrap(module: nn.Module, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                if path.ended:
                    return forward(*args, **kwargs)
                with path.step(module) as step:
                    if step is None or step.axes is None:
                        return forward(*args, **kwargs)
                    axes = [(axis, used) for axis, used in zip(step.axes, step.used)]
                    handed.append(with_each(axes, outputs[len(handed)], lambda t, a: repeat_rows(t, a[0], len(x), count, stored=a[1])))
                    return handed[-1]

            return run

        with _wrapped(path.modules, wrap), interruptible():
            out = self.model(x.repeat_interleave(count, 0), **repeated(given, count))  # problem-major: row n * count + b
        path.require_end(len(handed))
        return out

    def _find(self, pair: Tensor, noise: Noise, given: Mapping[str, Tensor]) -> str | None:
        """Make the plan. Returns the reason if nothing can be shared."""
        with temp_seed(1), noise():
            single = self._traced(pair, given, stop=True)
        with temp_seed(0), noise():  # another seed, so that draws from torch's own streams show as differences
            double = self._traced(pair.repeat_interleave(_PAIR, 0), repeated(given, _PAIR), stop=False)
        if not (single.started and double.started):
            return "no noise was reached, so all candidates are the same"
        self._steps, self.reason = _plan(single.root, double.root, self.precision), None
        if not self._steps:
            return "no module can be shared before the first noise"
        handed_on, handed = self._steps, list[Any]()
        try:
            with temp_seed(0), noise(), Uses() as uses:
                out = self._resume(self.run_prefix(pair, given), pair, _PAIR, handed, given)
            if not self._same(out, double.output):
                return "the outcome would not be the unshared one"
            uses.note(out)
            self._steps = [_Step(s.module, s.axes, uses.of(next(each))) if s.axes else s for each in [iter(handed)] for s in handed_on]
            with temp_seed(0), noise():
                if not self._same(self(pair, _PAIR, given), double.output):  # an output is used undetected: store all of them
                    self._steps = handed_on
        except RuntimeError as error:  # shapes differ if a model keeps activations on itself
            return f"the model cannot be run in two parts: {first_line(error)}"
        return None

    def _same(self, out: Any, expected: Any) -> bool:
        return same_structure(out, expected) and all(close(a, b, self.precision) for a, b in zip(tensors_of(out), tensors_of(expected)))

    def _traced(self, x: Tensor, given: Mapping[str, Tensor], *, stop: bool) -> _Trace:
        """Call the model and record the calls of its modules up to the first noise, then stop or continue without recording."""
        trace = _Trace(stop)

        def wrap(module: nn.Module, forward: Forward) -> Forward:
            after = self._starts.get(module)

            def run(*args: Any, **kwargs: Any) -> Any:
                if after is False:
                    trace.reach()
                if trace.started:
                    return forward(*args, **kwargs)
                with trace.call(module) as note:
                    taken = [(t, t._version) for t in tensors_of((args, kwargs))]
                    out = forward(*args, **kwargs)
                    if not trace.started:
                        note.keep(out, changes_input=any(t._version != version for t, version in taken))
                if after:
                    trace.reach()
                return out

            return run

        try:
            with _wrapped(self._visible, wrap), interruptible():
                trace.output = self.model(x, **given)
        except _Stop as ended:
            if ended.of is not trace:
                raise
        return trace


class _Stop(BaseException):
    """Ends the first call at the first noise. Not an ``Exception``, so that no handler within a model catches it."""

    def __init__(self, of: object) -> None:
        self.of = of


@dataclass
class _CallRecord:
    """One call of a module, with the calls inside it."""

    module: nn.Module | None = None
    within: list[_CallRecord] = field(default_factory=list)
    complete: bool = False
    changes_input: bool = False
    output: Any = None

    def keep(self, output: Any, *, changes_input: bool) -> None:
        self.output, self.changes_input, self.complete = map_tensors(torch.clone, output), changes_input, True


class _Trace:
    """Records the calls of one forward up to the first noise."""

    def __init__(self, stop: bool) -> None:
        self.root, self.started, self.output = _CallRecord(), False, None
        self._stop, self._open = stop, [self.root]

    @contextmanager
    def call(self, module: nn.Module) -> Iterator[_CallRecord]:
        note = _CallRecord(module)
        self._open[-1].within.append(note)
        self._open.append(note)
        try:
            yield note
        finally:
            self._open.pop()

    def reach(self) -> None:
        self.started = True
        if self._stop:
            raise _Stop(self)


@dataclass(frozen=True, eq=False)
class _Step:
    """One module call before the first noise.

    Args:
        module: The module.
        axes: Axis of the rows in each output; None if the call is not shared.
        used: Which tensors of its output are used by anything but shared modules; the others are replaced by stand-ins.
    """

    module: nn.Module
    axes: Axes | None
    used: tuple[bool, ...] = ()


class _Path:
    """Follows the calls of the planned modules in order."""

    def __init__(self, model: nn.Module, steps: list[_Step]) -> None:
        self._model, self._steps, self._at, self._inside = model, steps, 0, False
        self.modules = dict.fromkeys(step.module for step in steps)

    @property
    def ended(self) -> bool:
        return self._at == len(self._steps)

    @contextmanager
    def step(self, module: nn.Module) -> Iterator[_Step | None]:
        """Yield the step of a call of ``module``; None inside a shared call, and for modules without a step."""
        if self._inside or module not in self.modules:
            yield None
            return
        if self.ended or self._steps[self._at].module is not module:
            raise OtherPathError(self._model, f"{type(module).__name__} was called out of turn")
        found = self._steps[self._at]
        self._at += 1
        self._inside = found.axes is not None
        try:
            yield found
        finally:
            self._inside = False

    def require_end(self, outputs: int) -> None:
        """Raise unless all steps were taken, with this many shared outputs."""
        if not self.ended:
            raise OtherPathError(self._model, f"{type(self._steps[self._at].module).__name__} was not called")
        if outputs != sum(step.axes is not None for step in self._steps):
            raise OtherPathError(self._model, f"noise within {type(self._steps[-1].module).__name__}")


def _plan(single: _CallRecord, double: _CallRecord, precision: torch.dtype | None) -> list[_Step]:
    """Return the largest calls that can be shared, by comparing calls on two rows with those on four; none if the calls differ."""
    chosen: list[_Step] = []

    def visit(one: _CallRecord, two: _CallRecord) -> bool:
        if [n.module for n in one.within] != [n.module for n in two.within]:
            return False
        for a, b in zip(one.within, two.within):
            assert a.module is not None
            axes = _shareable(a, b, precision)
            chosen.append(_Step(a.module, axes, (True,) * len(axes or ())))
            if axes is None and not visit(a, b):
                return False
        return True

    same = visit(single, double)
    planned = {step.module for step in chosen if step.axes is not None}
    return [step for step in chosen if step.module in planned] if same else []


def _shareable(one: _CallRecord, two: _CallRecord, precision: torch.dtype | None) -> Axes | None:
    """Return the row axes in the output of a call if the four rows are the two rows repeated; otherwise None."""
    if not (one.complete and two.complete) or one.changes_input or two.changes_input or not same_structure(one.output, two.output):
        return None
    axes: list[int | None] = []
    for a, b in zip(tensors_of(one.output), tensors_of(two.output)):
        differing = [d for d in range(a.ndim) if a.shape[d] != b.shape[d]] if a.ndim == b.ndim else [0, 0]
        if len(differing) > 1 or any(a.shape[d] % _PAIR for d in differing):
            return None
        axes.append(differing[0] if differing else None)
        if not close(repeat_rows(a, axes[-1], _PAIR, _PAIR), b, precision):
            return None
    return tuple(axes) or None


@contextmanager
def _wrapped(modules: Iterable[nn.Module], wrap: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Replace each ``module.forward`` by ``wrap(module, module.forward)`` for this thread within a block of a turn; restores it exactly."""
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    thread = threading.get_ident()

    def in_this_thread(wrapped: Forward, own: Forward) -> Forward:
        return lambda *args, **kwargs: (wrapped if threading.get_ident() == thread else own)(*args, **kwargs)

    try:
        for module in modules:
            saved.append((module, {k: v for k, v in vars(module).items() if k == "forward"}))
            vars(module)["forward"] = in_this_thread(wrap(module, module.forward), module.forward)
        yield
    finally:
        for module, own in saved:
            vars(module).pop("forward", None)
            vars(module).update(own)


def _opaque(module: nn.Module) -> bool:
    """Tell whether calls of the modules inside are invisible from Python."""
    return isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")
