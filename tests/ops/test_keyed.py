"""The generator behind the keyed operations: published answers, instruction sets, keys, statistics, and what all three refuse."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from tests import cases
from tests.ops.philox_words import interpreted, philox_words
from ttcfast.ops import add_noise, keyed, keyed_dropout, native, normal
from ttcfast.spec import Key

ALL = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32-10: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Rows whose halves of every number are all used; the largest of each.
ROWS = [(0, 0), (0, 1), (0, 2), (1, 1), (5, 2**40 + 2), (2**32 - 1, 2**63 - 1)]
FEW_ROWS = [ROWS[2], ROWS[4]]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
needs_extension = pytest.mark.skipif(native.available() is not None, reason="the extension is not built")


def levels() -> range:
    return range(len(native.module().cpu_levels)) if native.available() is None else range(0)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_published_answers(backend, device, counter, key, answer):
    assert philox_words(backend, device, [counter], key) == [list(answer)]


def test_many_counters_at_once(backend, device):
    counters = [(i, i * i, ALL - i, i << 20) for i in range(13)]
    assert philox_words(backend, device, counters, (7, ALL - 7)) == philox_words("reference", "cpu", counters, (7, ALL - 7))


@needs_extension
@pytest.mark.parametrize("level", levels())
def test_every_instruction_set_gives_the_published_answers_and_the_reference_integers(level):
    words = native.module().keyed_words
    for (c0, c1, c2, c3), (k0, k1), answer in KNOWN_ANSWERS:
        assert words(k0 | k1 << 32, c3, c1 | c2 << 32, 4 * c0, 4, level) == list(answer)
    for n in (*cases.SMALL_SIZES, *cases.TILE_EDGES):
        for first in (0, 4096, 4 * (2**32 - 4096)):
            group = first // 4 + torch.arange((n + 3) // 4)
            counter = (group, torch.tensor([3]), torch.tensor([1]), torch.tensor([ALL]))
            expected = torch.stack(torch.broadcast_tensors(*keyed.philox(counter, (torch.tensor([5]), torch.tensor([ALL])))), 1)
            assert words(5 | ALL << 32, ALL, 3 | 1 << 32, first, n, level) == expected.flatten()[:n].tolist()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(dtype):
    rows, stream = torch.tensor(ROWS), keyed.stream_of(3, 4)
    for n in (1, 31, 64, 1023, 4097):
        x = torch.randn(len(ROWS), n).to(dtype)
        drawn = keyed.native_rows(rows, stream, 5, True, n)[:-1]
        layout = (x.data_ptr(), [n, 1, 1, n, 0, 0, 1])
        for run, given in (
            (native.module().normal, ()),
            (native.module().add_noise, (*layout, 1, 0.3)),
            (native.module().keyed_dropout, (*layout, 2**30, 1.5)),
        ):
            found = [torch.empty_like(x) for _ in levels()]
            for out, level in zip(found, levels()):
                run(keyed.DTYPES.index(dtype), out.data_ptr(), *given, *drawn, level)
            assert all(torch.equal(out, found[0]) for out in found) and bool(found[0].isfinite().all())


def test_keys_follow_splitmix64():
    """Its published sequence from the seed 1234567 (the C source by Vigna; the numbers also stand in many languages' tests)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for site, expected in enumerate(published):
        low, high = keyed.philox_key(torch.tensor([1234567]), site)
        assert int(low) | int(high) << 32 == expected


def test_every_stream_and_site_is_its_own():
    streams = torch.cat([keyed.stream_of(seed, step) for seed in (*range(40), 2**63 - 1) for step in (*range(40), 2**63 - 1)])
    keys = torch.stack([low | high << 32 for low, high in (keyed.philox_key(streams, site) for site in (*range(20), 2**63 - 1))])
    assert streams.unique().numel() == 41 * 41 and keys.unique().numel() == 41 * 41 * 21


def neighbours() -> dict[str, tuple[Tensor, Tensor]]:
    """Two draws that differ in one thing."""
    n = 2**18

    def draw(seed: int = 1, step: int = 2, site: int = 3, problem: int = 4, candidate: int = 5, elements: int = n) -> Tensor:
        return normal(1, (elements,), key=Key(seed, step, site), rows=torch.tensor([[problem, candidate]]))[0]

    base, longer = draw(), draw(elements=n + 8)
    found = {
        "seed": (base, draw(seed=2)),
        "step": (base, draw(step=3)),
        "site": (base, draw(site=4)),
        "problem": (base, draw(problem=5)),
        "candidate": (base, draw(candidate=6)),
        "candidate's upper half": (base, draw(candidate=5 + 2**32)),
        "problem and candidate swapped": (base, draw(problem=5, candidate=4)),
        "seed and step swapped": (base, draw(seed=2, step=1)),
        "step and site swapped": (base, draw(step=3, site=2)),
    }
    return found | {f"{lag} elements apart": (base, longer[lag : n + lag]) for lag in (1, 2, 3, 4, 8)}


def test_neighbours_are_independent():
    for name, (a, b) in neighbours().items():
        for f in (lambda x: x, torch.square, lambda x: x.pow(3), lambda x: (x > 1).double()):  # dependence of sizes, not only of signs
            correlation = float(torch.corrcoef(torch.stack([f(a.double()), f(b.double())]))[0, 1])
            assert abs(correlation) < 5 / math.sqrt(a.numel()), f"{name}: {correlation}"
        assert stats.kstest(((a + b) / math.sqrt(2)).numpy(), "norm").pvalue > 1e-4, name


def test_each_bit_is_set_half_of_the_time():
    words, _ = keyed.words_ref(torch.tensor([[0, 0], [0, 1], [1, 0]]), keyed.stream_of(0, 0), 0, 2**18, False)
    for bit in range(32):
        ones = float(((words >> bit) & 1).double().sum())
        assert abs(ones - words.numel() / 2) < 5 * math.sqrt(words.numel() / 4), bit


X, R, K = torch.ones(2, 3, 5), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), Key(0)


