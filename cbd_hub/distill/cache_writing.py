"""A teacher's top-k log-probabilities, written once, shard by shard."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from cbd_hub.cards import cache_card
from cbd_hub.distill.cache_record import (
    FILE_NAME,
    SCHEMA_VERSION,
    TAIL,
    TOKEN,
    TOP,
    CacheRecord,
    Figures,
    IdentifiedBlocks,
    PackingRecord,
    ShardRecord,
    Source,
    StudentFigures,
    TeacherRecord,
    TextRecord,
)
from cbd_hub.distill.packing import collate, next_tokens, no_block
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.top_codec import TailCodec, TopCodec, rounding_kl
from cbd_hub.distill.wrapping import cast_weights
from cbd_hub.errors import ArgumentError, DataError, StorageError, VocabularyMismatchError
from cbd_hub.evaluation import IGNORED
from cbd_hub.files import ASIDE, disk_told, held, sha256, write_text
from cbd_hub.hub import is_repo_id
from cbd_hub.interpolation.live import ModelRunner, frozen
from cbd_hub.losses.alignment import prefix_of, rows_needed
from cbd_hub.losses.head import Listed, distillation_loss
from cbd_hub.losses.log_probs import top_log_probs
from cbd_hub.reporting import Report
from cbd_hub.shapes import check_positions, parameter_count
from cbd_hub.weights import tokenizer_sha256, weights_sha256


SHARD_TOKENS = 2**18
_WORK = ".work"
_PLAN = "source.json"


@dataclass
class _Sums:
    """What is added up over the positions of a shard."""

    positions: int = 0
    rounding: float = 0.0
    worst: float = 0.0
    tail: float = 0.0
    full: float = 0.0
    kept: float = 0.0

    def add(self, other: _Sums) -> None:
        for name in ("positions", "rounding", "tail", "full", "kept"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)


@dataclass
class _Asker:
    """The teacher, and perhaps a student, asked about blocks."""

    codec: TopCodec
    tail: TailCodec
    teacher: Any
    student: Any = None
    sums: _Sums = field(default_factory=_Sums)

    def __call__(self, blocks: list[dict[str, np.ndarray]], first: int) -> list[dict[str, Any]]:
        """The encoded top tokens of each block and draws from the others, and the log-probabilities of its own; ``first`` is the first block's number."""
        batch = {name: tensor.to(self.teacher.device, torch.int64) for name, tensor in collate(blocks).items()}
        following = next_tokens(batch)
        keep = following != IGNORED
        inputs = (batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
        target = ModelRunner(self.teacher)(*inputs)
        head, hidden = target.head, target.hidden[keep].float()
        uniform = np.concatenate([np.random.default_rng(first + place).random(int(row.sum())) for place, row in enumerate(keep.cpu().numpy())])
        top = top_log_probs(
            hidden, head.weight, self.codec.top_k, following[keep], **head.options(),
            vocab_size=self.codec.vocab_size, draws=self.tail.draws, uniform=torch.from_numpy(uniform.astype(np.float32)).to(hidden.device),
        )
        if not torch.isfinite(top.log_probs).all():
            raise DataError(f"the teacher's log-probabilities are no numbers on a batch that begins with tokens {blocks[0]['input_ids'][:8].tolist()}")
        order = top.ids.argsort(-1)
        exact = (top.ids.gather(1, order).cpu().numpy(), top.log_probs.gather(1, order).cpu().numpy(), top.log_rest.cpu().numpy())
        drawn = (top.tail_ids.cpu().numpy(), top.tail_log_probs.cpu().numpy())
        encoded, start = [], 0
        kept, tails = np.empty_like(exact[1]), tuple(map(np.empty_like, drawn))
        for block, positions in zip(blocks, keep.cpu().numpy()):
            here = slice(start, start + int(positions.sum()))
            listed = self.codec.encode(*(part[here] for part in exact))
            chosen = np.zeros(len(positions), np.float16)
            chosen[np.roll(positions, 1)] = top.chosen[here].clamp(-6e4, 0.0).cpu().numpy()
            encoded.append({TOP: listed, TOKEN: chosen[: len(block["input_ids"])]})
            kept[here] = self.codec.decode(listed, here.stop - start)[1]
            if self.tail.draws:
                others = self.tail.encode(*(part[here] for part in drawn))
                encoded[-1][TAIL] = others
                for whole, part in zip(tails, self.tail.decode(others, here.stop - start)):
                    whole[here] = part
            start = here.stop
        costs = rounding_kl(exact[1], exact[2], kept)
        self.sums.positions += len(costs)
        self.sums.rounding += float(costs.sum())
        self.sums.worst = max(self.sums.worst, float(costs.max(initial=0.0)))
        self.sums.tail += float(np.exp(exact[2], dtype=np.float64).sum())
        if self.student is not None:
            parts = (exact[0], kept, *(tails if self.tail.draws else ()))
            whole_kl, kept_kl = self._divergences(inputs, keep, hidden, head, Listed(*(torch.from_numpy(part).to(hidden.device) for part in parts)))
            self.sums.full += whole_kl
            self.sums.kept += kept_kl
        return encoded

    def _divergences(self, inputs: tuple[Any, ...], keep: Tensor, hidden: Tensor, head: Any, top: Listed) -> tuple[float, float]:
        """Forward KL to the student, summed over positions: over the whole vocabulary, and over what is kept."""
        output = ModelRunner(self.student)(*inputs)
        ours = output.head
        full, kept = (
            float(distillation_loss(
                output.hidden[keep].float(), ours.weight, hidden, head.weight, torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device),
                num_items=1, vocab_size=self.codec.vocab_size, teacher_top=listed, **ours.options("student_"), **head.options("teacher_"),
            )) for listed in (None, top)
        )
        return full, kept


