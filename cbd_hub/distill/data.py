"""Text in: documents of files and data sets, and the three parts that never mix."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from cbd_hub.distill.rows import RESPONSES, check_row
from cbd_hub.errors import DataError, one_line
from cbd_hub.texts import FORMATS, column_of, files_of, json_rows, nonempty, paragraphs_of, read_texts


@dataclass(frozen=True)
class Parts:
    """Documents split three ways; no document is in two parts.

    A document is a text, or a row with ``messages`` or with ``prompt`` and ``completion``. What is trained on may be a stream of rows.
    """

    train: Any
    calibration: list[Any]
    heldout: list[Any]

    def rows(self, without: Parts | None = None) -> Any:
        """The training documents as the trainer takes them.

        Args:
            without: Parts whose calibration and held-out documents are left out; a stream is taken as it is.
        """
        if not isinstance(self.train, list):
            return self.train
        aside = set() if without is None else {_text(document) for document in (*without.calibration, *without.heldout)}
        return [as_row(document) for document in self.train if _text(document) not in aside]


def as_row(document: Any) -> Mapping[str, Any]:
    """A document as a row."""
    return {"text": document} if isinstance(document, str) else document


def as_document(row: Mapping[str, Any]) -> Any:
    """A row as a document: its text where it has nothing else."""
    return row["text"] if set(row) == {"text"} else row


def _text(document: Any) -> str:
    """What makes a document the same as another."""
    return document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=str)


def is_conversation(columns: Iterable[str]) -> bool:
    """Whether rows of these columns are chats, or prompts with completions."""
    names = set(columns)
    return "messages" in names or ("prompt" in names and bool(names & {*RESPONSES}))


def read_rows(path: str, column: str = "text") -> list[dict[str, Any]]:
    """Rows of local files as the trainer takes them: their texts, or where they have no such column their chats or prompts with completions.

    Args:
        path: A file, or a pattern such as "text/*.txt".
        column: Column that holds the text, where files have columns.

    Raises:
        DataError: If no file matches, a format is unknown, a line is no row, or there is no text.
    """
    names = files_of(path)
    kinds = {FORMATS.get(Path(name).suffix.lower()) for name in names}
    rows: list[tuple[str, dict[str, Any]]] = []
    if kinds == {"jsonl"}:
        rows = [(f"{name} line {number}", row) for name in names for number, row in json_rows(name)]
    elif kinds in ({"csv"}, {"parquet"}, {"json"}):
        loaded = _loaded(str(kinds.pop()), data_files=names, split="train")
        if column not in loaded.column_names and is_conversation(loaded.column_names):
            rows = [(f"{path} row {number:,}", row) for number, row in enumerate(loaded)]
    if rows and column not in rows[0][1] and is_conversation(rows[0][1]):
        for where, row in rows:
            check_row(row, where)
        return [row for _, row in rows]
    return [{"text": text} for text in read_texts(path, column)]


def read_dataset(dataset: str, split: str, column: str, name: str | None = None) -> list[Any]:
    """Documents of a Hub data set: its texts, or where it has no such column its chats or prompts with completions.

    Raises:
        DataError: If it cannot be loaded or has no such column.
    """
    rows = _loaded(dataset, name, split=split)
    if column not in rows.column_names and is_conversation(rows.column_names):
        found = list(rows)
        for number, row in enumerate(found):
            check_row(row, f"{dataset} row {number:,}")
        return found
    return nonempty(column_of(rows, column, dataset), dataset)


def open_stream(path: str | None, dataset: str | None, split: str, column: str, name: str | None = None) -> Any:
    """Rows of local files or a Hub data set as a stream, in a fixed order, never held as a whole.

    Raises:
        DataError: If it cannot be opened, or has neither the column nor conversations.
    """
    if path is not None:
        names = files_of(path)
        suffixes = sorted({Path(file).suffix.lower() for file in names})
        builders = {"json" if FORMATS.get(suffix) == "jsonl" else FORMATS.get(suffix) for suffix in suffixes}
        builder = builders.pop()
        if builders or builder is None:
            raise DataError(f"a stream reads files of one kind, and {path} matches {', '.join(suffixes)}; give {', '.join(FORMATS)}")
        more = {"sample_by": "paragraph"} if builder == "text" else {}
        rows = _loaded(builder, data_files=names, split="train", streaming=True, **more)
        if builder == "text":
            rows = rows.map(_paragraphs, batched=True)
    else:
        rows = _loaded(str(dataset), name, split=split, streaming=True)
    source = str(path or dataset)
    found = list(rows.column_names or next(_drawn(rows, source), {}))
    if not found:
        raise DataError(f"{source} holds no rows; give some with text, messages, or prompt and completion")
    if column in found:
        chosen = rows.select_columns([column])
        rows = (chosen if column == "text" else chosen.rename_column(column, "text")).filter(_filled)
    elif not is_conversation(found):
        raise DataError(f'{source} has no column "{column}"; it has {", ".join(found)}: name the column that holds the text')
    return IterableDataset.from_generator(lambda: _drawn(rows, source))


def _drawn(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a stream, as far as they can be read.

    Raises:
        DataError: Where one cannot; it names the stream.
    """
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {error.start}); convert it first") from error
    except Exception as error:  # datasets, pyarrow and pandas raise many kinds
        raise DataError(f"{source} cannot be read behind its first {number:,} rows ({one_line(error)}); mend what comes there, or leave it out") from error


