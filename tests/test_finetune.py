"""Fine-tuning: the views of a pair, the schedule, what resumes, several processes, what is refused."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from test_benchmarks import RECORD, spair_tree
from test_train import ROOT, configured, run, train

import data
from evaluate import predict, score
from experiments import finetune
from experiments.cats import Cats, as_cats_reads, flow_target
from experiments.finetune import FinetuneConfig, learning_rate, parse_config
from experiments.views import KeypointViews, photometric, random_crop, to_view
from support.backbone import BACKBONES, ViTSpec
from support.benchmarks import label_pairs, spair_pairs
from support.label_tree import write_label_tree
from support.shapes import shapes_pairs

MATCHER = "--backbone random_vit8 --size 128 --device cpu --augment --no-cache-features"
SMALL = f"{MATCHER} --batch 2 --epochs 2 --pretrain-epochs 2 --epoch-steps 2 --seed 5".split()
SMALLER = {"projection": 16, "heads": 4, "log_every": 1}  # what has no option
LAUNCH = f"""import dataclasses
from experiments.finetune import finetune, parse_config
cfg, resume = parse_config(None)
finetune(dataclasses.replace(cfg, **{SMALLER}), resume)
"""
RATES = "--lr 1e-3 --backbone-lr 1e-4".split()
BOTH = [*SMALL, *RATES, "--dataset", "shapes", "--annotated", "4", "--save-every", "3"]
STEPS = 4  # of either phase


# ------------------------------------------------------------------------------------------------------------
# Photometric changes


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_without_a_chance_nothing_changes(photo):
    for change in (photometric(0.0), photometric(0.0, blur=True)):
        for _ in range(10):
            assert np.array_equal(change(photo), photo)


def test_each_change_is_what_its_name_says(photo):
    gray, posterize, equalize, sharpen, contrast, solarize, jitter = photometric(1.0).transforms
    values = np.asarray(photo).astype(int)
    luminance = np.asarray(gray(photo)).astype(float)
    assert np.abs(luminance - (values @ [0.2989, 0.587, 0.114])[..., None]).max() <= 1
    assert np.array_equal(posterize(photo), values & 0b11110000)
    assert np.array_equal(equalize(photo), ImageOps.equalize(photo))
    assert np.array_equal(sharpen(photo), ImageEnhance.Sharpness(photo).enhance(1.5))
    assert np.array_equal(solarize(photo), np.where(values >= 128, 255 - values, values))
    plain, red = Image.new("RGB", (4, 4), (100, 100, 100)), Image.new("RGB", (4, 4), (200, 20, 20))
    for change in (contrast, jitter):
        levels = [np.asarray(change(plain))[0, 0].tolist() for _ in range(300)]
        assert all(r == g == b and 79 <= r <= 121 for r, g, b in levels)
        assert min(levels)[0] < 84 and max(levels)[0] > 116
    hues = [np.asarray(jitter(red))[0, 0].astype(int) for _ in range(100)]
    assert any(abs(g - b) > 20 for _, g, b in hues)  # only the last one turns hues
    plainer = [np.asarray(contrast(red))[0, 0].astype(int) for _ in range(100)]
    assert all(abs(g - b) <= 1 for _, g, b in plainer)


def test_the_strong_list_blurs_where_the_weak_one_sharpens(photo):
    weak, strong = photometric(1.0).transforms, photometric(1.0, blur=True).transforms
    assert [type(a) is type(b) for a, b in zip(weak, strong, strict=True)] == [k != 3 for k in range(7)]
    sharp, before, blurred = (np.abs(np.diff(np.asarray(image).astype(float), axis=0)).sum()
                              for image in (weak[3](photo), photo, strong[3](photo)))
    assert blurred < before < sharp


def test_every_change_has_its_own_chance(photo):
    torch.manual_seed(0)
    for transform in photometric(0.2, blur=True).transforms:
        touched = np.mean([not np.array_equal(transform(photo), photo) for _ in range(500)])
        assert touched == pytest.approx(0.2, abs=0.06), transform


# ------------------------------------------------------------------------------------------------------------
# Crops and coordinates


def test_crops_hold_the_box_and_reach_both_ends():
    rng = np.random.default_rng(0)
    crops = np.array([random_crop((120, 90), (30.2, 20.0, 99.1, 77.0), rng) for _ in range(4000)])
    for side, whole in zip(crops.T, (range(31), range(21), range(100, 121), range(77, 91)), strict=True):
        assert set(side) == set(map(float, whole))
        counts = np.unique(side, return_counts=True)[1]
        assert counts.min() > 0.6 * len(crops) / len(whole)  # all equally often


@pytest.mark.parametrize("box", [
    (0, 0, 120, 90), (-3.0, -0.5, 125.0, 90.5), (50.0, 40.0, 50.0, 40.0), (119.5,) * 4,
])  # fmt: skip
def test_crops_of_odd_boxes_stay_in_the_image_and_are_not_empty(box):
    rng = np.random.default_rng(0)
    for _ in range(1000):
        x0, y0, x1, y1 = random_crop((120, 90), box, rng)
        assert 0 <= x0 < x1 <= 120 and 0 <= y0 < y1 <= 90
        assert x0 <= max(0, box[0]) and y0 <= max(0, box[1])
        assert x1 >= min(120, box[2]) and y1 >= min(90, box[3])


def ruler(width: int, height: int, unit: int = 1) -> Image.Image:
    """A picture that says of every pixel where it is: red is x, green is y, in so many steps a pixel."""
    x, y = np.meshgrid(unit * np.arange(width), unit * np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def places(view: torch.Tensor) -> torch.Tensor:
    """Where in its ruler every pixel of a view comes from: (2, S, S)."""
    return (view * torch.tensor(data.STD).view(3, 1, 1) + torch.tensor(data.MEAN).view(3, 1, 1))[:2] * 255


@pytest.mark.parametrize("crop", [
    (20.0, 30.0, 70.0, 66.0), (0.0, 0.0, 200.0, 160.0), (3.0, 100.0, 190.0, 160.0),
])  # fmt: skip
def test_points_land_on_the_pixels_they_were_on(crop):
    size, (x0, y0, x1, y1) = 256, crop
    view = places(data.prepare(ruler(200, 160), None, size, 8, crop)[0])
    torch.manual_seed(0)
    points = torch.rand(500, 2) * torch.tensor([x1 - x0 - 8, y1 - y0 - 8]) + torch.tensor([x0 + 4, y0 + 4])
    at = to_view(points, crop, size)
    for x, y in at.tolist():
        assert 0 <= x <= size - 1 and 0 <= y <= size - 1
    low = at.floor().long()
    (fx, fy), (x, y) = (at - low).T, low.T
    read = view[:, y, x] * (1 - fx) * (1 - fy) + view[:, y, x + 1] * fx * (1 - fy)
    read = read + view[:, y + 1, x] * (1 - fx) * fy + view[:, y + 1, x + 1] * fx * fy
    wrong = read.T - points
    assert wrong.abs().max() < 0.75 and wrong.mean(0).abs().max() < 0.1  # pixels are whole numbers


def test_points_outside_a_crop_stop_at_its_edges():
    points = torch.tensor([[0.0, 0.0], [99.0, 99.0], [49.5, 19.5]])
    at = to_view(points, (10.0, 10.0, 50.0, 20.0), 16)
    torch.testing.assert_close(at, torch.tensor([[-0.5, -0.5], [15.5, 15.5], [15.5, 15.5]]))


# ------------------------------------------------------------------------------------------------------------
# Views of a pair


class Rulers:
    """Rulers of several sizes; some cannot be read."""

    def __init__(self, *broken: int) -> None:
        self.broken, self.sizes = broken, [(80, 64), (60, 84), (45, 45), (84, 56)]
        self.size = self.sizes.__getitem__

    def load(self, index: int) -> tuple[Image.Image, None]:
        if index in self.broken:
            raise ValueError(f"cannot read image {index}.jpg")
        return ruler(*self.sizes[index], unit=3), None


def pair_of(src: int, trg: int, points: list, src_box: data.Box, trg_box: data.Box) -> data.KeypointPair:
    a, b = torch.tensor(points)
    return data.KeypointPair(src, trg, a, b, "ruler", src_box, trg_box)


PAIRS = [
    pair_of(0, 1, [[[36.0, 28.0], [44.0, 33.0]], [[30.0, 40.5], [31.0, 43.0]]],
            (24, 20, 52, 44), (15, 30, 50, 70)),
    pair_of(2, 3, [[[20.0, 27.0]], [[55.0, 18.25]]], (15, 20, 30, 30), (30, 16, 60, 36)),
]


def views(*broken: int, **changes) -> KeypointViews:
    options = {"size": 128, "batch": 2, "semi": True, "semi_photometric": 0.0, "semi_keyout": 0.0, "seed": 3}
    keypoints = data.KeypointSet("rulers", Rulers(*broken), PAIRS)
    return KeypointViews(keypoints, [0, 1], FinetuneConfig(**options | changes), 8)


def read_crop(view: torch.Tensor) -> torch.Tensor:
    """The crop that a view of a ruler in thirds shows, (x0, y0, x1, y1), from its pixels alone."""
    at, found = torch.arange(16, 112).float(), places(view)[:, 16:112, 16:112] / 3
    edges = []
    for line in (found[0].mean(0), found[1].mean(1)):
        slope = ((at - at.mean()) * (line - line.mean())).sum() / (at - at.mean()).square().sum()
        start = line.mean() - slope * at.mean()  # the pixel of the ruler under the view's first pixel
        edges.append((start - 0.5 * slope + 0.5, start + 127.5 * slope + 0.5))
    return torch.tensor([edges[0][0], edges[1][0], edges[0][1], edges[1][1]])


def cells(points: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
    """Points whose pixels begin at whole numbers (corners, not centres) to cells of the crop."""
    return (points - crop[:2]) / (crop[2:] - crop[:2]) * 16 - 0.5


@pytest.mark.parametrize("number, original", [(0, False), (0, True), (1, False)])
def test_points_and_boxes_move_with_the_crop_that_the_views_show(number, original):
    pair, whole = PAIRS[number], []
    for place in range(30):
        item = views(original_target=original)[0, place, number]
        assert torch.equal(item["plain"], item["trg"]) and torch.equal(item["strong"], item["trg"])
        src, trg = read_crop(item["src"]), read_crop(item["trg"])
        torch.testing.assert_close(src, src.round(), rtol=0, atol=0.3)
        src, trg = src.round(), trg.round()
        whole += [crop[:2].tolist() == [0, 0] and crop[2:].tolist() == list(size)
                  for crop, size in zip((src, trg), (Rulers().sizes[i] for i in pair[:2]))]  # fmt: skip
        flow, valid = flow_target(cells(pair.src_kps + 0.5, src), cells(pair.trg_kps + 0.5, trg), original)
        assert torch.equal(item["valid"], valid) and valid.any()
        torch.testing.assert_close(item["flow"], flow, rtol=1e-3, atol=1e-3)
        for name, crop, box in (("src_box", src, pair.src_box), ("trg_box", trg, pair.trg_box)):
            expected = cells(torch.tensor(box).float().view(2, 2), crop).flatten()
            torch.testing.assert_close(item[name], expected, rtol=1e-3, atol=1e-3)
            assert item[name].min() >= -0.5 and item[name].max() <= 15.5
    assert 0.3 < np.mean(whole) < 0.7  # half of the views are of the whole image
    assert not views(augment=False)[0, number, 0]["skipped"]


def test_no_crop_cuts_off_the_pixel_of_a_point_outside_the_box():
    one, rng = views(), np.random.default_rng(0)
    for _ in range(300):
        _, crop, points, _ = one.side(0, torch.tensor([[70.0, 60.0]]), (24, 20, 52, 44), rng)
        expected = cells(torch.tensor([[70.5, 60.5]]), torch.tensor(crop))
        torch.testing.assert_close(points, expected, rtol=1e-4, atol=1e-4)


def test_without_augmentation_a_view_is_the_whole_image_unchanged():
    for place in range(8):
        item = views(augment=False, semi=False)[0, place, 0]
        for name, size in (("src", (80, 64)), ("trg", (60, 84))):  # bilinear, as CATs reads
            view = ruler(*size, 3).resize((128, 128), Image.Resampling.BILINEAR)
            assert torch.equal(item[name], data.prepare(view, None, 128, 8)[0])
        assert "strong" not in item


def same(a: dict, b: dict) -> bool:
    equal = (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k]
             for k in a.keys() | b.keys())
    return all(equal)


@pytest.mark.parametrize("semi", [False, True])
def test_a_key_says_all_that_is_random(semi):
    one = views(semi=semi, semi_photometric=0.5, semi_keyout=0.5)
    before = torch.get_rng_state()
    first = one[2, 7, 0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert same(first, views(semi=semi, semi_photometric=0.5, semi_keyout=0.5)[2, 7, 0])
    other_seed = views(semi=semi, semi_photometric=0.5, semi_keyout=0.5, seed=4)[2, 7, 0]
    others = one[2, 8, 0], one[3, 7, 0], other_seed
    assert not any(same(first, other) for other in others)


def test_an_image_that_cannot_be_read_is_named_and_the_next_pair_taken():
    item, wanted = views(1)[0, 5, 0], views()[0, 5, 1]
    assert item.pop("skipped") == "cannot read image 1.jpg" and wanted.pop("skipped") == ""
    assert same(item, wanted)
    item, wanted = views(2)[0, 5, 1], views()[0, 5, 0]  # behind the last comes the first
    assert item.pop("skipped") == "cannot read image 2.jpg" and wanted.pop("skipped") == ""
    assert same(item, wanted)
    with pytest.raises(ValueError, match="no pair can be read; the first: cannot read image 0.jpg"):
        views(0, 3)[0, 5, 0]


def test_an_epoch_has_every_pair_and_fills_a_batch():
    assert sorted(views().epoch_pairs(0, 0)) == [(0,), (1,)]
    pairs = views(batch=5).epoch_pairs(0, 1)
    assert sorted(pairs) == [(0,)] * 3 + [(1,)] * 3
    orders = {tuple(views(batch=5).epoch_pairs(0, epoch)) for epoch in range(10)}
    assert len(orders) > 3 and tuple(pairs) in orders


def test_the_stream_asks_for_every_pair_at_its_place():
    """The order and the draws of a key are those of (seed, epoch, place), whatever stands in the key."""
    stream = iter(data.PairStream(views(batch=5), 5, seed=3))
    for epoch in range(2):
        keys = next(stream)
        pairs = views(batch=5).epoch_pairs(3, epoch)
        assert keys == [(epoch, place, n) for place, (n,) in enumerate(pairs[:5])]
    draws = []
    one = views()
    one.item = lambda number, rng: draws.append((number, rng.random(2).tolist())) or {}
    one[4, 9, 1]
    rng = np.random.default_rng((3, 4, 9))
    rng.integers(2**62)  # the seed of torchvision's generator
    assert draws == [(1, rng.random(2).tolist())]


class Counted(list):
    """A list that is looked into at single places, and counts them."""

    seen = 0

    def __getitem__(self, index: int) -> int:
        assert isinstance(index, int), "sliced"
        self.seen += 1
        return super().__getitem__(index)

    def __iter__(self):
        raise AssertionError("read from end to end")

    def index(self, *arguments):
        raise AssertionError("searched from end to end")


def test_an_item_is_read_without_a_look_at_the_other_pairs():
    one = views()
    one.keypoints = data.KeypointSet("many", one.keypoints.images, PAIRS * 50_000)
    one.numbers = Counted(range(1, 100_000, 2))
    assert same(one[0, 5, 77_777], views()[0, 5, 1])
    assert one.numbers.seen < 20


def test_few_annotated_pairs_are_among_more():
    keypoints = shapes_pairs("val")
    few, more = finetune.chosen_pairs(keypoints, 5, 1), finetune.chosen_pairs(keypoints, 20, 1)
    assert len(set(few)) == 5 and set(few) < set(more) and few == sorted(few)
    assert finetune.chosen_pairs(keypoints, 5, 2) != few
    assert finetune.chosen_pairs(keypoints, 0, 1) == list(range(80))
    with pytest.raises(ValueError, match="--annotated 81: shapes val has 80 pairs"):
        finetune.chosen_pairs(keypoints, 81, 1)


# ------------------------------------------------------------------------------------------------------------
# Optimiser


def test_step_schedule_is_cut_at_per_cents():
    original = [learning_rate(FinetuneConfig(), epoch, 100) for epoch in (69, 70, 79, 80, 89, 90, 99)]
    assert original == pytest.approx([3e-5, 1.5e-5, 1.5e-5, 7.5e-6, 7.5e-6, 3.75e-6, 3.75e-6])
    cfg = FinetuneConfig(lr=2.0, milestones=(50, 75.5))
    rates = [learning_rate(cfg, step, 200) for step in range(200)]
    assert rates == pytest.approx([2.0] * 100 + [1.0] * 51 + [0.5] * 49)


def test_the_preset_semimatch_is_the_released_recipe(whole, tmp_path):
    with pytest.raises(ValueError, match="--preset semimatch starts from trained CATs: give --checkpoint"):
        parse_config(["--preset", "semimatch", "--out", str(tmp_path)])
    start = str(whole(False) / "finetune" / "best.pt")
    cfg, _ = parse_config(["--preset", "semimatch", "--checkpoint", start, "--out", str(tmp_path)])
    assert (cfg.dataset, cfg.semi, cfg.batch, cfg.lr, cfg.backbone_lr) == ("spair", True, 8, 1e-6, 3e-6)
    assert (cfg.backbone, cfg.levels, cfg.size) == ("resnet101", None, 256)
    assert (cfg.beta, cfg.semi_temperature, cfg.semi_gamma, cfg.semi_threshold) == (0.1, 0.1, 0.1, 0.5)
    assert (cfg.epochs, cfg.milestones) == (500, (30, 44))
    rates = [learning_rate(cfg, epoch, 500) for epoch in (149, 150, 219, 220, 499)]
    assert rates == pytest.approx([1e-6, 5e-7, 5e-7, 2.5e-7, 2.5e-7])


def test_semimatchs_temperature_is_that_of_training_and_of_decoding(whole, tmp_path, monkeypatch):
    """A short run of the preset on shapes: the checkpoint decodes as it was trained, unlike CATs' own."""
    betas, original = set(), finetune.flow_of

    def record(corr, beta):
        betas.add(beta)
        return original(corr, beta)

    for module in ("finetune", "cats"):
        monkeypatch.setattr(f"experiments.{module}.flow_of", record)
    start = whole(False) / "finetune" / "best.pt"
    begin([*SMALL, "--preset", "semimatch", "--dataset", "shapes", "--epochs", "1", "--checkpoint", start,
           "--out", tmp_path])
    assert betas == {0.1}
    assert finetune.load_matcher(str(tmp_path / "finetune" / "best.pt")).cfg.beta == 0.1
    assert finetune.load_matcher(str(start)).cfg.beta == 0.02


