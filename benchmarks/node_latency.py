"""The whole node under a camera: starts it and a 30 Hz publisher as processes of their own, and watches from a third.

Measures the time from the stamp of a picture to its masks in a subscriber, the rate, whether it is the newest picture
that is answered, memory over time and share of the CPU.

    python benchmarks/node_latency.py --minutes 10
    python benchmarks/node_latency.py --seconds 30 --enhancement always --folder photos
    python benchmarks/node_latency.py --seconds 30 --degrade lq --level 3 --point 300 220 --point 320 240
"""

from __future__ import annotations

import argparse
import array
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point, PointStamped
from rclpy.executors import ExternalShutdownException
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from sensor_msgs.msg import Image

from glesam_ros.cli.machine import demo_photograph, processor, usable_cores
from glesam_ros.cli.pictures import find_pictures, read_picture
from glesam_ros.degradation import degrade, names
from glesam_ros.ros import shared_memory

NAMESPACE = "/glesam"
OUTPUTS = ("masks", "confidence", "overlay", "semantic", "semantic/confidence", "enhanced")
SETTLE_S = 5.0
"""Thrown away after the first masks."""
SAMPLE_S = 2.0
"""Between two looks at memory and CPU."""
FILM_FRAMES = 60


@dataclass
class Watch:
    """What the watching process saw.

    Attributes:
        latency_ms: stamp to masks, one value a frame.
        missed: pictures published between two answered ones, one value a frame.
        rss: (seconds, MB) of the node.
        cpu: share of one core, one value a sample.
        diagnostics: last key-value pairs of the node.
    """

    latency_ms: list[float] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    rss: list[tuple[float, float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    diagnostics: dict[str, dict[str, str]] = field(default_factory=dict)


def main() -> int:
    """Start the processes, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to measure; default: 1")
    parser.add_argument("--seconds", type=float, help="how long to measure, instead of --minutes")
    parser.add_argument("--rate", type=float, default=30.0, help="of the camera in Hz; default: 30")
    parser.add_argument("--size", default="640x480", help="of the camera; default: 640x480")
    parser.add_argument("--folder", type=Path, help="pictures of the film; default: a photograph of the demo, panned")
    parser.add_argument("--degrade", choices=names(), help="what the camera suffers from; default: nothing")
    parser.add_argument("--level", type=int, choices=(1, 2, 3), default=3, help="of --degrade; default: 3")
    parser.add_argument(
        "--point", nargs=2, type=float, action="append", default=[], metavar=("X", "Y"),
        help="in pixels, of the one object that is asked for; default: everything mode",
    )
    parser.add_argument("--enhancement", default="auto", help="parameter of the node; default: auto")
    parser.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME:=VALUE", help="of the node")
    parser.add_argument("--subscribe", nargs="+", choices=OUTPUTS, default=["masks"], help="default: masks only")
    parser.add_argument("--cores", type=int, help="bind all processes to so many cores; default: all there are")
    parser.add_argument(
        "--small-segments", action="store_true",
        help="leave Fast DDS its shared memory of 512 KB; default: the demo's profile, unless the environment has one",
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--publish", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if not args.small_segments:
        shared_memory.enlarge()
    if args.publish:
        return publish(args)
    seconds = args.seconds if args.seconds is not None else 60 * args.minutes
    parameters = [f"enhancement:={args.enhancement}", *args.parameter]
    if args.point:
        parameters.append("prompt_timeout_s:=0.0")
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        node = subprocess.Popen(
            [sys.executable, "-m", "glesam_ros.ros", "--ros-args", *(x for p in parameters for x in ("-p", p))],
            stdout=log, stderr=subprocess.STDOUT,
        )
        camera = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--publish"], stdout=log, stderr=log)
        try:
            watch = observe(node, args.subscribe, seconds, 1 / args.rate)
        finally:
            for process in (camera, node):
                process.send_signal(signal.SIGINT)
            for process in (camera, node):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
                if process.poll() is None:
                    process.kill()
        log.seek(0)
        said = log.read()
    if not watch.latency_ms:
        print(f"no masks came; the node said:\n{said[-3000:]}", file=sys.stderr)
        return 1
    report = summary(watch, seconds, args, parameters)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def observe(node: subprocess.Popen[bytes], outputs: list[str], seconds: float, period_s: float) -> Watch:
    """Subscribe and sample until `seconds` have passed since the node settled, or the node ended."""
    watch = Watch()
    rclpy.init(args=[])
    watcher = rclpy.create_node("latency_watcher")
    first = 0.0
    last_stamp = 0

    def on_masks(message: Image) -> None:
        nonlocal first, last_stamp
        now = time.time_ns()
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        first = first or time.monotonic()
        if time.monotonic() - first > SETTLE_S:
            watch.latency_ms.append((now - stamp) / 1e6)
            if last_stamp:
                watch.missed.append(round((stamp - last_stamp) / 1e9 / period_s) - 1)
        last_stamp = stamp

    def on_diagnostics(message: DiagnosticArray) -> None:
        for status in message.status:
            watch.diagnostics[status.name] = {pair.key: pair.value for pair in status.values}

    profile = QoSProfile(depth=2, reliability=QoSReliabilityPolicy.RELIABLE)
    for name in outputs:
        callback = on_masks if name == outputs[0] else lambda message: None
        watcher.create_subscription(Image, f"{NAMESPACE}/{name}", callback, profile)
    watcher.create_subscription(DiagnosticArray, "/diagnostics", on_diagnostics, 10)
    started = time.monotonic()
    sampled, cpu_before = started, 0.0
    while node.poll() is None:
        rclpy.spin_once(watcher, timeout_sec=0.2)
        now = time.monotonic()
        if (not first and now - started > 120) or (first and now - first > SETTLE_S + seconds):
            break
        if first and now - first > SETTLE_S and now - sampled > SAMPLE_S:
            cpu = cpu_seconds(node.pid)
            if cpu_before:
                watch.cpu.append((cpu - cpu_before) / (now - sampled))
            watch.rss.append((now - first, rss_mb(node.pid)))
            sampled, cpu_before = now, cpu
    watcher.destroy_node()
    rclpy.try_shutdown()
    return watch


def summary(watch: Watch, seconds: float, args: argparse.Namespace, parameters: list[str]) -> dict[str, Any]:
    """The figures of a run."""
    median, p95, p99 = (round(float(q), 1) for q in np.percentile(watch.latency_ms, [50, 95, 99]))
    rss = np.array(watch.rss or [(0.0, 0.0)])
    slope = float(np.polyfit(rss[:, 0], rss[:, 1], 1)[0]) * 60 if len(rss) > 4 else 0.0
    return {
        "machine": f"{processor()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}",
        "camera": f"{args.size} at {args.rate:g} Hz, {f'{args.degrade}-{args.level}' if args.degrade else 'as it is'}",
        "points": args.point,
        "parameters": parameters,
        "subscribed": args.subscribe,
        "fast_dds_profile": os.environ.get(shared_memory.VARIABLES[0], "default"),
        "seconds": seconds,
        "frames": len(watch.latency_ms),
        "rate_hz": round(len(watch.latency_ms) / seconds, 1),
        "latency_ms": {"median": median, "p95": p95, "p99": p99, "max": round(max(watch.latency_ms), 1)},
        "skipped_per_answer": {
            "median": float(np.median(watch.missed or [0])), "max": int(max(watch.missed, default=0)),
        },
        "backward": sum(m < 0 for m in watch.missed),
        "rss_mb": {
            "quarters": [round(float(part.mean()), 1) for part in np.array_split(rss[:, 1], 4)],
            "first": round(rss[0, 1], 1), "last": round(rss[-1, 1], 1), "max": round(rss[:, 1].max(), 1),
            "per_minute": round(slope, 2),
        },
        "cpu_cores": round(float(np.median(watch.cpu or [0])), 2),
        "diagnostics": watch.diagnostics,
    }


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    latency, rss, skipped = report["latency_ms"], report["rss_mb"], report["skipped_per_answer"]
    rows = {
        "stamp to masks, median": f"{latency['median']} ms",
        "stamp to masks, p95 / p99": f"{latency['p95']} / {latency['p99']} ms",
        "oldest answer": f"{latency['max']} ms",
        "masks": f"{report['rate_hz']} Hz, {report['frames']} frames in {report['seconds']:g} s",
        "pictures skipped per answer": f"median {skipped['median']:g}, at most {skipped['max']}",
        "answers out of order": str(report["backward"]),
        "memory, first / last / most": f"{rss['first']} / {rss['last']} / {rss['max']} MB",
        "memory, mean of each quarter": " / ".join(f"{mb:.1f}" for mb in rss["quarters"]) + " MB",
        "memory growth": f"{rss['per_minute']} MB a minute",
        "CPU of the node": f"{report['cpu_cores']} cores",
    }
    asked = f"an object under {len(report['points'])} points" if report["points"] else "everything"
    head = f"{report['camera']}, {asked}, {', '.join(report['parameters'])}; {report['machine']}\n"
    return "\n".join([head, *(f"{name:<30}{value}" for name, value in rows.items())])


def publish(args: argparse.Namespace) -> int:
    """The camera process: best effort, stamped when the picture is handed out, on an even beat; and the prompt."""
    width, height = (int(side) for side in args.size.split("x"))
    pictures = film(args.folder, width, height)
    if args.degrade:
        pictures = [degrade(picture, args.degrade, args.level, seed=0).image for picture in pictures]
    messages = [camera_message(picture) for picture in pictures]
    points = [PointStamped(point=Point(x=x, y=y)) for x, y in args.point]
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.init()
        node = rclpy.create_node("latency_camera")
        profile = QoSProfile(depth=1, reliability=QoSReliabilityPolicy.BEST_EFFORT)
        publisher = node.create_publisher(Image, f"{NAMESPACE}/image", profile)
        prompt = node.create_publisher(PointStamped, f"{NAMESPACE}/prompt/point", 10)
        start, number = time.monotonic(), 0
        while True:
            message = messages[number % len(messages)]
            time.sleep(max(0.0, start + number / args.rate - time.monotonic()))
            message.header.stamp = node.get_clock().now().to_msg()
            publisher.publish(message)
            number += 1
            if points and prompt.get_subscription_count():
                prompt.publish(points.pop())
    return 0


def film(folder: Path | None, width: int, height: int) -> list[Any]:
    """(height, width, 3) uint8 RGB pictures: those of `folder`, or a window that pans over a photograph and back."""
    if folder is not None:
        paths = [path for path, _ in find_pictures([folder])][:FILM_FRAMES]
        return [cv2.resize(read_picture(path), (width, height), interpolation=cv2.INTER_AREA) for path in paths]
    photograph = read_picture(demo_photograph())
    scale = 1.25 * max(width / photograph.shape[1], height / photograph.shape[0])
    enlarged = cv2.resize(photograph, None, fx=scale, fy=scale)
    room_y, room_x = enlarged.shape[0] - height, enlarged.shape[1] - width
    way = 0.5 - 0.5 * np.cos(np.linspace(0, 2 * np.pi, FILM_FRAMES, endpoint=False))
    corners = [(int(s * room_y), int(s * room_x)) for s in way]
    return [enlarged[y : y + height, x : x + width] for y, x in corners]


def camera_message(rgb: Any) -> Image:
    """A message as a driver sends it."""
    pixels = np.ascontiguousarray(rgb)
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding="rgb8", step=pixels.strides[0])
    message.header.frame_id = "camera"
    message.data = array.array("B", pixels.tobytes())
    return message


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB (10^6 bytes)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
