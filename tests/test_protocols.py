"""experiments/peers.py: the peers' ways to score, one by one, against loops that follow each peer's rule."""

import csv
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data import KeypointPair, KeypointSet
from evaluate import predict, right_points, score
from experiments import peers
from experiments.cats import Cats, as_cats_reads
from experiments.finetune import PROGRAM, FinetuneConfig
from experiments.peers import PROTOCOLS, print_paper
from modules import Features
from support.benchmarks import pfwillow, span
from support.presets import PRESETS
from support.shapes import SHAPE_SPLITS, shapes_pairs
from train import Cascade, Config

ROOT = Path(__file__).parent.parent
ALPHAS = (0.05, 0.1, 0.2)
SIZES = [(260, 161), (143, 300), (250, 182), (401, 170), (97, 230), (333, 333)]


class Pictures:
    """Images of given sizes in the place of an ImageSet."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes, self.size = sizes, sizes.__getitem__

    def load(self, index: int) -> tuple[Image.Image, None]:
        return Image.new("RGB", self.sizes[index]), None


# ------------------------------------------------------------------------------------------------------------
# Literal rules. A scene is a dictionary of plain lists and numbers; `side`: the image with the threshold.


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


def own_pixels(scene: dict, pred: list, rule: str, alpha: float, side: str,
               strict: bool = False) -> list[bool]:
    """HPF and its kin: no squashing; on PF-WILLOW the box of the points, which nothing pads."""
    x0, y0, x1, y1 = scene[f"{side}_box"]
    if rule == "img":
        d = max(scene[f"{side}_size"])
    elif scene["willow"]:
        d = longer_side(scene[f"{side}_kps"])
    else:
        d = max(x1 - x0, y1 - y0)
    return within(pred, scene[f"{side}_kps"], alpha * d, strict)


def squashed(scene: dict, pred: list, rule: str, alpha: float, side: str, answer: str, width: int,
             height: int, pad: float | None = None) -> list[bool]:
    """DHPF, CATs and their kin: points, predictions and box in the squashed image; d is the side's."""
    size, (x0, y0, x1, y1) = scene[f"{side}_size"], scene[f"{side}_box"]
    points = squash(scene[f"{side}_kps"], size, width, height)
    if rule == "img":
        d = max(width, height)
    elif scene["willow"]:
        d = longer_side(points) if pad is None else padded_longer_side(points, pad)
    else:
        d = max((x1 - x0) * width / size[0], (y1 - y0) * height / size[1])
    pred, truth = (squash(p, scene[f"{answer}_size"], width, height) for p in (pred, scene[f"{answer}_kps"]))
    return within(pred, truth, alpha * d)


# name: (side of the threshold, width and height of the squashed image, padding, strict, whole query pixels)
PEERS = {
    "target": ("trg", None, None, False, False),
    "padded": ("trg", (256, 256), -1, False, False),
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
    "sd4match": ("trg", (768, 768), None, False, False),
    "sd4match-ori": ("trg", None, None, False, False),
}
OTHER = {"src": "trg", "trg": "src"}
ANSWER = {name: row[0] for name, row in PEERS.items()} | {"actr": "trg"}  # where points are compared


def literal(name: str, scene: dict, pred: list, rule: str, alpha: float) -> list[bool]:
    side, frame, pad, strict, _ = PEERS[name]
    if frame is None:
        return own_pixels(scene, pred, rule, alpha, side, strict)
    return squashed(scene, pred, rule, alpha, side, ANSWER[name], *frame, pad)


def literal_query(name: str, scene: dict) -> list:
    """The points that are asked for, in pixels of their image: as they are, or in whole squashed pixels."""
    _, frame, _, _, whole = PEERS[name]
    points, size = (scene[f"{OTHER[ANSWER[name]]}_{what}"] for what in ("kps", "size"))
    if not whole:
        return points
    asked = []
    for x, y in squash(points, size, *frame):
        column, row = (min(max(int(v), 0), frame[0] - 1) for v in (x, y))
        asked.append([column * size[0] / frame[0], row * size[1] / frame[1]])
    return asked


