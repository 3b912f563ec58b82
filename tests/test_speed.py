"""Sizes by their speed: measured with a clock of our own, predicted, kept, and asked for."""

import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import assembled
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from cbd_hub import CBDModel, Chain, assemble_chain, measure_speed
from cbd_hub.errors import ArgumentError, SizeError
from cbd_hub.interpolation.budget import largest_meeting
from cbd_hub.interpolation.planner import shape_in
from cbd_hub.plans import anchor_config, segment_between, stopwatch, usual_sizes
from cbd_hub.shapes import count, shape_of
from cbd_hub.sizes import parse_rate, parse_seconds
from cbd_hub.speed import stopwatch as timing
from cbd_hub.speed.measuring import Speed, SpeedWish, measure_in_turns
from cbd_hub.speed.prediction import Probe, SpeedModel, terms
from cbd_hub.speeds import speed_table


COSTS = np.array([2e-3, 1e-3, 5e-8, 3e-7])  # seconds per token, layer, parameter of a block and of the head


def law(config):
    """The speed that the pretended machine has."""
    seconds = float(COSTS @ terms(shape_of(config), config))
    return Speed(10 * seconds, seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chain whose larger segment moves the FFN too, wide enough that its steps are a small part of a size."""
    place = tmp_path_factory.mktemp("speed")
    shapes = [{"layers": 8, "ffn": 1500}, {"layers": 5, "ffn": 900}, {"layers": 3, "ffn": 900}]
    models = [tiny.save(tiny.llama(seed=number, **shape), place / f"m{number}") for number, shape in enumerate(shapes)]
    assemble_chain(models, place / "chain")
    return place / "chain"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that keeps `law`, and what was timed on it: lists of depths."""
    timed = []

    def measured(models, **options):
        timed.append([model.config.num_hidden_layers for model in models])
        return [law(model.config) for model in models]

    monkeypatch.setattr(timing, "measure_in_turns", measured)
    monkeypatch.setattr(timing, "measure_speed", lambda model: law(model.config))
    monkeypatch.setattr(timing.constants, "HF_HOME", str(tmp_path / "home"))
    return timed


def stored(model):
    """A model whose config names its class, as that of a folder does."""
    model.config.architectures = [type(model).__name__]
    return model


def record_files(tmp_path):
    return sorted((tmp_path / "home" / "cbd_hub" / "speed").glob("*.json"))


@pytest.mark.parametrize(("text", "seconds"), [("20ms", 0.02), ("1.5s", 1.5), ("2 min", 120.0), (".5 S", 0.5), ("3", 3.0), (3, 3.0), (0.25, 0.25), (np.float32(2), 2.0)])
def test_times_are_read(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("wrong", ["soon", "", "-1s", "0s", "1h", "nan", "inf", "1e3s", 0, -2.0, float("nan"), float("inf"), True, None, [], "9" * 50])
def test_what_is_no_time_or_rate_is_refused_in_one_line(wrong):
    for read in (parse_seconds, parse_rate):
        with pytest.raises(ArgumentError) as refused:
            read(wrong)
        assert "\n" not in str(refused.value)


def test_a_speed_is_the_median_of_what_the_clock_says():
    """The clock is looked at before a run and at each new token; its steps are 1, 2, 3, ... seconds."""
    clock = itertools.accumulate(itertools.count(1)).__next__
    speed = measure_speed(tiny.llama(), prompt_tokens=4, new_tokens=4, runs=1, clock=clock)
    # The first run, five looks, warms up; in the second one the steps are 7, then 8, 9 and 10.
    assert (speed.first, speed.token) == (7, 9)


def test_models_are_run_in_turns():
    """What slows the machine down for a while falls on all of them."""
    models = [tiny.llama(layers=1), tiny.llama(layers=2)]
    order = []
    for model in models:
        model.register_forward_pre_hook(lambda module, args: order.append(module.config.num_hidden_layers))
    seen = []
    measure_in_turns(models, prompt_tokens=4, new_tokens=2, runs=2, report=lambda done, total: seen.append((done, total)))
    assert order == [1, 1, 2, 2] * 3
    assert seen == [(done, 6) for done in range(1, 7)]


def test_measuring_leaves_a_model_as_it_was():
    """A model that ends a text early is timed to the end, in a short context too, and trains on."""
    model = tiny.llama(max_position_embeddings=8).train()
    before = model.generation_config.to_dict()
    model.generation_config.eos_token_id = list(range(tiny.VOCAB))[1:]
    ticks = itertools.count()
    measure_speed(model, new_tokens=6, runs=1, clock=lambda: next(ticks))
    assert next(ticks) == 2 * 7
    assert model.training
    model.generation_config.eos_token_id = before["eos_token_id"]
    assert model.generation_config.to_dict() == before
    with pytest.raises(ArgumentError, match="new_tokens=1 is too few"):
        measure_speed(model, new_tokens=1)


def test_a_wish_is_met_where_both_parts_are():
    speed = Speed(first=1.0, token=0.1)
    assert speed.latency == pytest.approx(7.3)
    assert SpeedWish.read("10", None).met(speed)
    assert not SpeedWish.read(10.1, None).met(speed)
    assert SpeedWish.read(5, "7.4s").met(speed)
    assert not SpeedWish.read(5, "7.2s").met(speed)
    assert SpeedWish.read(None, None) is None


def test_the_model_finds_the_law_of_its_probes(every):
    """Two shapes in two depths each tell all four terms apart where widths differ, in every architecture."""
    probes, configs = [], []
    for layers, hidden, ffn in ((8, 64, 96), (2, 64, 96), (6, 32, 80), (1, 32, 80)):
        config = tiny.EVERY[every](layers=layers, hidden=hidden, ffn=ffn).config
        configs.append(config)
        probes.append(Probe(tuple(terms(shape_of(config), config)), law(config)))
    found = SpeedModel.fit(probes)
    assert found.token == pytest.approx(COSTS, rel=1e-3)
    between = tiny.EVERY[every](layers=7, hidden=48, ffn=90).config
    assert found.at(terms(shape_of(between), between)).token == pytest.approx(law(between).token, rel=1e-6)


@given(st.lists(st.floats(0.5, 2.0), min_size=8, max_size=8))
def test_noise_makes_no_larger_shape_the_faster_one(noise):
    rows = [(1.0, 30.0, 1.06e8, 2.8e7), (1.0, 7.0, 2.5e7, 2.8e7), (1.0, 24.0, 7.1e7, 2.8e7), (1.0, 6.0, 1.8e7, 2.8e7)]
    probes = [Probe(row, Speed(first, token)) for row, first, token in zip(rows, noise[:4], noise[4:])]
    found = SpeedModel.fit(probes)
    for small, large in ((rows[1], rows[0]), (rows[3], rows[2]), (rows[2], rows[0])):
        assert 0 < found.at(small).token <= found.at(large).token
        assert 0 < found.at(small).latency <= found.at(large).latency


def test_the_largest_size_that_meets_a_condition_is_found():
    assert largest_meeting(100, 10_000, lambda size: size <= 4_321) == 4_321
    assert largest_meeting(100, 10_000, lambda size: True) == pytest.approx(10_000, abs=2)
    assert largest_meeting(100, 101, lambda size: True) is None
    assert largest_meeting(0, 6_400, lambda size: size <= 1_000 or 3_000 <= size <= 3_500) == 3_500  # not in order, and wide enough to be seen


def test_the_largest_size_that_is_fast_enough_is_chosen(folder, machine):
    """Of all sizes that can be made, none that is larger by more than a thousandth is predicted to meet the wish."""
    chain = Chain.from_pretrained(folder)
    watch, speeds = stopwatch(chain.files), {}
    for large, small in itertools.pairwise(chain.anchors):
        segment = segment_between(chain.files, small, large)
        model = watch.model(anchor_config(chain.files, small), segment.config)
        for size in np.linspace(small.parameters, large.parameters, 120).astype(int).tolist():
            shape = shape_in(segment, size, tolerance=0.5)
            speeds[count(shape, segment.config)] = model.at(terms(shape, segment.config))
    slow, fast = (pick(speed.latency for speed in speeds.values()) for pick in (max, min))
    for share in (0.02, 0.5, 0.8):
        wish = SpeedWish(max_latency=fast + share * (slow - fast))
        plan = chain.plan(max_latency=wish.max_latency)
        assert wish.met(plan.speed)
        assert plan.parameters >= 0.999 * max(size for size, speed in speeds.items() if wish.met(speed))
    assert chain.plan(min_tokens_per_second=plan.speed.tokens_per_second * 0.9999).parameters >= plan.parameters


def test_both_budgets_hold(folder, machine):
    chain = Chain.from_pretrained(folder)
    fast = chain.plan(min_tokens_per_second=1).parameters
    assert fast == chain.anchors[0].parameters
    budget = 4 * (chain.anchors[0].parameters + chain.anchors[1].parameters) // 2
    small = chain.plan(min_tokens_per_second=1, memory_budget=budget)
    assert 0.97 * budget <= 4 * small.parameters <= budget
    slow = chain.plan(min_tokens_per_second=1.2 * small.speed.tokens_per_second, memory_budget=budget)
    assert slow.parameters < small.parameters
    assert slow.speed.tokens_per_second >= 1.2 * small.speed.tokens_per_second
    with pytest.raises(SizeError, match="smallest anchor"):
        chain.plan(min_tokens_per_second=1, memory_budget=1000)


def test_a_model_is_made_and_its_prediction_checked_once(folder, machine, caplog):
    caplog.set_level(logging.INFO, "cbd_hub.speed")
    model = CBDModel.from_chain(folder, max_latency=10, device_map="cpu")
    assert model.config.cbd["parameters"] == Chain.from_pretrained(folder).anchors[0].parameters
    assert sum("measured" in line for line in caplog.messages) == 1
    assert not any(record.levelno > logging.INFO for record in caplog.records)
    caplog.clear()
    CBDModel.from_chain(folder, max_latency=10, device_map="cpu")
    assert not caplog.messages  # nothing was timed: the load is as quick as any


def test_a_model_is_where_it_was_timed(folder, machine, monkeypatch):
    monkeypatch.setattr("cbd_hub.plans.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(timing, "device_name", str)
    monkeypatch.setattr(timing.Stopwatch, "probe_models", lambda self, config: {config.num_hidden_layers: SimpleNamespace(config=config)})
    asked = []

    def load(prepared, arguments):
        asked.append(arguments.get("device_map"))
        raise ArgumentError("no such device here")

    monkeypatch.setattr("cbd_hub.model._load", load)
    for more in ({"max_latency": 10}, {"max_latency": 10, "device_map": "cpu"}, {"size": "max"}):
        with pytest.raises(ArgumentError, match="no such device here"):
            CBDModel.from_chain(folder, **more)
    assert asked == [{"": torch.device("cuda")}, "cpu", None]
    watch = timing.Stopwatch(torch.float32, torch.device("cuda"))
    assert watch.check(SimpleNamespace(device="cuda:0", config=tiny.llama().config), law(tiny.llama().config)) is not None
    assert watch.check(SimpleNamespace(device="cpu", config=tiny.llama().config), law(tiny.llama().config)) is None


def test_both_budgets_hold_in_a_chain_of_several_dtypes(machine, tmp_path):
    paths = [tiny.save(tiny.llama(layers=layers, seed=layers).to(dtype), tmp_path / f"m{layers}") for layers, dtype in ((5, torch.float32), (3, torch.float32), (2, torch.bfloat16))]
    chain = assemble_chain(paths, tmp_path / "chain", align=False)
    budget = 3 * chain.anchors[-1].parameters
    assert chain.plan(memory_budget=budget).parameters == chain.plan(memory_budget=budget, min_tokens_per_second=1).parameters == chain.anchors[-1].parameters


def test_a_prediction_that_is_far_off_is_said(folder, machine, caplog, monkeypatch):
    monkeypatch.setattr(timing, "measure_speed", lambda model: Speed(1.0, 1.3 * law(model.config).token))
    CBDModel.from_chain(folder, min_tokens_per_second=1, device_map="cpu")
    assert [record.levelno for record in caplog.records if "(+30%)" in record.getMessage()] == [logging.WARNING]


def test_materialize_takes_a_speed(folder, machine, tmp_path):
    plan = CBDModel.materialize(folder, min_tokens_per_second=1, output_dir=tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert plan.speed.tokens_per_second == pytest.approx(law(CBDModel.from_chain(folder, "max").config).tokens_per_second)


def test_times_are_kept_and_a_broken_file_is_measured_anew(folder, machine, tmp_path):
    CBDModel.plan(folder, min_tokens_per_second=1)
    assert machine == [[3, 1], [5, 1], [8, 2]]  # from the smallest anchor up, in its own depth and a quarter of it
    files = record_files(tmp_path)
    assert len(files) == 3
    whole = files[0].read_text()
    for text in ("", "{", "[]", '{"times": []}', '{"times": [[2, -1, 1]]}', '{"times": [[2, 1, NaN]]}', '{"times": [[0, 1, 1]]}', '{"times": [[2, 1]]}', whole[:-9]):
        files[0].write_text(text)
        assert timing.read_record(files[0]) is None, text
    CBDModel.plan(folder, min_tokens_per_second=1)
    assert len(machine) == 4
    assert files[0].read_text() == whole
    assert record_files(tmp_path) == files  # nothing half-written lies beside them


def test_what_a_time_depends_on_is_its_key(folder, machine, tmp_path, monkeypatch):
    config = stored(tiny.llama(layers=2)).config
    keys = []

    def key(dtype=torch.float32, attention=None):
        watch = timing.Stopwatch(dtype, torch.device("cpu"), attention)
        watch.speed(config)
        keys.append(len(machine))

    key()
    key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    key()
    monkeypatch.setattr(timing, "device_name", lambda device: "another")
    key()
    monkeypatch.setattr(timing, "version", lambda package: "99")
    key()
    monkeypatch.setattr(torch, "__version__", "99")
    key()
    key(torch.bfloat16)
    key(torch.bfloat16, "eager")
    config.intermediate_size += 1
    key(torch.bfloat16, "eager")
    key(torch.bfloat16, "eager")
    assert keys == [1, 1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(folder, machine, tmp_path):
    (tmp_path / "home").write_text("a file")
    assert CBDModel.plan(folder, min_tokens_per_second=1).speed is not None


def test_no_anchor_above_what_it_takes_is_timed(folder, machine):
    chain = Chain.from_pretrained(folder)
    slow = law(CBDModel.from_chain(folder, chain.anchors[1].parameters).config)
    chain.plan(min_tokens_per_second=1.01 * slow.tokens_per_second)
    assert [depths[0] for depths in machine] == [3, 5]


def test_a_deep_model_is_timed_in_fewer_layers(machine, monkeypatch):
    """An anchor that is too large for the memory to be timed in is told from its layers."""
    config = stored(tiny.llama(layers=8)).config
    block = terms(shape_of(config), config)[2] / 8
    monkeypatch.setattr(timing, "_MOST_BYTES", int(4 * block * 4.5))
    watch = timing.Stopwatch(torch.float32, torch.device("cpu"))
    assert watch.speed(config).token == pytest.approx(law(config).token)
    assert machine == [[4, 1]]


def test_no_weight_is_needed_to_time(folder, machine, tmp_path):
    import shutil
    shutil.copytree(folder, tmp_path / "bare")
    for path in (tmp_path / "bare").rglob("*.safetensors"):
        if "anchors" in path.parts:
            path.write_bytes(b"")
    assert CBDModel.plan(tmp_path / "bare", min_tokens_per_second=1).speed is not None


def test_a_device_without_room_says_so(monkeypatch):
    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "_random_state", none)
    with pytest.raises(ArgumentError, match="cpu has no room for .* to be timed; free it"):
        timing.Stopwatch(torch.float32, torch.device("cpu")).random_model(stored(tiny.llama()).config)


def test_models_that_are_timed_are_of_the_dtype_and_the_shape(every):
    source = stored(tiny.EVERY[every]())
    made = timing.Stopwatch(torch.bfloat16, torch.device("cpu")).random_model(source.config)
    assert {name: tensor.shape for name, tensor in made.named_parameters()} == {name: tensor.shape for name, tensor in source.named_parameters()}
    assert made.dtype == torch.bfloat16
    assert all(tensor.isfinite().all() for tensor in made.parameters())
    assert made(torch.tensor([[3, 4]])).logits.isfinite().all()


def bridged(folder, target):
    """The same chain with a bridge for its larger segment."""
    import shutil
    shutil.copytree(folder, target)
    values = json.loads((target / "chain.json").read_text())
    values["links"][0] = {"kind": "bridge", "small": values["links"][0]["small"], "large": values["links"][0]["large"]}
    (target / "chain.json").write_text(json.dumps(values))
    return target


def test_across_a_bridge_only_what_can_be_made_is_chosen(folder, machine, tmp_path):
    chain = Chain.from_pretrained(bridged(folder, tmp_path / "bridged"))
    large, small = chain.anchors[:2]
    speeds = [law(CBDModel.from_chain(folder, anchor.parameters).config) for anchor in (large, small)]
    middle = (speeds[0].latency + speeds[1].latency) / 2
    assert chain.plan(max_latency=middle).parameters == small.parameters
    assert CBDModel.plan(folder, max_latency=middle).parameters > small.parameters  # the same chain without the bridge
    assert usual_sizes(chain.manifest)[:2] == [large.parameters, small.parameters]


def test_a_faster_architecture_above_a_bridge_is_found(folder, machine, tmp_path, monkeypatch):
    chain = Chain.from_pretrained(bridged(folder, tmp_path / "bridged"))
    monkeypatch.setattr(timing, "measure_in_turns", lambda models, **options: [Speed(1, 0.001 if model.config.intermediate_size == 1500 else 1.0) for model in models])
    assert chain.plan(min_tokens_per_second=10).parameters == chain.anchors[0].parameters


@pytest.mark.parametrize(("wish", "error", "message"), [
    ({"min_tokens_per_second": 1e9}, SizeError, r"min_tokens_per_second=1e\+09 was asked for, but the smallest anchor of chain, [\d.]+K, reaches [\d.]+ tokens a second"),
    ({"max_latency": "1ms"}, SizeError, r"max_latency=1 ms was asked for, but the smallest anchor .* s for 64 tokens after 64 on"),
    ({"min_tokens_per_second": 1, "size": "max"}, ArgumentError, "came with size= or shape="),
    ({"max_latency": 1, "shape": {"layers": 3}}, ArgumentError, "came with size= or shape="),
    ({"max_latency": "soon"}, ArgumentError, "is no time"),
    ({"min_tokens_per_second": "many"}, ArgumentError, "is no rate"),
    ({"max_latency": 1, "strategy": "slerp"}, ArgumentError, "strategy"),
    ({"max_latency": 1, "quantization_config": BitsAndBytesConfig()}, ArgumentError, "quantization_config= came with a speed"),
    ({"max_latency": 1, "device_map": {"a": "cpu", "b": "disk"}}, ArgumentError, "spreads the model over cpu, disk"),
    ({"max_latency": 1, "device_map": "abacus"}, ArgumentError, "is none on which"),
    ({"max_latency": 1, "device_map": "meta"}, ArgumentError, "computes nothing"),
    ({"max_latency": 1, "dtype": "int4"}, ArgumentError, "no dtype"),
    ({"max_latencies": 1}, ArgumentError, "did you mean max_latency="),
])
def test_what_cannot_be_met_or_meant_is_refused(folder, machine, wish, error, message):
    with pytest.raises(error, match=message) as refused:
        CBDModel.from_chain(folder, **wish)
    assert "\n" not in str(refused.value)


def test_auto_classes_take_a_speed(folder, machine, tmp_path):
    from transformers import AutoConfig

    import cbd_hub.auto  # noqa: F401
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "config.json").write_text(json.dumps({"model_type": "cbd_chain"}))
    config = AutoConfig.from_pretrained(tmp_path / "index", min_tokens_per_second=20, max_latency="1s")
    assert (config.min_tokens_per_second, config.max_latency) == (20, "1s")


def test_the_table_of_speeds(folder, machine, monkeypatch):
    monkeypatch.setattr("cbd_hub.speeds.measure_in_turns", lambda models, **options: [law(model.config) for model in models])
    rows = speed_table(folder, check=True)
    chain = Chain.from_pretrained(folder)
    assert [row.plan.parameters for row in rows if row.plan.strategy == "anchor"] == [anchor.parameters for anchor in chain.anchors]
    assert len(rows) == 5
    held = []
    monkeypatch.setattr("cbd_hub.speeds._AT_ONCE", 4 * rows[0].plan.parameters)
    monkeypatch.setattr("cbd_hub.speeds.measure_in_turns", lambda models, **options: held.append(len(models)) or [law(model.config) for model in models])
    assert [row.measured for row in speed_table(folder, check=True)] == [row.measured for row in rows]
    assert held[0] == 1
    assert sum(held) == 5
    for row in rows:
        assert row.predicted.token == pytest.approx(row.measured.token, rel=1e-6)
    before = len(machine)
    speed_table(folder)
    assert len(machine) == before
    speed_table(folder, recalibrate=True)
    assert len(machine) == before + 3


def test_the_command_speed(folder, machine, cbd, monkeypatch):
    code, printed, said = cbd("speed", folder)
    assert code == 0
    assert "tokens a second" in printed
    assert "timing" in said
    code, printed, said = cbd("speed", folder, "--sizes", "min,max", "--check", "--json")
    assert code == 0
    rows = json.loads(printed)["results"]
    assert [set(row) >= {"tokens_per_second", "latency", "measured_tokens_per_second", "off"} for row in rows] == [True, True]
    for arguments, expected, message in (
        (("--sizes", ","), 2, "name none"), (("--sizes", "900M"), 1, "outside the chain"), (("--device", "abacus"), 2, "is none on which"), (("--dtype", "int4"), 2, "no dtype"),
    ):
        code, printed, said = cbd("speed", folder, *arguments)
        assert (code, printed) == (expected, "")
        assert message in said
        assert said.count("\n") == 1


def test_commands_take_a_speed(folder, machine, cbd, tmp_path):
    code, printed, _ = cbd("plan", folder, "--min-tokens-per-second", 1)
    assert code == 0
    assert "(predicted)" in printed
    code, printed, _ = cbd("plan", folder, "--max-latency", "5s", "--json")
    assert json.loads(printed)["speed"]["latency"] <= 5
    code, printed, _ = cbd("make", folder, "--max-latency", "5s", "--out", tmp_path / "m")
    assert code == 0
    assert "predicted here" in printed
    assert cbd("generate", folder, "a small", "--min-tokens-per-second", 1, "--max-new-tokens", 2)[0] == 0
    code, printed, said = cbd("make", folder, "--max-latency", "1ms", "--out", tmp_path / "none")
    assert (code, printed) == (1, "")
    assert "smallest anchor" in said
    assert not (tmp_path / "none").exists()
    assert cbd("plan", folder, "--max-latency", "soon")[0] == 2


def test_a_chain_of_layers_alone_gives_whole_layers(machine, tmp_path):
    """Sizes come in steps there; the step below is found, whatever the tolerance."""
    chain = Chain.from_pretrained(assembled(tmp_path, 8, 2))
    five = CBDModel.from_chain(chain.files.root, shape={"layers": 5}).config
    plan = chain.plan(min_tokens_per_second=0.999 * law(five).tokens_per_second)
    assert plan.shape.layers == 5
    assert plan.asked == plan.parameters
