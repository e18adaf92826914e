"""The Triton side of ops.arm: what the compiler makes of it, sums in a written order, and a CUDA graph of it."""

from __future__ import annotations

import re
from importlib import import_module
from itertools import pairwise, product

import pytest
import torch

from tests.ops.arm_problems import WEIGHTS, on, problem, reference
from ttcfast.ops import registry
from ttcfast.ops.arm import ArmScores, arm
from ttcfast.spec import StateSpec

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
fold = import_module("ttcfast.kernels.fold").fold
compiled_only = pytest.mark.skipif(
    registry.interpreting(), reason="under TRITON_INTERPRET kernels are defined so that they cannot be compiled"
)


def loads(name: str, architecture: int) -> list[str]:
    """The global loads of a variant's PTX, as ``eviction width``."""
    from bench.aot import compile_for
    from ttcfast.kernels import arm as kernels

    found = next(v for v in kernels.variants() if v[0] == name)
    ptx = compile_for(architecture, *found[1:5]).asm["ptx"]
    return [f"{kind or 'plain'} {width}" for kind, width in re.findall(r"ld\.global(?:\.L1::(\w+))?[\w:.]*?((?:\.v\d)?\.b\d+)\b", ptx)]


@compiled_only
@pytest.mark.parametrize(("stored", "width"), [("fp32", ".v4.b32"), ("bf16", ".v4.b32"), ("fp64", ".v2.b64")])
@pytest.mark.parametrize("architecture", [80, 90])
def test_contiguous_fields_are_read_16_bytes_at_a_time(stored, width, architecture):
    """Candidates are thrown out of the cache first, the state, which they share, last; nothing else is read."""
    found = loads(f"arm_partial {stored} conserved", architecture)
    per_channel = 2 if stored != "bf16" else 1
    assert sorted(found) == sorted([f"evict_first {width}"] * 4 * per_channel + [f"evict_last {width}"] * 4 * per_channel)


@compiled_only
def test_fields_over_the_cells_do_not_narrow_the_candidates_loads():
    found = loads("arm_partial fp32 conserved with fields", 90)
    assert found.count("evict_first .v4.b32") == 8 and not [f for f in found if f.startswith("evict_first") and f != "evict_first .v4.b32"]


def config(*arguments, **options):
    from ttcfast.kernels.arm import pick_config

    return pick_config(*arguments, **options)


def test_the_order_of_the_sums_depends_on_cells_and_dtype_alone():
    for cells, element in product((1, 17, 4096, 65536, 65537, 1 << 22), (2, 4, 8)):
        shapes = product((1, 8), (1, 3, 64, 1024), (None, (8, 0), (9, 0), (10, 0)), (False, True))
        found = [config((n, b, 4, cells), capability, element, contiguous) for n, b, capability, contiguous in shapes]
        assert len({(c.tile, c.vector, c.threads, c.step) for c in found}) == 1