def scattered(name: str, boxes: bool) -> KeypointSet:
    """Twelve pairs of 1 to 14 points between images of six shapes; boxes apart from points, or round them."""
    pairs = []
    for k in range(12):
        src, trg, n = k % 6, (k * 5 + 1) % 6, 1 + (5 * k) % 14 if boxes else 10
        kps = [torch.rand(n, 2) * (torch.tensor(SIZES[i]) * 0.8) + 8 for i in (src, trg)]
        around = [span(points) for points in kps]
        if boxes:
            sizes = [SIZES[src], SIZES[trg]]
            around = [(3.0, 2.0, 3 + float(w * (0.3 + 0.6 * torch.rand(()))), h * 0.9) for w, h in sizes]
        pairs.append(KeypointPair(src, trg, *kps, "ab"[k % 2], *around))
    return KeypointSet(name, Pictures(SIZES), pairs)


def guesses(keypoints: KeypointSet, name: str) -> list[torch.Tensor]:
    """Predictions 0 to 0.3 of the answer image off, in its pixels."""
    found = []
    for pair in keypoints.pairs:
        truth, index = (pair.src_kps, pair.src) if ANSWER[name] == "src" else (pair.trg_kps, pair.trg)
        reach = 0.3 * torch.rand(len(truth), 1) * torch.tensor(keypoints.size(index))
        found.append(truth + reach * torch.nn.functional.normalize(torch.randn(len(truth), 2)))
    return found


def assert_scored_as_the_peer(keypoints: KeypointSet, name: str, rule: str) -> dict:
    """Every point of every pair is judged as the peer judges it; returns the table."""
    predictions, shares, right, total = guesses(keypoints, name), [], [0] * len(ALPHAS), 0
    asked, strict = PROTOCOLS[name](keypoints, rule), PROTOCOLS[name].strict
    for number, pred in enumerate(predictions):
        scene = scene_of(keypoints, number)
        expected = [literal(name, scene, pred.tolist(), rule, alpha) for alpha in ALPHAS]
        found = right_points(pred, asked, number, ALPHAS, rule, strict)
        assert found.T.tolist() == expected, f"pair {number}"
        shares.append([100 * sum(row) / len(row) for row in expected])
        right, total = [r + sum(row) for r, row in zip(right, expected)], total + len(pred)
    table = score(predictions, asked, ALPHAS, rule, strict)
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
    """Which image is asked, which answers, where; CATs and its kin cut to whole pixels inside the frame."""
    torch.manual_seed(0)
    keypoints = scattered("SPair-71k test", boxes=True)
    outside = torch.tensor([[-7.3, 50.5], [-0.4, -0.4], [999.0, 20.9], [33.99, 500.0]])
    for number, pair in enumerate(keypoints.pairs[:3]):
        keypoints.pairs[number] = pair._replace(src_kps=outside, trg_kps=outside.flip(1))
    swap, whole, moved = ANSWER[name] == "src", PEERS[name][4], 0.0
    tasks = PROTOCOLS[name](keypoints, "bbox").pairs
    for number, (pair, task) in enumerate(zip(keypoints.pairs, tasks, strict=True)):
        (src, trg, src_kps, trg_kps), asked = pair[:4], literal_query(name, scene_of(keypoints, number))
        assert (task.src, task.trg) == ((trg, src) if swap else (src, trg))
        assert torch.equal(task.trg_kps, src_kps if swap else trg_kps)
        torch.testing.assert_close(task.src_kps, torch.tensor(asked), atol=1e-4, rtol=0)
        moved = max(moved, float((task.src_kps - (trg_kps if swap else src_kps)).abs().max()))
    assert (moved > 10) == whole


@pytest.mark.parametrize("name", PEERS)
def test_the_truncation_of_inner_points_moves_them_by_less_than_a_pixel_of_the_frame(name):
    torch.manual_seed(1)
    keypoints, frame = scattered("SPair-71k test", boxes=True), PEERS[name][1]
    moves = []
    for pair, task in zip(keypoints.pairs, PROTOCOLS[name](keypoints, "img").pairs, strict=True):
        points = pair.trg_kps if PROTOCOLS[name].swap else pair.src_kps
        size = torch.tensor(keypoints.size(task.src))
        moves.append((points - task.src_kps) * torch.tensor(frame or (1, 1)) / size)
    moves = torch.cat(moves)
    if PEERS[name][4]:
        assert moves.min() > -1e-3 and 0.9 < moves.max() < 1 and 0.4 < moves.mean() < 0.6  # to the upper left
    else:
        assert not moves.any()


