"""The paper's pipeline as files: valid as they stand, with the paper's numbers, and carried out on stand-ins of the same families."""

import ast
import importlib.util
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
import yaml
from test_docs import COMMANDS, commands

from cbd_hub import assemble_chain, distill_chain
from cbd_hub.configs import read_config
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.dry_run import dry_run
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import plan_stages
from cbd_hub.manifest import Shape
from cbd_hub.shapes import count


ROOT = Path(__file__).parent.parent
PAPER = ROOT / "examples" / "paper"
RECIPES = sorted(PAPER.glob("*.yaml"))
# Table 8: layers, heads, hidden, FFN, and the parameters that its names say
TARGETS = {138: (14, 12, 768, 3072), 220: (18, 14, 896, 3584), 277: (24, 14, 896, 3584), 380: (26, 16, 1024, 4096), 537: (30, 18, 1152, 4608)}


@pytest.fixture
def stand_ins(tmp_path):
    """The bridge's recipe with a tiny model in the place of each id."""
    values = yaml.safe_load((PAPER / "bridge.yaml").read_text())
    tokenizer = kinds.byte_level(330)
    for name, more in {"gpt2-xl": {"layers": 4, "ffn": 64}, "gpt2-large": {"layers": 3, "ffn": 48}, "gpt2-medium": {"layers": 2, "ffn": 32}, "gpt2": {"layers": 1, "ffn": 24}}.items():
        model = tiny.gpt2(**more)
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    values["teacher"] = str(tiny.save(tiny.qwen3(hidden=64, ffn=96), tmp_path / "teacher"))
    local = {anchor["checkpoint"]: str(tmp_path / anchor["checkpoint"].split("/")[1]) for anchor in values["anchors"]}
    values["anchors"] = [{"checkpoint": local[anchor["checkpoint"]]} for anchor in values["anchors"]]
    values["stages"] = {local[name]: {**fields, "max_steps": 2, "max_new_tokens": 6} for name, fields in values["stages"].items()}
    values["stage"] |= {"max_steps": 2, "rollout_batch": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_new_tokens": 6, "bf16": False}
    rows = [{"prompt": f"say {index} now", "completion": text} for index, text in enumerate(tiny.texts(40))]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "side.txt").write_text("\n\n".join(tiny.texts(40, seed=1)))
    values["data"] |= {"path": str(tmp_path / "dolly.jsonl"), "block_size": 64, "heldout": 0.1, "calibration": 0.2}
    values["text_data"] = {"path": str(tmp_path / "side.txt")}
    return values


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_says_what_the_paper_says(file):
    """B.1: 256 samples, 4 inner epochs, clip 0.2, length 512, temperature 1, 5,000 steps an anchor; MiniLLM's share of the teacher, batch and learning rate."""
    recipe = Recipe.read(file)
    said = {anchor["checkpoint"]: ChainDistillerConfig("unused", **recipe.stage_arguments(anchor)) for anchor in recipe.anchors}
    on_policy = {name: args for name, args in said.items() if args.bridge is None}
    assert on_policy
    for args in on_policy.values():
        assert (args.objective, args.divergence, args.max_steps, args.rollout_batch, args.inner_epochs) == ("minillm", "reverse_kl", 5000, 256, 4)
        assert (args.ratio_clip, args.max_new_tokens, args.sampling_temperature, args.teacher_mix, args.learning_rate) == (0.2, 512, 1.0, 0.2, 5e-6)
        assert args.train_batch_size * args.gradient_accumulation_steps == 64
    assert recipe.data.path == "dolly.jsonl"
    assert recipe.text_data is None or recipe.text_data.path  # the side loss reads its text over and over, and a stream is refused
    assert f"cbd distill examples/paper/{file.name}" in file.read_text()


def test_the_chains_are_the_papers():
    chains = {file.stem: [recipe.teacher, *(anchor["checkpoint"] for anchor in recipe.anchors)] for file in RECIPES for recipe in [Recipe.read(file)]}
    gpt2 = ["openai-community/gpt2-xl", "openai-community/gpt2-large", "openai-community/gpt2-medium", "openai-community/gpt2"]
    assert chains == {
        "gpt2": gpt2, "bridge": ["Qwen/Qwen3-4B", *gpt2], "qwen3": ["Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B"],
        "pythia": [f"EleutherAI/pythia-{size}" for size in ("1.4b", "1b", "410m", "160m", "70m")],
    }


