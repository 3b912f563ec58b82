"""Against the real Hub with the account of HF_TOKEN (`make nightly`): a private chain is pushed, loaded, pulled and deleted.

The commands and the client run in processes of their own, as everything in this one is offline. HF_ENDPOINT may name another Hub.
"""

import json
import os
import secrets
import subprocess
import sys

import pytest
import tiny

from cbd_hub import CBDModel, assemble_chain
from cbd_hub.files import CHUNK_BYTES, sha256


pytestmark = [pytest.mark.nightly, pytest.mark.skipif("HF_TOKEN" not in os.environ, reason="HF_TOKEN holds no token")]

ACCOUNT = """
from huggingface_hub import HfApi
from cbd_hub.client import transport_error
try:
    print(HfApi().whoami()["name"])
except Exception as error:
    if not transport_error(error):
        raise
"""
DELETE = """
import sys
from huggingface_hub import HfApi
api = HfApi()
for repo_id in sys.argv[2:]:
    api.delete_repo(repo_id, missing_ok=True)
if sys.argv[1]:
    api.delete_collection(sys.argv[1], missing_ok=True)
print([repo_id for repo_id in sys.argv[2:] if api.repo_exists(repo_id)])
"""
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.num_parameters(), AutoTokenizer.from_pretrained(sys.argv[2])("a").input_ids)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run Python in a process that is online, with a cache of its own; gives what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}

    def python(*arguments):
        done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert os.environ["HF_TOKEN"] not in done.stdout + done.stderr
        return done.stdout

    return python


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """(repo, local chain, what was published), deleted in the end."""
    account = run("-c", ACCOUNT).strip()
    if not account:
        pytest.skip("the Hub cannot be reached")
    folder, repo_id = tmp_path_factory.mktemp("nightly"), f"{account}/cbd-nightly-{secrets.token_hex(4)}"
    for layers in (8, 5):
        tiny.save(tiny.llama(layers=layers, hidden=256, heads=4, kv_heads=4, ffn=1000, seed=layers), folder / f"m{layers}")
    chain = assemble_chain([folder / "m8", folder / "m5"], folder / "chain")
    slug = ""
    try:
        done = json.loads(run("-m", "cbd_hub.cli", "push", folder / "chain", repo_id, "--private", "--json"))
        slug = done["collection"]
        yield repo_id, folder / "chain", done
    finally:
        assert run("-c", DELETE, slug, repo_id, *(f"{repo_id}-{anchor.name}" for anchor in chain.anchors)).strip() == "[]"


def test_a_size_comes_in_parts_and_is_the_local_one(run, published, tmp_path):
    repo_id, chain, _ = published
    size = CBDModel.plan(chain, shape={"layers": 7}).parameters
    plan = json.loads(run("-m", "cbd_hub.cli", "plan", repo_id, "--size", size, "--json"))
    assert 0 < sum(plan["bytes_to_fetch"].values()) < 4 * size * 1.02 + 6 * CHUNK_BYTES, "its own bytes, and two chunks for each of three stretches"
    run("-m", "cbd_hub.cli", "make", repo_id, "--size", size, "--out", tmp_path / "made")
    assert sum(json.loads(run("-m", "cbd_hub.cli", "plan", repo_id, "--size", size, "--json"))["bytes_to_fetch"].values()) == 0
    CBDModel.materialize(chain, size, output_dir=tmp_path / "local")
    assert sha256(tmp_path / "made/model.safetensors") == sha256(tmp_path / "local/model.safetensors")


def test_anchors_and_the_index_need_no_cbd_hub(run, published):
    repo_id, chain, done = published
    for repo, revision in done["anchors"].values():
        assert len(revision) == 40
        assert run("-c", PLAIN, repo, repo_id).split()[0].isdigit()


def test_pushed_again_and_pulled(run, published, tmp_path):
    repo_id, chain, done = published
    assert json.loads(run("-m", "cbd_hub.cli", "push", chain, repo_id, "--private", "--json"))["commit"] == done["commit"]
    run("-m", "cbd_hub.cli", "pull", repo_id, tmp_path / "pulled", "--json")
    for path in chain.glob("anchors/*/model.safetensors"):
        assert sha256(tmp_path / "pulled" / path.relative_to(chain)) == sha256(path)
