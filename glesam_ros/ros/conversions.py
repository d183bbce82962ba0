"""Between sensor_msgs and (H, W, 3) uint8 RGB, without cv_bridge and with no more copies than the layout asks for.

Importable without ROS: messages are read by their fields, so those of rclpy and of the `rosbags` library both fit.
"""

from __future__ import annotations

import re
import sys
import zlib
from typing import Any, NamedTuple

import cv2
import numpy as np

from glesam_ros.picture_files import end_of_jpeg
from glesam_ros.validation import UInt8Array
from glesam_ros.value_range import OWN_RANGE, ValueRange

FLOAT_TOLERANCE = 0.01
"""Float images may leave 0..1 by this much (resampling overshoot) and are clipped; further away they are refused."""


class ConversionError(ValueError):
    """A message that cannot become an image.

    Attributes:
        reason: short slug for counters: zero_size, bad_step, short_data, unknown_encoding, odd_width, odd_height,
            not_finite, out_of_range, corrupt_image, unknown_format, bad_array.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ConversionError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class _Layout(NamedTuple):
    """How one pixel of an encoding lies in memory."""

    channels: int
    depth: int  # bytes of one channel
    to_rgb: int | None  # cv2.cvtColor code once the channels are 8 bit; None where they are RGB already


# ROS names a Bayer pattern by the first two pixels of rows 0 and 1 (rggb), OpenCV by pixels 1 and 2 of row 1 (BG).
_BAYER = {
    "rggb": cv2.COLOR_BayerBG2RGB,
    "bggr": cv2.COLOR_BayerRG2RGB,
    "gbrg": cv2.COLOR_BayerGR2RGB,
    "grbg": cv2.COLOR_BayerGB2RGB,
}

_LAYOUTS: dict[str, _Layout] = {
    "rgb8": _Layout(3, 1, None),
    "bgr8": _Layout(3, 1, cv2.COLOR_BGR2RGB),
    "rgba8": _Layout(4, 1, cv2.COLOR_RGBA2RGB),
    "bgra8": _Layout(4, 1, cv2.COLOR_BGRA2RGB),
    "mono8": _Layout(1, 1, cv2.COLOR_GRAY2RGB),
    "rgb16": _Layout(3, 2, None),
    "bgr16": _Layout(3, 2, cv2.COLOR_BGR2RGB),
    "rgba16": _Layout(4, 2, cv2.COLOR_RGBA2RGB),
    "bgra16": _Layout(4, 2, cv2.COLOR_BGRA2RGB),
    "mono16": _Layout(1, 2, cv2.COLOR_GRAY2RGB),
    "yuv422": _Layout(2, 1, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": _Layout(2, 1, cv2.COLOR_YUV2RGB_YUY2),
    "32FC1": _Layout(1, 4, cv2.COLOR_GRAY2RGB),
    "32FC3": _Layout(3, 4, cv2.COLOR_BGR2RGB),
    **{f"bayer_{pattern}8": _Layout(1, 1, code) for pattern, code in _BAYER.items()},
    **{f"bayer_{pattern}16": _Layout(1, 2, code) for pattern, code in _BAYER.items()},
}


class _Planar(NamedTuple):
    """A plane of Y, then one of pairs of chroma, as V4L2 has them: what hardware decoders and Jetson's cameras give."""

    every: int  # pixels of Y, across and down, that share a pair
    to_rgb: int | None  # cv2.cvtColorTwoPlane code; None where no pixel shares its pair


_PLANAR: dict[str, _Planar] = {
    "nv12": _Planar(2, cv2.COLOR_YUV2RGB_NV12),
    "nv21": _Planar(2, cv2.COLOR_YUV2RGB_NV21),
    "nv24": _Planar(1, None),
}
_STUDIO_TO_RGB = np.array(
    [[1.164383, 0, 1.596027, -222.921], [1.164383, -0.391762, -0.812968, 135.576], [1.164383, 2.017232, 0, -276.836]]
)
"""(Y, U, V, 1) -> RGB by BT.601 in studio range, as OpenCV reads the other YUV encodings."""

