"""MiniLLM's objective: policy gradient of the reverse KL on the student's own samples (https://huggingface.co/papers/2306.08543).

With student q, teacher p and sampling distribution p~ of a response y_1 .. y_T, and r_t = log p(y_t | y_<t) - log q(y_t | y_<t), the gradient of
KL(q || p) splits into a single-step and a long term (equation 3)::

    single: sum_t grad KL(q(. | y_<t) || p(. | y_<t))              exact, over the whole vocabulary
    long:   sum_t -R_{t+1} grad log q(y_t | y_<t)                  with R_{t+1} = sum_{t' > t} r_t'

The single-step term is `cbd_hub.losses.divergence.reverse_kl` on the sampled tokens' positions, in its `cbd_hub.losses.head` form; it has no second
implementation here. Where the paper and its authors' code differ, or leave something open, this is what is done:

- The long term leaves r_t out (the paper's R_{t+1}): it is what the single-step term has already. The code's R_t counts it twice.
- Length normalisation divides by the number of summed terms, T - t. Equation 6 prints T - t - 1, which is 0 where one term is left; the code counts terms.
- Importance weights are per token, q / p~ (the paper's approximation below equation 5), and part of the clipped ratio of the long term, as in
  algorithm 1; the code's ``exp(log q - log q_old) x (q_old / p~)`` is the same number.
- The single-step term has no importance weight, as in the code: given y_<t its weight q(y_t) / p~(y_t) has mean 1 whatever the term is, so that it would
  only add variance.
- Rewards are those of the student that sampled, and stay for all inner epochs, as in the code. They are not scaled, clipped or whitened: the code
  does so, the paper does not.
- Sums over tokens are divided by the tokens of the whole optimiser step, as the code divides by those of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import ArgumentError
from cbd_hub.losses.head import distillation_loss
from cbd_hub.losses.log_probs import chosen_log_probs


def rewards_to_go(rewards: Tensor, keep: Tensor) -> Tensor:
    """Sum of the rewards after each token, in nats: R_{t+1} of equation 3.

    ``R_{t+1} = sum over kept t' > t of r_t'``; 0 at the last token.

    Args:
        rewards: ``r_t = log p(y_t) - log q(y_t)``, shape (B, T).
        keep: Bool, shape (B, T): tokens of the response.

    Returns:
        Shape (B, T), 0 where not kept.

    Example:
        >>> rewards_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]]))
        tensor([[6., 4., 0.]])
    """
    from_here = rewards.masked_fill(~keep, 0.0).flip(-1).cumsum(-1).flip(-1)
    return F.pad(from_here[..., 1:], (0, 1)).masked_fill(~keep, 0.0)


def length_normalised(sums: Tensor, keep: Tensor) -> Tensor:
    """Rewards-to-go divided by the number of tokens they sum: R_{t+1}^Norm of equation 6, in nats per token.

    ``R_{t+1}^Norm = R_{t+1} / (T - t)``; 0 at the last token, whose sum is empty. Without it short responses score best.

    Args:
        sums: What `rewards_to_go` gives, shape (B, T).
        keep: Bool, shape (B, T): tokens of the response.

    Returns:
        Shape (B, T).

    Example:
        >>> length_normalised(torch.tensor([[6.0, 4.0, 0.0]]), torch.tensor([[True, True, True]]))
        tensor([[3., 4., 0.]])
    """
    return sums / rewards_to_go(torch.ones_like(sums), keep).clamp(min=1.0)


def clipped_surrogate(
    log_probs: Tensor, sample_log_probs: Tensor, advantages: Tensor, keep: Tensor, ratio_clip: float = 0.2, num_items: int | Tensor | None = None
) -> Tensor:
    """The long term as a loss whose gradient is the clipped policy gradient (algorithm 1; PPO, https://huggingface.co/papers/1707.06347, equation 7).

    With ``rho_t = q(y_t) / p~(y_t)``::

        loss = -sum over kept t of  min(rho_t A_t, clip(rho_t, 1 - ratio_clip, 1 + ratio_clip) A_t)  /  num_items

    Args:
        log_probs: ``log q(y_t)`` of the student that learns, any shape. The only input that receives a gradient.
        sample_log_probs: ``log p~(y_t)`` of the distribution the token was drawn from.
        advantages: ``A_t``, what `rewards_to_go` or `length_normalised` give.
        keep: Bool: tokens of the response.
        ratio_clip: Half the width of the band in which the ratio has a gradient, above 0 and below 1.
        num_items: Kept tokens of the whole optimiser step; None for this call's own.

    Returns:
        Scalar; 0 with a live graph when nothing is kept.

    Raises:
        ArgumentError: If ``ratio_clip`` is outside its range.

    Example:
        >>> log_probs = torch.tensor([0.5, 0.5]).log()
        >>> clipped_surrogate(log_probs, torch.tensor([0.25, 0.5]).log(), torch.ones(2), torch.ones(2, dtype=torch.bool))  # -(1.2 + 1) / 2
        tensor(-1.1000)
    """
    if not 0.0 < ratio_clip < 1.0:
        raise ArgumentError(f"ratio_clip={ratio_clip} is outside (0, 1); the paper's value is 0.2")
    ratio = (log_probs - sample_log_probs).masked_fill(~keep, 0.0).exp()
    advantages = advantages.detach()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1.0 - ratio_clip, 1.0 + ratio_clip) * advantages)
    items = keep.sum().clamp(min=1) if num_items is None else num_items
    return -gain.masked_fill(~keep, 0.0).sum() / items


def minillm_loss(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor, sample_log_probs: Tensor,
    advantages: Tensor, *, ratio_clip: float = 0.2, num_items: int | Tensor | None = None, vocab_size: int | None = None, **head: Any,
) -> Tensor:
    """MiniLLM's loss of sampled tokens, single-step term plus clipped long term, in nats per kept token; never an N x V tensor.

    Its gradient is that of equation 7 with the decisions named at the top of this module.

    Args:
        student_hidden: Last hidden states, shape (N, H). Receives a gradient.
        student_head: Output projection, shape (V, H). Receives a gradient.
        teacher_hidden: Shape (N, H_teacher).
        teacher_head: Shape (V, H_teacher).
        labels: Sampled token of each row, shape (N,): already shifted; -100 drops the row.
        sample_log_probs: Its log-probability when it was drawn, shape (N,).
        advantages: Its (length-normalised) rewards-to-go, shape (N,).
        ratio_clip: Half the width of the band in which the ratio has a gradient.
        num_items: Kept tokens of the whole optimiser step; None for this call's own.
        vocab_size: Rows of both heads that are real tokens; None for all.
        **head: Biases, scales and soft-caps of both heads, as `cbd_hub.losses.head.distillation_loss` takes them.

    Returns:
        Scalar; 0 with a live graph when no row is kept.

    Raises:
        VocabularyMismatchError: If the heads differ in rows and ``vocab_size`` is not given.
        ArgumentError: If ``ratio_clip`` is outside its range.

    Example:
        >>> hidden, head, labels = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([3, 1, -100])
        >>> minillm_loss(hidden, head, hidden, head, labels, torch.zeros(3), torch.zeros(3)).item() == 0.0  # equal models, no rewards
        True
    """
    kept = labels != -100
    items = kept.sum().clamp(min=1) if num_items is None else num_items
    single = distillation_loss(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, divergence="reverse_kl", num_items=items, vocab_size=vocab_size, **head
    )
    log_probs = chosen_log_probs(
        student_hidden[kept], student_head, labels[kept], bias=head.get("student_bias"), logit_scale=head.get("student_logit_scale", 1.0),
        softcap=head.get("student_softcap"), vocab_size=vocab_size,
    )
    long = clipped_surrogate(log_probs, sample_log_probs[kept], advantages[kept], torch.ones_like(log_probs, dtype=torch.bool), ratio_clip, items)
    return single + long
