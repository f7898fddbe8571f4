"""Ranks: what torchrun or Slurm sets up, and the few things that all ranks do together. One process needs no group."""

import faulthandler
import gc
import os
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training import slurm
from training.options import ConfigError
from training.rendezvous import open_store

SECONDS_TO_LEAVE = 15  # the longest time to leave the process group; operations may still be running


class LostRankError(RuntimeError):
    """Another rank has gone; the message is one line that says where to look."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others: rank in [0, world_size), local_rank in [0, local_world_size) on its machine."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(device: str, timeout: timedelta) -> Ranks:
    """Read torchrun's or Slurm's environment, choose the device, and join the process group.

    The group has NCCL for the tensors of GPUs and gloo for those of CPUs.

    Args:
        device: auto, cuda or cpu.
        timeout: after which a collective operation fails.

    Raises:
        ConfigError: no GPU where one is asked for, or fewer GPUs than ranks on this machine.
        ConnectionError: the ranks have not met within the timeout.
    """
    if "RANK" not in os.environ:
        os.environ.update(slurm.rank_variables(os.environ))
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and num_gpus == 0:
        raise ConfigError("--device cuda: PyTorch sees no GPU here; check the driver, or use --device cpu")
    if device != "cpu" and 0 < num_gpus < local_world_size:
        raise ConfigError(
            f"{local_world_size} ranks but {num_gpus} GPUs on this machine: "
            f"use --nproc-per-node={num_gpus} (or --device cpu)"
        )
    if device == "cpu" or num_gpus == 0:
        chosen = torch.device("cpu")
    else:
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if world_size > 1:
        # Imported later by DDP, its functions would keep the group as a default argument, and it would never end.
        import_module("torch.distributed.nn.functional")
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        device_id = chosen if chosen.type == "cuda" else None
        dist.init_process_group(
            backend, store=open_store(timeout), rank=rank, world_size=world_size, device_id=device_id, timeout=timeout
        )
    return Ranks(rank, local_rank, world_size, local_world_size, chosen)


def stop(error: BaseException | None) -> None:
    """Leave the process group, whose threads end with it.

    They must not run into the end of Python, where gloo's would abort the process. So nothing may hold the group any
    more: the caller has dropped DDP and whatever else has collectives; this drops what `error` holds by its frames.

    Args:
        error: what ends the run, if anything does.
    """
    if not dist.is_initialized():
        return
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    # An operation that waits for a silent rank would block here for as long as `--timeout`.
    faulthandler.dump_traceback_later(SECONDS_TO_LEAVE, exit=True, file=2)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


@contextmanager
def first_on_machine(ranks: Ranks) -> Generator[None]:
    """The first rank of each machine does the body before the others, who then find what it has cached.

    Where the body fails, it lets the others go on all the same: each finds the same error and can say so.
    """
    if ranks.local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if ranks.local_rank == 0:
            barrier()


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, in place and on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def highest_over_ranks(*values: int) -> list[int]:
    """The highest of each value over all ranks, on every rank. On the CPU: it does not wait for a GPU."""
    if not dist.is_initialized():
        return list(values)
    highest = torch.tensor(values)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.tolist()


def share_buffers(model: nn.Module) -> None:
    """Give every rank the buffers (batch-norm statistics) of rank 0.

    In training each rank keeps its own; sharing them only where they are used, before an evaluation, gives the same
    numbers as DDP's broadcast in every step.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def lost_ranks_named() -> Generator[None]:
    """Turn the many errors of a broken connection into one line; the rank that failed says why on its own."""
    try:
        yield
    except RuntimeError as error:
        broken = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
        if dist.is_initialized() and any(words in str(error) for words in broken):
            raise LostRankError("another rank has failed; its own message says why") from error
        raise
