"""The size/quality curve as a plotly figure: the same for light and dark pages, whose texts the page's style colours."""

from __future__ import annotations

from typing import Any

from cbd_hub.sizes import format_size
from cbd_hub.space.facts import Facts, Picker, Point


ANCHOR, BETWEEN, CHOSEN = "#4f46e5", "#0d9488", "#ea580c"


def curve_figure(picker: Picker, chosen: Facts | None = None) -> Any:
    """Loss over size, log axis: anchors, sizes in between with error bars, and the chosen size.

    Args:
        picker: The chain.
        chosen: The size that is marked.
    """
    import plotly.graph_objects as go
    figure = go.Figure()
    anchors = [point for point in picker.points if point.strategy == "anchor"]
    best = _best(picker.points)
    if len(best) > 1:
        figure.add_trace(go.Scatter(
            x=[point.size for point in best], y=[point.loss for point in best], mode="lines", line={"color": "#8b90a0", "width": 1.5, "dash": "dot"}, hoverinfo="skip",
            showlegend=False,
        ))
    for strategy in sorted({point.strategy for point in picker.points} - {"anchor"}):
        symbol = "circle" if strategy == "blend" else "diamond"
        figure.add_trace(_points([point for point in picker.points if point.strategy == strategy], f"in between, by {strategy}", BETWEEN, symbol))
    if anchors:
        figure.add_trace(_points(anchors, "anchor", ANCHOR, "square"))
    if chosen is not None and chosen.loss is not None:
        figure.add_trace(go.Scatter(
            x=[chosen.parameters], y=[chosen.loss], mode="markers", name=f"your size: {chosen.name}",
            marker={"symbol": "circle-open", "size": 19, "color": CHOSEN, "line": {"width": 3.5}},
            hovertemplate=f"<b>{chosen.name}</b>: %{{x:,}} parameters<br>expected loss %{{y:.3f}}" + ("" if chosen.stderr is None else f" ± {chosen.stderr:.3f}") + "<extra></extra>",
        ))
    ticks = {snap.size: snap.name for snap in picker.snaps if snap.kind == "anchor"}
    figure.update_layout(
        height=390, margin={"l": 58, "r": 12, "t": 8, "b": 40}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", dragmode=False, autosize=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}, font={"size": 13},
        xaxis={
            "type": "log", "title": {"text": "parameters (log scale)", "font": {"size": 13}}, "tickvals": list(ticks), "ticktext": list(ticks.values()), "gridcolor": "rgba(128,128,128,.25)",
            "zeroline": False, "fixedrange": True,
        },
        yaxis={"title": {"text": "loss, nats per token", "font": {"size": 13}}, "gridcolor": "rgba(128,128,128,.25)", "zeroline": False, "fixedrange": True},
        hoverlabel={"font": {"size": 13}},
    )
    if not picker.points:
        figure.add_annotation(text="this chain was not measured", showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)
    return figure


def _points(points: list[Point], name: str, color: str, symbol: str) -> Any:
    import plotly.graph_objects as go
    errors = [point.stderr or 0.0 for point in points]
    return go.Scatter(
        x=[point.size for point in points], y=[point.loss for point in points], error_y={"type": "data", "array": errors, "color": color, "thickness": 1.5, "width": 4},
        mode="markers", name=name, marker={"size": 10, "color": color, "symbol": symbol}, customdata=[(format_size(point.size), error) for point, error in zip(points, errors)],
        hovertemplate="<b>%{customdata[0]}</b>, " + name + ": %{x:,} parameters<br>loss %{y:.3f} ± %{customdata[1]:.3f}<extra></extra>",
    )


def _best(points: list[Point]) -> list[Point]:
    """The lowest loss at each measured size."""
    found: dict[int, Point] = {}
    for point in points:
        if point.size not in found or point.loss < found[point.size].loss:
            found[point.size] = point
    return [found[size] for size in sorted(found)]
