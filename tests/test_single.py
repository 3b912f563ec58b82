"""A chain of one: any model cut to a smaller size, with what it lost."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import ONE_FAMILY, assembled
from datasets import Dataset
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig

from cbd_hub import CBDModel, Chain
from cbd_hub.cut import measure_importance, mixes
from cbd_hub.errors import ArchitectureError, ArgumentError, DataError, SizeError, StorageError, WeightsError
from cbd_hub.evaluation import Documents
from cbd_hub.shapes import count, fill_ffn, parameter_count, shape_of
from cbd_hub.single import OWN_TEXT, _own_text, cut_single


TEXTS = tiny.texts(60)


@pytest.fixture(scope="module")
def source(family, tmp_path_factory):
    return tiny.save(tiny.FAMILIES[family](layers=6, ffn=96), tmp_path_factory.mktemp("single") / family)


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def family(request):
    return request.param


def size_of(folder):
    return parameter_count(AutoModelForCausalLM.from_pretrained(folder).config)


@ONE_FAMILY
@pytest.mark.parametrize("calibration", ["file", "list", "dataset", "own"])
def test_any_calibration_text_gives_a_model_of_the_size(source, calibration, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text = {"file": tmp_path / "text.jsonl", "list": TEXTS, "dataset": Dataset.from_dict({"text": TEXTS}), "own": None}[calibration]
    wanted = int(0.8 * size_of(source))
    model = CBDModel.from_pretrained(source, wanted, calibration=text)
    assert abs(model.num_parameters() - wanted) <= 0.005 * wanted
    said = model.config.cbd
    assert said["parameters"] == model.num_parameters()
    assert (said["text"] == OWN_TEXT) == (text is None)
    assert said["loss"] > 0
    assert said["stderr"] > 0
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config.cbd == said


def test_the_loss_is_that_of_the_model_on_held_out_text(source, tmp_path):
    """What the card says can be measured again on the documents that were held out, and no text is in both parts."""
    from cbd_hub.evaluation import document_losses
    from cbd_hub.interpolation.live import ModelRunner
    from cbd_hub.single import _split
    from cbd_hub.weights import load_tokenizer
    tokenizer = load_tokenizer(source)
    chosen, heldout = _split(TEXTS, "texts", tokenizer, 4096, 4096, 128)
    joined = tokenizer.decode(torch.cat(chosen.ids))
    assert not any(tokenizer.decode(ids) in joined for ids in heldout.ids)
    cut = cut_single(source, int(0.8 * size_of(source)), calibration=TEXTS)
    cut.save_pretrained(tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    losses = document_losses(ModelRunner(model), heldout)
    assert losses.mean == pytest.approx(cut.losses.mean, rel=1e-4)
    card = (tmp_path / "made" / "README.md").read_text()
    assert f"{losses.mean:.3f} ± {losses.stderr:.3f}" in card
    assert "base_model" not in card  # it is a local one
    assert "license" not in card


def test_an_exact_shape_is_the_model_sliced(source):
    """A cut in FFN alone holds the whole model's rows; layers that stay are untouched elsewhere."""
    whole = AutoModelForCausalLM.from_pretrained(source)
    model = CBDModel.from_pretrained(source, shape={"ffn": 80}, calibration=TEXTS)
    assert model.get_input_embeddings().weight.equal(whole.get_input_embeddings().weight)
    rows = {"llama": "model.layers.2.mlp.up_proj.weight", "gpt2": "transformer.h.2.mlp.c_fc.bias"}[whole.config.model_type]
    ours, theirs = model.get_parameter(rows), whole.get_parameter(rows)
    assert len(ours) == 80
    assert all((theirs == row).reshape(len(theirs), -1).all(1).any() for row in ours)
    filled = CBDModel.from_pretrained(source, np.int64(0.8 * size_of(source)), shape={"layers": np.int32(5)}, calibration=TEXTS)
    assert filled.config.num_hidden_layers == 5
    assert abs(filled.num_parameters() - int(0.8 * size_of(source))) <= 0.005 * size_of(source)


