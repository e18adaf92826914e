"""Keyed noise in a model: within a block, every site draws by (seed, step, site) and (problem, candidate) rather than in sequence.

A candidate is then the same whichever others are in the batch, and in whichever order, chunk or process it is made.

Source: docs/design/decisions.md ("Keyed candidates"), ("Row axes").
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ttcfast.ops  # noqa: F401  (registers torch.ops.ttcfast.*)
from ttcfast.ops.keyed import DTYPES, stream_of
from ttcfast.runtime.turns import turn

from .attention import attend
from .dropout_wrap import drop_entries, edit_output, injected_dropout, switched_on
from .noise_site import NoiseSite
from .row_axis import RowAxis, over
from .sites import Site

Drop = Callable[[Tensor, float], Tensor]  # keyed dropout of a tensor whose first axis holds the states, at a rate
Call = tuple[int, int]  # the number of a site, and which call of its module within a forward, from 0
Axes = Mapping[Call, RowAxis | None]  # axis of the states in the tensor of each call; None for no axis
Trace = Callable[[Call, Sequence[Tensor] | None], None]  # receives the tensors of each call; None if it cannot be keyed


class Draw:
    """Candidates of one forward, and the random stream they draw from.

    Args:
        rows: (problem, candidate) of each state of the batch, int64 ``[M, 2]``, on the states' device.
        stream: The 64 bits of (seed, step), int64 ``[1]``, from ``ttcfast.ops.keyed.stream_of``.
        antithetic: Whether candidates 2, 4, 6, ... take the opposite noise of the candidate before them.
        still: Number of states of a problem, of which the first goes without noise: it is a deterministic step. 0 if none does.
        axes: Axis of the states at each site, as ``ttcfast.core.row_trace`` finds it; None guesses by sizes (``RowAxis.by_size``).
        trace: Receives what every site is given; no noise is added then.
    """

    def __init__(
        self,
        rows: Tensor,
        stream: Tensor,
        antithetic: bool = False,
        *,
        still: int = 0,
        axes: Axes | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.antithetic, self.still, self.axes, self.trace = antithetic, still, axes, trace
        self.start(rows, stream)

    @classmethod
    def of(cls, seed: int, step: int, rows: Tensor, antithetic: bool = False, *, still: int = 0) -> Draw:
        """Builds a draw from a seed and a step."""
        return cls(rows, stream_of(seed, step, rows.device), antithetic, still=still)

    def start(self, rows: Tensor, stream: Tensor) -> None:
        """Begins another forward in the same block.

        Under torch.compile the block surrounds the compiled function, which calls this; another step is then only other contents of the
        graph's inputs.
        """
        self.rows, self.stream = rows, stream
        self.calls: dict[int, int] = {}  # by site: how often its module was called in this forward

    def next_number(self, site: Site) -> int:
        """Returns the stream of this call of the site's module and counts the call."""
        return site.number_of(self.next_call(site)[1])

    def next_call(self, site: Site) -> Call:
        """Returns the site's number and which call of its module this is, and counts the call."""
        call = self.calls.get(site.number, 0)
        self.calls[site.number] = call + 1
        return site.number, call

    def axis_of(self, site: Site, call: Call, x: Tensor) -> RowAxis | None:
        """Returns the axis of ``x`` that holds the states; None if there is none. Warns if ``x`` is not as traced."""
        m = len(self.rows)
        if self.axes is None:
            return RowAxis.by_size(x, m, site.sequence_first)
        if call in self.axes and ((known := self.axes[call]) is None or known.fits(x, m)):
            return known
        warnings.warn(
            f"module {site.name!r} is given a tensor of shape {tuple(x.shape)}, which it was not when the model was traced; where the "
            f"{m} states are in it is told by size alone",
            RuntimeWarning,
            stacklevel=4,
        )
        return RowAxis.by_size(x, m, site.sequence_first)

    def of_all(self) -> Draw:
        """Returns a draw that is the same for all states."""
        return Draw(torch.zeros_like(self.rows[:1]), self.stream)

    def spared(self, noisy: Tensor, x: Tensor) -> Tensor:
        """Returns ``noisy [k M, ...]`` with the entries of ``x`` in place of those of states without noise."""
        if self.still:
            problems, own = len(self.rows) // self.still, len(x) // len(self.rows)
            noisy.unflatten(0, (problems, -1))[:, :own] = x.unflatten(0, (problems, -1))[:, :own]
        return noisy

    def dropout(self, x: Tensor, p: float, number: int) -> Tensor:
        """Applies inverted dropout to ``[k M, ...]``, whose first k entries belong to the first row, and so on.

        Both parts of a complex entry drop together.
        """
        if x.is_complex():
            kept = self.dropout(x.real.new_ones(x.shape), p, number)
            return torch.where(kept != 0, x * kept, 0)  # a dropped entry may be infinite
        out = self._by_row(x if x.dtype in DTYPES else x.float())
        return torch.ops.ttcfast.keyed_dropout(out, self.rows, self.stream, number, p, self.antithetic, "auto").to(x.dtype).view(x.shape)

    def noise(self, x: Tensor, sigma: float, number: int) -> Tensor:
        """Returns ``x + sigma * normal`` for ``[k M, ...]``, with rows as in ``dropout``.

        The normal of a complex entry is complex with variance 1, as in torch.randn.
        """
        if x.is_complex():
            return torch.view_as_complex(self.noise(torch.view_as_real(x.resolve_conj()), sigma / math.sqrt(2), number))
        return self.copies(self._by_row(x), 1, sigma, number).view(x.shape)

    def copies(self, x: Tensor, count: int, sigma: float, number: int) -> Tensor:
        """Returns ``count`` noisy copies of each entry, ``[N, ...] -> [N, count, ...]``, for ``N * count`` rows."""
        wide = x if x.dtype in DTYPES else x.float()
        return torch.ops.ttcfast.add_noise(wide, self.rows, self.stream, number, count, sigma, self.antithetic, "auto").to(x.dtype)

    def _by_row(self, x: Tensor) -> Tensor:
        m = self.rows.shape[0]
        return x if x.shape[0] == m else x.unflatten(0, (m, -1))