_ALIASES = {
    "uyvy": "yuv422",
    "yuyv": "yuv422_yuy2",
    "8UC1": "mono8",
    "8UC3": "bgr8",  # OpenCV's own order
    "8UC4": "bgra8",
    "16UC1": "mono16",
    "16UC3": "bgr16",
    "16UC4": "bgra16",
}

ENCODINGS = (*_LAYOUTS, *_PLANAR, *_ALIASES)
"""Every `sensor_msgs/Image.encoding` that `image_to_rgb` understands."""


def message_to_rgb(msg: Any, values: ValueRange = OWN_RANGE) -> UInt8Array:
    """`compressed_to_rgb` of a `sensor_msgs/CompressedImage`, `image_to_rgb` of an Image. Raises ConversionError."""
    return (compressed_to_rgb if hasattr(msg, "format") else image_to_rgb)(msg, values)


def image_to_rgb(msg: Any, values: ValueRange = OWN_RANGE) -> UInt8Array:
    """Pixels of a `sensor_msgs/Image` as (H, W, 3) uint8 RGB.

    rgb8 comes back as a view of `msg.data` (rows may be padded: do not write into it), everything else as one new
    array. 16-bit channels become 8-bit by ``>> 8``; 32-bit floats are expected in 0..1 and become
    ``round(255 * value)``; both by ``round(255 * (value - low) / (high - low))``, clipped, in another range, and before
    demosaicing. Alpha is dropped. The generic OpenCV names 8UC3, 16UC3 and 32FC3 are read in BGR order. The plane of
    chroma of nv12, nv21 and nv24 follows that of Y; `step` is the stride of both, of nv24's chroma twice that.

    Args:
        msg: sensor_msgs/Image of rclpy or rosbags; `data` may be array.array, bytes or a numpy array.
        values: what is black and white of channels of 16 bits or floats.

    Raises:
        ConversionError: zero_size, unknown_encoding, odd_width (of yuv422, nv12, nv21), odd_height (of nv12, nv21),
            bad_step, short_data, not_finite or out_of_range (of floats).
    """
    height, width, step = int(msg.height), int(msg.width), int(msg.step)
    if height < 1 or width < 1:
        raise ConversionError(
            "zero_size", f"expected width and height of at least 1 pixel, got {width}x{height}; check the camera driver"
        )
    name = _ALIASES.get(msg.encoding, msg.encoding)
    if name in _PLANAR:
        return _planar_to_rgb(msg, _PLANAR[name])
    layout = _LAYOUTS.get(name)
    if layout is None:
        raise ConversionError(
            "unknown_encoding",
            f"expected encoding one of {', '.join(ENCODINGS)}; got {msg.encoding!r}; set the camera driver to one of "
            "them or convert with image_proc",
        )
    if name.startswith("yuv422"):
        _need_even(msg, "width")
    pixel = layout.channels * layout.depth
    # the padding of the last row may be missing
    data = _checked_data(msg, width * pixel, f"{width} pixels of {pixel} bytes", step * (height - 1) + width * pixel)
    big = bool(msg.is_bigendian)
    if layout.depth == 4:
        floats = _view(data, height, width, layout.channels, step, np.dtype(">f4" if big else "<f4"))
        channels = _float_to_byte(floats, values)
    elif layout.depth == 2 and not values.is_own:
        words = _view(data, height, width, layout.channels, step, np.dtype(">u2" if big else "<u2"))
        channels = values.to_byte(words)
    elif layout.depth == 2:
        # value >> 8 is the high byte of each value, wherever it lies
        pairs = _view(data, height, width * layout.channels, 2, step, np.dtype(np.uint8))
        high = np.asarray(cv2.extractChannel(pairs, 0 if big else 1), np.uint8)
        channels = high.reshape(height, width, layout.channels)
    else:
        channels = _view(data, height, width, layout.channels, step, np.dtype(np.uint8))
    return _to_rgb(channels, layout.to_rgb)


