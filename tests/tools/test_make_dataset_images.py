"""Odd and bad images: what is re-encoded, what is listed, what is left out."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines import native
from pipelines.sources.beton import BetonSource
from pipelines.sources.errors import DataError
from pipelines.sources.images import MAX_PIXELS, BadImage
from tools.conversion.images import Options, convert
from tools.make_dataset import make_dataset

REENCODE = Options("reencode", max_size=40)


def gradient(width=48, height=32):
    """Smooth RGB pixels (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 5, y * 7, 255 - x * 2 - y * 3], 2).astype(np.uint8)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(**options):
    return saved(Image.fromarray(gradient()), "JPEG", quality=95, subsampling=0, **options)


def stored(data, options=Options()):  # noqa: B008 (it is frozen)
    return convert(np.frombuffer(data, np.uint8), 0, options)


def pixels(image):
    return native.decode_jpeg(image.data).astype(int)


def ycck():
    """A CMYK JPEG whose Adobe marker says YCCK."""
    data = bytearray(saved(Image.fromarray(gradient()).convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def with_size(data, height, width):
    """A JPEG whose header names another size."""
    data = bytearray(data)
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def huge_png(width, height):
    """The beginning of a PNG of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


KEPT = {
    "RGB": jpeg(),
    "grey": saved(Image.fromarray(gradient()).convert("L"), "JPEG"),
    "progressive": jpeg(progressive=True),
    "1 x 1": saved(Image.new("RGB", (1, 1), (9, 8, 7)), "JPEG"),
    "restart markers": jpeg(restart_marker_blocks=1),
    "bytes behind the end": jpeg() + b"and more",
}


@pytest.mark.parametrize("name", KEPT)
def test_jpegs_that_decode_are_kept_to_the_byte(name):
    image = stored(KEPT[name])
    assert image.data.tobytes() == KEPT[name] and image.reencoded_because is None
    assert (image.height, image.width) == Image.open(io.BytesIO(KEPT[name])).size[::-1]
    small = stored(KEPT[name], REENCODE)
    assert max(pixels(small).shape) <= 40 and pixels(small).shape == (small.height, small.width, 3)


def test_exif_rotation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    data = jpeg(exif=exif)
    image, small = stored(data), stored(data, REENCODE)
    assert image.data.tobytes() == data and (image.height, image.width) == (32, 48)
    assert (small.height, small.width) == (26, 40)


rgb = Image.fromarray(gradient())
ODD = {
    "CMYK": ("JPEG, CMYK", saved(rgb.convert("CMYK"), "JPEG", quality=95), 6),
    "a PNG": ("PNG, RGB", saved(rgb, "PNG"), 3),
    "transparent": ("PNG, RGBA", saved(rgb.convert("RGBA"), "PNG"), 3),
    "palette": ("GIF, P", saved(rgb.quantize(256), "GIF"), 12),
    "WebP": ("WEBP, RGB", saved(rgb, "WEBP", lossless=True), 3),
    "BMP": ("BMP, RGB", saved(rgb, "BMP"), 3),
    "TIFF": ("TIFF, RGB", saved(rgb, "TIFF"), 3),
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_plain_decoder_cannot_take_becomes_rgb(name):
    what, data, tolerance = ODD[name]
    image, small = stored(data), stored(data, REENCODE)
    assert image.reencoded_because == small.reencoded_because == what
    assert np.abs(pixels(image) - gradient()).mean() <= tolerance
    assert Image.open(io.BytesIO(image.data.tobytes())).layer[0][1:3] == (1, 1)  # chroma at full resolution
    assert pixels(small).shape == (26, 40, 3)


def test_ycck_becomes_what_pillow_makes_of_it():
    image = stored(ycck())
    expected = np.asarray(Image.open(io.BytesIO(ycck())).convert("RGB")).astype(int)
    assert image.reencoded_because == "JPEG, CMYK" and np.abs(pixels(image) - expected).mean() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind):
    grey = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = stored(saved(Image.fromarray(grey), kind))
    assert np.abs(pixels(image) - (grey >> 8).astype(int)[..., None]).max() <= 3


whole = jpeg()
middle = len(whole) * 2 // 3
damaged_cmyk = ODD["CMYK"][1]
BAD = {
    "zero bytes": (b"", "the file is empty"),
    "truncated": (whole[:middle], ""),
    "the end is missing": (whole[:-2], ""),
    "a marker in the middle": (whole[:middle] + b"\xff\xd9" + whole[middle + 2 :], ""),
    "zeros in the middle": (whole[:middle] + bytes(64) + whole[middle + 64 :], None),
    "header alone": (whole[:20], ""),
    "text": (b"<html>404 not found</html>", "not an image that Pillow knows"),
    "truncated PNG": (ODD["a PNG"][1][:-60], ""),
    "truncated CMYK": (damaged_cmyk[: len(damaged_cmyk) // 2], ""),
    "bomb": (with_size(whole, 20_000, 20_000), "20000 x 20000 pixels are more than 178,956,970"),
    "PNG bomb": (huge_png(20_000, 20_000), "178956970"),
    "too wide": (huge_png(65_536, 1), "at most 65,535 a side"),
    "32 bits": (saved(Image.new("F", (4, 4)), "TIFF"), "no known range"),
}


@pytest.mark.parametrize("options", [Options(), REENCODE], ids=["verbatim", "reencode"])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_decode_is_bad(name, options):
    data, words = BAD[name]
    if words is None:  # damage that is still a code is no damage to see; it must be judged as libjpeg judges it
        try:
            native.decode_jpeg(np.frombuffer(data, np.uint8))
            return
        except native.DecodeError as error:
            words = str(error)
    with pytest.raises(BadImage) as caught:
        stored(data, options)
    assert words in str(caught.value) and str(caught.value) and "\n" not in str(caught.value)


def by_libjpeg(data):
    return native.decode_jpeg(data, by_libjpeg_alone=True)


def test_the_check_of_a_jpeg_judges_damage_as_decoding_does_and_as_libjpeg_does():
    draw = np.random.default_rng(0)
    noise = Image.fromarray(draw.integers(0, 256, (90, 120, 3), np.uint8))
    files = [saved(noise, "JPEG", quality=quality) for quality in (20, 75, 98)]
    files += [KEPT[name] for name in ("RGB", "grey", "progressive", "restart markers")]
    verdicts = []
    for file in files:
        for _ in range(100):
            data = np.frombuffer(file, np.uint8).copy()
            data[draw.integers(len(data) // 4, len(data), 2)] = draw.integers(0, 256, 2)
            found = []
            for check in (native.check_jpeg, native.decode_jpeg, by_libjpeg):
                try:
                    check(data)
                    found.append(None)
                except native.DecodeError as error:
                    found.append(str(error))
            assert found[0] == found[1] == found[2]
            verdicts.append(found[0] is None)
    assert 50 < sum(verdicts) < len(verdicts) - 50  # both happen


def test_the_limit_of_pixels_is_that_of_pillow():
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("max_size, quality", [(500, 90), (256, 75), (97, 100), (40, 1)])
def test_an_image_is_shrunk_and_compressed_as_by_ffcv(max_size, quality):
    from ffcv.fields.rgb_image import encode_jpeg, resizer

    whole = np.random.default_rng(0).integers(0, 256, (333, 517, 3), np.uint8)
    data, expected = saved(Image.fromarray(whole), "PNG"), resizer(whole, max_size)
    as_jpeg, as_pixels = (stored(data, Options("reencode", max_size, quality, share)) for share in (1, 0))
    assert (as_jpeg.height, as_jpeg.width) == (as_pixels.height, as_pixels.width) == expected.shape[:2]
    np.testing.assert_array_equal(as_jpeg.data, encode_jpeg(expected, quality))
    np.testing.assert_array_equal(as_pixels.data, expected.reshape(-1))


def test_a_line_of_pixels_stays_one():
    image = stored(saved(Image.new("RGB", (1000, 1)), "PNG"), REENCODE)
    assert (image.height, image.width) == (1, 40)


# --------------------------------------------------------------------------------------------- a dataset of such images


@pytest.fixture
def mixed(folder, tmp_path):
    """An image folder with three bad images in train, one in val, and two odd ones; what the bad ones are called."""
    src = tmp_path / "src"
    for file in folder.rglob("*.JPEG"):
        to = src / file.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    bad = {
        "train/n01440764/n01440764_0.JPEG": b"",
        "train/n02119789/n02119789_5.JPEG": whole[:middle],
        "train/n15075141/n15075141_9.JPEG": b"text",
        "val/n02119789/zzz.JPEG": BAD["bomb"][0],
    }
    odd = {"train/n01440764/n01440764_5.JPEG": ODD["CMYK"][1], "val/n15075141/a.png": ODD["a PNG"][1]}
    for name, data in {**bad, **odd}.items():
        (src / name).write_bytes(data)
    (src / "train/n15075141/broken link.JPEG").symlink_to("nowhere")
    return src, [*bad, "train/n15075141/broken link.JPEG"]


def test_error_lists_every_bad_image_and_leaves_nothing(mixed, tmp_path, capsys):
    src, bad = mixed
    out = tmp_path / "out"
    with pytest.raises(DataError, match="^5 images do not decode: .* --on-bad skip$"):
        make_dataset(src, out, Options(), "error", 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("bad image: ") and len(line.split(": ")) > 2 for line in lines)
    assert sorted(line.split(": ")[1] for line in lines) == sorted(bad)
    assert os.listdir(out) == []


@pytest.mark.parametrize("mode", ["verbatim", "reencode"])
def test_skip_leaves_out_the_bad_images_alone(images, mixed, tmp_path, mode):
    src, bad = mixed
    out = tmp_path / "out"
    make_dataset(src, out, Options(mode, 500, 90, 0.5), "skip", 2)
    dataset = json.loads((out / "dataset.json").read_text())
    for split, count in (("train", 37), ("val", 13)):
        found = dataset["splits"][split]
        assert found["images"] == count
        assert sorted(image["name"] for image in found["skipped"]) == sorted(n for n in bad if n.startswith(split))
        assert len(found["reencoded"]) == 1 and all(image["reason"] for image in found["skipped"] + found["reencoded"])
        source = BetonSource(out / f"{split}.beton")
        assert len(source) == len(source.checksums) == count
        decoded = [source.read(i) if source.is_raw[i] else native.decode_jpeg(source.read(i)) for i in range(count)]
        assert all(image.size == 3 * size.prod() for image, size in zip(decoded, source.sizes, strict=True))
        if mode == "verbatim":
            there = [source.read(i).tobytes() for i in range(count)]
            expected = [data for _, _, data in images[split]]
            assert [data for data in there if data in expected] == expected  # in their order
    labels = BetonSource(out / "train.beton").labels
    assert np.bincount(labels).tolist() == [13, 12, 12]
    from ffcv.reader import Reader

    reader = Reader(str(out / "train.beton"))
    assert reader.num_samples == 37 and sorted(reader.alloc_table["sample_id"].tolist()) == list(range(37))
    assert reader.field_names == ["image", "label"]
    assert np.array_equal(np.sort(reader.metadata["f0"]["data_ptr"]), np.sort(reader.alloc_table["ptr"]))


def test_a_split_without_an_image_left_is_an_error(folder, tmp_path):
    src = tmp_path / "src"
    for split in ("train", "val"):
        (src / split / "a").mkdir(parents=True)
        (src / split / "a" / "x.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="not one image for train.beton decodes"):
        make_dataset(src, tmp_path / "out", Options(), "skip", 2)
    assert os.listdir(tmp_path / "out") == []
