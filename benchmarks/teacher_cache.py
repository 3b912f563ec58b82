"""A step from a teacher cache against a step with the live teacher, and what the cache costs in bytes and in nats.

    python benchmarks/teacher_cache.py --chain demo/chain --text wikipedia.jsonl [--errors]

Teacher and student are the chain's first two anchors; blocks of 128 tokens, 8 a step, bf16 autocast, the student and AdamW in fp32. Steps take turns,
medians of 21 after one round that does not count; decoding the cache's rows is part of its step. Bytes and errors are those that ``cbd cache-teacher``
prints, at k 128 and 50, with draws from the tail and with its sum alone; the error is that of the forward KL to the student. Writes
benchmarks/results/teacher_cache.json; with ``--errors`` the times of an earlier run stay in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import in_turns, medians, whence, write
from rich.console import Console
from rich.table import Table
from step import stepper_of_batches

from cbd_hub import Chain, ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.data import read_rows
from cbd_hub.distill.packing import packed_dataset
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.precision import has_bf16
from cbd_hub.weights import load_model


TOP = (128, 50)


def trainer_of(student: Any, folder: str, **source: Any) -> Callable[[], None]:
    """Steps of a trainer on the first blocks of its data, one after the other."""
    args = ChainDistillerConfig(folder, max_steps=1, bf16=True, disable_tqdm=True, save_strategy="no")
    trainer = ChainDistiller(model=student, args=args, **source)
    step = stepper_of_batches(trainer)
    place = 0

    def call() -> None:
        nonlocal place
        rows = [trainer.train_dataset[(place + index) % len(trainer.train_dataset)] for index in range(8)]
        place += 8
        step(trainer.data_collator(rows))
    return call


def main() -> None:
    """Write the caches, then time both kinds of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--errors", action="store_true", help="bytes and errors alone, no times")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/teacher_cache.json"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    chain = Chain.from_pretrained(options.chain)
    folders = [Path(options.chain) / "anchors" / anchor.name for anchor in chain.anchors[:2]]
    teacher, student = (load_model(folder, torch.float32) for folder in folders)
    tokenizer = chain.tokenizer()
    blocks = packed_dataset(read_rows(options.text), tokenizer, 128).select(range(options.tokens // 128))
    figures: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        compute = torch.bfloat16 if has_bf16("cpu") else torch.float32
        for k, draws in itertools.product(TOP, (None, 0)):
            cache = write_cache(
                teacher, blocks, Path(folder) / f"k{k}, {draws}", tokenizer=tokenizer, top_k=k, tail_draws=draws, dtype=compute, student=student,
            )
            figures[f"{k}, {cache.tail.draws}"] = {"top_k": k, "draws": cache.tail.draws, **cache.record.figures.model_dump()}
        if not options.errors:
            cached = TeacherCache.open(Path(folder) / f"k{TOP[0]}, None")
            seconds = in_turns({
                "live teacher": trainer_of(student, folder, teacher=teacher, train_dataset=blocks, processing_class=tokenizer),
                "cache, k 128": trainer_of(load_model(folders[1], torch.float32), folder, teacher_cache=cached, processing_class=tokenizer),
            }, options.repeats)
    table = Table("k", "draws", "bytes a token", "KL of rounding", "tail mass", "KL to the student", "from the cache", "error", title_justify="left")
    for one in figures.values():
        table.add_row(*map(str, (one["top_k"], one["draws"])), *(f"{one[name]:.3g}" for name in ("bytes_per_token", "rounding_kl", "tail_mass")), *(
            f"{value:+.4f}" for value in (one["student"]["full"], one["student"]["kept"], one["student"]["kept"] - one["student"]["full"])
        ))
    Console(width=120).print(table)
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if seconds:
        kept.update(seconds=medians(seconds), all_seconds=seconds)
    write(options.out, {
        **kept, **whence(), "threads": 2,
        "tokens": cache.record.source.packing.predicted, "student": f"the chain's {chain.anchors[1].name}, trained", "dtype": str(compute).removeprefix("torch."), "figures": figures,
    })


if __name__ == "__main__":
    main()
