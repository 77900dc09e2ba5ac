"""PCK, its thresholds and averages, prediction, pictures and the command line of evaluate.py."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import evaluate
from data import KeypointPair, KeypointSet
from evaluate import GREEN, RED, YELLOW, correct_points, draw_matches, match_sheet, padded_extent, predict, score
from modules import Features
from shapes import SHAPE_CLASSES

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def willow():
    if not os.environ.get("COCR_DATA"):
        pytest.skip("set COCR_DATA to a folder with PF-WILLOW to run this")
    return data.pfwillow(str(Path(os.environ["COCR_DATA"], "PF-WILLOW")))


class Pictures:
    """Images in memory in the place of an ImageSet."""

    def __init__(self, images: list[Image.Image], saliency: list[Image.Image] | None = None) -> None:
        self.images, self.saliency = images, saliency or [None] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        return self.images[index], self.saliency[index]


# ----------------------------------------------------------------------------------------------------------------------
# PCK


def test_pck_threshold_is_inclusive():
    truth = torch.tensor([[10.0, 20.0]] * 3)
    pred = truth + torch.tensor([[3.0, 4.0], [3.0, -4.01], [-3.0, 3.99]])  # 5, 5.008 and 4.99 px away
    assert correct_points(pred, truth, 50.0, (0.1, 0.05, 0.11)).tolist() == [
        [True, False, True],
        [False, False, True],
        [True, False, True],
    ]


def test_correct_points_equals_a_loop():
    pred, truth, extent, alphas = torch.rand(60, 2) * 90, torch.rand(60, 2) * 90, 123.4, (0.1, 0.3, 0.6)
    found = correct_points(pred, truth, extent, alphas)
    assert found.dtype == torch.bool and found.shape == (60, 3)
    for (x, y), (u, v), row in zip(pred.tolist(), truth.tolist(), found.tolist()):
        assert row == [math.sqrt((x - u) ** 2 + (y - v) ** 2) <= alpha * extent for alpha in alphas]
    assert 0 < found[:, 0].sum() < found[:, 1].sum() < found[:, 2].sum() < 60


def padded_as_peers(kps: torch.Tensor) -> torch.Tensor:
    """CATs' threshold and its kin's: points (2, n) filled up with -1 to 40 columns, and the longer side they span."""
    padding = torch.zeros((2, 40 - kps.shape[1])) - 1
    kps = torch.cat([kps, padding], dim=1)
    return max(kps.max(1)[0] - kps.min(1)[0])


def spanned(kps: torch.Tensor) -> torch.Tensor:
    """The longer side of the box round points (2, n)."""
    return max(kps.max(1)[0] - kps.min(1)[0])


def test_padded_extent_equals_the_span_of_points_padded_with_minus_one():
    for n in (1, 2, 10, 39):
        for scale in (torch.tensor([300.0, 180.0]), torch.tensor([90.0, 250.0])):
            kps = torch.rand(n, 2) * scale
            assert padded_extent(kps) == pytest.approx(float(padded_as_peers(kps.T)), rel=1e-6)


def squashed(kps: torch.Tensor, size: tuple[int, int], side: int = 256) -> torch.Tensor:
    """Points (n, 2) of an image of size (W, H), squashed to side x side as the peers do it: (2, n)."""
    return torch.stack([kps[:, 0] * (side / size[0]), kps[:, 1] * (side / size[1])])


def test_padding_inflates_the_threshold_of_real_pfwillow_by_1_283(willow):
    ratios = {}
    for pair in willow.pairs:
        for index, kps in ((pair.src, pair.src_kps), (pair.trg, pair.trg_kps)):
            if index not in ratios:
                points = squashed(kps, willow.load(index)[0].size)
                ratios[index] = float(padded_as_peers(points) / spanned(points))
    assert len(ratios) == 100 and min(ratios.values()) > 1
    assert sum(ratios.values()) / 100 == pytest.approx(1.283, abs=0.005)


def test_both_rules_of_real_pfwillow_score_as_literal_peers_do(willow):
    """Points 5 to 50 px off: "bbox" in the target's pixels, "bbox-padded" in the squashed image with padded points."""
    predictions = [pair.trg_kps + 16 * torch.randn(10, 2) for pair in willow.pairs]
    alphas, sizes = (0.05, 0.1, 0.15), {}
    expected = {"bbox": [], "bbox-padded": []}
    for pred, pair in zip(predictions, willow.pairs):
        if pair.trg not in sizes:
            sizes[pair.trg] = willow.load(pair.trg)[0].size
        small_pred, small_truth = (squashed(kps, sizes[pair.trg]) for kps in (pred, pair.trg_kps))
        own, padded = spanned(pair.trg_kps.T), padded_as_peers(small_truth)
        assert padded_extent(small_truth.T) == pytest.approx(float(padded), rel=1e-6)
        assert padded > spanned(small_truth)
        for rule, distance, d in (
            ("bbox", (pred.T - pair.trg_kps.T).pow(2).sum(0).pow(0.5), own),
            ("bbox-padded", (small_pred - small_truth).pow(2).sum(0).pow(0.5), padded),
        ):
            expected[rule].append([100 * float((distance <= alpha * d).float().mean()) for alpha in alphas])
    table = score(predictions, willow, alphas)
    assert list(table) == ["bbox", "bbox-padded"]
    for rule, shares in expected.items():
        assert table[rule]["per_image"] == pytest.approx(torch.tensor(shares).mean(0).tolist(), abs=0.02)
    for narrow, wide in zip(table["bbox"]["per_image"], table["bbox-padded"]["per_image"]):
        assert 5 < narrow < wide - 2 < 95


