"""ops.accumulate_moments: every backend and pair of dtypes against the reference, to the bit in the totals; and what holds for all."""

from __future__ import annotations

import itertools
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.tolerances import SQUARES, assert_within
from ttcfast.ops import BackendError, accumulate_moments, native, registry

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = ((F32, F32), (F64, F64), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16))
CHUNK_EDGES = (8191, 8192, 8193, 32767, 32768, 32769)  # of Triton's and of the C++ implementation


def tensors(sizes, dtype, device="cpu") -> list[Tensor]:
    return [torch.randn(size).to(dtype).to(device) for size in sizes]


def interpreted(backend: str) -> bool:
    return backend == "triton" and registry.interpreting()


def assert_totals(found: list[Tensor], expected: list[Tensor], backend: str) -> None:
    for a, b in zip(found, expected):
        a, b = a.cpu(), b.cpu()
        if interpreted(backend) and a.dtype == BF16:  # Triton's interpreter truncates where the hardware rounds to nearest
            finite = a.isfinite() & b.isfinite()
            error, allowed = (a.double() - b.double()).abs(), 2**-7 * b.double().abs() + torch.finfo(BF16).tiny
            assert bool((error <= allowed)[finite].all()) and torch.equal(a.isnan(), b.isnan())
        else:
            assert torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5)) and torch.equal(a.isnan(), b.isnan())


def check(grads: list[Tensor], totals: list[Tensor] | None, backend: str, device: str, zero: bool) -> None:
    expected = None if totals is None else [t.clone() for t in totals]
    size = accumulate_moments([g.double() for g in grads], None, backend="reference")
    accumulate_moments(grads, expected, backend="reference")
    moved, into = [g.clone().to(device) for g in grads], None if totals is None else [t.clone().to(device) for t in totals]
    found = accumulate_moments(moved, into, zero_grads=zero, backend=backend)
    assert found.dtype == F64 and found.shape == () and found.device.type == device
    if bool(size.isnan()):
        assert bool(found.isnan())
    else:
        assert_within(found, size, SQUARES)
    if totals is not None:
        assert_totals(into, expected, backend)
    for before, after in zip(grads, moved):
        wanted = torch.zeros_like(before) if zero else before
        assert torch.equal(after.cpu().nan_to_num(nan=1.5), wanted.nan_to_num(nan=1.5))


@pytest.mark.parametrize(("grad", "total"), PAIRS, ids=str)
def test_agrees_with_the_reference(backend, device, grad, total):
    sizes = [(), (0,), (3, 5), *((n,) for n in (*cases.SMALL_SIZES, *cases.TILE_EDGES, *CHUNK_EDGES))]
    if interpreted(backend):
        sizes = [(), (0,), (3, 5), (127,), (2049,), (8192,), (8193,)]
    for zero, accumulates in itertools.product((False, True), (False, True)):
        check(tensors(sizes, grad), tensors(sizes, total) if accumulates else None, backend, device, zero)


@pytest.mark.parametrize("name", cases.VALUES)
@pytest.mark.parametrize(("grad", "total"), PAIRS, ids=str)
def test_hard_values_and_what_is_not_finite(backend, device, grad, total, name):
    for other in ("normal", "-inf"):
        grads = [cases.VALUES[name]((37,), grad), cases.VALUES["normal"]((20,), grad)]
        check(grads, [cases.VALUES[other]((37,), total), cases.VALUES["normal"]((20,), total)], backend, device, zero=True)


def test_squares_beyond_the_range_of_float32_are_told(backend, device):
    huge, tiny = torch.full((3,), 1e30, device=device), torch.full((3,), 1e-30, device=device)
    assert float(accumulate_moments([huge], None, backend=backend)) == pytest.approx(3e60, rel=1e-6)
    assert float(accumulate_moments([tiny], None, backend=backend)) == pytest.approx(3e-60, rel=1e-6)
    assert float(accumulate_moments([torch.full((3,), 1e200, dtype=F64, device=device)], None, backend=backend)) == float("inf")


