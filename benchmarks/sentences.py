"""What each benchmark shows in one sentence, for benchmarks/README.md and docs/, and the few answers that README.md gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from tables import beside_mergekit, pair

from cbd_hub.interpolation.curve import Chord
from cbd_hub.sizes import format_size


def memory(data: dict[str, Any]) -> str:
    """Peak memory against its law."""
    under = sum(row["peak"] <= row["limit"] for row in data["rows"])
    closest = max(data["rows"], key=lambda row: row["peak"] / row["limit"])
    return (
        f"Peak memory of `from_chain` is below its bound (the model, twice its largest tensor, 64 MB) at {under} of {len(data['rows'])} sizes and dtypes; "
        f"the closest takes {closest['peak'] / closest['limit']:.0%} of it ({closest['size']}, {closest['dtype']})."
    )


def head(data: dict[str, Any]) -> str:
    """The loss head against Liger."""
    def span(kind: str, name: str) -> str:
        rivals = [(case[kind]["cbd_hub"], [value for rival, value in case[kind].items() if rival.startswith(name)]) for case in data["cases"] if not case["masked"]]
        shares = [ours / min(theirs) for ours, theirs in rivals if theirs]
        return f"{min(shares):.2f} to {max(shares):.2f}"

    unnoted = "" if data.get("machine") else " The CPU was not noted."
    return (
        f"Of the time of Liger's chunked loss, at its best of several sizes of chunk, ours takes {span('seconds', 'Liger')}, of its memory {span('peak_mib', 'Liger')}; of TRL's chunked loss {span('seconds', 'TRL')} and "
        f"{span('peak_mib', 'TRL')} ({sum(not case['masked'] for case in data['cases'])} cases without masked rows, all eager, two CPU threads; where half are masked, ours leaves them out and the others, as they were called, compute them). Liger compiled, and Triton's kernels on a GPU, were not measured.{unnoted}"
    )


def step(data: dict[str, Any]) -> str:
    """A distillation step against other trainers'."""
    ours, memory = data["seconds"]["cbd_hub"], data["peak_mib"]
    rivals = [f"{name} takes {seconds / ours:.1f} times the time and {memory[name] / memory['cbd_hub']:.1f} times the memory of ours" for name, seconds in data["seconds"].items() if name != "cbd_hub"]
    return (
        f"For the same step {', '.join(rivals)}: they form whole logits ({data['dtype']}, two CPU threads; memory above weights, gradients and optimiser state; "
        "TRL's chunked loss is in the line on the loss head)."
    )


step_fp32 = step


def teacher_cache(data: dict[str, Any]) -> str:
    """A teacher cache's error."""
    parts = [
        f"{one['student']['kept'] - one['student']['full']:+.4f} nats of forward KL at {one['bytes_per_token']:.0f} bytes a token (top {one['top_k']}, {one['draws']} draws)"
        for one in data["figures"].values() if one["draws"]
    ]
    return f"On {data['tokens']:,} tokens, to {data['student']}, a teacher cache is off by {' and '.join(parts)}: one set of draws, without a standard error."


def align(data: dict[str, Any]) -> str:
    """How much of the barrier an alignment removes."""
    (before, gone), (left, gone_then) = barriers(data, ""), barriers(data, ", distilled")
    return (
        f"Of the loss barrier between two byte-level Llamas of 4 layers, trained apart and untied, one pair each of equal and unequal width, aligning removes {gone}. Once the smaller one has learned "
        f"from the larger one for {data['distil']} steps the barrier is {left} nats instead of {before}, and aligning removes {gone_then}. No larger model was measured."
    )


def cut(data: dict[str, Any]) -> str:
    """What a cut without training loses, and what the others do."""
    rows = data["rows"]
    rivals, lost = ", ".join(f"{name} {reach(rows, name)}" for name in rows[0]["rivals"]), [row["to_whole"][0] for row in rows]
    return f"Cut without training by an eighth to three eighths of their blocks and fitted by least squares, {' and '.join(dict.fromkeys(row['model'] for row in rows))} lose {min(lost):.2f} to {max(lost):.2f} nats per token. At these sizes, ShortGPT and LaCo at the nearest depth: {rivals}."


def barriers(data: dict[str, Any], which: str) -> tuple[str, str]:
    """The barriers of both pairs as they are, and how much of them an alignment removes."""
    pairs = [data[f"{width}{which}"] for width in ("equal width", "unequal width")]
    return " and ".join(f"{found['barriers']['as they are']:.2f}" for found in pairs), " and ".join(f"{max(found['gone'].values()):.0%}" for found in pairs)


