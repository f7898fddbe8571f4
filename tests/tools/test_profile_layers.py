"""The profiler of layers: the shapes it finds, its measures on modules that can be checked by hand, what it writes."""

import json
import statistics
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import dcd
from dcd.layers import FORMS, DCDConv2d, NormAct, available_paths
from dcd.layers.rivals import RIVALS
from tools.profile_layers import main
from tools.profiling.layer_report import layer_sums, tables
from tools.profiling.measure import Extent, Subject, measure
from tools.profiling.parts import REST, parts_of, time_by_part
from tools.profiling.report import show
from tools.profiling.runner import Runner, Setting, saved_bytes, storage_bytes
from tools.profiling.shapes import ShapeError, parse_shape, shapes_of
from tools.profiling.variants import (
    NETWORKS,
    PLAIN,
    STATIC,
    all_variants,
    create_layer,
    create_model,
    has_layer,
    has_model,
    other_variants,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EAGER = Setting()


def test_a_shape_is_read_and_written_back():
    shape = parse_shape("64x256k1s2@56")
    assert (shape.in_channels, shape.out_channels, shape.kernel_size, shape.stride, shape.size) == (64, 256, 1, 2, 56)
    assert (shape.latent_dim, shape.squeeze_dim, shape.pool_size) == (8, 4, 1)  # ⌊√64⌋, 64 // 16
    assert str(shape) == "64x256k1s2@56"


@pytest.mark.parametrize(
    "text",
    ["", "64x256", "64x256k1s1", "64x256k1s1@56x56", "64x256k2s1@56", "8x64k1s1@7", "64x64k3s0@7", "64x64k3s1@0"],
)
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ShapeError, match=repr(text)):
        parse_shape(text)


def test_the_layers_of_resnet50():
    shapes = shapes_of("resnet50", 224)
    assert shapes.total() == 48
    # Four shapes in the first stage; in the others the first block's first two convolutions stand alone.
    stages = [
        {"64x64k1s1@56": 1, "64x64k3s1@56": 3, "64x256k1s1@56": 3, "256x64k1s1@56": 2},
        {"256x128k1s1@56": 1, "128x128k3s2@56": 1, "128x512k1s1@28": 4, "512x128k1s1@28": 3, "128x128k3s1@28": 3},
        {"512x256k1s1@28": 1, "256x256k3s2@28": 1, "256x1024k1s1@14": 6, "1024x256k1s1@14": 5, "256x256k3s1@14": 5},
        {"1024x512k1s1@14": 1, "512x512k3s2@14": 1, "512x2048k1s1@7": 3, "2048x512k1s1@7": 2, "512x512k3s1@7": 2},
    ]
    expected = {text: count for stage in stages for text, count in stage.items()}
    assert {str(shape): count for shape, count in shapes.items()} == expected
    assert {shape.latent_dim for shape in shapes} == {8, 11, 16, 22, 32, 45}
    assert parse_shape("256x64k1s1@56") in shapes  # a given shape is ResNet-50's layer


@pytest.mark.parametrize(("network", "count", "pool_sizes"), [("resnet18", 16, {2}), ("mobilenetv2", 32, {1, 2})])
def test_the_layers_of_other_networks_have_the_sizes_of_their_modules(network, count, pool_sizes):
    shapes = shapes_of(network, 96)
    assert shapes.total() == count and {shape.pool_size for shape in shapes} == pool_sizes
    layers = [layer for layer in create_model(network, "dcd reference").modules() if isinstance(layer, DCDConv2d)]

    def sizes(layer):
        return tuple(sorted((name, tuple(p.shape)) for name, p in layer.named_parameters()))

    found = Counter({sizes(create_layer(shape, "dcd reference")): 0 for shape in shapes})
    for shape, number in shapes.items():
        found[sizes(create_layer(shape, "dcd reference"))] += number
    assert found == Counter(map(sizes, layers))


