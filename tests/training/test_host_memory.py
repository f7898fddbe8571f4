"""Freed memory stays with the process, so that large tensors do not begin with page faults."""

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from training.host_memory import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults(3)
assert keep_freed_memory()
faults(20)  # the heap grows at first: glibc lays up to seven splinters of aligned memory between large pieces
print(given_back, faults(3))
"""


def test_a_large_tensor_finds_the_memory_of_the_one_before():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
