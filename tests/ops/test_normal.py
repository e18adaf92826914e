"""ops.normal: every backend against the float64 definition, whatever the rows, their order, chunks or threads; and that they are normal."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from tests import cases
from tests.ops.philox_words import interpreted
from tests.ops.test_keyed import DTYPES, FEW_ROWS, ROWS
from tests.tolerances import NORMAL_ULPS
from ttcfast.ops import normal
from ttcfast.spec import Key

KEY = Key(11, 12, 13)


def ulps(found: Tensor, expected: Tensor) -> float:
    """Largest distance in units in the last place of the float32 that was expected."""
    exact = expected.double()
    unit = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 23)
    return float(((found.double() - exact).abs() / unit).max())


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("elements", [*cases.SMALL_SIZES, *cases.TILE_EDGES])
def test_agrees_with_the_definition(backend, device, elements, antithetic):
    few = interpreted(backend, device)
    if few and antithetic and elements in cases.SMALL_SIZES[1:]:
        return  # the masks of keyed_dropout go through all of them
    rows = torch.tensor(FEW_ROWS if few and elements > 1 else ROWS)
    expected = normal(len(rows), (elements,), key=KEY, rows=rows, antithetic=antithetic, backend="reference")
    found = normal(len(rows), (elements,), key=KEY, rows=rows.to(device), antithetic=antithetic, backend=backend)
    assert found.shape == (len(rows), elements) and found.dtype == torch.float32
    assert ulps(found.cpu(), expected) <= NORMAL_ULPS


def test_agrees_with_the_definition_in_the_tails(backend, device):
    """A million draws reach radii of 5.2 and angles within 1e-5 of the axes, where digits are lost first."""
    if interpreted(backend, device):
        return  # the interpreter checks logic on small shapes; the same kernel is tried on this size where there is a GPU
    rows = torch.tensor([[0, 0]])
    expected = normal(1, (cases.LARGE_SIZE,), key=KEY, rows=rows, backend="reference")
    found = normal(1, (cases.LARGE_SIZE,), key=KEY, rows=rows.to(device), backend=backend)
    assert ulps(found.cpu(), expected) <= NORMAL_ULPS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_holds_the_float32_draw(backend, device, dtype):
    rows = torch.tensor(FEW_ROWS, device=device)
    expected = normal(2, (3, 41), key=KEY, rows=rows, antithetic=True, backend=backend)
    found = normal(2, (3, 41), key=KEY, rows=rows, dtype=dtype, antithetic=True, backend=backend)
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4, 5)], ids=str)
def test_shapes(backend, device, shape):
    rows = torch.tensor(FEW_ROWS, device=device)
    found = normal(2, shape, key=KEY, rows=rows, backend=backend)
    flat = normal(2, (torch.Size(shape).numel(),), key=KEY, rows=rows, backend=backend)
    assert found.shape == (2, *shape) and torch.equal(found.flatten(), flat.flatten())


def test_no_rows_give_no_normals(backend, device):
    empty = torch.empty(cases.EMPTY_BATCH, 2, dtype=torch.int64, device=device)
    assert normal(0, (4, 5), key=KEY, rows=empty, backend=backend).shape == (0, 4, 5)


def test_order_and_chunks_of_rows_change_no_bit(backend, device):
    rows = torch.tensor([(n, b) for n in (3, 0, 7) for b in range(4)], device=device)
    sizes = (5,) if interpreted(backend, device) else (1, 5, 12)
    whole = normal(12, (50,), key=KEY, rows=rows, antithetic=True, backend=backend)
    order = torch.randperm(12, device=device)
    for size in sizes:
        parts = [normal(len(r), (50,), key=KEY, rows=r, antithetic=True, backend=backend) for r in rows[order].split(size)]
        assert torch.equal(torch.cat(parts), whole[order])
    strided = torch.stack([rows, torch.full_like(rows, -1)], 1)[:, 0]  # every other row of something else
    assert not strided.is_contiguous() and torch.equal(normal(12, (50,), key=KEY, rows=strided, antithetic=True, backend=backend), whole)


def test_a_longer_row_starts_with_the_shorter_one(backend, device):
    rows = torch.tensor(FEW_ROWS, device=device)
    long = normal(2, (77,), key=KEY, rows=rows, backend=backend)
    for elements in (1, 2, 3, 4, 33):
        assert torch.equal(normal(2, (elements,), key=KEY, rows=rows, backend=backend), long[:, :elements])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_number_of_threads_changes_no_bit(name):
    rows, before, found = torch.tensor(ROWS), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(normal(len(ROWS), (30_001,), key=KEY, rows=rows, backend=name))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found)


def test_antithetic_candidates_are_exactly_opposite(backend, device):
    rows = torch.tensor([(2, c) for c in range(9)] + [(2, 2**62), (2, 2**62 - 1)], device=device)
    plain = normal(11, (67,), key=KEY, rows=rows, backend=backend)
    found = normal(11, (67,), key=KEY, rows=rows, antithetic=True, backend=backend)
    for row, candidate in enumerate(rows[:, 1].tolist()):
        if candidate >= 2 and candidate % 2 == 0:
            assert torch.equal(found[row], -plain[rows[:, 1].tolist().index(candidate - 1)])
        else:
            assert torch.equal(found[row], plain[row])


def test_draws_are_standard_normal(backend, device):
    if interpreted(backend, device):
        return  # its draws are those of the other backends, by the tests above
    rows = torch.tensor([(n, b) for n in range(4) for b in range(8)], device=device)
    z = normal(32, (2**15,), key=KEY, rows=rows, backend=backend).double().cpu()
    count = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):  # var of z^k: E z^2k - (E z^k)^2
        assert abs(float(z.pow(power).mean()) - moment) < 5 * (variance / count) ** 0.5, power
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-4
    assert min(stats.kstest(row.numpy(), "norm").pvalue for row in z) > 1e-4 / 32
    assert stats.kstest((z[:, 0::2].square() + z[:, 1::2].square()).flatten().numpy() / 2, "expon").pvalue > 1e-4
    assert stats.kstest(torch.atan2(z[:, 1::2], z[:, 0::2]).flatten().numpy(), "uniform", args=(-torch.pi, 2 * torch.pi)).pvalue > 1e-4
    tail = float((z.abs() > 4).sum())
    assert abs(tail - count * 6.334e-5) < 5 * (count * 6.334e-5) ** 0.5


def test_opcheck(backend, device):
    rows = torch.tensor(FEW_ROWS, device=device)
    for dtype in DTYPES[:1] if interpreted(backend, device) else DTYPES:
        arguments = (rows, Tensor([7]).long().to(device), 3, [3, 5], dtype, True, backend)
        torch.library.opcheck(torch.ops.ttcfast.normal.default, arguments)


def test_a_count_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"^M is tensor\(\[1., 1.\]\); give the whole number of rows$"):
        normal(torch.ones(2), (4,), key=KEY, rows=torch.tensor(ROWS))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"M is 3 and rows have shape \(6, 2\); give M rows", lambda rows: normal(3, (4,), key=KEY, rows=rows)),
        ("dtype is torch.float16; give float32", lambda rows: normal(6, (4,), key=KEY, rows=rows, dtype=torch.float16)),
        ("dtype is torch.int64; give float32", lambda rows: normal(6, (4,), key=KEY, rows=rows, dtype=torch.int64)),
        (r"shape is \(4, -1\); sizes are 0 or more", lambda rows: normal(6, (4, -1), key=KEY, rows=rows)),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call(torch.tensor(ROWS))
    assert "\n" not in str(caught.value)
