"""Any size of a chain as an ordinary transformers model: in memory, within a budget, and as a folder that needs no cbd_hub.

    python examples/03_load.py --chain org/NAME --size 117M --budget 250MB --out ./model
    python examples/03_load.py --smoke

The folder is a plain checkpoint: `vllm serve ./model` serves it (not run by us), 10_gguf.py and 11_onnx.py convert it, 12_quantised.py quantises while it loads.
"""

from __future__ import annotations

import argparse

import smoke
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub import CBDModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--size", default="117M", help="parameters wanted")
    parser.add_argument("--budget", default="250MB", help="bytes of weights in bfloat16: the largest size that fits is shown")
    parser.add_argument("--out", default="./model", help="folder for the checkpoint: absent or empty")
    parser.add_argument("--prompt", default="The history of the city begins")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.chain, options.size, options.budget, options.out = smoke.chain(), smoke.SIZE, "400KB", str(smoke.folder() / "model")

    print(CBDModel.plan(options.chain, size=options.size))  # no weight is touched
    fitting = CBDModel.plan(options.chain, memory_budget=options.budget, dtype="bfloat16")
    print(f"the largest in {options.budget} of bfloat16: {fitting.parameters:,} parameters")

    model = CBDModel.from_chain(options.chain, size=options.size)
    print(f"{type(model).__name__} of {model.num_parameters():,} parameters, made from {model.config.cbd['neighbours']} by {model.config.cbd['strategy']}")

    CBDModel.materialize(options.chain, size=options.size, output_dir=options.out)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(options.out), AutoTokenizer.from_pretrained(options.out)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        difference = float((model(**inputs).logits - plain(**inputs).logits).abs().max())
    print(f"largest difference of logits between the model in memory and the folder: {difference:g}")
    ids = plain.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(repr(tokenizer.decode(ids[0], skip_special_tokens=True)))
    print(f"serve it:  vllm serve {options.out}")
    if difference > 0:
        raise SystemExit("they should be the same model, bit for bit")


if __name__ == "__main__":
    main()
