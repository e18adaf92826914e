import copy

import pytest
import torch
from torch import Tensor, nn

from ttcfast.core.shared_prefix import OtherPathError, SharedPrefix, Start
from ttcfast.models.vit import ViT, ViTConfig


class RowNoise(nn.Module):
    """Adds something else to every row of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        row = torch.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))
        return x + 0.3 * torch.sin(1.0 + row).to(x.dtype)


class Rows(nn.Module):
    """A module with the sizes of the batches that it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, *inputs):
        self.seen.append(inputs[0].shape[0])
        return self.inner(*inputs)


class Written(nn.Module):
    """A model of one function of its parts."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def linear(a: int = 6, b: int = 6) -> Rows:
    return Rows(nn.Linear(a, b))


def residual(m, x):
    x = x + m.first(x)
    return x + m.second(m.noise(x))


def in_place(m, x):
    h = m.first(x)
    h += 1  # the output of a module, changed by the model
    g = m.relu(h)  # which is h, changed by a module
    out = m.second(m.noise(g))
    out += h
    return out


def repeated(m, x):
    for _ in range(3):
        x = torch.tanh(m.first(x))
        x = m.noise(x) if _ == 1 else x
    return m.second(x)


def skips(m, x):
    h, (one, kept) = m.first(x)
    return m.second(m.noise(h)) + one + kept["two"]


def windows(m, x):  # [M, 8, 6] -> two windows of each state, its rows beside one another
    n = x.shape[0]
    h = m.first(x.reshape(n * 2, 4, 6)).view(n, 8, 6)
    return m.second(m.noise(h)).view(n, 8, 6)


def sequence_first(m, x):
    h = m.first(x.transpose(0, 1))  # [8, M, 6]
    return m.second(m.noise(h.transpose(0, 1))) + h.transpose(0, 1)


def positions(m, x):  # what a module returns need not hold states
    table, first = m.table(x), m.first(x)
    return m.second(m.noise(first + table[0])) + m.one(x)


def in_order(m, x):  # a view that only the order in memory of the module's output allows
    h = m.first(x)  # [M, 6, 8], stored as [M, 8, 6]
    return m.second(m.noise(h.transpose(1, 2).view(-1, 48)).view(-1, 8, 6))


def behind(m, x):  # noise by a hook on m.noise
    return m.second(x + m.noise(m.first(x)))


CASES = {
    "residual": (residual, {"first": linear()}),
    "in place": (in_place, {"first": linear(), "relu": nn.ReLU(inplace=True)}),
    "called again": (repeated, {"first": linear()}),
    "tuples and dicts": (skips, {"first": Rows(Written(lambda m, x: (x + 1, [2 * x, {"two": 3 * x, "n": 2}])))}),
    "windows": (windows, {"first": linear()}),
    "sequence first": (sequence_first, {"first": Rows(Written(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(6, 6)))}),
    "tables": (
        positions,
        {
            "first": linear(),
            "table": Written(lambda m, x: (torch.arange(6.0) * torch.ones(8, 1), None)),
            "one": Written(lambda m, x: torch.ones(1, 8, 6)),
        },
    ),
    "order in memory": (in_order, {"first": Rows(Written(lambda m, x: m.inner(x).transpose(1, 2), inner=nn.Linear(6, 6)))}),
}
# Rows that the first part is given per forward, other than one call of n.
SEEN = {"called again": lambda n, count: [n, n, n * count], "windows": lambda n, count: [2 * n], "sequence first": lambda n, count: [8]}


def build(name: str) -> tuple[nn.Module, list[Start]]:
    torch.manual_seed(0)
    function, parts = CASES[name]
    model = Written(function, **copy.deepcopy(parts), noise=RowNoise(), second=linear()).eval()
    return model, [Start(model.noise)]


def checked(model: nn.Module, starts: list[Start], shape=(8, 6)) -> SharedPrefix:
    shared = SharedPrefix(model, starts)
    shared.check(torch.randn(2, *shape))
    for m in model.modules():
        if isinstance(m, Rows):
            m.seen.clear()
    return shared


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n, count", [(1, 3), (2, 2), (3, 4), (8, 2)])
@torch.no_grad()
def test_the_outcome_is_the_unshared_one_and_the_first_part_ran_once_per_problem(name, n, count):
    model, starts = build(name)
    shared = checked(model, starts)
    assert shared.reason is None
    x = torch.randn(n, 8, 6)
    out = shared(x, count)
    assert model.first.seen == SEEN.get(name, lambda n, count: [n])(n, count) and model.second.seen == [n * count]
    torch.testing.assert_close(out, model(x.repeat_interleave(count, 0)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(out[0], out[1])


@torch.no_grad()
def test_noise_behind_a_module_leaves_the_module_itself_shared():
    model = Written(behind, first=linear(), noise=linear(), second=linear()).eval()
    hook = RowNoise()
    handle = model.noise.register_forward_hook(lambda module, inputs, output: hook(output))
    shared, x = checked(model, [Start(model.noise, after=True)]), torch.randn(2, 8, 6)
    out = shared(x, 3)
    assert (model.first.seen, model.noise.seen, model.second.seen) == ([2], [2], [6])
    torch.testing.assert_close(out, model(x.repeat_interleave(3, 0)))
    handle.remove()
    both = checked(model, [Start(model.noise, after=True), Start(model.noise)])  # noise within comes before noise behind
    both(x, 3)
    assert model.first.seen == [2] and model.noise.seen == [6]


@pytest.mark.parametrize("first", range(3))
@torch.no_grad()
def test_a_transformer_shares_what_precedes_its_first_active_dropout(first):
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), patch=4, width=16, depth=3, heads=2, refine=4, dropout=0.1)).eval()
    nn.init.normal_(model.out.weight, std=0.1)
    blocks = model.blocks
    for i in range(first, 3):
        blocks[i].drop1, blocks[i].drop2 = RowNoise(), RowNoise()
    shared = SharedPrefix(model, [Start(m) for m in model.modules() if isinstance(m, RowNoise)])
    assert shared.check(torch.randn(2, 4, 8, 8)) is None
    seen = {}
    handles = [m.register_forward_hook(lambda m, i, o, k=k: seen.setdefault(k, []).append(len(o))) for k, m in model.named_modules()]
    x = torch.randn(3, 4, 8, 8)
    out = shared(x, 4)
    for handle in handles:
        handle.remove()
    for i in range(3):  # modules inside a shared one run once or not at all
        assert seen[f"blocks.{i}.attention.qkv"] == ([3] if i <= first else [12])
        assert seen[f"blocks.{i}.mlp.0"] == ([3] if i < first else [12])
    torch.testing.assert_close(out, model(x.repeat_interleave(4, 0)))


@torch.no_grad()
def test_only_what_is_used_is_stored_for_all_rows():
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.LSTM(6, 6, batch_first=True), Written(lambda m, x: x[0]), nn.Linear(6, 6)]
    model = nn.Sequential(Written(lambda m, x: m.body(x) + x, body=nn.Sequential(*layers, RowNoise())), nn.Linear(6, 6)).eval()
    shared, x = checked(model, [Start(model[0].body[5])]), torch.randn(2, 8, 6)
    stored = []
    for module in layers:
        module.register_forward_hook(lambda m, i, o: stored.append(any((o[0] if type(o) is tuple else o).stride())))
    out = shared(x, 3)
    # in the second of two calls a stand-in has no extent in memory; only the last output is read by what is not shared
    assert stored == [True] * 5 + [False, False, False, False, True]
    torch.testing.assert_close(out, model(x.repeat_interleave(3, 0)))


@torch.no_grad()
def test_what_mixes_rows_or_draws_for_itself_runs_again_and_the_rest_is_shared():
    cumulative = Rows(Written(lambda m, x: x.cumsum(0)))
    model = Written(lambda m, x: m.second(m.noise(m.mix(m.first(x)))), first=linear(), mix=cumulative, noise=RowNoise(), second=linear())
    shared, x = checked(model.eval(), [Start(model.noise)]), torch.randn(2, 8, 6)
    torch.testing.assert_close(shared(x, 3), model(x.repeat_interleave(3, 0)))
    assert model.first.seen == [2, 6] and model.mix.seen == [2, 6, 6]
    model.mix = Rows(Written(lambda m, x: x + torch.randn_like(x)))
    assert "would not be the unshared one" in checked(model, [Start(model.noise)]).reason


def keeps(m, x):
    m.first(x)
    return m.second(m.noise(x)) + m.first.kept


def remember(m, x):
    m.kept = 2 * x
    return m.kept


@pytest.mark.parametrize(
    "function, first, reason",
    [
        (keeps, Written(remember), "cannot be run in two parts: The size of tensor a"),
        (lambda m, x: m.noise(m.first(x) if len(x) > 2 else x), nn.Linear(6, 6), "no module can be shared"),
        (lambda m, x: m.noise(m.first(x[:, :, :3].relu_())) + x[:, :, :3], Written(lambda m, x: x), None),
        (lambda m, x: m.noise(x.square()), nn.Linear(6, 6), "no module can be shared before the first noise"),
        (lambda m, x: m.first(x), nn.Linear(6, 6), "no noise was reached, so all candidates are the same"),
        (lambda m, x: m.noise(m.first(x)), Written(lambda m, x: object()), "object"),
    ],
)
@torch.no_grad()
def test_nothing_is_shared_where_it_would_change_the_outcome(function, first, reason):
    model = Written(function, first=first, noise=RowNoise(), second=nn.Linear(6, 6)).eval()
    if reason == "object":
        model.noise = Written(lambda m, x: torch.zeros(4))
        reason = "no module can be shared"
    shared, x = SharedPrefix(model, [Start(model.noise)]), torch.randn(3, 8, 6)
    shared.check(torch.randn(2, 8, 6))
    assert shared.reason is None if reason is None else reason in shared.reason
    torch.testing.assert_close(shared(x.clone(), 2), model(x.repeat_interleave(2, 0)))


@torch.no_grad()
def test_a_path_that_is_left_later_is_noticed():
    model = Written(lambda m, x: m.second(m.noise(m.first(x) if x.sum() < 1e6 else x)), first=linear(), noise=RowNoise(), second=linear())
    shared = checked(model.eval(), [Start(model.noise)])
    for _ in range(2):
        with pytest.raises(OtherPathError, match=r"Written took another path .* \(Rows was not called\).*use share_prefix=False"):
            shared(torch.full((2, 8, 6), 1e6), 3)
        assert "forward" not in vars(model.first)
    assert shared(torch.zeros(2, 8, 6), 3).shape == (6, 8, 6)


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model, starts = build("called again")
    own = model.first.forward
    model.first.forward = lambda *a: own(*a)  # as wrappers of others leave it
    before = [dict(vars(m)) for m in model.modules()]
    shared = checked(model, starts)
    shared(torch.randn(2, 8, 6), 3)
    with pytest.raises(RuntimeError):
        shared(torch.randn(2, 8, 5), 3)
    after = [dict(vars(m)) for m in model.modules()]
    assert [list(v) for v in after] == [list(v) for v in before]
    assert vars(model.first)["forward"] is before[1]["forward"]


@torch.no_grad()
def test_a_compiled_module_is_shared_as_a_whole_or_not_at_all():
    inner = nn.Sequential(nn.Linear(6, 6), RowNoise())
    body = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), backend="eager")
    model = Written(lambda m, x: m.tail(m.second(x)), second=body, tail=torch.compile(inner, backend="eager")).eval()
    shared, x = checked(model, [Start(inner[1])]), torch.randn(2, 8, 6)
    assert shared.reason is None and [type(s.module).__name__ for s in shared._steps] == ["OptimizedModule"]
    torch.testing.assert_close(shared(x, 3), model(x.repeat_interleave(3, 0)))


def test_it_works_in_inference_mode_and_with_gradients_on():
    model, starts = build("in place")
    x = torch.randn(2, 8, 6)
    with torch.inference_mode():
        given = x.clone()
        assert checked(model, starts).reason is None
        inferred = checked(model, starts)(given, 3)
    out = checked(model, starts)(x.requires_grad_(), 3)
    torch.testing.assert_close(out, inferred.clone())
    out.square().sum().backward()
    wide = x.detach().repeat_interleave(3, 0).requires_grad_()
    model(wide).square().sum().backward()
    torch.testing.assert_close(x.grad, wide.grad.unflatten(0, (2, 3)).sum(1))


@torch.no_grad()
def test_what_ends_the_outer_of_two_calls_passes_through_the_inner_one():
    inner = Written(lambda m, x: m.second(m.noise(m.first(x))), first=linear(), noise=RowNoise(), second=linear())
    within = checked(inner, [Start(inner.second)])
    model = Written(lambda m, x: m.tail(within(m.first(x), 2)), first=linear(), inner=inner, tail=linear()).eval()
    outer = checked(model, [Start(inner.noise)])  # which the inner call passes on its way to its own first noise
    assert outer.reason is None and outer.shared == ["first", "inner.first"]
    x = torch.randn(2, 8, 6)
    assert [len(t) for t in outer.run_prefix(x)] == [2, 2]
    assert all("forward" not in vars(m) for m in model.modules())


@torch.no_grad()
def test_a_check_that_is_interrupted_has_found_nothing():
    class Interrupts(RowNoise):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Interrupts.calls += 1
            if Interrupts.calls == 2:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Written(lambda m, x: m.second(m.noise(m.first(x))), first=linear(), noise=Interrupts(), second=linear()).eval()
    shared, x = SharedPrefix(model, [Start(model.noise)]), torch.randn(2, 8, 6)
    with pytest.raises(KeyboardInterrupt):
        shared.check(torch.randn(2, 8, 6))
    assert shared.reason == "the check ended with KeyboardInterrupt: no message" and all("forward" not in vars(m) for m in model.modules())
    torch.testing.assert_close(shared(x, 3), model(x.repeat_interleave(3, 0)))
