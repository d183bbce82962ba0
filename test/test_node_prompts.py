"""Prompts by every door, how long they hold, and how the wrong ones are answered."""

from __future__ import annotations

import time

import numpy as np
import pytest
from geometry_msgs.msg import Point, PointStamped
from ros_graph import image_message, picture, pixels_of, wait_for
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger
from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesis, ObjectHypothesisWithPose

LEFT, RIGHT = (20, 20, 40, 60), (100, 20, 40, 60)
IN_LEFT, IN_RIGHT = (40.0, 50.0), (120.0, 50.0)


class Scene:
    """A node that sees two squares, and the ids of its newest masks."""

    def __init__(self, client):
        self.client = client
        self.masks = client.subscribe(Image, "masks")
        self.size = (120, 160)
        self.see("two objects", lambda m: m[50, 40] and m[50, 120])

    def frame(self):
        return image_message(picture((LEFT, RIGHT), size=self.size), self.client.stamp())

    def see(self, what, condition):
        """Stream until the newest masks fulfil `condition`."""
        self.client.stream(
            self.frame, lambda: self.masks.messages and condition(pixels_of(self.masks.last)), what
        )

    def point(self, xy, z=0.0, stamp=None, frame_id=""):
        message = PointStamped()
        message.header.frame_id = frame_id
        message.point = Point(x=xy[0], y=xy[1], z=z)
        if stamp is not None:
            message.header.stamp = stamp
        self.client.send(message, "prompt/point")

    def boxes(self, *xyxy, frame_id="", classes=()):
        message = Detection2DArray()
        message.header.frame_id = frame_id
        for k, (x1, y1, x2, y2) in enumerate(xyxy):
            detection = Detection2D()
            for name, score in classes[k : k + 1]:
                said = ObjectHypothesis(class_id=name, score=score)
                detection.results.append(ObjectHypothesisWithPose(hypothesis=said))
            detection.bbox.center.position.x, detection.bbox.center.position.y = (x1 + x2) / 2, (y1 + y2) / 2
            detection.bbox.size_x, detection.bbox.size_y = float(x2 - x1), float(y2 - y1)
            message.detections.append(detection)
        self.client.send(message, "prompt/boxes")

    def clear(self):
        return self.client.call(Trigger, "clear_prompts", Trigger.Request())


def only_left(masks):
    return masks[50, 40] == 1 and not masks[50, 120]


@pytest.fixture(scope="module")
def _of_module(launch_shared):
    return Scene(launch_shared())


@pytest.fixture
def scene(_of_module):
    """A scene that the tests share, in which no prompt is left and none is refused."""
    _of_module.clear()
    _of_module.size = (120, 160)
    _of_module.see("two objects", lambda m: m.shape == (120, 160) and len({m[50, 40], m[50, 120], 0}) == 3)
    return _of_module


@pytest.fixture
def fresh(launch):
    """A scene of the test alone, nothing logged or counted yet."""
    return Scene(launch())


def test_points_add_to_one_object_until_cleared(scene):
    scene.point(IN_LEFT)
    scene.see("the left square alone", only_left)
    scene.point(IN_RIGHT)
    scene.see("both squares as one object", lambda m: m[50, 40] == 1 and m[50, 120] == 1)
    scene.point(IN_RIGHT, z=-1.0)
    scene.see("the right square taken away", only_left)
    answer = scene.clear()
    assert answer.success and "3 points and 0 boxes" in answer.message
    scene.see("everything again", lambda m: len({m[50, 40], m[50, 120], 0}) == 3)


def test_without_everything_masks_stay_empty_until_a_prompt_comes(scene):
    scene.client.set_parameters(everything=False)
    scene.see("nothing", lambda m: not m.any())
    scene.point(IN_LEFT)
    scene.see("the left square alone", only_left)
    assert "masks stay empty until the next prompt" in scene.clear().message
    scene.see("nothing again", lambda m: not m.any())
    scene.client.set_parameters(everything=True)
    scene.see("everything", lambda m: len({m[50, 40], m[50, 120], 0}) == 3)


