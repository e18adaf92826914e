"""ops.topk: every backend gives the order of the definition, index for index, on ties, signed zeros, NaN and sorted input too."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import cases
from ttcfast.ops import BackendError, native, registry, topk
from ttcfast.ops.topk import MOST_CUDA_K

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def by_python(scores: Tensor, k: int, ids: Tensor | None = None) -> Tensor:
    """Positions of the k best of each row by Python's own sort: NaN last, larger first, then smaller id, then smaller index."""
    names = torch.arange(scores.shape[1]).expand(scores.shape) if ids is None else ids
    rows = []
    for row, name in zip(scores.double().tolist(), names.tolist()):
        rank = [(math.isnan(x), 0.0 if math.isnan(x) else -x, name[i], i) for i, x in enumerate(row)]
        rows.append(sorted(range(len(row)), key=rank.__getitem__)[:k])
    return torch.tensor(rows, dtype=torch.int64).reshape(scores.shape[0], k)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str = "") -> None:
    """The same indices, and the same values with the signs of their zeros."""
    assert found[0].dtype == expected[0].dtype and found[1].dtype == torch.int64
    assert torch.equal(found[1].cpu(), expected[1].cpu()), f"{what}: indices differ"
    values, others = found[0].cpu(), expected[0].cpu()
    assert torch.equal(values.nan_to_num(7.0), others.nan_to_num(7.0)) and torch.equal(values.isnan(), others.isnan()), (
        f"{what}: values differ"
    )
    assert torch.equal(values.signbit() & ~values.isnan(), others.signbit() & ~others.isnan()), f"{what}: zeros changed their sign"


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that are held against the reference; one that must be there fails its tests where it is not."""
    reason = next(b for b in registry.OPS["topk"] if b.name == request.param).available()
    if reason is not None:
        required = [name.strip() for name in request.config.getoption("--require-backends").split(",")]
        (pytest.fail if request.param in required else pytest.skip)(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return backend


def check(scores: Tensor, k: int, ids: Tensor | None = None, *, backend: str, what: str = "") -> None:
    expected = topk(scores.cpu(), k, ids=None if ids is None else ids.cpu(), backend="reference")
    assert_same(topk(scores, k, ids=ids, backend=backend), expected, what)


@pytest.fixture(params=["generic", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set that this processor has."""
    if native.available() is not None:
        pytest.skip(str(native.available()))
    levels = list(native.module().cpu_levels)
    if request.param not in levels:
        pytest.skip(f"this processor has {', '.join(levels)}")
    monkeypatch.setattr(native, "highest_level", levels.index(request.param))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", cases.VALUES)
def test_the_definition_is_the_order_of_python(values, dtype):
    scores = cases.VALUES[values]((3, 57), dtype)
    ids = torch.randint(-5, 6, (3, 57))
    for k in (1, 7, 57):
        for names in (None, ids):
            positions = by_python(scores, k, names)
            expected = scores.gather(1, positions), positions if names is None else names.gather(1, positions)
            assert_same(topk(scores, k, ids=names, backend="reference"), expected)