def hub(data: dict[str, Any]) -> str:
    """What a load from the Hub costs."""
    real, wide = data["seconds"]["real"], data["seconds"]["wide"]

    def ratio(seconds: dict[str, dict[str, float]], ours: str, theirs: str) -> str:
        return f"{seconds[ours]['wall'] / seconds[theirs]['wall']:.2f}x"

    return (
        f"Random weights, from a Hub of the tests on the same machine: a cold `blend`, the one strategy where more than layers moves as in the demo's chain, fetches {data['blend cold bytes'] / 1e6:.0f} MB of both anchors' "
        f"{data['blend both anchors bytes'] / 1e6:.0f}; a `patch`, of anchors that differ in layers alone, {data['patch cold bytes'] / 1e6:.0f} MB of {data['both anchors bytes'] / 1e6:.0f}, and a second size of that "
        f"segment {data['second size bytes'] / 1e6:.0f} MB more. Warm, with the first forward pass, a blend takes {ratio(wide, 'from_chain, forward', 'from_pretrained, forward')} the time of `from_pretrained`, a patch "
        f"{ratio(real, 'from_chain, forward', 'from_pretrained, forward')}; {data['warm pinned requests']} requests where the revision is pinned."
    )


def heal(data: dict[str, Any]) -> str:
    """What healing reaches."""
    parts = []
    for row in data["rows"]:
        made, last = row["curve"][0], row["curve"][-1]
        parts.append(
            f"{last['loss'] - made['loss']:+.3f} nats per token at {format_size(row['parameters'])} by {last['tokens']:,} tokens ({made['loss']:.3f} as made, {last['loss']:.3f} healed, {row['alone']['loss']:.3f} of the same "
            f"shape distilled on its own on {row['alone']['tokens']:,})"
        )
    return f"On an earlier chain of the demo, on text that the heal did not measure itself on: {'; '.join(parts)}."


def adapter(data: dict[str, Any]) -> str:
    """What a carried LoRA keeps."""
    rows = "; ".join(f"{row['kept'][0]:.0%} at {format_size(row['parameters'])}" for row in data["rows"])
    anew = [
        f" At {format_size(row['parameters'])} one that is trained there improves the loss by {row['anew_gain'][0]:.3f} nats, the carried one by {row['gain'][0]:.3f}." for row in data["rows"] if row.get("anew")
    ]
    return f"A LoRA of {format_size(data['anchor']['parameters'])}, carried without training, keeps of its improvement there: {rows}.{''.join(anew)}"


def speed(data: dict[str, Any]) -> str:
    """How well a speed is predicted."""
    off = [abs(row["off"]) for row in data["rows"] if not row["anchor"]]
    late = [abs(row["latency_off"]) for row in data["rows"] if not row["anchor"]]
    return (
        f"Of {len(off)} sizes in between (random weights), tokens a second are predicted within {max(off):.1%} and latency within {max(late):.1%} of what runs of {data['new_tokens']} new tokens give, where two timings of one anchor were up to {max(abs(row['off']) for row in data['rows'] if row['anchor']):.1%} apart; "
        f"real weights were {abs(data['real_to_random']):.1%} off random ones."
    )


def draft(data: dict[str, Any]) -> str:
    """The best draft."""
    best = max(data["results"], key=lambda row: row["speedup"])
    word = "which makes it" if best["speedup"] >= 1 else "and none pays here: with the best it is"
    return f"For {format_size(data['target'])} the best of {len(data['results'])} drafts is {format_size(best['parameters'])}: {best['acceptance']:.0%} accepted, {word} {best['speedup']:.2f} times as fast as alone."


def alpha(data: dict[str, Any]) -> str:
    """The sweep of alpha against the fitted mix."""
    half = [row["alphas"]["0.5"]["to_fitted"] for row in data["rows"] if "0.5" in row["alphas"]]
    best = [min(one["to_fitted"][0] for one in row["alphas"].values()) for row in data["rows"]]
    return (
        f"A plain average (alpha 0.5, gains of 1) loses {min(value for value, _ in half):.3f} to {max(value for value, _ in half):.3f} nats to the mix (alpha and gains) that the chain fits, and no alpha of the sweep "
        f"beats that mix by more than {max(0.0, -min(best)):.3f}, at {len(data['rows'])} sizes."
    )


