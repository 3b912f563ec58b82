"""A table of each benchmark's result, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from cbd_hub.sizes import format_size, with_error


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pair(values: list[float] | None) -> str:
    """A difference with its standard error."""
    return "" if values is None else f"{values[0]:+.3f} ± {values[1]:.3f}"


def demo(data: dict[str, Any]) -> str:
    """The demo's table."""
    rows = [
        [
            f"**{format_size(row['parameters'])}**" if row["strategy"] == "anchor" else format_size(row["parameters"]),
            f"{row['shape']['layers']} x {row['shape']['ffn']}", row["strategy"], f"{row['loss']:.3f} ± {row['stderr']:.3f}", f"{row['perplexity']:.1f}",
            "" if row["cut_loss"] is None else f"{row['cut_loss']:.2f}", pair(row["to_small"]), pair(row["to_chord"]),
        ]
        for row in data["rows"]
    ]
    head = ["size", "layers x FFN", "by", "loss", "perplexity", "merely cut", "to small neighbour", "to chord"]
    return (
        f"{table(head, rows)}\n\n{data['tokens']:,} tokens in {data['documents']} documents; nats per token ± standard error over documents. Merely cut: the loss of the teacher cut to that shape; to ...: the size's loss less that one, paired."
        f"{' The chain took {:.0f} minutes to distil and measure.'.format(data['seconds'] / 60) if data.get('seconds') else ''}"
    )


def boomerang(data: dict[str, Any]) -> str:
    """Boomerang at equal tokens and parameters."""
    best = min(data["boomerang"].values())
    return (
        f"At {format_size(data['parameters'])}, the middle of the demo's larger segment, against boomerang's losses with evenly spaced layers, at equal tokens "
        f"({data['steps']} steps) and parameters: {data['chain']:.3f} nats per token against {best:.3f}, {pair([data['difference'], data['stderr']])} (paired). "
        f"`{data['command']}`"
    )


def memory(data: dict[str, Any]) -> str:
    """Peak memory against the limit."""
    rows = [
        [row["size"], row["dtype"], row["strategy"], *(f"{row[name] / 1e6:.0f}" for name in ("model", "peak", "limit"))] for row in data["rows"]
    ]
    return f"{table(['size', 'dtype', 'by', 'model MB', 'peak MB', 'limit MB'], rows)}\n\nPeak anonymous memory of `from_chain` over the import baseline. `{data['command']}`"


def step(data: dict[str, Any]) -> str:
    """A distillation step against TRL's and Model-Optimizer's."""
    seconds, memory = data["seconds"], data["peak_mib"]
    ours = seconds["cbd_hub"]
    rows = [
        [name, f"{1024 / value:,.0f}", f"**{value / ours:.2f}x**" if name != "cbd_hub" else "", f"{memory[name]:,.0f}", f"**{memory['cbd_hub'] / memory[name]:.2f}x**" if name != "cbd_hub" else ""]
        for name, value in seconds.items()
    ]
    return (
        f"{table(['trainer', 'tokens a second, 8 x 128', 'ours to it', 'peak MiB, 8 x 512', 'ours to it'], rows)}\n\n"
        f"A distillation step, SmolLM2-135M to its 99M cut, the same batches and optimiser, two CPU threads, {data['dtype']}; TRL 1.16 `GKDTrainer` with lmbda 0 and beta 0"
        f"{', Model-Optimizer 0.47 `KDTrainer` without Liger (which wants a GPU)' if len(rows) > 2 else ''}. Memory is above weights, gradients and optimiser state. `{data['command']}`"
    )


step_fp32 = step


def teacher_cache(data: dict[str, Any]) -> str:
    """What a teacher cache saves and costs."""
    rows = [
        [
            str(one["top_k"]), str(one["draws"]), f"{one['bytes_per_token']:.0f}", f"{one['rounding_kl']:.1e}", f"{one['tail_mass']:.3f}",
            *(f"{value:.4f}" for value in (one["student"]["full"], one["student"]["kept"])), f"{one['student']['kept'] - one['student']['full']:+.4f}",
        ]
        for one in data["figures"].values()
    ]
    live, cached = data["seconds"]["live teacher"], data["seconds"]["cache, k 128"]
    names = ["top k", "draws", "bytes a token", "KL of rounding", "tail mass", "KL to the student", "from the cache", "error"]
    return (
        f"{table(names, rows)}\n\nA teacher cache of {data['tokens']:,} tokens of the demo's text, nats per token. With no draws the rest is one bucket. The student: {data['student']}. "
        f"A step from a cache takes 1/{live / cached:.2f} of a step with the live teacher. `{data['command']}`"
    )