def test_actr_asks_the_source_and_takes_d_from_it():
    """By hand: a source of 256 x 128 px, a target of 1024 x 512, frame 512: scales 2, 4 and 0.5, 1."""
    kps, found = torch.tensor([[10.7, 20.0], [50.0, 100.4]]), torch.tensor([[300.0, 200.0], [500.0, 400.0]])
    boxes = (10.0, 20.0, 60.0, 110.0), (0.0, 0.0, 1000.0, 500.0)
    for willow, d in ((True, 4 * 100.4 + 1), (False, 4 * 90.0)):  # the padded points; the box
        pair = KeypointPair(0, 1, kps, found, "a", *boxes)
        name = "PF-WILLOW" if willow else "SPair-71k test"
        keypoints = KeypointSet(name, Pictures([(256, 128), (1024, 512)]), [pair])
        (task,) = PROTOCOLS["actr"](keypoints).pairs
        assert (task.src, task.trg) == (0, 1) and torch.equal(task.trg_kps, found)
        assert task.src_kps.tolist() == [[10.5, 20.0], [50.0, 100.25]]  # 21.4, 80 and 100, 401.6, cut off
        assert task.d == pytest.approx(d) and task.scale == (0.5, 1.0)


@pytest.mark.parametrize("willow", [False, True])
@pytest.mark.parametrize("rule", ["bbox", "img"])
@pytest.mark.parametrize("name", PEERS)
def test_a_point_on_the_threshold_is_right_unless_the_peer_is_strict(name, rule, willow):
    """The answer image is four times smaller than the frame along y, twice along x: all numbers are exact."""
    side, frame, pad, strict, _ = PEERS[name]
    sx, sy = (1.0, 1.0) if frame is None else (2.0, 4.0)
    width, height = (128, 64) if frame is None else (frame[0] // 2, frame[1] // 4)
    truth = torch.tensor([[40.0, 8.0], [16.0, 30.0], [24.0, 16.0], [32.0, 28.0]])
    other = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0], [7.0, 19.0]])  # smaller, as is its box
    box, other_box = (4.0, 2.0, 52.0, 30.0), (0.0, 0.0, 20.0, 21.0)
    if rule == "img":
        d = float(max(frame or (width, height)))
    elif willow:
        span = max((40 - 16) * sx, (30 - 8) * sy)
        d = span if pad is None else max(40 * sx, 30 * sy) - pad
        box = (16.0, 8.0, 40.0, 30.0)
    else:
        d = max(48 * sx, 28 * sy)
    ends, same = [(truth, box, (width, height)), (other, other_box, (31, 47))], ANSWER[name] == side
    if not same:  # d is of the image that is asked from; as large as the one that is compared in
        ends[1] = (other, other_box, (width, height))
    if side == "trg":
        ends.reverse()
    (src_kps, src_box, src_size), (trg_kps, trg_box, trg_size) = ends
    pair = KeypointPair(0, 1, src_kps, trg_kps, "a", src_box, trg_box)
    name_of_set = "PF-WILLOW" if willow else "SPair-71k test"
    keypoints = KeypointSet(name_of_set, Pictures([src_size, trg_size]), [pair])
    dx, dy = 0.125 * d / sx, 0.125 * d / sy
    for factor, expected in ((1.0, not strict), (1 - 2**-12, True), (1 + 2**-12, False)):
        pred = (truth if same else other) + factor * torch.tensor([[dx, 0], [-dx, 0], [0, dy], [0, -dy]])
        table = score([pred], PROTOCOLS[name](keypoints, rule), (0.125, 0.0625, 0.25), rule, strict)
        assert table[rule]["per_point"] == [100.0 * expected, 0.0, 100.0], factor


# ------------------------------------------------------------------------------------------------------------
# The real PF-WILLOW


@pytest.fixture(scope="module")
def willow():
    if not os.environ.get("COCR_DATA"):
        pytest.skip("set COCR_DATA to a folder with PF-WILLOW to run this")
    return pfwillow(str(Path(os.environ["COCR_DATA"], "PF-WILLOW")))


def inflation(keypoints: KeypointSet, name: str, side: int, pad: int) -> list[float]:
    """Threshold of a protocol over the longer side of the points' box in the squashed image, by image."""
    found = {}
    for pair, task in zip(keypoints.pairs, PROTOCOLS[name](keypoints, "bbox").pairs, strict=True):
        if task.trg not in found:
            kps = pair.src_kps if PROTOCOLS[name].swap else pair.trg_kps
            points = squash(kps.tolist(), keypoints.size(task.trg), side, side)
            assert task.d == pytest.approx(padded_longer_side(points, pad), rel=1e-5)
            found[task.trg] = task.d / longer_side(points)
    return list(found.values())


