"""What a recipe may train on: chats, prompts with completions, streams, and a stage's own data."""

import json
from pathlib import Path

import pytest
import tiny
from conftest import recipe as make_recipe
from datasets import Dataset
from safetensors.torch import load_file

from cbd_hub import CBDModel, distill_chain
from cbd_hub.configs import read_config
from cbd_hub.distill.checks import check_stages
from cbd_hub.distill.data import open_stream, read_rows
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import plan_stages, read_parts, stage_rows, stage_tokenizers
from cbd_hub.errors import DataError, RecipeError


SHAPE = {"layers": 2, "ffn": 24}


def chats(path: Path, count=120):
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]} for text in tiny.texts(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(path: Path, count=120):
    path.write_text("".join(json.dumps({"prompt": text[:20], "completion": text[20:60]}) + "\n" for text in tiny.texts(count)))
    return str(path)


def weights(folder):
    return [load_file(path) for path in sorted(folder.glob("anchors/*/model.safetensors"))]


@pytest.mark.parametrize("kind", [chats, prompts])
@pytest.mark.parametrize("stage", [{}, {"objective": "minillm", "rollout_batch": 8, "inner_epochs": 2, "max_new_tokens": 8}])
def test_conversations_train_calibrate_and_are_split(tmp_path, kind, stage):
    plain = make_recipe(tmp_path, "llama", [SHAPE], stage=stage)
    plain["data"] = {"path": kind(tmp_path / "rows.jsonl"), "block_size": 96, "heldout": 0.1, "calibration": 0.2}
    parts = read_parts(Recipe.parse(plain))
    assert (len(parts.heldout), len(parts.calibration), len(parts.train)) == (12, 24, 84)
    assert not {json.dumps(row) for row in parts.train} & {json.dumps(row) for row in (*parts.heldout, *parts.calibration)}
    chain = distill_chain(plain, tmp_path / "chain")
    assert chain.anchors[1].training.tokens > 0
    assert CBDModel.from_chain(tmp_path / "chain", "max") is not None


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "json"])
def test_files_of_every_format_may_hold_prompts_and_a_text_column_goes_first(tmp_path, suffix):
    pairs = Dataset.from_list([{"prompt": text[:20], "completion": text[20:60]} for text in tiny.texts(10)])
    both = pairs.add_column("text", tiny.texts(10))
    write = {"parquet": Dataset.to_parquet, "csv": Dataset.to_csv, "jsonl": Dataset.to_json, "json": Dataset.to_json}[suffix]
    for name, dataset in (("pairs", pairs), ("both", both)):
        write(dataset, tmp_path / f"{name}.{suffix}")
    assert read_rows(str(tmp_path / f"pairs.{suffix}")) == list(pairs) == list(open_stream(str(tmp_path / f"pairs.{suffix}"), None, "train", "text"))
    assert read_rows(str(tmp_path / f"both.{suffix}")) == [{"text": text} for text in tiny.texts(10)] == list(open_stream(str(tmp_path / f"both.{suffix}"), None, "train", "text"))


def test_a_stage_has_its_own_data_and_loss(tmp_path):
    """Two anchors, the second on other text with another divergence; a stage of a shape is named by it."""
    plain = make_recipe(tmp_path, "llama", [{"layers": 3, "ffn": 24}, SHAPE])
    (tmp_path / "other.txt").write_text("\n\n".join(tiny.texts(100, seed=7)))
    own = {"path": str(tmp_path / "other.txt"), "heldout": 0.1, "calibration": 0.1, "block_size": 16}
    base = distill_chain(plain, tmp_path / "base")
    stages = {"layers=2,ffn=24": {"data": own, "divergence": "reverse_kl", "max_steps": 3}}
    made = distill_chain({**plain, "stages": stages}, tmp_path / "own")
    assert [anchor.training.tokens for anchor in base.anchors[1:]] == [4 * 4 * 32] * 2
    assert [anchor.training.tokens for anchor in made.anchors[1:]] == [4 * 4 * 32, 3 * 4 * 16]
    first, second = weights(tmp_path / "base"), weights(tmp_path / "own")
    same = [all((one[key] == two[key]).all() for key in one) for one, two in zip(first, second)]
    assert sorted(same) == [False, True, True]


