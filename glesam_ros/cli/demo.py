"""`glesam demo`: node and demo camera on this machine, a live line, and pictures of what came out."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glesam_ros.cli.options import CommandError, add_settings, not_negative
from glesam_ros.picture_files import encoded
from glesam_ros.ros import shared_memory

START_TIMEOUT_S = 90.0
"""How long the first masks may take: loading the model, warming up, rendering the camera's frames."""
END_TIMEOUT_S = 5.0
WINDOW_S = 5.0
"""Rates and latencies of the live line are over this time."""
SETTLE_S = 1.2
"""A scene plays this long before its picture is taken."""
FRAMES_KEPT = 60
"""Camera frames that wait for the overlay with their stamp."""
JPEG_QUALITY = 92
LINES_SHOWN = 8
"""Of the log of a process that failed."""
NODE, CAMERA = "glesam_ros.ros", "glesam_ros.ros.demo_camera"

EPILOG = """\
examples:
  glesam demo                            until Ctrl-C; pictures in out/demo
  glesam demo --seconds 60 --out show

the line: frames a second into and out of the node, latency from the camera's stamp to the masks that arrive here,
the scene that plays, measured degradation (0 clear .. 1) and whether the enhancement ran, instances, frames skipped
because a newer one was there, frames lost by faults, memory of the node. While it runs, look with rqt or RViz at
/glesam/overlay, /glesam/masks, /glesam/detections; change parameters of /glesam/perception with rqt."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "demo", help="node and demo camera on this machine, with a live line and pictures", epilog=EPILOG,
        description="Run the perception node on a camera that plays real photographs in changing weather.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=not_negative("0 or more seconds"), default=0.0, metavar="S",
                        help="end after this time, counted from the first masks; 0: at Ctrl-C; default: 0")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="FOLDER",
                        help="where pictures and logs go; default: out/demo")
    add_settings(parser, ("model", "semantic"))
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and write its pictures."""
    try:
        import rclpy
        from rclpy.signals import SignalHandlerOptions
    except ImportError as error:
        raise CommandError(
            f"expected ROS 2, but rclpy cannot be imported ({error}). On a robot: source "
            "/opt/ros/$ROS_DISTRO/setup.bash. Elsewhere, with Python 3.11: pip install 'glesam_ros[ros]'. "
            "Pictures and bags need no ROS: glesam segment, glesam bag"
        ) from error
    args.out.mkdir(parents=True, exist_ok=True)
    shared_memory.enlarge()
    with _ended_by_signal() as ended, _children(args.out, args.model, args.semantic) as children:
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        view = View(rclpy.create_node("glesam_demo"), args.out, children[NODE].pid)
        try:
            _watch(view, children, args.out, args.seconds, ended)
        finally:
            view.close()
            rclpy.try_shutdown()
    _report(view, args.out)
    return 0


def _watch(
    view: View, children: dict[str, subprocess.Popen[bytes]], out: Path, seconds: float, ended: threading.Event
) -> None:
    """Spin until the time is over or a signal came, and print the line.

    Raises:
        CommandError: a child ended, the node reports an error, or no masks came.
    """
    print(f"starting node and camera; logs in {out}", flush=True)
    started = time.monotonic()
    is_terminal = sys.stdout.isatty()
    period, next_line = (0.5 if is_terminal else 2.0), 0.0
    while not ended.is_set():
        view.spin()
        now = time.monotonic()
        for module, child in children.items():
            if child.poll() is not None and not ended.is_set():
                raise CommandError(f"{module} ended with code {child.returncode}:\n{_last_lines(_log(out, module))}")
        if view.first is None:
            if view.error:
                raise CommandError(f"the node cannot work: {view.error}; its log is {_log(out, NODE)}")
            if now - started > START_TIMEOUT_S:
                raise CommandError(
                    f"expected masks on /glesam/masks within {START_TIMEOUT_S:g} s, got none. The node says:\n"
                    + _last_lines(_log(out, NODE))
                )
            continue
        if seconds and now - view.first >= seconds:
            break
        if now >= next_line:
            next_line = now + period
            line = view.line(now)
            if is_terminal:
                columns = shutil.get_terminal_size().columns - 1
                print(f"\r{line[:columns]:<{columns}}", end="", flush=True)
            else:
                print(line, flush=True)
    if is_terminal:
        print()


