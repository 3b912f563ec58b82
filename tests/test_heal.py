"""Healing: the loss falls and the record says by how much, the best weights come back, a killed run goes on bit for bit, two processes are one."""

import functools
import json

import pytest
import tiny
import torch
from conftest import assembled
from datasets import Dataset, IterableDataset
from processes import launched
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub import CBDModel, Chain, ChainDistiller, heal
from cbd_hub.cards import interpolant_card
from cbd_hub.distill import heal as module
from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.data import split_documents
from cbd_hub.distill.healing import Healer, divided, documents_of
from cbd_hub.errors import ArgumentError, DataError, SizeError, StorageError, WeightsError
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.publish import push_model


OPTIONS = {"max_steps": 6, "eval_steps": 2, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "block_size": 32, "bf16": False, "heldout": 0.1, "disable_tqdm": True}
TEXTS = tiny.texts(120)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Anchors of 4 and 2 layers."""
    return assembled(tmp_path_factory.mktemp("heal"), 4, 2)


def middle(chain):
    return sum(anchor.parameters for anchor in Chain.from_pretrained(chain).anchors) // 2


def between(chain, **options):
    return CBDModel.from_chain(chain, middle(chain), **options)


def data(texts=TEXTS):
    return Dataset.from_dict({"text": texts})


def lora(**more):
    from peft import LoraConfig
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})


def held_documents():
    """What heal holds out by default, found anew."""
    parts = split_documents(TEXTS, 0.1, 0.0, 0)
    return Documents.read([*parts.heldout, *parts.calibration], tiny.tokenizer(), 32, 8192)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_the_loss_falls_and_the_record_is_what_is_measured(chain, tmp_path):
    model, lines = between(chain), []
    before = document_losses(ModelRunner(model), held_documents())
    healed = heal(model, chain, data(), output_dir=tmp_path / "out", progress=lines.append, **OPTIONS)
    assert healed is model
    assert not model.training
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tiny.same(loaded, healed)
    after = document_losses(ModelRunner(loaded.eval()), held_documents())
    record = loaded.config.cbd["healed"]
    assert (record["loss"], record["stderr"], record["loss_before"], record["stderr_before"]) == pytest.approx((after.mean, after.stderr, before.mean, before.stderr))
    assert (record["difference"], record["difference_stderr"]) == pytest.approx(after.minus((1.0, before)))
    assert record["difference"] < -3 * record["difference_stderr"]
    assert (record["teacher"], record["by"], record["steps"], record["tokens"]) == (Chain.from_pretrained(chain).anchors[0].name, "full", 6, 6 * 4 * 32)
    assert record["objective"] == "0.1 x forward_kl at temperature 1 + 1 x cross-entropy"
    assert (record["documents"], record["heldout_tokens"]) == (13, held_documents().tokens)
    made = between(chain).config.cbd
    assert {name: value for name, value in loaded.config.cbd.items() if name != "healed"} == made
    assert loaded.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert [f"{before.mean:.3f}" in lines[0], f"{after.mean:.3f}" in lines[1], len(lines)] == [True, True, 2]


def test_a_model_comes_back_in_its_own_dtype_and_may_be_healed_again(chain):
    model = heal(between(chain, dtype=torch.bfloat16), chain, data(), **OPTIONS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.base_model.rotary_emb.inv_freq.dtype == torch.float32
    first = model.config.cbd["healed"]
    again = heal(model, Chain.from_pretrained(chain), data(), **OPTIONS).config.cbd["healed"]
    assert again["earlier"] == first
    assert again["loss_before"] == pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize(("given", "weights"), [
    ({}, (0.1, 1.0)), ({"kd_weight": 1.0}, (1.0, 1.0)), ({"on_policy_fraction": 0.5}, (1.0, 1.0)), ({"objective": "minillm"}, (1.0, 0.0)),
])
def test_the_text_weighs_ten_times_what_the_teacher_says_unless_the_models_own_answers_are_judged(given, weights):
    args = module._arguments({"bf16": False, **given}, None, None, adapter=False)
    assert (args.kd_weight, args.ce_weight) == weights


def test_no_document_is_both_trained_and_measured_on():
    rows, held = divided(data(), None, 0.1, 0)
    trained, measured = {row["text"] for row in rows}, {row["text"] for row in held}
    assert not trained & measured
    assert trained | measured == set(TEXTS)
    recipe = split_documents(TEXTS, 0.1, 0.02, 0)
    assert set(recipe.heldout) <= measured <= {*recipe.heldout, *recipe.calibration}, "what a recipe holds out of the same text"
    rows, held = divided(data(), data(TEXTS[:5]), 0.1, 0)
    assert [row["text"] for row in rows] == TEXTS[5:]


@pytest.mark.parametrize("rows", [
    [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS], [{"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]} for text in TEXTS],
    [{"input_ids": tiny.tokenizer()(text).input_ids[:32]} for text in TEXTS],
], ids=["prompts", "chats", "ids"])
def test_rows_of_every_kind(chain, rows):
    tokenizer = tiny.tokenizer()
    if "messages" in rows[0]:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    record = heal(between(chain), chain, rows, **OPTIONS).config.cbd["healed"]
    assert record["difference"] < 0
    held = divided(rows, None, 0.1, 0)[1]
    if "prompt" in rows[0]:
        assert record["heldout_tokens"] == sum(len(tokenizer(row["completion"][:32 - 9]).input_ids) + (len(row["completion"]) < 32 - 9) for row in held)


def test_streams_are_read_with_rows_to_measure_on(chain):
    stream = IterableDataset.from_generator(lambda: iter([{"text": text} for text in TEXTS[20:]]))
    assert heal(between(chain), chain, stream, eval_dataset=data(TEXTS[:20]), **OPTIONS).config.cbd["healed"]["difference"] < 0
    with pytest.raises(ArgumentError, match="dataset is a stream"):
        heal(between(chain), chain, stream, **OPTIONS)


def test_a_lora_is_merged_or_a_peft_folder_that_loads(chain, tmp_path):
    from peft import PeftModel

    base = between(chain)
    merged = heal(between(chain), chain, data(), output_dir=tmp_path / "merged", peft_config=lora(), **OPTIONS)
    assert type(merged) is type(base)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    moved = {name for name, tensor in base.named_parameters() if not torch.equal(tensor, merged.get_parameter(name))}
    assert moved == {name for name in weights(base) if "proj" in name}
    record = merged.config.cbd["healed"]
    assert (record["by"], record["difference"] < 0) == ("lora, rank 4", True)
    assert tiny.same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), merged)

    kept = heal(between(chain), chain, data(), output_dir=tmp_path / "adapter", peft_config=lora(), merge=False, **OPTIONS)
    assert isinstance(kept, PeftModel)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(between(chain), tmp_path / "adapter").eval()
    ids = torch.arange(4, 24)[None]
    torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert loaded.merge_and_unload().num_parameters() == base.num_parameters()
    assert kept.config.cbd["healed"]["loss"] == pytest.approx(record["loss"], abs=2e-3)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_healed_in_bf16_computes_in_its_own_precision_afterwards(chain, monkeypatch, fails, tmp_path):
    """The trainer's autocast goes with it, also where the heal fails."""
    monkeypatch.setattr("cbd_hub.distill.config.has_bf16", lambda device: True)
    model = between(chain)
    if fails:
        monkeypatch.setattr("cbd_hub.distill.heal._result", lambda *_: pytest.fail("not reached"))
        train = module._train

        def failing(healer, *rest):
            train(healer, *rest)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "_train", failing)
        with pytest.raises(KeyboardInterrupt):
            heal(model, chain, data(), **{**OPTIONS, "bf16": True})
        other = between(chain)
    else:
        model = heal(model, chain, data(), output_dir=tmp_path / "m", **{**OPTIONS, "bf16": True})
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.arange(4, 24)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_early_stopping_gives_back_the_best_weights(chain, monkeypatch):
    """Held-out losses by a script: the third evaluation is the best, and two worse ones stop the run."""
    script, seen, measure = [5.0, 4.0, 3.0, 2.0, 2.5, 2.0, 9.0], [], Healer.losses

    def losses(self):
        found = measure(self)
        seen.append(weights(self.model))
        return type(found)(found.tokens * script[len(seen) - 1], found.tokens)

    monkeypatch.setattr(Healer, "losses", losses)
    model = heal(between(chain), chain, data(), **{**OPTIONS, "max_steps": 20})
    assert len(seen) == 6, "the start, and five evaluations of ten"
    assert model.config.cbd["healed"]["steps"] == 6
    assert model.config.cbd["healed"]["tokens"] == 6 * 4 * 32
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in seen[3].items())
    assert not all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in seen[5].items())


