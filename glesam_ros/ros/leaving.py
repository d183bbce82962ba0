"""How processes of ours leave the network."""

from __future__ import annotations

import signal

import rclpy

LEAVE_S = 4.0
"""How long that may take: launch sends SIGTERM 5 s after the signal that ends a process."""


def leave() -> None:
    """Shut ROS down; SIGALRM ends the process if it is still there after `LEAVE_S`.

    Where many leave at once, Fast DDS may lock itself up as a node is destroyed (eProsima/Fast-DDS, issue 6513 is one
    way), for ever and with one core busy. It holds the interpreter's lock then, so no thread of ours could end it.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, LEAVE_S)
    rclpy.try_shutdown()
