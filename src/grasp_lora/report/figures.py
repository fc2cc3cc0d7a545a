"""Figures of a run as plain plotly JSON, and how a page embeds them.

Colours are names of CSS variables, which the page resolves, so that one file suits light and dark.
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from grasp_lora.bench.comparison_record import Comparison, CurvePoint
from grasp_lora.bench.run_folder import TRAINED, Curve, HistoryRow, RoundRow
from grasp_lora.report.run_record import RunRecord
from grasp_lora.report.tables import by_factor, is_even, kept_share

Figure = dict[str, Any]
Trace = dict[str, Any]

_SEQUENTIAL = [[0, "var(--low)"], [1, "var(--high)"]]
_DIVERGING = [[0, "var(--bad)"], [0.5, "var(--neutral)"], [1, "var(--good)"]]
_RATIO = "Prune ratio (fraction of weights)"


def figures_of(record: RunRecord) -> dict[str, Figure]:
    """Return all figures that the record has data for, by the name under which the page places them.

    Those that could show only one value, or values that cannot be compared, are left out.
    """
    uneven = not is_even(record.sparsity)
    figures = {
        "curve": _curve(record),
        "trajectory": _trajectory(record.rounds),
        "baseline": None if record.in_turn else _baseline(record.rounds),
        **{f"history-{stage}": _history(record.history[stage]) for stage in TRAINED},
        "sparsity": _sparsity(record) if uneven else None,
        "survival": _survival(record) if uneven else None,
        "cost": _cost(record),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def comparison_figure(comparison: Comparison) -> Figure:
    """Return the dev and test loss of the grid's runs over the ratio, mean over seeds, with the learned ratios marked."""
    points: dict[float, list[CurvePoint]] = {}
    for point in comparison.curve:
        points.setdefault(point.prune_ratio, []).append(point)
    most = max(map(len, points.values()), default=0)
    # Where the run of a seed failed, the mean would be that of the others.
    points = {ratio: found for ratio, found in points.items() if len(found) == most}
    traces = []
    for split, colour in (("dev", "target"), ("test", "grasp")):
        measured = {ratio: [getattr(one, split) for one in points[ratio]] for ratio in sorted(points)}
        if all(None not in values for values in measured.values()):
            line = [(ratio, fmean(values)) for ratio, values in measured.items()]
            traces.append(_scatter(f"{split} loss", line, "lines+markers", line={"color": f"var(--{colour})"}))
    learned = comparison.learned.prune_ratio if comparison.learned else None
    marks = [
        {
            "type": "line", "x0": ratio, "x1": ratio, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": "var(--mark)", "dash": "dash"},
        }
        for ratio in (learned.values if learned else ())
    ]  # fmt: skip
    return _figure(traces, _RATIO, "Loss (nats per answer token)", shapes=marks)


def script_json(value: Any) -> Any:
    """Return JSON that is safe inside a script element: no tag can end it, and no line separator can break it."""
    from markupsafe import Markup

    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@cache
def plotly_js() -> Any:
    """Return the plotly library, to be written into a script element."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    assert "</script" not in source.lower(), "the plotly library would end its own script element"
    return Markup(source)


def _finite(value: Any) -> Any:
    """The same value with None, which plotly leaves out, for every number that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _figure(traces: list[Trace], x: str, y: str, **layout: Any) -> Figure:
    axes = {name: {"title": {"text": text}} | layout.pop(name, {}) for name, text in (("xaxis", x), ("yaxis", y))}
    return {"data": traces, "layout": axes | layout}


def _scatter(name: str, points: Iterable[tuple[float, float]], mode: str = "lines", **style: Any) -> Trace:
    x, y = zip(*points, strict=True)
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, **style}