def test_hundreds_of_tensors_of_a_million_elements(backend, device):
    sizes = [(n,) for n in [7] * 300] if interpreted(backend) else [*[(n,) for n in [7] * 300], (cases.LARGE_SIZE,), (1,)]
    check(tensors(sizes, F32), tensors(sizes, F32), backend, device, zero=False)


@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_by_torch(backend, device, half):
    if interpreted(backend):
        return  # its conversions are the interpreter's own
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    check([every], [torch.zeros(every.shape)], backend, device, zero=False)
    for shift in (0.0, 1.0, 2.0**-10, 2.0**-16, 60000.0):
        check([every], [torch.full_like(every, shift)], backend, device, zero=False)
    check([every], [every.flip(0)], backend, device, zero=False)


def test_elements_in_any_packed_order_and_at_any_address(backend, device):
    images = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    total = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    apart = torch.randn(11, device=device)[1:], torch.randn(12, device=device)[1:11]
    expected = [total + images, apart[1] + apart[0]]
    found = accumulate_moments([images, apart[0]], [total, apart[1]], backend=backend)
    assert_within(found, images.double().square().sum() + apart[0].double().square().sum(), SQUARES)
    assert_totals([total, apart[1]], expected, backend)


def test_tensors_with_gaps_are_for_the_reference_alone(backend, device):
    wide, total = torch.randn(6, 8, device=device), torch.zeros(6, 4, device=device)
    transposed = torch.randn(4, 6, device=device).T
    for grad, message in ((wide[:, ::2], r"grads\[0\] has gaps"), (transposed, r"totals\[0\] lies in memory with strides \(4, 1\)")):
        if backend == "reference":
            assert_within(accumulate_moments([grad], [total.zero_()]), grad.double().square().sum(), SQUARES)
            assert torch.equal(total, grad)
        else:
            with pytest.raises(BackendError, match=message):
                accumulate_moments([grad], [total], backend=backend)


def test_threads_and_instruction_sets_change_no_bit():
    if native.available() is not None:
        pytest.skip(f"{native.available()}")
    c, results = native.module(), []
    for code, dtype in enumerate((F32, F64, BF16, F16)):
        for into in {dtype, F32} - ({F32} if dtype == F64 else set()):
            results.clear()
            for level, threads in ((0, 1), (len(c.cpu_levels) - 1, 1), (1, 2), (0, 3)):
                torch.manual_seed(1)
                grads, totals = tensors([5, 200_003, 33], dtype), tensors([5, 200_003, 33], into)
                addresses = [[t.data_ptr() for t in x] for x in (grads, totals)]
                into_code = [F32, F64, BF16, F16].index(into)
                size = c.accumulate_moments(code, into_code, *addresses, [g.numel() for g in grads], False, threads, level)
                results.append((size, totals))
            for size, totals in results[1:]:
                assert size == results[0][0], (dtype, into)
                assert all(torch.equal(a, b) for a, b in zip(totals, results[0][1])), (dtype, into)


def test_the_same_bits_from_call_to_call(backend, device):
    grads = tensors([100, 9000, 3], F32, device)
    first = accumulate_moments(grads, None, backend=backend)
    assert all(torch.equal(first, accumulate_moments(grads, None, backend=backend)) for _ in range(3))


