"""Where the student's tokens come from: sampling, on-policy steps, MiniLLM's rollout batches, the teacher's answers."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
import torch
from conftest import ONE_FAMILY, recipe
from datasets import Dataset, IterableDataset, load_dataset
from test_distill import rows, trainer_for, weights

from cbd_hub import ChainDistiller, ChainDistillerConfig, Recipe, distill_chain
from cbd_hub.configs import read_config
from cbd_hub.distill import answers, on_policy
from cbd_hub.distill.answers import teacher_answers
from cbd_hub.distill.on_policy import endless
from cbd_hub.distill.packing import collate, packed_dataset
from cbd_hub.distill.rollouts import (
    Prompt,
    Sampling,
    batch_prompts,
    end_tokens,
    generate,
    prompts_of,
    rollout_tensors,
    rollouts_from,
)
from cbd_hub.distill.stages import plan_stages
from cbd_hub.errors import ArgumentError, DataError, RecipeError, StorageError
from cbd_hub.losses.divergence import reverse_kl


ENDS = list(range(4, 60))  # so many that responses differ in length
PLAIN = Sampling(ENDS)


def prompts(count=6, room=9, seed=0):
    draw = np.random.default_rng(seed)
    return [Prompt(draw.integers(4, tiny.VOCAB, size=draw.integers(1, 14)).tolist(), room) for _ in range(count)]


def keys(count=6):
    return [f"key {index}" for index in range(count)]


def plain_log_probs(model, rollout):
    """Log-probability of each response token by a forward pass of the row alone, without padding or cache."""
    with torch.no_grad():
        logits = model(torch.tensor([rollout.row["input_ids"]])).logits[0].double()
    return logits[len(rollout.prompt) - 1 : -1].log_softmax(-1)


def pair(family):
    return tiny.FAMILIES[family](layers=2, seed=3), tiny.FAMILIES[family]()


# -- sampling ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_kept_log_probs_are_those_of_plain_forward_passes(family, share):
    """Padding, caches and rows that leave the batch change nothing, for both models and their mixture."""
    student, teacher = pair(family)
    for rollout in generate(student, prompts(), keys(), Sampling(ENDS, teacher_mix=share, batch_size=4), teacher=teacher):
        place = torch.tensor(rollout.response)[:, None]
        q, p = (plain_log_probs(model, rollout).gather(1, place).squeeze(1) for model in (student, teacher))
        for got, want in ((rollout.student, q), (rollout.teacher, p), (rollout.sampled, (share * p.exp() + (1 - share) * q.exp()).log())):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_temperature_is_of_the_draw_and_not_of_what_the_models_say(family):
    student, teacher = pair(family)
    for rollout in generate(student, prompts(), keys(), Sampling(ENDS, teacher_mix=0.3, temperature=0.5), teacher=teacher):
        place = torch.tensor(rollout.response)[:, None]
        q, p = (plain_log_probs(model, rollout) for model in (student, teacher))
        torch.testing.assert_close(rollout.student.double(), q.gather(1, place).squeeze(1), rtol=1e-4, atol=1e-5)
        drawn = 0.3 * (2 * p).softmax(-1) + 0.7 * (2 * q).softmax(-1)
        torch.testing.assert_close(rollout.sampled.double(), drawn.log().gather(1, place).squeeze(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_tokens_follow_the_distribution(share):
    """Chi-square of 4,000 first tokens against the exact mixture."""
    student, teacher = pair("llama")
    prompt, count = Prompt([7, 9, 30], 1), 4000
    drawn = generate(student, [prompt] * count, keys(count), Sampling([2], teacher_mix=share, batch_size=1000), teacher=teacher)
    with torch.no_grad():
        q, p = (model(torch.tensor([prompt.ids])).logits[0, -1].double().softmax(-1) for model in (student, teacher))
    expected = (share * p + (1 - share) * q) * count
    seen = torch.bincount(torch.tensor([rollout.response[0] for rollout in drawn]), minlength=tiny.VOCAB)
    rare = expected < 5
    observed, wanted = (torch.cat([values[~rare].double(), values[rare].sum()[None].double()]) for values in (seen, expected))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    square = ((observed - wanted).square() / wanted).sum()
    chance = torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2.0).double(), square / 2)
    assert len(wanted) > 20
    assert chance > 1e-3


def test_draws_depend_on_the_key_alone(family):
    """Neither order, batch size, neighbours nor torch's generator decide a row's tokens."""
    student, _ = pair(family)
    asked, names = prompts(8), keys(8)
    first = generate(student, asked, names, PLAIN)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    other = generate(student, asked[::-1], names[::-1], Sampling(ENDS, batch_size=3))[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [rollout.response for rollout in first] == [rollout.response for rollout in other]
    again = generate(student, asked, [f"other {name}" for name in names], PLAIN)
    assert [rollout.response for rollout in first] != [rollout.response for rollout in again]


def test_responses_end_at_an_end_token_or_when_their_room_is_full(family):
    student, _ = pair(family)
    drawn = generate(student, prompts(12, room=5), keys(12), Sampling(ENDS, batch_size=5))
    assert {len(rollout.response) for rollout in drawn} > {1, 5}
    for prompt, rollout in zip(prompts(12, room=5), drawn):
        assert rollout.prompt == prompt.ids
        assert not set(rollout.response[:-1]) & set(ENDS)
        assert rollout.response[-1] in ENDS or len(rollout.response) == 5
        assert len(rollout.sampled) == len(rollout.student) == len(rollout.response)


def test_the_likeliest_token_at_temperature_0(family):
    student, _ = pair(family)
    for rollout in generate(student, prompts(), keys(), Sampling([2], temperature=0.0)):
        assert rollout.response == plain_log_probs(student, rollout).argmax(-1).tolist()


def test_modes_and_gradients_are_left_as_they_were(family):
    student, teacher = pair(family)
    student.train()
    generate(student, prompts(), keys(), PLAIN, teacher=teacher)
    assert student.training
    assert not teacher.training
    assert torch.is_grad_enabled()


def test_padded_rows_of_the_vocabulary_are_never_drawn():
    student, teacher = pair("llama")
    teacher.resize_token_embeddings(300)
    with torch.no_grad():
        teacher.lm_head.weight[260:] = 100 * teacher.lm_head.weight[5]
    drawn = generate(student, prompts(), keys(), Sampling([2], teacher_mix=0.9, vocab_size=260), teacher=teacher)
    assert max(max(rollout.response) for rollout in drawn) < 260


def test_room_is_that_of_the_positions(family):
    student, _ = pair(family)
    (rollout,) = generate(student, [Prompt([5] * 250, 100)], ["a"], Sampling([]))
    assert len(rollout.response) == 6
    with pytest.raises(DataError, match="256 tokens leaves room for 0 more of 256 positions"):
        generate(student, [Prompt([5] * 256, 100)], ["a"], PLAIN)
    with pytest.raises(DataError, match="0 tokens"):
        generate(student, [Prompt([], 100)], ["a"], PLAIN)


def test_wrong_sampling_is_named():
    student, teacher = pair("llama")
    with pytest.raises(ArgumentError, match=r"teacher_mix=1.5 is outside 0 to 1"):
        generate(student, prompts(), keys(), Sampling([2], teacher_mix=1.5), teacher=teacher)
    with pytest.raises(ArgumentError, match="no teacher was given"):
        generate(student, prompts(), keys(), Sampling([2], teacher_mix=0.5))
    with pytest.raises(ArgumentError, match=r"temperature=-1"):
        generate(student, prompts(), keys(), Sampling([2], temperature=-1.0))


def test_end_tokens_are_of_tokenizer_and_models():
    model = tiny.llama()
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(tiny.tokenizer(), model) == [2, 7, 9]
    assert end_tokens(None, object()) == []


def test_rollouts_survive_being_tensors():
    student, teacher = pair("llama")
    drawn = generate(student, prompts(), keys(), PLAIN, teacher=teacher)
    for one, other in zip(drawn, rollouts_from(rollout_tensors(drawn))):
        assert (one.prompt, one.response) == (other.prompt, other.response)
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("sampled", "student", "teacher"))


# -- prompts -----------------------------------------------------------------------------------------------------------------


CHAT = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def text_of(tokens):
    return tiny.tokenizer().decode(tokens)


def test_prompts_of_packed_pairs_and_chats():
    """Each row of a block is asked for itself, a chat up to its last answer."""
    pairs = packed_dataset([{"prompt": f"ask {index}", "completion": "yes"} for index in range(5)], tiny.tokenizer(), 32)
    found = [prompt for block in pairs for prompt in prompts_of(block, 9, 0.5)]
    assert [text_of(prompt.ids) for prompt in found] == [f"ask {index}" for index in range(5)]
    assert {prompt.room for prompt in found} == {9}
    assert [prompt for block in pairs.with_format("torch") for prompt in prompts_of(block, 9, 0.5)] == found
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    turns = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    (block,) = packed_dataset([{"messages": turns}], tokenizer, 128)
    (prompt,) = prompts_of(block, 9, 0.5)
    assert text_of(prompt.ids) == "<user>a\n<assistant>b\n<user>c\n<assistant>"


def test_prompts_of_text_are_its_first_part():
    ids = list(range(10, 30))
    assert prompts_of({"input_ids": ids}, 512, 0.25) == [Prompt(ids[:5], 15)]
    assert prompts_of({"input_ids": ids}, 7, 0.25) == [Prompt(ids[:5], 7)]
    assert prompts_of({"input_ids": ids[:2]}, 7, 0.01) == [Prompt(ids[:1], 1)]
    assert prompts_of({"input_ids": ids[:1]}, 7, 0.5) == []


def test_prompts_of_a_batch_are_those_of_its_rows():
    """Padding of either kind, and the row of padding that packed blocks end with, are no prompts."""
    block = next(iter(packed_dataset([{"prompt": "ask", "completion": "yes"}, {"prompt": "more", "completion": "no"}], tiny.tokenizer(), 32)))
    longer = {"input_ids": list(range(4, 40)), "labels": [-100] * 20 + list(range(24, 40)), "position_ids": list(range(36))}
    plain = [{"input_ids": list(range(10, 20))}, {"input_ids": list(range(10, 14))}]
    for members in ([block, longer], plain):
        assert batch_prompts(collate(members), 9, 0.5) == [prompts_of(row, 9, 0.5) for row in members]


# -- on-policy steps ---------------------------------------------------------------------------------------------------------


def text_rows(count=16, length=14, seed=1):
    draw = np.random.default_rng(seed)
    return Dataset.from_list([{"input_ids": draw.integers(4, tiny.VOCAB, size=length).tolist()} for _ in range(count)])


def pairs(count=24, seed=0):
    """Rows of a prompt and a completion, as token ids of unequal length."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        asked, said = (draw.integers(4, tiny.VOCAB, size=draw.integers(2, 9)).tolist() for _ in range(2))
        made.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
    return Dataset.from_list(made)


