"""A cut knows what it was cut from, also after training, and an assembled chain has it from there."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import save
from transformers import AutoModelForCausalLM

from cbd_hub import CBDModel, ChainDistiller, ChainDistillerConfig, assemble_chain
from cbd_hub.ancestry import Ancestry
from cbd_hub.errors import ArgumentError, WeightsError
from cbd_hub.hub import KEPT_FILE
from cbd_hub.plans import coordinates_of
from cbd_hub.single import cut_single
from cbd_hub.weights import weights_sha256


TEXTS = tiny.texts(60)
ROWS = [{"input_ids": list(range(4, 36)), "labels": list(range(4, 36))} for _ in range(8)]


def cut(folder, make=tiny.llama, **shape):
    """A model, and the folder of a cut of it."""
    whole = tiny.save(make(layers=6, ffn=96), folder / "whole")
    made = cut_single(whole, shape=shape or {"layers": 4, "ffn": 64}, calibration=TEXTS)
    made.save_pretrained(folder / "cut")
    return whole, folder / "cut", made.kept


def trained(whole, folder, out, **options):
    """The cut after two steps."""
    trainer = ChainDistiller(
        model=AutoModelForCausalLM.from_pretrained(folder), teacher=AutoModelForCausalLM.from_pretrained(whole),
        args=ChainDistillerConfig(str(out), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01, bf16=False, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **options),
        train_dataset=ROWS, processing_class=tiny.tokenizer(), kept=folder,
    )
    trainer.train()
    trainer.save_model()
    return out


def equal(ours, theirs):
    return all((mine is None) == (other is None) and (mine is None or np.array_equal(mine, other)) for mine, other in zip(vars(ours).values(), vars(theirs).values()))


def between(chain):
    large, small = chain.anchors
    return coordinates_of(chain.files, small, large)


def test_every_family_s_cut_says_what_it_kept(every, tmp_path):
    whole, folder, kept = cut(tmp_path, tiny.EVERY[every])
    found = Ancestry.read(folder)
    assert equal(found.kept, kept)
    assert found.parent == weights_sha256(AutoModelForCausalLM.from_pretrained(whole))
    shared, maps = between(assemble_chain([whole, folder], tmp_path / "chain"))
    assert equal(shared, kept)
    assert maps is None


@pytest.mark.parametrize("calibration", [None, TEXTS])
def test_a_trained_cut_shares_coordinates_in_the_chain(calibration, tmp_path):
    """They are those of the cut, nothing is aligned, and the anchors are the checkpoints, bit for bit."""
    whole, folder, kept = cut(tmp_path)
    out = trained(whole, folder, tmp_path / "out", path_fraction=0.5)
    assert (out / "checkpoint-2" / KEPT_FILE).is_file()
    chain = assemble_chain([out, whole], tmp_path / "chain", calibration=calibration)
    shared, maps = between(chain)
    assert equal(shared, kept)
    assert maps is None
    (link,) = chain.manifest.links
    assert link.strategies.blend.align is None
    assert not link.strategies.blend.replicate
    for anchor, source in zip(chain.anchors, (whole, out)):
        assert not (chain.files.root / "anchors" / anchor.name / KEPT_FILE).exists()
        model, stored = CBDModel.from_chain(chain, anchor.name), AutoModelForCausalLM.from_pretrained(source)
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.named_parameters())


def test_a_size_between_an_untrained_cut_and_its_model_is_the_model_cut(tmp_path):
    """What both hold is the same in both, whatever alpha; by index it would be an average of unlike neurons."""
    whole, folder, kept = cut(tmp_path, ffn=48)
    chain = assemble_chain([whole, folder], tmp_path / "chain")
    model, large = CBDModel.from_chain(chain, shape={"ffn": 72}, strategy="blend", alpha=0.3), AutoModelForCausalLM.from_pretrained(whole)
    for layer in range(6):
        ours, theirs = (found.model.layers[layer].mlp.up_proj.weight for found in (model, large))
        torch.testing.assert_close(ours, theirs[kept.ffn[layer][:72]])


def test_a_cut_of_another_model_is_aligned(tmp_path, caplog):
    whole, folder, kept = cut(tmp_path)
    other = tiny.save(tiny.llama(layers=6, ffn=96, seed=9), tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        chain = assemble_chain([other, folder], tmp_path / "chain", align=True)
    assert "was cut from another model than" in caplog.text
    assert not equal(between(chain)[0], kept)
    assert chain.manifest.links[0].strategies.blend.align is not None


@pytest.mark.parametrize("calibration", [None, TEXTS])
def test_a_cut_without_its_file_is_found_by_its_weights(every, calibration, tmp_path):
    """Aligned, it stands for the layers and neurons that it was cut from; among random ones a few are like others' too."""
    whole, folder, kept = cut(tmp_path, tiny.EVERY[every])
    (folder / KEPT_FILE).unlink()
    shared, _ = between(assemble_chain([whole, folder], tmp_path / "chain", align=True, calibration=calibration))
    assert np.array_equal(shared.layers, kept.layers)
    assert np.mean([shared.ffn[layer][:64] == kept.ffn[layer][:64] for layer in kept.layers]) > 0.95


def test_units_that_the_smaller_one_lacks_come_back_by_importance(tmp_path):
    """As they would have between a cut and its model, where there is text to measure it on."""
    whole, folder, kept = cut(tmp_path)
    out = trained(whole, folder, tmp_path / "out")
    (out / KEPT_FILE).unlink()
    shared, maps = between(assemble_chain([whole, out], tmp_path / "chain", align=True, calibration=[text for text in TEXTS for _ in range(2)]))
    assert maps is not None
    assert np.array_equal(shared.layers, kept.layers)
    alike = []
    for layer in range(6):
        own = 64 if layer in kept.layers else 0
        assert len(set(shared.ffn[layer][:own]) - set(kept.ffn[layer][:own])) < 6
        rest = np.intersect1d(shared.ffn[layer][own:], kept.ffn[layer][own:])
        alike.append(np.corrcoef(*(np.argsort([unit for unit in order.ffn[layer] if unit in rest]) for order in (shared, kept)))[0, 1])
    assert np.mean(alike) > 0.8


