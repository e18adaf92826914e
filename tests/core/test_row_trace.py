"""Noise belongs to the state it is keyed by, however a model folds its batch; where candidates depend on one another, that is said."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.dropouts import DropPath
from tests.surrogates import DropNet, euler_state
from ttcfast.core import candidate_forward, row_trace
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec
from ttcfast.stochastic_sampling import noise_sites

SPEC, IDS = StateSpec.euler2d(), torch.arange(1, 5)
LATENT = {"dropout": False, "latent_sigma": 0.5, "latent_at": "drop"}


class Folds(nn.Module):
    """Lifts channels, hands them to a noisy module in some layout, and takes the state out again."""

    def __init__(self, out, back, drop: nn.Module | None = None, history: int = 1, zero: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out, self.back, self.history = out, back, history
        self.lift, self.drop, self.head = nn.Conv2d(4, 8, 1), drop or nn.Dropout(0.3), nn.Conv2d(8, 4, 1)
        if zero:
            nn.init.zeros_(self.lift.weight)
            nn.init.zeros_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
        m, h = len(x), self.history
        z = self.lift(x.unflatten(1, (h, 4)).flatten(0, 1)).unflatten(0, (m, h))  # [M, h, 8, H, W]
        return self.head(self.back(self.drop(self.out(z)), m).mean(1))


def tokens(z: Tensor) -> Tensor:  # [L, M, D], L = H W
    return z[:, 0].flatten(2).permute(2, 0, 1)


def from_tokens(z: Tensor, m: int) -> Tensor:
    return z.permute(1, 2, 0).unflatten(2, (8, 8)).unsqueeze(1)


LAYOUTS = {
    "(b t) c h w": (lambda z: z.flatten(0, 1), lambda z, m: z.unflatten(0, (m, -1))),
    "(t b) c h w": (lambda z: z.transpose(0, 1).flatten(0, 1), lambda z, m: z.unflatten(0, (-1, m)).transpose(0, 1)),
    "t b c h w": (lambda z: z.transpose(0, 1), lambda z, m: z.transpose(0, 1)),
    "(t b h) w c": (
        lambda z: z.permute(1, 0, 3, 4, 2).flatten(0, 2),
        lambda z, m: z.unflatten(0, (-1, m, 8)).permute(1, 0, 4, 2, 3),
    ),
    "h w (t b) c": (
        lambda z: z.permute(3, 4, 1, 0, 2).flatten(2, 3),
        lambda z, m: z.unflatten(2, (-1, m)).permute(3, 2, 4, 0, 1),
    ),
    "c (b t h w)": (
        lambda z: z.permute(2, 0, 1, 3, 4).flatten(1),
        lambda z, m: z.unflatten(1, (m, -1, 8, 8)).permute(1, 2, 0, 3, 4),
    ),
}
DROPS = {"entries": lambda: nn.Dropout(0.3), "alpha": lambda: nn.AlphaDropout(0.3), "latent": nn.Identity, "path": lambda: DropPath(0.4)}


def window(history: int, n: int = 2) -> Tensor:
    return torch.stack([euler_state(n, seed=s) for s in range(history)], 1) if history > 1 else euler_state(n)


def candidates(fm: Surrogate, x: Tensor, ids: Tensor = IDS, **options) -> Tensor:
    return fm.candidates(x, ids, **{"seed": 0, "step": 1, **options})


def independent(fm: Surrogate, x: Tensor, tolerance: float = 1e-5, distinct: bool = True) -> None:
    """Each candidate is the same in any chunk, order and batch, of each call's first layout; and another one is another."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, twin = candidates(fm, x), copy.deepcopy(fm)
        for size in (1, 2, 3):
            parts = torch.cat([candidates(twin, x, part) for part in IDS.split(size)], 1)
            torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)
        for n in range(len(x)):
            alone = candidates(twin, x[n : n + 1], IDS.flip(0), problem_ids=torch.tensor([n]))
            torch.testing.assert_close(alone, whole[n : n + 1].flip(1), rtol=tolerance, atol=tolerance)
        each = candidates(twin, x, torch.stack([IDS, IDS.flip(0)]))  # those of beams
        torch.testing.assert_close(each, torch.stack([whole[0], whole[1].flip(0)]), rtol=tolerance, atol=tolerance)
        sample = twin.sample_next(x[0], seed=3)
        torch.testing.assert_close(
            sample, twin.sample_next(x[:1].expand(3, *x.shape[1:]), seed=3, multi=True)[0], rtol=tolerance, atol=tolerance
        )
    for n in range(len(x)):
        differences = [(whole[n, i] - whole[n, j]).abs().max() for i in range(4) for j in range(i)]
        assert (min if distinct else max)(differences) > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("noise", DROPS)
