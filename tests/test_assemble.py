"""Chains from ready checkpoints, random ones too: every other feature works on them."""

import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from conftest import ONE_FAMILY
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2Tokenizer, LlamaForSequenceClassification

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub import chain as chain_room
from cbd_hub import links as links_room
from cbd_hub.errors import ArchitectureError, ArgumentError, DataError, StorageError, VocabularyMismatchError, WeightsError
from cbd_hub.files import sha256, staged_folder
from cbd_hub.interpolation import align as align_room


def three(family, folder, shapes=((6, 64), (4, 48), (2, 48))):
    make = tiny.FAMILIES[family]
    return [tiny.save(make(layers=layers, ffn=ffn, seed=index), folder / f"m{index}") for index, (layers, ffn) in enumerate(shapes)]


def test_an_assembled_chain_does_everything(family, tmp_path):
    checkpoints = three(family, tmp_path)
    chain = assemble_chain(checkpoints[::-1], tmp_path / "chain")
    sizes = [anchor.parameters for anchor in chain.anchors]
    assert sizes == sorted(sizes, reverse=True)
    assert {anchor.origin for anchor in chain.anchors} == {"published"}
    assert chain.manifest.teacher is None
    for anchor, source in zip(chain.anchors, checkpoints):
        model, stored = CBDModel.from_chain(tmp_path / "chain", anchor.name), AutoModelForCausalLM.from_pretrained(source)
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.named_parameters())
    # Without a curve auto is patch where only layers differ, else blend; order last block first.
    assert chain.plan(sum(sizes[:2]) // 2).strategy == "blend"
    assert chain.plan(sum(sizes[1:]) // 2).strategy == "patch"
    assert chain.manifest.links[1].order == [2, 1]
    assert chain.manifest.links[0].order == [4, 1]
    for size in range(sizes[-1], sizes[0], (sizes[0] - sizes[-1]) // 7):
        plan = CBDModel.materialize(tmp_path / "chain", size, output_dir=tmp_path / f"made{size}", tolerance=0.2)
        made = AutoModelForCausalLM.from_pretrained(tmp_path / f"made{size}")
        direct = CBDModel.from_chain(tmp_path / "chain", size, tolerance=0.2)
        ids = torch.tensor([[7, 8, 9]])
        assert torch.equal(made(ids).logits, direct(ids).logits)
        assert plan.parameters == sum({id(p): p.numel() for p in made.parameters()}.values())


def test_blend_of_published_anchors_is_eq_3_with_layer_replication(tmp_path):
    """Layers are mapped evenly; a layer the smaller one lacks is averaged with the replicated layer before it."""
    large, small = tiny.llama(layers=3, seed=1), tiny.llama(layers=2, seed=2)
    assemble_chain([tiny.save(large, tmp_path / "l"), tiny.save(small, tmp_path / "s")], tmp_path / "chain", align=False)
    model = CBDModel.from_chain(tmp_path / "chain", shape={"layers": 3}, strategy="blend", alpha=0.25)
    assert model.config.cbd["strategy"] == "anchor"  # three layers are the larger anchor itself
    big = tiny.llama(layers=5, seed=3)
    assemble_chain([tiny.save(big, tmp_path / "b"), tmp_path / "s"], tmp_path / "chain2", align=False)
    model = CBDModel.from_chain(tmp_path / "chain2", shape={"layers": 3}, strategy="blend", alpha=0.25)
    for name, (little, great) in {"0": (0, 0), "1": (0, 3), "2": (1, 4)}.items():
        weight = model.model.layers[int(name)].mlp.up_proj.weight
        expected = 0.25 * small.model.layers[little].mlp.up_proj.weight + 0.75 * big.model.layers[great].mlp.up_proj.weight
        torch.testing.assert_close(weight, expected)


@ONE_FAMILY
def test_with_text_the_segments_are_measured(family, tmp_path, monkeypatch):
    monkeypatch.setattr("cbd_hub.interpolation.align.STEPS", 3)
    chain = assemble_chain(three(family, tmp_path), tmp_path / "chain", calibration=tiny.texts(60))
    for link in chain.manifest.links:
        assert link.curve
        assert {point.dataset for point in link.curve} == {"60 texts"}
        assert link.strategies.blend.road


def test_what_is_fitted_on_one_text_is_measured_on_another(tmp_path, monkeypatch, caplog):
    """Else the curve would promise what the maps know by heart. A text that cannot be parted is told; anchors that are not aligned need no parting."""
    checkpoints, read = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (3, 2)], []
    fit, measure = align_room.fit, links_room.measure_segment
    monkeypatch.setattr(align_room, "fit", lambda small, large, ids, **options: read.append(ids) or fit(small, large, ids, **{**options, "steps": 1}))
    monkeypatch.setattr(links_room, "measure_segment", lambda small, large, kept, documents, *rest, **options: read.append(documents.ids) or measure(small, large, kept, documents, *rest, **options))
    texts = [f"#{number}# {text}" for number, text in enumerate(tiny.texts(60))]
    assemble_chain(checkpoints, tmp_path / "chain", calibration=texts)
    fitted, measured = ({tiny.tokenizer().decode(ids) for ids in part} for part in read)
    fitted, measured = ({number for number in range(60) if any(f"#{number}#" in text for text in part)} for part in (fitted, measured))
    assert not fitted & measured
    assert len(measured) == 30
    for part in (fitted, measured):  # of what alternates, each half has both
        assert 5 < sum(number % 2 for number in part) < len(part) - 5
    assert "cannot be parted" not in caplog.text
    assemble_chain(checkpoints, tmp_path / "plain", align=False, calibration=texts)
    assert len(read.pop()) > 30
    with caplog.at_level(logging.WARNING):
        assemble_chain(checkpoints, tmp_path / "short", calibration=[" ".join(tiny.texts(30))])
    assert "text (texts: 1) cannot be parted: coordinates are fitted and losses measured on one and the same" in caplog.text
    with caplog.at_level(logging.WARNING):
        assemble_chain(checkpoints, tmp_path / "few", calibration=[" ".join(tiny.texts(30))] * 2)
    assert "losses are measured on 127 tokens, of each text the first" in caplog.text


def test_whether_to_align_is_judged_by_losses_on_the_text_that_is_measured(tmp_path, monkeypatch):
    checkpoints = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (3, 2)]
    losses, judged, measured = links_room.document_losses, [], []
    measure = links_room.measure_segment
    monkeypatch.setattr(links_room, "measure_segment", lambda small, large, kept, documents, *rest, **options: measured.append(documents.ids) or measure(small, large, kept, documents, *rest, **options))

    def scored(order):
        def loss(runner, documents):
            judged.append(documents.ids)
            return replace(losses(runner, documents), nats=np.array([order[len(judged) % 2]]), tokens=np.array([1]))
        return loss

    for order, aligns in (((2.0, 1.0), True), ((1.0, 2.0), False)):
        judged.clear()
        monkeypatch.setattr(links_room, "document_losses", scored(order))
        chain = assemble_chain(checkpoints, tmp_path / f"chain{aligns}", calibration=tiny.texts(30))
        assert (chain.manifest.links[0].strategies.blend.align is not None) == aligns
        assert len(judged) == 2
        assert all(ids is measured[-1] for ids in judged)


def test_anchors_of_few_positions_are_measured_on_shorter_blocks(tmp_path, monkeypatch):
    """A block of 128 tokens does not fit into the learned positions of the anchor that has fewest."""
    monkeypatch.setattr("cbd_hub.interpolation.align.STEPS", 1)
    checkpoints = [tiny.save(tiny.gpt2(layers=layers, ffn=16, n_positions=48), tmp_path / f"m{layers}") for layers in (3, 2)]
    chain = assemble_chain(checkpoints, tmp_path / "chain", calibration=tiny.texts(10))
    assert all(anchor.evaluations for anchor in chain.manifest.anchors)


@pytest.mark.parametrize("case", ["one", "equal", "family", "hidden", "heads", "vocabulary", "tied", "deeper", "align", "untabled", "classifier", "pickle", "absent"])
def test_what_cannot_be_a_chain_is_refused_and_nothing_is_left_behind(tmp_path, case):
    base = tiny.save(tiny.llama(layers=4), tmp_path / "base")
    other, error, message = {
        "one": (None, ArgumentError, "two checkpoints or more"),
        "equal": (tiny.llama(layers=4, seed=3), ArgumentError, "same size"),
        "family": (tiny.gpt2(layers=1), ArchitectureError, "llama and a gpt2|gpt2 and a llama"),
        "hidden": (tiny.llama(layers=2, hidden=16), ArchitectureError, "head_size 8 and 4"),
        "heads": (tiny.llama(layers=2, kv_heads=4), ArchitectureError, r"more kv_heads \(4 against 2\)"),
        "vocabulary": (tiny.llama(layers=2), VocabularyMismatchError, "tokenizers"),
        "tied": (tiny.llama(layers=1, tied=False), ArchitectureError, "tie_word_embeddings"),
        "deeper": (tiny.llama(layers=5, ffn=8), ArchitectureError, "more layers"),
        "align": (tiny.llama(layers=2), ArgumentError, "align='yes'"),
        "untabled": (AutoModelForCausalLM.from_config(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=260, is_decoder=True)), ArchitectureError, "no axis table"),
        "classifier": (LlamaForSequenceClassification(tiny.llama(layers=2).config), WeightsError, r"unexpected tensors model.score.weight"),
        "pickle": (None, WeightsError, "no .safetensors file"),
        "absent": (None, StorageError, "neither a model folder nor a Hub id"),
    }[case]
    checkpoints = [base]
    if other is not None:
        checkpoints.append(tiny.save(other, tmp_path / "other"))
    if case == "vocabulary":
        path = tmp_path / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace("<unk>", "<UNK>"))
    if case == "pickle":
        folder = tmp_path / "other"
        folder.mkdir()
        (folder / "config.json").write_text((base / "config.json").read_text())
        torch.save({}, folder / "pytorch_model.bin")
        checkpoints.append(folder)
    if case == "absent":
        checkpoints.append(tmp_path / "absent")
    with pytest.raises(error, match=message):
        assemble_chain(checkpoints, tmp_path / "chain", align="yes" if case == "align" else "auto")
    assert not (tmp_path / "chain").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_how_a_tokenizer_was_last_called_and_saved_is_no_difference(tmp_path):
    """Truncation and padding of the last call are saved with it, and versions write the same tokenizer in other words."""
    checkpoints = three("llama", tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer(["a longer text", "two"], truncation=True, max_length=3, padding=True)
    tokenizer.save_pretrained(checkpoints[1])
    path = checkpoints[2] / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert len({path.read_bytes() for path in (folder / "tokenizer.json" for folder in checkpoints)}) == 3
    assert {anchor.tokenizer_sha256 for anchor in assemble_chain(checkpoints, tmp_path / "chain").anchors} == {sha256(checkpoints[0] / "tokenizer.json")}
    config = checkpoints[0] / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<unk>"}))
    assert assemble_chain(checkpoints, tmp_path / "again").anchors
    (checkpoints[2] / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"m2 has no tokenizer that can be used .*save one there"):
        assemble_chain(checkpoints, tmp_path / "other")


def test_equal_tokenizer_files_are_not_read(tmp_path, monkeypatch):
    """Reading a large one takes seconds, and a padding token that a config adds is in no text."""
    checkpoints = three("llama", tmp_path)
    config = checkpoints[1] / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "<another>"}))
    monkeypatch.setattr("cbd_hub.weights.load_tokenizer", lambda folder: pytest.fail(f"{folder} was read"))
    monkeypatch.setattr("cbd_hub.chain.settle_tokenizer", lambda folder: None)  # reads the first anchor's
    assert len({anchor.tokenizer_sha256 for anchor in assemble_chain(checkpoints, tmp_path / "chain").anchors}) == 1


