"""What a training run is made of: frozen dataclasses, read from YAML, each value checked with its full name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from glesam_ros.degradation import HELD_OUT_KINDS, TRAINING_KINDS
from glesam_ros.training.recipes import RECIPES

CONFIGS = Path(__file__).parent / "configs"
STAGES = RECIPES["nano"].stages
"""The stages in the order in which they run."""
NO_BEARING = ("workers", "checkpoint_every", "log_every", "pictures_every", "gradient_checkpointing")
"""Keys, of the run or of a stage, that change nothing in the weights: a run may go on with other values of them."""

TEST_SPLIT = re.compile(r"(?<![A-Za-z])test|Test|TEST")
"""Finds a word that begins with test in the name of a split, as of test, val_test2017 and myTest, not of latest."""


def no_bool(value: Any) -> Any:
    """The value; true and false, which Python takes for 1 and 0, are a ValueError."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def no_as_text(value: Any) -> Any:
    """The value; "no" for false, as which YAML reads a bare no."""
    return "no" if value is False else value


def training_split(value: str) -> str:
    """The name of a split; that of a test split is a ValueError."""
    if TEST_SPLIT.search(value):
        raise ValueError(f"expected a split for training, got {value!r}: nothing is trained on a test split")
    return value


def _training_kind(value: str) -> str:
    known = [name for name in TRAINING_KINDS if name != "lq"]
    if value not in known:
        why = ", which is held out for evaluation" if value in HELD_OUT_KINDS else ""
        raise ValueError(f"expected one of {', '.join(known)}; got {value!r}{why}")
    return value


def zoom_range(value: tuple[float, float]) -> tuple[float, float]:
    """A range; one that ends before it begins is a ValueError."""
    if value[0] > value[1]:
        raise ValueError(f"expected the smaller number first, got {list(value)}")
    return value


def _no_pictures(value: int) -> int:
    if value:
        raise ValueError(f"expected 0, got {value}: this stage has no pictures to show")
    return value


def _some(value: tuple[float, ...]) -> tuple[float, ...]:
    if not sum(value):
        raise ValueError("expected at least one weight above 0")
    return value


Count = Annotated[int, Field(strict=True, ge=1)]
CountOrNone = Annotated[int, Field(strict=True, ge=0)]
NoPictures = Annotated[CountOrNone, AfterValidator(_no_pictures)]
Number = Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]
Rate = Annotated[float, BeforeValidator(no_bool), Field(gt=0, le=1)]
Scale = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, BeforeValidator(no_bool), Field(ge=0, lt=1)]
Zoom = Annotated[float, BeforeValidator(no_bool), Field(ge=1, le=8)]
Degrees = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=180)]
Detail = Annotated[float, BeforeValidator(no_bool), Field(ge=0.25, le=4)]
Side = Annotated[int, Field(strict=True, ge=32, le=4096, multiple_of=32)]
Text = Annotated[str, Field(min_length=1)]
Precision = Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(no_as_text)]

STRICT = ConfigDict(extra="forbid")

Kind = TypeVar("Kind")


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """Annotated photographs.

    Attributes:
        kind: coco (instances JSON), bsds (label maps by annotator), camvid (class maps) or lqseg (the clear pictures
            of a set that `glesam lqseg build` wrote).
        path: folder, relative to --data.
        split: its list or JSON file; for lqseg the split that it was built from. No test split.
        weight: how often one of its pictures is drawn, beside a picture of weight 1.
    """

    kind: Literal["coco", "bsds", "camvid", "lqseg"]
    path: Text
    split: Annotated[Text, AfterValidator(training_split)] = "train"
    weight: Scale = 1.0


@dataclass(frozen=True, config=STRICT)
class CropConfig:
    """Crops of photographs.

    Attributes:
        height, width: pixels, multiples of 32.
        zoom: range of the scale, 1 is the largest crop that fits into the photograph.
        paste: share of crops that get objects of another photograph (composed scenes).
        detail: range of the scale at which a crop is degraded before it takes its size, as a camera's frame does.
        gamma, colour: ranges of brightness gamma (1 / g to g) and of the gain of each colour (1 / g to g).
        grey: share of crops without colour.
        turn: largest angle in degrees, to either side.
        stretch: range of width against height (1 / s to s).
    """

    height: Side = 320
    width: Side = 416
    zoom: Annotated[tuple[Zoom, Zoom], AfterValidator(zoom_range)] = (1.0, 2.0)
    paste: Share = 0.6
    detail: Annotated[tuple[Detail, Detail], AfterValidator(zoom_range)] = (0.8, 1.4)
    gamma: Zoom = 1.5
    colour: Zoom = 1.2
    grey: Share = 0.05
    turn: Degrees = 0.0
    stretch: Zoom = 1.0


