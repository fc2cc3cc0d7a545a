"""Figures of a run as plain plotly JSON, and how its page embeds them.

Colours are names of CSS variables, which the page resolves, so that one file suits light and dark.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean, median
from typing import Any

import numpy as np

from grasp_lora.engine.run_folder import TRAINED, Run

Figure = dict[str, Any]
Trace = dict[str, Any]
Curve = Sequence[tuple[float, float, float, float]]  # of `RatioEstimate`: ratio, fitted loss, low, high

_SEQUENTIAL = [[0, "var(--low)"], [1, "var(--high)"]]
_DIVERGING = [[0, "var(--bad)"], [0.5, "var(--neutral)"], [1, "var(--good)"]]
_RATIO = "Prune ratio (fraction of weights)"


def figures_of(run: Run) -> dict[str, Figure]:
    """Return all figures of a run by the name under which the page places them; those that would show nothing are left out."""
    figures = {
        "curve": _curve(run),
        "trajectory": _trajectory(run),
        **{f"history-{name}": _history(run.history.get(name, [])) for name in TRAINED},
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


@cache
def plotly_js() -> str:
    """Return the plotly library, to be written into a script element."""
    from plotly.offline import get_plotlyjs

    source: str = get_plotlyjs()
    assert "</script" not in source.lower(), "the plotly library would end its own script element"
    return source


def _figure(traces: list[Trace], x: str, y: str, **layout: Any) -> Figure:
    axes = {name: {"title": {"text": text}} | layout.pop(name, {}) for name, text in (("xaxis", x), ("yaxis", y))}
    return {"data": traces, "layout": axes | layout}


def _scatter(name: str, points: Iterable[tuple[float, float]], mode: str = "lines", **style: Any) -> Trace:
    x, y = zip(*points, strict=True)
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, **style}


def _band(name: str, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> Trace:
    outline = [*zip(x, high, strict=True), *reversed([*zip(x, low, strict=True)])]
    return _scatter(name, outline, fill="toself", fillcolor=color, line={"width": 0}, hoverinfo="skip")


def _curve(run: Run) -> Figure | None:
    """The fitted curve, and the differences that it was fitted to."""
    if run.learned is None:
        return None
    estimate, rounds, traces = run.estimate, run.learned.result.rounds, []
    ratio, curve = estimate.ratio, estimate.curve
    ratios, fitted, low, high = zip(*curve, strict=True) if curve else ((), (), (), ())
    if curve:
        traces.append(
            _band(f"{100 * estimate.confidence:.0f} % interval of the fit", ratios, low, high, "var(--grasp-soft)")
        )
    probes = [(row["round"], probe) for row in rounds for probe in _differences(row, curve)]
    numbers = [number for number, _ in probes]
    marker = {
        "size": 7, "color": numbers, "colorscale": _SEQUENTIAL, "cmin": 0, "cmax": max(numbers),
        "colorbar": {"title": {"text": "Round"}, "tick0": 0, "dtick": max(1, math.ceil(max(numbers) / 8))},
        "line": {"width": 0.5, "color": "var(--paper)"},
    }  # fmt: skip
    hover = "round %{customdata}<br>ratio %{x:.3f}<br>loss difference %{y:.4f}<extra></extra>"
    style = {"customdata": numbers, "hovertemplate": hover, "marker": marker}
    traces.append(_scatter("one probe", (probe for _, probe in probes), "markers", **style))
    if curve:
        line, hover = {"width": 2.5, "color": "var(--grasp)"}, "ratio %{x:.3f}<br>fit %{y:.4f}<extra></extra>"
        traces.append(_scatter("fitted loss", zip(ratios, fitted, strict=True), line=line, hovertemplate=hover))
    if run.metrics.grid and curve:
        places, losses = zip(*run.metrics.grid.losses, strict=True)
        above = [(place, loss - min(losses)) for place, loss in zip(places, losses, strict=True)]
        marker = {
            "size": 10,
            "symbol": "diamond",
            "color": "var(--source)",
            "line": {"width": 0.5, "color": "var(--paper)"},
        }
        hover = "grid, ratio %{x:.1f}<br>test loss %{customdata:.4f}<extra></extra>"
        traces.append(
            _scatter("grid: one training each", above, "markers", customdata=losses, hovertemplate=hover, marker=marker)
        )
    upright = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1}  # from the foot of the figure to its top
    strip = {"type": "rect", **upright, "x0": estimate.low, "x1": estimate.high, "fillcolor": "var(--mark-soft)",
             "line": {"width": 0}, "layer": "below"}  # fmt: skip
    dashed = {"width": 1.5, "dash": "dash", "color": "var(--mark)"}
    mark = {"type": "line", **upright, "x0": ratio, "x1": ratio, "line": dashed}
    label = {  # inside, at the foot of the line: above it stands the legend
        "xref": "x", "yref": "paper", "x": ratio, "y": 0, "yanchor": "bottom", "showarrow": False,
        "xanchor": "left" if 2 * ratio < estimate.low + estimate.high else "right",
        "text": f" p* = {ratio:.3f} ", "font": {"color": "var(--mark)"},
    }  # fmt: skip
    y = f"Loss {'above minimum' if curve else 'minus baseline'} (nats per token)"
    return _figure(traces, _RATIO, y, shapes=[strip, mark], annotations=[label])


def _differences(row: Mapping[str, Any], curve: Curve) -> list[tuple[float, float]]:
    """Ratio and loss of each probe of a round.

    Only differences within a round mean something, so a round is moved as a whole to where the curve runs at its
    ratios; without a curve the baseline of the round is zero.
    """
    ratios = [row["ratio_before"], *row["candidates"]]
    losses = [0.0, *(-reward for reward in row["rewards"])]
    shift = 0.0
    if curve:
        places, heights, *_ = zip(*curve, strict=True)
        shift = fmean(np.interp(ratios, places, heights).tolist()) - fmean(losses)
    return [(ratio, loss + shift) for ratio, loss in zip(ratios, losses, strict=True)]


def _trajectory(run: Run) -> Figure | None:
    """The committed ratio and the candidates of each round, with the policy where it learns."""
    if run.learned is None:
        return None
    rounds = run.learned.result.rounds
    steps = [row["step"] for row in rounds]
    rewards = [reward for row in rounds for reward in row["rewards"]]
    # One disastrous candidate must not turn all others grey, so half of the rewards have a full colour.
    limit = median(map(abs, rewards)) or 1e-6
    marker = {
        "size": 8, "color": rewards, "colorscale": _DIVERGING, "cmin": -limit, "cmax": limit,
        "line": {"width": 0.75, "color": "var(--muted)"},
        "colorbar": {"title": {"text": "Reward<br>(nats per<br>token)"}},
    }  # fmt: skip
    hover = "step %{x}<br>candidate %{y:.3f}<br>reward %{customdata:.4f}<extra></extra>"
    style = {"customdata": rewards, "hovertemplate": hover, "marker": marker}
    committed = [(0, rounds[0]["ratio_before"]), *((row["step"], row["ratio"]) for row in rounds)]
    traces = []
    if len({(row["policy_mean"], row["policy_std"]) for row in rounds}) > 1:  # a policy that learns
        low = [max(0.0, row["policy_mean"] - row["policy_std"]) for row in rounds]
        high = [min(1.0, row["policy_mean"] + row["policy_std"]) for row in rounds]
        means = [(row["step"], row["policy_mean"]) for row in rounds]
        dotted = {"width": 1.5, "dash": "dot", "color": "var(--target)"}
        traces = [
            _band("policy ± 1 deviation", steps, low, high, "var(--target-soft)"),
            _scatter("policy mean", means, line=dotted),
        ]
    stairs = {"width": 2.5, "shape": "hv", "color": "var(--grasp)"}
    candidates = [(row["step"], ratio) for row in rounds for ratio in row["candidates"]]
    traces += [
        _scatter("candidate", candidates, "markers", **style),
        _scatter("committed ratio", committed, line=stairs),
    ]
    return _figure(traces, "Optimizer step", _RATIO)


def _history(history: Sequence[Mapping[str, float]]) -> Figure | None:
    traces = [
        _scatter(name, points, mode, line={"width": width, "color": color}, marker={"size": 6})
        for name, key, mode, width, color in (
            ("train", "loss", "lines", 1.25, "var(--merged)"),
            ("dev", "dev_loss", "lines+markers", 2, "var(--grasp)"),
        )
        if (points := [(row["step"], row[key]) for row in history if key in row])
    ]
    y = "Loss (nats per token)"
    return _figure(traces, "Optimizer step", y, yaxis={"rangemode": "tozero"}) if traces else None
