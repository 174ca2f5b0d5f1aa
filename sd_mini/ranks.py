"""Several processes: `torchrun --nproc-per-node=N advunlearn.py ...` starts N; alone, all of this does nothing.

Each holds the whole model and draws the same random numbers. What comes in batches is computed in turns and exchanged,
gradients are averaged, and only process 0 prints and writes (attacks excepted, which each keeps in the run's folder). The
runs of a comparison are dealt out whole instead.
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
TURN = slice(RANK, None, COUNT)  # of a list of batches, those that are this process's


def join(device):
    """Meet the others; all but process 0 fall silent, errors excepted."""
    if COUNT == 1 or dist.is_initialized():
        return
    if device != "cpu":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(f"torchrun: more processes on this machine than GPUs, {torch.cuda.device_count()}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(days=7))
    if RANK:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def exchange(mine, n, device):
    """`mine`, a tuple of tensors for each item of this process's turn -> those of all n items, in order: on the
    CPU, having travelled by `device`; where they are, if there is one process."""
    if COUNT == 1:
        return mine
    mine, everything = iter(mine), []
    for owner in (i % COUNT for i in range(n)):
        data = b"" if owner != RANK else save({str(j): tensor.contiguous() for j, tensor in enumerate(next(mine))})
        size = torch.tensor([len(data)], device=device)
        dist.broadcast(size, owner)
        sent = torch.frombuffer(bytearray(data.ljust(int(size))), dtype=torch.uint8).to(device)
        dist.broadcast(sent, owner)
        received = load(sent.cpu().numpy().tobytes())
        everything.append([received[str(j)] for j in range(len(received))])
    return everything


def mean(values, n):
    """This process's part in the mean of n values: the `average` of these parts over all processes is that mean."""
    return COUNT * values.sum() / n


def average(tensors):
    """Replace each tensor by its average over all processes."""
    if COUNT > 1:
        for tensor in tensors:
            dist.all_reduce(tensor.div_(COUNT))


def anyone(flag, device):
    """Is the flag set in any of the processes?"""
    if COUNT == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


def meet():
    """Wait for all processes."""
    if COUNT > 1:
        dist.barrier()


def first(act, *arguments):
    """Process 0 acts while the others wait -> its result, or None for the others."""
    meet()
    result = act(*arguments) if RANK == 0 else None
    meet()
    return result


@contextmanager
def apart(jobs):
    """Within, each process works as if alone -> the jobs that are its own, the first to choose another in each round; before and
    afterwards all meet."""
    global RANK, COUNT, TURN
    meet()
    mine = [job for i, job in enumerate(jobs) if (i + i // COUNT) % COUNT == RANK]
    together = RANK, COUNT, TURN
    RANK, COUNT, TURN = 0, 1, slice(None)
    try:
        yield mine
    finally:
        RANK, COUNT, TURN = together
    meet()


def leave(status):
    """End this process; where it failed, without a farewell, for which the others would have to be there."""
    if COUNT > 1 and status == 0:
        dist.destroy_process_group()
    elif COUNT > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