def annotated(counts: list[int], categories: list[str], name: str) -> tuple[list[torch.Tensor], KeypointSet]:
    """Random pairs of the given numbers of points, targets of different shapes, and predictions some pixels off."""
    sizes = [(260, 160), (240, 300), (250, 180), (400, 170), (230, 230)]
    pairs, predictions = [], []
    for k, (n, category) in enumerate(zip(counts, categories)):
        truth = torch.rand(n, 2) * torch.tensor([190.0, 110.0]) + 30
        source, box = torch.rand(n, 2), (5.0, 10.0, 45.0, float(60 + 100 * torch.rand(())))  # higher than wide
        pairs.append(KeypointPair(0, k, source, truth, category, (0.0, 0.0, 300.0, 300.0), box))
        predictions.append(truth + (5 + 4 * k) * torch.randn(n, 2))
    return predictions, KeypointSet(name, Pictures([Image.new("RGB", size) for size in sizes]), pairs)


def test_score_averages_over_pairs_points_and_classes_as_loops_do():
    counts, categories = [3, 12, 1, 7, 12], ["dog", "car", "dog", "dog", "car"]
    predictions, keypoints = annotated(counts, categories, "PF-WILLOW")
    alphas = (0.05, 0.1, 0.2)
    table = score(predictions, keypoints, alphas)
    assert list(table) == ["bbox", "bbox-padded"]
    for rule in table:
        for a, alpha in enumerate(alphas):
            shares, by_class, right, total = [], {}, 0, 0
            for pred, pair in zip(predictions, keypoints.pairs):
                sx, sy, d = 1, 1, pair.trg_box[3] - pair.trg_box[1]
                if rule == "bbox-padded":
                    width, height = keypoints.images.images[pair.trg].size
                    sx, sy = 256 / width, 256 / height
                    d = max(max(x * sx, y * sy) for x, y in pair.trg_kps.tolist()) + 1
                hits = []
                for (x, y), (u, v) in zip(pred.tolist(), pair.trg_kps.tolist()):
                    hits.append(math.hypot((x - u) * sx, (y - v) * sy) <= alpha * d)
                shares.append(100 * sum(hits) / len(hits))
                by_class.setdefault(pair.category, []).append(shares[-1])
                right, total = right + sum(hits), total + len(hits)
            block = table[rule]
            assert block["per_image"][a] == pytest.approx(sum(shares) / len(shares), abs=1e-3)
            assert block["per_point"][a] == pytest.approx(100 * right / total, abs=1e-3)
            assert list(block["per_class"]) == ["car", "dog"]
            for category, values in by_class.items():
                assert block["per_class"][category][a] == pytest.approx(sum(values) / len(values), abs=1e-3)
    # The set tells the averages and the rules apart.
    assert abs(table["bbox"]["per_image"][1] - table["bbox"]["per_point"][1]) > 1
    assert table["bbox-padded"]["per_image"][1] > table["bbox"]["per_image"][1] + 1


def test_the_padded_rule_is_reported_for_pfwillow_alone():
    assert list(score(*annotated([4, 2], ["a", "a"], "shapes test"))) == ["bbox"]


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + p[-1:]])
def test_score_refuses_a_wrong_number_of_predictions(change):
    predictions, keypoints = annotated([4, 4, 4], ["a", "a", "b"], "shapes test")
    with pytest.raises(ValueError):
        score(change(predictions), keypoints)


