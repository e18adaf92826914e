"""Operations under torch.autocast: they take what mixed precision hands them, in the precision that their docstrings name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ttcfast import ops
from ttcfast.ops import VelocityMLP
from ttcfast.spec import Key, StateSpec

HALVES = (torch.bfloat16, torch.float16)
ROWS = torch.tensor([[0, 0], [0, 1], [0, 2]])
SPEC, KEY = StateSpec.euler2d(), Key(3)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def draw(*shape: int) -> Tensor:
    """Numbers that 16 bits hold exactly, so that a cast loses nothing."""
    return torch.randint(1, 16, shape).float() / 8


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_vector_updates_are_made_in_float32(half):
    z, k1, k2 = draw(3, 8), draw(3, 8), draw(3, 8)
    expected = ops.heun_correct(z, k1, k2, 0.3, group=4), ops.heun_predict(z, k1, 0.3)
    for of_z, of_k1, of_k2 in [(torch.float32, half, half), (half, half, torch.float32), (half, torch.float32, half)]:
        with autocast(half):
            found = (
                ops.heun_correct(z.to(of_z), k1.to(of_k1), k2.to(of_k2), 0.3, group=4),
                ops.heun_predict(z.to(of_z), k1.to(of_k1), 0.3),
            )
        for f, e in zip(found, expected):
            assert f.dtype == torch.float32 and torch.equal(f, e)
    with autocast(half):
        assert torch.equal(ops.heun_predict(z.double(), k1.to(half), 0.3), ops.heun_predict(z.double(), k1.double(), 0.3))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_norm_mish_keeps_the_dtype_of_x_and_computes_in_float32(half):
    x, rows, bias, scale, shift = draw(3, 8), draw(3, 8), draw(8), draw(8), draw(8)
    exact = ops.norm_mish(x, bias, scale, shift, rows=rows)
    with autocast(half):
        wide = ops.norm_mish(x, bias, scale.to(half), shift, rows=rows.to(half))
        narrow = ops.norm_mish(x.to(half), bias.to(half), scale, shift.to(half), rows=rows)
    assert wide.dtype == torch.float32 and torch.equal(wide, exact)
    assert narrow.dtype == half
    torch.testing.assert_close(narrow, exact.to(half), rtol=2**-7, atol=1e-6)  # one rounding: bfloat16's last place


def network(width: int = 8, hidden: int = 12) -> tuple[list[Tensor], VelocityMLP]:
    weights = [(draw(hidden, width) - 1) / 4, (draw(width, hidden) - 1) / 4]
    return [draw(3, width), draw(3, hidden), draw(3, hidden)], VelocityMLP(weights, [draw(width)], [draw(hidden)], [draw(hidden)])


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_mlp_flow_has_products_in_bfloat16_and_the_rest_in_float32(method):
    (z, rows, times), parameters = network()
    times = times[: 2 + (method == "heun")]
    expected = ops.mlp_flow(z, rows, times, parameters, method=method, group=4, matmul_dtype=torch.bfloat16)
    for of_z, of_rows in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        with autocast(torch.bfloat16):
            found = ops.mlp_flow(z.to(of_z), rows.to(of_rows), times, parameters, method=method, group=4)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    with autocast(torch.float16):  # no backend has products in float16: float32 is at least as exact
        found = ops.mlp_flow(z.half(), rows, times.half(), parameters, method=method, group=4)
    assert torch.equal(found, ops.mlp_flow(z, rows, times, parameters, method=method, group=4))
    wide = VelocityMLP(*([t.double() for t in part] for part in parameters))
    with autocast(torch.bfloat16):
        found = ops.mlp_flow(z.double(), rows.double(), times.double(), wide, method=method)
    assert torch.equal(found, ops.mlp_flow(z.double(), rows.double(), times.double(), wide, method=method))


def test_gradients_reach_every_tensor_in_its_own_dtype():
    (z, rows, times), parameters = network()
    leaves = [z, rows.bfloat16(), times, *(t for part in parameters for t in part)]
    given = [t.clone().requires_grad_() for t in leaves]
    with autocast(torch.bfloat16):
        found = ops.mlp_flow(*given[:3], VelocityMLP(given[3:5], given[5:6], given[6:7], given[7:8]), group=4)
        inside = torch.autograd.grad(found.square().sum(), given, retain_graph=True)
    outside = torch.autograd.grad(found.square().sum(), given)
    exact = [t.double().requires_grad_() for t in leaves]
    result = ops.mlp_flow(*exact[:3], VelocityMLP(exact[3:5], exact[5:6], exact[6:7], exact[7:8]), group=4)
    for a, b, e, t in zip(inside, outside, torch.autograd.grad(result.square().sum(), exact), given):
        assert a.dtype == t.dtype and torch.equal(a, b)
        assert (a.double() - e).norm() < 0.03 * e.norm()


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_arm_widens_unlike_states(half):
    state, candidates = draw(1, 4, 4, 4), draw(1, 2, 4, 4, 4)
    expected = ops.arm(state, candidates, SPEC)
    for given in [(state, candidates.to(half)), (state.to(half), candidates), (state.to(half), candidates.to(half))]:
        with autocast(half):
            found = ops.arm(*given, SPEC)
        assert found.score.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_keyed_operations_and_selections_keep_the_dtype_of_x(dtype):
    x = draw(3, 20).to(dtype)
    calls = {
        "keyed_dropout": lambda x: ops.keyed_dropout(x, 0.5, key=KEY, rows=ROWS),
        "add_noise": lambda x: ops.add_noise(x, 1, 0.5, key=KEY, rows=ROWS),
        "topk": lambda x: ops.topk(x, 3)[0],
    }
    for name, call in calls.items():
        with autocast(torch.bfloat16):
            found = call(x)
        expected = call(x.float() if dtype == torch.float16 and name != "topk" else x)
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype)), name
    with autocast(torch.bfloat16):
        normals = ops.normal(3, (5,), key=KEY, rows=ROWS)
        totals = [torch.zeros(20)]
        squares = ops.accumulate_moments([x[0]], totals if dtype != torch.float64 else [totals[0].double()])
    assert torch.equal(normals, ops.normal(3, (5,), key=KEY, rows=ROWS))
    assert squares.dtype == torch.float64 and torch.equal(squares, x[0].double().square().sum())


def test_compiled_code_sees_the_same():
    (z, rows, times), parameters = network()

    def run(z: Tensor, rows: Tensor) -> Tensor:
        with autocast(torch.bfloat16):
            k = ops.mlp_flow(z, rows, times, parameters)
            return ops.heun_predict(k, torch.nn.functional.linear(k, parameters.weights[0][:8]), 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, rows), run(z, rows))
