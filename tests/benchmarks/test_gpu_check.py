"""`make gpu-check` on a machine without a GPU: what it reports, and that its sections run (tiny, on the CPU)."""

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks import gpu_check
from benchmarks.gpu import section as gpu_section
from benchmarks.gpu import sections, timeline
from benchmarks.gpu.section import Findings, Section, Target
from benchmarks.gpu.timeline import Event


@pytest.fixture
def section(tmp_path) -> Section:
    return Section("A section", tmp_path, time.monotonic() + 100, rehearsal=True)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_program_that_fails_or_lacks_a_package_stops_no_other(section):
    programs = {
        "loader": "import no_such_package",
        "model": "import sys; sys.exit('error: out of paper')",
        "decoder": "import os; os.abort()",
        "printer": "print('it went on')",
    }
    for what, code in programs.items():
        section.judge(what, *section.run(what, python(code)))
    assert section.found.skipped == ["loader: no_such_package is not installed here"]
    assert section.found.failed == ["model: out of paper", "decoder: ended by signal 6: no output"]


def test_a_program_that_lists_its_failures_is_not_said_to_have_failed_once_more(section):
    listed = ["static: OutOfMemoryError: too large", "ours: RuntimeError: no"]
    section.judge("eager", 1, "error: not everything could be measured", listed)
    assert section.found.skipped == ["eager: static: OutOfMemoryError: too large"]
    assert section.found.failed == ["eager: ours: RuntimeError: no"]


def test_after_an_error_beside_others_no_program_goes_on(section):
    def fail():
        time.sleep(1)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        section.at_the_same_time(lambda: [section.run("long", python("import time; time.sleep(99)"))] * 2, fail)
    assert section.run("more", python("")) == (None, "")


def test_what_there_is_no_time_for_is_named(section, monkeypatch):
    monkeypatch.setattr(gpu_section, "LEAST_S", 2)
    section.deadline = time.monotonic() + 3
    script = "import time\nwhile True:\n    try: time.sleep(9)\n    except KeyboardInterrupt: print('so far'); raise"
    code, output = section.run("this", python(script))
    assert code is None and output.startswith("so far")
    assert section.run("that", python("")) == (None, "")
    assert section.found.failed == ["this: cut off at its time limit"]
    assert section.found.skipped == ["that: out of time"]


def test_what_a_program_wrote_before_it_failed_is_kept(section):
    (section.folder / "too_small.json").write_text('{"rows": [1], "failures": ["first", "second"]}')
    found = section.measure("too small", "tools.profile_layers", device="cpu", size=31)
    assert found == section.found.figures["too small"] == {"rows": [1], "failures": ["first", "second"]}
    assert section.found.failed == ["too small: first", "too small: second"]
    (section.folder / "too_small.json").unlink()
    assert section.measure("too small", "tools.profile_layers", device="cpu", size=31) == {}
    assert section.found.failed[2:] == ["too small: --size 31: must be at least 32"]


def test_what_a_program_reports_is_taken_over(section, monkeypatch):
    """But for the machine, and notes that stand there already."""
    out = section.folder / "one_thing"
    monkeypatch.setattr(section, "run", lambda *_: (0, ""))
    out.with_suffix(".json").write_text('{"rows": []}')
    out.with_suffix(".md").write_text("a machine\n\nA note.\n\n## bf16\n\n### Networks\n\n| static | 1 |\n")
    for _ in range(2):
        section.measure("one thing", "a.program")
    tables = ["### one thing", "#### bf16", "##### Networks", "| static | 1 |"]
    assert section.found.text == [tables[0], "A note.", *tables[1:], *tables[:3]]


def test_the_report_says_what_was_reached_missed_and_not_measured():
    section = Findings(
        "Models",
        text=["**Rates**", "| ours | 2,512 |"],
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
    assert "rehearsal" not in text
    assert "no figure below means anything" in gpu_check.report({}, [], 1, rehearsal=True)


def test_the_sections_fit_into_nine_minutes():
    assert sum(gpu_check.SECTIONS.values()) <= gpu_check.LIMIT_S < 9 * 60


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
    command += ["networks", "layers", "loaders", "timeline"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    content = json.loads((tmp_path / "out/gpu_check.json").read_text())
    networks, layers, loaders, last = content["sections"]
    for found in (networks, layers):
        assert found["failed"] == found["skipped"] == []
    rows = {what: networks["figures"][what]["rows"] for what in sections.REHEARSED}
    measured = {what: [(row["variant"], row["mode"]) for row in found] for what, found in rows.items()}
    assert measured == {
        "eager": 2 * [("static", "eager"), ("dcd auto", "eager")],
        "compiled": 2 * [(variant, "compiled") for variant in ("static", "dcd reference", "dcd fused")],
    }
    text = (tmp_path / "out/gpu_check.md").read_text()
    for head in ("## Networks", "### eager", "### compiled", "##### Layers given", "## Layers"):
        assert f"\n{head}\n" in text
    assert {target["found"] for target in networks["targets"]} == {None}, "no figure is of a network"
    assert len(layers["figures"]["layers"]["rows"]) == 2 * 5 and "| above the floor ms |" in text
    assert loaders["skipped"] == ["fake ImageNet: sklearn is not installed here"]
    assert last["skipped"] == ["time line: tqdm is not installed here"]


def test_a_section_that_takes_too_long_is_cut_off_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_section, "LEAST_S", 1)
    monkeypatch.setattr(gpu_check, "LIMIT_S", 100)
    monkeypatch.setattr(gpu_check, "SECTIONS", {"networks": 2, "layers": 97})
    short = python("print('ran')")
    monkeypatch.setattr(sections, "layers", lambda section: section.found.text.append(section.run("short", short)[1]))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out"), "--rehearse"])
    with pytest.raises(SystemExit, match="error: something failed"):
        gpu_check.main()
    content = json.loads((tmp_path / "out/gpu_check.json").read_text())
    cut, after = content["sections"]
    assert cut["failed"] == ["eager: cut off at its time limit"]
    assert cut["skipped"] == ["compiled: out of time"]
    assert after["failed"] == [] and after["text"] == ["ran\n"]
    assert (tmp_path / "out/gpu_check.md").read_text() == capsys.readouterr().out


def test_a_section_whose_own_code_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "layers", lambda section: section.found.text.append("It began.") or 1 / 0)
    found = gpu_check.check("layers", tmp_path, time.monotonic() + 100, True)
    assert found.text == ["It began."] and found.failed == ["layers: ZeroDivisionError: division by zero"]


