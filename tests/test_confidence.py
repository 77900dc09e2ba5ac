"""How sure matches are: evidence, its logistic function, the fit and the report."""

import itertools
import json
import math
import runpy
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import Pictures
from torch import Tensor

import evaluate
import support.confidence
from data import KeypointPair, KeypointSet, cells_to_pixels, pixels_to_cells, prepare
from evaluate import predict
from experiments import calibrate
from modules import Features, cosine_volume, transfer_keypoints
from support.confidence import CLOSE, FITTED, calibration, confidence, evidence, report
from support.dense import Dense
from support.ours import FACING_TEMPERATURE, Reading, best_reading, both_faces
from support.shapes import SHAPE_SPLITS, draw_shape
from train import Cascade, Config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------
# Evidence


def between(table: np.ndarray, x: float, y: float) -> np.ndarray:
    """A table (H, W, ...) read bilinearly at (x, y) in cells."""
    (h, w), found = table.shape[:2], 0.0
    for i, j in itertools.product(*((math.floor(v), math.floor(v) + 1) for v in (y, x))):
        weight = (1 - abs(y - i)) * (1 - abs(x - j))
        found = found + weight * table[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
    return found


def sent(volume: np.ndarray, x: float, y: float) -> tuple[float, float]:
    """Where a volume (Hs, Ws, Ht, Wt) sends a point: a soft maximum under a Gaussian around the maximum."""
    row = between(volume, x, y)
    top = np.unravel_index(row.argmax(), row.shape)
    total = u = v = 0.0
    for (i, j), value in np.ndenumerate(row):
        weight = math.exp(value / row.max() / 0.05 - ((i - top[0]) ** 2 + (j - top[1]) ** 2) / 2 / 2.5**2)
        total, u, v = total + weight, u + weight * j, v + weight * i
    return u / total, v / total


def score_of(volume: np.ndarray, mask_s: np.ndarray, mask_t: np.ndarray) -> float:
    """Mean soft maximum of foreground cells over the other foreground, both ways summed."""
    total = 0.0
    for table, own, other in ((volume, mask_s, mask_t), (volume.transpose(2, 3, 0, 1), mask_t, mask_s)):
        soft = [FACING_TEMPERATURE * math.log(np.exp(table[y, x][other] / FACING_TEMPERATURE).sum())
                for y, x in zip(*own.nonzero())]
        total += sum(soft) / len(soft)
    return total


@pytest.mark.parametrize("places", [[[2.0, 3.0], [0.0, 5.0]], [[1.3, 2.6], [2.9, 0.45]]])
def test_evidence_equals_loops(places):
    """Grids of 4 x 7 and 6 x 5 cells; a point in a cell's centre and one between cells."""
    volume, near = torch.rand(2, 2, 4, 7, 6, 5)
    mask_s, mask_t = torch.rand(2, 4, 7) > 0.4, torch.rand(2, 6, 5) > 0.4
    points = torch.tensor([[[5.0, 2.0], [1.6, 0.25]], [[0.0, 3.0], [3.5, 1.8]]])
    places = torch.tensor([places, places[::-1]])
    found = evidence(Reading(volume, near, torch.rand(2)), mask_s, mask_t, points, places)
    assert found.shape == (2, 2, 4)
    for b, n in itertools.product(range(2), range(2)):
        (x, y), (u, v), (reading, consensus) = points[b, n].tolist(), places[b, n].tolist(), (
            z[b].double().numpy() for z in (volume, near))
        row = between(reading, x, y)
        expected = [(between(row, u, v) - row.mean()) / row.std(ddof=1)]
        for table in (reading, consensus):
            off = math.dist(sent(table.transpose(2, 3, 0, 1), u, v), (x, y))
            expected.append(math.exp(-((off / (CLOSE * 7)) ** 2) / 2))
        expected.append(score_of(consensus, *(mask[b].numpy() for mask in (mask_s, mask_t))))
        np.testing.assert_allclose(found[b, n], expected, rtol=1e-3, atol=1e-4)


def test_a_loop_that_closes_is_evidence_of_one_and_one_far_off_of_none():
    """One-hot volumes: the reading moves a cell to the right, the consensus moves it on by three cells."""
    reading, consensus = torch.zeros(2, 1, 5, 9, 5, 10)
    for y, x in itertools.product(range(5), range(9)):
        reading[0, y, x, y, x + 1] = consensus[0, y, x, y, (x + 4) % 10] = 1.0
    points = torch.tensor([[[4.0, 2.0], [6.0, 1.0]]])
    masks = torch.ones(1, 5, 9, dtype=torch.bool), torch.ones(1, 5, 10, dtype=torch.bool)
    places = points + torch.tensor([1, 0])
    found = evidence(Reading(reading, consensus, torch.zeros(1)), *masks, points, places)
    peak = (1 - 1 / 50) / math.sqrt(1 / 50)  # of a row with a one among 49 zeros, in standard deviations
    far = math.exp(-((3 / (CLOSE * 9)) ** 2) / 2)
    for row in found[0].tolist():
        assert row[:3] == pytest.approx([peak, 1.0, far], rel=1e-3, abs=1e-4)
    constant = Reading(torch.ones_like(reading), consensus, torch.zeros(1))
    assert evidence(constant, *masks, points, points)[0, :, 0].tolist() == pytest.approx([0, 0], abs=0.5)


@pytest.mark.parametrize("away", [False, True])
def test_the_consensus_of_a_reading_is_in_the_targets_own_cells_whichever_way_it_faces(away):
    feat = torch.randn(1, 5, 8, 64)
    own, turned = (Features(x.flatten(1, 2), x.mean((1, 2)), torch.ones(x.shape[:3]))
                   for x in (feat, feat.flip(2)))  # fmt: skip
    src = own._replace(mirror=turned)
    trg = turned._replace(mirror=own) if away else src
    reading = best_reading(lambda s, t: cosine_volume(s.feat, t.feat, s.grid, t.grid), src, trg, smooth=True)
    assert float(reading.away) == pytest.approx(float(away), abs=0.05)
    for volume in (reading.near, reading.volume):
        for y, x in itertools.product(range(1, 4), range(1, 7)):
            assert divmod(int(volume[0, y, x].argmax()), 8) == (y, 7 - x if away else x)


@pytest.mark.parametrize("dense", [True, False])
def test_confidence_is_the_logistic_function_of_the_fitted_sum(dense):
    found = torch.randn(3, 5, 4) * torch.tensor([3, 0.5, 0.5, 0.7])
    weights, bias = FITTED[dense]
    sure = confidence(found, dense)
    assert sure.shape == (3, 5)
    for row, c in zip(found.flatten(0, 1).tolist(), sure.flatten().tolist()):
        odds = math.exp(bias + sum(w * e for w, e in zip(weights, row)))
        assert c == pytest.approx(odds / (1 + odds), abs=1e-5)
    assert len(weights) == 4 and min(weights) > 0 > bias  # all of it is in favour


# ------------------------------------------------------------------------------------------------------------
# Calibration


def test_confidences_fall_into_tenths_the_last_of_which_holds_one():
    edges = [k / 10 for k in range(11)]
    sure = torch.tensor([*edges, 0.0, 1.0, 0.0999, 0.1001, 0.95, *torch.rand(200).tolist()])
    right = torch.rand(len(sure)) < sure
    expected = [[0, 0] for _ in range(10)]
    for c, good in zip(sure.tolist(), right.tolist()):
        k = next(k for k in reversed(range(10)) if c > k / 10 - 1e-7)
        expected[k][0] += 1
        expected[k][1] += good
    assert calibration(sure, right) == [tuple(row) for row in expected]
    assert calibration(torch.tensor(edges), torch.ones(11, dtype=torch.bool)) == [(1, 1)] * 9 + [(2, 2)]
    assert calibration(torch.ones(3), torch.tensor([True, False, False])) == [(0, 0)] * 9 + [(3, 1)]


def test_the_report_prints_and_draws_how_many_are_right(monkeypatch, capsys, tmp_path):
    """Confidences of .05, .55, .85 and .95, of 4, 10, 5 and 1 points."""
    monkeypatch.setattr(support.confidence, "FITTED", {True: ((1.0, 0.0, 0.0, 0.0), 0.0)})
    drawn, draw = [], support.confidence.draw_curve
    monkeypatch.setattr(support.confidence, "draw_curve",
                        lambda *args, **more: drawn.append((args, more)) or draw(*args, **more))
    sure = torch.tensor([0.05] * 4 + [0.55] * 10 + [0.85] * 5 + [0.95])
    found = torch.cat([torch.logit(sure)[:, None], torch.randn(20, 3)], 1)
    right = torch.tensor([True] + [False] * 3 + [True] * 6 + [False] * 4 + [True] * 4 + [False] + [True])
    given = {"best": found, "best-pixel": found[:3]}
    told = report(given, {"best": right, "best-pixel": right[:3]}, True, "a set", tmp_path)
    assert capsys.readouterr().out.splitlines() == """
confidence of best on a set: right within 0.10 of the longer side of the target's box
  0.0 to 0.1       4 points   25.0 % right
  0.1 to 0.2       0 points
  0.2 to 0.3       0 points
  0.3 to 0.4       0 points
  0.4 to 0.5       0 points
  0.5 to 0.6      10 points   60.0 % right
  0.6 to 0.7       0 points
  0.7 to 0.8       0 points
  0.8 to 0.9       5 points   80.0 % right
  0.9 to 1.0       1 points  100.0 % right
  over 0.5: 80 % of 20 points, 68.8 % right
  over 0.8: 30 % of 20 points, 83.3 % right

confidence of best-pixel on a set: right within 0.10 of the longer side of the target's box
  0.0 to 0.1       3 points   33.3 % right
  0.1 to 0.2       0 points
  0.2 to 0.3       0 points
  0.3 to 0.4       0 points
  0.4 to 0.5       0 points
  0.5 to 0.6       0 points
  0.6 to 0.7       0 points
  0.7 to 0.8       0 points
  0.8 to 0.9       0 points
  0.9 to 1.0       0 points
  over 0.5: 0 % of 3 points
  over 0.8: 0 % of 3 points""".splitlines()
    assert told["best"] == {"dense": True, "evidence": found.tolist(), "right": right.tolist()}
    assert len(told["best-pixel"]["right"]) == 3 and json.dumps(told)
    (((curves, middles, *_), more),) = drawn
    assert curves["best"] == [None] * 5 + [60.0] + [None] * 4  # of less than ten points nothing is drawn
    assert middles == pytest.approx([0.05 + k / 10 for k in range(10)]) and more == {"diagonal": True}
    assert [path.name for path in tmp_path.iterdir()] == ["confidence.png"]
    with Image.open(tmp_path / "confidence.png") as page:
        assert page.size == draw(curves, middles, "matches on a set", "confidence",
                                 "% right within 0.10 of the box", True).size
    report(given, {"best": right, "best-pixel": right[:3]}, True, "a set", None)
    assert len(drawn) == 1


# ------------------------------------------------------------------------------------------------------------
# The fit

TRUTH, BIAS = (0.6, 1.5, 0.8, 3.0), -4.0


def observed(count: int, weights: tuple[float, ...] = TRUTH, bias: float = BIAS) -> tuple[Tensor, Tensor]:
    """Evidence (n, 4) of different scales and places, and which matches are right, drawn by a known model."""
    rows = [2 + 1.5 * torch.randn(count), *torch.rand(2, count), 0.5 + 0.2 * torch.randn(count)]
    found = torch.stack(rows, 1)
    return found, torch.rand(count) < torch.sigmoid(found @ torch.tensor(weights) + bias)


def test_the_fit_finds_the_weights_that_matches_were_drawn_by():
    weights, bias = calibrate.fit(*zip(observed(60_000), observed(40_000)))
    assert weights.tolist() == pytest.approx(TRUTH, abs=0.15) and float(bias) == pytest.approx(BIAS, abs=0.15)


def test_the_fit_is_where_the_likelihood_is_highest_and_weighs_sets_alike():
    (large, yes), (small, no) = observed(900), observed(60, (0.1, 3.0, 0.0, 1.0), -1.0)
    weights, bias = calibrate.fit([large, small], [yes, no])
    again = calibrate.fit([large, small.repeat(15, 1)], [yes, no.repeat(15)])
    for one, two in zip((weights, bias), again):
        torch.testing.assert_close(one, two, rtol=0.01, atol=0.01)
    pooled = calibrate.fit([torch.cat([large, small])], [torch.cat([yes, no])])
    assert float((pooled[0] - weights).abs().max()) > 0.3

    def likelihood(weights: Tensor, bias: Tensor) -> float:
        total = 0.0
        for some, good in ((large, yes), (small, no)):
            p = torch.sigmoid(some.double() @ weights + bias)
            total += float(torch.where(good, p, 1 - p).log().mean()) / 2
        return total

    best = likelihood(weights, bias)
    for k, step in itertools.product(range(4), (-0.3, 0.3)):
        moved = weights.clone()
        moved[k] += step
        assert likelihood(moved, bias) < best
    assert likelihood(weights, bias + 0.1) < best > likelihood(weights, bias - 0.1)


def written(path, *sets: tuple[Tensor, Tensor], dense: bool = True) -> str:
    """A file as evaluate.py --confidence --json writes it, a method a set."""
    tables = {f"best{k}": {"dense": dense, "evidence": x.tolist(), "right": y.tolist()}
              for k, (x, y) in enumerate(sets)}
    path.write_text(json.dumps({"dataset": "some", "confidence": tables}))
    return str(path)


def test_calibrate_prints_the_weights_of_all_sets_of_all_files(capsys, tmp_path):
    sets = [observed(300), observed(40), observed(90)]
    calibrate.main([written(tmp_path / "a.json", *sets[:2]), written(tmp_path / "b.json", sets[2])])
    first, second = capsys.readouterr().out.splitlines()
    weights, bias = calibrate.fit(*zip(*sets))
    assert first.startswith("True: ((")
    first = first.removeprefix("True: (").removesuffix(")")
    numbers = [float(part) for part in first.replace("(", "").replace(")", "").split(", ")]
    assert numbers == pytest.approx([*weights.tolist(), float(bias)], rel=0.006)
    assert first.count("(") == 1 and first.index(")") < first.rindex(", ")
    assert second == "fitted on 430 points of 3 sets"


def test_calibrate_keeps_dense_and_whole_reading_apart(monkeypatch, tmp_path):
    files = [written(tmp_path / f"{dense}.json", observed(30), dense=dense) for dense in (True, False)]
    with pytest.raises(ValueError, match="some files were read densely and some by whole cells"):
        calibrate.main(files)


@pytest.mark.parametrize("text", [
    "not JSON", "[]", "{}", '{"scores": {}}', '{"confidence": 3}', '{"confidence": {}}',
    '{"confidence": {"best": {"evidence": [[1, 2, 3, 4]]}}}',
    '{"confidence": {"best": {"evidence": [], "right": []}}}',
    '{"confidence": {"best": {"evidence": [[1, 2, 3], [2, 3, 4]], "right": [true, false]}}}',
    '{"confidence": {"best": {"evidence": [[1, 2, 3, 4]], "right": [true, false]}}}',
    '{"confidence": {"best": {"evidence": [[1, 2, 3, "x"]], "right": [true]}}}', None,
])  # fmt: skip
def test_calibrate_names_a_file_that_evaluate_did_not_write(monkeypatch, tmp_path, text):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    line = ["calibrate", written(tmp_path / "good.json", observed(30)), str(path)]
    monkeypatch.setattr(sys, "argv", line)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("ignore")  # that the module is imported already
        runpy.run_module("experiments.calibrate", run_name="__main__")
    assert left.value.code == f"error: {path} is not what evaluate.py --confidence --json writes"


# ------------------------------------------------------------------------------------------------------------
# In evaluate.py


@pytest.fixture(scope="module")
def keypoints() -> KeypointSet:
    """Four pairs of five pictures of different shapes, of 2, 5, 1 and 3 points, in two categories."""
    sizes = [(90, 60), (64, 100), (120, 70), (80, 80), (50, 90)]
    pictures = [draw_shape("dog", k)["image"].resize(size) for k, size in enumerate(sizes)]
    rng, pairs = torch.Generator().manual_seed(1), []
    for src, trg, n, category in ((0, 1, 2, "dog"), (2, 1, 5, "dog"), (3, 4, 1, "cat"), (1, 0, 3, "dog")):
        kps = [torch.rand(n, 2, generator=rng) * torch.tensor(sizes[k]) - 0.5 for k in (src, trg)]
        pairs.append(KeypointPair(src, trg, *kps, category, *[(0.0, 0.0, 50.0, 40.0)] * 2))
    return KeypointSet("some", Pictures(pictures), pairs)


@pytest.mark.parametrize("wrap", [lambda cascade: cascade, Dense])
def test_predict_gives_places_as_without_and_the_evidence_of_each(keypoints, wrap):
    matcher = wrap(Cascade(Config(backbone="random_vit8", size=48)).eval())
    plain = predict(matcher, keypoints, ["best", "best-image"], quiet=True)
    found = predict(matcher, keypoints, ["best", "best-image"], quiet=True, sure=True)
    assert not torch.allclose(found["best"][0][:, 2:], found["best-image"][0][:, 2:], atol=0.01)
    for method in plain:
        for pair, places, row in zip(keypoints.pairs, plain[method], found[method]):
            assert row.shape == (len(pair.src_kps), 6)
            torch.testing.assert_close(row[:, :2], places)
            images = [keypoints.images.images[k] for k in (pair.src, pair.trg)]
            views = [prepare(image, None, 48, 8)[0][None] for image in images]
            src, trg = (both_faces(matcher, view) for view in views)
            with torch.no_grad():
                reading = matcher.best(src, trg, method)
                points = pixels_to_cells(pair.src_kps, images[0].size, src.grid)[None]
                cells = transfer_keypoints(reading.volume, points)
                everything = torch.ones(1, *src.grid, dtype=torch.bool)
                expected = evidence(reading, everything, everything, points, cells)[0]
            torch.testing.assert_close(row[:, 2:], expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(cells_to_pixels(cells[0], images[1].size, trg.grid), places,
                                       rtol=1e-3, atol=1e-2)  # fmt: skip


def test_evidence_is_of_the_foreground_that_the_backbone_sees(monkeypatch):
    seen, rows = [], torch.rand(1, 3, 4)
    monkeypatch.setattr(support.confidence, "evidence", lambda *args: seen.append(args) or rows)
    src, trg = (SimpleNamespace(saliency=torch.rand(1, *grid)) for grid in ((3, 4), (5, 2)))
    reading = Reading(torch.rand(1, 3, 4, 5, 2), None, None)
    matcher = SimpleNamespace(best=lambda *args: reading if args == (src, trg, "best-image") else None)
    points = torch.rand(1, 3, 2)
    found = support.confidence.transfer_with_evidence(matcher, src, trg, points, "best-image")
    ((given, mask_s, mask_t, *both),) = seen
    assert given is reading and both[0] is points and torch.equal(found, torch.cat([both[1], rows], 2))
    torch.testing.assert_close(both[1], transfer_keypoints(reading.volume, points))
    assert torch.equal(mask_s, src.saliency >= 0.5) and torch.equal(mask_t, trg.saliency >= 0.5)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """evaluate.py on two images a class of shapes, in this process and an empty folder."""
    monkeypatch.setitem(SHAPE_SPLITS, "test", (200_000, 2))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> None:
        evaluate.main(["--dataset", "shapes", "--device", "cpu", "--size", "64", *args])

    return run


def test_evaluate_counts_every_point_once_and_writes_what_calibrate_reads(run_main, capsys, tmp_path):
    run_main("--confidence", "--json", "sure.json")
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "sure.json").read_text())
    (table,) = record["confidence"].values()
    known, right = torch.tensor(table["evidence"]), torch.tensor(table["right"])
    points = int(said.partition("pairs, ")[2].split()[0])  # of the header of the scores
    assert known.shape == (points, 4) and len(right) == points > 100
    share = 100 * float(right.float().mean())
    assert share == pytest.approx(record["scores"]["target"]["best"]["bbox"]["per_point"][1], abs=0.01)
    lines = said[said.index("confidence of best on shapes test") :].splitlines()
    counts = [int(line.split()[3]) for line in lines[1:11]]
    assert sum(counts) == points and all(" points" in line for line in lines[1:11])
    assert [line.split()[0] for line in lines[1:11]] == [f"{k / 10:.1f}" for k in range(10)]
    assert counts == [count for count, _ in calibration(confidence(known, False), right)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sure.json"]
    calibrate.main(["sure.json"])
    assert f"fitted on {points} points of 1 sets" in capsys.readouterr().out
    run_main("--json", "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert plain == {key: value for key, value in record.items() if key != "confidence"}
    assert "confidence" not in capsys.readouterr().out


def test_evaluate_draws_the_curve_beside_the_pictures(run_main, tmp_path):
    run_main("--confidence", "--dense", "--visualize", "1", "--out", "sheets")
    names = {path.name for path in (tmp_path / "sheets").iterdir()}
    assert {"confidence.png", "curve.png", "fish.jpg"} <= names


def test_confidence_without_our_reading_is_refused(run_main, tmp_path):
    words = "^--confidence is of our reading: name best, best-image or best-pixel$"
    with pytest.raises(ValueError, match=words):
        run_main("--baseline", "nn", "--confidence", "--visualize", "1", "--json", "x.json")
    assert not any(tmp_path.iterdir())