def test_the_bridge_is_the_papers():
    """B.2: ten epochs of the source's answers, batch 8, learning rate 1e-5."""
    recipe = Recipe.read(PAPER / "bridge.yaml")
    first, later = (recipe.stage_arguments(anchor) for anchor in recipe.anchors[:2])
    assert (first["bridge"], first["learning_rate"], first["per_device_train_batch_size"], first["gradient_accumulation_steps"]) == ("text", 1e-5, 8, 1)
    questions = 15_011 - round(15_011 * recipe.data.heldout) - round(15_011 * recipe.data.calibration)
    assert first["max_steps"] == 10 * questions // 8
    assert "bridge" not in later


def test_it_is_carried_out_on_stand_ins(stand_ins, tmp_path):
    assert len(dry_run(Recipe.parse(stand_ins))) == 4
    chain = distill_chain({**stand_ins, "anchors": stand_ins["anchors"][:2]}, tmp_path / "chain")
    assert [link.kind for link in chain.manifest.links] == ["bridge", "segment"]
    assert [anchor.family for anchor in chain.anchors] == ["qwen3", "gpt2", "gpt2"]


@pytest.mark.parametrize("name", ["pythia", "qwen3"])
def test_stand_ins_of_the_other_chains_pass_every_check_of_their_shapes(name, tmp_path):
    """Tiny models with the published ones' ratios of layers, heads and widths, Pythia's unlike head sizes among them."""
    makers = {
        "pythia-1.4b": lambda: tiny.gpt_neox(layers=6, hidden=64, heads=4, ffn=256), "pythia-1b": lambda: tiny.gpt_neox(layers=4, hidden=64, heads=2, ffn=256),
        "pythia-410m": lambda: tiny.gpt_neox(layers=6, hidden=32, heads=4, ffn=128), "pythia-160m": lambda: tiny.gpt_neox(layers=3, hidden=24, heads=3, ffn=96),
        "pythia-70m": lambda: tiny.gpt_neox(layers=2, hidden=16, heads=2, ffn=64),
        "Qwen3-4B": lambda: tiny.qwen3(layers=9, hidden=40, heads=8, kv_heads=4, ffn=152, head_dim=8), "Qwen3-1.7B": lambda: tiny.qwen3(layers=7, hidden=32, heads=4, kv_heads=4, ffn=96, head_dim=8),
        "Qwen3-0.6B": lambda: tiny.qwen3(layers=7, hidden=16, heads=4, kv_heads=4, ffn=48, head_dim=8),
    }
    values = yaml.safe_load((PAPER / f"{name}.yaml").read_text())
    local = {each: str(tiny.save(makers[each.split("/")[1]](), tmp_path / each.split("/")[1])) for each in [values["teacher"], *(anchor["checkpoint"] for anchor in values["anchors"])]}
    values["teacher"] = local[values["teacher"]]
    values["anchors"] = [{"checkpoint": local[anchor["checkpoint"]]} for anchor in values["anchors"]]
    values["stages"] = {local[each]: fields for each, fields in values.get("stages", {}).items()}
    stages = plan_stages(Recipe.parse(values), Path(values["teacher"]), read_config(Path(values["teacher"])))
    assert [stage.bridged for stage in stages] == ([True, True, False, False] if name == "pythia" else [False, False])


def test_the_papers_targets_have_the_papers_sizes():
    from transformers import GPT2Config
    for millions, (layers, heads, hidden, ffn) in TARGETS.items():
        shape = Shape(layers=layers, hidden=hidden, heads=heads, kv_heads=heads, head_size=64, ffn=ffn, vocab=50257)
        assert count(shape, GPT2Config()) / 1e6 == pytest.approx(millions, abs=1.0)


