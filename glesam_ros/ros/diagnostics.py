"""What happened to every frame, and how it reads in /diagnostics."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

STOPPED_AFTER_S = 2.0
"""A camera without a frame for this long counts as stopped."""
MISSED_AFTER_S = 5.0
"""A camera without its first frame for this long is worth a log line."""
FAILURES_TO_ERROR = 3
"""Failed inferences in a row that make the status ERROR."""
RATE_WINDOW_S = 5
"""Rates are means over this many seconds."""
LATENCIES_KEPT = 512

HARMLESS_DROPS = frozenset({"overwritten", "passed_over", "no_subscriber", "disabled", "clock_jump"})
"""Reasons that are the design at work; all others are faults."""
NOTHING_ASKED = frozenset({"no_subscriber", "disabled"})
"""Reasons after which earlier failed inferences say nothing of now."""
INFERENCE_FAULTS = frozenset({"inference_error", "out_of_memory", "no_result"})
"""Reasons that count as failed inferences."""


class Ring:
    """The last values of a measurement, in a fixed amount of memory. One writer, any reader."""

    def __init__(self, size: int = LATENCIES_KEPT) -> None:
        self._values = np.zeros(size, np.float64)
        self._count = 0

    def add(self, value: float) -> None:
        """Keep `value`, forget the oldest."""
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def __bool__(self) -> bool:
        return self._count > 0

    def percentiles(self, *percents: float) -> list[float]:
        """Percentiles of what is kept, NaN while nothing is."""
        kept = self._values[: min(self._count, len(self._values))]
        return np.percentile(kept, percents).tolist() if kept.size else [float("nan")] * len(percents)


class CameraLedger:
    """Counts and times of one camera; every frame that came in is in one of the counts. Thread-safe.

    Attributes:
        topic: full name of the input topic, for the texts.
        size: (height, width) of the newest frame that could be read, None before.
        degradation, enhanced: of the newest result, None before.
        qos_mismatch: text of a QoS mismatch, "" where there is none.
        no_publisher: text of a topic without a publisher, "" where it has one.
        processed_rate_hz: frames a second when `status` was last asked for.
        latency_ms: from stamp to masks.
        encode_ms, decode_ms: of the pipeline.
        semantic_ms, restore_ms: of the semantic model and of the restorer, in `status` once there is one.
        own_ms: all else.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.size: tuple[int, int] | None = None
        self.degradation: float | None = None
        self.enhanced: bool | None = None
        self.qos_mismatch = ""
        self.no_publisher = ""
        self.processed_rate_hz = 0.0
        self.latency_ms, self.encode_ms, self.decode_ms, self.own_ms = Ring(), Ring(), Ring(), Ring()
        self.semantic_ms, self.restore_ms = Ring(), Ring()
        self._lock = threading.Lock()
        self._received = 0
        self._processed = 0
        self._dropped: Counter[str] = Counter()
        self._noticed: Counter[str] = Counter()
        self._failures_in_a_row = 0
        self._last_fault = ""
        self._last_arrival: float | None = None
        self._is_stopped = False
        self._missed_at: float | None = None
        self._history: deque[tuple[float, int, int, Counter[str]]] = deque(maxlen=RATE_WINDOW_S + 1)

    def arrived(self, now: float) -> float | None:
        """Count a frame that came at `now` (monotonic seconds); the length of the silence if it ended one."""
        with self._lock:
            silence = now - self._last_arrival if self._is_stopped and self._last_arrival is not None else None
            if not self._history:
                self._history.append((now, self._received, self._processed, self._events()))
            self._received += 1
            self._last_arrival, self._is_stopped = now, False
            self.qos_mismatch = ""
            return silence

    def stopped(self, now: float) -> float | None:
        """Length of the silence in seconds, once, when the camera has just stopped."""
        with self._lock:
            if self._is_stopped or self._last_arrival is None or now - self._last_arrival <= STOPPED_AFTER_S:
                return None
            self._is_stopped = True
            return now - self._last_arrival

    def listens(self, now: float) -> None:
        """From `now` (monotonic seconds) on frames are expected."""
        with self._lock:
            self._missed_at = now + MISSED_AFTER_S

    def missed(self, now: float) -> str:
        """Why there is no first frame yet, once, when it is time to tell; else ""."""
        with self._lock:
            if self._missed_at is None or self._last_arrival is not None or now < self._missed_at:
                return ""
            self._missed_at = None
            return self._absence()

    def rest(self) -> None:
        """Forget rates and silence, keep the counts: the node does not listen from now on."""
        with self._lock:
            self._last_arrival, self._is_stopped, self.qos_mismatch = None, False, ""
            self._missed_at = None
            self._failures_in_a_row = 0
            self._history.clear()

    def processed(self) -> None:
        """Count a frame whose result was published."""
        with self._lock:
            self._processed += 1
            self._failures_in_a_row = 0

    def dropped(self, reason: str, text: str = "") -> int:
        """Count a frame that was dropped for `reason`; how many there are now."""
        with self._lock:
            self._dropped[reason] += 1
            if reason not in HARMLESS_DROPS:
                self._last_fault = f"{reason}: {text}"
            if reason in INFERENCE_FAULTS:
                self._failures_in_a_row += 1
            elif reason in NOTHING_ASKED:
                self._failures_in_a_row = 0
            return self._dropped[reason]

    def noticed(self, what: str, text: str = "") -> int:
        """Count something odd that did not cost a frame; how many there are now."""
        with self._lock:
            self._noticed[what] += 1
            self._last_fault = f"{what}: {text}"
            return self._noticed[what]

    def status(
        self, name: str, hardware_id: str, now: float, extra: dict[str, Any], min_rate_hz: float = 0.0
    ) -> DiagnosticStatus:
        """The camera as a diagnostic status; call once a second, the rates come from these calls.

        Args:
            now: monotonic seconds.
            extra: further key values.
            min_rate_hz: processed frames a second below which it warns; 0 is any.
        """
        with self._lock:
            events = self._events()
            self._history.append((now, self._received, self._processed, events))
            then, received, processed, old_events = self._history[0]
            span = max(now - then, 1.0)  # a first frame just before a call, or just after its `now`, is no rate
            rate_in, rate_out = (self._received - received) / span, (self._processed - processed) / span
            self.processed_rate_hz = rate_out
            level, message = self._verdict(now, rate_in, rate_out, events - old_events)
            if level == DiagnosticStatus.OK and self._is_slow(rate_out, min_rate_hz, events - old_events):
                level, message = DiagnosticStatus.WARN, f"{message}: expected at least {min_rate_hz:g} Hz (min_rate_hz)"
            values: dict[str, Any] = {
                "topic": self.topic,
                "input_rate_hz": f"{rate_in:.2f}",
                "processed_rate_hz": f"{rate_out:.2f}",
                "frames_received": self._received,
                "frames_processed": self._processed,
                "frames_dropped": sum(self._dropped.values()),
            }
            values.update({f"dropped_{reason}": n for reason, n in sorted(self._dropped.items())})
            values.update({f"noticed_{what}": n for what, n in sorted(self._noticed.items())})
            values["last_fault"] = self._last_fault
        rings = {"latency": self.latency_ms, "encode": self.encode_ms, "decode": self.decode_ms, "own": self.own_ms}
        beside = {"semantic": self.semantic_ms, "restore": self.restore_ms}
        rings.update({key: ring for key, ring in beside.items() if ring})
        for key, ring in rings.items():
            for percent, value in zip((50, 95, 99), ring.percentiles(50, 95, 99)):
                values[f"{key}_p{percent}_ms"] = f"{value:.1f}"
        values["image_size"] = f"{self.size[1]}x{self.size[0]}" if self.size else ""
        values["degradation"] = "" if self.degradation is None else f"{self.degradation:.3f}"
        values["enhanced"] = "" if self.enhanced is None else self.enhanced
        return status(name, hardware_id, level, message, {**values, **extra})

    def _is_slow(self, rate_out: float, min_rate_hz: float, new_events: Counter[str]) -> bool:
        """Whether, for as long as rates are measured, less was processed than is expected though it was asked for."""
        is_full = len(self._history) == self._history.maxlen
        return is_full and rate_out < min_rate_hz and not NOTHING_ASKED & new_events.keys()

    def _absence(self) -> str:
        return self.no_publisher or f"no frame yet on {self.topic}"

    def _events(self) -> Counter[str]:
        return self._dropped + self._noticed

    def _verdict(
        self, now: float, rate_in: float, rate_out: float, new_events: Counter[str]
    ) -> tuple[bytes, str]:
        new_faults = {event: n for event, n in new_events.items() if event not in HARMLESS_DROPS}
        listed = ", ".join(f"{n} {reason}" for reason, n in sorted(new_faults.items()))
        # one whose publisher is gone says nothing of now
        if self.qos_mismatch and not self.no_publisher:
            return DiagnosticStatus.ERROR, self.qos_mismatch
        if self._last_arrival is None:
            # no error: cameras often start after the node
            return DiagnosticStatus.WARN, self._absence()
        if now - self._last_arrival > STOPPED_AFTER_S:
            text = f"camera stopped: no frame for {now - self._last_arrival:.1f} s"
            return DiagnosticStatus.STALE, f"{text}; {self.no_publisher}" if self.no_publisher else text
        if self._failures_in_a_row >= FAILURES_TO_ERROR:
            return DiagnosticStatus.ERROR, f"inference failed {self._failures_in_a_row} times in a row"
        # what was only noticed cost no frame
        if rate_out == 0 and any(fault in self._dropped for fault in new_faults):
            return DiagnosticStatus.ERROR, f"no frame could be processed: {listed}"
        if new_faults:
            return DiagnosticStatus.WARN, f"faults: {listed}"
        idle = ", no subscriber" if rate_out == 0 and new_events["no_subscriber"] else ""
        return DiagnosticStatus.OK, f"{rate_in:.1f} Hz in, {rate_out:.1f} Hz processed{idle}"


