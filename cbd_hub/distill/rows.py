"""What a row may hold: a text, a prompt and its completion, or a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cbd_hub.errors import DataError
from cbd_hub.texts import unicode_fault


RESPONSES = ("completion", "response")


def check_row(row: Mapping[str, Any], where: str | None = None) -> None:
    """Refuse a row that cannot be tokenised, naming its column.

    Args:
        row: With ``text``, ``prompt`` and perhaps ``completion`` (or ``response``), or ``messages``.
        where: What to call it; its place is known to the caller alone.

    Raises:
        DataError: If it has none of these, or a value of another kind.

    Example:
        >>> check_row({"text": 5}, "row 7")
        Traceback (most recent call last):
        cbd_hub.errors.DataError: row 7: text is no text but int; give texts, or leave the row out
    """
    pairs = (["messages"], *(["prompt", name] for name in RESPONSES), ["text"], ["prompt"])
    columns = next((names for names in pairs if set(names) <= set(row)), [])
    if not columns:
        found: str | None = f"a row has the columns {', '.join(map(str, row))}; give text, prompt and completion, messages, or input_ids"
    else:
        chat = "messages" in columns or ("prompt" in columns and isinstance(row["prompt"], (list, tuple)))
        faults = (_chat_fault(name, row[name]) if chat else _text_fault(name, row[name]) for name in columns)
        found = next((fault for fault in faults if fault is not None), None)
    if found is not None:
        raise DataError(found if where is None else f"{where}: {found}")


def _text_fault(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"{name} is no text but {_kind(value)}; give texts, or leave the row out"
    fault = unicode_fault(value)
    return None if fault is None else f"{name} {fault}"


def _chat_fault(name: str, value: Any) -> str | None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        return f"{name} is no list of messages but {_kind(value)}; give some with role and content"
    for index, message in enumerate(value):
        if not isinstance(message.get("role"), str):
            return f"{name}[{index}] has no role; give each message a role and content"
        content = message.get("content")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            return f"{name}[{index}] has no content but {_kind(content)}; give each message a role and content"
        fault = unicode_fault(content) if isinstance(content, str) else None
        if fault is not None:
            return f"{name}[{index}] {fault}"
    return None


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
