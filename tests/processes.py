"""Processes as torchrun would start them, forked: to import everything anew takes longer than what they do."""

import multiprocessing
import os
import socket

import torch
from accelerate.state import AcceleratorState, GradientState


def launched(count, work, *arguments):
    """Run some work in so many processes of one group over gloo, or in one without a group, until all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if count > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in places.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        work(*arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # a process that ends with gloo's threads alive may abort

    processes = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    assert not left, "they hang"
    assert [process.exitcode for process in processes] == [0] * count, "their errors stand in what was written to standard error"
