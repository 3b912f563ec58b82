"""Cards: what the Hub would refuse, licences, and citations that BibTeX reads."""

import re

import pytest
from huggingface_hub import ModelCard

from cbd_hub.card_metadata import LICENSES, check_card, license_lines
from cbd_hub.cards import Healed, anchor_card, interpolant_card
from cbd_hub.errors import ArgumentError


def card(text):
    return f"---\n{text}\n---\n# x\n"


def test_every_card_cites_the_method_in_bibtex():
    cards = [
        anchor_card("org/a", 1000, teacher_repo="big/teacher", license="mit", facts={"shape": "x"}),
        interpolant_card("org/b", 1000, chain=None, anchors=[], license=None, facts={}),
    ]
    for text in cards:
        ModelCard(text)
        (entry,) = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
        assert entry.count("{") == entry.count("}")
        kind, key, body = re.fullmatch(r"@(\w+)\{(\w+),\n(.*)\n\}\n", entry, re.DOTALL).groups()
        fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{([^{}]*)\},?$", body, re.MULTILINE))
        assert (kind, key, fields["eprint"], fields["archivePrefix"], fields["year"]) == ("misc", "shi2026chain", "2605.07783", "arXiv", "2026")
        authors = fields["author"].split(" and ")
        assert len(authors) == 6
        assert all(re.fullmatch(r"\w+, \w+", author) for author in authors)
        assert len(body.splitlines()) == len(fields), "every line is a field"


@pytest.mark.parametrize("text", [
    "license: Apache 2.0", "license: cc-by-nc-", "license: sa-4.0", "license: mit\nlicense_name: mine", "license: other\nlicense_name: My Licence", "license: 3",
    "base_model: ./here", "base_model_relation: distilled", "tags: 3", "datasets: [1]", "license: [mit, nonsense]", "license_name: x",
])
def test_what_the_hub_refuses_is_found_before(text):
    with pytest.raises(ArgumentError, match="card of org/x"):
        check_card(card(text), "org/x")


def test_what_the_hub_takes_passes():
    for license in ("apache-2.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-3.0", "openmdw-1.1", "gemma", "llama3.3", "other"):
        assert license in LICENSES
        check_card(card(f"license: {license}"), "org/x")
    for licence in ("Apache-2.0", "SmolLM Community (v1)", "OpenRAIL++", "Lizenz für alle"):
        check_card(card(license_lines(licence).strip()), "org/x")
    check_card(card("license: other\nlicense_name: mine\nlicense_link: LICENSE"), "org/x")


def test_what_a_folder_says_of_its_heal_is_a_cell_and_nothing_more():
    healed = Healed(teacher="a", by="full", objective="x <!-- cbd_hub:end --> | y", steps=1, tokens=8, loss=1.0, loss_before=1.5, difference=-0.5, documents=1, heldout_tokens=9)
    card = interpolant_card("org/b", 1000, chain=None, anchors=[], license=None, facts={}, healed=healed)
    assert card.count("<!-- cbd_hub:end") == 1
    assert len(next(line for line in card.splitlines() if line.startswith("| learned by")).replace("\\|", "").split("|")) == 4
