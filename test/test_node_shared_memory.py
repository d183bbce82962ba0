"""Which Fast DDS profile the node starts with: ours, unless the user has chosen a profile or a network."""

from __future__ import annotations

import os

import pytest

from glesam_ros.ros import shared_memory

NETWORK = ("FASTDDS_BUILTIN_TRANSPORTS", "ROS_LOCALHOST_ONLY")
OURS = dict.fromkeys(shared_memory.VARIABLES, str(shared_memory.PROFILE))


@pytest.fixture
def enlarged(monkeypatch):
    """`enlarged(VARIABLE=value, ...)`: the profiles after `enlarge` in an environment with these variables alone."""

    def enlarge(**variables: str) -> dict[str, str]:
        for name in (*shared_memory.VARIABLES, *NETWORK, "ROS_DISTRO"):
            # set first, so that what `enlarge` sets is taken back, too
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        shared_memory.enlarge()
        return {name: os.environ[name] for name in shared_memory.VARIABLES if name in os.environ}

    return enlarge


@pytest.mark.parametrize(
    "variables",
    [{}, {"ROS_LOCALHOST_ONLY": "0"}, {"ROS_LOCALHOST_ONLY": "", "FASTDDS_BUILTIN_TRANSPORTS": ""}],
    ids=str,
)
def test_where_nothing_is_chosen_the_profile_is_ours(enlarged, variables):
    assert shared_memory.PROFILE.is_file()
    assert enlarged(**variables) == OURS


@pytest.mark.parametrize(("distro", "names"), [("humble", 2), ("jazzy", 2), ("kilted", 1), ("rolling", 1)])
def test_fast_dds_3_gets_no_variable_that_it_warns_of(enlarged, distro, names):
    assert enlarged(ROS_DISTRO=distro) == {name: OURS[name] for name in shared_memory.VARIABLES[-names:]}


@pytest.mark.parametrize("name", shared_memory.VARIABLES)
def test_a_profile_of_the_user_stays(enlarged, name):
    assert enlarged(**{name: "/mine.xml"}) == {name: "/mine.xml"}


@pytest.mark.parametrize(
    "variables",
    [{"ROS_LOCALHOST_ONLY": "1"}, {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4", "ROS_LOCALHOST_ONLY": "0"}],
    ids=str,
)
def test_a_network_of_the_user_is_left_alone(enlarged, variables):
    assert enlarged(**variables) == {}
