"""PCK, its thresholds and averages, prediction and the command line of evaluate.py."""

import csv
import errno
import json
import math
import os
import random
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluate
from data import KeypointPair, KeypointSet
from evaluate import blocks_of_pairs, correct_points, predict, score
from experiments import peers
from modules import Features
from support.dense import Dense
from support.presets import PRESETS
from support.shapes import SHAPE_CLASSES, SHAPE_SPLITS, shapes_pairs
from train import FROZEN, Cascade, Config, save

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Pictures:
    """Images in memory in the place of an ImageSet."""

    def __init__(self, images: list[Image.Image], saliency: list[Image.Image] | None = None) -> None:
        self.images, self.saliency = images, saliency or [None] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, Image.Image | None]:
        return self.images[index], self.saliency[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.images[index].size


# ------------------------------------------------------------------------------------------------------------
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


def annotated(counts: list[int], categories: list[str], name: str) -> tuple[list[torch.Tensor], KeypointSet]:
    """Random pairs of the given numbers of points, targets of different shapes, and predictions."""
    sizes = [(260, 160), (240, 300), (250, 180), (400, 170), (230, 230)]
    pairs, predictions = [], []
    for k, (n, category) in enumerate(zip(counts, categories)):
        truth, side = torch.rand(n, 2) * torch.tensor([190.0, 110.0]) + 30, float(50 + 70 * torch.rand(()))
        boxes = (0.0, 0.0, 9.0, 9.0), (10.0, 20.0, 10 + side * (1 - k % 2 / 3), 20 + side * (2 + k % 2) / 3)
        codes = {} if k == 2 else {"occlusion": k % 2, "truncation": 3}
        pairs.append(KeypointPair(0, k, torch.rand(n, 2), truth, category, *boxes, codes))
        predictions.append(truth + (5 + 4 * k) * torch.randn(n, 2))
    return predictions, KeypointSet(name, Pictures([Image.new("RGB", size) for size in sizes]), pairs)


COUNTS, CATEGORIES = [3, 12, 1, 7, 12], ["dog", "car", "dog", "dog", "car"]


@pytest.mark.parametrize("rule", ["bbox", "img"])
def test_score_averages_over_pairs_points_classes_and_codes_as_loops_do(rule):
    predictions, keypoints = annotated(COUNTS, CATEGORIES, "some")
    alphas = (0.05, 0.1, 0.2)
    table = score(predictions, keypoints, alphas, rule=rule)
    assert list(table) == [rule]
    for a, alpha in enumerate(alphas):
        shares, groups, right, total = [], {}, 0, 0
        for pred, pair in zip(predictions, keypoints.pairs):
            width, height = keypoints.images.images[pair.trg].size
            x0, y0, x1, y1 = pair.trg_box
            d = max(width, height) if rule == "img" else max(x1 - x0, y1 - y0)
            hits = []
            for (x, y), (u, v) in zip(pred.tolist(), pair.trg_kps.tolist()):
                hits.append(math.hypot(x - u, y - v) <= alpha * d)
            shares.append(100 * sum(hits) / len(hits))
            for group in [pair.category, *(f"{code} {value}" for code, value in pair.codes.items())]:
                groups.setdefault(group, []).append(shares[-1])
            right, total = right + sum(hits), total + len(hits)
        block = table[rule]
        assert block["per_image"][a] == pytest.approx(sum(shares) / len(shares), abs=1e-3)
        assert block["per_point"][a] == pytest.approx(100 * right / total, abs=1e-3)
        assert list(block["per_class"]) == ["car", "dog"]
        assert list(block["per_code"]) == ["occlusion 0", "occlusion 1", "truncation 3"]
        for group, values in groups.items():
            found = (block["per_class"] | block["per_code"])[group]
            assert found[a] == pytest.approx(sum(values) / len(values), abs=1e-3)
    assert len(groups["truncation 3"]) == 4 and len(groups["occlusion 0"]) == 2  # one pair bears no codes
    apart = [abs(i - p) for i, p in zip(table[rule]["per_image"], table[rule]["per_point"])]
    assert max(apart) > 1  # the set tells the averages apart


def test_a_set_is_scored_by_its_own_rule_unless_another_is_asked_for():
    predictions, keypoints = annotated(COUNTS, CATEGORIES, "PF-PASCAL test")
    keypoints.rule = "img"
    assert score(predictions, keypoints) == score(predictions, keypoints, rule="img") != {}
    narrow, wide = score(predictions, keypoints, rule="bbox")["bbox"], score(predictions, keypoints)["img"]
    assert narrow["per_image"][1] + 5 < wide["per_image"][1]


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + p[-1:]])
def test_score_refuses_a_wrong_number_of_predictions(change):
    predictions, keypoints = annotated([4, 4, 4], ["a", "a", "b"], "shapes test")
    with pytest.raises(ValueError):
        score(change(predictions), keypoints)