@ONE_FAMILY
def test_what_was_cut_is_made_up_for_or_not(source, tmp_path):
    """Without the fit the model is slices of the whole one; with it what attention and FFN write alone is another, and file, model and record agree."""
    whole = AutoModelForCausalLM.from_pretrained(source)
    plain, *fitted = (CBDModel.from_pretrained(source, shape={"layers": 4, "ffn": 80}, calibration=TEXTS, reconstruct=target) for target in (None, "stream", "layer"))
    columns = torch.cat([layer.mlp.down_proj.weight for layer in whole.model.layers], 1)
    assert all(bool((columns == column[:, None]).all(0).any()) for column in plain.model.layers[3].mlp.down_proj.weight.T)
    assert (plain.config.cbd["reconstruction"], plain.config.cbd["reconstruction_tokens"], plain.config.cbd["loss"]) == (None, 0, plain.config.cbd["sliced_loss"])
    for model, target in zip(fitted, ("stream", "layer")):
        moved = {name for name, tensor in model.named_parameters() if not tensor.equal(plain.get_parameter(name))}
        written = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)}
        assert moved == written | ({f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(1, 4)} if target == "stream" else set()), "heads are all there, and so is all that the first layer reads"
        assert model.config.cbd["sliced_loss"] == plain.config.cbd["loss"]
        assert model.config.cbd["reconstruction"] == target
        assert model.config.cbd["reconstruction_tokens"] > 0
    made = cut_single(source, shape={"layers": 4, "ffn": 80}, calibration=TEXTS)
    made.save_pretrained(tmp_path / "made")
    assert tiny.same(AutoModelForCausalLM.from_pretrained(tmp_path / "made"), fitted[0])
    card = (tmp_path / "made" / "README.md").read_text()
    assert f"| loss before reconstruction | {plain.config.cbd['loss']:.3f} |" in card
    assert "the residual stream" in card
    named = shutil.copytree(source, tmp_path / "reconstruction")
    assert tiny.same(CBDModel.from_pretrained(named, shape={"layers": 4, "ffn": 80}, calibration=TEXTS), fitted[0]), "whatever it is called"
    half = CBDModel.from_pretrained(source, shape={"layers": 4, "ffn": 80}, calibration=TEXTS, dtype="bfloat16")
    assert half.model.layers[3].mlp.down_proj.weight.equal(fitted[0].model.layers[3].mlp.down_proj.weight.bfloat16()), "rounded once"


def test_loader_arguments_pass_through(source):
    model, info = CBDModel.from_pretrained(source, shape={"layers": 4}, calibration=TEXTS, dtype="bfloat16", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert info["plan"].shape.layers == 4
    with pytest.raises(ArgumentError, match="did you mean device_map"):
        CBDModel.from_pretrained(source, shape={"layers": 4}, device_mop="cpu")


def test_a_chain_is_no_model(hub, tmp_path):
    """Who names one where a model should stand is told so, of a folder and of a repo."""
    folder = assembled(tmp_path, 4, 2)
    Chain.from_pretrained(folder).push_to_hub("org/tiny")
    for name in (folder, "org/tiny"):
        with pytest.raises(WeightsError, match="is a chain, not a model"):
            CBDModel.from_pretrained(name, size="min", calibration=TEXTS)


@ONE_FAMILY
def test_the_same_call_gives_the_same_model(source):
    size = int(0.85 * size_of(source))
    first, second = (CBDModel.from_pretrained(source, size) for _ in range(2))
    assert all(torch.equal(tensor, second.get_parameter(name)) for name, tensor in first.named_parameters())
    assert first.config.cbd == second.config.cbd


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"size": "900M"}, SizeError, "a cut is smaller"),
    ({"size": 9000}, SizeError, "cannot be cut to 9K"),
    ({"size": "12Q"}, SizeError, "cannot be read"),
    ({}, ArgumentError, "neither size nor shape"),
    ({"shape": {"layers": 9}}, ArgumentError, "layers=9 cannot be cut from layers=6"),
    ({"shape": {"layers": 0}}, ArgumentError, "shape layers=0"),
    ({"shape": {"depth": 3}}, ArgumentError, 'no field "depth"'),
    ({"shape": "layers=2"}, ArgumentError, "shape='layers=2' is no shape"),
    ({"shape": {"layers": 6}}, SizeError, "is all of"),
    ({"shape": {"layers": 5}, "reconstruct": "channel"}, ArgumentError, "reconstruct='channel' is not known; use stream, layer or none"),
    ({"shape": {"hidden": 28}, "reconstruct": "layer"}, ArgumentError, "hidden=28 is another width"),
    ({"shape": {"hidden": 30}}, ArchitectureError, "cannot have the shape"),
    ({"shape": {"layers": 3, "ffn": 8}, "size": 50_000}, SizeError, "leave one of them out"),
    ({"size": 50_000, "calibration": []}, DataError, "holds no text"),
    ({"size": 50_000, "calibration": ["one"]}, DataError, "one document"),
    ({"size": 50_000, "calibration": ["one", "two"]}, DataError, "too short"),
    ({"size": 50_000, "calibration": 7}, ArgumentError, "calibration is int"),
    ({"size": 50_000, "calibration": "/no/such.txt"}, DataError, "no file matches"),
    ({"size": 50_000, "revision": "main"}, ArgumentError, "no meaning for the local folder"),
])
def test_what_cannot_be_cut_is_refused(tmp_path_factory, options, error, message):
    source = tiny.save(tiny.llama(layers=6, ffn=96), tmp_path_factory.mktemp("refused") / "m")
    with pytest.raises(error, match=message):
        CBDModel.from_pretrained(source, **{"calibration": TEXTS, **options})