def test_the_backbone_has_a_rate_of_its_own_or_is_frozen():
    for rate in (0.0, 1e-4):
        cfg = parse_config([*SMALL, "--dataset", "shapes", "--lr", "1e-3", "--backbone-lr", str(rate)])[0]
        matcher = Cats(cfg)
        groups = finetune.build_optimizer(matcher, cfg).param_groups
        inner = set(map(id, matcher.backbone.parameters()))
        ids = [[id(p) for p in group["params"]] for group in groups]
        assert set(ids[0]) == {id(p) for p in matcher.parameters()} - inner
        assert [group["scale"] for group in groups] == pytest.approx([1.0, 0.1][: len(groups)])
        assert all(group["weight_decay"] == 0.05 for group in groups)
        assert all(p.requires_grad == bool(rate) for p in matcher.backbone.parameters())
        assert len(groups) == 1 if not rate else set(ids[1]) == inner
        assert sum(map(len, ids)) == len({i for some in ids for i in some})


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_signals():
    """All runs compute the same bits; Ctrl-C ends pytest again afterwards."""
    threads = torch.get_num_threads()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def begin(flags: list, **changes) -> Cats:
    """What main does, with a small matcher and a log of every step."""
    cfg, resume = parse_config([*map(str, flags)])
    return finetune.finetune(dataclasses.replace(cfg, **SMALLER | changes), resume)


