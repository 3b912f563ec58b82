"""The size/quality curve as a plotly figure: the same for light and dark pages, whose texts the page's style colours."""

from __future__ import annotations

import math
from typing import Any

from cbd_hub.sizes import format_size
from cbd_hub.space.facts import Facts, Picker, Point


ANCHOR, BETWEEN, CHOSEN = "#4f46e5", "#0d9488", "#ea580c"
_GRID = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False, "fixedrange": True}
_NEAR = 0.09  # share of the axis that a name under it needs on a phone


def curve_figure(picker: Picker, chosen: Facts | None = None) -> Any:
    """Loss over size, log axis: anchors, sizes in between with error bars, and the chosen size.

    Args:
        picker: The chain.
        chosen: The size that is marked.
    """
    import plotly.graph_objects as go
    figure = go.Figure()
    shown = _Heights(picker)
    best = _best(picker.points)
    if len(best) > 1:
        figure.add_trace(go.Scatter(
            x=[point.size for point in best], y=[shown.of(point.loss, point.bits_per_byte) for point in best], mode="lines",
            line={"color": "#8b90a0", "width": 1.5, "dash": "dot"}, hoverinfo="skip", showlegend=False,
        ))
    for strategy, name, color, symbol in _KINDS:
        points = [point for point in picker.points if point.strategy == strategy]
        if points:
            figure.add_trace(_points(points, name, color, symbol, shown))
    if chosen is not None and chosen.loss is not None:
        figure.add_trace(_chosen(chosen, shown))
    ticks = _ticks(picker)
    figure.update_layout(
        height=370, margin={"l": 62, "r": 16, "t": 10, "b": 40}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", dragmode=False, autosize=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}, font={"size": 13}, hoverlabel={"bgcolor": "#1f2937", "bordercolor": "#1f2937", "font": {"size": 13, "color": "#ffffff"}}, hovermode="closest", hoverdistance=30,
        xaxis={**_GRID, "type": "log", "title": {"text": "parameters (log scale)", "font": {"size": 13}}, "tickvals": list(ticks), "ticktext": list(ticks.values())},
        yaxis={**_GRID, "title": {"text": f"loss, {shown.unit}", "font": {"size": 13}}},
    )
    if not picker.points:
        figure.add_annotation(text="this chain was not measured", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    return figure


_KINDS = (("blend", "in between, by blend", BETWEEN, "circle"), ("patch", "in between, by patch", BETWEEN, "diamond"), ("anchor", "anchor", ANCHOR, "square"))


class _Heights:
    """Where losses stand: in bits per byte on a chain of several vocabularies, else in nats per token."""

    def __init__(self, picker: Picker) -> None:
        self.bits, self.unit = picker.bridged, picker.unit

    def of(self, loss: float, bits: float | None) -> float | None:
        return bits if self.bits else loss

    def error(self, loss: float, stderr: float | None, bits: float | None) -> float:
        height = self.of(loss, bits)
        return 0.0 if stderr is None or height is None else stderr * height / loss


def _points(points: list[Point], name: str, color: str, symbol: str, shown: _Heights) -> Any:
    import plotly.graph_objects as go
    errors = [shown.error(point.loss, point.stderr, point.bits_per_byte) for point in points]
    return go.Scatter(
        x=[point.size for point in points], y=[shown.of(point.loss, point.bits_per_byte) for point in points], mode="markers", name=name,
        error_y={"type": "data", "array": errors, "color": color, "thickness": 1.5, "width": 4}, marker={"size": 10, "color": color, "symbol": symbol},
        customdata=[(format_size(point.size), f" ± {error:.3f}" if error else "") for point, error in zip(points, errors)],
        hovertemplate="<b>%{customdata[0]}</b>, " + name + "<br>%{x:,} parameters<br>loss %{y:.3f}%{customdata[1]}<extra></extra>",
    )


def _chosen(facts: Facts, shown: _Heights) -> Any:
    import plotly.graph_objects as go
    loss = facts.loss or 0.0
    error = shown.error(loss, facts.stderr, facts.bits_per_byte)
    return go.Scatter(
        x=[facts.parameters], y=[shown.of(loss, facts.bits_per_byte)], mode="markers", name=f"your size: {facts.name}",
        marker={"symbol": "circle-open", "size": 19, "color": CHOSEN, "line": {"width": 3.5}},
        hovertemplate=f"<b>{facts.name}</b>, your size<br>%{{x:,}} parameters<br>expected loss %{{y:.3f}}{f' ± {error:.3f}' if error else ''}<extra></extra>",
    )


def _ticks(picker: Picker) -> dict[int, str]:
    """Names under the axis: the anchors', the smallest and the largest first, none over another."""
    anchors = [snap for snap in picker.snaps if snap.kind == "anchor"]
    span = math.log(picker.largest / picker.smallest) or 1.0
    found: dict[int, str] = {}
    for snap in sorted(anchors, key=lambda snap: snap.size not in (picker.smallest, picker.largest)):
        if all(abs(math.log(snap.size / other)) >= _NEAR * span for other in found):
            found[snap.size] = snap.name
    return dict(sorted(found.items()))


def _best(points: list[Point]) -> list[Point]:
    """The lowest loss at each measured size."""
    found: dict[int, Point] = {}
    for point in points:
        if point.size not in found or point.loss < found[point.size].loss:
            found[point.size] = point
    return [found[size] for size in sorted(found)]