@pytest.mark.parametrize("config", [None, "lora"])
def test_where_nothing_helps_the_model_comes_back_as_it_was(chain, config, caplog, monkeypatch):
    measure, worse = Healer.losses, iter(range(9))
    monkeypatch.setattr(Healer, "losses", lambda self: type(found := measure(self))(found.nats + 900 * next(worse), found.tokens))
    model = heal(between(chain), chain, data(), peft_config=lora() if config else None, **{**OPTIONS, "max_steps": 20})
    assert next(worse) == 3, "the start, and two evaluations of ten"
    record = model.config.cbd["healed"]
    assert (record["steps"], record["tokens"], record["difference"]) == (0, 0, 0.0)
    assert tiny.same(model, between(chain))
    assert "the model is as it was" in caplog.text


def test_a_run_that_learned_nothing_is_in_the_way_of_no_other(chain, tmp_path, monkeypatch):
    tiny.killed_in_training(monkeypatch, 2)
    with pytest.raises(tiny.Killed):
        heal(between(chain), chain, data(), output_dir=tmp_path / "out", **{**OPTIONS, "learning_rate": 0.1})
    again, whole = (heal(between(chain), chain, data(), output_dir=tmp_path / name, **OPTIONS) for name in ("out", "whole"))
    assert tiny.same(again, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(("stop", "config"), [(2, None), (4, None), (4, "lora")], ids=["before a checkpoint", "after one", "lora"])
def test_killed_and_run_again_is_the_run_never_killed(chain, tmp_path, monkeypatch, stop, config):
    def call(name, **more):
        return heal(between(chain), chain, data(), output_dir=tmp_path / name, peft_config=lora() if config else None, **{**OPTIONS, "hidden_weight": 0.5, **more})

    whole = call("whole")
    count = tiny.killed_in_training(monkeypatch, stop)
    with pytest.raises(tiny.Killed):
        call("again")
    assert not (tmp_path / "again").exists()
    if stop > 2:
        with pytest.raises(StorageError, match="unfinished run with learning_rate=0.003, and 0.1 is asked; ask for the same, or remove"):
            call("again", learning_rate=0.1)
        with pytest.raises(StorageError, match="unfinished run with kd_weight=0.1, and 1.0 is asked"):
            call("again", kd_weight=1)
    again = call("again", kd_weight=0.1, ce_weight=1, disable_tqdm=True, logging_steps=3)  # what it has by default, and what only tells
    assert count[0] == stop + 6 - (stop - 1) // 2 * 2
    assert tiny.same(again, whole)
    assert again.config.cbd == whole.config.cbd
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "whole"]


