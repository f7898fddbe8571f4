"""Stopped while it waits for data that never comes: every loader is closed in seconds, and Python ends."""

import shutil
import subprocess
import sys
from pathlib import Path

# Each case in turn in one process, which has all that is stuck in it when it ends.
SCRIPT = """
import multiprocessing, os, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from pipelines import native, threads
from pipelines.executors import torchvision_executor
from pipelines.batch import Place
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.loader import Loader
from tests.pipelines import helpers

threads.PATIENCE_S = torchvision_executor.PATIENCE_S = 0.5
folder, beton = map(Path, sys.argv[1:])
config = DataConfig(folder, "torchvision", batch_size=4, workers=2, input_size=32)
pipe, _ = os.pipe()  # which nobody writes to
stuck = folder / "train" / "flower" / "2.JPEG"  # in the fourth batch at the latest

class Stop(Exception):
    pass

def stop(*_):
    global start
    start = time.monotonic()
    raise Stop

def make_pipe():
    stuck.unlink()
    os.mkfifo(stuck)

def stop_workers():
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)

def block_decoder():
    native.render = lambda *_: os.read(pipe, 1)

def on_gpu(config):
    source = build_loader(config, "train")._source
    executor = torchvision_executor.TorchvisionGpuExecutor(source, torch.device("cpu"), 2)
    return Loader(source, executor, True, config, AugmentationConfig(), Place(), seed=0)

class Stuck:
    def draw(self, seed, epoch, indices):
        return indices

    def apply(self, images, operations):
        os.read(pipe, 1)

def augmented(config):
    return build_loader(config, "train", augmentation=helpers.augmented(Stuck()))

def do_nothing():
    pass

def open_train(config):
    return build_loader(config, "train")

cases = {
    "torchvision, workers": (open_train, config, make_pipe),
    "torchvision, in this process": (open_train, replace(config, workers=0), make_pipe),
    "torchvision, on a GPU": (on_gpu, config, make_pipe),
    "DALI": (open_train, replace(config, backend="dali"), make_pipe),
    "torchvision, stopped workers": (open_train, replace(config, root=beton), stop_workers),
    "augmentation": (augmented, replace(config, root=beton, backend="ffcv"), do_nothing),
    "FFCV": (open_train, replace(config, root=beton, backend="ffcv"), block_decoder),
}
image = stuck.read_bytes()
signal.signal(signal.SIGALRM, stop)
workers = []
for name, (open_loader, config, block) in cases.items():
    loader = open_loader(config)
    batches = iter(loader)
    if block is stop_workers:
        next(batches)
        workers += multiprocessing.active_children()
    block()
    signal.setitimer(signal.ITIMER_REAL, 0.7)
    try:
        for epoch in range(100):
            loader.set_epoch(epoch)
            for _ in loader:
                pass
        raise SystemExit(f"{name}: nothing was stuck")
    except Stop:
        workers += multiprocessing.active_children()
        loader.close()
        print(f"{time.monotonic() - start:.2f} {name}", flush=True)
    if block is make_pipe:
        stuck.unlink()
        stuck.write_bytes(image)
assert not multiprocessing.active_children() and len(workers) >= 4

unclosed = open_train(cases["torchvision, workers"][1])
next(iter(unclosed))
stop_workers()
print("left", *(worker.pid for worker in multiprocessing.active_children()))
"""


def test_a_stop_while_waiting_for_data_ends_at_once_on_every_backend(photos, tmp_path, root):
    folder = shutil.copytree(photos.folder, tmp_path / "folder")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(photos.verbatim)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    *closed, left = done.stdout.splitlines()
    assert len(closed) == 7 and all(float(line.split()[0]) < 3 for line in closed)
    assert not [pid for pid in left.split()[1:] if Path("/proc", pid).exists()]
