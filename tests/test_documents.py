"""What README.md, CONTRIBUTING.md and docs/ tell to type works, and what they point to is there.

- **Really run**, small and on one rank: ImageNet's commands of the README but the installation, and after them what
  names pictures, converts weights and checks data; the Python of README.md and docs/models.md.
- **Parsed only**: all other commands of ours, each by its own program up to where that would begin, and torchrun's by
  torchrun's parser. What the programs do is tested where `test_every_program_has_a_test_that_runs_it` looks.
- **`make -n`**: targets; the programs that they would start are parsed as above.
- **Compiled only**: the Python of docs/export.md, which `tests/tools/test_export.py` runs.
- **`bash -n` only**: commands of others, such as pip, docker and Slurm.

A block of code that none of these covers fails.
"""

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import dcd
from tests.commands import SCRIPTS, is_command, program_of, started_by_make, try_command, words_of
from tests.documents import DOCUMENTS, ROOT, Block, anchors, blocks, links, rows, spans
from tests.helpers import SMALL
from training.config import Config
from training.config_file import read_config_file

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
# Blocks that are no code, by how they begin.
DRAWINGS = {
    "README.md": ("    EpochPlan(",),
    "docs/architecture.md": ("EpochPlan(", "bytes ", "train_dist.py "),
    "docs/data.md": ("train.beton,", "train-00003-of-00016.beton", "hours =", "G · R reads", "draw(seed"),
    "docs/dynamic_layers.md": ("u = bn1(Q x)",),
    "docs/training.md": ("config.json ",),
}
# Options of Docker and Slurm.
FOREIGN = {"--gpus-per-node", "--ipc", "--requeue", "--shm-size", "--signal"}


def kind(block: Block) -> str:
    if block.first.startswith(DRAWINGS.get(block.document, ())):
        return "drawing"
    if is_command(block.first) or block.first.startswith("#!"):
        return "commands"
    if re.match(r"\w+: ", block.first):
        return "options"
    try:
        ast.parse(block.text)
    except SyntaxError:
        return "unknown"
    return "python"


def of_kind(wanted: str) -> list:
    return [pytest.param(block, id=block.where) for block in BLOCKS if kind(block) == wanted]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The files that the documents' commands name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (options,) = (block for block in BLOCKS if kind(block) == "options")
    (tmp_path / "run.yaml").write_text(options.text)
    return tmp_path


def test_every_block_is_code_of_a_known_kind():
    assert len(BLOCKS) > 30
    unknown = [block.where for block in BLOCKS if kind(block) == "unknown"]
    assert not unknown, "neither commands, Python nor options; what is none of them, DRAWINGS names"
    drawn = [(block.document, block.first) for block in BLOCKS if kind(block) == "drawing"]
    for document, begins in DRAWINGS.items():
        for begin in begins:
            assert any(name == document and first.startswith(begin) for name, first in drawn), (document, begin)