def go_on(last: Path) -> None:
    finetune.main(["--resume", str(last)])


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(keypoints: data.KeypointSet, count: int) -> data.KeypointSet:
    return data.KeypointSet(keypoints.name, keypoints.images, keypoints.pairs[::11][:count])


@pytest.fixture(scope="module")
def shapes() -> dict[str, data.KeypointSet]:
    """A few pairs for every split, drawn once."""
    keypoints = shapes_pairs("val")
    other = data.KeypointSet("shapes train", keypoints.images, keypoints.pairs[1:])
    return {"train": part(other, 7), "val": part(keypoints, 6)}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, shapes):
    monkeypatch.setitem(finetune.DATASETS, "shapes", lambda root, split: shapes[split])


def shapes_labels(out: Path) -> Path:
    """A label set of shapes on disk: six pairs to train on, four to choose by."""
    keypoints, records = shapes_pairs("val"), []
    for split, pairs in (("trn", keypoints.pairs[::8][:6]), ("val", keypoints.pairs[::8][6:])):
        record = {"split": split, "images": {}, "pairs": []}
        for pair in pairs:
            for i, box in ((pair.src, pair.src_box), (pair.trg, pair.trg_box)):
                record["images"][str(i)] = {"size": [128, 128], "box": [int(v) for v in box]}
            kps = {"src_kps": pair.src_kps.round().int().tolist()}
            kps["trg_kps"] = pair.trg_kps.round().int().tolist()
            kps["errors"] = [0.0] * len(pair.src_kps)
            record["pairs"].append({"kept": True, "src": pair.src, "trg": pair.trg} | kps)
        records.append(record)
    write_label_tree(out, keypoints.images, records, "copy")
    return out


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return shapes_labels(tmp_path_factory.mktemp("labels"))


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_s"} for line in found]


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_runs(one: Path, two: Path) -> None:
    """The same weights, optimiser and scores, bit for bit."""
    for file in ("best.pt", "last.pt"):
        a, b = checkpoint(one / file), checkpoint(two / file)
        assert (a["step"], a["best"], a["phase"]) == (b["step"], b["best"], b["phase"])
        assert a["model"].keys() == b["model"].keys()
        assert [key for key, value in a["model"].items() if not torch.equal(value, b["model"][key])] == []
    for number, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][number][key]) for key, value in moments.items())
    assert lines(one) == lines(two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, labels, shapes):
    """Uninterrupted runs of both phases, made on demand: without and with --semi."""
    made: dict[bool, Path] = {}

    def get(semi: bool) -> Path:
        if semi not in made:
            made[semi] = tmp_path_factory.mktemp("whole")
            begin([*BOTH, "--pretrain", labels, "--out", made[semi], *["--semi"] * semi])
        return made[semi]

    return get


