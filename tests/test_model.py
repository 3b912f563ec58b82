"""from_chain, plan and materialize on distilled chains of every family."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import assembled
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.cards import chain_call
from cbd_hub.errors import ArgumentError, IntegrityError, ManifestError, SizeError, StorageError, WeightsError
from cbd_hub.shapes import shape_of


def anchors(chain):
    return Chain.from_pretrained(chain).anchors


def middles(chain):
    """A size inside each segment."""
    found = anchors(chain)
    return [(small.parameters + large.parameters) // 2 for large, small in zip(found, found[1:])]


def same(first, second):
    first, second = dict(first.named_parameters()), dict(second.named_parameters())
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{}, {"strategy": "blend"}, {"strategy": "patch"}, {"alpha": 0.3}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_at_an_anchors_size_it_is_that_anchor_bit_for_bit(chain, options):
    for anchor in anchors(chain):
        stored = AutoModelForCausalLM.from_pretrained(chain / "anchors" / anchor.name)
        for size in (anchor.parameters, anchor.name, str(anchor.parameters), np.int64(anchor.parameters)):
            model = CBDModel.from_chain(chain, size=size, **options)
            assert same(model, stored)
            assert model.config.cbd["strategy"] == "anchor"
        for shape in (anchor.shape, {name: np.int64(value) for name, value in anchor.shape.model_dump().items()}):
            assert same(CBDModel.from_chain(chain, shape=shape, **options), stored)


def test_min_and_max(chain):
    sizes = [anchor.parameters for anchor in anchors(chain)]
    assert CBDModel.plan(chain, "max").parameters == max(sizes)
    assert CBDModel.plan(chain, "min").parameters == min(sizes)


def test_it_is_an_ordinary_model(chain, family, tmp_path):
    size = middles(chain)[0]
    model = CBDModel.from_chain(chain, size=size)
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(chain / "anchors" / anchors(chain)[0].name))
    assert not model.training
    unique = sum({id(p): p.numel() for p in model.parameters()}.values())
    assert unique == model.config.cbd["parameters"] == CBDModel.plan(chain, size=size).parameters
    assert abs(unique - size) <= 0.01 * size
    assert all(parameter.device.type != "meta" for parameter in model.parameters())
    assert model.config.name_or_path == str(chain)
    model.save_pretrained(tmp_path / "saved")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 5)


def test_an_open_chain_makes_models_wherever_one_stands(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(chain.parent)
    opened = Chain.from_pretrained(chain.name)
    monkeypatch.chdir(tmp_path)
    assert tiny.same(opened.model("min"), CBDModel.from_chain(chain, "min"))
    assert CBDModel.plan(opened, "MIN").parameters == CBDModel.plan(chain, float(opened.anchors[-1].parameters)).parameters
    assert len(repr(CBDModel.plan(opened, "min"))) < 200
    with pytest.raises(ArgumentError, match="chain is a NoneType; give a folder, a Hub id or an open Chain"):
        CBDModel.from_chain(None, "min")
    with pytest.raises(ArgumentError, match="is open already, and revision= says how a chain is opened"):
        opened.model("min", revision="v1")


def test_loading_writes_nothing_into_the_chain(chain):
    """The model owns its memory: changing it changes no anchor."""
    name = anchors(chain)[0].name
    before = load_file(chain / "anchors" / name / "model.safetensors")
    model = CBDModel.from_chain(chain, size="max")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    after = load_file(chain / "anchors" / name / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16])
def test_materialize_gives_the_same_model_as_from_chain(chain, dtype, tmp_path):
    for index, size in enumerate([*middles(chain), "min"]):
        out = tmp_path / str(index)
        plan = CBDModel.materialize(chain, size, output_dir=out, dtype=dtype)
        made = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        direct = CBDModel.from_chain(chain, size, **({"dtype": dtype} if dtype else {}))
        assert same(made, direct)
        assert made.dtype == direct.dtype
        ids = torch.tensor([[10, 20, 30]])
        assert torch.equal(made(ids).logits, direct(ids).logits)
        assert plan.parameters == made.config.cbd["parameters"]
        assert AutoTokenizer.from_pretrained(out)("héllo ✓").input_ids == tiny.tokenizer()("héllo ✓").input_ids
        assert (out / "chat_template.jinja").is_file()


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_what_is_made_loads_without_cbd_hub(chain, tmp_path):
    CBDModel.materialize(chain, middles(chain)[0], output_dir=tmp_path / "m")
    code = (
        "import sys; sys.modules['cbd_hub'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True); AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(sum({id(p): p.numel() for p in m.parameters()}.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert int(done.stdout) == CBDModel.plan(chain, middles(chain)[0]).parameters
    assert "randomly initialized" not in done.stderr + done.stdout


@pytest.mark.parametrize("argument", ["generation_config", "quantization_config", "output_loading_info"])
def test_what_would_not_show_on_disk_is_refused(chain, tmp_path, argument):
    with pytest.raises(ArgumentError, match=f"{argument}= is of a load"):
        CBDModel.materialize(chain, "min", output_dir=tmp_path / "out", **{argument: True})
    assert not list(tmp_path.iterdir())


def test_materialize_leaves_nothing_behind_when_the_place_is_taken(chain, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("precious")
    with pytest.raises(StorageError, match="already exists"):
        CBDModel.materialize(chain, "min", output_dir=taken)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine.txt"]


def test_materialize_leaves_nothing_behind_when_the_disk_is_full(chain, tmp_path, monkeypatch):
    import cbd_hub.model

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cbd_hub.model, "write_safetensors", full)
    with pytest.raises(StorageError, match="No space left"):
        CBDModel.materialize(chain, "min", output_dir=tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_the_call_that_a_card_states_makes_the_same_model(chain):
    """Of an adapter that was trained on a model: also where alpha or the shape were given, or the smaller neighbour is padded."""
    large, small = anchors(chain)[0], anchors(chain)[1]
    middle = (large.parameters + small.parameters) // 2
    for wish in ({"size": "max"}, {"size": middle}, {"size": middle, "strategy": "blend"}, {"size": middle, "alpha": 0.2}, {"shape": CBDModel.plan(chain, middle).shape, "alpha": 0.9}):
        model = CBDModel.from_chain(chain, **wish)
        again = eval(chain_call(str(chain), model.config.cbd, shape_of(model.config)), {"CBDModel": CBDModel})
        assert tiny.same(model, again), wish
        assert again.config.cbd["strategy"] == model.config.cbd["strategy"], wish


def test_a_model_with_settings_of_sampling_that_does_not_sample_saves_like_its_anchor(tmp_path):
    """As plain transformers, which refuses only what was changed; older versions refuse both."""
    models = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (4, 2)]
    for folder in models:
        (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assemble_chain(models, tmp_path / "chain", align=False)
    for size in ("max", middles(tmp_path / "chain")[0]):
        made = CBDModel.from_chain(tmp_path / "chain", size, tolerance=0.5)
        assert made.generation_config.temperature == 0.6
        try:
            AutoModelForCausalLM.from_pretrained(models[0]).save_pretrained(tmp_path / f"plain{size}")
        except ValueError:
            with pytest.raises(ValueError, match="do_sample"):
                made.save_pretrained(tmp_path / f"saved{size}")
        else:
            made.save_pretrained(tmp_path / f"saved{size}")


def test_auto_takes_what_measured_best(chain):
    opened = Chain.from_pretrained(chain)
    point = min(opened.manifest.links[1].curve, key=lambda point: point.loss)
    assert CBDModel.plan(chain, point.size).strategy == point.strategy
    smaller = opened.neighbours(point.size)[0].evaluations[-1].loss
    assert CBDModel.plan(chain, point.size).expected == pytest.approx(min(point.loss, smaller))


def test_alpha_moves_the_shared_parameters_from_one_anchor_to_the_other(chain):
    """alpha weighs the smaller neighbour; the embedding is shared by both, so it shows the formula plainly."""
    large, small = anchors(chain)[:2]
    ends = [AutoModelForCausalLM.from_pretrained(chain / "anchors" / a.name).get_input_embeddings().weight for a in (small, large)]
    for alpha in (0.0, 0.25, 1.0):
        model = CBDModel.from_chain(chain, middles(chain)[0], strategy="blend", alpha=alpha)
        torch.testing.assert_close(model.get_input_embeddings().weight, alpha * ends[0] + (1 - alpha) * ends[1])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sise": 3}, r"sise= is no argument of from_chain; did you mean size=\?"),
    ({"size": "min", "torch_dtyp": 3}, "did you mean torch_dtype="),
    ({"size": "min", "atn_implementation": 3}, "did you mean attn_implementation="),
    ({"size": "min", "state_dict": {}}, "state_dict= cannot be used with from_chain"),
    ({"size": "min", "dtype": "int8"}, "no dtype that weights"),
    ({}, "neither size nor shape"),
    ({"size": "min", "tolerance": 7}, "tolerance=7"),
    ({"size": "min", "strategy": "best"}, "choose one of"),
    ({"size": "min", "alpha": -1}, "outside 0 to 1"),
    ({"size": "min", "alpha": "0.5"}, "alpha='0.5' is outside 0 to 1; it is a number"),
    ({"size": "min", "tolerance": "0.5"}, "tolerance='0.5' is outside 0 to 1; it is a number"),
    ({"size": "min", "strategy": "patch", "alpha": 0.5}, "no meaning for strategy=\"patch\""),
    ({"shape": "layers=2"}, "shape='layers=2' is no shape; give its fields"),
])
def test_wrong_arguments_are_named_with_the_way_out(chain, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        CBDModel.from_chain(chain, **arguments)


@pytest.mark.parametrize(("call", "own"), [
    (lambda **more: CBDModel.plan("no", "1M", **more), "tolerance"), (lambda **more: CBDModel.from_chain("no", "1M", **more), "adapter_size"),
    (lambda **more: CBDModel.materialize("no", "1M", output_dir="x", **more), "memory_budget"), (lambda **more: CBDModel.from_pretrained("no", "1M", **more), "calibration"),
])
def test_a_wrong_argument_is_compared_with_the_callers_own(call, own):
    name = next(name for name in ("plan", "from_chain", "materialize", "from_pretrained") if name in call.__code__.co_names)
    with pytest.raises(ArgumentError, match=rf"{own}x= is no argument of {name}; did you mean {own}="):
        call(**{f"{own}x": 1})
    with pytest.raises(ArgumentError, match=f"config= cannot be used with {name}: "):
        call(config=5)


def test_what_a_cut_has_no_argument_for_is_not_recommended():
    """alpha= is one of from_chain alone."""
    with pytest.raises(ArgumentError, match="alpha= is no argument of from_pretrained; did you mean (?!alpha)"):
        CBDModel.from_pretrained("no", "1M", alpha=0.5)


@pytest.mark.parametrize("size", ["138Q", "", "900M", 1, -5, 10**18, "0"])
def test_wrong_sizes(chain, size):
    with pytest.raises(SizeError):
        CBDModel.from_chain(chain, size=size)


def test_a_shape_and_a_size_that_contradict_each_other(chain):
    found = anchors(chain)
    with pytest.raises((SizeError, ArgumentError)):
        CBDModel.plan(chain, found[1].parameters + 500, shape={"layers": 4, "ffn": 47})


def test_loader_arguments_pass_through(chain):
    size = middles(chain)[0]
    model, info = CBDModel.from_chain(chain, size, attn_implementation="eager", dtype=torch.bfloat16, device_map="cpu", output_loading_info=True)
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    assert info["plan"].parameters == model.config.cbd["parameters"]
    assert not info["missing_keys"]
    full = CBDModel.from_chain(chain, size)
    for name, parameter in full.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(torch.bfloat16)), name


@pytest.mark.parametrize("size", ["max", "middle"])
def test_it_quantises_while_it_loads(size, tmp_path):
    """As transformers does with the same weights in a folder: near the exact model, and saved and loaded as it is."""
    chain = assembled(tmp_path, 4, 2)
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    size = sum(anchor.parameters for anchor in Chain.from_pretrained(chain).anchors[:2]) // 2 if size == "middle" else size
    exact, made = CBDModel.from_chain(chain, size), CBDModel.from_chain(chain, size, quantization_config=config)
    CBDModel.materialize(chain, size, output_dir=tmp_path / "made")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "made", quantization_config=config)
    made.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        logits, *same, expected = (model(ids).logits for model in (made, plain, again, exact))
    assert all(torch.equal(logits, other) for other in same)
    assert 0 < (logits - expected).abs().max() < 0.2 * expected.std()
    assert made.config.cbd == exact.config.cbd


def test_no_such_chain(tmp_path):
    for wrong in (tmp_path, tmp_path / "absent", "./absent", "no/such/thing"):
        with pytest.raises(ManifestError):
            CBDModel.plan(wrong, "1M")
    with pytest.raises((ManifestError, StorageError), match="org/absent"):
        CBDModel.plan("org/absent", "1M")


@pytest.fixture
def copy(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "copy")
    return tmp_path / "copy"


def weights(copy, index=0):
    return copy / "anchors" / anchors(copy)[index].name / "model.safetensors"


def test_a_truncated_file_is_refused(copy):
    path = weights(copy)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="cut short"):
        CBDModel.from_chain(copy, "max")


def test_one_changed_byte_is_refused(copy):
    path = weights(copy)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="recorded hash"):
        CBDModel.from_chain(copy, "max")


def test_a_changed_config_is_refused(copy):
    path = weights(copy).parent / "config.json"
    path.write_text(path.read_text().replace("260", "261"))
    with pytest.raises(IntegrityError, match="config.json"):
        CBDModel.from_chain(copy, "max")


def test_a_missing_file_is_refused(copy):
    weights(copy).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        CBDModel.from_chain(copy, "max")


def rehash(copy, change):
    """Change an anchor's tensors and record the new hashes, as an honest but wrong tool would."""
    path = weights(copy)
    tensors = change(load_file(path))
    save_file(tensors, path, {"format": "pt"})
    from cbd_hub.files import chunk_hashes, sha256, write_text
    manifest = json.loads((copy / "chain.json").read_text())
    entry = manifest["anchors"][0]
    entry["files"]["model.safetensors"] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    listing = copy / entry["chunks"]["path"]
    write_text(listing, json.dumps({"files": {"model.safetensors": chunk_hashes(path)}}))
    entry["chunks"]["sha256"] = sha256(listing)
    (copy / "chain.json").write_text(json.dumps(manifest))


