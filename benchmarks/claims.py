"""The paper's claims with ours beside them, for examples/paper/README.md: its figures by hand, from its tables; ours from benchmarks/results/*.json."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sentences import Results, first_rows, span
from tables import healed_by

from cbd_hub.sizes import format_size


@dataclass(frozen=True)
class Claim:
    """One row.

    Attributes:
        claim: What the paper says.
        paper: Its figures.
        ours: Ours, from results by name; None where nothing was measured.
        verdict: What follows.
    """

    claim: str
    paper: str
    ours: Callable[[Results], str] | None = None
    verdict: str = ""

    def row(self, read: Results) -> str:
        """A line of the table."""
        ours, verdict = "–", "not measured"
        if self.ours is not None:
            with suppress(FileNotFoundError):  # not measured yet
                ours, verdict = self.ours(read), self.verdict
        return f"| {self.claim} | {self.paper} | {ours} | {verdict} |"


def found(difference: list[float]) -> str:
    """A difference of losses in words."""
    value, error = difference
    return f"{abs(value):.3f} ± {error:.3f} {'worse' if value > 0 else 'better'}"


def against_scratch(read: Results) -> str:
    """The headline: on ten times the tokens."""
    data = read("headline")
    ours, most = data["rows"][0], data["rows"][-1]
    right = {name: (ours["tasks"][name], most["tasks"][name]) for name in ("sciq", "arc_easy")}
    error = max(one["accuracy_stderr"] for pair in right.values() for one in pair)
    words = ", ".join(f"{name} {mine['accuracy']:.2f} against {theirs['accuracy']:.2f}" for name, (mine, theirs) in right.items())
    large, small = list(data["anchors"])[-2:]
    return (
        f"{format_size(data['parameters'])} between anchors of {large} and {small} (8K vocabulary, {data['stage_tokens']:,} tokens a stage), untrained: {ours['loss']:.3f} nats; from scratch on 10 times the whole chain's tokens "
        f"{found(most['to_chain'])}. Accuracy {words} (errors up to {error:.2f}, chance 0.25). `benchmarks/headline.py`"
    )


def at_equal_budget(read: Results) -> str:
    """On as many tokens, and three times as many."""
    rows = read("headline")["rows"]
    return f"scratch training of the same size on the chain's own tokens is {found(rows[1]['to_chain'])}, on 3 times {found(rows[2]['to_chain'])}. `benchmarks/headline.py`"


def after_a_heal(read: Results) -> str:
    """How near a size is to one distilled for it alone, made and healed."""
    rows = read("heal")["rows"]
    words = [
        f"{format_size(row['parameters'])} is {found(row['curve'][0]['to_alone'])} than the same shape distilled alone on {row['alone']['tokens']:,} tokens, and after {row['curve'][-1]['tokens']:,} tokens of heal {found(row['curve'][-1]['to_alone'])}"
        for row in reversed(rows)
    ]
    return f"another question, of the same kind: untrained, {'; '.join(words)}. `benchmarks/after/heal.py`"


def two_anchors(read: Results) -> str:
    """Against either neighbour alone."""
    rows = first_rows(read("quality"))
    smaller, cut = (span(row["rivals"][name]["minus"][0] for row in rows) for name in ("smaller neighbour", "merely cut"))
    return f"{len(rows)} sizes of {len({row['segment'] for row in rows})} segments: the smaller neighbour {smaller}, a cut of the larger one {cut}, each many standard errors. `benchmarks/quality/run.py`"


def _sweep(row: dict[str, Any]) -> dict[float, float]:
    return {float(alpha): one["to_fitted"][0] for alpha, one in row["alphas"].items()}


def averaging(read: Results) -> str:
    """The best alpha against the better end."""
    sweeps = [_sweep(row) for row in read("alpha")["rows"]]
    gains = [min(sweep[0.0], sweep[1.0]) - min(sweep.values()) for sweep in sweeps]
    return (
        f"best alpha of the sweep against its better end: {min(gains):.3f} to {max(gains):.3f} better at {len(gains)} sizes (table above). Most of the gain over the smaller anchor is the larger one's further units, "
        "which alpha 1 has too. `benchmarks/alpha.py`"
    )


def best_alpha(read: Results) -> str:
    """Where it is best."""
    sweeps = {row["parameters"]: _sweep(row) for row in sorted(read("alpha")["rows"], key=lambda row: row["parameters"])}
    words = ", ".join(f"{min(sweep, key=sweep.__getitem__):g} at {format_size(size)}" for size, sweep in sweeps.items())
    upper = [sweep for size, sweep in list(sweeps.items())[-3:]]
    spread = [max(sweep[alpha] for alpha in (0.7, 0.8, 0.9)) - min(sweep[alpha] for alpha in (0.7, 0.8, 0.9)) for sweep in upper]
    return f"{words}; in the upper segment 0.7 to 0.9 are within {min(spread):.2f} to {max(spread):.2f} of each other. `benchmarks/alpha.py`"


def unaligned(read: Results) -> str:
    """Barriers of models trained apart, as they are and aligned."""
    data = read("align")
    words = [
        f"{data[name]['barriers']['as they are']:.2f} ({name}), after {data['distil']} steps of distillation {data[f'{name}, distilled']['barriers']['as they are']:.2f}, and aligned {min(data[f'{name}, distilled']['barriers'].values()):.2f}"
        for name in ("equal width", "unequal width")
    ]
    return f"two models trained apart, then one distilled from the other: their plain average is so many nats per byte above its ends: {'; '.join(words)}. Byte-level models of 4 layers. `benchmarks/align.py`"


def sag(read: Results) -> str:
    """The middle against the chord, by kind of segment."""
    rows = {row["segment"]: row["to_chord"] for row in first_rows(read("quality")) if row["share"] == 0.5}
    words = {"depth": "depth", "ffn": "FFN", "hidden, no path": "hidden width", "hidden": "with a fifth of the anchor's steps on the path"}
    return f"to the line between the anchors, at its middle: {', '.join(f'{word} {rows[name][0]:+.3f} ± {rows[name][1]:.3f}' for name, word in words.items())}. `benchmarks/quality/run.py`"


def _middles(read: Results, name: str, healed: bool) -> dict[str, dict[str, Any]]:
    return {row["segment"]: row for row in read(name)["rows"] if row["by"] == ("blend, healed" if healed else "blend")}


def further_training(read: Results) -> str:
    """The smaller neighbour after the same heal."""
    healed, made = (_middles(read, "quality_today", after) for after in (True, False))
    words = [f"{found(healed[name]['rivals']['smaller neighbour']['minus'])} ({name}; the chain's own heal: {healed[name]['loss'] - made[name]['loss']:+.3f})" for name in ("least loss", "ffn")]
    return f"after the same 10 steps {healed_by(healed.values())} the smaller neighbour is, beside the chain's middle, {' and '.join(words)}. `benchmarks/quality/README.md`"


def initialisers(read: Results) -> str:
    """LaCo, weight selection, boomerang, and a distillation for the size alone."""
    rows = first_rows(read("quality"))
    free = ", ".join(f"{title} {span(row['rivals'][name]['minus'][0] for row in rows)}" for title, name in (("weight selection", "weight selection"), ("LaCo", "LaCo, same size")))
    middles, healed = _middles(read, "quality_trained", False), _middles(read, "quality_trained", True)
    segments = ("least loss", "depth", "ffn", "hidden")

    def each(entries: dict[str, dict[str, Any]], rival: str) -> str:
        return "; ".join(f"{found(entries[name]['rivals'][rival]['minus'])} ({name})" for name in segments)

    hurt = [healed[name]["loss"] - middles[name]["loss"] for name in segments]
    hurt += [healed[name]["rivals"][rival]["loss"] - middles[name]["rivals"][rival]["loss"] for name in segments for rival in ("smaller neighbour", "distilled alone")]
    today = {name: row["rivals"]["distilled alone"]["minus"] for name, row in _middles(read, "quality_today", True).items()}
    few = read("quality_rivals")
    tenth = "; ".join(f"{found(row['rivals'][name]['minus'])} ({row['segment']})" for name in ("boomerang", "boomerang, improved") for row in first_rows(few))
    return (
        f"Learngene was not run. Same size, untrained: {free}. At {read('quality_trained')['stage_tokens']:,} tokens a stage, in the middle of segments, boomerang's losses with evenly spaced layers are {each(middles, 'boomerang')}; with our choice of layers "
        f"{each(middles, 'boomerang, improved')}. At {few['stage_tokens']:,} tokens a stage, so and then with our choice: {tenth}. A model distilled alone at that size is {each(middles, 'distilled alone')}, after the same 10 steps of both {healed_by(healed.values())} "
        f"{each(healed, 'distilled alone')}, which makes models that have been trained, the chain's too, {span(hurt)} (by `cbd heal`'s own it is {'; '.join(f'{found(minus)} ({name})' for name, minus in today.items())}). `benchmarks/quality/run.py`"
    )


def bridged(read: Results) -> str:
    """The paper's bridge, by answers, against cross-entropy."""
    data = read("bridge")["gemma"]
    words = ", ".join(f"`{name}` {abs(data[name]['to_cross_entropy']):.3f} ± {data[name]['stderr']:.3f} {'more' if data[name]['to_cross_entropy'] > 0 else 'fewer'}" for name in ("text", "span"))
    return f"from Gemma-3-270M into a 99M Llama over {data['tokens']:,} tokens, bits per byte beside plain cross-entropy on the same text: {words}; `text` is the paper's bridge (`benchmarks/README.md`, Bridges)"


