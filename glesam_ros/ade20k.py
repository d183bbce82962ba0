"""The 150 classes of ADE20K's scene parsing benchmark, and colours for any number of classes."""

from __future__ import annotations

import cv2
import numpy as np

from glesam_ros.validation import UInt8Array

_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""

CLASSES: tuple[str, ...] = tuple(_NAMES.replace("\n", " ").strip().split(", "))
"""Class k - 1 is value k of the annotation pictures, whose 0 is unlabelled; sorted by how much of the set each covers.

Source: Zhou et al., Scene Parsing through ADE20K Dataset (CVPR 2017), SceneParse150.
"""

_LEVELS = (0, 48, 96, 144, 192, 240)
"""Values that red, green and blue of a colour are taken from."""
_DARKEST, _FIRST = 100, 200
"""Least sum of the three, so that no class looks like the black of a missing one; index of the first colour."""


def class_colours(count: int) -> UInt8Array:
    """Colours of `count` classes, (count, 3) uint8 RGB, all different; the first are the same for any count.

    Each is the colour of a grid in RGB that lies farthest, in CIE Lab, from all before it.

    Raises:
        ValueError: `count` is not in 1..200.
    """
    if not 1 <= count <= 200:
        raise ValueError(f"class_colours: expected 1..200 classes, got {count}; give a palette of your own")
    grid = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), -1).reshape(1, -1, 3)
    grid = grid[:, grid.sum(-1)[0] >= _DARKEST]
    lab = cv2.cvtColor((grid / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    chosen = [_FIRST]
    distance = np.linalg.norm(lab - lab[_FIRST], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return grid[0, chosen].astype(np.uint8)


PALETTE: UInt8Array = class_colours(len(CLASSES))
"""(150, 3) uint8 RGB; ours, not the one that the benchmark's tools draw with."""