def batches_of(trainer, count=1, step=0):
    trainer.state.global_step = step
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), count, trainer.args.device)


def test_the_batch_has_the_students_completions_and_their_count(family, tmp_path):
    """The prompts stay, the labels are the student's tokens, and the denominator is theirs."""
    trainer = sampler_for(family, tmp_path, on_policy_fraction=1.0, max_new_tokens=6, per_device_train_batch_size=4)
    plain, before = batches_of(sampler_for(family, tmp_path, per_device_train_batch_size=4), 2)
    own, items = batches_of(trainer, 2)
    assert int(before) == sum(int((batch["labels"] != -100).sum()) for batch in plain)
    assert int(items) == sum(int((batch["labels"] != -100).sum()) for batch in own)
    assert len({int((labels != -100).sum()) for batch in own for labels in batch["labels"]}) > 2
    for before, after in zip(plain, own):
        for asked, row, labels, mask in zip(batch_prompts(before, 6, 0.5), after["input_ids"], after["labels"], after["attention_mask"]):
            kept = labels[labels != -100]
            assert row[: len(asked[0].ids)].tolist() == asked[0].ids
            assert (labels[: len(asked[0].ids)] == -100).all()
            assert row[mask.bool()].tolist() == [*asked[0].ids, *kept.tolist()]
            assert 1 <= len(kept) <= 6