class View:
    """What the demo sees of the node: rates, latency, diagnostics, and one picture a scene.

    Args:
        node: rclpy node to subscribe with.
        out: folder of the pictures.
        pid: of the perception node's process.

    Attributes:
        first: when the first masks came (monotonic seconds), None before.
        error: what the node reports as broken, "" where nothing is.
        pictures: what was written, by scene.
        total: number of masks received.
    """

    def __init__(self, node: Any, out: Path, pid: int) -> None:
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.qos import QoSDurabilityPolicy, QoSProfile, qos_profile_sensor_data
        from sensor_msgs.msg import Image
        from std_msgs.msg import String

        self.first: float | None = None
        self.error = ""
        self.pictures: dict[str, Path] = {}
        self.total = 0
        self._node, self._out, self._pid = node, out, pid
        self._image_type, self._sensor_qos = Image, qos_profile_sensor_data
        self._arrivals: deque[tuple[float, float]] = deque()  # (when, latency in ms)
        self._masks: Any = None
        self._diagnosed: dict[str, str] = {}
        self._quality: dict[str, float] = {}
        self._scene, self._scene_since = "", 0.0
        self._frames: dict[tuple[int, int], Any] = {}
        self._picture_subscriptions: list[Any] = []
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        node.create_subscription(Image, "/glesam/masks", self._on_masks, qos_profile_sensor_data)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        latched = QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(String, "/glesam/demo_camera/scene", self._on_scene, latched)
        try:
            from vision_msgs.msg import Classification
        except ImportError:
            print("vision_msgs is not installed: quality and detections are off, masks are not affected")
        else:
            node.create_subscription(Classification, "/glesam/quality", self._on_quality, qos_profile_sensor_data)

    def spin(self) -> None:
        """Take in one message, or wait a moment; see whether a picture is due."""
        self._executor.spin_once(timeout_sec=0.1)
        is_due = self._scene and self._scene not in self.pictures and self.first is not None
        if is_due and not self._picture_subscriptions and time.monotonic() - self._scene_since >= SETTLE_S:
            # only now: the node does not draw overlays that nobody looks at
            self._picture_subscriptions = [
                self._node.create_subscription(self._image_type, topic, callback, self._sensor_qos)
                for topic, callback in (("/glesam/image", self._on_image), ("/glesam/overlay", self._on_overlay))
            ]

    def line(self, now: float) -> str:
        """The live line."""
        import numpy as np

        while self._arrivals and self._arrivals[0][0] < now - WINDOW_S:
            self._arrivals.popleft()
        span = min(WINDOW_S, max(now - (self.first or now), 1.0))
        latencies = [latency for _, latency in self._arrivals]
        p50, p95 = np.percentile(latencies, [50, 95]) if latencies else (float("nan"), float("nan"))
        labels = np.frombuffer(self._masks.data, np.uint16)
        instances = int(np.count_nonzero(np.bincount(labels)[1:]))
        degradation = self._quality.get("degradation", _number(self._diagnosed.get("degradation", "")))
        enhanced = self._quality.get("enhanced", float(self._diagnosed.get("enhanced") == "True"))
        skipped, faults = self._drops()
        return (
            f"{now - (self.first or now):5.0f} s | in {_number(self._diagnosed.get('input_rate_hz', '')):4.1f} Hz, "
            f"out {len(latencies) / span:4.1f} Hz | latency {p50:.0f} ms, p95 {p95:.0f} ms | {self._scene}: "
            f"degradation {degradation:.2f}, {'enhanced' if enhanced else 'not enhanced'}, {instances} instances | "
            f"skipped {skipped}, faults {faults} | node {_memory(self._pid)}"
        )

    def close(self) -> None:
        """Write the contact sheet and leave the graph."""
        self._executor.shutdown()
        self._node.destroy_node()
        if self.pictures:
            _write_sheet(self._out / "contact_sheet.jpg", list(self.pictures.values()))

    def _drops(self) -> tuple[int, int]:
        from glesam_ros.ros.diagnostics import HARMLESS_DROPS

        drops = {k.removeprefix("dropped_"): int(v) for k, v in self._diagnosed.items() if k.startswith("dropped_")}
        harmless = sum(n for reason, n in drops.items() if reason in HARMLESS_DROPS)
        return harmless, sum(drops.values()) - harmless

    def _on_masks(self, message: Any) -> None:
        stamp = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
        latency_ms = (self._node.get_clock().now().nanoseconds - stamp) / 1e6
        now = time.monotonic()
        self.first = now if self.first is None else self.first
        self._arrivals.append((now, latency_ms))
        self._masks = message
        self.total += 1

    def _on_diagnostics(self, message: Any) -> None:
        for status in message.status:
            if status.name == "glesam/perception: model":
                self.error = status.message if status.level == type(status).ERROR else ""
            values = {pair.key: pair.value for pair in status.values}
            if status.name.startswith("glesam/perception") and "input_rate_hz" in values:
                self._diagnosed = values

    def _on_quality(self, message: Any) -> None:
        self._quality = {result.class_id: result.score for result in message.results}

    def _on_scene(self, message: Any) -> None:
        self._stop_pictures()
        self._scene, self._scene_since = message.data, time.monotonic()

    def _on_image(self, message: Any) -> None:
        self._frames[_stamp(message)] = message
        while len(self._frames) > FRAMES_KEPT:
            self._frames.pop(next(iter(self._frames)))

    def _on_overlay(self, message: Any) -> None:
        frame = self._frames.get(_stamp(message))
        if frame is None or self._scene in self.pictures:
            return
        from glesam_ros.ros.conversions import image_to_rgb

        path = self._out / f"{self._scene}.jpg"
        _write_pair(path, self._scene, image_to_rgb(frame), image_to_rgb(message))
        self.pictures[self._scene] = path
        self._stop_pictures()

    def _stop_pictures(self) -> None:
        for subscription in self._picture_subscriptions:
            self._node.destroy_subscription(subscription)
        self._picture_subscriptions = []
        self._frames.clear()


