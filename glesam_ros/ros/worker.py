"""The threads that turn the newest frames into results."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
from rclpy.clock import Clock, ROSClock
from sensor_msgs.msg import CompressedImage

from glesam_ros.instances import Instances
from glesam_ros.models import Embedding, OutOfMemory
from glesam_ros.pipeline import Pipeline
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.conversions import ConversionError, message_to_rgb
from glesam_ros.ros.diagnostics import Ring, worth_a_log_line
from glesam_ros.ros.outputs import OF_CLASSES, OF_EMBEDDING, OF_INSTANCES, WITH_CLASSES
from glesam_ros.ros.prompts import boxes_of
from glesam_ros.ros.scheduling import Frame, HandOver, NewestFrames
from glesam_ros.semantic import Restorer, SemanticSegmenter
from glesam_ros.validation import UInt8Array
from glesam_ros.value_range import ValueRange

OTHER_TIME_MS = 10_000
"""A frame that is older when it comes is no late one: its stamp is of another time than the node's clock."""
FEW_VALUES = 64
"""Of the upper 8 bits of 16, more than 14 bits that nobody shifted up give."""
FLAT = 16
"""Of these, more than lies between the coldest and the warmest that a thermal camera sees in most scenes."""
FASTER = "frame_budget_ms makes frames faster"
AFTER_BOXES = (
    "the boxes that it waited for (sync_boxes) came late, or the model is slow: a faster detector, a higher "
    "max_frame_age_ms, or frame_budget_ms helps"
)

Result = TypeVar("Result")


