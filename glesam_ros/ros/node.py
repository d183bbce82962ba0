"""The perception node: lifecycle, topics, services. What happens to a frame is in `worker`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Point, PointStamped
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import ParameterEvent, SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.impl.implementation_singleton import rclpy_implementation as _rclpy
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image
from std_srvs.srv import SetBool, Trigger

from glesam_ros.models import OutOfMemory
from glesam_ros.models.base import return_freed_memory
from glesam_ros.pipeline import Pipeline, load_pipeline
from glesam_ros.ros import diagnostics, parameters, qos
from glesam_ros.ros.camera import Camera
from glesam_ros.ros.names import beside
from glesam_ros.ros.outputs import COMPRESSED, VISION_MSGS_MISSING, Outputs, vision
from glesam_ros.ros.pairing import Paired
from glesam_ros.ros.prompts import MAX_POINTS, corners_of
from glesam_ros.ros.scheduling import Frame, NewestFrames
from glesam_ros.ros.worker import Worker
from glesam_ros.semantic import Restorer, SemanticSegmenter, device_beside, load_restorer, load_semantic
from glesam_ros.settings import OFF
from glesam_ros.validation import UInt8Array

NODE_NAME = "perception"
DEFAULT_NAMESPACE = "glesam"
STOP_TIMEOUT_S = 10.0
"""How long deactivate waits for a running inference."""
WARM_UP_SIZES = (480, 640), (720, 1280)
"""(height, width) of most cameras, for warm-up before a frame has come."""
PROMPT_DEPTH = 2 * MAX_POINTS
"""An object may come as a burst of points; one that is lost is lost without a word."""
NO_BOXES = (
    "with sync_boxes a frame waits for boxes with its stamp on prompt/boxes, and none came within max_frame_age_ms; "
    "the detector has to copy header.stamp of its image, to publish where it finds nothing, too, and to be faster"
)
NO_FRAME = (
    "with sync_boxes boxes wait for the frame with their stamp, and none came, or it was over; the detector has to "
    "copy header.stamp of its image and to be faster than max_frame_age_ms; where frames are lost on the way here, "
    "input_reliability: reliable helps"
)
NO_STAMP = "with sync_boxes frames need stamps, got 0; let the camera driver fill header.stamp"
CLICKED = "_mouse_left"
"""rqt_image_view publishes clicks on `<image topic>_mouse_left` as geometry_msgs/Point in pixels."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")

IN_WORDS = {
    "configuring": "configuring: the model is being loaded",
    "activating": "activating: the model is being loaded and warmed up",
}
"""Lifecycle states in /diagnostics, where their names do not say enough."""

Models = tuple[Pipeline | None, SemanticSegmenter | None, Restorer | None]


class StuckInference(RuntimeError):
    """An inference does not end, so the memory of its model cannot be freed."""


class NotLoaded(RuntimeError):
    """A model cannot be loaded as the parameters ask for it."""


FOR_THE_USER = (FileNotFoundError, ModuleNotFoundError, OutOfMemory, StuckInference, NotLoaded)
"""Faults of transitions whose text says what to do, so that a traceback would only hide it."""

SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE, TransitionCallbackReturn.ERROR
)