def head(data: dict[str, Any]) -> str:
    """The loss head against its floor and its rivals."""
    rows = []
    for case in data["cases"]:
        seconds, memory = case["seconds"], case["peak_mib"]
        liger = min((name for name in seconds if name.startswith("Liger")), key=lambda name: seconds[name], default="")
        smallest = min((memory[name] for name in memory if name.startswith("Liger")), default=float("nan"))
        ours = seconds["cbd_hub"]
        rows.append([
            f"{case['rows']:,} x {case['vocab']:,}, {case['dtype']}, {case['masked']:.0%} masked", f"{ours:.2f}", f"{ours / seconds['floor']:.2f}",
            *(f"{ours / seconds[name]:.2f}" if name in seconds else "" for name in (liger, "TRL", "dense")),
            f"{memory['cbd_hub']:.0f} / {smallest:.0f} / {memory.get('TRL', float('nan')):.0f}",
        ])
    names = ["N x V", "seconds", "to floor", "to Liger's best", "to TRL", "to dense", "peak MiB: ours / Liger's least / TRL"]
    return f"{table(names, rows)}\n\nForward and backward of the loss head, H 576, two CPU threads; ratios of time, less is faster. Peak memory above the inputs and a head's gradient in their dtype; ours is summed in fp32, of which the second half counts here in bf16. All are eager: Liger's `chunked_loss` with `compiled=False`, TRL's without its Triton kernel; on a GPU both have faster ways, which were not measured. `{data['command']}`"


def cut(data: dict[str, Any]) -> str:
    """Models cut without training, beside other ways to that size."""
    rivals = list(data["rows"][0]["rivals"])
    rows = []
    for row in data["rows"]:
        shapes = (f"{row[kind]['layers']} x {row[kind]['ffn']}" for kind in ("shape", "unfitted_shape"))
        rows.append([
            f"{row['model']}, {format_size(row['parameters'])}", *shapes, with_error(row["loss"], row["stderr"]), pair(row["to_whole"]), *(pair(row["rivals"].get(name, {}).get("minus")) for name in rivals),
            format_size(row["dropped_parameters"]), f"{row['seconds']['cut']:.0f} ({row['seconds']['unfitted']:.0f})",
        ])
    wholes = ", ".join(f"{name} of {format_size(size)} {loss:.3f} on {tokens:,} tokens" for name, size, loss, tokens in dict.fromkeys((row["model"], row["whole_parameters"], row["whole_loss"], row["heldout_tokens"]) for row in data["rows"]))
    head = ["cut to", "layers x FFN", "unfitted", "loss", "to the whole model", *(f"{name}, to that" for name in rivals), "size of ShortGPT's and LaCo's", "seconds (unfitted)"]
    return (
        f"{table(head, rows)}\n\nAn eighth, a quarter and three eighths fewer parameters in the blocks, fitted by least squares, without training; nats per token on held-out text ± standard error over documents. The whole models: {wholes}. "
        f"Last columns: another's loss less that of the fitted cut, paired. Unfitted: `--reconstruct none`, at the shape that it then chooses; ShortGPT and LaCo: at the depth nearest in size, which is another size; LaCo's places are searched on one block of calibration text, the better of folding one or two layers at a time is taken on the held-out text. The chain's size cost training. `{data['command']}`"
    )


def anchors(data: dict[str, Any]) -> str:
    """An anchor against students trained only for its size."""
    others = "; ".join(f"{name} {data['losses'][name]:.3f}, {pair(difference)}" for name, difference in data["to_default"].items())
    return (
        f"The demo's {format_size(data['parameters'])} anchor, trained by default (forward KL and cross-entropy) {data['losses']['default']:.3f} nats per token on "
        f"{data['tokens']:,} held-out tokens; from the same cut, with the same text and steps, paired: {others}. `{data['command']}`"
    )