def test_minillms_side_text_has_its_own_data(tmp_path):
    plain = make_recipe(tmp_path, "llama", [SHAPE], stage={"objective": "minillm", "rollout_batch": 8, "inner_epochs": 1, "max_new_tokens": 8, "text_weight": 1.0})
    plain["text_data"] = {"path": plain["data"]["path"], "block_size": 32, "heldout": 0.1, "calibration": 0.1}
    plain["data"] = {"path": prompts(tmp_path / "rows.jsonl"), "block_size": 96, "heldout": 0.1, "calibration": 0.2}
    assert distill_chain(plain, tmp_path / "chain").anchors[1].training.loss is not None


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_streams_train_and_set_documents_aside(tmp_path, kind):
    plain = make_recipe(tmp_path, "llama", [SHAPE])
    if kind == "jsonl":
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in tiny.texts(200)))
        plain["data"] = {**plain["data"], "path": str(path), "column": "body"}
    plain["data"] = {**plain["data"], "streaming": True, "reserve": 40}
    parts = read_parts(Recipe.parse(plain))
    texts = tiny.texts(200)
    assert set(parts.heldout) | set(parts.calibration) == set(texts[:40])
    assert (len(parts.heldout), len(parts.calibration)) == (13, 27)
    assert [row["text"] for row in parts.train] == texts[40:]
    distill_chain(plain, tmp_path / "a")
    distill_chain(plain, tmp_path / "b")
    assert all((one[key] == two[key]).all() for one, two in zip(weights(tmp_path / "a"), weights(tmp_path / "b")) for key in one)


def test_a_stream_reads_what_files_read(tmp_path):
    """Rows without text are left out of both, and so is a byte order mark."""
    mark, texts = b"\xef\xbb\xbf", ["one", None, "  ", "two"]
    (tmp_path / "a.jsonl").write_bytes(mark + b"".join(json.dumps({"body": text}).encode() + b"\n" for text in texts))
    (tmp_path / "a.txt").write_bytes(mark + b"one\n\n  \n\ntwo\n")
    for name in ("a.jsonl", "a.txt"):
        path, column = str(tmp_path / name), "body" if name == "a.jsonl" else "text"
        assert list(open_stream(path, None, "train", column)) == read_rows(path, column) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(("kind", "good", "bad", "said"), [
    ("jsonl", b'{"text": "one"}\n{"text": "two"}\n', b'{"text": "three"}\n{"text": ', "cannot be read behind its first 2 rows"), ("csv", b"text\none\ntwo\n", b'text\n"three', "cannot be read behind its first 2 rows"),
    ("txt", b"one\n\ntwo\n", b"three\xff", "is not UTF-8 text"),
])
def test_a_stream_that_cannot_be_read_is_named(tmp_path, kind, good, bad, said):
    """From its first rows on, and where it has been read for a while."""
    (tmp_path / f"a.{kind}").write_bytes(good)
    (tmp_path / f"b.{kind}").write_bytes(bad)
    with pytest.raises(DataError, match=rf"\*.{kind} {said}"):
        list(open_stream(str(tmp_path / f"*.{kind}"), None, "train", "text"))
    with pytest.raises(DataError, match=rf"b.{kind} (is not|cannot be read)"):
        list(open_stream(str(tmp_path / f"b.{kind}"), None, "train", "text"))