def _planar_to_rgb(msg: Any, layout: _Planar) -> UInt8Array:
    height, width, step = int(msg.height), int(msg.width), int(msg.step)
    if layout.every == 2:
        _need_even(msg, "width")
        _need_even(msg, "height")
    rows, across, stride = height // layout.every, width // layout.every, 2 * step // layout.every
    needed = step * height + stride * (rows - 1) + 2 * across
    data = _checked_data(msg, width, f"{width} bytes of Y", needed)
    luma = _view(data, height, width, 1, step, np.dtype(np.uint8))[..., 0]
    chroma = _view(data[step * height :], rows, across, 2, stride, np.dtype(np.uint8))
    if layout.to_rgb is not None:
        return np.asarray(cv2.cvtColorTwoPlane(luma, chroma, layout.to_rgb), np.uint8)
    return np.asarray(cv2.transform(cv2.merge([luma, *cv2.split(chroma)]), _STUDIO_TO_RGB), np.uint8)


def _need_even(msg: Any, side: str) -> None:
    if (value := getattr(msg, side)) % 2:
        raise ConversionError(
            f"odd_{side}", f"expected an even {side} for {msg.encoding}, got {value}; set the camera to an even {side}"
        )


def _checked_data(msg: Any, row: int, what: str, needed: int) -> UInt8Array:
    """The bytes of a message whose rows have at least `row` bytes, which are `what`, and which has `needed` in all."""
    if msg.step < row:
        raise ConversionError(
            "bad_step",
            f"expected step >= {row} bytes ({what} in {msg.encoding}), got {msg.step}; the publisher must set step to "
            "the length of one row",
        )
    size = len(msg.data) * getattr(msg.data, "itemsize", 1)
    if size < needed:
        raise ConversionError(
            "short_data",
            f"expected at least {needed} bytes of data ({msg.height} rows with step {msg.step}) in {msg.encoding}, got "
            f"{size}; the message was cut or its height, width, step do not belong to it",
        )
    return np.frombuffer(msg.data, np.uint8)


