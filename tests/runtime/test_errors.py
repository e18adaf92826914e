"""What a lack of memory is called, whoever tells of it."""

from __future__ import annotations

import pytest

from ttcfast.runtime.errors import DataError, OutOfMemoryError, memory_errors


def test_every_kind_says_what_to_lower():
    hdf5 = OSError("Can't synchronously read data (memory allocation failed for chunk)")
    torch = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    for error, told in ((MemoryError(), "out of memory; lower"), (torch, "9 bytes.); lower"), (hdf5, "failed for chunk)); lower")):
        with pytest.raises(OutOfMemoryError) as found, memory_errors():
            raise error
        assert told in str(found.value) and "batch, per_file, grid" in str(found.value) and found.value.status == 1
    with pytest.raises(OutOfMemoryError), memory_errors():
        try:
            raise hdf5
        except OSError as error:
            raise DataError("a.hdf5 is damaged; make or copy it again") from error


def test_other_errors_keep_their_kind():
    for error in (DataError("a.hdf5 is damaged"), RuntimeError("shapes differ"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, memory_errors():
            raise error
        assert found.value is error
