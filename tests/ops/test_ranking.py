"""ops.ranking: the best of a stream are those of a full sort, whatever the chunks."""

from __future__ import annotations

import pytest
import torch

from ttcfast.ops.ranking import NO_ID, Keys, best, marks_of


def streamed(keys: Keys, k: int, chunk: int) -> Keys:
    held = Keys.empty(len(keys.rank), k, keys.rank.dtype, keys.rank.device, ties=keys.ties is not None, marks=keys.marks is not None)
    for part in torch.arange(keys.rank.shape[1]).split(chunk):
        held, _ = best(held.beside(keys.at(part.expand(len(keys.rank), -1))), k)
    return held


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_ties", [False, True])
def test_chunks_do_not_matter_and_the_order_is_that_of_a_sort(dtype, with_ties):
    rank = torch.randint(5, (3, 60)).to(dtype)
    rank[:, ::4] = -torch.inf
    rank[2, 5:] = -torch.inf
    ties = torch.randint(3, (3, 60)).to(dtype) if with_ties else None
    keys = Keys(rank, torch.arange(60).expand(3, 60), torch.randn(3, 60, dtype=dtype), ties)
    for row in range(3):
        order = sorted(range(60), key=lambda i: (-float(rank[row, i]), 0.0 if ties is None else -float(ties[row, i]), i))
        wanted = [i for i in order if rank[row, i] > -torch.inf][:8]
        for chunk in (1, 7, 60):
            found = streamed(keys, 8, chunk)
            assert found.ids[row].tolist() == wanted + [NO_ID] * (8 - len(wanted))
            assert torch.equal(found.scores[row, : len(wanted)], keys.scores[row, wanted])


def test_a_state_counts_once_by_its_best_rank():
    states = torch.randint(6, (4, 50, 1)).float()
    rank = torch.randn(4, 50)
    keys = Keys(rank, torch.arange(50).expand(4, 50), rank, marks=marks_of(states, 2))
    for row in range(4):
        by_state = {float(s): max(float(r) for r, t in zip(rank[row], states[row]) if t == s) for s in states[row]}
        wanted = sorted(by_state.values(), reverse=True)[:4]
        for chunk in (1, 9, 50):
            assert streamed(keys, 4, chunk).rank[row].tolist() == wanted
