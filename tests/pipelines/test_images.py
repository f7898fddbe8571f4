"""What is an image, and which pixels it holds: one verdict for the converter and every loader."""

import io
import struct
import zlib
from importlib import import_module

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from pipelines.batch import ExecutorOptions, Place
from pipelines.config import DataConfig
from pipelines.executors.torchvision_executor import TorchvisionGpuExecutor
from pipelines.plan import StepPlan
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from pipelines.sources.images import BadImage, examine
from tests.pipelines.helpers import OF_FOLDERS, stored_by_the_converter

BY_BATCHES = "torchvision by batches"  # as it decodes on a GPU
# "torchvision" keeps nothing: it finds the damage whenever it decodes
CHECKING_ONCE = [name for name in (*OF_FOLDERS, BY_BATCHES) if name != "torchvision"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gradient(height=64, width=96):
    """Smooth RGB pixels (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x], 2).astype(np.uint8)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB = Image.fromarray(gradient())
# noise, so that every sector of the file holds pixels
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
WHOLE = saved(NOISE, "JPEG", quality=30)


def folder_of(tmp_path, files: dict[str, bytes]) -> FolderSource:
    for name, data in files.items():
        (tmp_path / "train" / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "all" / name).write_bytes(data)
    return FolderSource(tmp_path / "train")


def executor_of(name: str, source: FolderSource):
    if name == BY_BATCHES:
        return TorchvisionGpuExecutor(source, Place().device, 1)  # the same code by the CPU's decoder
    options = ExecutorOptions(DataConfig(batch_size=1, workers=0), True, Place(), as_bytes=True)
    return import_module(f"pipelines.executors.{name}_executor").create_executor(source, options)


def pixels(executor, index: int, height: int, width: int) -> np.ndarray:
    """The square in the upper left corner of an image, as an executor hands it out, (S, S, 3)."""
    side = min(height, width)
    box = np.array([[0, 0, side, side]], np.int32)
    ((_, images),) = executor.run([StepPlan(np.array([index]), box, np.zeros(1, bool))], side)
    return images[0].float().numpy()


def without(marker: int, data: bytes) -> bytes:
    """A JPEG without one of its segments."""
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def large_png() -> bytes:
    """A PNG with 2 MB of text and a colour profile that takes 3 MB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()) + bytes(3 << 20)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "words " * 350_000, zip=True)
    return saved(RGB, "PNG", pnginfo=text, icc_profile=bytes(profile))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to show it
    return exif


CMYK = saved(RGB.convert("CMYK"), "JPEG", quality=95)
UNUSUAL = {
    "grey.JPEG": saved(RGB.convert("L"), "JPEG", quality=95),
    "progressive.JPEG": saved(RGB, "JPEG", quality=95, progressive=True),
    "cmyk.JPEG": CMYK,
    "cmyk without Adobe's marker.JPEG": without(0xEE, CMYK),
    "stored as RGB.JPEG": saved(RGB, "JPEG", quality=95, keep_rgb=True),
    "16 bits.png": saved(Image.fromarray((gradient()[..., 0].astype(np.uint16) << 8) + 77), "PNG"),
    "transparent.png": saved(RGB.convert("RGBA"), "PNG"),
    "much text.png": large_png(),
    "animated gif.JPEG": saved(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size)]),
    "bmp.JPEG": saved(RGB, "BMP"),
    "tiff.JPEG": saved(RGB, "TIFF"),
    "turned tiff.JPEG": saved(
        RGB, "TIFF", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    ),
    "ppm.JPEG": saved(RGB, "PPM"),
    "jpeg 2000.JPEG": saved(RGB, "JPEG2000"),
    "webp.JPEG": saved(RGB, "WEBP", lossless=True),
    "avif.JPEG": saved(RGB, "AVIF", quality=100),
    "ico.JPEG": saved(RGB, "ICO", sizes=[(96, 64)]),
}


