"""The Space without a browser: what a visitor can ask for, what is refused, the API, and how it is deployed."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from cbd_hub import CBDModel, Chain
from cbd_hub.errors import ArgumentError, BusyError, DataError, IntegrityError, SizeError
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.plans import plan_costs
from cbd_hub.space.archives import Archives
from cbd_hub.space.desk import Desk
from cbd_hub.space.facts import Scale
from cbd_hub.space.figure import curve_figure
from cbd_hub.space.limits import Limits
from cbd_hub.space.models import ModelCache
from cbd_hub.space.push import is_release, push_space, wheel
from cbd_hub.space.render import facts_card, measured_table
from cbd_hub.space.serving import serve
from cbd_hub.space.writing import Measure, Sampling, Writer, step_tokens


pytest.importorskip("gradio", reason="the Space's tests need gradio: pip install 'cbd-hub[dev]'")


@pytest.fixture(scope="module")
def desk(shown):
    return Desk(Chain.from_pretrained(shown), Limits(download=True, new_tokens=64, prompt_tokens=200))


def middle(desk):
    first, second = desk.chain.anchors[:2]
    return (first.parameters + second.parameters) // 2


def last(states):
    *_, end = states
    return end


def test_facts_are_those_of_the_plan_and_of_the_model(desk):
    for wish in ("min", "max", middle(desk)):
        facts, plan = desk.picker.facts(wish), desk.chain.plan(wish, tolerance=0.99)
        model = CBDModel.from_chain(desk.chain.files.name, facts.parameters, tolerance=0.99)
        assert facts.parameters == plan.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert (facts.layers, facts.hidden, facts.loss, facts.strategy) == (plan.shape.layers, plan.shape.hidden, plan.expected, plan.strategy)
        assert facts.memory == {"float32": 4 * facts.parameters, "bfloat16": 2 * facts.parameters, "int8": facts.parameters}
        assert facts.stderr > 0
        assert 0 < facts.download <= sum(anchor.files[name].bytes for anchor in desk.chain.anchors for name in anchor.weight_files)
    assert desk.picker.facts("min").position == 1.0
    assert 0 < desk.picker.facts(middle(desk)).position < 1
    assert desk.models.sizes == [], "no weight was loaded for them"


def test_the_error_at_a_measured_size_is_the_measured_one(desk):
    points = [point for link in desk.chain.manifest.links for point in link.curve if desk.picker.facts(point.size).strategy == point.strategy]
    assert points
    for point in points:
        assert desk.picker.facts(point.size).stderr == pytest.approx(point.stderr)
    anchor = desk.chain.anchors[0]
    assert desk.picker.facts("max").stderr == pytest.approx(anchor.evaluations[-1].stderr)


def test_the_download_is_what_a_load_fetches(hub, shown, desk, monkeypatch):
    Chain.from_pretrained(shown).push_to_hub("org/tiny")
    remote = Desk(Chain.from_pretrained("org/tiny"))
    for wish in ("min", middle(desk)):
        plan = remote.chain.plan(wish)
        assert remote.picker.facts(wish).download == sum(plan_costs(remote.picker.files, plan)["bytes_to_fetch"].values()) == desk.picker.facts(wish).download


def test_a_download_is_counted_and_the_python_lines_are_pinned(hub, shown):
    Chain.from_pretrained(shown).push_to_hub("org/tiny")
    remote = Desk(Chain.from_pretrained("org/tiny"))
    with remote.models.hold([remote.picker.size("min")]) as (entry,):
        entry.future.result(60)
    assert entry.came >= entry.to_come == remote.picker.facts("min").download
    assert entry.share == 1.0
    with remote.models.hold([remote.picker.size("min")]) as (again,):
        assert again is entry
    fresh = Desk(Chain.from_pretrained("org/tiny"))
    with fresh.models.hold([fresh.picker.size("min")]) as (cached,):
        cached.future.result(60)
    assert cached.to_come == 0
    assert remote.picker.name == "org/tiny"
    assert f'revision="{remote.chain.files.revision}"' in remote.picker.snippet("min")


def test_a_chain_that_comes_back_is_shown(shown, tmp_path, monkeypatch):
    import httpx
    place, found = tmp_path / "late", {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    thread = threading.Thread(target=lambda: found.update(page=serve(str(place), wait=0.2, host="127.0.0.1", port=port, block=False)), daemon=True)
    thread.start()

    def says(text):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if text in httpx.get(f"http://127.0.0.1:{port}/config", timeout=20).text:
                    return True
            time.sleep(0.1)
        return False

    assert says("neither a folder nor a Hub id")
    shutil.copytree(shown, tmp_path / "aside")
    (tmp_path / "aside").rename(place)
    assert says("One chain, any size from")
    thread.join(20)
    found["page"].close()


def test_every_place_of_the_slider_is_a_size(desk):
    picker, scale = desk.picker, desk.picker.scale
    snaps = {snap.size for snap in picker.snaps}
    assert {anchor.parameters for anchor in desk.chain.anchors} <= snaps
    for snap in snaps:
        assert picker.at(scale.value(snap)) == snap
    assert picker.at(scale.low) == picker.smallest
    assert picker.at(scale.high + 1) == picker.largest
    places = [scale.low + share / 40 * (scale.high - scale.low) for share in range(41)]
    sizes = [picker.at(place) for place in places]
    assert sizes == sorted(sizes)
    assert [picker.size(size) for size in sizes] == sizes
    assert [picker.at(picker.stand(size)) for size in sizes] == sizes, "a link reopens that very size"
    with pytest.raises(ArgumentError, match="the slider has no number"):
        picker.at(float("nan"))
    assert Scale.of(54_000, 54_000).high > Scale.of(54_000, 54_000).low


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_budget_gives_the_largest_size_that_fits(desk, dtype, width):
    budget = middle(desk) * width + 10
    size = desk.picker.fits(f"{budget}B", dtype)
    assert size * width <= budget
    above = [other for other in (desk.picker.at(desk.picker.scale.low + share / 60 * (desk.picker.scale.high - desk.picker.scale.low)) for share in range(61)) if other > size]
    assert all(other * width > budget for other in above)
    assert desk.picker.fits("99GB", dtype) == desk.picker.largest
    assert budget // width - 600 < desk.picker.at(desk.picker.place(size)) <= size, "the slider stands at a size that fits, and near it"
    assert desk.picker.at(desk.picker.place(desk.picker.smallest)) == desk.picker.smallest
    with pytest.raises(SizeError, match="hold no size of this chain"):
        desk.picker.fits("1kB", dtype)
    with pytest.raises(SizeError, match="write a number and a unit"):
        desk.picker.fits("a lot", dtype)


def test_a_continuation_is_what_transformers_generates(desk):
    size, prompt = middle(desk), "a small model learns"
    end = last(desk.generate(size, prompt, Sampling(new_tokens=20)))
    model, tokenizer = desk.chain.model(desk.picker.size(size), tolerance=0.99), desk.chain.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20, do_sample=False)
    assert end.text == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert end.state == "done"
    assert end.tokens == 20
    assert end.tokens_per_second > 0
    assert end.memory == 4 * end.size
    assert end.process > 10**7


def test_a_long_prompt_is_read_in_parts_with_the_same_result(desk):
    model, tokenizer = desk.chain.model("max"), desk.chain.tokenizer()
    ids = tokenizer("every size between two anchors of one chain " * 4)["input_ids"]
    writer = Writer(model, tokenizer, ids, Sampling(new_tokens=8))
    steps = 0
    while not writer.done:
        writer.step()
        steps += 1
    whole = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=8, do_sample=False)
    assert writer.new == whole[0, len(ids) :].tolist()
    assert steps == -(-len(ids) // step_tokens(model)) + 7


def test_a_large_model_reads_less_in_a_step():
    def model(parameters, device="cpu"):
        return SimpleNamespace(device=torch.device(device), num_parameters=lambda: parameters)

    assert [step_tokens(model(count)) for count in (10**6, 10**9, 7 * 10**9)] == [32, 4, 1]
    assert step_tokens(model(7 * 10**9, "cuda")) > 100


def test_a_seed_gives_the_same_text_whoever_else_draws(desk):
    sampling = Sampling(temperature=1.0, top_p=0.9, new_tokens=16, seed=3)
    first = last(desk.generate("max", "a model", sampling)).text
    torch.manual_seed(99)
    assert last(desk.generate("max", "a model", sampling)).text == first
    assert last(desk.generate("max", "a model", Sampling(1.0, 0.9, 16, 4))).text != first
    assert last(desk.compare(["max", "min"], "a model", sampling))[0].text == first


def test_a_closed_continuation_computes_nothing_more(desk, monkeypatch):
    steps = []
    step = Writer.step
    monkeypatch.setattr(Writer, "step", lambda writer: (steps.append(1), time.sleep(0.05), step(writer)))
    states = desk.generate("max", "a model", Sampling(new_tokens=60))
    while next(states).state != "writing":
        pass
    states.close()
    done = len(steps)
    time.sleep(0.2)
    assert len(steps) == done < 60
    assert not any(entry.users for entry in desk.models._held.values())


def test_a_chat_goes_through_the_template(desk, monkeypatch):
    end = last(desk.chat("max", [{"role": "user", "content": "a size?"}], Sampling(new_tokens=4)))
    tokenizer, model = desk.chain.tokenizer(), desk.chain.model("max")
    ids = tokenizer("user: a size?\n", return_tensors="pt")["input_ids"]
    assert end.text == tokenizer.decode(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(ArgumentError, match="the message is empty"):
        last(desk.chat("max", [{"role": "user", "content": " "}], Sampling()))


def test_side_by_side_answers_alone_and_perplexity_is_the_evaluations(desk):
    text = "every size between two anchors learns from its teacher. " * 3
    ends = last(desk.compare(["min", middle(desk), "max"], "a model", Sampling(new_tokens=8), text))
    assert [end.size for end in ends] == [desk.picker.smallest, desk.picker.size(middle(desk)), desk.picker.largest]
    ids = torch.tensor(desk.chain.tokenizer()(text)["input_ids"])
    for end in ends:
        assert end.text == last(desk.generate(end.size, "a model", Sampling(new_tokens=8))).text
        losses = document_losses(ModelRunner(desk.chain.model(end.size, tolerance=0.99)), Documents((ids,), (0,)), bf16=False)
        assert end.perplexity == pytest.approx(losses.perplexity, rel=1e-4)
        assert end.bits_per_byte is None
    with pytest.raises(DataError, match="fewer than two tokens"):
        desk.compare(["min", "max"], "a model", Sampling(new_tokens=1), "x")
    with pytest.raises(ArgumentError, match="text to measure has 201 tokens, more than 200"):
        desk.compare(["min", "max"], "a model", Sampling(new_tokens=1), "x" * 201)
    with pytest.raises(ArgumentError, match="compare two or three"):
        desk.compare(["min", "min"], "a", Sampling())


def test_measuring_ends_with_the_turn(desk, monkeypatch):
    step = Measure._step
    monkeypatch.setattr(Measure, "_step", lambda self, start, stop: time.sleep(0.3) or step(self, start, stop))
    monkeypatch.setattr("cbd_hub.space.writing.step_tokens", lambda model: 8)
    hasty = Desk(desk.chain, Limits(seconds=1, new_tokens=64, prompt_tokens=200))
    with hasty.models.hold([hasty.picker.smallest, hasty.picker.largest]) as entries:
        for entry in entries:
            entry.future.result(60)
    started = time.monotonic()
    ends = last(hasty.compare(["min", "max"], "a", Sampling(new_tokens=2), "every size between two anchors learns from its teacher. " * 3))
    assert time.monotonic() - started < 3
    assert (ends[0].note, ends[1].perplexity) == ("stopped after 1 s, the longest turn here", None)


def test_an_answer_without_a_word_is_no_turn(desk, monkeypatch):
    from cbd_hub.space.page import _Page
    asked = []
    monkeypatch.setattr(desk, "chat", lambda size, turns, sampling: asked.append(turns) or iter(()))
    page = _Page(desk)
    history = [{"role": role, "content": content} for role, content in (("user", "first"), ("assistant", "yes"), ("user", "stopped"), ("assistant", "\u2026"))]
    list(page.chatted(page.picker.stand(page.picker.largest), "second", history, 0.0, 1.0, 4, 0))
    assert asked == [[{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "second"}]]


@pytest.mark.parametrize(("size", "prompt", "sampling", "error", "says"), [
    ("900B", "a", {}, SizeError, "is outside the chain"),
    ("../../etc/passwd", "a", {}, SizeError, "cannot be read"),
    ("org/other", "a", {}, SizeError, "cannot be read"),
    ("max", " ", {}, ArgumentError, "the prompt is empty"),
    ("max", "a" * 201, {}, ArgumentError, "has 201 tokens, more than 19"),
    ("max", "a" * 10**6, {}, ArgumentError, "1,000,000 characters"),
    ("max", "a", {"new_tokens": 65}, ArgumentError, "more than 64"),
])
def test_what_is_refused_says_why(desk, size, prompt, sampling, error, says):
    with pytest.raises(error, match=says):
        last(desk.generate(size, prompt, Sampling(**sampling)))


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"new_tokens": 0}, {"seed": -1}, {"temperature": "hot"}, {"seed": True}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ArgumentError, match="is outside"):
        Sampling(**wrong)


def test_a_token_for_which_the_model_has_no_row_is_told(desk, monkeypatch):
    """On a GPU it would end the process for all visitors."""
    few = SimpleNamespace(max_position_embeddings=999, vocab_size=9)
    monkeypatch.setattr(desk, "_config", lambda size: few)
    for call in (lambda: last(desk.generate("min", "the river", Sampling(new_tokens=2))), lambda: desk._passage(desk.chain.anchors[-1].parameters, "the river")):
        with pytest.raises(DataError, match="the model has rows for 9"):
            call()


def test_a_temperature_next_to_nothing_is_none(desk):
    texts = [last(desk.generate("min", "the river", Sampling(temperature=temperature, new_tokens=6))).text for temperature in (0.0, 1e-300, 0.009)]
    assert len(set(texts)) == 1


def test_what_is_no_text_is_refused_by_name():
    from cbd_hub.space.programs import text_of
    assert text_of("a", "prompt") == "a"
    for wrong in (None, 3, ["a"], {"a": 1}):
        with pytest.raises(ArgumentError, match="prompt=.* is not text"):
            text_of(wrong, "prompt")


class Gate:
    """Models that are made when a test lets them."""

    def __init__(self):
        self.open, self.made = threading.Event(), []

    def __call__(self, size, entry):
        assert self.open.wait(20)
        entry.arrived()
        self.made.append(size)
        if isinstance(self.open, Exception):
            raise self.open
        return SimpleNamespace(size=size)


def settled(entries):
    return [entry.future.result(20).size for entry in entries]


def test_models_are_bounded_and_the_oldest_goes_first(desk):
    small, mid, large = desk.picker.smallest, desk.picker.size(middle(desk)), desk.picker.largest
    gate = Gate()
    gate.open.set()
    cache = ModelCache(desk.picker, 4 * (small + large), make=gate)
    for size in (small, large, small):
        with cache.hold([size]) as entries:
            assert settled(entries) == [size]
    assert cache.sizes == [large, small]
    assert gate.made == [small, large], "what is held is not made again"
    with cache.hold([small]) as used, cache.hold([mid]) as entries:
        assert settled(used + entries) == [small, mid]
        assert cache.sizes == [small, mid], "the oldest that nobody used went"
        assert cache.bytes <= cache.limit
        with pytest.raises(BusyError, match="busy with other sizes"), cache.hold([large]):
            pass
    with pytest.raises(ArgumentError, match="at a time; choose smaller sizes, or fewer"), cache.hold([small, mid, large]):
        pass
    with cache.hold([mid]), pytest.raises(BusyError, match="busy with other sizes"), cache.hold([large]):
        pass
    assert sorted(cache.sizes) == [small, mid], "a request for which there is no room throws nothing out"


def test_who_stops_waiting_is_free_and_the_model_is_there_for_the_next(desk):
    gate = Gate()
    slow = Desk(desk.chain, desk.limits)
    slow.models._make = gate
    states = slow.generate("max", "a", Sampling())
    assert next(states).note == "reading the anchors of " + desk.chain.anchors[0].name
    started = time.monotonic()
    states.close()
    assert time.monotonic() - started < 1
    gate.open.set()
    with slow.models.hold([desk.picker.largest]) as entries:
        assert settled(entries) == [desk.picker.largest]
    assert gate.made == [desk.picker.largest]


def test_a_load_that_failed_says_so_and_is_tried_anew(desk, monkeypatch):
    failing = Desk(desk.chain, desk.limits)
    tries = []

    def make(size, entry):
        tries.append(size)
        raise IntegrityError("model.safetensors differs from its recorded hash; fetch the chain again")

    failing.models._make = make
    for _ in range(2):
        with pytest.raises(IntegrityError, match="recorded hash"):
            last(failing.generate("max", "a", Sampling()))
    assert len(tries) == 2
    assert failing.models.sizes == []


def test_a_load_tells_how_far_it_is(desk):
    fresh = Desk(desk.chain, desk.limits)
    with fresh.models.hold([desk.picker.size(middle(desk))]) as (entry,):
        entry.future.result(60)
        assert entry.fetched
        assert entry.share == 1.0
        assert entry.read == entry.terms


def test_the_python_lines_run_and_give_that_size(desk, capsys):
    size = desk.picker.size(middle(desk))
    place = {}
    exec(desk.picker.snippet(size), place)
    assert sum(parameter.numel() for parameter in place["model"].parameters()) == size
    exec(desk.picker.snippet("min"), place)
    assert place["model"].config.cbd["strategy"] == "anchor"


def test_a_checkpoint_is_an_ordinary_one_and_only_where_it_is_allowed(desk, tmp_path):
    with desk.checkpoint(middle(desk)) as archive:
        zipfile.ZipFile(archive).extractall(tmp_path)
    assert not archive.exists()
    (folder,) = tmp_path.iterdir()
    loaded, ours = AutoModelForCausalLM.from_pretrained(folder), desk.chain.model(desk.picker.size(middle(desk)), tolerance=0.99)
    assert all(torch.equal(ours.get_parameter(name), tensor) for name, tensor in loaded.named_parameters())
    with pytest.raises(ArgumentError, match="downloads are off"), Desk(desk.chain).checkpoint("max"):
        pass


def test_archives_are_bounded_and_the_oldest_goes_first(desk, tmp_path):
    small, large = desk.picker.smallest, desk.picker.largest
    archives = Archives(desk, 10**9)
    first = archives.get(small, tmp_path)
    assert archives.get(small, tmp_path) == first, "what is there is not made again"
    tight = Archives(desk, first.stat().st_size + 10)
    kept = tight.get(small, tmp_path)
    assert tight.get(large, tmp_path).is_file()
    assert not kept.parent.exists()
    kept = tight.get(small, tmp_path)
    assert kept.is_file()
    assert len(list(tmp_path.glob("*/*.zip"))) == 2, "one of each"


def test_a_device_that_is_slow_in_bf16_computes_in_fp32(desk, monkeypatch):
    config = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr("cbd_hub.space.models.anchor_config", lambda files, anchor: config)
    monkeypatch.setattr("cbd_hub.precision.best_device", lambda: torch.device("cpu"))
    for quick, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("cbd_hub.precision.has_bf16", lambda device, quick=quick: quick)
        assert ModelCache(desk.picker, 10**9).dtype is dtype
    assert ModelCache(desk.picker, 10**9, torch.bfloat16).dtype is torch.bfloat16, "who names one gets it"
    assert ModelCache(desk.picker, 3 * desk.picker.largest).dtype is torch.bfloat16, "in fp32 the largest would not fit"
    config.dtype = torch.float16
    assert ModelCache(desk.picker, 10**9).dtype is torch.float32


def test_across_vocabularies_sizes_compare_in_bits_per_byte(shown, tmp_path):
    shutil.copytree(shown, tmp_path / "chain")
    path = tmp_path / "chain" / "chain.json"
    data = json.loads(path.read_text())
    last_link, small = data["links"][-1], data["anchors"][-1]
    small["tokenizer_sha256"], small["parent"], small["maps"] = "0" * 64, None, None
    data["links"][-1] = {"kind": "bridge", "small": last_link["small"], "large": last_link["large"]}
    for anchor, bits in zip(data["anchors"], (1.0, 1.1, 1.4)):
        anchor["evaluations"][-1]["bits_per_byte"] = bits
    path.write_text(json.dumps(data))
    picker = Desk(Chain.from_pretrained(tmp_path / "chain")).picker
    assert picker.unit == "bits per byte"
    assert picker.facts("max").bits_per_byte == pytest.approx(1.0)
    assert [round(point.bits_per_byte, 6) for point in picker.points if point.strategy == "anchor"] == [1.4, 1.1, 1.0]
    heights = [row["height"] for layer in curve_figure(picker, picker.facts("max"))["layer"] for row in layer["data"]["values"]]
    assert max(heights) == pytest.approx(1.4)
    assert "+0.400 bits per byte" in facts_card(picker.facts("min"), picker)
    assert "1.400" in measured_table(picker)
    between = (picker.manifest.anchors[1].parameters + picker.smallest) // 2
    assert picker.at(between / picker.scale.factor) in (picker.smallest, picker.manifest.anchors[1].parameters), "no size lies in the gap"


def test_links_reopen_and_hostile_ones_fall_back(desk):
    assert desk.opened({"size": "max", "prompt": "hello"}) == (desk.picker.largest, "hello")
    assert desk.opened({"size": "../../x" * 1000, "prompt": "y" * 10**6}) == (desk.default, "y" * desk.limits.characters)
    assert desk.opened({}) == (desk.default, "")


def test_limits_come_from_the_environment():
    assert Limits.from_environment({"CBD_NEW_TOKENS": "9", "CBD_DOWNLOAD": "true"}) == Limits(new_tokens=9, download=True)
    with pytest.raises(ArgumentError, match="CBD_WAITING='many' is no count"):
        Limits.from_environment({"CBD_WAITING": "many"})
    with pytest.raises(ArgumentError, match="workers=0"):
        Limits(workers=0)


@pytest.fixture(scope="module")
def served(desk):
    from cbd_hub.space.page import build_page, launch
    page = build_page(desk)
    _, address, _ = launch(page, host="127.0.0.1", block=False, mcp=True)
    yield address
    page.close()


def test_a_port_that_is_taken_is_said(served):
    from cbd_hub.space.page import launch, message_page
    with pytest.raises(ArgumentError, match="127.0.0.1 has no port to listen on .*choose another --port"):
        launch(message_page("second"), host="127.0.0.1", port=int(served.rstrip("/").rpartition(":")[2]), block=False)
    with pytest.raises(ArgumentError, match="999.1.1.1 has no port to listen on .*or --host"):
        launch(message_page("third"), host="999.1.1.1", block=False)


def test_programs_ask_the_same(served, desk):
    from gradio_client import Client
    client = Client(served, verbose=False)
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {"/sizes", "/describe", "/largest", "/snippet", "/generate", "/chat", "/compare"}
    assert client.predict("max", api_name="/describe") == json.loads(json.dumps(desk.picker.facts("max").data()))
    assert client.predict(f"{4 * desk.picker.smallest}B", api_name="/largest")["parameters"] == desk.picker.smallest
    assert client.predict("max", api_name="/snippet") == desk.picker.snippet("max")
    job = client.submit("max", "a model", 0, 1, 12, 0, api_name="/generate")
    assert job.result(60) is not None
    assert job.outputs()[-1]["text"] == last(desk.generate("max", "a model", Sampling(new_tokens=12))).text
    job = client.submit("min,max", "a model", "a text of two", 0, 1, 4, 0, api_name="/compare")
    job.result(60)
    assert [side["size"] for side in job.outputs()[-1]] == [desk.picker.smallest, desk.picker.largest]
    assert all(side["perplexity"] > 1 for side in job.outputs()[-1])
    with pytest.raises(Exception, match="is outside the chain"):
        client.predict("900B", api_name="/describe")
    with pytest.raises(Exception, match="the prompt is empty"):
        client.predict("max", "", api_name="/generate")


def test_files_are_not_served(served, shown):
    import httpx
    for path in ("/etc/passwd", str(shown / "chain.json"), "..%2f..%2fetc%2fpasswd"):
        assert httpx.get(f"{served}gradio_api/file={path}").status_code in (403, 404)
    sent = httpx.post(f"{served}gradio_api/upload", files={"files": ("x.bin", b"x" * 4096)})
    assert sent.status_code in (400, 413)


def test_tools_for_agents_are_listed(served):
    import httpx
    schema = httpx.get(f"{served}gradio_api/mcp/schema").json()
    assert {tool["name"].rpartition("_")[2] for tool in schema} >= {"describe", "generate", "compare", "largest"}


def test_an_agent_calls_the_tools(served, desk):
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def ask():
        async with streamable_http_client(f"{served}gradio_api/mcp/") as streams, ClientSession(streams[0], streams[1]) as session:
            await session.initialize()
            names = {tool.name.rpartition("_")[2]: tool.name for tool in (await session.list_tools()).tools}
            described = await session.call_tool(names["describe"], {"size": "max"})
            written = await session.call_tool(names["generate"], {"size": "max", "prompt": "a model", "new_tokens": 4})
            refused = await session.call_tool(names["describe"], {"size": "900B"})
            return described, written, refused

    described, written, refused = asyncio.run(ask())
    assert f'{desk.picker.largest}' in described.content[0].text
    assert "tokens_per_second" in written.content[0].text
    assert refused.isError
    assert "is outside the chain" in refused.content[0].text


def test_importing_the_library_and_the_command_imports_no_gradio():
    code = "import sys, cbd_hub, cbd_hub.cli; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_space_is_deployed_and_its_app_serves_the_chain(hub, shown, tmp_path):
    Chain.from_pretrained(shown).push_to_hub("org/tiny")
    chain = Chain.from_pretrained("org/tiny")
    hub.forget()
    assert push_space(chain, "org/look", dry_run=True).commit is None
    assert "spaces/org/look" not in hub.repos
    done = push_space(chain, "org/look")
    commit, files = hub.repos["spaces/org/look"].at("main")
    assert done.commit == commit
    card = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    repos = ["org/tiny", *(f"org/tiny-{anchor.name}" for anchor in Chain.from_pretrained(shown).anchors)]
    from importlib.metadata import distribution, version
    assert {name: card[name] for name in ("sdk", "sdk_version", "python_version", "app_file", "models", "suggested_hardware")} == {
        "sdk": "gradio", "sdk_version": version("gradio"), "python_version": "3.12", "app_file": "app.py", "models": repos, "suggested_hardware": "cpu-basic",
    }
    for line, repo in zip(card["preload_from_hub"], repos):
        name, paths, revision = line.split(" ")
        assert name == repo
        assert set(paths.split(",")) <= set(hub.repos[repo].commits[revision][1])
    assert json.loads(files["space.json"]) == {"chain": "org/tiny", "revision": chain.files.revision, "dtype": None, "limits": {"memory": "8GB"}}
    (made,) = [name for name in files if name.endswith(".whl")]
    assert not is_release(distribution("cbd-hub"))
    assert b"gradio[mcp]" in files["requirements.txt"]
    assert b"cbd-hub" not in files["requirements.txt"]
    assert push_space(chain, "org/look").commit == commit, "nothing is sent a second time"
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import runpy, sys, types; sys.modules['cbd_hub.space.serving'] = types.SimpleNamespace(serve=lambda *a, **k: print(a, k)); runpy.run_path('app.py')\n"
        "import cbd_hub; print(cbd_hub.__file__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ".cbd_hub" in ran.stdout
    assert chain.files.revision in ran.stdout


def test_limits_of_the_command_are_those_of_the_space(hub, cbd, shown, tmp_path):
    Chain.from_pretrained(shown).push_to_hub("org/tiny")
    options = ["--allow-download", "--memory", "1GB", "--max-new-tokens", "5", "--max-prompt-tokens", "100", "--waiting", "3", "--dtype", "bfloat16"]
    code, _, said = cbd("space", "org/tiny", "--push", "org/look", *options, "--json")
    assert code == 0, said
    files = hub.repos["spaces/org/look"].at("main")[1]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import runpy, sys, types\n"
        "def serve(chain, **how):\n    from cbd_hub.space.limits import Limits\n    print(Limits.from_environment(), how['dtype'])\n"
        "sys.modules['cbd_hub.space.serving'] = types.SimpleNamespace(serve=serve)\nrunpy.run_path('app.py')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "CBD_WAITING": "7"})
    assert ran.stdout.split() == f"{Limits(memory=10**9, prompt_tokens=100, new_tokens=5, waiting=7, download=True)} bfloat16".split()


def test_a_wheel_of_the_running_code_installs(tmp_path):
    name, data = wheel()
    assert wheel()[1] == data
    (tmp_path / name).write_bytes(data)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "site", tmp_path / name], check=True)
    for path in ("cbd_hub/space/page.css", "cbd_hub/py.typed", "cbd_hub/model_cards/chain.md.j2", "cbd_hub/spaces/size_picker/app.py"):
        assert (tmp_path / "site" / path).is_file(), path


def test_the_command_refuses_in_one_line(cbd, shown, hub, tmp_path):
    for arguments, code, says in (
        ([tmp_path / "none"], 1, "neither a folder nor a Hub id"),
        (["org/none"], 1, "no repo on the Hub"),
        ([shown, "--memory", "much"], 2, "no count of bytes"),
        ([shown, "--dtype", "int3"], 2, "no dtype"),
        (["org/none", "--push", "org/look", "--memory", "much"], 1, "no repo on the Hub"),
        ([shown, "--push", "org/look", "--memory", "much"], 2, "no count of bytes"),
        ([shown, "--dry-run"], 2, "--dry-run is of a Space that is deployed"),
        ([shown, "--push", "org/look"], 2, "cbd push"),
        ([shown, "--push", "no name"], 2, "cannot be the name of a repo"),
    ):
        got, _, printed = cbd("space", *arguments)
        assert (got, printed.count("\n")) == (code, 1), printed
        assert says in printed
