"""What is no dense tensor, or of a class that an operation does not take, is named before torch's dispatcher or Python's depths meet it."""

from __future__ import annotations

import pytest
import torch

from ttcfast import ops
from ttcfast.spec import Key, StateSpec

X, ROWS, KEY = torch.ones(2, 4), torch.zeros((2, 2), dtype=torch.int64), Key(1)
STATE, GROUP, SPEC = torch.ones(1, 4, 3, 3), torch.ones(1, 2, 4, 3, 3), StateSpec.euler2d()
ROW, NETWORK = torch.ones(4), ops.VelocityMLP([torch.ones(3, 4), torch.ones(4, 3)], [torch.ones(4)], [torch.ones(3)], [torch.ones(3)])
TIMES, AT_Z = torch.ones(3, 3), torch.ones(2, 3)
MLP, OFFSETS, OF_ACTIONS = ops.MLP(NETWORK.weights, [torch.ones(3), ROW], *NETWORK[2:]), torch.ones(2, 2, 4), torch.ones(3, 4)

# Each operation with one tensor in place of `t`, by the argument's name.
TENSORS = {
    ("topk", "scores"): lambda t: ops.topk(t, 1),
    ("topk", "ids"): lambda t: ops.topk(X, 1, ids=t),
    ("normal", "rows"): lambda t: ops.normal(2, (3,), key=KEY, rows=t),
    ("add_noise", "x"): lambda t: ops.add_noise(t, 1, 0.5, key=KEY, rows=ROWS),
    ("keyed_dropout", "x"): lambda t: ops.keyed_dropout(t, 0.5, key=KEY, rows=ROWS),
    ("keyed_dropout", "rows"): lambda t: ops.keyed_dropout(X, 0.5, key=KEY, rows=t),
    ("heun_predict", "k1"): lambda t: ops.heun_predict(X, t, 0.5),
    ("heun_correct", "k2"): lambda t: ops.heun_correct(X, X, t, 0.5),
    ("norm_mish", "x"): lambda t: ops.norm_mish(t, ROW, ROW, ROW),
    ("norm_mish", "rows"): lambda t: ops.norm_mish(X, ROW, ROW, ROW, rows=t),
    ("mlp_flow", "z"): lambda t: ops.mlp_flow(t, AT_Z, TIMES, NETWORK),
    ("mlp_flow", r"weights\[1\]"): lambda t: ops.mlp_flow(X, AT_Z, TIMES, NETWORK._replace(weights=[NETWORK.weights[0], t])),
    ("mlp", "x"): lambda t: ops.mlp(t, MLP),
    ("mlp", "rows"): lambda t: ops.mlp(X, MLP, rows=t),
    ("mlp", r"biases\[1\]"): lambda t: ops.mlp(X, MLP._replace(biases=[MLP.biases[0], t])),
    ("closed_loop", "offsets"): lambda t: ops.closed_loop(X, t, MLP, OF_ACTIONS, TIMES, NETWORK),
    ("closed_loop", "weight"): lambda t: ops.closed_loop(X, OFFSETS, MLP, t, TIMES, NETWORK),
    ("closed_loop", r"weights\[1\]"): lambda t: ops.closed_loop(
        X, OFFSETS, MLP, OF_ACTIONS, TIMES, NETWORK._replace(weights=[NETWORK.weights[0], t])
    ),
    ("arm", "state"): lambda t: ops.arm(t, GROUP, SPEC),
    ("arm", "candidates"): lambda t: ops.arm(STATE, t, SPEC),
}
OTHERS = {
    "shape is int; give Sequence": lambda: ops.normal(2, 3, key=KEY, rows=ROWS),
    "spec is str; give StateSpec": lambda: ops.arm(STATE, GROUP, "euler"),
    "weights is list; give ARMWeights or Mapping or None": lambda: ops.arm(STATE, GROUP, SPEC, [1.0] * 5),
    "network is list; give VelocityMLP": lambda: ops.mlp_flow(X, AT_Z, TIMES, list(NETWORK)),
    "biases is Tensor; give list or tuple": lambda: ops.mlp_flow(X, AT_Z, TIMES, NETWORK._replace(biases=torch.ones(1, 4))),
    "network is VelocityMLP; give MLP": lambda: ops.mlp(X, NETWORK),
    "policy is VelocityMLP; give MLP": lambda: ops.closed_loop(X, OFFSETS, NETWORK, OF_ACTIONS, TIMES, NETWORK),
    "scales is Tensor; give list or tuple": lambda: ops.closed_loop(
        X, OFFSETS, MLP._replace(scales=torch.ones(1, 3)), OF_ACTIONS, TIMES, NETWORK
    ),
    "grads is float; give Sequence": lambda: ops.accumulate_moments(1.0, None),
    "totals is Tensor; give Sequence or None": lambda: ops.accumulate_moments([X], X.clone()),
    "zero_grads is Tensor; give bool": lambda: ops.accumulate_moments([X], None, zero_grads=X),
}


def test_the_examples_are_sound():
    good = {
        "offsets": OFFSETS,
        "weight": OF_ACTIONS,
        r"biases\[1\]": ROW,
        "scores": X,
        "ids": ROWS.repeat(1, 2),
        "rows": ROWS,
        "k1": X,
        "k2": X,
        "x": X,
        "z": X,
        "state": STATE,
        "candidates": GROUP,
    }
    for (op, name), call in TENSORS.items():
        given = good.get(name, NETWORK.weights[1])
        call({("norm_mish", "rows"): X, ("mlp", "rows"): AT_Z}.get((op, name), given))


@pytest.mark.parametrize(("op", "name"), TENSORS, ids=" ".join)
def test_what_is_no_dense_tensor_is_named(op, name):
    call = TENSORS[op, name]
    if (op, name) not in (("topk", "ids"), ("norm_mish", "rows"), ("mlp", "rows")):
        with pytest.raises(TypeError, match=rf"^{name} (is|are a) NoneType; give an? .*tensor"):
            call(None)
    with pytest.raises(TypeError, match=rf"^{name} (is|are a) list; give an? .*tensor"):
        call([1.0])
    with pytest.raises(ValueError, match=rf"^{name} is torch.sparse_coo; give a dense tensor, as to_dense\(\) makes it$"):
        call(X.to_sparse())


@pytest.mark.parametrize("message", OTHERS)
def test_what_is_of_another_class_is_named(message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        OTHERS[message]()
