"""The compute frontier: error against model evaluations, search by search."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ttcfast.evaluation.frontier import SEARCHES, Frontier
from ttcfast.evaluation.results import LABELS

from .style import branching_axis, finish, new_figure, value_axis

_STYLES = {  # colours of Okabe and Ito, as in style.py
    "greedy": ("#000000", "o", "greedy"),
    "lookahead": ("#E69F00", "v", "greedy, looking one step ahead"),
    "beam": ("#D55E00", "D", "beam"),
    "diverse_beam": ("#0072B2", "s", "diverse beam"),
    "particle": ("#009E73", "^", "particles"),
}


def search_label(search: str) -> str:
    """A search's name for readers; one that is not known stays as it is."""
    return _STYLES[search][2] if search in _STYLES else search


def error_against_evaluations(frontier: Frontier) -> Figure:
    """Rollout error as a ratio to the deterministic rollout against the model evaluations of a step, a panel for each reward.

    Thick lines are means over problems, the bars their standard errors; 1 is the deterministic rollout, which takes one evaluation.
    """
    rewards = list(dict.fromkeys(reward for reward, _ in frontier.results))
    title = f"Error against model evaluations, {frontier.problems} problems, {frontier.steps} steps"
    figure = new_figure(1.8 + 4.2 * len(rewards), 4.2, title)
    for axes, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards):
        axes.set_title(LABELS.get(reward, reward), fontsize=10)
        _panel(axes, frontier, reward)
    searches = [s for s in SEARCHES if any(search == s for _, search in frontier.results)]
    handles = [Line2D([], [], color=_STYLES[s][0], marker=_STYLES[s][1], markersize=4.5, label=_STYLES[s][2]) for s in searches]
    handles.append(Line2D([], [], color="#7F7F7F", linestyle=":", label="deterministic"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, frontier: Frontier, reward: str) -> None:
    base, shown, factors = frontier.deterministic.rollout_error, [1.0], {1}
    for (name, search), found in frontier.results.items():
        if name != reward:
            continue
        colour, marker, label = _STYLES[search]
        ratios = torch.stack([r.rollout_error for r in found]) / base.mean()  # [points, N]
        ratios = ratios.masked_fill(~ratios.isfinite(), torch.nan)
        differences = ratios - base / base.mean()  # problem by problem: how much harder one is than another is no error bar
        errors = differences.std(1) / differences.shape[1] ** 0.5 if differences.shape[1] > 1 else torch.zeros(len(found))
        counts = [frontier.per_step(r) for r in found]
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 4.5,
            "linewidth": 1.5,
            "elinewidth": 0.8,
            "capsize": 2,
            "label": label,
        }
        axes.errorbar(counts, ratios.mean(1), yerr=errors, **style)
        shown += ratios.mean(1).tolist()
        factors |= {round(c) for c in counts} if search == "greedy" else set()
    axes.axhline(1.0, color="#7F7F7F", linestyle=":", linewidth=1.2)
    branching_axis(axes, sorted(factors))
    value_axis(axes, shown)
    finish(axes, "model evaluations per problem and step", "MSE / MSE of the deterministic rollout")
