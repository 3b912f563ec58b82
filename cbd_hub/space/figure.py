"""The size/quality curve as a Vega-Lite picture, which the page's style colours for light and dark. Plotly draws the same, and its 4.6 MB take two seconds to start."""

from __future__ import annotations

import json
import math
from typing import Any

from cbd_hub.sizes import format_size
from cbd_hub.space.facts import Facts, Picker, Point


ANCHOR, BETWEEN, CHOSEN = "#4f46e5", "#0d9488", "#ea580c"
_KINDS = (("anchor", "anchor", ANCHOR, "square"), ("blend", "by blend", BETWEEN, "circle"), ("patch", "by patch", BETWEEN, "diamond"))
_GRID = "rgba(128,128,128,.25)"
_NEAR = 0.09  # share of the axis that a name under it needs on a phone
_MARGIN = 0.04  # share of the axis left free at both ends


def curve_figure(picker: Picker, chosen: Facts | None = None) -> dict[str, Any]:
    """Loss over size, log axis: anchors, sizes in between with error bars, and the chosen size; each says its numbers under the pointer.

    Args:
        picker: The chain.
        chosen: The size that is marked.

    Returns:
        A Vega-Lite 5 specification.
    """
    points = [row for row in (_row(picker, point) for point in picker.points) if row["height"] is not None]
    measured = [row["kind"] for row in points]
    kinds = [kind for kind in _KINDS if kind[1] in measured]
    layers = [
        _layer(_best(points), {"type": "line", "color": "#8b90a0", "strokeWidth": 1.5, "strokeDash": [2, 3]}),
        _layer(points, {"type": "errorbar", "rule": {"aria": False}, "ticks": {"size": 9, "aria": False}}, y={"field": "low", "type": "quantitative"}, y2={"field": "high"}, color=_color(kinds)),
        _layer(points, {"type": "point", "filled": True, "size": 110, "opacity": 1}, color=_color(kinds), shape=_shape(kinds)),
        *([] if chosen is None or chosen.loss is None else _chosen(picker, chosen)),
        {**_layer(points, {"type": "circle", "size": 900, "opacity": 0}, tooltip=_TOOLTIP), "name": "pointed"},  # what the pointer finds is larger than what the eye sees
    ]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json", "width": "container", "height": 290, "background": "transparent", "padding": {"left": 4, "top": 6, "right": 18, "bottom": 4},
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": "Loss over size; the table below holds the same numbers", "usermeta": {"embedOptions": {"renderer": "svg", "actions": False}},
        "config": {
            "font": "sans-serif", "view": {"stroke": None},
            "axis": {"labelFontSize": 13, "titleFontSize": 13, "titleFontWeight": "normal", "titlePadding": 10, "gridColor": _GRID, "domainColor": _GRID, "tickColor": _GRID, "aria": False},
            "legend": {"orient": "bottom", "direction": "horizontal", "columns": 3, "labelFontSize": 13, "title": None, "symbolSize": 110, "symbolOpacity": 1, "aria": False},
        },
        "encoding": {"x": _x(picker), "y": _y(picker)}, "layer": [layer for layer in layers if layer["data"]["values"]] or [_nothing()],
    }


_TOOLTIP = [{"field": name, "type": "nominal", "title": title} for name, title in (("name", "size"), ("parameters", "parameters"), ("loss", "loss"), ("kind", "what"))]


def as_json(figure: dict[str, Any]) -> str:
    """The picture as the page takes it."""
    return json.dumps(figure)


def _layer(rows: list[dict[str, Any]], mark: dict[str, Any], **encoding: Any) -> dict[str, Any]:
    return {"data": {"values": rows}, "mark": {**mark, "aria": False}, "encoding": encoding}  # the picture as a whole has a name, and its numbers are in the table


def _row(picker: Picker, point: Point) -> dict[str, Any]:
    kind = next(name for strategy, name, _, _ in _KINDS if strategy == point.strategy)
    return _numbers(picker, point.size, format_size(point.size), point.loss, point.stderr, point.bits_per_byte, kind)