def test_the_loss_of_a_step_is_the_divergence_on_its_own_tokens(family, tmp_path):
    """Without cross-entropy: its gradient on a model's own samples is noise around 0."""
    trainer = sampler_for(family, tmp_path, on_policy_fraction=1.0, max_new_tokens=6, divergence="reverse_kl", ce_weight=0.7)
    (batch,), items = batches_of(trainer)
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    logits = [model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double() for model in (trainer.model, trainer.teacher)]
    torch.testing.assert_close(value.double(), reverse_kl(*logits, batch["labels"][:, 1:] != -100), rtol=1e-4, atol=1e-6)


def test_the_share_of_steps_is_drawn_from_seed_and_step(tmp_path):
    trainer = sampler_for("llama", tmp_path, on_policy_fraction=0.3, max_new_tokens=2, per_device_train_batch_size=2)
    kinds = ["own" in batches_of(trainer, 1, step)[0][0] for step in range(60)]
    assert 8 <= sum(kinds) <= 28
    assert kinds == ["own" in batches_of(trainer, 1, step)[0][0] for step in range(60)]


MINILLM = {"objective": "minillm", "rollout_batch": 16, "inner_epochs": 2, "max_new_tokens": 6}
MODES = {"on_policy": {"on_policy_fraction": 0.6, "max_new_tokens": 6}, "minillm": MINILLM, "minillm_text": {**MINILLM, "text_weight": 0.5}}