# n, k: taken whole; filtered by maxima of 8 and more; selected by histograms; rows that end inside a block.
SHAPES = ((33, 5), (129, 129), (1025, 3), (4097, 1024), (20_011, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", cases.VALUES)
def test_every_instruction_set_gives_the_order_of_the_definition(level, values, dtype):
    for n, k in SHAPES:
        scores = cases.VALUES[values]((2, n), dtype)
        check(scores, k, backend="cpu", what=f"n {n}, k {k}")
        check(scores, k, torch.randint(-9, 9, scores.shape), backend="cpu", what=f"n {n}, k {k}, ids")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", cases.VALUES)
def test_cuda_gives_the_order_of_the_definition(values, dtype):
    for n, k in (*SHAPES, (300_007, 1024), (70_000, 2048)):
        scores = cases.VALUES[values]((2, n), dtype).cuda()
        check(scores, k, backend="cuda", what=f"n {n}, k {k}")
        check(scores, k, torch.randint(-9, 9, scores.shape, device="cuda"), backend="cuda", what=f"n {n}, k {k}, ids")


@pytest.mark.parametrize("n", [*cases.SMALL_SIZES, *cases.TILE_EDGES])
def test_sizes(backend, device, n):
    for k in sorted({1, min(n, 17), n}):
        if k <= MOST_CUDA_K or backend != "cuda":
            check(torch.randint(0, 50, (3, n)).float().to(device), k, backend=backend, what=f"k {k}")


@pytest.mark.parametrize("order", ["normal", "ascending", "descending", "constant", "shared leading bits"])
def test_a_million_scores(backend, device, order):
    scores = cases.VALUES[order]((1, cases.LARGE_SIZE), torch.float32)
    best = by_key(scores)
    for k in (1, 300, 1024):
        found = topk(scores.to(device), k, backend=backend)
        assert torch.equal(found[1].cpu(), best[:, :k]), f"k {k}"


def by_key(scores: Tensor) -> Tensor:
    """Positions from best to worst of finite scores; quicker than the reference on a million."""
    return scores.sort(dim=1, descending=True, stable=True).indices


@pytest.mark.parametrize("run", [10, 100, 1000])
@pytest.mark.parametrize(("n", "k"), [(50_257, 50), (100_000, 4096)])
def test_almost_sorted_scores(level, n, k, run):
    """Runs that ascend, and an ascending row whose runs are reversed: the bound of the selection rises late, and again and again."""
    scores = torch.randn(n)
    runs = torch.cat([part.sort().values for part in scores.split(run)])
    reversed_runs = torch.cat([part.flip(0) for part in scores.sort().values.split(run)])
    rows = torch.stack([runs, -runs.flip(0), reversed_runs, -reversed_runs])
    positions = by_key(rows)[:, :k]
    assert_same(topk(rows, k, backend="cpu"), (rows.gather(1, positions), positions))


def test_a_row_longer_than_a_segment_with_better_scores_later(backend, device):
    """The C++ path makes maxima of 2^20 scores at a time; what it kept of one must give way to the next, ties excepted."""
    scores = torch.arange(2 * 2**20 + 12_345).div(1000, rounding_mode="floor").float()[None]
    assert torch.equal(topk(scores.to(device), 1500, backend=backend)[1].cpu(), by_key(scores)[:, :1500])
    assert torch.equal(topk(-scores.to(device), 1500, backend=backend)[1].cpu(), by_key(-scores)[:, :1500])


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, device, layout):
    scores, ids = torch.randint(0, 99, (4, 3000)).float(), torch.randint(0, 500, (4, 3000))
    view = cases.LAYOUTS[layout](scores)
    for k in (10, 700):
        check(view.to(device) if backend == "cpu" else cases.LAYOUTS[layout](scores.to(device)), k, backend=backend)
        spread = torch.stack([ids, -ids], 2).to(device)[..., 0]  # every other number of something else
        check(scores.to(device), k, spread, backend=backend)
    shared = torch.arange(3000, 0, -1, device=device).expand(4, -1)
    check(scores.to(device), 10, shared, backend=backend)


def test_no_rows(backend, device):
    values, indices = topk(torch.empty(cases.EMPTY_BATCH, 9, device=device), 3, backend=backend)
    assert values.shape == indices.shape == (0, 3)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("shape", [(64, 3000), (1, 5 * 2**21 + 7)], ids=str)
def test_threads_change_nothing(shape, threads):
    if native.available() is not None:
        pytest.skip(str(native.available()))
    scores = torch.randint(0, 1000, shape).float()
    expected = topk(scores, 50, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(topk(scores, 50, backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(expected[1], by_key(scores)[:, :50])


@given(data=st.data())
def test_any_scores_and_ids(data):
    n = data.draw(st.integers(1, 400), label="n")
    pool = data.draw(st.lists(st.floats(width=32), min_size=1, max_size=30), label="values")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.tensor(pool)[torch.randint(0, len(pool), (2, n), generator=generator)]
    ids = torch.randint(-3, 3, (2, n), generator=generator) * 2**40
    k = data.draw(st.integers(1, n), label="k")
    backend = "reference" if native.available() is not None else "cpu"
    for names in (None, ids):
        positions = by_python(scores, k, names)
        expected = scores.gather(1, positions), positions if names is None else names.gather(1, positions)
        assert_same(topk(scores, k, ids=names, backend=backend), expected)


def test_merging_by_ids_equals_one_selection(backend, device):
    """A running top k of (score, id), merged with each chunk, is the top k of all: the streaming search."""
    scores = torch.randint(0, 40, (3, 1000), device=device).float()
    best, names = None, None
    for start in range(0, 1000, 170):
        chunk = scores[:, start : start + 170]
        chunk_names = torch.arange(start, start + chunk.shape[1], device=device).expand(3, -1)
        best = chunk if best is None else torch.cat([best, chunk], 1)
        names = chunk_names if names is None else torch.cat([names, chunk_names], 1)
        best, names = topk(best, min(60, best.shape[1]), ids=names, backend=backend)
    assert_same((best, names), topk(scores, 60, backend=backend))


@pytest.mark.parametrize("named", [False, True], ids=["positions", "ids"])
def test_values_are_differentiable(backend, device, named):
    scores = torch.randperm(40, device=device).reshape(2, 20).double().requires_grad_()
    ids = torch.randint(0, 99, (2, 20), device=device) if named else None
    assert torch.autograd.gradcheck(lambda x: topk(x, 5, ids=ids, backend=backend)[0], scores)


@pytest.mark.parametrize("named", [False, True], ids=["positions", "ids"])
def test_registered_as_torch_asks(backend, device, named):
    scores = torch.randn(2, 30, device=device, requires_grad=True)
    ids = torch.randint(0, 9, (2, 30), device=device) if named else None
    torch.library.opcheck(torch.ops.ttcfast.topk.default, (scores, 4, ids, backend))


def test_compiles_without_a_graph_break(backend, device):
    def best(x: Tensor, ids: Tensor) -> Tensor:
        values, indices = topk(x.sin(), 3, ids=ids, backend=backend)
        return values.sum() + indices.sum()

    x, ids = torch.randn(2, 50, device=device), torch.randint(0, 9, (2, 50), device=device)
    assert torch.equal(torch.compile(best, fullgraph=True, backend="aot_eager")(x, ids), best(x, ids))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", [(3, 50), (5, 4000), (1, 300_000)], ids=str)
def test_a_cuda_graph_replays_with_new_scores(shape):
    scores, ids = torch.randn(shape, device="cuda"), torch.randint(0, 9, shape, device="cuda")
    topk(scores, 20, ids=ids, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain, named = topk(scores, 20, backend="cuda"), topk(scores, 20, ids=ids, backend="cuda")
    for _ in range(3):
        scores.copy_(torch.randint(0, 1000, shape).float())
        graph.replay()
        assert_same(plain, topk(scores.cpu(), 20, backend="reference"))
        assert_same(named, topk(scores.cpu(), 20, ids=ids.cpu(), backend="reference"))


S, I = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64)  # noqa: E741
WRONG = {
    "k above n": (S, 6, None, ValueError, "k is 6 and scores have shape .* n = 5"),
    "k of 0": (S, 0, None, ValueError, "k is 0; give at least 1"),
    "k below 0": (S, -1, None, ValueError, "k is -1"),
    "k a float": (S, 2.0, None, TypeError, "k is 2.0; give an integer"),
    "k a bool": (S, True, None, TypeError, "k is True"),
    "no scores in a row": (torch.zeros(2, 0), 1, None, ValueError, "n = 0"),
    "integer scores": (I, 2, None, ValueError, "scores are torch.int64; give float32"),
    "one axis": (S[0], 2, None, ValueError, r"scores have shape \(5,\); give \[N, n\]"),
    "three axes": (S[None], 2, None, ValueError, "scores have shape"),
    "a list": ([1.0, 2.0], 1, None, TypeError, "scores is list"),
    "ids of another shape": (S, 2, I[:, :4], ValueError, r"ids are torch.int64 \(2, 4\); give torch.int64 \(2, 5\)"),
    "ids of one row": (S, 2, I[0], ValueError, "expand them"),
    "ids of another dtype": (S, 2, I.int(), ValueError, "ids are torch.int32"),
    "ids a list": (S, 2, [1, 2], TypeError, "ids is list"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_clear_error(wrong):
    scores, k, ids, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        topk(scores, k, ids=ids)


def test_a_backend_asked_for_runs_or_says_why():
    with pytest.raises(BackendError, match="topk: backend 'cuda' cannot run"):
        topk(S, 2, backend="cuda")  # in host memory, or without a GPU at all
    with pytest.raises(BackendError, match="no backend 'triton'"):
        topk(S, 2, backend="triton")
