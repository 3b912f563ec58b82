"""Data and a Jinja template in, a README out."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined
from pydantic import Field

from cbd_hub.card_metadata import hub_id, license_lines, repeated
from cbd_hub.hub import KEPT_FILE, is_repo_id
from cbd_hub.interpolation.curve import Chord
from cbd_hub.interpolation.planner import PADDING
from cbd_hub.manifest import Anchor, Data, Evaluation, Loss, Manifest, Mix, Name, Parameters, Shape
from cbd_hub.sizes import format_size, with_error


class Healed(Data):
    """What ``config.cbd["healed"]`` says of a model that `cbd_hub.heal` gave.

    Attributes:
        teacher: The anchor that it learned from.
        by: ``full``, or the adapter that was trained.
        objective: The loss, term by term; of models healed by an earlier version None.
        steps: Optimiser steps of the weights that were kept.
        tokens: Tokens that these have learned from.
        loss: Held-out loss, nats per token, and ``stderr`` its standard error over documents, where there are two or more.
        loss_before: The same before.
        difference: Loss after less loss before, paired over documents.
        documents: Held-out documents.
        heldout_tokens: Predicted tokens in them.
        earlier: What it said before, of a model that was healed already.
    """

    teacher: Name
    by: str = Field(max_length=64)
    objective: str | None = Field(default=None, max_length=512)
    steps: int = Field(ge=0)
    tokens: int = Field(ge=0)
    loss: float
    stderr: float | None = None
    loss_before: float
    stderr_before: float | None = None
    difference: float
    difference_stderr: float | None = None
    documents: int = Field(ge=1)
    heldout_tokens: int = Field(ge=1)
    earlier: dict[str, Any] | None = None

    def table(self) -> dict[str, str]:
        """The same in words."""
        return {
            "taught by": f"anchor {self.teacher}", "trained": self.by, **({} if self.objective is None else {"learned by": self.objective}), "on": f"{self.tokens:,} tokens, {self.steps:,} optimiser steps",
            "held-out loss before": with_error(self.loss_before, self.stderr_before), "held-out loss after": with_error(self.loss, self.stderr),
            "difference": with_error(self.difference, self.difference_stderr, "+.3f"), "measured on": f"{self.heldout_tokens:,} tokens in {self.documents:,} documents",
        }


class Made(Data):
    """What ``config.cbd`` says of any model that came from a chain or a cut, of what a card tells."""

    parameters: Parameters
    strategy: str = Field(default="", max_length=64)
    chain: str | None = Field(default=None, max_length=256)
    revision: str | None = Field(default=None, max_length=64)
    neighbours: list[Name] = Field(default=[], max_length=2)
    license: str | None = Field(default=None, max_length=128)


class CutLosses(Data):
    """What ``config.cbd`` says beside it of a model that `cbd_hub.single` cut: losses in nats per token, of the whole model and before the fit too, on how much of which text."""

    model: str = Field(max_length=256)
    revision: str | None = Field(max_length=64)
    whole_parameters: Parameters
    text: str = Field(max_length=4096)
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    loss: Loss
    stderr: Loss | None
    whole_loss: Loss
    difference: float
    difference_stderr: Loss | None
    sliced_loss: Loss | None = None
    reconstruction: Literal["stream", "layer"] | None = None
    reconstruction_tokens: int = Field(default=0, ge=0)


def chain_card(
    manifest: Manifest, *, repo_id: str | None = None, anchor_repos: Mapping[str, str] | None = None, recipe: bool = True, datasets: Sequence[str] = (),
) -> str:
    """The README of a chain.

    Args:
        manifest: The chain.
        repo_id: Its repo; None for a local folder.
        anchor_repos: The repo of each anchor, where it is published.
        recipe: Whether recipe.yaml lies beside it.
        datasets: Hub ids of the data sets that it was trained on.

    Returns:
        Markdown with the metadata of a model card.
    """
    name = repo_id or manifest.name
    anchors = [
        {
            "name": anchor.name, "parameters": anchor.parameters, "shape": anchor.shape, "origin": _origin(anchor),
            "loss": _loss(anchor.evaluations[-1]) if anchor.evaluations else "not measured",
            "path": anchor_repos[anchor.name] if anchor_repos else f"{name}/anchors/{anchor.name}",
            "subfolder": anchor.location.subfolder if anchor_repos and (anchor_repos[anchor.name] == repo_id or anchor.location.repo_id != ".") else None,
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
    teacher = manifest.teacher
    aligned = [
        f"{link.small} is brought into {link.large}'s coordinates by a {found.residual} of the residual stream; a logit moves by up to {found.error:.1e}"
        for link in manifest.links if link.strategies.blend is not None and (found := link.strategies.blend.align) is not None
    ]
    return _render(
        "chain.md.j2", aligned=aligned, cuts=all(anchor.origin == "cut" for anchor in manifest.anchors[1:]), name=name, published=repo_id is not None, anchors=anchors, curve=curve, troughs=troughs, recommended=recommended, **_span(manifest),
        teacher_repo=hub_id(teacher.repo_id) if teacher else None, license=license_lines(manifest.shared_license(manifest.anchors)),
        teacher_parameters=format_size(teacher.parameters) if teacher else None, recipe=recipe,
        dataset=cell(measured[-1].dataset) if measured else None, tokens=f"{measured[-1].tokens:,}" if measured else None, datasets=list(datasets),
    )


def _origin(anchor: Anchor) -> str:
    """What an anchor began as, and on how many tokens it was trained."""
    begun = anchor.origin if anchor.parent is None or anchor.origin == "published" else f"{anchor.origin} from {anchor.parent}"
    return begun if anchor.training is None or not anchor.training.tokens else f"{begun}, {anchor.training.tokens:,} tokens"


def cell(value: Any) -> str:
    r"""A value as a cell of a table, which it cannot leave.

    Example:
        >>> cell("a|b\n<!-- c")
        'a\\|b <\\!-- c'
    """
    return " ".join(str(value).split()).replace("|", "\\|").replace("<!--", "<\\!--")


def anchor_card(
    name: str, parameters: int, *, teacher_repo: str | None, license: str | None, facts: dict[str, str], base: str | None = None,
    base_repo: str | None = None, chain: str | None = None, manifest: Manifest | None = None, distilled: bool = True, datasets: Sequence[str] = (),
) -> str:
    """The README of a distilled model, or of an adapter.

    Args:
        name: Its repo id, or its name.
        parameters: Unique parameters.
        teacher_repo: Hub id of the model it learned from; None for a local one.
        license: Licence of the teacher where it is known; it is never invented.
        facts: What the table says of it.
        base: The model that an adapter belongs on; None for a whole model.
        base_repo: Its Hub id; None for a local one.
        chain: Repo of the chain that it is an anchor of.
        manifest: That chain.
        distilled: Whether it was distilled here, and not merely taken over.
        datasets: Hub ids of the data sets that it was trained on.

    Returns:
        Markdown with the metadata of a model card.
    """
    span = {"sizes": "", "example": ""} if manifest is None else _span(manifest)
    return _render(
        "anchor.md.j2", name=name, parameters=parameters, teacher_repo=hub_id(teacher_repo), license=license_lines(license), facts=_cells(facts), datasets=list(datasets),
        base=base, base_repo=base_repo, chain=chain, distilled=distilled, curve=manifest is not None and any(link.curve for link in manifest.links), **span,
    )


def cut_card(name: str, summary: dict[str, Any], *, kept: bool, license: str | None) -> str:
    """The README of a model that was cut from one other.

    Args:
        name: Its name.
        summary: What `cbd_hub.single.Single.summary` says of it: what its config.json holds, and its shape.
        kept: Whether a file beside it says which units were kept.
        license: Licence of the model where it is known; it is never invented.

    Returns:
        Markdown with the metadata of a model card.
    """
    return _render(
        "cut.md.j2", name=name, kept_file=KEPT_FILE if kept else None, license=license_lines(license), repo=summary["model"] if summary["revision"] else None, whole=format_size(summary["whole_parameters"]),
        **summary,
    )


def retokenized_card(name: str, source: str, facts: dict[str, Any], *, trimmed: bool, license: str | None) -> str:
    """The README of a model with another vocabulary.

    Args:
        name: Its name.
        source: What the model that it was is called.
        facts: What `cbd_hub.retokenize.Retokenized` holds.
        trimmed: Whether its vocabulary is a part of the old one.
        license: Licence of the model where it is known; it is never invented.

    Returns:
        Markdown with the metadata of a model card.
    """
    texts = {key: "" if facts[key] is None else with_error(facts[key][0], facts[key][1], "+.4f") for key in ("difference", "trained_difference")}
    return _render("retokenized.md.j2", name=name, repo=source if is_repo_id(source) else None, trimmed=trimmed, license=license_lines(license), **{**facts, **texts})


def interpolant_card(
    name: str, parameters: int, *, chain: str | None, anchors: Sequence[str], license: str | None, facts: dict[str, str], manifest: Manifest | None = None,
    healed: Healed | None = None, base: str | None = None, mixed: bool = True,
) -> str:
    """The README of a model made from a chain, or of an adapter that heals one.

    Args:
        name: Its repo id.
        parameters: Unique parameters.
        chain: Repo of the chain; None for a local one.
        anchors: Repos of the anchors it was made of.
        license: Licence that the anchors have in common, where it is known.
        facts: The plan.
        manifest: The chain, where it has a repo.
        healed: How it was healed.
        base: For an adapter alone, the Python that makes the model that it belongs on.
        mixed: Whether it is a mix of anchors, and not one of them as it is.

    Returns:
        Markdown with the metadata of a model card.
    """
    return _render(
        "interpolant.md.j2", name=name, parameters=parameters, chain=chain, anchors=list(anchors), license=license_lines(license), facts=_cells(facts),
        example="" if manifest is None else _span(manifest)["example"], healed=[] if healed is None else _cells(healed.table()),
        teacher=None if healed is None else healed.teacher, base=base, mixed=mixed,
    )


def cache_card(record: dict[str, Any]) -> str:
    """The README of a teacher cache.

    Args:
        record: Its cache.json.

    Returns:
        Markdown with the metadata of a data set card.
    """
    source = record["source"]
    return _render("teacher_cache.md.j2", teacher=source["teacher"], source=source, figures=record["figures"])


def curve_picture(manifest: Manifest) -> bytes | None:
    """Size against measured loss, as a PNG; None where nothing was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    anchors = [(anchor.parameters / 1e6, anchor.evaluations[-1]) for anchor in manifest.anchors if anchor.evaluations]
    between = [(point.size / 1e6, point) for link in manifest.links for point in link.curve]
    if not between:
        return None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for strategy in sorted({point.strategy for _, point in between}):
        chosen = sorted((size, point.loss, point.stderr or 0.0) for size, point in between if point.strategy == strategy)
        sizes, losses, errors = zip(*chosen)
        axes.errorbar(sizes, losses, errors, marker="o", markersize=4, linestyle="none", capsize=2, label=strategy)
    if anchors:
        sizes, points = zip(*anchors)
        axes.errorbar(sizes, [point.loss for point in points], [point.stderr or 0.0 for point in points], marker="s", color="black", capsize=2, label="anchors")
    axes.set_xlabel("million parameters")
    axes.set_ylabel("nats per token")
    axes.set_title(manifest.name)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _cells(facts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(cell(label), cell(value)) for label, value in facts.items()]


