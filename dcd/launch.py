"""The commands of an installed package, `dcd-train` and those of `tools/`: each runs a module as `python -m` does.

A wheel has the rooms under their own names (`training`, `tools`, …) in `dcd/app/`. Only these commands put that folder
on Python's path, and before all others: no other package's `tools` is in the way, and `import dcd` adds one name alone.
In a checkout the folder is the root of the repository.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

NEEDED = ("torchvision", "numpy", "PIL", "tyro", "tqdm", "tensorboard", "yaml")  # the extra `train` of pyproject.toml


class Program:
    """A module to run. Its attributes are modules in it, so that pyproject.toml can say `dcd.launch:tools.evaluate`."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> "Program":
        return Program(f"{self._module}.{name}")

    def __call__(self) -> None:
        """Run it as the main module; its command line is that of this process."""
        sys.path.insert(0, str(folder()))
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            command = Path(sys.argv[0]).name
            sys.exit(f"error: {command} needs {', '.join(missing)}: pip install 'dcd-trainer[train]'")
        spec = find_spec(self._module)
        assert spec is not None
        loader: Any = spec.loader  # of a file: it has the code
        main = ModuleType("__main__")
        main.__spec__, main.__file__, main.__package__ = spec, spec.origin, spec.parent
        sys.modules["__main__"] = main  # where a class of the program is looked for by its name
        exec(loader.get_code(self._module), vars(main))


def folder() -> Path:
    """Where the modules of the programs are."""
    installed = Path(__file__).with_name("app")
    return installed if installed.is_dir() else Path(__file__).parents[1]


train_dist = Program("train_dist")
tools = Program("tools")
