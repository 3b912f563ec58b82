"""A chain.json and weight files from strangers: refused with one of our errors, never a crash, and nothing read or written outside the folder."""

import copy
import json
import os
import struct

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbd_hub import Chain
from cbd_hub.errors import CBDError, IntegrityError, ManifestError
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest import Manifest, Preview, inside
from cbd_hub.plans import anchor_config, plan_in
from cbd_hub.remote import _previewed, spans_read
from cbd_hub.weights import read_header


CASES = int(os.environ.get("CBD_FUZZ_CASES", "150"))
FUZZ = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
NASTY = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from(["..", "/etc/passwd", "../../x", "a\x00b", "\x1b[31m", "C:\\x", "~", ".", "", "x" * 5000, "hf://a/b", "https://evil/x"]),
    st.lists(st.integers(-3, 5000), max_size=4), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    from cbd_hub import assemble_chain
    folder = tmp_path_factory.mktemp("fuzz")
    for layers in (4, 2):
        tiny.save(tiny.llama(layers=layers), folder / f"m{layers}")
    assemble_chain([folder / "m4", folder / "m2"], folder / "chain")
    return folder / "chain"


def one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 900


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def put(value, path, new):
    """A copy with something else in one place."""
    if not path:
        return new
    made = copy.deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return made


def test_any_chain_json_is_read_or_refused(chain):
    good = json.loads((chain / "chain.json").read_text())
    spots = list(places(good))

    @FUZZ
    @given(st.lists(st.tuples(st.sampled_from(spots), NASTY), min_size=1, max_size=3))
    def fuzz(changes):
        values = good
        for path, new in changes:
            try:
                values = put(values, path, new)
            except (KeyError, IndexError, TypeError):  # the place went with an earlier change
                continue
        try:
            manifest = Manifest.parse(values, "chain.json")
        except ManifestError as error:
            one_line(error)
            return
        for anchor in manifest.anchors:
            records = [anchor.chunks, anchor.maps]
            for path in (*anchor.files, *(record.path for record in records if record), *([anchor.location.subfolder] if anchor.location.subfolder else [])):
                assert not path.startswith("/")
                assert ".." not in path.split("/")
                inside(chain, path)

    fuzz()


def test_any_manifest_that_is_read_gives_a_plan_or_an_error(chain, tmp_path):
    """Past the schema: what is semantically wrong is found when a plan is made."""
    good = json.loads((chain / "chain.json").read_text())
    spots = [path for path in places(good) if path and path[0] in ("anchors", "links")]
    files = Chain.from_pretrained(chain).files

    @settings(FUZZ, max_examples=max(CASES // 5, 20))
    @given(st.sampled_from(spots), NASTY)
    def fuzz(path, new):
        from dataclasses import replace
        try:
            manifest = Manifest.parse(put(good, path, new), "chain.json")
            plan = plan_in(replace(files, manifest=manifest), (manifest.anchors[0].parameters + manifest.anchors[-1].parameters) // 2, tolerance=0.5)
        except CBDError:
            return
        assert isinstance(plan, Plan)

    fuzz()


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.tuples(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 300)), st.binary(max_size=300)).map(lambda pair: struct.pack("<Q", pair[0]) + pair[1])))
def test_any_safetensors_header_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        header, start = read_header(path)
    except IntegrityError as error:
        one_line(error)
        return
    assert start <= len(data)
    assert isinstance(header, dict)


def test_any_preview_is_a_promise_and_nothing_more(chain):
    """Spans of a preview stay inside the file, whatever it says."""
    files = Chain.from_pretrained(chain).files
    anchor = files.manifest.anchors[0]
    config = anchor_config(files, anchor)
    header, start = read_header(files.path(anchor, "model.safetensors"))
    good = {"start": start, "tensors": header}
    spots = list(places(good))
    size = anchor.files["model.safetensors"].bytes
    rows = {name: tiny.torch.arange(3).numpy() for name in header}

    @FUZZ
    @given(st.sampled_from(spots), NASTY)
    def fuzz(path, new):
        text = json.dumps(put(good, path, new))
        found = _previewed(anchor.model_copy(update={"preview": Preview(config="", headers={"model.safetensors": text})}), "model.safetensors")
        for first, last in [] if found is None else spans_read(*found, config, rows):
            assert 0 <= first <= last <= size

    fuzz()
