"""`glesam evaluate`: how good the masks are, clear and degraded, without and with enhancement, beside baselines."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
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
from glesam_ros.cli.options import (
    MODEL_SETTINGS,
    SELECTION_SETTINGS,
    CommandError,
    add_settings,
    positive,
    seed,
    versions,
)
from glesam_ros.evaluation import MAX_MASKS

if TYPE_CHECKING:
    from glesam_ros.datasets import Photograph
    from glesam_ros.evaluation.agreement import Agreement, Unlabelled
    from glesam_ros.evaluation.protocol import Case, Condition, Evaluator, Measurement, Options
    from glesam_ros.settings import Settings

SETS = {"coco": "coco_small", "bsds": "bsds500"}
"""Data sets that `--sets` knows, and their folders in DATA."""
SETTINGS = tuple(
    name
    for name in (*MODEL_SETTINGS, *SELECTION_SETTINGS)
    if name not in ("enhancement", "enhance_below")
)
Cases = Callable[[], Iterator["Case"]]

EPILOG = """\
examples:
  glesam evaluate --data DATA --out out/evaluation
  glesam evaluate --data DATA --out out/weather --kinds low_light rain fog --levels 3 --workers 2
  glesam evaluate --data DATA --out out/baselines --levels 3 --baselines classical grabcut
  glesam evaluate --data DATA --out out/restored --kinds rain --baselines prenet --restorers WEIGHTS
  glesam evaluate --lqseg lqseg_test --out out/lqseg --prompts points everything
  glesam evaluate --agreement night_photos --out out/night --kinds lq low_light --levels 2

DATA holds coco_small/ (images/, test.json) and bsds500/ (images/, regions/, test.txt). Any other annotated pictures:
`glesam lqseg build` makes a data set of them for --lqseg.

prompts: points (random points of each true mask), boxes (its box), everything (best mask for each true region).
baselines: classical (OpenCV), zero_dce (for low_light), prenet (for rain), grabcut (from the box). The learned ones
need torch and, in the folder --restorers, zero_dce.pth and prenet_r_rain100h.pth, which are not in this package.

written to --out:
  table.md            all means, gains with intervals, baselines, degradation level
  results.json        every figure with its 95 % bootstrap interval, count, settings and versions
  photographs.csv     a line a photograph, condition, method and metric
  by_level.png, gains.png, levels.png
  sheet_SET.jpg       best, median and worst photographs: frame, degraded, masks without and with enhancement, truth
  agreement.json, agreement_CONDITION.jpg     with --agreement