def sampler_for(family, folder, dataset=None, **options):
    student, teacher = pair(family)
    student.generation_config.eos_token_id = ENDS
    arguments = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, **options,
    }
    return ChainDistiller(
        model=student, teacher=teacher, args=ChainDistillerConfig(**arguments), train_dataset=dataset or pairs(),
        processing_class=tiny.tokenizer(), text_dataset=text_rows() if options.get("text_weight") else None,
    )


@ONE_FAMILY
@pytest.mark.parametrize("mode", sorted(MODES))
def test_eight_by_one_is_one_by_eight(family, tmp_path, mode):
    """Accumulating eight batches of one row draws the same tokens and makes the same update as one batch of eight."""
    whole = sampler_for(family, tmp_path / "a", **MODES[mode])
    pieces = sampler_for(family, tmp_path / "b", **MODES[mode], per_device_train_batch_size=1, gradient_accumulation_steps=8)
    whole.train()
    pieces.train()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(pieces)[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)


def resumed(family, folder, stop, **options):
    options = {"max_steps": 7, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, **options}
    # killed at the end of the step after, before that one's checkpoint
    return weights(tiny.stopped_and_resumed(lambda: sampler_for(family, folder, **options), folder, stop and stop + 1))


@ONE_FAMILY
@pytest.mark.parametrize(("mode", "stop"), [("on_policy", 3), ("minillm", 3), ("minillm", 4), ("minillm_text", 5)])
def test_killed_and_resumed_equals_never_stopped(family, tmp_path, mode, stop):
    """Also in the middle of an inner epoch (3, 5) and between two rollout batches (4): bit for bit, metrics too."""
    whole, again = (resumed(family, tmp_path / name, at, **MODES[mode]) for name, at in (("a", 0), ("b", stop)))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in "ab")
    assert first == second


def test_a_checkpoint_without_its_rollouts_is_refused(tmp_path):
    resumed("llama", tmp_path, 3, **MINILLM)
    last = tmp_path / "checkpoint-7"
    (last / "rollouts.safetensors").unlink()
    with pytest.raises(StorageError, match="no rollouts.safetensors was found for step 7"):
        sampler_for("llama", tmp_path, **MINILLM, max_steps=9).train(resume_from_checkpoint=str(last))


# -- MiniLLM -----------------------------------------------------------------------------------------------------------------