@dataclass(frozen=True, config=STRICT)
class DegradationConfig:
    """What degrades the crops.

    Attributes:
        lq: share of LQSeg among the degraded crops; the rest is drawn from `kinds`.
        kinds: of `glesam_ros.degradation.TRAINING_KINDS`, without lq; the held-out ones are refused.
        levels: weights of level 1, 2, 3; level 3 half of the time, as the released GleSAM code draws its rate.
    """

    lq: Share = 0.6
    kinds: Annotated[tuple[Annotated[str, AfterValidator(_training_kind)], ...], Field(min_length=1)] = (
        "low_light", "motion_blur", "defocus", "rain", "fog",
    )
    levels: Annotated[tuple[Number, Number, Number], AfterValidator(_some)] = (1.0, 1.0, 2.0)


@dataclass(frozen=True, config=STRICT)
class EnhancerConfig:
    """The enhancer as it is trained.

    Attributes:
        gamma: scale of the latent inside the enhancer (FDA of GleSAM).
        condition: level (GleSAM++), or none: the enhancer always gets 0.5.
    """

    gamma: Scale = 1.0
    condition: Literal["level", "none"] = "level"


@dataclass(frozen=True, config=STRICT)
class StageConfig:
    """What every stage has.

    Attributes:
        steps: of the optimiser; 0 skips the stage.
        batch: crops of one process in one micro-batch.
        accumulate: micro-batches of a step.
        warm_up: steps of linear warm-up.
        final: share of the peak rate at the end of the cosine; 1 is constant.
        weight_decay: of AdamW.
        clip: largest norm of the gradient, 0 for any.
        ema: decay of the moving average of the weights, which is what is saved; 0 saves the weights themselves.
        checkpoint_every, log_every: steps.
        pictures_every: steps between pictures for TensorBoard, 0 for none; stages without pictures take 0 alone.
    """

    steps: CountOrNone
    batch: Count = 8
    accumulate: Count = 1
    warm_up: CountOrNone = 100
    final: Share = 0.01
    weight_decay: Number = 0.01
    clip: Number = 5.0
    ema: Decay = 0.998
    checkpoint_every: Count = 100
    log_every: Count = 50
    pictures_every: CountOrNone = 500


@dataclass(frozen=True, config=STRICT)
class BaseRates:
    """Peak rates: late backbone (from stride 16 on); neck and decoder."""

    backbone: Rate = 2e-4
    fresh: Rate = 1e-3


@dataclass(frozen=True, config=STRICT)
class BaseConfig(StageConfig):
    """Encoder and decoder on clear crops. `loss`: see `DecodeConfig`."""

    steps: CountOrNone = 7300
    warm_up: CountOrNone = 200
    rates: BaseRates = field(default_factory=BaseRates)
    loss: Literal["windowed", "focal"] = "windowed"


@dataclass(frozen=True, config=STRICT)
class LevelRates:
    """Peak rate of the level head."""

    head: Rate = 2e-3


@dataclass(frozen=True, config=STRICT)
class LevelConfig(StageConfig):
    """The degradation-level head, on the statistics of `pairs` clear and degraded frames, `batch` rows a step."""

    steps: CountOrNone = 3000
    batch: Count = 256
    warm_up: CountOrNone = 0
    weight_decay: Number = 0.3
    clip: Number = 0.0
    ema: Decay = 0.0
    checkpoint_every: Count = 3000
    log_every: Count = 500
    pictures_every: NoPictures = 0
    pairs: Count = 4500
    rates: LevelRates = field(default_factory=LevelRates)


@dataclass(frozen=True, config=STRICT)
class RestoreRates:
    """Peak rates: adapters of the enhancer's trunk; its U-Net."""

    adapters: Rate = 1e-3
    unet: Rate = 1e-3


