"""How near the predicted speed of a size is to the measured one.

    OMP_NUM_THREADS=1 python benchmarks/after/speed.py --random
    OMP_NUM_THREADS=1 python benchmarks/after/speed.py --chain demo/chain

The anchors are timed as `CBDModel.from_chain(..., min_tokens_per_second=)` times them, each in its own depth and in a quarter of it, and models of all sizes are measured; all of these run
in turns, so that what else runs on the machine (its load is written down) falls on all alike, and medians over the runs are compared. An anchor's row compares its shape with the same
shape: it shows the noise. Weights are random, on whose values no time depends: ``--random`` takes shapes like the demo's (SmolLM2-135M, 99M and 64M) without a chain, and ``--real``
runs a model folder's own weights beside random ones of its config. Writes benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar

from cbd_hub import Chain
from cbd_hub.configs import read_config
from cbd_hub.interpolation.plan import Kept, Segment
from cbd_hub.interpolation.planner import shape_in
from cbd_hub.plans import anchor_config, usual_sizes
from cbd_hub.precision import best_device
from cbd_hub.shapes import config_for, count, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.speed.measuring import Speed, measure_in_turns
from cbd_hub.speed.prediction import Probe, SpeedModel, terms
from cbd_hub.speed.stopwatch import Stopwatch
from cbd_hub.weights import load_model


sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import write


SHAPES = ((30, 1536), (24, 1192), (17, 704))


def smollm2(layers: int, ffn: int) -> Any:
    """The config of SmolLM2-135M in another depth and FFN width."""
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )


def random_sizes() -> list[tuple[Any, list[Any]]]:
    """Configs of sizes like the demo's, largest first, each with those of its neighbours: the anchors, and three sizes in between two."""
    anchors = [smollm2(*shape) for shape in SHAPES]
    found = [(anchors[0], [anchors[0]])]
    for large, small in zip(anchors, anchors[1:]):
        shapes = shape_of(small), shape_of(large)
        kept = Kept.even(*shapes)
        segment = Segment("small", "large", *shapes, kept, kept.dropped, large)
        low, high = segment.sizes
        found += [(config_for(shape_in(segment, round(low + share * (high - low))), large), [small, large]) for share in (0.75, 0.5, 0.25)]
        found.append((small, [small]))
    return found


def chain_sizes(folder: Path) -> list[tuple[Any, list[Any]]]:
    """The same of a chain's usual sizes."""
    chain = Chain.from_pretrained(folder)
    found = []
    for size in usual_sizes(chain.manifest):
        plan = chain.plan(size, tolerance=0.5)
        configs = [anchor_config(chain.files, chain.manifest.anchor(name)) for name in dict.fromkeys((plan.small, plan.large))]
        found.append((plan.config(configs[-1]), configs))
    return found


def key(config: Any) -> str:
    """What tells an anchor from another."""
    return shape_of(config).text


def row(config: Any, predicted: Speed, measured: Speed, anchor: bool) -> dict[str, Any]:
    """A size as it is written down."""
    shape = shape_of(config)
    return {
        "parameters": count(shape, config), "layers": shape.layers, "ffn": shape.ffn, "anchor": anchor, "predicted": predicted.summary(), "measured": measured.summary(),
        "off": predicted.off(measured), "latency_off": predicted.latency / measured.latency - 1,
    }


def main() -> None:
    """Time the anchors, predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--chain", type=Path)
    source.add_argument("--random", action="store_true", help="shapes like the demo's")
    parser.add_argument("--real", type=Path, help="a model folder, to measure its own weights against random ones")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    options = parser.parse_args()
    disable_progress_bar()
    load = [os.getloadavg()[0]]
    sizes = random_sizes() if options.random else chain_sizes(options.chain)
    watch = Stopwatch(getattr(torch, options.dtype), best_device())
    anchors = {key(config): watch.probe_models(config) for config, neighbours in sizes if len(neighbours) == 1}
    probes = [model for models in anchors.values() for model in models.values()]
    models = [watch.random_model(config) for config, _ in sizes]
    if options.real is not None:
        models += [load_model(options.real, watch.dtype).to(watch.device), watch.random_model(read_config(options.real))]
    speeds = measure_in_turns([*probes, *models], new_tokens=options.new_tokens, runs=options.runs)
    load.append(os.getloadavg()[0])
    timed, measured = iter(speeds), speeds[len(probes) :]
    known = {name: [Probe(tuple(terms(shape_of(model.config), model.config)), next(timed)) for model in found.values()] for name, found in anchors.items()}
    predicted = [
        SpeedModel.fit([probe for neighbour in neighbours for probe in known[key(neighbour)]]).at(terms(shape_of(config), config)) for config, neighbours in sizes
    ]
    rows = [row(config, ours, found, len(neighbours) == 1) for (config, neighbours), ours, found in zip(sizes, predicted, measured)]
    table = Table("size", "shape", "predicted", "measured", "off", "latency", "measured", "off", title=watch.text, title_justify="left")
    for found in rows:
        ours, theirs = found["predicted"], found["measured"]
        table.add_row(
            format_size(found["parameters"]), f"{found['layers']} x {found['ffn']}", f"{ours['tokens_per_second']:.2f}", f"{theirs['tokens_per_second']:.2f}", f"{found['off']:+.1%}",
            f"{ours['latency']:.2f}", f"{theirs['latency']:.2f}", f"{found['latency_off']:+.1%}",
        )
    Console(width=120).print(table)
    data = {
        "where": watch.text, "cpus": os.cpu_count(), "load": load, "runs": options.runs, "new_tokens": options.new_tokens,
        "rows": rows, "real_to_random": None if options.real is None else measured[-2].off(measured[-1]),
    }
    print("load of the machine:", " ".join(f"{value:.1f}" for value in load), "" if data["real_to_random"] is None else f"real weights to random ones: {data['real_to_random']:+.1%}")
    write(options.out, data)


if __name__ == "__main__":
    main()
