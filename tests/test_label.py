"""Closed loops, selection and the pieces of label.py; the tree it writes is read in test_label_tree.py."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import label
from label import Clique, LabelConfig, clique_maps, closed_loops, image_errors, loop_errors, pair_matches
from modules import Features, cells_to_xy, kernel_soft_argmax, read_at, select_pairs
from support import detector, label_report, shapes
from support.pictures import draw_pair, error_legend
from support.shapes import Shapes, corresponding_points, draw_shape
from support.shards import ImageGroups, Records, run_shards, shard_path, write_record
from train import Cascade, Config, build_optimizer, save

CFG = Config(backbone="random_vit8", volume_window=2, ffn_ratio=0.25, saliency_threshold=0.5)


def random_clique(count: int, h: int = 4, w: int = 6, seed: int = 0) -> tuple[Cascade, Clique]:
    """A cascade whose volumes are far from the backbone's own, and images of different sizes."""
    torch.manual_seed(seed)
    cascade = Cascade(CFG).eval()
    for p in cascade.pixel.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    saliency = (torch.rand(count, h, w) > 0.3).float()
    feats = Features(torch.randn(count, h * w, 128), torch.randn(count, 128), saliency)
    sizes = [(60 + 10 * k, 50 - 3 * k) for k in range(count)]
    boxes = [(5, 4, 40 + k, 30) for k in range(count)]
    stride = torch.tensor([[width / w, height / h] for width, height in sizes])
    side = torch.tensor([float(max(x1 - x0, y1 - y0)) for x0, y0, x1, y1 in boxes])
    return cascade, Clique(list(range(count)), feats, sizes, boxes, stride, side, saliency.flatten(1) > 0.5)


def read_map(table: list, x: float, y: float) -> tuple[float, float]:
    """A transfer map [y][x] -> (u, v), bilinear between the four cells around (x, y), the border repeated."""
    h, w = len(table), len(table[0])
    x, y = min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)
    x0, y0 = min(int(x), w - 2), min(int(y), h - 2)
    u = v = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
            a, b = table[y0 + dy][x0 + dx]
            u, v = u + weight * a, v + weight * b
    return u, v


def test_what_the_paper_gives_is_the_default():
    """Sections 3.4 and 3.5: 100 loops an image, the top 30 %, 7 pairs an image, 32 points a pair."""
    cfg = LabelConfig()
    assert (cfg.loops, cfg.keep, cfg.pairs, cfg.points) == (100, 0.3, 7, 32)
    assert cfg.clique_size == 12 and not cfg.detector  # 11 * 10 loops


