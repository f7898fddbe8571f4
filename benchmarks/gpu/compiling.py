"""How long torch.compile takes for the networks. Its cache is kept for the section that times them."""

import torch

from benchmarks.gpu.networks import PLAN, SHORT_PLAN, free
from benchmarks.gpu.record import Record
from tools.profiling.runner import Runner
from tools.profiling.timing import step_seconds
from tools.profiling.variants import create_model


def run(record: Record, device: torch.device, rehearsal: bool) -> None:
    """Time the first training step of each compiled variant."""
    table = record.table("Compilation, beside the tests", "form", "seconds to the end of the first training step")
    torch.set_float32_matmul_precision("high")
    batch_size, size = (2, 32) if rehearsal else (256, 224)
    images = torch.randn(batch_size, 3, size, size).to(device, memory_format=torch.channels_last)
    groups = [group for group in (SHORT_PLAN if rehearsal else PLAN) if group.setting.mode == "compiled"]
    forms = {(group.network, variant): group.setting for group in groups for variant in group.variants}
    for (name, variant), setting in forms.items():
        what = f"{name} {variant}"
        if record.has_time(what, 20):
            with record.part(what):
                runner = Runner(create_model(name, variant), images, setting)
                record.add(table, what, step_seconds(runner.train, device))
            runner = None
            torch._dynamo.reset()
            free()