class Killed(BaseException):
    """No handler of the program catches this."""


def interrupt(monkeypatch, step: int, how: str, number: int = signal.SIGINT) -> None:
    """Kill, or stop as Ctrl-C does, while the loss of a step (from 0, over both phases) is computed."""
    original, calls = finetune.batch_loss, []

    def loss(*arguments):
        calls.append(1)
        if len(calls) == step + 1:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(finetune, "batch_loss", loss)


@pytest.mark.parametrize("how, phase, semi", [
    ("kill", "pretrain", False), ("kill", "pretrain", True), ("kill", "finetune", False),
    ("kill", "finetune", True), ("stop", "pretrain", False), ("stop", "finetune", True),
])  # fmt: skip
def test_an_interrupted_run_ends_where_an_uninterrupted_one_ends(
    whole, labels, tmp_path, monkeypatch, capsys, how, phase, semi
):
    # a kill loses nothing after step 3, which was saved; a stop finishes its step
    step = {"kill": 3, "stop": 2}[how]
    flags = [*BOTH, "--pretrain", labels, "--out", tmp_path, *["--semi"] * semi]
    last = tmp_path / phase / "last.pt"
    with monkeypatch.context() as patched:
        interrupt(patched, step + STEPS * (phase == "finetune"), how)
        if how == "kill":
            with pytest.raises(Killed):
                begin(flags)
        else:
            with pytest.raises(SystemExit) as stopped:
                begin(flags)
            assert stopped.value.code == 130
            assert f"stopped after step 3; go on with --resume {last}" in capsys.readouterr().out
    assert checkpoint(last)["step"] == 3
    assert (tmp_path / "finetune").exists() == (phase == "finetune")
    go_on(last)
    for folder in ("pretrain", "finetune"):
        assert_equal_runs(tmp_path / folder, whole(semi) / folder)


def test_a_run_killed_before_its_first_step_keeps_the_first_score(whole, labels, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, 0, "kill")
        with pytest.raises(Killed):
            begin([*BOTH, "--pretrain", labels, "--out", tmp_path])
    assert [line["step"] for line in lines(tmp_path / "pretrain")] == [0]
    go_on(tmp_path / "pretrain" / "last.pt")
    assert_equal_runs(tmp_path / "pretrain", whole(False) / "pretrain")


def test_a_stop_in_the_last_step_of_the_labels_does_not_start_the_keypoints(labels, tmp_path, monkeypatch):
    interrupt(monkeypatch, STEPS - 1, "stop", signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        begin([*BOTH, "--pretrain", labels, "--out", tmp_path])
    assert stopped.value.code == 143
    assert not (tmp_path / "finetune" / "metrics.jsonl").exists()


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_a_stop_in_the_very_last_step_is_none(labels, tmp_path, monkeypatch, capsys, phase):
    interrupt(monkeypatch, STEPS - 1, "stop")
    data_of = {"pretrain": ["--pretrain", labels, "--dataset", "none"], "finetune": []}
    begin([*BOTH, *data_of[phase], "--out", tmp_path])
    assert checkpoint(tmp_path / phase / "last.pt")["step"] == STEPS
    assert "stopped" not in capsys.readouterr().out


def test_a_process_killed_from_outside_goes_on(labels, tmp_path):
    flags = [*SMALL, "--pretrain", str(labels), "--pretrain-epochs", "3", "--save-every", "1"]
    command = [sys.executable, "-c", LAUNCH, *flags, "--out", str(tmp_path / "killed")]
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT)
    last = tmp_path / "killed" / "pretrain" / "last.pt"
    while not last.exists() or checkpoint(last)["step"] < 1:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and 1 <= checkpoint(last)["step"] < 6
    go_on(last)
    begin([*flags, "--out", tmp_path / "whole"])
    assert_equal_runs(tmp_path / "killed" / "pretrain", tmp_path / "whole" / "pretrain")


@pytest.mark.parametrize("semi", [False, True])
def test_best_is_the_best_of_the_recorded_scores(whole, shapes, labels, semi):
    sets = {"pretrain": label_pairs(str(labels), "val"), "finetune": shapes["val"]}
    for phase, val in sets.items():
        folder = whole(semi) / phase
        scores = [(line["pck"]["cats"][1], -line["step"]) for line in lines(folder) if "pck" in line]
        assert [-step for _, step in scores] == [0, 2, 4] and len({value for value, _ in scores}) > 1
        best = checkpoint(folder / "best.pt")
        assert (best["best"], -best["step"]) == max(scores) and best["phase"] == phase
        val = as_cats_reads(val, 128)
        found = predict(finetune.load_matcher(str(folder / "best.pt")), val, ["cats"])
        assert score(found["cats"], val)["bbox"]["per_image"][1] == pytest.approx(best["best"])
    first = lines(whole(semi) / "finetune")[0]
    val = as_cats_reads(shapes["val"], 128)
    start = predict(finetune.load_matcher(str(whole(semi) / "pretrain" / "best.pt")), val, ["cats"])
    assert score(start["cats"], val)["bbox"]["per_image"] == pytest.approx(first["pck"]["cats"])