def test_pytests_summary_is_read(section, tmp_path):
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'no'\n"
        "def test_none(): pytest.skip('needs a moon')\n"
    )
    (tmp_path / "test_four.py").write_text("import no_such_package\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sections.SUMMARY, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    sections.read_summary(section, done.stdout)
    found = section.found
    assert found.text[0].startswith("Tests marked gpu: 1 failed, 1 passed, 1 skipped, 1 error in ")
    assert found.skipped == ["tests: [1] test_three.py:4: needs a moon"]
    assert found.failed[0] == "test_three.py::test_bad: AssertionError: no"
    assert found.failed[1].startswith("test_four.py") and len(found.failed) == 2


def test_that_no_test_passed_is_a_failure(section):
    sections.read_summary(section, "ERROR: file not found\n")
    assert section.found.failed == ["tests marked gpu: none passed: ERROR: file not found"]


def test_the_tests_run(section):
    sections.run_tests(section)
    assert section.found.failed == [] and section.found.text[0].startswith("Tests marked gpu: 4 passed")


def test_gaps_and_kinds_of_a_time_line():
    """Two streams; the device has nothing to do from 80 to 100, and for a moment before the last kernel."""
    events = [
        Event("sm90_xmma_fprop_implicit_gemm", 0, 60),
        Event("void at::native::batch_norm_backward", 40, 80),
        Event("Memcpy DtoD", 100, 102),
        Event("vectorized_elementwise_kernel", 106, 200),
    ]
    assert timeline.gaps_us(events) == [20, 4]
    (sentence, kinds, most), gaps = timeline.summarise(events, steps=1)
    assert gaps == pytest.approx(10)
    assert sentence.startswith("1 steps of 0.2 ms: the GPU works for 88.0 % of them, on 4 kernels a step; ")
    assert "gaps of more than 5 µs take 10.0 %, the shorter ones between kernels 2.0 %." in sentence
    assert sentence.endswith(" 1 of the kernels take less than 3 µs.")
    calls = {line.split(" | ")[0]: line.split(" | ")[3] for line in kinds.splitlines()[2:]}
    assert calls == {f"| {kind}": "1" for kind in ("element by element", "convolutions", "batch norm", "copies")}
    assert most.splitlines()[-1] == "| the 0 others | 0 |"
    assert timeline.kind_of("_combine_forward") == "our kernels"
    assert timeline.kind_of("triton_poi_fused_add_1") == "compiled"


def test_what_ran_on_a_device_is_in_order():
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.mm(torch.ones(3, 3), torch.ones(3, 3)).exp()
    events = timeline.device_events(profiler, DeviceType.CPU)
    names = [event.name for event in events]
    assert names.index("aten::mm") < names.index("aten::exp") and all(event.end >= event.start for event in events)
    assert timeline.device_events(profiler, DeviceType.CUDA) == []


def row(network: str, variant: str, mode: str, rate: float, to_static: float) -> dict:
    figures = {"training_images_per_sec": rate, "training_to_static": to_static}
    return {"network": network, "variant": variant, "mode": mode, **figures}


def test_figures_are_compared_with_their_own_kind(section):
    rows = [
        row("resnet50", "dcd auto", "eager", 2400, 0.85),
        row("resnet50", "dcd auto", "CUDA graph", 2600, 0.93),
        row("resnet50", "dcd reference", "DataParallel", 800, 0.3),
        row("resnet50", "dcd reference", "compiled", 2500, 0.8),
        row("resnet50", "dcd fused", "compiled", 2700, 0.9),
        row("resnet50", "static", "compiled", 3000, 1.0),
        row("mobilenetv2", "dcd auto", "eager", 4000, 0.71),
    ]
    sections.report_targets(section, rows)
    assert [target.found for target in section.found.targets] == [0.85, 0.9, 3.0, 2700, 0.71]


def test_a_network_that_does_not_fit_gets_half_the_batch(section, monkeypatch):
    tried = []

    def profile(section, what, **options):
        tried.append((what, options.get("batch_size")))
        return {"failures": ["resnet50 static: OutOfMemoryError: too large"]} if len(tried) < 3 else {}

    monkeypatch.setattr(sections, "profile", profile)
    sections.networks(section)
    assert tried[:4] == [
        ("eager", None),
        ("eager, 128 images", 128),
        ("eager, 128 images, 64 images", 64),
        ("compiled", None),
    ]