def test_autograd_is_told_what_was_written(backend, device):
    for zero in (False, True):
        grad, total, weight = torch.ones(3, device=device), torch.ones(3, device=device), torch.ones(3, device=device, requires_grad=True)
        uses_total, uses_grad = (weight * total).sum(), (weight * grad).sum()
        with torch.no_grad():
            accumulate_moments([grad], [total], zero_grads=zero, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            uses_total.backward()
        if zero:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                uses_grad.backward()
        else:
            uses_grad.backward()


def test_runs_under_inference_mode(backend, device):
    with torch.inference_mode():
        total = torch.zeros(3, device=device)
        assert float(accumulate_moments([torch.ones(3, device=device)], [total], backend=backend)) == 3
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        accumulate_moments([torch.ones(3, device=device)], [total], backend=backend)


@pytest.mark.parametrize(("grad", "total"), [(F32, F32), (BF16, F32)], ids=str)
def test_opcheck(backend, device, grad, total):
    op = torch.ops.ttcfast.accumulate_moments
    for overload in (op.default, op.zero_grads):
        grads, totals = tensors([(2, 3), (17,)], grad, device), tensors([(2, 3), (17,)], total, device)
        torch.library.opcheck(overload, (grads, totals, backend))
        torch.library.opcheck(overload, (grads, [], backend))


def test_compiles_as_one_graph(backend, device):
    def update(grads: list[Tensor], totals: list[Tensor]) -> Tensor:
        doubled = [2 * g for g in grads]
        return accumulate_moments(doubled, totals, backend=backend).sqrt() + doubled[0].sum()

    torch._dynamo.reset()
    compilers = ("aot_eager", "inductor") if backend == "cpu" or device == "cuda" else ("aot_eager",)  # Inductor takes seconds
    results = []
    for f in (update, *(torch.compile(update, fullgraph=True, backend=name) for name in compilers)):
        torch.manual_seed(3)
        grads, totals = tensors([(4, 3), (5,)], F32, device), tensors([(4, 3), (5,)], F32, device)
        results.append((f(grads, totals), totals))
    for result, totals in results[1:]:
        torch.testing.assert_close(result, results[0][0])
        assert_totals(totals, results[0][1], backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_cuda_graph_replays_it_with_tensors_known_before_and_new():
    grads, totals = tensors([(300, 40), (7,)], F32, "cuda"), tensors([(300, 40), (7,)], F32, "cuda")
    accumulate_moments(grads, totals)
    source, graph = [g.clone() for g in grads], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        known = accumulate_moments(grads, totals, zero_grads=True)
        fresh = [3 * s for s in source]
        new = accumulate_moments(fresh, totals)
    for _ in range(2):
        for g in grads:
            g.normal_()
        before, expected = [t.clone() for t in totals], [g.clone() for g in grads]
        graph.replay()
        assert_within(known, accumulate_moments(expected, None, backend="reference"), SQUARES)
        assert_within(new, accumulate_moments([3 * s for s in source], None, backend="reference"), SQUARES)
        assert all(torch.equal(t, b + e + 3 * s) for t, b, e, s in zip(totals, before, expected, source))
        assert all(bool((g == 0).all()) for g in grads)


def test_triton_makes_a_table_of_pointers_for_new_memory_alone(monkeypatch):
    """Not for new values, nor for new objects at the same addresses; but for a tensor that has moved or is of another size."""
    if (reason := registry.triton_available()) is not None:
        pytest.skip(reason)
    kernels, device = import_module("ttcfast.kernels.accumulate_moments"), "cpu" if registry.interpreting() else "cuda"
    rows, made = kernels._rows, []
    monkeypatch.setattr(kernels, "TABLES", kernels.Tables())
    monkeypatch.setattr(kernels, "_rows", lambda *arguments: made.append(arguments) or rows(*arguments))
    room = torch.randn(64, device=device)
    grads, totals = [room[:7], room[16:20], room[32:32]], tensors([7, 4, 0], F32, device)

    def step(tables: int) -> None:
        expected = [t + g for t, g in zip(totals, grads)]
        found = accumulate_moments(grads, totals, backend="triton")
        assert_within(found, sum(g.double().square().sum() for g in grads), SQUARES)
        assert_totals(totals, expected, "triton")
        assert len(made) == tables

    step(1)
    room.normal_()
    step(1)
    grads[0] = room[:7]
    step(1)
    totals[1].data = torch.randn(4, device=device)  # the same object elsewhere
    step(2)
    grads[1], totals[1] = room[16:19], totals[1][:3]  # another size at the same address
    step(3)
    accumulate_moments(grads, None, backend="triton")
    accumulate_moments(grads, None, backend="triton")
    assert len(made) == 4


A, B = torch.ones(2, 3), torch.ones(4)
FLAT, EXPANDED, WINDOWS = torch.ones(20), torch.ones(1).expand(4), torch.ones(5).as_strided((3, 3), (1, 1))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("grads is empty", lambda: accumulate_moments([], [])),
        ("there are 1 totals and 2 grads; give one total per gradient, or None", lambda: accumulate_moments([A, B], [A.clone()])),
        ("there are 0 totals and 1 grads", lambda: accumulate_moments([A], [])),
        (r"grads\[1\] is None; leave out parameters that have no gradient", lambda: accumulate_moments([A, None], None)),
        (r"totals\[0\] is 3; leave out", lambda: accumulate_moments([A], [3])),
        (r"totals\[1\] has shape \(2, 2\) and grads\[1\] \(4,\)", lambda: accumulate_moments([A, B], [A.clone(), torch.ones(2, 2)])),
        (r"grads\[1\] is torch.float64 on cpu, grads\[0\] is torch.float32", lambda: accumulate_moments([A, B.double()], None)),
        (r"grads\[1\] is torch.float32 on meta, .* grads\[0\] is on cpu", lambda: accumulate_moments([A, B.to("meta")], None)),
        (r"totals\[0\] is torch.float32 on meta", lambda: accumulate_moments([A], [A.to("meta")])),
        ("totals are torch.float64 and grads torch.float32; give totals of float32", lambda: accumulate_moments([A], [A.double()])),
        ("totals are torch.float32 and grads torch.float64; give totals of float64", lambda: accumulate_moments([A.double()], [A])),
        (
            "totals are torch.float16 and grads torch.bfloat16; give totals of float32 or bfloat16",
            lambda: accumulate_moments([A.bfloat16()], [A.half()]),
        ),
        ("grads are torch.int64; give float32", lambda: accumulate_moments([A.long()], None)),
        (r"grads\[0\] is the same memory as totals\[0\]", lambda: accumulate_moments([A], [A])),
        (r"totals\[1\] is the same memory as totals\[0\]", lambda: accumulate_moments([A, A.clone()], [B := A.clone(), B])),
        (r"grads\[0\] shares memory with totals\[0\]; .* \(clone\(\) the second\)", lambda: accumulate_moments([FLAT[:9]], [FLAT[8:17]])),
        (r"totals\[1\] shares memory with totals\[0\]", lambda: accumulate_moments([B, A.reshape(6)], [FLAT[:4], FLAT[3:9]])),
        (r"grads\[1\] shares memory with grads\[0\]", lambda: accumulate_moments([FLAT[:8], FLAT[7:]], None)),
        (r"grads\[0\] shares memory with totals\[0\]", lambda: accumulate_moments([FLAT[:10:3]], [FLAT[1:8:2]])),
        (
            r"totals\[0\] has shape \(4,\) and strides \(0,\), so several of its elements are one",
            lambda: accumulate_moments([B], [EXPANDED]),
        ),
        (r"grads\[0\] has .*; clone\(\) it", lambda: accumulate_moments([EXPANDED], None, zero_grads=True)),
        (r"totals\[0\] has shape \(3, 3\) and strides \(1, 1\)", lambda: accumulate_moments([torch.ones(3, 3)], [WINDOWS])),
        (r"grads\[0\] is torch.sparse_coo; give dense tensors", lambda: accumulate_moments([A.to_sparse()], [A])),
        (r"totals\[0\] requires grad and accumulate_moments is not diff", lambda: accumulate_moments([A], [A.clone().requires_grad_()])),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_side_by_side_is_not_shared(dtype):
    """What lies between the elements of another tensor, what is empty, and what is only read may stand anywhere."""
    wide = torch.arange(24, dtype=dtype).reshape(4, 6)
    grad, total = wide[:, :3], wide[:, 3:]
    expected = total + grad
    squares = accumulate_moments([grad, wide[1:1]], [total, torch.zeros(0, 6, dtype=dtype)])
    assert torch.equal(total, expected) and float(squares) == float(grad.double().square().sum())
    even, odd = torch.arange(9, dtype=dtype)[::2], torch.arange(1, 11, dtype=dtype)
    both = torch.stack([even, even], 1)
    accumulate_moments([both[:, 0]], [both[:, 1]])
    assert torch.equal(both[:, 1], 2 * even)
    assert float(accumulate_moments([odd[:1].expand(4), odd[1:]], None)) == 4 + float(odd[1:].double().square().sum())