def test_the_papers_targets_are_made_between_its_anchors_at_both_ends_of_alpha(tmp_path):
    """Table 8 at a sixteenth of the widths, between unaligned stand-ins of GPT-2's three checkpoints."""
    for name, (layers, heads) in {"large": (36, 20), "medium": (24, 16), "small": (12, 12)}.items():
        tiny.save(tiny.gpt2(layers=layers, hidden=4 * heads, heads=heads, ffn=16 * heads), tmp_path / name)
    chain = assemble_chain([str(tmp_path / name) for name in ("large", "medium", "small")], tmp_path / "chain", align=False)
    for layers, heads, hidden, ffn in TARGETS.values():
        for alpha in (0.0, 0.5, 1.0):
            plan = chain.plan(shape={"layers": layers, "hidden": hidden // 16, "heads": heads, "ffn": ffn // 16}, strategy="blend", alpha=alpha)
            assert (plan.shape.layers, plan.shape.heads, plan.shape.hidden, plan.shape.ffn, plan.mix.alpha) == (layers, heads, hidden // 16, ffn // 16, alpha)
    model = chain.model(shape={"layers": 18, "hidden": 56, "heads": 14, "ffn": 224}, strategy="blend", alpha=0.0)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


BLOCKS = re.findall(r"```bash\n(.*?)```", (PAPER / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", BLOCKS, ids=[block.strip().splitlines()[0][:50] for block in BLOCKS])
def test_every_command_of_the_readme_exists(text):
    for name, *rest in commands(text):
        known = {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, name
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["python"]:
            script = ROOT / words[1]
            assert script.is_file(), words[1]
            known = {node.value for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")}
            assert {word for word in words[2:] if word.startswith("--")} <= known, line
        for word in words:
            if word.startswith("examples/"):
                assert (ROOT / word).exists(), word


def test_the_readmes_python_parses_and_its_recipes_are_all_told_of():
    text = (PAPER / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    assert all(file.name in text for file in [*RECIPES, *PAPER.glob("*.py")])


def test_finetuning_learns_answers_alone_and_scores_them(tmp_path, monkeypatch, capsys):
    """The whole script on a tiny model, a row longer than the rest among its data."""
    tiny.save(tiny.gpt2(n_positions=64), tmp_path / "model")
    rows = [{"prompt": f"say {index} now", "completion": " yes"} for index in range(6)] + [{"prompt": "a" * 100, "completion": " no"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", "model", "--data", "rows.jsonl", "--out", "tuned", "--epochs", "2", "--batch", "4", "--learning-rate", "1e-2", "--score", "rows.jsonl", "--new-tokens", "4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    made = runpy.run_path(str(PAPER / "finetune.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "an ordinary GPT2LMHeadModel in tuned" in said
    assert re.search(r"Rouge-L \d+\.\d\d on 7 prompts", said)
    assert (tmp_path / "tuned" / "config.json").is_file()
    short, *_, long = made["tokenise"](rows, tiny.tokenizer(), 64)
    end = tiny.tokenizer().eos_token_id
    assert [token for token in short["labels"] if token != -100] == [*tiny.tokenizer()(" yes")["input_ids"], end]
    assert len(short["labels"]) == len(short["input_ids"]) == len("say 0 now yes") + 1
    assert len(long["input_ids"]) == len(long["labels"]) == 64


@pytest.mark.slow
def test_the_small_pipeline_goes_through_every_step_on_a_tiny_source(tmp_path, monkeypatch):
    """All but the fetching, and with the scripts that it calls in this process."""
    spec = importlib.util.spec_from_file_location("small", PAPER / "small.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    tokenizer, scripts = kinds.byte_level(330), []

    def get(self):
        model = tiny.llama(layers=6, ffn=64, max_position_embeddings=512)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(self.out / "models" / "source")
        tokenizer.save_pretrained(self.out / "models" / "source")
        lines = [json.dumps({"text": text}) for text in tiny.texts(120)]
        self.text.write_text("\n".join(lines))
        (self.out / "text.jsonl").write_text("\n".join(lines))
        rows = "".join(json.dumps({"prompt": f"{text} {index} Answer:", "completion": " yes"}) + "\n" for index, text in enumerate(tiny.texts(40)))
        self.tasks.mkdir()
        for file in (self.prompts, self.tasks / "sciq.train.jsonl", self.tasks / "sciq.test.jsonl"):
            file.write_text(rows)

    def run(self, script, *words):
        scripts.append(script)
        if script.startswith("examples/"):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [script, *words])
                runpy.run_path(str(ROOT / script), run_name="__main__")

    monkeypatch.setattr(small.Small, "get", get)
    monkeypatch.setattr(small.Small, "_run", run)
    monkeypatch.setattr(small, "ANCHORS", {"large": {"layers": 4, "ffn": 48}, "small": {"layers": 2, "ffn": 32}})
    monkeypatch.setattr(small, "VOCABULARY", 300)
    monkeypatch.setattr(small, "DATA", {**small.DATA, "block_size": 64})
    monkeypatch.setattr(sys, "argv", ["small.py", "--step", "all", "--out", str(tmp_path)])
    small.main()
    assert list(json.loads((tmp_path / "costs.json").read_text())) == ["get", "assemble", "sft", "kl", "bridge", "alpha", "finetune"]
    assert scripts == ["examples/paper/finetune.py"] * 4 + ["benchmarks/tasks.py"] * 2
    bridged = json.loads((tmp_path / "bridged" / "chain.json").read_text())
    assert [link["kind"] for link in bridged["links"]] == ["bridge", "segment"]
    small.main()  # nothing is done twice
    assert len(scripts) == 6
