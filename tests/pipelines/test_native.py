"""The decoder and resizer in C++: held to Pillow's decoder, to PyTorch's resize and to the xxhash package."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash
from PIL import Image

from pipelines import native
from tests import jpegs


def jpeg(pixels, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def decoded(data):
    with Image.open(io.BytesIO(data.tobytes())) as file:
        return np.asarray(file.convert("RGB"))


def texture(height, width, seed=0):
    """Smooth colours with some noise: something that JPEG can hold."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    return np.uint8(np.clip(smooth + draw.normal(0, 6, smooth.shape), 0, 255))


def job(data, box, flip=False, size=None):
    jobs = np.zeros(1, native.JOB)
    height_width = size or native.jpeg_size(data)
    jobs["data"], jobs["size"], jobs["image_size"] = data.ctypes.data, data.nbytes, height_width
    jobs["box"], jobs["flip"] = box, flip
    return jobs


def render(data, box, side, flip=False, exact=True, dtype=np.float32, **options):
    images = np.full((1, side, side, 3), 77, dtype)
    native.render(job(data, box, flip), images, 1, exact, **options)
    return images[0]


def resized(pixels, box, side, flip=False):
    top, left, height, width = box
    cut = torch.from_numpy(pixels[top : top + height, left : left + width].astype(np.float32)).permute(2, 0, 1)[None]
    image = F.interpolate(cut, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return (image.flip(1) if flip else image).numpy()


KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "grey": {"mode": "L"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 5},
    "own codes": {"optimize": True, "quality": 98},
}
BOXES = [
    (0, 0, 123, 181),  # the whole image
    (17, 16, 31, 32),  # begins at a block
    (16, 17, 90, 100),
    (121, 179, 2, 2),  # the last pixels
    (0, 180, 123, 1),
    (60, 3, 1, 150),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [1, 7, 64, 224])
def test_a_box_is_that_of_the_whole_image_resized(kind, side):
    data = jpeg(texture(123, 181), **{"quality": 90, **KINDS[kind]})
    whole = decoded(data)
    for box in BOXES:
        for flip in (False, True):
            expected = resized(whole, box, side, flip)
            np.testing.assert_allclose(render(data, box, side, flip), expected, atol=0.01)  # of 255
            rounded = render(data, box, side, flip, dtype=np.uint8)
            np.testing.assert_allclose(rounded, expected, atol=0.51)


def test_random_boxes_of_random_images():
    draw = np.random.default_rng(1)
    for seed in range(60):
        height, width = draw.integers(1, 200, 2)
        data = jpeg(texture(height, width, seed), quality=int(draw.integers(30, 96)), subsampling=int(draw.integers(3)))
        box_h, box_w = draw.integers(1, height + 1), draw.integers(1, width + 1)
        box = (draw.integers(height - box_h + 1), draw.integers(width - box_w + 1), box_h, box_w)
        side = int(draw.integers(1, 100))
        np.testing.assert_allclose(render(data, box, side), resized(decoded(data), box, side), atol=0.01)


def test_normalised_floats():
    data = jpeg(texture(50, 60), quality=95)
    plain = render(data, (3, 5, 40, 41), 32)
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
    np.testing.assert_allclose(
        render(data, (3, 5, 40, 41), 32, mean=mean, std=std), (plain - mean) / std, rtol=1e-4, atol=1e-4
    )


def test_a_decode_at_half_size_is_near_and_only_where_it_is_enough():
    data = jpeg(texture(400, 600), quality=95)
    for box, side, halved in (
        ((0, 0, 400, 600), 200, True),
        ((10, 21, 300, 420), 100, True),
        ((0, 0, 399, 600), 200, False),
        ((0, 0, 400, 600), 50, True),
        ((101, 7, 130, 140), 64, True),
    ):
        exact, fast = render(data, box, side), render(data, box, side, exact=False)
        assert (np.abs(exact - fast).max() > 0.01) == halved
        assert np.abs(exact - fast).mean() < 3


@pytest.mark.parametrize("layout", jpegs.LAYOUTS)
def test_a_smaller_decode_is_near_or_exact_for_every_sampling(layout):
    """Columns are cut away on both sides, on the right, on the left, and on none."""
    data = jpegs.write(jpegs.smooth(300, 420, step=128), jpegs.LAYOUTS[layout])
    near = {**dict.fromkeys(jpegs.USUAL, 4), "4:2:2": 12, "4:4:0": 10, "4:1:1": 35}.get(layout, 0)  # of 255, at 1/8
    for box in ((10, 60, 288, 288), (3, 0, 288, 289), (0, 132, 300, 288), (0, 0, 300, 420)):
        for side in (144, 72, 36):
            exact, fast = render(data, box, side), render(data, box, side, exact=False)
            np.testing.assert_allclose(exact, resized(decoded(data), box, side), atol=0.01)
            assert np.abs(exact - fast).max() <= near
            assert (exact != fast).any() == bool(near)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_smaller_decode_keeps_the_last_row_and_column_of_a_box(axis):
    """A ramp, whose brightness says which pixels were taken."""
    ramp = np.uint8(np.linspace(0, 255, 304) + np.zeros((304, 1)))
    data = jpeg(ramp.T if axis == 0 else ramp, quality=100)
    for start in range(8):
        for side in (144, 72, 36):
            exact, fast = (render(data, (start, start, 288, 288), side, exact=way) for way in (True, False))
            assert np.abs(exact - fast).max() < 1.5


