"""Signals to a run, and to what it has forked."""

import subprocess
import sys

SCRIPT = """
import os, signal, sys, time
from training import interruption

interruption.SAME_REQUEST_S = 0.05
listening = interruption.Interruption()
listening.listen(lambda: None)
pid = os.fork()
if pid == 0:
    time.sleep(3)
    os._exit(0)
to = {"child": pid, "itself": os.getpid()}[sys.argv[1]]
for _ in range(3):
    time.sleep(0.2)
    os.kill(to, signal.SIGTERM)
time.sleep(0.5)
os.kill(pid, signal.SIGKILL)
print("alive, requested:", listening.requested)
"""


def signals(to: str, root) -> subprocess.CompletedProcess:
    """Three signals, further apart than those of one request."""
    # Python 3.12 warns of a fork beside other threads, of which PyTorch has some.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT, to]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)


def test_signals_to_a_forked_process_are_no_request_to_its_parent(root):
    done = signals("child", root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive, requested: False\n", "")


def test_the_second_signal_ends_a_run_at_once(root):
    done = signals("itself", root)
    assert done.returncode == 128 + 15 and not done.stdout
