"""Two small models trained apart on real text: the loss between them, averaged as they are and aligned first.

    python benchmarks/align.py --text wikipedia.jsonl

Byte-level Llama models, each from its own seed and order of the text: two of one shape, and a third one that is wider. The barrier is the loss half
way (alpha 0.5) minus the mean of the ends' losses, on held-out text. Then the same once the smaller model of a pair has learned from the larger one
for --distil steps, as in a chain of published anchors. Trained models are kept in --models and used again. Writes benchmarks/results/align.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from measuring import write
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.interpolation.align import STEPS, Alignment, fit, segment_with
from cbd_hub.interpolation.fitting import Residual
from cbd_hub.interpolation.live import Between, ModelRunner, Runner
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.plan import Kept
from cbd_hub.interpolation.refine import middle
from cbd_hub.shapes import shape_of


BLOCK, BATCH = 128, 16
WIDTHS = {"first": (128, 1), "second": (128, 2), "wider": (192, 3)}  # hidden width and seed


def read_bytes(path: Path) -> torch.Tensor:
    """The text of a .jsonl file as bytes, one document after the other."""
    texts = (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    return torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()


def trained(name: str, folder: Path, data: torch.Tensor, steps: int, tied: bool) -> Any:
    """A model trained from its seed, or read where it has been trained before."""
    hidden, seed = WIDTHS[name]
    place = folder / f"{name}-{steps}{'-tied' if tied else ''}"
    if (place / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    transformers.set_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=8 * hidden // 3 // 8 * 8, num_hidden_layers=4, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64, head_dim=32, max_position_embeddings=BLOCK, tie_word_embeddings=tied,
    ))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began = time.perf_counter()
    for step in range(steps):
        rate = 3e-3 * min(1.0, (step + 1) / 40) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(data) - BLOCK, (BATCH,))
        ids = torch.stack([data[start : start + BLOCK] for start in starts.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"{name} step {step}: {loss.item():.3f} ({time.perf_counter() - began:.0f} s)", flush=True)
    model.eval().save_pretrained(place)
    return model


def distilled(student: Any, teacher: Any, data: torch.Tensor, steps: int) -> Any:
    """The student after so many steps from the teacher, by cross-entropy and forward KL alike, as recipes have it."""
    starts = torch.randint(len(data) - BLOCK, (steps * BATCH,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": data[start : start + BLOCK].tolist()} for start in starts]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ChainDistillerConfig(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, ce_weight=1.0, block_size=BLOCK, save_strategy="no", report_to="none", disable_tqdm=True,
        )
        trainer = ChainDistiller(model=copy.deepcopy(student).requires_grad_(True), teacher=teacher, args=arguments, train_dataset=rows)
        trainer.train()
    return trainer.model.eval()


@torch.no_grad()
def loss_of(runner: Runner, held: torch.Tensor) -> float:
    """Cross-entropy on held-out text, in nats per byte."""
    total = [F.cross_entropy((out.hidden @ out.head.weight.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() for ids in held.split(32) for out in [runner(ids)]]
    return sum(total) / len(total)


def compare(small: Any, large: Any, calibration: list[torch.Tensor], held: torch.Tensor, steps: int, *, default: bool = False) -> dict[str, Any]:
    """Loss half way between two models by each way of finding common coordinates, or by the default alone, and the share of the barrier that is gone."""
    models, shapes = {"small": small, "large": large}, (shape_of(small.config), shape_of(large.config))
    ways: dict[str, Alignment] = {"as they are": Alignment(Kept.even(*shapes), Maps(), "permutation", 0.0)}
    kinds: list[Residual] = ["rotation"] if default else ["permutation", "rotation"]
    for residual in kinds:
        if not default:
            ways[f"{residual}, weights"] = fit(small, large, residual=residual)
            ways[f"{residual}, weights and activations"] = fit(small, large, calibration, residual=residual, steps=0)
        ways[f"{residual}, and {steps} gradient steps at most"] = fit(small, large, calibration, residual=residual, steps=steps)
    ends = [loss_of(ModelRunner(model), held) for model in (small, large)]
    losses = {name: loss_of(Between(models).run(middle(segment_with(way, small, large), 0.5)), held) for name, way in ways.items()}
    barriers = {name: loss - sum(ends) / 2 for name, loss in losses.items()}
    gone = {name: 1 - barrier / barriers["as they are"] for name, barrier in barriers.items()}
    return {"ends": ends, "losses": losses, "barriers": barriers, "gone": gone, "error": {name: way.error for name, way in ways.items()}}


def main() -> None:
    """Train, align, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("benchmarks/models"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--distil", type=int, default=100)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--calibration", type=int, default=1024, help="blocks of text on which coordinates are fitted")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/align.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = read_bytes(options.text)
    cut = int(0.95 * len(data))
    models = {name: trained(name, options.models, data[:cut], options.steps, options.tied) for name in WIDTHS}
    calibration = list(data[: options.calibration * BLOCK].view(-1, BLOCK))
    held = data[cut : cut + 128 * BLOCK].view(-1, BLOCK)
    results = {}
    for name, small, large in (("equal width", "second", "first"), ("unequal width", "first", "wider")):
        results[name] = compare(models[small], models[large], calibration, held, STEPS)
        student = distilled(models[small], models[large], data[:cut], options.distil)
        results[f"{name}, distilled"] = compare(student, models[large], calibration, held, STEPS, default=True)
    for name, found in results.items():
        table = Table("coordinates", "loss half way", "barrier", "gone", title=f"{name}: ends {found['ends'][0]:.3f} and {found['ends'][1]:.3f}", title_justify="left")
        for way, loss in found["losses"].items():
            table.add_row(way, f"{loss:.3f}", f"{found['barriers'][way]:.3f}", f"{found['gone'][way]:.0%}")
        Console(width=110).print(table)
    write(options.out, {
        "tokens": held.numel(), "steps": options.steps, "distil": options.distil,
        "widths": [128, 192], "calibration": options.calibration * BLOCK, "tied": options.tied, **results,
    })


if __name__ == "__main__":
    main()
