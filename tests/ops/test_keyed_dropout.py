"""ops.keyed_dropout: masks bit for bit on every backend, their statistics, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from tests import cases
from tests.ops.philox_words import interpreted
from tests.ops.test_keyed import DTYPES, FEW_ROWS, ROWS
from ttcfast.ops import add_noise, keyed, keyed_dropout
from ttcfast.spec import Key

KEY = Key(31, 32, 33)
RATES = (0.0, 0.1, 0.5, 0.999, 1 - 2**-33, 1 - 2**-53)


def mask_of(rows: Tensor, p: float, elements: int, antithetic: bool) -> Tensor:
    """What is kept, from the integers, by the definition's own words."""
    words, opposite = keyed.words_ref(rows, keyed.stream_of(KEY.seed, KEY.step), KEY.site, elements, antithetic)
    return torch.where(opposite, 2**32 - 1 - words, words)[:, :elements] >= round(p * 2**32)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("elements", [*cases.SMALL_SIZES, *cases.TILE_EDGES])
def test_mask_is_the_one_of_the_integers(backend, device, elements, antithetic):
    few = interpreted(backend, device)
    rows = torch.tensor(FEW_ROWS if few else ROWS)
    x = 1 + torch.rand(len(rows), elements)
    for p in (RATES[elements % 5],) if few else RATES:
        kept = mask_of(rows, p, elements, antithetic)
        for dtype in DTYPES[elements % 3 :][:1] if few else DTYPES:
            given = x.to(dtype)
            found = keyed_dropout(given.to(device), p, key=KEY, rows=rows.to(device), antithetic=antithetic, backend=backend).cpu()
            wide = given if dtype == torch.float64 else given.float()
            assert found.dtype == dtype and torch.equal(found, torch.where(kept, (wide * (1 / (1 - p))).to(dtype), 0))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_in_memory_changes_no_bit(backend, device, dtype, layout):
    view, rows = cases.LAYOUTS[layout], torch.tensor(FEW_ROWS, device=device)
    shapes = [(2, 3, 4, 5)] if interpreted(backend, device) else [(2, 1100), (2, 3, 4, 5), (2, 3, 4, 5, 6)]
    for shape in shapes:
        x = torch.randn(shape, device=device).to(dtype)
        expected = keyed_dropout(x, 0.3, key=KEY, rows=rows, backend=backend)
        found = keyed_dropout(view(x), 0.3, key=KEY, rows=rows, backend=backend)
        assert torch.equal(found, expected) and found.is_contiguous()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 0),
        torch.zeros(2, 3, 4, 5, 0),
        torch.zeros(2, 3, 4, 5, 0).permute(0, 4, 3, 2, 1),
        torch.zeros(0, 3, 4, 5, 6).permute(0, 4, 3, 2, 1),
        torch.zeros(0, 4, 6, 6, 6).to(memory_format=torch.channels_last_3d),
        torch.zeros(2, 0, 2, 0, 2, 2),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
def test_of_nothing_comes_nothing(backend, device, x):
    """A permuted tensor without elements was copied again and again, for the axes that no copy would merge."""
    x, rows = x.to(device), torch.zeros((x.shape[0], 2), dtype=torch.int64, device=device)
    for p in (0.5, 1 - 2**-53):
        found = keyed_dropout(x, p, key=KEY, rows=rows, backend=backend)
        assert found.shape == x.shape and found.is_contiguous()
    noisy = add_noise(x, 2, 0.5, key=KEY, rows=rows.repeat_interleave(2, 0), backend=backend)
    assert noisy.shape == (x.shape[0], 2, *x.shape[1:])


def test_dropped_entries_are_zero_whatever_they_were(backend, device):
    rows = torch.tensor(FEW_ROWS, device=device)
    for value in (float("nan"), float("inf"), float("-inf")):
        for dtype in DTYPES:
            x = torch.full((2, 40), value, dtype=dtype, device=device)
            found = keyed_dropout(x, 0.5, key=KEY, rows=rows, backend=backend).cpu()
            kept = mask_of(rows.cpu(), 0.5, 40, False)
            assert bool((found[~kept] == 0).all()) and not bool(found[kept].isfinite().any())


def test_order_chunks_and_threads_change_no_bit(backend, device):
    rows = torch.tensor([(n, b) for n in (3, 0, 7) for b in range(4)], device=device)
    x, order, before = torch.randn(12, 5, 9, device=device), torch.randperm(12, device=device), torch.get_num_threads()
    whole = keyed_dropout(x, 0.4, key=KEY, rows=rows, antithetic=True, backend=backend)
    for size in (5,) if interpreted(backend, device) else (1, 5, 12):
        pieces = zip(x[order].split(size), rows[order].split(size))
        parts = [keyed_dropout(piece, 0.4, key=KEY, rows=r, antithetic=True, backend=backend) for piece, r in pieces]
        assert torch.equal(torch.cat(parts), whole[order])
    if backend == "cpu":
        x, found = torch.randn(12, 9001), []
        try:
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                found.append(keyed_dropout(x, 0.4, key=KEY, rows=rows, backend=backend))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(other, found[0]) for other in found)


