"""What cbd_hub and its peers can do: docs/features.md, and the table of README.md, from docs/features.yaml.

python docs/features.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs" / "features.yaml"
PAGE, README = ROOT / "docs" / "features.md", ROOT / "README.md"
BEGIN, END = "<!-- features:begin -->\n", "\n<!-- features:end -->"
OURS = {"full": "**yes**", "part": "in part", "none": "no"}
INTRODUCTION = """# Features, and what proves each

What cbd_hub has beside its peers, with the test or command that stands behind it. The page is written by `docs/features.py` from `docs/features.yaml`; `tests/test_features.py` holds every named test and
command to being there, and every *yes* to having one. **yes**: there today, and tested; *in part*: with what is missing; a blank: not there; *?*: not looked for. A test's name runs as it stands,
`pytest tests/test_model.py::test_it_is_an_ordinary_model`; commands run in a checkout.

The peers were read in {read}, in source and documentation, and few of them were run; a blank means that nothing was found there, and they move on. What they are best at is what they were made for, of which
these rows, chosen by what somebody wants who needs a model in any size, show a part.

| peer | read |
| --- | --- |
{versions}
"""


def load() -> Any:
    """The data."""
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def mark(row: dict[str, Any], peer: str) -> str:
    """What a peer has of a feature."""
    words = {"have": "yes", "partly": "in part", "lack": "", "unread": "?"}
    return next((word for key, word in words.items() if peer in row.get(key, ())), "?" if "others" in row.get("unread", ()) else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def evidence(row: dict[str, Any]) -> str:
    """What proves a row, what is missing, and what else should be known."""
    parts = [f"missing: {row['lacks']}"] if "lacks" in row else []
    return "<br>".join([*parts, *(f"`{proof}`" for proof in row.get("proof", ())), *([row["note"]] if "note" in row else [])])


def page(data: Any) -> str:
    """docs/features.md."""
    peers = data["peers"]
    versions = "\n".join(f"| {peer['whole']} | {peer['version']} |" for peer in peers.values())
    parts, number = [INTRODUCTION.format(read=data["read"], versions=versions)], 0
    for group in data["groups"]:
        rows, proofs = [], []
        for row in group["rows"]:
            number += 1
            rows.append([str(number), row["feature"], OURS[row["ours"]], *(mark(row, peer) for peer in peers)])
            if told := evidence(row):
                proofs.append([str(number), told])
        parts.append(f"## {group['title']}\n\n{table(['', 'feature', 'cbd_hub', *(peer['name'] for peer in peers.values())], rows)}\n\n{table(['', 'what proves it, and what should be known'], proofs)}\n")
    return "\n".join(parts)


def short(data: Any) -> str:
    """The block of README.md: some rows, some peers."""
    peers = data["short"]
    rows = [[row["short"], OURS[row["ours"]], *(mark(row, peer) for peer in peers)] for group in data["groups"] for row in group["rows"] if "short" in row]
    return table(["", "cbd_hub", *(data["peers"][peer]["name"] for peer in peers)], rows)


def filled(text: str, block: str) -> str:
    """README.md with the block in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{block}{END}{rest.split(END)[1]}"


def main() -> None:
    """Write both."""
    data = load()
    PAGE.write_text(page(data), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8"), short(data)), encoding="utf-8")


if __name__ == "__main__":
    main()
