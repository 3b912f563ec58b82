"""Fixtures: everything offline, caches in a temporary folder, one tiny chain per family."""

import gc
import os
import sys
import tempfile
import time


SLEEP = time.sleep
_CACHE = tempfile.mkdtemp(prefix="cbd-tests-")
os.environ.update(HF_HOME=_CACHE, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side: more threads only wait for each other
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # images set it: each command that a test starts would compile all of cbd_hub again

import hub_server  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from cbd_hub import ChainDistiller, assemble_chain, cli, distill_chain  # noqa: E402, F401 (the trainer is imported before gc.freeze)


torch.set_num_threads(1)
gc.freeze()  # what imports made stays: each full collection would look through it again, a sixth of the time of tests that train


def pytest_unconfigure():
    gc.unfreeze()


def recipe(folder, family, anchors, **more):
    """A recipe's plain data for a tiny teacher, which is written to the folder."""
    teacher = tiny.save(tiny.FAMILIES[family](**more.pop("teacher", {})), folder / "teacher")
    text = folder / "text.txt"
    text.write_text("\n\n".join(tiny.texts(200)))
    return {
        "teacher": str(teacher),
        "anchors": anchors,
        "data": {"path": str(text), "block_size": 32, "heldout": 0.1, "calibration": 0.2},
        "stage": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "bf16": False, "disable_tqdm": True, **more.pop("stage", {})},
        **more,
    }


def assembled(folder, *depths, **shape):
    """A chain of random llamas of these depths, neither trained nor aligned; its folder."""
    models = [tiny.save(tiny.llama(layers=layers, seed=layers, **shape), folder / f"m{layers}") for layers in depths]
    assemble_chain(models, folder / "chain", align=False)
    return folder / "chain"


@pytest.fixture(scope="session", params=sorted(tiny.FAMILIES))
def family(request):
    return request.param


# for what no architecture does otherwise: `make test` sees it on one, `make test-all` on both
ONE_FAMILY = pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)], indirect=True, scope="session")


@pytest.fixture(scope="session", params=sorted(tiny.EVERY))
def every(request):
    """Each architecture that has a table."""
    return request.param


@pytest.fixture(scope="session")
def chain(family, tmp_path_factory):
    """A distilled chain of three anchors; its second segment moves layers alone."""
    folder = tmp_path_factory.mktemp(family)
    made = recipe(folder, family, [{"layers": 4, "ffn": 24}, {"layers": 2, "ffn": 24}])
    distill_chain(made, folder / "chain")
    return folder / "chain"


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """A chain for the Space: three anchors, measured in between."""
    folder = tmp_path_factory.mktemp("shown")
    distill_chain(recipe(folder, "llama", [{"layers": 4, "ffn": 24}, {"layers": 2, "ffn": 24}]), folder / "chain")
    return folder / "chain"


def online(monkeypatch, address, home):
    """Point the official client of this process at a server, with a cache of its own; the client itself stays as it is."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: SLEEP(min(seconds, 0.01)))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A test Hub that this process's client speaks to."""
    with hub_server.running() as (hub, address):
        online(monkeypatch, address, tmp_path / "home")
        yield hub


@pytest.fixture
def cbd(monkeypatch, capsys):
    """The command in this process: its exit code, standard output and standard error."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cbd", *map(str, arguments)])
        monkeypatch.setattr(cli.out, "_file", None)
        monkeypatch.setattr(cli.out, "_width", 200)
        capsys.readouterr()  # of what the test did before
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err

    return run