def test_the_file_of_another_cut_is_left_out(tmp_path, caplog):
    """Its parent and its shape are right, and the units are not."""
    whole, folder, kept = cut(tmp_path)
    draw = np.random.default_rng(0)
    Ancestry(replace(kept, ffn=draw.permuted(kept.ffn, axis=1)), weights_sha256(AutoModelForCausalLM.from_pretrained(whole))).save(folder)
    with caplog.at_level(logging.WARNING):
        assemble_chain([whole, folder], tmp_path / "chain")
    assert "is not that of the model beside it, whose weights are nearer to other units" in caplog.text


def test_a_process_that_does_not_save_writes_none(tmp_path):
    whole, folder, _ = cut(tmp_path)
    trainer = ChainDistiller(
        model=AutoModelForCausalLM.from_pretrained(folder), teacher=AutoModelForCausalLM.from_pretrained(whole), kept=folder, train_dataset=ROWS, processing_class=tiny.tokenizer(),
        args=ChainDistillerConfig(str(tmp_path / "out"), bf16=False, report_to="none", use_cpu=True),
    )
    trainer.args.distributed_state.process_index = 1
    try:
        trainer._save(str(tmp_path / "out"))
    finally:
        trainer.args.distributed_state.process_index = 0
    assert not (tmp_path / "out" / KEPT_FILE).exists()
    trainer._save(str(tmp_path / "out"))
    assert (tmp_path / "out" / KEPT_FILE).is_file()


@pytest.mark.parametrize("shape", [{"hidden": 24}, {"heads": 2, "kv_heads": 1}])
def test_orders_of_channels_and_heads_come_back(shape, tmp_path):
    whole, folder, kept = cut(tmp_path, **shape)
    assert (kept.hidden if "hidden" in shape else kept.heads) is not None
    chain = assemble_chain([whole, folder], tmp_path / "chain")
    assert equal(between(chain)[0], kept)
    model, stored = CBDModel.from_chain(chain, chain.anchors[1].name), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in stored.named_parameters())


def test_a_chain_of_cuts_of_trained_cuts(tmp_path):
    """Each was cut from the one above it once that was trained; the card and `origin` say so."""
    whole, folder, kept = cut(tmp_path)
    middle = trained(whole, folder, tmp_path / "middle")
    made = cut_single(middle, shape={"layers": 3, "ffn": 48}, calibration=TEXTS)
    made.save_pretrained(tmp_path / "small")
    chain = assemble_chain([tmp_path / "small", whole, middle], tmp_path / "chain")
    first, second, third = chain.anchors
    assert equal(coordinates_of(chain.files, second, first)[0], kept)
    assert equal(coordinates_of(chain.files, third, second)[0], made.kept)
    assert [anchor.origin for anchor in chain.anchors] == ["published", "cut", "cut"]
    assert f"cut from {first.name}" in (tmp_path / "chain/README.md").read_text()


def test_own_coordinates_are_asked_for(tmp_path):
    whole, folder, _ = cut(tmp_path)
    assert between(assemble_chain([whole, folder], tmp_path / "chain", align=False)) == (None, None)


def test_a_file_that_is_broken_or_of_another_shape_is_refused(tmp_path):
    whole, folder, kept = cut(tmp_path)
    other = cut_single(whole, shape={"layers": 3}, calibration=TEXTS)
    Ancestry(other.kept, weights_sha256(AutoModelForCausalLM.from_pretrained(whole))).save(folder)
    with pytest.raises(WeightsError, match="is not that of the model beside it .*kept layers must be 4"):
        assemble_chain([whole, folder], tmp_path / "chain")
    good = (folder / KEPT_FILE).read_bytes()
    for content in (b"", b"half", good[:200], save({"parent": np.zeros(32, np.uint8)}), save({"parent": np.zeros(32, np.uint8), "kept.layers": np.zeros(4), "kept.ffn": np.zeros((6, 96))})):
        (folder / KEPT_FILE).write_bytes(content)
        with pytest.raises(WeightsError, match="does not say which units were kept"):
            assemble_chain([whole, folder], tmp_path / "chain")
    assert not (tmp_path / "chain").exists()


def test_a_folder_that_says_nothing_is_refused(tmp_path):
    whole, folder, _ = cut(tmp_path)
    (folder / KEPT_FILE).unlink()
    with pytest.raises(ArgumentError, match="name the folder that cbd cut wrote"):
        trained(whole, folder, tmp_path / "out")


def test_it_goes_to_the_hub_and_comes_back(hub, tmp_path):
    whole, folder, kept = cut(tmp_path)
    trainer = ChainDistiller(
        model=AutoModelForCausalLM.from_pretrained(folder), teacher=AutoModelForCausalLM.from_pretrained(whole),
        args=ChainDistillerConfig(str(tmp_path / "out"), max_steps=1, bf16=False, report_to="none", disable_tqdm=True, use_cpu=True, hub_model_id="org/student"),
        train_dataset=ROWS, processing_class=tiny.tokenizer(), kept=folder,
    )
    trainer.train()
    trainer.push_to_hub()
    shutil.rmtree(folder)
    shared, _ = between(assemble_chain([whole, "org/student"], tmp_path / "chain"))
    assert equal(shared, kept)
