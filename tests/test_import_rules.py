"""Who may import whom (docs/architecture.md), read from the source; and what `import dcd` pulls in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = set(sys.stdlib_module_names)
OURS = {"dcd", "pipelines", "training", "train_dist", "hubconf", "tools", "benchmarks", "tests"}
# imported where they are used
OPTIONAL = {"nvidia", "ffcv", "triton", "apex", "timm", "onnx", "onnxruntime", "onnxscript", "safetensors"}
OPTIONAL |= {"wandb", "mlflow"}
# are made of an optional package, timm or Triton, so they are imported like it
KERNELS = ("coefficients", "combine", "gradients", "latent", "matrices", "norm", "project")
MADE_OF_OPTIONAL = ("dcd.timm", *(f"dcd.ops.triton_{name}" for name in KERNELS))
NOT_THE_PROJECT = {"build", "dist", "data", "runs", "out"}  # nor hidden folders


def python_files():
    rooms = [path for path in sorted(ROOT.iterdir()) if path.name not in NOT_THE_PROJECT and path.name[0] != "."]
    return [file for room in rooms for file in ([room] if room.suffix == ".py" else sorted(room.rglob("*.py")))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def names_in(node, package):
    """The modules that an import statement names. `from dcd import models` names dcd.models, not dcd alone."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level] + ([base] if base else []))
    inner = [f"{base}.{alias.name}" for alias in node.names]
    return [name if is_module(name) else base for name in inner]


def imports(source, module, is_package=False):
    """(module named, line, whether it is imported when this module is) for each import of a source text."""
    package = module if is_package else module.rpartition(".")[0]
    found = []

    def visit(node, at_once):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend((name, node.lineno, at_once) for name in names_in(node, package))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            at_once = False  # for a reader of types only
        for child in ast.iter_child_nodes(node):
            visit(child, at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), True)
    return found


FILES = {path: imports(path.read_text(), module_name(path), path.name == "__init__.py") for path in python_files()}