def test_variants():
    assert NETWORKS == ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenetv2"]
    variants = all_variants(CPU)
    dcd_variants = tuple(f"dcd {path}" for path in available_paths(CPU))
    assert variants == (STATIC, *RIVALS, *dcd_variants) and "dcd reference" in variants
    assert all(has_model("resnet18", variant) and has_model("resnet50", variant) for variant in variants)
    layer = create_layer(parse_shape("16x32k3s2@9"), "dcd reference")
    assert isinstance(layer, DCDConv2d) and (layer.path, layer.form) == ("reference", "auto")
    in_forms = tuple(f"{name} {form}" for name in dcd_variants if name != "dcd reference" for form in FORMS)
    assert other_variants(CPU) == (PLAIN, "dcd auto", *in_forms) and "dcd fused maps" in in_forms
    layer = create_layer(parse_shape("16x32k1s1@9"), "dcd fused kernels")
    assert (layer.path, layer.form) == ("fused", "kernels")
    plain = [module for module in create_model("resnet18", PLAIN).modules() if isinstance(module, NormAct)]
    assert {module.path for module in plain} == {"reference"}
    assert has_model("resnet18", PLAIN) and not has_layer(parse_shape("16x32k1s1@9"), PLAIN)


def test_saved_for_backward_counts_each_piece_of_memory_once_and_no_parameter():
    linear = nn.Linear(3, 5)
    x = torch.randn(4, 3)

    def forward():
        hidden = torch.relu(linear(x))  # saves x (4×3) for the weight, its own output (4×5)
        return (hidden * hidden.view(20).view(4, 5)).sum()  # saves hidden twice again

    weight = linear.weight
    assert saved_bytes(forward, linear.parameters()) == 4 * (4 * 3 + 4 * 5)
    x.requires_grad_()  # then linear saves its weight, too
    assert saved_bytes(forward, linear.parameters()) == 4 * (4 * 3 + 4 * 5)
    assert saved_bytes(forward, []) == 4 * (4 * 3 + 4 * 5 + 5 * 3)
    assert storage_bytes([weight, weight.t(), weight[0], x]) == 4 * (5 * 3 + 4 * 3)


def test_peak_memory_is_that_of_one_variant(monkeypatch):
    """The GPU's counters are played: others hold 1000 bytes, and at the peak 5000 are allocated."""
    runner = Runner(nn.Conv2d(2, 3, 1), torch.zeros(2, 2, 4, 4), EAGER)
    assert runner.peak_mib() is None  # on a CPU
    own = 4 * (2 * (2 * 3 + 3) + 2 * 2 * 4 * 4 + 2 * 3 * 4 * 4)  # weight and bias with their momenta, x, y's gradient
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000 + own)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    assert runner._peak_bytes() == 5000 - 1000


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_does_not_depend_on_what_others_hold():
    device = torch.device("cuda")
    x = torch.randn(8, 64, 56, 56, device=device)

    def peak():
        return Runner(nn.Conv2d(64, 64, 3, padding=1), x, EAGER).peak_mib()

    alone = peak()
    others = torch.empty(64 * 2**20, device=device)
    assert peak() == pytest.approx(alone, rel=0.01)
    assert alone * 2**20 >= 2 * x.nbytes  # x and y
    del others


def test_the_parts_of_a_layer_are_the_layer():
    torch.manual_seed(0)
    layer = create_layer(parse_shape("16x32k3s2@9"), "dcd reference").double()
    x = torch.randn(3, 16, 9, 9, dtype=torch.float64)
    parts = parts_of(layer, x, lambda: EAGER.autocast(CPU))
    (last,) = list(parts.values())[-1].outputs
    torch.testing.assert_close(last, layer(x), rtol=1e-12, atol=1e-12)
    for part in parts.values():
        part.backward()
        part.forward()
    trained = [id(p) for part in parts.values() for p in part.sources[len(part.inputs) :]]
    assert sorted(trained) == sorted(map(id, layer.parameters()))  # each parameter belongs to one part