def test_stopped_in_a_notebook_the_same_call_goes_on(chain, tmp_path, monkeypatch):
    whole, model = heal(between(chain), chain, data(), **OPTIONS), between(chain, dtype=torch.bfloat16)
    before = weights(model)
    tiny.killed_in_training(monkeypatch, 4)
    with pytest.raises(tiny.Killed):
        heal(model, chain, data(), output_dir=tmp_path / "out", **OPTIONS)
    assert all(torch.equal(before[name], after) and after.dtype == torch.bfloat16 for name, after in weights(model).items()), "as it came"
    model = between(chain)
    tiny.killed_in_training(monkeypatch, 4)
    with pytest.raises(tiny.Killed):
        heal(model, chain, data(), output_dir=tmp_path / "again", **OPTIONS)
    assert tiny.same(heal(model, chain, data(), output_dir=tmp_path / "again", **OPTIONS), whole)


@pytest.mark.parametrize("stopped", [False, True], ids=["at its last step", "early"])
def test_killed_at_its_end_it_takes_no_further_step(chain, tmp_path, monkeypatch, stopped):
    options = {**OPTIONS, **({"max_steps": 20, "learning_rate": 3.0} if stopped else {})}
    whole = heal(between(chain), chain, data(), **options)
    result = module._result

    def killed(*_):
        raise tiny.Killed

    monkeypatch.setattr(module, "_result", killed)
    with pytest.raises(tiny.Killed):
        heal(between(chain), chain, data(), output_dir=tmp_path / "out", **options)
    monkeypatch.setattr(module, "_result", result)
    count = tiny.killed_in_training(monkeypatch, 10**6)
    again = heal(between(chain), chain, data(), output_dir=tmp_path / "out", **options)
    assert count[0] == 0
    assert tiny.same(again, whole)
    assert again.config.cbd == whole.config.cbd
    assert (again.config.cbd["healed"]["steps"] < 6) == stopped


