"""Play the pictures of a bag to a node in real time, with fresh stamps, as if the camera were here.

`ros2 bag play` keeps the recorded stamps, so a node that refuses old frames would refuse them all.

    python benchmarks/play_bag.py film --to /glesam/image --loops 3
"""

from __future__ import annotations

import argparse
import array
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rclpy
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image

from glesam_ros.ros import shared_memory

KINDS = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/CompressedImage": CompressedImage}


def main() -> int:
    """Play and say how many frames left how late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bag", type=Path, help="bag folder, .mcap, .db3 or ROS 1 .bag")
    parser.add_argument("--topic", help="image topic in the bag; default: the only one, or the first by name")
    parser.add_argument("--to", default="/glesam/image", help="topic to publish on; default: /glesam/image")
    parser.add_argument("--speed", type=float, default=1.0, help="1 is real time")
    parser.add_argument("--loops", type=int, default=1, help="how often to play the bag; 0 is for ever")
    parser.add_argument("--reliable", action="store_true", help="publish reliable; default: best effort, as cameras do")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds to wait for a subscriber first")
    args = parser.parse_args()
    if args.speed <= 0:
        parser.error(f"--speed: expected a number above 0, got {args.speed}")

    shared_memory.enlarge()
    with AnyReader([args.bag], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        kinds = {c.topic: c.msgtype for c in reader.connections if c.msgtype in KINDS}
        topic = args.topic or min(kinds, default="")
        if topic not in kinds:
            print(f"{args.bag}: expected an image topic, got {topic!r}; there are: {sorted(kinds)}", file=sys.stderr)
            return 1
        rclpy.init()
        node = rclpy.create_node("play_bag")
        reliability = QoSReliabilityPolicy.RELIABLE if args.reliable else QoSReliabilityPolicy.BEST_EFFORT
        publisher = node.create_publisher(KINDS[kinds[topic]], args.to, QoSProfile(depth=1, reliability=reliability))
        deadline = time.monotonic() + args.wait
        while publisher.get_subscription_count() == 0 and time.monotonic() < deadline:
            rclpy.spin_once(node, timeout_sec=0.1)
        count, late = 0, 0.0
        loop = 0
        try:
            while loop != args.loops:
                for due, message in paced(frames(reader, topic, kinds[topic]), args.speed):
                    late = max(late, time.monotonic() - due)
                    message.header.stamp = node.get_clock().now().to_msg()
                    publisher.publish(message)
                    count += 1
                loop += 1
        except KeyboardInterrupt:
            pass
        print(f"{count} frames of {topic} played to {args.to}, at most {1000 * late:.0f} ms late")
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


def frames(reader: AnyReader, topic: str, kind: str) -> Iterator[tuple[int, Any]]:
    """(recording time in ns, rclpy message) of `topic`."""
    for _, log_time, raw in reader.messages([c for c in reader.connections if c.topic == topic]):
        read: Any = reader.deserialize(raw, kind)
        message = KINDS[kind]()
        message.header.frame_id = read.header.frame_id
        message.data = array.array("B", read.data.tobytes())
        names = ("format",) if kind.endswith("CompressedImage") else (
            "height", "width", "encoding", "is_bigendian", "step"
        )
        for name in names:
            setattr(message, name, getattr(read, name))
        yield log_time, message


def paced(timed: Iterator[tuple[int, Any]], speed: float) -> Iterator[tuple[float, Any]]:
    """Hand messages out at their time; with each the monotonic time at which it was due."""
    first: int | None = None
    start = time.monotonic()
    for log_time, message in timed:
        if first is None:
            first, start = log_time, time.monotonic()
        due = start + (log_time - first) / 1e9 / speed
        time.sleep(max(0.0, due - time.monotonic()))
        yield due, message


if __name__ == "__main__":
    sys.exit(main())