def test_raw_pixels():
    pixels = texture(40, 70)
    data = np.ascontiguousarray(pixels).reshape(-1)
    for box in ((0, 0, 40, 70), (39, 69, 1, 1), (5, 60, 30, 10)):
        jobs = job(data, box, flip=True, size=(40, 70))
        jobs["is_raw"] = True
        images = np.empty((1, 24, 24, 3), np.float32)
        native.render(jobs, images, 1, True)
        np.testing.assert_allclose(images[0], resized(pixels, box, 24, flip=True), atol=0.01)
    jobs["size"] -= 1
    with pytest.raises(native.DecodeError, match="height x width x 3"):
        native.render(jobs, images, 1, True)


def test_many_threads_give_the_same_as_one():
    files = [jpeg(texture(60 + i, 200 - i, i), quality=90) for i in range(40)]
    jobs = np.concatenate([job(data, (i % 7, i % 5, 50, 100), i % 2) for i, data in enumerate(files)])
    one, many = np.empty((40, 32, 32, 3), np.uint8), np.empty((40, 32, 32, 3), np.uint8)
    native.render(jobs, one, 1, True)
    native.render(jobs, many, 9, True)
    np.testing.assert_array_equal(one, many)


def test_nothing_is_written_beside_the_images():
    data = jpeg(texture(60, 60), quality=90)
    for dtype in (np.uint8, np.float32):
        around = np.full(2 * 17 * 17 * 3 + 64, 99, dtype)
        images = around[32:-32].reshape(2, 17, 17, 3)
        native.render(np.concatenate([job(data, (0, 0, 60, 60))] * 2), images, 2, True)
        assert (around[:32] == 99).all() and (around[-32:] == 99).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_image_is_named_by_its_place(threads):
    whole = jpeg(texture(60, 60), quality=90)
    for damaged, reason in (
        (whole[: len(whole) // 2].copy(), "[Pp]remature"),
        (np.zeros(100, np.uint8), "Not a JPEG"),
        (jpeg(texture(60, 60), "CMYK"), "conversion"),
        (jpeg(texture(61, 60)), "size"),
    ):
        jobs = np.concatenate([job(whole, (0, 0, 60, 60))] * 5)
        jobs["data"][3], jobs["size"][3] = damaged.ctypes.data, damaged.nbytes
        with pytest.raises(native.DecodeError, match=reason) as error:
            native.render(jobs, np.empty((5, 32, 32, 3), np.uint8), threads, True)
        assert error.value.position == 3


def bomb(side, scans):
    """A progressive JPEG of side × side grey pixels; each scan goes through all of them, and is a few bytes long."""
    data = bytearray(jpegs.write(np.zeros((8, 8, 1), np.uint8), jpegs.USUAL["grey"], progressive=True).tobytes())
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    head = data[: frame + 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")]
    # The only code, of one bit: the next 2^14 + (14 bits, all set) blocks stay as they are.
    codes = bytes([0xFF, 0xC4, 0, 20, 0x10, 1, *bytes(15), 0xE0])
    bits = ("0" + "1" * 14) * -(-((side // 8) ** 2) // (2**15 - 1))
    bits += "1" * (-len(bits) % 8)
    scan = bytes([0xFF, 0xDA, 0, 8, 1, 1, 0, 1, 1, 0])
    scan += int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    return np.frombuffer(head + codes + scan * scans + b"\xff\xd9", np.uint8)


def test_what_a_few_bytes_may_claim_is_bounded():
    data = jpeg(texture(60, 60)).copy()
    at = data.tobytes().index(b"\xff\xc0")
    data[at + 5 : at + 9] = tuple(struct.pack(">HH", 65500, 65500))
    for read in (native.jpeg_size, native.decode_jpeg, native.check_jpeg):
        with pytest.raises(native.DecodeError, match="65500 x 65500 pixels are more than 178,956,970"):
            read(data)
    native.check_jpeg(bomb(1600, 100))
    with pytest.raises(native.DecodeError, match="more than 100 scans"):
        native.check_jpeg(bomb(1600, 102))


def test_a_wrong_checksum_is_an_error():
    data = jpeg(texture(60, 60), quality=90)
    jobs = job(data, (0, 0, 60, 60))
    jobs["checksum"], jobs["has_checksum"] = native.checksum(data), True
    images = np.empty((1, 32, 32, 3), np.uint8)
    native.render(jobs, images, 1, True)
    jobs["checksum"] += 1
    with pytest.raises(native.DecodeError, match="not those that were converted"):
        native.render(jobs, images, 1, True)


def test_the_checksum_is_xxh64():
    for size in (0, 1, 3, 4, 7, 8, 31, 32, 33, 63, 64, 1000, 100_003):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        assert native.checksum(data) == xxhash.xxh64(data.tobytes()).intdigest()


def test_wrong_arrays_are_refused():
    data = jpeg(texture(20, 20))
    for images in (np.empty((2, 8, 8, 3), np.uint8), np.empty((1, 8, 9, 3), np.uint8), np.empty((1, 8, 8, 3), int)):
        with pytest.raises(TypeError):
            native.render(job(data, (0, 0, 20, 20)), images, 1, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_says_what_decoding_says(kind):
    """Intact and damaged files: the same verdict, with the same reason."""
    draw = np.random.default_rng(3)
    verdicts = set()
    for round in range(60):
        data = jpeg(texture(*draw.integers(8, 150, 2), seed=round), **{"quality": 85, **KINDS[kind]}).copy()
        at = int(draw.integers(len(data) // 3, len(data)))
        if round % 4 == 1:
            data = data[:at].copy()
        elif round % 4 == 2:
            data[at] ^= 1 << int(draw.integers(8))
        elif round % 4 == 3:
            data = np.concatenate([data[:at], data[at + int(draw.integers(1, 9)) :]])
        said = []
        for read in (native.decode_jpeg, native.check_jpeg):
            try:
                read(data)
                said.append("")
            except native.DecodeError as error:
                said.append(str(error))
        assert said[0] == said[1]
        verdicts.add(bool(said[0]))
    assert verdicts == {False, True}


def test_whole_images_are_pillows():
    for kind, options in KINDS.items():
        data = jpeg(texture(33, 57), **{"quality": 80, **options})
        assert native.jpeg_size(data) == (33, 57)
        np.testing.assert_array_equal(native.decode_jpeg(data), decoded(data), err_msg=kind)


def test_a_missing_compiler_is_one_line_that_names_the_packages(tmp_path, root):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "/nowhere/g++"}
    script = "import numpy as np; from pipelines import native; native.checksum(np.zeros(1, np.uint8))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "DataError: cannot compile" in last and "apt-get install g++ libjpeg-dev" in last
    assert not list((tmp_path / "dcd").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": True},  # codes of the image's own, some of one bit
        {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1},
        {"subsampling": "4:2:2"},
        {"progressive": True},  # which libjpeg reads
    ],
)
@pytest.mark.parametrize("quality", [1, 40, 90, 100])
def test_every_code_is_read_as_pillow_reads_it(options, quality):
    draw = np.random.default_rng(quality)
    for height, width in ((1, 1), (9, 16), (70, 131)):
        noise = draw.integers(0, 256, (height, width, 3), np.uint8)
        for pixels in (noise, texture(height, width, quality), np.zeros_like(noise), noise[..., 0]):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=quality, **options)
            data = np.frombuffer(file.getvalue(), np.uint8)
            native.check_jpeg(data)
            np.testing.assert_array_equal(native.decode_jpeg(data), decoded(data))
            np.testing.assert_array_equal(native.decode_jpeg(data, by_libjpeg_alone=True), decoded(data))
            side = min(height, width) - min(height, width) // 3
            square = (height - side, width - side, side, side)  # the codes of the rows above it are passed over
            wanted = decoded(data)[-side:, -side:]
            np.testing.assert_array_equal(render(data, square, side, dtype=np.uint8), wanted)


def test_a_file_gets_no_tables_of_the_one_before_it():
    whole = jpeg(texture(32, 32))
    table = whole.tobytes().index(b"\xff\xdb")
    length = int.from_bytes(whole.tobytes()[table + 2 : table + 4], "big")
    lacking = np.frombuffer(whole.tobytes()[:table] + whole.tobytes()[table + 2 + length :], np.uint8)
    reasons = set()
    for _ in range(3):
        native.decode_jpeg(whole)
        for read in (native.decode_jpeg, native.check_jpeg):
            with pytest.raises(native.DecodeError) as caught:
                read(lacking)
            reasons.add(str(caught.value))
    jobs = np.concatenate([job(whole, (0, 0, 32, 32)), job(lacking, (0, 0, 32, 32), size=(32, 32))])
    with pytest.raises(native.DecodeError) as caught:
        native.render(jobs, np.empty((2, 32, 32, 3), np.uint8), 1, True)
    assert caught.value.position == 1 and reasons == {str(caught.value)} == {"Quantization table 0x00 was not defined"}
