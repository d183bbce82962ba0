"""Every parameter of the node, once.

`Settings` is the only source: the ROS descriptors (with ranges, so rqt draws sliders), ``config/perception.yaml`` and
the parameter table of the README are all made from its fields. Nothing here knows ROS.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from dataclasses import dataclass, field
from typing import Any

ENHANCEMENT_MODES = ("off", "always", "auto")
OFF = "off"
"""Value of `semantic` and `restorer` that loads no model."""
DEVICES = ("auto", "cpu", "cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8")
RELIABILITIES = ("best_effort", "reliable")

_CAMERA = re.compile(r"([A-Za-z]\w*(/[A-Za-z]\w*)*)?", re.ASCII)


@dataclass(frozen=True)
class Spec:
    """What is known of one parameter beside its default.

    Attributes:
        help: one sentence for rqt, YAML and README.
        low, high: inclusive range of a number, None where there is none.
        choices: allowed strings, empty where any is allowed.
        unit: unit of the value, "" where it has none.
        read_only: True when it takes effect only at start.
    """

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""
    read_only: bool = False

    def values_in_words(self, default: Any) -> str:
        """Range, choices and unit of a parameter with this default, "" where anything goes."""
        if self.choices:
            return ", ".join(self.choices)
        if self.low is None or self.high is None:
            return "true, false" if isinstance(default, bool) else ""
        low, high = (f"{float(v)}" if isinstance(default, float) else f"{int(v)}" for v in (self.low, self.high))
        return f"{low} .. {high} {self.unit}".rstrip()


def _param(default: Any, help: str, **spec: Any) -> Any:
    metadata = {"spec": Spec(help=help, **spec)}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All parameters of the node; `spec(name)` gives range and help of each.

    Raises:
        ValueError: on construction, when a value breaks its range, choices or type, or a camera is named twice.
    """

    model: str = _param(
        "nano",
        "Model to run: a registered name, see `glesam bench --list`, or a folder with weights of nano of one's own.",
        read_only=True,
    )
    device: str = _param(
        "auto", "Where the model runs; auto takes TensorRT, then CUDA, then CPU (SAM models: CUDA, then CPU).",
        choices=DEVICES, read_only=True,
    )
    precision: str = _param(
        "auto", "Arithmetic of the model; auto takes what was measured best on the device. Semantic and restorer have "
        "auto always.",
        choices=PRECISIONS, read_only=True,
    )
    semantic: str = _param(
        OFF, "Class of every pixel: off, rass-nano, rass-sd21, or a folder with weights of rass-nano of one's own.",
        read_only=True,
    )
    restorer: str = _param(
        OFF, "The picture restored, on the topic enhanced: off, or scr-sd21.",
        read_only=True,
    )
    cameras: tuple[str, ...] = _param(
        ("",), "Camera names; each gets its topics under its name. One empty name means topics without a prefix.",
        read_only=True,
    )
    compressed: bool = _param(
        False, "Subscribe image/compressed (JPEG or PNG) instead of image.", read_only=True
    )
    input_reliability: str = _param(
        "best_effort", "Reliability asked of the image publisher; best_effort matches every publisher.",
        choices=RELIABILITIES, read_only=True,
    )
    autostart: bool = _param(
        True, "Configure and activate by itself; false waits for a lifecycle manager.", read_only=True
    )
    min_image_value: float = _param(
        0.0, "What is black in images of 16 bits or floats, where max_image_value is larger.",
        low=-1000.0, high=65535.0,
    )
    max_image_value: float = _param(
        0.0, "What is white there: 4095 of a camera that fills 12 of 16 bits, 310 of one that gives Kelvin; not above "
        "min_image_value: 65535 of 16 bits, 1 of floats.",
        low=-1000.0, high=65535.0,
    )
    do_dynamic_scaling: bool = _param(
        False, "Black and white of such images are what 0.5 % of their own values lie below and above, for thermal "
        "cameras with raw counts; goes before min_image_value and max_image_value.",
    )
    enhancement: str = _param(
        "auto", "Latent enhancement: off, always, or auto (by measured degradation, with hysteresis).",
        choices=ENHANCEMENT_MODES,
    )
    enhance_above: float = _param(
        0.25, "Auto mode switches enhancement on when the degradation level rises above this.", low=0.0, high=1.0
    )
    enhance_below: float = _param(
        0.15, "Auto mode switches enhancement off when the degradation level falls below this; more than enhance_above "
        "counts as enhance_above.",
        low=0.0, high=1.0,
    )
    score_threshold: float = _param(
        -1.0, "Instances with a lower score (predicted IoU) are dropped in everything mode; below 0 it is the model's "
        "own: nano and +glesam 0.15, SAM 0.88, SAM 2 0.8.",
        low=-1.0, high=1.0,
    )
    stability_threshold: float = _param(
        -1.0, "Instances with a lower stability (mask IoU under a shifted threshold) are dropped in everything mode; "
        "below 0 it is the model's own: nano and +glesam 0.5, SAM and SAM 2 0.95.",
        low=-1.0, high=1.0,
    )
    nms_iou: float = _param(
        0.7, "Of two masks that overlap more than this, the worse is dropped in everything mode: that with the lower "
        "score (nano: times stability squared).",
        low=0.0, high=1.0,
    )
    max_instances: int = _param(64, "At most this many instances a frame, the best.", low=1, high=256)
    min_area: int = _param(
        100, "Smaller instances are dropped in everything mode.", low=0, high=100_000, unit="px"
    )
    processing_size: int = _param(
        0, "Long side of the image inside the model, rounded to what it takes, at least 256; 0 is its own (nano 512, "
        "SAM 1024).",
        low=0, high=1024, unit="px",
    )
    frame_budget_ms: int = _param(
        0, "Time that a frame may take in the model: while frames take longer, processing_size is lowered in steps "
        "of an eighth of the model's own, to half of that, and raised again when there is time; 0 is no limit.",
        low=0, high=10_000, unit="ms",
    )
    second_look: bool = _param(
        True, "Prompts on a bad frame that was enhanced: nano looks a second time, at the mirrored frame or nearer, "
        "where the objects are, and takes the mean; better masks in more time.",
    )
    points_per_side: int = _param(
        32, "Everything mode of SAM models prompts a grid of this many points a side; nano has a grid of its own.",
        low=1, high=64,
    )
    points_per_batch: int = _param(
        64, "Prompts that are decoded at once: more takes more memory, and with SAM models less time.",
        low=1, high=1024,
    )
    crop_layers: int = _param(
        0, "Everything mode of SAM models also looks into 2x2 (1) and 4x4 (2) crops of the image; slow.",
        low=0, high=2,
    )
    max_rate_hz: float = _param(
        0.0, "At most this many frames a second are processed, of all cameras together, so that other nodes have the "
        "processor, too; 0 is no limit.",
        low=0.0, high=1000.0, unit="Hz",
    )
    min_rate_hz: float = _param(
        0.0, "Diagnostics warn while fewer frames of a camera are processed, though results are asked for; 0 is no "
        "limit.",
        low=0.0, high=1000.0, unit="Hz",
    )
    max_frame_age_ms: int = _param(
        500, "A frame older than this is dropped, not processed, and masks that come later are noticed; 0 is no "
        "limit.", low=0, high=10_000, unit="ms"
    )
    everything: bool = _param(
        True, "While a camera has no prompt, segment everything; false: masks stay empty until one comes.",
    )
    stable_ids: bool = _param(
        True, "An object of everything mode keeps its id from frame to frame; false: ids are 1, 2, ... by rank.",
    )
    prompt_timeout_s: float = _param(
        30.0, "A prompt expires after this time; 0 keeps it until it is cleared.", low=0.0, high=3600.0, unit="s"
    )
    sync_boxes: bool = _param(
        False, "Boxes and the frame that they were found in go together, by their stamps: a frame waits for its boxes, "
        "for max_frame_age_ms (and in 256 MB) at most, and is answered with these alone; others are dropped.",
    )
    overlay_alpha: float = _param(0.5, "Opacity of the mask colours in the overlay.", low=0.0, high=1.0)

    def __post_init__(self) -> None:
        if isinstance(self.cameras, list):
            object.__setattr__(self, "cameras", tuple(self.cameras))
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), _kind(f.name)
            check_value(f.name, value)
            if kind in ("int", "float"):  # numpy's are welcome, JSON and ROS want Python's
                object.__setattr__(self, f.name, int(value) if kind == "int" else float(value))
        if len(set(self.cameras)) != len(self.cameras) or not self.cameras:
            raise ValueError(f"cameras: expected at least one name and no name twice, got {list(self.cameras)}")
        taken = {f"{name}/semantic".lstrip("/") for name in self.cameras} if self.semantic != OFF else set()
        if both := taken & set(self.cameras):
            raise ValueError(f"cameras: expected another name than {min(both)}, where the class map of a camera goes")

    def replace(self, **changes: Any) -> Settings:
        """A copy with `changes`, checked as on construction."""
        return dataclasses.replace(self, **changes)