# ----------------------------------------------------------------------------------------------------------------------
# Prediction

GRID = (3, 5)  # h, w of the fake backbone
BOX = (0.0, 0.0, 30.0, 20.0)


class FakeCascade:
    """Reads an image's number from its red value; moves points by a known rule of both numbers and the method."""

    cfg, backbone = SimpleNamespace(size=32), SimpleNamespace(patch=8)

    def __init__(self) -> None:
        self.seen, self.maps = [], {}

    def features(self, images: torch.Tensor, saliency: torch.Tensor | None = None) -> Features:
        assert images.shape == (1, 3, 32, 32)
        number = ((images[:, 0] * 0.229 + 0.485).mean((1, 2)) * 255 / 20).round()
        self.seen.append(int(number))
        self.maps[int(number)] = saliency
        feat = number.view(1, 1, 1).expand(1, GRID[0] * GRID[1], 2)
        return Features(feat, number.view(1, 1), torch.ones(1, *GRID))

    def transfer(self, src: Features, trg: Features, points: torch.Tensor, method: str) -> torch.Tensor:
        assert src.grid == trg.grid == GRID and len(src.feat) == len(trg.feat) == len(points)
        pull = {"near": 0.5, "far": 0.9}[method]
        return pull * points + 0.1 * src.token[:, None] - 0.07 * trg.feat[:, :1]


SIZES = [(40, 24), (31, 50), (64, 64), (20, 90), (75, 33), (48, 28)]


@pytest.fixture
def numbered():
    """Six images of different shapes, image k of red value 20 k, and seven pairs of 1 to 6 points, none of image 2."""
    images = Pictures([Image.new("RGB", size, (20 * k, 90, 10)) for k, size in enumerate(SIZES)])
    pairs = []
    for (src, trg), n in zip([(0, 1), (1, 3), (3, 0), (4, 5), (5, 0), (1, 0), (0, 4)], (3, 6, 1, 2, 5, 1, 4)):
        kps = [torch.rand(n, 2) * torch.tensor(SIZES[index]) for index in (src, trg)]
        pairs.append(KeypointPair(src, trg, *kps, "thing", BOX, BOX))
    return KeypointSet("numbered", images, pairs)


def test_predict_returns_target_pixels_through_the_sizes_of_both_images(numbered):
    predictions = predict(FakeCascade(), numbered, ["near", "far"], batch=3, quiet=True)
    assert list(predictions) == ["near", "far"]
    (h, w), pulls = GRID, {"near": 0.5, "far": 0.9}
    for method, found in predictions.items():
        assert len(found) == len(numbered)
        for pair, moved in zip(numbered.pairs, found):
            (ws, hs), (wt, ht) = SIZES[pair.src], SIZES[pair.trg]
            shift = 0.1 * pair.src - 0.07 * pair.trg
            expected = []
            for x, y in pair.src_kps.tolist():
                cx, cy = (x + 0.5) * w / ws - 0.5, (y + 0.5) * h / hs - 0.5
                cx, cy = pulls[method] * cx + shift, pulls[method] * cy + shift
                expected.append([(cx + 0.5) * wt / w - 0.5, (cy + 0.5) * ht / h - 0.5])
            torch.testing.assert_close(moved, torch.tensor(expected), atol=1e-3, rtol=0)