def test_clique_errors_equal_those_of_one_loop_at_a_time(monkeypatch):
    cascade, clique = random_clique(5)
    h, w = clique.feats.grid
    maps, _ = clique_maps(cascade, clique.feats, batch=3)
    for cap in (math.inf, 0.15):
        monkeypatch.setattr(label, "CAP", cap)
        fast = image_errors(clique, maps)
        for s in range(5):
            errors = []
            for m in range(5):
                for t in range(5):
                    if len({s, m, t}) < 3:
                        continue
                    tables = []
                    for a, b in ((s, m), (m, t), (t, s)):  # three volumes a loop
                        first, second = sorted((a, b))
                        ends = (clique.feats.map(lambda x, i=i: x[i : i + 1]) for i in (first, second))
                        corr = cascade.volume(*ends)
                        rows = corr[0] if a == first else corr[0].permute(2, 3, 0, 1)
                        tables.append(kernel_soft_argmax(rows).tolist())
                    for n in clique.foreground[s].nonzero()[:, 0].tolist():
                        x, y = n % w, n // w
                        for table in tables:
                            x, y = read_map(table, x, y)
                        dx, dy = (x - n % w) * clique.sizes[s][0] / w, (y - n // w) * clique.sizes[s][1] / h
                        errors.append(min(math.hypot(dx, dy) / float(clique.side[s]), cap))
            assert fast[s] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_maps_and_partners_of_one_volume_serve_both_directions():
    cascade, clique = random_clique(4, seed=1)
    maps, partners = clique_maps(cascade, clique.feats, batch=4, matched=True)
    h, w = clique.feats.grid
    for a in range(4):
        for b in range(a + 1, 4):
            src, trg = (clique.feats.map(lambda x, i=i: x[i : i + 1]) for i in (a, b))
            corr = cascade.volume(src, trg)
            torch.testing.assert_close(maps[a, b], kernel_soft_argmax(corr)[0], atol=1e-4, rtol=1e-4)
            back = kernel_soft_argmax(corr.permute(0, 3, 4, 1, 2))[0]
            torch.testing.assert_close(maps[b, a], back, atol=1e-4, rtol=1e-4)
            pairs = select_pairs(corr, src, trg, cascade.cfg)
            found = {(int(i), int(j)) for i, j, v in zip(pairs.src[0], pairs.trg[0], pairs.valid[0]) if v}
            assert found == {(i, int(j)) for i, j in enumerate(partners[a, b]) if j >= 0}
            assert found == {(int(j), i) for i, j in enumerate(partners[b, a]) if j >= 0}
            assert all(clique.foreground[a, i] and clique.foreground[b, j] for i, j in found)


def test_maps_are_read_bilinearly_and_repeat_the_border():
    maps = torch.randn(2, 3, 5, 2)
    planes = maps.permute(0, 3, 1, 2)
    points = torch.rand(2, 40, 2) * torch.tensor([8.0, 6.0]) - 1.5
    places = read_at(planes, points)
    for b in range(2):
        for (x, y), place in zip(points[b].tolist(), places[b].tolist()):
            assert place == pytest.approx(read_map(maps[b].tolist(), x, y), abs=1e-4)
    centres = cells_to_xy(torch.arange(15), 5).expand(2, -1, -1)
    torch.testing.assert_close(read_at(planes, centres), maps.flatten(1, 2), atol=1e-5, rtol=1e-5)


def shifted_clique(count: int, h: int, w: int, shift: dict | None = None) -> tuple:
    """Images whose maps are the identity, but for maps[a, b] moved by shift[a, b]; stride 10."""
    cells = cells_to_xy(torch.arange(h * w), w).view(h, w, 2)
    maps = cells.expand(count, count, h, w, 2).clone()
    for ends, by in (shift or {}).items():
        maps[ends] += torch.tensor(by)
    sizes, side = [(10 * w, 10 * h)] * count, torch.full((count,), 10.0 * max(h, w))
    feats = Features(torch.zeros(count, h * w, 1), torch.zeros(count, 1), torch.ones(count, h, w))
    everything = torch.ones(count, h * w, dtype=torch.bool)
    boxes = [(0, 0, 10 * w, 10 * h)] * count
    clique = Clique(list(range(count)), feats, sizes, boxes, torch.full((count, 2), 10.0), side, everything)
    return clique, maps, torch.arange(h * w).expand(count, count, -1).clone()


def test_a_loop_that_ends_two_cells_off_errs_by_two_cells_over_the_box(monkeypatch):
    clique, maps, _ = shifted_clique(3, 5, 8, {(2, 0): (2.0, 0.0)})
    _, back, real = closed_loops(maps, 0)
    assert real.tolist() == [[False, False, False], [False, False, True], [False, True, False]]
    torch.testing.assert_close(loop_errors(clique, 0, back)[1, 2], torch.full((40,), 0.1))
    assert image_errors(clique, maps)[0] == pytest.approx(0.05)
    monkeypatch.setattr(label, "CAP", math.inf)
    errors = loop_errors(clique, 0, back)
    torch.testing.assert_close(errors[1, 2], torch.full((40,), 20 / 80))  # 0 -> 1 -> 2 -> 0
    torch.testing.assert_close(errors[2, 1], torch.zeros(40))  # 0 -> 2 -> 1 -> 0


def test_every_pair_is_labelled_once_with_spread_points_and_images_take_turns():
    clique, maps, partners = shifted_clique(6, 9, 12)
    pairs = pair_matches(clique, maps, partners, LabelConfig(points=20, batch=4))
    assert sorted(tuple(sorted((p["src"], p["trg"]))) for p in pairs) == [
        (a, b) for a in range(6) for b in range(a + 1, 6)
    ]
    assert {sum(p["src"] == k for p in pairs) for k in range(6)} == {2, 3}
    for pair in pairs:
        assert pair["src_kps"] == pair["trg_kps"] and pair["errors"] == [0.0] * 20 and pair["score"] == 0
        points = np.array(pair["src_kps"])
        apart = np.abs(points[:, None] - points).max(-1) + 1e3 * np.eye(20)
        assert apart.min() >= 20  # two cells of ten pixels: 30 places remain, with three cells only 12


def test_matches_that_disagree_leave_the_box_or_their_partner_are_dropped(monkeypatch):
    monkeypatch.setattr(label, "FEWEST", 1)
    clique, maps, partners = shifted_clique(5, 6, 6)
    clique.side[0] = 600  # what counts is the box of 1, of 60 pixels
    maps[0, 1, 2, 3] += torch.tensor([1.2, 0.0])  # direct transfer and the ways through 2, 3, 4 disagree
    partners[0, 1, 7] = 9  # selection paired it with a cell two away
    partners[0, 1, 8] = -1  # selection paired it with none
    clique.boxes[1] = (0, 0, 50, 60)  # t's box leaves out the last column
    clique = clique._replace(boxes=clique.boxes[:1] + [(0, 0, 50, 60)] + clique.boxes[2:])
    pairs = pair_matches(clique, maps, partners, LabelConfig(points=40))
    (pair,) = (p for p in pairs if {p["src"], p["trg"]} == {0, 1})
    assert (pair["src"], pair["trg"]) == (0, 1)
    lost = {2 * 6 + 3, 7, 8} | {6 * y + 5 for y in range(6)}
    cells = {round((y - 4.5) / 10) * 6 + round((x - 4.5) / 10) for x, y in pair["src_kps"]}
    assert cells == set(range(36)) - lost


def test_a_pair_with_too_few_matches_is_left_out(monkeypatch):
    monkeypatch.setattr(label, "FEWEST", 6)
    clique, maps, partners = shifted_clique(4, 3, 4)
    partners[0, 1] = partners[1, 0] = -1
    partners[0, 1, :5] = torch.arange(5)
    pairs = pair_matches(clique, maps, partners, LabelConfig())
    assert len(pairs) == 5 and all({p["src"], p["trg"]} != {0, 1} for p in pairs)


def test_matches_are_the_best_by_their_mean_loop_error(monkeypatch):
    clique, maps, partners = shifted_clique(4, 4, 6)
    maps[1, 0, :, 3:] += torch.tensor([0.5, 0.0])  # loops from there miss by half a cell
    monkeypatch.setattr(label, "FEWEST", 1)
    pairs = pair_matches(clique, maps, partners, LabelConfig(points=12))
    (pair,) = (p for p in pairs if (p["src"], p["trg"]) == (0, 1))
    assert max(x for x, _ in pair["src_kps"]) < 30 and pair["errors"] == [0.0] * 12
    monkeypatch.undo()
    pairs = pair_matches(clique, maps, partners, LabelConfig(points=24))
    (pair,) = (p for p in pairs if (p["src"], p["trg"]) == (0, 1))
    assert sorted(pair["errors"])[::12] == [0.0, pytest.approx(5 / 60, abs=1e-4)]


def test_an_image_is_a_single_instance_with_exactly_one_sure_box():
    boxes = torch.tensor([[10.4, 5.0, 30.2, 28.6], [1.0, 2.0, 3.0, 4.0]])
    assert detector.single_box(torch.tensor([0.95, 0.9]), boxes, (40, 30)) == (10, 5, 31, 29)
    assert detector.single_box(torch.tensor([0.95, 0.91]), boxes, (40, 30)) is None
    assert detector.single_box(torch.tensor([0.5, 0.4]), boxes, (40, 30)) is None
    beyond = torch.tensor([[-3.0, -1.0, 45.0, 30.5]])
    assert detector.single_box(torch.tensor([0.99]), beyond, (40, 30)) == (0, 0, 40, 30)
    sliver = torch.tensor([[39.9, 29.9, 40.0, 30.0]])
    assert detector.single_box(torch.tensor([0.99]), sliver, (40, 30)) == (39, 29, 40, 30)


def test_the_foregrounds_box_covers_its_cells_in_whole_pixels():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = mask[2, 3] = True
    # cells of 6.6 x 5.5: 13.2..26.4, 5.5..16.5
    assert label.foreground_box(mask, (33, 22)) == (13, 5, 27, 17)


def test_cliques_hold_the_asked_number_of_loops():
    assert [LabelConfig(loops=n).clique_size for n in (2, 100, 110, 111)] == [3, 12, 12, 13]
    for count in range(1, 60):
        cut = label.split_cliques(list(range(count)), 12)
        assert sum(cut, []) == list(range(count))
        assert all(12 <= len(c) < 24 for c in cut) or (count < 12 and len(cut) == 1)


def test_the_most_consistent_share_of_every_class_is_kept():
    errors = dict(enumerate([0.3, 0.1, 0.2, 0.4] + [0.05, 0.06, 0.07, 0.08] + [0.9, 0.8, 0.7, 0.6]))
    labels = [0] * 4 + [1] * 4 + [2] * 4
    assert label.select_images(errors, labels, 0.5) == {0: [1, 2], 1: [4, 5], 2: [11, 10]}
    assert label.select_images(errors, labels, 0.3) == {0: [1], 1: [4], 2: [11]}
    assert label.share_of(0.29, 100) == 29 and label.share_of(0.3, 9) == 2


def test_val_images_come_in_company_and_are_not_in_trn():
    kept = {k: list(range(100 * k, 100 * k + n)) for k, n in enumerate([5, 12, 40, 12, 12, 7])}
    splits = label.split_images(kept, 0.1, seed=0)
    sizes = {k: len(some) for k, some in splits["val"].items() if some}
    # owed: 6 + 0.5 + 1.2, paid at once; 1.7 + 4 are too few for a company; 1.7 + 4 + 1.2
    assert sizes == {1: 6, 3: 6}
    for k, members in kept.items():
        assert sorted(splits["trn"][k] + splits["val"][k]) == members
    assert label.split_images(kept, 0.0, 0)["val"] == dict.fromkeys(kept, [])


def test_mean_value_coordinates_of_a_triangle_are_affine():
    triangle, other = np.array([0, 10, 4 + 8j]), np.array([5 + 1j, 3 + 20j, -9 + 2j])
    points = np.array([[4.0, 2.0], [5.0, 4.0], [3.0, 1.0]])
    found = corresponding_points({"parts": [triangle]}, {"parts": [other]}, points)
    for (x, y), place in zip(points, found):
        shares = np.linalg.solve([[0, 10, 4], [0, 0, 8], [1, 1, 1]], [x, y, 1])
        assert place == pytest.approx([shares @ other.real, shares @ other.imag])


def test_the_front_part_covers_and_points_off_the_object_move_with_its_boundary():
    square = np.array([0, 10, 10 + 10j, 10j])
    src = {"parts": [square, square / 2 + (2 + 2j)]}  # the second lies in front
    trg = {"parts": [square + 100, square / 2 + (2 + 202j)]}
    found = corresponding_points(src, trg, np.array([[3.0, 4.0], [9.0, 9.0], [12.0, 5.0], [10.0, 10.0]]))
    assert found == pytest.approx(np.array([[3, 204], [109, 9], [110, 5], [110, 10]]))


def test_keypoints_of_a_shape_move_to_their_namesakes():
    near = []
    for category, seed in (("dog", 1), ("plane", 2), ("bicycle", 3), ("teapot", 4)):
        a, b = draw_shape(category, seed), draw_shape(category, seed + 50)
        found = corresponding_points(a, b, np.array(list(a["kps"].values())))
        near += np.linalg.norm(found - np.array([b["kps"][n] for n in a["kps"]]), axis=1).tolist()
        inside = np.argwhere(np.asarray(a["mask"]))[::7, ::-1]
        apart = np.linalg.norm(corresponding_points(a, a, inside) - inside, axis=1)
        assert apart.max() < 2  # an outline's width
    assert np.mean(np.array(near) < 2) > 0.9


class OneOrTwoObjects(torch.nn.Module):
    """Stands for the detector: two objects in images wider than high, one box otherwise."""

    def forward(self, photos: list[torch.Tensor]) -> list[dict]:
        count = 2 if photos[0].shape[2] > photos[0].shape[1] else 1
        boxes = torch.tensor([[4.5, 6.0, 40.0, 44.2], [2.0, 2.0, 9.0, 9.0]])[:count]
        return [{"boxes": boxes, "scores": torch.full((count,), 0.97), "labels": torch.ones(count)}]


def test_a_detector_keeps_single_instances_and_its_box_bounds_the_points(tmp_path, monkeypatch):
    for k in range(8):
        size = (60, 48) if k in (2, 5) else (48, 60)
        path = tmp_path / "root" / "fish" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape("fish", k, 64)["image"].resize(size).save(path)
    checkpoint = small_checkpoint(tmp_path)
    monkeypatch.setattr(detector, "load_detector", lambda weights, device: OneOrTwoObjects())
    for name, value in (("CAP", 9.0), ("FEWEST", 1)):
        monkeypatch.setattr(label, name, value)
    flags = f"--checkpoint {checkpoint} --root {tmp_path}/root --out {tmp_path}/out --loops 2 --keep 1"
    summary = label.main([*flags.split(), "--detector", "--device", "cpu"])
    funnel = {"seen": 8, "unreadable": 0, "without_a_single_object": 2, "without_foreground": 0}
    used = summary["images"].pop("used")
    assert summary["images"] == funnel | {"measured": 6, "alone": 0, "kept": 6} and used <= 6
    assert summary["box"] == "detector"
    files = list((tmp_path / "out/SC-ImageNet/PairAnnotation").glob("*/*.json"))
    assert len(files) == sum(summary["pairs"].values()) and min(summary["pairs"].values()) > 0
    ends = {json.loads(file.read_text())[f"{side}_imname"] for file in files for side in ("src", "trg")}
    assert len(ends) == used
    for file in files:
        pair = json.loads(file.read_text())
        assert pair["src_bndbox"] == pair["trg_bndbox"] == [4, 6, 40, 45]
        for x, y in pair["src_kps"] + pair["trg_kps"]:
            assert 4 <= x <= 40 and 6 <= y <= 45
        assert not {"fish_2.JPEG", "fish_5.JPEG"} & {pair["src_imname"], pair["trg_imname"]}


def small_checkpoint(folder: Path) -> str:
    """A checkpoint of an untrained cascade."""
    cascade = Cascade(Config(backbone="random_vit8", size=64, ffn_ratio=0.25))
    save(folder / "small.pt", cascade, build_optimizer(cascade), 0)
    return str(folder / "small.pt")


def test_a_file_that_is_no_detector_is_refused_in_one_line(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    for name in ("w.pth", "missing.pth"):
        line = f"cannot read the detector from .*{name} .*--detector-weights"
        with pytest.raises(ValueError, match=line) as caught:
            detector.load_detector(str(tmp_path / name), torch.device("cpu"))
        assert "\n" not in str(caught.value)


def test_precision_counts_right_matches_by_kind_and_by_loop_error():
    judged = [("kept", 0.01, True, True), ("kept", 0.025, False, False), ("kept", 0.1, True, True)]
    judged += [("dropped images", 0.05, False, True)]
    assert label_report.precision_table(judged, 0.1) == {
        "kept": [66.7, 3],
        "dropped images": [0.0, 1],
        "kept, facing alike": [100.0, 2],
        "kept, facing opposite ways": [0.0, 1],
        "kept, loop error 0.0 to 2.5 %": [100.0, 1],
        "kept, loop error 2.5 to 5.0 %": [0.0, 1],
        "kept, loop error 7.5 to 10.0 %": [100.0, 1],
    }


def test_a_drawn_shapes_label_is_judged_by_its_true_partner():
    images = Shapes("train")
    src, trg = images.draw(3), images.draw(9)
    points = np.array(list(src["kps"].values()))[:4]
    truth = corresponding_points(src, trg, points)
    x0, y0, x1, y1 = trg["bbox"]
    side = max(x1 - x0, y1 - y0)
    moved = truth + np.array([[0, 0], [0.09 * side, 0], [0, 0.11 * side], [side, 0]])
    pair = {"src": 3, "trg": 9, "src_kps": points.tolist(), "trg_kps": moved.tolist()}
    assert label_report.right_matches(images, pair) == [True, True, False, False]


def test_pages_of_pairs_begin_with_the_scale_of_their_colours(tmp_path):
    Image.new("RGB", (200, 160)).save(tmp_path / "a.png")
    images = data.ImageSet([tmp_path / "a.png"] * 2, [0, 0], ["duck"])
    kps = {"src_kps": [[20, 40], [20, 120]], "trg_kps": [[150, 40], [150, 120]]}
    pair = kps | {"src": 0, "trg": 1, "errors": [0.0, 0.4]}

    class Shards(list):
        def read(self, shard: int) -> dict:
            return self[shard]

    kept = [pair | {"score": score, "kept": True} for score in (0.01, 0.03)]
    records = (Shards([{"pairs": some}]) for some in (kept, [pair | {"score": 0.2, "kept": False}]))
    label_report.draw_pages(tmp_path, images, *records, count=1)
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {
        "best.jpg", "worst.jpg", "typical.jpg", "dropped_images.jpg"}
    for name, score in (("best", 0.01), ("worst", 0.03), ("dropped_images", 0.2)):
        expected = [error_legend(), draw_pair(images, pair | {"score": score})]
        with Image.open(tmp_path / "drawn" / f"{name}.jpg") as page:
            assert page.size == (max(view.width for view in expected), 18 + 8 + expected[1].height)
            for view, y in zip(expected, (0, 26)):
                found = np.asarray(page.crop((0, y, view.width, y + view.height)), float)
                assert np.abs(found - np.asarray(view, float)).mean() < 6, name


def test_exactly_half_of_the_other_images_are_enough(monkeypatch):
    monkeypatch.setattr(label, "FEWEST", 1)
    clique, maps, partners = shifted_clique(26, 2, 3)
    maps[14:, 1] += torch.tensor([2.0, 0.0])  # 12 of 24 send the points of 0 elsewhere in 1
    pairs = pair_matches(clique, maps, partners, LabelConfig())
    (pair,) = (p for p in pairs if {p["src"], p["trg"]} == {0, 1})
    assert len(pair["src_kps"]) == 6
    maps[13, 1] += torch.tensor([2.0, 0.0])
    pairs = pair_matches(clique, maps, partners, LabelConfig())
    assert not [p for p in pairs if {p["src"], p["trg"]} == {0, 1}]


def test_matches_none_of_whose_loops_closes_are_dropped(monkeypatch):
    monkeypatch.setattr(label, "FEWEST", 1)
    clique, maps, partners = shifted_clique(4, 4, 5)
    maps[1, 0, 2, 3] += torch.tensor([0.0, 2.0])  # where every loop over cell 13 of 1 comes back
    found = pair_matches(clique, maps, partners, LabelConfig())
    (pair,) = (p for p in found if (p["src"], p["trg"]) == (0, 1))
    assert len(pair["src_kps"]) == 19 and [34.5, 24.5] not in pair["src_kps"]
    monkeypatch.setattr(label, "CAP", 9.0)
    found = pair_matches(clique, maps, partners, LabelConfig())
    (pair,) = (p for p in found if (p["src"], p["trg"]) == (0, 1))
    assert len(pair["src_kps"]) == 20 and max(pair["errors"]) == pytest.approx(20 / 50)


def test_shards_of_other_images_are_refused_after_a_repair(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for k in range(9):
        (root / "fish").mkdir(parents=True, exist_ok=True)
        draw_shape("fish", k, 64)["image"].save(root / "fish" / f"{k}.png")
    whole = (root / "fish/4.png").read_bytes()
    (root / "fish/4.png").write_bytes(whole[:500])
    for name, value in (("CAP", 9.0), ("FEWEST", 1)):
        monkeypatch.setattr(label, name, value)
    checkpoint, out = small_checkpoint(tmp_path), tmp_path / "out"
    flags = f"--checkpoint {checkpoint} --root {root} --out {out} --loops 2 --keep 1 --device cpu".split()
    assert label.main(flags)["images"]["unreadable"] == 1
    (root / "fish/4.png").write_bytes(whole)
    for step, what in (("loops", r"1 rewritten \(fish/4.png\)"), ("pairs", r"3 new \(fish/2.png\)")):
        refusal = rf"work/{step} was made from other photographs: {what}; give another --out, or delete"
        with pytest.raises(ValueError, match=refusal):
            label.main(flags)
        shutil.rmtree(out / "work" / step)
    assert label.main(flags)["images"]["unreadable"] == 0


class Sides(ImageGroups):
    """Items of shards for the tests: the sides of a group's images."""

    def __getitem__(self, number: int) -> list:
        return [i for i, *_ in self.read(number)[0]]


def make_shards(base: Path, settings: dict, groups: list | None = None) -> list[dict]:
    """Shards of the images below base/root with their maps in base/maps; returns their records."""
    paths = sorted((base / "root" / "fish").iterdir())
    (maps,) = {"maps", "other"} & {path.name for path in base.iterdir()}
    images = data.ImageSet(paths, [0] * len(paths), ["fish"], str(base / maps))
    groups = groups or [list(range(len(paths)))]
    cfg = SimpleNamespace(out=str(base / "out"), workers=0)
    costs, made = [1] * len(groups), lambda number, item: {"index": item}
    return list(run_shards(cfg, "loops", "loops", Sides(images, groups), costs, settings, made))


def write_images(base: Path, count: int = 4) -> None:
    for folder, end in (("root", ""), ("maps", "_sal")):
        (base / folder / "fish").mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (4, 4)).save(base / folder / "fish" / f"{k}{end}.png")


CHANGES = {
    "nothing": (lambda base: None, {}, ""),
    "a moved folder of maps": (lambda base: (base / "maps").rename(base / "other"), {}, ""),
    "an option": (lambda base: None, {"--loops": 8}, "with --loops 6, not --loops 8;"),
    "a checkpoint": (lambda base: None, {"checkpoint (--checkpoint)": "b"},
                     "with another checkpoint (--checkpoint);"),
    "the same size": (lambda base: os.utime(base / "root/fish/2.png", ns=(1, 1)), {},
                      "from other photographs: 1 rewritten (fish/2.png);"),
    "the same time": (lambda base: rewrite(base / "root/fish/2.png"), {},
                      "from other photographs: 1 rewritten (fish/2.png);"),
    "a name": (lambda base: (base / "root/fish/2.png").rename(base / "root/fish/9.png"), {},
               "from other photographs: 1 new (fish/9.png), 1 gone (fish/2.png);"),
    "a map": (lambda base: rewrite(base / "maps/fish/3_sal.png"), {},
              "from other saliency maps: 1 rewritten (fish/3.png);"),
    "no map": (lambda base: (base / "maps/fish/3_sal.png").unlink(), {},
               "from other saliency maps: 1 rewritten (fish/3.png);"),
    "no settings": (lambda base: (base / "out/work/loops/settings.json").unlink(), {},
                    "its settings.json is missing;"),
}


def rewrite(path: Path) -> None:
    """Other bytes, the time of modification as it was."""
    state = path.stat()
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("case", CHANGES)
def test_shards_of_other_files_or_options_are_refused_in_the_users_words(tmp_path, case):
    change, options, words = CHANGES[case]
    settings = {"--loops": 6, "checkpoint (--checkpoint)": "a"}
    write_images(tmp_path)
    before = make_shards(tmp_path, settings)
    shard = shard_path(tmp_path / "out", "loops", 0)
    written = shard.stat().st_mtime_ns
    change(tmp_path)
    if not words:
        assert make_shards(tmp_path, settings) == before and shard.stat().st_mtime_ns == written
        return
    with pytest.raises(ValueError) as error:
        make_shards(tmp_path, settings | options)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert f"give another --out, or delete {shard.parent} to make it anew" in str(error.value)
    shutil.rmtree(shard.parent)
    make_shards(tmp_path, settings | options)


def test_other_groups_of_the_same_images_are_refused(tmp_path):
    write_images(tmp_path)
    make_shards(tmp_path, {}, [[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="work/loops was made from other groups of these images; give"):
        make_shards(tmp_path, {}, [[0, 2], [1, 3]])


FILES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a list": lambda path: path.write_text("[1, 2]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "no digest": lambda path: path.write_text(json.dumps({"record": {"index": [0, 1, 2, 3]}})),
    "an earlier version": lambda path: path.write_text('{"errors": {}, "empty": [], "skipped": []}'),
    "one changed value": lambda path: path.write_text(path.read_text().replace("3", "4", 1)),
    "of another place": lambda path: write_record(path.with_name("000009.json"), {"index": [0, 1, 2, 3]})
    or path.with_name("000009.json").replace(path),
}


@pytest.mark.parametrize("name", ["000000.json", "settings.json"])
@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_of_the_work_are_named_in_one_line(tmp_path, damage, name):
    write_images(tmp_path)
    before = make_shards(tmp_path, {"--loops": 3})
    path = tmp_path / "out" / "work" / "loops" / name
    FILES[damage](path)
    with pytest.raises(ValueError, match="is damaged, or another version of label.py wrote it") as error:
        make_shards(tmp_path, {"--loops": 3})
    to_delete = path if name == "000000.json" else path.parent
    assert str(error.value).startswith(f"{path} is damaged") and "\n" not in str(error.value)
    assert f"delete {to_delete}, and the same command makes it anew" in str(error.value)
    shutil.rmtree(to_delete) if to_delete.is_dir() else to_delete.unlink()
    assert make_shards(tmp_path, {"--loops": 3}) == before


def test_classes_that_are_too_small_are_named_before_the_work_starts(capsys):
    kept = {"fish": label.share_of(0.3, 10), "bird": label.share_of(0.3, 9), "duck": label.share_of(0.3, 19)}
    label.check_sizes(LabelConfig(), kept | {"dog": 0})
    printed, line = capsys.readouterr()
    says = "classes that keep fewer than three images give nothing, and --keep 0.3 keeps three of 10: "
    assert (printed, line) == ("", f"{says}bird (2), dog (0)\n")
    for keep, count in ((0.3, 10), (0.29, 11), (0.1, 30), (0.6, 5), (0.7, 5), (1.0, 3)):
        label.check_sizes(LabelConfig(keep=keep), {"fish": 9, "dog": label.share_of(keep, count - 1)})
        assert f"--keep {keep} keeps three of {count}: dog (2)" in capsys.readouterr().err
        label.check_sizes(LabelConfig(keep=keep), {"fish": 9, "dog": label.share_of(keep, count)})
        assert capsys.readouterr().err == ""
    for few in ({"fish": 5}, {"fish": 3, "bird": 2}, {"fish": 0}):
        says = f"--keep 0.3: trn and val each need .* no class keeps more than {max(few.values())}; keep more"
        with pytest.raises(ValueError, match=says):
            label.check_sizes(LabelConfig(), few)
    label.check_sizes(LabelConfig(), {"fish": 6})
    groups = label.kept_groups(LabelConfig(), {0: [*range(6)]}, ["fish"])
    assert [(split, len(some)) for split, _, some in groups] == [("trn", 3), ("val", 3)]
    assert len(label.kept_groups(LabelConfig(), {0: [1, 2, 3], 1: [4, 5, 6]}, ["a", "b"])) == 2


def pair_records(out: Path, *groups: tuple[str, int]) -> Records:
    """Shards of groups (split, number of kept pairs)."""
    for number, (split, count) in enumerate(groups):
        path = shard_path(out, "pairs", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, {"split": split, "pairs": [{"kept": True}] * count + [{"kept": False}]})
    return Records(str(out), "pairs", len(groups), {})


@pytest.mark.parametrize("groups, splits", [
    ([("trn", 4), ("val", 2), ("trn", 3)], ["trn", "val", "trn"]),  # as they were
    ([("trn", 4), ("trn", 2), ("trn", 3)], ["trn", "val", "trn"]),
    ([("trn", 4), ("val", 0), ("trn", 3)], ["trn", "val", "val"]),
    ([("trn", 0), ("val", 5), ("val", 3), ("val", 3)], ["trn", "trn", "val", "trn"]),
])  # fmt: skip
def test_no_split_is_empty_while_two_cliques_have_pairs(tmp_path, groups, splits):
    records = label.fill_splits(pair_records(tmp_path, *groups))
    assert [record["split"] for record in records] == splits
    assert [records.read(k)["split"] for k in range(len(groups))] == splits
    assert [sum(pair["kept"] for pair in record["pairs"]) for record in records] == [n for _, n in groups]


def test_pairs_of_a_single_clique_are_refused_with_the_numbers(tmp_path):
    for count, cliques in ((5, 1), (0, 0)):
        says = f"{count} pairs have 8 matches, in {cliques} of 2 cliques of images, and trn and val need a c"
        with pytest.raises(ValueError, match=says):
            label.fill_splits(pair_records(tmp_path, ("trn", count), ("val", 0)))


def test_pairs_of_dropped_shapes_are_looked_at_for_pictures_only_and_change_no_label(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPE_SPLITS, "train", (0, 10))
    for name, value in (("CAP", 9.0), ("FEWEST", 1)):
        monkeypatch.setattr(label, name, value)
    flags = ["--checkpoint", small_checkpoint(tmp_path), "--loops", "2", "--device", "cpu", "--points", "8"]
    plain, drawn = (label.main([*flags, "--out", str(tmp_path / name), "--draw", count])
                    for name, count in (("plain", "0"), ("drawn", "1")))
    assert not (tmp_path / "plain/work/dropped").exists() and (tmp_path / "drawn/work/dropped").exists()
    assert "dropped images" in drawn["precision"] and "dropped images" not in plain.pop("precision")
    trees = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
             for root in (tmp_path / name / "SC-ImageNet" for name in ("plain", "drawn"))]
    assert trees[0] == trees[1] and len(trees[0]) > 30 and min(plain["pairs"].values()) > 0
    assert all(drawn[name] == plain[name] for name in plain if name != "config")


def test_every_numeric_option_has_a_range_and_the_message_names_it():
    numeric = [field.name for field in dataclasses.fields(LabelConfig) if field.type in (int, float)]
    assert {"size", "loops", "keep", "pairs", "points", "draw", "seed", "batch", "workers"} == set(numeric)
    for name in numeric:
        for value in ("-1", str(2**70)) if name not in ("size", "batch", "workers") else ("-1",):
            with pytest.raises(ValueError, match=f"^--{name} "):
                label.parse_config([f"--{name}", value])
    for flags in ("--keep 30", "--keep nan", "--keep 1.01", "--loops 1", "--points 7", "--batch 0"):
        with pytest.raises(ValueError, match=f"^{flags.split()[0]} "):
            label.parse_config(flags.split())


def test_a_root_alone_means_class_folders_and_wants_a_checkpoint():
    assert label.parse_config([]) == LabelConfig()
    with pytest.raises(ValueError, match="give --checkpoint FILE"):
        label.parse_config(["--root", "photos"])
    cfg = label.parse_config("--root photos --checkpoint last.pt --detector-weights w.pth".split())
    assert (cfg.dataset, cfg.root, cfg.detector) == ("folder", "photos", True)