def spec(name: str) -> Spec:
    """Range, choices and help of the parameter `name`. Raises KeyError for an unknown name."""
    for f in dataclasses.fields(Settings):
        if f.name == name:
            return f.metadata["spec"]
    raise KeyError(f"unknown parameter {name!r}; known: {', '.join(names())}")


def names() -> tuple[str, ...]:
    """Names of all parameters, in declaration order."""
    return tuple(f.name for f in dataclasses.fields(Settings))


def default(name: str) -> Any:
    """Default of the parameter `name`; a tuple for lists of strings."""
    return getattr(Settings(), name)


def check_value(name: str, value: Any) -> None:
    """Refuse a value that breaks the type, range or choices of the parameter `name`.

    Raises:
        ValueError: with the parameter, what was expected and what came.
    """
    s, kind = spec(name), _kind(name)
    if kind == "strings":
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{name}: expected a list of strings, got {value!r}")
        if name == "cameras" and not all(_CAMERA.fullmatch(v) for v in value):
            raise ValueError(
                f"{name}: expected names of letters, digits and _ that begin with a letter, joined by / (they become "
                f"part of topic names), got {list(value)}"
            )
        return
    expected: type = {"bool": bool, "int": numbers.Integral, "float": numbers.Real, "str": str}[kind]
    if not isinstance(value, expected) or (isinstance(value, bool) and kind != "bool"):
        article = "an" if kind == "int" else "a"
        raise ValueError(f"{name}: expected {article} {kind}, got {value!r} ({type(value).__name__})")
    if s.choices and value not in s.choices:
        raise ValueError(f"{name}: expected one of {', '.join(s.choices)}; got {value!r}")
    if s.low is not None and not s.low <= value <= s.high:  # type: ignore[operator]  # low and high come together
        unit = f" {s.unit}" if s.unit else ""
        raise ValueError(f"{name}: expected {s.low:.10g} .. {s.high:.10g}{unit}, got {value}")


def _kind(name: str) -> str:
    for f in dataclasses.fields(Settings):
        if f.name == name:
            kind = str(f.type)
            return "strings" if kind.startswith("tuple") else kind
    raise KeyError(name)