def test_predict_runs_the_backbone_once_for_every_image_that_is_used(numbered):
    cascade = FakeCascade()
    predict(cascade, numbered, ["near", "far"], batch=2, quiet=True)
    assert Counter(cascade.seen) == {0: 1, 1: 1, 3: 1, 4: 1, 5: 1}


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_predictions_do_not_depend_on_the_batch_size(numbered, batch):
    expected = predict(FakeCascade(), numbered, ["far"], batch=7, quiet=True)["far"]
    found = predict(FakeCascade(), numbered, ["far"], batch=batch, quiet=True)["far"]
    assert [len(p) for p in found] == [len(p.src_kps) for p in numbered.pairs]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_real_backbone_predicts_alike_in_every_batch_size():
    from train import Cascade, Config

    cascade = Cascade(Config(backbone="random_vit8", size=64)).eval()
    images = [Image.effect_noise(size, 60).convert("RGB") for size in SIZES[:3]]
    points = [torch.rand(n, 2) * torch.tensor(SIZES[src]) for src, n in ((0, 2), (1, 6), (2, 3))]
    pairs = [KeypointPair(k, (k + 1) % 3, kps, kps, "noise", BOX, BOX) for k, kps in enumerate(points)]
    keypoints = KeypointSet("noise", Pictures(images), pairs)
    methods = ["nn", "hough", "image", "region", "pixel"]
    alone, together = (predict(cascade, keypoints, methods, batch, quiet=True) for batch in (1, 3))
    for method in methods:
        for a, b in zip(alone[method], together[method]):
            torch.testing.assert_close(a, b, atol=0.02, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


BLUE, GRAY, WHITE = (20, 30, 160), (90, 90, 90), (255, 255, 255)


def test_draw_matches_joins_right_points_in_green_and_wrong_ones_in_red():
    """Source 40 x 20 px drawn six times larger, target 30 x 60 px twice; both lines are level, at y 15 and 78."""
    src, trg = Image.new("RGB", (40, 20), BLUE), Image.new("RGB", (30, 60), GRAY)
    src_kps, trg_kps = torch.tensor([[10.0, 2.0], [20.0, 12.5]]), torch.tensor([[5.0, 7.0], [12.0, 38.5]])
    truth = torch.tensor([[5.0, 7.0], [22.0, 50.0]])
    picture = draw_matches(src, trg, src_kps, trg_kps, truth, torch.tensor([True, False]), height=120)
    assert picture.size == (240 + 4 + 60, 120)
    # Ends: source 63, 15 and 123, 78; target 244 + 11, 15 and 244 + 25, 78.
    for x in (80, 150, 200, 242, 249):
        assert picture.getpixel((x, 15)) == GREEN
    for x in (140, 200, 242, 255, 262):
        assert picture.getpixel((x, 78)) == RED
    assert picture.getpixel((50, 15)) == BLUE and picture.getpixel((100, 78)) == BLUE  # before the lines begin
    assert picture.getpixel((262, 15)) == GRAY and picture.getpixel((280, 78)) == GRAY  # behind their ends
    assert picture.getpixel((242, 50)) == WHITE
    # The truth of the wrong point: a cross at 244 + 45, 101.
    for x, y in ((289, 101), (286, 101), (292, 101), (289, 98), (289, 104)):
        assert picture.getpixel((x, y)) == YELLOW
    assert picture.getpixel((296, 101)) == GRAY and picture.getpixel((289, 109)) == GRAY


def test_draw_matches_without_truth_gives_every_line_its_own_hue():
    src, trg = Image.new("RGB", (30, 60), BLUE), Image.new("RGB", (40, 20), GRAY)
    ys = torch.tensor([4.0, 19.0, 34.0, 49.0])
    src_kps, trg_kps = torch.stack([ys * 0 + 5, ys], 1), torch.stack([ys * 0 + 20, (ys + 0.5) / 3 - 0.5], 1)
    picture = draw_matches(src, trg, src_kps, trg_kps, height=120)
    assert picture.size == (60 + 4 + 240, 120)
    colours = [picture.getpixel((62, round(2 * (float(y) + 0.5)))) for y in ys]
    assert all(colour != WHITE for colour in colours)
    assert min(math.dist(a, b) for k, a in enumerate(colours) for b in colours[:k]) > 100
    assert YELLOW not in [colour for _, colour in picture.getcolors(maxcolors=100_000)]


def sheet_set(count: int) -> tuple[dict, KeypointSet]:
    """Pair k joins an image of red value 10 k, 40 x 20 or 20 x 20 px, to a gray one of 30 x 60 px."""
    sources = [Image.new("RGB", (40 if k % 2 else 20, 20), (10 * k, 0, 90)) for k in range(count)]
    images = Pictures([*sources, Image.new("RGB", (30, 60), GRAY)])
    kps, truth = torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 50.0]])
    pairs = [KeypointPair(k, count, kps, truth, "thing", BOX, BOX) for k in range(count)]
    return {"one": [truth] * count, "other": [truth + 6] * count}, KeypointSet("sheet", images, pairs)


@pytest.mark.parametrize(("count", "rows"), [(6, [0, 2, 4]), (2, [0, 1])])
def test_match_sheet_has_a_row_a_pair_spread_over_the_set_and_a_column_a_method(count, rows):
    predictions, keypoints = sheet_set(count)
    page = match_sheet(predictions, keypoints, 3)
    # At a height of 192 px the sources are 384 or 192 px wide, the targets 96.
    wide = max(384 if k % 2 else 192 for k in rows) + 4 + 96
    assert page.size == (2 * (wide + 8), 16 + 200 * len(rows))
    for column in range(2):
        for r, k in enumerate(rows):
            assert page.getpixel((column * (wide + 8) + 150, 16 + 200 * r + 20)) == (10 * k, 0, 90)


