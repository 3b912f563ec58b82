"""What a card's metadata may hold, and a card written anew around what people wrote into the old one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard, metadata_load

from cbd_hub.errors import ArgumentError


_BEGIN, _END = "<!-- cbd_hub:begin", "<!-- cbd_hub:end -->"
_METADATA = "<!-- cbd_hub:metadata "  # begins the line of the block that repeats what was generated of the metadata: the rest is a person's
CHAIN_TAG = "cbd-chain:"
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


def license_lines(license: str | None) -> str:
    r"""The metadata of a licence: nothing for an unknown one, ``other`` with its name for one that the Hub has no id for.

    Example:
        >>> license_lines("apache-2.0"), license_lines("My Licence"), license_lines(None)
        ('license: apache-2.0\n', 'license: other\nlicense_name: "my-licence"\n', '')
    """
    name = "" if license is None else _license_id(license)
    return f"license: {name}\n" if name in LICENSES else f'license: other\nlicense_name: "{name}"\n' if name else ""


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


def check_card(text: str, name: str) -> None:
    """What the Hub would refuse in a card's metadata, found before anything is sent.

    Args:
        text: The README.
        name: Whose it is, for the error.

    Raises:
        ArgumentError: Naming the first field that is wrong.
    """
    data = _metadata(text, name, strict=True)
    bases = data.get("base_model") or []
    lists = {field: data.get(field) or [] for field in ("tags", "datasets", "language")}
    for field, value in lists.items():
        if not isinstance(value, (str, list)) or not all(isinstance(entry, str) and entry for entry in _texts(value)):
            raise ArgumentError(f"the card of {name} has {field}: {str(value)[:80]}, which is not a list of texts; mend its README")
    for base in _texts(bases):
        if hub_id(base) is None:
            raise ArgumentError(f"the card of {name} has base_model: {str(base)[:80]}, which is no Hub id; mend its README")
    if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        raise ArgumentError(f"the card of {name} has base_model_relation: {str(data['base_model_relation'])[:80]}; the Hub knows adapter, merge, quantized and finetune")
    for license in _texts(data.get("license")):
        if license not in LICENSES:
            raise ArgumentError(f'the card of {name} has license: {str(license)[:80]}, which is no id of the Hub; write "other" with license_name')
    named = data.get("license_name")
    if named is not None and (data.get("license") != "other" or not isinstance(named, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", named)):
        raise ArgumentError(f'the card of {name} has license_name: {str(named)[:80]}; it goes with license: other, in lower case with "-" and "."')


def _metadata(text: str, name: str, *, strict: bool = False) -> dict[str, Any]:
    """The metadata of a card, whose ``name`` is for the error; ``strict`` refuses also what the client could leave out."""
    try:
        found: dict[str, Any] = RepoCard(text, ignore_metadata_errors=not strict).data.to_dict()
    except Exception as error:  # whatever a broken YAML block raises
        raise ArgumentError(f"the card of {name} has metadata that is not YAML ({str(error).splitlines()[0][:120]}); mend the block at the top of its README") from error
    return found


def read_card(path: Path, name: str | None = None) -> str | None:
    """The text of a README, whatever system it was written on; None where there is none. ``name`` says whose it is.

    Raises:
        ArgumentError: If it is no UTF-8, or has metadata that is no YAML, since what people wrote would be lost.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError:
        return None
    except UnicodeDecodeError as error:
        whose = path if name is None else f"the README of {name}"
        raise ArgumentError(f"{whose} is not UTF-8 (byte {error.start:,}), and its words could not be kept; save it as UTF-8 and run the same command again") from error
    _metadata(text, str(name or path))
    return text


def is_ours(card: str) -> bool:
    """Whether a README has a block that cbd_hub writes, and of a model that it wrote too."""
    return _BEGIN in card and not _generated(card).get("theirs")


def chains_of(card: str) -> list[str]:
    """The chains on the Hub that a model's README says it belongs to."""
    tags = _texts(RepoCard(card, ignore_metadata_errors=True).data.to_dict().get("tags"))
    named = [tag.removeprefix(CHAIN_TAG) for tag in tags if isinstance(tag, str) and tag.startswith(CHAIN_TAG)]
    return [chain for chain in named if hub_id(chain) is not None]


def as_theirs(card: str) -> str:
    """A card of ours for a model that somebody else wrote."""
    return repeated(card, theirs=True)


def merge_card(old: str | None, new: str) -> str:
    """A card written anew that keeps what people wrote into the old one.

    The marked block is replaced and the text around it kept. Of the old metadata what was generated goes, as the block repeats it; of the rest what only the old
    one has is kept, tags and data sets of both are kept, and a licence or base model that a person put there stands.

    Args:
        old: The README that is there, as `read_card` gives it; None for none.
        new: The card.

    Returns:
        The README to publish.
    """
    if not old or not old.strip():
        return new
    fresh = RepoCard(new)
    written = RepoCard(old, ignore_metadata_errors=True)
    data, body = written.data.to_dict(), written.text
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


def repeated(card: str, *, theirs: bool = False) -> str:
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


def hub_id(name: Any) -> str | None:
    """A text if it is a Hub id."""
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else None