def beside_mergekit(data: dict[str, Any], name: str, rival: str) -> tuple[float, float, float]:
    """How many times the time of ``cbd make`` a mergekit command takes: as whole commands by wall and by CPU time, and in CPU time without imports."""
    ours, theirs, imports = data["disk"][name]["cbd make"], data["disk"][name][rival], data["disk"]["imports"]
    apart = (theirs["cpu"] - imports["mergekit"]["cpu"]) / (ours["cpu"] - imports["cbd make"]["cpu"])
    return theirs["wall"] / ours["wall"], theirs["cpu"] / ours["cpu"], apart


def loading(data: dict[str, Any]) -> str:
    """Time to load and to write a size."""
    rows = []
    for name, found in data["memory"].items():
        base = found["from_pretrained"]
        rows.append([
            f"`from_chain` by {name}, {format_size(data['parameters'][name])}", f"{found['from_chain']['wall']:.2f}",
            *(f"{found['from_chain'][kind] / base[kind]:.1f}x" for kind in ("wall", "cpu")),
            *(f"{found['from_chain, touched'][kind] / found['from_pretrained, touched'][kind]:.1f}x" for kind in ("wall", "cpu")),
        ])
    head = ["fp32, page cache warm", "seconds", "to from_pretrained", "its CPU time", "both, then every weight read", "its CPU time"]
    lines = [
        "`from_pretrained` maps files and reads nothing; a patch's tensors are mapped as well, a blend's have to be read and made."
    ]
    blend = data["memory"]["blend"]
    if (added := blend.get("two files added up")) is not None:
        floor = added["wall"] + blend["from_pretrained"]["wall"]
        lines.append(
            f"Two files of that size added up into new memory, with no plan and no model, take {added['wall']:.2f} s: with that on top `from_pretrained` would stand at "
            f"{floor / blend['from_pretrained']['wall']:.1f}x, and `from_chain` takes {blend['from_chain']['wall'] / floor:.1f}x of it."
        )
    for name, rival in (("blend", "mergekit linear"), ("patch", "mergekit passthrough")):
        if "disk" in data:
            wall, cpu, apart = beside_mergekit(data, name, rival)
            lines.append(f"`cbd make` by {name} is {wall:.1f}x as fast as {rival} 0.1.5 as whole commands ({cpu:.1f}x in CPU time, {apart:.1f}x without imports).")
    if data["scale"]:
        rates = "; ".join(f"{format_size(row['parameters'])} {row['wall']:.2f} ({row['cpu']:.2f}) s" for row in data["scale"])
        lines.append(f"Time (CPU time) of a blend against size, bf16, random weights: {rates}.")
    return f"{table(head, rows)}\n\n{' '.join([*lines, '`' + data['command'] + '`'])}"


def align(data: dict[str, Any]) -> str:
    """The barrier between two models trained apart."""
    rows = [
        [f"{name}: {way}", f"{found['losses'][way]:.3f}", f"{found['barriers'][way]:.3f}", f"{found['gone'][way]:.0%}"]
        for name, found in data.items() if isinstance(found, dict) and "losses" in found for way in found["losses"]
    ]
    return (
        f"{table(['coordinates', 'loss half way', 'barrier', 'gone'], rows)}\n\nByte-level {'tied' if data['tied'] else 'untied'} Llama models of 4 layers, hidden "
        f"{' and '.join(map(str, data['widths']))}, each trained {data['steps']} steps from its own seed; distilled: the smaller one by {data['distil']} further steps from the larger one; fitted on {data['calibration']:,} bytes of text; barrier: loss half way less the mean of "
        f"the ends', nats per byte, {data['tokens']:,} held-out bytes. `{data['command']}`"
    )