def _band(name: str, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> Trace:
    outline = [*zip(x, high, strict=True), *reversed([*zip(x, low, strict=True)])]
    return _scatter(name, outline, fill="toself", fillcolor=color, line={"width": 0}, hoverinfo="skip")


def _curve(record: RunRecord) -> Figure | None:
    """The fitted curve, and the differences that it was fitted to."""
    learned = record.learned
    if learned is None:
        return None
    curve, star = learned.curve, learned.prune_ratio
    traces = []
    if curve.ratios:
        interval = f"{100 * learned.confidence:.0f} % interval of the fit"
        traces.append(_band(interval, curve.ratios, curve.low, curve.high, "var(--grasp-soft)"))
    if record.rounds:
        probes = [(measured.round, probe) for measured in record.rounds for probe in _differences(measured, curve)]
        rounds = [number for number, _ in probes]
        marker = {
            "size": 7, "color": rounds, "colorscale": _SEQUENTIAL, "cmin": 0, "cmax": max(rounds),
            "colorbar": {"title": {"text": "Round"}, "tick0": 0, "dtick": math.ceil(max(rounds) / 8)},
            "line": {"width": 0.5, "color": "var(--paper)"},
        }  # fmt: skip
        hover = "round %{customdata}<br>ratio %{x:.3f}<br>loss difference %{y:.4f}<extra></extra>"
        style = {"customdata": rounds, "hovertemplate": hover, "marker": marker}
        traces.append(_scatter("one probe", (probe for _, probe in probes), "markers", **style))
    if curve.ratios:
        line = {"width": 2.5, "color": "var(--grasp)"}
        hover = "ratio %{x:.3f}<br>fit %{y:.4f}<extra></extra>"
        points = zip(curve.ratios, curve.mean, strict=True)
        traces.append(_scatter("fitted loss", points, line=line, hovertemplate=hover))
    y = f"Loss {'above minimum' if curve.ratios else 'minus baseline'} (nats per token)"
    return _figure(
        traces, _RATIO, y,
        shapes=[
            {"type": "rect", "xref": "x", "yref": "paper", "x0": learned.low, "x1": learned.high, "y0": 0, "y1": 1,
             "fillcolor": "var(--mark-soft)", "line": {"width": 0}, "layer": "below"},
            {"type": "line", "xref": "x", "yref": "paper", "x0": star, "x1": star, "y0": 0, "y1": 1,
             "line": {"width": 1.5, "dash": "dash", "color": "var(--mark)"}},
        ],
        annotations=[
            # Inside, at the foot of the line: above it stands the legend.
            {"xref": "x", "yref": "paper", "x": star, "y": 0, "yanchor": "bottom", "showarrow": False,
             "xanchor": "left" if 2 * star < learned.low + learned.high else "right",
             "text": f" p* = {star:.3f} ", "font": {"color": "var(--mark)"}}
        ],
    )  # fmt: skip


def _differences(measured: RoundRow, curve: Curve) -> list[tuple[float, float]]:
    """Ratio and loss of each probe of a round.

    Only differences within a round mean something, so a round is moved as a whole to where the curve runs at its
    ratios; without a curve the baseline of the round is zero.
    """
    ratios = [measured.ratio_before, *measured.candidates]
    losses = [0.0, *(-reward for reward in measured.rewards)]
    shift = fmean(_interpolated(curve, ratio) for ratio in ratios) - fmean(losses) if curve.ratios else 0.0
    return [(ratio, loss + shift) for ratio, loss in zip(ratios, losses, strict=True)]


def _interpolated(curve: Curve, ratio: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(zip(curve.ratios, curve.mean, strict=True)):
        if x0 <= ratio <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
    return curve.mean[0] if ratio < curve.ratios[0] else curve.mean[-1]


def _trajectory(rounds: Sequence[RoundRow]) -> Figure | None:
    if not rounds:
        return None
    low = [max(0.0, measured.policy_mean - measured.policy_std) for measured in rounds]
    high = [min(1.0, measured.policy_mean + measured.policy_std) for measured in rounds]
    candidates = [(measured.step, ratio) for measured in rounds for ratio in measured.candidates]
    rewards = [reward for measured in rounds for reward in measured.rewards]
    # One disastrous candidate must not turn all others grey, so half of the rewards have a full colour.
    limit = median(abs(reward) for reward in rewards) or 1e-6
    marker = {
        "size": 8, "color": rewards, "colorscale": _DIVERGING, "cmin": -limit, "cmax": limit,
        "line": {"width": 0.75, "color": "var(--muted)"},
        "colorbar": {"title": {"text": "Reward<br>(nats per<br>token)"}},
    }  # fmt: skip
    hover = "step %{x}<br>candidate %{y:.3f}<br>reward %{customdata:.4f}<extra></extra>"
    style = {"customdata": rewards, "hovertemplate": hover, "marker": marker}
    means = [(measured.step, measured.policy_mean) for measured in rounds]
    committed = [(0, rounds[0].ratio_before), *((measured.step, measured.ratio) for measured in rounds)]
    dotted = {"width": 1.5, "dash": "dot", "color": "var(--target)"}
    stairs = {"width": 2.5, "shape": "hv", "color": "var(--grasp)"}
    traces = []
    if len({(measured.policy_mean, measured.policy_std) for measured in rounds}) > 1:  # a policy that learns
        traces = [
            _band("policy ± 1 deviation", [measured.step for measured in rounds], low, high, "var(--target-soft)"),
            _scatter("policy mean", means, line=dotted),
        ]
    traces += [
        _scatter("candidate", candidates, "markers", **style),
        _scatter("committed ratio", committed, line=stairs),
    ]
    return _figure(traces, "Optimizer step", _RATIO)


def _baseline(rounds: Sequence[RoundRow]) -> Figure | None:
    if len(rounds) < 2:
        return None
    losses = [(measured.step, fmean(measured.baseline_losses)) for measured in rounds]
    line = {"width": 2, "color": "var(--grasp)"}
    trace = _scatter("committed mask", losses, "lines+markers", line=line, marker={"size": 5})
    return _figure([trace], "Optimizer step", "Loss of the probed examples (nats per token)", showlegend=False)


def _history(history: Sequence[HistoryRow]) -> Figure | None:
    train = [(row.step, row.loss) for row in history if row.loss is not None]
    dev = [(row.step, row.dev_loss) for row in history if row.dev_loss is not None]
    traces = [
        _scatter(name, points, mode, line={"width": width, "color": color}, marker={"size": 6})
        for name, points, mode, width, color in (
            ("train", train, "lines", 1.25, "var(--merged)"),
            ("dev", dev, "lines+markers", 2, "var(--grasp)"),
        )
        if points
    ]
    y = "Loss (nats per token)"
    return _figure(traces, "Optimizer step", y, yaxis={"rangemode": "tozero"}) if traces else None


def _sparsity(record: RunRecord) -> Figure | None:
    groups = by_factor(record.sparsity)
    if not groups:
        return None
    shares = {
        f"{factor}, {segment}": {layer: entry.kept / entry.weights for layer, entry in entries}
        for (factor, segment), entries in reversed(groups.items())
    }
    layers = sorted(
        {layer for row in shares.values() for layer in row}, key=lambda name: (name.isdigit(), len(name), name)
    )
    trace = {
        "type": "heatmap", "x": [_label(layer) for layer in layers], "y": [_label(name) for name in shares],
        "z": [[row.get(layer) for layer in layers] for row in shares.values()],
        "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1, "colorscale": _SEQUENTIAL,
        "hovertemplate": "layer %{x}<br>%{y}<br>kept %{z:.3f}<extra></extra>",
        "colorbar": {"title": {"text": "Kept share<br>(fraction)"}},
    }  # fmt: skip
    category, height = {"type": "category"}, 150 + 26 * len(shares)
    return _figure([trace], "Layer (index)", "Factor, segment", height=height, xaxis=category, yaxis=category)


def _survival(record: RunRecord) -> Figure | None:
    traces = []
    for number, segment in enumerate((*record.sources, "target")):
        shares = {
            _label(factor): kept_share(entry for _, entry in entries)
            for (factor, origin), entries in by_factor(record.sparsity).items()
            if origin == segment
        }
        if not shares:
            return None
        name = segment.replace("_", " ")
        hover = "%{x}<br>kept %{y:.3f}<extra>" + name + "</extra>"
        trace = {"type": "bar", "name": name, "x": list(shares), "y": list(shares.values()), "hovertemplate": hover}
        color = "target" if segment == "target" else "source"
        # Several sources have one colour, each fainter than the one before.
        traces.append(
            trace | {"marker": {"color": f"var(--{color})"}, "opacity": 1.0 if color == "target" else 0.7**number}
        )
    return _figure(traces, "Factor", "Kept share (fraction of weights)", yaxis={"range": [0, 1]}, bargap=0.35)


def _cost(record: RunRecord) -> Figure | None:
    cost = record.cost
    if not cost:
        return None
    unit, name = (60, "minutes") if max(cost.values()) >= 180 else (1, "seconds")
    probes = {stage: min(record.probe_seconds, cost[stage]) if stage == "controller" else 0.0 for stage in cost}
    rest = [cost[stage] - probes[stage] for stage in cost]
    bars = [("training and the rest", rest, "var(--merged)"), ("probes", [*probes.values()], "var(--grasp)")]
    traces = [
        {"type": "bar", "orientation": "h", "name": label, "x": [part / unit for part in seconds],
         "y": [_label(stage) for stage in cost], "marker": {"color": color}}
        for label, seconds, color in (bars if any(probes.values()) else bars[:1])
    ]  # fmt: skip
    stages = {"autorange": "reversed", "type": "category"}
    return _figure(traces, f"Time ({name})", "Stage", barmode="stack", height=130 + 34 * len(cost), yaxis=stages)


def _label(text: str) -> str:
    """Plotly reads tags in its texts, so a text from a file must not hold any."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