def each_operation(rows: Tensor = R, key: Key = K, backend: str = "auto"):
    """All three, on the same rows."""
    return [
        lambda: normal(len(rows), (5,), key=key, rows=rows, backend=backend),
        lambda: add_noise(X, 2, 0.1, key=key, rows=rows, backend=backend),
        lambda: keyed_dropout(torch.ones(4, 5), 0.1, key=key, rows=rows, backend=backend),
    ]


@pytest.mark.parametrize(
    ("message", "rows"),
    [
        (r"rows are torch.int64 \(4,\); give int64 \[M, 2\]", R[:, 0]),
        (r"rows are torch.int64 \(4, 3\); give int64", torch.zeros(4, 3, dtype=torch.int64)),
        (r"rows are torch.int32 \(4, 2\); give int64", R.int()),
        (r"rows are torch.float32 \(4, 2\); give int64", R.float()),
    ],
)
def test_rows_of_another_shape_or_dtype_are_refused(message, rows):
    for call in each_operation(rows):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("message", "row"),
    [
        ("rows hold -1; problems and candidates are 0 or more", (-1, 0)),
        ("rows hold -7; problems and candidates are 0 or more", (3, -7)),
        (r"rows hold the problem 4294967296; problems are below 2\*\*32", (2**32, 0)),
    ],
)
def test_numbers_that_a_counter_cannot_hold_are_refused(backend, device, message, row):
    if device == "cuda":
        return  # not looked at there: it would make the host wait
    for call in each_operation(torch.tensor([(0, 0), (0, 1), row, (1, 1)]), backend=backend):
        with pytest.raises(ValueError, match=message):
            call()


def test_key_of_another_type_is_refused():
    for key in (3, (0, 0, 0), None):
        for call in each_operation(key=key):
            with pytest.raises(TypeError, match=r"key is .* of type \w+; give ttcfast.spec.Key"):
                call()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"seed is 9223372036854775808; it must be below 2\*\*63", lambda: Key(2**63)),
        (r"step is 1.5; give a whole number of at least 0", lambda: Key(0, 1.5)),
        (r"site is -1; it must be at least 0", lambda: Key(0, 0, -1)),
        (r"seed is 9223372036854775808; give a whole number", lambda: keyed.stream_of(2**63, 0)),
        (r"step is -1; give a whole number", lambda: keyed.stream_of(0, -1)),
        (
            r"site is -1; give a whole number",
            lambda: torch.ops.ttcfast.normal(R, keyed.stream_of(0, 0), -1, [5], torch.float32, False, "auto"),
        ),
    ],
)
def test_key_out_of_range_is_refused(message, make):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def test_rows_that_are_no_tensor_are_refused():
    for call in each_operation(rows=[[0, 0], [0, 1]]):
        with pytest.raises(TypeError, match=r"rows are a list; give an int64 tensor \[M, 2\]"):
            call()


