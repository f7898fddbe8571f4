"""The ranks of an attempt agree on a name that no other attempt has, by a store that all attempts share."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from training.rendezvous import agree_on_name


def attempt(server: dist.TCPStore, ranks: list[int], world_size: int, seconds: float = 20.0) -> list[str]:
    """The names that these ranks come to, which start one after another in any order."""

    def join(rank: int) -> str:
        timeout = timedelta(seconds=seconds)
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
        time.sleep(random.uniform(0, 0.3))
        return agree_on_name(store, rank, world_size, timeout)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(join, ranks))


def test_each_attempt_has_a_name_of_its_own():
    """Also after one to which some did not come, whose numbers and acknowledgements are still there."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    names = []
    for broken in (None, [0, 1], [1, 2], [0], None):
        if broken:
            with pytest.raises(dist.DistStoreError):
                attempt(server, broken, 3, seconds=1.0)
        found = set(attempt(server, [2, 0, 1], 3))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 5
