"""Known answers of every encoding, faults by name, and the copies that are not made."""

from __future__ import annotations

import array
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from glesam_ros.ros.conversions import (
    ENCODINGS,
    ConversionError,
    array_to_compressed,
    array_to_image,
    compressed_to_rgb,
    image_to_rgb,
)
from glesam_ros.settings import Settings
from glesam_ros.value_range import ValueRange

RED, GREEN, BLUE = (240, 0, 0), (0, 240, 0), (0, 0, 240)
RGB = np.array([[(10, 20, 30), (200, 100, 50)], [(0, 255, 1), (7, 8, 9)], [(90, 80, 70), (255, 254, 253)]], np.uint8)
GREY = RGB[..., 1]


def message(pixels: np.ndarray[Any, Any], encoding: str, padding: int = 0, big: bool = False, **fields: Any) -> Any:
    """The fields of a sensor_msgs/Image that holds `pixels` (H, W[, C]) with `padding` bytes after each row."""
    height, width = pixels.shape[:2]
    stored = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
    rows = np.frombuffer(stored.tobytes(), np.uint8).reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xAB)
    made = {
        "height": height, "width": width, "encoding": encoding, "is_bigendian": int(big), "step": rows.shape[1],
        "data": array.array("B", rows.tobytes()),
    }
    return SimpleNamespace(**{**made, **fields})


