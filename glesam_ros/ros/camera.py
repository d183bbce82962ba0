"""Everything the node knows of one camera."""

from __future__ import annotations

from glesam_ros.identity import IdKeeper
from glesam_ros.pipeline import EnhancementGate
from glesam_ros.ros.diagnostics import CameraLedger
from glesam_ros.ros.outputs import Outputs
from glesam_ros.ros.pairing import Pairing
from glesam_ros.ros.prompts import CameraPrompts


class Camera:
    """State of one camera between configure and cleanup.

    Args:
        name: as in the parameter `cameras`; "" for topics without a prefix.
        topic: full name of the input topic.
        outputs: its result topics.

    Attributes:
        last_stamp_ns: stamp of the newest frame, 0 before any.
        frame_id: of the newest frame that could be read, "" before any.
        logged_refusals: why prompts were refused, as far as the log has it, without their numbers: a few texts.
    """

    def __init__(self, name: str, topic: str, outputs: Outputs) -> None:
        self.name = name
        self.outputs = outputs
        self.ledger = CameraLedger(topic)
        self.prompts = CameraPrompts()
        self.pairing = Pairing()
        self.gate = EnhancementGate()
        self.identity = IdKeeper()
        self.last_stamp_ns = 0
        self.frame_id = ""
        self.logged_refusals: set[str] = set()

    @property
    def label(self) -> str:
        """The camera in words, for log lines."""
        return f"camera {self.name!r}" if self.name else "camera"

    def forget_time(self) -> None:
        """Start anew after a jump of clock or stamps: no previous stamp, enhancement gate closed, ids from 1."""
        self.last_stamp_ns = 0
        self.gate = EnhancementGate()
        self.identity = IdKeeper()