@dataclass(frozen=True, config=STRICT)
class RestoreConfig(StageConfig):
    """Stage 1 of GleSAM: the enhancer, latent MSE and a constraint.

    Attributes:
        clear: share of inputs that are clear and must stay.
        rank: of the adapters.
        constraint: weight of the frozen decoder's mask loss on the restored latent.
    """

    steps: CountOrNone = 700
    clip: Number = 5.0
    clear: Share = 0.125
    rank: Count = 16
    constraint: Number = 0.2
    rates: RestoreRates = field(default_factory=RestoreRates)


@dataclass(frozen=True, config=STRICT)
class DecodeRates:
    """Peak rates: decoder; trunk of the enhancer; U-Net. That of what is not trained is not used."""

    decoder: Rate = 2e-4
    trunk: Rate = 5e-5
    unet: Rate = 1e-4


@dataclass(frozen=True, config=STRICT)
class DecodeConfig(StageConfig):
    """Stage 2 of GleSAM: the decoder on restored latents.

    Attributes:
        train: the decoder alone (the paper), or the enhancer with it.
        loss: windowed (Dice, cross-entropy mostly around the region) or focal (the paper's Dice and focal).
        clear: share of crops that are clear.
        skip: share of those that skip the denoising step, as automatic mode will have it.
        agreement: weight of the mean squared distance between the latents of clear crops before and after the step;
            changes nothing where the decoder alone trains.
        restoration: weight of the mean squared distance of a degraded crop's restored latent to that of the clear crop
            before the step, which gets no gradient by it: stage 1's loss, kept up while the enhancer trains on; changes
            nothing where the decoder alone trains.
    """

    steps: CountOrNone = 1000
    train: Annotated[tuple[Literal["decoder", "enhancer"], ...], Field(min_length=1)] = ("decoder", "enhancer")
    loss: Literal["windowed", "focal"] = "windowed"
    clear: Share = 0.333
    skip: Share = 0.5
    agreement: Number = 0.0
    restoration: Number = 0.0
    rates: DecodeRates = field(default_factory=DecodeRates)


@dataclass(frozen=True, config=STRICT)
class RefitRates:
    """Peak rate of the encoder's trunk."""

    trunk: Rate = 1e-4


@dataclass(frozen=True, config=STRICT)
class RefitConfig(StageConfig):
    """The encoder's trunk on clear crops, to the decoder as stage 2 left it. `loss`: see `DecodeConfig`."""

    steps: CountOrNone = 700
    warm_up: CountOrNone = 50
    rates: RefitRates = field(default_factory=RefitRates)
    loss: Literal["windowed", "focal"] = "windowed"


@dataclass(frozen=True, config=STRICT)
class Config:
    """One run.

    Attributes:
        seed: of the first weights and of every batch.
        precision: auto (bf16 where the device computes in it, else no), no (fp32), bf16, or fp16 (on a GPU).
        workers: processes that draw batches ahead, 0 for none; the batches are the same.
        start: weights to begin with: a `<stage>.pt` of another run, its `nano.pt` where `enhancer.gamma` is 1,
            "shipped" for those of the package, or none for the pretrained backbone alone.
        objects: prompted objects of a crop.
        cells: grid points of an object, for everything mode.
    """

    seed: CountOrNone = 10
    precision: Precision = "auto"
    workers: CountOrNone = 0
    start: Text | None = None
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (
        SourceConfig("coco", "coco_small", weight=2.5), SourceConfig("bsds", "bsds500"),
        SourceConfig("camvid", "camvid", weight=0.3),
    )
    crop: CropConfig = field(default_factory=CropConfig)
    objects: Count = 12
    cells: Count = 3
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    enhancer: EnhancerConfig = field(default_factory=EnhancerConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    level: LevelConfig = field(default_factory=LevelConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)


def shipped() -> tuple[str, ...]:
    """Names of the configurations in the package."""
    return tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))


def load_config(name: str | Path, changes: Sequence[str] = ()) -> Config:
    """A configuration of nano by its name in the package, or from a YAML file.

    Args:
        name: one of `shipped()`, or a path that ends in .yaml or .yml.
        changes: `key=value` with dots between the parts of the key; the value is YAML.

    Raises:
        ValueError: unknown name, YAML that cannot be read, a configuration of another model, or a key, a type or a
            value that does not fit; the message has the full name of each.
        FileNotFoundError: the file does not exist.
    """
    data = read_config(name, changes)
    if data.get("model", "nano") != "nano":
        raise ValueError(f"{name}: expected a configuration of nano, got one of {data['model']!r}")
    return make_config({key: value for key, value in data.items() if key != "model"}, str(name))


