"""`glesam evaluate-semantic`: how good the maps of classes are, clear and degraded, beside baselines."""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glesam_ros.checksum import sha256
from glesam_ros.cli.evaluation import (
    check_baselines,
    check_kinds,
    interval,
    plotted,
    shared,
    sheet_condition,
    wanted_conditions,
    write_json,
    write_sheet,
)
from glesam_ros.cli.machine import usable_cores
from glesam_ros.cli.options import BESIDE_TEXTS, CommandError, add_settings, positive, seed, versions

if TYPE_CHECKING:
    from glesam_ros.evaluation.semantic import SemanticEvaluator, SemanticOptions
    from glesam_ros.evaluation.semantic_summary import Tally

SETTINGS = ("device", "precision")
RASS_NANO = "rass-nano"

EPILOG = """\
examples:
  glesam evaluate-semantic --data DATA/camvid --out out/semantic
  glesam evaluate-semantic --data DATA/camvid --out out/direct --compare runs/clear_only/export
  glesam evaluate-semantic --data DATA/camvid --out out/restored --levels 3 --baselines classical
  glesam evaluate-semantic --data DATA/camvid --out out/rain --kinds rain --baselines prenet --restorers WEIGHTS
  glesam evaluate-semantic --data ADEChallengeData2016 --split val --model rass-sd21 --baselines scr-sd21 --out out/ade
  glesam evaluate-semantic --data reallq --split val --kinds none --model rass-sd21 --out out/reallq

DATA is a folder of pictures with label maps:
  ADE20K    images/{training,validation}/, annotations/{training,validation}/; its splits are train and val
  CamVid    a folder named camvid with train.txt, test.txt, images/, labels/
  any other images/, labels/ (PNG) and classes.json {"classes": [...], "palette": [[r, g, b], ...], "ignore": [...]} or
            classes.txt (a name a line); pictures of <split>.txt, else of images/<split>/, else, with --split all, all

models: a registered name, or a folder with rass_nano.onnx and rass_nano.json. Classes are matched by name; where names
differ give --classes-map: JSON with {"class of the data set": "class of the model"}, null for one not to count.
baselines restore the picture, then the same models segment it: classical (OpenCV), zero_dce (for low_light), prenet
(for rain), scr-sd21 (RASS's own). zero_dce.pth and prenet_r_rain100h.pth lie in --restorers; these three need torch.

written to --out:
  table.md            mean IoU with intervals, accuracies, paired differences, IoU of each class
  results.json        every figure with its 95 % bootstrap interval, settings and versions
  pictures.csv        a line a picture, condition, method and metric
  by_level.png        mean IoU by level, where a kind has several
  sheet.jpg           best, median and worst pictures: frame, degraded frame, truth, what each method finds
A picture is degraded by seed and name: the same for all models and in every run, whatever --workers says."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "evaluate-semantic", help="how good the maps of classes are, on pictures with label maps", epilog=EPILOG,
        description="Measure maps of classes against truth on clear and degraded pictures, and against baselines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of labelled pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if needed")
    parser.add_argument("--split", default="test", metavar="NAME", help="of DATA; default: test")
    parser.add_argument("--model", default=RASS_NANO, metavar="NAME", help=f"name or folder; default: {RASS_NANO}")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME",
        help="other models, or folders with other weights, for example trained on clear pictures only (direct test)",
    )
    parser.add_argument(
        "--baselines", nargs="+", default=[], metavar="NAME",
        help="restore, then segment: classical zero_dce prenet scr-sd21; default: none",
    )
    parser.add_argument("--restorers", type=Path, metavar="DIR", help="folder with weights of zero_dce and prenet")
    parser.add_argument("--classes-map", type=Path, metavar="FILE", help="names of the data set's classes in the model")
    parser.add_argument(
        "--kinds", nargs="+", default=["lq"], metavar="KIND",
        help="degradations: lq (LQSeg), low_light, rain, ...; a wrong name is answered with all; none: the pictures as "
        "they are alone; default: lq",
    )
    parser.add_argument(
        "--levels", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3], metavar="N",
        help="how bad, 1 2 3; default: all",
    )
    parser.add_argument("--limit", type=positive(int), metavar="N", help="first so many pictures only")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of degradations and intervals; default: 0")
    parser.add_argument(
        "--workers", type=positive(int), metavar="N",
        help=f"processes, each with models of its own; default: one a core where all models are {RASS_NANO} on a CPU "
        "and no baseline needs a network, else 1",
    )
    parser.add_argument(
        "--sheet", action=argparse.BooleanOptionalAction, default=True, help="write a contact sheet; default: yes"
    )
    parser.add_argument(
        "--sheet-condition", default="lq-3", metavar="NAME",
        help="what the contact sheet shows; the last condition where this one was not measured; default: lq-3",
    )
    add_settings(parser, SETTINGS, texts=BESIDE_TEXTS)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and write everything to --out."""
    from glesam_ros.evaluation.plots import draw_semantic_plot
    from glesam_ros.evaluation.semantic import open_semantic_evaluator
    from glesam_ros.evaluation.semantic_report import semantic_tables
    from glesam_ros.evaluation.semantic_summary import summarise_semantic

    options = _options(args)
    workers = args.workers or (usable_cores() if _is_small(options) and _is_on_cpu(options) else 1)
    options = replace(options, threads=1 if workers > 1 else 0)
    try:
        evaluator = open_semantic_evaluator(options)  # what is wrong is said before the work begins
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    tally, seconds = _measure(options, evaluator, workers)
    try:
        figures = summarise_semantic(tally, args.seed)
    except ValueError as error:
        raise CommandError(f"{args.data}: {error}") from error
    packages = ["onnxruntime"] if _is_small(options) else ["onnxruntime", "torch", "transformers"]
    results: dict[str, Any] = {"settings": _recorded(options, evaluator), "versions": versions(*packages), **figures}
    write_json(args.out / "results.json", results)
    text = semantic_tables(results)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    _write_csv(args.out / "pictures.csv", tally)
    plot = args.out / "by_level.png"
    pictures = plotted("evaluate-semantic", lambda: [plot] if draw_semantic_plot(results, plot) else [])
    if args.sheet:
        pictures.append(_write_sheet(args.out / "sheet.jpg", tally, evaluator, args.sheet_condition))
    evaluator.close()
    print(text)
    print(f"{seconds:.2f} s of processor time for a picture and condition with {next(iter(evaluator.models))}")
    print(f"results in {args.out}: table.md results.json pictures.csv {' '.join(path.name for path in pictures)}")
    return 0


