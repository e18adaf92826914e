import dataclasses
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from tests.small_run import arm, problems, small_evaluation, surrogate
from ttcfast.evaluation.results import LABELS
from ttcfast.evaluation.sweep import sweep_branching
from ttcfast.report.figures import (
    drift_against_branching,
    drift_against_time,
    error_against_branching,
    error_against_seconds,
    error_against_time,
    field_panels,
    gain_histogram,
    save,
)
from ttcfast.report.figures.style import colour
from ttcfast.spec import StateSpec, TTCConfig

NAMES = ["deterministic", "random candidate", "mean of B", "ARM", "oracle"]


@pytest.fixture(scope="module")
def evaluation():
    return small_evaluation()


@pytest.fixture(scope="module")
def sweep(evaluation):
    config = TTCConfig(branching_factor=4, seed=1)
    return sweep_branching(surrogate(), problems(), {"arm": arm()}, config, (1, 2, 6), evaluation, count=3)


def legend_texts(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def line(axes, label: str):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_files_are_pictures_with_something_on_them(evaluation, sweep, tmp_path):
    made = {
        "error_time": error_against_time(evaluation),
        "error_seconds": error_against_seconds(evaluation),
        "drift_time": drift_against_time(evaluation),
        "gain": gain_histogram(evaluation),
        "fields": field_panels(evaluation, evaluation.find("arm", projected=True)),
        "error_b": error_against_branching(sweep),
        "drift_b": drift_against_branching(sweep),
    }
    for name, figure in made.items():
        path = tmp_path / f"{name}.png"
        save(figure, path)
        picture = imread(path)
        assert path.stat().st_size > 20_000 and min(picture.shape[:2]) > 500, name
        assert len(np.unique(picture[::9, ::9, :3].reshape(-1, 3), axis=0)) > 20, name
    lines = [f"{n}.svg" for n in made if n != "fields"]  # what is made of cells is a picture alone
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{n}.png" for n in made), *lines])


def test_no_pyplot_state_is_left(evaluation):
    from matplotlib import _pylab_helpers

    error_against_time(evaluation)
    assert not _pylab_helpers.Gcf.get_all_fig_managers()


def test_error_time_draws_every_method(evaluation):
    figure = error_against_time(evaluation)
    left, right = figure.axes
    for result in evaluation.rollouts:
        np.testing.assert_allclose(line(left, result.name).get_ydata(), result.mse.mean(0)[1:], rtol=1e-12)
        expected = result.mse.mean(0)[1:] / evaluation.baseline.mse.mean(0)[1:]
        np.testing.assert_allclose(line(right, result.name).get_ydata(), expected, rtol=1e-12)
        assert (line(left, result.name).get_linestyle() == "--") == result.projected
        assert line(left, result.name).get_color() == colour(result.method)
    assert left.get_xlabel() == "rollout step" and left.get_ylabel() == "MSE (normalised units)" and left.get_yscale() == "log"
    assert [t for t in NAMES if t in legend_texts(figure)] == NAMES


def test_error_seconds_has_every_method_and_joins_the_grids_of_the_solver(evaluation):
    solved = [dataclasses.replace(evaluation.baseline, method=f"solver {n}x{n}", seconds=s) for n, s in ((16, 2.0), (8, 0.5))]
    axes = error_against_seconds(evaluation.adding(*solved)).axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    points = {held.get_label(): held.lines[0] for held in axes.containers}
    assert set(points) == {r.name for r in evaluation.rollouts} | {"solver 16x16", "solver 8x8"}
    arm_row = evaluation.find("arm", projected=True)
    assert points[arm_row.name].get_xdata() == pytest.approx([arm_row.seconds / (5 * 8)])
    assert points[arm_row.name].get_ydata() == pytest.approx([float(arm_row.rollout_error.mean())])
    np.testing.assert_allclose(axes.get_lines()[0].get_xdata(), [0.5 / 40, 2.0 / 40])
    assert {text.get_text() for text in axes.texts} == {"8x8", "16x16"}


def test_drift_time_has_a_row_per_form_and_a_column_per_quantity(evaluation):
    figure = drift_against_time(evaluation)
    assert len(figure.axes) == 6
    assert [a.get_title() for a in figure.axes[:3]] == ["mass", "momentum", "energy"]
    drawn = line(figure.axes[2], "ARM").get_ydata()
    np.testing.assert_allclose(drawn, evaluation.find("arm").drift["energy"].mean(0)[1:], rtol=1e-12)
    assert {x.get_label() for x in figure.axes[3].get_lines()} >= {f"{n} + projection" for n in NAMES}


def test_gain_histogram_counts_every_problem(evaluation):
    figure = gain_histogram(evaluation)
    axes = [a for a in figure.axes if a.patches]
    assert len(axes) == 8  # four methods, over the deterministic rollout and over the projected one
    assert all(sum(p.get_height() for p in a.patches) == 5 for a in axes)
    assert [a.get_title(loc="left") for a in axes[:2]] == ["random candidate", "random candidate + projection"]
    assert "gain over deterministic + projection (%)" in [a.get_xlabel() for a in axes]


def test_gain_of_exactly_zero_is_not_drawn_as_better(evaluation):
    same = dataclasses.replace(evaluation.baseline, method="arm")
    figure = gain_histogram(dataclasses.replace(evaluation, results=(evaluation.baseline, same)))
    assert all(p.get_x() + p.get_width() <= 1e-12 for p in figure.axes[0].patches if p.get_height() > 0)


def test_gain_histogram_gathers_what_is_worse_than_its_left_end(evaluation):
    lost = dataclasses.replace(evaluation.find("arm"), mse=torch.full_like(evaluation.baseline.mse, math.nan))
    figure = gain_histogram(dataclasses.replace(evaluation, results=(evaluation.baseline, lost)))
    heights = [p.get_height() for p in figure.axes[0].patches]
    assert heights[0] == 5 and sum(heights) == 5
    assert "or worse" in [t.get_text() for t in figure.axes[0].texts]


def test_fields_share_scales_and_lie_the_right_way_up(evaluation):
    result = evaluation.find("arm", projected=True)
    figure = field_panels(evaluation, result, position=1, steps=[1, 8], times=torch.linspace(0, 0.4, 9))
    images = [a.get_images()[0] for a in figure.axes if a.get_images()]
    assert len(images) == 10
    assert len({i.get_clim() for i in images[:6]}) == 1 and len({i.get_clim() for i in images[6:]}) == 1
    low, high = images[6].get_clim()
    assert low == -high
    truth = evaluation.truth[1, 1, 0].double().numpy()
    np.testing.assert_allclose(images[0].get_array(), truth.T)  # columns of the picture run along x, the first space axis
    assert images[0].origin == "lower" and images[0].axes.get_aspect() == 1.0
    assert images[0].axes.get_title() == "step 1\nt = 0.05"
    error = result.trajectory[1, 1, 0].double().numpy() - truth
    np.testing.assert_allclose(images[8].get_array(), error.T, atol=1e-12)
    labels = [a.get_ylabel() for a in figure.axes]
    assert {"truth", "deterministic", "ARM + projection", "density", "density: prediction − truth"} <= set(labels)


def test_cells_that_are_not_finite_are_marked(evaluation):
    result = evaluation.find("arm")
    broken = result.trajectory.clone()
    broken[0, 5:] = math.nan
    figure = field_panels(evaluation, dataclasses.replace(result, trajectory=broken), steps=[1, 8])
    assert sum(t.get_text() == "not finite" for a in figure.axes for t in a.texts) == 2  # the field and its error at step 8


def test_result_without_trajectory_is_refused(evaluation):
    with pytest.raises(ValueError, match="shown"):
        field_panels(evaluation, dataclasses.replace(evaluation.find("arm"), trajectory=None))


@pytest.mark.parametrize("shape", [(12,), (6, 6, 6)])
def test_fields_in_one_and_three_dimensions(evaluation, shape):
    def like(trajectory):
        return torch.rand(*trajectory.shape[:3], *shape)

    results = tuple(dataclasses.replace(r, trajectory=like(r.trajectory)) for r in evaluation.results)
    other = dataclasses.replace(evaluation, results=results, truth=like(evaluation.truth))
    figure = field_panels(other, other.find("arm"))
    if len(shape) == 1:
        assert {x.get_label() for x in figure.axes[0].get_lines()} == {"truth", "deterministic", "ARM"}
    else:
        np.testing.assert_allclose(figure.axes[0].get_images()[0].get_array(), other.truth[0, 1, 0, :, :, 3].T, rtol=1e-6)


def test_error_branching_draws_ratios(sweep):
    figure = error_against_branching(sweep)
    assert [a.get_title() for a in figure.axes] == ["mean of steps 1 to 8", "step 8"]
    drawn = line(figure.axes[1], "oracle")
    results = next(line for line in sweep.lines() if line[0].method == "oracle")
    assert list(drawn.get_xdata()) == [1, 2, 4, 6]
    expected = [float(r.mse[:, -1].mean() / sweep.deterministic.mse[:, -1].mean()) for r in results]
    np.testing.assert_allclose(drawn.get_ydata(), expected, rtol=1e-12)
    assert figure.axes[0].get_xscale() == "log" and figure.axes[0].get_xlabel() == "candidates per step B"
    assert any("deterministic + projection" in t.get_text() for t in figure.axes[0].texts)


def test_drift_branching_draws_the_last_step(sweep):
    figure = drift_against_branching(sweep)
    of_arm = next(results for results in sweep.lines() if results[0].method == "arm")
    np.testing.assert_allclose(line(figure.axes[0], "ARM").get_ydata(), [r.final_drift("mass") for r in of_arm], rtol=1e-6)
    assert [a.get_title().split()[0] for a in figure.axes] == ["mass", "momentum", "energy"]


def test_projected_sweep_gets_rows_of_its_own(evaluation):
    config = TTCConfig(branching_factor=4, seed=1)
    sweep = sweep_branching(surrogate(), problems(), {}, config, (2,), evaluation, count=2, projections=(False, True))
    assert len(error_against_branching(sweep).axes) == 4 and len(drift_against_branching(sweep).axes) == 6


def test_method_that_blew_up_is_told_in_the_legend(evaluation):
    lost = evaluation.find("oracle").mse.clone()
    lost[1:3, 5:] = math.nan
    other = evaluation.adding(dataclasses.replace(evaluation.find("oracle"), method="prm", mse=lost))
    figure = error_against_time(other)
    assert "PRM\n(2/5 blew up)" in legend_texts(figure)
    assert np.isnan(line(figure.axes[0], "PRM").get_ydata()[4:]).all()


def test_every_named_method_has_its_own_colour():
    assert len({colour(m) for m in LABELS}) == len(LABELS)
    assert colour("something new") == colour("something new") != colour("arm")


def test_open_domains_have_one_row(evaluation):
    raw = dataclasses.replace(evaluation, results=tuple(r for r in evaluation.results if not r.projected))
    assert len(drift_against_time(raw).axes) == 3
    assert "dashed: with projection" not in legend_texts(error_against_time(raw))
    assert StateSpec.euler2d(periodic=False).conserved_channels == ()


def test_fields_keep_the_sides_of_the_domain(evaluation):
    figure = field_panels(evaluation, evaluation.find("arm"), steps=[1], extent=(1.6, 6.4))
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert (right - left, top - bottom) == (1.6, 6.4)
