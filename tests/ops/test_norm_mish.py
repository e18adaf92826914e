"""ops.norm_mish: every backend against torch's own LayerNorm and Mish in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import cases
from tests.tolerances import ACTIVATIONS, assert_within
from ttcfast.ops import norm_mish
from ttcfast.ops.norm_mish import Gradients, Layer, fill_backward_cpu, fill_backward_reference, fill_backward_triton, fill_cpu

BACKWARD = {"reference": fill_backward_reference, "cpu": fill_backward_cpu, "triton": fill_backward_triton}

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = [(7,), (1, 8), (3, 17), (2, 5, 64), (70, 33), (5, 1), (0, 8), (2, 0, 3), (9, 512)]


def plain(x: Tensor, rows: Tensor | None, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same by torch's own functions."""
    total = x + bias if rows is None else x + rows + bias
    return F.mish(F.layer_norm(total, total.shape[-1:], scale, shift, 1e-5))


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, with_rows: bool) -> list[Tensor | None]:
    """x, rows, bias, scale, shift; normalised values reach from far below zero to beyond where Mish is the identity."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draw = [torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)]
    parameters = [torch.randn(shape[-1], dtype=torch.float64) for _ in range(3)]
    parameters[1] *= 6
    rows = draw[1].to(wide).to(device) if with_rows else None
    return [draw[0].to(dtype).to(device), rows, *(p.to(wide).to(device) for p in parameters)]


def doubled(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double().cpu().detach().requires_grad_() for t in tensors]


def usable(backend: str, dtype: torch.dtype) -> bool:
    """C++ takes no bfloat16; that it says so is tested below."""
    return not (backend == "cpu" and dtype == torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_rows", [False, True])
def test_agrees_with_torch_in_float64(backend, device, dtype, shape, with_rows):
    if not usable(backend, dtype):
        return
    given = problem(shape, dtype, device, with_rows)
    wide = doubled(given)
    expected = plain(*wide)
    leaves = [None if t is None else t.requires_grad_() for t in given]
    x, rows, bias, scale, shift = leaves
    found = norm_mish(x, bias, scale, shift, rows=rows, backend=backend)
    size = float(scale.abs().max().detach()) * shape[-1] ** 0.5
    assert found.dtype == dtype and found.shape == shape
    assert_within(found, expected, ACTIVATIONS[dtype], size)

    grad = torch.randn(shape, dtype=torch.float64)
    grad = grad.to(dtype).double()
    (expected * grad).sum().backward()
    found.backward(grad.to(dtype).to(device))
    for name, mine, true in zip(("x", "rows", "bias", "scale", "shift"), leaves, wide):
        if mine is not None:
            top = float(true.grad.abs().max()) if true.grad.numel() else 1.0
            assert_within(mine.grad, true.grad, ACTIVATIONS[dtype], max(size, top) * (4 if dtype != torch.bfloat16 else 400), name)


@pytest.mark.parametrize("width", [*cases.SMALL_SIZES, 1023, 1025])
def test_widths_around_lanes_and_blocks(backend, device, width):
    given = problem((3, width), torch.float32, device, True)
    x, rows, *rest = given
    found = norm_mish(x, *rest, rows=rows, backend=backend)
    assert_within(found, plain(*doubled(given)), ACTIVATIONS[torch.float32], 6 * width**0.5)


def test_far_values_of_mish(backend, device):
    """With scale 0 the normalised value is the shift: the activation alone, on its whole range."""
    shift = torch.tensor([-200, -90, -87.5, -30, -1e-3, 0, 1e-3, 1, 19.9, 20, 20.1, 80, 1e4], dtype=torch.float32)
    x = torch.randn(2, len(shift), device=device)
    found = norm_mish(x, torch.zeros_like(shift).to(device), torch.zeros_like(shift).to(device), shift.to(device), backend=backend)
    expected = shift.double() * torch.tanh(torch.log1p(shift.double().exp()))
    expected[-1] = 1e4
    torch.testing.assert_close(found.double().cpu(), expected.expand(2, -1), rtol=1e-6, atol=1e-36)


def test_a_bad_row_leaves_the_others_alone(backend, device):
    for bad in cases.NON_FINITE:
        x, _, bias, scale, shift = problem((5, 40), torch.float32, device, False)
        good = norm_mish(x, bias, scale, shift, backend=backend)
        x[2, 7] = float(bad)
        found = norm_mish(x, bias, scale, shift, backend=backend)
        assert bool(found[2].isnan().all())
        assert torch.equal(found[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


def test_rows_do_not_depend_on_their_company(backend, device):
    x, rows, bias, scale, shift = problem((70, 48), torch.float32, device, True)
    whole = norm_mish(x, bias, scale, shift, rows=rows, backend=backend)
    assert torch.equal(whole[33:41], norm_mish(x[33:41], bias, scale, shift, rows=rows[33:41], backend=backend))


def test_number_of_threads_changes_no_bit():
    x, rows, *parameters = problem((300, 512), torch.float32, "cpu", True)
    layer, grad, before, found = Layer(*parameters, 1e-5), torch.randn(300, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, stats = torch.empty_like(x), torch.empty(300, 2)
            fill_cpu(x, rows, layer, y, stats)
            gradients = Gradients(torch.empty_like(x), torch.empty_like(x), torch.empty(512), torch.empty(512))
            fill_backward_cpu(grad, x, rows, layer, stats, gradients)
            found.append([y, stats, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_fills_what_is_wanted_and_gives_the_result_again(backend, device, dtype):
    if not usable(backend, dtype):
        return
    x, rows, *parameters = problem((6, 24), dtype, device, True)
    y, stats = torch.ops.ttcfast.norm_mish(x, rows, *parameters, 1e-5, backend)
    grad, layer = torch.randn(6, 24).to(dtype).to(device), Layer(*parameters, 1e-5)
    full = Gradients(torch.empty_like(x), torch.empty_like(x), torch.empty_like(layer.scale), torch.empty_like(layer.scale))
    lean = Gradients(torch.empty_like(x))
    for wanted in (full, lean):
        BACKWARD[backend](grad, x, rows, layer, stats, wanted)
    assert_within(full.y, y, ACTIVATIONS[dtype], 20.0)
    assert torch.equal(lean.x, full.x)


def test_gradcheck(backend, device):
    x, rows, bias, scale, shift = (t.requires_grad_() for t in problem((3, 8), torch.float64, device, True))
    assert torch.autograd.gradcheck(lambda x, r, b, s, h: norm_mish(x, b, s, h, rows=r, backend=backend), (x, rows, bias, scale, shift))


def test_gradients_of_some_inputs_alone(backend, device):
    x, _, bias, scale, shift = problem((4, 16), torch.float32, device, False)
    for wanted in (x, bias, scale, shift):
        wanted.requires_grad_()
        norm_mish(x, bias, scale, shift, backend=backend).sum().backward()
        assert wanted.grad is not None and [t.grad is None for t in (x, bias, scale, shift)].count(False) == 1
        wanted.grad, _ = None, wanted.requires_grad_(False)


def test_strided_tensors_go_to_the_reference_unless_asked_for():
    given = problem((3, 12), torch.float64, "cpu", False)
    for view in cases.LAYOUTS.values():
        x, _, *rest = given
        torch.testing.assert_close(norm_mish(view(x), *rest), plain(*given))
    with pytest.raises(RuntimeError, match=r"strides \(1, 3\); call .contiguous\(\)"):
        norm_mish(given[0].T.contiguous().T, *given[2:], backend="cpu")


def test_opcheck_and_one_graph(backend, device):
    given = [t.requires_grad_() for t in problem((4, 16), torch.float32, device, True)]
    torch.library.opcheck(torch.ops.ttcfast.norm_mish.default, (*given, 1e-5, backend))
    y, stats = torch.ops.ttcfast.norm_mish(*(t.detach() for t in given), 1e-5, backend)
    backward = (torch.ones_like(y), *(t.detach() for t in given), 1e-5, stats, True, backend)
    torch.library.opcheck(torch.ops.ttcfast.norm_mish_backward.default, backward)
    torch._dynamo.reset()
    x, rows, *parameters = given

    def layer(x: Tensor) -> Tensor:
        return norm_mish(x, *parameters, rows=rows, backend=backend).sum()

    grads = [torch.autograd.grad(f(x), given) for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


X, P = torch.ones(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"bias is torch.float32 \(7,\) on cpu; x is torch.float32 \(3, 8\).*give torch.float32 \(8,\)", lambda: norm_mish(X, P[:7], P, P)),
        ("scale is torch.float64", lambda: norm_mish(X, P, P.double(), P)),
        ("shift is torch.bfloat16 .* so give torch.float32", lambda: norm_mish(X.bfloat16(), P, P, P.bfloat16())),
        (r"rows is torch.float32 \(2, 8\)", lambda: norm_mish(X, P, P, P, rows=X[:2])),
        ("bias is torch.float32 .* on meta", lambda: norm_mish(X, P.to("meta"), P, P)),
        ("x is torch.float16; give float32", lambda: norm_mish(X.half(), P, P, P)),
        (r"x has shape \(3, 0\)", lambda: norm_mish(X[:, :0], P[:0], P[:0], P[:0])),
        ("eps is -1", lambda: norm_mish(X, P, P, P, eps=-1.0)),
        ("the C\\+\\+ path takes float32 or float64", lambda: norm_mish(X.bfloat16(), P, P, P, backend="cpu")),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