def any_number(read: Results) -> str:
    """From how many sizes on the chain is cheaper, and what a load costs."""
    cross, seconds = read("headline")["costs"]["crossover"], read("hub")["seconds"]
    patch, blend = (seconds[kind]["from_chain, forward"]["wall"] / seconds[kind]["from_pretrained, forward"]["wall"] for kind in ("real", "wide"))
    return (
        f"no training for any of them; against a distillation each the chain costs less from {cross['tokens']} sizes on in tokens and from {cross['seconds']} on in seconds, its measuring included (`benchmarks/headline.py`); "
        f"a warm load with a first forward pass takes {patch:.2f}x (patch) and {blend:.2f}x (blend) of `from_pretrained` of the same model. `benchmarks/hub.py`"
    )


CLAIMS = [
    Claim(
        "A size in between needs no further pre-training and beats 10B tokens of scratch training",
        "HellaSwag at 138M, tuned: 30.59 (GPT2-XL), 39.59, 42.01 against 29.27 (Table 9); XLSum goes the other way, 32.19 against 35.26", against_scratch,
        "holds in loss at that scale; 10B tokens are another matter",
    ),
    Claim("At equal budget it beats scratch training", "averages of 46.33 against 39.67 from scratch at 138M, 78M tokens (Table 1)", at_equal_budget, "holds"),
    Claim(
        "It reaches scratch training's loss in up to 200 times fewer steps", "217.86x at 138M (two layers from an anchor), 3.5x to 4.4x at 220M (App. G)", after_a_heal,
        "the start is near; a fifth of the tokens of heal go half of the way at 117M, half way between anchors, and none at 101M, beside one",
    ),
    Claim(
        "Two anchors are better than one", "expansion of the smaller one alone is 0.4 to 3.0 points worse on average (Table 3); the mirror, a cut of the larger one alone, is absent", two_anchors,
        "holds, against both",
    ),
    Claim("Averaging what both hold is what helps", "Eq. 3; no ends of alpha", averaging, "holds, and is small"),
    Claim("alpha 0.9 is best near the smaller anchor, larger sizes want less", "in words, Sec. 4.2.2, Fig. 6", best_alpha, "holds in the lower segment; in the upper one the choice matters little"),
    Claim("Anchors need no alignment", "implied: none is done", unaligned, "does not hold for models without a common ancestor, and distillation does not bring it about; the paper's own anchors were not measured"),
    Claim(
        "(not claimed, seen in Table 1) sizes between two widths sag", "averages of 46.3, 41.9, 44.7, 50.9, 45.6 for 138M to 537M: best where the width is a neighbour's", sag,
        "the same; path training mends more than half of it",
    ),
    Claim("Step by step is better than directly", "smallest anchor on Dolly: 26.02 against 23.30 (Table 5)"),
    Claim("More anchors are better", "47.58 with four against 46.24 with two (Table 7, Pythia)"),
    Claim("Without training, better than one anchor trained further", "54.43 against 50.07 with 100M tokens (Table 6)", further_training, "holds at that budget"),
    Claim(
        "Better than other initialisers", "42.44 against 37.50 (Auto-Learngene) and 36.50 (Van-Learngene) (Table 2, after 78M tokens)", initialisers,
        "holds against LaCo, untrained; open against boomerang with layers chosen; weight selection is made to be trained after it, and was not compared so",
    ),
    Claim(
        "A bridge brings another family's knowledge in", "better on open answers, worse on multiple choice than the homogeneous chain (Tables 10, 11, 17, 18)", bridged, "not for `text`, at this scale",
    ),
    Claim("Qwen3 chain; 51M model; HyperCloning; FSLM", "+0.54 over scratch (Table 13); 40.27 against 35.52 (Table 16); Tables 14, 15"),
    Claim("One chain serves any number of sizes", "O(1) in their number, Fig. 2a; no cost is given", any_number, "holds; the anchors have to be distilled first"),
]


def table(read: Results) -> str:
    """All of them."""
    return "\n".join(["| claim | the paper | ours | verdict |", "| --- | --- | --- | --- |", *(claim.row(read) for claim in CLAIMS)])
