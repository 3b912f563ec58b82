"""A size converted to other formats by the scripts of examples/, and how far each is from transformers in fp32.

    python benchmarks/after/deploy.py --chain demo/chain

Runs examples/10_gguf.py, 11_onnx.py and 12_quantised.py once a format, each in a process of its own, and keeps what it prints: bytes of weights, the largest difference of logits (of
log-probabilities for GGUF) and the mean KL. Needs `pip install '.[gguf,onnx,quantised]' bitsandbytes`; a format whose packages are not installed is left out and named. A format further off
than its script's bound is marked. Writes benchmarks/results/deploy.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import write

from cbd_hub import CBDModel


EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@dataclass(frozen=True)
class Format:
    """A conversion.

    Attributes:
        script: Which example does it.
        words: Its arguments, but for chain and size.
        needs: The module that has to be there.
    """

    script: str
    words: str
    needs: str


FORMATS = {
    "GGUF f32": Format("10_gguf.py", "--type f32 --out model.gguf", "xllamacpp"),
    "GGUF f16": Format("10_gguf.py", "--type f16 --out model.gguf", "xllamacpp"),
    "GGUF q8_0": Format("10_gguf.py", "--type q8_0 --out model.gguf", "xllamacpp"),
    "ONNX, fp32": Format("11_onnx.py", "--out onnx", "onnxruntime"),
    "int8 (torchao)": Format("12_quantised.py", "--by int8 --out quantised", "torchao"),
    "int8-bnb (bitsandbytes)": Format("12_quantised.py", "--by int8-bnb --out quantised", "bitsandbytes"),
    "nf4 (bitsandbytes)": Format("12_quantised.py", "--by nf4 --out quantised", "bitsandbytes"),
}


def number(pattern: str, printed: str) -> float | None:
    """The number that stands at the place of ``{}``."""
    found = re.search(pattern.replace("{}", r"(-?[\d.]+(?:e[+-]?\d+)?)"), printed)
    return float(found[1]) if found else None


def convert(name: str, chain: Path, size: str) -> dict[str, Any]:
    """What a format's script prints of one size, or the last line of what went wrong."""
    one = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLES / one.script), "--chain", str(chain.resolve()), "--size", size, *one.words.split()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    difference = number(r"largest difference of [a-z-]+(?: to transformers)?: {}", done.stdout)
    if difference is None:
        return {"format": name, "error": (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]}
    return {
        "format": name, "megabytes": number("{} MB", done.stdout), "difference": difference,
        "kl": number("mean KL {}", done.stdout), "within_bound": done.returncode == 0,
    }


def main() -> None:
    """Convert to each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--size", default="117M")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deploy.json"))
    options = parser.parse_args()
    rows = []
    for name, one in FORMATS.items():
        if importlib.util.find_spec(one.needs) is None:
            print(f"{name}: left out, {one.needs} is not installed")
            continue
        rows.append(convert(name, options.chain, options.size))
        print(rows[-1], flush=True)
    write(options.out, {
        "size": options.size, "parameters": CBDModel.plan(options.chain, options.size).parameters, "rows": rows,
    })


if __name__ == "__main__":
    main()
