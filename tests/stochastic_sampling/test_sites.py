"""Sites keep their streams when a model is wrapped."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.surrogates import DropNet, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import StateSpec, StochasticConfig
from ttcfast.stochastic_sampling import noise_sites

CONFIG = {"dropout_p": 0.2, "dropout_after": ("head",), "latent_sigma": 0.1}


def in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DDP": in_ddp,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "average": AveragedModel,
    "several": lambda model: torch.compile(nn.DataParallel(torch.compile(model, backend="eager")), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_draws_what_the_model_itself_draws(wrapper, process_group):
    torch.manual_seed(0)
    model, x = DropNet(), euler_state(2)
    wrapped = WRAPPERS[wrapper](model)
    config = StochasticConfig(**CONFIG)  # the latent is where the model says, and names are those of the model
    ours, theirs = noise_sites(model, config), noise_sites(wrapped, config)
    assert [s.number for s in theirs] == [s.number for s in ours] and len(ours) == 3
    assert [s.name for s in theirs] != [s.name for s in ours]
    plain, other = (Surrogate(m, StateSpec.euler2d(), stochastic=CONFIG) for m in (model, wrapped))
    for stochastic in (CONFIG, {}, {"latent_sigma": 0.2, "latent_at": "norm"}, {**CONFIG, "dropout_after": (theirs[1].name,)}):
        named = {**stochastic, "dropout_after": ("head",)} if "dropout_after" in stochastic else stochastic
        expected = plain.candidates(x, torch.arange(3), seed=1, step=1, stochastic=named)
        assert torch.equal(other.candidates(x, torch.arange(3), seed=1, step=1, stochastic=stochastic), expected)


def test_a_part_may_be_wrapped_and_a_module_may_be_called_module():
    part = nn.ModuleDict({"module": nn.Dropout(0.1)})
    plain, wrapped = nn.Sequential(nn.Linear(2, 2), part), nn.Sequential(nn.Linear(2, 2), nn.DataParallel(part))
    (ours,), (theirs,) = (noise_sites(m, StochasticConfig()) for m in (plain, wrapped))
    assert (ours.name, theirs.name) == ("1.module", "1.module.module") and ours.number == theirs.number
    assert (
        noise_sites(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"drop": nn.Dropout(0.1)})), StochasticConfig())[0].number != ours.number
    )


def test_several_devices_at_once_are_refused():
    wrapped = nn.DataParallel(DropNet())
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"the model is a DataParallel over 2 devices.*give the Surrogate the model itself \(.module\)"):
        noise_sites(wrapped, StochasticConfig())
