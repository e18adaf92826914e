import pytest

from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError


@pytest.mark.parametrize("name", ["meta", "foo:3", "cuda:99", "", "cpu:x", "xla"])
def test_a_device_that_cannot_be_used_is_told_by_its_name(name):
    with pytest.raises(ArgumentError, match=f"device is '{name}'"):
        device_of(name)