def test_every_variant_is_compiled_and_the_memory_it_saves_is_seen():
    """Without machine code, which would take minutes; with more compilations of one function than the usual limit."""
    compiled = []

    def count(graph, _):
        compiled.append(graph)
        return make_boxed_func(graph)

    def build(variant):
        return nn.Sequential(create_layer(parse_shape("16x16k3s1@6"), variant))

    setting = Setting(mode="compiled", compiler=aot_autograd(fw_compiler=count))
    subject, variants = Subject("", "layer", 1, (16, 6, 6), build), (*all_variants(CPU)[:4], "dcd reference")
    rows, failures = measure(subject, variants, setting, Extent(CPU, 2, 1))
    assert [row.variant for row in rows] == list(variants) and not failures
    assert len(compiled) >= 2 * len(variants) > 8  # for training and for inference
    eager, _ = measure(subject, variants, EAGER, Extent(CPU, 2, 1))
    assert [row.saved_mib for row in rows] == pytest.approx([row.saved_mib for row in eager], rel=0.01)


def test_a_variant_that_fails_is_reported_and_the_others_go_on():
    def build(variant):
        if variant == "odconv":
            raise RuntimeError("first line\nsecond line")
        return create_layer(parse_shape("16x16k1s1@4"), variant)

    subject = Subject("resnet18", "layer", 1, (16, 4, 4), build)
    rows, failures = measure(subject, (STATIC, "odconv", "se"), EAGER, Extent(CPU, 2, 1))
    assert [row.variant for row in rows] == [STATIC, "se"]
    assert failures == ["resnet18 layer odconv, fp32, channels_last, eager: RuntimeError: first line"]
    assert failures[0] in tables(rows, [], failures)[-1]
    rows, failures = measure(subject, ("odconv", "se"), EAGER, Extent(CPU, 2, 1))
    assert rows == [] and len(failures) == 1  # nothing to compare with


def test_a_network_s_sums_count_each_layer_as_often_as_it_occurs():
    rows = []
    for text, count in (("16x16k1s1@4", 3), ("16x32k1s1@4", 2)):
        subject = Subject("network", text, count, (16, 4, 4), partial(create_layer, parse_shape(text)))
        rows += measure(subject, (STATIC, "se"), EAGER, Extent(CPU, 2, 2))[0]
    static, se = layer_sums(rows).splitlines()[2:]
    expected = 3 * rows[0].forward_ms + 2 * rows[2].forward_ms
    millions = (3 * 16 * 16 * 16 + 2 * 16 * 16 * 32) / 1e6
    assert static.split(" | ")[1] == "5" and static.split(" | ")[3] == show(expected)
    assert float(static.split(" | ")[2]) == pytest.approx(millions, rel=0.01)
    assert se.startswith("| se | 5 | ")
    _, one = layer_sums(rows[:3]).splitlines()[2:]  # the second layer as static alone: se is compared over the first
    assert one.startswith("| se | 3 | ") and f" | {show(rows[0].training_ms / rows[1].training_ms)} | " in one


# A real run


