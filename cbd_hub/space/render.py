"""What the page shows, as HTML: every text of a chain is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cbd_hub.sizes import format_bytes, format_size, with_error
from cbd_hub.space.desk import Written
from cbd_hub.space.facts import Facts, Picker, Point, Scale, Snap


_ROOM = (0.055, 0.13)  # share of the slider that a mark's name needs on a desktop and on a phone
_SEPARATOR = '<span class="cbd-sep"> · </span>'
_SHORT = (("float32", "fp32"), ("bfloat16", "bf16"), ("int8", "int8"))


def headline(picker: Picker) -> str:
    """What the chain gives, in one look."""
    small, large = picker.manifest.anchors[-1].name, picker.manifest.anchors[0].name
    count = len(picker.manifest.anchors)
    if count == 1:
        title, text = f"One model of {escape(large)}", "holds 1 model, its only <b>anchor</b>; a second one would give the sizes in between."
    else:
        title = f"One chain, any size from {escape(small)} to {escape(large)}"
        text = f"holds {count} trained models, the <b>anchors</b>; every size in between is made of them in seconds, without training."
    return f"<h1>{title}</h1><p><b>{escape(picker.name)}</b> {text} Pick a size, see what you get, try it.</p>"


def marks(snaps: Sequence[Snap], scale: Scale) -> str:
    """The slider's marks: a tick at each snap, and buttons that set the slider, anchors above, recommended sizes below."""
    ticks = "".join(f'<i class="cbd-tick cbd-{snap.kind}" style="left:{100 * scale.share(snap.size):.2f}%"></i>' for snap in snaps)
    rows, keys = [], ['<span class="cbd-dot cbd-anchor"></span> anchor']
    for kind, word in (("anchor", "anchor"), ("recommended", "recommended size")):
        chosen = [snap for snap in snaps if snap.kind == kind]
        if chosen:
            rows.append(f'<div class="cbd-row">{"".join(_mark(snap, word, chosen, scale) for snap in chosen)}</div>')
            if kind == "recommended":
                keys.append('<span class="cbd-dot cbd-recommended"></span> recommended size in between')
    return (
        f'<div class="cbd-marks" role="group" aria-label="Sizes to jump to"><div class="cbd-row cbd-ticks" aria-hidden="true">{ticks}</div>{"".join(rows)}</div>'
        f'<p class="cbd-key">{" ".join(keys)}</p>'
    )


def _named(snaps: Sequence[Snap], scale: Scale, room: float) -> set[int]:
    """Snaps whose names have room: the first and the last before those between."""
    found: list[Snap] = []
    for snap in (snaps[0], snaps[-1], *snaps[1:-1]):
        if snap not in found and all(abs(scale.share(snap.size) - scale.share(other.size)) >= room for other in found):
            found.append(snap)
    return {snap.size for snap in found}


def _mark(snap: Snap, word: str, row: Sequence[Snap], scale: Scale) -> str:
    share = scale.share(snap.size)
    side = " cbd-first" if share < 0.04 else " cbd-last" if share > 0.96 else ""
    name = escape(snap.name)
    desktop, phone = (snap.size in _named(row, scale, room) for room in _ROOM)
    shown = f"<span>{name}</span>" if desktop else "·"
    side += " cbd-tight" if desktop and not phone else ""
    return (
        f'<button type="button" class="cbd-mark cbd-{snap.kind}{side}" style="left:{100 * share:.2f}%" data-value="{scale.value(snap.size):g}" '
        f'aria-label="{name}, {word}" title="{name}, {word}">{shown}</button>'
    )


def facts_card(facts: Facts, picker: Picker) -> str:
    """A size in numbers."""
    if facts.strategy == "anchor":
        where = f"an anchor, bit for bit: {escape(facts.small)}"
    else:
        where = f"{facts.strategy} of {escape(facts.small)} and {escape(facts.large)}, {facts.position:.0%} of the way up"
    remote = picker.files.revision is not None
    rows = [
        ("Parameters", f"{facts.parameters:,}"),
        ("Layers x width", f"{facts.layers} x {facts.hidden} <small>FFN {facts.ffn}</small>"),
        ("Memory of the weights", "".join(f"<span>{format_bytes(facts.memory[dtype])} <small>{short}</small></span>" for dtype, short in _SHORT)),
        ("Download" if remote else "Download, once published", format_bytes(facts.download)),
        ("Expected loss", _loss(facts, picker)),
        ("Made by", where),
    ]
    bar = "" if facts.strategy == "anchor" else (
        f'<div class="cbd-segment" role="img" aria-label="{facts.position:.0%} of the way from {escape(facts.small)} to {escape(facts.large)}">'
        f'<span>{escape(facts.small)}</span><i><b style="left:{100 * facts.position:.1f}%"></b></i><span>{escape(facts.large)}</span></div>'
    )
    warning = f'<p class="cbd-warning"><b>Poor choice:</b> {escape(facts.trough)}.</p>' if facts.trough else ""
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return (
        f'<div class="cbd-facts" aria-live="polite"><h2>{escape(facts.name)}</h2><p class="cbd-gist">{_gist(facts, picker)}</p><dl>{body}</dl>{bar}{warning}</div>'
    )