def below(name, *packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def broken(package, allowed):
    """Imports by the modules of `package` for which `allowed(name)` is false."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path, found in FILES.items()
        if below(module_name(path), package)
        for name, line, _ in found
        if not allowed(name)
    ]


def test_the_reader_of_imports_finds_every_way_to_import():
    source = """
import dcd.registry as r, numpy
from dcd import models
from dcd.registry import create_model
from . import mobilenet_v2
from .. import layers
from ..layers.dcd_linear import DCDLinear
if TYPE_CHECKING:
    import onnx
try:
    import apex
except ImportError:
    pass
class A:
    import ffcv
def f():
    from nvidia.dali import pipeline
    async def g():
        import triton
"""
    names = [(name, at_once) for name, _, at_once in imports(source, "dcd.models.resnet")]
    assert names == [
        ("dcd.registry", True),
        ("numpy", True),
        ("dcd.models", True),
        ("dcd.registry", True),
        ("dcd.models.mobilenet_v2", True),
        ("dcd.layers", True),
        ("dcd.layers.dcd_linear", True),
        ("onnx", False),
        ("apex", True),
        ("ffcv", True),
        ("nvidia.dali", False),
        ("triton", False),
    ]


def test_every_room_is_read():
    read = {module_name(path) for path in FILES}
    assert {"train_dist", "dcd", "dcd.ops.reference", "training.trainer", "pipelines.plan"} <= read


def stdlib_or_below(name, *packages):
    return name.split(".")[0] in STDLIB or below(name, *packages)


@pytest.mark.parametrize(
    "package, allowed",
    [
        ("dcd.ops", ("torch", "triton", "dcd.ops")),
        ("dcd.layers", ("torch", "dcd.ops", "dcd.layers")),
        ("dcd.models", ("torch", "dcd.layers", "dcd.models", "dcd.registry")),
        ("dcd.registry", ("torch", "dcd.registry")),
    ],
)
def test_ops_layers_models_and_registry_import_only_what_is_below_them(package, allowed):
    assert broken(package, lambda name: stdlib_or_below(name, *allowed)) == []


# Of our own rooms, which one each may import. On top stand train_dist.py, the programs and the tests.
ROOMS_BELOW = {
    "dcd": {"dcd"},
    "pipelines": {"pipelines"},
    "training": {"training", "dcd", "pipelines"},
    "train_dist": {"train_dist", "training"},
    "hubconf": {"hubconf", "dcd"},
    "tools": {"tools", "training", "dcd", "pipelines"},
    "benchmarks": {"benchmarks", "tools", "training", "dcd", "pipelines"},
    "tests": OURS,
}


@pytest.mark.parametrize("room, allowed", ROOMS_BELOW.items())
def test_no_room_imports_one_that_stands_on_it(room, allowed):
    assert broken(room, lambda name: name.split(".")[0] not in OURS - allowed) == []


def test_no_program_is_imported_by_another():
    """What two programs of tools or benchmarks share is a library: tools.profiling, tools.conversion."""
    files = {module_name(path): path for path in FILES}
    programs = {name for name, path in files.items() if 'if __name__ == "__main__"' in path.read_text()}
    programs = {name for name in programs if below(name, "tools", "benchmarks", "train_dist")}
    assert {"tools.profile_layers", "tools.make_dataset", "benchmarks.soak", "train_dist"} <= programs
    assert broken("tools", lambda name: name not in programs) == []
    assert broken("benchmarks", lambda name: name not in programs) == []
    libraries = ("tools.profiling", "tools.conversion")
    assert broken("benchmarks", lambda name: below(name, *libraries) or not below(name, "tools")) == []


@pytest.mark.parametrize("room", ["dcd", "pipelines", "training"])
def test_the_tests_of_a_room_import_no_tool(room):
    """But for the helpers of tests/pipelines, which make .beton files by the converter, and ask for its verdict."""
    found = broken(f"tests.{room}", lambda name: not below(name, "benchmarks", "tools"))
    assert [each for each in found if not each.startswith("tests/pipelines/helpers.py:")] == []


def test_in_training_only_build_and_config_join_models_and_data():
    for path, found in FILES.items():
        module = module_name(path)
        if below(module, "training") and module not in ("training.build", "training.config"):
            assert not {"dcd", "pipelines"} <= {name.split(".")[0] for name, _, _ in found}, path
            # Optimizers and the log are training's own, those of other packages, too.
            its_own = {"apex", "timm", "wandb", "mlflow"}
            handed_in = ("dcd.models", "dcd.layers", "pipelines", "torchvision", *(OPTIONAL - its_own))
            assert not [name for name, _, _ in found if below(name, *handed_in)], path


def test_optional_packages_are_imported_on_use_only():
    for path, found in FILES.items():
        for name, line, at_once in found:
            is_made_of_it = module_name(path) in MADE_OF_OPTIONAL
            optional = name.split(".")[0] in OPTIONAL and not is_made_of_it
            optional |= name in MADE_OF_OPTIONAL and not is_made_of_it and not below(module_name(path), "tests")
            assert not (at_once and optional), f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_no_file_of_ours_shadows_a_module_that_we_import():
    # as a profile.py or an ffcv.py beside the file that is run would
    imported = {name.split(".")[0] for found in FILES.values() for name, _, _ in found} - OURS
    for path in FILES.keys() - {ROOT / "dcd" / "timm.py"}:  # which stands beside no file that is run
        assert path.stem not in imported | OPTIONAL, path


def test_importing_dcd_needs_torch_and_nothing_else():
    unwanted = ["torchvision", "tyro", "PIL", "tensorboard", "tqdm", "sklearn", "triton", "pipelines", "training"]
    script = f"""
import sys
import torch
before = set(sys.modules)
import dcd
assert "resnet50_dcd" in dcd.list_models()
new = sorted(set(sys.modules) - before)
print([name for name in {unwanted} if name in sys.modules and name not in before])
print(sorted({{name.split(".")[0] for name in new}} - {{"dcd", "torch"}} - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[]", "[]"]


def circles(edges):
    """Sets of modules that import each other, by Tarjan's algorithm, of {module: the modules that it imports}."""
    order, low, stack, found = {}, {}, [], []

    def visit(module):
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in edges[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            part = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(part) > 1 or module in edges[module]:
                found.append(sorted(part))

    for module in edges:
        if module not in order:
            visit(module)
    return found


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == [["b", "c"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


@pytest.mark.parametrize("room", sorted(OURS))
def test_no_modules_import_each_other(room):
    """Imports inside functions are counted, too."""
    names = {module_name(path): found for path, found in FILES.items() if below(module_name(path), room)}
    edges = {module: [name for name, _, _ in found if name in names] for module, found in names.items()}
    assert circles(edges) == []