def _span(manifest: Manifest) -> dict[str, str]:
    sides = [[manifest.anchors[-1].parameters]]  # of bridges, which no size lies on
    for link in reversed(manifest.links):
        if link.kind == "bridge":
            sides.append([])
        sides[-1].append(manifest.anchor(link.large).parameters)
    words = [f"any size from {format_size(side[0])} to {format_size(side[-1])}" if len(side) > 1 else format_size(side[0]) for side in sides]
    return {"sizes": " and ".join(words), "example": example_size(manifest)}


def example_size(manifest: Manifest) -> str:
    """A size that a chain gives: the middle one of what its first segment with recommended sizes recommends, else the middle of its first one; without any its smallest anchor."""
    for link in sorted(manifest.links, key=lambda link: not link.recommended_sizes):
        if link.kind == "segment":
            found = link.recommended_sizes or [(manifest.anchor(link.small).parameters + manifest.anchor(link.large).parameters) // 2]
            return format_size(found[len(found) // 2])
    return format_size(manifest.anchors[-1].parameters)


def chain_call(chain: str, made: Mapping[str, Any], shape: Shape) -> str:
    """The Python that makes a model of a chain again.

    Args:
        chain: Folder or Hub id.
        made: What the model's ``config.cbd`` holds.
        shape: Its shape, which says how a fitted blend is mixed.
    """
    padded = made.get("alpha") == PADDING.alpha and all(made.get(name) == getattr(PADDING, name) for name in Mix.model_fields)
    by_size = made["strategy"] == "anchor" or padded
    wish: dict[str, Any] = {"size": made["parameters"]} if by_size else {"shape": shape.model_dump(exclude={"head_size", "vocab"}), "strategy": made["strategy"]}
    if not by_size and "alpha" in made and Mix(alpha=made["alpha"]) == Mix(**{name: made[name] for name in Mix.model_fields if name in made}):
        wish["alpha"] = made["alpha"]  # the plain formula, as where it was given
    if made.get("revision"):
        wish["revision"] = made["revision"]
    return f"CBDModel.from_chain({json.dumps(chain, ensure_ascii=False)}, {', '.join(f'{name}={json.dumps(value)}' for name, value in wish.items())})"


def _loss(entry: Evaluation) -> str:
    return with_error(entry.loss, entry.stderr)


def _above(loss: float, chord: float | None) -> str:
    return "" if chord is None else f"{loss - chord:+.3f}"


def _render(template: str, **values: Any) -> str:
    loader = FunctionLoader(lambda name: (files("cbd_hub.model_cards") / name).read_text(encoding="utf-8"))
    return repeated(Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).get_template(template).render(**values))
