import pytest
import torch

from ttcfast.runtime.lent import ChangedInputError, _checksum, lent

WRITES = {
    "sub_": lambda x: x.sub_(1),
    "augmented": lambda x: exec("x -= 1", {"x": x}),
    "item": lambda x: x.__setitem__((0, 0), 7.0),
    "view": lambda x: x[0].flatten()[:2].add_(1),
    "detached": lambda x: x.detach().clamp_(max=0.5),
    "numpy": lambda x: x.numpy().__setitem__(slice(None), x.numpy()[::-1].copy()),  # keeps every sum over the tensor
    "data": lambda x: x.data.mul_(2),
    "out": lambda x: torch.add(x, 1, out=x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", WRITES)
def test_every_way_of_writing_is_found(how, inference):
    with torch.inference_mode(inference):
        x, other = torch.arange(6.0).reshape(2, 3), torch.zeros(3)
        told = pytest.raises(ChangedInputError, match=r"scorer f changed the candidates .*x = x.clone\(\)")
        with told, lent("scorer f", {"state": other, "candidates": x}):
            WRITES[how](x)


def test_reading_is_free_to_all():
    x = torch.rand(2, 3)
    with lent("scorer f", {"x": x, "part": x[:, ::2], "bits": x.bfloat16(), "ids": torch.arange(3), "none": x[:0]}):
        y = (x - 1).clamp_(min=0)
        y.numpy()[:] = 3
        x.sum().item()


def test_an_error_of_the_block_is_its_own():
    with pytest.raises(KeyError), lent("scorer f", {"x": torch.zeros(1)}):
        raise KeyError("mine")


@pytest.mark.parametrize("size", [2, 4097, 2**20 + 1])
def test_the_checksum_of_a_device_tells_values_and_order_apart(size):
    x = torch.randint(0, 256, (size,), dtype=torch.uint8)
    x[0], x[-1] = 1, 2
    assert len({_checksum(y) for y in (x, x + 1, x.flip(0), x.roll(1 if size < 2**20 else 4096))}) == (3 if size == 2 else 4)
    assert _checksum(x) == _checksum(x.clone()) and _checksum(x[:0]) == 0