def hub(data: dict[str, Any]) -> str:
    """What loads from the Hub cost."""
    mega = {name: f"{value / 1e6:.1f} MB" for name, value in data.items() if name.endswith("bytes")}
    chunk = data["chunk bytes"]

    def fetched(name: str, used: int) -> str:
        return f"{mega[name]}: {used / 1e6:.1f} MB that the plan reads and {max(data[name] - used, 0) / chunk:.1f} chunks of rounding"

    rows = [
        ["a `patch` size, cold", f"{fetched('patch cold bytes', data['patch used bytes'])}; the model itself has {mega['target bytes']}, both anchors {mega['both anchors bytes']}"],
        ["as `cbd plan` said before", f"{mega['patch planned bytes']}, in {data['plan requests']} requests"],
        ["a second size of the segment", fetched("second size bytes", data["second size new bytes"])],
        ["a `blend` size across FFN widths, cold", f"{fetched('blend cold bytes', data['blend used bytes'])}; both anchors have {mega['blend both anchors bytes']}"],
        ["requests, warm, pinned / not", f"{data['warm pinned requests']} / {data['warm requests']}"],
        ["four processes at once, cold", f"{data['four processes bytes to one']:.2f}x the bytes of one, {data['four processes right']} right models"],
    ]

    def ratio(seconds: dict[str, dict[str, float]], ours: str, theirs: str) -> str:
        return f"{seconds[ours]['wall'] / seconds[theirs]['wall']:.2f}x ({seconds[ours]['cpu'] / seconds[theirs]['cpu']:.2f}x)"

    kinds = {"real": "`patch`, SmolLM2-135M's widths", "deep": "`patch`, 8 layers of hidden 512", "wide": "`blend`, 2 layers of hidden 1024"}
    times = [
        [
            what, ratio(data["seconds"][name], "from_chain", "from_pretrained"), ratio(data["seconds"][name], "from_chain, forward", "from_pretrained, forward"),
        ]
        for name, what in kinds.items()
    ]
    return (
        f"{table(['load from the Hub', 'cost'], rows)}\n\nRandom Llama models that differ in layers alone (10 and 7, hidden 512) and in FFN width (8192 and 4096, hidden 1024); counted "
        f"by the tests' Hub; a chunk has {chunk / 2**20:.0f} MiB. `{data['command']}`\n\n"
        + table(["warm load to `from_pretrained` of the same model", "mapped, nothing read yet", "with the first forward pass"], times)
        + "\n\nWall time, and CPU time in brackets, from the same command. A patch maps its tensors as `from_pretrained` does; a blend has to be computed before it is there, so make it "
        "once (`cbd make`) where the same one is loaded often."
    )


def quality(data: dict[str, Any]) -> str:
    """Sizes in between on four kinds of segment against what else gives such a model."""
    rivals = list(dict.fromkeys(name for row in data["rows"] for name in row["rivals"]))
    worse = sum(row["rivals"].get("weight selection", {"loss": 0.0})["loss"] > math.log(49_152) for row in data["rows"])
    rows = [
        [
            f"{row['segment']}: {format_size(row['parameters'])}", row["by"], f"{row['loss']:.3f} ± {row['stderr']:.3f}", pair(row.get("to_chord")),
            *(pair(row["rivals"][name]["minus"]) if name in row["rivals"] else "" for name in rivals),
        ]
        for row in data["rows"]
    ]
    return (
        f"{table(['segment and size', 'by', 'loss', 'to chord', *rivals], rows)}\n\nSegments of SmolLM2-135M-Instruct and a 99M anchor, {data['stage_tokens']:,} tokens a stage, "
        f"{data['heldout_tokens']:,} held-out tokens; a rival's column is its loss less the chain's, paired. LaCo: [arXiv 2402.11187](https://huggingface.co/papers/2402.11187). Weight selection ([arXiv 2311.18823](https://huggingface.co/papers/2311.18823)) "
        f"initialises a model that is then trained: without that, as here, it stands above a uniform guess (10.8 nats) at {worse} of {len(rows)} sizes and is no fair rival. `{data['command']}`"
    )


def healed_by(rows: Iterable[dict[str, Any]]) -> str:
    """By what loss and learning rate models were healed."""
    heals = (row["heal"] for row in rows)
    ways = dict.fromkeys(f"{heal['kd_weight']:g} x KL + {heal['ce_weight']:g} x cross-entropy at a learning rate of {heal['learning_rate']:g}" for heal in heals)
    return f"by {' or '.join(ways)}"


