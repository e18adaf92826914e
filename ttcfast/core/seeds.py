"""Seeds random streams within a block, and derives integers that name them."""

# ruff: noqa: NPY002  (numpy's legacy global stream is the one that published models draw from)

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ttcfast.runtime.turns import turn


@contextmanager
def temp_seed(seed: int | None) -> Iterator[None]:
    """Seeds torch (CPU and every CUDA device), numpy and ``random`` within a block, and restores their states afterwards.

    States are restored on exceptions too; ``None`` does nothing. It covers more than the plan's CPU and CUDA, since published surrogates
    draw from numpy and ``random`` as well. CUDA is not initialised by this: if unused so far, it is seeded for the block, and afterwards as
    ``torch.manual_seed`` last left it. The streams belong to the process: threads take turns at such blocks (``ttcfast.runtime.turns``),
    and a thread that draws without taking its turn draws from the seeded streams.

    Args:
        seed: Integer of any size; numpy uses it modulo 2^32, torch modulo 2^63.

    Source: TTC plan, "Minimal Interfaces (Copy-Paste Stubs)"; docs/design/decisions.md ("Keyed candidates").
    """
    if seed is None:
        yield
        return
    seed = int(seed)
    with turn("temp_seed") as this:
        outer = torch.initial_seed()
        torch_state, numpy_state, python_state = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
        cuda = torch.cuda.is_available()
        cuda_states = torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_initialized() else None
        try:
            if cuda:
                torch.manual_seed(seed % 2**63)
            else:  # torch.manual_seed records its call stack for lazily initialised devices, which takes longer than everything else
                torch.default_generator.manual_seed(seed % 2**63)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            with this.body():
                yield
        finally:
            torch.random.set_rng_state(torch_state)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
            elif cuda:
                torch.cuda.manual_seed_all(outer)


def random_states() -> tuple[Any, ...]:
    """Returns the states of all streams that ``temp_seed`` sets, for a comparison."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    tensors = [torch.random.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else ())]
    kind, numbers, *rest = np.random.get_state()
    return [t.numpy().tobytes() for t in tensors], (kind, np.asarray(numbers).tobytes(), *rest), random.getstate()


def hash_seed(*parts: int) -> int:
    """Maps integers such as (seed, step, candidate) to an integer in [0, 2^63), the same on every machine.

    Different arguments give independent seeds for all practical purposes (64 bits of BLAKE2b, one dropped).
    """
    text = ",".join(str(int(p)) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
