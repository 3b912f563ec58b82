"""What an unfinished run has begun, so that a corrected recipe goes on with all that it has not changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hub.distill.saving import has_checkpoint
from cbd_hub.distill.schema import UNSAID, telling
from cbd_hub.errors import RecipeError, StorageError
from cbd_hub.files import LOCK, write_text


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
        if stage.origin == "published" and not stage.bridged and recipe.align != UNSAID["align"]:  # as the next one, so that runs begun before it was a field go on
            found[stage.name]["align"] = recipe.align
        if stage.origin == "cut" and recipe.reconstruct != UNSAID["reconstruct"]:
            found[stage.name]["reconstruct"] = recipe.reconstruct
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
        """Write down that an anchor is begun; where it was not written down, what there is of one of its name goes."""
        path = self._work / f"{name}{_SUFFIX}"
        if not path.is_file():
            self._forget(name)
        write_text(path, json.dumps(self._wanted[name]))

    def forget(self) -> None:
        """Remove what is begun and asked for otherwise now, with all that would learn from it; `check` has found that nothing of it has learned."""
        order = self._order()
        first = next((place for place, name in enumerate(order) if name not in self._wanted or self._changed(name) is not None), len(order))
        for name in reversed(order[first:]):  # who is killed in between finds what the rest depends on
            self._forget(name)

    def _order(self) -> list[str]:
        """The anchors that are begun, in the chain's order; last those that the recipe does not make."""
        found = self.names(self._work) - {*self._made}
        return list(dict.fromkeys(name for name in [*self._wanted, *sorted(found)] if name in found))

    def _forget(self, name: str) -> None:
        root, record = self._work.parent, self._work / f"{name}{_SUFFIX}"
        if self._copied(name):
            shutil.rmtree(self._anchor(name), ignore_errors=True)
        for path in (root / "maps" / f"{name}.safetensors", root / "chunks" / f"{name}.json", *self._work.glob(f"{name}.*")):
            if path != record:
                path.unlink(missing_ok=True)
        shutil.rmtree(self._work / name, ignore_errors=True)
        record.unlink(missing_ok=True)  # last, so that a kill in between is gone on with

    def check(self) -> None:
        """Refuse a recipe that asks otherwise for what is begun, where something was learned already.

        Raises:
            RecipeError: Naming the anchor and the key.
        """
        root = self._work.parent
        order = self._order()
        for place, name in enumerate(order):
            if not any(map(self._learned, order[place:])):
                return
            if self._made or not self._anchor(name).exists():  # with all that learned from it
                anew = f"remove {' and '.join(path for below in order[place:] for path in self._paths(below))} to begin it anew"
            else:
                anew = f"remove {root}"
            if name not in self._wanted:
                raise RecipeError(f"{root} holds an unfinished run with an anchor {name}, which the recipe does not make; put it back, or {anew}")
            changed = self._changed(name)
            if changed is not None:
                key, old, new = (UNSAID.get(changed[0], value) if value is None else value for value in changed)
                raise RecipeError(f"{root} holds an unfinished run whose anchor {name} was begun with {key}={old!r}, and the recipe has {new!r}; put it back, or {anew}")

    def _changed(self, name: str) -> tuple[str, Any, Any] | None:
        """In what an anchor that is begun was asked for otherwise."""
        begun = json.loads((self._work / f"{name}{_SUFFIX}").read_text())
        if "stage" in begun:
            begun["stage"] = telling(begun["stage"])  # the first versions wrote all of it down
        return difference(begun, {key: value for key, value in self._wanted[name].items() if key in begun or key != "text"})  # which was not always written down

    def _learned(self, name: str) -> bool:
        """Whether there is an anchor that has learned, or a checkpoint of one."""
        return has_checkpoint(self._work / name) or (self._anchor(name).exists() and not self._copied(name))

    def _copied(self, name: str) -> bool:
        """Whether an anchor is the teacher, which is copied and learns nothing."""
        record = self._work / f"{name}{_SUFFIX}"
        return record.is_file() and "teacher" in json.loads(record.read_text())

    def _anchor(self, name: str) -> Path:
        return self._work.parent / "anchors" / name

    def _paths(self, name: str) -> list[str]:
        """What there is of an anchor that is begun."""
        return [*([str(self._anchor(name))] if self._anchor(name).exists() else []), str(self._work / name), f"{self._work / name}.*"]


def fingerprint(rows: Any) -> str:
    """A hash of plain data, such as rows of text."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def unfinished(path: Path, asked: Mapping[str, Any], target: Path) -> dict[str, Any] | None:
    """What an unfinished run has written down, what it was asked for among it (``asked``); None where there is none.

    One that was asked for something else and has saved no checkpoint has learned nothing: all but the lock of its work folder goes.

    Args:
        path: The record, in the work folder; checkpoints lie in ``run`` beside it.
        asked: What is asked for now.
        target: What the run makes.

    Raises:
        StorageError: If it was asked for something else and has learned already.
    """
    if not path.is_file():
        return None
    known: dict[str, Any] = json.loads(path.read_text())
    changed = difference(known["asked"], json.loads(json.dumps(asked, default=str)))
    if changed is None:
        return known
    if not has_checkpoint(path.parent / "run"):
        for other in path.parent.iterdir():
            if other.is_dir():
                shutil.rmtree(other)
            elif other.name not in (LOCK, path.name):
                other.unlink()
        path.unlink()  # last: a kill in between leaves no half of it to go on with
        return None
    name, old, new = changed
    raise StorageError(f"{target} has an unfinished run with {name}={old!r}, and {new!r} is asked; ask for the same, or remove {path.parent} to begin anew")


def difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two records differ, with both values; None where they are equal."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (where, old, new)
    found = (difference(old.get(key), new.get(key), f"{where}.{key}".lstrip(".")) for key in {**old, **new})
    return next((changed for changed in found if changed is not None), None)
