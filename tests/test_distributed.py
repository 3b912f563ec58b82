"""One process and two give the same updates: whole models under DDP, and models split by FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from processes import launched
from run_distributed import MODES, best_weights, gone_on_with, main
from safetensors.torch import load_file


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for processes, folder in enumerate(folders, 1):
        launched(processes, main, folder)
    return folders


@pytest.mark.parametrize("mode", MODES)
def test_one_process_equals_two(runs, mode):
    alone, together = (torch.load(folder / f"{mode}.pt") for folder in runs)
    log, other = (json.loads((folder / f"{mode}.json").read_text()) for folder in runs)
    assert (log["processes"], other["processes"]) == (1, 2)
    assert log["losses"] == pytest.approx(other["losses"], rel=1e-3)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_by_two_processes_counts_no_row_twice(runs, mode):
    """Of sets that do not divide by the batch, and of a stream."""
    alone, together = (json.loads((folder / f"{mode}.json").read_text())["evaluations"] for folder in runs)
    assert len({*alone}) >= 3
    assert alone == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("work", [best_weights, gone_on_with])
def test_two_processes_end_with_the_same_weights(tmp_path, work):
    """The best ones where these are wanted, and those of a run that was never killed."""
    launched(2, work, tmp_path)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_configurations_are_read(name):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml")).num_processes == 2


@pytest.mark.slow
def test_the_example_trains_on_two_processes(tmp_path):
    """Two processes over gloo, from the command line, and the same weights as with one."""
    tiny.save(tiny.llama(), tmp_path / "teacher")
    tiny.save(tiny.llama(layers=2, seed=3), tmp_path / "student")
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.texts(60)))
    options = ["--student", tmp_path / "student", "--teacher", tmp_path / "teacher", "--text", tmp_path / "text.txt", "--max_steps", 2, "--block_size", 16, "--optim", "sgd", "--disable_tqdm", "true"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]  # accelerate launch wants MPI for CPUs
    for folder, start, batch in (("one", [], 8), ("two", launch, 4)):
        command = [sys.executable, *start, EXAMPLES / "09_multi_gpu.py", *options, "--output_dir", tmp_path / folder, "--per_device_train_batch_size", batch]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=1e-4, atol=1e-6, msg=key)
