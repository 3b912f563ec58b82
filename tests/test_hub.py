"""Chains and checkpoints from the Hub, with the official client against a server on loopback."""

import json

import tiny
import torch
from conftest import online
from huggingface_hub import ModelCard, constants
from test_distill import rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cbd_hub import CBDModel, Chain, ChainDistiller, ChainDistillerConfig, assemble_chain
from cbd_hub.cli import app
from cbd_hub.errors import ArgumentError, StorageError
from cbd_hub.files import chunk_hashes, sha256


def test_a_chain_on_the_hub_is_a_chain(hub, cbd, chain, tmp_path, monkeypatch):
    Chain.from_pretrained(chain).push_to_hub("org/tiny")
    hub.forget()
    first, second = Chain.from_pretrained(chain).anchors[:2]
    size = (first.parameters + second.parameters) // 2
    code, printed, said = cbd("make", "org/tiny", "--size", size, "--out", tmp_path / "m", "--json")
    assert code == 0, said
    assert json.loads(printed)["parameters"] == CBDModel.plan(chain, size).parameters
    made, local = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), CBDModel.from_chain(chain, size)
    assert all(torch.equal(made.get_parameter(name), tensor) for name, tensor in local.named_parameters())
    assert made.config.cbd["chain"] == "org/tiny"
    assert len(made.config.cbd["revision"]) == 40
    # What is not needed is not fetched: the smallest anchor's weights are no part of this plan.
    smallest = Chain.from_pretrained(chain).anchors[2].name
    assert not [path for _, path in hub.requests if f"tiny-{smallest}/resolve" in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cbd("show", "org/tiny")[0] == 0


def test_push_and_pull_on_the_command_line(hub, tmp_path):
    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return done.exception if done.exit_code else done.stdout

    for layers in (4, 2):
        tiny.save(tiny.llama(layers=layers), tmp_path / f"m{layers}")
    assemble_chain([tmp_path / "m4", tmp_path / "m2"], tmp_path / "chain")
    assert "would be sent" in str(run("push", tmp_path / "chain", "org/cmd", "--dry-run"))
    assert not hub.repos
    assert json.loads(run("push", tmp_path / "chain", "org/cmd", "--json"))["tag"] == "v1"
    assert json.loads(run("plan", "org/cmd", "--memory-budget", "1GB", "--json"))["bytes_to_fetch"]
    assert "org/cmd" not in run("pull", "org/cmd", tmp_path / "pulled")
    assert (tmp_path / "pulled" / "chain.json").is_file()
    assert isinstance(run("push", tmp_path / "nowhere", "org/x"), StorageError)
    assert isinstance(run("push", tmp_path / "chain", "no-namespace"), ArgumentError)


def test_what_is_not_on_the_hub_is_one_clear_line(hub, cbd, monkeypatch, tmp_path):
    code, _, said = cbd("show", "org/absent")
    assert (code, said.count("\n"), "no repo on the Hub" in said) == (1, 1, True)
    online(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    for patience, lines in ((0.0, 2), (60.0, 1)):  # where it takes long, that it is looked for there is said
        monkeypatch.setattr("cbd_hub.hub._LONG", patience)
        code, _, said = cbd("show", "org/tiny")
        assert (code, said.count("\n"), "cannot be reached" in said) == (1, lines, True)
        assert said.startswith("warning: org/tiny is no folder here; it is being asked for on the Hub\n") == (lines == 2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, said = cbd("show", "org/tiny")
    assert (code, said.count("\n")) == (1, 1)


def test_checkpoints_from_the_hub_are_assembled(hub, cbd, tmp_path):
    for index, layers in enumerate((4, 2)):
        hub.upload_folder(f"org/m{index}", tiny.save(tiny.llama(layers=layers), tmp_path / f"m{index}"))
    code, _, said = cbd("assemble", "org/m0", "org/m1", "--out", tmp_path / "chain")
    assert code == 0, said
    path = tmp_path / "chain" / "anchors" / Chain.from_pretrained(tmp_path / "chain").anchors[0].name / "model.safetensors"
    assert sha256(path) == sha256(tmp_path / "m0" / "model.safetensors")
    assert len(chunk_hashes(path)) == 1


def test_the_trainer_pushes_an_anchor_and_nothing_else(hub, tmp_path, capsys):
    config = ChainDistillerConfig(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, bf16=False, disable_tqdm=True, logging_steps=1, push_to_hub=True, hub_model_id="org/pushed",
        hub_token="hf_test", save_strategy="no",
    )
    trainer = ChainDistiller(model=tiny.llama(layers=2), teacher=tiny.llama(), args=config, train_dataset=rows(), processing_class=tiny.tokenizer())
    trainer.train()
    trainer.push_to_hub()
    printed = capsys.readouterr()
    _, files = hub.repos["org/pushed"].at("main")
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "distillation" in card.data.tags
    assert "base_model" not in card.data.to_dict()
    assert "hf_test" not in printed.out + printed.err + files["README.md"].decode()