def _paragraphs(rows: Mapping[str, Any]) -> dict[str, list[str]]:
    """Texts between empty lines parted at blank ones too, as files are."""
    return {"text": [part for text in rows["text"] for part in paragraphs_of(text.removeprefix("\ufeff"))]}


def _filled(row: Mapping[str, Any]) -> bool:
    """Whether a row's text holds anything; what is no text is refused where it is read."""
    text = row["text"]
    return bool(text.strip()) if isinstance(text, str) else text is not None


def _loaded(source: str, *args: Any, **kwargs: Any) -> Any:
    try:
        return load_dataset(source, *args, **kwargs)
    except Exception as error:  # datasets and the Hub client raise many kinds
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        if "data_files" in kwargs:
            raise DataError(f"{', '.join(map(str, kwargs['data_files']))} cannot be read as {source} ({reason}); make or fetch it again") from error
        raise DataError(f'data set "{source}" cannot be loaded ({reason}); check its name and the network, or use path with local files') from error


def split_documents(texts: Sequence[Any], heldout: float, calibration: float, seed: int) -> Parts:
    """Split documents into training, calibration and held-out parts by a hash of their text.

    Equal documents land in one part, and the split does not depend on the order of the files.

    Args:
        texts: The documents, texts or rows.
        heldout: Share that is never trained or calibrated on.
        calibration: Share for measuring importance, order and curves.
        seed: Seed of the split.

    Raises:
        DataError: If there are fewer than three different documents.
    """
    unique = _shuffled(texts, seed)
    if len(unique) < 3:
        raise DataError(
            f"the text has {len(unique)} different documents, and training, calibration and held-out parts need one each; give more, "
            "separated by blank lines"
        )
    first = max(1, round(heldout * len(unique)))
    second = first + max(1, round(calibration * len(unique)))
    if second >= len(unique):
        raise DataError(f"heldout {heldout} and calibration {calibration} leave none of {len(unique)} documents to train on; lower them")
    return Parts(unique[second:], unique[first:second], unique[:first])


def split_stream(rows: Any, reserve: int, heldout: float, calibration: float, seed: int) -> Parts:
    """The first documents of a stream divided into calibration and held-out parts, and the rest of it to train on.

    A document that comes again further on is not noticed.

    Args:
        rows: An ``IterableDataset`` of rows.
        reserve: Documents that are set aside.
        heldout: Their share for the held-out part is ``heldout / (heldout + calibration)``.
        calibration: See ``heldout``.
        seed: Seed of the division.

    Raises:
        DataError: If there are fewer than two different documents.
    """
    first = []
    for number, row in enumerate(itertools.islice(rows, reserve)):
        check_row(row, f"row {number:,} of the stream")
        first.append(as_document(row))
    unique = _shuffled(first, seed)
    if len(unique) < 2:
        raise DataError(f"the stream has {len(unique)} different documents in its first {reserve:,}, and calibration and held-out parts need one each; give more")
    if next(iter(rows.skip(reserve)), None) is None:
        raise DataError(f"the stream ends within the {reserve:,} documents that are set aside, and none is left to train on; lower reserve, or leave streaming out")
    cut = min(max(1, round(len(unique) * heldout / (heldout + calibration))), len(unique) - 1)
    return Parts(rows.skip(reserve), unique[cut:], unique[:cut])


def _shuffled(documents: Iterable[Any], seed: int) -> list[Any]:
    """Different documents, in an order that depends on nothing but their text and the seed."""
    by_text = {_text(document): document for document in documents}
    order = sorted(by_text, key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode(errors="replace")).digest())
    return [by_text[text] for text in order]
