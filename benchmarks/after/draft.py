"""How much faster the largest size of a chain answers when a smaller one drafts for it.

    python benchmarks/after/draft.py --chain demo/chain --text wikipedia.jsonl

A chain that goes further down than the demo's is that of demo/recipe.yaml with an anchor more (``anchors: [99M, 64M, 45M]``, 60 steps for the last: half an hour on
two slow cores); ``--about`` says so in the table. `cbd_hub.draft_table` on the first words of documents: greedy, the same output (checked), in turns without and with each draft. Writes benchmarks/results/draft.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cbd_hub import Chain, draft_table
from cbd_hub.precision import best_device
from cbd_hub.sizes import format_size
from cbd_hub.speed.stopwatch import device_name
from cbd_hub.texts import read_texts


sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import write


def main() -> None:
    """Measure the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--target", default="max")
    parser.add_argument("--sizes", help="draft sizes, with commas; the usual ones by default")
    parser.add_argument("--text", help="documents to go on from; short prompts by default")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--about", help="what the chain is, where it is not the demo's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft.json"))
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    chain = Chain.from_pretrained(options.chain)
    found = draft_table(
        chain, options.target, options.sizes and options.sizes.split(","), None if options.text is None else read_texts(options.text)[-options.count :],
        max_new_tokens=options.max_new_tokens, prompt_tokens=options.prompt_tokens, num_assistant_tokens=options.draft_tokens, rounds=options.rounds, dtype=options.dtype,
    )
    load.append(os.getloadavg()[0])
    table = Table("draft", "accepted", "alone", "with it", "speed-up", "ties", title=f"drafts for {format_size(found.target)}", title_justify="left")
    for row in found.rows:
        table.add_row(format_size(row.parameters), f"{row.acceptance:.0%}", f"{row.alone:.2f}", f"{row.together:.2f}", f"{row.speedup:.2f}x", str(row.ties))
    Console(width=120).print(table)
    write(options.out, {
        "about": options.about, **found.summary(), "where": device_name(best_device()), "threads": torch.get_num_threads(),
        "dtype": options.dtype, "rounds": options.rounds, "load": load,
    })


if __name__ == "__main__":
    main()