class DroppedFrame(Exception):
    """A frame that gets no result; `reason` is the slug in the ledger."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Encoded:
    """A frame after its first half.

    Attributes:
        wanted: outputs that had a subscriber when it was taken.
        prompts: arguments for `Pipeline.decode`.
        objects: by id, in the order of the prompts, what came with the box of each.
        stamp_ns: 0 where the stamp is.
        embedding: None where no output needs it.
        own_s: seconds spent on it beside the model.
        encode_s: seconds in `Pipeline.encode`.
    """

    camera: Camera
    frame: Frame
    wanted: frozenset[str]
    image: UInt8Array
    prompts: dict[str, Any]
    objects: dict[int, Sequence[Any]]
    stamp_ns: int
    embedding: Embedding | None
    own_s: float
    encode_s: float


class Worker:
    """Takes frames in turns, converts, encodes, decodes, publishes. No frame and no model fault ends it.

    Masks go out first; then classes are found, and what shows them goes out; the restored picture is last. A fault of
    the segmenter or the restorer costs its own result only: detections and overlay then go out without classes.

    One thread does it all; where the model overlaps, a second one decodes and publishes a frame while the first is with
    the next. The age of a frame is checked right before inference: that is the last moment at which dropping it saves
    work.

    Args:
        pipeline: model and live settings.
        cameras: by name.
        frames: where the newest frames are taken from; closing it ends the work.
        clock: the node's clock, for ages.
        warn: takes the text of a log line.
        segmenter: finds the class of each pixel; None where the parameter `semantic` is off.
        restorer: restores pictures; None where the parameter `restorer` is off.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        cameras: Mapping[str, Camera],
        frames: NewestFrames,
        clock: Clock,
        warn: Callable[[str], Any],
        segmenter: SemanticSegmenter | None = None,
        restorer: Restorer | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._cameras = cameras
        self._frames = frames
        self._clock = clock
        self._warn = warn
        self._segmenter = segmenter
        self._restorer = restorer
        self._stopping = threading.Event()
        self._hand_over: HandOver[Encoded] | None = None
        self._threads = [threading.Thread(target=self._take_frames, name="inference", daemon=True)]
        if pipeline.model.overlaps:
            self._hand_over = HandOver()
            decoding = threading.Thread(target=self._take_encoded, args=(self._hand_over,), name="decode", daemon=True)
            self._threads.append(decoding)

    def start(self) -> None:
        """Begin to take frames."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Whether frames are still taken and finished."""
        return all(thread.is_alive() for thread in self._threads)

    def stop(self, timeout_s: float | None) -> bool:
        """Ask the threads to end and wait; False when an inference still runs after `timeout_s`; None is for ever."""
        self._stopping.set()
        self._frames.close()
        if self._hand_over is not None:
            self._hand_over.close()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _take_frames(self) -> None:
        while (frame := self._frames.take()) is not None:
            began = time.monotonic()
            if self._begin(self._cameras[frame.camera], frame):
                self._rest(began)

    def _rest(self, began: float) -> None:
        """Wait until max_rate_hz, which may change meanwhile, allows another frame after the one of `began`."""
        while rate_hz := self._pipeline.settings.max_rate_hz:
            left_s = began + 1 / rate_hz - time.monotonic()
            if left_s <= 0 or self._stopping.wait(min(left_s, 0.1)):
                return

    def _take_encoded(self, hand_over: HandOver[Encoded]) -> None:
        while (encoded := hand_over.take()) is not None:
            with self._dropping_faults(encoded.camera):
                self._finish(encoded)
            del encoded  # its arrays would live until the next frame

    def _begin(self, camera: Camera, frame: Frame) -> bool:
        """Whether the model had work with it: frames that are dropped before take no turn of max_rate_hz."""
        encoded = None
        with self._dropping_faults(camera):
            encoded = self._encode(camera, frame)
            if encoded is None:
                camera.ledger.dropped("no_subscriber")
            elif self._hand_over is None:
                self._finish(encoded)
            elif not self._hand_over.give(encoded):
                camera.ledger.dropped("disabled")
        return encoded is not None

    @contextlib.contextmanager
    def _dropping_faults(self, camera: Camera) -> Iterator[None]:
        """One bad frame must not end the node: whatever is raised costs that frame, and is counted and logged."""
        try:
            yield
        except (DroppedFrame, ConversionError) as error:
            self._drop(camera, error.reason, error)
        except Exception as error:
            self._drop(camera, "internal_error", error)

    def _encode(self, camera: Camera, frame: Frame) -> Encoded | None:
        """The first half; None where nobody wants a result."""
        wanted = camera.outputs.wanted()
        ledger, header, settings = camera.ledger, frame.message.header, self._pipeline.settings
        if not wanted and ledger.size is not None:  # a first frame is read all the same: prompts need its size
            return None
        started = time.perf_counter()
        values = ValueRange.of(settings)
        image = message_to_rgb(frame.message, values)
        ledger.size, camera.frame_id = (image.shape[0], image.shape[1]), header.frame_id
        if not wanted:
            return None
        if values.is_own:
            self._check_values(camera, frame.message, image)
        stamp_ns = self._check_stamp(camera, header.stamp)
        prompts, objects = self._prompts(camera, frame, ledger.size, settings.prompt_timeout_s)
        self._check_age(camera, stamp_ns, frame, settings.max_frame_age_ms)
        before = after = time.perf_counter()
        embedding = None
        if wanted & OF_EMBEDDING:
            with _inference():
                embedding = self._pipeline.encode(image, camera.gate)
            after = time.perf_counter()
        return Encoded(
            camera, frame, wanted, image, prompts, objects, stamp_ns, embedding,
            own_s=before - started, encode_s=after - before,
        )

    def _prompts(
        self, camera: Camera, frame: Frame, size: tuple[int, int], timeout_s: float
    ) -> tuple[dict[str, Any], dict[int, Sequence[Any]]]:
        """Arguments for `Pipeline.decode`, and its objects as `CameraPrompts.current` has them."""
        if frame.boxes is None:
            prompts, objects, gone = camera.prompts.current(size, timeout_s)
            for text in gone:
                camera.ledger.noticed("dropped_prompt", text)
            if gone:
                self._warn(f"{camera.label}: {'; '.join(gone)}")
            return prompts, objects
        expected, got = frame.message.header.frame_id, frame.boxes.header.frame_id
        if expected and got and expected != got:
            raise DroppedFrame("no_boxes", f"expected boxes of the frame_id {expected!r} of the image, got {got!r}")
        prompts, objects, refused = boxes_of(frame.boxes, size)
        if refused:
            self._notice(camera, "refused_prompt", refused)
        return prompts, objects

    def _finish(self, encoded: Encoded) -> None:
        """The second half: decode, find classes, restore; each result is published as soon as it is there."""
        camera, frame, wanted, embedding = encoded.camera, encoded.frame, encoded.wanted, encoded.embedding
        ledger, header, outputs = camera.ledger, frame.message.header, camera.outputs
        segmenter = self._segmenter if wanted & WITH_CLASSES else None
        restorer = self._restorer if "enhanced" in wanted else None
        labels = semantic = None
        began = time.perf_counter()
        instances = self._decode(encoded) if wanted & OF_INSTANCES else None
        decode_s = in_models_s = time.perf_counter() - began
        if embedding is not None:
            self._pipeline.pace.took(encoded.encode_s + decode_s)
        if self._stopping.is_set():
            ledger.dropped("disabled")
            return

        published = wanted & OF_EMBEDDING
        if instances is not None:
            labels = outputs.publish_masks(wanted, header, instances)
            if segmenter is None:
                outputs.publish_detections(wanted, header, instances, None, encoded.objects)
        if embedding is not None:
            age_ms, limit_ms = self._age_ms(encoded.stamp_ns, frame), self._pipeline.settings.max_frame_age_ms
            ledger.latency_ms.add(age_ms)
            if 0 < limit_ms < age_ms:
                self._notice(
                    camera, "late_result", f"expected masks at most {limit_ms} ms after the stamp (max_frame_age_ms), "
                    f"they came after {age_ms:.0f} ms; {AFTER_BOXES if frame.boxes is not None else FASTER}",
                )
            outputs.publish_quality(wanted, header, embedding.degradation, embedding.enhanced)
            ledger.degradation, ledger.enhanced = embedding.degradation, embedding.enhanced
            ledger.encode_ms.add(1e3 * encoded.encode_s)
            ledger.decode_ms.add(1e3 * decode_s)

        if segmenter is not None:
            semantic, took_s = self._attempt(camera, "semantic", ledger.semantic_ms, segmenter.segment, encoded.image)
            in_models_s += took_s
        if semantic is not None:
            outputs.publish_semantic(wanted, header, semantic)
            published |= wanted & OF_CLASSES
        if instances is not None:
            if segmenter is not None:
                outputs.publish_detections(wanted, header, instances, semantic, encoded.objects)
            alpha = self._pipeline.settings.overlay_alpha
            outputs.publish_overlay(wanted, header, encoded.image, instances, alpha, labels, semantic)

        if restorer is not None and not self._stopping.is_set():
            names = semantic.main_classes() if semantic is not None else ()
            restored, took_s = self._attempt(
                camera, "restorer", ledger.restore_ms, restorer.restore, encoded.image, names
            )
            in_models_s += took_s
            if restored is not None:
                outputs.publish_enhanced(wanted, header, restored)
                published |= {"enhanced"}

        ledger.own_ms.add(1e3 * (encoded.own_s + time.perf_counter() - began - in_models_s))
        if published:
            ledger.processed()
        elif self._stopping.is_set():
            ledger.dropped("disabled")
        else:
            ledger.dropped("no_result", "no model that was asked could make its result; the notices say why")

    def _decode(self, encoded: Encoded) -> Instances | None:
        """Masks with their ids; None where nothing was encoded, none at all where nothing is asked for."""
        camera, embedding, settings = encoded.camera, encoded.embedding, self._pipeline.settings
        if embedding is None:
            return None
        if not encoded.prompts and (encoded.frame.boxes is not None or not settings.everything):
            return Instances.empty(embedding.size, embedding.degradation, embedding.enhanced)
        with _inference():
            instances = self._pipeline.decode(embedding, **encoded.prompts)
        if encoded.prompts:
            return dataclasses.replace(instances, ids=np.array(list(encoded.objects), np.int32))
        return camera.identity.update(instances) if settings.stable_ids else instances

    def _attempt(
        self, camera: Camera, what: str, times_ms: Ring, model: Callable[..., Result], *arguments: Any
    ) -> tuple[Result | None, float]:
        """A result beside the masks, and the seconds spent on it; a fault costs the result and not the frame."""
        started = time.perf_counter()
        try:
            result = model(*arguments)
        except OutOfMemory as error:
            self._notice(camera, f"{what}_out_of_memory", str(error))
        except Exception as error:
            self._notice(camera, f"{what}_error", f"{type(error).__name__}: {error}", error)
        else:
            took_s = time.perf_counter() - started
            times_ms.add(1e3 * took_s)
            return result, took_s
        return None, time.perf_counter() - started

    def _check_values(self, camera: Camera, message: Any, image: UInt8Array) -> None:
        """Notice dark or flat pictures whose message states that they have 16 bits: their cameras may fill fewer."""
        stated = message.format if isinstance(message, CompressedImage) else message.encoding
        if "16" not in stated or "jpeg" in stated.lower():
            return
        low, high, *_ = cv2.minMaxLoc(image.reshape(len(image), -1))
        if high < FEW_VALUES or high - low < FLAT:
            self._notice(
                camera, "few_values", f"of 16 bits the upper 8 count, and of these this picture ({stated}) has {low:g} "
                f"to {high:g} of 255 only; if the camera fills fewer bits, set max_image_value (4095 for 12 bits); if "
                "it is a thermal one with raw counts, do_dynamic_scaling",
            )

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
        if limit_ms == 0:
            return
        age_ms = self._age_ms(stamp_ns, frame)
        if age_ms > limit_ms:
            in_node_ms = 1e3 * (time.monotonic() - frame.arrival)
            raise DroppedFrame(
                "stale", f"expected an age of at most {limit_ms} ms (max_frame_age_ms), got {age_ms:.0f} ms; "
                f"{self._why_old(age_ms - in_node_ms) if frame.boxes is None else AFTER_BOXES}",
            )
        if age_ms < -limit_ms:
            self._notice(camera, "future_stamp", self._why_ahead(-age_ms))

    def _why_old(self, age_on_arrival_ms: float) -> str:
        """Why a frame may be too old, and what to do."""
        if age_on_arrival_ms <= OTHER_TIME_MS:
            return "the model is too slow for this machine (frame_budget_ms makes it faster), or two clocks disagree"
        if self._is_simulated():
            return "the stamps are of another time than /clock; let what publishes the images have use_sim_time, too"
        return "the stamps are of another time; of a bag: ros2 bag play --clock, and use_sim_time:=true here"

    def _why_ahead(self, ahead_ms: float) -> str:
        """Why a stamp may be ahead of the clock, and what to do."""
        if not self._is_simulated():
            return (
                f"the stamp is {ahead_ms:.0f} ms ahead of the node's clock; synchronise the clocks, or set "
                "use_sim_time for a simulation"
            )
        if self._clock.now().nanoseconds == 0:
            return (
                "use_sim_time is set and nothing came on /clock yet, so ages are unknown; start the simulation, play "
                "the bag with ros2 bag play --clock, or set use_sim_time:=false"
            )
        return (
            f"the stamp is {ahead_ms:.0f} ms ahead of /clock; let what publishes the images have use_sim_time, too, or "
            "set use_sim_time:=false"
        )

    def _is_simulated(self) -> bool:
        return isinstance(self._clock, ROSClock) and self._clock.ros_time_is_active

    def _age_ms(self, stamp_ns: int, frame: Frame) -> float:
        if stamp_ns == 0:
            return 1e3 * (time.monotonic() - frame.arrival)
        return (self._clock.now().nanoseconds - stamp_ns) / 1e6

    def _notice(self, camera: Camera, what: str, text: str, error: Exception | None = None) -> None:
        count = camera.ledger.noticed(what, text)
        if worth_a_log_line(count):
            note = f"{camera.label}: {what}: {text} [{count} so far, next note at {10 * count}]"
            self._warn(note if error is None else f"{note}\n{_traceback(error)}")

    def _drop(self, camera: Camera, reason: str, error: Exception) -> None:
        count = camera.ledger.dropped(reason, str(error))
        if worth_a_log_line(count):
            text = f"{camera.label}: frame dropped, {reason}: {error} [{count} so far, next note at {10 * count}]"
            if reason in ("inference_error", "internal_error"):
                text += f"\n{_traceback(error)}"
            self._warn(text)


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()


@contextlib.contextmanager
def _inference() -> Iterator[None]:
    """A fault of the pipeline as the reason why its frame is dropped."""
    try:
        yield
    except OutOfMemory as error:
        raise DroppedFrame("out_of_memory", str(error)) from error
    except Exception as error:
        raise DroppedFrame("inference_error", f"{type(error).__name__}: {error}") from error
