"""TRL's GOLD as a rival: its loss (ULD, and the hybrid with shared tokens) on the same rows, with the same spans, in the same trainer. Needs ``trl`` 1.16."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cbd_hub import ChainDistiller
from cbd_hub.interpolation.live import Output


_IGNORED = -100


def available() -> bool:
    """Whether trl is installed."""
    try:
        import_module("trl.experimental.gold.gold_trainer")
    except ImportError:
        return False
    return True


def gold_loss(hybrid: bool, student: Any, teacher: Any, device: Any = None) -> Any:
    """GOLD's loss with its defaults, plus cross-entropy with the weight that the other rivals give it."""
    trainer = import_module("trl.experimental.gold.gold_trainer")
    defaults = import_module("trl.experimental.gold.gold_config").GOLDConfig.__dataclass_fields__
    named = {name: field.default for name, field in defaults.items() if name.startswith("uld_") or name in ("use_extended_uld", "beta")}
    config = SimpleNamespace(**{
        **named, "uld_crossentropy_weight": 1.0, "uld_use_hybrid_loss": hybrid, "use_extended_uld": True, "uld_skip_student_eos": False, "uld_skip_teacher_eos": False,
    })
    return trainer.ULDLoss(config, student_tokenizer=student, teacher_tokenizer=teacher, device=device)


def coordinates(spans: Tensor, odd: int) -> Tensor:
    """Byte offsets that give GOLD the spans that the others have: tokens inside a span end where the other side has no end. Shape (B, T, 2)."""
    found = torch.zeros(*spans.shape, 2, dtype=torch.long)
    for row, numbers in enumerate(spans.tolist()):
        order = {span: place for place, span in enumerate(dict.fromkeys(span for span in numbers if span >= 0))}
        at = 0
        for place, span in enumerate(numbers):
            last = place + 1 == len(numbers) or numbers[place + 1] != span
            end = at if span < 0 else 10_000 * (order[span] + 1) if last else max(at, 10_000 * order[span]) + 2 + (odd if at % 2 == 0 else 0)
            found[row, place] = torch.tensor([at, end])
            at = end
    return found


def gold_inputs(inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """A batch of a bridge as GOLD takes it."""
    theirs = inputs["teacher_input_ids"].clone()
    if "teacher_attention_mask" in inputs:
        theirs[inputs["teacher_attention_mask"] == 0] = _IGNORED
    theirs[:, 0] = _IGNORED
    return {
        "student_labels": labels, "teacher_labels": theirs, "student_input_ids": inputs["input_ids"], "teacher_input_ids": inputs["teacher_input_ids"],
        "student_byte_offsets": coordinates(inputs["spans"], 0), "teacher_byte_offsets": coordinates(inputs["teacher_spans"], 1),
    }


class GoldDistiller(ChainDistiller):
    """A `ChainDistiller` with a bridge whose loss is GOLD's, on whole logits."""

    hybrid = False

    def _head_loss(self, output: Output, target: Output | None, labels: Tensor, num_items: Any, ce_weight: float, inputs: Mapping[str, Tensor]) -> Tensor:
        if not hasattr(self, "_gold"):
            self._gold = gold_loss(self.hybrid, self.bridge.rows.student, self.bridge.rows.teacher, output.hidden.device)
        assert target is not None
        own = inputs["labels"].clone()
        own[:, 0] = _IGNORED
        logits = (side.hidden @ side.head.weight.t().to(side.hidden.dtype) for side in (output, target))
        found = self._gold(*logits, **gold_inputs(inputs, own))
        return found.sum()


class HybridDistiller(GoldDistiller):
    """The same with shared tokens compared directly."""

    hybrid = True
