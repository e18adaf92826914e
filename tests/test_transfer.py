"""What is put on a device arrives there, once, and without a wait."""

from __future__ import annotations

import torch

from tests.fake_cuda import FakeCuda, on_host
from ttcfast.transfer import constant, indices, on_device, sent

CUDA = torch.device("cuda", 0)


def test_nothing_waits_and_everything_arrives():
    x = torch.arange(6.0)
    with FakeCuda() as gpu, gpu.counting() as waits:
        there = sent(x, CUDA)
        found = [there, indices((2, 0), CUDA), constant((0.5, 2.0), CUDA, torch.float64), on_device(x, CUDA, torch.float64)]
        found += [on_device(3, CUDA, torch.float64), there[indices([4], CUDA)]]
        assert sent(there, CUDA) is there and indices((2, 0), CUDA) is found[1]
    assert not waits and all(y.is_cuda for y in found)
    for y, expected in zip(on_host(found), [x, torch.tensor([2, 0]), [0.5, 2.0], x.double(), 3.0, [4.0]]):
        torch.testing.assert_close(y, torch.as_tensor(expected, dtype=y.dtype), rtol=0, atol=0)


def test_on_the_host_nothing_is_copied():
    x = torch.arange(3)
    assert sent(x, torch.device("cpu")) is x and on_device(x, torch.device("cpu"), torch.int64) is x
    assert indices((), torch.device("cpu")).dtype == torch.int64


def test_constants_of_inference_mode_take_part_in_gradients():
    with torch.inference_mode():
        at = indices((1, 5, 3), torch.device("cpu"))
    x = torch.ones(6, requires_grad=True)
    x[at].sum().backward()
    assert x.grad.tolist() == [0, 1, 0, 1, 0, 1]