def quality_rivals(data: dict[str, Any]) -> str:
    """The middle of each kind of segment against models that were trained for it: as made, and where all were healed alike."""

    def side_by_side(rows: list[dict[str, Any]]) -> str:
        names = dict.fromkeys(name for row in rows for name in row["rivals"])
        head = ["", *(", ".join(filter(None, (f"{row['segment']}: {format_size(row['parameters'])}", row["by"].partition(", ")[2]))) for row in rows)]
        chords = [["its less the chord's", *(pair(row.get("to_chord")) for row in rows)]] if any("to_chord" in row for row in rows) else []
        return table(head, [
            ["the chain's", *(f"{row['loss']:.3f} ± {row['stderr']:.3f}" for row in rows)], *chords,
            *([name, *(pair(row["rivals"].get(name, {}).get("minus")) for row in rows)] for name in names),
        ])

    def over_seeds(name: str) -> list[str]:
        """A rival's line, each segment's mean over its seeds with the mean's standard error."""
        cells = []
        for found in seeds.values():
            values = [row["rivals"][name]["minus"][0] for row in found if name in row["rivals"]] if name else [row["loss"] for row in found]
            cells.append("" if len(values) < len(found) else with_error(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)), "+.3f" if name else ".3f"))
        return [name or "the chain's", *cells]

    healed = [row for row in data["rows"] if "healed" in row["by"]]
    again = [row for row in data["rows"] if "seed" in row["by"]]
    first = [row for row in data["rows"] if row not in healed and row not in again]
    seeds = {row["segment"]: [row, *found] for row in first if (found := [other for other in again if other["segment"] == row["segment"]])}
    made = side_by_side(first)
    two = any("boomerang, first two layers" in row["rivals"] for row in first)
    if seeds:
        names = ["", *dict.fromkeys(name for row in again for name in row["rivals"])]
        heads = [f"{segment}: {format_size(found[0]['parameters'])}, {len(found)} seeds" for segment, found in seeds.items()]
        spread = table(["mean over seeds", *heads], [over_seeds(name) for name in names])
        made += f"\n\nAnchor, chain and the rivals that are trained, learned anew with other seeds; ± is the standard error over seeds:\n\n{spread}"
    return (
        f"{made}\n\nThe middle of segments of SmolLM2-135M-Instruct and a 99M anchor, {data['stage_tokens']:,} tokens a stage and "
        f"for every rival that is trained; {data['heldout_tokens']:,} held-out tokens, nats per token. A rival's line is its loss less the chain's, paired. Boomerang: its losses, evenly spaced layers (20 of 30; of a Llama its authors keep the first two and every second one), put back from the last on; {'first two layers: these and evenly spaced ones, from the last or the first on, whichever is better on the held-out text; ' if two else ''}improved: the layers of most influence, in the best order. "
        f"{'It and LaCo, at the nearest depth, are the same models in all columns, and columns of one shape share the one distilled alone, so that errors are not independent between columns; that one is left out where the middle has another shape. ' if len(first) > 2 else ''}"
        + (f"All of them healed {healed_by(healed)}, on a 20th of those tokens:\n\n{side_by_side(healed)}\n\n" if healed else "") + f"`{data['command']}`"
    )


quality_trained = quality_today = quality_rivals


def quality_scratch(data: dict[str, Any]) -> str:
    """The middle of a segment against a model of its shape that was trained from random weights."""
    rival = next(iter(data["rows"][0]["rivals"]))
    rows = [
        [
            ", ".join(filter(None, (f"{row['segment']}: {format_size(row['parameters'])}", row["by"].partition(", ")[2]))), f"{row['loss']:.3f} ± {row['stderr']:.3f}",
            f"{row['rivals'][rival]['loss']:.3f}", pair(row["rivals"][rival]["minus"]),
        ]
        for row in data["rows"]
    ]
    head = ["segment and size", "the chain's", rival, "its less the chain's"]
    healed = [row for row in data["rows"] if "healed" in row["by"]]
    after = f"Healed: both, {healed_by(healed)}, on a 20th of a stage's tokens." if healed else ""
    return (
        f"{table(head, rows)}\n\nThe chain's model took no step of its own; its smaller anchor learned from {data['stage_tokens']:,} tokens, the other from random weights, by "
        f"cross-entropy, from as many times that as is said. {data['heldout_tokens']:,} held-out tokens, nats per token, paired. {after} `{data['command']}`"
    )