def loading(data: dict[str, Any]) -> str:
    """Time to load, and to write."""
    parts = [f"a {name} takes {found['from_chain, touched']['wall'] / found['from_pretrained, touched']['wall']:.1f} times as long as `from_pretrained`" for name, found in data["memory"].items()]
    words = f"From a local chain, every weight read once, {', '.join(parts)}."
    if "disk" in data:
        ratios = []
        for name, rival in (("blend", "mergekit linear"), ("patch", "mergekit passthrough")):
            wall, _, apart = beside_mergekit(data, name, rival)
            ratios.append(f"{wall:.1f} times as fast as its `{rival.split()[1]}` ({apart:.1f} times in CPU time without imports)")
        words += f" `cbd make` is, beside mergekit's whole commands, {' and '.join(ratios)}: for the most part by what is imported."
    return words


def bridge(data: dict[str, Any]) -> str:
    """What bridges gain, and what their losses cost against GOLD's."""
    words = []
    if "gemma" in data:
        rivals = {name: one for name, one in data["gemma"].items() if isinstance(one, dict) and "bits_per_byte" in one and name not in ("teacher", "untrained", "cross-entropy")}
        gains = "; ".join(f"{name} {pair([one['to_cross_entropy'], one['stderr']])}" for name, one in sorted(rivals.items(), key=lambda entry: entry[1]["bits_per_byte"]))
        words.append(f"Gemma-3-270M teaches a 99M Llama of another vocabulary, {data['gemma']['tokens']:,} tokens; held-out bits per byte against cross-entropy alone: {gains}.")
    if "move" in data:
        start = data["move"]["original"]["bits_per_byte"]
        more = {name: one["bits_per_byte"] / start - 1 for name, one in data["move"].items() if isinstance(one, dict) and "bits_per_byte" in one}
        alike = f", {more['composed rows, cross-entropy']:.0%} after as many of cross-entropy" if "composed rows, cross-entropy" in more else ""
        words.append(
            f"SmolLM2-135M in GPT-2's vocabulary has {more['composed rows, untrained']:.0%} more bits per byte untrained and {more['composed rows, span']:.0%} after {data['move']['tokens']:,} tokens "
            f"of `span`{alike} ({more['random rows, span']:.0%} from random rows)."
        )
    if "gpt2" in data:
        ours, base = (data["gpt2"][f"random, {name}"] for name in ("vocab", "cross-entropy"))
        words.append(
            f"A GPT-2 of SmolLM2-135M's size, from random weights, {data['gpt2']['tokens']:,} tokens: {ours['bits_per_byte']:.3f} bits per byte taught by it, {base['bits_per_byte']:.3f} by cross-entropy."
        )
    case = data.get("loss", {})
    if "GOLD, hybrid" in case:
        ours, theirs = case["span+vocab"], case["GOLD, hybrid"]
        words.append(
            f"The bridge loss `span+vocab` takes {ours['cpu_seconds'] / theirs['cpu_seconds']:.2f} of the time and {ours['peak_bytes'] / theirs['peak_bytes']:.2f} of the memory of TRL's GOLD (hybrid)."
        )
    return " ".join(words)


def quality(data: dict[str, Any]) -> str:
    """Segments against their chord."""
    rows = [row for row in data["rows"] if row.get("to_chord")]
    under = sum(row["to_chord"][0] <= row["to_chord"][1] for row in rows)
    over = {row["segment"]: row for row in sorted(rows, key=lambda row: row["to_chord"][0]) if row["to_chord"][0] > row["to_chord"][1]}
    words = ", ".join(f"`{segment}` {pair(row['to_chord'])} at {format_size(row['parameters'])}" for segment, row in over.items())
    return f"Of {len(rows)} sizes on {len({row['segment'] for row in rows})} segments, {under} lie on or below the chord of their anchors' losses. Above it, in nats, at worst: {words}. The demo's lower segment, above, sags too."


def first_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of sizes in between that are neither healed nor of a further seed."""
    return [row for row in data["rows"] if "," not in row["by"]]


def span(differences: Iterable[float], more: str = "worse", less: str = "better") -> str:
    """By how much losses are worse or better than the chain's, or how one says it, from one end to the other."""
    found = sorted(differences)
    words = [f"{abs(value):.2f} {more if value > 0 else less}" for value in (found[0], found[-1])]
    if words[0] == words[1]:
        return words[0]
    if words[0].split()[1] == words[1].split()[1]:
        return f"{min(map(abs, found)):.2f} to {max(map(abs, found)):.2f} {words[0].split()[1]}"
    return f"from {words[0]} to {words[1]}"


