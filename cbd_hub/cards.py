"""Data and a Jinja template in, a README out."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard, metadata_load
from jinja2 import Environment, FunctionLoader, StrictUndefined
from pydantic import Field

from cbd_hub.errors import ArgumentError
from cbd_hub.hub import is_repo_id
from cbd_hub.interpolation.curve import Chord
from cbd_hub.manifest import Anchor, Data, Evaluation, Manifest, Name
from cbd_hub.sizes import format_size


_BEGIN, _END = "<!-- cbd_hub:begin", "<!-- cbd_hub:end -->"
_METADATA = "<!-- cbd_hub:metadata "  # begins the line of the block that repeats what was generated of the metadata: the rest is a person's
_LICENCE = ("license", "license_name", "license_link")
# The ids that the Hub's metadata may hold.
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m openrail++ afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl
    gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openmdw-1.1 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())


class Healed(Data):
    """What ``config.cbd["healed"]`` says of a model that `cbd_hub.heal` gave.

    Attributes:
        teacher: The anchor that it learned from.
        by: ``full``, or the adapter that was trained.
        steps: Optimiser steps of the weights that were kept.
        tokens: Tokens that these have learned from.
        loss: Held-out loss, nats per token, and ``stderr`` its standard error over documents, where there are two or more.
        loss_before: The same before.
        difference: Of the two, paired over documents.
        documents: Held-out documents.
        heldout_tokens: Predicted tokens in them.
        earlier: What it said before, of a model that was healed already.
    """

    teacher: Name
    by: str = Field(max_length=64)
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
            "taught by": f"anchor {self.teacher}", "trained": self.by, "on": f"{self.tokens:,} tokens, {self.steps:,} optimiser steps",
            "held-out loss before": value_text(self.loss_before, self.stderr_before), "held-out loss after": value_text(self.loss, self.stderr),
            "difference": value_text(self.difference, self.difference_stderr, "+"), "measured on": f"{self.heldout_tokens:,} tokens in {self.documents:,} documents",
        }


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
        "chain.md.j2", aligned=aligned, name=name, published=repo_id is not None, anchors=anchors, curve=curve, troughs=troughs, recommended=recommended, **_span(manifest),
        teacher_repo=_hub_id(teacher.repo_id) if teacher else None, license=license_lines(shared_license(manifest, manifest.anchors)),
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
        base: Of an adapter, the model that it belongs on; None for a whole model.
        base_repo: Its Hub id; None for a local one.
        chain: Repo of the chain that it is an anchor of.
        manifest: That chain.
        distilled: Whether it was distilled here, and not merely taken over.
        datasets: Hub ids of the data sets that it was trained on.

    Returns:
        Markdown with the metadata of a model card.
    """
    span = {"smallest": "", "largest": "", "example": ""} if manifest is None else _span(manifest)
    return _render(
        "anchor.md.j2", name=name, parameters=parameters, teacher_repo=_hub_id(teacher_repo), license=license_lines(license), facts=_cells(facts), datasets=list(datasets),
        base=base, base_repo=base_repo, chain=chain, distilled=distilled, curve=manifest is not None and any(link.curve for link in manifest.links), **span,
    )


