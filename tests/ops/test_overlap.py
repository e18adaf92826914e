"""Which views of one buffer share elements, against sets of their places."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor

from ttcfast.ops.overlap import shared_pair, within_itself


def view(pick: random.Random, flat: Tensor) -> tuple[Tensor, list[int]]:
    """A view and where each of its elements stands."""
    shape = pick.choice([(), (3,), (2, 3), (4, 1), (2, 2, 2), (0, 3)])
    strides, start = [pick.choice([0, 1, 2, 3, 4, 7]) for _ in shape], pick.randrange(12)
    places = [start + sum(i * s for i, s in zip(index, strides)) for index in itertools.product(*map(range, shape))]
    return flat.as_strided(shape, strides, start), places


def test_views_share_what_their_places_share():
    pick, flat, found = random.Random(3), torch.zeros(64, dtype=torch.bfloat16), set()
    for _ in range(2000):
        views, places = zip(*(view(pick, flat) for _ in range(3)))
        for tensor, at in zip(views, places):
            assert within_itself(tensor, tensor.data_ptr()) == (len(set(at)) < len(at)), (tensor.shape, tensor.stride())
        shared = {(i, j) for i, j in itertools.combinations(range(3), 2) if set(places[i]) & set(places[j])}
        pair = shared_pair(views, [t.data_ptr() for t in views])
        assert (pair in shared) if shared else pair is None
        found.add(bool(shared))
    assert found == {True, False}


def test_memory_is_not_touched():
    """Addresses of another device are only calculated with."""
    wide = torch.empty(4, 6, device="meta")
    at = 1 << 40
    assert shared_pair([wide[:, :3], wide[:, 3:]], [at, at + 12]) is None
    assert shared_pair([wide[:, :3], wide[:, 2:]], [at, at + 8]) == (0, 1)
    assert within_itself(torch.empty(1, device="meta").expand(3), at)
