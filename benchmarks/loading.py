"""How long a size takes: `from_chain` against `from_pretrained`, `cbd make` against mergekit, and time against size.

    python benchmarks/loading.py --chain demo/chain --mergekit-python mergekit/bin/python

In memory, page cache warm: `CBDModel.from_chain` of an in-between size against transformers' ``from_pretrained`` of that model saved on disk, as it is (files
are mapped, nothing is read yet) and with ``disable_mmap`` (every byte is in memory, as after ours). On disk, whole commands and imports apart: a blend
against mergekit's ``linear`` of two checkpoints of that very size, and a patch of random weights against its ``passthrough``. Time against size on
chains of random weights. Runs take turns, medians; the machine's own load cancels in ratios only. mergekit (0.1.5) has a Python of its own:
``python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5``. Writes benchmarks/results/loading.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import in_turns, medians
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.interpolation.planner import Plan
from cbd_hub.sizes import format_size


console = Console(width=120)


def in_memory(chain: str, size: str, saved: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds to a model in memory."""
    load = AutoModelForCausalLM.from_pretrained
    return in_turns({
        "from_chain": lambda: CBDModel.from_chain(chain, size), "from_pretrained": lambda: load(saved, dtype="auto"),
        "from_pretrained, read": lambda: load(saved, dtype="auto", disable_mmap=True),
    }, repeats)


def random_chain(folder: Path, hidden: int, layers: tuple[int, int], dtype: torch.dtype = torch.float32) -> Chain:
    """A chain of two models of random weights that differ in layers."""
    paths = []
    for count in layers:
        config = LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=count, num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64, tie_word_embeddings=True, dtype=dtype,
        )
        paths.append(folder / f"{hidden}x{count}")
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(paths[-1])
    return assemble_chain(paths, folder / f"chain{hidden}")


def slices_of(plan: Plan, folders: dict[str, Path]) -> list[dict[str, Any]]:
    """A patch as mergekit's slices."""
    spans: list[tuple[str, int, int]] = []
    key = "model.layers.{}.input_layernorm.weight"
    for layer in range(plan.shape.layers):
        (term,) = plan.tensors[key.format(layer)]
        source = int(term.tensor.split(".")[2])
        if spans and spans[-1][0] == term.anchor and spans[-1][2] == source:
            spans[-1] = (term.anchor, spans[-1][1], source + 1)
        else:
            spans.append((term.anchor, source, source + 1))
    return [{"sources": [{"model": str(folders[name]), "layer_range": [first, last]}]} for name, first, last in spans]


class Commands:
    """Commands that write a model to a folder of their own each time."""

    def __init__(self, work: Path, python: str) -> None:
        self.work, self.python, self.count = work, python, 0

    def timed(self, *arguments: object) -> Callable[[], None]:
        """A command whose last argument is a new folder."""
        def call() -> None:
            self.count += 1
            subprocess.run([*map(str, arguments), str(self.work / f"out{self.count}")], check=True, capture_output=True)
            for path in (self.work / f"out{self.count}").iterdir():
                path.unlink()
        return call

    def ours(self, chain: object, *arguments: str) -> Callable[[], None]:
        """``cbd make``."""
        return self.timed(sys.executable, "-m", "cbd_hub.cli", "make", chain, *arguments, "--out")

    def theirs(self, recipe: dict[str, Any]) -> Callable[[], None]:
        """``mergekit-yaml``."""
        path = self.work / f"recipe{self.count}-{len(recipe)}-{recipe['merge_method']}.yml"
        path.write_text(yaml.safe_dump(recipe))
        return self.timed(self.python, "-m", "mergekit.scripts.run_yaml", path)


def on_disk(chain: str, size: str, saved: Path, work: Path, python: str, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of whole commands, and of their imports alone."""
    model = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(work / "other")
    commands = Commands(work, python)
    pair = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (saved, work / "other")]
    patched = random_chain(work, 768, (24, 12))
    names = {anchor.name: work / f"chain768/anchors/{anchor.name}" for anchor in patched.anchors}
    middle = sum(anchor.parameters for anchor in patched.anchors) // 2
    slices = slices_of(patched.plan(middle, strategy="patch"), names)
    return {
        "blend": in_turns({
            "cbd make": commands.ours(chain, "--size", size, "--strategy", "blend"),
            "mergekit linear": commands.theirs({"merge_method": "linear", "models": pair, "dtype": "float32"}),
        }, repeats),
        "patch": in_turns({
            "cbd make": commands.ours(work / "chain768", "--size", str(middle), "--strategy", "patch"),
            "mergekit passthrough": commands.theirs({"merge_method": "passthrough", "slices": slices, "dtype": "float32"}),
        }, repeats),
        "imports": in_turns({
            "cbd make": lambda: subprocess.run([sys.executable, "-c", "import cbd_hub.cli, cbd_hub.model"], check=True),
            "mergekit": lambda: subprocess.run([python, "-c", "import mergekit.scripts.run_yaml"], check=True),
        }, repeats),
    }


def main() -> None:
    """Time everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="demo/chain")
    parser.add_argument("--size", default="117M")
    parser.add_argument("--mergekit-python", help="the Python of an environment with mergekit; without it the commands are not timed")
    parser.add_argument("--hidden", default="512,768,1024,1536", help="hidden widths of the chains of random weights, bf16: time against size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    results: dict[str, Any] = {
        "command": "python benchmarks/loading.py --chain demo/chain --mergekit-python mergekit/bin/python", "torch": torch.__version__, "repeats": options.repeats,
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        plan = CBDModel.materialize(options.chain, options.size, strategy="blend", output_dir=work / "saved")
        results["parameters"] = plan.parameters
        results["memory"] = medians(in_memory(options.chain, options.size, work / "saved", options.repeats))
        console.print(results["memory"])
        if options.mergekit_python:
            found = on_disk(options.chain, options.size, work / "saved", work, options.mergekit_python, options.repeats)
            results["disk"] = {name: medians(seconds) for name, seconds in found.items()}
            console.print(results["disk"])
        results["scale"] = []
        chains = {}
        for hidden in map(int, filter(None, options.hidden.split(","))):
            place = work / f"scale{hidden}"
            place.mkdir()
            chain = random_chain(place, hidden, (24, 16), torch.bfloat16)
            chains[place / f"chain{hidden}"] = sum(anchor.parameters for anchor in chain.anchors) // 2
        seconds = in_turns({str(path): lambda path=path, size=size: CBDModel.from_chain(path, size, strategy="blend") for path, size in chains.items()}, options.repeats)  # type: ignore[misc]
        for (path, size), middle in zip(chains.items(), medians(seconds).values()):
            results["scale"].append({"parameters": size, "seconds": middle})
            console.print(f"{format_size(size)} in bf16 ({path.name}): {middle:.2f} s, {size / middle / 1e6:.0f}M parameters a second")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