def _numbers(picker: Picker, size: int, name: str, loss: float, stderr: float | None, bits: float | None, kind: str) -> dict[str, Any]:
    """What is drawn and said of a size: in bits per byte on a chain of several vocabularies, else in nats per token."""
    height = bits if picker.bridged else loss
    error = 0.0 if stderr is None or not height else stderr * height / loss
    said = "" if height is None else f"{height:.3f}" + (f" ± {error:.3f}" if error else "")
    return {
        "size": size, "height": height, "low": (height or 0.0) - error, "high": (height or 0.0) + error, "name": name, "parameters": f"{size:,}", "loss": said, "kind": kind,
    }


def _chosen(picker: Picker, facts: Facts) -> list[dict[str, Any]]:
    """A ring at the chosen size, with its name where a falling curve leaves room."""
    row = _numbers(picker, facts.parameters, facts.name, facts.loss or 0.0, facts.stderr, facts.bits_per_byte, "your size, expected")
    if row["height"] is None:
        return []
    left = facts.parameters < math.sqrt(picker.smallest * picker.largest)
    place = {"align": "left", "dx": 14, "dy": -14} if left else {"align": "right", "dx": -14, "dy": 20}
    return [
        _layer([row], {"type": "point", "filled": False, "size": 330, "color": CHOSEN, "strokeWidth": 3.5, "opacity": 1}, tooltip=_TOOLTIP),
        _layer([{**row, "text": f"your size: {facts.name}"}], {"type": "text", "fontSize": 13, "fontWeight": "bold", **place}, text={"field": "text", "type": "nominal"}),
    ]


def _color(kinds: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    return {"field": "kind", "type": "nominal", "scale": {"domain": [kind[1] for kind in kinds], "range": [kind[2] for kind in kinds]}}


def _shape(kinds: list[tuple[str, str, str, str]]) -> dict[str, Any]:
    return {"field": "kind", "type": "nominal", "scale": {"domain": [kind[1] for kind in kinds], "range": [kind[3] for kind in kinds]}}


def _x(picker: Picker) -> dict[str, Any]:
    span = max(math.log(picker.largest / picker.smallest), 0.1)
    domain = [picker.smallest * math.exp(-_MARGIN * span), picker.largest * math.exp(_MARGIN * span)]
    ticks = _ticks(picker, span)
    names = json.dumps({str(size): name for size, name in ticks.items()})
    return {
        "field": "size", "type": "quantitative", "scale": {"type": "log", "domain": domain, "nice": False},
        "axis": {"title": "parameters (log scale)", "values": list(ticks), "labelExpr": f"{names}[toString(datum.value)]", "labelOverlap": False},
    }


def _y(picker: Picker) -> dict[str, Any]:
    return {"field": "height", "type": "quantitative", "scale": {"zero": False}, "axis": {"title": f"loss, {picker.unit}", "tickCount": 5}}


def _ticks(picker: Picker, span: float) -> dict[int, str]:
    """Names under the axis: the anchors', the smallest and the largest first, none over another."""
    anchors = [snap for snap in picker.snaps if snap.kind == "anchor"]
    found: dict[int, str] = {}
    for snap in sorted(anchors, key=lambda snap: snap.size not in (picker.smallest, picker.largest)):
        if all(abs(math.log(snap.size / other)) >= _NEAR * span for other in found):
            found[snap.size] = snap.name
    return dict(sorted(found.items()))


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lowest loss at each measured size."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["size"] not in found or row["height"] < found[row["size"]]["height"]:
            found[row["size"]] = row
    return [found[size] for size in sorted(found)]


def _nothing() -> dict[str, Any]:
    mark = {"type": "text", "text": "this chain was not measured", "fontSize": 14, "aria": False}
    return {"data": {"values": [{}]}, "mark": mark, "encoding": {"x": {"value": 150}, "y": {"value": 140}}}
