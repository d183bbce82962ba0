"""A camera for machines that have none: real photographs, panned over, in changing weather."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    NameValidationException,
    ParameterException,
)
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation as _rclpy
from rclpy.node import Node
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, QoSReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header, String

from glesam_ros import degradation
from glesam_ros.ros import shared_memory, usage
from glesam_ros.ros.conversions import array_to_image
from glesam_ros.ros.leaving import leave
from glesam_ros.ros.parameters import described, with_hint
from glesam_ros.settings import Spec
from glesam_ros.validation import UInt8Array

NODE_NAME = "demo_camera"
ABOUT = "A camera for machines that have none: it publishes real photographs, panned over, in changing weather."
DEFAULT_NAMESPACE = "glesam"
PHOTOGRAPHS = Path(__file__).parents[1] / "demo"
CLEAR = "clear"
SCENES = (
    (CLEAR, "coffee"), ("low_light", "coffee"), ("rain", "rocket"), ("motion_blur", "cat"), ("fog", "rocket"),
    ("lq", "astronaut"),
)
"""(degradation, photograph) of the cycle, in its order."""
SWEEP_FRAMES = 30
"""Rendered frames of a scene; played forth and back."""
CROP = 0.85
"""Width of the panned window as a share of the largest one that fits the photograph."""
STORED_QUALITY = 95


PARAMETERS: dict[str, tuple[Any, Spec]] = {
    "rate": (30.0, Spec("Frames a second.", 0.1, 120.0, read_only=True)),
    "width": (640, Spec("Width of the image in pixels.", 16, 4096, read_only=True)),
    "height": (480, Spec("Height of the image in pixels.", 16, 4096, read_only=True)),
    "degradation": ("cycle", Spec(f"cycle, {CLEAR}, or one of {', '.join(degradation.names())}.", read_only=True)),
    "level": (3, Spec("Severity of the degradation, 1 to 3.", 1, 3, read_only=True)),
    "seconds_per_scene": (4.0, Spec("How long a scene plays.", 0.1, 3600.0, read_only=True)),
    "frame_id": ("demo_camera", Spec("frame_id of the headers.", read_only=True)),
    "compressed": (False, Spec("Publish image/compressed instead of image.", read_only=True)),
}


class DemoCamera(Node):
    """Publishes `image` (rgb8) or, with the parameter `compressed`, `image/compressed` (JPEG).

    Frames are rendered once, the later scenes while the first one plays, and kept as JPEG, so that playing costs a
    decode and a copy. The name of the scene that plays is on `~/scene` (std_msgs/String, latched).

    Raises:
        ValueError, rclpy.exceptions.ParameterException: a parameter is not valid.
        FileNotFoundError: a photograph is not installed.
    """

    def __init__(self) -> None:
        super().__init__(NODE_NAME, namespace=DEFAULT_NAMESPACE)
        given = {name: self._declare(name, *known) for name, known in PARAMETERS.items()}
        self._rate, self._frame_id, self._is_compressed = given["rate"], given["frame_id"], given["compressed"]
        level, chosen, size = given["level"], given["degradation"], (given["width"], given["height"])
        known = ("cycle", CLEAR, *degradation.names())
        if chosen not in known:
            raise ValueError(f"degradation: expected one of {', '.join(known)}; got {chosen!r}")
        photographs = dict.fromkeys(photo for _, photo in SCENES)
        plan = SCENES if chosen == "cycle" else tuple((chosen, photo) for photo in photographs)
        self._frames_per_scene = max(1, round(given["seconds_per_scene"] * self._rate))
        self._scenes: list[tuple[str, list[UInt8Array]]] = []  # grows while the first scenes play
        self._closing = threading.Event()
        self._render(plan[:1], level, size)
        self._renderer = threading.Thread(target=self._render, args=(plan[1:], level, size), name="renderer")
        self._renderer.start()
        # reliable matches every subscriber; depth 1 never holds frames back
        profile = QoSProfile(depth=1, reliability=QoSReliabilityPolicy.RELIABLE)
        self._publisher = (
            self.create_publisher(CompressedImage, "image/compressed", profile)
            if self._is_compressed
            else self.create_publisher(Image, "image", profile)
        )
        latched = QoSProfile(
            depth=1, reliability=QoSReliabilityPolicy.RELIABLE, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL
        )
        self._scene_publisher = self.create_publisher(String, "~/scene", latched)
        self._scene, self._position = 0, 0
        self.create_timer(1.0 / self._rate, self._publish)

    def _declare(self, name: str, default: Any, spec: Spec) -> Any:
        try:
            return self.declare_parameter(name, default, described(name, default, spec)).value
        except InvalidParameterTypeException as error:
            raise ValueError(with_hint(error)) from error

    def close(self) -> None:
        """Stop rendering."""
        self._closing.set()
        self._renderer.join()

    def _render(self, plan: Iterable[tuple[str, str]], level: int, size: tuple[int, int]) -> None:
        for name, photograph in plan:
            started = time.monotonic()
            frames = render(name, photograph, level, size, seed=len(self._scenes), ended=self._closing)
            if self._closing.is_set():
                return
            self._scenes.append((name, frames))
            self.get_logger().info(
                f"scene {name}: {len(frames)} frames, {sum(f.nbytes for f in frames) / 1e6:.1f} MB, "
                f"rendered in {time.monotonic() - started:.1f} s"
            )

    def _publish(self) -> None:
        if self._position == self._frames_per_scene:
            self._scene, self._position = (self._scene + 1) % len(self._scenes), 0
        name, sweep = self._scenes[self._scene]
        if self._position == 0:
            self._scene_publisher.publish(String(data=name))
        position = self._position
        self._position += 1
        stored = sweep[forth_and_back(position, len(sweep))]
        if self._is_compressed:
            message = CompressedImage(header=self._header(), format="jpeg")
            message.data.frombytes(stored)
        else:
            bgr = np.asarray(cv2.imdecode(stored, cv2.IMREAD_COLOR), np.uint8)
            rgb = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
            message = array_to_image(rgb, "rgb8", self._header())
        self._publisher.publish(message)

    def _header(self) -> Header:
        return Header(stamp=self.get_clock().now().to_msg(), frame_id=self._frame_id)


def render(
    name: str, photograph: str, level: int, size: tuple[int, int], seed: int, ended: threading.Event
) -> list[UInt8Array]:
    """The frames of one scene.

    Args:
        name: "clear" or a name of `degradation.names()`.
        photograph: file stem in `PHOTOGRAPHS`.
        level: severity, 1 to 3.
        size: (width, height) in pixels.
        seed: of the weather.
        ended: when set, rendering stops with what there is.

    Returns:
        `SWEEP_FRAMES` JPEG files as uint8 arrays.

    Raises:
        FileNotFoundError: the photograph is not installed.
    """
    path = PHOTOGRAPHS / f"{photograph}.jpg"
    photo = cv2.imread(str(path))
    if photo is None:
        raise FileNotFoundError(f"expected a photograph at {path}, found none; install the package again")
    frames: list[UInt8Array] = []
    for k in range(SWEEP_FRAMES):
        if ended.is_set():
            break
        frame = _window(np.asarray(photo, np.uint8), size, k / (SWEEP_FRAMES - 1))
        if name != CLEAR:
            rgb = np.ascontiguousarray(frame[..., ::-1])
            frame = degradation.degrade(rgb, name, level, seed, frame=k).image[..., ::-1]
        encoded = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, STORED_QUALITY])[1]
        frames.append(np.asarray(encoded, np.uint8).reshape(-1))
    return frames


def forth_and_back(position: int, length: int) -> int:
    """Index 0, 1, .., length - 1, length - 2, .., 1, 0, 1, ... of the frame at `position`."""
    if length == 1:
        return 0
    at = position % (2 * length - 2)
    return at if at < length else 2 * length - 2 - at


def _window(photo: UInt8Array, size: tuple[int, int], progress: float) -> UInt8Array:
    """The camera's view at `progress` 0..1: a window that pans and zooms in a little, and never leaves the photo."""
    width, height = size
    photo_height, photo_width = photo.shape[:2]
    ease = (1 - math.cos(math.pi * progress)) / 2  # slow at both ends, where the pan turns round
    crop = min(photo_width, photo_height * width / height) * (CROP + 0.1 * (1 - ease))
    scale = crop / width
    left = (photo_width - crop) * ease
    top = (photo_height - height * scale) * (0.5 + 0.4 * (ease - 0.5))
    to_photo = np.array([[scale, 0, left + scale / 2 - 0.5], [0, scale, top + scale / 2 - 0.5]])
    return np.asarray(cv2.warpAffine(
        photo, to_photo, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    ), np.uint8)


def main(args: list[str] | None = None) -> int:
    """Run the camera until SIGINT or SIGTERM; 1 when its arguments are not valid, else 0. `--help` only explains it."""
    if usage.is_asked(args):
        print(usage.text("demo_camera", ABOUT, "-p degradation:=rain -p level:=2 -p rate:=10.0", PARAMETERS))
        return 0
    cv2.setNumThreads(1)  # the cores are the perception node's
    shared_memory.enlarge()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        node = DemoCamera()
    except (
        ValueError, FileNotFoundError, ParameterException, InvalidParameterValueException, NameValidationException,
        _rclpy.RCLError, _rclpy.UnknownROSArgsError,
    ) as error:
        rclpy.logging.get_logger(NODE_NAME).fatal(f"the demo camera cannot start: {error}")
        rclpy.try_shutdown()
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        node.get_logger().info("ending: the context was shut down")
    node.close()
    executor.shutdown()
    leave()
    # launch sends one more to what still runs; the interpreter, which takes the handlers away, would die of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