class PerceptionNode(LifecycleNode):
    """Camera images in, instance masks out.

    | Callback group | Callbacks |
    |---|---|
    | images | store the newest message of a camera; with sync_boxes those that wait for their boxes |
    | default ("control") | parameters, services, prompts, diagnostics; with sync_boxes frames whose boxes came |
    | transitions | change_state and autostart, which load and free the model |

    Inference runs on a thread of its own, between activate and deactivate.

    Raises:
        ValueError, rclpy.exceptions.ParameterException: a parameter that the node is started with is not valid.
    """

    def __init__(self) -> None:
        super().__init__(NODE_NAME, namespace=DEFAULT_NAMESPACE)
        self.settings = parameters.declare(self)
        if ignored := parameters.unknown(self):
            self.get_logger().warning(ignored)
        self.add_on_set_parameters_callback(self._on_parameters)

        self._pipeline: Pipeline | None = None
        self._segmenter: SemanticSegmenter | None = None
        self._restorer: Restorer | None = None
        self._worker: Worker | None = None
        self._is_stuck = False
        self._cameras: dict[str, Camera] = {}
        self._frames = NewestFrames(self.settings.cameras)
        self._subscriptions_of_images: list[Subscription] = []
        self._subscriptions_of_prompts: list[Subscription] = []
        self._is_enabled = True
        self._is_in_transition = False
        self._device_text = ""
        self._last_error = ""
        self._twins = ""

        self._image_group = MutuallyExclusiveCallbackGroup()
        self._transition_group = MutuallyExclusiveCallbackGroup()
        for service in self.services:
            if service.srv_type is ChangeState:
                # a model that loads for a minute must not hold up the parameter services
                service.callback_group = self._transition_group
                service.callback = functools.partial(self._on_change_state, service.callback)
                self._transition_group.add_entity(service)
        self.create_service(Trigger, "clear_prompts", self._on_clear_prompts)
        self.create_service(SetBool, "enable", self._on_enable)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # steady time: also while a simulation is paused
        self.create_timer(1.0, self._publish_diagnostics, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._jump_handle = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._on_clock_jump,
        )
        if VISION_MSGS_MISSING:
            self.get_logger().warning(VISION_MSGS_MISSING)
        if self.settings.autostart:
            self._autostart_timer = self.create_timer(
                0.0, self._autostart, callback_group=self._transition_group,
                clock=Clock(clock_type=ClockType.STEADY_TIME),
            )

    # Lifecycle: configure / cleanup and activate / deactivate mirror each other.

    def _on_change_state(
        self, change: Callable[[Any, Any], ChangeState.Response], request: ChangeState.Request,
        response: ChangeState.Response,
    ) -> ChangeState.Response:
        """Answer a transition that the state does not have with success false; rclpy raises and never answers."""
        state = self._state_machine.current_state[1]
        try:
            return change(request, response)
        except _rclpy.RCLError:
            self.get_logger().warning(
                f"transition {request.transition.label or request.transition.id} refused: the node is {state}; ros2 "
                f"lifecycle list {self.get_fully_qualified_name()} says what it may do; below a lifecycle manager set "
                "autostart to false"
            )
            response.success = False
            return response

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the models and make the result topics."""
        return self._transition("configure", self._configure, undo=self._clean_up)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Warm the models up with one inference, then listen."""
        return self._transition("activate", self._activate, undo=self._deactivate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop listening and free the models; the next activate loads them again."""
        return self._transition("deactivate", self._deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Remove the result topics; as after the start the node is not paused."""
        return self._transition("cleanup", self._begin_anew)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything, from any state."""
        return self._transition("shutdown", self._clean_up)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a fault that a transition could not undo: free what can be freed, back to unconfigured."""
        return self._transition("error processing", self._clean_up, mends=False)

    def _transition(
        self, name: str, action: Callable[[], None], undo: Callable[[], None] | None = None, mends: bool = True
    ) -> TransitionCallbackReturn:
        """Run `action`; rclpy is silent about exceptions in transitions, so they are logged here.

        Args:
            undo: run where `action` fails; None where there is no way back.
            mends: whether diagnostics forget the error of an earlier transition where `action` works.
        """
        self._is_in_transition = True
        try:
            action()
        except Exception as error:  # any fault of a transition is logged
            self._last_error = f"{name}: {type(error).__name__}: {error}"
            text, where = f"{name} failed: {error}", traceback.format_exc().rstrip()
            if isinstance(error, FOR_THE_USER):
                self.get_logger().error(text)
                self.get_logger().debug(where)
            else:
                self.get_logger().error(f"{text}\n{where}")
            if undo is None:
                return ERROR
            undo()
            return FAILURE
        finally:
            self._is_in_transition = False
        if mends:
            self._last_error = ""
        self.get_logger().info(f"{name} done")
        return SUCCESS

    def _configure(self) -> None:
        pipeline = self._load()
        for name in self.settings.cameras:
            prefix = f"{name}/" if name else ""
            outputs = Outputs(
                self, prefix, pipeline.model.classes, pipeline.resolved.score_threshold,
                semantic_classes=self._segmenter.classes if self._segmenter is not None else None,
                restores=self._restorer is not None,
            )
            topic = self.resolve_topic_name(self._input_topic(prefix))
            self._cameras[name] = Camera(name, topic, outputs)

    def _clean_up(self) -> None:
        self._deactivate()
        for camera in self._cameras.values():
            camera.outputs.destroy()
        self._cameras = {}

    def _begin_anew(self) -> None:
        self._clean_up()
        self._is_enabled = True

    def _activate(self) -> None:
        pipeline = self._pipeline or self._load()
        self._warm_up(pipeline)
        self._frames = NewestFrames(self.settings.cameras)
        worker = Worker(
            pipeline, dict(self._cameras), self._frames, self.get_clock(), self.get_logger().warning,
            self._segmenter, self._restorer,
        )
        worker.start()
        self._worker = worker
        self._forget_waiting("disabled")
        for camera in self._cameras.values():
            camera.outputs.tell_threshold(pipeline.resolved.score_threshold)
            camera.forget_time()
            self._listen(camera)
            camera.ledger.listens(time.monotonic())
        topics = ", ".join(camera.ledger.topic for camera in self._cameras.values())
        self.get_logger().info(f"listening to {topics} ({'JPEG or PNG' if self.settings.compressed else 'raw images'})")

    def _deactivate(self) -> None:
        for subscription in self._subscriptions_of_images + self._subscriptions_of_prompts:
            self.destroy_subscription(subscription)
        self._subscriptions_of_images, self._subscriptions_of_prompts = [], []
        worker, self._worker = self._worker, None
        models = self._pipeline, self._segmenter, self._restorer
        self._pipeline = self._segmenter = self._restorer = None
        if worker is not None and not worker.stop(STOP_TIMEOUT_S):
            self._is_stuck = True
            threading.Thread(target=self._free_later, args=(worker, models), name="freeing", daemon=True).start()
            raise StuckInference(
                f"the model did not finish a frame within {STOP_TIMEOUT_S:g} s, so its memory cannot be freed; "
                "restart the node if it does not recover"
            )
        self._forget_frames("disabled")
        _close(models)
        del worker, models
        gc.collect()
        return_freed_memory()
        for camera in self._cameras.values():
            camera.ledger.rest()

    def _free_later(self, worker: Worker, models: Models) -> None:
        """Close `models` once the frame has ended that `_deactivate` gave up on."""
        worker.stop(None)
        try:
            _close(models)
        finally:
            self._is_stuck = False
        del worker, models
        gc.collect()
        return_freed_memory()
        self.get_logger().info("the frame that deactivate gave up on has ended, its model is freed; configure again")

    def _load(self) -> Pipeline:
        if self._is_stuck:
            raise StuckInference(
                "expected that the model had ended its frame before another one is loaded, it is still with the one "
                "that deactivate gave up on; try again later, or restart the node"
            )
        settings = self.settings
        started = time.monotonic()
        with _loading():
            self._pipeline = load_pipeline(**dataclasses.asdict(settings))
        # parameters may change while the model is loading, and while they are handed over
        while self._pipeline.settings is not self.settings:
            self._pipeline.settings = self.settings
        self._device_text = self._pipeline.model.device
        self._log_load("model", settings.model, self._device_text, started)
        device = device_beside(settings.device)
        if settings.semantic != OFF:
            started = time.monotonic()
            with _loading():
                self._segmenter = load_semantic(settings.semantic, device)
            self._log_load("semantic", settings.semantic, self._segmenter.device, started)
        if settings.restorer != OFF:
            started = time.monotonic()
            with _loading():
                self._restorer = load_restorer(settings.restorer, device)
            self._log_load("restorer", settings.restorer, self._restorer.device, started)
        return self._pipeline

    def _log_load(self, what: str, name: str, device: str, started: float) -> None:
        self.get_logger().info(f"{what} {name} loaded on {device} in {time.monotonic() - started:.2f} s")

    def _warm_up(self, pipeline: Pipeline) -> None:
        started = time.monotonic()
        sizes = self._sizes_to_expect(pipeline.model.device)
        for size in sizes:
            pipeline.warm_up(_noise(size))
        if self._segmenter is not None:
            self._warm_up_beside("semantic model", self._segmenter.segment, self._segmenter.device)
        if self._restorer is not None:
            self._warm_up_beside("restorer", self._restorer.restore, self._restorer.device)
        self.get_logger().info(
            f"warm-up inference took {1e3 * (time.monotonic() - started):.0f} ms "
            f"({', '.join(f'{width}x{height}' for height, width in sizes)})"
        )

    def _sizes_to_expect(self, device: str) -> list[tuple[int, int]]:
        """(height, width) that the cameras had; of one without a frame yet the usual sizes, on a CPU the first alone.

        A GPU builds engines or tunes kernels for each size, a CPU does not.
        """
        sizes = {camera.ledger.size for camera in self._cameras.values()}
        if None in sizes:
            sizes.update(WARM_UP_SIZES[:1] if device.startswith("cpu") else WARM_UP_SIZES)
        return sorted(size for size in sizes if size is not None)

    def _warm_up_beside(self, what: str, model: Callable[[UInt8Array], Any], device: str) -> None:
        """As for frames: what cannot be made beside the masks does not stop them."""
        try:
            for size in self._sizes_to_expect(device):
                model(_noise(size))
        except Exception as error:  # whatever the model raises
            self.get_logger().error(f"warm-up of the {what} failed, masks go on: {type(error).__name__}: {error}")

    def _autostart(self) -> None:
        self._autostart_timer.cancel()
        if self.trigger_configure() != SUCCESS or self.trigger_activate() != SUCCESS:
            self.get_logger().error(
                f"autostart stopped; mend the cause, then: ros2 lifecycle set {self.get_fully_qualified_name()} "
                "configure (or activate, if it is configured); another value of a parameter that is read at start "
                "(model, device, precision, semantic, restorer, ...) takes a new start of the node"
            )

    # Topics in.

    def _input_topic(self, prefix: str) -> str:
        """Name, before remapping, of the images of the camera whose topics begin with `prefix`."""
        return beside(self, f"{prefix}image", COMPRESSED) if self.settings.compressed else f"{prefix}image"

    def _listen(self, camera: Camera) -> None:
        prefix = f"{camera.name}/" if camera.name else ""
        profile = qos.image_input(self.settings.input_reliability)
        self._subscriptions_of_images.append(
            self.create_subscription(
                CompressedImage if self.settings.compressed else Image,
                self._input_topic(prefix),
                functools.partial(self._on_image, camera),
                profile,
                callback_group=self._image_group,
                event_callbacks=qos.SubscriptionEventCallbacks(
                    incompatible_qos=functools.partial(self._on_qos_mismatch, camera, profile)
                ),
                qos_overriding_options=qos.overridable(),
            )
        )
        doors: list[tuple[Any, str, Callable[..., None]]] = [
            (PointStamped, f"{prefix}prompt/point", self._on_point),
            (Point, beside(self, f"{prefix}overlay", CLICKED), self._on_click),
        ]
        if vision is not None:
            doors.append((vision.Detection2DArray, f"{prefix}prompt/boxes", self._on_boxes))
        self._subscriptions_of_prompts += [
            self.create_subscription(kind, topic, functools.partial(callback, camera), PROMPT_DEPTH)
            for kind, topic, callback in doors
        ]

    def _on_image(self, camera: Camera, message: Any) -> None:
        frame = Frame(camera.name, message)
        silence = camera.ledger.arrived(frame.arrival)
        if silence is not None:
            self.get_logger().info(f"{camera.label} is back on {camera.ledger.topic} after {silence:.1f} s")
        if not self._is_enabled:
            camera.ledger.dropped("disabled")
        elif self.settings.sync_boxes:
            self._wait_for_boxes(camera, frame)
        else:
            self._put(camera, frame)

    def _put(self, camera: Camera, frame: Frame) -> None:
        if lost := self._frames.put(frame):
            camera.ledger.dropped(lost)

    def _wait_for_boxes(self, camera: Camera, frame: Frame) -> None:
        stamp = frame.message.header.stamp
        if not (stamp.sec or stamp.nanosec):
            self._drop_without_boxes(camera, NO_STAMP)
            return
        self._paired(camera, camera.pairing.put_frame(frame, self.settings.max_frame_age_ms))
        if not (self._is_enabled and self.settings.sync_boxes):  # since the frame came: nobody else takes it out
            self._forget_waiting("disabled")

    def _paired(self, camera: Camera, paired: Paired) -> None:
        """With sync_boxes: hand on a frame that has its boxes, count what stays alone."""
        for _ in range(paired.passed):
            camera.ledger.dropped("passed_over")
        for _ in range(paired.expired):
            self._drop_without_boxes(camera, VISION_MSGS_MISSING or NO_BOXES)
        for _ in range(paired.unmatched):
            self._tell(camera, f"unmatched_boxes: {NO_FRAME}", camera.ledger.noticed("unmatched_boxes", NO_FRAME))
        if paired.frame is not None:
            self._put(camera, paired.frame)

    def _drop_without_boxes(self, camera: Camera, text: str) -> None:
        self._tell(camera, f"frame dropped, no_boxes: {text}", camera.ledger.dropped("no_boxes", text))

    def _tell(self, camera: Camera, text: str, count: int) -> None:
        if diagnostics.worth_a_log_line(count):
            self.get_logger().warning(f"{camera.label}: {text} [{count} so far, next note at {10 * count}]")

    def _on_qos_mismatch(self, camera: Camera, profile: Any, event: Any) -> None:
        text = qos.mismatch(self, camera.ledger.topic, profile, event.last_policy_kind)
        if text != camera.ledger.qos_mismatch:
            camera.ledger.qos_mismatch = text
            self.get_logger().error(text)

    def _on_clock_jump(self, _jump: Any) -> None:
        self._forget_frames("clock_jump")
        for camera in list(self._cameras.values()):
            camera.forget_time()
        self.get_logger().info("the clock jumped: stamps and enhancement gates start anew")

    def _forget_frames(self, reason: str) -> None:
        for name in self._frames.clear():
            self._cameras[name].ledger.dropped(reason)
        self._forget_waiting(reason)

    def _forget_waiting(self, reason: str) -> None:
        """Frames that wait for their boxes."""
        for camera in list(self._cameras.values()):
            for _ in range(camera.pairing.clear()):
                camera.ledger.dropped(reason)

    # Prompts.

    def _on_point(self, camera: Camera, message: PointStamped) -> None:
        self._prompt(camera, message.header, "point", lambda size: camera.prompts.add_point(
            message.point.x, message.point.y, message.point.z >= 0, size, self.settings.prompt_timeout_s
        ))

    def _on_click(self, camera: Camera, message: Point) -> None:
        def add(size: tuple[int, int]) -> str:
            # rqt_image_view rounds, so a click on the last column or row may name the one after it
            height, width = size
            x = width - 1 if message.x == width else message.x
            y = height - 1 if message.y == height else message.y
            return camera.prompts.add_point(x, y, message.z >= 0, size, self.settings.prompt_timeout_s)

        self._prompt(camera, None, "click", add)

    def _on_boxes(self, camera: Camera, message: Any) -> None:
        if self.settings.sync_boxes:
            if self._is_enabled:
                self._paired(camera, camera.pairing.put_boxes(message))
            return
        boxes, results = corners_of(message)
        self._prompt(camera, message.header, "boxes", lambda size: camera.prompts.set_boxes(
            boxes, size, self.settings.prompt_timeout_s, results
        ))

    def _prompt(
        self, camera: Camera, header: Any, kind: str, accept: Callable[[tuple[int, int]], str]
    ) -> None:
        """Hand a prompt to `accept`, unless its image is too old; a refusal is a warning with the numbers."""
        try:
            if self.settings.sync_boxes:
                raise ValueError("with sync_boxes frames are answered with boxes of their stamp alone; set it to false")
            if camera.ledger.size is None:
                raise ValueError(
                    f"no frame of {camera.ledger.topic} was read yet; send the prompt after the first result"
                )
            if header is not None and header.frame_id and camera.frame_id and header.frame_id != camera.frame_id:
                # RViz gives metres of a map, and boxes may be of another camera
                raise ValueError(
                    f"expected pixels of the image, frame_id {camera.frame_id!r} or empty, got {header.frame_id!r}"
                )
            stamp_ns = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec if header is not None else 0
            age_s = (self.get_clock().now().nanoseconds - stamp_ns) / 1e9
            limit_s = self.settings.prompt_timeout_s
            # a person looks at the image for longer than a frame may wait
            if stamp_ns and limit_s and age_s > limit_s:
                raise ValueError(
                    f"its image is too old: expected a stamp at most {limit_s:g} s old (prompt_timeout_s), got "
                    f"{age_s:.1f} s; a stamp of 0 means the newest image"
                )
            warning = accept(camera.ledger.size)
        except ValueError as error:
            count = camera.ledger.noticed("refused_prompt", str(error))
            reason = _NUMBER.sub("", str(error))
            if diagnostics.worth_a_log_line(count) or reason not in camera.logged_refusals:
                camera.logged_refusals.add(reason)
                self.get_logger().warning(f"{camera.label}: prompt ({kind}) refused: {error} [{count} so far]")
            return
        if warning:
            self.get_logger().warning(f"{camera.label}: {warning}")

    # Services and parameters.

    def _on_clear_prompts(self, _request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        held = [camera.prompts.clear(self.settings.prompt_timeout_s) for camera in list(self._cameras.values())]
        points, boxes = sum(p for p, _ in held), sum(b for _, b in held)
        response.success = True
        now = "everything mode is back" if self.settings.everything else "masks stay empty until the next prompt"
        if self.settings.sync_boxes:
            now = "frames are answered with boxes of their stamp (sync_boxes)"
        response.message = f"cleared {points} points and {boxes} boxes of {len(held)} cameras; {now}"
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._is_enabled = request.data
        if not request.data:
            self._forget_frames("disabled")
        response.success = True
        response.message = "inference runs" if request.data else "inference is paused; frames are counted as disabled"
        self.get_logger().info(response.message)
        return response

    def _on_parameters(self, changes: Iterable[Parameter]) -> SetParametersResult:
        # applied here and not in a post-set callback, which Humble does not have
        were_synced = self.settings.sync_boxes
        try:
            self.settings = parameters.changed(self.settings, changes)
        except ValueError as error:
            # rqt does not show the reason
            self.get_logger().warning(f"parameters stay as they are: {error}")
            self._tell_what_counts(p.name for p in changes)
            return SetParametersResult(successful=False, reason=str(error))
        if were_synced and not self.settings.sync_boxes:
            self._forget_waiting("passed_over")
        if (pipeline := self._pipeline) is not None:
            pipeline.settings = self.settings
            for camera in list(self._cameras.values()):
                camera.outputs.tell_threshold(pipeline.resolved.score_threshold)
        return SetParametersResult(successful=True)

    def _tell_what_counts(self, names: Iterable[str]) -> None:
        """An event with the values that stay: rqt goes on showing a refused one, and does not send it again."""
        kept = [self.get_parameter(name).to_parameter_msg() for name in names if self.has_parameter(name)]
        if self._parameter_event_publisher is not None:
            self._parameter_event_publisher.publish(ParameterEvent(
                stamp=self.get_clock().now().to_msg(), node=self.get_fully_qualified_name(), changed_parameters=kept
            ))

    # Diagnostics.

    def _publish_diagnostics(self) -> None:
        now = time.monotonic()
        name = self.get_fully_qualified_name().lstrip("/")
        before, self._twins = self._twins, diagnostics.twins(
            (self.get_name(), self.get_namespace()), self.get_node_names_and_namespaces()
        )
        if self._twins and not before:
            self.get_logger().warning(self._twins)
        hardware_id = f"{self.settings.model} on {self._device_text or self.settings.device}"
        message = DiagnosticArray(status=[self._node_status(name, hardware_id)])
        message.header.stamp = self.get_clock().now().to_msg()
        if self._worker is not None:
            for camera in list(self._cameras.values()):
                silence = camera.ledger.stopped(now)
                if silence is not None:
                    self.get_logger().warning(
                        f"{camera.label} stopped: no frame on {camera.ledger.topic} for {silence:.1f} s"
                    )
                camera.ledger.no_publisher = diagnostics.no_publisher(
                    camera.ledger.topic, self.settings.compressed, self.count_publishers, len(self._cameras) > 1
                )
                # a QoS mismatch has a line of its own
                if (missed := camera.ledger.missed(now)) and not camera.ledger.qos_mismatch:
                    self.get_logger().warning(f"{camera.label}: {missed}")
                points, boxes = camera.prompts.count(self.settings.prompt_timeout_s)
                message.status.append(camera.ledger.status(
                    f"{name}: camera {camera.name}".rstrip(), hardware_id, now,
                    {"prompt_points": points, "prompt_boxes": boxes}, self.settings.min_rate_hz,
                ))
        self._diagnostics.publish(message)

    def _node_status(self, name: str, hardware_id: str) -> DiagnosticStatus:
        settings = self.settings
        # a transition may take the pipeline away at any time
        worker, pipeline = self._worker, self._pipeline
        memory, pace = (pipeline.memory, pipeline.pace) if pipeline is not None else (None, None)
        is_busy = any(camera.ledger.processed_rate_hz for camera in list(self._cameras.values()))
        if self._last_error:
            level, text = DiagnosticStatus.ERROR, self._last_error
        elif worker is None:
            state = self._state_machine.current_state[1]
            level, text = DiagnosticStatus.OK, IN_WORDS.get(state, state)
        elif not worker.is_alive():
            level, text = DiagnosticStatus.ERROR, "the inference thread has ended; deactivate and activate again"
        elif memory is not None and memory.now != memory.full:
            level, text = DiagnosticStatus.WARN, f"out of memory: {memory}"
        elif self._twins:
            level, text = DiagnosticStatus.WARN, self._twins
        elif not self._is_enabled:
            level, text = DiagnosticStatus.OK, "paused (service enable)"
        elif pace is not None and pace.is_late and is_busy:
            limit = f"frame_budget_ms, {settings.frame_budget_ms} ms"
            level, text = DiagnosticStatus.WARN, f"frames take longer than {limit}, even at processing size {pace.now}"
        else:
            is_paced = pace is not None and pace.now != pace.full
            level, text = DiagnosticStatus.OK, f"active, {pace} to keep to frame_budget_ms" if is_paced else "active"
        return diagnostics.status(f"{name}: model", hardware_id, level, text, {
            "model": settings.model,
            "device": self._device_text,
            "precision": settings.precision,
            "semantic": settings.semantic,
            "semantic_device": segmenter.device if (segmenter := self._segmenter) is not None else "",
            "restorer": settings.restorer,
            "restorer_device": restorer.device if (restorer := self._restorer) is not None else "",
            "enhancement": settings.enhancement,
            "processing_size": settings.processing_size,
            "processing_size_now": min(memory.now.size, pace.now) if memory and pace else "",
            "points_per_batch_now": memory.now.batch if memory else "",
            "out_of_memory": memory.failures if memory else 0,
            "enabled": self._is_enabled,
            "cameras": ", ".join(settings.cameras),
            "vision_msgs": "missing" if VISION_MSGS_MISSING else "found",
            "last_error": self._last_error,
        })

    # End of the process.

    def close(self, timeout_s: float) -> bool:
        """Stop working at once; False when a model is busy for longer than that, so that threads are left behind."""
        worker, self._worker = self._worker, None
        stopped = (worker is None or worker.stop(timeout_s)) and not self._is_stuck
        if stopped and not self._is_in_transition:
            _close((self._pipeline, self._segmenter, self._restorer))
        return stopped and not self._is_in_transition


def _noise(size: tuple[int, int]) -> UInt8Array:
    """A picture of `size` (height, width) to warm up with."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """What models raise for who chose them, in one type."""
    try:
        yield
    except FOR_THE_USER:
        raise
    except (ValueError, RuntimeError) as error:
        raise NotLoaded(str(error)) from error


def _close(models: Models) -> None:
    for model in models:
        if model is not None:
            model.close()
