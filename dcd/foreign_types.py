"""Types of other libraries that trainers leave in their checkpoints beside the weights: options, dates, scores.

None of them is needed for a model. Each gets a stand-in, so that a file that holds one can be read by
`weights_only=True` without a line of its library's code; a type that is not listed is refused by its name.
"""

from collections.abc import Callable


class Unread:
    """Replaces an object of any type: accepts whatever the object was created from, and keeps nothing."""

    def __init__(self, *args): ...

    def __setstate__(self, state): ...


class PlainDict:
    """Replaces a class of dictionaries: creates a plain dict."""

    def __new__(cls, *args):
        return {}


_UNREAD = {
    "argparse": ("Namespace",),
    "builtins": ("bool", "dict", "float", "frozenset", "int", "list", "str"),  # what defaultdicts begin with
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "pathlib": ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),  # as Python 3.13 writes them
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),  # since NumPy 2
    "torch.torch_version": ("TorchVersion",),
    "types": ("SimpleNamespace",),
}
_DICTIONARIES = {
    "collections": ("defaultdict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "lightning.fabric.utilities.data": ("AttributeDict",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
}

# For `torch.serialization.safe_globals`: a stand-in, and the full name of the type that it replaces in a file.
STAND_INS: list[Callable | tuple[Callable, str]] = [
    (stand_in, f"{module}.{name}")
    for stand_in, types in ((Unread, _UNREAD), (PlainDict, _DICTIONARIES))
    for module, names in types.items()
    for name in names
]