def test_a_click_in_rqt_image_view_is_a_positive_point(scene):
    scene.client.send(Point(x=IN_LEFT[0], y=IN_LEFT[1]), "overlay_mouse_left")
    scene.see("the left square alone", only_left)
    # rqt rounds, so the last column and row may come as width and height
    scene.client.send(Point(x=160.0, y=120.0), "overlay_mouse_left")
    scene.client.wait_count("prompt_points", 2)
    assert not scene.client.logged("refused")


def test_boxes_are_objects_and_a_new_message_replaces_them(scene):
    scene.boxes((16, 16, 48, 48), (80, 80, 120, 112))
    scene.see("two boxes", lambda m: m[30, 30] == 1 and m[100, 100] == 2 and not m[50, 120])
    scene.boxes((96, 16, 128, 48))
    scene.see("the new box alone", lambda m: m[30, 100] == 1 and not m[30, 30] and not m[100, 100])
    scene.point(IN_LEFT)
    scene.see("the point's object first, then the box", lambda m: m[50, 40] == 1 and m[20, 98] == 2)
    scene.boxes()
    scene.see("the point alone", only_left)


def test_a_prompt_expires(launch):
    scene = Scene(launch(prompt_timeout_s=1.0))
    scene.point(IN_LEFT)
    scene.see("the left square alone", only_left)
    scene.see("everything again", lambda m: len({m[50, 40], m[50, 120], 0}) == 3)


def test_points_that_expired_while_nothing_was_processed_do_not_come_back_with_a_new_one(fresh):
    """No frame comes meanwhile. The time changes, so that the new point cannot expire on a busy machine."""
    for _ in range(2):
        fresh.point(IN_RIGHT)
    fresh.client.wait_count("prompt_points", 2)
    fresh.client.set_parameters(prompt_timeout_s=0.5)
    time.sleep(0.6)
    fresh.point(IN_LEFT)
    wait_for(lambda: fresh.client.counts()["prompt_points"] == 1, "the new point alone")
    fresh.client.set_parameters(prompt_timeout_s=0.0)
    before = len(fresh.masks)
    fresh.see("masks again", lambda m: len(fresh.masks) > before)
    assert only_left(pixels_of(fresh.masks.messages[before]))


def test_a_point_outside_is_refused_with_the_numbers(fresh):
    fresh.point((200.0, 50.0))
    fresh.client.wait_log("refused", "expected 0 <= x < 160 and 0 <= y < 120, got (200, 50)")
    fresh.client.wait_count("noticed_refused_prompt", 1)


@pytest.mark.parametrize(("box", "parts"), [
    ((170, 10, 200, 40), ("160x120", "(170, 10, 200, 40)")),
    ((50, 50, 50, 60), ("x1 < x2", "(50, 50, 50, 60)")),
])
def test_a_box_outside_or_empty_is_refused_with_the_numbers(fresh, box, parts):
    fresh.boxes(box)
    fresh.client.wait_log("refused", *parts)


def test_a_bad_box_does_not_take_the_good_ones_with_it_and_these_keep_their_ids(fresh):
    nan = float("nan")
    fresh.boxes((16, 16, 48, 48), (170, 10, 200, 40), (80, 80, 120, 112), (nan, 5, nan, 9))
    fresh.see("boxes 1 and 3", lambda m: set(np.unique(m)) == {0, 1, 3} and m[30, 30] == 1 and m[100, 100] == 3)
    fresh.client.wait_log("refused", "touches the 160x120 image", "2 of 4 boxes are left out, the others hold")
    fresh.point(IN_LEFT)
    fresh.see("the point's object before them", lambda m: m[50, 40] == 1 and m[100, 100] == 4)
    # where none is good, those before hold
    fresh.boxes((170, 10, 200, 40))
    fresh.client.wait_count("noticed_refused_prompt", 2)
    assert fresh.client.counts()["prompt_boxes"] == 2


def test_of_more_than_64_boxes_the_first_hold(fresh):
    cells = [(20 * x, 15 * y, 20 * x + 20, 15 * y + 15) for y in range(8) for x in range(8)]
    fresh.boxes(*cells, (0, 0, 160, 120))
    fresh.client.wait_log("refused", "at most 64, got 65; 1 of 65 boxes are left out")
    fresh.see("64 objects", lambda m: set(np.unique(m)) == set(range(65)))
    fresh.boxes()
    fresh.client.wait_count("prompt_boxes", 0)


