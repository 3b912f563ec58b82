"""Peak anonymous memory of from_chain against its law: the model, twice its largest tensor and 64 MB over the import baseline.

    python benchmarks/memory.py --chain demo/chain

Every size is loaded in a process of its own. Anonymous memory (RssAnon) is sampled every millisecond from the moment all imports are done;
pages of mapped files do not count, as the system can drop them. Linux only. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from measuring import Peak, write
from rich.console import Console
from rich.table import Table


def measure(chain: str, size: str, dtype: str) -> None:
    """Load one size and print what it took, as JSON."""
    import transformers

    from cbd_hub import CBDModel
    from cbd_hub.interpolation import execute, live

    architecture = json.loads(next((Path(chain) / "anchors").glob("*/config.json")).read_text())["architectures"][0]
    getattr(transformers, architecture)  # the model's module is an import too
    assert execute
    assert live
    with Peak() as peak:
        began = time.perf_counter()
        model = CBDModel.from_chain(chain, size, dtype=dtype)
        seconds = time.perf_counter() - began
    tensors = {id(parameter): parameter.numel() * parameter.element_size() for parameter in model.parameters()}
    print(json.dumps({
        "size": size, "dtype": dtype, "strategy": model.config.cbd["strategy"], "parameters": model.config.cbd["parameters"],
        "seconds": seconds, "peak": peak.bytes, "model": sum(tensors.values()), "largest": max(tensors.values()),
        "limit": sum(tensors.values()) + 2 * max(tensors.values()) + 64_000_000,
    }))


def main() -> None:
    """Measure several sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="demo/chain")
    parser.add_argument("--sizes", default="117M,108M,80M,max,min")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.chain, *options.one)
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        for size in options.sizes.split(","):
            command = [sys.executable, __file__, "--chain", options.chain, "--one", size, dtype]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    table = Table("size", "dtype", "made by", "model MB", "peak MB", "limit MB", "seconds", title="Peak anonymous memory over the import baseline", title_justify="left")
    for row in rows:
        table.add_row(row["size"], row["dtype"], row["strategy"], *(f"{row[name] / 1e6:.0f}" for name in ("model", "peak", "limit")), f"{row['seconds']:.2f}")
    Console(width=120).print(table)
    write(options.out, {"rows": rows})
    over = [row for row in rows if row["peak"] > row["limit"]]
    sys.exit(f"{len(over)} of {len(rows)} are over the limit" if over else 0)


if __name__ == "__main__":
    main()
