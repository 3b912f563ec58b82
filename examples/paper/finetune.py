"""A model fine-tuned on prompts with completions: the paper's SFT (3 epochs) and its protocol on every task (10 epochs, batch 8 or 16, learning rate 1e-5, the last epoch).

    python examples/paper/finetune.py --model openai-community/gpt2-xl --data dolly.jsonl --epochs 3 --batch 2 --out sft/gpt2-xl
    python examples/paper/finetune.py --model models/220M --data tasks/boolq.train.jsonl --score tasks/boolq.test.jsonl --out tuned/220M

Rows have ``prompt`` and ``completion``; only the completion and the end-of-text token after it count, and only their beginning is cut where a row is too long. ``--score``
answers the prompts of another file greedily and prints the mean Rouge-L of the answers, the paper's metric (`pip install rouge-score`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed


Rows = list[dict[str, Any]]


def read(path: str, limit: int | None) -> Rows:
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[:limit]]


def tokenise(rows: Rows, tokenizer: Any, length: int) -> Rows:
    """Token ids, and labels that are -100 on the prompt; the prompt's beginning is left out where a row is longer than ``length``."""
    made = []
    for row in rows:
        start = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["prompt"] + row["completion"])["input_ids"][len(start) :], tokenizer.eos_token_id][:length]
        start = start[max(0, len(start) + len(answer) - length) :]
        made.append({"input_ids": start + answer, "labels": [-100] * len(start) + answer})
    return made


def rouge(model: Any, tokenizer: Any, rows: Rows, new_tokens: int, room: int) -> float:
    """Mean Rouge-L, 0 to 100, of greedy answers to the prompts."""
    from rouge_score.rouge_scorer import RougeScorer
    scorer, found = RougeScorer(["rougeL"]), []
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"][-(room - new_tokens) :]], device=model.device)
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found.append(scorer.score(row["completion"], tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))["rougeL"].fmeasure)
    return 100 * sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help=".jsonl of prompt and completion")
    parser.add_argument("--out", required=True, help="folder for the model")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--length", type=int, default=512, help="most tokens of a row")
    parser.add_argument("--limit", type=int, help="rows to read of each file")
    parser.add_argument("--score", help=".jsonl whose prompts are answered after training")
    parser.add_argument("--new-tokens", type=int, default=128, help="most tokens of an answer that is scored")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    length = min(options.length, getattr(model.config, "max_position_embeddings", None) or options.length)
    trainer = Trainer(
        model=model, train_dataset=tokenise(read(options.data, options.limit), tokenizer, length), processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        args=TrainingArguments(
            options.out, num_train_epochs=options.epochs, per_device_train_batch_size=options.batch, learning_rate=options.learning_rate, seed=options.seed,
            save_strategy="no", logging_steps=10, report_to="none", use_cpu=not torch.accelerator.is_available(),
        ),
    )
    trainer.train()
    trainer.save_model()
    if options.score:
        rows = read(options.score, options.limit)
        print(f"Rouge-L {rouge(model.eval(), tokenizer, rows, options.new_tokens, length):.2f} on {len(rows)} prompts")
    print(f"an ordinary {type(model).__name__} in {options.out}")


if __name__ == "__main__":
    main()
