"""Responses drawn from a student, a teacher or the mixture of both: prompts in, tokens and their log-probabilities out, batched.

Every draw is a function of a key, so that neither the batch a prompt is in nor the process that answers it changes its tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import IGNORED
from cbd_hub.interpolation.live import frozen
from cbd_hub.precision import widest


logger = logging.getLogger(__name__)

@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    Attributes:
        ids: Its tokens, at least one.
        room: Most tokens that may be drawn after it.
    """

    ids: list[int]
    room: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A prompt with a drawn response.

    Attributes:
        prompt: Tokens of the prompt.
        response: Tokens drawn, the end token included where it was drawn.
        sampled: Log-probability of each under the distribution it was drawn from, in nats, shape (T,).
        student: The same under the model itself at temperature 1.
        teacher: The same under the teacher; equal to ``student`` where there was none.
    """

    prompt: list[int]
    response: list[int]
    sampled: Tensor
    student: Tensor
    teacher: Tensor

    @property
    def row(self) -> dict[str, list[int]]:
        """The tokens, with labels on the response only."""
        return {"input_ids": [*self.prompt, *self.response], "labels": [*[IGNORED] * len(self.prompt), *self.response]}


# -- prompts -----------------------------------------------------------------------------------------------------------------


def prompts_of(row: Mapping[str, Sequence[int]], max_new_tokens: int, prompt_share: float) -> list[Prompt]:
    """The prompts of a row or packed block.

    A prompt is what comes before the last run of labels that count: of a chat, all before the last answer. A row without a prompt, plain text, is
    parted: its first share is the prompt, and as many tokens may be drawn as its rest has.

    Args:
        row: With ``input_ids``, and where there are any ``labels``, ``attention_mask`` and ``position_ids``, which start anew in each packed row.
        max_new_tokens: Most tokens to draw.
        prompt_share: Share of plain text that is the prompt, between 0 and 1.

    Example:
        >>> prompts_of({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, 16, 0.5)
        [Prompt(ids=[5, 6], room=16)]
        >>> prompts_of({"input_ids": [5, 6, 7, 8, 9]}, 16, 0.4)
        [Prompt(ids=[5, 6], room=3)]
    """
    mask, answers = row.get("attention_mask"), row.get("labels")
    real = [index for index in range(len(row["input_ids"])) if mask is None or mask[index]]
    ids, labels = ([int(values[index]) for index in real] for values in (row["input_ids"], row["input_ids"] if answers is None else answers))
    positions = row.get("position_ids")
    starts = [0, *(place for place, index in enumerate(real) if place and positions is not None and positions[index] == 0)]
    prompts = []
    for start, stop in pairwise([*starts, len(ids)]):
        first = stop
        while first > start + 1 and labels[first - 1] == IGNORED:
            first -= 1
        if first <= start + 1:
            continue  # nothing to answer: padding, or a row of one token
        while first > start + 1 and labels[first - 1] != IGNORED:
            first -= 1
        padded = real[start] > (real[start - 1] + 1 if start else 0)  # what stands behind padding is not predicted, and no prompt by that
        if first == start + 1 and (labels[start] != IGNORED or padded):
            length = stop - start
            cut = min(max(round(prompt_share * length), 1), length - 1)
            prompts.append(Prompt(ids[start : start + cut], min(length - cut, max_new_tokens)))
        else:
            prompts.append(Prompt(ids[start:first], max_new_tokens))
    return prompts


def batch_prompts(batch: Mapping[str, Tensor], max_new_tokens: int, prompt_share: float) -> list[list[Prompt]]:
    """The prompts of each row of a collated batch."""
    lists = {name: batch[name].tolist() for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch}
    return [
        prompts_of({name: values[index] for name, values in lists.items()}, max_new_tokens, prompt_share) for index in range(len(lists["input_ids"]))
    ]


def positions_of(*models: Any) -> int | None:
    """Most tokens of a row that all of these models can read; None where no config names a number."""
    return min((limit for model in models if (limit := getattr(model.config, "max_position_embeddings", None))), default=None)


def fitting(prompts: Sequence[Prompt], positions: int | None) -> list[Prompt]:
    """The prompts that leave room for an answer, with no more room than there are positions; the log says what was left out or cut short.

    Args:
        prompts: Prompts.
        positions: Most tokens of prompt and answer together; None for no bound.

    Raises:
        DataError: If there is none.

    Example:
        >>> fitting([Prompt([5, 6], 16), Prompt([5] * 9, 16)], 9)
        [Prompt(ids=[5, 6], room=7)]
    """
    if positions is None:
        return list(prompts)
    fit = [dataclasses.replace(prompt, room=min(prompt.room, positions - len(prompt.ids))) for prompt in prompts if len(prompt.ids) < positions]
    if len(fit) < len(prompts):
        logger.warning("%d of %d prompts fill the models' %d positions and are left out", len(prompts) - len(fit), len(prompts), positions)
    if prompts and not fit:
        raise DataError(f"every prompt fills the models' {positions:,} positions, and no answer fits behind it; shorten the prompts")
    short = sum(prompt.room > positions - len(prompt.ids) for prompt in prompts) - (len(prompts) - len(fit))
    if short:
        logger.warning("behind %d of %d prompts the models' %d positions leave less room than max_new_tokens; answers end there", short, len(prompts), positions)
    return fit


# -- sampling ----------------------------------------------------------------------------------------------------------------


def end_tokens(tokenizer: Any, *models: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's, and those of the models' generation configurations."""
    found: set[int] = set()
    for holder in (tokenizer, *(getattr(model, "generation_config", None) for model in models)):
        tokens = getattr(holder, "eos_token_id", None)
        found.update([] if tokens is None else tokens if isinstance(tokens, list) else [tokens])
    return sorted(found)


def _uniforms(keys: Sequence[str], count: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), shape (len(keys), count): each row a function of its key alone, and of no global generator."""
    rows = []
    for key in keys:
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(widest(device)).to(device)


def _drawn(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """A token of each row by the inverse of its distribution function, shape (rows,)."""
    cumulative = log_probs.to(widest(log_probs.device)).exp().cumsum(-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(1).clamp(max=log_probs.shape[-1] - 1)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        ends: Tokens that end a response.
        pad: Token that fills the left of shorter prompts; nothing sees it.
        teacher_mix: Share of the teacher in the distribution of every token, 0 to 1.
        temperature: Temperature of the distributions that are drawn from; 0 takes the likeliest token.
        vocab_size: Rows of the heads that are real tokens; None for all.
        batch_size: Prompts answered at once.
        positions: Most tokens of prompt and response together; None for as many as the models that draw can read.
    """

    ends: Sequence[int]
    pad: int = 0
    teacher_mix: float = 0.0
    temperature: float = 1.0
    vocab_size: int | None = None
    batch_size: int = 32
    positions: int | None = None


def generate(model: Any, prompts: Sequence[Prompt], keys: Sequence[str], sampling: Sampling, *, teacher: Any = None) -> list[Rollout]:
    """Answer prompts, token by token, in batches padded on the left, with key-value caches.

    Each token comes from ``teacher_mix x teacher + (1 - teacher_mix) x model`` (MiniLLM, equation 4,
    https://huggingface.co/papers/2306.08543). Models are in eval mode and without gradient meanwhile, and back in their mode afterwards.

    Args:
        model: A causal language model, such as the student.
        prompts: What to answer.
        keys: One text per prompt; it alone decides the draws.
        sampling: How to draw.
        teacher: Another model of the same vocabulary; it runs along, and its log-probabilities are kept.

    Returns:
        A rollout per prompt, in their order.

    Raises:
        ArgumentError: If a share, temperature or batch size is outside its range, or a share of no teacher is asked for.
        DataError: If a prompt is empty or fills all of a model's positions.
    """
    if not 0.0 <= sampling.teacher_mix <= 1.0:
        raise ArgumentError(f"teacher_mix={sampling.teacher_mix} is outside 0 to 1; it is the teacher's share of each token's distribution")
    if sampling.teacher_mix and teacher is None:
        raise ArgumentError(f"teacher_mix={sampling.teacher_mix} but no teacher was given; pass teacher=, or set it to 0")
    if not sampling.temperature >= 0.0 or sampling.batch_size < 1:
        raise ArgumentError(f"temperature={sampling.temperature} and batch_size={sampling.batch_size}; give a temperature of 0 or more and a batch of 1 or more")
    models = [model] if teacher is None else [model, teacher]
    most = min((limit for limit in (sampling.positions, positions_of(*models)) if limit is not None), default=None)
    roomy = [_fitted(prompt, most) for prompt in prompts]
    order = sorted(range(len(roomy)), key=lambda index: len(roomy[index].ids))  # little padding
    found: dict[int, Rollout] = {}
    with frozen(*models):
        for start in range(0, len(order), sampling.batch_size):
            chunk = order[start : start + sampling.batch_size]
            found.update(zip(chunk, _answered(models, [roomy[index] for index in chunk], [keys[index] for index in chunk], sampling)))
    return [found[index] for index in range(len(roomy))]


def _fitted(prompt: Prompt, most: int | None) -> Prompt:
    """The prompt with no more room than there are positions."""
    room = prompt.room if most is None else min(prompt.room, most - len(prompt.ids))
    if not prompt.ids or room < 1:
        raise DataError(f"a prompt of {len(prompt.ids):,} tokens leaves room for {max(room, 0)} more of {most or 'any number of'} positions; shorten the prompts, or drop empty ones")
    return dataclasses.replace(prompt, room=room)


def _answered(models: Sequence[Any], prompts: Sequence[Prompt], keys: Sequence[str], sampling: Sampling) -> list[Rollout]:
    """Answer one batch; rows that have ended leave it."""
    device = models[0].device
    count, width, longest = len(prompts), max(len(prompt.ids) for prompt in prompts), max(prompt.room for prompt in prompts)
    ids = torch.tensor([[sampling.pad] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rooms = torch.tensor([prompt.room for prompt in prompts], device=device)
    ends = torch.tensor(list(sampling.ends), dtype=torch.long, device=device)
    uniforms = _uniforms(keys, longest, device)
    caches: list[Any] = [None] * len(models)
    live = torch.arange(count, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    tokens = torch.zeros(count, longest, dtype=torch.long, device=device)
    kept = torch.zeros(3, count, longest, device=device)
    for step in range(longest):
        logits = []
        for place, model in enumerate(models):
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=caches[place], use_cache=True, logits_to_keep=1
            )
            caches[place] = output.past_key_values
            logits.append(output.logits[:, -1, : sampling.vocab_size].float())
        token, chosen = _step(logits, uniforms[live, step], sampling)
        tokens[live, step] = token
        kept[:, live, step] = chosen
        ended = torch.isin(token, ends) | (step + 1 >= rooms[live])
        lengths[live[ended]] = step + 1
        going = (~ended).nonzero().squeeze(1)
        if not len(going):
            break
        if len(going) < len(live):
            for cache in caches:
                cache.batch_select_indices(going)
        live, ids = live[going], token[going, None]
        mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], 1)
        positions = positions[going, -1:] + 1
    stops, tokens, kept = lengths.tolist(), tokens.cpu(), kept.cpu()
    return [
        Rollout(prompt.ids, tokens[row, :stop].tolist(), *(values[row, :stop].clone() for values in kept))
        for row, (prompt, stop) in enumerate(zip(prompts, stops))
    ]


def _step(logits: Sequence[Tensor], uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-probability when drawn, under the model and under the teacher, shape (3, rows)."""
    plain = [values.log_softmax(-1) for values in logits]
    if not sampling.temperature:
        token = _mixed(plain, sampling.teacher_mix).argmax(-1)
        drawn_at = torch.zeros_like(plain[0][:, 0])  # it could not have been another
    else:
        tempered = plain if sampling.temperature == 1.0 else [(values / sampling.temperature).log_softmax(-1) for values in logits]
        mixture = _mixed(tempered, sampling.teacher_mix)
        token = _drawn(mixture, uniforms)
        drawn_at = mixture.gather(1, token[:, None]).squeeze(1)
    each = [values.gather(1, token[:, None]).squeeze(1) for values in plain]
    return token, torch.stack([drawn_at, each[0], each[-1]])


def _mixed(log_probs: Sequence[Tensor], share: float) -> Tensor:
    if len(log_probs) == 1 or share == 0.0:
        return log_probs[0]
    return log_probs[1] if share == 1.0 else torch.logaddexp(log_probs[1] + math.log(share), log_probs[0] + math.log1p(-share))


# -- as tensors --------------------------------------------------------------------------------------------------------------


def rollout_tensors(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Rollouts as a few flat tensors, for safetensors."""
    return {
        "tokens": torch.tensor([token for rollout in rollouts for token in (*rollout.prompt, *rollout.response)]),
        "prompt_lengths": torch.tensor([len(rollout.prompt) for rollout in rollouts]),
        "response_lengths": torch.tensor([len(rollout.response) for rollout in rollouts]),
        **{name: torch.cat([getattr(rollout, name) for rollout in rollouts]) for name in ("sampled", "student", "teacher")},
    }


def rollouts_from(tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """The rollouts that `rollout_tensors` was given."""
    prompts, responses = tensors["prompt_lengths"].tolist(), tensors["response_lengths"].tolist()
    tokens = tensors["tokens"].tolist()
    token_ends = _ends(prompt + response for prompt, response in zip(prompts, responses))
    made = []
    for (start, stop), (first, last), prompt in zip(pairwise(token_ends), pairwise(_ends(responses)), prompts):
        made.append(Rollout(
            tokens[start : start + prompt], tokens[start + prompt : stop], *(tensors[name][first:last] for name in ("sampled", "student", "teacher"))
        ))
    return made


def _ends(lengths: Iterable[int]) -> list[int]:
    return [0, *accumulate(lengths)]
