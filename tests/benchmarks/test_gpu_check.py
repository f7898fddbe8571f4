"""`make gpu-check` on a machine without a GPU: what it reports, and that its sections run (tiny, on the CPU)."""

import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import correctness, layers, networks, timeline
from benchmarks.gpu.record import Findings, Record, Table, Target
from tools.profiling.measure import Extent, Row, Subject
from tools.profiling.runner import Setting
from tools.profiling.shapes import parse_shape

CPU = torch.device("cpu")


@pytest.fixture
def record(tmp_path) -> Record:
    return Record("A section", tmp_path / "section.json", 1000)


def saved(tmp_path) -> Findings:
    return Findings.read(tmp_path / "section.json")


def test_a_part_that_fails_or_lacks_a_package_stops_no_other(record, tmp_path):
    with record.part("loader"):
        import no_such_package  # noqa: F401
    with record.part("model"):
        raise RuntimeError("out of\npaper")
    record.say("It went on.")
    found = saved(tmp_path)
    assert found.skipped == ["loader: no_such_package is not installed here"]
    assert found.failed == ["model: RuntimeError: out of"]
    assert found.sentences == ["It went on."]


def test_every_row_is_saved_when_it_is_added(record, tmp_path):
    table = record.table("Rates", "form", "images/s")
    record.add(table, "static", 2500.0)
    assert saved(tmp_path).tables == [Table("Rates", ["form", "images/s"], [["static", 2500.0]])]
    record.add(table, "ours", None)
    assert saved(tmp_path).tables[0].rows == [["static", 2500.0], ["ours", None]]


def test_what_there_is_no_time_for_is_named(tmp_path):
    record = Record("A section", tmp_path / "section.json", 10)
    assert record.has_time("this", 5)
    assert not record.has_time("that", 50)
    assert saved(tmp_path).skipped == ["that: out of time"]


def test_the_report_says_what_was_reached_missed_and_not_measured():
    section = Findings(
        "Models",
        tables=[Table("Rates", ["form", "images/s"], [["ours", 2512.4]]), Table("Empty", ["a"])],
        targets=[
            Target("rate", 2500.0, 2512.4),
            Target("ratio", 0.9, 0.85),
            Target("gaps", 3.0, 2.0, at_most=True),
            Target("other", 1.0, None),
        ],
        skipped=["DALI: not installed"],
        failed=["compiled: too large"],
    )
    text = gpu_check.report({"gpu": "one"}, [section], 100, rehearsal=False)
    for line in (
        "| rate | 2,500 | 2,512 | reached |",
        "| ratio | 0.9 | 0.85 | missed |",
        "| gaps | 3 | 2 | reached |",
        "| other | 1 | – | not measured |",
        "| ours | 2,512 |",
        "- skipped: DALI: not installed",
        "- compiled: too large",
        "gpu one; 100 s.",
    ):
        assert line in text.splitlines(), text
    assert "Empty" not in text and "rehearsal" not in text
    assert "no figure below means anything" in gpu_check.report({}, [], 1, rehearsal=True)


def test_the_sections_fit_into_nine_minutes():
    assert sum(max(beside.values()) for beside in gpu_check.SECTIONS) <= gpu_check.LIMIT_S < 9 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines() == [
        "error: PyTorch sees no GPU here: check the driver and PyTorch's CUDA build, or use --rehearse"
    ]