def _loss(facts: Facts, picker: Picker) -> str:
    if facts.loss is None:
        return "not measured"
    if picker.bridged and facts.bits_per_byte is not None:
        stderr = None if facts.stderr is None else facts.stderr * facts.bits_per_byte / facts.loss
        return f"{with_error(facts.bits_per_byte, stderr)} <small>{picker.unit}</small>"
    return f"{with_error(facts.loss, facts.stderr)} <small>nats per token</small>"


def _gist(facts: Facts, picker: Picker) -> str:
    """A size against the largest anchor, in one sentence."""
    whole = picker.facts(picker.largest)
    if facts.parameters == whole.parameters:
        return "The largest anchor of the chain."
    text = f"{facts.parameters / whole.parameters:.0%} of the size of {escape(whole.name)}"
    if facts.loss is None or whole.loss is None:
        return f"{text}."
    if picker.bridged:
        if facts.bits_per_byte is None or whole.bits_per_byte is None:
            return f"{text}."
        return f"{text}, at {_signed(facts.bits_per_byte - whole.bits_per_byte)} bits per byte."
    perplexities = f"perplexity {_perplexity(facts.loss)} instead of {_perplexity(whole.loss)}"
    return f"{text}, at {_signed(facts.loss - whole.loss)} nats per token ({perplexities})."


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):,.1f}" if loss < 20 else "huge"


def measured_table(picker: Picker) -> str:
    """The curve as a table."""
    points = picker.points
    if not points:
        return "<p>This chain was not measured.</p>"
    rows = "".join(f"<tr><td>{format_size(point.size)}</td><td>{point.size:,}</td><td>{point.strategy}</td><td>{_measured(point, picker)}</td></tr>" for point in points)
    return (
        '<div class="cbd-scroll" tabindex="0" role="region" aria-label="Measured losses"><table class="cbd-table"><thead><tr><th scope="col">size</th>'
        f'<th scope="col">parameters</th><th scope="col">by</th><th scope="col">loss</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<p>{picker.unit.capitalize()} ± standard error, on {points[-1].tokens:,} tokens of {escape(points[-1].dataset)}.</p>"
    )


def _measured(point: Point, picker: Picker) -> str:
    if picker.bridged and point.bits_per_byte is not None:
        return with_error(point.bits_per_byte, None if point.stderr is None else point.stderr * point.bits_per_byte / point.loss)
    return with_error(point.loss, point.stderr)


def status(written: Written | None, dtype: str = "") -> str:
    """What is going on, or what it took."""
    if written is None:
        return '<p class="cbd-status cbd-empty"></p>'
    if written.state == "loading":
        value = "" if written.share is None else f' value="{written.share:.2f}"'
        return f'<p class="cbd-status cbd-busy" role="status"><progress max="1"{value} aria-label="{escape(written.note)}"></progress> {escape(written.note)}</p>'
    done = written.state == "done"
    speed = "" if written.tokens_per_second is None else f"<b>{written.tokens_per_second:.1f}</b> tokens per second"
    parts = [part for part in (
        escape(written.note), "1 token" if written.tokens == 1 else f"{written.tokens} tokens", speed,
        "" if written.perplexity is None else f"perplexity <b>{written.perplexity:,.1f}</b>",
        "" if written.bits_per_byte is None else f"<b>{written.bits_per_byte:.3f}</b> bits per byte",
        f"{format_bytes(written.memory)} of weights{f' in {dtype}' if dtype else ''}" if done else "",
        f"{format_bytes(written.process)} the whole process" if done else "",
    ) if part]
    return f'<p class="cbd-status {"cbd-done" if done else "cbd-busy"}" role="status">{_SEPARATOR.join(parts)}</p>'


def refusal(why: str) -> str:
    """Why something was not done."""
    return f'<p class="cbd-status cbd-done cbd-warning" role="alert">{escape(why)}</p>'
