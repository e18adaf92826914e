"""ops.mlp, and mlp_flow over several steps and for several networks: backends against the definition, in values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ttcfast.ops import MLP, VelocityMLP, mlp, mlp_flow, native
from ttcfast.ops.mlp_flow import mlp_flow_ref


def draws(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def network(sizes: tuple[int, ...], sets: tuple[int, ...] = (), seed: int = 0) -> MLP:
    draw, hidden = draws(seed), sizes[1:-1]
    weights = [draw(*sets, o, i) / i**0.5 for i, o in itertools.pairwise(sizes)]
    biases = [0.3 * draw(*sets, o) for o in sizes[1:]]
    return MLP(weights, biases, [1 + 0.3 * draw(*sets, u) for u in hidden], [0.3 * draw(*sets, u) for u in hidden])


def plain(x: Tensor, net: MLP) -> Tensor:
    for weight, bias, scale, shift in zip(net.weights, net.biases, net.scales, net.shifts):
        x = F.mish(F.layer_norm(F.linear(x, weight, bias), scale.shape, scale, shift))
    return F.linear(x, net.weights[-1], net.biases[-1])


def leaves(dtype: torch.dtype, device: str, *tensors: Tensor) -> list[Tensor]:
    return [t.to(dtype).to(device).detach().clone().requires_grad_() for t in tensors]


def rebuilt(flat: list[Tensor], like: MLP) -> MLP:
    found = iter(flat)
    return MLP(*([next(found) for _ in part] for part in like))


@pytest.mark.parametrize("sizes", [(3, 8, 2), (17, 40, 33, 101), (33, 16, 16, 16, 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 70, 300])
def test_is_the_network_written_out(backend, device, sizes, rows):
    if backend == "triton" and rows > 7:
        pytest.skip("interpreted")
    net, x = network(sizes), draws(1)(rows, sizes[0])
    flat = [t for part in net for t in part]
    results = []
    for run, where in ((lambda x, net: mlp(x, net, backend=backend), device), (plain, "cpu")):
        x_, *flat_ = leaves(torch.float64, where, x, *flat)
        y = run(x_, rebuilt(flat_, net))
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(where)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x_, *flat_])])
    for found, expected in zip(*results):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-11)


def test_leading_axes_rows_and_no_gradient():
    net, draw = network((5, 9, 4)), draws(2)
    x, rows = draw(3, 6, 5), draw(3, 6, 9)
    expected = plain(
        torch.cat([x, rows], -1), net._replace(weights=[torch.cat([net.weights[0], torch.eye(9).double()], 1), net.weights[1]])
    )
    torch.testing.assert_close(mlp(x, net, rows=rows), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mlp(x[0, 0], net), plain(x[0, 0], net), rtol=1e-12, atol=1e-13)


def test_several_networks_are_each_their_own_also_as_parts_of_wider_tensors():
    draw = draws(6)
    alone = [network((5, 9, 7, 4), seed=seed) for seed in range(3)]
    wide = torch.stack([torch.cat([t.flatten() for part in net for t in part]) for net in alone])  # every parameter is a part of a row
    shapes = [t.shape for part in alone[0] for t in part]
    parts = [t.unflatten(1, shape) for t, shape in zip(wide.split([s.numel() for s in shapes], 1), shapes)]
    x = draw(2, 3, 6, 5)
    found = mlp(x, rebuilt(parts, alone[0]))
    assert found.shape == (2, 3, 6, 4)
    for i, net in enumerate(alone):
        assert torch.equal(found[:, i], mlp(x[:, i], net))
        torch.testing.assert_close(found[:, i], plain(x[:, i], net), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("sets", [(), (2,)])
@pytest.mark.parametrize(("method", "substeps"), [("heun", 2), ("euler", 2), ("map", 1)])
def test_steps_and_sets_agree_with_the_definition(backend, device, method, substeps, sets, steps, trained):
    b, d, widths = (5, 6, (12, 7)) if backend == "triton" else (70, 6, (40, 33))
    draw, net = draws(3), network((d, *widths, d), sets)
    group, count = 0 if method == "map" else 3, substeps + (method == "heun")
    over = () if steps is None else (steps,)
    state = [draw(*sets, b, d), draw(*over, *sets, b, widths[0])]
    parameters = [draw(*sets, count, widths[0]), *net.weights, *net.biases[1:], *net.scales, *net.shifts]
    results = []
    for ref in (False, True):
        where = "cpu" if ref else device
        z, rows, *rest = leaves(torch.float64, where, *state, *parameters)
        times, *flat = rest if trained else [t.detach() for t in rest]
        n = len(widths)
        parts = VelocityMLP(flat[: n + 1], flat[n + 1 : 2 * n + 1], flat[2 * n + 1 : 3 * n + 1], flat[3 * n + 1 :])
        if ref:
            y = mlp_flow_ref(z, rows, times, parts, method, substeps, group, 1e-5)
        else:
            y = mlp_flow(z, rows, times, parts, method=method, substeps=substeps, group=group, backend=backend)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(where)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [z, rows, *(rest if trained else ())])])
    assert results[0][0].shape == (*over, *sets, b, d)
    for found, expected in zip(*results):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(native.available() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_instruction_sets_threads_and_company_change_no_bit(dtype, monkeypatch):
    net, draw = network((17, 48, 33, 16)), draws(4)
    flat, x = [t for part in net for t in part], draw(200, 17)

    def run(rows: int = 200) -> list[Tensor]:
        x_, *flat_ = leaves(dtype, "cpu", x[:rows], *flat)
        y = mlp(x_, rebuilt(flat_, net))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x_, *flat_])]

    expected = run()
    assert torch.equal(run(133)[0], expected[0][:133]) and torch.equal(run(133)[1], expected[1][:133])
    before = torch.get_num_threads()
    try:
        for level in range(len(native.module().cpu_levels)):
            monkeypatch.setattr(native, "highest_level", level)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(run(), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(native.available() is not None, reason="needs the compiled extension")
def test_wide_networks_take_torchs_products():
    net, x = network((4, 300, 2)), draws(5)(6, 4)
    torch.testing.assert_close(mlp(x, net), plain(x, net), rtol=1e-12, atol=1e-12)
    with torch.profiler.profile() as profile:
        mlp(x, net)
    assert {"aten::bmm", "aten::baddbmm"} <= {event.key for event in profile.key_averages()}


ONE, SEVERAL = ([torch.ones(*sets, 9, 4).double(), torch.ones(*sets, 4, 9).double()] for sets in ((), (2,)))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (
            r"x is torch.float64 \(6, 4\) on cpu and weights\[0\] torch.float64 \(9, 5\)",
            {"weights": [torch.ones(9, 5).double(), torch.ones(4, 9).double()]},
        ),
        (r"biases\[1\] is torch.float64 \(5,\) on cpu and weights\[1\]", {"biases": [torch.ones(9).double(), torch.ones(5).double()]}),
        (r"biases\[0\] is torch.float64 \(\)", {"biases": [torch.tensor(1.0).double(), torch.ones(4).double()]}),
        ("1 weights, 2 biases, 1 scales, 1 shifts; give n . 1 weights and biases", {"weights": [torch.ones(9, 4).double()]}),
        ("network has 2 weights, 2 biases, 2 scales", {"scales": [torch.ones(9).double()] * 2}),
        ("the weights have 2, 3 axes", {"weights": [ONE[0], SEVERAL[1]], "biases": [ONE[0][:, 0], SEVERAL[1][..., 0]]}),
        (r"x has shape \(6, 4\); give \[..., S, B, I\] for several", {"weights": SEVERAL, "biases": [t[..., 0] for t in SEVERAL]}),
    ],
)
def test_what_does_not_fit_is_told(message, changes):
    with pytest.raises(ValueError, match=message):
        mlp(torch.ones(6, 4).double(), network((4, 9, 4))._replace(**changes))


def test_steps_that_do_not_fit_are_told():
    net = network((4, 9, 4))
    parts = VelocityMLP(net.weights, net.biases[1:], net.scales, net.shifts)
    z, times = torch.ones(6, 4).double(), torch.ones(3, 9).double()
    for rows, message in ((torch.ones(0, 6, 9), "rows has no step"), (torch.ones(9), "rows has 1 axes and z 2")):
        with pytest.raises(ValueError, match=message):
            mlp_flow(z, rows.double(), times, parts)
    with pytest.raises(ValueError, match="with method='map' give 1 and 0"):
        mlp_flow(z, torch.ones(6, 9).double(), times, parts, method="map")
    with pytest.raises(ValueError, match=r"gives 3; give as many"):
        wide = parts._replace(weights=[net.weights[0], torch.ones(3, 9).double()], biases=[torch.ones(3).double()])
        mlp_flow(z, torch.ones(6, 9).double(), times, wide)
