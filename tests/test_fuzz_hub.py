"""A chain.json and weight files from strangers: refused with one of our errors, never a crash, and nothing read or written outside the folder."""

import copy
import json
import os
import shutil
import struct
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
import tiny
from conftest import assembled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbd_hub import CBDModel, Chain
from cbd_hub.configs import read_config
from cbd_hub.errors import CBDError, IntegrityError, ManifestError
from cbd_hub.files import inside
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest import Manifest, Preview
from cbd_hub.plans import anchor_config, plan_in
from cbd_hub.remote import _previewed, spans_read
from cbd_hub.weights import Checkpoint, read_header, stored_shapes


CASES = int(os.environ.get("CBD_FUZZ_CASES", "150"))
FUZZ = settings(max_examples=CASES, deadline=timedelta(seconds=60), suppress_health_check=list(HealthCheck))  # a hang fails
NASTY = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from(["..", "/etc/passwd", "../../x", "a\x00b", "\x1b[31m", "C:\\x", "~", ".", "", "x" * 5000, "hf://a/b", "https://evil/x"]),
    st.lists(st.integers(-3, 5000), max_size=4), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return assembled(tmp_path_factory.mktemp("fuzz"), 4, 2)


def one_line(error):
    """What a terminal and a log can show."""
    assert str(error).isprintable()
    assert len(str(error)) < 900


@contextmanager
def kept_inside(*folders):
    """Nothing outside of these folders is opened for writing, made, renamed or removed meanwhile."""
    roots, escaped = [os.path.realpath(folder) for folder in folders], []

    def watch(event, arguments):
        if not watching:
            return
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            paths = [arguments[0]]
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link"):
            paths = [path for path in arguments[:2] if isinstance(path, str) and path.startswith("/")]  # others are relative to an open folder
        else:
            return
        escaped.extend(path for path in paths if not any(os.path.realpath(path).startswith(root) for root in roots) and not path.startswith("/dev/"))

    watching = True
    sys.addaudithook(watch)
    try:
        yield
    finally:
        watching = False
    assert not escaped, escaped[:5]


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
        try:
            manifest = Manifest.parse(put(good, path, new), "chain.json")
            plan = plan_in(replace(files, manifest=manifest), (manifest.anchors[0].parameters + manifest.anchors[-1].parameters) // 2, tolerance=0.5)
        except CBDError as error:
            one_line(error)
            return
        assert isinstance(plan, Plan)

    fuzz()


def test_any_text_of_chain_json_is_read_or_refused(chain, tmp_path):
    """Bytes cut out, repeated and put in anywhere; keys renamed; nested without end."""
    good = (chain / "chain.json").read_bytes()
    pieces = st.one_of(st.binary(max_size=30), st.sampled_from([
        b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b'"\\u001b[31m":0,', b"null", b'"..":{},', b'"anchors":[],',
    ]))

    @FUZZ
    @given(st.lists(st.tuples(st.integers(0, len(good)), st.integers(0, 40), pieces), min_size=1, max_size=3))
    def fuzz(changes):
        text = good
        for start, length, piece in changes:
            text = text[:start] + piece + text[start + length :]
        (tmp_path / "chain.json").write_bytes(text)
        try:
            manifest = Manifest.read(tmp_path)
        except ManifestError as error:
            one_line(error)
            return
        assert Manifest.parse(json.loads(manifest.to_json()), "again") == manifest

    fuzz()


def test_any_key_of_chain_json_is_read_or_refused(chain):
    good = json.loads((chain / "chain.json").read_text())
    spots = [path for path in places(good) if path and isinstance(path[-1], str)]

    @settings(FUZZ, max_examples=max(CASES // 5, 50))
    @given(st.sampled_from(spots), st.one_of(st.text(max_size=20), st.sampled_from(["", "..", "/etc/passwd", "a\x1b[31m", "\ud800", "x" * 5000])))
    def fuzz(path, name):
        values = copy.deepcopy(good)
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[name] = inner.pop(path[-1])
        try:
            Manifest.parse(values, "chain.json")
        except ManifestError as error:
            one_line(error)

    fuzz()


def test_any_chain_loads_or_is_refused_and_stays_in_its_folder(chain, tmp_path, monkeypatch):
    """The whole way: opened, planned, loaded and copied."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a config that is met for the first time is read by way of a temporary folder
    folder = shutil.copytree(chain, tmp_path / "chain")
    good = json.loads((chain / "chain.json").read_text())
    spots = [path for path in places(good) if path]

    @settings(FUZZ, max_examples=max(CASES // 5, 50))
    @given(st.lists(st.tuples(st.sampled_from(spots), NASTY), min_size=1, max_size=2), st.booleans())
    def fuzz(changes, copied):
        values = good
        for path, new in changes:
            try:
                values = put(values, path, new)
            except (KeyError, IndexError, TypeError):
                continue
        (folder / "chain.json").write_text(json.dumps(values))
        try:
            if copied:
                Chain.from_pretrained(folder).save_pretrained(tmp_path / "copy")
            else:
                CBDModel.from_chain(folder, shape={"layers": 3})
        except CBDError as error:
            one_line(error)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)

    with kept_inside(tmp_path, os.environ["HF_HOME"], ".hypothesis"):  # hypothesis keeps its own there
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


def test_any_header_of_a_model_is_read_or_refused(chain, tmp_path):
    """A real file whose header says something else: tensors come as the config asks for them, or not at all."""
    source = next((chain / "anchors").iterdir())
    config = read_config(source)
    data = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    good, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    spots = [path for path in places(good) if path]

    @FUZZ
    @given(st.sampled_from(spots), st.one_of(NASTY, st.tuples(st.integers(-8, 8), st.integers(-8, 8))), st.integers(-9, 9), st.booleans())
    def fuzz(path, new, longer, renamed):
        values = good
        if isinstance(new, tuple):  # offsets and shapes a little off, the likeliest to pass
            inner = good
            for key in path:
                inner = inner[key]
            new = [number + step for number, step in zip(inner, new)] if isinstance(inner, list) and inner and isinstance(inner[0], int) else new[0]
        if renamed and path[0] != "__metadata__":
            values = {**{key: value for key, value in good.items() if key != path[0]}, str(new)[:99]: good[path[0]]}
        else:
            values = put(values, path, new)
        header = json.dumps(values).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", max(len(header) + (longer if abs(longer) > 6 else 0), 0)) + header + tensors)
        try:
            checkpoint = Checkpoint(tmp_path, config)
            shapes = {name: tuple(checkpoint[name].shape) for name in checkpoint._where}
        except CBDError as error:
            one_line(error)
            return
        assert shapes == stored_shapes(config)

    fuzz()