The figures depend on data, settings and seed alone, not on --workers."""


def add_parser(commands: Any) -> None:
    """Add the command to the sub-parsers of `glesam`."""
    parser = commands.add_parser(
        "evaluate", help="how good the masks are, without and with enhancement", epilog=EPILOG,
        description="Measure masks against truth on clear and degraded photographs, and against baselines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with coco_small/ and bsds500/, or one of them")
    parser.add_argument("--lqseg", type=Path, metavar="DIR", help="data set built by `glesam lqseg build`")
    parser.add_argument("--agreement", type=Path, metavar="DIR", help="folder of photographs without masks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if needed")
    parser.add_argument(
        "--sets", nargs="+", choices=tuple(SETS), metavar="SET",
        help=f"of DATA, {' '.join(SETS)}; default: those that are there",
    )
    parser.add_argument(
        "--split", choices=("test", "train"), default="test",
        help="of DATA; the shipped weights were trained on train; default: test",
    )
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND",
        help="degradations: lq (LQSeg), low_light, rain, ...; a wrong name is answered with all; none: the clear ones "
        "alone; default: lq, with --lqseg those of the data set",
    )
    parser.add_argument(
        "--levels", nargs="+", type=int, choices=(1, 2, 3), metavar="N",
        help="how bad, 1 2 3; default: all, with --lqseg those of the data set",
    )
    parser.add_argument("--limit", type=positive(int), metavar="N", help="first so many photographs of each set only")
    parser.add_argument(
        "--modes", nargs="+", choices=("off", "always", "auto"), default=["off", "always", "auto"], metavar="MODE",
        help="of enhancement; default: off always auto",
    )
    parser.add_argument(
        "--prompts", nargs="+", choices=("points", "boxes", "everything"),
        default=["points", "boxes", "everything"], metavar="PROMPT", help="default: points boxes everything",
    )
    parser.add_argument(
        "--points", type=int, choices=(1, 2, 3), default=3, metavar="N", help="of each region, 1 2 3; default: 3"
    )
    parser.add_argument(
        "--box-error", type=box_error, default=0.0, metavar="SHARE",
        help="boxes as of a detector: the standard deviation of each side, as a share of the box's; default: 0, tight",
    )
    parser.add_argument(
        "--baselines", nargs="+", default=[], metavar="NAME", help="classical zero_dce prenet grabcut; default: none",
    )
    parser.add_argument("--restorers", type=Path, metavar="DIR", help="folder with weights of the learned baselines")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="other weights of nano, to compare trainings")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of points and degradations; default: 0")
    parser.add_argument(
        "--workers", type=positive(int), metavar="N",
        help="processes, each with a model of its own; default: one a core for nano on a CPU, else 1",
    )
    parser.add_argument(
        "--sheet", action=argparse.BooleanOptionalAction, default=True, help="write contact sheets; default: yes"
    )
    parser.add_argument(
        "--masks-alone", action="store_true",
        help="the sheets of --agreement show masks alone, where the photographs must not be shown, and twice as many",
    )
    parser.add_argument(
        "--sheet-condition", default="lq-3", metavar="NAME",
        help="what the contact sheets show; the last condition where this one was not measured; default: lq-3",
    )
    add_settings(parser, SETTINGS, {"max_instances": MAX_MASKS})
    parser.set_defaults(func=run)


def box_error(text: str) -> float:
    """An argparse type for the error of boxes, 0 .. `MOST_BOX_ERROR`."""
    from glesam_ros.evaluation.protocol import MOST_BOX_ERROR

    value = float(text)
    if not 0 <= value <= MOST_BOX_ERROR:
        raise argparse.ArgumentTypeError(f"expected a share in 0 .. {MOST_BOX_ERROR}, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure, and write everything to --out."""
    from glesam_ros.evaluation.baselines import LEARNED
    from glesam_ros.evaluation.plots import draw_plots
    from glesam_ros.evaluation.protocol import Options, open_evaluator
    from glesam_ros.evaluation.report import tables
    from glesam_ros.evaluation.summary import summarise

    _check(args)
    settings = _settings(args)
    modes, prompts, baselines = (tuple(dict.fromkeys(some)) for some in (args.modes, args.prompts, args.baselines))
    options = Options(modes, prompts, baselines, args.seed, args.box_error, args.points)
    open_one = partial(open_evaluator, settings, options, args.weights, args.restorers)
    try:
        evaluator = open_one()  # here too: what is wrong is said before the work begins, and the sheets need it
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    args.out.mkdir(parents=True, exist_ok=True)
    unlabelled = {} if args.agreement is None else _unlabelled_photographs(args)
    sources, total = _sources(args)
    workers = args.workers or _default_workers(settings, evaluator)
    measurements = _measure(sources, total, open_one, evaluator, workers)
    if sources and not measurements:
        raise CommandError("expected at least one photograph with a region of 1,000 pixels, got none")
    packages = ["onnxruntime", *(["torch"] if set(LEARNED) & set(baselines) else [])]
    results: dict[str, Any] = {
        "settings": _recorded(args, evaluator.pipe.resolved, options), "versions": versions(*packages),
        **summarise(measurements, args.seed),
    }
    pictures: list[Path] = []
    if args.agreement is not None:
        results["agreement"], drawn = _agreement(args, unlabelled, open_one, evaluator, workers)
        pictures += drawn
        write_json(args.out / "agreement.json", {k: results[k] for k in ("settings", "versions", "agreement")})
    write_json(args.out / "results.json", results)
    text = tables(results)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    if measurements:
        _write_csv(args.out / "photographs.csv", measurements)
        pictures += plotted("evaluate", lambda: draw_plots(results, measurements, args.out))
        if args.sheet:
            pictures += _sheets(args, sources, measurements, evaluator)
    print(text)
    if measurements:
        seconds = sum(m.seconds for m in measurements) / len(measurements)
        print(f"{seconds:.2f} s of one core for a photograph and condition, without baselines")
    print(f"results in {args.out}: table.md results.json {' '.join(path.name for path in pictures)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from glesam_ros.evaluation.baselines import BASELINES

    if args.data is None and args.lqseg is None and args.agreement is None:
        raise CommandError("expected --data, --lqseg or --agreement, got none of them; say what to measure on")
    if args.sets and args.data is None:
        raise CommandError("--sets: expected --data with it, got none")
    check_kinds(args.kinds or ())
    if unknown := sorted(set(args.baselines) - set(BASELINES)):  # before a model is loaded
        raise CommandError(f"--baselines: expected some of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    check_baselines(args.baselines, args.restorers)
    if args.weights is not None and not args.weights.is_dir():
        raise CommandError(f"--weights: expected a folder with the ONNX files of nano, got {args.weights}")


def _settings(args: argparse.Namespace) -> Settings:
    from glesam_ros.settings import Settings

    chosen = {name: getattr(args, name) for name in SETTINGS}
    return Settings(**chosen)


def _default_workers(settings: Settings, evaluator: Evaluator) -> int:
    """One a core for nano on a CPU, which has one thread then; others fill memory, all cores or a GPU by themselves."""
    small = settings.model == "nano" and evaluator.pipe.model.device.startswith("cpu")
    return usable_cores() if small else 1


def _conditions(args: argparse.Namespace) -> list[Condition]:
    return wanted_conditions(args.kinds or ["lq"], args.levels or (1, 2, 3))


def _sources(args: argparse.Namespace) -> tuple[dict[str, Cases], int]:
    """Data set -> a function that gives its cases from the start, and the number of all photographs."""
    from glesam_ros.evaluation.protocol import lqseg_cases, synthetic_cases

    sources: dict[str, Cases] = {}
    total = 0
    for name in _set_names(args):
        photographs = _load(name, args.data / SETS[name], args.split, args.limit)
        sources[name] = partial(synthetic_cases, name, photographs, _conditions(args))
        total += len(photographs)
    if args.lqseg is not None:
        info = _lqseg_info(args.lqseg)
        split = info["settings"]["split"]
        if split.startswith("train"):
            print(
                f"glesam evaluate: {args.lqseg} was built as the split {split!r}; masks of pictures that a model was "
                "trained on say little about others", file=sys.stderr,
            )
        for what in ("kinds", "levels"):
            wanted, there = getattr(args, what), info["settings"][what]
            missing = sorted(set(wanted or ()) - {*there, "none"})
            if missing:
                raise CommandError(
                    f"--{what}: expected some of {' '.join(map(str, there))}, which {args.lqseg} has; "
                    f"got {' '.join(map(str, missing))}"
                )
        sources["lqseg"] = partial(lqseg_cases, args.lqseg, args.kinds, args.levels, args.limit)
        total += min(info["counts"]["images"], args.limit or info["counts"]["images"])
    return sources, total


def _lqseg_info(folder: Path) -> dict[str, Any]:
    from glesam_ros.datasets import read_lqseg_info

    try:
        return read_lqseg_info(folder)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _set_names(args: argparse.Namespace) -> list[str]:
    if args.data is None:
        return []
    if args.sets:
        return list(dict.fromkeys(args.sets))
    there = [name for name, folder in SETS.items() if (args.data / folder).is_dir()]
    if not there:
        raise CommandError(f"{args.data}: expected a folder with {' or '.join(SETS.values())}, found neither")
    return there


def _load(name: str, folder: Path, split: str, limit: int | None) -> list[Photograph]:
    from glesam_ros.datasets import load_bsds, load_coco

    try:
        return load_coco(folder, split, limit) if name == "coco" else load_bsds(folder, split, limit)
    except (ValueError, KeyError) as error:
        raise CommandError(f"{folder}: expected the {split} split of {name}, cannot read it: {error}") from error


def _measure(
    sources: dict[str, Cases], total: int, open_one: Callable[[], Evaluator], evaluator: Evaluator, workers: int
) -> list[Measurement]:
    from glesam_ros.evaluation.protocol import Evaluator

    cases = (case for open_cases in sources.values() for case in open_cases())
    done = shared(open_one, evaluator, Evaluator.measure, cases, total, workers, "photograph")
    return [measurement for found in done for measurement in found]


def _unlabelled_photographs(args: argparse.Namespace) -> dict[str, Path]:
    """The photographs of --agreement by their names; what is wrong with it is said before the work begins.

    Raises:
        CommandError: there is none, or no kind of degradation.
    """
    from glesam_ros.cli.pictures import find_pictures

    if not _degradations(args):
        raise CommandError("--agreement: expected at least one kind of degradation, got --kinds none")
    return {str(stem): path for path, stem in find_pictures([args.agreement])[: args.limit]}


def _degradations(args: argparse.Namespace) -> tuple[Condition, ...]:
    """The conditions without the clear one."""
    from glesam_ros.evaluation.protocol import CLEAR

    return tuple(condition for condition in _conditions(args) if condition != CLEAR)


def _agreement(
    args: argparse.Namespace, paths: dict[str, Path], open_one: Callable[[], Evaluator], evaluator: Evaluator,
    workers: int,
) -> tuple[dict[str, Any], list[Path]]:
    """The figures of --agreement on the photographs of `paths`, and its sheets."""
    from glesam_ros.evaluation.agreement import agree, agreement_tiles, summarise_agreement
    from glesam_ros.evaluation.sheet import ranked, sheet

    conditions = _degradations(args)
    tasks = (_unlabelled(name, path, conditions) for name, path in paths.items())
    found: list[Agreement] = list(shared(open_one, evaluator, agree, tasks, len(paths), workers, "photograph"))
    if all(one.values is None for one in found):
        raise CommandError(f"{args.agreement}: expected photographs in which the model finds something, found none")
    summary = summarise_agreement(found, evaluator.options.modes, args.seed)
    drawn: list[Path] = []
    if args.sheet and {"off", "always"} <= set(args.modes):
        for condition in conditions:
            gains = {
                one.name: one.values[condition.name, "always", "plain"] - one.values[condition.name, "off", "plain"]
                for one in found
                if one.values is not None
            }
            rows = [
                agreement_tiles(
                    evaluator, word, _unlabelled(name, paths[name], conditions), condition, args.masks_alone
                )
                for word, name in ranked(gains, 4 if args.masks_alone else 2)
            ]
            title = f"{condition.name}: best, median, worst of {len(gains)}; a mask found again keeps its colour"
            drawn.append(write_sheet(args.out / f"agreement_{condition.name}.jpg", sheet(rows, title)))
    return summary, drawn


def _unlabelled(name: str, path: Path, conditions: tuple[Condition, ...]) -> Unlabelled:
    from glesam_ros.cli.pictures import read_picture
    from glesam_ros.evaluation.agreement import Unlabelled

    try:
        return Unlabelled(name, read_picture(path), conditions)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error


def _sheets(
    args: argparse.Namespace, sources: dict[str, Cases], measurements: Sequence[Measurement], evaluator: Evaluator
) -> list[Path]:
    """A contact sheet a data set, where both modes and a prompt that makes a mask a region were measured."""
    from glesam_ros.evaluation.sheet import case_tiles, choose, sheet

    prompt = next((prompt for prompt in ("points", "boxes") if prompt in args.prompts), None)
    if prompt is None or not {"off", "always"} <= set(args.modes):
        return []
    drawn = []
    for set_name, open_cases in sources.items():
        own = [m for m in measurements if m.set_name == set_name]
        there = list(dict.fromkeys(m.condition for m in own))
        if not there:
            continue
        condition = sheet_condition(there, args.sheet_condition)
        chosen = choose(own, condition, f"{prompt}_iou")
        names = {name for _, name in chosen}
        cases = {case.photograph.name: case for case in open_cases() if case.photograph.name in names}
        rows = [case_tiles(word, evaluator.pictures(cases[name], condition, prompt)) for word, name in chosen]
        points = "a point each" if args.points == 1 else f"{args.points} points each"
        asked = points if prompt == "points" else "a box each"
        title = f"{set_name}, {condition.name}, {asked}: best, median and worst photographs by gain of enhancement"
        drawn.append(write_sheet(args.out / f"sheet_{set_name}.jpg", sheet(rows, title)))
    return drawn


def _write_csv(path: Path, measurements: Sequence[Measurement]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "photograph", "condition", "level", "enhanced", "method", "metric", "mean", "regions"])
        for m in measurements:
            for (method, metric), values in m.values.items():
                writer.writerow([
                    m.set_name, m.photograph, m.condition.name, f"{m.level:.4f}", int(m.enhanced), method, metric,
                    f"{sum(values) / len(values):.5f}", len(values),
                ])


def _recorded(args: argparse.Namespace, settings: Settings, options: Options) -> dict[str, Any]:
    """What the figures depend on, for results.json; without paths, so that it can be published."""
    import dataclasses

    from glesam_ros.datasets import LQSEG_MANIFEST
    from glesam_ros.evaluation.metrics import BOUNDARY_SHARE, COCO_THRESHOLDS
    from glesam_ros.evaluation.protocol import MIN_AREA

    kinds, lqseg = args.kinds, None
    if args.lqseg is not None:
        built = _lqseg_info(args.lqseg)["settings"]
        kinds = built["kinds"] if kinds is None else kinds
        lqseg = {**built, "manifest_sha256": sha256(args.lqseg / LQSEG_MANIFEST)}
    return {
        "split": args.split if args.data is not None else None, "lqseg": lqseg,
        "kinds": [kind for kind in kinds or ["lq"] if kind != "none"], "levels": args.levels, "limit": args.limit,
        **dataclasses.asdict(options), "min_region_area": MIN_AREA,
        "boundary_share": BOUNDARY_SHARE, "recall_thresholds": COCO_THRESHOLDS,
        "interval": interval("photographs"),
        "pipeline": {name: getattr(settings, name) for name in SETTINGS},
        "weights": _fingerprints(args, settings),
    }


def _fingerprints(args: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """SHA-256 of each file of nano's weights."""
    if settings.model != "nano":
        return {}
    from glesam_ros.models.nano import WEIGHTS

    files = sorted((args.weights or WEIGHTS).glob("nano_*"))
    return {path.name: sha256(path) for path in files}