def test_antithetic_candidates_keep_what_the_other_dropped(backend, device):
    rows, x = torch.tensor([(0, 1), (0, 2), (0, 3), (0, 4)], device=device), torch.ones(4, 999, device=device)
    kept = {p: keyed_dropout(x, p, key=KEY, rows=rows, antithetic=True, backend=backend) != 0 for p in (0.2, 0.5, 0.8)}
    for pair in (0, 2):
        assert torch.equal(kept[0.5][pair], ~kept[0.5][pair + 1])
        assert bool((kept[0.2][pair] | kept[0.2][pair + 1]).all()) and not bool((kept[0.8][pair] & kept[0.8][pair + 1]).any())
    assert not torch.equal(kept[0.5][0], kept[0.5][2])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate_is_within_binomial_bounds(backend, device, p):
    count = 1024 if interpreted(backend, device) else 2**18
    rows = torch.tensor([(0, 0), (0, 1), (1, 0), (9, 2**33)], device=device)
    dropped = (keyed_dropout(torch.ones(4, count, device=device), p, key=KEY, rows=rows, backend=backend) == 0).cpu()
    for row in dropped:
        assert stats.binomtest(int(row.sum()), count, p).pvalue > 1e-5
    both = int((dropped[:-1] & dropped[1:]).sum())  # neighbouring rows
    assert stats.binomtest(both, 3 * count, p * p).pvalue > 1e-5
    next_to_it = int((dropped[:, :-1] & dropped[:, 1:]).sum())
    assert stats.binomtest(next_to_it, 4 * (count - 1), p * p).pvalue > 1e-5
    other = (
        keyed_dropout(torch.ones(4, count, device=device), p, key=Key(KEY.seed, KEY.step, KEY.site + 1), rows=rows, backend=backend) == 0
    )
    assert stats.binomtest(int((other.cpu() & dropped).sum()), 4 * count, p * p).pvalue > 1e-5


def test_gradient_passes_where_the_value_did(backend, device):
    rows = torch.tensor(FEW_ROWS, device=device)
    for dtype in DTYPES[2:] if interpreted(backend, device) else DTYPES:
        x = (1 + torch.rand(2, 3, 7, device=device)).to(dtype).requires_grad_()
        out = keyed_dropout(x, 0.4, key=KEY, rows=rows, antithetic=True, backend=backend)
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        assert torch.equal(x.grad, torch.where(out != 0, torch.tensor(1 / 0.6, dtype=torch.float64).to(x.grad), 0))
    if interpreted(backend, device):
        return  # hundreds of calls
    x = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)

    def dropped(x: Tensor) -> Tensor:
        return keyed_dropout(x, 0.4, key=KEY, rows=rows, backend=backend)

    assert torch.autograd.gradcheck(dropped, (x,)) and torch.autograd.gradgradcheck(dropped, (x,))


def test_empty_inputs(backend, device):
    none = torch.empty(0, 2, dtype=torch.int64, device=device)
    assert keyed_dropout(torch.ones(0, 3, device=device), 0.5, key=KEY, rows=none, backend=backend).shape == (0, 3)
    rows = torch.tensor(ROWS, device=device)
    assert keyed_dropout(torch.ones(6, 0, 3, device=device), 0.5, key=KEY, rows=rows, backend=backend).shape == (6, 0, 3)
    assert keyed_dropout(torch.ones(6, device=device), 0.0, key=KEY, rows=rows, backend=backend).tolist() == [1.0] * 6


def test_opcheck(backend, device):
    rows = torch.tensor(FEW_ROWS, device=device)
    for dtype in DTYPES[:1] if interpreted(backend, device) else DTYPES:
        x = torch.randn(2, 3, 5, device=device).to(dtype)
        for given in (x, x.clone().requires_grad_()):
            arguments = (given, rows, Tensor([7]).long().to(device), 3, 0.4, True, backend)
            torch.library.opcheck(torch.ops.ttcfast.keyed_dropout.default, arguments)


X, R = torch.ones(6, 5), torch.tensor(ROWS)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"p is 1.0; a dropout rate lies in \[0, 1\)", lambda: keyed_dropout(X, 1.0, key=KEY, rows=R)),
        (r"p is -0.1; a dropout rate", lambda: keyed_dropout(X, -0.1, key=KEY, rows=R)),
        (r"p is nan; a dropout rate", lambda: keyed_dropout(X, float("nan"), key=KEY, rows=R)),
        (r"x has shape \(5, 5\) and rows \(6, 2\); give one", lambda: keyed_dropout(X[:5], 0.1, key=KEY, rows=R)),
        (r"x has shape \(\) and rows \(6, 2\); give one", lambda: keyed_dropout(torch.tensor(1.0), 0.1, key=KEY, rows=R)),
        ("x is torch.float16; give float32", lambda: keyed_dropout(X.half(), 0.1, key=KEY, rows=R)),
        ("x is torch.bool; give float32", lambda: keyed_dropout(X > 0, 0.1, key=KEY, rows=R)),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
