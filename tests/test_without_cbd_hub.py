"""A published anchor in the hands of people who have never heard of cbd_hub: the official command, plain transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import recipe
from huggingface_hub import constants

from cbd_hub import CBDModel, Chain, distill_chain


PLAIN = """
import json, sys
sys.modules["cbd_hub"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
anchor, index = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(anchor), AutoTokenizer.from_pretrained(index)
writes = pipeline("text-generation", anchor)
ids = tokenizer("a small model", return_tensors="pt").input_ids
print(json.dumps({
    "logits": model(ids).logits[0, -1].tolist(), "text": writes("a small", max_new_tokens=4, do_sample=False)[0]["generated_text"],
}))
"""


def test_an_anchor_is_an_ordinary_repo(hub, tmp_path):
    chain = distill_chain(recipe(tmp_path, "llama", [{"layers": 2, "ffn": 24}]), tmp_path / "chain")
    Chain.from_pretrained(tmp_path / "chain").push_to_hub("org/tiny")
    name = chain.anchors[1].name
    environment = {**os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path / "plain"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, f"org/tiny-{name}", "org/tiny"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads(run.stdout.splitlines()[-1])
    model = CBDModel.from_chain(tmp_path / "chain", chain.anchors[1].parameters)
    ids = chain.tokenizer()("a small model", return_tensors="pt").input_ids
    assert torch.allclose(torch.tensor(said["logits"]), model(ids).logits[0, -1], atol=1e-6)
    assert said["text"].startswith("a small")
    command = [str(Path(sys.executable).with_name("hf")), "download", f"org/tiny-{name}", "--local-dir", str(tmp_path / "here")]
    subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == (tmp_path / "chain" / "anchors" / name / "model.safetensors").read_bytes()