def test_a_chain_and_its_anchors_are_read_with_one_tokenizer(tmp_path):
    """Of a Qwen2 transformers reads every tokenizer by Qwen2's rules; the chain's own folder names no architecture, and reads texts alike all the same."""
    text = "A\u030a and 1234 \u2126."  # normalised by these rules, its digits one by one
    chain = assemble_chain([tiny.save(tiny.qwen2(layers=layers), tmp_path / f"{layers}") for layers in (4, 2)], tmp_path / "chain")
    expected = AutoTokenizer.from_pretrained(tmp_path / "4")(text).input_ids
    assert expected != tiny.tokenizer()(text).input_ids
    folders = [chain.files.root, *(chain.files.root / "anchors" / anchor.name for anchor in chain.anchors)]
    assert [AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in folders] == [expected] * 3
    assert [chain.tokenizer(size)(text).input_ids for size in ("max", "min")] == [expected] * 2
    assert len({anchor.tokenizer_sha256 for anchor in chain.anchors}) == 1


def test_a_tokenizer_in_the_files_of_old_is_the_same_as_in_one(tmp_path):
    checkpoints = three("gpt2", tmp_path)[:2]
    made = GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "\u0120": 3}, merges=[])
    for folder in checkpoints:
        made.save_pretrained(folder)
    path = checkpoints[1] / "tokenizer.json"
    path.unlink()
    (checkpoints[1] / "vocab.json").write_text(json.dumps(made.get_vocab()))
    (checkpoints[1] / "merges.txt").write_text("#version: 0.2\n")
    assert {anchor.tokenizer_sha256 for anchor in assemble_chain(checkpoints, tmp_path / "chain").anchors} == {sha256(checkpoints[0] / "tokenizer.json")}


