import math

import pytest
import torch

from ttcfast.ops.ranking import Keys, marks_of
from ttcfast.ttc.select.particles import systematic, uniforms_of
from ttcfast.ttc.select.topk import TopPool


def filled(rank, states, k, chunks, *, ties=None, marks=None, order=None):
    """A pool of all candidates [n, B], which come in chunks of so many."""
    n, b = rank.shape
    ids = torch.arange(b).expand(n, b)
    pool = TopPool(states[0, 0], n, k, ties=ties is not None, marks=marks is not None)
    parts = torch.arange(b).split(chunks)
    for part in parts if order is None else [parts[i] for i in order]:
        cut = [None if v is None else v[:, part] for v in (rank, ids, rank, ties, marks)]
        row = torch.arange(n).unsqueeze(1).expand(n, len(part))
        pool.add(slice(0, n), Keys(*cut), states[:, part], row, torch.arange(len(part)).expand(n, -1))
    return pool


def contents(pool):
    group, place = pool.taken.nonzero(as_tuple=True)
    return pool.keys.ids[group, place], pool.keys.rank[group, place], pool.states_of(group, place)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("values", [4, 1000])  # many ties, few
def test_every_chunking_and_order_keeps_the_same_k_as_a_full_sort(k, values):
    n, b = 3, 40
    rank = torch.randint(values, (n, b)).double()
    rank[:, ::7] = -torch.inf  # cannot be taken
    rank[2, k // 2 :] = -torch.inf  # a group with fewer than k
    states = torch.randn(n, b, 2, 3)
    by_id = (-rank).argsort(dim=1, stable=True)[:, :k]
    wanted = by_id[rank.gather(1, by_id) > -torch.inf]
    for chunks, order in ((40, None), (1, None), (7, None), (7, [4, 0, 5, 2, 1, 3])):
        ids, ranks, kept = contents(filled(rank, states, k, chunks, order=order))
        assert torch.equal(ids, wanted)
        group = torch.repeat_interleave(torch.arange(n), (rank.gather(1, by_id) > -torch.inf).sum(1))
        assert torch.equal(kept, states[group, ids]) and torch.equal(ranks, rank[group, ids])


def test_few_states_are_copied():
    n, b, k = 64, 2000, 4
    copies = filled(torch.rand(n, b, dtype=torch.float64), torch.zeros(n, b, 1), k, 5).copies / n
    expected = k * (1 + math.log(b / k))
    assert 0.8 * expected < copies < 1.1 * expected  # 28.9; a chunk of five may copy less


def test_a_tie_breaker_decides_between_equal_ranks_alone():
    rank, ties = torch.tensor([[1.0, 2, 2, 2, 0]]).double(), torch.tensor([[9.0, 1, 3, 3, 9]]).double()
    for chunks in (1, 2, 5):
        assert filled(rank, torch.zeros(1, 5, 1), 4, chunks, ties=ties).keys.ids.tolist() == [[2, 3, 1, 0]]


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_of_equal_states_the_best_is_kept(chunks):
    states = torch.tensor([0.0, 1, -0.0, 1, 2, 3, 2, 0]).view(1, 8, 1)
    rank = torch.tensor([[1.0, 2, 7, 9, 4, 0, 4, 8]]).double()
    pool = filled(rank, states, 3, chunks, marks=marks_of(states, 2))
    assert pool.keys.ids.tolist() == [[3, 7, 4]]  # of 1, 0 and 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_marks_tell_states_apart(dtype):
    x = torch.randn(500, 4, 3, 3).to(dtype)
    x[1::2] = x[::2]
    x[1::4, 2, 1, 1] *= 1.5
    marks = marks_of(x, 1)
    same = (marks[::2] == marks[1::2]).tolist()
    assert same == [False, True] * 125 and len(marks.unique()) == 250 + 125


def test_systematic_resampling_gives_each_its_share():
    weights, uniforms = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64), torch.tensor([0.01, 0.3, 0.999], dtype=torch.float64)
    for drawn in systematic(weights.log().expand(3, 4), 10, uniforms):
        assert drawn.bincount(minlength=4).tolist() == [5, 0, 2, 3]
    drawn = systematic(weights.log().expand(1000, 4), 1, torch.linspace(0, 0.9999, 1000).double())
    assert torch.allclose(drawn.flatten().bincount(minlength=4) / 1000, weights.float(), atol=0.002)
    rows = torch.tensor([[-1e9, 0.0, -torch.inf], [-torch.inf] * 3, [0.0, -torch.inf, 5.0]]).double()  # a row of nothing disturbs no other
    assert systematic(rows, 3, torch.full((3,), 0.999).double())[::2].tolist() == [[1, 1, 1], [2, 2, 2]]
    u = uniforms_of(3, 5, torch.arange(200))
    assert torch.equal(u[7:9], uniforms_of(3, 5, torch.tensor([7, 8]))) and 0.4 < u.mean() < 0.6
    assert not torch.equal(u, uniforms_of(3, 6, torch.arange(200)))
