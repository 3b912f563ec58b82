"""What the page shows, as HTML: every text of a chain is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cbd_hub.printing import with_error
from cbd_hub.sizes import format_bytes, format_size
from cbd_hub.space.desk import Written
from cbd_hub.space.facts import Facts, Picker, Point, Scale, Snap


_ROOM = 0.085  # share of the slider that a mark's name needs on a phone


def headline(picker: Picker) -> str:
    """What the chain gives, in one look."""
    small, large = picker.manifest.anchors[-1].name, picker.manifest.anchors[0].name
    count = len(picker.manifest.anchors)
    between = "every size in between is made of them in seconds, without training" if count > 1 else "more anchors would give the sizes in between"
    anchors = f"{count} trained models, the <b>anchors</b>" if count > 1 else "1 trained model"
    return (
        f"<h1>One chain, any size from {escape(small)} to {escape(large)}</h1>"
        f"<p><b>{escape(picker.chain.name)}</b> holds {anchors}; {between}. Pick a size, see what you get, try it.</p>"
    )


def marks(snaps: Sequence[Snap], scale: Scale) -> str:
    """The slider's marks: buttons that set it, anchors above, recommended sizes below."""
    parts = []
    for kind, word in (("anchor", "anchor"), ("recommended", "recommended size")):
        last = -1.0
        for snap in (snap for snap in snaps if snap.kind == kind):
            share = scale.share(snap.size)
            named = share - last >= _ROOM
            last = share if named else last
            side = " cbd-first" if share < 0.04 else " cbd-last" if share > 0.96 else ""
            parts.append(
                f'<button type="button" class="cbd-mark cbd-{kind}{side}" style="left:{100 * share:.2f}%" data-value="{scale.value(snap.size):g}" '
                f'aria-label="{escape(snap.name)}, {word}" title="{escape(snap.name)}, {word}">{escape(snap.name) if named else "·"}</button>'
            )
    key = '<p class="cbd-key"><span class="cbd-dot cbd-anchor-dot"></span> anchor <span class="cbd-dot cbd-rec-dot"></span> recommended size in between</p>'
    return f'<div class="cbd-marks" role="group" aria-label="Sizes to jump to">{"".join(parts)}</div>{key}'


def facts_card(facts: Facts, picker: Picker) -> str:
    """A size in numbers."""
    if facts.strategy == "anchor":
        where = f"an anchor, bit for bit: {escape(facts.small)}"
    else:
        where = f"{facts.strategy} of {escape(facts.small)} and {escape(facts.large)}, {facts.position:.0%} of the way up"
    loss = "not measured" if facts.loss is None else with_error(facts.loss, facts.stderr)
    remote = picker.files.revision is not None
    rows = [
        ("Parameters", f"{facts.parameters:,}"),
        ("Layers x width", f"{facts.layers} x {facts.hidden}"),
        ("Memory", "".join(f"<span>{format_bytes(facts.memory[dtype])} <small>{short}</small></span>" for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"), ("int8", "int8")))),
        ("Download" if remote else "Download, once published", format_bytes(facts.download)),
        ("Expected loss", f"{loss} <small>nats per token</small>" if facts.loss is not None else loss),
        ("Made by", where),
    ]
    bar = "" if facts.strategy == "anchor" else (
        f'<div class="cbd-segment" role="img" aria-label="{facts.position:.0%} of the way from {escape(facts.small)} to {escape(facts.large)}">'
        f'<span>{escape(facts.small)}</span><i><b style="left:{100 * facts.position:.1f}%"></b></i><span>{escape(facts.large)}</span></div>'
    )
    warning = f'<p class="cbd-warning"><b>Poor choice:</b> {escape(facts.trough)}.</p>' if facts.trough else ""
    body = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<div class="cbd-facts" aria-live="polite"><h2>{escape(facts.name)}</h2><dl>{body}</dl>{bar}{warning}</div>'


def measured_table(points: Sequence[Point]) -> str:
    """The curve as a table."""
    if not points:
        return "<p>This chain was not measured.</p>"
    rows = "".join(
        f"<tr><td>{format_size(point.size)}</td><td>{point.size:,}</td><td>{point.strategy}</td><td>{with_error(point.loss, point.stderr)}</td></tr>" for point in points
    )
    return (
        '<div class="cbd-scroll" tabindex="0" role="region" aria-label="Measured losses"><table class="cbd-table"><thead><tr><th scope="col">size</th>'
        f'<th scope="col">parameters</th><th scope="col">by</th><th scope="col">loss</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<p>Nats per token ± standard error, on {points[-1].tokens:,} tokens of {escape(points[-1].dataset)}.</p>"
    )


def status(written: Written | None, dtype: str = "") -> str:
    """What is going on, or what it took."""
    if written is None:
        return '<p class="cbd-status">&nbsp;</p>'
    if written.state == "loading":
        value = "" if written.share is None else f' value="{written.share:.2f}"'
        return f'<p class="cbd-status" role="status"><progress max="1"{value} aria-label="{escape(written.note)}"></progress> {escape(written.note)}</p>'
    speed = "" if written.tokens_per_second is None else f"<b>{written.tokens_per_second:.1f}</b> tokens per second"
    parts = [part for part in (
        escape(written.note), f"{written.tokens} tokens", speed, "" if written.perplexity is None else f"perplexity <b>{written.perplexity:.1f}</b>",
        f"{format_bytes(written.memory)} of weights{f' in {dtype}' if dtype else ''}" if written.state == "done" else "",
        f"{format_bytes(written.process)} the whole process" if written.state == "done" else "",
    ) if part]
    return f'<p class="cbd-status" role="status">{" · ".join(parts)}</p>'


def refusal(error: Exception) -> str:
    """Why something was not done."""
    return f'<p class="cbd-status cbd-warning" role="alert">{escape(str(error))}</p>'
