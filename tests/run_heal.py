"""Started by test_heal.py with one or two processes: heals a size of a chain, whole and by LoRA, and saves both."""

import os
import sys
import tempfile
from pathlib import Path


def main(folder, chain, processes):
    from test_heal import OPTIONS, between, data, lora

    from cbd_hub import heal

    options = {
        **OPTIONS, "per_device_train_batch_size": 4 // processes, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    for name, config in (("full", None), ("lora", lora(init_lora_weights=False))):
        model = heal(between(chain), chain, data(), output_dir=folder / name, peft_config=config, **options)
        assert model.config.cbd["healed"]["difference"] < 0
    if processes > 1:
        import torch
        torch.distributed.destroy_process_group()  # a process that ends with gloo's threads alive may abort


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("HF_HOME", tempfile.mkdtemp())
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