@contextmanager
def _ended_by_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of their usual effect."""
    ended = threading.Event()
    before = {n: signal.signal(n, lambda *_: ended.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _children(out: Path, model: str, semantic: str) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Node and camera as processes that end with this block, and with this process whatever ends it."""
    # in quotes: ROS takes a plain off for a bool
    arguments = {NODE: ["--ros-args", "-p", f"model:={model}", "-p", f'semantic:="{semantic}"'], CAMERA: []}
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for module, extra in arguments.items():
            with _log(out, module).open("wb") as log:
                children[module] = subprocess.Popen(
                    [sys.executable, "-m", module, *extra], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # Ctrl-C is ours; we end them
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                )
        yield children
    finally:
        for child in children.values():
            child.terminate()
        for child in children.values():
            try:
                child.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before the fork


def _end_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when the parent is gone, even by SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _log(out: Path, module: str) -> Path:
    return out / ("node.log" if module == NODE else "camera.log")


def _last_lines(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
    return "\n".join(f"  {line}" for line in lines) or "  (nothing)"


def _memory(pid: int) -> str:
    """Resident memory of a process in words; Linux only."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return "memory unknown"
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.0f} MB"


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _stamp(message: Any) -> tuple[int, int]:
    return message.header.stamp.sec, message.header.stamp.nanosec


def _write_pair(path: Path, scene: str, frame: Any, overlay: Any) -> None:
    """Camera frame and overlay side by side under a caption; RGB in, a JPEG out."""
    import cv2
    import numpy as np

    height, width = frame.shape[:2]
    bar, gap = 36, 8
    sheet = np.full((bar + height, 2 * width + gap, 3), 24, np.uint8)
    sheet[bar:, :width], sheet[bar:, width + gap :] = frame[..., ::-1], overlay[..., ::-1]
    for text, x in ((f"{scene.replace('_', ' ')}: camera", 8), ("glesam", width + gap + 8)):
        cv2.putText(sheet, text, (x, bar - 12), cv2.FONT_HERSHEY_SIMPLEX, 0.65, (235, 235, 235), 1, cv2.LINE_AA)
    path.write_bytes(encoded(path, sheet, JPEG_QUALITY))


def _write_sheet(path: Path, pairs: list[Path]) -> None:
    """All pairs on one sheet, two in a row."""
    import cv2
    import numpy as np

    small = []
    for pair in pairs:
        picture = cv2.imread(str(pair))
        if picture is None:
            raise CommandError(f"{pair}: expected the picture written before, got none; was the folder changed?")
        small.append(cv2.resize(picture, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA))
    height, width = small[0].shape[:2]
    rows, gap = (len(small) + 1) // 2, 8
    sheet = np.full((rows * (height + gap) - gap, 2 * width + gap, 3), 255, np.uint8)
    for k, picture in enumerate(small):
        y, x = k // 2 * (height + gap), k % 2 * (width + gap)
        sheet[y : y + height, x : x + width] = picture
    path.write_bytes(encoded(path, sheet, JPEG_QUALITY))


def _report(view: View, out: Path) -> None:
    if view.first is None:
        print("stopped before the first masks")
        return
    print(f"{view.total} frames segmented")
    for scene, path in view.pictures.items():
        print(f"  {path}  ({scene.replace('_', ' ')}: camera | overlay)")
    if view.pictures:
        print(f"look at {out / 'contact_sheet.jpg'}")
    else:
        print("no picture yet: let it run for some seconds longer")