def test_files_of_old_that_say_nothing_of_how_they_are_read_are_written_anew(tmp_path):
    """Vocabulary and merges alone are read by the architecture beside them, and beside chain.json there is none."""
    checkpoints, text = three("gpt2", tmp_path)[:2], "a b \u2126"
    for folder in checkpoints:
        vocab = AutoTokenizer.from_pretrained(folder).get_vocab()
        for path in folder.glob("tokenizer*"):
            path.unlink()
        (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>" if token == "<eos>" else token: place for token, place in vocab.items()}, sort_keys=True))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    expected = AutoTokenizer.from_pretrained(checkpoints[0])(text).input_ids
    chain = assemble_chain(checkpoints, tmp_path / "chain")
    assert chain.tokenizer()(text).input_ids == AutoTokenizer.from_pretrained(tmp_path / "chain")(text).input_ids == expected


@pytest.mark.parametrize("change", ["prefix space", "slow"])
def test_tokenizers_that_read_a_text_otherwise_are_two(tmp_path, change):
    """Whether a file says so, the config beside it, or the two files of a tokenizer of old."""
    checkpoints = three("gpt2", tmp_path)[:2]
    for place, folder in enumerate(checkpoints):
        made = GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1 + place * (change == "slow"), "b": 2 - place * (change == "slow"), "\u0120": 3}, merges=[])
        if change == "slow":
            (folder / "tokenizer.json").unlink()
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                (folder / name).unlink(missing_ok=True)
            (folder / "vocab.json").write_text(json.dumps(made.get_vocab()))
            (folder / "merges.txt").write_text("#version: 0.2\n")
        else:
            made.save_pretrained(folder)
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": bool(place)}))
    with pytest.raises(VocabularyMismatchError, match="different tokenizers .*copy the tokenizer's files"):
        assemble_chain(checkpoints, tmp_path / "chain")