def test_every_response_is_used_once_an_inner_epoch(tmp_path):
    """4 steps of 4 make an epoch of 16 responses; the order is another in each, and the next rollout batch has other prompts."""
    trainer = sampler_for("llama", tmp_path, **{**MINILLM, "inner_epochs": 3}, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    steps = [[row for batch in batches_of(trainer, 2, step)[0] for row in map(tuple, batch["input_ids"].tolist())] for step in range(13)]
    epochs = [sum(steps[start : start + 4], []) for start in (0, 4, 8)]
    stripped = [sorted(tuple(token for token in row if token) for row in epoch) for epoch in epochs]
    assert stripped[0] == stripped[1] == stripped[2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert trainer._rollouts[0] == 1


def test_the_loss_of_a_step_is_equation_7_by_loops(family, tmp_path):
    """After the student has moved: single-step reverse KL and clipped ratio, on the probabilities kept when the tokens were drawn."""
    trainer = sampler_for(family, tmp_path, **MINILLM)
    batches_of(trainer, 1, 0)
    rollouts = trainer._rollouts[1]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    (batch,), items = batches_of(trainer, 1, 1)
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    by_row = {tuple(rollout.row["input_ids"]): rollout for rollout in rollouts}
    total, count, clipped = 0.0, 0, 0
    for row, mask in zip(batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))):
        rollout = by_row[tuple(row[mask.bool()].tolist())]
        q, p = (plain_log_probs(model, rollout) for model in (trainer.model, trainer.teacher))
        rewards = [float(b - a) for a, b in zip(rollout.student, rollout.teacher)]
        for t, token in enumerate(rollout.response):
            later = rewards[t + 1 :]
            advantage = sum(later) / len(later) if later else 0.0
            ratio = math.exp(q[t, token] - rollout.sampled[t])
            total += float((q[t].exp() * (q[t] - p[t])).sum()) - min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            clipped += not 0.8 < ratio < 1.2
            count += 1
    assert count == int(items)
    assert clipped
    assert value.item() == pytest.approx(total / count, rel=1e-3)


def test_prompts_are_whole_whatever_the_block_size(tmp_path):
    """Also without completions: pairs and chats are asked as they are, not as a training block would cut them."""
    asked = [f"a question much longer than a block, number {index}" for index in range(16)]
    trainer = sampler_for("llama", tmp_path, Dataset.from_dict({"prompt": asked}), **MINILLM, block_size=16)
    assert [text_of(prompt.ids) for prompt in trainer._prompts] == asked
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in asked])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    rows_of = on_policy.unpacked(chats, tokenizer, trainer.args)
    assert [text_of(prompt.ids) for row in rows_of for prompt in prompts_of(row, 4, 0.5)] == [f"<user>{text}\n<assistant>" for text in asked]
    answered = sampler_for("llama", tmp_path / "b", Dataset.from_dict({"prompt": asked}), teacher_answers=True, max_new_tokens=3, max_steps=1)
    answered.train()
    assert sorted(answered.train_dataset["prompt"]) == sorted(asked)


@pytest.mark.parametrize("options", [MINILLM, {"teacher_answers": True}])
def test_answers_end_where_either_model_has_no_position_left(family, tmp_path, caplog, options):
    """Also those of a teacher with more positions than the student; prompts that fill them all are left out, before training, and the log says both."""
    student, teacher = tiny.FAMILIES[family](layers=2, seed=3), tiny.FAMILIES[family](**{"n_positions" if family == "gpt2" else "max_position_embeddings": 512})
    asked = [{"input_ids": [5 + index] * length, "labels": [-100] * (length - 1) + [7]} for index, length in enumerate([250] * 15 + [300, 10])]
    config = ChainDistillerConfig(
        str(tmp_path), max_steps=1, bf16=False, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=16, **{**options, "max_new_tokens": 20},
    )
    trainer = ChainDistiller(model=student, teacher=teacher, args=config, train_dataset=Dataset.from_list(asked), processing_class=tiny.tokenizer())
    trainer.train()
    said = [rollout.row for rollout in trainer._rollouts[1]] if trainer._rollouts else list(trainer.train_dataset)
    assert len(said) == 16
    assert max(len(row["input_ids"]) for row in said) == 256
    assert max(sum(label != -100 for label in row["labels"]) for row in said) == 20
    assert "1 of 17 prompts fill the models' 256 positions and are left out" in caplog.text
    assert "behind 15 of 17 prompts the models' 256 positions leave less room than max_new_tokens" in caplog.text
    full = Dataset.from_list([{"input_ids": [5] * 300, "labels": [-100] * 299 + [7]}] * 16)
    with pytest.raises(DataError, match="every prompt fills the models' 256 positions"):
        ChainDistiller(model=student, teacher=teacher, args=dataclasses.replace(config, output_dir=str(tmp_path / "b")), train_dataset=full, processing_class=tiny.tokenizer()).train()


