"""The loss head against its floor and its rivals: time and memory of forward + backward of the forward KL.

    python benchmarks/head.py [--quick] [--only 512x49152 ...]

Floor: the four matrix products alone. Dense: full logits, log_softmax, kl_div. Liger 0.8.5 ``LigerFusedLinearJSDLoss(beta=0)`` at its best
chunk size, TRL 1.16 ``ChunkedDivergenceFunction(beta=0)``; a rival that is not installed is left out. Runs alternate, five of each; medians. Peak
memory is anonymous memory above the inputs, in a process of its own, the gradient of the head taken off. Cases in bf16 are left out on a CPU without
instructions for it, where one product takes minutes. Writes benchmarks/results/head.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Peak, in_turns, medians, write
from rich.console import Console
from rich.table import Table

from cbd_hub.losses.head import distillation_loss
from cbd_hub.precision import has_bf16


LIGER_CHUNKS = (128, 256, 1024)
GRID = [  # rows, vocabulary, dtype, share of rows that is masked
    (2048, 49_152, "bfloat16", 0.0), (2048, 49_152, "bfloat16", 0.5), (2048, 49_152, "float32", 0.0), (2048, 49_152, "float32", 0.5), (512, 49_152, "bfloat16", 0.0),
    (512, 49_152, "float32", 0.0), (512, 151_936, "float32", 0.0), (2048, 151_936, "bfloat16", 0.0), (8192, 49_152, "bfloat16", 0.0),
]
Run = Callable[[], torch.Tensor]


def inputs(rows: int, vocab: int, width: int, dtype: torch.dtype, masked: float) -> dict[str, torch.Tensor]:
    """Hidden states and heads of a student and a teacher, and labels of which a share is masked."""
    torch.manual_seed(0)
    labels = torch.randint(0, vocab, (rows,))
    labels[: int(masked * rows)] = -100
    return {
        "hidden": torch.randn(rows, width).to(dtype).requires_grad_(), "head": (0.05 * torch.randn(vocab, width)).to(dtype).requires_grad_(),
        "teacher_hidden": torch.randn(rows, width).to(dtype), "teacher_head": (0.05 * torch.randn(vocab, width)).to(dtype), "labels": labels,
    }


def contenders(data: dict[str, torch.Tensor], only: str = "") -> dict[str, Run]:
    """What is compared: each makes the loss with its graph. With ``only`` the packages of others are not imported, which takes seconds."""
    hidden, head, teacher_hidden, teacher_head, labels = data.values()

    def ours() -> torch.Tensor:
        return distillation_loss(hidden, head, teacher_hidden, teacher_head, labels)

    def dense() -> torch.Tensor:
        keep = labels != -100
        student, teacher = (hidden @ head.t()).float().log_softmax(-1), (teacher_hidden @ teacher_head.t()).float().log_softmax(-1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)[keep].mean()

    found: dict[str, Run] = {"cbd_hub": ours, "dense": dense}
    if find_spec("liger_kernel") and (not only or only.startswith("Liger")):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        def liger(chunk: int) -> Run:
            loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk)

            def run() -> torch.Tensor:
                value: torch.Tensor = loss(hidden, head, teacher_hidden, teacher_head, labels)
                return value
            return run

        found.update({f"Liger {chunk}": liger(chunk) for chunk in LIGER_CHUNKS})
    if find_spec("trl") and only in ("", "TRL"):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl() -> torch.Tensor:
            per_token, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.0)
            keep = labels != -100
            value: torch.Tensor = per_token[keep].mean()
            return value

        found["TRL"] = trl
    return found


def floor(data: dict[str, torch.Tensor]) -> None:
    """The four matrix products that nobody can do without, on the kept rows."""
    keep = data["labels"] != -100
    with torch.no_grad():
        hidden, teacher = data["hidden"][keep], data["teacher_hidden"][keep]
        logits = hidden @ data["head"].t()
        teacher @ data["teacher_head"].t()
        logits @ data["head"]
        logits.t() @ hidden


def step(data: dict[str, torch.Tensor], run: Run) -> Callable[[], None]:
    """Forward and backward."""
    def call() -> None:
        data["hidden"].grad = data["head"].grad = None
        run().backward()
    return call


def peak(name: str, rows: int, vocab: int, width: int, dtype: torch.dtype, masked: float) -> float:
    """Peak MiB of one step above the inputs and the head's gradient."""
    data = inputs(rows, vocab, width, dtype, masked)
    call = step(data, contenders(data, name)[name])
    with Peak() as measured:
        call()
    return (measured.bytes - data["head"].numel() * data["head"].element_size()) / 2**20


def main() -> None:
    """Time and weigh every contender on a grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 rows of the demo's head only, in bf16 where this CPU is quick at it")
    parser.add_argument("--only", action="append", help="cases of these rows x vocabulary; the others stay as the file has them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/head.json"))
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.peak:
        name, rows, vocab, dtype, masked = options.peak
        print(peak(name, int(rows), int(vocab), 576, getattr(torch, dtype), float(masked)))
        return
    cases = [case for case in GRID if case[2] != "bfloat16" or has_bf16("cpu")]
    if options.quick:
        cases = [case for case in cases if case[:2] == (512, 49_152)][:1]

    def place(case: dict[str, Any]) -> int:
        return GRID.index((case["rows"], case["vocab"], case["dtype"], case["masked"]))

    results: list[dict[str, Any]] = json.loads(options.out.read_text())["cases"] if options.only and options.out.is_file() else []
    for rows, vocab, dtype, masked in cases:
        if options.only and f"{rows}x{vocab}" not in options.only:
            continue
        data = inputs(rows, vocab, 576, getattr(torch, dtype), masked)
        calls: dict[str, Callable[[], object]] = {"floor": lambda data=data: floor(data)}  # type: ignore[misc]
        runs = contenders(data)
        calls.update({name: step(data, run) for name, run in runs.items()})
        reference = float(runs["cbd_hub"]().detach())
        if "TRL" in runs:
            assert abs(float(runs["TRL"]().detach()) / reference - 1) < 0.05
        seconds = in_turns(calls, options.repeats)
        middle = medians(seconds)
        memory = {}
        for name in runs:
            command = [sys.executable, __file__, "--peak", name, str(rows), str(vocab), dtype, str(masked)]
            memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        results = [case for case in results if (case["rows"], case["vocab"], case["dtype"], case["masked"]) != (rows, vocab, dtype, masked)]
        results.append({"rows": rows, "vocab": vocab, "dtype": dtype, "masked": masked, "seconds": middle, "all_seconds": seconds, "peak_mib": memory})
        table = Table("", "seconds", "ratio to ours", "peak MiB", title=f"N {rows}, V {vocab:,}, H 576, {dtype}, {masked:.0%} masked", title_justify="left")
        for name, value in middle.items():
            table.add_row(name, f"{value:.2f}", f"{value / middle['cbd_hub']:.2f}", f"{memory[name]:.0f}" if name in memory else "")
        Console(width=100).print(table)
        write(options.out, {"cases": sorted(results, key=place)})


if __name__ == "__main__":
    main()