def write_cache(
    teacher: Any, rows: Iterable[Mapping[str, Any]], folder: str | os.PathLike[str], *, tokenizer: Any = None, block_size: int = 128,
    top_k: int = 128, bits: int = 8, max_tokens: int | None = None, batch_size: int = 8, shard_tokens: int = SHARD_TOKENS,
    dtype: torch.dtype | None = None, student: Any = None, bos: bool = True, tail_draws: int | None = None, report: Report | None = None,
) -> TeacherCache:
    """Run a teacher over a text once and keep its top-k log-probabilities, as a folder that ``datasets.load_dataset`` reads.

    Of the tokens that are not listed the sum of their probabilities is kept, and some drawn from them by their probability: these make the forward KL to a
    student that of the whole vocabulary in expectation, in value and gradient. With the sum alone, which the other divergences read, it is less than that.
    Shards are written aside and renamed. Stopped, the same call goes on behind the last whole shard, and the folder comes out as if it had not been
    stopped. Two figures say what the cache costs, in ``cache.json``: ``rounding_kl``, what rounding the log-probabilities moves the teacher by, and
    ``tail_mass``, the probability of the tokens that are not listed. With ``student`` its forward KL is measured from the cache and from the teacher itself.

    Args:
        teacher: The model to learn from.
        rows: Rows with ``text``, ``prompt`` and ``completion`` or ``messages``, which are packed, or blocks that have ``input_ids``.
        folder: The folder to make: absent, empty, or this cache unfinished.
        tokenizer: Its tokenizer; needed unless rows have ``input_ids``.
        block_size: Tokens in a packed block.
        top_k: Tokens listed at a position.
        bits: Precision of a log-probability, 4 to 16; at 8 rounding costs at most 0.0005 nats at any token.
        max_tokens: Stop with the block in which so many tokens are reached; None for the whole text.
        batch_size: Blocks a forward pass.
        shard_tokens: Tokens in a shard, which is what is lost at most when it is stopped.
        dtype: What the teacher computes in; its own by default. Logits are made in fp32.
        student: A model to measure the tail's share of the divergence with; costs a second forward pass.
        bos: Begin each block of joined text with what the tokenizer puts before a text, such as gemma's ``<bos>``, without which it is no good teacher; as training
            on the text does.
        tail_draws: Tokens drawn from those that are not listed at a position; by default a twelfth of ``top_k``, or 1; 0 for the sum alone.
        report: Called with what is done, how much of it, and of how much.

    Returns:
        The cache.

    Raises:
        ArgumentError: If a block is longer than the teacher's positions.
        DataError: If the text does not fill one block, or a token is not in the teacher's vocabulary.
        StorageError: If the folder is in the way, holds another cache, another process writes it, or the disk is full.
    """
    target = Path(folder).expanduser()
    rows_of_head = teacher.get_output_embeddings().weight.shape[0]
    codec = TopCodec(top_k, bits, rows_of_head if tokenizer is None else min(rows_of_head, rows_needed(tokenizer)))
    if student is not None and student.get_output_embeddings().weight.shape[0] < codec.vocab_size:
        raise VocabularyMismatchError(f"the student has a vocabulary of {student.config.vocab_size:,}, the cache one of {codec.vocab_size:,}; give a student of the teacher's vocabulary")
    tail = TailCodec(max(1, top_k // 12) if tail_draws is None else tail_draws, codec.vocab_size)
    if tail.draws < 0:
        raise ArgumentError(f"tail_draws={tail_draws} is negative; give 0 or more, such as a twelfth of top_k")
    identified = IdentifiedBlocks(rows, tokenizer, block_size, prefix_of(tokenizer) if bos and tokenizer is not None else [])
    if not identified.packed:
        check_positions(block_size, teacher.config, f"block_size={block_size}")
    blocks, complete = [], True
    for block in identified:
        blocks.append(block)
        if block.keys() != blocks[0].keys():
            raise DataError(f"block {len(blocks) - 1:,} has {', '.join(block)} and the first one {', '.join(blocks[0])}; give all blocks the same columns")
        if block["input_ids"].max() >= codec.vocab_size:
            raise DataError(f"block {len(blocks) - 1:,} has the token {block['input_ids'].max():,}, not below the vocabulary's size, {codec.vocab_size:,}; give the teacher's tokenizer")
        if "position_ids" not in block:
            check_positions(len(block["input_ids"]), teacher.config, f"block {len(blocks) - 1:,} of {len(block['input_ids']):,} tokens")
        if max_tokens is not None and identified.tokens >= max_tokens:
            complete = False
            break
    if not identified.predicted:
        raise no_block(block_size, joined=identified.joined)
    name = getattr(teacher.config, "_name_or_path", "") or ""
    source = Source(
        teacher=TeacherRecord(
            repo_id=name if is_repo_id(name) else None, parameters=parameter_count(teacher.config), weights_sha256=weights_sha256(teacher),
            dtype=str(dtype or teacher.dtype).removeprefix("torch."),
        ),
        tokenizer_sha256=None if tokenizer is None else tokenizer_sha256(tokenizer),
        text=TextRecord(sha256=identified.text_sha256, documents=identified.documents, complete=complete),
        packing=PackingRecord(
            sha256=identified.packing_sha256, block_size=None if identified.packed else block_size, blocks=identified.blocks,
            tokens=identified.tokens, predicted=identified.predicted, prefix=identified.prefix,
        ),
        columns=list(blocks[0]), top_k=top_k, bits=bits, vocab_size=codec.vocab_size,
        shard_blocks=max(1, shard_tokens // max(len(block["input_ids"]) for block in blocks)),
        student_sha256=None if student is None else weights_sha256(student), token_log_probs=True, tail_draws=tail.draws,
    )
    if dtype is not None and teacher.dtype != dtype:
        teacher = cast_weights(copy.deepcopy(teacher), dtype)
    report = report or (lambda what, done, total: None)
    finished = _complete(target, source)
    if finished:
        report("blocks cached", len(blocks), len(blocks))
    if not finished or (target / _WORK).is_dir():  # there too if it was killed at its very end
        with disk_told(target), held(target / _WORK, str(target)), frozen(teacher, *([] if student is None else [student])):
            if not _complete(target, source):  # once more, now that no other process can change it
                _write(target, source, blocks, (codec, tail), teacher, student, batch_size, report)
            shutil.rmtree(target / _WORK)
    return TeacherCache.open(target)


def _write(
    target: Path, source: Source, blocks: list[dict[str, np.ndarray]], codecs: tuple[TopCodec, TailCodec], teacher: Any, student: Any, batch_size: int,
    report: Report,
) -> None:
    work = target / _WORK
    write_text(work / _PLAN, json.dumps(source.model_dump()))
    count = -(-len(blocks) // source.shard_blocks)
    total, shards = _Sums(), []
    for index in range(count):
        name = f"data/train-{index:05d}-of-{count:05d}.arrow"
        first, last = index * source.shard_blocks, min((index + 1) * source.shard_blocks, len(blocks))
        facts = _finished(work / f"{index:05d}.json", target / name)
        if facts is None:
            asker = _Asker(*codecs, teacher, student)
            partial = work / "shard.partial"
            with ArrowWriter(path=str(partial), features=source.features(), writer_batch_size=batch_size) as writer:
                for start in range(first, last, batch_size):
                    part = blocks[start : min(start + batch_size, last)]
                    for block, found in zip(part, asker(part, start), strict=True):
                        writer.write({**block, **found})
                    report("blocks cached", start + len(part), len(blocks))
                writer.finalize()
            facts = {"bytes": partial.stat().st_size, "sha256": sha256(partial), "sums": vars(asker.sums)}
            write_text(work / f"{index:05d}.json", json.dumps(facts))
            (target / name).parent.mkdir(exist_ok=True)
            os.replace(partial, target / name)
        report("blocks cached", last, len(blocks))
        shards.append(ShardRecord(path=name, rows=last - first, bytes=facts["bytes"], sha256=facts["sha256"]))
        total.add(_Sums(**facts["sums"]))
    figures = Figures(
        bytes_per_token=sum(shard.bytes for shard in shards) / source.packing.tokens, rounding_kl=total.rounding / total.positions,
        rounding_kl_max=total.worst, tail_mass=total.tail / total.positions,
        student=None if student is None else StudentFigures(
            parameters=parameter_count(student.config), full=total.full / total.positions, kept=total.kept / total.positions,
        ),
    )
    record = CacheRecord(schema_version=SCHEMA_VERSION, created_with=f"cbd_hub {version('cbd-hub')}", source=source, figures=figures, shards=shards)
    write_text(target / "README.md", cache_card(record.model_dump()))
    for path in target.glob(f".*{ASIDE}"):
        path.unlink()  # left by a run that was killed while it wrote
    write_text(target / FILE_NAME, record.model_dump_json(indent=1) + "\n")


def _complete(target: Path, source: Source) -> bool:
    """Whether the folder holds the whole cache already; not where it holds a part of it, or nothing.

    Raises:
        StorageError: If the folder holds anything else.
    """
    plan = target / _WORK / _PLAN
    found: dict[str, Any] | None = None
    if (target / FILE_NAME).is_file():
        found = CacheRecord.read(target).source.model_dump()
    elif plan.is_file():
        found = json.loads(plan.read_bytes())
    elif target.exists() and (not target.is_dir() or any(path.name != _WORK for path in target.iterdir())):
        raise StorageError(f"{target} already exists and is no teacher cache; choose another folder or remove it")
    wanted = source.model_dump()
    if found is not None and found != wanted:
        differs = ", ".join(name for name in wanted if found.get(name) != wanted[name])
        raise StorageError(f"{target} holds a cache of another {differs}; choose another folder or remove it")
    return (target / FILE_NAME).is_file()


def _finished(facts: Path, shard: Path) -> dict[str, Any] | None:
    """What was written of a shard if it is whole, else None."""
    if not facts.is_file() or not shard.is_file():
        return None
    found: dict[str, Any] = json.loads(facts.read_bytes())
    return found if shard.stat().st_size == found["bytes"] and sha256(shard) == found["sha256"] else None