def compressed_to_rgb(msg: Any, values: ValueRange = OWN_RANGE) -> UInt8Array:
    """Pixels of a `sensor_msgs/CompressedImage` (JPEG or PNG) as (H, W, 3) uint8 RGB.

    The format strings of image_transport ("bgr8; jpeg compressed bgr8") and of plain drivers ("jpeg", "png", "") are
    understood. 16-bit PNG becomes 8-bit as with `image_to_rgb`; a Bayer mosaic stored as it is is demosaiced; alpha is
    dropped; the EXIF orientation is ignored, so that masks fit the pixels as stored.

    Args:
        msg: sensor_msgs/CompressedImage of rclpy or rosbags; `data` may be array.array, bytes or a numpy array.
        values: as for `image_to_rgb`.

    Raises:
        ConversionError: unknown_format (also compressedDepth), zero_size (no data), corrupt_image (cut or broken).
    """
    stated = str(msg.format)
    source, _, coding = stated.rpartition(";")
    if "compresseddepth" in stated.lower():
        raise ConversionError(
            "unknown_format",
            f"expected format jpeg or png of a colour camera, got {stated!r}, which holds distances; subscribe to the "
            "colour camera's compressed topic",
        )
    data = bytes(memoryview(msg.data))
    if not data:
        raise ConversionError("zero_size", f"expected a picture ({stated!r}), got no data; check the camera driver")
    # the bytes decide: many drivers state one format and send the other, or none
    jpeg_end = None
    if data[:2] == b"\xff\xd8":
        jpeg_end = end_of_jpeg(data)
        if jpeg_end is None:  # OpenCV 4 would decode it with the rest left grey
            raise _truncated("JPEG", len(data), "its end marker FF D9")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)
    elif not re.search(r"\b(m?jpe?g|png)\b", stated.lower()):
        raise ConversionError(
            "unknown_format", f"expected format jpeg or png, got {stated!r}; set the camera driver to one of them"
        )
    else:
        raise ConversionError(
            "corrupt_image",
            f"expected data that begins like a JPEG or PNG ({stated!r}), got {data[:8].hex(' ')}; the message was "
            "cut or is of another format",
        )
    bayer = re.match(r"bayer_(\w{4})(8|16)$", source.strip())
    mosaic = bayer is not None and bayer[1] in _BAYER and "compressed bgr" not in coding
    kind = cv2.IMREAD_GRAYSCALE if mosaic else cv2.IMREAD_COLOR
    flags = kind | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ConversionError("corrupt_image", f"expected a whole picture, OpenCV says: {error}") from error
    if pixels is None:
        raise ConversionError(
            "corrupt_image",
            f"expected a whole picture ({stated!r}), got {len(data)} bytes that do not decode; check the network and "
            "the camera driver",
        )
    if jpeg_end and (pixels[-2:, -2:] == 128).all():
        # grey like the blocks for which data were missing; in a whole picture more data before the end change nothing
        # not behind the first half of a marker, and once more after the restart that is due next
        due = len(re.findall(rb"\xff[\xd0-\xd7]", data[data.rfind(b"\xff\xda", 0, jpeg_end) : jpeg_end])) % 8
        more = b"\x55" * 64
        longer = data[:jpeg_end].rstrip(b"\xff") + more + bytes((0xFF, 0xD0 + due)) + more + data[jpeg_end:]
        decoded: Any = cv2.imdecode(np.frombuffer(longer, np.uint8), flags)
        if not np.array_equal(pixels, decoded):
            raise _truncated("JPEG", len(data), "its last rows")
    if pixels.dtype == np.uint16:
        pixels = values.to_byte(pixels)
    if mosaic and bayer is not None:
        return _to_rgb(pixels[..., None], _BAYER[bayer[1]])
    # image_transport states "compressed rgb8" when the channels were not swapped before the coder
    return pixels if "compressed rgb" in coding else _to_rgb(pixels, cv2.COLOR_BGR2RGB)


_OUT = {
    "mono8": (2, np.dtype(np.uint8)),
    "mono16": (2, np.dtype(np.uint16)),
    "32FC1": (2, np.dtype(np.float32)),
    "rgb8": (3, np.dtype(np.uint8)),
    "bgr8": (3, np.dtype(np.uint8)),
}


def array_to_image(array: np.ndarray[Any, Any], encoding: str, header: Any) -> Any:
    """A `sensor_msgs/Image` with one copy of the pixels.

    Args:
        array: (H, W) uint8 for mono8, uint16 for mono16, float32 for 32FC1; (H, W, 3) uint8 **RGB** for rgb8 and for
            bgr8, which swaps the channels here.
        encoding: mono8, mono16, 32FC1, rgb8 or bgr8.
        header: std_msgs/Header of the message, used as it is.

    Raises:
        ConversionError: unknown_encoding, or bad_array for another shape or dtype.
        ImportError: sensor_msgs is not installed.
    """
    from sensor_msgs.msg import Image

    if encoding not in _OUT:
        raise ConversionError("unknown_encoding", f"expected encoding one of {', '.join(_OUT)}; got {encoding!r}")
    _check_array(array, encoding)
    height, width = array.shape[:2]
    if encoding == "bgr8":
        array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    message = Image(
        header=header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=int(sys.byteorder == "big"),
        step=width * array.itemsize * (3 if array.ndim == 3 else 1),
    )
    # filling the empty array.array avoids the setter, which looks at each element of bytes (rclpy issue 836)
    message.data.frombytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return message


JPEG_QUALITY = 80
"""Of 100; enough for pictures that people look at."""