@contextmanager
def keyed_noise(model: nn.Module, sites: Sequence[Site], draw: Draw) -> Iterator[nn.Module]:
    """Holds the model in evaluation mode within a block, with noise at ``sites`` (from ``noise_sites``) keyed by ``draw``.

    In evaluation mode dropout modules are the identity; hooks on them do the keyed dropping. Attention with dropped weights is computed
    step by step. Flags, rates, hooks and forwards are restored exactly, on exceptions and interrupts too. A module's second call within a
    forward counts as another site; ``draw.start`` begins another forward. The site of the input is left to the caller.

    Each site finds the M states of the batch by ``draw.axes``, as a ``Surrogate`` does, or by ``RowAxis.by_size``. Sizes are ambiguous
    where ``(t b)`` are folded, or where the number of tokens in ``[L, M, D]`` is a multiple of M.

    Such blocks take turns (``ttcfast.runtime.turns``): another thread that enters one, for this model or another, waits until this one
    ends. A thread that merely calls the model meanwhile gets its output without noise, in evaluation mode. Code that torch.compile has
    already made of the model ignores hooks, so that such a model runs uncompiled in the block.

    Noise that cannot be keyed is drawn from the global streams, with a warning: sites of kind ``"own"`` and ``"training"``, modules named
    like a drop path that are not the identity in evaluation mode, and sites whose tensors have no axis for the states. Other noise that no
    module reveals (``torch.rand`` in a forward) is not detected here.
    """
    with turn("keyed_noise") as this, ExitStack() as stack:
        inside, modules = [site for site in sites if site.module is not None], list(model.modules())
        for module in modules:
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
            if module._forward_hooks and (hook := injected_dropout(module)) is not None:  # a site of its own drops there
                stack.callback(setattr, hook, "p", hook.p)
                hook.p = 0.0
            if isinstance(module, NoiseSite) and not module.keyed:
                stack.callback(setattr, module, "keyed", False)
                module.keyed = True
        if inside and any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if inside and any(isinstance(m, nn.MultiheadAttention) for m in modules):  # torch's fused layers call none of their modules
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        if draw.trace is None and (held := [site.name for site in inside if site.kind == "training"]):
            _warn(f"what {type(model).__name__} drops by function{_in_modules(held)}", "has no module of its own")
        for site in inside:
            _install(site, draw, stack)
        with this.body():
            yield model


