"""What loads from the Hub cost: bytes and requests counted by the tests' Hub, and time against plain from_pretrained.

    python benchmarks/hub.py

Three chains of random Llama models are pushed to a Hub on loopback: one whose anchors differ in layers alone (10 and 7 of hidden 512, FFN 2048), one
whose anchors differ in FFN width (8192 and 4096, 2 layers of hidden 1024), and one of SmolLM2-135M's widths (30 and 22 layers). Each cold figure is of a cache of its
own. Times are medians of loads in turns, page cache warm, wall and CPU: other work on the machine stretches the first and hardly the second. Beside each load stands
``from_pretrained`` of the same model pushed as a repo, as it is (files are mapped, nothing is read yet), with ``disable_mmap`` (every byte is in memory), and both with
the first forward pass of eight tokens, after which the weights have been read. Writes benchmarks/results/hub.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import write


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "results" / "hub.json"
PATCH, FURTHER, BLEND = {"layers": 8}, {"layers": 9}, {"ffn": 4608}
REAL = {"layers": 26}  # a patch between 30 and 22 layers of SmolLM2-135M's widths
REPEATS = 7


def main() -> None:
    """Measure, print and keep the figures."""
    os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_TOKEN="hf_test", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DOWNLOAD_TIMEOUT="300", OMP_NUM_THREADS="1")
    import hub_server  # type: ignore[import-not-found]
    with tempfile.TemporaryDirectory() as temporary, hub_server.running() as (hub, address):
        os.environ.update(HF_ENDPOINT=address, HF_HOME=f"{temporary}/home")  # read when the client is imported
        figures = measure(hub, Path(temporary))
    write(RESULTS, figures)
    print(json.dumps(figures, indent=1))


def timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Median seconds of every call, wall and CPU, one after the other in each round; the first round is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if repeat:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: dict(zip(("wall", "cpu"), map(statistics.median, zip(*values)))) for name, values in seconds.items()}


def measure(hub: Any, folder: Path) -> dict[str, Any]:
    """The figures."""
    import tiny  # type: ignore[import-not-found]
    import torch
    from transformers import AutoModelForCausalLM

    from cbd_hub import CBDModel, Chain, assemble_chain
    from cbd_hub.files import CHUNK_BYTES
    from cbd_hub.hub import open_chain
    from cbd_hub.plans import anchor_config, plan_costs
    from cbd_hub.remote import spans_read
    from cbd_hub.weights import read_header
    torch.set_num_threads(1)

    def publish(name: str, shapes: list[dict[str, int]]) -> Chain:
        for place, shape in enumerate(shapes):
            tiny.save(tiny.llama(**{"heads": 8, "kv_heads": 8, "seed": place, **shape}), folder / f"{name}{place}")
        return assemble_chain([folder / f"{name}{place}" for place in range(len(shapes))], folder / name, align=False)

    deep = publish("deep", [{"layers": layers, "hidden": 512, "ffn": 2048} for layers in (10, 7)])
    wide = publish("wide", [{"layers": 2, "hidden": 1024, "ffn": ffn} for ffn in (8192, 4096)])
    commit = deep.push_to_hub("org/deep").commit
    wide.push_to_hub("org/wide")
    real = publish("real", [{"layers": layers, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn": 1536} for layers in (30, 22)])
    real.push_to_hub("org/real")
    for repo, shape in (("deep", PATCH), ("wide", BLEND), ("real", REAL)):
        CBDModel.materialize(folder / repo, shape=shape, output_dir=folder / f"{repo}-made")
        hub.upload_folder(f"org/{repo}-made", folder / f"{repo}-made")

    def cost(work: Any) -> dict[str, int]:
        """Bytes and requests for weights, and all requests, of some work."""
        hub.forget()
        work()
        entries = [entry for entry in hub.log if entry.path.endswith(".safetensors") and "/maps/" not in entry.path]
        return {"bytes": sum(entry.sent for entry in entries), "requests": len(hub.log), "weight requests": len(entries)}

    def load(repo: str, shape: dict[str, int], cache: str, revision: str | None = None) -> Any:
        return CBDModel.from_chain(repo, shape=shape, cache_dir=folder / cache, revision=revision)

    def planned(repo: str, shape: dict[str, int], cache: str) -> tuple[int, int]:
        """Bytes that a plan foretells, and its requests."""
        found: dict[str, Any] = {}

        def work() -> None:
            files = replace(open_chain(repo, cache_dir=folder / cache), glance=True)
            found.update(plan_costs(files, Chain(files).plan(shape=shape)))

        requests = cost(work)["requests"]
        return sum(found["bytes_to_fetch"].values()), requests

    def used(chain: Chain, *shapes: dict[str, int]) -> tuple[int, int]:
        """Bytes of the headers, tensors and rows that some plans read, each counted once, and the count of their stretches."""
        spans = []
        for shape in shapes:
            for name, rows in chain.plan(shape=shape).rows().items():
                anchor = chain.manifest.anchor(name)
                header = read_header(chain.files.path(anchor, "model.safetensors"))
                spans += [(name, *span) for span in spans_read(*header, anchor_config(chain.files, anchor), rows)]
        merged: list[tuple[str, int, int]] = []
        for name, start, stop in sorted(spans):
            if merged and name == merged[-1][0] and start <= merged[-1][2]:
                merged[-1] = (name, merged[-1][1], max(stop, merged[-1][2]))
            else:
                merged.append((name, start, stop))
        return sum(stop - start for _, start, stop in merged), len(merged)

    own = 4 * deep.plan(shape=PATCH).parameters
    patch_planned, plan_requests = planned("org/deep", PATCH, "patch")
    first = cost(lambda: load("org/deep", PATCH, "patch"))
    second = cost(lambda: load("org/deep", FURTHER, "patch"))
    warm, unpinned = cost(lambda: load("org/deep", PATCH, "patch", commit)), cost(lambda: load("org/deep", PATCH, "patch"))
    blend_planned, _ = planned("org/wide", BLEND, "blend")
    blended, (blend_used, blend_stretches) = cost(lambda: load("org/wide", BLEND, "blend")), used(wide, BLEND)
    patch_used, patch_stretches = used(deep, PATCH)

    right = [tensor.clone() for tensor in CBDModel.from_chain(folder / "deep", shape=PATCH).state_dict().values()]
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()

    def one() -> None:
        queue.put(all(torch.equal(ours, tensor) for ours, tensor in zip(load("org/deep", PATCH, "four").state_dict().values(), right, strict=True)))

    hub.forget()
    workers = [fork.Process(target=one) for _ in range(4)]
    for worker in workers:
        worker.start()
    four = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    together = sum(entry.sent for entry in hub.log if entry.path.endswith(".safetensors"))

    def first_pass(model: Any) -> None:
        with torch.no_grad():
            model(torch.ones(1, 8, dtype=torch.long))

    def beside(repo: str, shape: dict[str, int], cache: str) -> dict[str, dict[str, float]]:
        def ours() -> Any:
            return load(f"org/{repo}", shape, cache)

        def theirs(**more: Any) -> Any:
            return AutoModelForCausalLM.from_pretrained(f"org/{repo}-made", cache_dir=folder / cache, **more)

        return timed({
            "from_chain": ours, "from_pretrained": theirs, "from_pretrained, read": lambda: theirs(disable_mmap=True),
            "from_chain, forward": lambda: first_pass(ours()), "from_pretrained, forward": lambda: first_pass(theirs()),
        })

    seconds = {repo: beside(repo, shape, cache) for repo, shape, cache in (("deep", PATCH, "patch"), ("real", REAL, "real"), ("wide", BLEND, "blend"))}
    return {
        "chunk bytes": CHUNK_BYTES, "target bytes": own, "both anchors bytes": sum(4 * anchor.parameters for anchor in deep.anchors),
        "patch cold bytes": first["bytes"], "patch cold requests for weights": first["weight requests"], "patch planned bytes": patch_planned,
        "plan requests": plan_requests, "second size bytes": second["bytes"],
        "second size new bytes": used(deep, PATCH, FURTHER)[0] - patch_used, "warm pinned requests": warm["requests"], "warm requests": unpinned["requests"],
        "blend cold bytes": blended["bytes"], "blend planned bytes": blend_planned, "blend used bytes": blend_used, "blend stretches": blend_stretches, "patch used bytes": patch_used, "patch stretches": patch_stretches,
        "blend both anchors bytes": sum(4 * anchor.parameters for anchor in wide.anchors), "four processes right": sum(four),
        "four processes bytes to one": together / first["bytes"], "seconds": seconds,
    }


if __name__ == "__main__":
    main()
