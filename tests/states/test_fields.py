"""``StateSpec.fields``: declarations, their errors, and what the rest of the package reads of them."""

import copy
import json
import math
import pickle

import pytest
import torch

from ttcfast.spec import EulerSpec, FieldSpec, StateSpec

SHALLOW = StateSpec.fields("h", "hu", "hv", conserved={"mass": "h", "momentum": ("hu", "hv")}, bounds={"h": (0, None)})


def test_one_channel_is_enough_and_all_of_it_may_be_conserved():
    spec = StateSpec.fields("vorticity", conserved="all")
    assert (spec.num_channels, spec.conserved_groups, spec.conserved_channels) == (1, {"vorticity": (0,)}, (0,))


def test_quantities_group_channels_and_vectors_are_recognised():
    assert SHALLOW.conserved_groups == {"mass": (0,), "momentum": (1, 2)}
    assert SHALLOW.vectors == ((1, 2),)
    assert SHALLOW.bounded_channels == {0: (0.0, None)}
    flow = StateSpec.fields("p", "u", "v", "f", mean_zero="p", divergence_free=("u", "v"), given="f", conserved=("u", "v"))
    assert flow.solenoidal == flow.vectors == ((1, 2),)
    assert flow.given_channels == (3,) and flow.conserved_groups == {"u": (1,), "v": (2,)}
    magnetic = StateSpec.fields("a", "b", "c", "d", divergence_free=(("a", "b"), ("c", "d")))
    assert magnetic.solenoidal == ((0, 1), (2, 3))
    assert StateSpec.fields("u", "p", "f", given="f", mean_zero="p", conserved="all").conserved_groups == {"u": (0,)}


def test_cells_are_cubes_unless_their_spacing_is_given():
    assert StateSpec.fields("u", cell_volume=0.25).distances == (0.5, 0.5)
    assert StateSpec.fields("u", spacing=(0.1, 0.3)).distances == (0.1, 0.3)


@pytest.mark.parametrize("spec", [SHALLOW, StateSpec.fields("u", "v", spacing=[1, 2], periodic=(True, False)), StateSpec.pdegym()])
def test_layouts_are_copied_pickled_and_written_as_json(spec):
    again = StateSpec.from_meta(json.loads(json.dumps(spec.to_meta())))
    for other in (again, copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), spec.replace(ndim=2)):
        assert type(other) is type(spec) and other.to_meta() == spec.to_meta()


def test_a_gas_is_one_layout_among_others():
    made = StateSpec(density=1, momentum=(2,), energy=0, ndim=1)
    assert type(made) is EulerSpec and isinstance(made, StateSpec) and not isinstance(SHALLOW, EulerSpec)
    assert isinstance(SHALLOW, FieldSpec) and SHALLOW.gamma is None
    assert StateSpec.euler2d().conserved_groups == {"mass": (0,), "momentum": (1, 2), "energy": (3,)}
    assert StateSpec.euler2d(periodic=False, closed=True).conserved_groups == {"mass": (0,), "energy": (3,)}
    assert StateSpec.pdegym().conserved_groups == {} and StateSpec.pdegym().names == ("density", "velocity 0", "velocity 1", "pressure")


def test_tensors_of_a_layout_move_with_it():
    spec = StateSpec.fields("u", cell_volume=torch.ones(4, 4), boundary_mask=torch.zeros(4, 4, dtype=torch.bool))
    assert spec.to(torch.device("cpu")) is spec
    moved = spec.to(torch.device("meta"))
    assert moved.cell_volume.is_meta and moved.boundary_mask.is_meta


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conserved": {"mass": ()}}, "conserved quantity 'mass' has no channels; name at least one of u, v"),
        ({"conserved": {"mass": "rho"}}, "conserved quantity 'mass' names 'rho', which is no channel; the channels are u, v"),
        ({"conserved": {"a": "u", "b": "u"}}, "u would be conserved twice"),
        ({"conserved": "u", "given": "u"}, "u would be conserved twice"),
        ({"conserved": {"bounds": "u"}}, "conserved quantity 'bounds' has the name of another penalty"),
        ({"bounds": {"w": (0, 1)}}, "bounds names 'w', which is no channel; the channels are u, v"),
        ({"bounds": {"u": (1, 0)}}, r"bounds of 'u' are \(1, 0\); give a smaller number and a larger one"),
        ({"divergence_free": ("u",)}, r"divergence_free is \('u',\) in 2 dimensions"),
        ({"divergence_free": ("u", "v"), "ndim": 1}, "in 1 dimensions"),
        ({"mean_zero": "p"}, "mean_zero names 'p', which is no channel"),
        ({"given": ("u", "u")}, r"given is \('u', 'u'\); name each channel once"),
        ({"spacing": (1.0,)}, r"spacing is \(1.0,\); give one distance above 0 for each of 2 dimensions"),
        ({"cell_volume": 0.0}, "cell_volume is 0.0; it must be positive"),
        ({"periodic": (True,)}, "give true or false, or 2 of them"),
        ({"periodic": "no"}, "periodic is 'no'; give true or false, or 2 of them"),
        ({"bounds": {"u": 0.0}}, "bounds of 'u' are 0.0; give a smaller number and a larger one"),
        ({"bounds": {"u": (0, 1, 2)}}, r"bounds of 'u' are \(0, 1, 2\); give a smaller"),
        ({"bounds": {"u": ("a", 1)}}, r"bounds of 'u' are \('a', 1\); give a smaller"),
        ({"bounds": {"u": (math.inf, None)}}, r"bounds of 'u' are \(inf, None\); give a smaller"),
        ({"bounds": {"u": (math.nan, None)}}, r"bounds of 'u' are \(nan, None\); give a smaller"),
    ],
)
def test_wrong_declarations_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        StateSpec.fields("u", "v", **options)


def test_names_must_differ():
    with pytest.raises(ValueError, match="give at least one channel, each by a name of its own"):
        StateSpec.fields("u", "u")
    with pytest.raises(ValueError, match="give at least one channel"):
        StateSpec.fields()


def test_given_channels_are_carried():
    spec, new, old = StateSpec.fields("a", "b", "c", given=("a", "c")), torch.zeros(2, 5, 3, 4, 4), torch.ones(2, 5, 3, 4, 4)
    assert spec.carried(new, old, channel_axis=2).mean((0, 1, 3, 4)).tolist() == [1, 0, 1]
    assert StateSpec.fields("a").carried(new, old, channel_axis=2) is new


def test_what_is_predicted_is_all_but_what_is_given():
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert StateSpec.fields("a", "b", "c", given="b").predicted(x, channel_axis=1).tolist() == [[[0, 1], [4, 5]]]
    assert StateSpec.fields("a").predicted(x, channel_axis=1) is x