@pytest.mark.parametrize("block", of_kind("commands"))
def test_commands(block, folder):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in block.text.replace("\\\n", " ").splitlines():
        words = words_of(line)
        if words:
            try_command(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_within_the_text(document, folder):
    for span in filter(is_command, spans(document)):
        try_command(words_of(span), whole=False)


def test_options_in_a_file(folder):
    found = read_config_file(folder / "run.yaml", Config(), set())
    assert found.recipe == "resnet50_dcd" and "--epochs=60" in found.arguments


def test_options_here_of_those_who_come_from_elsewhere(folder):
    """The second column of docs/coming_from.md: all options are read by our parser together, values included."""
    here = [cells for cells in rows(ROOT / "docs" / "coming_from.md") if len(cells) == 3]
    assert len(here) > 150
    options = []
    for theirs, ours, _ in here:
        found = re.findall(r"`([^`]+)`", ours)
        assert found or ours == "none", theirs
        options += [words for span in found if (words := shlex.split(span))[0].startswith("-")]
    try:
        try_command(["train_dist.py", *(word for words in options for word in words)])
    except AssertionError:
        for words in options:  # which one it was
            try_command(["train_dist.py", *words])
        raise


def test_every_flag_in_the_text_is_there():
    """By its name: a field or an argument somewhere in our programs, or a flag of torchrun's."""
    rooms = ("dcd", "pipelines", "training", "tools", "benchmarks")
    code = "".join(path.read_text() for room in rooms for path in (ROOT / room).rglob("*.py"))
    known = {*re.findall(r"\b(\w+): ", code), *re.findall(r'"--([\w-]+)"', code), "help"}
    known = {f"--{name.replace('_', '-')}" for name in known} | {*get_args_parser()._option_string_actions} | FOREIGN
    for document in DOCUMENTS:
        if document.stem != "coming_from":
            words = {word for span in spans(document) if not is_command(span) for word in span.split()}
            flags = {re.split(r"[=,…]", word)[0] for word in words if word.startswith("--")}
            unknown = {flag for flag in flags if flag not in known and f"--{flag[5:]}" not in known}
            assert not unknown, f"{document.name}: {unknown}"


def test_every_program_has_a_test_that_runs_it():
    for target in {each.partition(":")[2] for each in SCRIPTS.values()}:
        room, _, name = target.rpartition(".")
        path = ROOT / "tests" / room / f"test_{name}.py"
        assert re.search(rf"\b{name}\b", path.read_text()), path


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links(document):
    for target in links(document):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{document.name}: {target}: there are {sorted(anchors(file))}"


def test_files_and_tests_in_the_text_are_there():
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    tests = {*re.findall(r"^ *def (test_\w+)\(", code, re.MULTILINE)}
    file = r"(dcd|training|pipelines|tools|tests|benchmarks|docs|scripts)/[\w/]+\.(py|md|cpp|h)"
    for document in DOCUMENTS:
        for span in spans(document):
            if re.fullmatch(file, span) and "NAME" not in span and document.stem != "coming_from":
                assert (ROOT / span).exists(), f"{document.name}: {span}"
            if re.fullmatch(r"test_[a-z_0-9]+", span):
                assert span in tests, f"{document.name}: {span}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.fixture
def carried_out(main):
    """Calls a command of a document in this process: one rank of it, with other words than the document's."""

    def call(words: list[str], *more: str, **others: Path) -> None:
        places = {f"/path/to/{name}": str(place) for name, place in others.items()}
        module, arguments = program_of([places.get(word, word) for word in words])
        argv, sys.argv = sys.argv, [module, *arguments, *more]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            assert not error.code, error.code
        finally:
            sys.argv = argv

    return call


def test_imagenet_in_four_commands_and_what_comes_after(tiny, folder, carried_out):
    """On 71 images, by a small model: the README's words but for folders, sizes and the number of ranks."""
    readme = [block.text.splitlines() for block in BLOCKS if block.document == "README.md"]
    _, dataset, train, evaluate = next(lines for lines in readme if lines[0] == "make setup")
    after = next(lines for lines in readme if "tools.predict" in lines[0])
    places = {"imagenet": tiny, "converted": folder / "converted", "output": folder / "output"}
    (convert,) = started_by_make(words_of(dataset)[1:])

    carried_out(convert, **places)
    carried_out(words_of(train), *SMALL, "-b", "16", "--epochs", "1", **places)
    carried_out(words_of(evaluate), "-b", "16", **places)
    assert json.loads((folder / "figures.json").read_text())["images"] == 23

    (folder / "photos").mkdir()
    picture = next((tiny / "val").rglob("*.JPEG"))
    shutil.copy(picture, folder / "cat.jpg")
    shutil.copy(picture, folder / "photos")
    predict, _, _, convert_weights, check = map(words_of, after[:5])
    carried_out(predict, **places)
    carried_out(convert_weights, **places)
    carried_out(check, **places)
    assert dcd.load(folder / "model.safetensors").class_names == sorted(each.name for each in (tiny / "val").iterdir())
    assert "<img" in (folder / "page.html").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output of a run of resnet50_dcd; beside it an official checkpoint of MobileNetV2."""
    output = tmp_path_factory.mktemp("trained") / "output"
    (output / "checkpoints").mkdir(parents=True)
    architecture = {"arch": "resnet50_dcd", "num_classes": 10}
    content = {
        "model": dcd.create_model("resnet50_dcd", 10).state_dict(),
        "classes": [str(number) for number in range(10)],
        "architecture": architecture,
        "config": Config().with_options(**architecture, input_size=64).to_dict(),
    }
    torch.save(content, output / "checkpoints" / "best.pth")
    model = dcd.create_model("mobilenetv2_dcd", fc_squeeze=16)
    names, state = dcd.upstream_names(model), model.state_dict()
    official = {"arch": "mobilenetv2_dcd", "state_dict": {names[name]: state[name] for name in state}}
    torch.save(official, output.parent / "mv2x1.0_dcd.pth.tar")
    return output


@pytest.mark.parametrize("block", of_kind("python"))
def test_python(block, trained, monkeypatch):
    code = block.text.replace("/path/to/output", str(trained)).replace("/path/to/this/repository", str(ROOT))
    code = compile(code, block.where, "exec")
    monkeypatch.chdir(trained.parent)
    if not block.first.startswith("import json"):
        model = dcd.create_model("mobilenetv2_dcd", 10, width_mult=0.1)
        exec(code, {"torch": torch, "dcd": dcd, "model": model, "image": torch.zeros(3, 80, 80, dtype=torch.uint8)})
