"""The page of ``ttcfast report``: what stands on it, and what a browser makes of it."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.report.conftest import HOSTILE
from tests.report.test_policies import run as policy
from tests.report.test_policies import store
from tests.small_run import arm, problems, surrogate
from ttcfast.evaluation.calibration import candidate_scores
from ttcfast.report.compare import CompareConfig, compare
from ttcfast.report.fields import MOST_CELLS, MOST_FRAMES, read_fields, write_fields
from ttcfast.report.figures import save
from ttcfast.report.figures.lines import Line, line_figure
from ttcfast.report.page.ablation import differing
from ttcfast.report.page.pictures import palette_url, read_picture
from ttcfast.report.page.runs import load, short_names
from ttcfast.report.policies import run_rows
from ttcfast.rewards.common import ScoreContext
from ttcfast.runtime.errors import ArgumentError, DataError, OutputError
from ttcfast.runtime.files import strict, write_csv, write_json
from ttcfast.spec import TTCConfig


def page_of(tmp_path, *folders):
    compare(CompareConfig(tuple(map(str, folders)), str(tmp_path / "report")))
    return tmp_path / "report" / "report.html"


def captions(browser):
    return browser.evaluate("[...document.querySelectorAll('caption')].map(c => c.textContent)")


def test_browser_shows_tables_charts_and_animation_without_complaint(run, tmp_path, browser):
    page = page_of(tmp_path, run)
    assert page.stat().st_size < 8_000_000
    browser.open(page)
    assert browser.complaints == [] and [r for r in browser.requests if not r.startswith("data:")] == [page.as_uri()]
    shown = " ".join(captions(browser))
    for name in ("Methods on 4 problems", "B sweep on 2 problems", "ARM: scores in buckets", "guardrails", "Versions", "Configuration"):
        assert name in shown
    drawn = browser.evaluate("[...document.querySelectorAll('.still figcaption')].map(c => c.textContent)")
    for name in ("Rollout error", "Conservation drift since step 0", "SampleGain", "Error against B", "Calibration", "density, problem 0"):
        assert any(caption.startswith(name) for caption in drawn), (name, drawn)
    # every picture is decoded, of some size, and has a text; every canvas has more than one colour
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    assert browser.evaluate("[...document.querySelectorAll('.still img')].every(i => i.getBoundingClientRect().height > 60)")
    kinds = browser.evaluate("[...document.querySelectorAll('.still img')].map(i => i.src.slice(5, i.src.indexOf(';')))")
    assert kinds.count("image/png") == sum(caption.startswith("density") for caption in drawn) and "image/svg+xml" in kinds
    colours = "new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size"
    assert min(browser.evaluate(f"[...document.querySelectorAll('canvas')].map(c => {colours})")) > 5


def test_the_compute_frontier_is_a_table_of_the_runs_section(run, tmp_path, browser):
    folder = tmp_path / "traced"
    shutil.copytree(run, folder)
    common = {"beam_width": 1, "branching_factor": 4, "seconds": 0.5, "evaluations": 64}
    rows = [("arm", "greedy", 4.0, 0.02, 0.8), ("arm", "lookahead", 3.5, 0.015, 0.6), ("arm", "beam", 4.0, *[float("inf")] * 2)]
    rows += [(HOSTILE, "mine", 1.0, float("nan"), float("nan"))]
    names = ("reward", "search", "evaluations_per_step", "rollout_mse", "ratio_to_deterministic")
    write_csv(folder / "frontier.csv", [{**dict(zip(names, row)), **common} for row in rows])
    browser.open(page_of(tmp_path, folder))
    here = "[...document.querySelectorAll('#run-1 table')].find(t => t.caption.textContent.startsWith('Compute frontier'))"
    heads, *body = browser.evaluate(f"[...{here}.rows].map(r => [...r.cells].map(c => c.textContent))")
    assert heads == ["reward", "search", "k", "B", "evaluations per step and problem", "rollout MSE", "× deterministic", "s", "model evals"]
    assert body[:2] == [
        ["ARM", "greedy", "1", "4", "4", "0.02", "0.8", "0.5", "64"],
        ["ARM", "greedy, looking one step ahead", "1", "4", "3.5", "0.015", "0.6", "0.5", "64"],
    ]
    assert body[3][:2] == [HOSTILE, "mine"] and body[2][5:7] == body[3][5:7] == ["–", "–"] and browser.complaints == []
    assert browser.evaluate(f"[...{here}.querySelectorAll('.best')].map(c => c.textContent)") == ["0.6"]


def test_heads_sort_the_table_by_value_both_ways(run, tmp_path, browser):
    browser.open(page_of(tmp_path, run))
    column = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[1].dataset.value)"
    values = "[...document.querySelector('table').tBodies[0].rows].map(r => Number(r.cells[4].dataset.value))"
    before, methods = browser.evaluate(column), browser.evaluate(values)
    for order in ("ascending", "descending"):
        browser.evaluate("document.querySelectorAll('table')[0].tHead.rows[0].cells[4].querySelector('button').click()")
        assert browser.evaluate(values) == sorted(methods, reverse=order == "descending")
        assert browser.evaluate("document.querySelector('table').tHead.rows[0].cells[4].ariaSort") == order
    assert sorted(browser.evaluate(column)) == sorted(before)


def test_animation_plays_to_its_end_and_the_slider_moves_it(run, tmp_path, browser):
    browser.open(page_of(tmp_path, run))
    first = "document.querySelector('.animation canvas').toDataURL()"
    last_frame = browser.evaluate(first)
    browser.evaluate("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.querySelector('.animation input'))")
    assert browser.evaluate("document.querySelector('.animation output').value").startswith("step 0")
    assert browser.evaluate(first) != last_frame
    browser.evaluate("document.querySelector('.animation button').click()")
    assert browser.evaluate("document.querySelector('.animation button').textContent") == "Pause"
    browser.wait_for("document.querySelector('.animation button').textContent === 'Play'")
    assert browser.evaluate(first) == last_frame


@pytest.mark.parametrize(("width", "dark"), [(380, False), (380, True), (1300, True)])
def test_nothing_sticks_out_and_text_is_legible_on_a_phone_and_in_the_dark(run, multirun, tmp_path, browser, width, dark):
    browser.open(page_of(tmp_path, run, multirun, multirun.parent / "training"), width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width and browser.complaints == []
    ground, ink = browser.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ground, ink)]
    assert (light[0] < 60 and light[1] > 200) if dark else (light[0] > 200 and light[1] < 60)


def test_no_table_scrolls_sideways_on_a_laptop(run, multirun, tmp_path, browser):
    trained = tmp_path / "trained"
    policies = [policy(arm, seed, 300, 700) for arm in ("mlp", "heun2") for seed in (0, 1)]
    store(trained, policies)
    write_csv(trained / "runs.csv", strict(run_rows(policies)))
    write_json(trained / "protocol.provenance.json", {"config": {}})
    browser.open(page_of(tmp_path, run, multirun, trained), width=1280)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    wide = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth).map(s => s.getAttribute('aria-label'))"
    assert browser.evaluate(wide) == [] and browser.complaints == []
    shown = captions(browser)
    assert "Means over random seeds" in shown and "What explains them, and what they cost" in shown
    parts = [caption for caption in shown if caption.startswith("runs.csv")]
    assert parts == [f"runs.csv ({i} of {len(parts)})" for i in range(1, len(parts) + 1)] and len(parts) > 2
    of_runs = "[...document.querySelectorAll('table')].filter(t => t.caption.textContent.startsWith('runs.csv')).map(t => t.tHead.rows[0])"
    heads = browser.evaluate(f"{of_runs}.map(row => [...row.cells].map(c => c.textContent))")
    assert all(names[:3] == ["task", "arm", "seed"] for names in heads)
    assert [name for names in heads for name in names[3:]] == list(run_rows(policies)[0])[3:], "every column once, in order"


def test_a_multirun_shows_the_keys_that_differ_and_a_training_its_table_and_log(multirun, tmp_path, browser):
    page_of(multirun / "page", multirun)  # a page in the folder is no run of it
    runs, notes = load([str(multirun)])
    assert differing(runs) == {"ttc.branching_factor": [2, 3, 16]} and [r.name for r in runs] == ["0", "1", "2"]
    assert len(notes) == 1 and "no metrics.json yet" in notes[0]
    browser.open(page_of(tmp_path, multirun, multirun.parent / "training"))
    first, second = browser.evaluate(
        "[...document.querySelectorAll('table')].map(t => [...t.tHead.rows[0].cells].map(c => c.textContent))"
    )[:2]
    assert first[:4] == ["run", "ttc.branching_factor", "problems", "deterministic MSE"]
    assert second[0] == "run" and "oracle + projection" in second
    assert browser.evaluate("document.querySelector('table').tBodies[0].rows.length") == 3
    text = browser.evaluate("document.body.textContent")
    assert "Error against ttc.branching_factor" in text and "no metrics.json yet" in text
    assert "table.csv" in " ".join(captions(browser)) and HOSTILE in text
    assert "loss" in browser.evaluate("[...document.querySelectorAll('#run-4 .still figcaption')].map(c => c.textContent)")


def test_what_files_say_is_text_and_never_markup(run, tmp_path, browser):
    folder = tmp_path / "<b>run"
    shutil.copytree(run, folder)
    held = json.loads((folder / "metrics.json").read_text())
    held["notes"].append(HOSTILE)
    held["methods"][6]["method"] = HOSTILE
    held["error_units"] = HOSTILE
    held["provenance"]["config"][HOSTILE] = {"</details></main>": HOSTILE}
    (folder / "metrics.json").write_text(json.dumps(held))
    (folder / "figures" / "<i>broken.png").write_bytes(b"\x89PNG\r\n\x1a\n<svg onload=alert(1)>")
    (folder / "figures" / "<i>half.svg").write_text('<svg width="9pt" height="9pt"><script>')
    hacked = '<svg xmlns="http://www.w3.org/2000/svg" width="90pt" height="90pt" onload="document.title=1">'
    hacked += "<script>top.document.title=1</script></svg>"
    (folder / "figures" / "own.svg").write_text(hacked)
    browser.open(page_of(tmp_path, folder))
    assert browser.complaints == [] and browser.evaluate("document.title") == "ttcfast report: <b>run"
    assert browser.evaluate("document.scripts.length") == 1 and browser.evaluate("document.querySelectorAll('b, i').length") == 4
    assert browser.evaluate("document.body.textContent").count(HOSTILE) >= 4
    text = browser.evaluate("document.body.textContent")
    assert "<i>broken.png is no whole PNG" in text and "<i>half.svg is no whole PNG or SVG" in text


def test_wrong_folders_are_one_clear_error(run, tmp_path):
    def fails(kind, match, *folders, out=tmp_path / "out"):
        with pytest.raises(kind, match=match):
            compare(CompareConfig(tuple(map(str, folders)), str(out)))

    fails(DataError, "there is no folder", tmp_path / "nowhere")
    fails(DataError, "is no run", tmp_path)
    fails(ArgumentError, "twice", run, run / ".." / "demo")
    fails(ArgumentError, "twice", run, run.parent)
    waiting = tmp_path / "waiting"
    write_json(waiting / "run_ttc.provenance.json", {"config": {}})
    fails(DataError, r"has no metrics\.json yet", waiting)
    (waiting / "log.jsonl").write_text('{"step": 1, "mse": 2}\n{"step": 2, "mse": 1}\n')
    fails(DataError, r"has no metrics\.json yet", waiting)
    damaged = tmp_path / "damaged"
    write_json(damaged / "metrics.json", {"methods": [{"method": "arm"}]})
    fails(DataError, "damaged or of another version", damaged)
    (tmp_path / "file").write_text("")
    fails(OutputError, "give another one", run, out=tmp_path / "file" / "out")
    untraced = tmp_path / "untraced"
    shutil.copytree(run, untraced)
    (untraced / "frontier.csv").write_text("reward,search\narm,greedy\n")
    fails(DataError, "damaged or of another version", untraced)
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "fields.npz").write_bytes(b"PK no")
    fails(DataError, "damaged or of another version", broken)


def test_runs_of_one_name_are_told_apart_by_the_folders_above(run, tmp_path):
    for place in ("monday", "tuesday"):
        shutil.copytree(run, tmp_path / place / "demo", ignore=shutil.ignore_patterns("*.png", "*.npz"))
    runs, _ = load([str(tmp_path / "monday" / "demo"), str(tmp_path / "tuesday" / "demo")])
    assert [r.name for r in runs] == ["monday/demo", "tuesday/demo"]
    assert short_names([tmp_path / "a" / "x", tmp_path / "y"]) == ["x", "y"]


def test_page_stays_small_and_says_what_it_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "fat")
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(noise).save(tmp_path / "fat" / f"noise{i}.png")
    page = page_of(tmp_path, tmp_path / "fat")
    text = page.read_text()
    assert page.stat().st_size < 8_000_000 and "noise0.png of fat" not in text
    assert "Left out, since the page is full" in text and "noise3.png of fat" in text


def test_fields_keep_what_the_rollouts_were(tmp_path):
    from tests.small_run import small_evaluation

    evaluation = small_evaluation()
    result = evaluation.find("arm", projected=True)
    write_fields(tmp_path / "fields.npz", evaluation, result, times=torch.arange(9) * 0.5)
    kept = read_fields(tmp_path / "fields.npz")
    assert kept.steps == tuple(range(9)) and kept.problems == (0, 2) and kept.times[2] == 1.0 and kept.name == "ARM + projection"
    np.testing.assert_array_equal(kept.method, result.trajectory[:, :, 0].numpy())
    np.testing.assert_array_equal(kept.truth, evaluation.truth[:, :, 0].numpy())


def test_large_fields_are_thinned_out_by_block_means(tmp_path):
    from ttcfast.report.fields import _small

    assert MOST_CELLS == 128 and MOST_FRAMES == 41
    fields = torch.arange(300.0).repeat(1, 2, 20, 1)  # [P, F, 20, 300]: blocks of 3 along the last axis
    small = _small(fields)
    assert small.shape == (1, 2, 20, 100)
    np.testing.assert_allclose(small[0, 0, 0], torch.arange(300.0).reshape(100, 3).mean(1).numpy())
    assert _small(torch.rand(1, 2, 8, 8, 6)).shape == (1, 2, 8, 8)


def test_calibration_scores_and_errors_are_those_of_the_candidates():
    given, model, scorer = problems(3, 4), surrogate(), arm()
    found = candidate_scores(model, given, {"arm": scorer}, TTCConfig(branching_factor=5, seed=7), groups=6)
    assert found.errors.shape == found.scores["arm"].shape == (6, 5)
    assert set(found.problems) == {0, 1, 2} and set(found.steps) == {0, 1, 2, 3}
    i, problem, step = 4, found.problems[4], found.steps[4]
    state = given.truth[problem : problem + 1, step]
    where = torch.tensor([problem])
    drawn = model.candidates(state, torch.arange(1, 5), problem_ids=where, seed=7, step=step)
    candidates = torch.cat([model.deterministic(state).unsqueeze(1), drawn], 1)
    true = ((candidates[0] - given.truth[problem, step + 1]) / given.scale.view(-1, 1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(found.errors[i], true.double())
    torch.testing.assert_close(found.scores["arm"][i], scorer.score_group(state, candidates, ScoreContext(step, where))[0].double())


def test_calibration_takes_the_deterministic_step_in_as_a_rollout_does():
    given, model = problems(2, 2), surrogate()
    state, where = given.truth[:1, 0], torch.tensor([0])
    step = {"problem_ids": where, "seed": 0, "step": 0}

    def first_group(**options):
        return candidate_scores(model, given, {"arm": arm()}, TTCConfig(**options), groups=1).errors[0]

    def errors(candidates):
        return ((candidates[0] - given.truth[0, 1]) / given.scale.view(-1, 1, 1)).square().flatten(1).mean(1).double()

    alone = model.deterministic(state).unsqueeze(1)
    torch.testing.assert_close(first_group(branching_factor=1), errors(alone))
    sampled = model.candidates(state, torch.arange(3), **step)
    torch.testing.assert_close(first_group(branching_factor=3, include_deterministic=False), errors(sampled))
    assert not torch.allclose(errors(sampled)[:1], errors(alone), rtol=1e-3)


def test_palette_pictures_are_png_with_the_colours_given(tmp_path):
    indices = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
    palette = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(base64.b64decode(palette_url(indices, palette).partition(",")[2]))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png").convert("RGB")), palette[indices])
    picture = read_picture(tmp_path / "a.png")
    assert (picture.width, picture.height, picture.title) == (7, 5, "")


def test_a_figure_is_saved_twice_with_its_title_and_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        figure = line_figure("Loss & <more>", [Line("loss", [1, 2, 3], [3.0, None, 1.0])], xlabel="step", ylabel="loss")
        save(figure, tmp_path / f"{name}.png")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for suffix in (".png", ".svg"):
        assert read_picture(tmp_path / f"a{suffix}").title == "Loss & <more>"
        (tmp_path / f"cut{suffix}").write_bytes((tmp_path / f"a{suffix}").read_bytes()[:-20])
        assert read_picture(tmp_path / f"cut{suffix}") is None