def test_losses_and_rates_are_recorded(whole):
    steps = [line for line in lines(whole(True) / "finetune") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    rates = [line["lr"] for line in steps]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])  # 70 % of four steps is passed
    for line in steps:  # the dynamic weight makes both parts equally large
        assert line["loss"] == pytest.approx(line["epe"] * (2 if line["unsup"] else 1), rel=1e-4)
    plain = lines(whole(True) / "pretrain") + lines(whole(False) / "finetune")
    assert not any("unsup" in line for line in plain)
    groups = checkpoint(whole(True) / "finetune" / "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 5e-5])


def test_training_moves_the_backbone_only_if_asked(whole, tmp_path):
    start = Cats(parse_config(BOTH)[0]).backbone.state_dict()
    begin([*SMALL, "--dataset", "shapes", "--epochs", "1", "--out", tmp_path])  # on shapes its rate is 0
    for folder, moved in ((tmp_path, False), (whole(False), True)):
        after = checkpoint(folder / "finetune" / "last.pt")["model"]
        changed = [not torch.equal(value, after[f"backbone.{key}"]) for key, value in start.items()]
        assert all(changed) if moved else not any(changed)


def test_a_checkpoint_is_started_from(whole, tmp_path):
    other = whole(False) / "pretrain" / "best.pt"
    flags = [*SMALL, "--dataset", "shapes", "--epochs", "1", "--seed", "9", "--out", tmp_path]
    matcher = begin([*flags, "--checkpoint", other])
    assert lines(tmp_path / "finetune")[0]["pck"] == lines(whole(False) / "finetune")[0]["pck"]
    best = checkpoint(tmp_path / "finetune" / "best.pt")["model"]
    assert not matcher.training
    assert all(torch.equal(value, best[key]) for key, value in matcher.state_dict().items())


def test_cached_features_change_nothing(tmp_path):
    flags = [*SMALL, "--dataset", "shapes", "--annotated", "3", "--no-augment", "--lr", "1e-3"]
    for name, more in (("plain", []), ("cached", ["--cache-features"])):
        begin([*flags, *more, "--out", tmp_path / name])
    for a, b in zip(*(lines(tmp_path / name / "finetune") for name in ("plain", "cached")), strict=True):
        assert a.keys() == b.keys() and a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)


def test_two_processes_equal_one_that_accumulates(labels, tmp_path):
    flags = [*SMALL, *RATES, "--pretrain", str(labels), "--pretrain-epochs", "1", "--epoch-steps", "3"]
    (tmp_path / "launch.py").write_text(LAUNCH)
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    two = run(tmp_path / "launch.py", *flags, "--out", tmp_path / "two", launcher=torchrun, env=environment)
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stdout
    begin([*flags, "--out", tmp_path / "one", "--accumulate", "2"])
    one, two = (tmp_path / name / "pretrain" for name in ("one", "two"))
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "grad_norm", "lr"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=2e-3)
    torch.manual_seed(5)
    start = Cats(dataclasses.replace(parse_config(flags)[0], **SMALLER)).state_dict()
    a, b = (checkpoint(path / "last.pt")["model"] for path in (one, two))
    trained = [key for key in start if key.startswith(("aggregator", "project", "backbone"))]
    apart = sum(float((a[key] - b[key]).square().sum()) for key in trained)
    moved = sum(float((a[key] - start[key]).square().sum()) for key in trained)
    # Adam makes whole steps of gradients that are only rounding
    assert math.sqrt(apart) < 0.02 * math.sqrt(moved)


# ------------------------------------------------------------------------------------------------------------
# What is refused


def refused(*arguments: object) -> str:
    """What fine-tuning ends with, which has to be one line."""
    with pytest.raises(SystemExit) as error:
        finetune.main([*map(str, arguments)])
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("flags, words", [
    ("", "give --pretrain LABELS, --dataset shapes, pfpascal, spair, spair-small, or both"),
    ("--dataset shapes --annotated 8", "--annotated 8: shapes train has 7 pairs"),
    ("--dataset shapes --cache-features", "--cache-features needs --no-augment and --backbone-lr 0"),
    ("--dataset shapes --cache-features --no-augment --backbone-lr 1e-5", "--cache-features needs"),
    ("--dataset shapes --batch 0", "--batch 0: at least 1"),
    ("--dataset shapes --pretrain-epochs 0", "--pretrain-epochs 0: at least 1"),
    ("--dataset shapes --epoch-steps -1", "--epoch-steps -1: not negative"),
    ("--dataset shapes --patience -1", "--patience -1: not negative"),
    ("--dataset shapes --lr 0", "--lr 0.0: above 0"),
    ("--dataset shapes --lr nan", "--lr nan: above 0"),
    ("--dataset shapes --backbone-lr inf", "--backbone-lr inf: not negative"),
    ("--dataset shapes --backbone-lr=-1e-6", "--backbone-lr -1e-06: not negative"),
    ("--dataset shapes --size 0", "--size 0: at least 1"),
    ("--dataset shapes --seed -1", "--seed -1: from 0"),
    ("--dataset shapes --seed 1180591620717411303424", "--seed 1180591620717411303424: from 0"),
    ("--dataset shapes --annotated -2", "--annotated -2: not negative"),
    ("--dataset shapes --accumulate 0", "--accumulate 0: at least 1"),
    ("--dataset shapes --workers -1", "--workers -1: not negative"),
    ("--dataset shapes --save-every -1", "--save-every -1: not negative"),
    ("--dataset shapes --semi --semi-threshold 50", "--semi-threshold 50.0: from 0 to 1"),
    ("--dataset shapes --semi --semi-keyout 20", "--semi-keyout 20.0: from 0 to 1"),
    ("--dataset shapes --semi --semi-uncertainty -1", "--semi-uncertainty -1.0: not negative"),
    ("--dataset shapes --size 100", "--size 100: not a multiple"),
    ("--dataset shapes --backbone vgg", "--backbone vgg"),
    ("--dataset shapes --checkpoint absent.pt", "no such checkpoint: absent.pt"),
    ("--resume absent.pt", "no such checkpoint: absent.pt"),
    ("--pretrain absent", "absent"),
    ("--dataset spair --root absent", "absent"),
])  # fmt: skip
def test_bad_options_are_one_line_and_write_nothing(tmp_path, flags, words):
    assert words in refused(*SMALL, "--out", tmp_path / "new", *flags.split())
    assert not files_in(tmp_path)


def test_every_number_of_a_configuration_has_a_range():
    for field in dataclasses.fields(FinetuneConfig):
        if field.type in (int, float):
            flag = "--" + field.name.replace("_", "-")
            for value in (field.type(-1), float("nan"), float("inf")):
                with pytest.raises(ValueError, match=f"{flag} "):
                    finetune.check(FinetuneConfig(dataset="shapes", **{field.name: value}))
    for name in ("beta", "semi_temperature", "semi_gamma", "heads", "depth", "projection", "log_every"):
        with pytest.raises(ValueError, match="above 0|at least 1"):
            finetune.check(FinetuneConfig(dataset="shapes", **{name: 0}))


