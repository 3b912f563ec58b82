"""The command as people use it: exit codes, one-line errors, tables, JSON."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import tiny
import typer
import yaml
from conftest import ONE_FAMILY
from conftest import recipe as make_recipe
from safetensors.torch import load_file, save_file
from tokenizers_for_bridge import byte_level
from transformers import AutoModelForCausalLM

from cbd_hub import Chain, ChainDistillerConfig, cli, draft_table, evaluate_sizes
from cbd_hub.errors import ArgumentError


@pytest.fixture
def text(tmp_path):
    (tmp_path / "held.txt").write_text("\n\n".join(tiny.texts(30, seed=9)))
    return tmp_path / "held.txt"


def middle(chain):
    first, second = Chain.from_pretrained(chain).anchors[:2]
    return (first.parameters + second.parameters) // 2


@ONE_FAMILY
def test_show_plan_make_generate_eval(cbd, chain, text, tmp_path):
    size = middle(chain)
    code, shown, _ = cbd("show", chain)
    assert code == 0
    for anchor in Chain.from_pretrained(chain).anchors:
        assert f"{anchor.parameters:,}" in shown
    code, planned, _ = cbd("plan", chain, "--size", size)
    assert code == 0
    assert "expected loss" in planned
    assert "in float32, " in planned
    memory = {dtype: json.loads(cbd("plan", chain, "--size", size, "--json", *dtype)[1])["bytes_in_memory"] for dtype in ((), ("--dtype", "float16"))}
    assert {name: set(found) for name, found in memory.items()} == {(): {"float32", "bfloat16"}, ("--dtype", "float16"): {"float16"}}
    code, made, _ = cbd("make", chain, "--size", size, "--out", tmp_path / "m", "--dtype", "bfloat16")
    assert code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype.itemsize == 2
    code, generated, _ = cbd("generate", chain, "a small", "--size", size, "--max-new-tokens", 4)
    assert code == 0
    assert generated.startswith("a small")
    assert cbd("generate", tmp_path / "m", "a small", "--max-new-tokens", 4)[:2] == cbd("generate", chain, "a small", "--size", size, "--max-new-tokens", 4, "--dtype", "bfloat16")[:2], "what was made goes on as the size does"
    assert "--size is of a chain" in cbd("generate", tmp_path / "m", "a small", "--size", size)[2]
    code, table, _ = cbd("eval", chain, "--text", text, "--sizes", f"{size},min")
    assert code == 0
    assert "perplexity" in table


def test_json_is_one_object_with_the_same_numbers(cbd, chain, text, tmp_path):
    size = middle(chain)
    for arguments, key in (
        (["show", chain], "anchors"), (["plan", chain, "--size", size], "bytes_read"), (["make", chain, "--size", size, "--out", tmp_path / "m"], "parameters"),
        (["generate", chain, "x", "--size", size, "--max-new-tokens", 2, "--temperature", 0.7], "text"), (["eval", chain, "--text", text], "results"),
    ):
        code, printed, _ = cbd(*arguments, "--json")
        assert code == 0
        assert key in json.loads(printed)
    planned = json.loads(cbd("plan", chain, "--size", size, "--json")[1])
    assert planned["parameters"] == Chain.from_pretrained(chain).plan(size).parameters
    assert sum(planned["bytes_read"].values()) > 0


def test_tasks_are_answered(cbd, chain, tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": f"{n} and", "choices": [" one", " two"], "answer": n % 2}) + "\n" for n in range(6)))
    code, printed, _ = cbd("eval", chain, "--tasks", tmp_path / "q.jsonl", "--sizes", "min,max", "--json")
    assert code == 0
    assert [row["questions"] for row in json.loads(printed)["tasks"]] == [6, 6]
    code, table, _ = cbd("eval", chain, "--tasks", tmp_path / "q.jsonl", "--sizes", "min")
    assert code == 0
    assert "accuracy" in table
    assert cbd("eval", chain)[0] == 2


@ONE_FAMILY
def test_other_models_are_measured_beside_sizes(cbd, chain, text, tmp_path):
    """One made from the chain loses what its size does; one with another vocabulary is compared on the same bytes, and the folder that is a chain is named."""
    size = middle(chain)
    assert cbd("make", chain, "--size", size, "--out", tmp_path / "made")[0] == 0
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": f"{n} and", "choices": [" one", " two"], "answer": n % 2}) + "\n" for n in range(6)))
    words = ("eval", chain, "--text", text, "--tasks", tmp_path / "q.jsonl", "--sizes", size, "--models")
    found = json.loads(cbd(*words, tmp_path / "made", "--json")[1])
    ours, theirs = found["results"]
    assert (theirs.pop("model"), ours.pop("strategy")) == (str(tmp_path / "made"), Chain.from_pretrained(chain).plan(size).strategy)
    assert (theirs.pop("difference"), theirs.pop("difference_stderr")) == (0, 0)
    assert ours == theirs
    assert found["tokens"]
    ours, theirs = json.loads(cbd("eval", chain, "--text", text, "--sizes", f"{size},min", "--json")[1])["results"]
    assert theirs["difference"] == pytest.approx(theirs["loss"] - ours["loss"], abs=1e-6)
    assert theirs["difference_stderr"] > 0
    assert [row.get("model") for row in found["tasks"]] == [None, str(tmp_path / "made")]
    other = byte_level()
    model = tiny.llama()
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    code, table, _ = cbd(*words, f"{tmp_path / 'made'}, {tmp_path / 'other'}")
    assert code == 0
    assert "the same for each vocabulary" in table
    assert "less the first, paired" in table
    assert "other" in table
    code, _, errors = cbd(*words, chain)
    assert code == 1
    assert "is a chain, not a model" in errors


@ONE_FAMILY
def test_other_models_change_nothing_of_the_sizes(cbd, chain, text, tmp_path):
    """One vocabulary is one, whatever ends its texts and however its chats look; what cannot be measured is said by its name, before anything is measured."""
    words = ("eval", chain, "--text", text, "--sizes", "max", "--json")
    alone = json.loads(cbd(*words)[1])
    anchor = Chain.from_pretrained(chain)
    copied = tmp_path / "copied"
    anchor.model("max").save_pretrained(copied)
    tokenizer = anchor.tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<unk>", "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(copied)
    beside = json.loads(cbd(*words, "--models", copied)[1])
    assert beside["results"][0] == alone["results"][0]
    assert beside["tokens"] == alone["tokens"]
    assert beside["results"][1]["difference"] == 0
    short = tiny.gpt2()
    short.config.n_positions = 16
    type(short)(short.config).save_pretrained(tmp_path / "short")
    anchor.tokenizer().save_pretrained(tmp_path / "short")
    anchor.model("max").save_pretrained(tmp_path / "rows")
    byte_level().save_pretrained(tmp_path / "rows")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    for models, code, message in (
        (tmp_path / "short", 2, r"short is to read \d+ tokens \(block_size\), which is more than the model's 16 positions; give 16 or less"),
        (tmp_path / "rows", 1, "rows has 260 rows in its embedding, and its tokenizer tokens up to 399; give it its own"), (",", 2, 'models "," name none'),
        (tmp_path / "lora", 1, "lora is an adapter, not a model; merge it"),
    ):
        found, _, errors = cbd(*words, "--models", models)
        assert found == code
        assert re.search(message, errors), errors
        assert "measuring" not in errors
    with pytest.raises(ArgumentError, match="sizes and models name none"):
        evaluate_sizes(anchor, [], text=str(text))
    with pytest.raises(ArgumentError, match="models is './model' alone"):
        evaluate_sizes(anchor, models="./model", text=str(text))


def test_lists_and_files_are_what_sizes_are_measured_by(chain, text):
    opened = Chain.from_pretrained(chain)
    for wrong, message in (({"sizes": "min"}, "sizes is 'min' alone; give a list of sizes"), ({"tasks": "a.jsonl"}, "tasks is 'a.jsonl' alone"), ({"text": ["one"]}, "text is a list; give a file"), ({"text": "x", "block_size": 0}, "block_size=0 is no whole number of 1 or more"), ({"text": "x", "max_tokens": -1}, "max_tokens=-1 is no")):
        with pytest.raises(ArgumentError, match=message):
            evaluate_sizes(opened, **{"text": text, **wrong})
    assert evaluate_sizes(chain, ["min"], text=text).results, "a path is a file too"


def test_the_likeliest_tokens_are_taken_whatever_a_models_generation_config_says(cbd, chain, tmp_path):
    assert cbd("make", chain, "--size", "max", "--out", tmp_path / "m")[0] == 0
    plain = cbd("generate", tmp_path / "m", "a small")[1]
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1}))
    assert cbd("generate", tmp_path / "m", "a small")[1] == plain


def test_generation_depends_on_the_seed_alone(cbd, chain):
    texts = [json.loads(cbd("generate", chain, "x", "--size", "max", "--temperature", 2.0, "--seed", seed, "--json")[1])["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_distil_and_assemble(cbd, tmp_path):
    plain = make_recipe(tmp_path, "llama", [{"layers": 2, "ffn": 24}])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain))
    code, printed, _ = cbd("distill", tmp_path / "r.yaml", "--out", tmp_path / "chain", "--dry-run", "--json")
    assert code == 0
    assert json.loads(printed)["stages"][0]["tokens"] == 4 * 4 * 32
    assert not (tmp_path / "chain").exists()
    code, printed, said = cbd("distill", tmp_path / "r.yaml", "--out", tmp_path / "chain")
    assert code == 0
    assert "next: cbd make" in printed
    assert "learns" in said
    anchors = [tmp_path / "chain" / "anchors" / anchor.name for anchor in Chain.from_pretrained(tmp_path / "chain").anchors]
    code, printed, _ = cbd("assemble", *anchors, "--out", tmp_path / "again")
    assert code == 0
    assert "not measured" in printed


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["plan", "CHAIN", "--size", "138Q"], 2, 'size "138Q" cannot be read'),
    (["plan", "CHAIN", "--size", "900M"], 1, "outside the chain"),
    (["plan", "CHAIN"], 2, "neither size nor shape"),
    (["plan", "CHAIN", "--size", "min", "--strategy", "slerp"], 2, "choose one of"),
    (["plan", "CHAIN", "--shape", "layers"], 2, "cannot be read"),
    (["plan", "/no/such/chain", "--size", "1M"], 1, "neither a folder"),
    (["show", "."], 1, "no chain.json"),
    (["make", "CHAIN", "--size", "min", "--out", "CHAIN"], 1, "already exists"),
    (["make", "CHAIN", "--size", "min", "--out", "x", "--dtype", "int4"], 2, "no dtype that weights"),
    (["generate", "CHAIN", "", "--size", "min"], 2, "prompt is empty"),
    (["eval", "CHAIN", "--text", "/no/such.txt"], 1, "no file matches"),
    (["eval", "CHAIN", "--text", "/tmp"], 1, 'is a folder; name its files, such as "/tmp/*.txt"'),
    (["plan", "CHAIN", "--size", "min", "--dtype", "int8"], 2, "no dtype that weights"),
    (["distill", "/no/such.yaml", "--out", "x"], 1, "cannot be read"),
    (["assemble", "CHAIN", "--out", "x"], 2, "two checkpoints or more"),
    (["plan", "CHAIN", "--shape", "layers=5,layers=6"], 2, "gives layers twice"),
    (["plan", "CHAIN", "--size", "min", "--adapter-size", "max"], 2, "no adapter came"), (["make", "CHAIN", "--size", "min", "--adapter-size", "max", "--out", "x"], 2, "no adapter came"),
    (["generate", "CHAIN", "one", "--size", "min", "--top-p", "0.5"], 2, "--top-p is of sampling"), (["generate", "CHAIN", "one", "--size", "min", "--seed", "1"], 2, "--seed is of sampling"),
    (["eval", "CHAIN", "--tasks", "x.jsonl", "--column", "body"], 2, "--column is of --text"), (["eval", "CHAIN", "--tasks", "x.jsonl", "--block-size", "64"], 2, "--block-size is of --text"),
    (["generate", "~nosuchuser/x", "one"], 1, "neither a folder nor a Hub id"), (["plan", "x" * 300, "--size", "min"], 1, "neither a folder nor a Hub id"),
    (["heal", "CHAIN", "--size", "min", "--text", "a", "--heldout-text", "b", "--heldout", "0.1", "--out", "x"], 2, "--heldout is the share"),
    (["heal", "CHAIN", "--size", "min", "--cache", "a", "--out", "x"], 2, "give --heldout-text too"),
    (["heal", "CHAIN", "--size", "min", "--text", "a", "--steps", "3", "--tokens", "9", "--out", "x"], 2, "--tokens 9 came with --steps 3"),
    (["retokenize", "CHAIN", "--keep", "300", "--bridge", "span", "--out", "x"], 2, "--bridge is of a training"),
    (["cache-teacher", "CHAIN", "--recipe", "r.yaml", "--column", "body", "--out", "x"], 2, "--column is of --text"),
    (["push", "CHAIN/anchors", "org/model", "--tag", "v1"], 2, "--tag is of a chain's index"), (["push", "CHAIN/anchors", "org/model", "--no-collection"], 2, "--collection is of a chain's index"),
    (["retokenize", "CHAIN", "--keep", "300", "--column", "body", "--out", "x"], 2, "--column is of --text"),
    (["draft", "CHAIN", "--column", "body"], 2, "--column is of the documents of --prompts"), (["draft", "CHAIN", "--count", "2"], 2, "--count is of the documents of --prompts"),
])
def test_errors_are_one_line_with_the_way_out(cbd, chain, arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, printed, said = cbd(*(argument.replace("CHAIN", str(chain)) for argument in arguments))
    assert got == code
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not printed
    assert not list(tmp_path.iterdir())


def test_what_has_no_effect_is_said(cbd, chain, text, tmp_path):
    code, _, said = cbd("make", chain, "--size", "max", "--alpha", 0.5, "--strategy", "blend", "--out", tmp_path / "made")
    assert (code, "is an anchor, and is itself whatever --strategy and --alpha say" in said) == (0, True)
    assert "is an anchor" not in cbd("plan", chain, "--size", "max")[2]
    code, _, said = cbd("eval", chain, "--text", text, "--column", "body")
    assert (code, said) == (1, f'error: "body" names a column, and {text} is plain text, which has none; leave it out\n')


def test_an_adapters_folder_is_no_model_and_chats_are_no_plain_text(cbd, chain, tmp_path):
    from peft import LoraConfig, get_peft_model
    model = Chain.from_pretrained(chain).model("max")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    model.config.save_pretrained(tmp_path / "lora")  # as `cbd heal` does
    code, _, said = cbd("cut", tmp_path / "lora", "--size", "10K", "--out", tmp_path / "cut")
    assert (code, "is an adapter, not a model; merge it into its base model" in said) == (1, True)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    anchor = Chain.from_pretrained(chain).files.root / "anchors" / Chain.from_pretrained(chain).anchors[0].name
    code, _, said = cbd("cut", anchor, "--size", "20K", "--text", tmp_path / "chats.jsonl", "--out", tmp_path / "cut")
    assert (code, "plain text is wanted here, and these are chats or prompts" in said) == (1, True)


@pytest.mark.parametrize("arguments", [["plan"], ["nope"], ["plan", "x", "--sise", "1M"], ["make", "x", "--size", "1M"], ["plan", "x", "--alpha", "much"]])
def test_wrong_calls_exit_with_2(cbd, arguments):
    code, _, said = cbd(*arguments)
    assert code == 2
    assert "Traceback" not in said


@pytest.mark.parametrize("command", sorted(typer.main.get_command(cli.app).commands))
def test_every_command_has_help_and_json(cbd, command):
    code, printed, _ = cbd(command, "--help")
    assert code == 0
    assert "Usage: cbd" in printed
    assert "--json" in printed


def test_an_error_has_a_line_of_its_own_though_a_bar_is_on_the_way(cbd, monkeypatch):
    from tqdm import tqdm
    held = []

    def fails(**_):
        held.append(tqdm(total=10))
        raise ArgumentError("it breaks")

    monkeypatch.setattr(cli, "app", fails)
    assert cbd("plan")[2].endswith("\nerror: it breaks\n")


def test_debug_shows_the_traceback(monkeypatch):
    done = subprocess.run([sys.executable, "-m", "cbd_hub.cli", "plan", "/no/such", "--size", "1M", "--debug"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_importing_cbd_hub_is_light():
    """Nothing but its own file and Python's library: no torch, nothing registered."""
    code = (
        "import sys; before = set(sys.modules); import cbd_hub\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)), cbd_hub.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cbd_hub", version("cbd-hub")]


