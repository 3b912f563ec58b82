"""Compiled students, and mixtures of experts whose auxiliary loss stays."""

import pytest
import tiny
import torch
from test_distill import rows, trainer_for, weights
from transformers import AutoModelForCausalLM, MixtralConfig

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.losses.divergence import forward_kl


def test_compiling_changes_no_update_and_no_name(family, tmp_path):
    plain = trainer_for(family, tmp_path / "a", hidden_weight=0.5)
    compiled = trainer_for(family, tmp_path / "b", hidden_weight=0.5, torch_compile=True, torch_compile_backend="aot_eager")
    plain.train()
    calls = []
    compiled.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    compiled.train()
    assert compiled.model.base_model._compiled_call_impl is not None
    assert list(weights(plain)) == list(weights(compiled))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(compiled)[name], rtol=1e-4, atol=1e-6, msg=name)


def mixture(layers=2, seed=0):
    config = MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.7, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("teacher", ["mixture", "dense"])
def test_the_auxiliary_loss_of_a_mixture_stays(tmp_path, teacher):
    """The training loss is the divergence and the model's own weighted load balancing loss; evaluation has the divergence alone."""
    student = mixture(seed=1)
    args = ChainDistillerConfig(str(tmp_path), max_steps=2, bf16=False, disable_tqdm=True, save_strategy="no")
    trainer = ChainDistiller(
        model=student, teacher=mixture() if teacher == "mixture" else tiny.llama(), args=args, train_dataset=rows(16), processing_class=tiny.tokenizer()
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    student.train()
    ours = student(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    theirs = trainer.teacher(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    keep = batch["labels"][:, 1:] != -100
    expected = forward_kl(ours.logits[:, :-1], theirs.logits[:, :-1], keep)
    assert ours.aux_loss > 0
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected + 0.7 * ours.aux_loss, rtol=1e-4, atol=1e-5)
    student.eval()
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected, rtol=1e-4, atol=1e-5)
    before = student.model.layers[0].mlp.gate.weight.detach().clone()
    trainer.train()
    assert not torch.equal(student.model.layers[0].mlp.gate.weight, before)