def test_wrong_data_of_a_stage_is_said_before_work(tmp_path):
    plain = make_recipe(tmp_path, "llama", [SHAPE])
    with pytest.raises(RecipeError, match=r"stages.layers=2,ffn=24.data.colum: Extra"):
        Recipe.parse({**plain, "stages": {"layers=2,ffn=24": {"data": {"path": "x", "colum": "y"}}}})
    with pytest.raises(RecipeError, match="its anchors are layers=2,ffn=24"):
        Recipe.parse({**plain, "stages": {"99M": {}}})
    with pytest.raises(DataError, match="no file matches"):
        distill_chain({**plain, "stages": {"layers=2,ffn=24": {"data": {"path": str(tmp_path / "none*.txt")}}}}, tmp_path / "chain")
    assert not (tmp_path / "chain").exists()
    (tmp_path / "one.txt").write_text("a\n")
    with pytest.raises(DataError, match="first 2,000"):
        distill_chain({**plain, "data": {"path": str(tmp_path / "one.txt"), "streaming": True}}, tmp_path / "chain")




def test_what_is_set_aside_is_in_no_stages_training_text(tmp_path):
    """A stage's own data may overlap the recipe's; its calibration and held-out documents are left out of it."""
    from cbd_hub.distill.recipe import _Run

    plain = make_recipe(tmp_path, "llama", [SHAPE])
    own = {"path": plain["data"]["path"], "heldout": 0.01, "calibration": 0.01}
    run = _Run(Recipe.parse({**plain, "stages": {"layers=2,ffn=24": {"data": own}}}), tmp_path / "chain", print)
    rows, _ = run.rows[run.stages[0].name]
    aside = {*run.parts.calibration, *run.parts.heldout}
    assert len(rows) > 100
    assert not aside & {row["text"] for row in rows}


def test_a_stream_that_is_all_set_aside_is_said(tmp_path):
    plain = make_recipe(tmp_path, "llama", [SHAPE])
    with pytest.raises(DataError, match="none is left to train on"):
        distill_chain({**plain, "data": {**plain["data"], "streaming": True}}, tmp_path / "chain")


def test_the_papers_recipe_is_ready(tmp_path):
    """The example, with models and data sets of this machine in the place of those of the Hub, passes every check that comes before training."""
    example = Recipe.read(Path(__file__).parent.parent / "examples" / "paper" / "gpt2.yaml").model_dump(exclude_none=True)
    shapes = {"gpt2-xl": (4, 64, 128), "gpt2-large": (4, 48, 96), "gpt2-medium": (3, 32, 64), "gpt2": (2, 16, 32)}
    for name, (layers, hidden, ffn) in shapes.items():
        tiny.save(tiny.gpt2(layers=layers, hidden=hidden, heads=hidden // 8, ffn=ffn, n_positions=1024), tmp_path / name)

    def local(name):
        return str(tmp_path / name.split("/")[-1])

    (tmp_path / "side.txt").write_text("\n\n".join(tiny.texts(200)))
    made = {
        **example, "teacher": local(example["teacher"]), "anchors": [{"checkpoint": local(anchor["checkpoint"])} for anchor in example["anchors"]],
        "data": {**example["data"], "path": prompts(tmp_path / "dolly.jsonl")}, "text_data": {"path": str(tmp_path / "side.txt")},
    }
    read = Recipe.parse(made)
    teacher = Path(read.teacher)
    stages = plan_stages(read, teacher, read_config(teacher))
    rows = {stage.name: stage_rows(read, stage.anchor, read_parts(read)) for stage in stages}
    check_stages(read, stages, read_config(teacher), rows, stage_tokenizers(stages, tiny.tokenizer()))
    args = stages[0].config(str(tmp_path / "out"))
    assert [stage.checkpoint for stage in stages] == [local(name) for name in list(shapes)[1:]]
    assert (args.objective, args.divergence, args.rollout_batch, args.inner_epochs, args.max_steps, args.max_new_tokens) == ("minillm", "reverse_kl", 256, 4, 5000, 512)
    assert (args.teacher_mix, args.ratio_clip, args.length_normalised, args.text_weight, args.learning_rate) == (0.2, 0.2, True, 1.0, 5e-6)
    assert args.train_batch_size * args.gradient_accumulation_steps == 64
    assert all(text is not None for _, text in rows.values())


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    assert read_rows(str(tmp_path / "bom.txt")) == [{"text": "one"}, {"text": "two"}]
