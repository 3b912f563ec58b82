"""bf16 where the device is quick at it, fp32 where it is not."""

import logging

import pytest
import tiny
import torch

from cbd_hub import ChainDistillerConfig
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.precision import _bf16_speed, has_bf16, products, say_fp32
from cbd_hub.precision import quick as is_quick


@pytest.mark.parametrize("quick", [True, False])
def test_bf16_means_autocast_only_where_it_is_quick(tmp_path, monkeypatch, caplog, quick):
    """Elsewhere the trainer is told that it computes in fp32, and says so once."""
    say_fp32.cache_clear()
    monkeypatch.setattr("cbd_hub.distill.config.has_bf16", lambda device: quick)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "cbd_hub"):
        made = [ChainDistillerConfig(str(tmp_path), bf16=True) for _ in range(2)]
    assert [args.bf16 for args in made] == [quick, quick]
    assert [record.message.count("fp32") for record in caplog.records if "bf16" in record.message] == ([] if quick else [1])
    assert not ChainDistillerConfig(str(tmp_path)).bf16


@pytest.mark.parametrize("quick", [True, False])
def test_measuring_follows(monkeypatch, quick):
    """Losses in fp32 are those without bf16, bit for bit; in bf16 they are near."""
    for module in ("precision", "evaluation"):
        monkeypatch.setattr(f"cbd_hub.{module}.has_bf16", lambda device: quick)
    model = tiny.llama().eval()
    documents = Documents.packed(tiny.texts(60), tiny.tokenizer(), 32, 600)
    exact, asked = (document_losses(ModelRunner(model), documents, bf16=bf16) for bf16 in (False, True))
    assert (asked.nats == exact.nats).all() != quick
    assert asked.mean == pytest.approx(exact.mean, rel=0.02)


def test_a_block_of_products_is_autocast_or_nothing(monkeypatch):
    for quick in (True, False):
        monkeypatch.setattr("cbd_hub.precision.has_bf16", lambda device, quick=quick: quick)
        with products(torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") == quick
        with products(torch.device("cpu"), bf16=False):
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("quick", [True, False])
def test_a_gpu_that_emulates_bf16_is_not_quick(tmp_path, monkeypatch, caplog, quick):
    """Nvidia's before Ampere; the trainer computes in fp32 there too, and says so."""
    has_bf16.cache_clear()
    say_fp32.cache_clear()
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or quick)
    assert has_bf16("cuda") == quick
    assert asked == [False]
    has_bf16.cache_clear()
    monkeypatch.setattr("cbd_hub.precision.best_device", lambda: torch.device("cuda"))
    assert is_quick(torch.bfloat16) == quick
    assert is_quick(torch.float16)
    if not quick:
        for module in ("precision", "distill.config"):
            monkeypatch.setattr(f"cbd_hub.{module}.best_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        with caplog.at_level(logging.WARNING, "cbd_hub"):
            assert not ChainDistillerConfig(str(tmp_path), bf16=True).bf16
        assert "not quicker on this CUDA" in caplog.text
        has_bf16.cache_clear()


@pytest.mark.parametrize(("there", "speed", "quick"), [(True, 2.0, True), (True, 0.5, False), (True, 1.0, False), (False, 2.0, False)])
def test_a_cpu_with_instructions_is_timed(monkeypatch, there, speed, quick):
    """Those of AVX-512 alone take twice as long as fp32 on some."""
    has_bf16.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
    monkeypatch.setattr("cbd_hub.precision._bf16_speed", lambda: speed)
    assert has_bf16("cpu") == quick
    has_bf16.cache_clear()


def test_the_quicker_precision_is_found(monkeypatch):
    """By the least time of several: what else the machine does is in some."""
    clock, cost = [0.0], {torch.float32: 3.0, torch.bfloat16: 1.0}
    slow = iter([50.0, 0.0, 0.0, 50.0] + [0.0] * 36)
    monkeypatch.setattr("cbd_hub.precision.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.nn.functional, "linear", lambda factor, _: clock.__setitem__(0, clock[0] + cost[factor.dtype] + next(slow)))
    threads = torch.get_num_threads()
    assert _bf16_speed() == pytest.approx(3.0)
    assert torch.get_num_threads() == threads
