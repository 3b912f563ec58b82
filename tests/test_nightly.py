"""Against the real Hub with the account of HF_TOKEN (`make nightly`): a private chain is pushed, loaded, pulled and deleted.

All of it runs in one process of its own, as everything in this one is offline. HF_ENDPOINT may name another Hub.
"""

import json
import os
import secrets
import subprocess
import sys

import pytest
import tiny

from cbd_hub import assemble_chain
from cbd_hub.files import CHUNK_BYTES


pytestmark = [pytest.mark.nightly, pytest.mark.skipif("HF_TOKEN" not in os.environ, reason="HF_TOKEN holds no token")]

WORK = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer
from cbd_hub import CBDModel, Chain
from cbd_hub.client import transport_error
from cbd_hub.files import sha256
from cbd_hub.plans import plan_costs

folder, name = Path(sys.argv[1]), sys.argv[2]
api = HfApi()
try:
    account = api.whoami()["name"]
except Exception as error:
    if not transport_error(error):
        raise
    print("{}")
    sys.exit()
chain, repo_id, slug = Chain.from_pretrained(folder / "chain"), f"{account}/{name}", None
repos = [repo_id, *(f"{repo_id}-{anchor.name}" for anchor in chain.anchors)]
found = {}
try:
    done = chain.push_to_hub(repo_id, private=True)
    slug = done.collection
    found["private"] = [api.model_info(repo).private for repo in repos]
    found["pushed again"] = chain.push_to_hub(repo_id, private=True) == done
    remote = Chain.from_pretrained(repo_id)
    plan = remote.plan(shape={"layers": 7})
    found["parameters"], found["planned"] = plan.parameters, sum(plan_costs(remote.files, plan)["bytes_to_fetch"].values())
    CBDModel.materialize(repo_id, shape={"layers": 7}, output_dir=folder / "made")
    CBDModel.materialize(folder / "chain", shape={"layers": 7}, output_dir=folder / "local")
    found["right"] = sha256(folder / "made/model.safetensors") == sha256(folder / "local/model.safetensors")
    found["missing then"] = sum(plan_costs(remote.files, plan)["bytes_to_fetch"].values())
    found["anchors"] = [AutoModelForCausalLM.from_pretrained(repo, revision=revision).num_parameters() for repo, revision in done.anchors.values()]
    found["tokens"] = AutoTokenizer.from_pretrained(repo_id)("a").input_ids == chain.tokenizer()("a").input_ids
    remote.save_pretrained(folder / "pulled")
    found["pulled"] = all(sha256(folder / "pulled" / path.relative_to(folder / "chain")) == sha256(path) for path in (folder / "chain").glob("anchors/*/*.safetensors"))
finally:
    for repo in repos:
        api.delete_repo(repo, missing_ok=True)
    if slug is not None:
        api.delete_collection(slug, missing_ok=True)
found["left behind"] = [repo for repo in repos if api.repo_exists(repo)]
print(json.dumps(found))
"""


def test_a_chain_is_published_loaded_and_deleted(tmp_path):
    for layers in (8, 5):
        tiny.save(tiny.llama(layers=layers, hidden=256, heads=4, kv_heads=4, ffn=1000, seed=layers), tmp_path / f"m{layers}")
    chain = assemble_chain([tmp_path / "m8", tmp_path / "m5"], tmp_path / "chain", align=False)
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(tmp_path), f"cbd-nightly-{secrets.token_hex(4)}"], capture_output=True, text=True, env=environment
    )
    assert os.environ["HF_TOKEN"] not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if not found:
        pytest.skip("the Hub cannot be reached")
    assert found["private"] == [True] * 3
    assert all(found[fact] for fact in ("pushed again", "right", "tokens", "pulled"))
    assert found["planned"] < 4 * found["parameters"] * 1.02 + 6 * CHUNK_BYTES, "its own bytes, and two chunks for each of three stretches"
    assert found["missing then"] == 0
    assert found["anchors"] == [anchor.parameters for anchor in chain.anchors]
    assert found["left behind"] == []