def test_refused_prompts_are_counted_and_the_1st_and_the_10th_are_logged(fresh):
    for x in range(200, 212):
        fresh.point((float(x), 50.0))
        time.sleep(0.02)  # the node keeps 10
    fresh.client.wait_count("noticed_refused_prompt", 12)
    fresh.client.wait_log("refused", "[10 so far]")
    assert len(fresh.client.logged("refused")) == 2
    wait_for(lambda: "got (211, 50)" in fresh.client.values().get("last_fault", ""), "the newest refusal")


def test_each_reason_of_a_refusal_is_logged_once_also_where_they_take_turns(fresh):
    for x in range(200, 204):
        fresh.point((float(x), 50.0))
        fresh.client.wait_count("noticed_refused_prompt", 2 * (x - 200) + 1)
        fresh.boxes((50, 50, 50, 60))
        fresh.client.wait_count("noticed_refused_prompt", 2 * (x - 200) + 2)
    fresh.client.wait_log("refused", "x1 < x2", "[2 so far]")
    fresh.client.wait_log("refused", "got (200, 50)", "[1 so far]")
    assert len(fresh.client.logged("refused")) == 2


def stamped(scene, age_s):
    """A point with the stamp of an image of that age."""
    stamp = scene.client.stamp()
    stamp.sec -= age_s
    scene.point(IN_LEFT, stamp=stamp)


def test_a_prompt_on_an_image_that_a_person_looked_at_is_taken(scene):
    stamped(scene, 20)  # far beyond max_frame_age_ms
    scene.see("the left square alone", only_left)
    assert not scene.client.logged("refused")


def test_a_prompt_on_an_image_beyond_its_timeout_is_refused_with_its_age(launch):
    scene = Scene(launch(prompt_timeout_s=10.0))
    stamped(scene, 20)
    line = scene.client.wait_log("refused", "its image is too old")
    assert "at most 10 s old (prompt_timeout_s), got 20." in line
    stamped(scene, 0)
    scene.see("the left square alone", only_left)


def test_without_a_timeout_the_image_of_a_prompt_may_be_of_any_age(launch):
    scene = Scene(launch(prompt_timeout_s=0.0))
    stamped(scene, 100_000)
    scene.see("the left square alone", only_left)


def test_of_boxes_within_each_other_both_are_there(scene):
    """The whole comes first and has the same score; a part that it hid would be lost to who asked for it."""
    scene.boxes((10, 10, 90, 90), (20, 20, 60, 60))
    scene.see("the part on the whole", lambda m: m[40, 40] == 2 and m[80, 80] == 1)
    scene.boxes((20, 20, 60, 60), (10, 10, 90, 90))
    scene.see("and in the other order", lambda m: m[40, 40] == 1 and m[80, 80] == 2)


def test_classes_of_the_boxes_go_on_to_their_detections(scene):
    detections = scene.client.subscribe(Detection2DArray, "detections")
    scene.boxes(
        (300, 300, 310, 310), (20, 20, 60, 80), (100, 20, 140, 80),
        classes=[("ghost", 0.1), ("person", 0.875), ("dog", 0.5)],
    )

    def said():
        return {
            d.id: [(r.hypothesis.class_id, round(r.hypothesis.score, 3)) for r in d.results]
            for d in (detections.last.detections if detections.messages else ())
        }

    expected = {"2": [("object", 0.9), ("person", 0.875)], "3": [("object", 0.9), ("dog", 0.5)]}
    scene.client.stream(scene.frame, lambda: said() == expected, f"{expected}, got {said()}")
    # a tracker hands them back: what is there already does not come again
    scene.client.send(detections.last, "prompt/boxes")
    again = {"1": expected["2"], "2": expected["3"]}
    scene.client.stream(scene.frame, lambda: said() == again, f"{again}, got {said()}")
    # of very many the first go on
    many, names = detections.last, [f"class {k}" for k in range(20)]
    many.detections[1].results = [
        ObjectHypothesisWithPose(hypothesis=ObjectHypothesis(class_id=name, score=0.5)) for name in names
    ]
    scene.client.send(many, "prompt/boxes")
    first = ["object", *names[:16]]
    scene.client.stream(scene.frame, lambda: [name for name, _ in said().get("2", ())] == first, f"{first}")