def test_padding_inflates_the_threshold_of_real_pfwillow_by_1_28(willow):
    ratios = inflation(willow, "cats", 256, -1)
    assert len(ratios) == 100
    figures = statistics.mean(ratios), statistics.median(ratios), min(ratios), max(ratios)
    assert figures == pytest.approx((1.283, 1.207, 1.056, 2.165), abs=6e-4)
    assert statistics.mean(inflation(willow, "chm", 240, -2)) == pytest.approx(1.289, abs=6e-4)
    assert statistics.mean(inflation(willow, "vat", 512, -1)) < 1.283  # coordinates grow, padding does not


@pytest.mark.parametrize("name", PEERS)
def test_all_pairs_of_real_pfwillow_are_scored_as_the_peer_scores_them(willow, name):
    torch.manual_seed(0)
    assert_scored_as_the_peer(willow, name, "bbox")


# ------------------------------------------------------------------------------------------------------------
# Prediction of what a protocol asks for


class FakeCascade:
    """Reads an image's number from its red value; moves points by a known rule of both numbers."""

    cfg, backbone = SimpleNamespace(size=32), SimpleNamespace(patch=8)

    def features(self, images: torch.Tensor) -> Features:
        numbers = ((images[:, 0] * 0.229 + 0.485).mean((1, 2)) * 255 / 20).round().view(-1, 1)
        return Features(numbers[:, None].expand(-1, 15, 2), numbers, torch.ones(len(images), 3, 5))

    def transfer(self, src: Features, trg: Features, points: torch.Tensor, method: str) -> torch.Tensor:
        return 0.9 * points + 0.1 * src.token[:, None] - 0.07 * trg.feat[:, :1]


@pytest.fixture
def numbered():
    """Six images of different shapes, image k of red value 20 k, and five pairs."""
    images = SimpleNamespace(size=SIZES.__getitem__)
    images.load = lambda k: (Image.new("RGB", SIZES[k], (20 * k, 90, 10)), None)
    pairs = []
    for (src, trg), n in zip([(0, 1), (1, 3), (3, 0), (4, 5), (5, 0)], (3, 6, 1, 2, 5)):
        kps = [torch.rand(n, 2) * torch.tensor(SIZES[index]) for index in (src, trg)]
        pairs.append(KeypointPair(src, trg, *kps, "thing", (0.0, 0.0, 30.0, 20.0), (0.0, 0.0, 30.0, 20.0)))
    return KeypointSet("numbered", images, pairs)


def moved_by_hand(query: int, answer: int, points: list) -> torch.Tensor:
    """What FakeCascade makes of points: pixels of one image to cells, moved, to pixels of the other."""
    (h, w), (ws, hs), (wt, ht), found = (3, 5), SIZES[query], SIZES[answer], []
    for x, y in points:
        cx, cy = (x + 0.5) * w / ws - 0.5, (y + 0.5) * h / hs - 0.5
        cx, cy = (0.9 * c + 0.1 * query - 0.07 * answer for c in (cx, cy))
        found.append([(cx + 0.5) * wt / w - 0.5, (cy + 0.5) * ht / h - 0.5])
    return torch.tensor(found)


def predicted(keypoints: KeypointSet, name: str) -> list[torch.Tensor]:
    return predict(FakeCascade(), PROTOCOLS[name](keypoints), ["far"], batch=3, quiet=True)["far"]


def test_a_protocol_that_swaps_has_target_points_found_in_the_source(numbered):
    both = zip(numbered.pairs, predicted(numbered, "densematching"), predicted(numbered, "cats"), strict=True)
    for pair, plain, cut in both:
        expected = moved_by_hand(pair.trg, pair.src, pair.trg_kps.tolist())
        torch.testing.assert_close(plain, expected, atol=1e-3, rtol=0)
        sx, sy = (256 / side for side in SIZES[pair.trg])
        whole = [(int(x * sx) / sx, int(y * sy) / sy) for x, y in pair.trg_kps]
        torch.testing.assert_close(cut, moved_by_hand(pair.trg, pair.src, whole), atol=1e-3, rtol=0)
        assert not torch.equal(plain, cut)