@pytest.mark.parametrize("executor", [*OF_FOLDERS, BY_BATCHES])
def test_unusual_images_have_the_same_pixels_by_every_backend(tmp_path, executor):
    source = folder_of(tmp_path, UNUSUAL)
    runner = executor_of(executor, source)
    assert len(source) == len(UNUSUAL)
    for index in range(len(source)):
        name = source.path(index).name
        height, width = source.sizes[index].tolist()
        wanted = examine(np.frombuffer(UNUSUAL[name], np.uint8)).pixels
        assert wanted.shape == (height, width, 3), name
        found = pixels(runner, index, height, width)
        side = min(height, width)
        assert np.abs(found - wanted[:side, :side]).max() <= 1, name
    runner.close()


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_hold_what_their_makers_put_in(name):
    seen = examine(np.frombuffer(UNUSUAL[name], np.uint8))
    expected = gradient().astype(int)
    if name in ("grey.JPEG", "16 bits.png"):
        grey = np.asarray(RGB.convert("L")) if name == "grey.JPEG" else gradient()[..., 0]
        expected = np.repeat(grey[..., None], 3, 2).astype(int)
    # CMYK by Pillow's naive conversion there and back; without the marker nobody knows that it is not the negative
    tolerance = {"cmyk without Adobe's marker.JPEG": 255, "animated gif.JPEG": 12, "turned tiff.JPEG": 255}.get(name, 6)
    if seen.pixels.shape == expected.shape:
        assert np.abs(seen.pixels - expected).mean() <= tolerance
    else:
        assert name == "turned tiff.JPEG"
    assert (seen.reencoded_because is None) == (name in ("grey.JPEG", "progressive.JPEG", "stored as RGB.JPEG"))
    assert stored_by_the_converter(UNUSUAL[name]).reencoded_because == seen.reencoded_because


def with_rows(data: bytes, rows: int) -> bytes:
    """A JPEG whose header names another height."""
    data = bytearray(data)
    struct.pack_into(">H", data, data.index(b"\xff\xc0") + 5, rows)
    return bytes(data)


def sectors(data: bytes) -> list[bytes]:
    """An image with each of its sectors of 512 bytes lost, which then read as zeros."""
    first = data.index(b"\xff\xda") // 512 + 1
    return [data[:at] + bytes(512) + data[at + 512 :] for at in range(first * 512, len(data) - 512, 512)]


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 50}, {"progressive": True, "quality": 90}])
def test_a_lost_sector_is_noticed_wherever_it_lies(options):
    whole = saved(NOISE, "JPEG", **options)
    verdicts = []
    for damaged in sectors(whole):
        data = np.frombuffer(damaged, np.uint8)
        found = []
        for with_pixels in (True, False):
            try:
                examine(data, with_pixels)
                found.append(None)
            except BadImage as error:
                found.append(str(error))
        assert (found[0] is None) == (found[1] is None), found
        verdicts.append(found[0])
    if "progressive" not in options:  # where zeros may stand for nothing that has to be coded
        assert None not in verdicts and "512 bytes of zeros" in verdicts[0]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_zeros_of_a_plain_image_and_behind_one_are_no_damage(mode):
    plain = saved(Image.new(mode, (2000, 2000)), "JPEG", optimize=True)
    assert bytes(2000) in plain
    assert examine(np.frombuffer(plain, np.uint8)).pixels.max() == 0
    assert examine(np.frombuffer(WHOLE + bytes(4096), np.uint8), with_pixels=False).reencoded_because is None
    longer = WHOLE[:-2] + b"some bytes more than needed" + WHOLE[-2:]  # as some programs leave them
    assert (examine(np.frombuffer(longer, np.uint8)).pixels == examine(np.frombuffer(WHOLE, np.uint8)).pixels).all()