def test_the_cli_starts_without_torch():
    code = "import cbd_hub.cli, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_load_and_a_plan_import_no_machinery_for_training():
    code = "import cbd_hub.cli, cbd_hub.model, cbd_hub.chain, sys; print(sorted({'accelerate', 'datasets', 'peft', 'scipy', 'transformers.modeling_utils', 'transformers.generation'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@ONE_FAMILY
def test_a_home_folder_is_found_whatever_the_shell_left(cbd, chain, text, tmp_path, monkeypatch):
    """bash leaves ~ behind = as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(chain, tmp_path / "chain")
    assert cbd("push", "~/chain", "org/x", "--dry-run")[0] == 0
    code, _, said = cbd("cache-teacher", chain / "anchors" / Chain.from_pretrained(chain).anchors[0].name, "--text", text, "--out", "~/cache", "--block-size", 32)
    assert code == 0, said
    assert (tmp_path / "cache/cache.json").is_file()


@ONE_FAMILY
def test_what_a_broken_model_loses_is_null_in_json(cbd, chain, text, tmp_path):
    code, printed, said = cbd("make", chain, "--size", "min", "--out", tmp_path / "hot")
    assert code == 0, said
    weights = load_file(tmp_path / "hot/model.safetensors")
    save_file({name: tensor * 1000 if "norm" in name else tensor for name, tensor in weights.items()}, tmp_path / "hot/model.safetensors", {"format": "pt"})
    code, printed, said = cbd("eval", chain, "--text", text, "--sizes", "max", "--models", tmp_path / "hot", "--json")
    assert code == 0, said
    assert [row["perplexity"] is None for row in json.loads(printed)["results"]] == [False, True]


@ONE_FAMILY
def test_calls_that_could_not_end_well_are_refused_at_once(cbd, chain, text, tmp_path, monkeypatch):
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "file").write_text("x")
    top = chain / "anchors" / Chain.from_pretrained(chain).anchors[0].name
    for arguments, message in (
        (("eval", chain, "--text", tmp_path / "broken.parquet"), "broken.parquet cannot be read as parquet"),
        (("cut", top, "--size", "30K", "--text", text, "--out", tmp_path / "file/x"), "cannot be made: "),
        (("cache-teacher", top, "--text", text, "--out", tmp_path / "c", "--push", "alone"), '"alone" cannot be the name of a repo (it has no namespace)'),
        (("space", chain, "--push", "org/s", "--port", 80), "--port is of the page on this machine"),
    ):
        code, _, said = cbd(*arguments)
        assert code in (1, 2)
        assert message in said, said
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not to be written to" in cbd("cut", top, "--size", "30K", "--text", text, "--out", tmp_path / "new")[2]
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match="prompts is 'one text' alone"):
        draft_table(chain, prompts="one text")
    for more, message in (({}, "changes nothing on a CPU"), ({"bf16": True}, "contradict each other")):
        with pytest.raises(ArgumentError, match=message):
            ChainDistillerConfig(str(tmp_path), fp16=True, use_cpu=True, **more)
    (tmp_path / "twice.yaml").write_text("teacher: a\nteacher: b\n")
    assert "twice.yaml line 2: teacher is given twice" in cbd("distill", tmp_path / "twice.yaml", "--out", tmp_path / "d")[2]


def test_an_error_of_the_system_names_its_path(cbd, monkeypatch):
    def locked(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr(Chain, "from_pretrained", locked)
    code, _, said = cbd("show", "x")
    assert code == 1
    assert said == "error: /some/where: Permission denied; check the path, its permissions and the disk\n"