def cut_card(name: str, summary: dict[str, Any], *, license: str | None) -> str:
    """The README of a model that was cut from one other.

    Args:
        name: Its name.
        summary: What `cbd_hub.single.Single.summary` says of it: what its config.json holds, and its shape.
        license: Licence of the model where it is known; it is never invented.

    Returns:
        Markdown with the metadata of a model card.
    """
    return _render(
        "cut.md.j2", name=name, license=license_lines(license), repo=summary["model"] if summary["revision"] else None, whole=format_size(summary["whole_parameters"]),
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
    texts = {
        key: "" if (value := facts[key]) is None else f"{value[0]:+.4f}" + ("" if value[1] is None else f" ± {value[1]:.4f}") for key in ("difference", "trained_difference")
    }
    return _render("retokenized.md.j2", name=name, repo=source if is_repo_id(source) else None, trimmed=trimmed, license=license_lines(license), **{**facts, **texts})


def interpolant_card(
    name: str, parameters: int, *, chain: str | None, anchors: Sequence[str], license: str | None, facts: dict[str, str], manifest: Manifest | None = None,
    healed: Healed | None = None, base: str | None = None,
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
        base: Of an adapter alone, the Python that makes the model that it belongs on.

    Returns:
        Markdown with the metadata of a model card.
    """
    return _render(
        "interpolant.md.j2", name=name, parameters=parameters, chain=chain, anchors=list(anchors), license=license_lines(license), facts=_cells(facts),
        example="" if manifest is None else _span(manifest)["example"], healed=[] if healed is None else list(healed.table().items()),
        teacher=None if healed is None else healed.teacher, base=base,
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


def license_lines(license: str | None) -> str:
    r"""The metadata of a licence: nothing for an unknown one, ``other`` with its name for one that the Hub has no id for.

    Example:
        >>> license_lines("apache-2.0"), license_lines("My Licence"), license_lines(None)
        ('license: apache-2.0\n', 'license: other\nlicense_name: my-licence\n', '')
    """
    name = "" if license is None else _license_id(license)
    return f"license: {name}\n" if name in LICENSES else f"license: other\nlicense_name: {name}\n" if name else ""


def _license_id(license: str) -> str:
    """The Hub's id of a licence, or the name that stands beside ``other``."""
    return license.lower() if license.lower() in LICENSES else re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-.")


def license_of(folder: Path) -> str | None:
    """The licence that a model folder's card names: an id of the Hub, or the name of another one; None where it names none, or several."""
    try:
        data = metadata_load(folder / "README.md") or {}
    except Exception:  # whatever a broken YAML block raises
        return None
    found = data.get("license")
    if found == "other":
        found = data.get("license_name") or found
    return found if isinstance(found, str) and found.isprintable() and 0 < len(found) <= 128 else None


def shared_license(manifest: Manifest, anchors: Iterable[Anchor]) -> str | None:
    """The licence of some anchors, each one's own or else the teacher's; None where it is unknown or they differ."""
    inherited = manifest.teacher.license if manifest.teacher is not None else None
    found = {anchor.license or inherited for anchor in anchors}
    return found.pop() if len(found) == 1 else None


def check_card(text: str, name: str) -> None:
    """What the Hub would refuse in a card's metadata, found before anything is sent.

    Args:
        text: The README.
        name: Whose it is, for the error.

    Raises:
        ArgumentError: Naming the first field that is wrong.
    """
    try:
        data = RepoCard(text, ignore_metadata_errors=False).data.to_dict()
    except Exception as error:  # whatever a broken YAML block raises
        raise ArgumentError(f"the card of {name} has metadata that is not YAML ({str(error).splitlines()[0][:120]}); mend the block at the top of its README") from error
    bases = data.get("base_model") or []
    lists = {field: data.get(field) or [] for field in ("tags", "datasets", "language")}
    for field, value in lists.items():
        if not isinstance(value, (str, list)) or not all(isinstance(entry, str) and entry for entry in _texts(value)):
            raise ArgumentError(f"the card of {name} has {field}: {str(value)[:80]}, which is not a list of texts; mend its README")
    for base in _texts(bases):
        if _hub_id(base) is None:
            raise ArgumentError(f"the card of {name} has base_model: {str(base)[:80]}, which is no Hub id; mend its README")
    if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        raise ArgumentError(f"the card of {name} has base_model_relation: {str(data['base_model_relation'])[:80]}; the Hub knows adapter, merge, quantized and finetune")
    for license in _texts(data.get("license")):
        if license not in LICENSES:
            raise ArgumentError(f'the card of {name} has license: {str(license)[:80]}, which is no id of the Hub; write "other" with license_name')
    named = data.get("license_name")
    if named is not None and (data.get("license") != "other" or not isinstance(named, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", named)):
        raise ArgumentError(f'the card of {name} has license_name: {str(named)[:80]}; it goes with license: other, in lower case with "-" and "."')


def read_card(path: Path, name: str | None = None) -> str | None:
    """The text of a README, whatever system it was written on; None where there is none. ``name`` says whose it is.

    Raises:
        ArgumentError: If it is no UTF-8, since what people wrote would be lost.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError:
        return None
    except UnicodeDecodeError as error:
        whose = path if name is None else f"the README of {name}"
        raise ArgumentError(f"{whose} is not UTF-8 (byte {error.start:,}), and its words could not be kept; save it as UTF-8 and run the same command again") from error


def is_ours(card: str) -> bool:
    """Whether a README has a block that cbd_hub writes, and of a model that it wrote too."""
    return _BEGIN in card and not _generated(card).get("theirs")


def as_theirs(card: str) -> str:
    """A card of ours for a model that somebody else wrote."""
    return _repeated(card, theirs=True)


def merge_card(old: str | None, new: str) -> str:
    """A card written anew that keeps what people wrote into the old one.

    The marked block is replaced and the text around it kept. Of the old metadata what was generated goes, as the block repeats it; of the rest what only the old
    one has is kept, tags and data sets of both are kept, and a licence or base model that a person put there stands.

    Args:
        old: The README that is there; None for none.
        new: The card.

    Returns:
        The README to publish.
    """
    if not old or not old.strip():
        return new
    fresh = RepoCard(new)
    try:
        written = RepoCard(old, ignore_metadata_errors=True)
        data, body = written.data.to_dict(), written.text
    except Exception:  # a card that cannot be read is all hand-written text
        data, body = {}, old
    generated, new_data = _generated(body), fresh.data.to_dict()
    if generated.get("license") and all(generated.get(field) == data.get(field) for field in _LICENCE[:2]):
        changed = any(generated.get(field) != new_data.get(field) for field in _LICENCE[:2])
        data = {field: value for field, value in data.items() if field not in (_LICENCE if changed else _LICENCE[:2])}
    own: dict[str, Any] = {}  # of the base models, what a person wrote
    for field in ("base_model", "base_model_relation", "tags", "datasets"):
        if not isinstance(data.get(field), (str, list)):
            continue
        ours, theirs = _texts(generated.get(field)), _texts(data[field])
        rest = [entry for entry in theirs if entry not in ours]
        if generated and rest and field.startswith("base"):
            joined = [*(_texts(new_data.get(field)) if ours and set(ours) <= set(theirs) else []), *rest]
            own[field] = joined if isinstance(data[field], list) else data[field]
        data = {name: value for name, value in data.items() if name != field} | ({field: rest if isinstance(data[field], list) else data[field]} if rest else {})
    merged = {**data, **new_data, **own}
    for field in ("tags", "datasets", "language"):
        if isinstance(data.get(field), (str, list, type(None))):  # anything else is for the check of the card to refuse
            both = [*_texts(new_data.get(field)), *_texts(data.get(field))]
        else:
            merged[field], both = data[field], []
        if both:
            merged[field] = list(dict.fromkeys(both))
    if data.get("license"):
        merged |= {field: data[field] for field in _LICENCE if field in data}
    start, stop = body.find(_BEGIN), body.find(_END)
    block = fresh.text[fresh.text.find(_BEGIN) : fresh.text.find(_END) + len(_END)].strip()
    if 0 <= start < stop:
        body = body[:start].strip("\n") + "\n\n" + block + "\n\n" + body[stop + len(_END) :].strip("\n")
    else:
        body = block + "\n\n" + body.strip()
    head = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body.strip()}\n"


def _generated(body: str) -> dict[str, Any]:
    """The metadata that a card's block says was generated with it."""
    _, found, rest = body.partition(_METADATA)
    try:
        values = json.loads(rest.partition(" -->")[0]) if found else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _repeated(card: str, *, theirs: bool = False) -> str:
    """A card whose block repeats the metadata that a person may change; with ``theirs`` also that the model is a person's."""
    if _BEGIN not in card:
        return card
    data = RepoCard(card).data.to_dict()
    fields = _generated(card) or {field: data[field] for field in (*_LICENCE[:2], "base_model", "base_model_relation", "tags", "datasets") if field in data}
    text = json.dumps({**fields, **({"theirs": True} if theirs else {})}).replace("--", "-\\u002d")
    head, begin, rest = card.partition(_BEGIN)
    line, end, rest = rest.partition("\n")
    rest = rest.partition("\n")[2] if rest.startswith(_METADATA) else rest
    return f"{head}{begin}{line}{end}{_METADATA}{text} -->\n{rest}"


def _texts(value: Any) -> list[Any]:
    """A field of a card's metadata that may be one entry or a list of them."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _cells(facts: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(cell(label), cell(value)) for label, value in facts.items()]


def _span(manifest: Manifest) -> dict[str, str]:
    smallest, largest = manifest.anchors[-1].parameters, manifest.anchors[0].parameters
    return {"smallest": format_size(smallest), "largest": format_size(largest), "example": format_size((smallest + largest) // 2)}


def _hub_id(name: Any) -> str | None:
    """A text if it is a Hub id."""
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else None


def _loss(entry: Evaluation) -> str:
    return value_text(entry.loss, entry.stderr)


def value_text(value: float, stderr: float | None, sign: str = "") -> str:
    """A figure with its standard error, where it has one; ``sign`` as in a format."""
    return f"{value:{sign}.3f}" + (f" ± {stderr:.3f}" if stderr is not None else "")


def _above(loss: float, chord: float | None) -> str:
    return "" if chord is None else f"{loss - chord:+.3f}"


def _render(template: str, **values: Any) -> str:
    loader = FunctionLoader(lambda name: (files("cbd_hub.model_cards") / name).read_text(encoding="utf-8"))
    return _repeated(Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).get_template(template).render(**values))