@pytest.mark.parametrize("named", [None, ["LlamaModel"], ["LLaMAForCausalLM"], "LlamaForCausalLM"])
def test_whatever_architecture_a_config_names_it_is_a_causal_language_model(tmp_path, named):
    """As AutoModelForCausalLM reads it: published checkpoints name none, their base model, or a class of old."""
    checkpoints = three("llama", tmp_path)
    for folder in checkpoints:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": named}))
    chain = assemble_chain(checkpoints, tmp_path / "chain")
    size = chain.anchors[0].parameters - 100
    CBDModel.materialize(tmp_path / "chain", size, output_dir=tmp_path / "made")
    made, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "made"), torch.tensor([[7, 8, 9]])
    assert torch.equal(made(ids).logits, CBDModel.from_chain(tmp_path / "chain", size)(ids).logits)


def test_what_a_kill_left_in_an_empty_folder_is_not_in_the_way(tmp_path):
    checkpoints, target = three("llama", tmp_path), tmp_path / "chain"
    (target / ".chain.x1y2z3a4.cbd-part").mkdir(parents=True)
    assert assemble_chain(checkpoints, target).plan("max").parameters
    with pytest.raises(StorageError, match="already exists"):
        assemble_chain(checkpoints, target)


def test_what_a_kill_left_beside_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path):
    target = tmp_path / "chain"
    code = "import os, sys; from pathlib import Path; from cbd_hub.files import staged_folder\nwith staged_folder(Path(sys.argv[1])) as folder: os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.glob(".chain.*.cbd-part")
    with staged_folder(target) as written:
        (written / "whole").write_text("x")
        for path in (left, written / "whole", written):
            os.utime(path, (0, 0))
        with suppress(KeyError), staged_folder(target):
            assert not left.exists()
            raise KeyError
    assert (target / "whole").is_file()
    assert list(tmp_path.iterdir()) == [target]


