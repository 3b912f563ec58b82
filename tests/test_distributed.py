"""One process and two give the same updates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


HERE = Path(__file__).parent


def launch(folder, processes):
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    done = subprocess.run([*command, str(HERE / "run_distributed.py"), str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return launch(folder / "one", 1), launch(folder / "two", 2)


@pytest.mark.parametrize("mode", ["plain", "path", "hidden", "cached"])
def test_one_process_equals_two(runs, mode):
    alone, together = (torch.load(folder / f"{mode}.pt") for folder in runs)
    log, other = (json.loads((folder / f"{mode}.json").read_text()) for folder in runs)
    assert (log["processes"], other["processes"]) == (1, 2)
    assert log["losses"] == pytest.approx(other["losses"], rel=1e-3)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name], rtol=1e-4, atol=1e-6, msg=name)