def test_a_teacher_cache_stands_in_for_the_neighbour(chain, tmp_path):
    opened = Chain.from_pretrained(chain)
    rows, held = [{"text": text} for text in TEXTS[20:]], data(TEXTS[:20])
    teacher, tokenizer = opened.model("max"), opened.tokenizer()
    cache = write_cache(teacher, rows, tmp_path / "cache", tokenizer=tokenizer, block_size=32, top_k=259, bits=16)
    options = {name: value for name, value in OPTIONS.items() if name != "block_size"}
    cached = heal(between(chain), chain, teacher_cache=tmp_path / "cache", eval_dataset=held, **options)
    live = heal(between(chain), chain, rows, eval_dataset=held, **OPTIONS)
    record, other = cached.config.cbd["healed"], live.config.cbd["healed"]
    assert record["loss"] == pytest.approx(other["loss"], abs=2e-3)
    assert {name: record[name] for name in ("teacher", "loss_before", "tokens")} == {name: other[name] for name in ("teacher", "loss_before", "tokens")}
    same = heal(between(chain), chain, cache, eval_dataset=held, **options)
    assert tiny.same(same, cached)
    with pytest.raises(ArgumentError, match="pass eval_dataset"):
        heal(between(chain), chain, teacher_cache=cache, **options)
    with pytest.raises(DataError, match="made for another text"):
        heal(between(chain), chain, rows[:-1], teacher_cache=cache, eval_dataset=held, **options)
    with pytest.raises(ArgumentError, match="hidden_weight=1.0 needs the teacher itself"):
        heal(between(chain), chain, teacher_cache=cache, eval_dataset=held, hidden_weight=1.0, **options)
    stranger = write_cache(tiny.llama(layers=4, seed=77), rows, tmp_path / "stranger", tokenizer=tokenizer, block_size=32)
    with pytest.raises(DataError, match="made for another teacher"):
        heal(between(chain), chain, teacher_cache=stranger, eval_dataset=held, **options)
    below = write_cache(opened.model("min"), rows, tmp_path / "below", tokenizer=tokenizer, block_size=32)
    with pytest.raises(DataError, match=f"give one of an anchor above the model: {opened.anchors[0].name}"):
        heal(between(chain), chain, teacher_cache=below, eval_dataset=held, **options)
    with pytest.raises(DataError, match="is no teacher cache"):
        heal(between(chain), chain, teacher_cache=tmp_path, eval_dataset=held, **options)


