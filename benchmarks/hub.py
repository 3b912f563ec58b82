"""What loads from the Hub cost: bytes and requests counted by the tests' Hub, and time against plain from_pretrained.

    python benchmarks/hub.py

A chain of two random Llama models of 10 and 7 layers that differ in layers alone is pushed to a Hub on loopback; every figure is of a process
of its own with a cache of its own, unless it says warm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "results" / "hub.json"

LOAD = """
import json, sys, time
from cbd_hub import CBDModel
began = time.perf_counter()
model = CBDModel.from_chain("org/bench", shape=json.loads(sys.argv[1]), strategy=sys.argv[2], revision=sys.argv[3] or None)
print(json.dumps({"parameters": model.num_parameters(), "seconds": time.perf_counter() - began}))
"""
PLAN = """
import dataclasses, json, sys
from cbd_hub.chain import Chain
from cbd_hub.hub import open_chain
from cbd_hub.plans import plan_costs
files = dataclasses.replace(open_chain("org/bench"), glance=True)
print(json.dumps(plan_costs(files, Chain(files).plan(shape=json.loads(sys.argv[1]), strategy=sys.argv[2]))))
"""
WARM = """
import json, statistics, sys, time
from transformers import AutoModelForCausalLM
from cbd_hub import CBDModel
ours, theirs = [], []
shape = json.loads(sys.argv[1])
for turn in range(6):
    for times, load in (
        (ours, lambda: CBDModel.from_chain("org/bench", shape=shape, strategy="patch", revision=sys.argv[2])), (theirs, lambda: AutoModelForCausalLM.from_pretrained("org/same")),
    ):
        began = time.perf_counter()
        load()
        times.append(time.perf_counter() - began)
print(json.dumps({"ours": statistics.median(ours[1:]), "theirs": statistics.median(theirs[1:])}))
"""


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="Hidden width of the models.")
    hidden = parser.parse_args().hidden
    os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_TOKEN="hf_test", HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")
    import hub_server  # type: ignore[import-not-found]
    with tempfile.TemporaryDirectory() as temporary, hub_server.running() as (hub, address):
        os.environ.update(HF_ENDPOINT=address, HF_HOME=f"{temporary}/home")  # read when the client is imported
        figures = measure(hub, Path(temporary), hidden)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(hub: Any, folder: Path, hidden: int) -> dict[str, Any]:
    """The figures."""
    import tiny  # type: ignore[import-not-found]

    from cbd_hub import CBDModel, assemble_chain
    for layers in (10, 7):
        tiny.save(tiny.llama(layers=layers, hidden=hidden, heads=8, kv_heads=8, ffn=4 * hidden, seed=layers), folder / f"m{layers}")
    chain = assemble_chain([folder / "m10", folder / "m7"], folder / "chain")
    commit = chain.push_to_hub("org/bench").commit
    patch, further = {"layers": 8}, {"layers": 9}
    CBDModel.materialize(folder / "chain", shape=patch, output_dir=folder / "same")
    hub.upload_folder("org/same", folder / "same")

    def run(cache: str, code: str, *arguments: Any) -> tuple[dict[str, Any], dict[str, int]]:
        hub.forget()
        environment = {**os.environ, "HF_HOME": str(folder / cache), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=True)
        entries = [entry for entry in hub.log if entry.path.endswith(".safetensors") and "/maps/" not in entry.path]
        return json.loads(done.stdout.splitlines()[-1]), {"bytes": sum(entry.sent for entry in entries), "requests": len(hub.log), "weight requests": len(entries)}

    shape = json.dumps(patch)
    costs, planning = run("plan", PLAN, shape, "patch")
    cold, first = run("patch", LOAD, shape, "patch", "")
    _, second = run("patch", LOAD, json.dumps(further), "patch", "")
    _, warm = run("patch", LOAD, shape, "patch", commit)
    _, unpinned = run("patch", LOAD, shape, "patch", "")
    _, blended = run("blend", LOAD, shape, "blend", "")
    blend_costs, _ = run("plan", PLAN, shape, "blend")
    hub.forget()
    environment = {**os.environ, "HF_HOME": str(folder / "four")}
    four = [subprocess.Popen([sys.executable, "-c", LOAD, shape, "patch", ""], env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert all(process.wait() == 0 for process in four)
    together = sum(entry.sent for entry in hub.log if entry.path.endswith(".safetensors"))
    run("patch", "from transformers import AutoModelForCausalLM as A; A.from_pretrained('org/same'); print('{}')")
    speed, _ = run("patch", WARM, shape, commit)
    own = 4 * cold["parameters"]
    return {
        "target bytes": own, "both anchors bytes": sum(4 * anchor.parameters for anchor in chain.anchors),
        "patch cold bytes": first["bytes"], "patch cold to target": first["bytes"] / own, "patch cold requests for weights": first["weight requests"],
        "planned bytes": sum(costs["bytes_to_fetch"].values()), "plan requests": planning["requests"],
        "second size bytes": second["bytes"], "block bytes": 4 * (chain.anchors[0].parameters - chain.anchors[1].parameters) // 3,
        "warm pinned requests": warm["requests"], "warm requests": unpinned["requests"],
        "blend cold bytes": blended["bytes"], "blend planned bytes": sum(blend_costs["bytes_to_fetch"].values()),
        "four processes bytes to one": together / first["bytes"], "warm seconds": speed["ours"], "from_pretrained seconds": speed["theirs"],
        "warm to from_pretrained": speed["ours"] / speed["theirs"],
    }


if __name__ == "__main__":
    main()
