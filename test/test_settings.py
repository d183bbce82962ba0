"""The one source of the parameters: types, ranges, choices."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from glesam_ros import Settings
from glesam_ros.settings import check_value, default, names, spec

READ_ONLY = {"model", "device", "precision", "cameras"}


def test_every_parameter_explains_itself() -> None:
    assert set(names()) == {f.name for f in dataclasses.fields(Settings)}
    for name in names():
        assert len(spec(name).help) > 20 and spec(name).help.endswith("."), name
        check_value(name, default(name))
        if isinstance(default(name), (int, float)) and not isinstance(default(name), bool):
            assert spec(name).low is not None and spec(name).high is not None, f"{name} has no range"


def test_what_takes_effect_only_at_start_is_read_only() -> None:
    assert {name for name in names() if spec(name).read_only} >= READ_ONLY
    assert not spec("score_threshold").read_only


def test_ranges_are_inclusive() -> None:
    for name in names():
        s = spec(name)
        if s.low is None or s.high is None:
            continue
        kind = type(default(name))
        for value in (s.low, s.high):
            check_value(name, kind(value))
        step = 1 if kind is int else 0.01
        for value in (s.low - step, s.high + step):
            with pytest.raises(ValueError, match=f"{name}: expected {s.low:.10g} .. {s.high:.10g}"):
                check_value(name, kind(value))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "text for a number": ({"score_threshold": "0.5"}, r"score_threshold: expected a float, got '0.5' \(str\)"),
    "truth for a number": ({"overlay_alpha": True}, r"overlay_alpha: expected a float, got True"),
    "truth for an integer": ({"max_instances": True}, "max_instances: expected an int, got True"),
    "number for a truth": ({"compressed": 1}, "compressed: expected a bool, got 1"),
    "fraction for an integer": ({"min_area": 1.5}, "min_area: expected an int, got 1.5"),
    "nan": ({"nms_iou": float("nan")}, "nms_iou: expected 0 .. 1, got nan"),
    "infinity": ({"prompt_timeout_s": float("inf")}, "0 .. 3600 s, got inf"),
    "choice": ({"enhancement": "on"}, "enhancement: expected one of off, always, auto; got 'on'"),
    "device": ({"device": "gpu"}, "expected one of auto, cpu, cuda, tensorrt"),
    "no camera": ({"cameras": ()}, "cameras: expected at least one name"),
    "camera twice": ({"cameras": ("a", "a")}, "no name twice"),
    "camera where a class map goes": (
        {"cameras": ("a", "a/semantic"), "semantic": "rass-nano"}, "expected another name than a/semantic"
    ),
    "camera where the class map of the one without a name goes": (
        {"cameras": ("", "semantic"), "semantic": "rass-nano"}, "expected another name than semantic"
    ),
    "one text for cameras": ({"cameras": "front"}, "cameras: expected a list of strings, got 'front'"),
    "camera number": ({"cameras": (1,)}, "cameras: expected a list of strings"),
    "camera with a space": ({"cameras": ("front left",)}, "letters, digits and _"),
    "camera that begins with a slash": ({"cameras": ("/front",)}, "joined by /"),
    "none": ({"model": None}, "model: expected a str, got None"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    values, words = REFUSALS[name]
    with pytest.raises(ValueError, match=words):
        Settings(**values)


def test_integers_are_welcome_where_floats_are_expected() -> None:
    assert Settings(overlay_alpha=1, enhance_below=0, enhance_above=0).overlay_alpha == 1


def test_numbers_of_numpy_become_those_of_python() -> None:
    s = Settings(max_instances=np.int64(4), score_threshold=np.float32(0.5), nms_iou=np.float64(0.5))
    assert [type(value) for value in (s.max_instances, s.score_threshold, s.nms_iou)] == [int, float, float]
    assert json.loads(json.dumps(dataclasses.asdict(s)))["max_instances"] == 4
    with pytest.raises(ValueError, match="max_instances: expected an int"):
        Settings(max_instances=np.float32(4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_instances: expected an int"):
        Settings(max_instances=np.bool_(True))  # type: ignore[arg-type]


def test_cameras_from_a_list() -> None:
    assert Settings(cameras=["front", "rear/left_1"]).cameras == ("front", "rear/left_1")  # type: ignore[arg-type]
    assert Settings().cameras == ("",)
    assert Settings(cameras=("a", "a/semantic")).cameras == ("a", "a/semantic")


def test_replace_checks_and_leaves_the_original() -> None:
    old = Settings()
    assert old.replace(min_area=7).min_area == 7
    assert old.min_area == default("min_area")
    with pytest.raises(ValueError, match="min_area"):
        old.replace(min_area=-1)
    with pytest.raises(AttributeError):
        old.min_area = 3  # type: ignore[misc]


def test_thresholds_of_the_gate_may_be_set_in_any_order() -> None:
    """`ros2 param load` and rqt set one after the other, in the order of the names."""
    old = Settings(enhance_above=0.6, enhance_below=0.5)
    new = old.replace(enhance_above=0.25).replace(enhance_below=0.15)
    assert (new.enhance_above, new.enhance_below) == (0.25, 0.15)


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match="unknown parameter 'colour'; known: model"):
        spec("colour")
    with pytest.raises(KeyError):
        check_value("colour", 1)
