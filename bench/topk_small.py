"""Small calls of the CUDA top-k for compute-sanitizer, each compared with the reference: ``python -m bench.topk_small``."""

from __future__ import annotations

import torch

from ttcfast.ops import topk

# n, k: a warp, a block, a block that narrows the candidates, several blocks per row
SHAPES = ((50, 7), (200, 200), (5000, 60), (40_000, 300))


def main() -> None:
    torch.manual_seed(0)
    for n, k in SHAPES:
        for scores in (torch.randn(2, n), torch.randint(0, 3, (2, n)).double(), torch.full((2, n), float("nan"), dtype=torch.float16)):
            ids = torch.randint(-9, 9, scores.shape)
            for names in (None, ids):
                expected = topk(scores, k, ids=names, backend="reference")
                found = topk(scores.cuda(), k, ids=None if names is None else names.cuda(), backend="cuda")
                if not torch.equal(found[1].cpu(), expected[1]):
                    raise SystemExit(f"topk [2, {n}], k {k}, {scores.dtype}{'' if names is None else ', ids'}: wrong indices")
    print(f"{len(SHAPES)} shapes agree with the reference")


if __name__ == "__main__":
    main()
