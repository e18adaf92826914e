"""The real packages, of the extra ``[adapters]``."""

import pytest
import torch
from torch import nn

from ttcfast import StateSpec, Surrogate, adapters

from .test_wrappers import SPEC, keyed, states


def test_fno_and_the_normalisers_of_neuraloperator():
    neuralop = pytest.importorskip("neuralop")
    from neuralop.data.transforms.data_processors import DefaultDataProcessor
    from neuralop.data.transforms.normalizers import UnitGaussianNormalizer

    torch.manual_seed(0)
    x, y = 3 + 2 * states(8, 1, 16, 16), 1 + 4 * states(8, 1, 16, 16, seed=1)
    per_channel, per_cell = UnitGaussianNormalizer(dim=[0, 2, 3]), UnitGaussianNormalizer(dim=[0])
    per_channel.fit(x), per_cell.fit(y)
    model = neuralop.models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)
    processor = DefaultDataProcessor(per_channel, per_cell).wrap(model)
    spec, noise = StateSpec.fields("vorticity", conserved="all"), {"latent_sigma": 0.3}
    surrogate = Surrogate(adapters.neuraloperator(processor), spec, normalizer=adapters.normalizer(processor), stochastic=noise)
    keyed(surrogate, x[:4])
    processor.eval()
    expected = per_cell.inverse_transform(model(per_channel.transform(x[:4])))
    torch.testing.assert_close(surrogate.deterministic(x[:4]), expected, rtol=1e-4, atol=1e-4)
    change = adapters.normalizer(processor, predicts="delta")
    torch.testing.assert_close(change.decode_delta(x), per_cell.inverse_transform(x))
    with pytest.raises(ValueError, match="has no statistics; call its fit first"):
        adapters.normalizer(UnitGaussianNormalizer())


@pytest.mark.parametrize("kind", ["z", "rms"])
def test_the_well_by_its_metadata(kind):
    pytest.importorskip("the_well")
    from the_well.data.datasets import WellMetadata
    from the_well.data.normalization import RMSNormalization, ZScoreNormalization

    metadata = WellMetadata(
        dataset_name="layered",
        n_spatial_dims=2,
        spatial_resolution=(8, 8),
        scalar_names=[],
        n_files=1,
        constant_scalar_names=[],
        field_names={0: ["density"], 1: ["velocity_x", "velocity_y"], 2: []},
        constant_field_names={0: ["mask"], 1: [], 2: []},
        boundary_condition_types=["PERIODIC"],
        n_trajectories_per_file=[1],
        n_steps_per_trajectory=[10],
    )
    fields = {"density": 2.0, "velocity": [3.0, 4.0], "mask": 5.0}
    names = ["mean", "std", "mean_delta", "std_delta"] if kind == "z" else ["rms", "rms_delta"]
    stats = {name: {k: (torch.tensor(v) + i).tolist() for k, v in fields.items()} for i, name in enumerate(names)}
    norm = (ZScoreNormalization if kind == "z" else RMSNormalization)(stats, ["density", "velocity"], ["mask"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2 * 3 + 1, 8, 1), nn.Dropout(0.3), nn.Conv2d(8, 3, 1))
    surrogate = adapters.well(model, metadata, predicts="delta", normalizer=norm, spec={"conserved": "density"})
    assert surrogate.history == 2 and surrogate.spec.names == ("density", "velocity_x", "velocity_y", "mask")
    assert surrogate.spec.periodic is True and surrogate.spec.given == ("mask",)
    x = states(4, 2, 4, 8, 8)
    keyed(surrogate, x)
    z = norm.normalize_flattened(x[:, :, :3].movedim(2, -1), "variable").movedim(-1, 2)
    mask = norm.normalize_flattened(x[:, -1, 3:].movedim(1, -1), "constant").movedim(-1, 1)
    delta = model.eval()(torch.cat([z.flatten(1, 2), mask], 1))
    delta = norm.delta_denormalize_flattened(delta.movedim(1, -1), "variable").movedim(-1, 1)
    expected = torch.cat([x[:, -1, :3] + delta, x[:, -1, 3:]], 1)
    torch.testing.assert_close(surrogate.deterministic(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes 5 channels, and the metadata have 3 fields and 1 constant ones; give history="):
        adapters.well(nn.Conv2d(5, 3, 1), metadata)


@pytest.mark.parametrize(("name", "options"), [("DDIMScheduler", {}), ("DDPMScheduler", {}), ("EulerAncestralDiscreteScheduler", {})])
def test_diffusion_is_keyed_whatever_the_scheduler_draws(name, options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    scheduler = getattr(diffusers, name)(num_train_timesteps=100, **options)
    surrogate, x = Surrogate(adapters.diffusers(unet, scheduler, steps=3), SPEC), states(4, 2, 8, 8)
    keyed(surrogate, x)
    assert torch.equal(surrogate.deterministic(x), surrogate.deterministic(x))
    model = surrogate.model
    torch.manual_seed(7)
    ours = model(x)
    torch.manual_seed(7)
    scheduler.set_timesteps(3)
    z = torch.randn_like(x) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        z = scheduler.step(unet(torch.cat([scheduler.scale_model_input(z, t), x], 1), t).sample, t, z).prev_sample
    torch.testing.assert_close(ours, z)


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Swin2SRConfig(
        num_channels=2,
        num_channels_out=2,
        image_size=16,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=4,
        upscale=1,
        upsampler="",
        hidden_dropout_prob=0.2,
    )
    model = adapters.hf(transformers.Swin2SRForImageSuperResolution(config), "reconstruction")
    keyed(Surrogate(model, SPEC), states(4, 2, 16, 16))


def test_a_checkpoint_folder_of_neuraloperator(tmp_path):
    neuralop = pytest.importorskip("neuralop")
    torch.manual_seed(0)
    model = neuralop.models.FNO(n_modes=(4, 4), in_channels=2, out_channels=2, hidden_channels=8, n_layers=2)
    model.save_checkpoint(tmp_path, "best")
    x = states(3, 2, 8, 8)
    loaded = adapters.neuraloperator(tmp_path, name="best", cls=neuralop.models.FNO)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    config = {"dropout_p": 0.2, "dropout_after": ["fno_blocks.convs.*"]}
    keyed(Surrogate(loaded, SPEC, stochastic=config), x)
    with pytest.raises(ValueError, match="give name= and cls="):
        adapters.neuraloperator(tmp_path)