# ------------------------------------------------------------------------------------------------------------
# Prediction

GRID = (3, 5)  # h, w of the fake backbone


class FakeCascade:
    """Reads an image's number from its red value; moves points by a rule of both numbers and the method."""

    cfg, backbone = SimpleNamespace(size=32), SimpleNamespace(patch=8)

    def __init__(self) -> None:
        self.seen, self.batches, self.alive, self.most = [], [], [], 0

    def features(self, images: torch.Tensor, saliency: torch.Tensor | None = None) -> Features:
        assert images.shape[1:] == (3, 32, 32) and saliency is None
        numbers = ((images[:, 0] * 0.229 + 0.485).mean((1, 2)) * 255 / 20).round()
        self.seen += numbers.int().tolist()
        self.batches.append(len(images))
        array = numbers.view(-1, 1, 1).expand(-1, GRID[0] * GRID[1], 2).numpy().copy()
        self.alive = [(ref, n) for ref, n in self.alive if ref() is not None]
        self.alive.append((weakref.ref(array), len(images)))
        self.most = max(self.most, sum(n for _, n in self.alive))  # images whose features are in memory
        return Features(torch.from_numpy(array), numbers.view(-1, 1), torch.ones(len(images), *GRID))

    def transfer(self, src: Features, trg: Features, points: torch.Tensor, method: str) -> torch.Tensor:
        assert src.grid == trg.grid == GRID and len(src.feat) == len(trg.feat) == len(points)
        pull = {"near": 0.5, "far": 0.9}[method]
        return pull * points + 0.1 * src.token[:, None] - 0.07 * trg.feat[:, :1]


BOX = (0.0, 0.0, 30.0, 20.0)
SIZES = [(40, 24), (31, 50), (64, 64), (20, 90), (75, 33), (48, 28)]


@pytest.fixture
def numbered():
    """Six images of different shapes, image k of red value 20 k, and seven pairs, none of image 2."""
    images = Pictures([Image.new("RGB", size, (20 * k, 90, 10)) for k, size in enumerate(SIZES)])
    pairs = []
    for (src, trg), n in zip([(0, 1), (1, 3), (3, 0), (4, 5), (5, 0), (1, 0), (0, 4)], (3, 6, 1, 2, 5, 1, 4)):
        kps = [torch.rand(n, 2) * torch.tensor(SIZES[index]) for index in (src, trg)]
        pairs.append(KeypointPair(src, trg, *kps, "thing", BOX, BOX))
    return KeypointSet("numbered", images, pairs)


def moved_by_hand(query: int, answer: int, points: list, pull: float) -> torch.Tensor:
    """What FakeCascade makes of points: pixels of one image to cells, moved, to pixels of the other."""
    (h, w), (ws, hs), (wt, ht), found = GRID, SIZES[query], SIZES[answer], []
    for x, y in points:
        cx, cy = (x + 0.5) * w / ws - 0.5, (y + 0.5) * h / hs - 0.5
        cx, cy = (pull * c + 0.1 * query - 0.07 * answer for c in (cx, cy))
        found.append([(cx + 0.5) * wt / w - 0.5, (cy + 0.5) * ht / h - 0.5])
    return torch.tensor(found)


