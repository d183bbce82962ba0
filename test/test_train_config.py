"""Configurations of a training run: what is in the package, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="training needs pydantic; scripts/test.sh installs it")
yaml = pytest.importorskip("yaml", reason="training needs pyyaml; scripts/test.sh installs it")

from glesam_ros.training import config as configs  # noqa: E402
from glesam_ros.training.config import (  # noqa: E402
    STAGES,
    Config,
    differences,
    load_any,  # noqa: E402
    load_config,
    make_config,
    to_dict,
    training_split,
)
from glesam_ros.training.recipes import recipe_of  # noqa: E402


@pytest.mark.parametrize("name", configs.shipped())
def test_shipped_configurations_survive_writing_and_reading(name: str, tmp_path: Path) -> None:
    config = load_any(name)
    path = tmp_path / "again.yaml"
    path.write_text(configs.to_yaml(config))
    assert load_any(path) == config


def test_what_a_file_leaves_out_is_as_in_nano() -> None:
    assert to_dict(configs.Config()) == to_dict(load_config("nano"))


def test_nano_names_every_key() -> None:
    def keys(data: Any, prefix: str = "") -> set[str]:
        if not isinstance(data, dict):
            return {prefix}
        return {key for name, value in data.items() for key in keys(value, f"{prefix}.{name}")}

    written = yaml.safe_load((configs.CONFIGS / "nano.yaml").read_text())
    assert keys(written) == keys(to_dict(load_config("nano")))


def test_defaults_are_complete_and_frozen() -> None:
    config = make_config({})
    assert config == Config() and all(getattr(config, stage).steps > 0 for stage in STAGES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_set_changes_what_it_names() -> None:
    changes = ["base.steps=7", "decode.rates.decoder=1e-5", "sources=[{kind: bsds, path: b}]", "decode.train=[decoder]"]
    config = load_config("nano", changes)
    assert (config.base.steps, config.decode.rates.decoder) == (7, 1e-5)
    assert [(s.kind, s.path, s.split, s.weight) for s in config.sources] == [("bsds", "b", "train", 1.0)]
    assert config.decode.train == ("decoder",)
    assert config.restore == load_config("nano").restore


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"bas": {}}, "bas: unknown key, expected one of seed, precision"),
        ({"base": {"stepz": 1}}, "base.stepz: unknown key, expected one of steps, batch"),
        ({"base": {"rates": {"head": 1}}}, "base.rates.head: unknown key, expected one of backbone, fresh"),
        ({"base": 3}, "base: expected keys and values, got 3"),
        ({"base": {"steps": "many"}}, "base.steps: expected a valid integer, got 'many'"),
        ({"base": {"steps": True}}, "base.steps: expected a valid integer, got True"),
        ({"base": {"steps": -1}}, "base.steps: expected greater than or equal to 0, got -1"),
        ({"restore": {"batch": 0}}, "restore.batch: expected greater than or equal to 1, got 0"),
        ({"decode": {"rates": {"decoder": "nan"}}}, "decode.rates.decoder: expected"),
        ({"decode": {"loss": "dice"}}, "decode.loss: expected 'windowed' or 'focal', got 'dice'"),
        ({"decode": {"train": []}}, "decode.train: expected at least 1 entry, found 0"),
        ({"decode": {"clear": 1.5}}, "decode.clear: expected less than or equal to 1, got 1.5"),
        ({"level": {"ema": 1.0}}, "level.ema: expected less than 1, got 1.0"),
        ({"degradation": {"lq": True}}, "degradation.lq: expected a number, got true"),
        ({"degradation": {"kinds": ["rian"]}}, "degradation.kinds.0: expected one of low_light"),
        ({"degradation": {"kinds": ["rain", "snow"]}}, "got 'snow', which is held out for evaluation"),
        ({"degradation": {"levels": [0, 0, 0]}}, "degradation.levels: expected at least one weight above 0"),
        ({"enhancer": {"gamma": 0}}, "enhancer.gamma: expected greater than 0, got 0"),
        ({"crop": {"height": 100}}, "crop.height: expected a multiple of 32, got 100"),
        ({"crop": {"zoom": [2, 1]}}, "crop.zoom: expected the smaller number first, got [2.0, 1.0]"),
        ({"sources": []}, "sources: expected at least 1 entry, found 0"),
        ({"sources": [{"kind": "coco"}]}, "sources.0.path: expected a value, found none"),
        ({"sources": [{"kind": "coco", "path": "x", "splt": ""}]}, "sources.0.splt: unknown key, expected one of kind"),
        ({"sources": [{"kind": "coco", "path": "x", "split": "test"}]}, "nothing is trained on a test split"),
    ],
)
def test_what_does_not_fit_is_named_in_full(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        make_config(data)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).count("expected") == 1  # one fault is said once


def test_a_split_is_of_a_test_set_by_its_words() -> None:
    """latest.json is no test split, but val_test2017 is one, however it is written."""
    for name in ("train", "latest", "contest2", "train_attested"):
        assert training_split(name) == name
    for name in ("test", "testing", "test2017", "val_test2017", "image_info_test-dev", "myTest", "Test", "VALTEST"):
        with pytest.raises(ValueError, match=f"got '{name}': nothing is trained on a test split"):
            training_split(name)


@pytest.mark.parametrize(
    "name, shown",
    [("nano", {"base", "restore", "decode", "refit"}), ("glesam_tiny", set()), ("rass_tiny", {"scr", "rass"}),
     ("rass_nano", set())],
)
def test_stages_without_pictures_show_none(name: str, shown: set[str]) -> None:
    for stage in recipe_of(load_any(name)).stages:
        change = f"{stage}.pictures_every=2"
        if stage in shown:
            assert getattr(load_any(name, [change]), stage).pictures_every == 2
        else:
            with pytest.raises(ValueError, match=f"{name}: {stage}.pictures_every: expected 0, got 2: .* no pictures"):
                load_any(name, [change])


def test_files_and_changes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .*nano, .*tiny or a \.yaml file, got 'nanno'"):
        load_config("nanno")
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    for text, expected in (("a: [", "expected YAML"), ("- 1", "expected keys and values, got list")):
        broken.write_text(text)
        with pytest.raises(ValueError, match=expected):
            load_config(broken)
    for change, expected in (
        ("base.steps", "expected key=value"), ("=3", "expected key=value"), ("seed.x=1", "seed has none"),
        ("base.steps=[", "expected YAML"),
    ):
        with pytest.raises(ValueError, match=f"--set.*{expected}"):
            load_config("nano", [change])
    for model in ("foo", "[1]", "{}"):
        with pytest.raises(ValueError, match=r"nano: model: expected one of nano, glesam, .*; got '?[f[{]"):
            load_any("nano", [f"model={model}"])


def test_differences_name_what_bears_on_the_weights() -> None:
    a = to_dict(load_config("nano"))
    b = to_dict(load_config("nano", ["base.steps=1", "decode.rates.decoder=1e-5", "crop.zoom=[1, 3]", "workers=3",
                                     "base.log_every=7", "level.checkpoint_every=1", "restore.pictures_every=2"]))
    assert differences(a, b) == ["crop.zoom", "base.steps", "decode.rates.decoder"]
    assert differences(a, a) == []
    del b["objects"]
    assert "objects" in differences(a, b)
