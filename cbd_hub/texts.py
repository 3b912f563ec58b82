"""Texts of local files: the documents that everything is measured and trained on."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cbd_hub.errors import ArgumentError, DataError


FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def texts_of(calibration: Any, column: str = "text") -> tuple[list[str], str]:
    """Documents in whatever form a caller has them, and what to call them.

    Args:
        calibration: A text file or a pattern, a list of texts, or a ``datasets.Dataset``.
        column: Column that holds the text, where there are columns.

    Raises:
        ArgumentError: If it is something else.
        DataError: If there is no text.

    Example:
        >>> texts_of(["one", "two", ""])
        (['one', 'two'], '3 texts')
    """
    if isinstance(calibration, (str, os.PathLike)):
        return read_texts(os.fspath(calibration), column), Path(calibration).name
    if hasattr(calibration, "column_names"):
        source = str(getattr(getattr(calibration, "info", None), "dataset_name", None) or "a data set")
        return nonempty(column_of(calibration, column, source), source), source
    if not isinstance(calibration, Sequence) or not all(isinstance(text, str) for text in calibration):
        raise ArgumentError(f"calibration is {type(calibration).__name__}; give a text file, a list of texts, a datasets.Dataset, or None")
    return nonempty(list(calibration), "calibration"), f"{len(calibration):,} texts"


def read_texts(path: str, column: str = "text") -> list[str]:
    """Documents of local files: paragraphs of .txt files, rows of .jsonl, .csv and .parquet files.

    Args:
        path: A file, or a pattern such as "text/*.txt".
        column: Column that holds the text, where files have columns.

    Raises:
        DataError: If no file matches, a format is unknown, there is no text, or a column of plain text is named.
    """
    texts: list[str] = []
    found = files_of(path)
    if column != "text" and all(FORMATS.get(Path(name).suffix.lower()) == "text" for name in found):
        raise DataError(f'"{column}" names a column, and {path} is plain text, which has none; leave it out')
    for suffix, names in itertools.groupby(found, key=lambda name: Path(name).suffix.lower()):
        if suffix not in FORMATS:
            raise DataError(f'"{suffix}" files are not read as text; give {", ".join(FORMATS)}')
        texts += _rows(FORMATS[suffix], list(names), column)
    return nonempty(texts, path)


def files_of(path: str) -> list[str]:
    """The files that a path or a pattern names, sorted.

    Raises:
        DataError: If there are none.
    """
    literal = Path(path).expanduser()
    found = [str(literal)] if literal.is_file() else sorted(
        name for name in glob.glob(str(literal), recursive=True) if Path(name).is_file()
    )
    if not found:
        folder = literal.is_dir()
        raise DataError(f'"{path}" is a folder; name its files, such as "{literal}/*.txt"' if folder else f'no file matches "{path}"; check the path or the pattern')
    return found


def _rows(builder: str, names: list[str], column: str) -> list[str]:
    if builder == "text":
        return [paragraph for name in names for paragraph in paragraphs_of(_read(name))]
    if builder == "jsonl":
        return [text for name in names for text in _json_lines(name, column)]
    from datasets import load_dataset
    try:
        rows = load_dataset(builder, data_files=names, split="train")
    except Exception as error:  # datasets raises many kinds for a broken file
        raise DataError(f"{names[0]} cannot be read as {builder} ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})") from error
    return column_of(rows, column, names[0])


def paragraphs_of(text: str) -> list[str]:
    r"""The parts of a text between blank lines.

    Example:
        >>> paragraphs_of("one\n  \ntwo\nlines\n")
        ['one', 'two\nlines']
    """
    groups = itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip()))
    return ["\n".join(group) for filled, group in groups if filled]


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); check the path and its permissions") from error


def _json_lines(name: str, column: str) -> list[str]:
    """The texts of a .jsonl file."""
    texts = []
    for number, row in json_rows(name):
        if column not in row:
            raise DataError(f'{name} line {number} has no column "{column}"; it has {_columns(row)}')
        if row[column] is not None and not isinstance(row[column], str):
            raise DataError(f'{name} line {number}: "{column}" is no text but {type(row[column]).__name__}; name the column that holds the text')
        texts.append(row[column] or "")
    return texts


def json_rows(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl file with their line numbers."""
    for number, line in enumerate(_read(name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} line {number} cannot be read as json ({error}); each line is one object") from error
        if not isinstance(row, dict):
            raise DataError(f"{name} line {number} is no object but {type(row).__name__}; each line is one object")
        yield number, row


def column_of(rows: Any, column: str, source: str) -> list[str]:
    """The filled texts of a data set's column; ``source`` names it in errors.

    Raises:
        DataError: If it has no such column, or a row has something else than text there.
    """
    if column not in rows.column_names:
        raise DataError(f'{source} has no column "{column}"; it has {_columns(rows.column_names)}')
    for number, text in enumerate(rows[column]):
        if text is not None and not isinstance(text, str):
            raise DataError(f'{source} row {number:,}: "{column}" is no text but {type(text).__name__}; name the column that holds the text')
    return [text for text in rows[column] if text]


def _columns(names: Iterable[str]) -> str:
    """What columns there are, and what to do."""
    names = list(names)
    todo = "plain text is wanted here, and these are chats or prompts: give a file of their texts" if {"messages", "prompt"} & set(names) else "name the column that holds the text"
    return f"{', '.join(names)[:100]}: {todo}"


def utf8(text: str, where: str = "the text") -> bytes:
    """The bytes of a text; ``where`` names it in errors.

    Raises:
        DataError: If it holds half a surrogate pair, which is no character.
    """
    fault = unicode_fault(text)
    if fault is not None:
        raise DataError(f"{where} {fault}")
    return text.encode()


def unicode_fault(text: str) -> str | None:
    """Why a text is no Unicode text, in words that follow its name; None where it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate at character {error.start:,}, which is no Unicode text; repair or leave out that row"
    return None


def nonempty(texts: list[str], source: str) -> list[str]:
    """The texts that hold anything; ``source`` names them in errors.

    Raises:
        DataError: If there are none, or one is no Unicode text.
    """
    for number, text in enumerate(texts):
        utf8(text, f"{source} text {number:,}")
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise DataError(f"{source} holds no text; give a file with at least a few paragraphs")
    return kept