def test_what_is_not_there_is_no_full_disk(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(ChainDistiller, "_save_checkpoint", lambda *_, **__: (tmp_path / "no such file").read_bytes())
    with pytest.raises(FileNotFoundError):
        heal(between(chain), chain, data(), output_dir=tmp_path / "out", **OPTIONS)


def test_a_full_disk_is_told_and_the_same_call_goes_on(chain, tmp_path, monkeypatch):
    whole = heal(between(chain), chain, data(), output_dir=tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        saved = []
        save = ChainDistiller._save_checkpoint

        def full(self, *args, **kwargs):
            saved.append(1)
            if len(saved) == 3:
                raise RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")  # what torch says of a full disk
            return save(self, *args, **kwargs)

        patch.setattr(ChainDistiller, "_save_checkpoint", full)
        with pytest.raises(StorageError, match="cannot write .*out: .*; free or choose another disk and run again, it goes on"):
            heal(between(chain), chain, data(), output_dir=tmp_path / "out", **OPTIONS)
    assert tiny.same(heal(between(chain), chain, data(), output_dir=tmp_path / "out", **OPTIONS), whole)


def test_what_is_refused(chain, tmp_path):
    from peft import get_peft_model

    other = assembled(tmp_path / "other", 5, 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    anchor, plain, adapted = CBDModel.from_chain(chain, "max"), tiny.llama(layers=3), get_peft_model(between(chain), lora())
    wrong = [
        (plain, data(), {}, ArgumentError, "was not made from a chain"), (adapted, data(), {}, ArgumentError, "has an adapter"), (anchor, data(), {}, SizeError, "is the anchor .* needs no healing"),
        (between(other), data(), {}, ArgumentError, "is no size of"), (None, None, {}, ArgumentError, "neither dataset nor teacher_cache"), (None, [], {}, DataError, "dataset holds no rows"),
        (None, data(["one"]), {}, DataError, "different documents"), (None, "text.txt", {}, ArgumentError, "dataset is a str"), (None, {"train": data()}, {}, DataError, "row 0 is no row but str"),
        (None, [{"text": "a"}, {"text": 3}], {}, DataError, "dataset row 1: text is no text but int"), (None, data(), {"eval_dataset": data()}, DataError, "none is left"),
        (None, data(), {"output_dir": tmp_path / "full"}, StorageError, "not an empty folder"), (None, data(), {"tokens": 0}, ArgumentError, "tokens=0"),
        (None, data(), {"tokens": 100, "max_steps": 3}, ArgumentError, "give one of them"), (None, data(), {"max_steps": 1.5}, ArgumentError, "max_steps=1.5 is no whole number"),
        (None, data(), {"learning_rat": 1.0}, ArgumentError, "did you mean learning_rate="), (None, data(), {"lr": 1.0}, ArgumentError, "ChainDistillerConfig; give such as .*learning_rate="), (None, data(), {"path_fraction": 0.3}, ArgumentError, "path_fraction= cannot be set here"),
        (None, data(), {"include_num_input_tokens_seen": False}, ArgumentError, "tokens are counted"),
        (None, data(), {"num_train_epochs": 3}, ArgumentError, "give max_steps, or tokens"), (None, data(), {"heldout": 1.0}, ArgumentError, "heldout=1.0"),
        (None, data(), {"patience": 0}, ArgumentError, "patience=0"), (None, data(), {"kd_weight": 0.0}, ArgumentError, "kd_weight=0 leaves nothing to learn from the larger neighbour"), (None, data(), {"block_size": 300}, ArgumentError, "more than the model's 256 positions"),
        (None, data(), {"optim": "magic"}, ArgumentError, "magic"), (None, data(), {"adam_beta1": 2.0}, ArgumentError, "beta"), (None, data(["a b", "c d", "e f"]), {}, DataError, "does not fill one block"),
        (None, [{"prompt": text} for text in TEXTS], {}, DataError, "a prompt and no answer"), (None, [*({"text": text} for text in TEXTS), {"prompt": "a", "completion": "b"}], {}, DataError, "row 120 has prompts with answers, and .* text"),
        (None, [{"input_ids": [5, tiny.VOCAB]}], {}, DataError, "row 0: input_ids holds 260, and the model's vocabulary has 260 tokens"), (None, [{"input_ids": [[5]]}], {}, DataError, "no list of token ids"),
        (None, [{"input_ids": [5, 6], "labels": [-100, -1]}], {}, DataError, "labels holds -1"), (None, [{"input_ids": ["a"]}], {}, DataError, "input_ids cannot be read"),
    ]
    for model, dataset, options, kind, said in wrong:
        base = {name: value for name, value in OPTIONS.items() if name != "max_steps" or "tokens" not in options}
        with pytest.raises(kind, match=said):
            heal(between(chain) if model is None else model, chain, dataset, **{**base, **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "other"]


@pytest.mark.parametrize(("config", "said"), [
    ({"target_modules": ["lm_head"]}, "output head"), ({"target_modules": r".*(q_proj|embed_tokens)"}, r"changes model.embed_tokens \(target_modules\), whose weights the output head shares"),
    ({"modules_to_save": ["embed_tokens"]}, r"changes model.embed_tokens \(modules_to_save\)"), ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_modules": ["nowhere"]}, "peft refuses peft_config: .*nowhere"), ({"target_modules": ["q_proj", "mlp"]}, "peft refuses peft_config: .*LlamaMLP"), (None, "peft_config is a dict; give a config of peft"),
    ({"r": 2}, "nothing"),
], ids=["head", "embedding", "saved", "tokens", "absent", "block", "dict", "killed"])
def test_a_refused_adapter_leaves_nothing_in_the_model(chain, monkeypatch, config, said):
    """Whatever ends a heal, the model that came has its own modules, and trains what it trained; peft's config is as it was."""
    model, before = between(chain), between(chain)
    modules = dict(model.named_modules())
    given = {"r": 4} if config is None else lora(**config)
    asked = str(given)
    if said == "nothing":
        tiny.killed_in_training(monkeypatch, 1)
    with pytest.raises(tiny.Killed if said == "nothing" else ArgumentError, match=None if said == "nothing" else said) as caught:
        heal(model, chain, data(), peft_config=given, **OPTIONS)
    assert "\n" not in str(caught.value)
    assert str(given) == asked
    assert dict(model.named_modules()) == modules
    assert tiny.same(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache
    assert not hasattr(model, "peft_config")


def test_a_run_with_an_adapter_is_known_again_by_another_process(chain, tmp_path, monkeypatch):
    """Sets have another order in each process: what was asked is written down in one."""
    names = ["v_proj", "q_proj", "o_proj", "k_proj"]
    tiny.killed_in_training(monkeypatch, 1)
    with pytest.raises(tiny.Killed):
        heal(between(chain), chain, data(), output_dir=tmp_path / "out", peft_config=lora(target_modules=names), **OPTIONS)
    asked = json.loads((tmp_path / ".out.work" / "asked.json").read_text())["asked"]
    assert json.loads(asked["peft_config"])["target_modules"] == sorted(names)


def test_rows_of_tensors_are_read(chain):
    rows = Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]]} for text in TEXTS for ids in [tiny.tokenizer()(text).input_ids[:32]]])
    plain, tensors = divided(rows, None, 0.1, 0), divided(rows.with_format("torch"), None, 0.1, 0)
    assert plain == tensors
    assert documents_of(tensors[1], tiny.tokenizer(), 32, 8192).tokens > 100