def test_predict_returns_target_pixels_through_the_sizes_of_both_images(numbered):
    predictions = predict(FakeCascade(), numbered, ["near", "far"], batch=3, quiet=True)
    assert list(predictions) == ["near", "far"]
    for method, pull in (("near", 0.5), ("far", 0.9)):
        for pair, moved in zip(numbered.pairs, predictions[method], strict=True):
            expected = moved_by_hand(pair.src, pair.trg, pair.src_kps.tolist(), pull)
            torch.testing.assert_close(moved, expected, atol=1e-3, rtol=0)


def test_predict_runs_the_backbone_once_for_every_image_that_is_used(numbered):
    cascade = FakeCascade()
    predict(cascade, numbered, ["near", "far"], batch=2, quiet=True)
    assert cascade.seen == [0, 1, 3, 4, 5] and cascade.batches == [2, 2, 1]
    cascade = FakeCascade()
    predict(cascade, numbered, ["near", "far"], batch=2, quiet=True, numbers=[3, 6])  # images 4, 5 and 0, 4
    assert cascade.seen == [0, 4, 5]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_features_of_one_category_at_a_time_are_in_memory(batch):
    """Five categories of four images, pairs of all of them mixed."""
    images = Pictures([Image.new("RGB", (30, 20 + k), (k % 12 * 20, 90, 10)) for k in range(20)])
    pairs = []
    for k in range(40):
        category, (src, trg) = k % 5, ((k // 5) % 4, (k // 5 + 1) % 4)
        kps = torch.rand(2, 2) * 20
        pairs.append(KeypointPair(4 * category + src, 4 * category + trg, kps, kps, str(category), BOX, BOX))
    cascade = FakeCascade()
    found = predict(cascade, KeypointSet("mixed", images, pairs), ["near"], batch=batch, quiet=True)["near"]
    assert len(cascade.seen) == 20 and cascade.most <= 4 + batch
    assert [len(places) for places in found] == [2] * 40


@pytest.mark.parametrize("numbers", [[6, 0, 3], [5], [], [3, 3, 1]])
def test_predictions_come_in_the_order_of_the_given_pairs(numbered, numbers):
    every = predict(FakeCascade(), numbered, ["far"], batch=2, quiet=True)["far"]
    found = predict(FakeCascade(), numbered, ["far"], batch=2, quiet=True, numbers=numbers)["far"]
    assert len(found) == len(numbers)
    assert all(torch.equal(places, every[n]) for n, places in zip(numbers, found))


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_predictions_do_not_depend_on_the_batch_size(numbered, batch):
    expected = predict(FakeCascade(), numbered, ["far"], batch=7, quiet=True)["far"]
    found = predict(FakeCascade(), numbered, ["far"], batch=batch, quiet=True)["far"]
    assert [len(p) for p in found] == [len(p.src_kps) for p in numbered.pairs]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_real_backbone_predicts_alike_in_every_batch_size():
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


# ------------------------------------------------------------------------------------------------------------
# Command line


def command(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    line = [sys.executable, *launcher, "evaluate.py", *map(str, args), "--device", "cpu"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """evaluate.py's main in this process and an empty folder, on a shapes test set of two images a class."""
    monkeypatch.setitem(SHAPE_SPLITS, "test", (200_000, 2))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> None:
        evaluate.main(["--dataset", "shapes", "--device", "cpu", *map(str, args)])

    return run


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A cascade of three stages after two steps."""
    out = tmp_path_factory.mktemp("tiny")
    options = "--size 64 --batch 3 --candidates 6 --ffn-ratio 0.25 --backbone random_vit8 --val none"
    line = [*options.split(), "--device", "cpu", "--steps", "2", "--out", str(out)]
    done = subprocess.run([sys.executable, "train.py", *line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "last.pt"


def test_a_missing_data_set_ends_in_one_line_that_names_its_path(tmp_path):
    done = command("--dataset", "pfwillow", "--datapath", tmp_path / "nowhere", "--baseline", "nn")
    assert done.returncode not in (0, 2) and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "nowhere") in line and "Traceback" not in line


def test_without_checkpoint_the_frozen_backbone_is_scored_by_its_best_reading(run_main, capsys, tmp_path):
    run_main("--json", tmp_path / "out.json")
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]["target"]
    said = capsys.readouterr().out
    (line,) = said.partition("\n\n")[0].splitlines()
    told = "frozen random_vit8", "last block", "128 px", "best", "128 principal axes", "--checkpoint FILE"
    assert all(words in line for words in told)
    assert list(scores) == ["best"] and "\nbest on shapes test: " in said
    cascade = Cascade(Config(**PRESETS["quick"])).eval()
    found = predict(cascade, shapes_pairs("test"), ["best", "nn"], quiet=True)
    expected = {m: score(places, shapes_pairs("test"))["bbox"]["per_image"] for m, places in found.items()}
    assert scores["best"]["bbox"]["per_image"] == pytest.approx(expected["best"], abs=1e-3) != expected["nn"]


def test_on_photographs_the_default_is_the_papers_backbone_and_size(monkeypatch, capsys):
    """What is built is seen in the line; its weights would be a download."""
    seen = []

    def build(cfg):
        seen.append(cfg)
        return Cascade(Config(backbone="random_vit8", size=cfg.size))

    monkeypatch.setattr(evaluate, "Cascade", build)
    args = evaluate.read_options(evaluate.shared_options(""), ["--dataset", "spair", "--device", "cpu"])
    matcher, methods = evaluate.load_methods(args)
    assert (seen[0].backbone, seen[0].size, seen[0].layer) == ("ibot_vitb16", 512, "-1")
    assert methods == ["best"] and matcher.cfg.size == 512 and "512 px" in capsys.readouterr().out
    assert args.alphas == (0.01, 0.05, 0.10) and args.split == "test" and args.rule is None


def test_a_baseline_that_names_none_is_all_readings_of_the_frozen_backbone(run_main, capsys, tmp_path):
    run_main("--baseline", "--json", tmp_path / "out.json")
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]["target"]
    assert list(scores) == list(FROZEN) == ["nn", "hough", "consensus", "best"]
    assert "--checkpoint" not in capsys.readouterr().out


def test_neither_a_data_set_nor_pairs_is_argparses_error(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--baseline", "nn"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--dataset" in last and "--pairs" in last


def test_of_a_cats_checkpoint_the_command_that_scores_it_is_printed(tmp_path):
    """Before any data are looked for."""
    torch.save({"model": {}, "config": {}, "program": "experiments.finetune"}, tmp_path / "my best.pt")
    done = command("--dataset", "spair", "--datapath", "gone", "--checkpoint", tmp_path / "my best.pt")
    (line,) = done.stderr.splitlines()
    given = f"--dataset spair --datapath gone --checkpoint '{tmp_path / 'my best.pt'}' --device cpu"
    assert done.returncode == 1 and done.stdout == ""
    assert line.endswith(f": python -m experiments.peers {given}")


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
    done = command("--dataset", "shapes", "--baseline", "nn", "hough", "--json", tmp_path / "out.json")
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads((tmp_path / "out.json").read_text())
    test = shapes_pairs("test")
    count, points = len(SHAPE_CLASSES) * SHAPE_SPLITS["test"][1], sum(len(p.src_kps) for p in test.pairs)
    assert len(test) == count and report["pairs"] == count and report["alphas"] == [0.05, 0.1, 0.15]
    assert report["dataset"] == "shapes test" and list(report["scores"]) == ["target"]
    assert list(report["scores"]["target"]) == ["nn", "hough"]
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == 3  # the time and a table a method
    for method, block in zip(("nn", "hough"), blocks[1:]):
        header, size = block.splitlines()[:2], report["size"]
        assert header[0] == f"{method} on shapes test: {count} pairs, {points} points, input {size}x{size}"
        assert header[1] == "protocol target: source to target, d of the target, own pixels, <= alpha d"
        lines, found = table_lines(block), report["scores"]["target"][method]["bbox"]
        assert lines.pop("PCK (%) at alpha") == [0.05, 0.1, 0.15]
        expected = {"bbox, per image": found["per_image"], "bbox, per point": found["per_point"]}
        expected |= found["per_class"]
        assert sorted(found["per_class"]) == sorted(SHAPE_CLASSES) and found["per_code"] == {}
        assert lines == {name: [float(f"{v:.1f}") for v in values] for name, values in expected.items()}
        for a in range(3):  # classes of equal size: the mean over pairs is the mean over classes
            mean = sum(values[a] for values in found["per_class"].values()) / len(SHAPE_CLASSES)
            assert found["per_image"][a] == pytest.approx(mean, abs=1e-3)
        assert 0 < found["per_image"][0] < found["per_image"][1] < found["per_image"][2] < 100
    assert f"{count} pairs by 2 methods" in blocks[0] and "pairs/s on cpu" in blocks[0]


def test_three_processes_write_exactly_what_one_writes(tiny_checkpoint, tmp_path):
    """200 pairs: three do not divide them, and cut categories in two."""
    args = ["--dataset", "shapes", "--checkpoint", tiny_checkpoint, "--baseline", "hough"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3")
    several = command(*args, "--json", tmp_path / "several.json", launcher=launcher)
    assert several.returncode == 0, several.stderr
    one = command(*args, "--json", tmp_path / "one.json")
    assert (tmp_path / "several.json").read_text() == (tmp_path / "one.json").read_text()
    tables = [re.sub(r"in .* s, .* pairs/s", "", done.stdout) for done in (one, several)]
    assert tables[0] == tables[1] and tables[0].count("hough on shapes test: 200 pairs") == 1  # printed once
    methods = ["pixel", "best-pixel", "hough"]
    assert list(json.loads((tmp_path / "one.json").read_text())["scores"]["target"]) == methods


# ------------------------------------------------------------------------------------------------------------
# Pictures of a run


def test_a_run_draws_a_sheet_a_class_and_the_curve_that_score_gives(run_main, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SHAPE_SPLITS, "test", (200_000, 4))
    run_main("--baseline", "nn", "hough", "--visualize", 1, "--out", "some/place")
    folder = tmp_path / "some" / "place"
    assert "some/place" in capsys.readouterr().out.splitlines()[-1]
    sheets = {f"{c}.jpg" for c in SHAPE_CLASSES}
    assert {p.name for p in folder.iterdir()} == sheets | {"curve.png", "curve.csv"}
    # A legend of 40 px, and three tiles, two in a row: each a source and two targets of 212 px in margins.
    size = (2 * 3 * 212 + 20, 48 + 2 * 251 + 20)
    assert all(Image.open(folder / f"{name}.jpg").size == size for name in SHAPE_CLASSES)
    assert Image.open(folder / "curve.png").height == 416
    title, *rows = csv.reader((folder / "curve.csv").read_text().splitlines())
    steps = [k / 100 for k in range(1, 11)]
    keypoints = shapes_pairs("test")
    found = predict(Cascade(Config(**PRESETS["quick"])).eval(), keypoints, ["nn", "hough"], quiet=True)
    assert title == ["alpha", "nn", "hough"] and [float(row[0]) for row in rows] == steps
    for column, places in enumerate(found.values(), 1):
        values = [float(row[column]) for row in rows]
        assert values == pytest.approx(score(places, keypoints, tuple(steps))["bbox"]["per_image"], abs=0.006)
        assert values == sorted(values) and values[0] < values[-1]


def test_classes_of_ones_own_pairs_may_have_any_name(monkeypatch, tmp_path):
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "a.png")
    header = "source,target,XA,YA,XB,YB,class\n"
    (tmp_path / "pairs.csv").write_text(header + "a.png,a.png,3;9,4;20,3;9,4;20,../cat/tabby\n")
    args = "--pairs pairs.csv --baseline nn --backbone random_vit8 --size 64 --device cpu --visualize 1"
    monkeypatch.chdir(tmp_path)
    evaluate.main([*args.split(), "--out", "sheets"])
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"a.png", "pairs.csv", "sheets/.._cat_tabby.jpg", "sheets/curve.csv", "sheets/curve.png"}


def test_alphas_are_printed_in_full_and_scored_as_given(run_main, capsys, tmp_path):
    run_main("--baseline", "nn", "--alpha", 0.005, 0.125, 1, "--json", tmp_path / "out.json")
    assert table_lines(capsys.readouterr().out)["PCK (%) at alpha"] == [0.005, 0.125, 1]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["alphas"] == [0.005, 0.125, 1]
    assert report["scores"]["target"]["nn"]["bbox"]["per_point"][2] > 90


@pytest.mark.parametrize("alpha", ["10", "5", "1.01", "-0.1", "nan", "inf"])
@pytest.mark.parametrize("program", [evaluate, peers])
def test_an_alpha_in_per_cent_is_refused(program, alpha):
    """10 would be right everywhere: 100.0 in every column."""
    with pytest.raises(ValueError) as error:
        program.main(["--dataset", "shapes", "--baseline", "nn", "--device", "cpu", "--alpha", "0.05", alpha])
    assert str(error.value) == f"--alpha {alpha}: a share of d from 0 to 1, such as 0.10"


def test_a_number_out_of_range_is_one_line():
    for numbers in (["--alpha", "10"], ["--size", "0"], ["--visualize", "-1"]):
        done = command("--dataset", "shapes", "--baseline", "nn", *numbers)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and line.startswith(f"error: {numbers[0]} {numbers[1]}: ")


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
    once, twice = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("once", "twice"))
    assert once["scores"] == twice["scores"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--baseline", "nn", "--stage", "pixel"], "--stage"),
        (["--baseline", "nn", "--visualize", "-2"], "--visualize -2: not negative"),
        (["--baseline", "nn", "--size", "0"], "--size 0: at least 1"),
        (["--baseline", "nn", "--size", "-128"], "--size -128: at least 1"),
        (["--baseline", "nn", "--alpha", "-0.1"], "--alpha"),
        (["--baseline", "dogs"], "--baseline"),
        (["--baseline", "nn", "--thres", "kp"], "--thres"),
        (["--baseline", "nn", "--split", "all"], "'all'"),
        (["--baseline", "nn", "--pairs", "some.csv"], "--pairs"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(run_main, capsys, args, named):
    with pytest.raises((SystemExit, ValueError)) as stop:
        run_main(*args)
    assert named in (str(stop.value) + (capsys.readouterr().err.splitlines() or [""])[-1])


@pytest.mark.parametrize(
    ("option", "place"),
    [("--json", "gone/file.json"), ("--json", "folder"), ("--out", "file"), ("--out", "file/deep")],
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(run_main, capsys, tmp_path, option, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((SystemExit, ValueError)) as stop:
        run_main("--baseline", "nn", "--visualize", "1", option, place)
    streams = capsys.readouterr()
    assert place in (str(stop.value) + streams.err).splitlines()[-1] and "PCK" not in streams.out
    assert (tmp_path / "file").read_text() == "in the way"


def test_nothing_is_written_before_options_and_data_are_checked(run_main, tmp_path):
    """Not even the folder of the pictures."""
    pictures = "--visualize", 1, "--out", "some/place"
    for wrong in ("--checkpoint gone.pt", "--device abacus", "--backbone vgg", "--layer 99"):
        with pytest.raises(ValueError):
            run_main(*pictures, *wrong.split())
    with pytest.raises(ValueError):
        evaluate.main(["--dataset", "spair", "--datapath", "gone", "--baseline", "nn", *map(str, pictures)])
    assert not list(tmp_path.iterdir())


class Full:
    """A disk that is full after a number of files."""

    def __init__(self, monkeypatch, room: int) -> None:
        self.room, self.replace = room, os.replace
        monkeypatch.setattr(os, "replace", self)

    def __call__(self, *names) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.replace(*names)


@pytest.mark.parametrize("room", [0, 3, 10, 11])
def test_a_picture_is_written_whole_or_not_at_all(run_main, monkeypatch, tmp_path, room):
    """Ten sheets, curve.png, curve.csv: one line, what was written stays, nothing half written is left."""
    (tmp_path / "matches").mkdir()
    (tmp_path / "matches" / "curve.csv").write_text("from before")
    Full(monkeypatch, room)
    with pytest.raises(OSError) as error:
        run_main("--baseline", "nn", "--visualize", 1)
    assert str(error.value).startswith("cannot write matches/") and "\n" not in str(error.value)
    names = sorted(p.name for p in (tmp_path / "matches").iterdir())
    assert len(names) == room + 1 and not any(name.endswith(".tmp") for name in names)
    assert (tmp_path / "matches" / "curve.csv").read_text() == "from before"


def test_images_of_a_list_are_found_under_datapath(monkeypatch, capsys, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "photos").mkdir()
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "photos" / "a.png")
    place = tmp_path / "lists" / "pairs.csv"
    place.write_text("source,target,XA,YA,XB,YB\na.png,a.png,3;9,4;20,3;9,4;20\n")
    args = ["--pairs", str(place), *"--baseline nn --backbone random_vit8 --size 64 --device cpu".split()]
    with pytest.raises(ValueError, match="no such image"):
        evaluate.main(args)
    evaluate.main([*args, "--datapath", str(tmp_path / "photos")])
    assert "nn on pairs.csv: 1 pairs, 2 points" in capsys.readouterr().out


def test_a_class_the_benchmark_does_not_have_is_named_in_one_line(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "test_pairs.csv").write_text("source,target,class,XA,YA,XB,YB\na.jpg,b.jpg,21,1,1,1,1\n")
    backbone = "--backbone", "random_vit8"
    done = command("--dataset", "pfpascal", "--datapath", tmp_path, "--baseline", "nn", *backbone)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "test_pairs.csv line 2" in line and "class 1 to 20" in line


def test_a_device_that_is_not_there_is_named(run_main):
    with pytest.raises(ValueError, match="--device abacus"):
        run_main("--baseline", "nn", "--device", "abacus")


def test_a_stage_the_checkpoint_does_not_have_is_named(run_main, tmp_path):
    cascade = Cascade(Config(backbone="random_vit8", stages=1))
    save(tmp_path / "image.pt", cascade, torch.optim.AdamW(cascade.image.parameters()), 0)
    for stage in ("region", "pixel", "best-pixel"):
        with pytest.raises(ValueError, match=f"--stage {stage}"):
            run_main("--checkpoint", tmp_path / "image.pt", "--stage", stage)


def pooled(patch: int) -> SimpleNamespace:
    """A matcher whose cells hold the mean of their own pixels."""

    def features(images: torch.Tensor) -> Features:
        means = torch.nn.functional.avg_pool2d(images, patch)
        return Features(means.flatten(2).transpose(1, 2), means.mean((2, 3)), torch.ones_like(means[:, 0]))

    return SimpleNamespace(features=features, backbone=SimpleNamespace(patch=patch), cfg=None)


@pytest.mark.parametrize("patch", [4, 8, 14, 16])
def test_dense_cells_lie_where_those_of_a_grid_of_twice_the_cells_do(patch):
    height, width = 3 * patch, 5 * patch
    rows, columns = torch.arange(height), torch.arange(width)
    ramps = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None].float()
    found = Dense(pooled(patch)).features(ramps)
    assert found.grid == (6, 10) and found.feat.shape == (1, 60, 2)
    y, x = found.feat.unflatten(1, found.grid)[0].unbind(-1)
    step = patch / 2
    inner = torch.arange(1, 9)  # the outermost cells see the border twice
    assert (x[2, inner] - ((inner + 0.5) * step - 0.5)).abs().max() <= 0.5
    assert (y[1:5, 3] - ((torch.arange(1, 5) + 0.5) * step - 0.5)).abs().max() <= 0.5


def test_a_dense_volume_is_that_of_every_view_with_every_view():
    cascade = Cascade(Config(backbone="random_vit8", consensus=3, volume_window=2)).eval()
    for p in cascade.pixel.parameters():
        p.data += 0.1 * torch.randn_like(p)
    matcher = Dense(cascade)
    images = torch.randn(2, 3, 24, 32), torch.randn(2, 3, 40, 24)
    src, trg = map(matcher.features, images)
    with torch.no_grad():
        found = matcher.volume(src, trg, "pixel")
    assert found.shape == (2, 6, 8, 10, 6)

    def view(image: torch.Tensor, y: int, x: int) -> torch.Tensor:  # rows and columns moved by -2 or 2 pixels
        height, width = image.shape[-2:]
        rows, columns = ((torch.arange(n) + 4 * k - 2).clamp(0, n - 1) for n, k in ((height, y), (width, x)))
        return image[:, :, rows][..., columns]

    for ys, xs, yt, xt in ((0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 1)):
        s, t = cascade.features(view(images[0], ys, xs)), cascade.features(view(images[1], yt, xt))
        s, t = s._replace(token=src.token), t._replace(token=trg.token)
        with torch.no_grad():
            expected = cascade.volume(s, t, "pixel")
        torch.testing.assert_close(found[:, ys::2, xs::2, yt::2, xt::2], expected, rtol=1e-4, atol=1e-5)
    tokens = [cascade.features(view(images[0], y, x)).token for y in (0, 1) for x in (0, 1)]
    torch.testing.assert_close(src.token, sum(tokens) / 4)


def test_dense_scores_differ_and_the_region_stage_has_none(run_main, tmp_path):
    cascade = Cascade(Config(backbone="random_vit8", size=64))
    save(tmp_path / "all.pt", cascade, torch.optim.AdamW(cascade.image.parameters()), 0)
    reports = []
    for extra in ([], ["--dense"]):
        report = "--json", tmp_path / "out.json"
        run_main("--checkpoint", tmp_path / "all.pt", "--baseline", "nn", *report, *extra)
        reports.append(json.loads((tmp_path / "out.json").read_text()))
    assert [report["dense"] for report in reports] == [False, True]
    plain, dense = (report["scores"]["target"]["nn"]["bbox"]["per_image"] for report in reports)
    assert plain != dense
    keypoints = shapes_pairs("test")  # two images a class, as in the run
    expected = score(predict(Dense(cascade.eval()), keypoints, ["nn"], quiet=True)["nn"], keypoints)
    assert dense == pytest.approx(expected["bbox"]["per_image"], abs=1e-3)
    with pytest.raises(ValueError, match="--dense: the region stage"):
        run_main("--checkpoint", tmp_path / "all.pt", "--stage", "region", "--dense")


def test_a_checkpoint_is_scored_by_its_last_stage_beside_the_baselines(run_main, capsys, tmp_path):
    cascade = Cascade(Config(backbone="random_vit8", stages=2, size=64))
    save(tmp_path / "two.pt", cascade, torch.optim.AdamW(cascade.image.parameters()), 0)
    place = tmp_path / "out.json"
    run_main("--checkpoint", tmp_path / "two.pt", "--baseline", "nn", "--json", place)
    report = json.loads(place.read_text())
    assert list(report["scores"]["target"]) == ["region", "nn"] and report["size"] == 64
    assert report["checkpoint"] == str(tmp_path / "two.pt")
    assert "input 64x64" in capsys.readouterr().out
    keypoints = shapes_pairs("test")  # two images a class, as in the run
    expected = score(predict(cascade.eval(), keypoints, ["region"], quiet=True)["region"], keypoints)
    found = report["scores"]["target"]["region"]["bbox"]["per_image"]
    assert found == pytest.approx(expected["bbox"]["per_image"], abs=1e-3)


def test_no_more_than_the_held_images_wait_in_memory():
    categories, rng = ["b"] * 10 + ["a"] * 30, random.Random(0)
    ends = [rng.sample(range(9), 2) for _ in categories]
    _, few = annotated(COUNTS, CATEGORIES, "any")
    pairs = [few.pairs[0]._replace(src=s, trg=t, category=c) for (s, t), c in zip(ends, categories)]
    keypoints, order = KeypointSet("any", few.images, pairs), rng.sample(range(40), 40)
    for held in (2, 4, 100):
        blocks = blocks_of_pairs(keypoints, order, held)
        assert sorted(sum(blocks, [])) == list(range(40))
        for block in blocks:
            assert len({i for n in block for i in ends[n]}) <= held
            assert len({categories[n] for n in block}) == 1
    assert blocks == [[n for n in order if n >= 10], [n for n in order if n < 10]]
