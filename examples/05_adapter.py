"""A LoRA that was trained at one size of a chain, on another size, without training.

    python examples/05_adapter.py --chain org/NAME --adapter org/lora-135M --size 117M --out ./lora-117M
    python examples/05_adapter.py --smoke

`cbd carry` does the same; `cbd make --adapter` merges it into the checkpoint.
"""

from __future__ import annotations

import argparse

import smoke
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cbd_hub import CBDModel, Chain, carry_adapter


def made_on_the_spot(chain: str) -> str:
    """A random LoRA of the chain's largest anchor."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    path = str(smoke.folder())
    get_peft_model(CBDModel.from_chain(chain, "max"), config).save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--adapter", default="./lora", help="Hub id or PEFT folder of a LoRA trained at any size of the chain")
    parser.add_argument("--size", default="117M", help="the size that is to have it")
    parser.add_argument("--out", default="./lora-carried", help="folder for the carried adapter")
    parser.add_argument("--prompt", default="The history of the city begins")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain and adapter, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.chain, options.size, options.out = smoke.chain(), smoke.SIZE, str(smoke.folder() / "lora")
        options.adapter = made_on_the_spot(options.chain)

    bare = CBDModel.from_chain(options.chain, size=options.size)
    model = CBDModel.from_chain(options.chain, size=options.size, adapter=options.adapter)  # loaded by peft
    carry_adapter(options.adapter, options.chain, options.size, output_dir=options.out)  # a PEFT folder

    inputs = Chain.from_pretrained(options.chain).tokenizer(options.size)(options.prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        without = bare(**inputs).logits
        logits, folder = model(**inputs).logits, PeftModel.from_pretrained(bare, options.out)(**inputs).logits
    print(f"the adapter moves a logit of {options.size} by up to {float((logits - without).abs().max()):.3g}")
    difference = float((logits - folder).abs().max())
    print(f"largest difference of logits between adapter= and the folder {options.out}: {difference:.2g} (bound 1e-3)")
    raise SystemExit(int(not difference <= 1e-3))


if __name__ == "__main__":
    main()
