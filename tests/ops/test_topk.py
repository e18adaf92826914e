"""ops.topk: every backend gives the order of the definition, index for index, on ties, signed zeros, NaN and sorted input too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import cases
from ttcfast.ops import topk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def by_python(scores: Tensor, k: int, ids: Tensor | None = None) -> Tensor:
    """Positions of the k best of each row by Python's own sort: NaN last, larger first, then smaller id, then smaller index."""
    names = torch.arange(scores.shape[1]).expand(scores.shape) if ids is None else ids
    rows = []
    for row, name in zip(scores.double().tolist(), names.tolist()):
        rank = [(math.isnan(x), 0.0 if math.isnan(x) else -x, name[i], i) for i, x in enumerate(row)]
        rows.append(sorted(range(len(row)), key=rank.__getitem__)[:k])
    return torch.tensor(rows, dtype=torch.int64).reshape(scores.shape[0], k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", cases.VALUES)
def test_the_definition_is_the_order_of_python(values, dtype):
    scores = cases.VALUES[values]((3, 57), dtype)
    ids = torch.randint(-5, 6, (3, 57))
    for k in (1, 7, 57):
        positions = by_python(scores, k)
        found, indices = topk(scores, k, backend="reference")
        assert torch.equal(indices, positions)
        assert torch.equal(found.view(torch.uint8), scores.gather(1, positions).view(torch.uint8))  # zeros keep their sign, NaN its bits
        named = topk(scores, k, ids=ids, backend="reference")[1]
        assert torch.equal(named, ids.gather(1, by_python(scores, k, ids)))
