"""The node's own share of a frame, everything but the model: conversion in, label map, confidence, publishing.

Real rclpy messages to a subscriber in another process; the instances are rendered, so that the share can be measured
without a model.

    python benchmarks/node_overhead.py --size 1280x720
"""

from __future__ import annotations

import argparse
import array
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from glesam_ros.cli.machine import load_frame, processor, quantiles, usable_cores
from glesam_ros.instances import Instances
from glesam_ros.overlay import draw_overlay
from glesam_ros.ros import shared_memory
from glesam_ros.ros.conversions import array_to_image, image_to_rgb

NAMESPACE = "/glesam_overhead"
OUTPUTS = ("masks", "confidence", "overlay")


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1280x720", help="of the frame; default: 1280x720")
    parser.add_argument("--frames", type=int, default=200, help="timed frames; default: 200")
    parser.add_argument("--instances", type=int, default=30, help="instances in each frame; default: 30")
    parser.add_argument("--encoding", choices=("rgb8", "bgr8"), default="bgr8", help="of the camera; default: bgr8")
    parser.add_argument("--image", type=Path, help="picture; default: a photograph of the demo")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--subscribe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shared_memory.enlarge()  # as the node does
    rclpy.init()
    if args.subscribe:
        return subscribe()

    width, height = (int(side) for side in args.size.split("x"))
    cv2.setNumThreads(2)
    node = rclpy.create_node("overhead")
    publishers = {name: node.create_publisher(Image, f"{NAMESPACE}/{name}", QoSProfile(depth=2)) for name in OUTPUTS}
    frame = camera_message(load_frame(args.image, (width, height)), args.encoding)
    instances = rendered_instances(args.instances, height, width)
    other = subprocess.Popen([sys.executable, __file__, "--subscribe"])
    try:
        while any(p.get_subscription_count() == 0 for p in publishers.values()):
            if other.poll() is not None:
                print("the subscriber process ended early", file=sys.stderr)
                return 1
            time.sleep(0.1)
        times = measure(publishers, frame, instances, args.frames)
    finally:
        # it holds nothing, and rclpy can miss a SIGTERM that comes while it waits
        other.kill()
        other.wait()
        node.destroy_node()
        rclpy.try_shutdown()
    own = ("conversion in", "label map", "masks message", "masks publish", "confidence map", "confidence message",
           "confidence publish")
    figures = {name: quantiles(values) for name, values in times.items()}
    figures["own share: masks"] = quantiles([sum(v) for v in zip(*(times[name] for name in own[:4]))])
    figures["own share: masks and confidence"] = quantiles([sum(v) for v in zip(*(times[name] for name in own))])
    print(f"{args.size} {args.encoding}, {args.instances} instances, {args.frames} frames; {processor()}, "
          f"{usable_cores()} cores\n\n{'':<36}{'median ms':>10}{'p95 ms':>10}")
    for name, q in figures.items():
        print(f"{name:<36}{q['median']:>10.2f}{q['p95']:>10.2f}")
    if args.json is not None:
        report = {"size": args.size, "encoding": args.encoding, "instances": args.instances, "ms": figures}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(publishers: dict[str, Any], message: Image, instances: Instances, frames: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one value a frame; five frames warm up."""
    times: dict[str, list[float]] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        times.setdefault(name, []).append(1000 * (time.perf_counter() - start))
        return result

    def one_frame() -> None:
        header = Header(stamp=message.header.stamp, frame_id="camera")
        image = timed("conversion in", lambda: image_to_rgb(message))
        labels = timed("label map", instances.label_map)
        masks = timed("masks message", lambda: array_to_image(labels, "mono16", header))
        timed("masks publish", lambda: publishers["masks"].publish(masks))
        values = timed("confidence map", lambda: instances.confidence_map(labels))
        confidence = timed("confidence message", lambda: array_to_image(values, "32FC1", header))
        timed("confidence publish", lambda: publishers["confidence"].publish(confidence))
        picture = timed("overlay, drawn for people", lambda: draw_overlay(image, instances, 0.5, labels))
        overlay = timed("overlay message", lambda: array_to_image(picture, "bgr8", header))
        timed("overlay publish", lambda: publishers["overlay"].publish(overlay))

    for _ in range(frames + 5):
        one_frame()
        time.sleep(0.02)  # as between the frames of a camera
    return {name: values[5:] for name, values in times.items()}


def camera_message(rgb: Any, encoding: str) -> Image:
    """A message as a driver sends it."""
    pixels = np.ascontiguousarray(rgb[..., ::-1] if encoding == "bgr8" else rgb)
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, step=pixels.strides[0])
    message.data = array.array("B", pixels.tobytes())
    return message


def rendered_instances(count: int, height: int, width: int) -> Instances:
    """Ellipses that overlap, from a twentieth to a third of the picture wide."""
    rng = np.random.default_rng(0)
    masks, boxes = np.zeros((count, height, width), bool), np.zeros((count, 4), np.float32)
    for k in range(count):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(width // 40, width // 6)), int(rng.integers(height // 40, height // 6)))
        canvas = np.zeros((height, width), np.uint8)
        cv2.ellipse(canvas, centre, axes, float(rng.integers(180)), 0, 360, 1, -1)
        masks[k] = canvas > 0
        x, y, w, h = cv2.boundingRect(canvas)
        boxes[k] = x, y, x + w, y + h
    scores = np.linspace(0.95, 0.5, count, dtype=np.float32)
    return Instances(masks, boxes, scores, scores, np.arange(1, count + 1, dtype=np.int32), 0.5, True)


def subscribe() -> int:
    """The other process: takes all outputs until it is ended."""
    node = rclpy.create_node("overhead_subscriber")
    for name in OUTPUTS:
        node.create_subscription(Image, f"{NAMESPACE}/{name}", lambda message: None, QoSProfile(depth=2))
    with contextlib.suppress(ExternalShutdownException, KeyboardInterrupt):
        rclpy.spin(node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
