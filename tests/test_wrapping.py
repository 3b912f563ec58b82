"""What a training step changes in a model for as long as it runs."""

import pytest
import tiny
import torch
from torch.distributed.utils import _to_kwargs

from cbd_hub import ChainDistillerConfig
from cbd_hub.distill.wrapping import inside, short_attention, sparse_rows
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.losses.head import distillation_loss


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_sends_back_its_rows_alone_and_the_gradient_is_the_same(tied: bool) -> None:
    """That of two dense gradients, also added to one that is there; in float64, since only the order of the sums differs."""
    model = tiny.llama(tied=tied).double().train()
    teacher = tiny.llama(seed=1).double()
    ids = torch.tensor([[3, 7, 3, 9, 3, 1], [2, 2, 4, 7, 5, 8]])
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1).flatten()
    target = ModelRunner(teacher)(ids)

    def gradients(sparse: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for _ in range(2):
            if sparse:
                with sparse_rows(model):
                    output = ModelRunner(model)(ids)
                    assert model.get_input_embeddings().sparse is tied
            else:
                output = ModelRunner(model)(ids)
            distillation_loss(output.hidden.flatten(0, 1), output.head.weight, target.hidden.flatten(0, 1).detach(), target.head.weight.detach(), labels).backward()
        assert not model.get_input_embeddings().sparse
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    dense, rows = gradients(False), gradients(True)
    for name, gradient in dense.items():
        assert not rows[name].is_sparse
        torch.testing.assert_close(rows[name], gradient, rtol=1e-12, atol=1e-14)


def test_a_wrapper_is_given_something_to_move():
    """As DDP on an accelerator moves its inputs to the device and takes the first of them."""
    model = tiny.llama()
    seen = []

    def wrapper(*inputs, **named):
        moved = _to_kwargs(inputs, named, torch.device("cpu"), False)
        return model(*moved[0][0], **moved[1][0])

    assert inside(wrapper, model, lambda: seen.append(model) or 3) == 3
    assert seen == [model]
    assert "forward" not in vars(model) or model.forward.__func__ is type(model).forward


def test_attention_is_plain_on_short_blocks_in_bf16_and_what_it_was_afterwards(tmp_path, monkeypatch) -> None:
    """Longer blocks, fp32, samples of the model's own and another attention are left alone."""
    monkeypatch.setattr("cbd_hub.distill.config.has_bf16", lambda device: True)
    model, other = tiny.llama(), tiny.llama(seed=1)
    other.set_attn_implementation("eager")

    def within(**options: object) -> list[str]:
        args = ChainDistillerConfig(str(tmp_path), use_cpu=True, **{"bf16": True, "block_size": 128, **options})
        with short_attention(args, [], model, other, None):
            return [each.config._attn_implementation for each in (model, other)]

    assert within() == ["eager", "eager"]
    assert [model.config._attn_implementation, other.config._attn_implementation] == ["sdpa", "eager"]
    for options in ({"block_size": 129}, {"bf16": False}, {"on_policy_fraction": 0.5}):
        assert within(**options) == ["sdpa", "eager"], options
    with pytest.raises(ZeroDivisionError), short_attention(ChainDistillerConfig(str(tmp_path), use_cpu=True, bf16=True), [], model):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("rows", "options", "attention"), [
    ([{"input_ids": [5] * 64}], {}, "eager"), ([{"input_ids": [5] * 300}], {}, "sdpa"), ([{"input_ids": [5] * 9, "teacher_input_ids": [5] * 300}], {}, "sdpa"),
    ([{"prompt": "a"}], {"teacher_answers": True}, "sdpa"), (iter([{"input_ids": [5] * 300}]), {}, "eager"),
], ids=["short", "long", "the teacher's", "answers", "a stream, by its block size"])
def test_short_rows_on_a_cpu_in_bf16_have_plain_attention(tmp_path, monkeypatch, rows, options, attention):
    monkeypatch.setattr("cbd_hub.distill.config.has_bf16", lambda device: True)
    model, args = tiny.llama(), ChainDistillerConfig(str(tmp_path), bf16=True, use_cpu=True, **options)
    with short_attention(args, rows, model, None):
        assert model.config._attn_implementation == attention
    assert model.config._attn_implementation == "sdpa"