def heal(data: dict[str, Any]) -> str:
    """What healing needs to reach a model distilled on its own."""
    rows, words = [], []
    for row in data["rows"]:
        alone, size = row["alone"], format_size(row["parameters"])
        for point in row["curve"]:
            how = f"healed on {point['tokens']:,}" if point["tokens"] else "as made"
            rows.append([f"{size}, {how}", f"{point['loss']:.3f} ± {point['stderr']:.3f}", pair(point["to_alone"])])
        rows.append([f"{size}, distilled on its own on {alone['tokens']:,}", f"{alone['loss']:.3f} ± {alone['stderr']:.3f}", ""])
        reached = row["reached"]
        words.append(
            f"{size} reaches it on none of these" if reached is None else f"{size} is there as made, untrained" if not reached else f"{size} reaches it on {reached:,} tokens, 1/{alone['tokens'] / reached:.0f}"
        )
    return (
        f"{table(['size and tokens', 'loss', 'to its own'], rows)}\n\nHealed {healed_by([data])}, against the same shape cut from the teacher and distilled on its own with a stage's settings; "
        f"{data['heldout_tokens']:,} held-out tokens, nats per token, differences paired: {'; '.join(words)}. `{data['command']}`"
    )


def adapter(data: dict[str, Any]) -> str:
    """What a LoRA keeps of its improvement when it is carried."""
    anchor = data["anchor"]

    def kept(row: dict[str, Any]) -> str:
        share, error = row["kept"]
        return f"{share:.0%}" + ("" if error is None else f" ± {error:.0%}")

    rows = [[format_size(anchor["parameters"]) + ", its own", f"{anchor['base'][0]:.3f}", f"{anchor['adapted'][0]:.3f}", pair(anchor["gain"]), "", ""]]
    for row in data["rows"]:
        anew = f"{row['anew'][0]:.3f} ({pair(row['carried_to_anew'])})" if "anew" in row else ""
        rows.append([format_size(row["parameters"]), f"{row['base'][0]:.3f}", f"{row['carried'][0]:.3f}", pair(row["gain"]), kept(row), anew])
    head = ["size", "without it", "with it", "improvement", "kept of it", "trained anew there (carried to that)"]
    return (
        f"{table(head, rows)}\n\nA LoRA of rank {data['rank']}, trained on {data['tokens']:,} tokens of another domain on the largest anchor and carried without training; "
        f"{data['heldout_tokens']:,} held-out tokens, nats per token, differences paired. `{data['command']}`"
    )


def speed(data: dict[str, Any]) -> str:
    """Predicted and measured speeds."""
    rows = [
        [
            f"**{format_size(row['parameters'])}**" if row["anchor"] else format_size(row["parameters"]), f"{row['layers']} x {row['ffn']}",
            *(f"{row[kind]['tokens_per_second']:.2f}" for kind in ("predicted", "measured")), f"{row['off']:+.1%}",
            *(f"{row[kind]['latency']:.2f}" for kind in ("predicted", "measured")), f"{row['latency_off']:+.1%}",
        ]
        for row in data["rows"]
    ]
    head = ["size", "layers x FFN", "tokens a second, predicted", "measured", "off", "latency in s, predicted", "measured", "off"]
    worst = max(abs(row["off"]) for row in data["rows"] if not row["anchor"])
    noise = max(abs(row["off"]) for row in data["rows"] if row["anchor"])
    real = "" if data["real_to_random"] is None else f" The same model with its own weights against random ones: {data['real_to_random']:+.1%}."
    return (
        f"{table(head, rows)}\n\n{data['where']}; medians of {data['runs']} runs in turns, on {data['cpus']} cores with a load of {min(data['load']):.1f} to {max(data['load']):.1f} by what else "
        f"ran; anchors are bold, and they alone are timed to predict: sizes in between are at most {worst:.1%} off, and two timings of one anchor {noise:.1%} apart.{real} `{data['command']}`"
    )