FLAGS = {
    "--models": "mobilenetv2",
    "--layers": "mobilenetv2",
    "--shapes": "16x32k3s2@9",
    "--size": "32",
    "--batch-size": "2",
    "--rounds": "2",
    "--device": "cpu",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """What one run writes, of a name with a dot."""
    out = tmp_path_factory.mktemp("profile") / "runs" / "layers.v1"
    command = [sys.executable, "-m", "tools.profile_layers", *chain(*FLAGS.items()), "--fold", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.with_name("layers.v1.md").read_text()
    return out


@pytest.fixture(scope="module")
def record(out) -> dict:
    return json.loads(out.with_name("layers.v1.json").read_text())


def test_a_run_measures_every_variant_of_everything(record):
    rows, variants = record["rows"], list(all_variants(CPU))
    assert {(row["memory_format"], row["precision"], row["mode"]) for row in rows} == {
        ("channels_last", "fp32", "eager")
    }
    networks = [row["variant"] for row in rows if not row["layer"]]
    assert networks == [name for name in variants if has_model("mobilenetv2", name)]
    assert {STATIC, "dcd reference"} <= set(networks)
    for shape, count in shapes_of("mobilenetv2", 32).items():
        found = [r for r in rows if (r["network"], r["layer"], r["count"]) == ("mobilenetv2", str(shape), count)]
        assert [row["variant"] for row in found] == variants
    assert [row["variant"] for row in rows if (row["network"], row["layer"]) == ("", "16x32k3s2@9")] == variants
    assert record["failures"] == []


def test_the_figures_of_a_run_agree_with_its_rounds(record):
    static = None
    for row in record["rows"]:
        static = row if row["variant"] == STATIC else static
        rounds = row["rounds_ms"]
        assert all(len(times) == 2 and min(times) > 0 for times in rounds.values())
        for name in ("forward", "backward", "update", "training", "inference", "folded"):
            assert row[f"{name}_ms"] == statistics.median(rounds[name])
        parts = zip(rounds["forward"], rounds["backward"], rounds["update"], strict=True)
        assert rounds["training"] == pytest.approx([sum(part) for part in parts])
        for mode in ("training", "inference", "folded"):
            assert row[f"{mode}_images_per_sec"] == pytest.approx(2000 / statistics.median(rounds[mode]))
            quotients = [a / b for a, b in zip(static["rounds_ms"][mode], rounds[mode], strict=True)]
            assert row[f"{mode}_to_static"] == pytest.approx(statistics.median(quotients))
        assert row["saved_mib"] > 0 and row["peak_mib"] is None


def test_the_figures_of_the_networks_are_those_of_the_models(record):
    for row in record["rows"]:
        if not row["layer"]:
            model = create_model(row["network"], row["variant"])
            assert row["parameters"] == sum(p.numel() for p in model.parameters())
            assert row["multiply_adds"] == dcd.count_macs(model, 32)


def test_the_parts_of_every_layer_are_timed(record):
    times, shapes = record["parts"], shapes_of("mobilenetv2", 32)
    parts = [time["part"] for time in times]
    assert parts == parts[:6] * len(shapes) and parts[5] == REST
    for time in times:
        assert time["part"] == REST or min(time["forward_ms"], time["backward_ms"]) > 0
    assert [(t["layer"], t["count"]) for t in times[::6]] == [(str(shape), n) for shape, n in shapes.items()]


def test_the_tables_show_the_record(out, record):
    text = out.with_name("layers.v1.md").read_text()
    for head in ("## fp32, channels_last, eager", "### Networks", "### Layers given"):
        assert text.count(f"\n{head}\n") == 1
    for head in ("All dynamic convolutions", "Layers", "Parts of the DCD layers"):
        assert text.count(f"\n### {head} of mobilenetv2") == 1
    assert "saved for backward MiB" in text and "folded to static" in text
    row = record["rows"][1]
    cells = f"| mobilenetv2 | {row['variant']} | {row['parameters'] / 1e6:.3g} | {row['multiply_adds'] / 1e6:.3g} |"
    (line,) = [line for line in text.splitlines() if line.startswith(cells)]
    assert line.split(" | ")[9] == f"{row['training_to_static']:.3g}"
    assert "peak memory MiB" not in text  # there is none on a CPU
    pool = [time for time in record["parts"] if time["part"] == "pool"]
    sums = [sum(time["count"] * time[name] for time in pool) for name in ("forward_ms", "backward_ms")]
    assert f"\n| pool | {sums[0]:.3g} | {sums[1]:.3g} |" in text


def test_the_plots_are_pictures(out):
    written = sorted(path.name for path in out.parent.iterdir())
    assert written == ["layers.v1.json", "layers.v1.md", "layers.v1_networks.png", "layers.v1_parts.png"]
    for name in written[2:]:
        data = out.with_name(name).read_bytes()
        width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        assert data.startswith(b"\x89PNG") and min(width, height) > 300 and len(data) > 10_000


def test_flags_widen_a_run(tmp_path, capsys):
    main(
        models=(),
        layers=(),
        shapes=("16x16k1s1@5",),
        variants=("se", "dcd reference", "dcd auto"),
        batch_size=2,
        rounds=1,
        device="cpu",
        memory_formats=("nchw", "channels_last"),
        amp=("off", "bf16"),
        out=tmp_path / "wide",
    )
    rows = json.loads((tmp_path / "wide.json").read_text())["rows"]
    settings = [(form, precision) for form in ("nchw", "channels_last") for precision in ("fp32", "bf16")]
    names = (STATIC, "se", "dcd reference", "dcd auto")  # static is always measured
    found = [(row["memory_format"], row["precision"], row["variant"]) for row in rows]
    assert found == [(*setting, name) for setting in settings for name in names]
    saved = {row["precision"]: row["saved_mib"] for row in rows if row["variant"] == "dcd reference"}
    assert saved["bf16"] < saved["fp32"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide.json", "wide.md"]  # nothing to plot
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("## ")]
    assert heads == [f"## {precision}, {form}, eager" for form, precision in settings]


def test_the_parts_of_a_layer_in_mixed_precision():
    setting = Setting("channels_last", "bf16", "eager")
    times = time_by_part("resnet50", parse_shape("16x16k1s1@5"), 2, setting, Extent(CPU, 2, 1))
    assert len(times) == 6 and {(time.count, time.precision) for time in times} == {(2, "bf16")}


def test_windows_in_other_modes_beside_the_floor(tmp_path, capsys):
    main(
        models=(),
        layers=(),
        shapes=("16x16k1s1@5", "16x32k3s2@9"),
        variants=("dcd fused maps", "dcd fused kernels"),
        batch_size=4,
        rounds=2,
        device="cpu",
        modes=("eager", "CUDA graph"),
        window_s=0.01,
        inference=False,
        floor=True,
        out=tmp_path / "wide",
    )
    rows = json.loads((tmp_path / "wide.json").read_text())["rows"]
    names = [STATIC, "dcd fused maps", "dcd fused kernels"]
    found = [(row["mode"], row["layer"], row["variant"]) for row in rows]
    layers = [("16x16k1s1@5", name) for name in names] + [("16x32k3s2@9", name) for name in names[:2]]
    assert found == [(mode, *layer) for mode in ("eager", "CUDA graph") for layer in layers]
    static = rows[3]
    # x (4, 16, 9, 9) three times and y (4, 32, 5, 5) twice, and each weight seven times
    moved = 4 * (3 * 4 * 16 * 9**2 + 2 * 4 * 32 * 5**2 + 7 * 32 * 16 * 3**2)
    assert static["floor"]["mb"] == pytest.approx(moved / 1e6)
    assert static["floor"]["gflop"] == pytest.approx(2 * 3 * 4 * 5**2 * 32 * 16 * 3**2 / 1e9)
    for row in rows:
        assert len(row["rounds_ms"]["training"]) == 2 and row["inference_ms"] is row["forward_ms"] is None
        assert row["training_ms"] > 0 and row["floor"]["ms"] > 0 and row["first_step_s"] > 0
    text = capsys.readouterr().out
    assert "| training to floor |" in text and "inference" not in text.partition("\n## ")[2]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ("resnet51",)}, "--models resnet51: use resnet18, "),
        ({"layers": ("resnet50_dcd",)}, "--layers resnet50_dcd: use resnet18, "),
        ({"variants": ("dcd",)}, "--variants dcd: use static, se, "),
        ({"shapes": ("64x64k2s1@7",)}, "'64x64k2s1@7': channels must"),
        ({"batch_size": 1}, "--batch-size 1: must be at least 2"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 2"),
        ({"size": 31}, "--size 31: must be at least 32"),
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"models": (), "layers": ()}, "nothing to measure"),
        ({"memory_formats": ()}, "nothing to measure"),
        ({"out": Path("/dev/null/layers")}, "/dev/null"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(**{"device": "cpu", **arguments})
    assert stop.value.code.startswith("error: ") and message in stop.value.code and "\n" not in stop.value.code


def test_bad_input_ends_the_process_with_a_code(tmp_path):
    command = [sys.executable, "-m", "tools.profile_layers", "--shapes", "64x256", "--out", tmp_path / "layers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: '64x256' is no shape") and done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(SystemExit, match="error: --device cuda: there is no GPU"):
        main(device="cuda")