def alpha(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.dstack([pixels, np.full(pixels.shape[:2], 77, pixels.dtype)])


def wide(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """16 bit with a low byte that must be dropped, not rounded."""
    return pixels.astype(np.uint16) * 256 + 0xFE


BGR = RGB[..., ::-1]
COLOURS = {
    "rgb8": RGB, "bgr8": BGR, "rgba8": alpha(RGB), "bgra8": alpha(BGR), "8UC3": BGR, "8UC4": alpha(BGR),
    "rgb16": wide(RGB), "bgr16": wide(BGR), "rgba16": wide(alpha(RGB)), "bgra16": wide(alpha(BGR)),
    "16UC3": wide(BGR), "16UC4": wide(alpha(BGR)), "32FC3": (BGR / 255).astype(np.float32),
}
GREYS = {
    "mono8": GREY, "8UC1": GREY, "mono16": wide(GREY), "16UC1": wide(GREY), "32FC1": (GREY / 255).astype(np.float32),
}
YUVS = ("yuv422", "uyvy", "yuv422_yuy2", "yuyv")
PLANARS = ("nv12", "nv21", "nv24")
# BT.601 in studio range
YUV_OF = {
    (255, 0, 0): (81, 90, 240), (0, 255, 0): (145, 54, 34), (0, 0, 255): (41, 240, 110),
    (255, 255, 255): (235, 128, 128),
}
BAYERS = tuple(f"bayer_{pattern}{bits}" for pattern in ("rggb", "bggr", "gbrg", "grbg") for bits in (8, 16))


def test_every_encoding_is_tested() -> None:
    assert {*COLOURS, *GREYS, *YUVS, *PLANARS, *BAYERS} == set(ENCODINGS)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("padding", [0, 3, 16])
@pytest.mark.parametrize("encoding", [*COLOURS, *GREYS])
def test_known_pixels(encoding: str, padding: int, big: bool) -> None:
    expected = RGB if encoding in COLOURS else np.dstack([GREY] * 3)
    rgb = image_to_rgb(message({**COLOURS, **GREYS}[encoding], encoding, padding, big))
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb, expected)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("encoding", YUVS)
def test_yuv422_of_pure_colours(encoding: str, padding: int) -> None:
    for colour, (y, u, v) in YUV_OF.items():
        pair = (u, y, v, y) if encoding in ("yuv422", "uyvy") else (y, u, y, v)
        stored = np.tile(np.array(pair, np.uint8).reshape(1, 2, 2), (3, 2, 1))
        got = image_to_rgb(message(stored, encoding, padding))
        assert got.shape == (3, 4, 3)
        np.testing.assert_allclose(got.astype(int), np.broadcast_to(colour, got.shape), atol=3)


def planar(encoding: str, padding: int = 0, size: tuple[int, int] = (6, 8)) -> tuple[Any, np.ndarray[Any, Any]]:
    """A message of four fields, each of one colour, and its pixels (H, W, 3)."""
    height, width = size
    colours = np.array(list(YUV_OF)).reshape(2, 2, 3)
    down, across = (np.arange(n) >= m for n, m in ((height, height // 2 // 2 * 2), (width, width // 2 // 2 * 2)))
    rgb = colours[down.astype(int)[:, None], across.astype(int)]
    yuv = np.array([[YUV_OF[tuple(pixel)] for pixel in row] for row in rgb.tolist()], np.uint8)
    chroma = yuv[..., 1:] if encoding == "nv24" else yuv[::2, ::2, 1:]
    chroma = chroma[..., ::-1] if encoding == "nv21" else chroma
    more = ((0, 0), (0, padding))
    data = np.pad(yuv[..., 0], more, constant_values=0xAB).tobytes()
    rows = chroma.reshape(len(chroma), -1)
    data += np.pad(rows, ((0, 0), (0, padding * (2 if encoding == "nv24" else 1))), constant_values=0xCD).tobytes()
    fields = {"step": width + padding, "data": array.array("B", data)}
    return message(np.zeros((height, width), np.uint8), encoding, **fields), rgb


@pytest.mark.parametrize("padding", [0, 5, 56])
@pytest.mark.parametrize("encoding", PLANARS)
def test_planes_of_luma_and_chroma(encoding: str, padding: int) -> None:
    msg, expected = planar(encoding, padding)
    got = image_to_rgb(msg)
    assert got.shape == (6, 8, 3) and got.dtype == np.uint8
    np.testing.assert_allclose(got.astype(int), expected, atol=3)


def test_nv12_and_nv24_of_greys_are_read_alike() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = []
    for encoding, pairs in (("nv12", 128), ("nv24", 512)):
        data = array.array("B", ramp.tobytes() + bytes([128]) * pairs)
        found.append(image_to_rgb(message(ramp, encoding, data=data)).astype(int))
    assert abs(found[0] - found[1]).max() <= 1
    assert (found[0][1, :2] == [[0] * 3, [1] * 3]).all() and (found[0][14, 11] == 255).all()


def test_an_odd_picture_of_nv24() -> None:
    msg, expected = planar("nv24", 3, (5, 7))
    np.testing.assert_allclose(image_to_rgb(msg).astype(int), expected, atol=3)


def mosaic(pattern: str, colour: tuple[int, int, int], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """What a sensor behind the filter `pattern` sees of one solid colour."""
    tile = np.array(["rgb".index(c) for c in pattern]).reshape(2, 2)
    height, width = size
    filters = np.tile(tile, (height // 2 + 1, width // 2 + 1))[:height, :width]
    return np.array(colour, np.uint8)[filters]


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (3, 3), (2, 2), (2, 6), (6, 2)])
@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (200, 90, 30)])
@pytest.mark.parametrize("encoding", BAYERS)
def test_bayer_of_solid_colours(encoding: str, colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    seen = mosaic(encoding[6:10], colour, size)
    for padding in (0, 4):
        for big in (False, True):
            stored = wide(seen) if encoding.endswith("16") else seen
            rgb = image_to_rgb(message(stored, encoding, padding, big))
            np.testing.assert_array_equal(rgb, np.broadcast_to(np.array(colour, np.uint8), (*size, 3)))


@pytest.mark.parametrize("kind", [bytes, bytearray, lambda d: np.frombuffer(bytes(d), np.uint8)])
def test_data_may_be_bytes_or_numpy(kind: Any) -> None:
    msg = message(RGB, "rgb8", padding=2)
    msg.data = kind(msg.data)
    np.testing.assert_array_equal(image_to_rgb(msg), RGB)


@pytest.mark.parametrize("padding", [0, 5])
def test_rgb8_is_a_view_of_the_message(padding: int) -> None:
    msg = message(RGB, "rgb8", padding)
    assert np.shares_memory(image_to_rgb(msg), np.frombuffer(msg.data, np.uint8))


def test_the_padding_of_the_last_row_may_be_missing() -> None:
    msg = message(RGB, "bgr8", padding=5)
    msg.data = msg.data[:-5]
    np.testing.assert_array_equal(image_to_rgb(msg), BGR)


def nan_image(value: float) -> np.ndarray[Any, Any]:
    image = np.full((4, 4), 0.5, np.float32)
    image[2, 1] = value
    return image


def changed(msg: Any, **fields: Any) -> Any:
    return SimpleNamespace(**{**vars(msg), **fields})


PLANES = planar("nv24")[0]
FAULTS = {
    "no width": (message(RGB, "rgb8", width=0), "zero_size", "0x3"),
    "no height": (message(RGB, "rgb8", height=0), "zero_size", "2x0"),
    "step of another width": (message(RGB, "rgb8", step=5), "bad_step", "step >= 6"),
    "step zero": (message(RGB, "rgb8", step=0), "bad_step", "got 0"),
    "step in pixels": (message(wide(GREY), "mono16", step=2), "bad_step", "step >= 4"),
    "cut": (message(RGB, "rgb8", data=bytes(17)), "short_data", "at least 18 bytes of data (3 rows with step 6)"),
    "empty": (message(RGB, "rgb8", data=b""), "short_data", "got 0"),
    "absurd size": (message(RGB, "rgb8", height=2**32 - 1), "short_data", "got 18"),
    "unknown encoding": (message(RGB, "nv12x"), "unknown_encoding", "'nv12x'"),
    "empty encoding": (message(RGB, ""), "unknown_encoding", "bayer_rggb8"),
    "odd yuv": (message(np.zeros((2, 3, 2), np.uint8), "yuv422"), "odd_width", "got 3"),
    "odd width of planes": (message(np.zeros((6, 5), np.uint8), "nv12"), "odd_width", "even width for nv12, got 5"),
    "odd height of planes": (message(np.zeros((5, 4), np.uint8), "nv21"), "odd_height", "even height for nv21, got 5"),
    "planes without chroma": (message(np.zeros((6, 8), np.uint8), "nv12"), "short_data", "at least 72 bytes"),
    "planes cut": (changed(PLANES, data=PLANES.data[:-1]), "short_data", "expected at least 144 bytes of data"),
    "planes that overlap": (changed(PLANES, step=7), "bad_step", "8 bytes of Y in nv24"),
    "nan": (message(nan_image(np.nan), "32FC1"), "not_finite", "0..1"),
    "infinity": (message(nan_image(-np.inf), "32FC1"), "not_finite", "0..1"),
    "metres": (message(nan_image(4.5), "32FC1"), "out_of_range", "0.5 .. 4.5"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_image_faults_are_named(name: str) -> None:
    msg, reason, words = FAULTS[name]
    with pytest.raises(ConversionError) as caught:
        image_to_rgb(msg)
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_slight_overshoot_of_floats_is_clipped() -> None:
    rgb = image_to_rgb(message(np.array([[-0.005, 1.005, 0.5]], np.float32), "32FC1"))
    assert rgb[0, :, 0].tolist() == [0, 255, 128]


def photo() -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:48, :64]
    return np.dstack([4 * x, 5 * y, 255 - 2 * (x + y)]).astype(np.uint8)


def coded(extension: str, pixels: np.ndarray[Any, Any], *options: int) -> bytes:
    ok, data = cv2.imencode(extension, pixels, list(options))
    assert ok
    return bytes(data)


def compressed(data: bytes, stated: str) -> Any:
    return SimpleNamespace(format=stated, data=array.array("B", data))


BGR_PHOTO = np.ascontiguousarray(photo()[..., ::-1])


@pytest.mark.parametrize(
    "stated",
    ["png", "rgb8; png compressed bgr8", "bgr8; png compressed bgr8", "PNG", "bayer_rggb8; png compressed bgr8"],
)
def test_png_is_exact(stated: str) -> None:
    np.testing.assert_array_equal(compressed_to_rgb(compressed(coded(".png", BGR_PHOTO), stated)), photo())


@pytest.mark.parametrize(
    "stated",
    [
        "jpeg", "jpg", "rgb8; jpeg compressed bgr8", "bgr8; jpeg compressed bgr8", "mjpeg",
        "bayer_rggb8; jpeg compressed bgr8",
    ],
)
def test_jpeg_colours(stated: str) -> None:
    rgb = compressed_to_rgb(compressed(coded(".jpg", BGR_PHOTO), stated))
    np.testing.assert_allclose(rgb.astype(int), photo(), atol=24)
    assert np.abs(rgb.astype(int) - photo()).mean() < 4


def test_the_bytes_decide_over_the_stated_format() -> None:
    np.testing.assert_array_equal(compressed_to_rgb(compressed(coded(".png", BGR_PHOTO), "jpeg")), photo())


@pytest.mark.parametrize("stated", ["", "JFIF", "bgr8"])
def test_the_bytes_decide_also_where_no_such_format_is_stated(stated: str) -> None:
    for ending in (".jpg", ".png"):
        data = coded(ending, BGR_PHOTO)
        np.testing.assert_array_equal(
            compressed_to_rgb(compressed(data, stated)), compressed_to_rgb(compressed(data, ending[1:]))
        )


def test_channels_stated_as_not_swapped_are_not_swapped() -> None:
    rgb = compressed_to_rgb(compressed(coded(".png", photo()), "rgb8; png compressed rgb8"))
    np.testing.assert_array_equal(rgb, photo())


@pytest.mark.parametrize("stated", ["mono8; jpeg compressed ", "mono8; png compressed "])
def test_grey_pictures(stated: str) -> None:
    grey = np.full((9, 7), 130, np.uint8)
    rgb = compressed_to_rgb(compressed(coded(".jpg" if "jpeg" in stated else ".png", grey), stated))
    np.testing.assert_array_equal(rgb, np.full((9, 7, 3), 130))


def test_16_bit_png() -> None:
    rgb = compressed_to_rgb(compressed(coded(".png", wide(BGR_PHOTO)), "bgr16; png compressed bgr16"))
    np.testing.assert_array_equal(rgb, photo())
    grey = compressed_to_rgb(compressed(coded(".png", wide(GREY)), "16UC1; png compressed "))
    np.testing.assert_array_equal(grey, np.dstack([GREY] * 3))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_cameras_that_fill_fewer_than_16_bits(bits: int) -> None:
    """A camera that puts 12 bits into 16 and does not shift them up gives the same picture as one that does."""
    values, full = GREY.astype(np.uint16) << (bits - 8), ValueRange(high=255 << (bits - 8))
    expected = np.dstack([GREY] * 3)
    for big in (False, True):
        for padding in (0, 4):
            msg = message(values, "mono16", padding, big)
            np.testing.assert_array_equal(image_to_rgb(msg, full), expected)
    colours = message(RGB.astype(np.uint16) << (bits - 8), "rgb16")
    np.testing.assert_array_equal(image_to_rgb(colours, full), RGB)
    flat = message(mosaic("rggb", RED, (6, 8)).astype(np.uint16) << (bits - 8), "bayer_rggb16")
    np.testing.assert_array_equal(image_to_rgb(flat, full), np.broadcast_to(np.array(RED, np.uint8), (6, 8, 3)))
    png = compressed(coded(".png", values), "mono16; png compressed ")
    np.testing.assert_array_equal(compressed_to_rgb(png, full), expected)
    # what is beyond is white, and 8-bit pictures stay
    beyond = message(np.full((3, 4), 65535, np.uint16), "mono16")
    np.testing.assert_array_equal(image_to_rgb(beyond, full), np.full((3, 4, 3), 255))
    np.testing.assert_array_equal(image_to_rgb(message(RGB, "rgb8"), full), RGB)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", ["mono16", "32FC1"])
def test_a_range_of_values(encoding: str, big: bool) -> None:
    """A thermal camera: 20 and 40 are black and white, what lies between is in proportion, beyond is clipped."""
    dtype = np.uint16 if encoding == "mono16" else np.float32
    msg = message(np.array([[0, 20, 25, 30, 40, 900]], dtype), encoding, 4, big)
    expected = np.dstack([np.array([[0, 0, 64, 128, 255, 255]])] * 3)  # 63.75, 127.5
    np.testing.assert_array_equal(image_to_rgb(msg, ValueRange(20, 40)), expected)


def test_a_range_below_zero_and_one_that_is_none() -> None:
    celsius = message(np.array([[-40, -20, 0, 60]], np.float32), "32FC1")
    np.testing.assert_array_equal(image_to_rgb(celsius, ValueRange(-20, 60))[0, :, 0], [0, 0, 64, 255])
    words = message(np.array([[0, 256, 65535]], np.uint16), "mono16")
    for low, high in ((0, 0), (300, 300), (300, 20)):
        np.testing.assert_array_equal(image_to_rgb(words, ValueRange(low, high))[0, :, 0], [0, 1, 255])
        with pytest.raises(ConversionError, match=r"expected floats in 0..1, got -40 .. 60; set min_image_value"):
            image_to_rgb(celsius, ValueRange(low, high))


@pytest.mark.parametrize("stored", ["mono16", "mono16 big", "32FC1", "png"])
def test_dynamic_scaling(stored: str) -> None:
    """Of raw counts between 7300 and 8300 all of black to white is used, and a dead and a hot pixel do not matter."""
    ramp = np.tile(np.linspace(7300, 8300, 500), (400, 1)).round().astype(np.uint16)
    ramp[100, 100], ramp[200, 300] = 0, 65535
    if stored == "png":
        got = compressed_to_rgb(compressed(coded(".png", ramp), "16UC1; png compressed "), ValueRange(dynamic=True))
    else:
        encoding = stored.split()[0]
        values = ramp.astype(np.float32) if encoding == "32FC1" else ramp
        got = image_to_rgb(message(values, encoding, big="big" in stored), ValueRange(20, 40, dynamic=True))
    # half a per cent of 1000 counts at each end: 5
    expected = np.clip((ramp[0] - 7305.0) * 255 / 990, 0, 255)
    assert np.abs(got[0, :, 0] - expected).max() <= 1
    assert got[100, 100].tolist() == [0, 0, 0] and got[200, 300].tolist() == [255, 255, 255]


def test_dynamic_scaling_takes_all_colours_of_a_mosaic_and_of_pixels_alike() -> None:
    """One range for all channels, else colours would shift; the rows of a mosaic take turns and both count."""
    tall = np.zeros((2000, 640), np.uint16)
    tall[::2], tall[1::2] = 1000, 3000
    assert set(np.unique(image_to_rgb(message(tall, "mono16"), ValueRange(dynamic=True)))) == {0, 255}
    pixels = np.full((50, 60, 3), (1000, 2000, 3000), np.uint16)
    rgb = image_to_rgb(message(pixels, "rgb16"), ValueRange(dynamic=True))
    np.testing.assert_array_equal(rgb, np.broadcast_to(np.array([0, 128, 255]), (50, 60, 3)))


@pytest.mark.parametrize("shape", [(2000, 3000, 4), (5, 40000, 4), (40000, 5, 4)])
def test_dynamic_scaling_leaves_alpha_and_a_line_of_numbers_out(shape: tuple[int, int, int]) -> None:
    """Some thermal cameras put a line of telemetry above the picture; alpha is no brightness."""
    pixels = np.full(shape, 5000, np.uint16)
    pixels[:, ::2], pixels[..., 3] = 6000, 65535
    if shape[0] > 1000:
        pixels[0] = 65535
    rgb = image_to_rgb(message(pixels, "rgba16"), ValueRange(dynamic=True))
    assert set(np.unique(rgb[1:])) == {0, 255}


def test_dynamic_scaling_of_a_png_of_a_mosaic() -> None:
    values = mosaic("rggb", (200, 100, 0), (6, 8)) * np.uint16(5) + np.uint16(7300)
    png = compressed(coded(".png", values), "bayer_rggb16; png compressed ")
    rgb = compressed_to_rgb(png, ValueRange(dynamic=True))
    np.testing.assert_array_equal(rgb, np.broadcast_to(np.array([255, 128, 0]), (6, 8, 3)))


def test_the_range_of_the_settings_is_theirs() -> None:
    settings = Settings(min_image_value=20.0, max_image_value=40.0, do_dynamic_scaling=True)
    assert ValueRange.of(settings) == ValueRange(20.0, 40.0, True)
    assert ValueRange.of(Settings()) == ValueRange() and ValueRange().is_own


def test_dynamic_scaling_of_a_flat_picture_and_of_floats_that_are_none() -> None:
    flat = message(np.full((4, 5), 7300, np.uint16), "mono16")
    np.testing.assert_array_equal(image_to_rgb(flat, ValueRange(dynamic=True)), np.zeros((4, 5, 3)))
    for values in (ValueRange(dynamic=True), ValueRange(20, 40)):
        with pytest.raises(ConversionError, match="expected finite floats, got NaN or infinity"):
            image_to_rgb(message(np.array([[20, np.nan]], np.float32), "32FC1"), values)


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_png_of_a_bayer_mosaic(pattern: str) -> None:
    data = coded(".png", mosaic(pattern, RED, (6, 8)))
    rgb = compressed_to_rgb(compressed(data, f"bayer_{pattern}8; png compressed "))
    np.testing.assert_array_equal(rgb, np.broadcast_to(np.array(RED, np.uint8), (6, 8, 3)))


JPEG, PNG = coded(".jpg", BGR_PHOTO), coded(".png", BGR_PHOTO)
PROGRESSIVE = coded(".jpg", BGR_PHOTO, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTS = coded(".jpg", BGR_PHOTO, cv2.IMWRITE_JPEG_RST_INTERVAL, 2)


def with_thumbnail(jpeg: bytes) -> bytes:
    """`jpeg` with an APP1 segment that holds a whole JPEG, end marker included."""
    thumbnail = b"Exif\x00\x00" + coded(".jpg", BGR_PHOTO[:8, :8])
    return jpeg[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + jpeg[2:]


@pytest.mark.parametrize("jpeg", [JPEG, PROGRESSIVE, RESTARTS, with_thumbnail(JPEG)])
def test_whole_jpeg_with_trailing_bytes_is_accepted(jpeg: bytes) -> None:
    expected = compressed_to_rgb(compressed(jpeg, "jpeg"))
    assert np.abs(expected.astype(int) - photo()).mean() < 4
    for tail in (b"\x00" * 37, b"\xff\xd9", b"tail"):
        np.testing.assert_array_equal(compressed_to_rgb(compressed(jpeg + tail, "jpeg")), expected)


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "restarts", "thumbnail", "png"])
def test_every_truncation_is_refused(kind: str) -> None:
    whole = {
        "jpeg": JPEG, "progressive": PROGRESSIVE, "restarts": RESTARTS, "thumbnail": with_thumbnail(JPEG), "png": PNG,
    }[kind]
    for cut in [*range(1, len(whole) - 1, 7), len(whole) - 1]:
        for filling in (b"", b"\x00" * (len(whole) - cut)):
            with pytest.raises(ConversionError) as caught:
                # the PNG's last byte is no zero, so zeros instead of the tail break its checksum
                compressed_to_rgb(compressed(whole[:cut] + filling, "png" if kind == "png" else "jpeg"))
            assert caught.value.reason == "corrupt_image"


def test_a_png_without_its_end_chunk_is_refused() -> None:
    for cut in (PNG[:-12], PNG[:-1]):
        with pytest.raises(ConversionError, match="without its end chunk IEND; the message was truncated") as caught:
            compressed_to_rgb(compressed(cut, "png"))
        assert caught.value.reason == "corrupt_image"


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["colour", "grey", "restarts"])
def test_a_cut_jpeg_with_an_end_marker_put_on_is_refused(kind: str, kept: float) -> None:
    big = cv2.resize(BGR_PHOTO, (320, 240))
    whole = {
        "colour": coded(".jpg", big),
        "grey": coded(".jpg", big[..., 0]),
        "restarts": coded(".jpg", big, cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
    }[kind]
    compressed_to_rgb(compressed(whole, "jpeg"))
    scan = whole.index(b"\xff\xda")
    cut = whole[: scan + int(kept * (len(whole) - scan))].rstrip(b"\xff") + b"\xff\xd9"
    with pytest.raises(ConversionError, match="last rows") as caught:
        compressed_to_rgb(compressed(cut, "jpeg"))
    assert caught.value.reason == "corrupt_image"


@pytest.mark.parametrize("interval", [3, 1])  # restarts are numbered from 0 to 7, and then from 0 again
def test_a_jpeg_cut_within_a_marker_or_where_a_restart_is_due_is_refused(interval: int) -> None:
    whole = coded(".jpg", cv2.resize(BGR_PHOTO, (83, 61)), cv2.IMWRITE_JPEG_RST_INTERVAL, interval)
    scan = whole.index(b"\xff\xda") + 14
    cuts = [n for n in range(scan, len(whole) - 40) if whole[n - 1] == 0xFF or whole[n] == 0xFF]
    assert len(cuts) > 10
    for n in cuts:
        with pytest.raises(ConversionError, match="last rows"):
            compressed_to_rgb(compressed(whole[:n] + b"\xff\xd9", "jpeg"))


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_whole_jpeg_that_ends_grey_after_fill_bytes_is_accepted(progressive: int) -> None:
    """Any number of FF may stand before a marker (ITU T.81, B.1.1.2)."""
    ends_grey = cv2.resize(BGR_PHOTO, (64, 48))
    ends_grey[32:] = 128
    whole = coded(".jpg", ends_grey, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    expected = compressed_to_rgb(compressed(whole, "jpeg"))
    assert (expected[-2:] == 128).all()
    filled = whole[:-2] + b"\xff\xff\xff" + whole[-2:]
    np.testing.assert_array_equal(compressed_to_rgb(compressed(filled, "jpeg")), expected)


@pytest.mark.parametrize("interval", [0, 1, 3])
@pytest.mark.parametrize("shape", [(48, 64, 3), (45, 67, 3), (48, 64)])
def test_a_whole_grey_jpeg_is_accepted(shape: tuple[int, ...], interval: int) -> None:
    flat = np.full(shape, 128, np.uint8)
    rgb = compressed_to_rgb(compressed(coded(".jpg", flat, cv2.IMWRITE_JPEG_RST_INTERVAL, interval), "jpeg"))
    np.testing.assert_array_equal(rgb, np.full((*shape[:2], 3), 128))


def test_a_flipped_bit_of_a_png_is_refused() -> None:
    broken = bytearray(PNG)
    broken[len(broken) // 2] ^= 4
    with pytest.raises(ConversionError, match="checksum") as caught:
        compressed_to_rgb(compressed(bytes(broken), "png"))
    assert caught.value.reason == "corrupt_image"


COMPRESSED_FAULTS = {
    "no data": (b"", "jpeg", "zero_size", "no data"),
    "not a picture": (b"hello, world", "jpeg", "corrupt_image", "begins like"),
    "headers only": (b"\xff\xd8\xff\xd9", "jpeg", "corrupt_image", "do not decode"),
    "depth": (b"\x00" * 12 + PNG, "16UC1; compressedDepth png", "unknown_format", "colour camera"),
    "old depth": (PNG, "16UC1; compressedDepth", "unknown_format", "distances"),
    "tiff": (b"II*\x00", "rgb8; tiff compressed ", "unknown_format", "tiff"),
    "video": (b"\x00\x00\x00\x01", "h264", "unknown_format", "'h264'"),
    "nothing stated": (b"II*\x00", "", "unknown_format", "''"),
}


@pytest.mark.parametrize("name", COMPRESSED_FAULTS)
def test_compressed_faults_are_named(name: str) -> None:
    data, stated, reason, words = COMPRESSED_FAULTS[name]
    with pytest.raises(ConversionError) as caught:
        compressed_to_rgb(compressed(data, stated))
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_the_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ConversionError("bad_step", "expected 6, got 5")))
    assert (error.reason, str(error)) == ("bad_step", "expected 6, got 5")


def test_import_needs_no_ros() -> None:
    code = "import sys, glesam_ros.ros.conversions; print([m for m in ('rclpy', 'sensor_msgs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestArrayToImage:
    """With the real message class."""

    @pytest.fixture(autouse=True)
    def messages(self) -> None:
        pytest.importorskip("sensor_msgs.msg")
        from std_msgs.msg import Header

        self.header = Header(frame_id="camera")
        self.header.stamp.sec = 12

    @pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8", "mono16"])
    def test_round_trip(self, encoding: str) -> None:
        stored = {"mono8": GREY, "mono16": wide(GREY)}.get(encoding, RGB)
        msg = array_to_image(stored, encoding, self.header)
        expected = RGB if encoding in ("rgb8", "bgr8") else np.dstack([GREY] * 3)
        np.testing.assert_array_equal(image_to_rgb(msg), expected)
        assert (msg.header.frame_id, msg.header.stamp.sec) == ("camera", 12)

    def test_fields_and_bytes(self) -> None:
        msg = array_to_image(np.array([[1, 258, 65535]], np.uint16), "mono16", self.header)
        assert (msg.height, msg.width, msg.step, msg.encoding) == (1, 3, 6, "mono16")
        assert np.frombuffer(msg.data, np.uint16).tolist() == [1, 258, 65535]
        assert msg.is_bigendian == int(sys.byteorder == "big")
        msg = array_to_image(RGB, "bgr8", self.header)
        assert bytes(msg.data) == BGR.tobytes()
        msg = array_to_image(np.array([[0.25]], np.float32), "32FC1", self.header)
        assert np.frombuffer(msg.data, np.float32).tolist() == [0.25]

    def test_strided_arrays(self) -> None:
        big = np.arange(24, dtype=np.uint16).reshape(4, 6)
        msg = array_to_image(big[::2, 1:4], "mono16", self.header)
        assert np.frombuffer(msg.data, np.uint16).tolist() == [1, 2, 3, 13, 14, 15]
        msg = array_to_image(RGB[:, ::-1], "bgr8", self.header)
        np.testing.assert_array_equal(image_to_rgb(msg), RGB[:, ::-1])

    def test_the_message_goes_through_serialization(self) -> None:
        serialization = pytest.importorskip("rclpy.serialization")
        from sensor_msgs.msg import Image

        msg = array_to_image(RGB, "bgr8", self.header)
        back = serialization.deserialize_message(serialization.serialize_message(msg), Image)
        assert back == msg
        np.testing.assert_array_equal(image_to_rgb(back), RGB)

    @pytest.mark.parametrize(
        ("pixels", "encoding", "reason"),
        [
            (GREY, "mono16", "bad_array"),
            (RGB, "mono8", "bad_array"),
            (alpha(RGB), "rgb8", "bad_array"),
            (GREY.astype(np.float64), "32FC1", "bad_array"),
            (np.zeros((0, 4), np.uint8), "mono8", "bad_array"),
            (RGB, "hsv8", "unknown_encoding"),
        ],
    )
    def test_faults(self, pixels: np.ndarray[Any, Any], encoding: str, reason: str) -> None:
        with pytest.raises(ConversionError) as caught:
            array_to_image(pixels, encoding, self.header)
        assert caught.value.reason == reason

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_compressed_label_maps_come_back_exactly(self, dtype: type[np.generic]) -> None:
        labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (30, 41)).astype(dtype)[::-2, ::-1]
        encoding = {np.uint8: "mono8", np.uint16: "mono16"}[dtype]
        msg = array_to_compressed(labels, encoding, self.header)
        assert msg.format == f"{encoding}; png compressed "
        assert (msg.header.frame_id, msg.header.stamp.sec) == ("camera", 12)
        decoded = cv2.imdecode(np.frombuffer(msg.data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert decoded.dtype == dtype
        np.testing.assert_array_equal(decoded, labels)

    @pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
    def test_compressed_pictures_keep_their_colours(self, encoding: str) -> None:
        picture = np.empty((32, 48, 3), np.uint8)
        picture[:, :24], picture[:, 24:] = (200, 40, 20), (10, 60, 220)
        msg = array_to_compressed(picture, encoding, self.header)
        assert msg.format == f"{encoding}; jpeg compressed bgr8"
        apart = np.abs(compressed_to_rgb(msg).astype(int) - picture)
        assert apart[:, :16].max() <= 4 and apart[:, 32:].max() <= 4
        assert len(msg.data) < picture.nbytes / 4

    @pytest.mark.parametrize(
        ("pixels", "encoding", "reason"),
        [
            (GREY, "mono16", "bad_array"), (RGB, "mono8", "bad_array"), (GREY, "32FC1", "unknown_encoding"),
            (np.zeros((4, 0, 3), np.uint8), "rgb8", "bad_array"),
            (np.zeros((1, 65501, 3), np.uint8), "rgb8", "bad_array"),
        ],
    )
    def test_faults_of_compression(self, pixels: np.ndarray[Any, Any], encoding: str, reason: str) -> None:
        with pytest.raises(ConversionError) as caught:
            array_to_compressed(pixels, encoding, self.header)
        assert caught.value.reason == reason
