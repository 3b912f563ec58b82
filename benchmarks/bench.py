"""Run the benchmarks and write benchmarks/README.md: `make bench`, or `make bench-full`.

    python benchmarks/bench.py [--full] [--only head --only hub] [--again] [--list]

The quick set makes the demo's chain where there is none and measures what takes minutes, some of it at fewer sizes or items than the full set, whose tables it replaces; the full set
also trains rivals, for hours. Each is a command of its own, shown before it runs.
One that has ended well, with the same arguments and the same code, is not run again: stop at any time and go on with the same command (``--again`` forgets that).
One that fails is named with its last lines, and the others go on. Rivals are left out where their package is not installed (extra ``bench``: TRL, Liger and Model-Optimizer; mergekit in an environment
of its own, named by ``--mergekit-python``), as are formats of ``deploy`` (extras ``gguf``, ``onnx`` and ``quantised``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cbd_hub.files import write_text


ROOT = Path(__file__).parent.parent
WORK = Path("bench")


@dataclass(frozen=True)
class Benchmark:
    """One command.

    Attributes:
        script: The script, from the repository's folder.
        arguments: What it is given in both sets.
        quick: Further arguments of the quick set; None where it is in the full set alone.
        full: Further arguments of the full set.
        environment: Variables that it needs.
    """

    script: str
    arguments: str = ""
    quick: str | None = ""
    full: str = ""
    environment: str = ""

    def command(self, full: bool, mergekit: str | None) -> list[str]:
        """The command line."""
        rest = shlex.split(f"{self.arguments} {self.full if full else self.quick}")
        if self.script.endswith("loading.py") and mergekit:
            rest += ["--mergekit-python", mergekit]
        return [sys.executable, self.script, *rest]

    def shown(self, command: list[str]) -> str:
        """The command line as one would type it."""
        return f"{self.environment} python {shlex.join(command[1:])}".strip()


BENCHMARKS = {
    "demo": Benchmark("examples/demo.py", "--out demo"),
    "inputs": Benchmark("benchmarks/inputs.py", "--out bench/inputs", full="--models"),
    "hub": Benchmark("benchmarks/hub.py"),
    "memory": Benchmark("benchmarks/memory.py", "--chain demo/chain"),
    "loading": Benchmark("benchmarks/loading.py", "--chain demo/chain", quick="--hidden 640 --command-repeats 5", full="--hidden 640,832,1088,1344,2816 --command-repeats 5"),
    "head": Benchmark("benchmarks/head.py", quick="--quick"),
    "step": Benchmark("benchmarks/step.py", "--teacher demo/chain/anchors/135M --student demo/chain/anchors/99M", quick="--repeats 5"),
    "alpha": Benchmark("benchmarks/alpha.py", "--demo demo", quick=None),
    "teacher_cache": Benchmark("benchmarks/teacher_cache.py", "--chain demo/chain --text demo/wikipedia.jsonl", quick="--tokens 1024 --errors"),
    "speed": Benchmark("benchmarks/after/speed.py", "--random --real demo/chain/anchors/135M", quick=None, environment="OMP_NUM_THREADS=1"),
    "draft": Benchmark("benchmarks/after/draft.py", "--chain demo/chain --text demo/wikipedia.jsonl", quick=None, full="--count 4"),
    "tasks": Benchmark("benchmarks/tasks.py", "--chain demo/chain", quick="--tasks arc_easy,winogrande --limit 50", full="--limit 500"),
    "deploy": Benchmark("benchmarks/after/deploy.py", "--chain demo/chain", quick=None),
    "paper": Benchmark("examples/paper/small.py", "--step all --out bench/paper --record benchmarks/results/paper.json", quick=None),
    "bridge, losses": Benchmark("benchmarks/bridge.py", "--models bench/inputs/models --train bench/inputs/train.jsonl --heldout bench/inputs/heldout.jsonl --work bench/bridge", quick=None, full="--only loss --only align"),
    "align": Benchmark("benchmarks/align.py", "--text demo/wikipedia.jsonl", quick=None),
    "cut": Benchmark("benchmarks/cut.py", "--chain demo/chain --model bench/inputs/models/gemma3-270m", quick=None),
    "boomerang": Benchmark("benchmarks/boomerang.py", "--chain demo/chain", quick=None),
    "anchors": Benchmark("benchmarks/anchors.py", "--chain demo/chain", quick=None),
    "adapter": Benchmark("benchmarks/after/adapter.py", "--chain demo/chain --text bench/inputs/other.jsonl --work bench/adapter", quick=None),
    "heal": Benchmark("benchmarks/after/heal.py", "--chain demo/chain --work bench/heal", quick=None),
    "bridge": Benchmark("benchmarks/bridge.py", "--models bench/inputs/models --train bench/inputs/train.jsonl --heldout bench/inputs/heldout.jsonl --work bench/bridge", quick=None, full="--only gemma --only move --only gpt2"),
    "headline": Benchmark("benchmarks/headline.py", "--teacher demo/chain/anchors/135M --text demo/wikipedia.jsonl --tasks arc_easy,sciq --work bench/headline", quick=None),
    "quality_rivals": Benchmark("benchmarks/quality/run.py", "--demo demo --work bench/quality_rivals --steps 20 --share 0.5 --heldout-tokens 8000 --out benchmarks/results/quality_rivals.json", quick=None),
    "quality": Benchmark("benchmarks/quality/run.py", "--demo demo --work bench/quality --free", quick=None),
    "quality_trained": Benchmark("benchmarks/quality/run.py", "--demo demo --work bench/quality --share 0.5 --out benchmarks/results/quality_trained.json", quick=None, full="--seeds 3"),
    "quality_today": Benchmark("benchmarks/quality/run.py", "--demo demo --work bench/quality --share 0.5 --only \"least loss\" --only ffn --out benchmarks/results/quality_today.json", quick=None),
    "quality_scratch": Benchmark("benchmarks/quality/run.py", "--demo demo --work bench/quality --only \"least loss\" --scratch 10", quick=None),
}


def fingerprint(command: list[str]) -> str:
    """What a run depends on: its arguments, and the code of the package and of the benchmarks."""
    digest = hashlib.sha256(json.dumps(command[1:]).encode())
    for folder in ("cbd_hub", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def run(name: str, benchmark: Benchmark, command: list[str]) -> str | None:
    """Run one; what went wrong in its last lines, or None."""
    settings = dict(part.split("=") for part in benchmark.environment.split())
    print(f"\n== {name}: {benchmark.shown(command)}", flush=True)
    log = WORK / "logs" / f"{name.replace(', ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(line for line in lines[-12:] if "\r" not in line), f"\n{time.monotonic() - began:.0f} s", flush=True)
    return None if status == 0 else f"{name} ended with {status}: {' '.join(lines[-1:])} (all of it in {log})"


def main() -> None:
    """Run what has not been run, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also what trains rivals, for hours")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="these alone")
    parser.add_argument("--again", action="store_true", help="run also what is done")
    parser.add_argument("--list", action="store_true", help="show the commands and what is done")
    parser.add_argument("--mergekit-python", help="the Python of an environment with mergekit 0.1.5")
    options = parser.parse_args()
    os.chdir(ROOT)
    record = WORK / "done.json"
    done: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
    wrong = []
    for name, benchmark in BENCHMARKS.items():
        if (options.only and name not in options.only) or not (options.full or benchmark.quick is not None or options.only):
            continue
        command = benchmark.command(options.full or benchmark.quick is None, options.mergekit_python)
        mark = fingerprint(command)
        if options.list:
            print(f"{'done' if done.get(name) == mark else '    '} {name}: {benchmark.shown(command)}")
            continue
        if done.get(name) == mark and not options.again:
            continue
        error = run(name, benchmark, command)
        if error is None:
            done[name] = mark
            write_text(record, json.dumps(done, indent=1))
        else:
            wrong.append(error)
    if not options.list:
        subprocess.run([sys.executable, "benchmarks/render.py"], check=True)
        print("\n".join(["", "benchmarks/README.md is written", *wrong]))
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