@pytest.mark.parametrize("history", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_that_of_the_state_in_any_layout(layout, history, noise):
    config = LATENT if noise == "latent" else {}
    model = Folds(*LAYOUTS[layout], DROPS[noise](), history)
    # few paths are dropped or kept, so that some candidates have the same
    independent(Surrogate(model, SPEC, history=history, stochastic=config), window(history), distinct=noise != "path")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_tensors_too_large_to_be_compared_whole_a_part_is_enough(layout, monkeypatch):
    monkeypatch.setattr(row_trace, "_COMPARED", 700)  # of 1536 entries of each state
    independent(Surrogate(Folds(*LAYOUTS[layout], history=3), SPEC, history=3), window(3))


@pytest.mark.parametrize("first", ["one", "all"])
def test_tokens_first_whatever_their_number_and_that_of_the_states(first):
    fm = Surrogate(Folds(tokens, from_tokens), SPEC)
    candidates(fm, euler_state(2), IDS[:1] if first == "one" else IDS)
    independent(fm, euler_state(2))


@pytest.mark.parametrize("layout", ["(b t) c h w", "(t b) c h w"])
def test_entries_that_say_nothing_are_settled_by_what_noise_there_does(layout):
    fm = Surrogate(Folds(*LAYOUTS[layout], nn.Identity(), 2, zero=True), SPEC, history=2, stochastic=LATENT)
    independent(fm, window(2))


def test_batch_first_windows_draw_what_they_always_drew():
    fm = Surrogate(Folds(*LAYOUTS["(b t) c h w"], history=2), SPEC, history=2)
    (site,) = noise_sites(fm.model, fm.stochastic)
    found, kept = [], fm.model.drop.register_forward_hook(lambda m, i, o: found.append((i[0], o)))
    candidates(fm, window(2))
    kept.remove()
    given, out = found[-1]
    from ttcfast import ops
    from ttcfast.spec import Key

    rows = torch.cartesian_prod(torch.arange(2), IDS)
    expected = ops.keyed_dropout(given.unflatten(0, (8, 2)), 0.3, key=Key(0, 1, site.number), rows=rows)
    assert torch.equal(out, expected.flatten(0, 1))


class Attends(nn.Module):
    """Attention of torch's, sequence first, over windows folded outside the states or inside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.lift, self.attention, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, dropout=0.3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        m = len(x)
        z = self.lift(x.flatten(2).transpose(1, 2)).unflatten(1, (4, 16))  # [M, 4, 16, 8]
        z = (z if self.inside else z.transpose(0, 1)).flatten(0, 1).transpose(0, 1)
        z = self.attention(z, z, z)[0].transpose(0, 1)
        z = z.unflatten(0, (m, 4)) if self.inside else z.unflatten(0, (4, m)).transpose(0, 1)
        return self.head(z.flatten(1, 2)).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("inside", [True, False])
def test_attention_weights_too(inside):
    independent(Surrogate(Attends(inside), SPEC), euler_state(2))


class Table(nn.Module):
    """A positional table with dropout on it."""

    def __init__(self, use, shape: tuple[int, ...], drop: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use, self.table = use, nn.Parameter(torch.randn(shape))
        self.lift, self.drop, self.head = nn.Linear(4, 8), drop or nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.use(self.lift(x.flatten(2).transpose(1, 2)), self.drop(self.table))
        return self.head(torch.tanh(z)).transpose(1, 2).reshape(x.shape)


TABLES = {
    "[L, D]": (lambda z, t: z + t, (64, 8)),
    "[1, L, D]": (lambda z, t: z + t, (1, 64, 8)),
    "[L, 1, D]": (lambda z, t: (z.transpose(0, 1) + t).transpose(0, 1), (64, 1, 8)),
    "[D]": (lambda z, t: z + t.unsqueeze(-2), (8,)),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("noise", ["dropout", "latent"])
def test_every_state_gets_its_own_draw_of_a_table(table, noise):
    config = {} if noise == "dropout" else LATENT
    independent(Surrogate(Table(*TABLES[table], nn.Dropout(0.7)), SPEC, stochastic=config), euler_state(2))


def test_a_table_that_the_model_takes_for_one_alone_has_one_draw_for_all_and_that_is_said():
    model = Table(lambda z, t: (z.transpose(0, 1) + t[:, None]).transpose(0, 1), (64, 8))
    model.head = nn.Sequential(model.head, nn.Dropout(0.1))
    fm, x = Surrogate(model, SPEC), euler_state(2)
    with pytest.warns(
        RuntimeWarning, match=r"all candidates of a step have the same noise at 'drop' of Table: the tensors there are the same"
    ):
        whole = candidates(fm, x)
    torch.testing.assert_close(torch.cat([candidates(fm, x, i) for i in IDS.split(1)], 1), whole)
    only = fm.variant(stochastic={"dropout": False, "latent_sigma": 0.3, "latent_at": "drop"})
    with pytest.warns(RuntimeWarning, match="the same noise at 'drop'"):
        whole = candidates(only, x)
    torch.testing.assert_close(whole, whole[:, :1].expand_as(whole))
    assert not torch.allclose(whole[:, 0], only.deterministic(x))
    torch.testing.assert_close(candidates(only, x, IDS[2:3]), whole[:, 2:3])


class Fourier(nn.Module):
    """Modes, time-major and complex, with dropout on them in real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft2(x.unflatten(1, (2, 4)).transpose(0, 1).flatten(0, 1))
        z = torch.view_as_complex(self.drop(torch.view_as_real(z)))
        return torch.fft.irfft2(z, s=x.shape[2:]).unflatten(0, (2, len(x))).mean(0)


def test_modes_and_outputs_of_other_types():
    @dataclass
    class Output:
        state: Tensor

    class Named(Fourier):
        def forward(self, x: Tensor) -> Output:
            return Output(super().forward(x))

    independent(Surrogate(Named(), SPEC, history=2, unpack=lambda out: out.state), window(2))


def test_complex_tensors_are_traced():
    class Complex(Fourier):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.fft.rfft2(x.unflatten(1, (2, 4)).transpose(0, 1).flatten(0, 1))
            return torch.fft.irfft2(self.drop(z), s=x.shape[2:]).unflatten(0, (2, len(x))).mean(0)

    model = Complex().eval()
    (site,) = sites = noise_sites(model, Surrogate(model, SPEC).stochastic)
    found = row_trace.row_trace(model, sites, torch.randn(8, 8, 8), lambda out: out)
    assert found.axes == {(site.number, 0): row_trace.RowAxis(0, 2, 1, ndim=4)}


@pytest.mark.parametrize("options", [{"compile": True}, {"dtype": torch.bfloat16}, {"compile": True, "dtype": torch.bfloat16}])
def test_compiled_and_in_low_precision_too(options, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, **settings: compile(graph, **settings, backend="eager"))
    fm = Surrogate(Folds(*LAYOUTS["(t b) c h w"], history=2), SPEC, history=2)
    low, x = fm.variant(**options), window(2)
    whole, tolerance = candidates(low, x), 0.02 if "dtype" in options else 1e-5
    parts = torch.cat([candidates(low, x, i) for i in IDS.split(1)], 1)
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)
    expected = candidates(fm, x)
    assert (whole - expected).abs().max() < 0.1 * expected.std(1).mean()


