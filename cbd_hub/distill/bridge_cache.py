"""A bridge from a teacher cache: the cache's blocks are the teacher's side, and the student reads the same documents beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset as TorchDataset

from cbd_hub.distill.bridge_rows import Side, is_plain, row_of
from cbd_hub.distill.bridging import Bridge
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import IGNORED
from cbd_hub.losses.alignment import prefix_of


logger = logging.getLogger(__name__)


class BridgedCache(TorchDataset[dict[str, Any]]):
    """A row per block of a cache: what `BridgeRows.blocks` gives, the student's ``position_ids`` where prompts are packed, and the teacher's log-probabilities.

    ``teacher_log_probs`` are those of its tokens, each after the ones before it; ``teacher_top_ids`` and ``teacher_top_log_probs`` are there for ``vocab``.

    Args:
        bridge: Both tokenizers.
        cache: The teacher's cache, made of the same documents.
        rows: The documents.
        room: Most tokens of the student in a row.

    Raises:
        ArgumentError: If the cache holds no log-probabilities of its tokens.
        DataError: If a row cannot be read.
    """

    def __init__(self, bridge: Bridge, cache: TeacherCache, rows: Any, room: int) -> None:
        source = cache.record.source
        if not source.token_log_probs:
            raise ArgumentError(f"{cache.name} was made by a version that kept no log-probabilities of the text's own tokens, which a bridge needs; make it again with `cbd cache-teacher`")
        self._bridge, self._cache, self._prefix = bridge, cache, source.packing.prefix
        plain = is_plain(rows)
        if plain and prefix_of(bridge.rows.teacher) and not self._prefix:
            logger.warning("the blocks of %s do not begin with what the teacher begins a text with; make it with `cbd cache-teacher --bos`", cache.name)
        self._rows = list(self._joined(rows, room) if plain else self._packed(rows, room))
        assert len(self._rows) == len(cache)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cached = self._cache[index]
        row = {**self._rows[index], "teacher_input_ids": cached["input_ids"], "teacher_log_probs": cached["token_log_probs"]}
        if self._bridge.shared is not None:
            row.update({f"teacher_{name}": cached[name] for name in ("top_ids", "top_log_probs")})
        return row

    def _joined(self, rows: Any, room: int) -> Iterator[dict[str, Any]]:
        """Plain text: the student's tokens of a span go into the block in which it begins; a span that lies in two blocks counts for neither."""
        size, before = self._bridge.args.block_size - len(self._prefix), prefix_of(self._bridge.rows.student)
        blocks, done, place = len(self._cache), 0, 0
        sides = self._begun(before)
        for ours, theirs, same in self._bridge.rows.pieces(rows):
            while done < place // size:
                yield self._row(sides, room)
                done, sides = done + 1, self._begun(before)
                if done == blocks:
                    return
            same = same and (place + len(theirs) - 1) // size == done
            span = len(sides[1].ids) if same else -1
            sides[0].add(ours, span)
            sides[1].add(theirs, span)
            place += len(theirs)
            left = place - (done + 1) * size
            while left > 0 and done < blocks:  # the rest of the teacher's span
                del sides[1].ids[-left:], sides[1].spans[-left:], sides[1].labels[-left:]
                yield self._row(sides, room)
                done, sides = done + 1, self._begun(before)
                sides[1].add(theirs[len(theirs) - left :], -1)
                left -= size
            if done == blocks:
                return
        while done < blocks:
            yield self._row(sides, room)
            done, sides = done + 1, self._begun(before)

    def _begun(self, before: list[int]) -> tuple[Side, Side]:
        sides = Side([], [], []), Side([], [], [])
        for side, ids in zip(sides, (before, self._prefix)):
            side.add(ids, -1, counts=False)
        return sides

    @staticmethod
    def _row(sides: tuple[Side, Side], room: int) -> dict[str, Any]:
        sides[0].cut(room)
        made = row_of(*sides)
        del made["teacher_input_ids"]
        return made

    def _packed(self, rows: Any, room: int) -> Iterator[dict[str, Any]]:
        """Prompts and chats: a block of the cache holds whole rows, and so does the student's."""
        sides = (
            pair for pair in self._bridge.rows.sides(rows, room, self._bridge.args.block_size) if any(label != IGNORED for label in pair[1].labels[1:])
        )
        for index in range(len(self._cache)):
            made: dict[str, Any] = {name: [] for name in ("input_ids", "labels", "position_ids", "spans", "teacher_spans")}
            length = len(self._cache.ids(index))
            while (at := len(made["teacher_spans"])) < length:
                pair = next(sides, None)
                if pair is None:
                    raise DataError(f"the rows end before the blocks of {self._cache.name}; give the documents that it was made of")
                row = row_of(*pair)
                made["input_ids"] += row["input_ids"]
                made["labels"] += [IGNORED, *row["labels"][1:]]
                made["position_ids"] += range(len(row["input_ids"]))
                for name in ("spans", "teacher_spans"):
                    made[name] += [span if span < 0 else span + at for span in row[name]]
            yield made