def test_missing_extra_and_misshaped_tensors_are_named(copy):
    key = sorted(load_file(weights(copy)))[3]
    original = load_file(weights(copy))
    for change, message in (
        (lambda t: {k: v for k, v in t.items() if k != key}, f"lacks tensors {key}"),
        (lambda t: {**original, "extra.weight": torch.zeros(3)}, "unexpected tensors .*extra.weight"),
        (lambda t: {**original, key: original[key].flatten()[:-1].clone()}, f"{key} has shape"),
        (lambda t: {**original, key: original[key].to(torch.int32)}, "not floating point"),
    ):
        rehash(copy, change)
        with pytest.raises(WeightsError, match=message):
            CBDModel.from_chain(copy, "max")


def test_a_manifest_that_lies_about_a_shape_is_refused(copy):
    manifest = json.loads((copy / "chain.json").read_text())
    manifest["anchors"][0]["parameters"] += 1
    (copy / "chain.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="chain.json says"):
        CBDModel.from_chain(copy, "max")


def test_a_map_that_was_changed_is_refused(copy):
    from safetensors.numpy import save_file as save_arrays
    anchor = anchors(copy)[1]
    save_arrays({"kept.layers": np.zeros(4, dtype=np.int32)}, copy / anchor.maps.path)
    with pytest.raises(IntegrityError, match="recorded hash"):
        CBDModel.from_chain(copy, middles(copy)[0])


def test_a_chain_is_copied_whole(chain, tmp_path):
    Chain.from_pretrained(chain).save_pretrained(tmp_path / "copy")
    assert Chain.from_pretrained(tmp_path / "copy").manifest == Chain.from_pretrained(chain).manifest.model_copy(update={"name": "chain"})
    for size in middles(chain):
        assert same(CBDModel.from_chain(chain, size), CBDModel.from_chain(tmp_path / "copy", size))


def test_a_second_load_checks_nothing_again(chain, monkeypatch):
    """A verdict is remembered: with every recorded hash made wrong afterwards, what was checked before is read all the same."""
    from cbd_hub.hub import open_chain
    from cbd_hub.plans import anchor_config
    from cbd_hub.remote import open_weights
    CBDModel.from_chain(chain, "max")
    files = open_chain(chain)
    checkpoint = open_weights(files, files.manifest.anchors[0], anchor_config(files, files.manifest.anchors[0]))
    for checked in checkpoint._checked.values():
        monkeypatch.setattr(checked, "_chunks", ["wrong"] * len(checked._chunks))
    assert checkpoint[next(iter(checkpoint._where))] is not None


def record(copy, name):
    """Record a changed file of the largest anchor, as an attacker would."""
    from cbd_hub.files import sha256
    manifest = json.loads((copy / "chain.json").read_text())
    path = weights(copy).parent / name
    manifest["anchors"][0]["files"][name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    (copy / "chain.json").write_text(json.dumps(manifest))


def test_code_of_a_stranger_is_never_run(copy):
    path = weights(copy).parent / "config.json"
    (path.parent / "evil.py").write_text("raise SystemExit('ran')")
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}))
    record(copy, "config.json")
    with pytest.raises(WeightsError, match="never run"):
        CBDModel.from_chain(copy, "max")


