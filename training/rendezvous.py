"""Where the ranks meet: a store of their own for each attempt.

torchrun keeps one store for all attempts of a run (`--max-restarts`), under the same names. There a rank that has been
restarted finds the addresses of those who are gone, and fails or waits for ever (pytorch/pytorch issues 135712 and
167288). No variable of the environment has the same number for an attempt on every machine, so the ranks agree on a
name.
"""

import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_S = 0.1


def open_store(timeout: timedelta) -> dist.Store:
    """The store that the environment's variables name; it holds nothing of another attempt.

    Args:
        timeout: for all ranks to come, and of each operation of the store.

    Raises:
        ConnectionError: the store is out of reach, or not all ranks have come.
    """
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(agree_on_name(store, rank, world_size, timeout), store)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"the ranks have not met within {timeout.total_seconds():g} s: {reason}") from error
    return store


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this attempt know, and no other attempt has.

    Each rank leaves a number of its own. Rank 0 lists those that it finds, old ones included, until every rank has
    found its own in the list and has said so: then it is of this attempt alone, and the name is made of it.

    Raises:
        torch.distributed.DistStoreError: not all ranks have come.
    """
    mine, end = uuid.uuid4().hex.encode(), time.monotonic() + timeout.total_seconds()
    store.set(f"attempt/number/{rank}", mine)  # pyrefly: ignore[bad-argument-type]: bytes do as well
    while time.monotonic() < end:
        if rank == 0:
            numbers = _read(store, "attempt/number", world_size)
            store.set("attempt/list", b" ".join(numbers))  # pyrefly: ignore[bad-argument-type]
        numbers = store.get("attempt/list").split()
        if len(numbers) == world_size and numbers[rank] == mine:
            name = hashlib.sha256(b" ".join(numbers)).hexdigest()
            store.set(f"attempt/seen/{rank}", name)
            if rank == 0 and _read(store, "attempt/seen", world_size) == [name.encode()] * world_size:
                store.set("attempt/name", name)
            if store.check(["attempt/name"]) and store.get("attempt/name") == name.encode():
                return name
        time.sleep(POLL_S)
    raise dist.DistStoreError(f"rank {rank} waits for the other {world_size - 1}")


def _read(store: dist.Store, key: str, world_size: int) -> list[bytes]:
    """What the ranks have left under `key`, in order; waits until each of them has, in whatever attempt."""
    return store.multi_get([f"{key}/{rank}" for rank in range(world_size)])