def test_protocols_of_one_direction_share_their_predictions(numbered):
    forward = ("target", "padded", "dhpf", "chm", "mmnet", "geoaware", "sd4match", "sd4match-ori")
    back = ("densematching", "ncnet")
    for names in (forward, back, ("cats", "scorrsan")):
        found = [predicted(numbered, name) for name in names]
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def run_peers(monkeypatch, tmp_path):
    """The program in this process and an empty folder, on a shapes test set of two images a class."""
    monkeypatch.setitem(SHAPE_SPLITS, "test", (200_000, 2))
    monkeypatch.chdir(tmp_path)
    return lambda *args: peers.main(["--dataset", "shapes", "--device", "cpu", *map(str, args)])


def test_protocols_are_scored_one_after_another_each_under_its_own_header(run_peers, capsys, tmp_path):
    names = ["cats", "proposalflow", "mmnet", "actr", "sd4match", "cats"]
    run_peers("--baseline", "nn", "--protocol", *names, "--thres", "img", "--json", tmp_path / "out.json")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("protocol ")] == [
        "protocol cats: target to source, d of the source, squashed to 256x256, <= alpha d",
        "protocol proposalflow: source to target, d of the target, own pixels, < alpha d",
        "protocol mmnet: source to target, d of the target, squashed to 320x224, <= alpha d",
        "protocol actr: source to target, d of the source, squashed to 512x512, <= alpha d",
        "protocol sd4match: source to target, d of the target, squashed to 768x768, <= alpha d",
    ]
    # proposalflow, mmnet and sd4match ask for the same points
    assert sum("pairs/s" in line for line in lines) == 3
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    cascade = Cascade(Config(**PRESETS["quick"])).eval()
    assert list(scores) == names[:5]
    for name, table in scores.items():
        asked = PROTOCOLS[name](shapes_pairs("test"), "img")
        expected = score(predict(cascade, asked, ["nn"], quiet=True)["nn"], asked, rule="img")["img"]
        assert list(table["nn"]) == ["img"] and table["nn"]["img"]["per_image"] == expected["per_image"]
    assert scores["cats"] != scores["mmnet"]