def test_text_has_a_cross_entropy_and_a_count_of_its_own(tmp_path):
    trainer = sampler_for("llama", tmp_path, **MODES["minillm_text"], per_device_train_batch_size=4, gradient_accumulation_steps=2)
    batches, items = batches_of(trainer, 2)
    assert int(batches[0]["text"]["items"]) == 8 * 13
    trainer.model.train()
    with_text = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items) for batch in batches)
    without = sum(trainer.compute_loss(trainer.model, {k: v for k, v in batch.items() if k != "text"}, num_items_in_batch=items) for batch in batches)
    losses = [trainer.model(batch["text"]["input_ids"], labels=batch["text"]["labels"]).loss for batch in batches]
    torch.testing.assert_close(with_text - without, 0.5 * sum(losses) / 2, rtol=1e-3, atol=1e-5)


def test_minillm_lowers_the_reverse_kl(tmp_path):
    """On its own fresh samples, exactly over the vocabulary; and the metrics say so."""
    trainer = sampler_for(
        "llama", tmp_path, pairs(64), objective="minillm", rollout_batch=64, inner_epochs=4, max_new_tokens=8, max_steps=48, per_device_train_batch_size=16,
        optim="adamw_torch", learning_rate=3e-3,
    )

    def measure():
        drawn = generate(trainer.model, prompts(64, 8, seed=5), keys(64), Sampling([2]))
        values = []
        for rollout in drawn:
            q, p = (plain_log_probs(model, rollout) for model in (trainer.model, trainer.teacher))
            values.append((q.exp() * (q - p)).sum(-1))
        return float(torch.cat(values).mean())

    before = measure()
    trainer.train()
    assert measure() < 0.8 * before
    logged = [entry["rollout_reverse_kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < 0.85 * logged[0]


@pytest.mark.parametrize("normalised", [True, False])
def test_dense_logits_are_never_formed(tmp_path, monkeypatch, normalised):
    """No tensor of the loss has more elements than a block: with blocks of 4 rows the largest has 4 x V."""
    monkeypatch.setattr("cbd_hub.losses.head.block_rows", lambda *_: 4)
    monkeypatch.setattr("cbd_hub.losses.log_probs.block_rows", lambda *_: 4)
    trainer = sampler_for("llama", tmp_path, **{**MINILLM, "max_new_tokens": 24}, length_normalised=normalised, per_device_train_batch_size=16)
    (batch,), items = batches_of(trainer)

    watch = tiny.Widest()
    trainer.model.train()
    with watch:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
    assert int(items) > 32
    assert 0 < watch.rows <= 32  # 32 rows of V are the head's own gradient, (V, H) transposed


def test_endless_orders_walk_every_row_before_any_twice():
    order = endless(5, 0, 20, 7)
    assert [sorted(order[start : start + 5]) for start in range(0, 20, 5)] == [list(range(5))] * 4
    assert endless(5, 3, 12, 7) == order[3:12]
    assert endless(5, 0, 20, 8) != order


@pytest.mark.parametrize(("options", "match"), [
    ({"objective": "rl"}, "objective='rl'"), ({"on_policy_fraction": 1.5}, "on_policy_fraction=1.5 is outside 0 to 1"), ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"teacher_mix": 1.0}, "teacher_mix=1.0 is outside"), ({"ratio_clip": 0.0}, "ratio_clip=0.0 is outside"), ({"prompt_share": 1.0}, "prompt_share=1.0"),
    ({"sampling_temperature": -1.0}, "sampling_temperature=-1.0 is negative"), ({"inner_epochs": 1.5}, "inner_epochs=1.5"), ({"text_weight": 1.0}, "belongs to objective=minillm"),
    ({"on_policy_fraction": 0.5, "kd_weight": 0.0, "ce_weight": 1.0}, "needs kd_weight"), ({"objective": "minillm", "ce_weight": 0.5}, "ce_weight=0.5 does not go"),
    ({"objective": "minillm", "divergence": "skew_kl"}, "divergence=skew_kl does not go"), ({"objective": "minillm", "sampling_temperature": 0.0}, "no importance weights"),
    ({"objective": "minillm", "path_fraction": 0.5}, "path_fraction=0.5 does not go"), ({"objective": "minillm", "teacher_answers": True}, "teacher_answers=True does not go"),
])
def test_arguments_outside_their_range_are_refused(options, match, tmp_path):
    with pytest.raises(ArgumentError, match=match):
        ChainDistillerConfig(str(tmp_path), **options)


