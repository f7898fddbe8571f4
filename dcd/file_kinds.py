"""Recognises files that are no PyTorch checkpoints by their first bytes: failed downloads, other formats."""

import string

HEAD_BYTES = 512  # of a file, enough to tell what it is
ZIP = b"PK\x03\x04"  # torch.save's format since PyTorch 1.6
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the format before that: a pickled magic number

_SAVE_AGAIN = 'read it with its own library and save the weights by torch.save({"state_dict": {name: tensor}}, FILE)'
_BEGINNINGS = {
    b"version https://git-lfs.github.com": "a Git LFS pointer, not the file that it stands for: run git lfs pull",
    b"\x1f\x8b": "compressed by gzip: unpack it with gunzip (tar xzf, if it is an archive)",
    b"BZh": "compressed by bzip2: unpack it with bunzip2",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it with unxz",
    b"(\xb5/\xfd": "compressed by zstd: unpack it with unzstd",
    b"\x93NUMPY": f"a NumPy array: {_SAVE_AGAIN}",
    b"\x89HDF\r\n\x1a\n": f"an HDF5 file, as Keras writes them: {_SAVE_AGAIN}",
}


def foreign_kind(head: bytes, size: int) -> str | None:
    """What a file is and what to do, e.g. "compressed by gzip: unpack it with gunzip"; None where it may be PyTorch's.

    Args:
        head: its first HEAD_BYTES. size: bytes in all.
    """
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page, as a failed download leaves it: download the file itself"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it with tar xf"
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b":"):  # IR version, then the producer or the graph
        return f"an ONNX model: {_SAVE_AGAIN}"
    if head and not ZIP.startswith(head) and all(byte in string.printable.encode() for byte in head):
        return f"text, which begins with {head[:40].decode().split(chr(10))[0]!r}: download the file itself"
    return None


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of these first bytes and this size begins as one of safetensors: with the length of its header,
    a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def foreign_zip(names: list[str]) -> str | None:
    """The same for a zip archive with members of these names."""
    members = {name.rpartition("/")[2] for name in names}
    if any(name.endswith(".npy") for name in members):
        return f"an archive of NumPy arrays (.npz): {_SAVE_AGAIN}"
    if "constants.pkl" in members:
        return "a TorchScript model: save its weights by torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
    if "data.pkl" not in members:
        return "a zip archive with no checkpoint as its content: unpack it with unzip"
    return None