# Every Python that is started reads it, and finds no other packages than on a machine with PyTorch and pytest alone.
BARE_MACHINE = """
import sys
absent = {"tyro", "tqdm", "ffcv", "nvidia.dali", "sklearn", "psutil", "matplotlib", "tensorboard", "hypothesis"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *where):
        return None if name in absent else self.finder.find_spec(name, *where)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture
def bare_machine(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BARE_MACHINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def test_it_needs_pytorch_torchvision_and_pytest_alone(bare_machine, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", tmp_path / "out", "--rehearse", "--only"]
    command += ["correctness", "layers", "timeline"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / "out/gpu_check.json").read_text())
    correctness_, layers_, timeline_ = content["sections"]
    assert correctness_["sentences"] and layers_["tables"][0]["rows"]
    assert timeline_["skipped"] == ["timeline: tqdm is not installed here"]


def test_a_section_that_takes_too_long_is_cut_off_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "SECTIONS", ({"networks": 0.5}, {"correctness": 100}))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out"), "--rehearse"])
    with pytest.raises(SystemExit, match="error: something failed"):
        gpu_check.main()
    content = json.loads((tmp_path / "out/gpu_check.json").read_text())
    cut, after = content["sections"]
    assert cut["failed"] == ["networks: cut off at its time limit"]
    assert after["failed"] == []
    assert re.search(r"^Tests marked gpu: [1-9]\d* passed", after["sentences"][0])
    assert (tmp_path / "out/gpu_check.md").read_text() == capsys.readouterr().out


def test_pytests_summary_is_read(record, tmp_path):
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'no'\n"
        "def test_none(): pytest.skip('needs a moon')\n"
    )
    (tmp_path / "test_four.py").write_text("import no_such_package\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *correctness.SUMMARY, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    correctness.read_summary(record, done.stdout)
    found = saved(tmp_path)
    assert found.sentences[0].startswith("Tests marked gpu: 1 failed, 1 passed, 1 skipped, 1 error in ")
    assert found.skipped == ["tests: [1] test_three.py:4: needs a moon"]
    assert found.failed[0] == "test_three.py::test_bad: AssertionError: no"
    assert found.failed[1].startswith("test_four.py") and len(found.failed) == 2


def test_that_no_test_passed_is_a_failure(record, tmp_path):
    correctness.read_summary(record, "ERROR: file not found\n")
    assert saved(tmp_path).failed == ["tests marked gpu: none passed: ERROR: file not found"]


def test_the_union_of_intervals():
    assert timeline.busy_us([(0, 10), (5, 12), (20, 25), (21, 22)]) == 17


def test_gaps_and_kinds_of_a_time_line(record, tmp_path):
    """Two streams; the device has nothing to do from 80 to 100."""
    trace = {
        "traceEvents": [
            {"cat": "kernel", "name": "sm90_xmma_fprop_implicit_gemm", "ts": 0, "dur": 60},
            {"cat": "kernel", "name": "void at::native::batch_norm_backward", "ts": 40, "dur": 40},
            {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 100, "dur": 2},
            {"cat": "kernel", "name": "vectorized_elementwise_kernel", "ts": 102, "dur": 98},
            {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500},
            {"cat": "kernel", "name": "begins only", "ts": 0},
        ]
    }
    events = timeline.device_events(trace, ("kernel", "gpu_memcpy"))
    timeline.summarise(record, events, steps=1)
    found = saved(tmp_path)
    assert found.sentences[0].startswith("1 steps of 0.2 ms: the GPU works for 90.0 % of them, on 4 kernels a step")
    kinds = {row[0]: row[3] for row in found.tables[0].rows}
    assert kinds == {"element by element": 1, "convolutions": 1, "batch norm": 1, "copies": 1}
    assert found.targets == [Target(found.targets[0].what, 3.0, pytest.approx(10), at_most=True)]
    assert found.sentences[0].endswith(" 1 of the kernels take less than 3 µs.")
    assert timeline.kind_of("_combine_forward") == "our kernels"
    assert timeline.kind_of("triton_poi_fused_add_1") == "compiled"


def test_the_floor_of_a_layer():
    """Counted by hand: x (2, 64, 56, 56) three times, y (2, 256, 28, 28) twice, in two bytes; weights in eight."""
    shape = parse_shape("64x256k1s2@56")
    assert layers.floor_bytes(shape, 100, 2) == 2 * (3 * 2 * 64 * 56**2 + 2 * 2 * 256 * 28**2) + 8 * 100
    conv = layers.create_layer(shape, "static")
    assert layers.floor_operations(conv, shape, 2) == 2 * 3 * 2 * (64 * 256 * 28**2)


@pytest.mark.parametrize("text, usual", [("64x256k1s1@56", "dcd fused kernels"), ("512x64k1s1@7", "dcd fused maps")])
def test_a_layers_own_way_is_known(text, usual):
    shape, strided = parse_shape(text), parse_shape("64x64k3s2@56")
    assert layers.ways_of(shape, CPU) == ["static", "dcd fused kernels", "dcd fused maps"]
    assert layers.usual_way(shape, CPU) == usual
    assert layers.ways_of(strided, CPU) == ["static", layers.usual_way(strided, CPU)] == ["static", "dcd fused maps"]


def test_layers_are_measured_in_both_ways(record, tmp_path):
    layers.run(record, CPU, rehearsal=True)
    found = saved(tmp_path)
    assert found.failed == found.skipped == []
    rows = [dict(zip(found.tables[0].columns, row, strict=True)) for row in found.tables[0].rows]
    assert [row["way"] for row in rows] == 2 * ["static", "dcd fused kernels", "dcd fused maps"]
    for row in rows:
        assert row["to floor"] == pytest.approx(row["kernels ms"] / row["floor ms"]) and row["kernels ms"] > 0
    assert found.sentences[1].startswith("These layers, each as often as ResNet-50 has it: static ")
    assert "ours" in found.sentences[1]


def test_networks_are_measured_beside_the_static_one(record, tmp_path):
    networks.run(record, CPU, rehearsal=True)
    found = saved(tmp_path)
    assert found.failed == found.skipped == []
    (table,) = found.tables
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["variant"], row["way"]) for row in rows] == [
        ("static", "eager"),
        ("dcd auto", "eager"),
        ("static", "DataParallel"),
        ("dcd reference", "DataParallel"),
        ("static", "compiled"),
    ]
    for row in rows:
        assert row["network"] == "resnet18" and row["inference images/s"] > 0
        assert row["ms a step"] == pytest.approx(1000 * row["batch"] / row["training images/s"])
        assert (row["folded images/s"] is not None) == (row["way"] == "eager")
    for static, dynamic in (rows[:2], rows[2:4]):  # of one round
        assert dynamic["to static"] == pytest.approx(dynamic["training images/s"] / static["training images/s"])
        assert static["to static"] == 1
    assert {target.found for target in found.targets} == {None}, "no figure is of this network"


def row(name: str, variant: str, mode: str, rate: float, to_static: float) -> tuple[tuple[str, str, str], Row]:
    rates = (1000 / rate, rate, to_static)
    what = (name, "", 1, variant, "channels_last", "bf16", mode, 256)
    return (name, variant, mode), Row(*what, 1, 1, 1.0, None, {}, *rates, *rates)


def test_figures_are_compared_with_their_own_kind(record, tmp_path):
    found = dict(
        [
            row("resnet50", "dcd auto", "eager", 2400, 0.85),
            row("resnet50", "dcd auto", "CUDA graph", 2600, 0.93),
            row("resnet50", "dcd reference", "DataParallel", 800, 0.3),
            row("resnet50", "dcd auto", "compiled", 2700, 0.9),
            row("resnet50", "static", "compiled", 3000, 1.0),
            row("mobilenetv2", "dcd auto", "eager", 4000, 0.71),
        ]
    )
    networks.report_targets(record, found)
    assert [target.found for target in saved(tmp_path).targets] == [0.85, 0.9, 3.0, 2700, 0.71]


def test_a_network_that_does_not_fit_gets_half_the_batch(record):
    class Large(torch.nn.Module):
        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("too large")
            return x.flatten(1) @ self.weight

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(12, 2))

    subject = Subject("large", "", 1, (3, 2, 2), lambda variant: Large())
    group = networks.Group("large", Setting(), ("static",))
    rows = networks.measure_what_fits(record, subject, group, Extent(CPU, 8, 1, 0.001))
    assert [found.batch_size for found in rows] == [2] and record.findings.failed == []
    assert len(record.findings.sentences) == 2
