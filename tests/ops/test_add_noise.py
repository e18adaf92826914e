"""ops.add_noise: x + sigma * normal to one rounding, on every backend, dtype and layout; its gradient; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.ops.philox_words import interpreted
from tests.ops.test_keyed import DTYPES
from tests.tolerances import NOISE, assert_within
from ttcfast.ops import add_noise, keyed, normal
from ttcfast.spec import Key

KEY = Key(21, 22, 23)


def rows_of(problems: int, candidates: int, device: str = "cpu") -> Tensor:
    """Problem-major (problem, candidate), neither starting at 0."""
    pairs = [(n + 5, b + 1) for n in range(problems) for b in range(candidates)]
    return torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space", [(1,), (7,), (33, 32), (3, 1, 4)], ids=str)
def test_is_x_plus_sigma_times_normal(backend, device, dtype, space):
    if interpreted(backend, device) and len(space) == 2:
        return  # twenty tiles; the sizes around a tile are tried below
    b = 2 if interpreted(backend, device) else 5
    x, rows = torch.randn(2, 3, *space, device=device).to(dtype), rows_of(2, b, device)
    z = normal(2 * b, (3, *space), key=KEY, rows=rows, antithetic=True, dtype=torch.float64, backend=backend).reshape(2, b, 3, *space)
    for sigma in (0.3,) if interpreted(backend, device) else (1e-3, 0.3):
        found = add_noise(x, b, sigma, key=KEY, rows=rows, antithetic=True, backend=backend)
        assert found.shape == (2, b, 3, *space) and found.dtype == dtype and found.is_contiguous()
        assert_within(found, x.unsqueeze(1).double() + sigma * z, NOISE[dtype], size=8)


@pytest.mark.parametrize("channels", [*cases.SMALL_SIZES, *cases.TILE_EDGES])
def test_sizes_around_lanes_and_tiles(backend, device, channels):
    if interpreted(backend, device) and channels in cases.SMALL_SIZES[1:]:
        return  # the masks of keyed_dropout go through all of them
    x, rows = torch.randn(1, channels, device=device), rows_of(1, 2, device)
    z = normal(2, (channels,), key=KEY, rows=rows, dtype=torch.float64, backend=backend).unsqueeze(0)
    assert_within(
        add_noise(x, 2, 0.5, key=KEY, rows=rows, backend=backend), x.unsqueeze(1).double() + 0.5 * z, NOISE[torch.float32], size=8
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_in_memory_changes_no_bit(backend, device, dtype, layout):
    view, few = cases.LAYOUTS[layout], interpreted(backend, device)
    if few and dtype != DTYPES[len(layout) % 3]:
        return  # strides are the same business for every dtype
    shapes = [(2, 3, 4, 5)] if few else [(2, 3, 1100), (2, 3, 4, 5), (2, 3, 4, 5, 6)]
    for shape in shapes:
        x, rows = torch.randn(shape, device=device).to(dtype), rows_of(2, 2, device)
        expected = add_noise(x, 2, 0.1, key=KEY, rows=rows, backend=backend)
        assert torch.equal(add_noise(view(x), 2, 0.1, key=KEY, rows=rows, backend=backend), expected)


def test_more_scattered_axes_than_three(backend, device):
    x = torch.randn(2, 3, 4, 5, 6, device=device).permute(0, 4, 2, 3, 1)[:, ::2, ::2, ::2]
    x = x.unsqueeze(2).expand(-1, -1, 2, -1, -1, -1)
    assert len(keyed.grid(x)[1]) == 3
    rows = rows_of(2, 2, device)
    expected = add_noise(x.contiguous(), 2, 0.1, key=KEY, rows=rows, backend=backend)
    assert torch.equal(add_noise(x, 2, 0.1, key=KEY, rows=rows, backend=backend), expected)


def test_no_noise_gives_copies(backend, device):
    x, rows = torch.randn(2, 3, 4, device=device), rows_of(2, 3, device)
    assert torch.equal(add_noise(x, 3, 0.0, key=KEY, rows=rows, backend=backend), x.unsqueeze(1).expand(-1, 3, -1, -1))


def test_values_that_are_not_finite_stay_where_they_are(backend, device):
    x, rows = torch.zeros(1, 1, 40, device=device), rows_of(1, 2, device)
    x[0, 0, 3], x[0, 0, 17], x[0, 0, 39] = float("inf"), float("-inf"), float("nan")
    for dtype in DTYPES:
        found = add_noise(x.to(dtype), 2, 0.1, key=KEY, rows=rows, backend=backend)
        wanted = x.to(dtype).unsqueeze(1).expand_as(found)
        assert torch.equal(found.isfinite(), wanted.isfinite()) and torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found[..., 3], wanted[..., 3]) and torch.equal(found[..., 17], wanted[..., 17])


def test_chunks_and_order_change_no_bit(backend, device):
    b = 6 if interpreted(backend, device) else 12
    x, rows = torch.randn(3, 2, 11, device=device), rows_of(3, b, device)
    whole = add_noise(x, b, 0.2, key=KEY, rows=rows, antithetic=True, backend=backend)
    pairs = rows.reshape(3, b, 2)
    for size in (5,) if b == 6 else (1, 5, 12):
        parts = [
            add_noise(x, part.shape[1], 0.2, key=KEY, rows=part.reshape(-1, 2), antithetic=True, backend=backend)
            for part in pairs.split(size, 1)
        ]
        assert torch.equal(torch.cat(parts, 1), whole)
    order = torch.tensor([2, 0, 1], device=device)
    permuted = add_noise(x[order], b, 0.2, key=KEY, rows=pairs[order].reshape(-1, 2), antithetic=True, backend=backend)
    assert torch.equal(permuted, whole[order])


def test_no_problems_and_no_cells(backend, device):
    assert add_noise(torch.ones(0, 2, 3, device=device), 4, 0.1, key=KEY, rows=rows_of(0, 4, device), backend=backend).shape == (0, 4, 2, 3)
    assert add_noise(torch.ones(2, 0, 3, device=device), 4, 0.1, key=KEY, rows=rows_of(2, 4, device), backend=backend).shape == (2, 4, 0, 3)


def test_gradient_is_the_sum_over_candidates(backend, device):
    rows = rows_of(2, 3, device)
    for dtype in DTYPES[2:] if interpreted(backend, device) else DTYPES:
        x = torch.randn(2, 2, 5, device=device).to(dtype).requires_grad_()
        weight = torch.randn(2, 3, 2, 5, device=device).to(dtype)
        add_noise(x, 3, 0.1, key=KEY, rows=rows, backend=backend).backward(weight)
        assert x.grad is not None and torch.equal(x.grad, weight.sum(1))
    if interpreted(backend, device):
        return  # dozens of calls
    x = torch.randn(2, 2, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: add_noise(x, 3, 0.1, key=KEY, rows=rows, backend=backend), (x,))


def test_opcheck(backend, device):
    for dtype in DTYPES[:1] if interpreted(backend, device) else DTYPES:
        x = torch.randn(2, 3, 5, device=device).to(dtype)
        for given in (x, x.clone().requires_grad_()):
            arguments = (given, rows_of(2, 2, device), Tensor([7]).long().to(device), 3, 2, 0.1, True, backend)
            torch.library.opcheck(torch.ops.ttcfast.add_noise.default, arguments)


X = torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"rows have shape \(7, 2\); N = 2 problems of B = 3 need \[6, 2\]", lambda: add_noise(X, 3, 0.1, key=KEY, rows=rows_of(1, 7))),
        (r"rows have shape \(3, 2\); N = 2 problems of B = 3 need \[6, 2\]", lambda: add_noise(X, 3, 0.1, key=KEY, rows=rows_of(1, 3))),
        ("B is 0; give at least one candidate", lambda: add_noise(X, 0, 0.1, key=KEY, rows=rows_of(2, 0))),
        ("sigma is -0.1; a standard deviation is finite and not negative", lambda: add_noise(X, 3, -0.1, key=KEY, rows=rows_of(2, 3))),
        ("sigma is inf; a standard deviation", lambda: add_noise(X, 3, float("inf"), key=KEY, rows=rows_of(2, 3))),
        ("sigma is nan; a standard deviation", lambda: add_noise(X, 3, float("nan"), key=KEY, rows=rows_of(2, 3))),
        ("x is torch.float16; give float32", lambda: add_noise(X.half(), 3, 0.1, key=KEY, rows=rows_of(2, 3))),
        ("x is torch.int64; give float32", lambda: add_noise(X.long(), 3, 0.1, key=KEY, rows=rows_of(2, 3))),
        ("x has no axes", lambda: add_noise(torch.tensor(1.0), 1, 0.1, key=KEY, rows=rows_of(1, 1))),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
