"""Each numbered example runs with --smoke, on a tiny chain made on the spot."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("[0-9][0-9]_*.py"))
NEEDS = {"05_adapter": "peft", "10_gguf": "xllamacpp", "11_onnx": "onnxruntime", "12_quantised": "torchao", "07_space": "gradio"}
SLOW = {"07_space", "10_gguf", "11_onnx", "12_quantised"}  # another process with a page or a converter, an export, torchao's import
SAYS = {  # what a run that did its work prints last
    "01_distil": r"tensors_read", "02_publish": r"LlamaForCausalLM of 169,408 parameters", "03_load": r"serve it: +vllm serve", "04_heal": r"earlier: ",
    "05_adapter": r"bound 1e-3", "06_bridge": r"an ordinary LlamaForCausalLM", "07_space": r"'state': 'done'", "08_draft": r"times as fast", "09_multi_gpu": r"train_loss",
    "10_gguf": r"largest difference of log-probabilities", "11_onnx": r"largest difference of logits", "12_quantised": r"MB instead of",
}


@pytest.fixture(scope="module", autouse=True)
def smoke(tmp_path_factory):
    """What the scripts import, with one tiny chain for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("smoke")))
        yield
        sys.modules.pop("smoke", None)


def run(script, capfd, monkeypatch):
    """What a script prints with --smoke, in this process."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{script}.py"), "--smoke"])
    code = None
    try:
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    said = capfd.readouterr()
    assert not code, (code, said)
    return said.out


def test_each_is_listed():
    assert [script[:2] for script in SCRIPTS] == [f"{number:02}" for number in range(1, len(SCRIPTS) + 1)]
    assert set(SAYS) == set(SCRIPTS)


@pytest.mark.parametrize("script", [pytest.param(script, marks=pytest.mark.slow if script in SLOW else ()) for script in SCRIPTS if script != "02_publish"])
def test_it_runs(script, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if script in NEEDS and importlib.util.find_spec(NEEDS[script]) is None:
        pytest.skip(f"{NEEDS[script]} is not installed")
    assert re.search(SAYS[script], run(script, capfd, monkeypatch))
    assert not [*tmp_path.iterdir()]


def test_it_publishes_from_a_process_of_its_own(tmp_path):
    """The client is pointed at a Hub of the tests before it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, EXAMPLES / "02_publish.py", "--smoke"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(SAYS["02_publish"], done.stdout)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_uses_only_what_cbd_hub_exports(script):
    text = (EXAMPLES / f"{script}.py").read_text()
    assert set(re.findall(r"(?:from|import) (cbd_hub[\w.]*)", text)) <= {"cbd_hub"}
    assert f"python examples/{script}.py --smoke" in text