@pytest.mark.parametrize("cells", [64**2, 128**2, 512**2])
def test_candidates_share_a_program_only_where_enough_programs_are_left(cells):
    for n, b, capability in product((1, 8), (1, 5, 64, 1024), ((8, 0), (9, 0))):
        c = config((n, b, 4, cells), capability)
        programs = n * -(-cells // c.tile) * -(-b // c.group)
        assert c.group == 1 or programs >= 4 * {(8, 0): 108, (9, 0): 132}[capability]
        assert c.group < 2 * b
    assert config((1, 1024, 4, cells), (9, 0)).group == 8


@pytest.fixture
def triton_device() -> str:
    if (reason := registry.triton_available()) is not None:
        pytest.skip(reason)
    return "cpu" if registry.interpreting() else "cuda"


@triton.jit
def fold_kernel(x, y, TILE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    place = tl.arange(0, TILE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y + tl.arange(0, WIDTH), fold(tl.load(x + place), TILE, WIDTH, VECTOR, THREADS))


@pytest.mark.parametrize(("tile", "width", "vector", "threads"), [(64, 4, 4, 8), (32, 1, 8, 4), (16, 2, 2, 2), (8, 8, 1, 1)])
def test_a_fold_adds_in_the_order_that_it_says(triton_device, tile, width, vector, threads):
    x = torch.randn(tile, width, device=triton_device) * 10.0 ** torch.randint(-6, 6, (tile, width), device=triton_device)
    y = torch.empty(width, device=triton_device)
    fold_kernel[(1,)](x, y, TILE=tile, WIDTH=width, VECTOR=vector, THREADS=threads)
    expected, added = x, 1
    while len(expected) > 1:
        if added >= vector and len(expected) > threads:
            expected = expected[: len(expected) // 2] + expected[len(expected) // 2 :]
        else:
            expected = expected[::2] + expected[1::2]
        added *= 2
    assert torch.equal(y, expected[0])


@pytest.mark.parametrize("kind", [StateSpec.euler1d(), StateSpec(1, (0,), None, pressure=2, variables="primitive", ndim=1)])
def test_a_tile_that_is_unlike_the_others_is_treated_on_its_own(triton_device, kind):
    """One tile with a negative density, one with a negative pressure, one with masked cells, one with a NaN, out of five."""
    cells = 5 * 256 - 56
    spec = kind.replace(boundary_mask=torch.arange(cells) == 700, boundary_value=torch.randn(4, 1), cell_volume=0.01)
    state, candidates = problem(spec, (cells,), torch.float32, n=1, b=4)
    candidates[:] = state.unsqueeze(1) * (1 + 1e-3 * torch.rand(1, 4, 1, 1))
    last = spec.energy if spec.pressure is None else spec.pressure
    candidates[0, :3, last] += 2
    candidates[0, 0, spec.density, 300] = -0.3
    candidates[0, 1, last, 900] = -0.5
    candidates[0, 2, spec.density, 5] = float("nan")
    expected = reference(state, candidates, spec, scale="relative")
    found = arm(state.to(triton_device), candidates.to(triton_device), on(spec, triton_device), WEIGHTS, scale="relative", backend="triton")
    for name in ArmScores._fields[:6]:
        torch.testing.assert_close(getattr(found, name).double().cpu(), getattr(expected, name), rtol=3e-6, atol=1e-6, msg=name)
    assert (found.positivity[0, :2] > 0).all() and found.finite.tolist() == [[True, True, False, True]]


def test_no_bit_depends_on_where_in_memory_the_candidates_lie(triton_device):
    """An odd number of cells puts every candidate at another alignment, which the compiler lays out in another way."""
    spec = StateSpec.euler1d(cell_volume=0.3)
    state, candidates = (x.to(triton_device) for x in problem(spec, (1025,), torch.float32, n=1, b=3))
    whole = arm(state, candidates, spec, scale="relative", backend="triton")
    for first in range(3):
        room = torch.empty(candidates[:, first:].numel() + 1, device=triton_device)
        moved = room[1:].view_as(candidates[:, first:]).copy_(candidates[:, first:])
        for part in (candidates[:, first:], moved):
            found = arm(state, part, spec, scale="relative", backend="triton")
            assert all(torch.equal(x[:, first:], y) for x, y in zip(whole, found))


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_any_program_may_be_the_last_to_arrive(triton_device, monkeypatch, scale):
    """Two groups of two problems with one candidate too few, 5 tiles each, in an order that the interpreter would not choose."""
    kernels = import_module("ttcfast.kernels.arm")
    config = kernels.pick_config
    monkeypatch.setattr(kernels, "pick_config", lambda *arguments: config(*arguments)._replace(group=4))
    spec = StateSpec.euler1d(cell_volume=0.3)
    state, candidates = (x.to(triton_device) for x in problem(spec, (5 * 256,), torch.float32, n=2, b=7))
    expected = arm(state, candidates, spec, WEIGHTS, scale=scale, backend="triton")
    for name in ArmScores._fields[:6]:
        theirs = getattr(reference(state.cpu(), candidates.cpu(), spec, scale=scale), name)
        torch.testing.assert_close(getattr(expected, name).double().cpu(), theirs, rtol=3e-6, atol=1e-6, msg=name)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "MOST_FOLDED", 0)  # in two launches
        apart = arm(state, candidates, spec, WEIGHTS, scale=scale, backend="triton")
        assert all(torch.equal(x, y) for x, y in zip(apart, expected))
    if not registry.interpreting():
        return  # a GPU's order is its own
    from triton.runtime.interpreter import interpreter_builder

    place = interpreter_builder.set_grid_idx
    for order in (torch.randperm(20).tolist(), list(reversed(range(20)))):
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: place(order[x], y, z))
        found = arm(state, candidates, spec, WEIGHTS, scale=scale, backend="triton")
        assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_counters_are_shared_by_a_stream_and_owned_by_a_graph(monkeypatch):
    """A graph may be replayed beside any other launch, so two captured launches count apart; the reserve is filled outside captures."""
    launching = import_module("ttcfast.kernels.launch")
    counters, state, zeros = launching.Counters(), [False, 7], torch.zeros
    monkeypatch.setattr(launching, "capturing_on", lambda device: state)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device, **options: zeros(*sizes, **options))
    cuda = torch.device("cuda:0")
    first = counters.get(10, cuda)
    assert counters.get(12, cuda) is first and len(counters.get(5000, cuda)) >= 5000
    state[1] = 8
    assert counters.get(10, cuda).data_ptr() != first.data_ptr()
    state[0] = True
    taken = [counters.get(10, cuda) for _ in range(3)]
    assert all(len(x) == 10 and not x.any() and x.untyped_storage().data_ptr() == taken[0].untyped_storage().data_ptr() for x in taken)
    places = [x.storage_offset() for x in taken]
    assert all(b - a >= 10 for a, b in pairwise(places))
    assert len(counters.get(counters.RESERVE, cuda)) == counters.RESERVE  # more than is left: the graph sets them to 0 itself
    state[0] = False
    counters.reserve[cuda] = counters.reserve[cuda][: counters.RESERVE // 4]
    counters.get(1, cuda)
    assert len(counters.reserve[cuda]) == counters.RESERVE


@compiled_only
def test_sums_are_published_before_they_are_counted_and_read_past_the_nearest_cache():
    """A barrier, an atomic that releases and acquires on the whole GPU, a barrier, and then loads of the second level, 16 bytes wide."""
    from bench.aot import compile_for
    from ttcfast.kernels import arm as kernels

    found = next(v for v in kernels.variants() if v[0] == "arm_partial fp32 conserved in one launch")
    ptx = compile_for(90, *found[1:5]).asm["ptx"]
    before, counting, after = re.split(r"(atom\.global\S* )", ptx)
    assert counting == "atom.global.gpu.acq_rel.add.u32 "
    assert "bar.sync" in before[-400:] and "bar.sync" in after[:400]
    widths = re.findall(r"ld\.global\.(\S+)", after)
    assert widths.count("cg.v4.b32") >= 8 and all(w.startswith("cg.") for w in widths if ".v4" in w), widths
    assert "ld.global.cg" not in before


def test_nothing_asks_the_device_for_a_value(triton_device, monkeypatch):
    """Such a question waits for the device, and a CUDA graph cannot hold it."""
    spec = on(
        StateSpec.euler2d(boundary_mask=torch.eye(6, 5) > 0, gamma=torch.tensor([1.4, 1.3]), cell_volume=torch.ones(6, 5)), triton_device
    )
    state, candidates = (x.to(triton_device) for x in problem(spec, (6, 5), torch.float32, n=2, b=2))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} was called"))
    for scale in ("absolute", "relative"):
        arm(state, candidates, spec, WEIGHTS, scale=scale, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_a_cuda_graph_holds_the_operation_and_scores_new_data(scale):
    mask = torch.zeros(33, 32, dtype=torch.bool)
    mask[0] = True
    spec = on(StateSpec.euler2d(boundary_mask=mask, gamma=torch.tensor([1.4, 1.3])), "cuda")
    state, candidates = (x.cuda() for x in problem(spec, (33, 32), torch.float32, b=5))

    def run():
        return arm(state, candidates, spec, WEIGHTS, momentum="components", scale=scale, backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles; a graph cannot
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    for seed in range(3):
        torch.manual_seed(seed)
        new_state, new_candidates = problem(spec, (33, 32), torch.float32, b=5)
        new_candidates[1, 2, 0, 3, 4] = float("nan") if seed == 1 else 1.0
        state.copy_(new_state)
        candidates.copy_(new_candidates)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(held, run()))
