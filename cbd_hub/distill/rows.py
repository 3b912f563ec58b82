"""What a row may hold: a text, a prompt and its completion, or a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cbd_hub.errors import DataError
from cbd_hub.texts import unicode_fault


RESPONSES = ("completion", "response")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # what a chat template takes beside messages
_RENDERING = frozenset({  # arguments of apply_chat_template
    "conversation", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})
_MASKS = ("completion_mask", "assistant_masks")  # of TRL's tokenised rows


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


def first_row(dataset: Any) -> Mapping[str, Any] | None:
    """The first row of a data set; None where there is none.

    Raises:
        DataError: If it is no row.
    """
    first = None if dataset is None else next(iter(dataset), None)
    if first is not None and not isinstance(first, Mapping):
        raise DataError(f'rows are no mappings but {_kind(first)}; give some such as {{"text": "..."}}')
    return first


def check_ready(row: Mapping[str, Any]) -> None:
    """Refuse a row with ``input_ids`` that says in another way than by ``labels`` which of them count, or than by ``position_ids`` where documents begin.

    Raises:
        DataError: If it does, and has none of these.
    """
    if row.get("seq_lengths") is not None and row.get("position_ids") is None:
        raise DataError("rows have input_ids and seq_lengths but no position_ids, so that attention would cross the documents' borders; give position_ids that begin at 0 in each document, or rows of text")
    mask = next((name for name in _MASKS if row.get(name) is not None), None)
    if mask is not None and row.get("labels") is None:
        raise DataError(f"rows have input_ids and {mask} but no labels, so that all of their tokens would count; give labels: the ids, and -100 where {mask} is 0")


def with_answer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with an answer: its own, or an empty one behind a prompt that has none.

    Example:
        >>> with_answer({"prompt": "2 + 2 ="})
        {'prompt': '2 + 2 =', 'completion': ''}
    """
    if {"messages", *RESPONSES} & set(row):
        return row
    return {**row, "completion": "" if isinstance(row.get("prompt"), (str, type(None))) else [{"role": "assistant", "content": ""}]}


def chat_of(row: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], int] | None:
    """The messages of a row that is a chat, and from which on answers count: from the first of its completion where it has a prompt; None of other rows.

    Example:
        >>> chat_of({"prompt": [{"role": "user", "content": "2 + 2 ="}], "completion": [{"role": "assistant", "content": "4"}]})
        ([{'role': 'user', 'content': '2 + 2 ='}, {'role': 'assistant', 'content': '4'}], 1)
    """
    if "messages" in row:
        return list(row["messages"]), 0
    response = next((name for name in RESPONSES if name in row), None)
    if response is None or isinstance(row.get("prompt", ""), str):
        return None
    return [*row["prompt"], *row[response]], len(row["prompt"])


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says to the chat template beside its messages: ``tools``, in a list or in JSON, and ``chat_template_kwargs``, as TRL reads them.

    Raises:
        DataError: If one is of another kind.

    Example:
        >>> template_options({"messages": [], "chat_template_kwargs": {"enable_thinking": False}})
        {'enable_thinking': False}
    """
    more, tools = row.get("chat_template_kwargs") or {}, row.get("tools") or None
    if not isinstance(more, Mapping):
        raise DataError(f"chat_template_kwargs is {_kind(more)}; give an object with what the chat template takes")
    own = next((name for name in more if name in _RENDERING), None)
    if own is not None:
        raise DataError(f"chat_template_kwargs has {own}, which is no option of a chat template but says how one is rendered; leave it out")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools cannot be read as json ({error}); give a list of tools") from error
    else:
        tools = _without_none(tools)
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise DataError(f"tools is no list but {_kind(tools)}; give a list of tools")
    return {**_without_none(more), **({"tools": list(tools)} if tools else {})}


def _without_none(value: Any) -> Any:
    """A value without the names that hold None: data sets give each row, and each tool in it, the names that any other has."""
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


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
