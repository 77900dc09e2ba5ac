"""The peers' ways to score, one by one: evaluate.py's protocols against loops that follow each peer's own rule."""

import math
import os
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from data import KeypointPair, KeypointSet
from evaluate import PROTOCOLS, hits, score, task_of

ALPHAS = (0.05, 0.1, 0.2)
SIZES = [(260, 161), (143, 300), (250, 182), (401, 170), (97, 230), (333, 333)]


class Pictures:
    """Images of given sizes in the place of an ImageSet."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes

    def load(self, index: int) -> tuple[Image.Image, None]:
        return Image.new("RGB", self.sizes[index]), None


# ----------------------------------------------------------------------------------------------------------------------
# Literal rules. A scene is a dictionary of plain lists and numbers; `side` is the image that carries the threshold.


def scene_of(keypoints: KeypointSet, number: int) -> dict:
    p = keypoints.pairs[number]
    scene = {"willow": keypoints.name == "PF-WILLOW"}
    scene |= {"src_size": keypoints.size(p.src), "trg_size": keypoints.size(p.trg)}
    scene |= {"src_kps": p.src_kps.tolist(), "trg_kps": p.trg_kps.tolist()}
    return scene | {"src_box": p.src_box, "trg_box": p.trg_box}


def squash(points: list, size: tuple[int, int], width: float, height: float) -> list:
    return [[x * width / size[0], y * height / size[1]] for x, y in points]


def longer_side(points: list) -> float:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return max(max(xs) - min(xs), max(ys) - min(ys))


def padded_longer_side(points: list, value: float) -> float:
    """The same over an array (2, 40) that is filled up with a value: its minimum is the value."""
    return longer_side(points + [[value, value]] * (40 - len(points)))


def within(pred: list, truth: list, limit: float, strict: bool = False) -> list[bool]:
    found = []
    for (x, y), (u, v) in zip(pred, truth):
        distance = math.sqrt((x - u) ** 2 + (y - v) ** 2)
        found.append(distance < limit if strict else distance <= limit)
    return found


def own_pixels(scene: dict, pred: list, rule: str, alpha: float, side: str, strict: bool = False) -> list[bool]:
    """HPF and its kin: no squashing; on PF-WILLOW the box of the points, which nothing pads."""
    x0, y0, x1, y1 = scene[f"{side}_box"]
    if rule == "img":
        d = max(scene[f"{side}_size"])
    elif scene["willow"]:
        d = longer_side(scene[f"{side}_kps"])
    else:
        d = max(x1 - x0, y1 - y0)
    return within(pred, scene[f"{side}_kps"], alpha * d, strict)


def squashed(
    scene: dict, pred: list, rule: str, alpha: float, side: str, width: int, height: int, pad: float | None = None
) -> list[bool]:
    """DHPF, CATs and their kin: points, predictions and box in the squashed image."""
    size, (x0, y0, x1, y1) = scene[f"{side}_size"], scene[f"{side}_box"]
    truth = squash(scene[f"{side}_kps"], size, width, height)
    if rule == "img":
        d = max(width, height)
    elif scene["willow"]:
        d = longer_side(truth) if pad is None else padded_longer_side(truth, pad)
    else:
        d = max((x1 - x0) * width / size[0], (y1 - y0) * height / size[1])
    return within(squash(pred, size, width, height), truth, alpha * d)


# name: (side of the threshold, width and height of the squashed image or None, padding, strict, whole query pixels)
PEERS = {
    "target": ("trg", None, None, False, False),
    "proposalflow": ("trg", None, None, True, False),
    "geoaware": ("trg", None, None, True, False),
    "densematching": ("src", None, None, False, False),
    "ncnet": ("src", (224, 224), None, False, False),
    "ncnet-willow": ("src", None, None, False, False),
    "mmnet": ("trg", (320, 224), None, False, False),
    "dhpf": ("trg", (240, 240), -1, False, False),
    "chm": ("trg", (240, 240), -2, False, False),
    "transformatcher": ("trg", (240, 240), -2, False, False),
    "cats": ("src", (256, 256), -1, False, True),
    "semimatch": ("src", (256, 256), -1, False, True),
    "scorrsan": ("src", (256, 256), -1, False, True),
    "vat": ("src", (512, 512), -1, False, True),
    "cats++": ("src", (512, 512), -1, False, True),
    "actr": ("src", (512, 512), -1, False, True),
}
OTHER = {"src": "trg", "trg": "src"}


def literal(name: str, scene: dict, pred: list, rule: str, alpha: float) -> list[bool]:
    side, frame, pad, strict, _ = PEERS[name]
    if frame is None:
        return own_pixels(scene, pred, rule, alpha, side, strict)
    return squashed(scene, pred, rule, alpha, side, *frame, pad)


def literal_query(name: str, scene: dict) -> list:
    """The points that are asked for, in pixels of their image: as they are, or as whole pixels of the squashed one."""
    side, frame, _, _, whole = PEERS[name]
    points, size = scene[f"{OTHER[side]}_kps"], scene[f"{OTHER[side]}_size"]
    if not whole:
        return points
    asked = []
    for x, y in squash(points, size, *frame):
        column, row = (min(max(int(v), 0), frame[0] - 1) for v in (x, y))
        asked.append([column * size[0] / frame[0], row * size[1] / frame[1]])
    return asked


def scattered(name: str, boxes: bool) -> KeypointSet:
    """Twelve pairs of 1 to 14 points between images of six shapes; boxes apart from the points, or round them."""
    pairs = []
    for k in range(12):
        src, trg, n = k % 6, (k * 5 + 1) % 6, 1 + (5 * k) % 14 if boxes else 10
        kps = [torch.rand(n, 2) * (torch.tensor(SIZES[i]) * 0.8) + 8 for i in (src, trg)]
        around = [data.span(points) for points in kps]
        if boxes:
            sizes = [SIZES[src], SIZES[trg]]
            around = [(3.0, 2.0, 3 + float(w * (0.3 + 0.6 * torch.rand(()))), h * 0.9) for w, h in sizes]
        pairs.append(KeypointPair(src, trg, *kps, "ab"[k % 2], *around))
    return KeypointSet(name, Pictures(SIZES), pairs)


def guesses(keypoints: KeypointSet, name: str) -> list[torch.Tensor]:
    """Predictions 0 to 0.3 of the answer image off, in its pixels."""
    found = []
    for pair in keypoints.pairs:
        truth, index = (pair.src_kps, pair.src) if PEERS[name][0] == "src" else (pair.trg_kps, pair.trg)
        reach = 0.3 * torch.rand(len(truth), 1) * torch.tensor(keypoints.size(index))
        found.append(truth + reach * torch.nn.functional.normalize(torch.randn(len(truth), 2)))
    return found


def assert_scored_as_the_peer(keypoints: KeypointSet, name: str, rule: str) -> dict:
    """Every point of every pair is judged as the peer judges it; returns the table."""
    predictions, shares, right, total = guesses(keypoints, name), [], [0] * len(ALPHAS), 0
    for number, pred in enumerate(predictions):
        scene = scene_of(keypoints, number)
        expected = [literal(name, scene, pred.tolist(), rule, alpha) for alpha in ALPHAS]
        found = hits(pred, task_of(keypoints, number, PROTOCOLS[name], rule), ALPHAS, PROTOCOLS[name].strict)
        assert found.T.tolist() == expected, f"pair {number}"
        shares.append([100 * sum(row) / len(row) for row in expected])
        right, total = [r + sum(row) for r, row in zip(right, expected)], total + len(pred)
    table = score(predictions, keypoints, ALPHAS, name, rule)
    assert list(table) == [rule]
    means = [sum(column) / len(shares) for column in zip(*shares)]
    assert table[rule]["per_image"] == pytest.approx(means, abs=1e-3)
    assert table[rule]["per_point"] == pytest.approx([100 * r / total for r in right], abs=1e-3)
    assert 2 < means[0] < means[1] < means[2] < 98
    return table


def test_every_protocol_has_a_literal_form():
    assert PEERS.keys() == PROTOCOLS.keys()


@pytest.mark.parametrize("rule", ["bbox", "img"])
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("willow", [False, True])
def test_points_are_counted_as_the_peer_counts_them(name, rule, willow):
    torch.manual_seed(0)
    keypoints = scattered("PF-WILLOW" if willow else "SPair-71k test", boxes=not willow)
    assert_scored_as_the_peer(keypoints, name, rule)


@pytest.mark.parametrize("name", PEERS)
def test_points_are_asked_for_as_the_peer_asks(name):
    """Which image is asked, which answers, where; CATs and its kin cut to whole pixels and never leave the frame."""
    torch.manual_seed(0)
    keypoints = scattered("SPair-71k test", boxes=True)
    outside = torch.tensor([[-7.3, 50.5], [-0.4, -0.4], [999.0, 20.9], [33.99, 500.0]])
    for number, pair in enumerate(keypoints.pairs[:3]):
        keypoints.pairs[number] = pair._replace(src_kps=outside, trg_kps=outside.flip(1))
    swap, whole, moved = PEERS[name][0] == "src", PEERS[name][4], 0.0
    for number, pair in enumerate(keypoints.pairs):
        task = task_of(keypoints, number, PROTOCOLS[name], "bbox")
        (src, trg, src_kps, trg_kps), asked = pair[:4], literal_query(name, scene_of(keypoints, number))
        assert (task.query, task.answer) == ((trg, src) if swap else (src, trg))
        assert torch.equal(task.truth, src_kps if swap else trg_kps)
        torch.testing.assert_close(task.points, torch.tensor(asked), atol=1e-4, rtol=0)
        moved = max(moved, float((task.points - (trg_kps if swap else src_kps)).abs().max()))
    assert (moved > 10) == whole


@pytest.mark.parametrize("name", PEERS)
def test_the_truncation_of_inner_points_moves_them_by_less_than_a_pixel_of_the_frame(name):
    torch.manual_seed(1)
    keypoints, frame = scattered("SPair-71k test", boxes=True), PEERS[name][1]
    moves = []
    for number, pair in enumerate(keypoints.pairs):
        task = task_of(keypoints, number, PROTOCOLS[name], "img")
        points = pair.trg_kps if PROTOCOLS[name].swap else pair.src_kps
        size = torch.tensor(keypoints.size(task.query))
        moves.append((points - task.points) * torch.tensor(frame or (1, 1)) / size)
    moves = torch.cat(moves)
    if PEERS[name][4]:
        assert moves.min() > -1e-3 and 0.9 < moves.max() < 1 and 0.4 < moves.mean() < 0.6  # always to the upper left
    else:
        assert not moves.any()


@pytest.mark.parametrize("willow", [False, True])
@pytest.mark.parametrize("rule", ["bbox", "img"])
@pytest.mark.parametrize("name", PEERS)
def test_a_point_on_the_threshold_is_right_unless_the_peer_is_strict(name, rule, willow):
    """The answer image is four times smaller than the frame along y, twice along x: every number below is exact."""
    side, frame, pad, strict, _ = PEERS[name]
    sx, sy = (1.0, 1.0) if frame is None else (2.0, 4.0)
    width, height = (128, 64) if frame is None else (frame[0] // 2, frame[1] // 4)
    truth = torch.tensor([[40.0, 8.0], [16.0, 30.0], [24.0, 16.0], [32.0, 28.0]])
    other = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0], [7.0, 19.0]])  # of smaller extent, as is its box
    box, other_box = (4.0, 2.0, 52.0, 30.0), (0.0, 0.0, 20.0, 21.0)
    if rule == "img":
        d = float(max(frame or (width, height)))
    elif willow:
        span = max((40 - 16) * sx, (30 - 8) * sy)
        d = span if pad is None else max(40 * sx, 30 * sy) - pad
        box = (16.0, 8.0, 40.0, 30.0)
    else:
        d = max(48 * sx, 28 * sy)
    ends = [(truth, box, (width, height)), (other, other_box, (31, 47))]
    if side == "trg":
        ends.reverse()
    (src_kps, src_box, src_size), (trg_kps, trg_box, trg_size) = ends
    pair = KeypointPair(0, 1, src_kps, trg_kps, "a", src_box, trg_box)
    keypoints = KeypointSet("PF-WILLOW" if willow else "SPair-71k test", Pictures([src_size, trg_size]), [pair])
    dx, dy = 0.125 * d / sx, 0.125 * d / sy
    for factor, expected in ((1.0, not strict), (1 - 2**-12, True), (1 + 2**-12, False)):
        pred = truth + factor * torch.tensor([[dx, 0.0], [-dx, 0.0], [0.0, dy], [0.0, -dy]])
        table = score([pred], keypoints, (0.125, 0.0625, 0.25), name, rule)
        assert table[rule]["per_point"] == [100.0 * expected, 0.0, 100.0], factor


# ----------------------------------------------------------------------------------------------------------------------
# The real PF-WILLOW


@pytest.fixture(scope="module")
def willow():
    if not os.environ.get("COCR_DATA"):
        pytest.skip("set COCR_DATA to a folder with PF-WILLOW to run this")
    return data.pfwillow(str(Path(os.environ["COCR_DATA"], "PF-WILLOW")))


def inflation(keypoints: KeypointSet, name: str, side: int, pad: int) -> list[float]:
    """Threshold of a protocol over the longer side of the points' box in the squashed image, once an image."""
    found = {}
    for number, pair in enumerate(keypoints.pairs):
        task = task_of(keypoints, number, PROTOCOLS[name], "bbox")
        if task.answer not in found:
            kps = pair.src_kps if PROTOCOLS[name].swap else pair.trg_kps
            points = squash(kps.tolist(), keypoints.size(task.answer), side, side)
            assert task.d == pytest.approx(padded_longer_side(points, pad), rel=1e-5)
            found[task.answer] = task.d / longer_side(points)
    return list(found.values())


def test_padding_inflates_the_threshold_of_real_pfwillow_by_1_28(willow):
    ratios = inflation(willow, "cats", 256, -1)
    assert len(ratios) == 100
    figures = statistics.mean(ratios), statistics.median(ratios), min(ratios), max(ratios)
    assert figures == pytest.approx((1.283, 1.207, 1.056, 2.165), abs=6e-4)
    assert statistics.mean(inflation(willow, "chm", 240, -2)) == pytest.approx(1.289, abs=6e-4)
    assert statistics.mean(inflation(willow, "vat", 512, -1)) < 1.283  # the padding shrinks beside larger coordinates


@pytest.mark.parametrize("name", PEERS)
def test_all_pairs_of_real_pfwillow_are_scored_as_the_peer_scores_them(willow, name):
    torch.manual_seed(0)
    assert_scored_as_the_peer(willow, name, "bbox")
