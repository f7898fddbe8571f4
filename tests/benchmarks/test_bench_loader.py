"""`make bench-loader`: rows in processes of their own, which take turns, end, and fail alone."""

import math
import os
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.bench_loader import Setting, close, measure, ratios, table


def test_rows_take_turns_and_one_that_fails_stops_no_other(tmp_path, digits):
    nowhere = tmp_path / "nowhere"
    setting = Setting(digits, nowhere, nowhere, batch_size=64, size=32, workers=1, device="cpu")
    ours, stock, broken = measure(
        setting, ("torchvision executor, folder", "torchvision DataLoader", "full decode"), epochs=2
    )
    for row in (ours, stock):
        assert row.error == "" and len(row.rates) == len(row.cpu_percents) == 2 and min(row.rates) > 0
        assert row.first_batch_s > 0 and row.peak_memory_gib > 0.05
    assert (ours.kind, stock.kind, broken.kind) == ("ours", "stock", "limit")
    assert str(nowhere) in broken.error and broken.rates == [] and math.isnan(broken.rate)
    (sentence,) = ratios([ours, stock, broken])
    assert sentence == f"{ours.name} is {ours.rate / stock.rate:.2f} times {stock.name}"
    lines = table([ours, stock, broken]).splitlines()
    assert len(lines) == 5 and f"| {broken.error} |" in lines[-1]
    assert [line.split(" | ")[-1] for line in lines[2:]] == 3 * ["– |"]  # there is no full decode to compare with


def test_the_end_of_a_row_that_has_crashed_stops_no_other():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert isinstance(pool.submit(os.abort).exception(), BrokenExecutor)
        close(pool)