def load_any(name: str | Path, changes: Sequence[str] = ()) -> Any:
    """A configuration of the model that its key `model` names, nano where it names none.

    Args, Raises: as `load_config`.
    """
    data = read_config(name, changes)
    model = data.get("model", "nano")
    if not isinstance(model, str) or model not in RECIPES:
        raise ValueError(f"{name}: model: expected one of {', '.join(RECIPES)}; got {model!r}")
    if model == "nano":
        return make_config({key: value for key, value in data.items() if key != "model"}, str(name))
    return validated(RECIPES[model].config_class(), data, str(name))


def read_config(name: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """What a configuration says, not checked yet; its key `model` tells whose it is, nano's if it has none.

    Args, Raises: as `load_config`.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in shipped():
            raise ValueError(f"configuration: expected {', '.join(shipped())} or a .yaml file, got {str(name)!r}")
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"expected a configuration at {path}, found no file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(data).__name__}")
    for change in changes:
        _change(data, change)
    return data


def make_config(data: Mapping[str, Any], where: str = "configuration") -> Config:
    """A configuration from nested mappings; what is not named takes its default.

    Raises:
        ValueError: a key, a type or a value does not fit; the message has the full name of each.
    """
    return validated(Config, data, where)


def validated(kind: type[Kind], data: Mapping[str, Any], where: str) -> Kind:
    """A configuration of `kind` from nested mappings. Raises ValueError as `make_config`."""
    try:
        return TypeAdapter(kind).validate_python(dict(data))
    except ValidationError as error:
        faults = [item for item in error.errors() if not _follows(item, error.errors())]
        raise ValueError(f"{where}: " + "; ".join(_said(item, kind) for item in faults)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries and lists of a configuration, as YAML has them."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def to_yaml(config: Any) -> str:
    """Every key with its value; `load_config` reads it back."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False))


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Full names of the keys of two `to_dict` whose values differ and bear on the weights."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if key in NO_BEARING or a == b:
            continue
        inner = isinstance(a, Mapping) and isinstance(b, Mapping)
        found += differences(a, b, f"{prefix}{key}.") if inner else [prefix + key]  # type: ignore[arg-type]
    return found


def _change(data: dict[str, Any], change: str) -> None:
    key, mark, text = change.partition("=")
    if not mark or not key:
        raise ValueError(f"--set: expected key=value, for example base.steps=100; got {change!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: expected YAML, got {text!r}") from error
    *parents, last = key.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {key}: expected a key that has others below it, {parent} has none")
        data = inner
    data[last] = value


def _follows(item: Any, faults: Sequence[Any]) -> bool:
    """Whether a list is called too short only because its entries are wrong."""
    n = len(item["loc"])
    return item["type"] == "too_short" and any(len(f["loc"]) > n and f["loc"][:n] == item["loc"] for f in faults)


def _said(item: Any, kind: type[Any]) -> str:
    """One fault of pydantic in a configuration of `kind`, in the words of this package."""
    name = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "unexpected_keyword_argument":
        return f"{name}: unknown key, expected one of {', '.join(_siblings(item['loc'], kind))}"
    if item["type"] == "missing":
        return f"{name}: expected a value, found none"
    if item["type"] == "value_error":
        return f"{name}: {item['ctx']['error']}"
    if item["type"] == "too_short":
        return f"{name}: expected at least {item['ctx']['min_length']} entry, found {item['ctx']['actual_length']}"
    if item["type"] == "dataclass_type":
        return f"{name}: expected keys and values, got {item['input']!r}"
    message = item["msg"].replace("Input should be", "expected")
    value = item["input"]
    return f"{name}: {message}" + ("" if isinstance(value, (dict, list)) else f", got {value!r}")


def _siblings(location: Sequence[str | int], kind: Any) -> list[str]:
    """Names of the keys of a configuration of `kind` where `location` looked for one."""
    for part in location[:-1]:
        if isinstance(part, str):
            kind = get_type_hints(kind)[part]
            kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return [f.name for f in dataclasses.fields(kind)]