def test_a_tensor_that_was_not_traced_is_told_by_size_and_that_is_said():
    class Turns(DropNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.amax() < 100 else self.head(self.drop(self.lift(x).flatten(2)).unflatten(2, (8, 8)))

    fm = Surrogate(Turns(), SPEC)
    candidates(fm, euler_state(2))
    with pytest.warns(
        RuntimeWarning, match=r"module 'drop' is given a tensor of shape \(8, 8, 64\), which it was not when the model was traced"
    ):
        candidates(fm, 100 * euler_state(2))


def test_once_for_each_layout_on_a_copy_that_shares_its_tensors(monkeypatch):
    traced = []

    def counted(model, *args):
        traced.append(model)
        return row_trace.row_trace(model, *args)

    monkeypatch.setattr(candidate_forward, "row_trace", counted)
    fm, x = Surrogate(DropNet(), SPEC), euler_state(2)
    for step in range(3):
        candidates(fm, x, step=step)
        candidates(fm, x, IDS[:1], step=step)
    assert len(traced) == 1 and fm.model.calls == [8, 2] * 3  # nothing of the trace is left on the model
    candidates(fm, x, stochastic={"dropout": False, "latent_sigma": 0.1})
    candidates(fm, euler_state(2, 6))
    candidates(fm, x, stochastic={"dropout_p": 0.4})  # other rates at the same places
    assert len(traced) == 3
    fm.model.drop = nn.Dropout(0.2)
    candidates(fm, x)
    assert len(traced) == 4
    model = DropNet()
    other, _ = row_trace._copied(model, [])
    assert all(a is b for a, b in zip(model.state_dict(keep_vars=True).values(), other.state_dict(keep_vars=True).values()))


def test_a_model_that_cannot_be_copied_is_traced_itself():
    model = Folds(*LAYOUTS["(t b) c h w"], history=2)
    model.lock = (i for i in ())  # no generator can be copied
    fm, x = Surrogate(model, SPEC, history=2), window(2)
    whole = candidates(fm, x)
    torch.testing.assert_close(torch.cat([candidates(fm, x, i) for i in IDS.split(1)], 1), whole)


def test_states_that_are_not_finite_or_all_alike_are_traced_too():
    for value in (0.0, float("nan"), float("inf")):
        fm = Surrogate(Folds(*LAYOUTS["(t b) c h w"], history=2), SPEC, history=2)
        candidates(fm, torch.full((2, 2, 4, 8, 8), value))
        independent(fm, window(2))


def test_the_first_call_draws_what_later_ones_draw():
    fm = Surrogate(Folds(*LAYOUTS["(t b) c h w"], history=2), SPEC, history=2)
    torch.manual_seed(0)
    first = candidates(fm, window(2))
    stream = torch.get_rng_state()
    assert torch.equal(candidates(fm, window(2)), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), stream)