def _install(site: Site, draw: Draw, stack: ExitStack) -> None:
    module, thread = site.module, threading.get_ident()
    assert module is not None
    if site.kind in ("own", "training") and draw.trace is not None:  # a trace adds no noise
        return
    if site.kind == "training":
        module.training = True
        stack.callback(setattr, module, "training", False)
    elif site.kind == "own":
        _warn(_at(site), "is drawn by a class of its own")
        stack.enter_context(switched_on(module, site.amount))
    elif site.kind == "attention":
        own = {name: value for name, value in vars(module).items() if name == "forward"}
        stack.callback(vars(module).update, own)
        stack.callback(vars(module).pop, "forward", None)  # runs first
        vars(module)["forward"] = partial(_attend, site, draw, thread)
    else:
        # The hook of a dropout module replaces its forward, so that it runs before other hooks.
        first = site.kind not in ("after", "latent")
        stack.enter_context(module.register_forward_hook(partial(_hook, site, draw, thread), prepend=first, with_kwargs=True))


def _other_thread(thread: int) -> bool:
    """Returns whether the caller is another thread, which does not compute candidates."""
    return not torch.compiler.is_compiling() and threading.get_ident() != thread


def _hook(site: Site, draw: Draw, thread: int, module: nn.Module, inputs: Any, options: dict[str, Any], output: Any) -> Any:
    if _other_thread(thread):
        return output
    if site.kind in ("after", "latent"):
        return edit_output(output, partial(noisy, site, draw), f"module {site.name!r}")
    unknown = site.kind in ("path", "block") and not torch.compiler.is_compiling()  # recognised by name or attribute only
    if unknown and all(output is not given for given in (*inputs, *options.values())):
        if draw.trace is not None:
            draw.trace(draw.next_call(site), None)
            return output
        return _own_forward(site, "is not the identity in evaluation", inputs, options)
    out = noisy(site, draw, output)
    return output.copy_(out) if getattr(module, "inplace", False) else out


def noisy(site: Site, draw: Draw, x: Tensor) -> Tensor:
    """Applies the site's noise to a tensor that holds the M states; counts the call whether or not it can be keyed."""
    call, m = draw.next_call(site), len(draw.rows)
    if draw.trace is not None:
        draw.trace(call, [x])
        return x
    number, where = site.number_of(call[1]), draw.axis_of(site, call, x)
    if where is None:
        return _unkeyed(site, x, m)
    rows, source = where.in_front(x, m), draw.of_all() if where.rows == "common" else draw
    if site.kind == "latent":
        out = source.noise(rows, site.amount, number)
    else:
        out = _DROP[site.kind](rows, site, lambda values, p: source.dropout(values, p, number))
    return where.put_back(source.spared(out, rows), m)


