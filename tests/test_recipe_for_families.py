"""The table that CONTRIBUTING.md shows is a whole one: it is run from there."""

import re
from pathlib import Path

import pytest
import test_every_family as every_family
import test_families
import tiny
from transformers import Starcoder2Config

from cbd_hub.errors import ArchitectureError
from cbd_hub.families import FAMILIES, family_of, register


NAME = "starcoder2"
GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def documented(monkeypatch):
    """The documented table in its place, for the time of a test."""
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text().split("## Add an architecture")[1], re.DOTALL).group(1)
    assert len(code.splitlines()) <= 32
    monkeypatch.setitem(tiny.EVERY, NAME, lambda **more: tiny.plain(Starcoder2Config, **more))
    known = list(FAMILIES)
    space = {}
    exec(code, space)
    yield register(space["STARCODER2"])
    FAMILIES[:] = known


def test_without_the_table_there_is_an_error_that_shows_the_way():
    with pytest.raises(ArchitectureError, match=r'"starcoder2" has no axis table.*CONTRIBUTING'):
        family_of(Starcoder2Config())


@pytest.mark.parametrize("more", [{}, {"tied": False, "use_bias": False}])
def test_it_holds_every_stored_tensor(documented, more, monkeypatch, tmp_path):
    monkeypatch.setitem(test_families.VARIANTS, NAME, lambda: tiny.EVERY[NAME](**more))
    test_families.test_table_holds_every_stored_tensor_and_no_other(NAME, tmp_path)
    test_families.test_counts_are_the_models_unique_parameters(NAME)


@pytest.mark.parametrize("tied", [True, False])
def test_widening_preserves_the_function(documented, tied):
    every_family.check_widening(NAME, tied, 0, 3, 3, 2, 33, 44)


@pytest.mark.parametrize("promise", [
    every_family.test_importance_finds_what_writes_nothing_and_its_cut_preserves_the_function, every_family.test_a_permuted_copy_computes_the_same,
    every_family.test_the_ends_of_a_blend_are_the_anchors, every_family.test_gradients_reach_every_parameter_of_both_anchors,
    every_family.test_states_of_a_live_plan_are_those_of_the_model_it_makes, every_family.test_every_size_between_is_realised_by_a_legal_shape,
])
def test_what_holds_for_every_family_holds_for_it(documented, promise):
    promise(NAME)


def test_a_cut_of_it_is_an_ordinary_model(documented, tmp_path):
    every_family.test_a_cut_to_a_smaller_shape_is_an_ordinary_model(NAME, tmp_path)
