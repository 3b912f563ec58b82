"""Sequence-level distillation: the teacher answers the prompts once, and its answers become an ordinary data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, load_dataset

from cbd_hub.distill.rollouts import Prompt, Sampling, generate
from cbd_hub.distill.rows import TEMPLATE_COLUMNS, chat_of, with_answer
from cbd_hub.errors import DataError, StorageError
from cbd_hub.files import write_text
from cbd_hub.weights import weights_sha256


logger = logging.getLogger(__name__)

_BROKEN = "\ufffd"  # what a decoder writes for a part of a character
_SHARD = 256  # prompts of a file, and most that a kill can lose
_MARK = "answers.json"


def teacher_answers(
    teacher: Any, prompts: Sequence[Prompt], folder: Path, sampling: Sampling, *, seed: int = 0, tokenizer: Any = None,
    process: tuple[int, int] = (0, 1), wait: Callable[[], None] = lambda: None,
) -> Dataset:
    """The teacher's answers to prompts, as rows to train on.

    Sequence-level distillation (https://huggingface.co/papers/1606.07947), the loss of CBD's bridge (equation 2,
    https://huggingface.co/papers/2605.07783). The answers are kept as lines of JSON in ``folder``, which ``datasets.load_dataset`` reads: ``input_ids``, ``labels`` on the answer only, and both as text where there
    is a tokenizer. Files that are there are not made again, so that a call that was killed is made again and goes on; the answer to a prompt depends on
    the seed and its place alone.

    Args:
        teacher: A loaded model.
        prompts: What it is to answer.
        folder: Where the answers are kept.
        sampling: How it draws; ``temperature=0`` takes the likeliest token, ``teacher_mix`` is to be 0.
        seed: Another seed, other answers.
        tokenizer: Writes prompts and answers as text too.
        process: Rank and number of the processes that share the work.
        wait: Called before all files are read, for the other processes.

    Returns:
        A row per prompt, in their order.

    Raises:
        DataError: If there is no prompt, or the folder holds the answers of another teacher, to other prompts or drawn otherwise.
        StorageError: If the disk is full or refuses, or a file of another process is not there.
    """
    if not prompts:
        raise DataError("there is no prompt to answer; give rows with a prompt, chat messages or text")
    rank, processes = process
    wanted = _description(teacher, prompts, sampling, seed)
    mark = folder / _MARK
    if mark.is_file():
        if json.loads(mark.read_text()) != wanted:
            raise DataError(f"{folder} holds the answers of another teacher, to other prompts, or drawn otherwise; remove it or choose another folder")
    elif rank == 0:
        write_text(mark, json.dumps(wanted))
    files = [folder / f"answers-{number:05d}.jsonl" for number in range(-(-len(prompts) // _SHARD))]
    for number, path in enumerate(files):
        if number % processes == rank and not path.is_file():
            write_text(path, _lines(teacher, prompts, range(number * _SHARD, min((number + 1) * _SHARD, len(prompts))), sampling, seed, tokenizer))
    wait()
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise StorageError(f"{folder} lacks {missing[0]} after every process has answered; all processes need the same folder")
    features = {"input_ids": List(Value("int64")), "labels": List(Value("int64"))}
    texts = {} if tokenizer is None else {"prompt": Value("string"), "completion": Value("string")}
    return load_dataset("json", data_files=[str(path) for path in files], split="train", features=Features({**features, **texts}))


def _lines(teacher: Any, prompts: Sequence[Prompt], places: range, sampling: Sampling, seed: int, tokenizer: Any) -> str:
    rollouts = generate(teacher, [prompts[place] for place in places], [f"{seed} answer {place}" for place in places], sampling)
    rows: list[dict[str, Any]] = [dict(rollout.row) for rollout in rollouts]
    if tokenizer is not None:
        for row, rollout in zip(rows, rollouts):
            prompt, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (rollout.prompt, [*rollout.prompt, *rollout.response]))
            prompt = prompt.rstrip(_BROKEN)  # half a character, which the response ends
            answer = whole.removeprefix(prompt)  # a decoder may drop the space that a text begins with, and this is none
            if answer == whole and prompt:
                answer = tokenizer.decode(rollout.response, skip_special_tokens=True)
            row["prompt"], row["completion"] = prompt.lstrip(_BROKEN), answer.strip(_BROKEN)
    return "".join(json.dumps(row) + "\n" for row in rows)


def _description(teacher: Any, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> dict[str, Any]:
    """What the answers depend on; the number of prompts answered at once is not part of it."""
    drawn = dataclasses.asdict(sampling)
    del drawn["batch_size"]
    said = hashlib.sha256(json.dumps([dataclasses.astuple(prompt) for prompt in prompts]).encode()).hexdigest()
    return {"teacher": weights_sha256(teacher), "prompts": said, "seed": seed, **drawn, "ends": list(sampling.ends)}


def answered_rows(rows: Sequence[Mapping[str, Any]], answers: Sequence[str], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows whose completions are the teacher's answers, as text; empty ones are left out.

    Args:
        rows: Prompts, chats or texts.
        answers: The teacher's answer to each.
        prompts: What it answered, as text; used where a row is plain text.

    Raises:
        DataError: If every answer is empty.
    """
    made: list[dict[str, Any]] = []
    for row, answer, prompt in zip(rows, answers, prompts, strict=True):
        if not answer.strip():
            continue
        chat = chat_of(with_answer(row))
        if chat is None:
            made.append({"prompt": row.get("prompt", prompt), "completion": answer})
            continue
        messages, _ = chat
        asked = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))  # as the prompt ended
        beside = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
        made.append({**beside, "messages": [*messages[:asked], {"role": "assistant", "content": answer.strip()}]})
    if len(made) < len(rows):
        logger.warning("%d of %d answers of the teacher are empty and are left out", len(rows) - len(made), len(rows))
    if not made:
        raise DataError("every answer of the teacher is empty; raise max_new_tokens, or look at its prompts and its end token")
    return made

