"""The page of benchmarks is what its results say, and every command of `make bench` is one that its script takes."""

import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import claims  # noqa: E402
import render  # noqa: E402
import tables  # noqa: E402


def test_the_page_is_written_from_the_results():
    assert (ROOT / "benchmarks" / "README.md").read_text() == render.page()


def test_the_readme_s_figures_are_written_from_the_results(tmp_path):
    for name, blocks in render.documents().items():
        copy = tmp_path / Path(name).name
        copy.write_text((ROOT / name).read_text())
        render.fill(copy, blocks)
        assert copy.read_text() == (ROOT / name).read_text(), f"run python benchmarks/render.py: {name} is older than the results"


@pytest.mark.parametrize("name", bench.BENCHMARKS)
@pytest.mark.parametrize("full", [False, True])
def test_a_command_is_one_that_its_script_takes(name, full):
    command = bench.BENCHMARKS[name].command(full, "python")
    script = (ROOT / command[1]).read_text()
    for option in (part for part in command if part.startswith("--")):
        assert f'"{option}"' in script or re.search(rf'\("{option[2:]}", "', script), f"{command[1]} knows no {option}"


def test_what_is_done_is_known_by_its_arguments_and_the_code():
    command = bench.BENCHMARKS["head"].command(False, None)
    assert bench.fingerprint(command) == bench.fingerprint(command)
    assert bench.fingerprint(command) != bench.fingerprint(bench.BENCHMARKS["head"].command(True, None))


def test_a_benchmark_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("print('measured')\n")
    (tmp_path / "bad.py").write_text("raise SystemExit('no chain here')\n")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "WORK", tmp_path / "work")
    good, bad = (bench.Benchmark(name) for name in ("good.py", "bad.py"))
    assert bench.run("good", good, good.command(False, None)) is None
    assert "bad ended with 1: no chain here" in bench.run("bad", bad, bad.command(False, None))


def test_models_healed_in_several_ways_are_said_to_be():
    now, before = ({"heal": {"kd_weight": weight, "ce_weight": 1.0, "learning_rate": rate}} for weight, rate in ((0.1, 1e-4), (1.0, 4e-4)))
    assert tables.healed_by([now, now]) == "by 0.1 x KL + 1 x cross-entropy at a learning rate of 0.0001"
    assert tables.healed_by([before, now]) == "by 1 x KL + 1 x cross-entropy at a learning rate of 0.0004 or 0.1 x KL + 1 x cross-entropy at a learning rate of 0.0001"


def test_a_claim_whose_figures_are_not_there_is_not_measured():
    """Where a benchmark has not been run the rest is written all the same."""
    def read(name):
        if name == "headline":
            raise FileNotFoundError(name)
        return render.result(name)

    lines = claims.table(read).splitlines()[2:]
    assert len(lines) == len(claims.CLAIMS)
    assert sum(line.endswith("| – | not measured |") for line in lines) == sum(claim.ours is None for claim in claims.CLAIMS) + 3
