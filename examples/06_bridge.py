"""A student learns from a teacher of another architecture and vocabulary.

    python examples/06_bridge.py --teacher Qwen/Qwen3-0.6B --student HuggingFaceTB/SmolLM2-135M --text "text/*.txt" --out ./student
    python examples/06_bridge.py --smoke

`span` compares the likelihoods of spans that are whole tokens for both, `vocab` the distributions on tokens that both have, `text` trains on the teacher's
answers, `hidden` compares states where both have read the same bytes. In a recipe, a stage's `bridge:` does the same inside a chain.
"""

from __future__ import annotations

import argparse
from typing import Any

import smoke
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub import ChainDistiller, ChainDistillerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="Qwen/Qwen3-0.6B", help="Hub id or folder")
    parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument("--bridge", default="span+vocab", choices=["text", "span", "vocab", "span+vocab", "hidden"])
    parser.add_argument("--text", default="text/*.txt", help="files of text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="./student", help="folder for the student")
    parser.add_argument("--smoke", action="store_true", help="tiny models, seconds")
    options = parser.parse_args()
    training: dict[str, Any] = {"max_steps": options.steps, "per_device_train_batch_size": 8, "learning_rate": 1e-4, "block_size": 256, "bf16": True}
    if options.smoke:
        options.teacher, options.student, options.out = smoke.stranger(), smoke.model(), str(smoke.folder())
        dataset, training = Dataset.from_dict({"text": smoke.texts()}), {**smoke.TRAINING, "logging_steps": 1}
    else:
        dataset = load_dataset("text", data_files=options.text, sample_by="paragraph", split="train")

    trainer = ChainDistiller(
        model=AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        teacher=AutoModelForCausalLM.from_pretrained(options.teacher),
        processing_class=AutoTokenizer.from_pretrained(options.student),
        teacher_processing_class=AutoTokenizer.from_pretrained(options.teacher),
        train_dataset=dataset,
        args=ChainDistillerConfig(options.out, bridge=options.bridge, save_strategy="no", **training),
    )
    trainer.train()
    trainer.save_model()
    print(f"an ordinary {type(trainer.model).__name__} in {options.out}")


if __name__ == "__main__":
    main()