SMOLLM = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)


@pytest.mark.parametrize("size", [33_000_000, 34_123_456, 36_666_667])
def test_an_ffn_is_a_multiple_of_8_where_that_costs_next_to_nothing(size):
    shape = shape_of(SMOLLM).model_copy(update={"layers": 3})
    width = fill_ffn(size, shape, SMOLLM)
    assert width % 8 == 0
    assert abs(count(shape.model_copy(update={"ffn": width}), SMOLLM) - size) <= 0.001 * size
    exact = count(shape.model_copy(update={"ffn": 1301}), SMOLLM)
    assert fill_ffn(exact, shape, SMOLLM) == 1301, "a width that gives the size exactly stays"
    assert fill_ffn(exact + 10, shape, SMOLLM) == 1304
    assert fill_ffn(exact + 10, shape, SMOLLM, within=1e-5) == 1301, "and one that is nearer than a multiple may be"


@pytest.mark.parametrize("below", [1, 1_000, 50_000, 100_000])
def test_a_cut_to_just_below_the_whole_is_smaller_than_it(below):
    whole = parameter_count(SMOLLM)
    for shape in mixes(whole - below, SMOLLM):
        assert abs(count(shape, SMOLLM) - (whole - below)) <= 0.005 * whole
        assert count(shape, SMOLLM) < whole


@pytest.mark.parametrize(("size", "deepest"), [(60_000_000, 30), (40_000_000, 13), (30_000_000, 2)])
def test_sizes_below_half_of_the_layers_are_cut_too(size, deepest):
    found = mixes(size, SMOLLM)
    assert max(shape.layers for shape in found) == deepest
    assert len({shape.layers for shape in found}) == len(found) <= 7
    assert all(abs(count(shape, SMOLLM) - size) <= 0.005 * size for shape in found)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_every_size_is_cut_within_a_percent_or_the_nearest_named_which_then_is_cut(layers):
    config = tiny.llama(layers=layers).config
    whole, refused = parameter_count(config), 0
    for size in range(count(shape_of(config).model_copy(update={"layers": 1, "ffn": 1}), config) - 500, whole, 97):
        try:
            found = mixes(size, config)
        except SizeError as error:
            refused += 1
            named = int(re.search(r"ask for size=(\d+)", str(error))[1])
            assert named < whole
            assert abs(named - size) > 0.01 * size
            found, size = mixes(named, config), named
            assert count(found[0], config) == named
        assert all(abs(count(shape, config) - size) <= 0.01 * size and count(shape, config) < whole for shape in found)
    assert refused


@ONE_FAMILY
def test_text_of_its_own_is_sampled_at_temperature_1_whatever_its_generation_config_says(source):
    """An instruct model's often sharpens, and penalises what was said."""
    model = AutoModelForCausalLM.from_pretrained(source)
    plain = _own_text(model, 2048)
    for name, value in {"do_sample": True, "temperature": 0.1, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_p": 0.5, "epsilon_cutoff": 0.1}.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config.to_dict()
    again = _own_text(model, 2048)
    assert model.generation_config.to_dict() == own
    for ours, theirs in zip(plain, again):
        assert torch.equal(torch.stack(ours.ids), torch.stack(theirs.ids))


@pytest.mark.parametrize("own", [False, True])
def test_a_model_of_few_positions_is_cut_on_shorter_blocks(own, tmp_path):
    """Learned positions end: a block of 128 tokens does not fit into 48."""
    folder = tiny.save(tiny.gpt2(layers=3, n_positions=48), tmp_path / "m")
    wanted = int(0.8 * size_of(folder))
    model = CBDModel.from_pretrained(folder, wanted, calibration=None if own else TEXTS)
    assert abs(model.num_parameters() - wanted) <= 0.01 * wanted
    with pytest.raises(ArgumentError, match=r"a row of 64 tokens is more than the model's 48 positions"):
        measure_importance(model, Documents((torch.arange(64),), (64,)))


def test_models_that_are_none_are_refused(tmp_path):
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=260, is_decoder=True)
    tiny.save(AutoModelForCausalLM.from_config(bert), tmp_path / "bert")
    with pytest.raises(ArchitectureError, match="no axis table"):
        CBDModel.from_pretrained(tmp_path / "bert", "1K")
    with pytest.raises(StorageError, match="neither a model folder nor a Hub id"):
        CBDModel.from_pretrained(tmp_path / "absent", "1K")