def _attend(site: Site, draw: Draw, thread: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    module = site.module
    assert isinstance(module, nn.MultiheadAttention)
    given = (query, key, value)
    if _other_thread(thread):
        return type(module).forward(module, *given, *args, **options)
    call, m = draw.next_call(site), len(draw.rows)
    if draw.trace is not None:
        draw.trace(call, given if query.ndim == 3 else None)
        return type(module).forward(module, *given, *args, **options)
    axis = 0 if module.batch_first else 1
    if query.ndim != 3:
        where = None
    elif draw.axes is None:
        where = RowAxis(axis, 1, query.shape[axis] // m) if query.shape[axis] % m == 0 else None
    else:
        where = draw.axis_of(site, call, query)
    if where is None or where.rows == "new" or (where.rows != "common" and where.axis != axis):
        return _own_forward(site, f"is given a query of shape {tuple(query.shape)} for {m} states", (*given, *args), options)
    if where.rows == "widened":
        given = tuple(t.expand(*t.shape[:axis], m, *t.shape[axis + 1 :]) for t in given)  # type: ignore[assignment]
    number, source = site.number_of(call[1]), draw.of_all() if where.rows == "common" else draw
    weights_at = RowAxis(0, where.outer, where.inner)  # of the weights [M, heads, L, S]

    def edit(weights: Tensor) -> Tensor:
        if where.rows == "common":
            return source.dropout(weights.unsqueeze(0), site.amount, number).squeeze(0)
        rows = weights_at.in_front(weights, m)
        return weights_at.put_back(source.spared(source.dropout(rows, site.amount, number), rows), m)

    return attend(module, edit, *given, *args, **options)


def _alpha(x: Tensor, site: Site, drop: Drop, axes: int | None = None) -> Tensor:
    """Sets dropped entries to the negative saturation value of SELU, then rescales to keep mean and variance.

    Source: Klambauer et al., Self-Normalizing Neural Networks, 2017.
    """
    if x.is_complex():
        raise ValueError(
            f"module {site.name!r} is an alpha dropout, which is not defined for {x.dtype}; use nn.Dropout or latent noise there"
        )
    p, saturation = site.amount, 1.7580993408473766
    kept = over(drop(x.new_ones(x.shape[:axes]), p) != 0, x)
    scale = 1 / math.sqrt((1 - p) * (1 + p * saturation**2))
    return torch.where(kept, x, -saturation) * scale + scale * p * saturation


def _whole(x: Tensor, site: Site, drop: Drop, axes: int) -> Tensor:
    """Drops whole entries of the first ``axes`` axes: states, or channels of states."""
    keep = drop(x.real.new_ones(x.shape[:axes]), site.amount)
    if getattr(site.module, "scale_by_keep", True) is False:  # timm's option
        keep = keep != 0
    return x * over(keep, x)


def _block(x: Tensor, site: Site, drop: Drop) -> Tensor:
    """Drops blocks of cells around keyed centres and rescales state by state, with the options of timm and torchvision.

    Source: Ghiasi, Lin, Le, DropBlock, 2018.
    """
    space, module = x.shape[2:], site.module
    if not 1 <= len(space) <= 3:
        raise ValueError(
            f"module {site.name!r} drops blocks of a tensor of shape {tuple(x.shape)}; give it [M, C, *S] with 1 to 3 space axes"
        )
    sizes = [min(int(getattr(module, "block_size", 1)), s) for s in space]
    valid = [s - b + 1 for s, b in zip(space, sizes)]
    rate = getattr(module, "gamma_scale", 1.0) * site.amount * math.prod(space) / (math.prod(sizes) * math.prod(valid))
    channels = 1 if getattr(module, "couple_channels", False) else x.shape[1]
    ones = x.real.new_ones(x.shape[0], channels, *valid)
    centres = (drop(ones, min(rate, 1 - 2**-32)) == 0).to(ones.dtype)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(space) - 1]
    around = [width for b in reversed(sizes) for width in (b - 1, b - 1)]
    keep = 1 - pool(F.pad(centres, around), sizes, stride=1)  # a centre is the first corner of its block
    if getattr(module, "scale_by_keep", True):
        keep = keep / over(keep.flatten(1).mean(1).clamp_min(torch.finfo(x.dtype).eps), x)
    return x * keep


_DROP: dict[str, Callable[[Tensor, Site, Drop], Tensor]] = {
    "entries": lambda x, site, drop: drop(x, site.amount),
    "after": lambda x, site, drop: drop(x, site.amount),
    "channels": partial(_whole, axes=2),
    "alpha": _alpha,
    "channels alpha": partial(_alpha, axes=2),
    "path": partial(_whole, axes=1),
    "block": _block,
}


def _unkeyed(site: Site, x: Tensor, m: int) -> Tensor:
    """Adds noise from the global streams to a tensor that has no axis for the states."""
    why = f"sees a tensor of shape {tuple(x.shape)}, in which no axis holds the {m} states of the batch"
    if site.kind not in ("latent", "after"):
        out: Tensor = _own_forward(site, why, (x,), {})
        return out
    _warn(_at(site), why)
    return torch.add(x, torch.randn_like(x), alpha=site.amount) if site.kind == "latent" else drop_entries(x, site.amount)


def _own_forward(site: Site, why: str, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """Runs the module's own forward in training mode."""
    _warn(_at(site), why)
    assert site.module is not None
    with switched_on(site.module, site.amount):
        return type(site.module).forward(site.module, *inputs, **options)


def _at(site: Site) -> str:
    return f"the noise at module {site.name!r}"


def _in_modules(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "" if list(names) == [""] else f" in modules {', '.join(map(repr, names[:3]))}{more}"


def _warn(noise: str, why: str) -> None:
    warnings.warn(
        f"{noise} cannot be keyed: it {why}; its draws come from the global streams, so that candidates depend on how they are chunked",
        RuntimeWarning,
        stacklevel=4,
    )