def reach(rows: list[dict[str, Any]], name: str) -> str:
    """By how much a rival is worse or better than ours, where it was measured."""
    return span(row["rivals"][name]["minus"][0] for row in rows if name in row["rivals"])


def quality_rivals(data: dict[str, Any]) -> str:
    """The middle of segments against trained rivals."""
    rows = first_rows(data)

    def spread(found: list[float]) -> str:
        return f"{statistics.mean(found):+.3f} ± {statistics.stdev(found) / len(found) ** 0.5:.3f}"

    improved: dict[str, list[float]] = {}
    for row in data["rows"]:
        if "healed" not in row["by"] and "boomerang, improved" in row["rivals"]:
            improved.setdefault(f"`{row['segment']}`", []).append(row["rivals"]["boomerang, improved"]["minus"][0])
    seeds = {segment: found for segment, found in improved.items() if len(found) > 1}
    names = ", ".join(f"`{row['segment']}`" for row in rows)
    kinds = {"boomerang": "boomerang's losses with evenly spaced layers", "boomerang, first two layers": "with the first two of them kept", "boomerang, improved": "with layers by influence and the best order"}
    boomerangs = ", ".join(f"{title} {reach(rows, name)}" for name, title in kinds.items() if any(name in row["rivals"] for row in rows))
    return (
        f"At the middle of {len(rows)} segment{'s' if len(rows) > 1 else ''} ({names}), {data['stage_tokens']:,} tokens a stage, in nats against the chain's model, which took no step: distilled for that size alone "
        f"{reach(rows, 'distilled alone')}; {boomerangs}; merely cut {reach(rows, 'merely cut')}; the smaller neighbour {reach(rows, 'smaller neighbour')}."
        + (f" Over {max(map(len, seeds.values()))} seeds that boomerang stands at {'; '.join(f'{spread(found)} in {segment}' for segment, found in seeds.items())}{f' (not repeated in {once})' if (once := ', '.join(sorted(improved.keys() - seeds.keys()))) else ''}." if seeds else "")
    )


quality_trained = quality_today = quality_rivals


def quality_scratch(data: dict[str, Any]) -> str:
    """A size in between against scratch training."""
    row = data["rows"][0]
    name, rival = next(iter(row["rivals"].items()))
    return (
        f"A model of {format_size(row['parameters'])} that the chain makes without a step loses {row['loss']:.2f} nats per token; one of its shape from random weights, trained on {name.rpartition(' ')[2].rstrip('x')} times the stage's {data['stage_tokens']:,} tokens, {rival['loss']:.2f} "
        f"({pair(rival['minus'])}, paired)."
    )


def headline(data: dict[str, Any]) -> str:
    """A size in between against training from scratch."""
    most, cross = data["rows"][-1], data["costs"]["crossover"]
    words = "better" if most["to_chain"][0] > 0 else "worse"
    times = most["tokens"] / (data["stage_tokens"] * (len(data["anchors"]) - 1))
    own = sorted(row["chain_to_alone"][0] for row in data["sizes"])
    beside = f"{-own[-1]:.2f} to {-own[0]:.2f} better than" if own[-1] < 0 else f"{own[0]:+.2f} to {own[-1]:+.2f} nats from"
    return (
        f"{format_size(data['parameters'])} of a chain of {', '.join(data['anchors'])}, without a training step, is {abs(most['to_chain'][0]):.2f} ± {most['to_chain'][1]:.2f} nats {words} than the same shape trained from scratch on "
        f"{times:.0f} times the chain's tokens ({data['stage_tokens']:,} a stage; the chain begins with a pretrained SmolLM2 of a smaller vocabulary, whose own pre-training is not counted; the learning rate from scratch was not searched). {len(own)} of its sizes are "
        f"{beside} the same shapes cut from its largest anchor and distilled each on its own with one stage's tokens (the chain had {len(data['anchors']) - 1} stages). It costs less than those from {cross['tokens']} sizes on in tokens, and from {cross['seconds']} on "
        f"in seconds, with its measuring, reckoned from the {len(own)} that were trained."
    )


