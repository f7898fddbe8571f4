"""What is decided for a GPU, without one: whether DALI decodes boxes on it, and how far one resize may go."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.executors import dali_probe
from pipelines.executors.dali_executor import HARDWARE_SHARE, choose_full_decode
from pipelines.executors.torchvision_executor import LARGEST_REDUCTION, resize_steps


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("pass", None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it ends by signal 11"),
        ("import time; time.sleep(60)", "it takes more than 1 s"),
        ("import sys; print('nvImageCodec failure: #8', file=sys.stderr); sys.exit(1)", "nvImageCodec failure: #8"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_an_attempt_that_crashes_hangs_or_fails_is_a_reason_and_is_made_once(
    program, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    setting = ["DALI 1", "card"]
    assert (
        dali_probe.probe([sys.executable, "-c", program], setting, 1.0 if reason and "takes" in reason else 20)
        == reason
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (reason is not None) and all(reason in line and "whole images" in line for line in said)
    broken = [sys.executable, "-c", "raise SystemExit('another answer')"]
    assert dali_probe.probe(broken, setting, 20) == reason, "kept"
    assert dali_probe.probe(broken, ["DALI 2", "card"], 20) == "another answer"
    for kept in (tmp_path / "dcd").iterdir():
        kept.write_text("{")  # torn
    assert dali_probe.probe(broken, setting, 20) == "another answer"


def test_whole_images_are_decoded_where_boxes_cannot_be():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_full_decode(None, gpu, lambda _: "it ends by signal 11") == HARDWARE_SHARE
    assert choose_full_decode(None, gpu, lambda _: None) is None
    assert choose_full_decode(0.2, gpu, lambda _: pytest.fail("it is not asked for")) == 0.2
    assert choose_full_decode(None, cpu, lambda _: pytest.fail("it is no GPU")) is None


def test_the_attempt_passes_where_boxes_are_decoded_and_fails_where_they_are_others(monkeypatch):
    dali_probe.main(None)  # by DALI's decoder of the CPU
    decode = dali_probe.decode_boxes
    monkeypatch.setattr(
        dali_probe, "decode_boxes", lambda encoded, boxes, _: decode(encoded, boxes + np.int32([3, 9, 0, 0]), None)
    )
    with pytest.raises(SystemExit, match="its pixels differ by"):
        dali_probe.main(None)
    monkeypatch.setattr(
        dali_probe, "decode_boxes", lambda encoded, boxes, _: decode(encoded, boxes - np.int32([0, 0, 1, 0]), None)
    )
    with pytest.raises(SystemExit, match="it gives"):
        dali_probe.main(None)


def test_only_a_gpu_is_told_to_interpolate_colours():
    assert dali_probe.decoder_options("mixed")["jpeg_fancy_upsampling"] is True
    assert "jpeg_fancy_upsampling" not in dali_probe.decoder_options("cpu")


def test_a_large_reduction_is_made_in_steps_that_come_near_to_a_single_one():
    assert resize_steps(500, 375, 224) == [(224, 224)]
    assert resize_steps(32 * LARGEST_REDUCTION, 20, 32) == [(32, 32)]
    assert resize_steps(65535, 20, 32) == [(32 * LARGEST_REDUCTION, 20), (32, 32)]
    for height, width, size in ((65535, 65535, 32), (30000, 9, 1), (4097, 9000, 64)):
        before = (height, width)
        for step in resize_steps(height, width, size):
            assert all(after > 0 and old / after <= LARGEST_REDUCTION for old, after in zip(before, step, strict=True))
            before = step
        assert before == (size, size)
    noise = np.random.default_rng(0).random((1, 3, 40, 60)).astype(np.float32)
    image = F.interpolate(torch.from_numpy(255 * noise), (3000, 2400), mode="bilinear")
    wanted = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    found = image
    for step in resize_steps(3000, 2400, 32):
        found = F.interpolate(found, step, mode="bilinear", antialias=True)
    assert len(resize_steps(3000, 2400, 32)) == 2 and (found - wanted).abs().max() < 1
