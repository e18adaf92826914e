"""ops.arm within torch: gradients, opcheck, torch.compile; and what wrong arguments are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.arm_problems import DTYPES, KINDS, MODES, SCALES, WEIGHTS, on, problem, spec_of, with_parameters
from tests.tolerances import GRADIENTS, assert_within
from ttcfast.ops import arm_ref
from ttcfast.ops.arm import arm, flatten
from ttcfast.spec import StateSpec


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_every_output(kind, mode):
    """Any two of kind, mode, scale and kind of parameters meet."""
    k, m = KINDS.index(kind), MODES.index(mode)
    space, scale, tensors = (2, 3), SCALES[(k + m) % 2], (k // 2 + m) % 2
    spec = spec_of(kind, 2, 2)
    state, candidates = problem(spec, space, torch.float64, n=2, b=3)
    spec = with_parameters(spec, space, state.shape[1], 2) if tensors else spec

    def penalties(c: Tensor) -> tuple[Tensor, ...]:
        return tuple(arm(state, c, spec, WEIGHTS, momentum=mode, scale=scale))[:6]

    assert torch.autograd.gradcheck(penalties, (candidates.requires_grad_(),))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_that_of_the_reference(backend, device, dtype):
    for kind in KINDS:
        spec = with_parameters(spec_of(kind, 2, 2), (5, 6), spec_of(kind, 2, 2).num_channels + 1, 2)
        state, candidates = problem(spec, (5, 6), dtype)
        call = flatten(state.double(), candidates.double().requires_grad_(), spec, WEIGHTS, "norm", "relative")
        (expected,) = torch.autograd.grad(arm_ref.arm_ref(call)[0].sum(), call.candidates)
        c = candidates.to(device).requires_grad_()
        arm(state.to(device), c, on(spec, device), WEIGHTS, momentum="norm", scale="relative", backend=backend).score.sum().backward()
        assert c.grad is not None and c.grad.dtype == dtype
        assert_within(c.grad, expected, GRADIENTS[dtype], float(expected.abs().max()), kind)


def test_bad_candidate_has_no_gradient_and_leaves_the_others_theirs(backend, device):
    spec = spec_of("primitive", 1, 1)
    state, candidates = (x.to(device) for x in problem(spec, (9,), torch.float32))
    candidates[0, 1, 0, 4] = float("nan")
    candidates.requires_grad_()
    arm(state, candidates, spec, backend=backend).score[0].nan_to_num(neginf=0).sum().backward()
    assert candidates.grad is not None and bool(candidates.grad.isfinite().all())
    assert bool((candidates.grad[0, 1] == 0).all()) and bool((candidates.grad[0, 2] != 0).any())


@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, (*DTYPES, torch.float32))), ids=str)
def test_opcheck(backend, device, kind, dtype):
    spec = on(with_parameters(spec_of(kind, 2, 2), (4, 5), spec_of(kind, 2, 2).num_channels + 1, 2), device)
    state, candidates = (x.to(device) for x in problem(spec, (4, 5), dtype))
    plain = spec.replace(gamma=1.4, cell_volume=0.1, boundary_mask=None, boundary_value=None)
    full, plain = ((*flatten(state, candidates, s, WEIGHTS, "norm", "relative"), backend) for s in (spec, plain))
    registered = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth, tracing, is dear
    for parameters in (full, plain):
        torch.library.opcheck(torch.ops.ttcfast.arm.default, parameters, test_utils=registered)
    # Traced with gradients, each kind on one backend: the backward pass is the same on all.
    if KINDS.index(kind) % 2 == (backend == "reference"):
        parameters = full if KINDS.index(kind) < 2 else plain
        torch.library.opcheck(torch.ops.ttcfast.arm.default, (state, candidates.requires_grad_(), *parameters[2:]))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend, device, compiler):
    spec = on(StateSpec.euler2d(gamma=torch.tensor([1.4, 1.3]), boundary_mask=torch.rand(6, 5) < 0.5), device)
    state, candidates = (x.to(device) for x in problem(spec, (6, 5), torch.float32))

    def best(s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        found = arm(s, c, spec, WEIGHTS, momentum="components", backend=backend)
        return found.score.argmax(1), found.score

    torch._dynamo.reset()  # the other backends' graphs of `best` count against its recompile limit
    compiled = torch.compile(best, fullgraph=True, backend=compiler)
    assert all(torch.equal(x, y) for x, y in zip(compiled(state, candidates), best(state, candidates)))
    grads = []
    for f in (best, compiled):
        c = candidates.clone().requires_grad_()
        f(state, c)[1].sum().backward()
        grads.append(c.grad)
    torch.testing.assert_close(grads[0], grads[1])


STATE, CANDIDATES, SPEC = torch.ones(2, 4, 5, 6), torch.ones(2, 3, 4, 5, 6), StateSpec.euler2d()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("3 channels .*at least 4 are needed", lambda: arm(STATE[:, :3], CANDIDATES[:, :, :3], SPEC)),
        ("candidates has 3 channels", lambda: arm(STATE, CANDIDATES[:, :, :3], SPEC)),
        (r"state has shape \(4, 5, 6\) \(3 axes\); expected \[N, C, \*S\]", lambda: arm(STATE[0], CANDIDATES[0], SPEC)),
        ("2 space axes", lambda: arm(STATE, CANDIDATES[:, 0], SPEC)),
        ("same N, C and", lambda: arm(STATE, CANDIDATES[:1], SPEC)),
        ("same N, C and", lambda: arm(STATE, CANDIDATES[..., :5], SPEC)),
        ("candidates are torch.float64 on cpu and state is torch.float32", lambda: arm(STATE, CANDIDATES.double(), SPEC)),
        ("candidates are torch.float32 on meta", lambda: arm(STATE, CANDIDATES.to("meta"), SPEC)),
        ("state is torch.float16; give float32", lambda: arm(STATE.half(), CANDIDATES.half(), SPEC)),
        ("state is torch.int64; give a floating-point", lambda: arm(STATE.long(), CANDIDATES.long(), SPEC)),
        ("B = 0; give at least one candidate", lambda: arm(STATE, CANDIDATES[:, :0], SPEC)),
        ("at least one channel and one cell", lambda: arm(STATE[..., :0], CANDIDATES[..., :0], SPEC)),
        ("cell_volume is -1", lambda: arm(STATE, CANDIDATES, SPEC.replace(cell_volume=-1.0))),
        ("cell_volume is -1", lambda: arm(STATE, CANDIDATES, SPEC.replace(cell_volume=-torch.ones(5, 6)))),
        (r"cell_volume has shape \(6, 5\)", lambda: arm(STATE, CANDIDATES, SPEC.replace(cell_volume=torch.ones(6, 5)))),
        (r"boundary_mask is torch.bool \(6, 5\)", lambda: arm(STATE, CANDIDATES, SPEC.replace(boundary_mask=torch.ones(6, 5) > 0))),
        ("boundary_mask is on meta", lambda: arm(STATE, CANDIDATES, SPEC.replace(boundary_mask=(torch.ones(5, 6) > 0).to("meta")))),
        (r"boundary_value has shape \(3, 1, 1\)", lambda: arm(STATE, CANDIDATES, SPEC.replace(boundary_value=torch.ones(3, 1, 1)))),
        (r"gamma has shape \(3,\); state has N = 2", lambda: arm(STATE, CANDIDATES, SPEC.replace(gamma=torch.full((3,), 1.4)))),
        ("momentum names 4 channels", lambda: arm(torch.ones(2, 6, 5, 6), torch.ones(2, 3, 6, 5, 6), StateSpec(0, (1, 2, 3, 4), 5))),
        ("momentum is 'total'; it must be one of 'sum'", lambda: arm(STATE, CANDIDATES, SPEC, momentum="total")),
        ("scale is 'log'; it must be one of 'absolute'", lambda: arm(STATE, CANDIDATES, SPEC, scale="log")),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_raw_operation_refuses_channels_that_are_not_there():
    with pytest.raises(ValueError, match="density is channel 9"):
        torch.ops.ttcfast.arm(
            STATE, CANDIDATES, None, 1.4, None, 1.0, None, None, 0.0, None, 9, [1, 2], 3, -1, False, "sum", "absolute", [1.0] * 5, "auto"
        )