def test_match_sheet_judges_points_at_alpha_010_of_the_box():
    """A miss of 6 px along both axes is 8.5 px: beyond 0.10 x 80 px, within it for a box of 90 px."""
    predictions, keypoints = sheet_set(2)
    keypoints.pairs = [
        pair._replace(trg_box=(9.0, 5.0, 9.0 + d, 25.0)) for pair, d in zip(keypoints.pairs, (80.0, 90.0))
    ]
    page = match_sheet(predictions, keypoints, 2)
    column = 384 + 4 + 96 + 8
    # Every line starts at the source's point, 1.5 px from its corner: drawn at 14.4, 14.4.
    colours = [page.getpixel((column * c + 14, 16 + 200 * r + 14)) for c in (0, 1) for r in (0, 1)]
    assert colours == [GREEN, GREEN, RED, GREEN]


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def command(*args: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "evaluate.py", *map(str, args), "--device", "cpu"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """evaluate.py's main in this process and an empty folder, on a shapes test set of two images a class."""
    monkeypatch.setitem(data.SHAPE_SPLITS, "test", (200_000, 2))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dataset", "shapes", "--device", "cpu", *map(str, args)])
        evaluate.main()

    return run


def test_a_missing_data_set_ends_in_one_line_that_names_its_path(tmp_path):
    done = command("--dataset", "pfwillow", "--datapath", tmp_path / "nowhere", "--baseline", "nn")
    assert done.returncode not in (0, 2) and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "nowhere") in line and "Traceback" not in line


def test_a_run_without_checkpoint_and_baseline_is_refused(run_main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--checkpoint" in last and "--baseline" in last


def test_a_damaged_checkpoint_ends_in_one_line_that_names_it(tmp_path):
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 4)
    done = command("--dataset", "shapes", "--checkpoint", tmp_path / "noise.pt")
    assert done.returncode not in (0, 2) and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "noise.pt") in line


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_no_kind_of_broken_checkpoint_escapes_as_another_error(run_main, tmp_path, content):
    if content is not None:
        (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match="broken.pt") as found:
        run_main("--checkpoint", tmp_path / "broken.pt")
    assert "\n" not in str(found.value)


def test_a_foreign_file_of_tensors_is_no_checkpoint(run_main, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="foreign.pt"):
        run_main("--checkpoint", tmp_path / "foreign.pt")


def table_lines(text: str) -> dict[str, list[float]]:
    """Lines of the form "name   1.0   2.0   3.0" by name, in print order."""
    found = re.findall(r"^ *(\S.*?) {2,}((?: *\d+(?:\.\d+)?)+)$", text, re.MULTILINE)
    return {name: [float(v) for v in values.split()] for name, values in found}


def test_shapes_run_prints_its_protocol_and_writes_the_same_numbers(tmp_path):
    paths = tmp_path / "out.json", tmp_path / "sheet.png"
    pictures = ("--visualize", 3, "--out", paths[1])
    done = command("--dataset", "shapes", "--baseline", "nn", "hough", "--json", paths[0], *pictures)
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads(paths[0].read_text())
    test = data.shapes_pairs("test")
    count, points = len(SHAPE_CLASSES) * data.SHAPE_SPLITS["test"][1], sum(len(p.src_kps) for p in test.pairs)
    assert len(test) == count and report["pairs"] == count and report["alphas"] == [0.05, 0.1, 0.15]
    assert report["dataset"] == "shapes test" and list(report["scores"]) == ["nn", "hough"]
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == 3  # a table a method and the time
    for method, block in zip(("nn", "hough"), blocks):
        header = block.splitlines()[0]
        size = report["size"]
        assert header.startswith(f"{method} on shapes test: {count} pairs, {points} points, input {size}x{size}, ")
        assert "source to target, target pixels, <=" in header
        lines, found = table_lines(block), report["scores"][method]["bbox"]
        assert lines.pop("PCK (%) at alpha") == [0.05, 0.1, 0.15]
        expected = {"bbox, per image": found["per_image"], "bbox, per point": found["per_point"], **found["per_class"]}
        assert sorted(found["per_class"]) == sorted(SHAPE_CLASSES)
        assert lines == {name: [float(f"{v:.1f}") for v in values] for name, values in expected.items()}
        for a in range(3):  # classes of equal size: the mean over pairs is the mean over classes
            mean = sum(values[a] for values in found["per_class"].values()) / len(SHAPE_CLASSES)
            assert found["per_image"][a] == pytest.approx(mean, abs=1e-3)
        assert 0 < found["per_image"][0] < found["per_image"][1] < found["per_image"][2] < 100
    assert f"{count} pairs by 2 methods" in blocks[2] and f"3 pairs drawn in {paths[1]}" in blocks[2]
    assert Image.open(paths[1]).height == 16 + 3 * 200


