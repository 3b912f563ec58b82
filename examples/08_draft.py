"""A small size of a chain drafts for a large one (speculative decoding): the same output, sooner.

    python examples/08_draft.py --chain org/NAME --target 135M
    python examples/08_draft.py --smoke

`cbd draft` prints the same table. transformers' `assistant_model=` does the work; what is measured is which size drafts best on this machine.
"""

from __future__ import annotations

import argparse

import smoke
import torch

from cbd_hub import CBDModel, Chain, draft_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--target", default="max", help="the size that answers")
    parser.add_argument("--prompt", default="The history of the city begins")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="a tiny chain, seconds")
    options = parser.parse_args()
    rounds = 3
    if options.smoke:
        options.chain, options.new_tokens, rounds = smoke.chain(), 8, 1

    table = draft_table(options.chain, options.target, max_new_tokens=options.new_tokens, rounds=rounds)
    for row in table.rows:
        print(f"{row.parameters:,} parameters: {row.accepted} of {row.drafted} drafted tokens accepted, {row.alone:.1f} tokens a second became {row.together:.1f}")
    draft = max(table.rows, key=lambda row: row.speedup)

    inputs = Chain.from_pretrained(options.chain).tokenizer(options.target)(options.prompt, return_tensors="pt", return_token_type_ids=False)
    target = CBDModel.from_chain(options.chain, options.target)
    how = {"max_new_tokens": options.new_tokens, "do_sample": False}
    alone = target.generate(**inputs, **how)
    together = target.generate(**inputs, **how, assistant_model=CBDModel.from_chain(options.chain, draft.parameters))
    same = torch.equal(alone, together)
    print(f"drafted by {draft.parameters:,} parameters: {draft.speedup:.2f} times as fast, " + ("the same tokens" if same else "other tokens, after a tie"))


if __name__ == "__main__":
    main()
