"""A size in between healed: a short distillation from its larger neighbour, whole or by LoRA.

    python examples/04_heal.py --chain ./chain --size 117M --text "text/*.txt" --tokens 100000 --out ./healed
    python examples/04_heal.py --smoke

The weights with the least loss on a held-out part of the text come back, be it those of the start. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from typing import Any

import smoke
from datasets import Dataset, load_dataset
from peft import LoraConfig

from cbd_hub import CBDModel, heal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--size", default="117M", help="parameters wanted, between two anchors")
    parser.add_argument("--text", default="text/*.txt", help="files of text, documents apart by blank lines")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to learn from")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train a LoRA of this rank and merge it")
    parser.add_argument("--out", default="./healed", help="folder for the model")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain, seconds")
    options = parser.parse_args()
    training: dict[str, Any] = {}
    if options.smoke:
        options.chain, options.size, options.out, options.tokens = smoke.chain(), smoke.SIZE, str(smoke.folder() / "healed"), None
        dataset, training = Dataset.from_dict({"text": smoke.texts()}), {**smoke.TRAINING, "eval_steps": 2, "heldout": 0.1}
    else:
        dataset = load_dataset("text", data_files=options.text, sample_by="paragraph", split="train")
    lora = LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear", task_type="CAUSAL_LM") if options.lora else None

    model = CBDModel.from_chain(options.chain, size=options.size)
    model = heal(model, options.chain, dataset, tokens=options.tokens, output_dir=options.out, peft_config=lora, progress=print, **training)

    for name, value in model.config.cbd["healed"].items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
