"""The thread that turns the newest frames into results."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from rclpy.clock import Clock
from sensor_msgs.msg import CompressedImage

from glesam_ros.pipeline import Pipeline
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.conversions import ConversionError, compressed_to_rgb, image_to_rgb
from glesam_ros.ros.diagnostics import worth_a_log_line
from glesam_ros.ros.scheduling import Frame, NewestFrames


class DroppedFrame(Exception):
    """A frame that gets no result; `reason` is the slug in the ledger."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Worker(threading.Thread):
    """Takes frames in turns, converts, infers, publishes. No frame and no model fault ends it.

    The age of a frame is checked right before inference: that is the last moment at which dropping it saves work.

    Args:
        pipeline: model and live settings.
        cameras: by name.
        frames: where the newest frames are taken from; closing it ends the thread.
        clock: the node's clock, for ages.
        warn: takes the text of a log line.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        cameras: Mapping[str, Camera],
        frames: NewestFrames,
        clock: Clock,
        warn: Callable[[str], Any],
    ) -> None:
        super().__init__(name="inference", daemon=True)
        self._pipeline = pipeline
        self._cameras = cameras
        self._frames = frames
        self._clock = clock
        self._warn = warn
        self._stopping = threading.Event()

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end and wait; False when an inference still runs after `timeout_s`."""
        self._stopping.set()
        self._frames.close()
        if self.is_alive():
            self.join(timeout_s)
        return not self.is_alive()

    def run(self) -> None:
        """Process frames until stopped."""
        while (frame := self._frames.take()) is not None:
            camera = self._cameras[frame.camera]
            try:
                self._process(camera, frame)
            except (DroppedFrame, ConversionError) as error:
                self._drop(camera, error.reason, error)
            except Exception as error:  # one bad frame must not end the node
                self._drop(camera, "internal_error", error)

    def _process(self, camera: Camera, frame: Frame) -> None:
        wanted = camera.outputs.wanted()
        if not wanted:
            camera.ledger.dropped("no_subscriber")
            return
        ledger, header, settings = camera.ledger, frame.message.header, self._pipeline.settings
        started = time.perf_counter()
        is_compressed = isinstance(frame.message, CompressedImage)
        image = compressed_to_rgb(frame.message) if is_compressed else image_to_rgb(frame.message)
        ledger.size = image.shape[0], image.shape[1]
        stamp_ns = self._check_stamp(camera, header.stamp)
        prompts, gone = camera.prompts.current(ledger.size, settings.prompt_timeout_s)
        for text in gone:
            ledger.noticed("dropped_prompt", text)
            self._warn(f"{camera.label}: prompt {text}")
        self._check_age(camera, stamp_ns, frame, settings.max_frame_age_ms)

        before_encode = before_decode = after_decode = time.perf_counter()
        instances = labels = None
        try:
            embedding = self._pipeline.encode(image, camera.gate)
            before_decode = after_decode = time.perf_counter()
            if wanted - {"quality"}:
                instances = self._pipeline.decode(embedding, **prompts)
                after_decode = time.perf_counter()
        except Exception as error:
            raise DroppedFrame("inference_error", f"{type(error).__name__}: {error}") from error
        if self._stopping.is_set():
            return

        if instances is not None:
            labels = camera.outputs.publish_masks(wanted, header, instances)
        ledger.latency_ms.add(self._age_ms(stamp_ns, frame))
        camera.outputs.publish_quality(wanted, header, embedding.degradation, embedding.enhanced)
        if instances is not None:
            camera.outputs.publish_overlay(wanted, header, image, instances, settings.overlay_alpha, labels)
        ledger.degradation, ledger.enhanced = embedding.degradation, embedding.enhanced
        ledger.encode_ms.add(1e3 * (before_decode - before_encode))
        ledger.decode_ms.add(1e3 * (after_decode - before_decode))
        ledger.own_ms.add(1e3 * (before_encode - started + time.perf_counter() - after_decode))
        ledger.processed()

    def _check_stamp(self, camera: Camera, stamp: Any) -> int:
        """The stamp in ns; a zero stamp is noticed, a frame older than the one before it is dropped."""
        stamp_ns = stamp.sec * 1_000_000_000 + stamp.nanosec
        if stamp_ns == 0:
            self._notice(camera, "zero_stamp", "the stamp is 0, so age and latency count from arrival; "
                         "let the camera driver fill header.stamp")
            return 0
        previous = camera.last_stamp_ns
        camera.last_stamp_ns = stamp_ns
        if stamp_ns < previous:
            camera.forget_time()
            camera.last_stamp_ns = stamp_ns
            raise DroppedFrame(
                "backward_stamp",
                f"expected a stamp after {previous / 1e9:.3f} s, got {stamp_ns / 1e9:.3f} s; frames from there on are "
                "processed (a bag in a loop or two publishers on one topic do this)",
            )
        return stamp_ns

    def _check_age(self, camera: Camera, stamp_ns: int, frame: Frame, limit_ms: int) -> None:
        age_ms = self._age_ms(stamp_ns, frame)
        if age_ms > limit_ms:
            raise DroppedFrame(
                "stale", f"expected an age of at most {limit_ms} ms (max_frame_age_ms), got {age_ms:.0f} ms; "
                "the model is too slow for this machine, use_sim_time is not set for a bag, or two clocks disagree",
            )
        if age_ms < -limit_ms:
            self._notice(camera, "future_stamp", f"the stamp is {-age_ms:.0f} ms ahead of the node's clock; "
                         "synchronise the clocks, or set use_sim_time")

    def _age_ms(self, stamp_ns: int, frame: Frame) -> float:
        if stamp_ns == 0:
            return 1e3 * (time.monotonic() - frame.arrival)
        return (self._clock.now().nanoseconds - stamp_ns) / 1e6

    def _notice(self, camera: Camera, what: str, text: str) -> None:
        count = camera.ledger.noticed(what, text)
        if worth_a_log_line(count):
            self._warn(f"{camera.label}: {what}: {text} [{count} so far, next note at {10 * count}]")

    def _drop(self, camera: Camera, reason: str, error: Exception) -> None:
        count = camera.ledger.dropped(reason, str(error))
        if worth_a_log_line(count):
            text = f"{camera.label}: frame dropped, {reason}: {error} [{count} so far, next note at {10 * count}]"
            if reason in ("inference_error", "internal_error"):
                text += "\n" + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
            self._warn(text)