def test_code_and_pickles_are_not_taken_over(tmp_path):
    checkpoints = three("llama", tmp_path)
    (checkpoints[0] / "modeling_evil.py").write_text("raise SystemExit")
    torch.save({}, checkpoints[0] / "training_args.bin")
    assemble_chain(checkpoints, tmp_path / "chain")
    assert not list((tmp_path / "chain").rglob("*.py"))
    assert not list((tmp_path / "chain").rglob("*.bin"))


def test_published_gpt2_checkpoints_without_prefix(tmp_path):
    """openai-community/gpt2 stores keys without "transformer." and with mask buffers; both are understood."""
    from safetensors.torch import load_file, save_file
    checkpoints = three("gpt2", tmp_path)
    for folder in checkpoints:
        path = folder / "model.safetensors"
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        save_file(tensors, path, {"format": "pt"})
    chain = assemble_chain(checkpoints, tmp_path / "chain")
    size = sum(anchor.parameters for anchor in chain.anchors[:2]) // 2
    CBDModel.materialize(tmp_path / "chain", size, output_dir=tmp_path / "made")
    assert Chain.from_pretrained(tmp_path / "chain").manifest.anchors[0].family == "gpt2"
    model = CBDModel.from_chain(tmp_path / "chain", "max")
    assert torch.equal(model.transformer.wte.weight, load_file(checkpoints[0] / "model.safetensors")["wte.weight"])


@pytest.mark.parametrize(("options", "message"), [
    ({"align": 0}, "align=0 is not known"), ({"calibration": [1, 2]}, "calibration is list; give a text file"), ({"calibration": 3}, "calibration is int"),
])
def test_options_of_another_kind_are_refused(options, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        assemble_chain(["a", "b"], tmp_path / "chain", **options)


def test_too_short_a_text_is_refused_before_anything_is_copied(tmp_path, monkeypatch):
    """Copying and hashing take minutes for real models."""
    checkpoints = [tiny.save(tiny.llama(layers=layers), tmp_path / f"m{layers}") for layers in (3, 2)]
    monkeypatch.setattr(chain_room, "copy_checkpoint", lambda *_: pytest.fail("copied"))
    with pytest.raises(DataError, match="less than one block"):
        assemble_chain(checkpoints, tmp_path / "chain", calibration=["too short"])
    assert not (tmp_path / "chain").exists()


def test_what_takes_long_is_reported_and_the_alignment_s_error_shown(tmp_path, caplog):
    checkpoints = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (3, 2)]
    seen = []
    with caplog.at_level(logging.WARNING, "cbd_hub.evaluation"):
        chain = assemble_chain(checkpoints, tmp_path / "chain", align=True, calibration=tiny.texts(8), report=lambda *entry: seen.append(entry))
    assert "fewer than 2048" in caplog.text
    kinds = {what.rpartition(": ")[2] for what, _, _ in seen}
    assert {"copying", "fitting a permutation", "fitting shape and mix"} <= kinds
    assert all(total is None or 0 <= done < total for _, done, total in seen)
    error = chain.manifest.links[0].strategies.blend.align.error
    assert f"a logit moves by up to {error:.1e}" in (tmp_path / "chain/README.md").read_text()
    size = chain.anchors[1].parameters + 1000
    assert "come in steps" in chain.plan(size, tolerance=0.5).note


def test_a_tilde_is_the_home_folder_where_a_chain_is_made_too(tmp_path, monkeypatch):
    models = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (4, 2)]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert len(assemble_chain(models, "~/chain", align=False).anchors) == 2
    assert (tmp_path / "home/chain/chain.json").is_file()
    assert not (tmp_path / "~").exists()