def test_tokens_are_steps(chain):
    options = {name: value for name, value in OPTIONS.items() if name not in ("max_steps", "eval_steps")}
    record = heal(between(chain), chain, data(), tokens=4 * 32 * 7 + 1, gradient_accumulation_steps=2, patience=None, **options).config.cbd["healed"]
    assert record["steps"] == 4
    assert record["tokens"] == 4 * 2 * 4 * 32


def test_a_copy_of_the_chain_will_do_and_its_anchors_must_be_there(chain, tmp_path):
    model = between(chain)
    model.config.cbd = {**model.config.cbd, "chain": "org/chain", "revision": "0" * 40}
    assert heal(model, chain, data(), **OPTIONS).config.cbd["chain"] == "org/chain"
    made = {**between(chain).config.cbd, "chain": "mine"}
    model.config.cbd = made
    assert heal(model, chain, data(), **OPTIONS).config.cbd["chain"] == "mine", "its anchors are the same, whatever it is called"
    for other in ({name: value for name, value in made.items() if name != "fingerprints"}, {**made, "fingerprints": made["fingerprints"][::-1]}):
        model.config.cbd = other
        with pytest.raises(ArgumentError, match="made from mine"):
            heal(model, chain, data(), **OPTIONS)


def heal_twice(folder, chain, processes):
    """Whole and by LoRA, both saved."""
    options = {
        **OPTIONS, "per_device_train_batch_size": 4 // processes, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    for name, config in (("full", None), ("lora", lora(init_lora_weights=False))):
        model = heal(between(chain), chain, data(), output_dir=folder / name, peft_config=config, **options)
        assert model.config.cbd["healed"]["difference"] < 0


def test_two_processes_are_one(chain, tmp_path):
    for processes in (1, 2):
        launched(processes, heal_twice, tmp_path / str(processes), chain, processes)
    for name in ("full", "lora"):
        alone, together = (AutoModelForCausalLM.from_pretrained(tmp_path / folder / name) for folder in "12")
        for key, tensor in alone.named_parameters():
            torch.testing.assert_close(tensor, together.get_parameter(key), rtol=1e-4, atol=1e-6, msg=key)
        one, two = (model.config.cbd["healed"] for model in (alone, together))
        assert (one["steps"], one["tokens"]) == (two["steps"], two["tokens"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["difference"] < 0


def test_cards_tell_of_the_heal(hub, chain, tmp_path):
    from huggingface_hub import ModelCard

    Chain.from_pretrained(chain).push_to_hub("org/tiny")
    anchors = [f"org/tiny-{anchor.name}" for anchor in Chain.from_pretrained(chain).anchors[::-1]]
    whole = heal(between("org/tiny"), "org/tiny", data(), output_dir=tmp_path / "whole", **OPTIONS)
    heal(between("org/tiny"), "org/tiny", data(), output_dir=tmp_path / "adapter", peft_config=lora(), merge=False, **OPTIONS)
    cards = {}
    for name in ("whole", "adapter"):
        push_model(tmp_path / name, f"org/{name}")
        files = hub.repos[f"org/{name}"].at("main")[1]
        cards[name] = ModelCard(files["README.md"].decode())
        assert ("adapter_model.safetensors" in files, "model.safetensors" in files) == (name == "adapter", name == "whole")
    data_of = {name: card.data for name, card in cards.items()}
    assert (data_of["whole"].base_model, data_of["whole"].base_model_relation, data_of["whole"].library_name) == (anchors, "finetune", "transformers")
    assert {"merge", "distillation", "cbd-chain:org/tiny"} <= {*data_of["whole"].tags}
    assert (data_of["adapter"].base_model, data_of["adapter"].base_model_relation, data_of["adapter"].library_name) == (["org/tiny"], "adapter", "peft")
    record = whole.config.cbd["healed"]
    text = cards["whole"].text
    assert "without training" not in text.partition("```")[0]
    for value in (f"{record['loss']:.3f} ± {record['stderr']:.3f}", f"{record['loss_before']:.3f}", f"{record['difference']:+.3f}", f"anchor {record['teacher']}", "768 tokens"):
        assert value in text
    call = cards["adapter"].text.partition("PeftModel.from_pretrained(")[2].partition(', "org/adapter")')[0]
    assert tiny.same(eval(call, {"CBDModel": CBDModel}), between(chain))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["cbd"]["healed"]["loss"] = "good"
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="refused at cbd.healed.loss"):
        push_model(tmp_path / "whole", "org/whole")
    plain = interpolant_card("org/x", 10, chain=None, anchors=[], license=None, facts={})
    assert "made without training from a local chain" in plain
    assert "## The heal" not in plain


def test_the_command(cbd, chain, tmp_path, monkeypatch):
    heal = functools.partial(cbd, "heal")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "empty.txt").touch()
    size = ["--size", middle(chain)]
    text = ["--text", tmp_path / "text.txt", "--batch-size", 4, "--block-size", 32, "--heldout", 0.1, "--learning-rate", 3e-3]
    code, printed, said = heal(chain, *size, *text, "--steps", 4, "--out", tmp_path / "out")
    assert code == 0, said
    record = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.cbd["healed"]
    assert f"{record['loss']:.3f}" in printed
    assert f"{record['difference']:+.3f}" in printed
    code, printed, said = heal(chain, *size, *text, "--tokens", 256, "--lora", 2, "--no-merge", "--out", tmp_path / "adapter", "--json")
    assert code == 0, said
    assert json.loads(printed)["healed"]["by"] == "lora, rank 2"
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert "holds an adapter alone; make the size with it by cbd make" in cbd("generate", tmp_path / "adapter", "a")[2]
    for arguments, expected, message in (
        ([*size], 2, "neither --text nor --cache"), ([*size, "--text", tmp_path / "empty.txt"], 1, "holds no text"), ([*size, "--text", tmp_path / "none.txt"], 1, "no file matches"),
        (["--size", "max", *text], 1, "is the anchor"), (["--size", "9B", *text], 1, "outside the chain"), (text, 2, "neither size nor shape"), ([*size, *text, "--no-merge"], 2, "no --lora was given"),
        ([*size, *text, "--out", tmp_path / "out"], 1, "not an empty folder"), ([*size, *text, "--cache", tmp_path], 1, "is no teacher cache"),
        ([*size, *text, "--steps", 3, "--tokens", 5], 2, "give one of them"), ([*size, *text, "--heldout", 2], 2, "heldout=2.0"), ([*size, *text, "--learning-rate", "nan"], 2, "learning_rate=nan teaches nothing"),
    ):
        code, _, said = heal(chain, *arguments, *([] if "--out" in arguments else ["--out", tmp_path / "new"]))
        assert (code, said.count("\n")) == (expected, 1), said
        assert message in said
        assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty.txt", "out", "text.txt"]


def test_a_killed_heal_does_not_go_on_with_another_cache(chain, tmp_path, monkeypatch):
    opened = Chain.from_pretrained(chain)
    teacher, tokenizer = opened.model("max"), opened.tokenizer()
    caches = [write_cache(teacher, [{"text": text} for text in TEXTS[start:]], tmp_path / str(start), tokenizer=tokenizer, block_size=32, top_k=8) for start in (20, 30)]
    options = {name: value for name, value in OPTIONS.items() if name != "block_size"}
    with monkeypatch.context() as patch:
        tiny.killed_in_training(patch, 4)
        with pytest.raises(tiny.Killed):
            heal(between(chain), chain, caches[0], eval_dataset=data(TEXTS[:20]), output_dir=tmp_path / "out", **options)
    with pytest.raises(StorageError, match="unfinished run with cache="):
        heal(between(chain), chain, caches[1], eval_dataset=data(TEXTS[:20]), output_dir=tmp_path / "out", **options)
    heal(between(chain), chain, caches[0], eval_dataset=data(TEXTS[:20]), output_dir=tmp_path / "out", **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_a_mask_names_is_not_measured(side):
    """Held-out documents of padded rows are those of the rows without padding."""
    rows = [tiny.tokenizer()(text).input_ids[: 8 + place] for place, text in enumerate(TEXTS[:6])]
    made = []
    for row in rows:
        ids, mask = ([fill] * (20 - len(row)) + part if side == "left" else part + [fill] * (20 - len(row)) for fill, part in ((0, row), (0, [1] * len(row))))
        made.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": None})
    _, held = divided(None, made, 0.1, 0)
    padded, plain = documents_of(held, tiny.tokenizer(), 32, 8192), documents_of([{"input_ids": row} for row in rows], tiny.tokenizer(), 32, 8192)
    assert padded.tokens == plain.tokens == sum(len(row) - 1 for row in rows)
    model = ModelRunner(tiny.llama())
    assert document_losses(model, padded).nats == pytest.approx(document_losses(model, plain).nats)
    with pytest.raises(DataError, match="attention_mask has the shape"):
        divided(None, [{"input_ids": [5, 6], "attention_mask": [1]}], 0.1, 0)
