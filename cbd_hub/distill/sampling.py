"""Arguments that say where the student's tokens come from: the data set, the teacher's answers, or the student itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cbd_hub.errors import ArgumentError


OBJECTIVES = ("divergence", "minillm")


def text_default(said: Mapping[str, Any]) -> dict[str, float]:
    """The weight of the text's cross-entropy in recipes and heals that name none; MiniLLM has a term of its own for text."""
    return {} if said.get("objective") == "minillm" else {"ce_weight": 1.0}


@dataclass
class SamplingArguments:
    """What `cbd_hub.distill.config.ChainDistillerConfig` has of sampling.

    ``on_policy_fraction`` is GKD (https://huggingface.co/papers/2306.13649): in that share of the optimiser steps the completions of the batch are replaced by
    the student's own, and the divergence is taken on those. ``objective="minillm"`` is MiniLLM (https://huggingface.co/papers/2306.08543, `cbd_hub.losses.policy`),
    which the stages of the CBD paper use; its paper's settings are the defaults.

    Args:
        objective: ``divergence``, or ``minillm`` for the policy gradient of the reverse KL on the student's samples.
        on_policy_fraction: Share of the optimiser steps taken on the student's own completions, 0 to 1; without cross-entropy there.
        teacher_answers: Train on the teacher's answers to the prompts instead of the data's own (sequence-level distillation,
            https://huggingface.co/papers/1606.07947); they are drawn once and kept in the output folder.
        max_new_tokens: Most tokens of a response; of plain text, no more than were left out of the prompt, and never more than both models have positions:
            the log says where a response ends earlier or a prompt is left out for that.
        sampling_temperature: Temperature of the distributions that are drawn from; 0 takes the likeliest token.
        prompt_share: Where data have no prompts, the share of each block that is the prompt.
        generation_batch_size: Prompts a process answers at once.
        rollout_batch: Responses sampled at a time, over all processes; a multiple of the optimiser step's batch.
        inner_epochs: Passes over them before the next are sampled.
        ratio_clip: How far the ratio of new and sampling probability may go and still have a gradient.
        teacher_mix: The teacher's share in the distribution that is sampled.
        length_normalised: Whether rewards-to-go are divided by the number of tokens they sum.
        text_weight: Weight of the cross-entropy with ``text_dataset``, as many of its rows in a step as responses.
    """

    objective: str = field(default="divergence", metadata={"help": "divergence or minillm."})
    on_policy_fraction: float = field(default=0.0, metadata={"help": "Share of the steps taken on the student's own completions."})
    teacher_answers: bool = field(default=False, metadata={"help": "Train on the teacher's answers to the prompts."})
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of a response."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling; 0 takes the likeliest token."})
    prompt_share: float = field(default=0.5, metadata={"help": "Share of a plain block that is the prompt."})
    generation_batch_size: int = field(default=32, metadata={"help": "Prompts a process answers at once."})
    rollout_batch: int = field(default=256, metadata={"help": "Responses sampled at a time."})
    inner_epochs: int = field(default=4, metadata={"help": "Passes over the sampled responses."})
    ratio_clip: float = field(default=0.2, metadata={"help": "Half the width of the band of the ratio."})
    teacher_mix: float = field(default=0.2, metadata={"help": "The teacher's share in the sampled distribution."})
    length_normalised: bool = field(default=True, metadata={"help": "Whether rewards-to-go are means."})
    text_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy with text_dataset."})

    @property
    def is_minillm(self) -> bool:
        """Whether the objective is MiniLLM's."""
        return self.objective == "minillm"

    def sampling_facts(self) -> dict[str, str]:
        """What a card says of where the tokens come from; nothing where they are the data's."""
        if self.is_minillm:
            text = f" + {self.text_weight:g} x cross-entropy of text" if self.text_weight else ""
            return {"loss": f"MiniLLM's, {self.teacher_mix:g} of the teacher in the sampled distribution{text}", "completions": "the student's and the teacher's"}
        said = ["the teacher's answers" if self.teacher_answers else "the data's"]
        if self.on_policy_fraction:
            said.append(f"the student's own in {self.on_policy_fraction:.0%} of the steps")
        return {"completions": ", ".join(said)} if self.teacher_answers or self.on_policy_fraction else {}


def check_sampling(args: Any) -> None:
    """Refuse sampling arguments outside their range, or that do not go together.

    Args:
        args: A `cbd_hub.distill.config.ChainDistillerConfig`; MiniLLM's divergence is set to the reverse KL.

    Raises:
        ArgumentError: Naming the argument, the value found and the range.
    """
    if args.objective not in OBJECTIVES:
        raise ArgumentError(f"objective={args.objective!r} is not known; choose one of {', '.join(OBJECTIVES)}")
    for name in ("max_new_tokens", "generation_batch_size", "rollout_batch", "inner_epochs"):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name}={value!r} must be a whole number of 1 or more")
    if not 0.0 <= args.on_policy_fraction <= 1.0:
        raise ArgumentError(f"on_policy_fraction={args.on_policy_fraction} is outside 0 to 1; it is a share of the steps")
    if not 0.0 <= args.teacher_mix < 1.0:
        raise ArgumentError(f"teacher_mix={args.teacher_mix} is outside 0 to below 1; it is the teacher's share, and the student needs one")
    for name in ("prompt_share", "ratio_clip"):
        if not 0.0 < getattr(args, name) < 1.0:
            raise ArgumentError(f"{name}={getattr(args, name)} is outside (0, 1); choose a value inside that range")
    for name in ("sampling_temperature", "text_weight"):
        if not getattr(args, name) >= 0.0:
            raise ArgumentError(f"{name}={getattr(args, name)} is negative; give 0 or more")
    if args.on_policy_fraction and not args.kd_weight:
        raise ArgumentError("on_policy_fraction needs kd_weight above 0: the student's own tokens are to be judged by the teacher")
    if not args.is_minillm:
        if args.text_weight:
            raise ArgumentError(f"text_weight={args.text_weight} belongs to objective=minillm; use ce_weight for the cross-entropy with the data")
        return
    if args.divergence == "forward_kl":
        args.divergence = "reverse_kl"
    wanted = {
        "divergence": "reverse_kl", "temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0, "hidden_weight": 0.0, "path_fraction": 0.0,
        "on_policy_fraction": 0.0, "teacher_answers": False,
    }
    for name, value in wanted.items():
        if getattr(args, name) != value:
            raise ArgumentError(f"{name}={getattr(args, name)} does not go with objective=minillm; leave it at {value}")
    if not args.sampling_temperature:
        raise ArgumentError("sampling_temperature=0 gives no importance weights, which objective=minillm needs; the paper's value is 1")