def tasks(data: dict[str, Any]) -> str:
    """Tasks by size."""
    words = []
    for task in dict.fromkeys(row["task"] for row in data["rows"]):
        rows = sorted((row for row in data["rows"] if row["task"] == task), key=lambda row: -row["parameters"])
        each = [f"{format_size(row['parameters'])} {row['accuracy']:.2f}" for row in rows]
        words.append(f"{task} {', '.join(each)}")
    most = max(row["accuracy_stderr"] for row in data["rows"])
    return f"Zero-shot accuracy by size, up to {max(row['questions'] for row in data['rows'])} items each, validation sets, standard errors up to {most:.2f}: {'; '.join(words)}. By chance arc_easy and sciq come to 0.25, winogrande to 0.50."


def lm_eval(data: dict[str, Any]) -> str:
    """Whether the protocol is lm-eval's."""
    items, differ = sum(row["check"]["items"] for row in data["rows"]), sum(len(found) for row in data["rows"] for found in row["check"]["different"].values())
    return f"Through lm-eval's Python API {differ} of {items} items of {', '.join(dict.fromkeys(row['task'] for row in data['rows']))} come out otherwise than by `cbd eval --tasks`."


def paper(data: dict[str, Any]) -> str:
    """The paper's pipeline."""
    return f"The paper's pipeline on models of 135M and less, which shows that its steps run and nothing of quality, takes {sum(found['processor_seconds'] for found in data['steps'].values()):.0f} processor seconds."


Results = Callable[[str], dict[str, Any]]


def _trained(name: str) -> Callable[[Results], str]:
    return lambda read: reach(first_rows(read("quality_trained")), name)


def _published(read: Results) -> str:
    def said(name: str) -> str:
        data = read(name)
        return f"{reach(first_rows(data), 'boomerang')} on {data['stage_tokens']:,} ({len(first_rows(data))} segments)"

    two = reach(first_rows(read("quality_today")), "boomerang, first two layers")
    return f"{said('quality_trained')}, {said('quality_rivals')}; measured again {said('quality_today')}, and there with the first two layers kept, as its authors do in a Llama, {two}"


def _cut(read: Results) -> str:
    rows = first_rows(read("quality"))
    return f"{reach(rows, 'merely cut')} at {len(rows)} sizes; the smaller anchor itself {reach(rows, 'smaller neighbour')}"


def _floor(read: Results) -> str:
    rows = [row for row in read("cut")["rows"] if "the chain" in row["rivals"]]
    return f"{span(-row['rivals']['the chain']['minus'][0] for row in rows)} at {', '.join(format_size(row['parameters']) for row in rows)} of the demo's chain"


def _chord(read: Results) -> str:
    rows = [row for row in first_rows(read("quality")) if row.get("to_chord")]
    worst = max(rows, key=lambda row: row["to_chord"][0])
    return f"{sum(row['to_chord'][0] <= row['to_chord'][1] for row in rows)} of {len(rows)} sizes are on or below it, within a standard error; at worst {worst['to_chord'][0]:.2f} above (segment `{worst['segment']}`); the demo's lower segment, in the table at the top, up to {max(row['to_chord'][0] for row in read('demo')['rows'] if row['to_chord']):.2f}"


def _alone(read: Results) -> str:
    data = read("headline")
    own = [-row["chain_to_alone"][0] for row in data["sizes"]]
    large, small = list(data["anchors"])[-2:]
    return f"{span(own)} at {len(own)} sizes between {large} and {small}, on one stage's tokens against the chain's {len(data['anchors']) - 1} stages (one run)"


def _costs(read: Results) -> str:
    data = read("headline")
    cross = data["costs"]["crossover"]
    return f"{len(data['anchors']) - 1} stages instead of N: fewer tokens from {cross['tokens']} sizes on; less time from {cross['seconds']} on, with stages of 20 steps, beside which measuring takes long"