sector = len(WHOLE) // 2 // 512 * 512
DAMAGE = {
    "a sector of zeros": WHOLE[:sector] + bytes(512) + WHOLE[sector + 512 :],
    "a lost block": WHOLE[:sector] + WHOLE[sector + 512 :],
    "more rows than data": with_rows(WHOLE, 300),
    "the second half is missing": WHOLE[: len(WHOLE) // 2],
    "a page of zeros at the end": WHOLE[:-4096] + bytes(4096),
}


@pytest.mark.parametrize("executor", [*OF_FOLDERS, BY_BATCHES])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_in_a_class_folder_is_what_it_is_to_the_converter(tmp_path, executor, damage):
    data = DAMAGE[damage]
    with pytest.raises(BadImage) as bad:
        stored_by_the_converter(data)
    source = folder_of(tmp_path, {"a.JPEG": WHOLE, "b.JPEG": data})  # the header is that of an image
    runner = executor_of(executor, source)
    assert pixels(runner, 0, 200, 200).shape == (200, 200, 3)
    with pytest.raises(DataError) as caught:
        pixels(runner, 1, 200, 200)
    runner.close()
    assert str(caught.value) == f"{source.path(1)} does not decode ({bad.value}): replace or remove this file"


@pytest.mark.parametrize("executor", CHECKING_ONCE)
def test_that_an_image_is_sound_is_found_out_once_and_kept(tmp_path, executor):
    source = folder_of(tmp_path, {"a.JPEG": WHOLE})
    runner = executor_of(executor, source)
    pixels(runner, 0, 200, 200)
    runner.close()
    (tmp_path / "train" / "all" / "a.JPEG").write_bytes(DAMAGE["a sector of zeros"])  # written over: it isn't seen
    runner = executor_of(executor, FolderSource(tmp_path / "train"))
    pixels(runner, 0, 200, 200)
    runner.close()
    (tmp_path / "train" / "all" / "b.JPEG").write_bytes(WHOLE)  # the listing changes: all is read again
    runner = executor_of(executor, FolderSource(tmp_path / "train"))
    with pytest.raises(DataError, match=r"a.JPEG does not decode"):
        pixels(runner, 0, 200, 200)
    runner.close()


@pytest.mark.parametrize("executor", [*OF_FOLDERS, BY_BATCHES])
def test_an_image_that_was_replaced_by_one_of_another_size_is_found_at_the_next_start(tmp_path, executor):
    source = folder_of(tmp_path, {"a.JPEG": saved(RGB, "JPEG")})
    (tmp_path / "train" / "all" / "a.JPEG").write_bytes(WHOLE)  # written over in place
    runner = executor_of(executor, source)
    with pytest.raises(DataError, match="a.JPEG has changed since it was indexed: start again"):
        pixels(runner, 0, 64, 96)
    runner.close()
    runner = executor_of(executor, FolderSource(tmp_path / "train"))
    assert pixels(runner, 0, 200, 200).shape == (200, 200, 3)
    runner.close()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


REFUSED = {
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that Pillow knows"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that Pillow knows"),
    "floats": (saved(Image.new("F", (4, 4)), "TIFF"), "32 bits have no known range"),
    "a bomb": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b""),
        "178956970",
    ),
    "empty": (b"", "not an image that Pillow knows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_when_the_folder_is_indexed_with_the_reason(tmp_path, name):
    data, reason = REFUSED[name]
    with pytest.raises(DataError, match=f"^1 file is no image; .*bad.JPEG .*{reason}"):
        folder_of(tmp_path, {"a.JPEG": WHOLE, "bad.JPEG": data})


def test_without_a_compiler_jpegs_are_read_by_pillow_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    from pipelines.sources import images

    monkeypatch.setenv("CXX", "no-such-compiler")
    images.has_native.cache_clear()
    images.native._library.cache_clear()
    try:
        source = folder_of(tmp_path, {"a.JPEG": WHOLE})  # the cache of this test is empty
        assert np.abs(source.decode(0).permute(1, 2, 0).numpy() - np.asarray(Image.open(io.BytesIO(WHOLE)))).max() <= 1
    finally:
        images.has_native.cache_clear()
        images.native._library.cache_clear()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no-such-compiler" in error and "apt-get install" in error