@pytest.mark.parametrize("p", ["0.1", None])
def test_a_rate_that_is_no_number_is_refused(p):
    with pytest.raises(ValueError, match=r"p is .*; a dropout rate lies in \[0, 1\)"):
        keyed_dropout(torch.ones(4, 5), p, key=K, rows=R)


def test_stream_of_another_kind_is_refused():
    for stream in (torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.zeros((), dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"stream is .*; give int64 \[1\] on cpu, as stream_of"):
            torch.ops.ttcfast.normal(R, stream, 0, [5], torch.float32, False, "auto")


def test_rows_on_another_device_are_refused():
    with pytest.raises(ValueError, match="x is on cpu and rows on meta; give both on one device"):
        add_noise(X, 2, 0.1, key=K, rows=R.to("meta"))
    with pytest.raises(ValueError, match="x is on meta and rows on cpu"):
        keyed_dropout(torch.ones(4, 5, device="meta"), 0.1, key=K, rows=R)


def test_a_row_longer_than_the_counter_is_refused():
    long = torch.ones(1, device="cpu").expand(1, 2**34 + 1)
    with pytest.raises(ValueError, match=r"a row has 17179869185 elements; at most 2\*\*34"):
        keyed_dropout(long, 0.1, key=K, rows=R[:1])


def all_three(x: Tensor, rows: Tensor, stream: Tensor, backend: str) -> Tensor:
    noisy = torch.ops.ttcfast.add_noise(x, rows, stream, 1, 2, 0.1, False, backend).flatten(0, 1)
    kept = torch.ops.ttcfast.keyed_dropout(noisy, rows, stream, 2, 0.3, True, backend)
    return kept + torch.ops.ttcfast.normal(rows, stream, 3, list(x.shape[1:]), x.dtype, False, backend)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_graph_is_kept_when_the_step_changes(backend, device, compiler):
    if interpreted(backend, device) and compiler == "inductor":
        return  # the same graph, and the kernel is not its business
    x, rows = X.to(device), R.to(device)
    torch._dynamo.reset()
    compiled = torch.compile(all_three, fullgraph=True, backend=compiler)
    compiled(x, rows, keyed.stream_of(0, 0, device), backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (1, 2):
            stream = keyed.stream_of(0, step, device)
            assert torch.equal(compiled(x, rows, stream, backend), all_three(x, rows, stream, backend))


def test_public_functions_compile_once_more_for_any_other_key():
    """A first step is a constant to the compiler, a second one makes it a symbol."""
    torch._dynamo.reset()
    calls = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (normal, add_noise, keyed_dropout)]

    def run(key: Key) -> list[Tensor]:
        noise = calls[0](4, (5,), key=key, rows=R)
        return [noise, calls[1](X, 2, 0.1, key=key, rows=R), calls[2](noise, 0.1, key=key, rows=R)]

    for step in (0, 1):
        run(Key(3, step, 2))
    with torch.compiler.set_stance("fail_on_recompile"):
        found = run(Key(3, 2, 2))
    expected = normal(4, (5,), key=Key(3, 2, 2), rows=R)
    assert torch.equal(found[0], expected) and torch.equal(found[1], add_noise(X, 2, 0.1, key=Key(3, 2, 2), rows=R))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_graph_draws_for_whatever_rows_and_stream_hold():
    x, rows, stream = X.cuda(), R.cuda(), keyed.stream_of(0, 0, "cuda")
    all_three(x, rows, stream, "triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = all_three(x, rows, stream, "triton")
    for step in (1, 2):
        stream.copy_(keyed.stream_of(0, step, "cuda"))
        rows.copy_(R.cuda() + step)
        graph.replay()
        assert torch.equal(out, all_three(x, rows, stream, "triton"))
