"""Several processes: `torchrun --nproc-per-node=N advunlearn.py ...` starts N of them.

Each process holds the whole model. `share` divides jobs among them: the bank, the evaluation, the
methods of a comparison. Process 0 alone trains, prints and writes.
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from tqdm import tqdm

RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device):
    """Meet the other processes. All but process 0 fall silent; errors are still printed."""
    if COUNT == 1 or dist.is_initialized():
        return
    if device != "cpu":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"torchrun: more processes on this machine than GPUs, {gpus}")
        torch.cuda.set_device(local)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=7))
    if RANK:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def share(compute, items, title=None):
    """[compute(item) for item in items], where each result is a tuple of tensors.

    With one process this is `map`. With several, each computes some of the items, and all get all
    results, on the CPU. Within `compute` a process is alone: a `share` in there is `map`. `title`
    names the progress bar.
    """
    items = list(items)
    owners = [(i + i // COUNT) % COUNT for i in range(len(items))]  # each round begins elsewhere
    own = [item for item, owner in zip(items, owners) if owner == RANK]
    with alone():
        results = [compute(item) for item in tqdm(own, title, leave=False, disable=not title)]
    if COUNT == 1:
        return results
    remaining = iter(results)
    return [exchange(next(remaining) if owner == RANK else (), owner) for owner in owners]


@contextmanager
def alone():
    """Within, this process works as if there were no other."""
    global RANK, COUNT
    together = RANK, COUNT
    RANK, COUNT = 0, 1
    try:
        yield
    finally:
        RANK, COUNT = together


def exchange(tensors, owner):
    """The tensors of the process `owner`, in every process, on the CPU."""
    data = save({str(i): tensor.contiguous() for i, tensor in enumerate(tensors)})
    received = load(broadcast(data, owner))
    return tuple(received[str(i)] for i in range(len(received)))


def broadcast(data, owner=0):
    """The bytes of the process `owner`, in every process."""
    if COUNT == 1:
        return data
    device = "cpu" if dist.get_backend() == "gloo" else "cuda"
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, owner)
    padded = bytearray(data[: int(size)].ljust(int(size)))
    sent = torch.frombuffer(padded, dtype=torch.uint8).to(device)
    dist.broadcast(sent, owner)
    return sent.cpu().numpy().tobytes()


def barrier():
    """Wait for all processes."""
    if COUNT > 1:
        dist.barrier()


def on_first(act, *arguments):
    """Process 0 calls act(*arguments) while the others wait."""
    barrier()
    if RANK == 0:
        act(*arguments)
    barrier()


def leave(status):
    """End this process. One that failed does not wait for the others."""
    if COUNT > 1 and status == 0:
        dist.destroy_process_group()
    elif COUNT > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