def test_links_that_leave_the_folder_leak_nothing(copy, tmp_path):
    (tmp_path / "secret").write_text("secret")
    path = weights(copy).parent / "tokenizer.json"
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    record(copy, "tokenizer.json")
    with pytest.raises(ManifestError, match="leads out"):
        CBDModel.materialize(copy, "max", output_dir=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_changed_tokenizer_is_refused(copy, tmp_path):
    (weights(copy).parent / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        CBDModel.materialize(copy, "max", output_dir=tmp_path / "m")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        Chain.from_pretrained(copy).tokenizer()


def test_a_tied_model_with_another_head_is_refused(copy):
    rehash(copy, lambda tensors: {**tensors, "lm_head.weight": torch.randn(260, 32)})
    with pytest.raises(WeightsError, match="ties its head"):
        CBDModel.from_chain(copy, "max")


def test_threads_may_load_at_once(chain):
    from concurrent.futures import ThreadPoolExecutor
    expected = CBDModel.from_chain(chain, middles(chain)[0])
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: CBDModel.from_chain(chain, middles(chain)[0]), range(8)))
    assert all(same(model, expected) for model in made)


def test_files_beside_the_model_are_not_read_for_it(tmp_path):
    """As transformers chooses: model.safetensors, else the index's files; the maker's own format and adapters may lie beside them."""
    model = tiny.llama(seed=5)
    single = tiny.save(model, tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    tiny.tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in (single, tmp_path / "shards"):
        save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
        save_file({"model.norm.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    other = tiny.save(tiny.llama(layers=2), tmp_path / "small")
    for folder in (single, tmp_path / "shards"):
        chain = assemble_chain([folder, other], tmp_path / f"chain of {folder.name}", align=False)
        assert all(name.startswith("model") for name in chain.anchors[0].weight_files)
        assert same(chain.model("max"), model)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    whole = index.read_text()
    for text in (whole.replace("model-00001", "model-99999"), whole.replace("model-00001", "../model-00001"), "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
            assemble_chain([tmp_path / "shards", other], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_old_name_of_dtype_counts_on_disk_too(chain, tmp_path):
    with pytest.warns(FutureWarning, match="torch_dtype"):
        CBDModel.materialize(chain, "min", output_dir=tmp_path / "m", torch_dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_damaged_chain_is_not_copied_as_a_sound_one(copy, tmp_path):
    path = weights(copy)
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="was changed or damaged"):
        Chain.from_pretrained(copy).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
