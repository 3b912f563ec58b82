"""How long a size takes: `from_chain` against `from_pretrained`, `cbd make` against mergekit, and time against size.

    python benchmarks/loading.py --chain demo/chain --mergekit-python mergekit/bin/python

In memory, page cache warm, a blend of the chain and a patch of random weights: `CBDModel.from_chain` of an in-between size against transformers'
``from_pretrained`` of that model saved on disk, which maps files and reads nothing yet; and both followed by one sum over every weight, after which both
models have been read. Beside the blend stands its floor: two files of that very size, added up tensor by tensor into new memory, with no plan and no model around it. On disk, whole commands and imports apart: a blend
against mergekit's ``linear`` of two checkpoints of that very size, and a patch against its ``passthrough``. Time against size on chains of random weights in
bf16; ``--hidden 640,832,1088,1344,2816`` goes to 2B (30 GB of disk, 16 GB of memory). Runs take turns; medians of wall time and of CPU time. Other work on the
machine stretches the first and hardly the second. mergekit (0.1.5) has a Python of its own:
``python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5``. Writes benchmarks/results/loading.json.
"""

from __future__ import annotations

import argparse
import gc
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from measuring import write
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.interpolation.plan import Plan
from cbd_hub.sizes import format_size


console = Console(width=120)


Seconds = dict[str, dict[str, float]]  # name -> wall and cpu


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> Seconds:
    """Median seconds of every call, one after the other in each round; the first round is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            gc.collect()  # or one call pays for the memory of the model before it
            wall, cpu = time.perf_counter(), cpu_seconds()
            call()
            if repeat:
                seconds[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return {name: dict(zip(("wall", "cpu"), map(statistics.median, zip(*values)))) for name, values in seconds.items()}


def touched(model: Any) -> None:
    """Read every weight once."""
    for parameter in model.parameters():
        parameter.detach().sum()


def summed(first: Path, second: Path) -> list[torch.Tensor]:
    """Half of each tensor of two checkpoints, in new memory: the least that a blend has to do."""
    with safe_open(first / "model.safetensors", "pt") as ours, safe_open(second / "model.safetensors", "pt") as theirs:
        return [torch.lerp(ours.get_tensor(key), theirs.get_tensor(key), 0.5) for key in ours.keys()]  # noqa: SIM118 (no mapping)


def in_memory(chain: str | Path, saved: Path, repeats: int, other: Path | None = None, **wish: Any) -> Seconds:
    """Seconds to a model in memory; with ``other``, a second checkpoint of its size, also to the sum of both."""
    load = AutoModelForCausalLM.from_pretrained
    floor: dict[str, Callable[[], object]] = {} if other is None else {"two files added up": lambda: summed(saved, other)}
    return in_turns({
        **floor,
        "from_chain": lambda: CBDModel.from_chain(chain, **wish), "from_pretrained": lambda: load(saved, dtype="auto"),
        "from_chain, touched": lambda: touched(CBDModel.from_chain(chain, **wish)), "from_pretrained, touched": lambda: touched(load(saved, dtype="auto")),
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
    chain = assemble_chain(paths, folder / f"chain{hidden}", align=False)
    for path in paths:
        shutil.rmtree(path)
    return chain


def scaled(saved: Path, folder: Path) -> None:
    """Another checkpoint of the same shape."""
    model = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(folder)


def middle_of(chain: Chain) -> int:
    """The size half way between two anchors."""
    return sum(anchor.parameters for anchor in chain.anchors) // 2


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


def on_disk(chain: str, size: str, saved: Path, other: Path, patched: Chain, work: Path, python: str, repeats: int) -> dict[str, Seconds]:
    """Seconds of whole commands, and of their imports alone."""
    commands = Commands(work, python)
    pair = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (saved, other)]
    names = {anchor.name: work / f"chain768/anchors/{anchor.name}" for anchor in patched.anchors}
    middle = middle_of(patched)
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
    parser.add_argument("--hidden", default="640,832,1088,1344", help="hidden widths of the chains of random weights, bf16: time against size")
    parser.add_argument("--work", type=Path, help="where the models are made; by default the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--command-repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    disable_progress_bar()
    results: dict[str, Any] = {"repeats": options.repeats}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        plan = CBDModel.materialize(options.chain, options.size, strategy="blend", output_dir=work / "saved")
        scaled(work / "saved", work / "other")
        patched = random_chain(work, 768, (24, 12))
        patch: dict[str, Any] = {"size": middle_of(patched), "strategy": "patch"}
        found = CBDModel.materialize(work / "chain768", **patch, output_dir=work / "patched")
        results["parameters"] = {"blend": plan.parameters, "patch": found.parameters}
        results["memory"] = {
            "blend": in_memory(options.chain, work / "saved", options.repeats, work / "other", size=options.size, strategy="blend"),
            "patch": in_memory(work / "chain768", work / "patched", options.repeats, **patch),
        }
        console.print(results["memory"])
        if options.mergekit_python:
            results["disk"] = on_disk(options.chain, options.size, work / "saved", work / "other", patched, work, options.mergekit_python, options.command_repeats)
            console.print(results["disk"])
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        results["scale"] = []
        for hidden in map(int, filter(None, options.hidden.split(","))):
            middle = middle_of(random_chain(work, hidden, (24, 16), torch.bfloat16))
            seconds = in_turns({"blend": lambda hidden=hidden, middle=middle: CBDModel.from_chain(work / f"chain{hidden}", middle, strategy="blend")}, options.repeats)["blend"]  # type: ignore[misc]
            shutil.rmtree(work / f"chain{hidden}")
            results["scale"].append({"parameters": middle, **seconds})
            console.print(f"{format_size(middle)} in bf16: {seconds['wall']:.2f} s, {middle / seconds['wall'] / 1e6:.0f}M parameters a second")
    write(options.out, results)


if __name__ == "__main__":
    main()