def test_data_that_cannot_be_sampled_from_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="rollout_batch=16 is no multiple of the 5 responses"):
        sampler_for("llama", tmp_path, **MINILLM, per_device_train_batch_size=5)
    stream = IterableDataset.from_generator(lambda: iter([{"input_ids": [4, 5, 6]}]))
    with pytest.raises(DataError, match="a stream has no length"):
        sampler_for("llama", tmp_path, stream, **MINILLM)
    with pytest.raises(DataError, match="no prompt"):
        sampler_for("llama", tmp_path, Dataset.from_list([{"input_ids": [4]}]), **MINILLM)
    with pytest.raises(ArgumentError, match="text_dataset is missing"):
        ChainDistiller(
            model=tiny.llama(), teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path), **MODES["minillm_text"]), train_dataset=pairs(),
        )


# -- the teacher's answers ---------------------------------------------------------------------------------------------------


def test_answers_are_the_teachers_and_an_ordinary_data_set(family, tmp_path):
    teacher = tiny.FAMILIES[family]()
    made = teacher_answers(teacher, prompts(), tmp_path / "answers", Sampling([2], temperature=0.0), tokenizer=tiny.tokenizer())
    for prompt, row in zip(prompts(), made):
        said = [label for label in row["labels"] if label != -100]
        assert row["input_ids"] == prompt.ids + said
        assert row["labels"] == [-100] * len(prompt.ids) + said
        asked, whole = (tiny.tokenizer().decode(ids, skip_special_tokens=True) for ids in (prompt.ids, row["input_ids"]))
        assert row["completion"] == whole.removeprefix(asked.rstrip("\ufffd")).strip("\ufffd")  # half a character ends with the answer, or is none
        logits = teacher(torch.tensor([row["input_ids"]])).logits[0]
        assert said == logits[len(prompt.ids) - 1 : -1].argmax(-1).tolist()
    read = load_dataset("json", data_files=str(tmp_path / "answers" / "answers-*.jsonl"), split="train")
    assert read["input_ids"] == made["input_ids"]


def test_answers_go_on_where_they_were_and_are_the_same_by_two_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_SHARD", 2)
    teacher = tiny.llama()
    whole = teacher_answers(teacher, prompts(7), tmp_path / "a", PLAIN)
    calls = []
    real = answers.generate
    monkeypatch.setattr(answers, "generate", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
    for rank in (1, 0):  # the second process comes last and reads everything
        if rank:
            with pytest.raises(StorageError, match=r"lacks answers-00000.jsonl"):
                teacher_answers(teacher, prompts(7), tmp_path / "b", PLAIN, process=(rank, 2))
        else:
            shared = teacher_answers(teacher, prompts(7), tmp_path / "b", PLAIN, process=(rank, 2))
    assert calls == [2, 1, 2, 2]
    assert shared["input_ids"] == whole["input_ids"]
    same = teacher_answers(teacher, prompts(1) * 4, tmp_path / "c", PLAIN)
    assert len({str(row["input_ids"]) for row in same}) == 4
    del calls[4:]
    (tmp_path / "b" / "answers-00001.jsonl").unlink()
    assert teacher_answers(teacher, prompts(7), tmp_path / "b", PLAIN)["input_ids"] == whole["input_ids"]
    assert calls == [2, 1, 2, 2, 2]


def test_answers_of_another_kind_are_refused(tmp_path):
    teacher = tiny.llama()
    teacher_answers(teacher, prompts(), tmp_path, PLAIN)
    teacher_answers(teacher, prompts(), tmp_path, Sampling(ENDS, batch_size=1))
    for other in ((tiny.llama(seed=1), prompts(), PLAIN, 0), (teacher, prompts(5), PLAIN, 0), (teacher, prompts(), Sampling(ENDS, temperature=0.5), 0), (teacher, prompts(), PLAIN, 1)):
        with pytest.raises(DataError, match="answers of another teacher"):
            teacher_answers(*other[:2], tmp_path, other[2], seed=other[3])
    with pytest.raises(DataError, match="no prompt to answer"):
        teacher_answers(teacher, [], tmp_path / "b", PLAIN)


def test_the_student_trains_on_the_teachers_answers(tmp_path):
    """Cross-entropy on answers: what the trainer walks is what was answered, once, also after a resume."""
    options = {"teacher_answers": True, "kd_weight": 0.0, "ce_weight": 1.0, "max_new_tokens": 6}
    whole = resumed("llama", tmp_path / "a", 0, **options)
    again = resumed("llama", tmp_path / "b", 4, **options)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    trainer = sampler_for("llama", tmp_path / "a", **options)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "a" / "answers" / "answers-00000.jsonl").read_text().splitlines()]
    assert len(lines) == len(pairs())
    assert trainer.train_dataset["input_ids"] == [line["input_ids"] for line in lines]
    assert trainer.train_dataset["input_ids"] != pairs()["input_ids"]