def _options(args: argparse.Namespace) -> SemanticOptions:
    from glesam_ros.evaluation.semantic import SemanticOptions

    check_kinds(args.kinds)
    check_baselines(args.baselines, args.restorers)
    return SemanticOptions(
        data=args.data, split=args.split, models=(args.model, *args.compare),
        conditions=tuple(wanted_conditions(args.kinds, args.levels)), restorers=tuple(dict.fromkeys(args.baselines)),
        weights=args.restorers, classes_map=args.classes_map, device=args.device, precision=args.precision,
        limit=args.limit, seed=args.seed,
    )


def _is_small(options: SemanticOptions) -> bool:
    """Whether each process can well have models of its own: rass-nano and OpenCV alone."""
    from glesam_ros.models import semantic_names

    full_size = [name for name in options.models if name in semantic_names() and name != RASS_NANO]
    return not full_size and set(options.restorers) <= {"classical"}


def _is_on_cpu(options: SemanticOptions) -> bool:
    """Whether the small models will run there; auto may be a GPU, which processes would have to share."""
    from glesam_ros.models.onnx_session import choose_device

    return options.device == "cpu" or (options.device == "auto" and choose_device("auto") == "cpu")


def _measure(options: SemanticOptions, evaluator: SemanticEvaluator, workers: int) -> tuple[Tally, float]:
    """Everything measured, and the mean processor time of a picture and condition."""
    from glesam_ros.evaluation.semantic import SemanticEvaluator, open_semantic_evaluator
    from glesam_ros.evaluation.semantic_summary import Tally

    open_one = partial(open_semantic_evaluator, options)
    total = len(evaluator.folder)
    tally = Tally(evaluator.classes)
    seconds: list[float] = []
    for found in shared(open_one, evaluator, SemanticEvaluator.measure, range(total), total, workers, "picture"):
        for measurement in found:
            tally.add(measurement)
            seconds.append(measurement.seconds)
    return tally, sum(seconds) / len(seconds)


def _write_sheet(path: Path, tally: Tally, evaluator: SemanticEvaluator, wanted: str) -> Path:
    import numpy as np

    from glesam_ros.evaluation.semantic_report import choose_pictures, legend, semantic_tiles
    from glesam_ros.evaluation.sheet import sheet

    condition = sheet_condition(evaluator.conditions, wanted)
    chosen = choose_pictures(tally, condition)
    rows = [
        semantic_tiles(word, evaluator.pictures(index, condition), evaluator.palette) for word, index in chosen
    ]
    methods = [method.name for other, method in tally.rows if other == condition]
    by = f"gain of {methods[0]} over {methods[1]}" if len(methods) > 1 else "mean IoU"
    pixels = sheet(rows, f"{condition.name}: best, median and worst pictures by {by}")
    return write_sheet(path, np.concatenate([pixels, legend(evaluator.classes, evaluator.palette, pixels.shape[1])]))


def _write_csv(path: Path, tally: Tally) -> None:
    import numpy as np

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "condition", "method", "metric", "value"])
        for (condition, method), found in tally.picture_figures().items():
            for metric, values in found.items():
                for picture, value in zip(tally.pictures, values):
                    if np.isfinite(value):
                        writer.writerow([picture, condition.name, method.name, metric, f"{value:.5f}"])


def _recorded(options: SemanticOptions, evaluator: SemanticEvaluator) -> dict[str, Any]:
    """What the figures depend on, for results.json; without paths, so that it can be published."""
    return {
        "set": evaluator.folder.name, "split": options.split, "limit": options.limit, "seed": options.seed,
        "models": list(evaluator.models), "baselines": list(options.restorers),
        "conditions": [condition.name for condition in options.conditions],
        "devices": {name: model.device for name, model in evaluator.models.items()},
        "classes_map": None if options.classes_map is None else json.loads(options.classes_map.read_text()),
        "interval": interval("pictures"), "weights": _fingerprints(options),
    }


def _fingerprints(options: SemanticOptions) -> dict[str, str]:
    """SHA-256 of the graph of each model that is a rass-nano."""
    from glesam_ros.evaluation.semantic import model_labels, weights_folder
    from glesam_ros.models import semantic_names
    from glesam_ros.models.nano import WEIGHTS
    from glesam_ros.models.rass_nano import GRAPH_FILE

    found = {}
    for label, source in model_labels(options.models).items():
        if source == RASS_NANO or source not in semantic_names():
            folder = WEIGHTS if source == RASS_NANO else weights_folder(source)
            found[label] = sha256(folder / GRAPH_FILE)
    return found
