"""The fake device: as strict as a GPU, counts every wait, computes what the host computes."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from tests.fake_cuda import CudaTensor, FakeCuda, on_host
from ttcfast import ops
from ttcfast.spec import Key, StateSpec

X = torch.arange(6.0).view(2, 3)


@pytest.fixture
def gpu():
    with FakeCuda() as found:
        yield found


MIXED = {
    "sum with a host tensor": lambda x: x + X,
    "host tensor changed by one of the device": lambda x: X.clone().add_(x),
    "number of the host changed by one of the device": lambda x: torch.zeros(()).add_(x.sum()),
    "joined": lambda x: torch.cat([x, X]),
    "product": lambda x: x @ X.T,
    "chosen by a mask of the host": lambda x: torch.where(X > 0, x, 0.0),
    "filled by a mask of the host": lambda x: x.masked_fill_(X > 0, 0.0),
    "values of the host at indices": lambda x: x.index_put_((torch.tensor([0], device="cuda"),), X[0]),
    "device indices of a host tensor": lambda x: X[torch.zeros(1, dtype=torch.int64, device="cuda")],
    "gathered by indices of the host": lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.int64)),
    "result in a host tensor": lambda x: torch.add(x, x, out=torch.empty(2, 3)),
    "generator of the host": lambda x: torch.randn(3, device="cuda", generator=torch.Generator()),
    "generator of the host, in place": lambda x: x.normal_(generator=torch.Generator()),
    "layer of the host": lambda x: nn.Linear(3, 2)(x),
}


@pytest.mark.parametrize("name", MIXED)
def test_host_and_device_do_not_mix(gpu, name):
    x = X.cuda()
    with pytest.raises(RuntimeError, match=r"same device|on cpu|'cuda' device type"):
        MIXED[name](x)


def test_numbers_of_the_host_mix_as_on_a_gpu(gpu):
    x, two = X.cuda(), torch.tensor(2.0)
    with gpu.counting() as waits:
        x[:, 0] = 5.0
        x[x > 4] = 1.0
        found = [x * two, torch.where(x > 1, x, two), x.clone().fill_(two), x.masked_fill(x > 1, 7.0), x.lerp(x, 0.5)]
    assert all(y.device == torch.device("cuda:0") for y in found) and not waits


def test_a_generator_of_the_device_draws_there(gpu):
    first, again = (torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(7)) for _ in range(2))
    assert first.is_cuda and torch.equal(on_host(first), on_host(again))


@pytest.mark.parametrize("read", [lambda x: x.numpy(), lambda x: torch.asarray(x).numpy(), lambda x: __import__("numpy").asarray(x)])
def test_the_memory_is_not_the_hosts(gpu, read):
    with pytest.raises(TypeError, match="to numpy"):
        read(X.cuda())


def test_pickling_and_use_after_the_block_raise():
    import pickle

    with FakeCuda():
        x = X.cuda()
        with pytest.raises(RuntimeError, match="pickled"):
            pickle.dumps(x)
    with pytest.raises(RuntimeError, match="outside of its block"):
        x + 1
    with pytest.raises((AssertionError, RuntimeError)):
        X.cuda()


WAITING = {
    "item": (lambda x: float(x.sum()), "item"),
    "condition": (lambda x: 1 if (x > 0).any() else 0, "item"),
    "list": (lambda x: x.tolist(), "a copy to the host"),
    "to the host": (lambda x: x.cpu(), "a copy to the host"),
    "to the host, by to": (lambda x: x.to("cpu", torch.float64), "a copy to the host"),
    "to the device": (lambda x: X.to(x), "a copy to the device"),
    "list to the device": (lambda x: torch.tensor([1, 2], device="cuda"), "a copy to the device"),
    "number to the device": (lambda x: torch.as_tensor(2.0, device="cuda"), "a copy to the device"),
    "into a tensor of the host": (lambda x: torch.empty(2, 3).copy_(x), "a copy to the host"),
    "mask": (lambda x: x[x > 2], "a mask as an index"),
    "values at a mask": (lambda x: x.index_put_((x > 9,), x[0, :0]), "a mask as an index"),
    "index of the host": (lambda x: x[torch.tensor([0])], "an index copied to the device"),
    "list as an index": (lambda x: x[:, [0, 1]], "an index copied to the device"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "unique": (lambda x: x.unique(), "unique"),
    "consecutive": (lambda x: torch.unique_consecutive(x), "unique"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "isin": (lambda x: torch.isin(x, x), "isin"),
    "equal": (lambda x: torch.equal(x, x), "equal"),
    "solve": (lambda x: torch.linalg.solve(x[:, :2] + 1, x[:, :2]), "linalg's check for errors"),
    "repeat by a tensor": (lambda x: x.repeat_interleave(torch.ones_like(x[:, 0], dtype=torch.int64), 0), "repeat_interleave by a tensor"),
    "filled by a number of the device": (lambda x: x.masked_fill(x > 0, x[0, 0]), "masked_fill by a tensor"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "synchronize"),
}
SILENT = {
    "index of the device": lambda x: x[x[:, 0].long().clamp(0, 1)],
    "slice": lambda x: x[:, 1:],
    "repeat": lambda x: x.repeat_interleave(3, 0),
    "sort": lambda x: x.argsort(1).gather(1, x.long().clamp(0, 2)),
    "filled": lambda x: torch.full((2,), 7.0, device="cuda"),
    "dtype": lambda x: x.to(torch.float64),
    "same device": lambda x: x.to("cuda"),
    "shape": lambda x: x.new_zeros(len(x)),
    "from pinned memory": lambda x: torch.empty(8, pin_memory=True)[:4].to("cuda", non_blocking=True),
    "by way of pinned memory": lambda x: torch.arange(3).pin_memory().to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("name", WAITING)
def test_waits_are_counted_where_they_happen(gpu, name):
    run, why = WAITING[name]
    x = X.cuda()
    with gpu.counting() as waits:
        run(x)
    assert [reason for _, reason in waits.elements()] == [why]
    ((place, _),) = waits
    first = inspect.getsourcelines(run)[1]
    assert place == f"tests/fake/test_device.py:{first}"


@pytest.mark.parametrize("name", SILENT)
def test_nothing_else_waits(gpu, name):
    x = X.cuda()
    with gpu.counting() as waits:
        assert SILENT[name](x).is_cuda
    assert not waits


def test_a_wait_in_ttcfast_is_told_by_its_line(gpu):
    from ttcfast.ttc.guardrails import check_start

    class Source:
        ndim, spec, history = 2, StateSpec.euler2d(), 1

    with gpu.counting() as waits:
        check_start(torch.ones(2, 4, 8, 8, device="cuda"), 1, None, Source())
    assert {place.split(":")[0] for place, _ in waits} == {"ttcfast/ttc/guardrails.py"}


def test_a_layer_trains_as_on_the_host(gpu):
    """Gradients by hooks and by accumulation, in place changes, views, modules and optimizers."""

    def trained(device: str) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Mish(), nn.Dropout(0.5), nn.Linear(4, 1)).to(device)
        model[2].register_full_backward_hook(lambda module, before, after: None)
        model[4].weight.register_hook(lambda g: g + torch.ones(1, 4, device=g.device))
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for _ in range(3):
            torch.manual_seed(2)
            x = X.clone().to(device)
            x[0].mul_(2)
            loss = model(x).square().mean() + model[0].weight.view(-1)[3].abs()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return [p.detach() for p in copy.deepcopy(model).parameters()]

    on_device, with_host = trained("cuda"), trained("cpu")
    assert all(isinstance(p, CudaTensor) for p in on_device)
    assert all(torch.equal(on_host(p), q) for p, q in zip(on_device, with_host))


def test_autocast_of_the_device_is_that_of_the_host(gpu):
    def product(device: str) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
            with torch.autocast(device, enabled=False):
                assert (X.to(device) @ X.T.to(device)).dtype == torch.float32
            return X.to(device) @ X.T.to(device)

    assert product("cuda").dtype == torch.bfloat16 and torch.equal(on_host(product("cuda")), product("cpu"))


def every_operation(device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The results of all operations on small tensors, and their gradients."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, grad: bool = False) -> torch.Tensor:
        x = torch.rand(shape, generator=generator).to(device, dtype)
        return x.requires_grad_() if grad else x

    rows, key = torch.stack([torch.arange(4), torch.arange(4) % 2], 1).to(device), Key(1, 2, 3)
    state, candidates = made(2, 4, 6, 5) + 1, made(2, 3, 4, 6, 5, grad=True)
    layout = StateSpec.fields("a", "b", "c", "d", conserved=("a", "b"), bounds={"c": (0, 1)}, divergence_free=("a", "b"))
    z, bias = made(4, 8, grad=True), made(6, grad=True)
    layers = ops.VelocityMLP([made(6, 8, grad=True), made(8, 6, grad=True)], [made(8)], [made(6)], [made(6)])
    found: list[torch.Tensor] = [
        ops.arm(state, candidates, StateSpec.euler2d(), scale="relative").score,
        ops.arm(state, candidates, layout).score,
        *ops.topk(made(3, 50), 4),
        ops.normal(4, (5,), key=key, rows=rows, dtype=dtype),
        ops.keyed_dropout(z, 0.3, key=key, rows=rows),
        ops.add_noise(z, 1, 0.1, key=key, rows=rows),
        ops.heun_predict(z, made(4, 8), 0.5, group=4),
        ops.norm_mish(made(4, 6, grad=True), bias, made(6), made(6)),
        ops.mlp_flow(z, made(4, 6), made(3, 6), layers, group=4),
        ops.mlp(z, ops.MLP(layers.weights, [made(6), *layers.biases], layers.scales, layers.shifts)),
    ]
    wanted = [candidates, z, bias, *layers.weights]
    gradients = torch.autograd.grad(sum(x.sum() for x in found if x.requires_grad), wanted)
    totals = [made(3, 4), made(5)]
    squares = ops.accumulate_moments([made(3, 4), made(5)], totals)
    return [x.detach() for x in (*found, *gradients, squares, *totals)]


def test_every_operation_runs_its_cuda_side(gpu):
    found, expected = every_operation("cuda"), every_operation("cpu")
    assert all(torch.equal(on_host(x), y) for x, y in zip(found, expected))
    pytest.importorskip("triton")
    assert len(gpu.launches) >= 10


def test_operations_refuse_tensors_of_two_devices(gpu):
    with pytest.raises(ValueError, match="on one device"):
        ops.topk(X.cuda(), 1, ids=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"on cpu; z is .* on cuda:0"):
        ops.heun_predict(X.cuda(), X, 0.5)


def test_a_recorded_graph_repeats_its_operations_on_new_contents(gpu):
    x = X.cuda()
    noise = {"key": Key(1), "rows": torch.stack([torch.zeros(2, dtype=torch.int64), torch.arange(2)], 1).cuda()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y = ops.add_noise(x, 1, 0.1, **noise)[:, 0]
        total = torch.zeros(2, device="cuda")
        total += y.sum(1)
        part = (2 * y)[:, 1:]
        part[0] = -1.0
    x.copy_(X + 10)
    graph.replay()
    expected = ops.add_noise(X + 10, 1, 0.1, key=Key(1), rows=on_host(noise["rows"]))[:, 0]
    assert torch.equal(on_host(y), expected) and torch.equal(on_host(total), expected.sum(1))
    assert torch.equal(on_host(part)[1], 2 * expected[1, 1:]) and (on_host(part)[0] == -1).all()


@pytest.mark.parametrize("name", WAITING)
def test_a_graph_records_no_wait(gpu, name):
    x = X.cuda()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        WAITING[name][0](x)
    assert not torch.cuda.is_current_stream_capturing()