# -- recipes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [
    {**MINILLM, "rollout_batch": 8, "ratio_clip": 0.2, "teacher_mix": 0.2, "length_normalised": True, "text_weight": 1.0}, {"on_policy_fraction": 0.5, "divergence": "jensen_shannon"},
    {"teacher_answers": True, "kd_weight": 0.0, "ce_weight": 1.0},
])
def test_a_recipe_says_where_the_tokens_come_from(tmp_path, stage):
    chain = distill_chain(recipe(tmp_path, "llama", [{"layers": 2}], stage=stage), tmp_path / "chain")
    metrics = [json.loads(line) for line in next((tmp_path / "chain").rglob("*metrics.jsonl")).read_text().splitlines()]
    assert len(chain.anchors) == 2
    assert ("rollout_reverse_kl" in metrics[-1]) == ("objective" in stage)


def test_the_papers_recipe_can_be_written_down(tmp_path):
    """CBD, B.1: its stage is read as it stands, and a slip in it is named."""
    stage = {
        "objective": "minillm", "rollout_batch": 256, "inner_epochs": 4, "ratio_clip": 0.2, "teacher_mix": 0.2, "max_new_tokens": 512, "length_normalised": True,
        "sampling_temperature": 1.0, "max_steps": 5000, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "learning_rate": 5e-6,
    }
    made = recipe(tmp_path, "gpt2", [{"layers": 2}], stage=stage)
    (planned,) = plan_stages(Recipe.parse(made), tmp_path / "teacher", read_config(tmp_path / "teacher"))
    config = planned.config("out")
    assert (config.rollout_batch, config.inner_epochs, config.teacher_mix, config.divergence, config.max_new_tokens) == (256, 4, 0.2, "reverse_kl", 512)
    made["stage"]["inner_epochs"] = 0
    with pytest.raises(RecipeError, match="inner_epochs=0 must be a whole number"):
        Recipe.parse(made)


def test_a_card_says_where_the_tokens_came_from(tmp_path):
    assert "MiniLLM's, 0.2 of the teacher" in sampler_for("llama", tmp_path, **MINILLM)._card("x")
    assert "the student's own in 60% of the steps" in sampler_for("llama", tmp_path, **MODES["on_policy"])._card("x")
    assert "completions" not in trainer_for("llama", tmp_path, rows())._card("x")


def test_ticks_are_a_pass_over_the_prompts(tmp_path):
    """An epoch of the Trainer is each prompt once, inner epochs counted, whatever the data's length."""
    trainer = sampler_for("llama", tmp_path, **MINILLM, max_steps=-1, num_train_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 4  # 24 prompts: one rollout batch of 16, two passes of two steps
    assert isinstance(trainer.train_dataset, on_policy.Ticks)


def test_padding_on_the_left_parts_plain_text_as_on_the_right():
    """Without labels of its own the token behind padding does not count, and is no prompt by that."""
    ids, rest = list(range(5, 25)), [0] * 12
    sides = {"right": {"input_ids": ids + rest, "attention_mask": [1] * 20 + rest}, "left": {"input_ids": rest + ids, "attention_mask": rest + [1] * 20}}
    found = []
    for row in sides.values():
        batch = collate([row], 0)
        found.append(prompts_of({name: values[0].tolist() for name, values in batch.items()}, 99, 0.5))
    assert found == [[Prompt(ids[:10], 10)]] * 2