@pytest.mark.parametrize("flags", ["--dataset labels", "--dataset pfwillow", "--preset spair", "--heads 4"])
def test_what_is_not_a_choice_or_an_option_is_refused(capsys, flags):
    with pytest.raises(SystemExit) as error:
        finetune.main([*SMALL, *flags.split()])
    assert error.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_help_shows_the_presets_values_and_at_most_32_options(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--dataset", "shapes", "--help"])
    page = capsys.readouterr().out
    assert "usage: python -m experiments.finetune" in page
    assert "(default: dinov2_vits14)" in " ".join(page.split())
    flags = set(re.findall(r"^  (--[a-z][\w-]*)", page, re.MULTILINE))
    assert {"--preset", "--resume", "--annotated"} <= flags and len(flags) <= 32


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """last.pt of a run of both phases that was stopped after four steps of nine on the keypoints."""
    out = tmp_path / "stopped"
    shutil.copytree(whole(False), out)
    for phase, steps in (("pretrain", STEPS), ("finetune", 9)):
        for file in ("last.pt", "best.pt"):
            state = checkpoint(out / phase / file)
            state |= {"steps": steps, "config": state["config"] | {"out": str(out)}}
            torch.save(state, out / phase / file)
    return out / "finetune" / "last.pt"


def test_a_run_goes_on_only_as_it_was_and_from_its_last_checkpoint(stopped, monkeypatch):
    last, best = stopped, stopped.with_name("best.pt")
    before = files_in(last.parents[1])
    assert f"{best} cannot be gone on from: --resume takes last.pt" in refused("--resume", best)
    words = "--resume goes on with the run as it was: --{} cannot change"
    assert words.format("lr") in refused("--resume", last, "--lr", "0.5")
    assert words.format("backbone-lr") in refused("--resume", last, "--backbone-lr", "0")
    assert words.format("semi") in refused("--resume", last, "--semi")
    assert words.format("out") in refused("--resume", last, "--out", "elsewhere")  # best.pt would stay behind
    for flags in ("--preset shapes", "--checkpoint other.pt", "--seed 6", "--batch 4", "--accumulate 2",
                  "--augment --size 256", "--no-augment", "--annotated 3", "--epochs 9", "--epoch-steps 3",
                  "--pretrain-epochs 3", "--dataset spair", "--semi-keyout 0.1", "--levels 0",
                  "--patience 1"):
        name = re.findall(r"--(?:no-)?([\w-]+)", flags)[-1]
        assert words.format(name) in refused("--resume", last, *flags.split())
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        assert "by 1 process(es), not by 2" in refused("--resume", last)
    assert files_in(last.parents[1]) == before
    cfg, resume = parse_config(["--resume", str(last), "--lr", "1e-3", "--workers", "1"])
    before = FinetuneConfig(**checkpoint(last)["config"])
    assert resume == str(last) and cfg == dataclasses.replace(before, workers=1)
    flags = "--root x --pretrain y --backbone-weights z --device cpu --save-every 7".split()
    cfg, _ = parse_config(["--resume", str(last), *flags])
    assert (cfg.root, cfg.pretrain, cfg.backbone_weights, cfg.save_every) == ("x", "y", "z", 7)


def test_a_finished_run_or_another_place_is_not_gone_on_from(whole, stopped, tmp_path):
    done = whole(False) / "finetune" / "last.pt"
    assert f"--resume {done}: this run has finished its 4 steps" in refused("--resume", done)
    first = stopped.parents[1] / "pretrain" / "last.pt"
    words = f"--resume {first}: the run has come further, go on with --resume {stopped}"
    assert words in refused("--resume", first)
    shutil.copy(stopped, tmp_path / "copy.pt")
    words = f"--resume {tmp_path / 'copy.pt'}: this run's own checkpoint is {stopped}"
    assert words in refused("--resume", tmp_path / "copy.pt")


def test_a_run_does_not_go_on_with_other_pairs(stopped):
    words = "finetune on shapes train takes 4 steps here, not 9: other pairs"
    before = files_in(stopped.parents[1])
    assert words in refused("--resume", stopped)
    assert files_in(stopped.parents[1]) == before


@pytest.mark.parametrize("name, value, words", [
    ("phase", 3, "its phase is a int"), ("phase", "sleep", "this run's own checkpoint is"),
    ("steps", None, "its steps is a NoneType"), ("best", "high", "its best is a str"),
    ("best_step", 1.5, "its best_step is a float"),
    ("processes", "one", "its processes is a str"), ("optimizer", [], "its optimizer is a list"),
    ("optimizer", {}, "its optimizer does not fit"), ("step", "3", "its step is a str"),
    ("model", {}, "does not fit --backbone or --levels"), ("config", [], "its config is a list"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_that_names_it(stopped, name, value, words):
    state = checkpoint(stopped)
    torch.save(state | {"steps": 4, "step": 3} | {name: value}, stopped)
    before = files_in(stopped.parents[1])
    said = refused("--resume", stopped)
    assert str(stopped) in said and words in said
    assert files_in(stopped.parents[1]) == before


def test_a_folder_with_a_run_in_it(whole, stopped, tmp_path, monkeypatch):
    """A stopped run is never replaced; a finished one only if the command names its folder."""
    monkeypatch.chdir(tmp_path)
    out = stopped.parents[1]
    before = files_in(out)
    said = refused(*SMALL, "--dataset", "shapes", "--out", out)
    assert said == (f"error: {out} holds a run that was stopped: go on with --resume {stopped}, or give"
                    " another --out")
    assert files_in(out) == before
    monkeypatch.setitem(finetune.PRESETS, "shapes", {"out": "runs/mine"})

    def chosen(*flags: object) -> str:
        return parse_config(["--dataset", "shapes", *map(str, flags)])[0].out

    assert chosen() == "runs/mine" and chosen("--out", "else") == "else"
    for number, name in enumerate(("mine", "mine-2"), 2):
        shutil.copytree(whole(False), tmp_path / "runs" / name)
        assert chosen() == f"runs/mine-{number}" and chosen("--out", "runs/mine") == "runs/mine"
    (tmp_path / "runs" / "mine-3" / "finetune").mkdir(parents=True)
    damaged = {"program": "experiments.finetune", "model": {}, "config": []}
    torch.save(damaged, tmp_path / "runs" / "mine-3" / "finetune" / "last.pt")
    with pytest.raises(ValueError, match="mine-3/finetune/last.pt is damaged: its config is a list"):
        chosen()
    # of two phases the second has not begun
    shutil.rmtree(tmp_path / "runs" / "mine" / "finetune")
    with pytest.raises(ValueError, match="go on with --resume runs/mine/pretrain/last.pt"):
        chosen()


def test_a_run_replaces_a_finished_one_with_all_its_phases(whole, labels, tmp_path, monkeypatch):
    """Killed on the labels, it must not be taken for one that has come further."""
    out = tmp_path / "out"
    shutil.copytree(whole(False), out)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        interrupt(patched, 3, "kill")
        begin([*BOTH, "--pretrain", labels, "--out", out])
    assert checkpoint(out / "pretrain" / "last.pt")["step"] == 3
    assert not [file for file in files_in(out / "finetune") if file.endswith(".pt")]
    go_on(out / "pretrain" / "last.pt")
    assert_equal_runs(out / "finetune", whole(False) / "finetune")


def test_what_cannot_be_trained_leaves_a_finished_run_alone(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole(False), out)
    before = files_in(out)
    for flags in ("--dataset shapes --lr -1", "--dataset shapes --size 100", "--dataset spair --root gone",
                  "--dataset shapes --checkpoint gone.pt", "--pretrain gone --dataset shapes",
                  "--dataset shapes --backbone vgg", "--dataset shapes --annotated 99"):
        refused(*SMALL, *flags.split(), "--out", out)
        assert files_in(out) == before


def test_a_checkpoint_has_to_fit(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "deep_vit8", ViTSpec("random", 128, 2, 8, 16, None, depth=2))
    flags = [*SMALL, "--dataset", "shapes", "--out", tmp_path]
    flags += ["--checkpoint", whole(False) / "pretrain" / "best.pt", "--backbone", "deep_vit8"]
    for levels in ("1", "0,1"):
        assert "does not fit --backbone or --levels" in refused(*flags, "--levels", levels)


def test_other_programs_and_versions_checkpoints_are_refused(whole, tmp_path):
    train(*configured(tmp_path, "--steps", "1"))
    last = tmp_path / "last.pt"
    words = f"{last} is a checkpoint of train.py, not of experiments.finetune"
    for way in ("--checkpoint", "--resume"):
        assert words in refused(*SMALL, "--dataset", "shapes", way, last, "--out", tmp_path / "new")
    out = run("-m", "experiments.finetune", "--resume", last)
    assert out.returncode == 1 and out.stderr == f"error: {words}\n"
    state = checkpoint(whole(False) / "pretrain" / "last.pt")
    torch.save(state | {"config": state["config"] | {"clip": 0.0}}, last)
    assert f"{last} was written by another version of experiments.finetune" in refused("--resume", last)


# ------------------------------------------------------------------------------------------------------------
# --patience


QUICK = [*SMALL, *RATES, "--no-augment", "--size", "64", "--save-every", "0"]
WAITING = [*QUICK, "--dataset", "shapes", "--annotated", "4", "--epochs", "5"]  # of two steps


def scripted(monkeypatch, keypoints: list[float], labels: list[float] = ()) -> dict[tuple[str, int], dict]:
    """The scores at alpha 0.10, after every epoch, are given; the weights that they stand for, by phase and
    step, as they come."""
    seen = {}

    def measure(log: Path, step: int, matcher: Cats, *_) -> tuple[dict, dict]:
        phase = log.parent.name
        scores = [99.0, {"finetune": keypoints, "pretrain": labels}[phase][step // 2], 99.0 - step]
        with open(log, "a") as file:
            file.write(json.dumps({"step": step, "pck": {"cats": scores}}) + "\n")
        seen[phase, step] = {key: value.clone() for key, value in matcher.state_dict().items()}
        return {"cats": scores}, {}

    monkeypatch.setattr(finetune, "measure", measure)
    return seen


def same_weights(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("patience, scores, ends, best", [
    (2, [10, 30, 20, 25, 90, 90], 6, 2),
    (2, [10, 30, 30, 30, 90, 90], 6, 2),  # as good is not better
    (2, [10, 20, 15, 30, 25, 28], 10, 6),  # a better one resets the waiting
    (1, [50, 10, 60, 60, 60, 60], 2, 0),  # no epoch was better than the start
    (0, [50, 10, 10, 10, 10, 10], 10, 0),
])  # fmt: skip
def test_the_keypoints_end_after_so_many_epochs_without_a_better_score(
    tmp_path, monkeypatch, capsys, patience, scores, ends, best
):
    out, seen = tmp_path / "run", scripted(monkeypatch, scores)
    matcher = begin([*WAITING, "--patience", patience, "--out", out])
    assert list(seen) == [("finetune", step) for step in range(0, ends + 1, 2)]
    assert [line["step"] for line in lines(out / "finetune") if "loss" in line] == [*range(1, ends + 1)]
    last, top = (checkpoint(out / "finetune" / name) for name in ("last.pt", "best.pt"))
    assert (last["step"], last["steps"]) == (ends, ends) and top["step"] == best
    for state in (last, top):
        assert (state["best"], state["best_step"]) == (scores[best // 2], best)
    assert same_weights(top["model"], seen["finetune", best])
    assert same_weights(matcher.state_dict(), seen["finetune", best])
    assert same_weights(last["model"], seen["finetune", ends])
    assert not same_weights(last["model"], top["model"])
    assert f"{scores[best // 2]:.1f} at step {best}, checkpoint" in capsys.readouterr().out
    # it has finished, and so has no more steps and may be replaced
    path = out / "finetune" / "last.pt"
    assert f"--resume {path}: this run has finished its {ends} steps" in refused("--resume", path)
    assert parse_config([*map(str, WAITING), "--out", str(out)])[0].out == str(out)
    monkeypatch.setitem(finetune.PRESETS, "shapes", {"out": str(out)})
    assert parse_config(["--dataset", "shapes"])[0].out == f"{out}-2"


def test_patience_does_not_end_the_labels(labels, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [50, 10, 60, 60], [50, 90, 10, 10])
    flags = [*WAITING, "--pretrain", labels, "--pretrain-epochs", "3", "--patience", "1", "--out", tmp_path]
    begin(flags)
    assert list(seen) == [*(("pretrain", step) for step in (0, 2, 4, 6)), ("finetune", 0), ("finetune", 2)]
    for phase, ends, best in (("pretrain", 6, 2), ("finetune", 2, 0)):
        last, top = (checkpoint(tmp_path / phase / name) for name in ("last.pt", "best.pt"))
        assert (last["step"], last["steps"], last["best_step"], top["step"]) == (ends, ends, best, best)
    assert same_weights(seen["finetune", 0], seen["pretrain", 2])


@pytest.mark.parametrize("how, step", [("kill", 4), ("stop", 2), ("stop", 4)])
def test_an_interrupted_run_waits_as_long_as_an_uninterrupted_one(tmp_path, monkeypatch, how, step):
    """Resumed two and three steps after the best and one after it, it ends four steps after it too."""
    scripted(monkeypatch, [10, 30, 20, 25, 90, 90])
    flags = [*WAITING, "--patience", "2", "--out"]
    begin([*flags, tmp_path / "whole"])
    last = tmp_path / "out" / "finetune" / "last.pt"
    with monkeypatch.context() as patched:
        interrupt(patched, step, how)
        with pytest.raises(Killed if how == "kill" else SystemExit):
            begin([*flags, tmp_path / "out"])
    state = checkpoint(last)
    assert (state["step"], state["steps"]) == (step + (how == "stop"), 10)
    assert (state["best"], state["best_step"]) == (30, 2)
    assert "holds a run that was stopped" in refused(*flags, tmp_path / "out")
    go_on(last)
    assert checkpoint(last)["steps"] == checkpoint(last)["step"] == 6
    assert_equal_runs(tmp_path / "out" / "finetune", tmp_path / "whole" / "finetune")


def test_a_stop_in_the_step_that_ends_the_waiting_is_none(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [50, 10, 60, 60, 60, 60])
    interrupt(monkeypatch, 1, "stop")
    begin([*WAITING, "--patience", "1", "--out", tmp_path])
    state = checkpoint(tmp_path / "finetune" / "last.pt")
    assert state["step"] == state["steps"] == 2 and "stopped" not in capsys.readouterr().out


def test_patience_ends_every_process(spair, tmp_path):
    """Only the first one scores."""
    worse = """from experiments import finetune
finetune.measure = lambda log, step, *_: ({"cats": [0, 9 - step, 0]}, {})
"""
    (tmp_path / "launch.py").write_text(worse + LAUNCH)
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = [*QUICK, "--dataset", "spair", "--root", spair, "--epochs", "9", "--patience", "1"]
    done = run(tmp_path / "launch.py", *flags, "--out", tmp_path, launcher=torchrun, env=environment)
    assert done.returncode == 0, done.stderr
    state = checkpoint(tmp_path / "finetune" / "last.pt")
    assert (state["step"], state["steps"], state["best_step"], state["processes"]) == (2, 2, 0, 2)


# ------------------------------------------------------------------------------------------------------------
# Pairs that are held back


SIDES = [(128, 96), (88, 120), (112, 72), (96, 136)]


def spair_shapes(root: Path, lists: dict[str, list[int]]) -> Path:
    """A benchmark of SPair-71k's form with pairs of shapes by their numbers; images are wide and narrow."""
    keypoints, found = shapes_pairs("val"), {}
    for place, numbers in lists.items():
        found[place] = []
        for pair in map(keypoints.pairs.__getitem__, numbers):
            record = RECORD | {"filename": f"{pair.src:06d}-{pair.src}-{pair.trg}:{pair.category}"}
            for side, index, kps, box in (("src", pair.src, pair.src_kps, pair.src_box),
                                          ("trg", pair.trg, pair.trg_kps, pair.trg_box)):
                image = root / "JPEGImages" / pair.category / f"{index}.jpg"
                image.parent.mkdir(parents=True, exist_ok=True)
                keypoints.load(index)[0].resize(SIDES[index % 4]).save(image, quality=95)
                scale = torch.tensor(SIDES[index % 4]) / 128
                record[f"{side}_imname"] = image.name
                record[f"{side}_kps"] = ((kps + 0.5) * scale - 0.5).tolist()
                record[f"{side}_bndbox"] = (torch.tensor(box).view(2, 2) * scale).flatten().tolist()
            found[place].append(record)
    return spair_tree(root, found)


@pytest.fixture(scope="module")
def spair(tmp_path_factory) -> Path:
    """Eleven pairs to train on, and no list of others to choose by, but in the small layout."""
    lists = {"large/trn": [*range(0, 77, 7)], "large/test": [3, 12, 25], "small/trn": [*range(0, 42, 7)]}
    return spair_shapes(tmp_path_factory.mktemp("spair"), lists | {"small/val": [5, 50]})


def ends_of(keypoints: data.KeypointSet, numbers: list[int] | None = None) -> set[tuple[int, int]]:
    """What tells pairs apart."""
    numbers = range(len(keypoints)) if numbers is None else numbers
    found = {keypoints.pairs[n][:2] for n in numbers}
    assert len(found) == len(numbers)
    return found


def phase_on(root: Path, *flags: object, dataset: str = "spair") -> finetune.Phase:
    cfg, _ = parse_config([*SMALL, "--dataset", dataset, "--root", str(root), *map(str, flags)])
    return finetune.load_phase(cfg, "finetune")


def test_a_fifth_is_held_back_whatever_the_seed(spair):
    every, held, drawn = ends_of(spair_pairs(str(spair), "trn")), set(), {}
    for seed in (1, 2, 3):
        for annotated in (0, 4, 9):
            phase = phase_on(spair, "--seed", seed, "--annotated", annotated, "--epoch-steps", 0)
            held.add(frozenset(ends_of(phase.val)))
            drawn[seed, annotated] = ends_of(phase.train, phase.numbers)
            assert phase.numbers == sorted(phase.numbers) and len(phase.train) == 11
            assert (phase.train.name, phase.val.name) == ("SPair-71k trn", "SPair-71k trn held back")
            assert phase.epoch == len(phase.numbers) // 2 == (annotated or 9) // 2
    (held,) = held
    assert len(held) == 2 and held < every
    for seed in (1, 2, 3):
        assert drawn[seed, 0] == drawn[seed, 9] == every - held
        assert len(drawn[seed, 4]) == 4 and drawn[seed, 4] < every - held
    assert len({frozenset(drawn[seed, 4]) for seed in (1, 2, 3)}) > 1


def test_pairs_that_are_held_back_are_scored_and_never_trained_on(spair, tmp_path, monkeypatch):
    shown, original = [], KeypointViews.item

    def item(self, number: int, rng: np.random.Generator) -> dict:
        shown.append(number)
        return original(self, number, rng)

    monkeypatch.setattr(KeypointViews, "item", item)
    begin([*QUICK, "--dataset", "spair", "--root", spair, "--epoch-steps", "5", "--out", tmp_path])
    held = sorted({*range(11)} - {*shown})
    assert len(held) == 2 and len(shown) >= 20
    keypoints, folder = spair_pairs(str(spair), "trn"), tmp_path / "finetune"
    keypoints.pairs = [keypoints.pairs[n] for n in held]
    val, best = as_cats_reads(keypoints, 64), checkpoint(folder / "best.pt")
    found = predict(finetune.load_matcher(str(folder / "best.pt")), val, ["cats"])["cats"]
    expected = score(found, val)["bbox"]["per_image"]
    assert best["best"] == pytest.approx(expected[1], abs=1e-3) and expected[2] > 0
    measured = {line["step"]: line for line in lines(folder) if "pck" in line}
    assert measured[best["step"]]["pck"]["cats"] == pytest.approx(expected, abs=1e-3)
    assert {line["on"] for line in measured.values()} == {"SPair-71k trn held back"}


def test_only_a_layout_without_a_list_is_held_back_from(spair, tmp_path):
    root = tmp_path / "SPair-71k"
    shutil.copytree(spair, root)
    for place in (root, tmp_path):  # the folder or one that holds it
        assert len(phase_on(place).numbers) == 9
        small = phase_on(place, dataset="spair-small")
        assert small.numbers == [*range(6)] and small.val.name == "SPair-71k small val"
    spair_shapes(root, {"large/val": [3, 40, 60]})
    (root / "Layout/small/val.txt").unlink()
    for place in (root, tmp_path):
        whole, small = phase_on(place), phase_on(place, dataset="spair-small")
        assert whole.numbers == [*range(11)] and whole.val.name == "SPair-71k val"
        assert ends_of(whole.val) == ends_of(spair_pairs(str(root), "val"))
        assert len(small.numbers) == 5 and small.val.name == "SPair-71k small trn held back"
        assert ends_of(small.train, small.numbers) | ends_of(small.val) == ends_of(small.train)
    assert len(phase_on(root, "--annotated", 10).numbers) == 10


def test_more_annotated_pairs_than_are_left_are_refused(spair, tmp_path):
    flags = [*SMALL, "--dataset", "spair", "--root", spair, "--out", tmp_path / "new"]
    for count in (10, 11):
        assert f"--annotated {count}: SPair-71k trn has 9 pairs" in refused(*flags, "--annotated", count)
    assert not files_in(tmp_path)


def test_of_less_than_five_pairs_and_of_labels_none_are_held_back(spair, labels, tmp_path):
    (tmp_path / "few").mkdir()
    spair_shapes(tmp_path / "few", {"large/trn": [0, 9, 18, 27]})
    shutil.copytree(labels, tmp_path / "labels", symlinks=True)
    (tmp_path / "labels/SC-ImageNet/Layout/large/val.txt").unlink()
    before = files_in(tmp_path)
    for flags in (["--dataset", "spair", "--root", tmp_path / "few"], ["--pretrain", tmp_path / "labels"]):
        assert "expected Layout/large/val.txt" in refused(*SMALL, *flags, "--out", tmp_path / "new")
    assert files_in(tmp_path) == before
