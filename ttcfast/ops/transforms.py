"""Makes operations work under autocast, function transforms, forward mode and higher derivatives.

An operation has fast implementations and a custom gradient, both opaque to torch. Transformed calls therefore evaluate the operation's
definition, which consists of torch's own functions, so that torch handles every transform and every nesting of them:

* ``torch.func`` (``jvp``, ``jacfwd``, ``linearize``, ``grad``, ``vjp``, ``jacrev``, ``hessian``, ``vmap``), compiled or not;
* ``torch.autograd.forward_ad``, if an argument has a tangent (inductor loses those of torch's own functions, pytorch#187284);
* a backward pass with ``create_graph=True``, with ``is_grads_batched=True``, or of a gradient that has a tangent.

These run at the speed of the definition. In the first two, a backend requested by name raises, ``TTCFAST_BACKEND`` has no effect, and
values in host memory that only an implementation checks (rows of keyed operations) are not checked.

Under ``torch.autocast`` an operation computes in the precision that its docstring names, with autocast disabled inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .registry import BackendError

AUTOCAST_DEVICES = ("cpu", "cuda")  # keys for which operations have implementations

# Functions called from code that torch.compile leaves eager may be compiled themselves, which loses tangents. (torch.compiler.disable has
# the same effect, but imports the compiler with this package.)
_torch: Any = torch
eagerly: Callable[[Callable[..., Any]], Callable[..., Any]] = _torch._disable_dynamo
_unpack_dual: Any = forward_ad.unpack_dual  # has no annotations

functorch = torch._C._functorch

Policy = Callable[..., Any]  # called with the operation and its arguments; returns a call with arguments suited to mixed precision


def plainly(op: Callable[..., Any], *args: Any) -> Any:
    """The policy of an operation that ignores autocast: arguments are unchanged."""
    return op(*args)


def wider(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of mixed-precision computation: float64 if one of the tensors has it, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def halves_as_floats(op: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """The policy of an operation without float16 support, which autocast may pass it: float32 inside, the result in float16 again."""
    return op(x.float(), *rest).to(x.dtype) if x.dtype == torch.float16 else op(x, *rest)


def register(
    library: Any,
    op: str,
    definition: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    policy: Policy = plainly,
) -> None:
    """Register how an operation behaves under autocast, function transforms and differentiation.

    Args:
        library: Library that defines the operation.
        op: Name of the operation, with ``.overload`` if it has several. Its last argument is the backend.
        definition: Computes the results from all arguments but the backend in torch's own functions, or raises if no transform is
            possible.
        backward: Gradient, as for ``torch.library.register_autograd``; None for an operation without one.
        setup_context: Saves the tensors that ``backward`` needs, likewise.
        policy: Prepares the arguments under autocast.
    """
    name, _, overload = op.partition(".")
    opaque = getattr(getattr(torch.ops.ttcfast, name), overload or "default")

    def defined(*args: Any) -> Any:
        if args[-1] not in ("auto", "reference"):
            raise BackendError(
                f"{name}: backend {args[-1]!r} cannot run under torch.func or with forward-mode tangents; give 'auto' or 'reference', "
                "which take the operation's definition in torch's own functions there"
            )
        return definition(*args[:-1])

    def transformed(*args: Any) -> Any:
        device = next((x.device.type for x in args if isinstance(x, Tensor)), None)
        if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return policy(defined, *args)
        return defined(*args)

    def autocast(device: str, *args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return policy(opaque, *args)

    # torch.func's layers look at this key first, so they see the definition's functions and never the operation.
    library.impl(op, transformed, "FuncTorchDynamicLayerFrontMode")
    for device in AUTOCAST_DEVICES:
        library.impl(op, partial(autocast, device), f"Autocast{device.upper()}")
    if backward is not None:
        # The result of register_autograd, called when there is no tangent.
        info = torch._library.autograd.Info(backward, setup_context)
        reverse = torch._library.autograd.make_autograd_impl(opaque, info)

        dual = eagerly(defined)

        def differentiable(keyset: Any, *args: Any) -> Any:
            return dual(*args) if has_tangent(args) else reverse(keyset, *args)

        library.impl(op, differentiable, "Autograd", with_keyset=True)


def immediate(*tensors: Tensor) -> bool:
    """Tell whether a call of these may go past torch's dispatcher: all are plain dense tensors, and nothing traces or transforms it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return False
    device = "cpu"
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided:
            return False
        device = t.device.type
    return device in AUTOCAST_DEVICES and not torch.is_autocast_enabled(device)


_TENSORS: set[type] = {Tensor, torch.nn.Parameter}
_LOOKED_AT = {*_TENSORS, list, tuple}
_SCALARS: dict[str, type] = {"float": float, "bool": bool, "int": int, "SymInt": int, "str": str, "ScalarType": torch.dtype}