def test_alphas_are_printed_in_full_and_scored_as_given(run_main, capsys, tmp_path):
    run_main("--baseline", "nn", "--alpha", 0.005, 0.125, 2, "--json", tmp_path / "out.json")
    assert table_lines(capsys.readouterr().out)["PCK (%) at alpha"] == [0.005, 0.125, 2]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["alphas"] == [0.005, 0.125, 2] and report["scores"]["nn"]["bbox"]["per_point"][2] == 100


def test_a_baseline_scores_alike_whatever_the_state_of_the_random_generator(run_main, tmp_path):
    found = []
    for number in (1, 2):
        torch.manual_seed(number)
        run_main("--baseline", "nn", "--json", tmp_path / "out.json")
        found.append(json.loads((tmp_path / "out.json").read_text())["scores"])
    assert found[0] == found[1]


def test_a_method_named_twice_is_scored_once(run_main, tmp_path):
    for name, methods in (("once", ["nn", "hough"]), ("twice", ["nn", "hough", "nn"])):
        run_main("--baseline", *methods, "--json", tmp_path / f"{name}.json")
    once, twice = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("once", "twice"))
    assert once == twice


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--baseline", "nn", "--batch", "0"], "--batch"),
        (["--baseline", "nn", "--batch", "-1"], "--batch"),
        (["--baseline", "nn", "--stage", "pixel"], "--stage"),
        (["--baseline", "nn", "--visualize", "-2"], "--visualize"),
        (["--baseline", "nn", "--alpha", "-0.1"], "--alpha"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(run_main, capsys, args, named):
    with pytest.raises((SystemExit, ValueError)) as stop:
        run_main(*args)
    assert named in (str(stop.value) + (capsys.readouterr().err.splitlines() or [""])[-1])


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_a_place_that_cannot_be_written_is_named_before_the_work(run_main, capsys, tmp_path, option):
    place = tmp_path / "gone" / "file.png"
    with pytest.raises((SystemExit, ValueError)) as stop:
        run_main("--baseline", "nn", "--visualize", "1", option, place)
    streams = capsys.readouterr()
    assert str(place) in str(stop.value) + streams.err and "PCK" not in streams.out


def test_a_device_that_is_not_there_is_named(run_main):
    with pytest.raises(ValueError, match="--device abacus"):
        run_main("--baseline", "nn", "--device", "abacus")


def test_a_stage_the_checkpoint_does_not_have_is_named(run_main, tmp_path):
    from train import Cascade, Config, save_checkpoint

    cascade = Cascade(Config(backbone="random_vit8", stages=1))
    save_checkpoint(tmp_path / "image.pt", cascade, torch.optim.AdamW(cascade.image.parameters()), 0)
    for stage in ("region", "pixel"):
        with pytest.raises(ValueError, match=f"--stage {stage}"):
            run_main("--checkpoint", tmp_path / "image.pt", "--stage", stage)


def test_a_checkpoint_is_scored_by_its_last_stage_beside_the_baselines(run_main, capsys, tmp_path):
    from train import Cascade, Config, save_checkpoint

    cascade = Cascade(Config(backbone="random_vit8", stages=2, size=64))
    save_checkpoint(tmp_path / "two.pt", cascade, torch.optim.AdamW(cascade.image.parameters()), 0)
    place = tmp_path / "out.json"
    run_main("--checkpoint", tmp_path / "two.pt", "--baseline", "nn", "--json", place)
    report = json.loads(place.read_text())
    assert list(report["scores"]) == ["region", "nn"] and report["size"] == 64
    assert report["checkpoint"] == str(tmp_path / "two.pt")
    assert "input 64x64" in capsys.readouterr().out
    keypoints = data.shapes_pairs("test")  # two images a class, as in the run
    expected = score(predict(cascade.eval(), keypoints, ["region"], quiet=True)["region"], keypoints)
    assert report["scores"]["region"]["bbox"]["per_image"] == pytest.approx(expected["bbox"]["per_image"], abs=1e-3)
