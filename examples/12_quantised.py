"""A size of a chain quantised while it is loaded: each tensor is made, quantised and let go. Compared with the model that is not quantised.

    python examples/12_quantised.py --chain org/NAME --size 117M --by int8
    python examples/12_quantised.py --smoke

int8 needs `pip install '.[quantised]'` (torchao, CPUs too), nf4 and int8-bnb `pip install bitsandbytes`. Whatever else transformers takes as a
`quantization_config` goes the same way. Exits with 1 where a next token's distribution is further off than the bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import smoke
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from cbd_hub import CBDModel, Chain


BOUNDS = {"int8": 0.03, "int8-bnb": 0.1, "nf4": 1.0}  # mean KL to the model that is not quantised, nats per token
TEXT = "The history of the city begins in the ninth century, when a small market grew at the crossing of two old roads."


def config(by: str) -> Any:
    """What transformers takes as a quantization_config."""
    if by == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(load_in_8bit=True) if by == "int8-bnb" else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--size", default="117M", help="parameters wanted")
    parser.add_argument("--by", default="int8", choices=BOUNDS)
    parser.add_argument("--out", help="folder to save the quantised model to")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain")
    options = parser.parse_args()
    if options.smoke:
        options.chain, options.size, options.out = smoke.chain(), smoke.SIZE, str(smoke.folder())

    whole = CBDModel.from_chain(options.chain, size=options.size, dtype=torch.float32)
    model = CBDModel.from_chain(options.chain, size=options.size, dtype=torch.float32, quantization_config=config(options.by))
    tokenizer = Chain.from_pretrained(options.chain).tokenizer(options.size)
    inputs = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        exact, rough = whole(**inputs).logits, model(**inputs).logits.float()
    divergence = float(torch.nn.functional.kl_div(rough[0].log_softmax(-1), exact[0].log_softmax(-1), log_target=True, reduction="batchmean"))
    print(f"largest difference of logits: {float((exact - rough).abs().max()):.2g}, mean KL {divergence:.2g} nats per token (bound {BOUNDS[options.by]})")
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        stored = sum(path.stat().st_size for path in Path(options.out).glob("*.safetensors"))
        print(f"{options.out}: {stored / 1e6:.1f} MB instead of {4 * whole.num_parameters() / 1e6:.1f}; AutoModelForCausalLM.from_pretrained loads it")
    raise SystemExit(int(not divergence <= BOUNDS[options.by]))


if __name__ == "__main__":
    main()
