"""Threads between stages, memory that is used again, normalisation, and the executor for a GPU on a CPU."""

import threading

import numpy as np
import pytest
import torch

from pipelines.batch import Place
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.executors.common import Buffers
from pipelines.executors.torchvision_executor import TorchvisionGpuExecutor
from pipelines.imagenet import MEAN, STD
from pipelines.loader import Loader
from pipelines.plan import StepPlan
from pipelines.sources.beton import BetonSource
from pipelines.stages import DeviceStage
from pipelines.threads import in_background


def counted(made, closed, stop=10**9):
    try:
        for i in range(stop):
            made.append(i)
            yield i
    finally:
        closed.append(threading.current_thread())


def test_items_are_made_ahead_in_another_thread_and_in_order():
    made, closed, taken, is_ahead = [], [], [], threading.Event()

    def watched():
        for item in counted(made, closed, 50):
            if item == 4:
                is_ahead.set()
            yield item

    for item in in_background(watched(), ahead=3):
        taken.append(item)
        assert is_ahead.wait(5)
        assert len(made) <= len(taken) + 4  # three in the queue, one that waits for a place
    assert taken == list(range(50))
    assert closed != [threading.current_thread()]


def test_closing_ends_the_threads_of_every_stage():
    before, made, closed = threading.active_count(), [], []
    items = in_background(in_background(counted(made, closed), ahead=2), ahead=2)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()
    assert threading.active_count() == before and len(closed) == 1


def test_an_error_comes_after_the_items_before_it():
    def broken():
        yield from (1, 2)
        raise OSError("no disk")

    items = in_background(broken(), ahead=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="no disk"):
        next(items)


def test_memory_is_used_again_only_when_nobody_holds_it():
    buffers = Buffers(pinned=False)
    first = buffers.empty(4, 3, dtype=torch.float32)
    address, part = first.data_ptr(), first[1:].permute(1, 0)
    del first
    assert buffers.empty(4, 3, dtype=torch.float32).data_ptr() != address  # a part of it is still held
    del part
    held = buffers.empty(4, 3, dtype=torch.float32)
    assert held.data_ptr() == address
    assert buffers.empty(4, 3, dtype=torch.uint8).dtype == torch.uint8
    assert buffers.empty(5, 3, dtype=torch.float32).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_normalised_and_floats_are_taken_as_they_are(dtype):
    def finish(images, dtype):
        step = StepPlan(np.array([2, 0]), np.zeros((2, 4), np.int32), np.zeros(2, bool))
        (batch,) = DeviceStage(Place(dtype=dtype)).run((item for item in [(step, images)]), np.array([5, 6, 7]))
        assert batch.labels.tolist() == [7, 5] and batch.indices.tolist() == [2, 0]
        return batch.images

    images = torch.randint(0, 256, (2, 5, 5, 3), dtype=torch.uint8)
    expected = (images.float() - torch.tensor(MEAN)) / torch.tensor(STD)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    found = finish(images, dtype).float()
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2), rtol=tolerance, atol=tolerance)
    assert torch.equal(finish(expected, torch.float32), expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("data", ["verbatim", "half_raw"])  # raw images are none that the batch decoder takes
def test_the_executor_for_a_gpu_does_on_a_cpu_what_the_other_does(photos, build, data):
    config = DataConfig(getattr(photos, data), "torchvision", batch_size=4, workers=0, input_size=64)
    other = build(config, "train")
    source = BetonSource(config.root / "train.beton")
    executor = TorchvisionGpuExecutor(source, torch.device("cpu"), 2)
    loader = Loader(source, executor, True, config, AugmentationConfig(), Place(), seed=0)
    for batch, expected in zip(loader, other, strict=True):
        assert torch.equal(batch.indices, expected.indices) and torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.images, expected.images)
    loader.close()
