"""How long torch.compile takes for the networks. What it makes stays in its cache, for the section that times them."""

import time

import torch

from tools.gpu.networks import PLAN, SHORT_PLAN, Runner, Scale, free
from tools.gpu.record import Record
from tools.profiling.steps import wait


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """The first step of training of each compiled form."""
    scale = Scale.of(rehearsal)
    table = record.table("Compilation, beside the tests", "form", "seconds to the end of the first training step")
    for group in SHORT_PLAN if rehearsal else PLAN:
        for form in group:
            if form.compiled and record.has_time(form.label, 20):
                with record.part(form.label):
                    step = Runner(form, device, scale, scale.batch_size).training()
                    start = time.perf_counter()
                    step()
                    wait(device)
                    record.add(table, form.label, time.perf_counter() - start)
                step = None
                torch._dynamo.reset()
                free()
