"""A size of a chain as ONNX by transformers' own exporter, run by ONNX Runtime and compared with transformers.

    python examples/11_onnx.py --chain org/NAME --size 117M --out ./onnx
    python examples/11_onnx.py --smoke

Needs `pip install '.[onnx]'`. Exits with 1 where a logit is further off than the bound.
"""

from __future__ import annotations

import argparse

import smoke
import torch
from torch.export import Dim
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

from cbd_hub import CBDModel


BOUND = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--size", default="117M", help="parameters wanted")
    parser.add_argument("--out", default="./onnx", help="folder for model.onnx and its weights")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain")
    options = parser.parse_args()
    if options.smoke:
        options.chain, options.size, options.out = smoke.chain(), smoke.SIZE, str(smoke.folder())

    model = CBDModel.from_chain(options.chain, size=options.size, dtype=torch.float32)
    model.config.use_cache = False  # the logits of a whole text; `export_for_generation` is the way with a cache
    example = {"input_ids": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    sizes = dict.fromkeys(example, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})  # any batch, any length
    OnnxExporter().export(model, example, config=OnnxConfig(dynamic=True, dynamic_shapes=sizes)).save_pretrained(options.out)

    exported, worst = ExportedModel.from_pretrained(options.out), 0.0
    for batch, length in ((1, 7), (3, 40)):
        ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            worst = max(worst, float((exported(**inputs).logits - model(**inputs).logits).abs().max()))
    print(f"{options.out}: largest difference of logits to transformers: {worst:.2g} (bound {BOUND})")
    raise SystemExit(int(not worst <= BOUND))


if __name__ == "__main__":
    main()
