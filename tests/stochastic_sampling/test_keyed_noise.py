"""Keyed noise inside models: what each kind draws, where it acts, and that nothing of the model is left changed."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dropouts import switches_of
from ttcfast import ops
from ttcfast.ops.keyed import stream_of
from ttcfast.spec import Key, StochasticConfig
from ttcfast.stochastic_sampling import Draw, enable_mc_dropout, inject_latent_noise, keyed_noise, noise_sites, perturb_state

M = 12


def rows(n: int = M, problem: int = 0, first: int = 0) -> Tensor:
    return torch.stack([torch.full((n,), problem), torch.arange(first, first + n)], 1)


def run(model: nn.Module, x: Tensor, *, ids: Tensor | None = None, step: int = 0, antithetic: bool = False, **config) -> Tensor:
    """One forward with the noise of ``config``, candidates 0 to M - 1 unless told."""
    sites = noise_sites(model, StochasticConfig(**config))
    with keyed_noise(model, sites, Draw.of(0, step, rows() if ids is None else ids, antithetic)), torch.no_grad():
        return model(x)


def own_dropout(kind: type[nn.Module], x: Tensor, p: float) -> Tensor:
    return kind(p).train()(x)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x


class DropBlock2d(nn.Module):
    def __init__(self, p: float, block_size: int, couple_channels: bool = False) -> None:
        super().__init__()
        self.p, self.block_size, self.couple_channels = p, block_size, couple_channels

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_keyed_dropout_has_the_values_and_the_rate_of_torchs(kind):
    shape = {nn.Dropout1d: (M, 500, 6), nn.Dropout3d: (M, 500, 2, 2, 2)}.get(kind, (M, 500, 3, 2))
    x, p = torch.ones(shape), 0.3
    ours, torchs = run(nn.Sequential(kind(p)), x), own_dropout(kind, x, p)
    values = [out.unique() for out in (ours, torchs)]  # two: of kept and of dropped entries
    torch.testing.assert_close(*values)
    dropped = (ours == values[0][0]).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.03)
    if kind not in (nn.Dropout, nn.AlphaDropout):
        assert bool((dropped.flatten(2).amax(2) == dropped.flatten(2).amin(2)).all())  # whole channels
    else:
        assert bool((dropped.flatten(2).amax(2) != dropped.flatten(2).amin(2)).any())
    assert not bool((dropped[0] == dropped[1]).all())


def test_alpha_dropout_keeps_mean_and_variance():
    out = run(nn.AlphaDropout(0.3), torch.randn(M, 20_000))
    assert out.mean().item() == pytest.approx(0, abs=0.02) and out.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_path_is_dropped_for_whole_states(scaled):
    ids = rows(400)
    out = run(DropPath(0.25, scaled), torch.ones(400, 3, 2), ids=ids).flatten(1)
    assert bool((out.amax(1) == out.amin(1)).all())
    assert out.unique().tolist() == pytest.approx([0, 4 / 3 if scaled else 1])
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("coupled", [False, True])
def test_blocks_are_dropped_around_centres_and_every_state_is_rescaled_by_itself(coupled):
    x = torch.ones(40, 6, 24, 24)
    out = run(DropBlock2d(0.1, 3, coupled), x, ids=rows(40))
    assert bool((out == out[:, :1]).all()) == coupled
    dropped = out == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.ones(40))
    corners = -F.max_pool2d(-dropped.float(), 3, 1)
    blocks = F.max_pool2d(F.pad(corners, (2, 2, 2, 2)), 3, 1)
    assert torch.equal(blocks, dropped.float())  # dropped cells are unions of whole blocks
    assert torch.equal(run(DropBlock2d(0.1, 3, coupled), x[7:9], ids=rows(2, first=7)), out[7:9])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 6}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_attention_is_torchs_with_the_weights_dropped_by_key(p, batch_first, options):
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first, **options).eval()
    q, k, v = torch.randn(M, 3, 8), torch.randn(M, 4, options.get("kdim", 8)), torch.randn(M, 4, options.get("vdim", 8))
    padding = torch.zeros(M, 4)
    padding[2, 3] = padding[5, :2] = -torch.inf
    masks = {"key_padding_mask": padding, "attn_mask": torch.randn(M * 2, 3, 4), "average_attn_weights": False}
    given = [t if batch_first else t.transpose(0, 1) for t in (q, k, v)]

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(*given, **masks)

    with torch.no_grad():
        clean, weights = attention(*given, **masks)
    site = StochasticConfig(dropout_p=p or 2**-40)  # a rate that rounds to no dropped entry, and so to the clean result
    with keyed_noise(model := Call(), noise_sites(model, site), Draw.of(0, 0, rows())), torch.no_grad():
        out, dropped = model(q)
    assert "forward" not in vars(attention)
    if not p:
        torch.testing.assert_close((out, dropped), (clean, weights))
        return
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / (1 - p))
    assert 0.5 < kept[weights > 0].float().mean() < 0.9
    assert not torch.equal(kept[0], kept[1]) and not torch.allclose(out, clean)


def test_causal_and_bool_masks_and_averaged_weights_are_torchs():
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).eval()
    x, causal = torch.randn(M, 4, 8), torch.ones(4, 4, dtype=torch.bool).triu(1)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=causal, is_causal=True)

    with torch.no_grad():
        clean = attention(x, x, x, attn_mask=causal, is_causal=True)
    torch.testing.assert_close(run(Call(), x, dropout_p=2**-40), clean)


class Everything(nn.Module):
    """Every kind of site; the states in the first axis, folded into it, or (inside the encoder) in the second."""

    latent_module = "mix"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.position = nn.Parameter(torch.randn(1, 4, 12))
        self.drops = nn.ModuleDict(
            {
                "entries": nn.Dropout(0.2),
                "channels": nn.Dropout2d(0.2),
                "alpha": nn.AlphaDropout(0.2),
                "feature": nn.FeatureAlphaDropout(0.2),
                "path": DropPath(0.3),
                "block": DropBlock2d(0.2, 2),
                "window": nn.Dropout(0.2),
                "position": nn.Dropout(0.2),
            }
        )
        self.mix = nn.Linear(12, 12)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, dropout=0.2), 2, enable_nested_tensor=False)  # [L, M, D]

    def forward(self, x: Tensor) -> Tensor:  # [M, 12, 2, 2]
        for name in ("entries", "channels", "alpha", "feature", "block"):
            x = self.drops[name](x)
        z = self.mix(x.flatten(2).transpose(1, 2)) + self.drops["position"](self.position)  # [M, 4, 12]
        z = z + self.drops["path"](z)
        z = self.drops["window"](z.reshape(-1, 2, 12)).reshape(z.shape)  # two windows of each state
        z = self.drops["entries"](z)  # the second call of one module
        return self.encoder(z.transpose(0, 1)).transpose(0, 1)


EVERYTHING = {"dropout_after": ("mix", "encoder.layers.0.linear1"), "dropout_p": 0.2, "latent_sigma": 0.1}


@pytest.mark.parametrize("antithetic", [False, True])
def test_what_a_state_draws_does_not_depend_on_the_others(antithetic):
    model, x = Everything().eval(), torch.randn(M, 12, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = run(model, x, antithetic=antithetic, **EVERYTHING)
        order = torch.randperm(M)
        torch.testing.assert_close(run(model, x[order], ids=rows()[order], antithetic=antithetic, **EVERYTHING), whole[order])
        for part in torch.arange(M).split(5):
            torch.testing.assert_close(run(model, x[part], ids=rows()[part], antithetic=antithetic, **EVERYTHING), whole[part])
    assert not torch.allclose(run(model, x, step=1, antithetic=antithetic, **EVERYTHING), whole, atol=1e-2)
    alone = run(model, x[:1].expand(M, -1, -1, -1), antithetic=antithetic, **EVERYTHING)
    assert len({tuple(row.flatten().tolist()) for row in alone}) == M


def test_every_site_acts_by_itself():
    model, x = Everything().eval(), torch.randn(M, 12, 2, 2)
    sites = noise_sites(model, StochasticConfig(**EVERYTHING, input_eps=0.1))
    assert sites[0].kind == "input" and sites[-1].kind == "latent" and len({s.number for s in sites}) == len(sites)
    assert [s.kind for s in sites[1:9]] == ["entries", "channels", "alpha", "channels alpha", "path", "block", "entries", "entries"]
    assert [s.kind for s in sites[9:17]] == ["attention", "entries", "entries", "entries"] * 2
    assert [(s.kind, s.name) for s in sites[17:]] == [("after", n) for n in EVERYTHING["dropout_after"]] + [("latent", "mix")]
    clean = run(model, x, dropout=False)
    for site in sites[1:]:
        with keyed_noise(model, [site], Draw.of(0, 0, rows())), torch.no_grad():
            assert not torch.allclose(model(x), clean), site


def test_calls_of_one_module_drop_independently():
    twice = nn.Sequential(drop := nn.Dropout(0.5), drop)
    assert (run(twice, torch.ones(M, 1000)) == 0).float().mean().item() == pytest.approx(0.75, abs=0.02)


def test_numbers_of_sites_are_the_same_in_every_process():
    (site,) = noise_sites(nn.ModuleDict({"drop": nn.Dropout(0.1)}), StochasticConfig())
    assert (site.number, site.number_of(1), site.number_of(2)) == (1791612094, 151080559, 2805516320)
    (compiled,) = noise_sites(torch.compile(nn.ModuleDict({"drop": nn.Dropout(0.1)})), StochasticConfig())
    assert compiled.name == "_orig_mod.drop" and compiled.number == site.number


def test_pairs_have_opposite_noise():
    x = torch.zeros(M, 4, 10)
    z = run(nn.Identity(), x, latent_sigma=1.0, latent_at="", dropout=False, antithetic=True)
    assert torch.equal(z[1:-1:2], -z[2::2]) and not torch.equal(z[1].abs(), z[3].abs())
    assert torch.equal(z[1::2], run(nn.Identity(), x, latent_sigma=1.0, latent_at="", dropout=False)[1::2])
    kept = run(nn.Dropout(0.5), x + 1, antithetic=True) != 0
    assert torch.equal(kept[1:-1:2], ~kept[2::2])


def test_layouts_are_read_as_the_model_means_them():
    x = torch.ones(M, 5, 6)
    first = run(nn.Dropout(0.5), x)
    ids = rows()
    for part in (slice(0, 4), slice(4, 12)):
        assert torch.equal(run(nn.Dropout(0.5), x[part], ids=ids[part]), first[part])
        windows = run(nn.Dropout(0.5), x[part].reshape(-1, 1, 6), ids=ids[part])  # five of each state
        assert torch.equal(windows.reshape(-1, 5, 6), first[part])
        tokens = run(nn.Dropout(0.5), torch.ones(7, len(ids[part]), 30), ids=ids[part]).transpose(0, 1)  # 7 is no multiple of the states
        assert torch.equal(tokens, run(nn.Dropout(0.5), torch.ones(M, 7, 30))[part])
    assert torch.equal(run(nn.Dropout(0.5), x[:1]), first)  # the same for all until here


class OwnDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > 0.5) if self.training else x


class Halving(nn.Module):
    """Has a ``drop_prob``, but is more than a drop path."""

    drop_prob = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x / 2, self.drop_prob, self.training)


@pytest.mark.parametrize(
    "model, config, why",
    [
        (OwnDropout(0.5), {}, "is drawn by a class of its own"),
        (Halving(), {}, "is not the identity in evaluation"),
        (nn.Sequential(nn.Unflatten(0, (2, -1)), nn.Dropout(0.5)), {}, r"sees a tensor of shape \(2, 6, 40\), in which no axis"),
        (nn.Sequential(nn.Unflatten(0, (2, -1)), nn.Flatten(0, 1)), {"dropout_after": ("0",), "dropout_p": 0.5}, "sees a tensor"),
        (nn.Sequential(nn.Unflatten(0, (2, -1))), {"latent_at": "0", "latent_sigma": 0.1}, "sees a tensor"),
    ],
)
def test_what_cannot_be_keyed_draws_from_the_global_streams_and_says_so(model, config, why):
    x = torch.ones(M, 40)
    with pytest.warns(RuntimeWarning, match=f"the noise at module '.*' cannot be keyed: it {why}"):
        first = run(model.eval(), x, **config)
    with pytest.warns(RuntimeWarning):
        assert not torch.equal(run(model, x, **config), first)  # the stream went on
        torch.manual_seed(5)
        again = run(model, x, **config)
        torch.manual_seed(5)
        assert torch.equal(run(model, x, **config), again)
    assert not any(m.training for m in model.modules())


def test_other_dtypes():
    x = torch.ones(M, 50, dtype=torch.float16)
    assert torch.equal(run(nn.Dropout(0.5), x), run(nn.Dropout(0.5), x.float()).half())
    assert run(nn.Identity(), x, latent_at="", latent_sigma=0.1).dtype == torch.float16


def test_dropout_in_place_changes_what_it_is_given():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0
            self.drop(input=x)
            return x

    out = run(InPlace(), torch.ones(M, 50))
    assert out.unique().tolist() == [0, 2]


def test_the_model_is_restored_exactly_on_exceptions_too():
    model = nn.Sequential(Everything(), OwnDropout(0.1)).train()
    model[0].encoder.eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    enable_mc_dropout(model, p=0.25, after=["0.mix"])  # switches it off
    try:
        before = switches_of(model)
        torch.backends.mha.set_fastpath_enabled(True)
        sites = noise_sites(model, StochasticConfig(dropout_p=0.4, dropout_after=("0.drops.path",)))
        assert {s.amount for s in sites} == {0.4, 0.25}  # what was injected for good keeps its rate
        with pytest.raises(RuntimeError, match="stop"), pytest.warns(), keyed_noise(model, sites, Draw.of(0, 0, rows())):
            assert [m for m in model.modules() if m.training] == [model[1]] and model[1].p == 0.4
            assert not torch.backends.mha.get_fastpath_enabled()
            raise RuntimeError("stop")
        assert switches_of(model) == before and torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def test_code_compiled_without_hooks_does_not_hide_the_noise():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x)

    x, plain = torch.ones(M, 10), Net().eval()
    compiled = torch.compile(plain, backend="eager")
    assert torch.equal(compiled(x), x)
    assert torch.equal(run(compiled, x), run(plain, x)) and not torch.equal(run(compiled, x), x)


def test_compiled_code_that_holds_the_sites_takes_every_step():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8)), torch.randn(M, 8)
    draw = Draw.of(0, 0, rows())

    def forward(x: Tensor, rows: Tensor, stream: Tensor) -> Tensor:
        draw.start(rows, stream)
        return model(x)

    with keyed_noise(model, noise_sites(model, StochasticConfig()), draw), torch.no_grad():
        compiled = torch.compile(forward, backend="eager", fullgraph=True)
        with torch.compiler.set_stance("default"):
            compiled(x, rows(), draw.stream)
        for step in range(1, 4):
            with torch.compiler.set_stance("fail_on_recompile"):
                out = compiled(x, rows(), stream_of(0, step))
            assert torch.equal(out, forward(x, rows(), stream_of(0, step)))


def test_direct_noise_takes_a_key():
    x, key = torch.zeros(M, 3, 4), Key(3, 1, 7)
    for noise in (inject_latent_noise, perturb_state):
        out = noise(x, 0.5, key=key)
        assert torch.equal(out, 0.5 * ops.normal(M, (3, 4), key=key, rows=rows()))
        assert torch.equal(noise(x[2:4], 0.5, key=key, rows=rows()[2:4]), out[2:4])
        assert torch.equal(noise(x, 0.5, key=key, rows=rows(), antithetic=True)[2], -out[1])
        for wrong, error, message in (
            ({"key": 3}, TypeError, "key is 3 of type int"),
            ({"key": key, "generator": torch.Generator()}, ValueError, "both generator and key"),
            ({"rows": rows()}, ValueError, "key is None; give key=Key"),
            ({"key": key, "rows": rows(3)}, ValueError, r"rows have shape \(3, 2\)"),
            ({"key": key, "rows": rows().int()}, ValueError, "rows are torch.int32"),
        ):
            with pytest.raises(error, match=message):
                noise(x, 0.5, **wrong)
        with pytest.raises(ValueError, match="is -1"):
            noise(x, -1, key=key)
        with pytest.raises(ValueError, match="a tensor without axes has none"):
            noise(torch.tensor(1.0), 1, key=key)


def test_sites_that_are_not_there_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    for config, message in (
        ({"dropout_after": ("nope",), "dropout_p": 0.1}, r"after names \['nope'\], which Sequential does not have; it has '0'"),
        ({"dropout_after": ("0",)}, "injected dropout needs a rate"),
        ({"latent_sigma": 0.1}, "does not say where its latent is"),
        ({"latent_sigma": 0.1, "latent_at": "z"}, "the latent module is 'z'"),
    ):
        with pytest.raises(ValueError, match=message):
            noise_sites(model, StochasticConfig(**config))
    assert noise_sites(model, StochasticConfig()) == []
