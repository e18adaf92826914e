"""What every operation must do with any arguments: give the reference's and numpy's answer, or say in one clear line what does not fit."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.draw import Draw, backends
from tests.tolerances import ACTIVATIONS, NOISE, NORMAL_ULPS, SQUARES, SUMS, UPDATES
from ttcfast import ops
from ttcfast.ops.closed_loop import closed_loop_ref
from ttcfast.ops.mlp_flow import VelocityMLP, mlp_flow_ref
from ttcfast.ops.registry import BackendError
from ttcfast.runtime.errors import UserError
from ttcfast.spec import ARMWeights, StateSpec

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
SPOILT = 0.3  # share of calls with an argument that does not fit
# What an error may name in place of the argument that was spoilt.
ALSO = {
    "key": ("seed", "step", "site"),
    "network": ("weights", "biases", "scales", "shifts"),
    "policy": ("weights", "biases", "scales", "shifts"),
    "spec": ("state",),
    "x": ("N",),
    "substeps": ("times",),
    "method": ("times",),
    "z": ("group",),
    "k1": ("slopes",),
    "k2": ("slopes",),
}
Call = Callable[..., Any]


class Wrong(AssertionError):
    """A result that differs, or an error that does not say which argument it means."""


def near(found: Tensor, expected: Tensor, allowed: Tensor | float, what: str) -> None:
    """NaN where NaN is expected, the same infinities, the rest within ``allowed``."""
    if found.shape != expected.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    same = (found.double() - expected.double()).abs() <= allowed
    same |= (found == expected) | (found.isnan() & expected.isnan())
    if not bool(same.all()):
        at = tuple(map(int, (~same).nonzero()[0]))
        raise Wrong(
            f"{what}: {float(found[at])!r} at {at}, expected {float(expected[at])!r}; {int((~same).sum())} of {same.numel()} differ"
        )


def same(found: Tensor, expected: Tensor, what: str) -> None:
    if found.dtype != expected.dtype:
        raise Wrong(f"{what}: {found.dtype}, not {expected.dtype}")
    near(found, expected, 0.0, what)


def answers(draw: Draw, op: str, call: Call, arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The name and the answer of every backend that takes the arguments; spoilt ones are refused, or taken, but clearly."""
    if draw.chance(SPOILT):
        refused(draw, op, call, arguments)
        return
    for name in backends(op):
        draw.machine()
        try:
            yield name, call(**arguments, backend=name)
        except BackendError:
            if name in ("auto", "reference"):
                raise


def refused(draw: Draw, op: str, call: Call, arguments: dict[str, Any]) -> None:
    backend = draw.one_of([*backends(op), "nonsense"])
    name, change = draw.spoilt(arguments)
    given: Any = None
    try:
        given = change(draw)
        call(**{**arguments, name: given}, backend=backend)
    except (ValueError, TypeError, UserError, RuntimeError) as error:
        text = str(error)
        # Torch's own check of a schema names the argument in several lines; what comes from the depths names none.
        ours = isinstance(error, (ValueError, TypeError, UserError)) and len(text.splitlines()) == 1
        named = re.search(rf"\b({'|'.join([name, 'backend', *ALSO.get(name, ())])})\b", text)
        if named is None or not (ours or f"for argument '{named[0]}'" in text):
            value = f"{given.dtype} {tuple(given.shape)} {given.layout}" if isinstance(given, Tensor) else repr(given)[:200]
            raise Wrong(f"{op} with {name} = {value} on {backend}: unclear {type(error).__name__}: {text[:300]}") from error