class Kinds:
    """The types of each argument of a schema that torch's dispatcher would pass on as they are, and those of a list's items."""

    def __init__(self, schema: str) -> None:
        self._wanted: list[tuple[set[Any], set[Any]]] = []
        self._known: dict[tuple[type, ...], list[tuple[int, set[Any] | None]]] = {}
        for argument in _torch._C.parse_schema(f"ttcfast::{schema}").arguments:
            kind = str(argument.real_type)
            inner = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
            several = inner.startswith("List[")
            item = inner.removeprefix("List[").removesuffix("]") if several else inner
            items = _TENSORS if item == "Tensor" else {_SCALARS.get(item, object)}
            types = {list, tuple} if several else items
            self._wanted.append((types | {type(None)} if inner != kind else types, items))

    def to_look_at(self, args: Sequence[Any]) -> list[tuple[int, set[Any] | None]] | None:
        """Return the positions of tensors, with None, and of lists, with their items' types; None if an argument's type is another."""
        types = tuple(map(type, args))
        found = self._known.get(types)  # a call's types are those of the last one
        if found is None and len(types) == len(self._wanted) and all(kind in wanted for kind, (wanted, _) in zip(types, self._wanted)):
            places = [(at, None if kind in _TENSORS else items) for at, (kind, (_, items)) in enumerate(zip(types, self._wanted))]
            found = self._known[types] = [(at, items) for at, items in places if types[at] in _LOOKED_AT]
        return found


_include, _exclude = _torch._C._dispatch_tls_local_include_set, _torch._C._dispatch_tls_local_exclude_set
_keys_of = _torch._C._dispatch_keys


def _dispatch_state() -> tuple[int, int]:
    return _include().raw_repr(), _exclude().raw_repr()


def _plain_keys() -> tuple[set[tuple[int, int]], set[int]]:
    """Return the states of the dispatcher without modes, and the keys of dense host tensors that hold their own values."""
    states, keys = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            states.add(_dispatch_state())
            keys.add(_keys_of(torch.empty(0, device="cpu")).raw_repr())
    return states, keys


_PLAIN_STATES, _PLAIN_KEYS = _plain_keys()


def plain(args: Sequence[Any], kinds: Kinds) -> bool:
    """Tell whether torch's dispatcher would only pass these arguments, of these kinds, on to the CPU's implementation.

    False under torch.compile and every other tracer, function transform, mode, autocast and profiler, with gradients or tangents, for
    subclasses and lazily negated tensors, and for scalars that a schema would convert.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _torch._C._len_torch_function_stack():
        return False
    if _dispatch_state() not in _PLAIN_STATES or _torch._C._autograd._profiler_enabled():
        return False
    places = kinds.to_look_at(args)
    if places is None:
        return False
    grad = torch.is_grad_enabled()
    for at, items in places:
        if items is None:
            if not _own_values(args[at], grad):
                return False
        elif not items.issuperset(map(type, args[at])) or (items is _TENSORS and not all(_own_values(x, grad) for x in args[at])):
            return False
    return True


def _own_values(x: Tensor, grad: bool) -> bool:
    return not (grad and x.requires_grad) and _keys_of(x).raw_repr() in _PLAIN_KEYS


def has_tangent(args: Sequence[Any]) -> bool:
    """Tell whether a tensor among the arguments, or in a list among them, is dual in the sense of ``torch.autograd.forward_ad``."""
    return forward_ad._current_level >= 0 and bool(_any_dual(args))


@eagerly
def _any_dual(args: Sequence[Any]) -> bool:
    for x in args:
        if isinstance(x, Tensor):
            if x.is_floating_point() and _unpack_dual(x).tangent is not None:
                return True
        elif isinstance(x, (list, tuple)) and _any_dual(x):
            return True
    return False


def watched(grads: Sequence[Tensor | None]) -> bool:
    """Tell whether a backward pass of ``grads`` is itself transformed: differentiated, or run for many gradients at once."""
    batched = any(g is not None and (functorch.is_functorch_wrapped_tensor(g) or functorch.is_legacy_batchedtensor(g)) for g in grads)
    return batched or torch.is_grad_enabled() or has_tangent(grads)


def gradients(function: Callable[..., Any], tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the differentiable gradients of ``function(*tensors)`` with respect to the tensors that require one.

    Args:
        function: Definition, called with only the tensors.
        tensors: Arguments of ``function``.
        grads: Gradients of its first results; None for a result without one.
    """
    with torch.enable_grad():
        # Views, since one argument may depend on another: each gradient is with respect to that argument alone.
        places = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        results = function(*places)
        pairs = [(r, g) for r, g in zip(results, grads) if g is not None and r.requires_grad]
        wanted = [t for t in places if t is not None and t.requires_grad]
        kept, of_kept = [r for r, _ in pairs], [g for _, g in pairs]
        found = iter(torch.autograd.grad(kept, wanted, of_kept, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in places]


def refuse(op: str) -> Callable[..., Any]:
    """Return a definition that raises for operations that cannot be transformed."""

    def definition(*_: Any) -> Any:
        raise NotImplementedError(
            f"{op} cannot be differentiated, nor transformed by torch.func; call it outside of the transform, on detached tensors"
        )

    return definition


def constant(name: str, value: Any) -> None:
    """Raise ``ValueError`` for a constant argument that requires a gradient, which torch would silently ignore."""
    if not isinstance(value, Tensor):
        return
    lost = value.requires_grad or has_tangent([value])
    while functorch.is_functorch_wrapped_tensor(value) and not lost:
        lost, value = functorch.is_gradtrackingtensor(value), functorch.get_unwrapped(value)
    if lost:
        raise ValueError(
            f"{name} is a tensor to be differentiated, and the operation is not differentiable in it; detach() it, "
            "or write the expression in torch's own functions"
        )