def status(name: str, hardware_id: str, level: bytes, message: str, values: dict[str, Any]) -> DiagnosticStatus:
    """A diagnostic status with `values` as its key values."""
    return DiagnosticStatus(
        level=level, name=name, hardware_id=hardware_id, message=message,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )


def no_publisher(topic: str, is_compressed: bool, count: Callable[[str], int], is_of_several: bool) -> str:
    """Why no frame can come on `topic`, and what to do; "" where it has a publisher.

    Args:
        topic: full name.
        is_compressed: whether JPEG or PNG is expected there.
        count: how many publishers a topic has.
        is_of_several: whether there are other cameras.
    """
    if count(topic):
        return ""
    other = topic.removesuffix("/compressed") if is_compressed else f"{topic}/compressed"
    switch = f"compressed:={str(not is_compressed).lower()}"
    if count(other):
        return f"no publisher on {topic}, but one on {other}: set {switch}"
    kind = "raw images" if is_compressed else "JPEG"
    argument = "image_topics" if is_of_several else "image_topic"
    return f"no publisher on {topic}: start the camera, or set {argument} ({switch} for {kind})"


def twins(own: tuple[str, str], found: Sequence[tuple[str, str]]) -> str:
    """What to do about other nodes with the name and namespace `own` among all that are `found`; "" without any."""
    others = found.count(own) - 1
    if others < 1:
        return ""
    return (
        f"{own[1].rstrip('/')}/{own[0]} runs {others + 1} times: their results mix on the same topics; end one, or "
        "start it with another namespace (one that was killed counts for some seconds more)"
    )


def worth_a_log_line(count: int) -> bool:
    """Whether the `count`-th event of a kind is logged: the 1st, 10th, 100th, ..."""
    return count == 10 ** (len(str(count)) - 1)