def draft(data: dict[str, Any]) -> str:
    """Drafts for the largest size."""
    rows = [
        [
            format_size(row["parameters"]), f"{row['drafted']:,}", f"{row['acceptance']:.0%}", f"{row['tokens_per_second_alone']:.2f}", f"{row['tokens_per_second']:.2f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in data["results"]
    ]
    best = "no draft is faster than it alone" if data["best"] is None else f"the best draft is {format_size(data['best'])}"
    ties = sum(row["ties"] for row in data["results"])
    same = "the output is the same in all" if not ties else f"the output parts at a tie in {ties} of {data['prompts'] * len(rows)}"
    return (
        f"{table(['draft', 'drafted', 'accepted', 'tokens a second alone', 'with it', 'speed-up'], rows)}\n\n{format_size(data['target'])} answering {data['prompts']} prompts with "
        f"{data['new_tokens']:,} tokens, greedy, {data['dtype']}, {data['where']}, {data['threads']} threads, medians of {data['rounds']} rounds in turns; {same}; {best}. `{data['command']}`"
    )


def alpha(data: dict[str, Any]) -> str:
    """The paper's sweep of alpha with both ends."""
    names = list(data["rows"][0]["alphas"])
    rows = [
        [format_size(row["parameters"]), f"{row['fitted']['loss']:.3f}", *(f"{row['alphas'][name]['to_fitted'][0]:+.3f}" for name in names)] for row in data["rows"]
    ]
    head = ["size", "fitted by the chain", *(f"alpha {float(name):g}" for name in names)]
    return f"{table(head, rows)}\n\nHeld-out loss of blends of the demo's sizes in between, nats per token on {data['tokens']:,} tokens; the sweep's columns, whose gains are 1, less the chain's fitted mix of alpha and gains. `{data['command']}`"


def bridge(data: dict[str, Any]) -> str:
    """Bridges row by row: trainings in bits per byte, alignment of tokenizers, cost of the losses."""
    parts = []
    for name, found in data.items():
        models = {rival: one for rival, one in found.items() if isinstance(one, dict) and "bits_per_byte" in one}
        pairs = {pair: one for pair, one in found.items() if isinstance(one, dict) and "covered" in one}
        losses = {kind: one for kind, one in found.items() if isinstance(one, dict) and "peak_bytes" in one}
        if models:
            head = [name, "bits per byte", "to cross-entropy"]
            rows = [[rival, f"{one['bits_per_byte']:.4f}", pair([one["to_cross_entropy"], one["stderr"] or 0.0])] for rival, one in models.items()]
            words = f"{found['tokens']:,} tokens each, {found['bytes']:,} held-out bytes, differences paired. GOLD: TRL 1.16's `ULDLoss`, in our trainer and on our spans."
        elif pairs:
            head = ["tokenizers", "bytes in one span", "single tokens on the coarser side", "seconds"]
            rows = [[two, f"{one['covered']:.0%}", f"{one['single on the coarser side']:.1%}", f"{one['seconds']:.2f}"] for two, one in pairs.items()]
            words = f"Spans of {next(iter(pairs.values()))['bytes']:,} bytes of the demo's text."
        else:
            head = ["loss alone", "CPU seconds", "peak MiB"]
            rows = [[kind, f"{one['cpu_seconds']:.2f}", f"{one['peak_bytes'] / 2**20:,.0f}"] for kind, one in losses.items()]
            words = f"Forward and backward on {found['tokens']:,} tokens, heads of Gemma-3-270M's and SmolLM2-135M's shapes, {found['threads']} thread. GOLD: TRL 1.16's `ULDLoss`, on our spans, without its trainer."
        parts.append(f"{table(head, rows)}\n\n{words} `{found['command']}`")
    return "\n\n".join(parts)


def headline(data: dict[str, Any]) -> str:
    """A size in between against training from scratch, and many sizes by one chain against each on its own."""
    tasks = list(data["rows"][0].get("tasks", {}))
    rows = [
        [
            row["name"], f"{row['tokens']:,}", f"{row['epochs']:.1f}", f"{row['loss']:.3f} ± {row['stderr']:.3f}", pair(row["to_chain"]) if row["tokens"] else "",
            *(f"{row['tasks'][name]['accuracy_norm']:.3f} ± {row['tasks'][name]['accuracy_norm_stderr']:.3f}" for name in tasks),
        ]
        for row in data["rows"]
    ]
    sizes = [
        [format_size(row["parameters"]), f"{row['chain'][0]:.3f}", f"{row['alone'][0]:.3f}", pair(row["chain_to_alone"])] for row in sorted(data["sizes"], key=lambda row: row["parameters"])
    ]
    costs, chain = data["costs"]["alone"], data["costs"]["chain"]
    spent = [[f"{count} sizes" if count != "1" else "1 size", f"{chain['tokens']:,}", f"{one['tokens']:,}", f"{chain['seconds']:,.0f}", f"{one['seconds']:,.0f}"] for count, one in costs.items()]
    cross = data["costs"]["crossover"]
    anchors = ", ".join(f"{name} {loss:.3f}" for name, (loss, _) in data["anchors"].items())
    return "\n\n".join([
        table([f"{format_size(data['parameters'])}", "tokens of its own", "times through the text", "loss", "to the chain's", *tasks], rows),
        table(["size", "chain's, no training", "distilled on its own", "difference"], sizes),
        table(["for", "chain: tokens", "alone: tokens", "chain: seconds", "alone: seconds"], spent),
        f"Anchors: {anchors}. Every token is also a teacher's pass. The chain costs less from {cross['tokens']} sizes on in tokens, from {cross['seconds']} on in seconds (its measuring of cuts and curves, which "
        f"does not grow with the tokens, included). Scratch training: AdamW, learning rate 1e-3, cosine. One seed. Tasks: share of right answers by characters; by chance 0.25. {data['stage_tokens']:,} tokens a stage, {data['heldout_tokens']:,} held-out tokens, nats per token, differences paired. `{data['command']}`",
    ])


def deploy(data: dict[str, Any]) -> str:
    """Conversions of a size."""
    rows = [
        [
            row["format"], "", f"failed here: {row['error']}", "",
        ] if "error" in row else [
            row["format"], f"{row['megabytes']:.1f} MB" if row["megabytes"] else "", f"{row['difference']:g}" + ("" if row["within_bound"] else " (beyond its bound)"),
            "" if row["kl"] is None else f"{row['kl']:g}",
        ]
        for row in data["rows"]
    ]
    return (
        f"{table(['to', 'bytes of weights', 'largest difference', 'mean KL, nats per token'], rows)}\n\n{format_size(data['parameters'])} of the demo's chain ({data['parameters'] * 4 / 1e6:.1f} MB in fp32) against "
        f"transformers in fp32, at the positions of one sentence (GGUF: every fourth) over the whole vocabulary: logits (ONNX, quantised) or log-probabilities (GGUF, llama.cpp without flash attention, which sums in half precision). `{data['command']}`"
    )


def share(row: dict[str, Any], kind: str) -> str:
    """A share of right answers with its standard error."""
    return f"{row[kind]:.3f} ± {row[f'{kind}_stderr']:.3f}"


def tasks(data: dict[str, Any]) -> str:
    """Shares of right answers."""
    rows = [[row["model"], row["task"], f"{row['questions']} of {row['of']:,}", share(row, "accuracy"), share(row, "accuracy_norm"), f"{row['seconds']:.0f}"] for row in data["rows"]]
    head = ["model", "task", "items", "right", "right by characters", "seconds"]
    return (
        f"{table(head, rows)}\n\nZero-shot, the likeliest choice; ± standard error over items. Not fine-tuned, and so not comparable with the paper's tables, whose every score is after 10 epochs on the "
        f"task's training set. {data['threads']} thread{'s' if data['threads'] > 1 else ''}. `{data['command']}`"
    )


def lm_eval(data: dict[str, Any]) -> str:
    """Our figures and lm-eval's of the same items."""
    rows = []
    for row in data["rows"]:
        check = row["check"]
        for name, metric in (("accuracy", "acc"), ("accuracy_norm", "acc_norm")):
            if metric in check["lm_eval"]:
                rows.append([
                    row["model"], f"{row['task']}, {metric}", str(check["items"]), f"{check['ours'][name]:.3f}", f"{check['lm_eval'][metric]:.3f}", str(len(check["different"][metric])),
                    f"{check['largest_difference']:.1e}",
                ])
    head = ["model", "task and metric", "items", "ours", "lm-eval's", "items that differ", "largest difference of a log-likelihood, nats"]
    return f"{table(head, rows)}\n\nThe same rows, read by lm-eval's own task files, and the same model, through its Python API. `{data['command']}`"


def paper(data: dict[str, Any]) -> str:
    """What each step of the paper's pipeline costs at small scale."""
    rows = [[name, f"{found['processor_seconds']:.0f}"] for name, found in data["steps"].items()]
    threads = sorted({found["threads"] for found in data["steps"].values()})
    return f"{table(['step', 'processor seconds'], rows)}\n\nOn {' and '.join(map(str, threads))} thread{'s' * (threads != [1])}, beside other work, which stretches wall time. `{data['command']}`"
