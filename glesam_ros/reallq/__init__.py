"""A set of real low-quality pictures in the RealLQ layout, which is ADE20K's: picked from a recording, labelled, read.

    classes.json, classes.txt           names and colours; the names alone, a name a line, for labelling tools
    images/validation/NAME.png          the worst frames, without loss
    images/validation/NAME.json         LabelMe's file of the same frame, at first without shapes
    annotations/validation/NAME.png     the labels once they are read: 0 unlabelled, k is class k - 1
    manifest.json                       settings; where each picture comes from, its measures and checksum
    measures.jsonl                      measures of every frame looked at, a line each
    test.txt                            names of the labelled pictures, which are the split "test"
"""

from glesam_ros.reallq.labels import read_labels
from glesam_ros.reallq.pick import PickOptions, Recording, Shot, pick, select
from glesam_ros.reallq.quality import Quality, measure, score

__all__ = ["PickOptions", "Quality", "Recording", "Shot", "measure", "pick", "read_labels", "score", "select"]