def test_three_processes_write_exactly_what_one_writes(tmp_path):
    """200 pairs: three do not divide them, and cut categories in two. Each table is printed once."""
    args = ["experiments.peers", "--dataset", "shapes", "--device", "cpu", "--baseline", "nn", "hough"]
    several = ["torch.distributed.run", "--standalone", "--nproc_per_node=3", "-m"]
    said = []
    for name, launcher in (("one", []), ("several", several)):
        line = [sys.executable, "-m", *launcher, *args, "--protocol", "target", "cats", "--json"]
        done = subprocess.run([*line, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(re.sub(r"in .* s, .* pairs/s", "", done.stdout))
    assert (tmp_path / "one").read_text() == (tmp_path / "several").read_text()
    assert said[0] == said[1] and said[0].count("hough on shapes test: 200 pairs") == 2
    assert list(json.loads((tmp_path / "one").read_text())["scores"]["cats"]) == ["nn", "hough"]


def test_padded_rules_are_named_so_on_pfwillow_alone(capsys):
    for name, rule, protocol, shown in (
        ("PF-WILLOW", None, "target", "bbox"),
        ("PF-WILLOW", None, "padded", "bbox-padded"),
        ("PF-WILLOW", "bbox", "dhpf", "bbox-padded"),
        ("PF-WILLOW", "img", "dhpf", "img"),
        ("PF-WILLOW", "bbox", "densematching", "bbox"),
        ("PF-WILLOW", None, "actr", "bbox-padded"),
        ("PF-WILLOW", None, "sd4match", "bbox"),
        ("PF-PASCAL test", "bbox", "dhpf", "bbox"),
        ("shapes test", None, "padded", "bbox"),
    ):
        asked = PROTOCOLS[protocol](scattered(name, boxes=True), rule)
        found = {"nn": [pair.trg_kps for pair in asked.pairs]}
        args = SimpleNamespace(alphas=ALPHAS, rule=rule)
        assert list(peers.score_as(protocol, found, asked, args, 64)["nn"]) == [rule or "bbox"]
        lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "per image" in line]
        assert lines == [shown], (name, rule, protocol)


def test_an_unknown_protocol_is_named(run_peers, capsys):
    with pytest.raises(SystemExit):
        run_peers("--baseline", "nn", "--protocol", "dogs")
    assert "--protocol" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def cats(tmp_path) -> Cats:
    """CATs, and its checkpoint as best.pt in the folder."""
    torch.manual_seed(0)
    cats = Cats(FinetuneConfig(backbone="random_vit8", levels="0", size=64, projection=8)).eval()
    state = {"program": PROGRAM, "model": cats.state_dict(), "config": dataclasses.asdict(cats.cfg)}
    torch.save(state | {"step": 0}, tmp_path / "best.pt")
    return cats


def test_a_cats_checkpoint_is_scored_by_every_protocol(run_peers, cats, tmp_path):
    names, place = ["cats", "target"], tmp_path / "out.json"
    run_peers("--checkpoint", tmp_path / "best.pt", "--protocol", *names, "--json", place)
    report = json.loads(place.read_text())
    assert (report["backbone"], report["levels"], report["size"]) == ("random_vit8", "0", 64)
    assert list(report["scores"]) == names
    for name in names:
        asked = as_cats_reads(PROTOCOLS[name](shapes_pairs("test")), 64)
        expected = score(predict(cats, asked, ["cats"], quiet=True)["cats"], asked)
        found = report["scores"][name]["cats"]["bbox"]["per_image"]
        assert found == pytest.approx(expected["bbox"]["per_image"], abs=1e-3)


@pytest.mark.parametrize("readings", [[], ["cats"], ["kernel"], ["kernel", "cats"]])
def test_cats_is_read_as_asked(run_peers, cats, tmp_path, capsys, readings):
    """By default by its own soft-argmax; each reading has a table of its own."""
    place, asked = tmp_path / "out.json", ["--reading"] * bool(readings) + readings
    run_peers("--checkpoint", tmp_path / "best.pt", "--protocol", "cats", "padded", *asked, "--json", place)
    said, tables = capsys.readouterr().out, json.loads(place.read_text())["scores"]
    assert list(tables) == ["cats", "padded"]
    for name, table in tables.items():
        pairs = as_cats_reads(PROTOCOLS[name](shapes_pairs("test")), 64)
        found = predict(cats, pairs, ["cats", "kernel"], quiet=True)
        expected = {method: score(places, pairs)["bbox"]["per_image"] for method, places in found.items()}
        assert expected["cats"] != pytest.approx(expected["kernel"], abs=0.1)
        assert list(table) == (readings or ["cats"])
        for method, block in table.items():
            assert block["bbox"]["per_image"] == pytest.approx(expected[method], abs=1e-3)
    for method in ("cats", "kernel"):
        assert said.count(f"\n{method} on shapes test: 20 pairs") == 2 * (method in (readings or ["cats"]))


def test_readings_are_refused_for_what_is_not_cats(run_peers, tmp_path, capsys):
    torch.save({"model": {}, "config": {}, "program": "train.py"}, tmp_path / "last.pt")
    words = "--reading is of CATs: give --checkpoint of experiments.finetune"
    for others in ([], ["--baseline", "nn"], ["--checkpoint", tmp_path / "last.pt"]):
        for reading in (["cats"], ["kernel"], ["kernel", "cats"]):
            with pytest.raises(ValueError) as error:
                run_peers(*others, "--reading", *reading)
            assert str(error.value) == words
    with pytest.raises(SystemExit):
        run_peers("--reading", "nn")
    assert "--reading" in capsys.readouterr().err.splitlines()[-1]
    line = [sys.executable, "-m", "experiments.peers", "--dataset", "shapes", "--reading", "kernel"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (1, f"error: {words}\n", "")


def test_options_of_a_cascade_are_refused_for_cats(run_peers, tmp_path):
    torch.save({"model": {}, "config": {}, "program": PROGRAM}, tmp_path / "best.pt")
    for option in (["--stage", "pixel"], ["--baseline", "nn"], ["--baseline"], ["--size", "64"], ["--dense"]):
        with pytest.raises(ValueError, match=f"holds CATs: {option[0]} does not apply"):
            run_peers("--checkpoint", tmp_path / "best.pt", *option)


# ------------------------------------------------------------------------------------------------------------
# The paper's rows


@pytest.mark.parametrize(
    ("dataset", "table", "method", "values"),
    [
        ("pfwillow", "Table 1", "NCNet (PF-P.)", [52.7, 84.3]),
        ("pfwillow", "Table 1", "Ours (FImN.)", [57.6, 85.3]),
        ("pfpascal", "Table 1", "Ours (PF-P.)", [58.3, 86.2]),
        ("pfpascal", "Table 2", "ProposalFlow", [31.4, 62.5, 79.5]),
        ("pfwillow", "Table 2", "DHPF (Weak-sup.)", [50.2, 80.2, 91.1]),
        ("pfwillow", "Table 2", "DHPF (Sup.)", [49.5, 77.6, 89.1]),
        ("spair", "Table 2", "DHPF (Weak-sup.)", [27.7]),
        ("spair", "Table 2", "CATs+Ours", [54.6]),
        ("spair", "Table 2", "VAT+Ours", [60.3]),
        ("pfwillow", "S Table 1", "CATs+SemiMatch", [82.1, 92.1]),
        ("pfpascal", "S Table 2", "SCorrSAN+Ours", [93.4, 96.8]),
    ],
)
def test_the_papers_rows_are_printed(capsys, dataset, table, method, values):
    print_paper(dataset)
    lines = capsys.readouterr().out.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"{table}  "))
    (row,) = (line for line in lines_of_table(lines, start) if line[2:30].strip() == method)
    assert [float(v) for v in row[30:].split()] == values
    alphas = {1: [0.1], 2: [0.1, 0.15] if table[0] == "S" else [0.05, 0.1], 3: [0.05, 0.1, 0.15]}[len(values)]
    assert [float(v) for v in lines[start][30:].split()] == alphas


