"""What a visitor can ask for, as plain functions: sizes, prompts and numbers come in, never a repo, a path or code."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil

from cbd_hub.chain import Chain
from cbd_hub.errors import ArgumentError, BusyError, CBDError, DataError, StorageError
from cbd_hub.model import CBDModel
from cbd_hub.shapes import check_ids
from cbd_hub.sizes import format_bytes, format_size
from cbd_hub.space.facts import Picker
from cbd_hub.space.limits import Limits
from cbd_hub.space.models import Loading, ModelCache
from cbd_hub.space.writing import Measure, Sampling, Writer, prompt_ids


_WAIT = 0.25  # seconds between two looks at a load
_SHOW = 0.06  # seconds between two texts that are shown


@dataclass(frozen=True)
class Written:
    """How far one size is with its text.

    Attributes:
        size: Its parameters.
        name: The same in three digits.
        text: What it has written.
        state: ``loading``, ``writing``, ``measuring`` or ``done``.
        note: What is going on, for people.
        share: How much of the loading is done, 0 to 1; None while that cannot be known.
        tokens: Tokens written.
        tokens_per_second: Tokens a second of computing.
        perplexity: Perplexity of the text that was given to measure.
        bits_per_byte: Bits per byte of the same text, on a chain of several vocabularies.
        memory: Bytes of the model's weights.
        process: Bytes of the whole process.
    """

    size: int
    name: str
    text: str = ""
    state: str = "loading"
    note: str = ""
    share: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    memory: int = 0
    process: int = 0

    def data(self) -> dict[str, Any]:
        """The end of it as plain data."""
        return {
            "size": self.size, "text": self.text, "tokens": self.tokens, "tokens_per_second": self.tokens_per_second, "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte, "bytes_of_weights": self.memory, "bytes_of_process": self.process,
        }


@dataclass
class Desk:
    """A chain, opened for visitors.

    Args:
        chain: The chain.
        limits: What a visitor may have.
        dtype: Dtype of the models; by default the anchors'.
    """

    chain: Chain
    limits: Limits = Limits()
    dtype: Any = None
    picker: Picker = field(init=False)
    models: ModelCache = field(init=False)

    def __post_init__(self) -> None:
        self.picker = Picker(self.chain)
        self.models = ModelCache(self.picker, self.limits.memory, self.dtype)
        self._tokenizers: dict[str | None, Any] = {}
        self._lock = threading.Lock()

    def tokenizer(self, size: int) -> Any:
        """The tokenizer of a size's side of the chain."""
        key = self.chain.neighbours(size)[0].tokenizer_sha256
        with self._lock:
            if key not in self._tokenizers:
                self._tokenizers[key] = self.chain.tokenizer(size)
            return self._tokenizers[key]

    @property
    def chats(self) -> bool:
        """Whether the largest anchor's tokenizer has a chat template."""
        return bool(self.tokenizer(self.picker.largest).chat_template)

    def generate(self, size: str | int, prompt: str, sampling: Sampling) -> Iterator[Written]:
        """Continue a prompt with a size, step by step; close the iterator to stop the computing."""
        made = self.picker.size(size)
        ids = self._prompt(made, prompt, sampling)
        for states in self._run({made: ids}, sampling):
            yield states[0]

    def chat(self, size: str | int, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> Iterator[Written]:
        """Answer a chat, which ends with the visitor's message, with a size."""
        made = self.picker.size(size)
        if not self.tokenizer(made).chat_template:
            raise ArgumentError(f"{format_size(made)} has no chat template; give it a prompt to continue instead")
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages if turn.get("role") in ("user", "assistant", "system")]
        if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise ArgumentError("the message is empty; write something to answer")
        ids = self._prompt(made, "".join(turn["content"] for turn in turns), sampling, turns, what="chat")
        for states in self._run({made: ids}, sampling):
            yield states[0]

    def compare(self, sizes: Sequence[str | int], prompt: str, sampling: Sampling, text: str = "") -> Iterator[list[Written]]:
        """Let two or three sizes answer one prompt at the same time, then measure each on a text, where one is given."""
        made = list(dict.fromkeys(self.picker.size(size) for size in sizes))
        if not 2 <= len(made) <= 3:
            raise ArgumentError(f"{len(made)} different sizes were chosen; compare two or three")
        return self._run({size: self._prompt(size, prompt, sampling) for size in made}, sampling, {size: self._passage(size, text) for size in made})

    def _passage(self, size: int, text: str) -> list[int]:
        """Token ids of a text that may be measured; none of no text.

        Raises:
            ArgumentError: If it is too long.
            DataError: If it has fewer than two tokens, or one for which the model has no row.
        """
        if not text.strip():
            return []
        if len(text) > self.limits.characters:
            raise ArgumentError(f"the text to measure has {len(text):,} characters, more than {self.limits.characters:,}; shorten it")
        ids = prompt_ids(self.tokenizer(size), text)
        if len(ids) < 2:
            raise DataError("the text to measure has fewer than two tokens; give a sentence or two")
        if len(ids) > (most := self._room(size)):
            raise ArgumentError(f"the text to measure has {len(ids):,} tokens, more than {most:,}; shorten it")
        check_ids(max(ids), self._config(size))
        return ids

    def _room(self, size: int, new_tokens: int = 0) -> int:
        """Most tokens that a size may read, when so many are to be written."""
        room = getattr(self._config(size), "max_position_embeddings", None)
        return self.limits.prompt_tokens if room is None else min(self.limits.prompt_tokens, room - new_tokens)

    def _prompt(self, size: int, prompt: str, sampling: Sampling, turns: Sequence[dict[str, str]] | None = None, what: str = "prompt") -> list[int]:
        """Token ids of a prompt that may be answered.

        Raises:
            ArgumentError: If it is empty or too long, or more tokens are asked for than there may be.
            DataError: If it holds a token for which the model has no row.
        """
        if not prompt.strip():
            raise ArgumentError("the prompt is empty; give a few words to continue")
        remedy = "shorten it" if turns is None else "clear it"
        if len(prompt) > self.limits.characters:
            raise ArgumentError(f"the {what} has {len(prompt):,} characters, more than {self.limits.characters:,}; {remedy}")
        if sampling.new_tokens > self.limits.new_tokens:
            raise ArgumentError(f"{sampling.new_tokens:,} new tokens are more than {self.limits.new_tokens:,}; ask for fewer")
        ids = prompt_ids(self.tokenizer(size), prompt, turns)
        most = self._room(size, int(sampling.new_tokens))
        if len(ids) > most:
            raise ArgumentError(f"the {what} has {len(ids):,} tokens, more than {max(most, 0):,}; {remedy}, or ask for fewer new tokens")
        check_ids(max(ids, default=0), self._config(size))
        return ids

    def _config(self, size: int) -> Any:
        from cbd_hub.plans import anchor_config
        return anchor_config(self.picker.files, self.chain.neighbours(size)[0])

    def _run(self, prompts: Mapping[int, Sequence[int]], sampling: Sampling, passages: Mapping[int, Sequence[int]] | None = None) -> Iterator[list[Written]]:
        end = time.monotonic() + self.limits.seconds
        with self.models.hold(list(prompts)) as entries:
            yield from self._waited(list(prompts), entries, end)
            models = [entry.future.result() for entry in entries]
            tokenizers = [self.tokenizer(size) for size in prompts]
            writers = [Writer(model, tokenizer, ids, sampling) for model, tokenizer, ids in zip(models, tokenizers, prompts.values())]
            measures: list[Measure] = []
            states = [Written(size, entry.name, state="writing", memory=entry.bytes) for size, entry in zip(prompts, entries)]

            def measured(measure: Measure) -> tuple[float | None, float | None]:
                return measure.perplexity, measure.bits_per_byte if self.picker.bridged else None

            def now(state: str, note: str = "") -> list[Written]:
                return [
                    Written(
                        before.size, before.name, writer.text, state, note, None, len(writer.new), writer.tokens_per_second,
                        *(measured(measures[place]) if place < len(measures) else (None, None)), before.memory, process_bytes(),
                    )
                    for place, (before, writer) in enumerate(zip(states, writers))
                ]

            shown = 0.0
            while any(not writer.done for writer in writers) and time.monotonic() < end:
                for writer in writers:
                    if not writer.done:
                        writer.step()
                        if time.monotonic() - shown >= _SHOW:
                            yield now("writing")
                            shown = time.monotonic()
            late = any(not writer.done for writer in writers)
            if passages is not None and all(passages.values()):
                for size, model, tokenizer in zip(prompts, models, tokenizers):
                    if late:
                        break
                    measure = Measure(model, tokenizer, passages[size])
                    for _ in measure.steps():
                        if time.monotonic() >= end:
                            break
                        yield now("measuring", "measuring the text")
                    late = measure.tokens < len(passages[size]) - 1
                    if not late:
                        measures.append(measure)  # read whole
            yield now("done", f"stopped after {self.limits.seconds} s, the longest turn here" if late else "")

    def _waited(self, sizes: Sequence[int], entries: Sequence[Loading], end: float) -> Iterator[list[Written]]:
        """States until all models are there.

        Raises:
            BusyError: If that takes longer than a turn may.
        """
        while not all(entry.future.done() for entry in entries):
            yield [Written(size, entry.name, note=loading_note(entry), share=1.0 if entry.future.done() else entry.share, memory=entry.bytes) for size, entry in zip(sizes, entries)]
            if time.monotonic() > end:
                raise BusyError("the model is still being made; try again in a moment, it will be there")
            time.sleep(_WAIT)
        for entry in entries:
            try:
                error = entry.future.exception()
            except CancelledError:
                raise BusyError("the Space is busy with other sizes; try again in a moment") from None
            if isinstance(error, CBDError):
                raise error
            if error is not None:
                raise StorageError(f"{entry.name} could not be made ({type(error).__name__}); try again, or another size") from error

    @contextmanager
    def checkpoint(self, size: str | int) -> Iterator[Path]:
        """A zip archive of the checkpoint of a size: an ordinary transformers folder; it is gone after the block.

        Raises:
            ArgumentError: If the owner allows no downloads.
        """
        if not self.limits.download:
            raise ArgumentError("downloads are off in this Space; make the size on your own machine with the lines shown")
        made = self.picker.size(size)
        if made * self.models.dtype.itemsize > self.limits.memory:
            raise ArgumentError(f"{format_size(made)} is larger than this Space hands out ({format_bytes(self.limits.memory)}); choose a smaller size")
        with tempfile.TemporaryDirectory(prefix="cbd-space-") as place:
            folder = Path(place) / f"{self.chain.name}-{format_size(made)}"
            options = {**self.chain.files.options, "revision": self.chain.files.revision}
            CBDModel.materialize(self.chain.files.name, made, output_dir=folder, dtype=self.models.dtype, **options)
            archive = Path(place) / f"{folder.name}.zip"
            _pack(folder, archive)
            shutil.rmtree(folder)
            yield archive

    def opened(self, query: Mapping[str, str]) -> tuple[int, str]:
        """Size and prompt of a link; what cannot be used falls back to the middle recommended size and a default."""
        try:
            size = self.picker.size(query["size"][:32]) if query.get("size") else self.default
        except CBDError:
            size = self.default
        prompt = query.get("prompt", "")
        return size, prompt[: self.limits.characters]

    @property
    def default(self) -> int:
        """The size shown first: the middle one of the recommended sizes, else of the snaps."""
        snaps = self.picker.snaps
        chosen = [snap for snap in snaps if snap.kind == "recommended"] or snaps
        return chosen[len(chosen) // 2].size


def loading_note(entry: Loading) -> str:
    """What a load is at, for people."""
    if entry.future.done():
        return f"{entry.name} is ready"
    if not entry.fetched:
        return f"getting {entry.name}: {format_bytes(entry.came)} of {format_bytes(entry.to_come)}" if entry.to_come else f"reading the anchors of {entry.name}"
    return f"making {entry.name} ({format_bytes(entry.bytes)})"


def process_bytes() -> int:
    """Resident bytes of this process."""
    return cast(int, psutil.Process().memory_info().rss)


def _pack(folder: Path, archive: Path) -> None:
    """A folder's files in a zip archive, stored as they are: weights do not shrink."""
    import zipfile
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(folder.iterdir()):
            packed.write(path, f"{folder.name}/{path.name}")