def topk(draw: Draw) -> None:
    dtype = draw.one_of([*FLOATS, torch.float16])
    rows, n = draw.size(9), draw.size(least=1)
    if draw.chance(0.02):
        rows, n = 1, draw.one_of([70_001, 1_050_000])
    scores = draw.tensor((rows, n), dtype)
    k = min(n, draw.one_of([1, 2, 3, n, draw.size(least=1), max(1, n // 3)]))
    ids = None
    if draw.chance(0.5):
        ids = draw.layout(torch.randint(-3, draw.one_of([4, 2**62]), (rows, n)))
    wide = scores.double().numpy()
    last = np.broadcast_to(np.arange(n), wide.shape) if ids is None else ids.numpy()
    order = np.lexsort((last, -np.nan_to_num(wide, nan=0.0, posinf=np.inf, neginf=-np.inf) + 0.0, np.isnan(wide)), axis=1)[:, :k]
    positions = torch.from_numpy(order.copy())
    expected = scores.gather(1, positions), positions if ids is None else ids.gather(1, positions)
    for name, found in answers(draw, "topk", ops.topk, {"scores": scores, "k": k, "ids": ids}):
        same(found[0], expected[0], f"values of {name}")
        same(found[1], expected[1], f"indices of {name}")


def normal(draw: Draw) -> None:
    shape, count = draw.shape(draw.one_of([0, 1, 2, 3])), draw.size(6)
    arguments = {
        "M": count,
        "shape": shape,
        "key": draw.key(),
        "rows": draw.rows(count),
        "dtype": draw.one_of(FLOATS),
        "antithetic": draw.chance(0.5),
    }
    expected = None
    for name, found in answers(draw, "normal", ops.normal, arguments):
        expected = found if expected is None else expected  # the reference comes first
        near(found, expected, normal_error(expected), name)


def normal_error(z: Tensor) -> Tensor:
    """What a backend's normals may be off by, and half a unit of bfloat16 where they are rounded to it."""
    ulps = z.double().abs() * 2.0**-23 * NORMAL_ULPS
    return ulps if z.dtype != torch.bfloat16 else ulps + z.double().abs() * 2.0**-7


def add_noise(draw: Draw) -> None:
    x, copies = (
        draw.tensor((draw.size(5), *draw.shape(draw.one_of([0, 1, 2, 3, 4, 5]), 5000)), draw.one_of(FLOATS)),
        draw.one_of([1, 2, 3, 7]),
    )
    sigma = draw.one_of([0.0, 1e-3, 1.0, 30.0, 1])
    arguments = {"x": x, "B": copies, "sigma": sigma, "key": draw.key(), "rows": draw.rows(len(x) * copies), "antithetic": draw.chance(0.5)}
    expected = None
    for name, found in answers(draw, "add_noise", ops.add_noise, arguments):
        expected = found if expected is None else expected
        size = expected.double().abs().nan_to_num(posinf=0.0, neginf=0.0)
        near(found, expected, 2 * NOISE[x.dtype].relative * (size + 7 * sigma) + sigma * 7 * NORMAL_ULPS * 2.0**-23, name)


def keyed_dropout(draw: Draw) -> None:
    x = draw.tensor((draw.size(5), *draw.shape(draw.one_of([0, 1, 2, 3, 4, 5]), 5000)), draw.one_of(FLOATS))
    p = draw.one_of([0.0, 0.1, 0.5, 0.999, 1 - 2**-33, 1 - 2**-53, 0])
    arguments = {"x": x, "p": p, "key": draw.key(), "rows": draw.rows(len(x)), "antithetic": draw.chance(0.5)}
    expected = None
    for name, found in answers(draw, "keyed_dropout", ops.keyed_dropout, arguments):
        expected = found if expected is None else expected
        same(found, expected, name)


def heun(draw: Draw) -> None:
    dtype, width = draw.one_of(FLOATS[:2]), draw.size(300)
    shape = () if draw.chance(0.05) else (*draw.shape(draw.one_of([0, 1, 2]), 3000), width)
    group = draw.one_of([d for d in (2, 3, 4, 8, 9, width) if width and width % d == 0 and shape] or [0]) if draw.chance(0.4) else 0
    slope = torch.bfloat16 if dtype == torch.float32 and draw.chance(0.2) else dtype
    names = ["z", "k1", "k2"][: draw.one_of([2, 3])]
    tame = bool(group) and draw.chance(0.7)
    tensors = {name: draw.tensor(shape, dtype if name == "z" else slope, tame=tame) for name in names}
    dt = draw.one_of([0.0, 0.5, -1.25, 1e-3])
    expected = None
    for name, found in answers(
        draw, "heun", ops.heun_correct if "k2" in names else ops.heun_predict, {**tensors, "dt": dt, "group": group}
    ):
        expected = found if expected is None else expected
        if group and not tame:  # means of numbers that cancel or overflow: the shape alone
            near(found.isnan() | ~found.isnan(), expected.isnan() | ~expected.isnan(), 0.0, name)
        elif group:
            size = sum(float(t.abs().max()) if t.numel() else 0.0 for t in tensors.values())
            near(found, expected, 4 * (UPDATES[dtype].relative + UPDATES[dtype].absolute) * size, name)
        else:
            same(found, expected, name)


def norm_mish(draw: Draw) -> None:
    dtype = draw.one_of(FLOATS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (*draw.shape(draw.one_of([0, 1, 2]), 500), draw.size(600, least=1))
    x = draw.tensor(shape, dtype, tame=True)
    rows = draw.tensor(shape, wide, tame=True) if draw.chance(0.5) else None
    parameters = {name: draw.tensor(shape[-1:], wide, tame=True) for name in ("bias", "scale", "shift")}
    given = {name: t for name, t in {"x": x, "rows": rows, **parameters}.items() if t is not None}
    exact = {name: t.double().detach().requires_grad_() for name, t in given.items()}
    total = exact["x"] + exact["bias"] + exact.get("rows", 0.0)
    level = torch.nn.functional.layer_norm(total, shape[-1:], exact["scale"], exact["shift"], 1e-5)
    expected = torch.nn.functional.mish(level)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    truth = torch.autograd.grad(expected, list(exact.values()), grad.double())
    spread = total.detach().var(-1, correction=0).add(1e-5).rsqrt().max() if total.numel() else 1.0
    size = float(1 + spread * total.detach().abs().amax() * exact["scale"].detach().abs().max()) if total.numel() else 1.0
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    for name, found in answers(draw, "norm_mish", ops.norm_mish, {**leaves, **({} if "rows" in leaves else {"rows": None})}):
        near(found, expected, ACTIVATIONS[dtype].relative * (2 * size + expected.detach().abs()), name)
        for which, mine, true in zip(given, torch.autograd.grad(found, list(leaves.values()), grad), truth):
            top = float(true.abs().max()) if true.numel() else 1.0
            loose = 2e-2 if dtype == torch.bfloat16 else 500 * ACTIVATIONS[dtype].relative
            near(mine, true, loose * (size**2 + top) * max(1, x.numel() // shape[-1]) ** 0.5, f"gradient of {which} by {name}")


def parameters(draw: Draw, dtype: torch.dtype, sets: tuple[int, ...], sizes: list[int]) -> tuple[list[Tensor], ...]:
    """Weights, biases, scales and shifts of a network; the biases of all its products."""

    def tensor(*shape: int) -> Tensor:
        return draw.tensor((*sets, *shape), dtype, tame=True) / shape[-1] ** 0.5

    weights, biases = [tensor(o, i) for i, o in itertools.pairwise(sizes)], [tensor(o) for o in sizes[1:]]
    return weights, biases, [tensor(o) for o in sizes[1:-1]], [tensor(o) for o in sizes[1:-1]]


def widths(draw: Draw) -> list[int]:
    return [draw.size(40, least=1) for _ in range(draw.one_of([1, 2, 3]))]


def doubles(network: Any) -> Any:
    return type(network)(*([t.double() for t in part] for part in network))


def loose(dtype: torch.dtype, expected: Tensor) -> float:
    """LayerNorm of equal numbers divides what is left of rounding by sqrt(eps)."""
    return (1e-2 if dtype == torch.float32 else 1e-8) * (1 + float(expected.abs().max()) if expected.numel() else 1.0)


def mlp_flow(draw: Draw) -> None:
    dtype, method = draw.one_of(FLOATS[:2]), draw.one_of(["heun", "euler", "map"])
    k = 1 if method == "map" else draw.one_of([1, 2, 3])
    sets, steps = draw.one_of([(), (), (1,), (3,)]), draw.one_of([(), (), (1,), (3,)])
    batch, d, hidden = draw.size(40), draw.size(40, least=1), widths(draw)
    weights, biases, *norms = parameters(draw, dtype, sets, [d, *hidden, d])
    network = VelocityMLP(weights, biases[1:], *norms)
    group = 0 if method == "map" else draw.one_of([0, d, 1])
    arguments: dict[str, Any] = {
        "z": draw.tensor((*sets, batch, d), dtype, tame=True) / d**0.5,
        "rows": draw.tensor((*steps, *sets, batch, hidden[0]), dtype, tame=True),
        "times": draw.tensor((*sets, k + (method == "heun"), hidden[0]), dtype, tame=True),
    }
    expected = mlp_flow_ref(*(t.double() for t in arguments.values()), doubles(network), method, k, group, 1e-5)
    arguments |= {"network": network, "method": method, "substeps": k, "group": group}
    for name, found in answers(draw, "mlp_flow", ops.mlp_flow, arguments):
        near(found, expected, loose(dtype, expected), name)


def mlp(draw: Draw) -> None:
    dtype, sets = draw.one_of(FLOATS[:2]), draw.one_of([(), (), (1,), (3,)])
    hidden, lead = widths(draw), (*draw.shape(draw.one_of([0, 1, 2]), 40), *sets, *draw.shape(1 if sets else draw.one_of([0, 1]), 40))
    sizes = [draw.size(40, least=1), *hidden, draw.size(40, least=1)]
    network = ops.MLP(*parameters(draw, dtype, sets, sizes))
    x = draw.tensor((*lead, sizes[0]), dtype, tame=True)
    rows = draw.tensor((*lead, hidden[0]), dtype, tame=True) if draw.chance(0.5) else None
    expected = x.double()
    for i, (weight, bias) in enumerate(zip(*doubles(network)[:2])):
        expected = expected @ weight.mT
        expected = expected + (bias.unsqueeze(-2) if sets else bias) + (0.0 if i or rows is None else rows.double())
        if i < len(hidden):
            scale, shift = (part[i].double().unsqueeze(-2) if sets else part[i].double() for part in network[2:])
            expected = torch.nn.functional.mish(torch.nn.functional.layer_norm(expected, expected.shape[-1:]) * scale + shift)
    given = {"x": x, "network": network, "rows": rows}
    for name, found in answers(draw, "mlp_flow", ops.mlp, given):
        near(found, expected, loose(dtype, expected), name)


def closed_loop(draw: Draw) -> None:
    """With the gradients of what may be trained, by the C++ loop and by the loop over operations."""
    dtype, method = draw.one_of(FLOATS[:2]), draw.one_of(["heun", "euler", "map"])
    k, sets, steps = 1 if method == "map" else draw.one_of([1, 2]), draw.one_of([(), (), (1,), (3,)]), draw.one_of([1, 2, 4])
    batch, d, a, hidden = draw.size(140), draw.size(40, least=1), draw.size(9, least=1), widths(draw)
    policy = ops.MLP(*parameters(draw, dtype, sets, [d, *widths(draw), a]))
    weights, biases, *norms = parameters(draw, dtype, sets, [d, *hidden, d])
    arguments: dict[str, Any] = {
        "z": draw.tensor((*sets, batch, d), dtype, tame=True),
        "offsets": draw.tensor((steps, *sets, batch, a), dtype, tame=True),
        "policy": policy,
        "weight": draw.tensor((*sets, hidden[0], a), dtype, tame=True),
        "times": draw.tensor((*sets, k + (method == "heun"), hidden[0]), dtype, tame=True),
        "network": VelocityMLP(weights, biases[1:], *norms),
    }
    group, detach = 0 if method == "map" else draw.one_of([0, d, 1]), draw.chance(0.3)
    exact = [doubles(t) if isinstance(t, tuple) else t.double() for t in arguments.values()]
    leaves = [exact[0], exact[1], *(t for part in exact[2] for t in part)]
    for t in leaves:
        t.requires_grad_()
    truth = closed_loop_ref(*exact, (method, k, group, 1e-5), 1e-5, detach)
    wanted = torch.autograd.grad(sum(t.sum() for t in truth), leaves, allow_unused=True)

    def call(backend: str, **given: Any) -> tuple[Tensor, Tensor]:
        return ops.closed_loop(**given)

    trained = [arguments["z"], arguments["offsets"], *(t for part in policy for t in part)]
    arguments |= {"method": method, "substeps": k, "group": group, "detach": detach}
    for name, found in answers(draw, "mlp_flow", call, arguments):
        for part, mine, true in zip(("states", "actions"), found, truth):
            near(mine, true.detach(), loose(dtype, true.detach()), f"{part} by {name}")
    if dtype == torch.float64:
        for t in trained:
            t.requires_grad_()
        found = torch.autograd.grad(sum(t.sum() for t in ops.closed_loop(**arguments)), trained, allow_unused=True)
        for mine, true in zip(found, wanted):
            if true is not None and mine is not None:
                near(mine, true, 1e-6 * (1 + float(true.abs().max()) if true.numel() else 1.0), "gradient")


def accumulate_moments(draw: Draw) -> None:
    grad_type = draw.one_of([*FLOATS, torch.float16])
    total_type = torch.float32 if grad_type.itemsize == 2 and draw.chance(0.5) else grad_type
    shapes = [draw.shape(draw.one_of([0, 1, 2, 3]), draw.one_of([50, 40_000])) for _ in range(draw.one_of([1, 2, 5, 40]))]
    zero = draw.chance(0.3)
    fresh = [draw.tensor(s, grad_type, expand=not zero) for s in shapes], [draw.tensor(s, total_type, expand=False) for s in shapes]
    with_totals = draw.chance(0.8)
    if draw.chance(0.2):
        return overlapping(draw, grad_type, zero)
    wide = np.concatenate([g.double().numpy().ravel() for g in fresh[0]])
    with np.errstate(all="ignore"):
        squares = torch.tensor(np.sum(wide * wide))
    sums = [t + g for t, g in zip(fresh[1], fresh[0])]

    def call(grads: Any, totals: Any, zero_grads: Any, backend: str) -> tuple[Tensor, Any, Any]:
        grads, totals = (
            [t.clone() if isinstance(t, Tensor) else t for t in part] if isinstance(part, list) else part for part in (grads, totals)
        )
        return ops.accumulate_moments(grads, totals, zero_grads=zero_grads, backend=backend), grads, totals

    arguments = {"grads": fresh[0], "totals": fresh[1] if with_totals else None, "zero_grads": zero}
    for name, (found, grads, totals) in answers(draw, "accumulate_moments", call, arguments):
        near(found, squares, SQUARES.relative * squares.abs().nan_to_num(posinf=0.0), f"squares by {name}")
        for i, expected in enumerate(sums if with_totals else []):
            same(totals[i], expected.to(total_type), f"totals[{i}] by {name}")
        for i, before in enumerate(fresh[0]):
            same(grads[i], torch.zeros_like(before) if zero else before, f"grads[{i}] by {name}")


def overlapping(draw: Draw, dtype: torch.dtype, zero: bool) -> None:
    """Views of one buffer: refused where two share an element, or where one that is written to shares its own; counted by hand."""
    flat = torch.arange(80, dtype=torch.float64).to(dtype)
    each: list[list[int]] = []  # places of the elements, of the totals and of the gradients

    def view(shape: tuple[int, ...]) -> Tensor:
        strides, start = [draw.one_of([0, 1, 2, 3, 7, 9]) for _ in shape], draw.random.randrange(30)
        each.append([start + sum(map(operator.mul, strides, index)) for index in np.ndindex(*shape)])
        return flat.as_strided(shape, strides, start)

    shapes = [draw.one_of([(2,), (4,), (2, 3), (1, 5), (0,)]) for _ in range(draw.one_of([1, 1, 2]))]
    totals, grads = [view(s) for s in shapes], [view(s) for s in shapes]
    written = each if zero else each[: len(totals)]
    shared = any(set(a) & set(b) for i, a in enumerate(each) for b in each[:i]) or any(len(set(e)) < len(e) for e in written)
    try:
        ops.accumulate_moments(grads, totals, zero_grads=zero)
    except ValueError as error:
        if not shared:
            raise Wrong(
                f"accumulate_moments refuses {[(t.shape, t.stride(), t.storage_offset()) for t in (*totals, *grads)]}: {error}"
            ) from error
    else:
        if shared:
            raise Wrong(f"accumulate_moments takes {[(t.shape, t.stride(), t.storage_offset()) for t in (*totals, *grads)]}, which overlap")


def arm(draw: Draw) -> None:
    dtype, ndim = draw.one_of(FLOATS), draw.one_of([1, 2, 3])
    space, n, b, parts = draw.shape(ndim, 3000, least=1), draw.size(3), draw.one_of([1, 2, 5, 9]), draw.one_of([1, 2, 3])
    velocity, tame = tuple(range(2, 2 + parts)), draw.chance(0.7)
    kind = draw.one_of(
        [
            {"density": 1, "momentum": velocity, "energy": 0},
            {"density": 0, "momentum": velocity, "energy": None, "pressure": 1, "variables": "primitive"},
        ]
    )
    changes: dict[str, Any] = {"cell_volume": draw.one_of([0.25, draw.tensor(space, torch.float32, tame=True).abs() + 0.1])}
    if draw.chance(0.5):
        changes["boundary_mask"] = draw.layout(torch.rand(space) < 0.3)
        changes["boundary_value"] = draw.one_of([0.5, torch.randn(3 + parts, *[1] * ndim)])
    if draw.chance(0.5):
        changes["gamma"] = draw.one_of([1.3, 1.2 + torch.rand(n)])
    spec = StateSpec(**kind, ndim=ndim, **changes)
    state = draw.tensor((n, 3 + parts, *space), dtype, tame=True).abs() + 0.1
    if spec.energy is not None:  # no pressure that is all rounding: the speed of sound has its square root
        kinetic = 0.5 * state[:, velocity].square().sum(1) / state[:, 1]
        state[:, 0] = torch.where((state[:, 0] - kinetic).abs() < 0.05 * state[:, 0], 1.2 * state[:, 0], state[:, 0])
    candidates = draw.tensor((n, b, 3 + parts, *space), dtype, tame=tame)
    options = {"momentum": draw.one_of(["sum", "components", "norm"]), "scale": draw.one_of(["absolute", "relative"])}
    truth = ops.arm(state.double(), candidates.double(), spec, ARMWeights(1, 0.5, 2, 0.3, 0.7), **options, backend="reference")
    top = float(candidates.double().nan_to_num(0, 0, 0).abs().max()) if n else 0.0
    volume = float(torch.as_tensor(spec.cell_volume).double().expand(space).sum())
    size = max(1.0, volume) * min(max(top, 1.0), 1e3) ** 3
    arguments = {"state": state, "candidates": candidates, "spec": spec, "weights": ARMWeights(1, 0.5, 2, 0.3, 0.7), **options}
    for name, found in answers(draw, "arm", ops.arm, arguments):
        same(found.finite, truth.finite, f"finite of {name}")
        for part in found._fields[:6] if top < 1e3 else ():
            expected = getattr(truth, part)
            near(
                getattr(found, part),
                expected,
                2 * (SUMS[dtype].absolute * size + SUMS[dtype].relative * expected.abs()),
                f"{part} of {name}",
            )
        if any(bool(t.isnan().any()) for t in found[:6]):
            raise Wrong(f"an output of {name} is NaN")


def arm_fields(draw: Draw) -> None:
    dtype, ndim, channels = draw.one_of(FLOATS), draw.one_of([1, 2, 3]), draw.one_of([1, 3, 5])
    space, n, b, tame = draw.shape(ndim, 3000, least=1), draw.size(3), draw.one_of([1, 2, 5, 9]), draw.chance(0.7)
    names = tuple("uvwxy"[:channels])
    changes: dict[str, Any] = {"cell_volume": draw.one_of([0.25, draw.tensor(space, torch.float32, tame=True).abs() + 0.1])}
    changes["conserved"] = draw.one_of(["all", (), {"first": names[0], "rest": names[1:]}] if channels > 1 else ["all", ()])
    changes["bounds"] = draw.one_of([{}, {names[0]: (-0.5, None)}, {names[0]: (0.1, 0.9), names[-1]: (None, -0.2)}]) if channels > 1 else {}
    if 1 < ndim <= channels and draw.chance(0.6):
        changes["divergence_free"] = names[:ndim]
    if draw.chance(0.5):
        changes["boundary_mask"] = draw.layout(torch.rand(space) < 0.3)
        changes["boundary_value"] = draw.one_of([0.5, torch.randn(channels, *[1] * ndim)])
    spec = StateSpec.fields(*names, ndim=ndim, periodic=tuple(draw.chance(0.5) for _ in range(ndim)), **changes)
    state, candidates = draw.tensor((n, channels, *space), dtype, tame=True), draw.tensor((n, b, channels, *space), dtype, tame=tame)
    options = {"momentum": draw.one_of(["sum", "components", "norm"]), "scale": draw.one_of(["absolute", "relative"])}
    truth = ops.arm(state.double(), candidates.double(), spec, **options, backend="reference")
    top = float(candidates.double().nan_to_num(0, 0, 0).abs().max()) if n else 0.0
    size = max(1.0, float(torch.as_tensor(spec.cell_volume).double().expand(space).sum())) * max(top, 1.0)
    for name, found in answers(draw, "arm_fields", ops.arm, {"state": state, "candidates": candidates, "spec": spec, **options}):
        same(found.finite, truth.finite, f"finite of {name}")
        # Relative penalties of a state that is all zero divide rounding by nothing.
        for part, expected in truth.terms.items() if top < 1e3 and (options["scale"] == "absolute" or bool(state.abs().sum() > 1)) else ():
            bound = 4 * (SUMS[dtype].absolute * size + SUMS[dtype].relative * expected.abs())
            near(found.terms[part], expected, bound, f"{part} of {name}")
        if any(bool(t.isnan().any()) for t in (found.score, *found.terms.values())):
            raise Wrong(f"an output of {name} is NaN")


OPS: dict[str, Callable[[Draw], None]] = {
    f.__name__: f
    for f in (arm, arm_fields, topk, normal, add_noise, keyed_dropout, heun, norm_mish, mlp_flow, mlp, closed_loop, accumulate_moments)
}