def array_to_compressed(array: np.ndarray[Any, Any], encoding: str, header: Any) -> Any:
    """A `sensor_msgs/CompressedImage` that image_transport's "compressed" subscribers read.

    Args:
        array: as for `array_to_image`: pictures become JPEG, label maps PNG, whose values come back exactly.
        encoding: mono8, mono16, rgb8 or bgr8.
        header: std_msgs/Header of the message, used as it is.

    Raises:
        ConversionError: unknown_encoding, or bad_array for another shape or dtype.
        ImportError: sensor_msgs is not installed.
    """
    from sensor_msgs.msg import CompressedImage

    known = [name for name, (_, dtype) in _OUT.items() if dtype != np.float32]
    if encoding not in known:
        raise ConversionError("unknown_encoding", f"expected encoding one of {', '.join(known)}; got {encoding!r}")
    _check_array(array, encoding)
    if array.ndim == 3:
        bgr = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
        done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        coding = "jpeg compressed bgr8"
    else:
        done, data = cv2.imencode(".png", np.ascontiguousarray(array), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        coding = "png compressed "  # image_transport names a target for colours alone
    if not done:
        raise ConversionError("bad_array", f"expected sides that a coder takes (JPEG: 65500), got {array.shape}")
    message = CompressedImage(header=header, format=f"{encoding}; {coding}")
    message.data.frombytes(data)
    return message


def _check_array(array: np.ndarray[Any, Any], encoding: str) -> None:
    ndim, dtype = _OUT[encoding]
    if array.ndim != ndim or array.dtype != dtype or (ndim == 3 and array.shape[2] != 3) or not array.size:
        shape = "(H, W)" if ndim == 2 else "(H, W, 3)"
        raise ConversionError(
            "bad_array", f"expected a {shape} {dtype} array with pixels for {encoding}, got {array.shape} {array.dtype}"
        )


def _view(
    data: UInt8Array, height: int, width: int, channels: int, step: int, dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    strides = (step, channels * dtype.itemsize, dtype.itemsize)
    return np.ndarray((height, width, channels), dtype, data, strides=strides)


def _float_to_byte(channels: np.ndarray[Any, Any], values: ValueRange) -> UInt8Array:
    low, high = float(channels.min()), float(channels.max())  # NaN comes through min and max
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ConversionError(
            "not_finite", f"expected finite floats{' in 0..1' if values.is_own else ''}, got NaN or infinity; the "
            "publisher must fill invalid pixels",
        )
    if values.is_own and (low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE):
        raise ConversionError(
            "out_of_range",
            f"expected floats in 0..1, got {low:g} .. {high:g}; set min_image_value and max_image_value, or is this a "
            "distance image?",
        )
    return values.to_byte(channels)


def _to_rgb(channels: np.ndarray[Any, Any], code: int | None) -> UInt8Array:
    if code is None:
        return channels
    if code in _BAYER.values():
        # cv2 answers black below 3x3; repeating two pixels keeps the phase of the pattern
        height, width = channels.shape[:2]
        down, right = (2 if height < 3 else 0), (2 if width < 3 else 0)
        if down or right:
            channels = np.pad(channels[..., 0], ((0, down), (0, right)), "wrap")
        return np.ascontiguousarray(cv2.cvtColor(channels, code)[:height, :width], np.uint8)
    return np.asarray(cv2.cvtColor(channels, code), np.uint8)


def _check_png(data: bytes) -> None:
    """Refuse a PNG without its IEND chunk or with a broken checksum."""
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data):
            break
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ConversionError(
                "corrupt_image",
                f"expected a whole PNG, got a wrong checksum in chunk {kind.decode('latin-1')}; check the network",
            )
        if kind == b"IEND":
            return
        at = end
    raise _truncated("PNG", len(data), "its end chunk IEND")


def _truncated(kind: str, size: int, missing: str) -> ConversionError:
    return ConversionError(
        "corrupt_image",
        f"expected a whole {kind}, got {size} bytes without {missing}; the message was truncated, check the network "
        "and the camera driver",
    )