def lines_of_table(lines: list[str], start: int) -> list[str]:
    """The indented lines behind a title."""
    count = next((k for k, line in enumerate(lines[start + 1 :]) if not line.startswith("  ")), len(lines))
    return lines[start + 1 :][:count]


@pytest.mark.parametrize(
    ("table", "method", "first", "last", "everything"),
    [
        ("Table 3", "VAT+Ours", [65.2, 50.1, 81.0], 74.5, 60.3),
        ("Table 3", "CATs+Ours", [58.8, 44.6, 71.7], 73.9, 54.5),
        ("S Table 4", "SCorrSAN", [57.1, 40.3, 78.3], 69.7, 55.3),
    ],
)
def test_the_papers_rows_by_class_are_printed(capsys, table, method, first, last, everything):
    print_paper("spair")
    lines = capsys.readouterr().out.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(f"{table}  "))
    columns = lines[start][30:].split()
    assert columns[:3] == ["aeropl", "bicycl", "bird"] and len(columns) == 19
    (row,) = (line for line in lines_of_table(lines, start) if line[2:30].strip() == method)
    values = [float(v) for v in row[30:].split()]
    assert (values[:3], values[-2], values[-1]) == (first, last, everything) and len(values) == 19


def test_every_row_of_the_papers_tables_parses_and_stands_once():
    with open(ROOT / "docs" / "paper_tables.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["table", "method", "dataset", "class", "alpha", "pck"]
    keys = Counter(tuple(row[c] for c in ("table", "method", "dataset", "class", "alpha")) for row in rows)
    assert max(keys.values()) == 1 and all(all(key) for key in keys)
    for row in rows:
        assert row["dataset"] in ("pfpascal", "pfwillow", "spair")
        assert float(row["alpha"]) in (0.05, 0.1, 0.15)
        assert 5 < float(row["pck"]) < 100 and re.fullmatch(r"\d+\.\d", row["pck"])
    # 4 methods on 2 benchmarks; 17 on 3, the first not on SPair-71k; 15, 3 and 2 on 18 classes and all
    sizes = {"Table 1": 16, "Table 2": 17 * 7 - 1, "Table 3": 15 * 19, "S Table 1": 15, "S Table 2": 10}
    assert Counter(row["table"] for row in rows) == sizes | {"S Table 3": 57, "S Table 4": 38}
    assert len({row["class"] for row in rows}) == 19


def test_a_set_the_paper_does_not_know_has_no_rows(run_peers, capsys):
    run_peers("--baseline", "nn", "--compare")
    out = capsys.readouterr().out
    assert "The paper has no rows on these pairs" in out and "Table" not in out


def test_our_numbers_stand_below_the_papers_of_the_same_column(capsys):
    print_paper("pfwillow", {"pixel, cats": {("all", "0.1"): 59.54, ("all", "0.2"): 80.0}})
    lines = capsys.readouterr().out.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("Table 2")))
    assert lines[table].split()[2:] == ["0.05", "0.1", "0.15"]
    below = next(line for line in lines[table:] if "here" in line)
    assert below.split() == ["here:", "pixel,", "cats", "-", "59.5", "-"]
