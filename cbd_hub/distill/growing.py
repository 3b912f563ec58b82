"""A finished chain that the recipe which made it, with further anchors at the end of its list, makes longer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hub.configs import read_config
from cbd_hub.distill.begun import difference
from cbd_hub.distill.schema import Recipe
from cbd_hub.errors import DataError, RecipeError, StorageError
from cbd_hub.files import public
from cbd_hub.sizes import with_error


if TYPE_CHECKING:
    from cbd_hub.chain import Chain
    from cbd_hub.manifest import Anchor, Evaluation


_SAME = 5e-3  # nats per token: more than another machine moves loss and error of a model on the same text, in another precision (0.001 was seen)


def made_by(chain: Chain, recipe: Recipe) -> bool:
    """Whether a recipe, but for settings that change nothing of what comes out, made a chain."""
    makers = {anchor.training.recipe_sha256 for anchor in chain.anchors if anchor.training is not None}
    return recipe.sha256() in makers or ((own := _own(chain, makers)) is not None and own.outcome() == recipe.outcome())


def _own(chain: Chain, makers: set[str | None]) -> Recipe | None:
    """The recipe in a chain's folder, where it is the one that made it."""
    with suppress(RecipeError):
        own = Recipe.read(chain.files.root / "recipe.yaml")
        return own if own.sha256() in makers else None
    return None


def _loss(entry: Evaluation) -> str:
    return f"{with_error(entry.loss, entry.stderr, '.4f')} nats on {entry.tokens:,} tokens"


class Finished:
    """A chain that is to be made longer: its anchors, links and files stay as they are, and the chain is what it was until the new one is written.

    Args:
        chain: The chain, in a local folder.
        recipe: A recipe that begins as the one that made it.

    Raises:
        RecipeError: If the recipe is another one, or the chain is not of one recipe.
        StorageError: If its anchors do not lie in its folder.
    """

    def __init__(self, chain: Chain, recipe: Recipe) -> None:
        self.chain, self.recipe = chain, recipe
        root, made = chain.files.root, chain.anchors[1:]
        strange = [anchor.name for anchor in made if anchor.training is None or anchor.training.recipe_sha256 is None]
        makers = {anchor.training.recipe_sha256 for anchor in made if anchor.training is not None}
        if strange or len(makers) > 1:
            raise RecipeError(f"{root} holds a chain whose anchors are not all of one recipe{f' ({strange[0]} is of none)' if strange else ''}, so that none makes it longer; choose another folder")
        if any(anchor.location.repo_id != "." for anchor in chain.anchors):
            raise StorageError(f"the anchors of {root} lie in repos of their own; fetch the chain with cbd pull, and make that one longer")
        first = recipe.beginning(len(made))
        if not made_by(chain, first):
            raise RecipeError(
                f"{root} holds a chain made by another recipe{self._differs(first, makers)}; to make the chain longer give its own recipe with further anchors at the end of the list, or choose "
                "another folder"
            )

    @property
    def folders(self) -> list[Path]:
        """The folders of its anchors; the first is the teacher's copy."""
        return [self.chain.files.root / "anchors" / name for name in self.names]

    @property
    def names(self) -> list[str]:
        """The names of its anchors."""
        return [anchor.name for anchor in self.chain.anchors]

    @property
    def stages(self) -> int:
        """How many of the recipe's stages are done."""
        return len(self.chain.anchors) - 1

    @property
    def config(self) -> Any:
        """The config of its smallest anchor, from which the longer recipe goes on."""
        return read_config(self.folders[-1])

    def anchors(self) -> list[Anchor]:
        """Its anchors as the longer recipe's, their files checked.

        Raises:
            IntegrityError: If a file is missing or differs from its record.
        """
        found = []
        for anchor in self.chain.anchors:
            for name in anchor.files:
                self.chain.files.checked(anchor, name)
            for record in (anchor.maps, anchor.chunks):
                if record is not None:
                    self.chain.files.side_file(record)
            training = anchor.training and anchor.training.model_copy(update={"recipe_sha256": self.recipe.sha256()})
            found.append(anchor.model_copy(update={"training": training}))
        return found

    def dataset(self, name: str) -> str:
        """What the chain calls its calibration text: a published one without its folder."""
        known = [entry.dataset for anchor in self.chain.anchors for entry in anchor.evaluations]
        return name if name in known else next((entry for entry in known if public(entry) == public(name)), name)

    def check_text(self, measured: Evaluation) -> None:
        """Refuse calibration text on which its smallest anchor has not the loss that is on record.

        Raises:
            DataError: If it is other text, or the chain has no loss on text of that name.
        """
        smallest = self.chain.anchors[-1]
        recorded = next((entry for entry in smallest.evaluations if entry.dataset == measured.dataset), None)
        if recorded is None:
            raise DataError(f"anchor {smallest.name} of {self.chain.files.root} has no loss on {measured.dataset}, so that new ones cannot be set beside it; choose another folder")
        pairs = [(recorded.loss, measured.loss), *([] if recorded.stderr is None or measured.stderr is None else [(recorded.stderr, measured.stderr)])]
        if recorded.tokens != measured.tokens or any(abs(old - new) > _SAME for old, new in pairs):
            raise DataError(
                f"{measured.dataset} is not the text that {self.chain.files.root} was measured on: anchor {smallest.name} has {_loss(measured)} of it, and {_loss(recorded)} are recorded; put the text "
                "back, or choose another folder"
            )

    def check_unchanged(self) -> None:
        """Refuse to replace a chain.json that somebody changed meanwhile.

        Raises:
            StorageError: If it was changed.
        """
        if type(self.chain).from_pretrained(self.chain.files.root).manifest != self.chain.manifest:
            raise StorageError(f"{self.chain.files.root} was changed while it was made longer; run again to see whether it still can be")

    def _differs(self, recipe: Recipe, makers: set[str | None]) -> str:
        """In what a recipe differs from the chain's own, as far as its folder tells."""
        own = _own(self.chain, makers)
        changed = None if own is None else difference(own.outcome(), recipe.outcome())
        return "" if changed is None else f", with {changed[0]}={changed[1]!r} where this one has {changed[2]!r}"
