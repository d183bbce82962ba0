"""The evaluation protocol on a picture whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from bright_model import BrightRegions

from glesam_ros import Settings
from glesam_ros.datasets import Photograph
from glesam_ros.evaluation import evaluate as protocol
from glesam_ros.pipeline import Pipeline


@pytest.fixture
def photograph() -> Photograph:
    """Two bright rectangles on black: 80x50 pixels, and one of 20x20 that is too small to count."""
    image, layer = np.zeros((160, 200, 3), np.uint8), np.zeros((160, 200), np.int16)
    image[20:70, 30:110], layer[20:70, 30:110] = 230, 1
    image[100:120, 20:40], layer[100:120, 20:40] = 230, 2
    return Photograph("rectangles", image, [layer], False)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(BrightRegions(), Settings(enhancement="off"))


def rows_of(result: dict, condition: str) -> dict[tuple[str, str], dict]:
    return {(r["mode"], r["metric"]): r for r in result["rows"] if r["condition"] == condition}


def test_clear_picture_gets_full_marks_in_every_mode(pipe: Pipeline, photograph: Photograph) -> None:
    rows = rows_of(protocol.evaluate(pipe, {"made": [photograph]}, [], []), "clear")
    assert {mode for mode, _ in rows} == {"off", "always", "auto"}
    for row in rows.values():
        assert row["mean"] == pytest.approx(1.0) and row["count"] == 1


def test_auto_counts_as_off_on_clear_and_as_always_on_degraded_pictures(photograph: Photograph) -> None:
    class Blind(BrightRegions):
        """Finds nothing unless it enhances."""

        def encode(self, image, processing_size):
            found = super().encode(image, processing_size)
            dark = float(image.max()) < 200
            return type(found)(found.latent * 0.3, found.size, degradation=1.0 if dark else 0.0)

        def enhance(self, embedding):
            return type(embedding)(embedding.latent * 10, embedding.size, embedding.degradation, enhanced=True)

    result = protocol.evaluate(
        Pipeline(Blind(), Settings(enhancement="off")), {"made": [photograph]}, ["low_light"], [3]
    )
    clear, dark = rows_of(result, "clear"), rows_of(result, "low_light-3")
    assert clear["auto", "everything"]["mean"] == clear["off", "everything"]["mean"] == 0.0
    assert clear["always", "everything"]["mean"] == pytest.approx(1.0)
    assert dark["auto", "everything"]["mean"] == dark["always", "everything"]["mean"]
    assert dark["off", "everything"]["mean"] == 0.0
    assert result["levels"] == {"clear": 0.0, "low_light-3": 1.0}


def test_the_annotator_that_fits_best_counts_in_everything_mode(pipe: Pipeline, photograph: Photograph) -> None:
    halves = np.zeros((160, 200), np.int16)
    halves[:80], halves[80:] = 1, 2
    twice = Photograph("two annotators", photograph.image, [halves, photograph.layers[0]], True)
    rows = rows_of(protocol.evaluate(pipe, {"made": [twice]}, [], []), "clear")
    assert rows["off", "everything"]["mean"] == pytest.approx(1.0)
    # points come from the first annotator, whose halves this model cannot give
    assert rows["off", "iou"]["count"] == 2 and rows["off", "iou"]["mean"] < 0.9


def test_the_same_seed_gives_the_same_figures(pipe: Pipeline, photograph: Photograph) -> None:
    first = protocol.evaluate(pipe, {"made": [photograph]}, ["lq"], [3], seed=4)
    assert first == protocol.evaluate(pipe, {"made": [photograph]}, ["lq"], [3], seed=4)


def test_ranks_and_their_correlation() -> None:
    assert protocol.mean_ranks([10, 30, 10, 20]).tolist() == [0.5, 3.0, 0.5, 2.0]
    rising = {"clear": [0.0, 0.1], "lq-1": [0.3, 0.2], "lq-2": [0.5, 0.6], "lq-3": [0.8, 0.9]}
    # true ranks tie in pairs: 1 - 6 * 4 * 2 * 0.25 / (8 * 63), by Pearson on ranks 0.9759
    assert protocol.rank_correlation(rising) == pytest.approx(0.9759, abs=1e-4)
    falling = {name: [1 - v for v in values] for name, values in rising.items()}
    assert protocol.rank_correlation(falling) == pytest.approx(-0.9759, abs=1e-4)


def test_table_has_a_row_for_each_condition(pipe: Pipeline, photograph: Photograph) -> None:
    text = protocol.table(protocol.evaluate(pipe, {"made": [photograph]}, ["lq"], [1, 3]))
    assert [line.split("|")[2].strip() for line in text.splitlines()[2:]] == ["clear", "lq-1", "lq-3"]
    assert "100.0 / 100.0 / 100.0" in text