@ONE_FAMILY
def test_the_command(cbd, source, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.texts(150)))
    wanted = int(0.8 * size_of(source))
    code, printed, said = cbd("cut", source, "--size", wanted, "--text", tmp_path / "text.txt", "--out", tmp_path / "made")
    assert code == 0
    assert "expected loss" in printed
    assert "nats per token\n" in said
    assert "nats per token, reconstructed on" in said
    assert "±" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made").config.cbd["strategy"] == "cut"
    assert "before reconstruction" in printed
    code, printed, said = cbd("cut", source, "--shape", "layers=3", "--reconstruct", "none", "--out", tmp_path / "sliced")
    assert code == 0
    assert "reconstruction" not in printed + said + (tmp_path / "sliced" / "README.md").read_text()
    code, printed, said = cbd("cut", source, "--shape", "layers=3", "--out", tmp_path / "json", "--json")
    assert code == 0
    assert not said
    facts = json.loads(printed)
    assert (facts["shape"]["layers"], facts["text"]) == (3, OWN_TEXT)
    assert facts["difference"] == pytest.approx(facts["loss"] - facts["whole_loss"])


@ONE_FAMILY
@pytest.mark.parametrize(("dtype", "quick"), [("bfloat16", False), ("bfloat16", True), ("float16", False), ("float32", True)])
def test_it_is_measured_in_fp32_where_the_weights_dtype_is_slow(source, dtype, quick, tmp_path, monkeypatch):
    stored, asked = getattr(torch, dtype), []
    AutoModelForCausalLM.from_pretrained(source, dtype=stored).save_pretrained(tmp_path / "model")
    shutil.copy(source / "tokenizer.json", tmp_path / "model")
    monkeypatch.setattr("cbd_hub.precision.has_bf16", lambda device: quick)
    monkeypatch.setattr("cbd_hub.single.measure_importance", lambda model, documents: asked.append(model.dtype) or measure_importance(model, documents))
    made = CBDModel.from_pretrained(tmp_path / "model", int(0.8 * size_of(source)), calibration=TEXTS)
    assert asked == [stored if quick else torch.float32]
    assert made.dtype == stored


@ONE_FAMILY
def test_a_model_that_loses_no_number_is_refused_before_anything_is_chosen(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name in ("up_proj", "gate_proj"):
            model.model.layers[1].mlp.get_submodule(name).weight.fill_(1e30)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(source / "tokenizer.json", tmp_path / "model")
    with pytest.raises(WeightsError, match="has the loss (nan|inf) on the held-out text in torch.float32"):
        CBDModel.from_pretrained(tmp_path / "model", int(0.8 * size_of(source)), calibration=TEXTS, reconstruct=None)


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--size", "900M"], 1, "a cut is smaller"), (["--size", "2K"], 1, "cannot be cut to 2K"), ([], 2, "neither size nor shape"),
    (["--size", "40K", "--column", "body"], 2, "--column is of --text, and none was given"), (["--shape", "layers"], 2, "cannot be read"), (["--size", "40K", "--reconstruct", "channel"], 2, "is not known"), (["--size", "40K", "--text", "/no/such.txt"], 1, "no file matches"),
])
def test_errors_of_the_command_are_one_line(cbd, source, arguments, code, message, tmp_path):
    got, printed, said = cbd("cut", source, "--out", tmp_path / "x", *arguments)
    assert (got, said.count("\n"), printed) == (code, 1, "")
    assert said.startswith("error: ")
    assert message in said
    assert not list(tmp_path.iterdir())
