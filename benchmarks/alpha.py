"""The paper's sweep of alpha, with both ends: held-out loss of sizes in between, where alpha weighs the smaller anchor (paper Eq. 3, Fig. 6).

    python benchmarks/alpha.py --demo demo

At a quarter, half and three quarters of each of the demo's segments, blends with alpha 0 (the shared units are the larger anchor's), 0.1 to 0.9 (the paper's sweep), 1 (the
smaller anchor's), all with gains of 1, and the mix of alpha and gains that the chain fitted on calibration text. Nothing is trained. Nats per token, paired with the fitted mix over documents. Writes
benchmarks/results/alpha.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import write
from rich.console import Console
from rich.table import Table

from cbd_hub import Chain, Recipe
from cbd_hub.distill.stages import read_parts
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.interpolation.live import Between
from cbd_hub.measure import SHARES
from cbd_hub.sizes import format_size


ALPHAS = tuple(round(0.1 * tenth, 1) for tenth in range(11))


def main() -> None:
    """Sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--heldout-tokens", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/alpha.json"))
    options = parser.parse_args()
    chain = Chain.from_pretrained(options.demo / "chain")
    recipe = Recipe.read(options.demo / "chain" / "recipe.yaml")
    documents = Documents.read(read_parts(recipe).heldout, chain.tokenizer(), recipe.data.block_size, options.heldout_tokens)
    table = Table("size", "fitted", *(f"{alpha:g}" for alpha in ALPHAS), title="loss by alpha, nats per token", title_justify="left")
    rows: list[dict[str, Any]] = []
    for large, small in zip(chain.anchors, chain.anchors[1:]):
        between = Between({anchor.name: chain.model(anchor.parameters, dtype=torch.float32) for anchor in (small, large)})

        def losses(size: int, alpha: float | None, between: Between = between) -> Losses:
            with torch.no_grad():
                return document_losses(between.run(chain.plan(size, strategy="blend", alpha=alpha)), documents)

        for share in SHARES:
            size = round(small.parameters + share * (large.parameters - small.parameters))
            fitted = losses(size, None)
            swept = {alpha: losses(size, alpha) for alpha in ALPHAS}
            plan = chain.plan(size, strategy="blend")
            rows.append({
                "parameters": plan.parameters, "shape": plan.shape.model_dump(), "fitted": {"loss": fitted.mean, "stderr": fitted.stderr},
                "alphas": {str(alpha): {"loss": found.mean, "to_fitted": found.minus((1.0, fitted))} for alpha, found in swept.items()},
            })
            table.add_row(format_size(size), f"{fitted.mean:.3f}", *(f"{found.mean:.3f}" for found in swept.values()))
    Console(width=140).print(table)
    write(options.out, {
        "tokens": documents.tokens, "documents": len(documents.ids), "rows": rows,
    })


if __name__ == "__main__":
    main()
