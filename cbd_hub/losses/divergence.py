"""Divergences between next-token distributions, on logits: the reference that everything else is pinned to.

Each function is the plain formula on full logits, written to be read. Training uses `cbd_hub.losses.head`,
which gives the same values and gradients without ever forming the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cbd_hub.errors import ArgumentError, VocabularyMismatchError


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl")


def check_options(divergence: str, temperature: float, beta: float, skew: float) -> None:
    """Refuse a divergence, temperature or mixture weight outside its range.

    Raises:
        ArgumentError: Naming the option, the value found and the range.
    """
    if divergence not in DIVERGENCES:
        raise ArgumentError(f"divergence={divergence!r} is not known; choose one of {', '.join(DIVERGENCES)}")
    for name, value, low, high in (
        ("temperature", temperature, 0.0, math.inf), ("beta", beta, 0.0, 1.0), ("skew", skew, 0.0, 1.0),
    ):
        if not low < value < high:
            raise ArgumentError(f"{name}={value} is outside ({low:g}, {high:g}); choose a value inside that range")


def _log_probs(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, beta: float = 0.5, skew: float = 0.1
) -> tuple[Tensor, Tensor]:
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise VocabularyMismatchError(
            f"student logits have {student_logits.shape[-1]:,} columns and teacher logits {teacher_logits.shape[-1]:,}; "
            "cut both to the tokenizer's size, or use a bridge for models of different vocabularies"
        )
    check_options("forward_kl", temperature, beta, skew)
    return (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)


def _mean(per_token: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """Mean over the kept positions, times temperature^2; 0 with a live graph when nothing is kept."""
    return temperature**2 * per_token.masked_fill(~keep, 0.0).sum() / keep.sum().clamp(min=1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean forward divergence KL(teacher || student), in nats per kept token.

    With ``p = softmax(logits / temperature)``::

        loss = temperature^2 * mean over kept (b, t) of  sum_v p_T[v] * log(p_T[v] / p_S[v])

    The square keeps gradients on the scale of the hard-label loss when the temperature changes
    (Hinton et al. 2015, section 2, https://huggingface.co/papers/1503.02531).

    Args:
        student_logits: Next-token scores, shape (B, T, V). Receives the gradient.
        teacher_logits: Next-token scores, shape (B, T, V).
        keep: Bool, shape (B, T). True where position t predicts a real token: already shifted by the caller.
        temperature: Above 0.

    Returns:
        Scalar, at least 0; 0 with a live graph when nothing is kept.

    Raises:
        VocabularyMismatchError: If the last dimensions differ.
        ArgumentError: If the temperature is not above 0.

    Example:
        >>> logits = torch.randn(2, 5, 11)
        >>> forward_kl(logits, logits, torch.ones(2, 5, dtype=torch.bool)).item()
        0.0
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    return _mean((teacher.exp() * (teacher - student)).sum(-1), keep, temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean reverse divergence KL(student || teacher), in nats per kept token, times temperature^2.

    The loss of the paper's stages (CBD, Eq. 1, https://huggingface.co/papers/2605.07783). Arguments, result and
    errors are those of `forward_kl`.

    Example:
        >>> student, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, torch.log(torch.tensor(3.0))]]])
        >>> round(reverse_kl(student, teacher, torch.tensor([[True]])).item(), 4)  # 0.5 ln 2 + 0.5 ln (2/3)
        0.1438
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature)
    return _mean((student.exp() * (student - teacher)).sum(-1), keep, temperature)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, keep: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Mean generalised Jensen-Shannon divergence, in nats per kept token, times temperature^2.

    ``beta KL(p_T || m) + (1 - beta) KL(p_S || m)`` with ``m = beta p_T + (1 - beta) p_S``
    (Agarwal et al. 2024, section 3, https://huggingface.co/papers/2306.13649). Symmetric at ``beta=0.5``. Other arguments,
    result and errors are those of `forward_kl`.

    Args:
        student_logits: Shape (B, T, V).
        teacher_logits: Shape (B, T, V).
        keep: Bool, shape (B, T).
        temperature: Above 0.
        beta: Weight of the teacher in the mixture, strictly between 0 and 1.

    Example:
        >>> a, b, keep = torch.randn(1, 2, 5), torch.randn(1, 2, 5), torch.ones(1, 2, dtype=torch.bool)
        >>> torch.allclose(jensen_shannon(a, b, keep), jensen_shannon(b, a, keep))
        True
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature, beta=beta)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (student.exp() * (student - mixture)).sum(-1)
    return _mean(beta * to_teacher + (1 - beta) * to_student, keep, temperature)


def skew_kl(
    student_logits: Tensor, teacher_logits: Tensor, keep: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """Mean skew divergence KL(p_T || skew p_T + (1 - skew) p_S), in nats per kept token, times temperature^2.

    Bounded by ``-log(skew)``, so that a token the student thinks impossible cannot dominate
    (DistiLLM, section 3.1, https://huggingface.co/papers/2402.03898). Other arguments, result and errors are those of `forward_kl`.

    Args:
        student_logits: Shape (B, T, V).
        teacher_logits: Shape (B, T, V).
        keep: Bool, shape (B, T).
        temperature: Above 0.
        skew: Share of the teacher in the mixture, strictly between 0 and 1.

    Example:
        >>> student, teacher = torch.tensor([[[100.0, 0.0]]]), torch.tensor([[[0.0, 100.0]]])
        >>> round(skew_kl(student, teacher, torch.tensor([[True]])).item(), 4)  # -log(0.1)
        2.3026
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature, skew=skew)
    mixture = torch.logaddexp(teacher + math.log(skew), student + math.log1p(-skew))
    return _mean((teacher.exp() * (teacher - mixture)).sum(-1), keep, temperature)
