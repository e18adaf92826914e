"""ops.heun_predict and ops.heun_correct: every backend against the definition, their gradients, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.tolerances import UPDATES, assert_within
from ttcfast.ops import heun_correct, heun_predict
from ttcfast.ops.heun import centered, heun_ref, update

DTYPES = (torch.float32, torch.float64)
GROUPS = (0, 1, 8, 12)
DT = 0.3


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int = 3) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype).to(device) for _ in range(count)]


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 48), (7, 1032), (0, 24)], ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_definition(backend, device, dtype, group, shape):
    if shape[-1] % max(group, 1):
        shape = (*shape[:-1], 24)
    z, k1, k2 = tensors(shape, dtype, device)
    wide = [t.double() for t in (z, k1, k2)]
    found = heun_predict(z, k1, DT, group=group, backend=backend), heun_correct(z, k1, k2, DT, group=group, backend=backend)
    expected = heun_ref(*wide[:2], None, DT, 1.0, group), heun_ref(*wide, 0.5 * DT, 1.0, group)
    for a, b in zip(found, expected):
        assert a.dtype == dtype and a.shape == shape
        assert_within(a, b, UPDATES[dtype], 3.0)
    if group == 0:
        assert torch.equal(found[0], z + DT * k1) and torch.equal(found[1], z + (0.5 * DT) * (k1 + k2))


@pytest.mark.parametrize("size", [*cases.SMALL_SIZES, *cases.TILE_EDGES])
def test_sizes_around_blocks_give_the_same_bits(backend, device, size):
    z, k1, k2 = tensors((size,), torch.float32, device)
    assert torch.equal(heun_correct(z, k1, k2, DT, backend=backend), z + (0.5 * DT) * (k1 + k2))


@pytest.mark.parametrize(("base", "second"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("group", [0, 8])
def test_every_form_of_the_update(backend, device, group, base, second):
    """The backward pass of a Heun step has no base, and weighs its two slopes differently."""
    z, k1, k2 = tensors((5, 32), torch.float64, device)
    arguments = (z if base else None, k1, k2 if second else None, 0.5 * DT, 2.0, group)
    torch.testing.assert_close(update(*arguments, backend=backend), heun_ref(*arguments), rtol=1e-14, atol=1e-15)


def test_many_threads_change_no_bit():
    z, k1, k2 = tensors((700, 1000), torch.float32, "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(heun_correct(z, k1, k2, DT, group=8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_bfloat16_slopes_update_a_float32_state(device, backend):
    if backend == "cpu":
        return  # refused: see below
    z, k1, k2 = tensors((3, 16), torch.float32, device)
    k1, k2 = k1.bfloat16(), k2.bfloat16()
    found = heun_correct(z, k1, k2, DT, group=8, backend=backend)
    assert found.dtype == torch.float32
    assert_within(found, heun_ref(z.double(), k1.double(), k2.double(), 0.5 * DT, 1.0, 8), UPDATES[torch.float32], 3.0)


@pytest.mark.parametrize("name", cases.NON_FINITE)
def test_values_that_are_not_finite_stay_in_their_group(backend, device, name):
    z, k1 = tensors((2, 16), torch.float32, device, 2)
    k1[0, 3] = float(name)
    for group in (0, 8):
        bad = ~heun_predict(z, k1, DT, group=group, backend=backend).isfinite()
        assert bad.nonzero().tolist() == ([[0, 3]] if group == 0 else [[0, i] for i in range(8)])


def test_sums_of_groups_are_kept(backend, device):
    z, k1, k2 = tensors((64, 512), torch.float32, device)
    z = z.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
    for stepped in (heun_predict(z, k1, DT, group=8, backend=backend), heun_correct(z, k1, k2, DT, group=8, backend=backend)):
        assert (stepped.unflatten(-1, (-1, 8)).sum(-1) - 1).abs().max() < 2e-6


@pytest.mark.parametrize("group", [0, 4])
def test_gradients(backend, device, group):
    z, k1, k2 = (t.requires_grad_() for t in tensors((2, 8), torch.float64, device))
    checks = (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
    for check in checks[: 1 if backend == "triton" else 2]:  # the backward pass is torch's own, whatever the backend
        assert check(lambda z, k: heun_predict(z, k, DT, group=group, backend=backend), (z, k1))
        assert check(lambda z, a, b: heun_correct(z, a, b, DT, group=group, backend=backend), (z, k1, k2))


def test_strided_tensors_go_to_the_reference_unless_asked_for():
    z, k1 = tensors((4, 8), torch.float64, "cpu", 2)
    for view in cases.LAYOUTS.values():
        torch.testing.assert_close(heun_predict(view(z), view(k1), DT, group=4), z + DT * centered(k1, 4))
    with pytest.raises(RuntimeError, match=r"strides \(1, 4\); call .contiguous\(\)"):
        heun_predict(z, k1.T.contiguous().T, DT, backend="cpu")


@pytest.mark.parametrize("group", [0, 8])
def test_opcheck_and_one_graph(backend, device, group):
    z, k1, k2 = (t.requires_grad_() for t in tensors((3, 16), torch.float32, device))
    torch.library.opcheck(torch.ops.ttcfast.heun_predict.default, (z, k1, DT, group, backend))
    torch.library.opcheck(torch.ops.ttcfast.heun_correct.default, (z, k1, k2, DT, group, backend))
    torch._dynamo.reset()

    def step(z: Tensor) -> Tensor:
        return heun_correct(z, k1, heun_predict(z, k1, DT, group=group, backend=backend), DT, group=group, backend=backend)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(z), step(z))


Z = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"k1 is torch.float32 \(2, 7\) on cpu; z is torch.float32 \(2, 8\)", lambda: heun_predict(Z, Z[:, :7], DT)),
        ("k2 is torch.float64", lambda: heun_correct(Z, Z, Z.double(), DT)),
        ("k1 is torch.bfloat16", lambda: heun_predict(Z.double(), Z.bfloat16(), DT)),
        ("the slopes are torch.float32 and torch.bfloat16", lambda: heun_correct(Z, Z, Z.bfloat16(), DT)),
        ("k1 is torch.float32 .* on meta", lambda: heun_predict(Z, Z.to("meta"), DT)),
        ("z is torch.float16; give float32 or float64", lambda: heun_predict(Z.half(), Z.half(), DT)),
        ("group is 3, which does not divide the last size, 8", lambda: heun_predict(Z, Z, DT, group=3)),
        ("group is -8; it must be at least 0", lambda: heun_predict(Z, Z, DT, group=-8)),
        ("the C\\+\\+ path takes float32 or float64", lambda: heun_predict(Z, Z.bfloat16(), DT, backend="cpu")),
        ("heun has no backend 'cuda'", lambda: heun_predict(Z, Z, DT, backend="cuda")),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