def _elsewhere(read: Results) -> str:
    data = read("adapter")
    whole, (*between, anchor) = data["anchor"], data["rows"]
    chord = Chord("", "", (anchor["parameters"], whole["parameters"]), (anchor["base"][0], whole["base"][0]))
    over = [row["base"][0] - (chord.at(row["parameters"]) or math.nan) for row in between]
    middle = between[len(between) // 2]
    return f"{', '.join(format_size(row['parameters']) for row in between)} lie {span(over, 'above', 'below')} it; {format_size(middle['parameters'])} loses {middle['base'][0] - whole['base'][0]:.2f} nats to the whole model there"


def _right(read: Results) -> str:
    rows = [row for row in read("tasks")["rows"] if row["task"] in ("arc_easy", "sciq")]
    models = list(dict.fromkeys(row["model"] for row in rows))[:3]  # the largest anchor, a size in between, the anchor below
    shares = {model: " and ".join(f"{row['accuracy']:.2f}" for row in rows if row["model"] == model) for model in models}
    large, between, small = models
    return f"{between} has {shares[between]}, {large} {shares[large]}, {small} {shares[small]} (errors up to {max(row['accuracy_stderr'] for row in rows):.2f}, {rows[0]['questions']} items each)"


def _scratch(read: Results) -> str:
    (name, rival), = read("quality_scratch")["rows"][0]["rivals"].items()
    return f"{rival['minus'][0]:.2f} worse on {name.rpartition(' ')[2].rstrip('x')} times a stage's tokens"


def _step(read: Results) -> str:
    data = read("step")
    ours, memory = data["seconds"]["cbd_hub"], data["peak_mib"]
    slow = read("step_fp32")["seconds"]
    return "; ".join(
        f"{name} {seconds / ours:.1f}x the time ({slow[name] / slow['cbd_hub']:.1f}x in fp32 on another CPU), {memory[name] / memory['cbd_hub']:.1f}x the memory beside weights and optimiser"
        for name, seconds in data["seconds"].items() if name != "cbd_hub"
    )


def _loading(read: Results) -> str:
    data = read("loading")
    blend, patch = (found["from_chain, touched"]["wall"] / found["from_pretrained, touched"]["wall"] for found in (data["memory"]["blend"], data["memory"]["patch"]))
    return f"by blend {blend:.1f}x the time, by patch {patch:.1f}x"


def _making(read: Results) -> str:
    wall, _, apart = beside_mergekit(read("loading"), "blend", "mergekit linear")
    return f"{wall:.1f}x the time as whole commands, {apart:.1f}x in CPU time without imports"


def _adapter(read: Results) -> str:
    rows = read("adapter")["rows"]
    first, *_, last = rows
    anew = next(row for row in rows if row.get("anew"))
    return (
        f"of its gain at {format_size(read('adapter')['anchor']['parameters'])} it keeps {first['kept'][0]:.0%} at {format_size(first['parameters'])}, {last['kept'][0]:.0%} at {format_size(last['parameters'])}; "
        f"at {format_size(anew['parameters'])} it gains {anew['gain'][0]:.2f} nats, one trained there {anew['anew_gain'][0]:.2f}"
    )


def _heal(read: Results) -> str:
    rows = read("heal")["rows"]
    found = [(row["curve"][-1]["loss"] - row["curve"][0]["loss"], format_size(row["parameters"])) for row in rows]
    words = ", ".join(f"{f'{abs(change):.3f} ' + ('worse' if change > 0 else 'better') if abs(change) >= 0.0005 else 'the same'} at {size}" for change, size in found)
    return f"{words}, on {rows[0]['curve'][-1]['tokens']:,} tokens; on text of another kind it may lose ([Heal a size](docs/how-to/heal.md))"


def _apart(read: Results) -> str:
    left, gone = barriers(read("align"), ", distilled")
    return f"half way {left} above their ends as they are; aligned, {gone} of that is gone (nats per byte, two small byte-level pairs)"


QUALITY: dict[str, tuple[str, Callable[[Results], str]]] = {
    "the line between its anchors' losses (the chord)": ("quality", _chord), "the chord on text of a kind that no anchor was trained on (Shakespeare)": ("adapter", _elsewhere), "its neighbours, on ARC-Easy and SciQ": ("tasks", _right), "the same shape, merely cut by importance": ("quality", _cut), "what `cbd cut` makes of the teacher at that size, fitted by least squares": ("cut", _floor),
    "the same shape from random weights": ("quality_scratch", _scratch), "boomerang's losses and evenly spaced layers, on as few tokens (its authors use 2.1 billion)": ("quality_trained", _published),
    "boomerang, layers chosen by influence, best order": ("quality_trained", _trained("boomerang, improved")), "the same shape, distilled for that size alone": ("quality_trained", _trained("distilled alone")), "the same, in the second segment of a chain": ("headline", _alone),
    "itself, healed": ("heal", _heal), "between models trained apart, the smaller one distilled from the other": ("align", _apart),
}
COST: dict[str, tuple[str, Callable[[Results], str]]] = {
    "N sizes, against N distillations": ("headline", _costs), "a distillation step on two CPU cores": ("step", _step), "`from_chain`, then every weight read, against `from_pretrained`": ("loading", _loading),
    "mergekit's `linear`, against `cbd make`": ("loading", _making), "a LoRA of the largest anchor, carried without training": ("adapter", _adapter),
}