@pytest.mark.parametrize("kind", ["point", "boxes"])
def test_a_prompt_of_another_frame_is_refused(fresh, kind):
    """RViz gives metres of a map, and a detector may look through another camera."""
    prompt = {"point": IN_LEFT, "boxes": (20, 20, 60, 80)}[kind]
    getattr(fresh, kind)(prompt, frame_id="map")
    fresh.client.wait_log("refused", "expected pixels of the image, frame_id 'optical' or empty, got 'map'")
    before = len(fresh.masks)
    fresh.see("everything still", lambda m: len(fresh.masks) >= before + 2 and m[50, 40] and m[50, 120])
    getattr(fresh, kind)(prompt, frame_id="optical")
    fresh.see("the left square alone", only_left)


def test_points_that_come_in_a_burst_are_all_held(fresh):
    fresh.client.publisher(PointStamped, "prompt/point", 64)
    for n in range(32):
        fresh.point((25.0 + n, 50.0))
    wait_for(lambda: fresh.client.values().get("prompt_points") == "32", "32 points")


def test_a_prompt_may_come_before_the_first_subscriber(launch):
    client = launch()
    client.publisher(PointStamped, "prompt/point")
    client.stream(
        lambda: image_message(picture((LEFT, RIGHT)), client.stamp()),
        lambda: client.counts()["dropped_no_subscriber"] >= 3, "frames that nobody wants",
    )
    message = PointStamped(point=Point(x=IN_LEFT[0], y=IN_LEFT[1]))
    client.send(message, "prompt/point")
    wait_for(lambda: client.values().get("prompt_points") == "1", "the point")
    assert not client.logged("refused")
    masks = client.subscribe(Image, "masks")
    client.stream(
        lambda: image_message(picture((LEFT, RIGHT)), client.stamp()),
        lambda: masks.messages and only_left(pixels_of(masks.last)), "the left square alone",
    )


def test_a_prompt_before_the_first_frame_is_refused(launch):
    client = launch()
    client.send(PointStamped(), "prompt/point")
    client.wait_log("refused", f"no frame of /{client.namespace}/image was read yet")


def test_a_negative_point_alone_has_no_effect_and_says_so(scene):
    scene.point(IN_LEFT, z=-1.0)
    scene.client.wait_log("negative point (40, 50) has no effect before a positive point")
    before = len(scene.masks)
    scene.see("everything still", lambda m: len(scene.masks) >= before + 2 and m[50, 40] and m[50, 120])


@pytest.mark.parametrize("size", [(90, 80), (240, 320)])
def test_prompts_of_another_resolution_are_dropped_with_a_warning(scene, size):
    """They name pixels of the old one; in the new one other things lie there."""
    scene.point(IN_RIGHT)
    scene.boxes((100, 16, 128, 48))
    scene.see("the right square", lambda m: m[60, 120] == 1 and not m[50, 40])
    scene.size = size
    scene.see("everything of the new image", lambda m: m.shape == size and m[50, 40])
    scene.client.wait_log(f"point (120, 50) dropped: the image is {size[1]}x{size[0]} now")
    scene.client.wait_log(f"box (100, 16, 128, 48) dropped: the image is {size[1]}x{size[0]} now")


def test_prompts_belong_to_their_camera(launch):
    client = launch(cameras=["a", "b"])
    masks = {name: client.subscribe(Image, f"{name}/masks") for name in "ab"}
    for name in "ab":
        client.stream(
            lambda: image_message(picture((LEFT, RIGHT)), client.stamp()),
            lambda name=name: masks[name].messages, f"masks of {name}", f"{name}/image",
        )
    message = PointStamped()
    message.point = Point(x=IN_LEFT[0], y=IN_LEFT[1])
    client.send(message, "a/prompt/point")
    client.stream(
        lambda: image_message(picture((LEFT, RIGHT)), client.stamp()),
        lambda: only_left(pixels_of(masks["a"].last)), "the left square of a", "a/image",
    )
    before = len(masks["b"])
    client.stream(
        lambda: image_message(picture((LEFT, RIGHT)), client.stamp()),
        lambda: len(masks["b"]) > before + 1, "masks of b", "b/image",
    )
    assert pixels_of(masks["b"].last)[50, 120]
