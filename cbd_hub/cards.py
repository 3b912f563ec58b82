"""Data and a Jinja template in, a README out."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from cbd_hub.hub import is_repo_id
from cbd_hub.interpolation.curve import Chord
from cbd_hub.manifest import Evaluation, Manifest
from cbd_hub.sizes import format_size


def chain_card(manifest: Manifest) -> str:
    """The README of a chain.

    Args:
        manifest: The chain.

    Returns:
        Markdown with the metadata of a model card.
    """
    anchors = [
        {
            "name": anchor.name, "parameters": anchor.parameters, "shape": anchor.shape, "origin": anchor.origin,
            "loss": _loss(anchor.evaluations[-1]) if anchor.evaluations else "not measured",
        }
        for anchor in manifest.anchors
    ]
    chords = {link.small: Chord.of(manifest, link) for link in manifest.links}
    curve = [
        {"size": format_size(point.size), "strategy": point.strategy, "loss": _loss(point), "chord": _above(point.loss, chords[link.small].at(point.size))}
        for link in manifest.links for point in link.curve
    ]
    best = [(link, size, min(point.loss for point in link.curve if point.size == size)) for link in manifest.links for size in sorted({p.size for p in link.curve})]
    troughs = [trough for link, size, loss in best if (trough := chords[link.small].trough(size, loss)) is not None]
    recommended = [format_size(size) for link in reversed(manifest.links) for size in link.recommended_sizes]
    measured = [anchor.evaluations[-1] for anchor in manifest.anchors if anchor.evaluations]
    smallest, largest = manifest.anchors[-1].parameters, manifest.anchors[0].parameters
    teacher = manifest.teacher
    return _render(
        "chain.md.j2", name=manifest.name, anchors=anchors, curve=curve, troughs=troughs, recommended=recommended, smallest=format_size(smallest), largest=format_size(largest),
        example=format_size((smallest + largest) // 2), teacher_repo=teacher.repo_id if teacher else None,
        license=teacher.license if teacher else None, teacher_parameters=format_size(teacher.parameters) if teacher else None,
        dataset=measured[-1].dataset if measured else None, tokens=f"{measured[-1].tokens:,}" if measured else None,
    )


def anchor_card(name: str, parameters: int, *, teacher_repo: str | None, license: str | None, facts: dict[str, str], base: str | None = None, base_repo: str | None = None) -> str:
    """The README of a distilled model, or of an adapter.

    Args:
        name: Its repo id, or its name.
        parameters: Unique parameters.
        teacher_repo: Hub id of the model it learned from; None for a local one.
        license: Licence of the teacher where it is known; it is never invented.
        facts: What the table says of it.
        base: Of an adapter, the model that it belongs on; None for a whole model.
        base_repo: Its Hub id; None for a local one.

    Returns:
        Markdown with the metadata of a model card.
    """
    return _render(
        "anchor.md.j2", name=name, parameters=parameters, teacher_repo=teacher_repo, license=license, facts=list(facts.items()), base=base, base_repo=base_repo
    )


def cut_card(name: str, summary: dict[str, Any], *, license: str | None) -> str:
    """The README of a model that was cut from one other.

    Args:
        name: Its name.
        summary: What `cbd_hub.single.Single.summary` says of it.
        license: Licence of the model where it is known; it is never invented.

    Returns:
        Markdown with the metadata of a model card.
    """
    source = summary["model"]
    return _render("cut.md.j2", name=name, license=license, repo=source if is_repo_id(source) else None, whole=format_size(summary["whole_parameters"]), **summary)


def cache_card(record: dict[str, Any]) -> str:
    """The README of a teacher cache.

    Args:
        record: Its cache.json.

    Returns:
        Markdown with the metadata of a data set card.
    """
    source = record["source"]
    return _render("teacher_cache.md.j2", teacher=source["teacher"], source=source, figures=record["figures"])


def _loss(entry: Evaluation) -> str:
    return f"{entry.loss:.3f}" + (f" ± {entry.stderr:.3f}" if entry.stderr is not None else "")


def _above(loss: float, chord: float | None) -> str:
    return "" if chord is None else f"{loss - chord:+.3f}"


def _render(template: str, **values: Any) -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    source = (files("cbd_hub.model_cards") / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)
