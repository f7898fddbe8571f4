"""What README.md, CONTRIBUTING.md and docs/ tell to type works, and what they point to is there.

- **Parsed**: every command, as it stands: ours by its own program up to where that would begin, torchrun's options by
  torchrun's parser, a target of make by `make -n`, and then the programs that it would start; others by `bash -n`.
- **Run**, small and on one rank (`tests/carry_out.py`): every command but those in `NOT_RUN`, which says why not, and
  what runs its program on less. The commands of a block are run one after the other; one that stands in several places
  is run once.
- **Run**: the Python of README.md and docs/models.md. Of docs/export.md it is compiled only: tests/tools/test_export.py
  runs it.

A block of code that none of these covers fails.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from torch.distributed.run import get_args_parser

import dcd
from tests.carry_out import carry_out
from tests.commands import SCRIPTS, is_command, program_of, started_by_make, try_command, words_of
from tests.documents import DOCUMENTS, ROOT, Block, anchors, blocks, links, rows, spans
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


# --- running ---


class NotRun(NamedTuple):
    """Commands that are only parsed."""

    command: str  # a regular expression for how they begin
    why: Literal["installs", "needs a cluster", "takes minutes", "runs the tests", "serves until it is stopped"]
    instead: str | None = None  # the test that runs the same program or script, on less


NOT_RUN = [
    NotRun("make (setup|wheel|image)", "installs"),
    NotRun("pip install", "installs"),
    NotRun("sbatch", "needs a cluster", "tests/scripts/test_slurm_script.py"),
    NotRun("docker run", "needs a cluster", "tests/scripts/test_dockerfile.py"),
    NotRun("kubectl", "needs a cluster", "tests/scripts/test_kubernetes.py"),
    NotRun("make test", "runs the tests"),
    NotRun("make (bench-model|profile-layers)", "takes minutes", "tests/tools/test_profile_layers.py"),
    NotRun("make bench-loader", "takes minutes", "tests/benchmarks/test_bench_loader.py"),
    NotRun("make gpu-check", "takes minutes", "tests/benchmarks/test_gpu_check.py"),
    NotRun("python -m tools.export .* --format aoti", "takes minutes", "tests/tools/test_export.py"),
    NotRun("tensorboard", "serves until it is stopped"),
]
WRITTEN = {".html", ".json", ".onnx", ".pt2", ".safetensors"}  # files that commands name because they write them


class Typed(NamedTuple):
    """Commands that somebody types one after the other."""

    where: str
    commands: list[str]


def typed() -> Iterator[Typed]:
    """Every whole command of the documents, where it stands first: those of a block together.

    Within the text a command is whole where it has arguments and leaves none out by "…"; else it is a name.
    """
    seen = set()

    def new(lines: list[str]) -> list[str]:
        found = {}
        for words in filter(None, map(words_of, lines)):
            same = str(program_of(words) or words)  # by whichever launcher
            if same not in seen:
                seen.add(same)
                found[same] = shlex.join(words)
        return [*found.values()]

    for block in BLOCKS:
        if kind(block) == "commands":
            yield Typed(block.where, new(block.text.replace("\\\n", " ").splitlines()))
    for document in DOCUMENTS:
        whole = r"(python -m [a-z_.]+|python train_dist.py|make [a-z-]+) [^…]+"
        for span in (span for span in spans(document) if re.fullmatch(whole, span)):
            yield Typed(f"{document.name}: {span}", new([span]))


def why_not(command: str) -> NotRun | None:
    return next((each for each in NOT_RUN if re.match(each.command, command)), None)


def programs_of(command: str) -> set[str]:
    """The modules of ours that it starts."""
    words = shlex.split(command)
    started = started_by_make(words[1:]) if words[0] == "make" else [words]
    return {found[0] for each in started if (found := program_of(each))}


RUN = [run for where, commands in typed() if (run := Typed(where, [each for each in commands if not why_not(each)]))[1]]


def test_what_is_not_run_is_there_and_has_another_test():
    programs_run = {name for run in RUN for command in run.commands for name in programs_of(command)}
    for each in NOT_RUN:
        commands = [command for typed_ in typed() for command in typed_.commands if re.match(each.command, command)]
        assert commands, f"no document has {each.command}"
        assert each.instead or each.why not in ("needs a cluster", "takes minutes")
        text = (ROOT / each.instead).read_text() if each.instead else ""
        for program in {name for command in commands for name in programs_of(command)} - programs_run:
            assert program.rpartition(".")[2] in text, f"{each.command}: where is {program} run?"


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory) -> Path:
    """What the commands read: a tiny ImageNet, and what the README's commands for ImageNet make of it."""
    folder = tmp_path_factory.mktemp("shared")
    places = folder / "path" / "to"
    places.mkdir(parents=True)
    for name in ("imagenet", "imagenet21k", "imagenet-a", "flowers"):
        (places / name).symlink_to(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in IMAGENET.commands:
            carry_out(shlex.split(command))
        carry_out(shlex.split("python -m tools.convert_checkpoint /path/to/output resnet50_dcd.pth.tar --to official"))
    shutil.copytree(places / "output", places / "another")
    shutil.copy(places / "output" / "checkpoints" / "best.pth", folder / "resnet101_dcd.pth.tar")
    (folder / "SRC").symlink_to(tiny)
    (folder / "DATA").symlink_to(places / "converted")
    picture = next((tiny / "val").rglob("*.JPEG"))
    shutil.copy(picture, folder / "cat.jpg")
    for name in ("photos", "more"):
        (folder / name).mkdir()
        shutil.copy(picture, folder / name / "dog.png")
    return folder


@pytest.fixture
def desk(shared, tmp_path, monkeypatch) -> Path:
    """An own folder, with links to all that is shared."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    for path in [*shared.iterdir(), *(shared / "path" / "to").iterdir()]:
        if path.name not in ("path", "figures.json"):
            (tmp_path / path.relative_to(shared)).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


(IMAGENET,) = (each for each in RUN if each.commands[0].startswith("make dataset") and len(each.commands) == 3)


def test_imagenet_in_four_commands(shared, tiny):
    """All but the first, which installs."""
    assert json.loads((shared / "figures.json").read_text())["images"] == 23
    best = torch.load(shared / "path" / "to" / "output" / "checkpoints" / "best.pth")
    assert best["classes"] == sorted(each.name for each in (tiny / "val").iterdir())


@pytest.mark.parametrize("typed", [pytest.param(each, id=each.where) for each in RUN if each is not IMAGENET])
def test_commands_run(typed, desk):
    for command in typed.commands:
        carry_out(shlex.split(command))
        written = [word for word in shlex.split(command) if Path(word).suffix in WRITTEN]
        assert all(Path(word).is_file() for word in written), f"{command} has not written {written}"


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
