"""What an unfinished run has begun, so that a corrected recipe goes on with all that it has not changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hub.distill.schema import telling
from cbd_hub.errors import RecipeError, StorageError
from cbd_hub.files import write_text


if TYPE_CHECKING:
    from cbd_hub.distill.data import Parts
    from cbd_hub.distill.schema import Recipe
    from cbd_hub.distill.stages import Stage

_SUFFIX = ".begun.json"


def dependencies(recipe: Recipe, teacher: str, stages: Sequence[Stage], parts: Parts) -> dict[str, dict[str, Any]]:
    """What each anchor's result depends on, beside that of the anchors above it.

    Args:
        recipe: The recipe.
        teacher: Name of the teacher's anchor.
        stages: The recipe's stages.
        parts: Its documents; of a stream those that are trained on are not looked at, nor those of a stage's own data.
    """
    text = fingerprint([parts.train if isinstance(parts.train, list) else [], parts.calibration, parts.heldout])[:12]
    found: dict[str, dict[str, Any]] = {teacher: {"teacher": recipe.teacher, "data": recipe.data.model_dump(), "seed": recipe.seed, "text": text}}
    for index, stage in enumerate(stages):
        own = recipe.stage_data(stage.anchor).model_dump()
        if not stage.arguments.get("text_weight"):
            del own["text_data"]
        found[stage.name] = {"anchors": recipe.anchors[: index + 1], **own, "stage": telling(stage.arguments)}
        if stage.origin == "published" and not stage.bridged and recipe.align != "auto":  # so that runs begun before it was a field go on
            found[stage.name]["align"] = recipe.align
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found, default=str))
    return plain


class Begun:
    """The record of the anchors that a run has begun.

    Args:
        work: The run's work folder.
        wanted: What each anchor depends on, by the recipe as it is now.
        made: The anchors of a finished chain that is made longer, of which nothing is to be begun.
    """

    def __init__(self, work: Path, wanted: Mapping[str, dict[str, Any]], made: Sequence[str] = ()) -> None:
        self._work, self._wanted, self._made = work, wanted, made

    @staticmethod
    def names(work: Path) -> set[str]:
        """The anchors that are begun in a run's work folder; none where it is no such folder."""
        return {path.name.removesuffix(_SUFFIX) for path in work.glob(f"*{_SUFFIX}")}

    def note(self, name: str) -> None:
        """Write down that an anchor is begun."""
        write_text(self._work / f"{name}{_SUFFIX}", json.dumps(self._wanted[name]))

    def check(self) -> None:
        """Refuse a recipe that asks otherwise for what is begun.

        Raises:
            RecipeError: Naming the anchor and the key.
        """
        root = self._work.parent
        found = self.names(self._work) - {*self._made}
        order = list(dict.fromkeys(name for name in [*self._wanted, *sorted(found)] if name in found))  # that of the chain
        for place, name in enumerate(order):
            if self._made or not (root / "anchors" / name).exists():  # with all that learned from it
                anew = f"remove {' and '.join(path for below in order[place:] for path in self._paths(below))} to begin it anew"
            else:
                anew = f"remove {root}"
            if name not in self._wanted:
                raise RecipeError(f"{root} holds an unfinished run with an anchor {name}, which the recipe does not make; put it back, or {anew}")
            begun = json.loads((self._work / f"{name}{_SUFFIX}").read_text())
            if "stage" in begun:
                begun["stage"] = telling(begun["stage"])  # the first versions wrote all of it down
            wanted = {key: value for key, value in self._wanted[name].items() if key in begun or key != "text"}  # which was not always written down
            changed = difference(begun, wanted)
            if changed is not None:
                key, old, new = changed
                raise RecipeError(f"{root} holds an unfinished run whose anchor {name} was begun with {key}={old!r}, and the recipe has {new!r}; put it back, or {anew}")

    def _paths(self, name: str) -> list[str]:
        """What there is of an anchor that is begun."""
        anchor = self._work.parent / "anchors" / name
        return [*([str(anchor)] if anchor.exists() else []), str(self._work / name), f"{self._work / name}.*"]


def fingerprint(rows: Any) -> str:
    """A hash of plain data, such as rows of text."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def unfinished(path: Path, asked: Mapping[str, Any], target: Path) -> dict[str, Any] | None:
    """What an unfinished run has written down, what it was asked for among it (``asked``); None where there is none.

    Args:
        path: The record.
        asked: What is asked for now.
        target: What the run makes.

    Raises:
        StorageError: If it was asked for something else.
    """
    if not path.is_file():
        return None
    known: dict[str, Any] = json.loads(path.read_text())
    changed = difference(known["asked"], json.loads(json.dumps(asked, default=str)))
    if changed is not None:
        name, old, new = changed
        raise StorageError(f"{target} has an unfinished run with {name}={old!r}, and {new!r} is asked; ask for the same, or remove {path.parent} to begin anew")
    return known


def difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two records differ, with both values; None where they are equal."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (where, old, new)
    found = (difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")) for key in {**old, **new})
    return next((changed for changed in found if changed is not None), None)
