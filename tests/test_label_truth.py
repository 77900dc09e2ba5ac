"""Labels against keypoints that the labeller never saw: experiments/label_truth.py."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from experiments.label_truth import Annotated, judge, main, read_images
from support.shapes import shapes_pairs
from train import parse_config, train

SMALL = ("--backbone random_vit8 --size 64 --batch 3 --candidates 6 --ffn-ratio 0.25 --val none --log-every 1"
         " --device cpu --steps 1").split()


def spair(folder, split: str = "trn", a_class: int = 4) -> None:
    """Shapes in SPair-71k's layout: the first pairs of two classes."""
    keypoints, lines = shapes_pairs("val"), []
    (folder / "PairAnnotation" / split).mkdir(parents=True)
    (folder / "Layout" / "large").mkdir(parents=True)
    for category in ("fish", "bicycle"):
        (folder / "JPEGImages" / category).mkdir(parents=True)
        for pair in [p for p in keypoints.pairs if p.category == category][:a_class]:
            name = f"{len(lines) + 1:06d}-{pair.src}-{pair.trg}:{category}"
            record = {"category": category, "kps_ids": [str(k) for k in range(len(pair.src_kps))]}
            record |= dict.fromkeys(("viewpoint_variation", "scale_variation", "truncation", "occlusion"), 0)
            for side, kps, box in (("src", pair.src_kps, pair.src_box), ("trg", pair.trg_kps, pair.trg_box)):
                image = getattr(pair, side)
                keypoints.load(image)[0].save(folder / "JPEGImages" / category / f"{image}.jpg")
                record |= {f"{side}_imname": f"{image}.jpg", f"{side}_kps": kps.tolist(),
                           f"{side}_bndbox": list(box)}
            (folder / "PairAnnotation" / split / f"{name}.json").write_text(json.dumps(record))
            lines.append(name)
    (folder / "Layout" / "large" / f"{split}.txt").write_text("\n".join(lines))


def test_keypoints_of_all_pairs_of_an_image_come_together(tmp_path):
    spair(tmp_path)
    path = next((tmp_path / "PairAnnotation" / "trn").glob("000001-*.json"))
    record = json.loads(path.read_text())
    cut = record | {"kps_ids": ["0"], "src_kps": record["src_kps"][:1], "trg_kps": record["trg_kps"][:1]}
    path.with_name("000000.json").write_text(json.dumps(cut))
    images, classes, known = read_images(str(tmp_path), "trn")
    assert sorted(set(classes)) == ["bicycle", "fish"] and len(images) == len(set(images)) == len(known)
    one = known[[i.name for i in images].index(record["src_imname"])]
    assert one.points == dict(zip(record["kps_ids"], map(tuple, record["src_kps"])))
    assert list(one.box) == record["src_bndbox"]


@pytest.mark.parametrize("shift, right", [(0.0, [True] * 4), (0.9, [True] * 4), (1.1, [False] * 4)])
def test_a_keypoint_is_right_within_a_tenth_of_the_targets_box(shift, right):
    """Images of 80x40 and 160x120 px, 8x4 cells both; a map that moves every cell by `shift` cells of 20 px;
    the target's box is 200 px on its longer side, so 20 px are right."""
    ys, xs = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    maps = torch.zeros(2, 2, 4, 8, 2)
    maps[0, 1] = torch.stack([xs + shift, ys], -1)
    clique = SimpleNamespace(index=[5, 3], sizes=[(80, 40), (160, 120)], feats=SimpleNamespace(grid=(4, 8)))
    cells = [(1.5, 1.0), (3.0, 2.0), (5.0, 0.5), (2.0, 2.5)]
    points = [{str(k): ((x + 0.5) * w / 8 - 0.5, (y + 0.5) * h / 4 - 0.5) for k, (x, y) in enumerate(cells)}
              for w, h in clique.sizes]
    known = dict(zip(clique.index, (Annotated(p, (0.0, 0.0, 200.0, 30.0)) for p in points)))
    known[3].points["other"] = (0.0, 0.0)  # not in the source
    labels = [(points[0][k][0] + dx, points[0][k][1]) for k, dx in (("0", 9.9), ("2", -10.1))]
    pair = {"src": 5, "trg": 3, "src_kps": labels}  # a cell is 10 px
    assert judge(known, clique, maps, pair) == (right, [True, False, False, False], True)
    mirrored = {k: (159 - x, y) for k, (x, y) in points[1].items()}
    known[3] = Annotated(mirrored, known[3].box)
    assert judge(known, clique, maps, pair)[2] is False
    few = Annotated({k: mirrored[k] for k in ("0", "1")}, known[3].box)
    assert judge(known | {3: few}, clique, maps, pair)[2] is None


def test_it_prints_kept_and_dropped_pairs(tmp_path, capsys, monkeypatch):
    """Every pair of a clique is labelled, and said to have three keypoints, of which two are right; the
    third alone has a label."""
    monkeypatch.setattr("experiments.label_truth.pair_matches", lambda clique, *rest: [
        {"src": a, "trg": b, "score": a + b, "src_kps": []}
        for a, b in itertools.combinations(clique.index, 2)])
    monkeypatch.setattr("experiments.label_truth.judge", lambda *given: (
        [True, True, False], [False, False, True], judge(*given)[2]))
    spair(tmp_path / "set", a_class=6)
    train(*parse_config([*SMALL, "--out", str(tmp_path / "run")]))
    capsys.readouterr()
    place = ["--checkpoint", str(tmp_path / "run" / "last.pt"), "--datapath", str(tmp_path / "set")]
    main([*place, "--keep", "0.5", "--device", "cpu"])
    said = capsys.readouterr().out
    images, classes, _ = read_images(str(tmp_path / "set"), "trn")
    kept = [classes.count(name) // 2 for name in ("bicycle", "fish")]
    assert f"{len(images)} images of 2 classes, {sum(kept)} kept" in said
    rows = {line[:40].strip(): int(line.split(" in ")[1].split()[0])
            for line in said.splitlines() if " keypoints in " in line}
    assert min(kept) >= 3 and rows["kept"] == sum(math.comb(n, 2) for n in kept)
    assert rows["dropped"] == sum(math.comb(classes.count(name) - n, 2) for name, n in
                                  zip(("bicycle", "fish"), kept))
    for kind in ("kept", "dropped"):
        assert f"{kind:40s}  66.7 % of {3 * rows[kind]:5d} keypoints in {rows[kind]} pairs" in said
        labelled = f"{kind}, a cell or less from a label"
        assert f"{labelled:40s}   0.0 % of {rows[kind]:5d} keypoints in {rows[kind]} pairs" in said
    assert rows["kept, facing alike"] + rows["kept, facing opposite ways"] == rows["kept"]
    quarters = [rows[f"all, quarter {q} by loop error"] for q in (1, 2, 3, 4)]
    assert sum(quarters) == rows["kept"] + rows["dropped"] and max(quarters) - min(quarters) <= 1
