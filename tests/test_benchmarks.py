"""Benchmarks on disk: SPair-71k, label sets, PF-PASCAL, PF-WILLOW, lists of one's own."""

import functools
import importlib.util
import itertools
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
import evaluate
from support import benchmarks
from support.benchmarks import csv_pairs, label_pairs, pfpascal_pairs, pfwillow, spair_pairs
from support.label_tree import write_label_tree

PASCAL = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person"
    " pottedplant sheep sofa train tvmonitor"
).split()
SPAIR = [name for name in PASCAL if name not in ("diningtable", "sofa")]
# The published annotation of SPair-71k's first test pair.
RECORD = json.loads("""
{"pair_id": 1, "filename": "000001-2008_002719-2008_004100:aeroplane", "src_imname": "2008_002719.jpg",
 "trg_imname": "2008_004100.jpg", "src_imsize": [500, 333, 3], "trg_imsize": [500, 332, 3],
 "src_bndbox": [210, 34, 475, 250], "trg_bndbox": [36, 92, 500, 200], "category": "aeroplane",
 "src_pose": "Left", "trg_pose": "Left", "src_kps": [[212, 153], [300, 130], [330, 127]],
 "trg_kps": [[39, 145], [364, 171], [416, 173]], "kps_ids": ["0", "7", "11"], "mirror": 0,
 "viewpoint_variation": 0, "scale_variation": 0, "truncation": 2, "occlusion": 2}""")


def need_scipy() -> None:
    pytest.importorskip("scipy.io", reason=".mat files need scipy")


def save_image(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path, None if path.suffix else "PNG")


def files(keypoints: data.KeypointSet, root: Path) -> list[list[str]]:
    """Every pair's images, below root."""
    return [[str(keypoints.images.paths[i].relative_to(root)) for i in pair[:2]] for pair in keypoints.pairs]


def fails(pattern: str, load, *args) -> str:
    """The one line that a call fails with."""
    with pytest.raises(ValueError, match=pattern) as found:
        load(*map(str, args))
    assert "\n" not in str(found.value)
    return str(found.value)


# SPair-71k and label sets


def spair_tree(root: Path, lists: dict[str, list[dict]]) -> Path:
    """Layout files ("large/test" and so on) of the given records, and an annotation each."""
    for place, records in lists.items():
        layout, folder = root / f"Layout/{place}.txt", root / "PairAnnotation" / place.split("/")[1]
        for path in (layout.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        layout.write_text("".join(f"{record['filename']}\n" for record in records))
        for record in records:
            (folder / f"{record['filename']}.json").write_text(json.dumps(record))
    return root


@pytest.mark.parametrize("separator", [":", "-"])
def test_spair_reads_its_published_record_whatever_stands_for_the_colon(tmp_path, separator):
    root = spair_tree(tmp_path, {"large/test": [RECORD]})
    (path,) = (root / "PairAnnotation/test").iterdir()
    path.rename(path.with_name(f"000001-2008_002719-2008_004100{separator}aeroplane.json"))
    save_image(root / "JPEGImages/aeroplane/2008_004100.jpg", (500, 332))
    (pair,) = (keypoints := spair_pairs(str(root), "test")).pairs
    assert keypoints.name == "SPair-71k test" and keypoints.rule == "bbox" and pair.category == "aeroplane"
    assert files(keypoints, root) == [[f"JPEGImages/aeroplane/2008_00{n}.jpg" for n in (2719, 4100)]]
    assert pair.src_kps.tolist() == [[212, 153], [300, 130], [330, 127]]
    assert pair.src_kps.dtype == torch.float32
    assert pair.trg_kps.tolist() == [[39, 145], [364, 171], [416, 173]]
    assert pair.src_box == (210, 34, 475, 250) and pair.trg_box == (36, 92, 500, 200)
    assert pair.extent == 464 and keypoints.size(pair.trg) == (500, 332)  # the target's box is 464 x 108
    assert pair.codes == {"viewpoint_variation": 0, "scale_variation": 0, "truncation": 2, "occlusion": 2}


def test_spair_has_every_pair_and_class_and_each_image_once(tmp_path):
    """Eighteen categories of three images: all ordered pairs for test, the first of each in the small one."""
    records, ends = [], list(itertools.permutations(("2007_1", "2008_2", "9"), 2))
    for n, (category, (src, trg)) in enumerate(itertools.product(SPAIR, ends)):
        changed = {"src_imname": f"{src}.jpg", "trg_imname": f"{trg}.jpg"}
        changed |= {"truncation": n % 4, "category": category}
        kps = {"src_kps": [[n, 7], [5, 20]], "trg_kps": [[60, n], [1, 2]]}
        records.append(RECORD | changed | kps | {"filename": f"{3 * n:06d}-{src}-{trg}:{category}"})
    lists = {"large/test": records, "small/test": records[::6]}
    lists |= {"large/trn": records[:4], "small/val": records[5:7]}
    spair = spair_tree(tmp_path / "SPair-71k", lists)
    keypoints = spair_pairs(str(tmp_path), "test")
    assert len(keypoints) == 18 * 6 and len(keypoints.images) == 18 * 3 and keypoints.images.classes == SPAIR
    assert Counter(p.category for p in keypoints.pairs) == dict.fromkeys(SPAIR, 6)
    for n, (pair, found) in enumerate(zip(keypoints.pairs, files(keypoints, spair))):
        assert found == [f"JPEGImages/{SPAIR[n // 6]}/{name}.jpg" for name in ends[n % 6]]
        assert pair.src_kps.tolist() == [[n, 7], [5, 20]] and pair.trg_kps.tolist() == [[60, n], [1, 2]]
        assert pair.codes["truncation"] == n % 4
    small = spair_pairs(str(spair), "test", "small")
    assert [p.src_kps[0, 0] for p in small.pairs] == [6 * k for k in range(18)] and "small" in small.name
    assert len(spair_pairs(str(spair), "trn")) == 4 and len(spair_pairs(str(spair), "val", "small")) == 2


def test_spair_names_a_broken_record_a_missing_one_and_a_bad_line(tmp_path):
    root = spair_tree(tmp_path, {"large/test": [RECORD]})
    (path,) = (root / "PairAnnotation/test").iterdir()
    changes = [{"trg_kps": [[39, 145]]}, {"src_kps": [], "trg_kps": []}, {"src_kps": [None, [3, 1], [2, 2]]}]
    broken = [RECORD | change for change in [*changes, {"trg_bndbox": [36, 92]}, {"truncation": None}]]
    for key in ("occlusion", "src_kps", "trg_bndbox"):
        broken.append({k: v for k, v in RECORD.items() if k != key})
    for text in (*map(json.dumps, broken), '{"pair_id": 1,', "[1]"):
        path.write_text(text)
        fails("000001-2008_002719-2008_004100:aeroplane.json: ", spair_pairs, root, "test")
    path.unlink()
    fails(f"test.txt line 1: neither {path.name} nor .*4100-aeroplane.json", spair_pairs, root, "test")
    for text, says in (("000001-a:cow\n", " line 1: '000001-a:cow'"), ("", ": no pairs")):
        (root / "Layout/large/test.txt").write_text(text)
        fails(f"test.txt{says}", spair_pairs, root, "test")


def test_spair_refuses_points_outside_their_images_and_boxes_without_extent(tmp_path):
    """A pixel beyond the centre of the last is let through: (500, 333) in an image of 500 x 333 px."""
    for name, size in (("2008_002719", (500, 333)), ("2008_004100", (500, 332))):
        save_image(tmp_path / f"JPEGImages/aeroplane/{name}.jpg", size)

    def root(**changed) -> Path:
        return spair_tree(tmp_path, {"large/test": [RECORD | changed], "small/trn": [RECORD | changed]})

    edges = [[500, 333], [-1, 0], [0, -1]]
    assert spair_pairs(str(root(src_kps=edges)), "test").pairs[0].src_kps.tolist() == edges
    where, trg = "000001-2008_002719-2008_004100:aeroplane.json: ", RECORD["trg_kps"]
    for x, y in ((500.5, 3), (-1.5, 3), (3, 334), (3, -50), (1e30, 2)):
        says = rf"{where}source point 2 \(.*2008_002719.jpg of 500x333 px"
        fails(says, spair_pairs, root(src_kps=[[1, 2], [x, y], [3, 4]]), "test")
        fails(says, spair_pairs, tmp_path, "trn", "small")
    fails(rf"{where}target point 3 \(416, 333\)", spair_pairs, root(trg_kps=[*trg[:2], [416, 333]]), "test")
    for side, box in (("src", [5, 7, 5, 7]), ("trg", [9, 8, 7, 6]), ("trg", [math.nan] * 4)):
        changed = root(**{f"{side}_bndbox": box})
        fails(f"{where}the (source|target)'s box.*no extent", spair_pairs, changed, "test")
    assert len(spair_pairs(str(root(src_kps=[[7, 7]], trg_kps=[[3, 3]])), "test")) == 1  # the box gives d
    for huge in ({"truncation": math.inf}, {"src_kps": [[10**400, 1]] * 3}):
        fails(where, spair_pairs, root(**huge), "test")


def test_a_label_set_that_was_written_here_reads_back(tmp_path):
    paths = [tmp_path / "in/a-1.png", tmp_path / "in/b.png"]
    for path, size in zip(paths, ((40, 30), (24, 50))):
        save_image(path, size)
    images, kps = data.ImageSet(paths, [0, 0], ["sea lion"]), {"src_kps": [[3.25, 4]], "trg_kps": [[12.5, 7]]}
    sides = {"0": {"size": [40, 30], "box": [1, 2, 38, 29]}, "1": {"size": [24, 50], "box": [2, 3, 20, 47]}}
    pair = {"kept": True, "src": 0, "trg": 1, "errors": [0.01]} | kps
    record = {"split": "val", "images": sides, "pairs": [pair]}
    write_label_tree(tmp_path, images, [record], "copy")
    (path,) = (tmp_path / "SC-ImageNet/PairAnnotation/val").iterdir()
    path.write_text(path.read_text().replace("imname", "unread"))
    for root in (tmp_path, tmp_path / "SC-IMAGENET", tmp_path / "SC-ImageNet"):
        (pair,) = (keypoints := label_pairs(str(root), "val")).pairs
        assert {"src_kps": pair.src_kps.tolist(), "trg_kps": pair.trg_kps.tolist()} == kps
        assert keypoints.rule == "bbox"
        assert (pair.category, pair.src_box, pair.trg_box) == ("sea_lion", (1, 2, 38, 29), (2, 3, 20, 47))
        for i, index in enumerate(pair[:2]):
            assert keypoints.load(index)[0].tobytes() == images.load(i)[0].tobytes()
        assert keypoints.images.paths[0].parts[-3:] == ("JPEGImages", "sea_lion", "sea_lion_a_1.JPEG")


@pytest.mark.parametrize("how", ["link", "copy"])
def test_turned_photographs_lie_upright_in_a_label_set_where_no_reader_turns_them(tmp_path, how):
    """Their points were made upright; the others are the original's bytes."""
    tag, paths = Image.Exif(), [tmp_path / f"in/{k}.jpg" for k in range(2)]
    tag[0x0112] = 6
    save_image(paths[1], (24, 50))
    Image.new("RGB", (30, 40), "red").save(paths[0], exif=tag)
    images = data.ImageSet(paths, [0, 0], ["cow"])
    images.upright = True
    sides = {"0": {"size": [40, 30], "box": [1, 2, 38, 29]}, "1": {"size": [24, 50], "box": [2, 3, 20, 47]}}
    pair = {"kept": True, "src": 0, "trg": 1, "errors": [0.01], "src_kps": [[38, 4]], "trg_kps": [[12, 7]]}
    write_label_tree(tmp_path, images, [{"split": "val", "images": sides, "pairs": [pair]}], how)
    (pair,) = (keypoints := label_pairs(str(tmp_path), "val")).pairs
    assert keypoints.load(pair.src)[0].size == (40, 30) and keypoints.size(pair.src) == (40, 30)
    assert keypoints.images.paths[pair.trg].read_bytes() == paths[1].read_bytes()
    assert Image.open(paths[0]).size == (30, 40)  # the original is as it was


# PF-PASCAL


def pascal_image(label: int, k: int) -> tuple[str, tuple[int, int], list[list[float]], list[float]]:
    """Image k of a class: stem, size, six points of which it lacks the k-th, box."""
    points = [[3.5 + 7 * r + label, 40 - 5.25 * r + k] if r != k else [math.nan] * 2 for r in range(6)]
    size, box = (70 + 3 * label + k, 44 + 2 * label + 5 * k), [2 + k, 3.5, 55 + label, 40 + k]
    return f"20{label:02d}_{k}", size, points, box


def pascal_tree(root: Path, ncnet: bool = False, mats: bool = True, points: bool = True) -> Path:
    """Twenty classes of 3 images: trn 0 -> 1 straight and flipped, val 1 -> 2, test 2 -> 0 (2 points)."""
    lists = {"trn": ["source_image,target_image,class,flip"], "test": ["source_image,target_image,class"]}
    lists |= {"val": lists["trn"][:]}
    for label, name in enumerate(PASCAL, 1):
        prefix = "PF-dataset-PASCAL/JPEGImages/" * ncnet
        paths = [f"{prefix}{pascal_image(label, k)[0]}.jpg" for k in range(3)]
        for k in range(3):
            stem, size, kps, box = pascal_image(label, k)
            save_image(root / "JPEGImages" / f"{stem}.jpg", size)
            if mats:
                (root / "Annotations" / name).mkdir(parents=True, exist_ok=True)
                mat = root / f"Annotations/{name}/{stem}.mat"
                sys.modules["scipy.io"].savemat(mat, {"kps": kps, "bbox": [box]})
        lists["trn"] += [f"{paths[0]},{paths[1]},{label},{flip}" for flip in (0, 1)]
        lists["val"] += [f"{paths[1]},{paths[2]},{label},0"]
        texts = f",5.5;{label},7;8.25,{label + 1};2,3;4" * points
        lists["test"] += [f"{paths[2]},{paths[0]},{label}{texts}"]
    lists["test"][0] += ",XA,YA,XB,YB" * points
    for split, lines in lists.items():
        name = f"{split.replace('trn', 'train')}_pairs_pf_pascal.csv" if ncnet else f"{split}_pairs.csv"
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(("folder", "ncnet"), [("PF-PASCAL", False), ("PF-dataset-PASCAL", True)])
def test_pfpascal_reads_points_and_boxes_and_mirrors_flipped_rows(tmp_path, folder, ncnet):
    need_scipy()
    root = pascal_tree(tmp_path / folder, ncnet)
    for split, ends, flips in (("trn", (0, 1), (0, 1)), ("val", (1, 2), (0,))):
        keypoints = pfpascal_pairs(str(tmp_path), split)
        assert keypoints.rule == "img" and keypoints.name == f"PF-PASCAL {split}"
        assert len(keypoints.images) == 40 * len(flips)
        assert [p.category for p in keypoints.pairs] == [name for name in PASCAL for _ in flips]
        for row, p in enumerate(keypoints.pairs):
            label, flip = row // len(flips) + 1, flips[row % len(flips)]
            for k, index, kps, box in zip(ends, p[:2], (p.src_kps, p.trg_kps), (p.src_box, p.trg_box)):
                stem, (width, _), points, (x0, y0, x1, y1) = pascal_image(label, k)
                stored = Image.open(root / f"JPEGImages/{stem}.jpg").convert("RGB")
                expected = ImageOps.mirror(stored) if flip else stored
                assert keypoints.load(index)[0].tobytes() == expected.tobytes()
                kept = [points[r] for r in range(6) if r not in ends]
                assert kps.tolist() == [[width - x if flip else x, y] for x, y in kept]
                assert box == ((width - x1, y0, width - x0, y1) if flip else (x0, y0, x1, y1))
    assert len(benchmarks.pfpascal_train(str(tmp_path)).pairs) == 20  # weak pairs: without the flipped


@pytest.mark.parametrize("ncnet", [False, True])
def test_pfpascal_takes_test_points_from_its_list_with_nothing_but_images(tmp_path, ncnet, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    keypoints = pfpascal_pairs(str(pascal_tree(tmp_path, ncnet, mats=False)), "test")
    assert [p.category for p in keypoints.pairs] == PASCAL and len(keypoints.images) == 40
    for label, pair in enumerate(keypoints.pairs, 1):
        assert pair.src_kps.tolist() == [[5.5, 7], [label, 8.25]]
        assert pair.trg_kps.tolist() == [[label + 1, 3], [2, 4]]
        assert [pair.src_box, pair.trg_box] == [(0, 0, *pascal_image(label, k)[1]) for k in (2, 0)]


def test_pfpascal_takes_from_its_mat_files_what_a_test_list_lacks(tmp_path, monkeypatch, capsys):
    need_scipy()
    listed, bare = (pascal_tree(tmp_path / name, points=name == "listed") for name in ("listed", "bare"))
    pair = pfpascal_pairs(str(listed), "test").pairs[4]
    assert pair.src_kps.tolist() == [[5.5, 7], [5, 8.25]] and pair.trg_box == tuple(pascal_image(5, 0)[3])
    pair = pfpascal_pairs(str(bare), "test").pairs[4]
    assert pair.src_kps.tolist() == [pascal_image(5, 2)[2][r] for r in (1, 3, 4, 5)]
    assert capsys.readouterr().err == ""
    path = bare / "Annotations/bottle/2005_2.mat"
    path.write_bytes(b"no matrix")
    fails("2005_2.mat", pfpascal_pairs, bare, "test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert pfpascal_pairs(str(listed), "test").pairs[4].trg_box == (0, 0, *pascal_image(5, 0)[1])
    assert "pip install scipy" in capsys.readouterr().err
    fails("2001_0.mat.*pip install scipy", pfpascal_pairs, listed, "trn")


@pytest.mark.parametrize("lists", ["pf-pascal", "pf-pascal/PF-dataset-PASCAL"])
@pytest.mark.parametrize("root", [".", "pf-pascal", "pf-pascal/PF-dataset-PASCAL", None])
def test_pfpascal_is_read_as_ncnet_has_it(tmp_path, monkeypatch, lists, root):
    """pf-pascal/PF-dataset-PASCAL/JPEGImages, and image_pairs/{train,val,test}_pairs.csv beside or inside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COCR_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    pascal_tree(tmp_path / "pf-pascal/PF-dataset-PASCAL", ncnet=True, mats=False)
    (tmp_path / lists / "image_pairs").mkdir()
    for path in (tmp_path / "pf-pascal/PF-dataset-PASCAL").glob("*.csv"):
        path.rename(tmp_path / lists / "image_pairs" / path.name.replace("_pf_pascal", ""))
    if root == "." and lists == "pf-pascal":
        root = str(tmp_path)  # as well
    keypoints = pfpascal_pairs(root, "test")
    assert len(keypoints) == 20 and len(keypoints.images) == 40
    assert keypoints.images.load(7)[0].size == keypoints.size(7)
    weak = benchmarks.pfpascal_train(root)
    assert len(weak.pairs) == 20 and all(path.is_file() for path in weak.paths)
    fails("Annotations/aeroplane/2001_1.mat", lambda: pfpascal_pairs(root, "val"))


def test_pfpascal_refuses_points_outside_their_images(tmp_path):
    save_image(tmp_path / "JPEGImages/a.jpg", (40, 30))
    head = "source_image,target_image,class,XA,YA,XB,YB\n"
    (tmp_path / "test_pairs.csv").write_text(f"{head}a.jpg,a.jpg,1,40;-1,30;-1,4;5,4;5\n")
    assert len(pfpascal_pairs(str(tmp_path), "test")) == 1
    for points, side in (("1;42,1;2,4;5,4;5", "source"), ("1;2,1;2,4;5,4;-3", "target")):
        (tmp_path / "test_pairs.csv").write_text(f"{head}a.jpg,a.jpg,1,4,5,4,5\na.jpg,a.jpg,1,{points}\n")
        fails(f"test_pairs.csv line 3: {side} point 2 .*a.jpg of 40x30 px", pfpascal_pairs, tmp_path, "test")
    (tmp_path / "test_pairs.csv").write_text(head.replace(",", ";") + "a.jpg;a.jpg;1\n")
    fails("test_pairs.csv: its columns are separated by ';'", pfpascal_pairs, tmp_path, "test")


def test_points_of_mirrored_rows_are_checked_as_they_are_written(tmp_path):
    need_scipy()
    root = pascal_tree(tmp_path)
    _, (width, _), points, box = pascal_image(1, 0)
    for x, fits in ((-1, True), (width, True), (-1.5, False), (width + 0.5, False)):
        sys.modules["scipy.io"].savemat(root / "Annotations/aeroplane/2001_0.mat",
                                        {"kps": [*points[:5], [x, 5]], "bbox": [box]})
        if fits:
            assert pfpascal_pairs(str(root), "trn").pairs[1].src_kps[-1, 0] == width - x
        else:
            fails(r"trn_pairs.csv line 2: source point 4 \(", pfpascal_pairs, root, "trn")


def test_pfpascal_names_file_and_line_of_a_broken_row(tmp_path):
    save_image(tmp_path / "JPEGImages/a.jpg", (40, 30))
    for row in ("a.jpg,a.jpg,1,1;2,3;4,5;6,7", "a.jpg,a.jpg,1,,,,", "a.jpg,a.jpg,21,1,2,3,4", "a.jpg"):
        (tmp_path / "test_pairs.csv").write_text(f"source_image,target_image,class,XA,YA,XB,YB\n\n{row}\n")
        fails("test_pairs.csv line 3: ", pfpascal_pairs, tmp_path, "test")


# PF-WILLOW

# car(G)/Cars_006a.mat, rounded
CAR_X = [47.94, 151.86, 45.97, 69.61, 110.00, 93.74, 94.24, 220.82, 37.59, 131.18]
CAR_Y = [98.16, 121.80, 57.28, 54.81, 45.95, 86.83, 115.40, 108.50, 80.92, 61.71]


def assert_same_pairs(a: data.KeypointSet, b: data.KeypointSet) -> None:
    sides = [[[k.images.paths[i].parts[-2:] for i in p[:2]] for p in k.pairs] for k in (a, b)]
    assert sides[0] == sides[1] and len(a) == 900 and len(a.images) == len(b.images) == 100
    for p, q in zip(a.pairs, b.pairs):
        torch.testing.assert_close((p.src_kps, p.trg_kps), (q.src_kps, q.trg_kps), atol=1e-4, rtol=0)
        assert p.category == q.category
        assert p.src_box + p.trg_box == pytest.approx(q.src_box + q.trg_box, abs=1e-4)


@pytest.mark.parametrize("inside", ["PF-WILLOW", "PF-dataset", "."])
def test_pfwillow_without_a_list_is_rebuilt_from_its_mat_files(tmp_path, inside):
    need_scipy()
    rows, other, folders = ["header"], tmp_path / "listed", benchmarks.WILLOW_FOLDERS
    for number, name in enumerate(folders):
        points = [np.array([CAR_X, CAR_Y]) + 3.5 * number + [[k], [2 * k]] for k in range(10)]
        (tmp_path / inside / name).mkdir(parents=True)
        for k in range(10):
            mat = tmp_path / inside / name / f"Image_{k}a.mat"
            sys.modules["scipy.io"].savemat(mat, {"pts_coord": points[k]})
        for pair in itertools.permutations(range(10), 2):
            cells = [str(v) for k in pair for v in points[k].ravel()]
            rows.append(",".join([*(f"PF-dataset/{name}/Image_{k}a.png" for k in pair), *cells]))
    other.mkdir()
    (other / "test_pairs_pf.csv").write_text("\n".join(rows))
    rebuilt = pfwillow(str(tmp_path))
    assert_same_pairs(rebuilt, pfwillow(str(other)))
    assert rebuilt.pairs[0].src_kps[7].tolist() == pytest.approx([220.82, 108.50], abs=1e-4)
    (tmp_path / inside / "duck(S)/._Image_4a.mat").write_bytes(b"a hidden file")
    assert len(pfwillow(str(tmp_path))) == 900
    save_image(tmp_path / inside / "car(G)/Image_3a.png", (222, 130))  # of which (223.82, 108.5) lies outside
    fails(r"car\(G\)/Image_0a.mat with Image_3a.mat: target point 8 \(223.82", pfwillow, tmp_path)
    (tmp_path / inside / "car(G)/Image_3a.png").unlink()
    (tmp_path / inside / "duck(S)/Image_4a.mat").unlink()
    fails(r"duck\(S\): 9 .mat files", pfwillow, tmp_path)


def test_real_pfwillow_rebuilt_from_its_mat_files_equals_its_list(tmp_path):
    need_scipy()
    if not os.environ.get("COCR_DATA"):
        pytest.skip("set COCR_DATA to a folder with PF-WILLOW to run this")
    real = Path(os.environ["COCR_DATA"], "PF-WILLOW").resolve()
    for folder in benchmarks.WILLOW_FOLDERS:
        (tmp_path / folder).symlink_to(real / folder)
    assert_same_pairs(pfwillow(str(tmp_path)), pfwillow(str(real)))


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (
            lambda r: spair_pairs(r, "val", "small"),
            "Layout/small/val.txt cvlab.postech.ac.kr/research/SPair-71k --dataset spair",
        ),
        (
            lambda r: pfpascal_pairs(r, "trn"),
            "train_pairs_pf_pascal.csv www.di.ens.fr/willow/research/proposalflow --dataset pfpascal",
        ),
        (pfwillow, "test_pairs_pf.csv <folder>/<image>.png www.di.ens.fr/willow/research/proposalflow"),
        (lambda r: label_pairs(r, "val"), "Layout/large/val.txt <category>_<id>.JPEG label.py"),
    ],
)
def test_a_missing_benchmark_says_what_was_expected_and_where_to_get_it(tmp_path, load, words):
    for root in (tmp_path, tmp_path / "gone"):
        assert all(word in fails(f"folder {root}: expected", load, root) for word in words.split())


# Where the benchmarks lie


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """A current folder without data, and no $COCR_DATA."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("COCR_DATA", raising=False)
    return tmp_path


def test_data_are_found_here_then_in_datasets_then_in_the_folder_of_the_environment(empty, monkeypatch):
    places = [empty / "elsewhere", Path("datasets"), Path(".")]
    monkeypatch.setenv("COCR_DATA", str(places[0]))
    for number, place in enumerate(places):  # the later ones come first
        spair_tree(place / "SPair-71k", {"large/trn": [RECORD] * (number + 1), "small/test": [RECORD]})
        assert [len(spair_pairs(root, "trn")) for root in (None, "")] == [number + 1] * 2
        cfg = SimpleNamespace(dataset="spair", root=None, saliency="auto")
        assert len(benchmarks.training_set(cfg).pairs) == number + 1
        assert len(benchmarks.DATASETS["spair-small"](None, "test")) == 1
    assert len(spair_pairs(str(places[0]), "trn")) == 1  # what is given is where it is looked for
    assert len(spair_pairs("datasets/SPair-71k", "trn")) == 2
    fails("not found", lambda: spair_pairs(None, "val"))


def test_a_list_is_looked_for_in_every_place_before_it_is_missing(empty, monkeypatch):
    monkeypatch.setenv("COCR_DATA", str(empty))
    (empty / "work/PF-PASCAL/JPEGImages").mkdir(parents=True)
    (empty / "PF-dataset-PASCAL").mkdir()
    (empty / "PF-dataset-PASCAL/train_pairs_pf_pascal.csv").write_text("a,b,class,flip\na.jpg,b.jpg,1,0\n")
    assert len(benchmarks.pfpascal_train(None).pairs) == 1
    (empty / "work/test_pairs.csv").write_text("another benchmark's\n")  # in no folder of its name
    fails("PF-WILLOW not found", lambda: pfwillow(None))


@pytest.mark.parametrize("variable", [None, "", "nowhere"])
def test_a_missing_set_names_its_layout_and_the_one_command_that_fetches_it(empty, monkeypatch, variable):
    if variable is not None:
        monkeypatch.setenv("COCR_DATA", variable)
    text = fails("^SPair-71k not found: expected Layout/large/test.txt", lambda: spair_pairs(None, "test"))
    assert "SPair-71k in the current folder, in datasets/ or in $COCR_DATA" in text
    assert "PairAnnotation/<split>/<pair>.json" in text
    assert text.endswith("; to fetch it: python evaluate.py --dataset spair --download")
    text = fails("^PF-WILLOW folder my data", pfwillow, "my data")
    assert text.endswith("python evaluate.py --dataset pfwillow --download --datapath 'my data'")
    assert "--download" not in fails("label.py", lambda: label_pairs(None, "val"))
    (empty / "work/datasets/SPair-71k").mkdir(parents=True)  # a download would leave it as it is
    assert "--download" not in fails("^SPair-71k not found", lambda: spair_pairs(None, "test"))


# What the options name


def test_training_set_builds_what_the_options_name(tmp_path):
    for name in ("cow/1", "cow/2", "maps/cow/1_sal", "maps/cow/2_sal"):
        save_image(tmp_path / f"{name}.png", (20, 16))
    Image.fromarray(np.array([[51, 102]], np.uint8)).save(tmp_path / "maps/cow/1_sal.png")

    def first_map(**changed):
        given = {"dataset": "folder", "root": str(tmp_path), "saliency": "none"} | changed
        saliency = benchmarks.training_set(SimpleNamespace(**given)).load(0)[1]
        return saliency and np.asarray(saliency).ravel().tolist()

    maps = str(tmp_path / "maps")
    assert [first_map(saliency=name) for name in ("none", "auto", "attention")] == [None] * 3
    assert first_map(saliency=maps) == first_map(saliency=maps, saliency_rescale=True) == [0, 1]
    assert first_map(saliency=maps, saliency_rescale=False) == pytest.approx([0.2, 0.4])
    assert set(first_map(dataset="shapes", saliency="auto")) == {0, 1}
    assert first_map(dataset="shapes") is None
    with pytest.raises(ValueError, match="--dataset caltech: shapes, folder, spair, pfpascal"):
        first_map(dataset="caltech")


def test_keypoint_set_is_what_val_names(tmp_path):
    def named(val: str, dataset: str = "folder"):
        cfg = SimpleNamespace(val=val, dataset=dataset, val_root=str(tmp_path))
        return benchmarks.keypoint_set(cfg, "val")

    spair_tree(tmp_path, {"large/val": [RECORD]})
    assert named("auto") is named("none") is named("none", "shapes") is None
    assert named("auto", "shapes").name == named("shapes").name == "shapes val"
    assert named("spair").name == "SPair-71k val"
    with pytest.raises(ValueError, match="--val caltech: shapes, pfwillow, .*, none"):
        named("caltech")


# Lists of one's own, and the command line


def write_pairs(root: Path, *rows: str, header: str = "class,source,target,XA,YA,XB,YB") -> Path:
    (root / "pairs.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return root / "pairs.csv"


def test_csv_pairs_reads_paths_points_and_classes(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # lies on its side
    Image.new("RGB", (30, 50)).save(tmp_path / "b.jpg", exif=tag)
    save_image(tmp_path / "in/a.png", (10, 9))
    rows = ["cat,in/a.png,b.jpg,1;2.5,3;4,5;6,7;22", "", f",b.jpg,{tmp_path}/in/a.png,9;9,8;1,7;6,6;7"]
    keypoints = csv_pairs(write_pairs(tmp_path, *rows))
    first, second = keypoints.pairs
    assert keypoints.images.paths == [tmp_path / "in/a.png", tmp_path / "b.jpg"] and keypoints.rule == "bbox"
    assert first[:2] == (0, 1) and second[:2] == (1, 0) and keypoints.size(1) == (50, 30)
    assert first.src_kps.tolist() == [[1, 3], [2.5, 4]] and first.trg_kps.tolist() == [[5, 7], [6, 22]]
    assert first.src_box == (1, 3, 2.5, 4) and first.trg_box == (5, 7, 6, 22) and first.extent == 15
    assert [p.category for p in keypoints.pairs] == ["cat", "all"]


def test_csv_pairs_are_looked_for_beside_the_file_or_in_the_folder_that_is_given(tmp_path):
    for folder in ("lists", "pictures/in"):
        save_image(tmp_path / folder / "a.png", (10, 9))
    listed = write_pairs(tmp_path / "lists", "x,a.png,a.png,1;2,1;2,3;4,3;4")
    assert csv_pairs(listed).images.paths == [tmp_path / "lists/a.png"]
    assert csv_pairs(listed, str(tmp_path / "pictures/in")).images.paths == [tmp_path / "pictures/in/a.png"]
    text = fails("csv line 2: no such image: .*pictures/a.png", csv_pairs, listed, tmp_path / "pictures")
    assert "--datapath" in text
    fails("--datapath .*/nowhere: no such folder", csv_pairs, listed, tmp_path / "nowhere")


GOOD = "1;2,1;2"
OUTSIDE = ("1000;2,1;2", "-50;2,1;2", "1;2,1e30;2", "1;10.1,1;2", "1;2,1;-0.6", "1;2,1;9.6")
POINTS = {
    "one": ([f"1,1,{GOOD}", f"{GOOD},1,1", "1,1,1,1"], "line 2: (XA|the source's box, 1,1 to 1,1, has no)"),
    "all equal": (["3;3;3,2;2;2,1;2;3,1;2;3"], "line 2: the source's box, 3,2 to 3,2, has no extent"),
    "all equal in the target": (["1;2,1;2,3;3,2;2"], "line 2: the target's box, 3,2 to 3,2, has no extent"),
    "outside": ([f"{xy},{GOOD}" for xy in OUTSIDE], r"line 2: source point [12] \(.*a.png of 10x9"),
    "outside the target": ([f"{GOOD},{xy}" for xy in OUTSIDE], r"line 2: target point [12] \(.*a.png of"),
    "too large for a number": ([f"1;1e300,1;2,{GOOD}", f"1;inf,1;2,{GOOD}"], "line 2: .*finite"),
}


@pytest.mark.parametrize("points,says", POINTS.values(), ids=POINTS)
def test_csv_pairs_refuses_points_that_cannot_be_scored(tmp_path, points, says):
    save_image(tmp_path / "a.png", (10, 9))
    csv_pairs(write_pairs(tmp_path, "x,a.png,a.png,-0.5;9.5,-0.5;8.5,1;1,1;2"))  # the edges of 10x9 px
    for four in points:
        fails(f"pairs.csv {says}", csv_pairs, write_pairs(tmp_path, f"x,a.png,a.png,{four}"))


def test_points_of_ones_own_are_those_of_the_upright_photograph(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("RGB", (30, 50)).save(tmp_path / "a.jpg", exif=tag)
    csv_pairs(write_pairs(tmp_path, "x,a.jpg,a.jpg,1;49,1;29,1;49,1;29"))
    fails("line 2: source point 2 .*of 50x30 px", csv_pairs,
          write_pairs(tmp_path, "x,a.jpg,a.jpg,1;29,1;49,1;49,1;29"))


def test_csv_pairs_refuses_a_column_that_is_there_twice_and_other_separators(tmp_path):
    save_image(tmp_path / "a.png", (10, 9))
    names, row = "source,target,XA,YA,XB,YB", "a.png,a.png,1;2,1;2,1;2,1;2"
    for header in (f"{names},XA", f"{names},note,note", f"{names},class,class"):
        column = header.split(",")[-1]
        twice = write_pairs(tmp_path, row + ",1;2" * (header.count(",") - 5), header=header)
        fails(f"pairs.csv: column {column} is there twice", csv_pairs, twice)
    assert len(csv_pairs(write_pairs(tmp_path, f"{row},,", header=f"{names},,"))) == 1  # a spreadsheet's rest
    for mark, says in ((";", "';'"), ("\t", r"'\\t'")):
        other = write_pairs(tmp_path, row.replace(",", mark), header=names.replace(",", mark))
        fails(f"pairs.csv: its columns are separated by {says}; expected ','", csv_pairs, other)


def test_csv_pairs_names_the_file_and_the_line_of_what_is_wrong(tmp_path):
    for name in "ab":
        save_image(tmp_path / name, (20, 20))
    for row in ("1;2,3;4,5;6,7", ",,,", "1,2,3,four", "1,nan,3,4", "1,2,3"):
        fails("pairs.csv line 3: ", csv_pairs, write_pairs(tmp_path, "x,a,b,1;2,2;3,3;4,4;5", f"x,a,b,{row}"))
    fails("pairs.csv line 2: ", csv_pairs, write_pairs(tmp_path, "x,,b,1,2,3,4"))
    short = write_pairs(tmp_path, "a,1,2,3", header="source,XA,YA,XB")
    fails("pairs.csv: no column target, YB; expected source,target,XA", csv_pairs, short)
    fails("pairs.csv: no pairs", csv_pairs, write_pairs(tmp_path))
    fails("gone.csv", csv_pairs, tmp_path / "gone.csv")


def test_evaluate_scores_pairs_of_ones_own_and_the_split_that_is_asked_for(tmp_path, monkeypatch):
    for name, size in (("a", (64, 40)), ("b", (40, 64))):
        save_image(tmp_path / f"{name}.png", size)
    own, loaded, place = "7.5;55.5,4.5;34.5", [], tmp_path / "out.json"  # points: centres of cells
    pairs = write_pairs(tmp_path, f"x,a.png,a.png,{own},{own}", f"y,a.png,b.png,{own},0.5;0.5,0.5;1.5")

    def run(*args: object) -> None:
        line = [*args, "--json", place, "--baseline", "nn", "--backbone", "random_vit8", "--size", "32"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, line), "--device", "cpu"])
        evaluate.main()

    run("--pairs", pairs)
    report = json.loads(place.read_text())
    assert report["dataset"] == "pairs.csv" and report["pairs"] == 2
    assert report["scores"]["target"]["nn"]["bbox"]["per_class"] == {"x": [100] * 3, "y": [0] * 3}
    for name in ("spair", "labels", "pfpascal"):
        fake = functools.partial(lambda *args: loaded.append(args) or csv_pairs(pairs), name)
        monkeypatch.setitem(benchmarks.DATASETS, name, fake)
    (tmp_path / "lists").mkdir()
    pairs.rename(tmp_path / "lists/pairs.csv")
    run("--pairs", tmp_path / "lists/pairs.csv", "--datapath", tmp_path)
    assert json.loads(place.read_text()) == report
    (tmp_path / "lists/pairs.csv").rename(pairs)
    for args in (["spair", "--datapath", "here"], ["pfpascal", "--split", "trn"], ["labels"]):
        run("--dataset", *args)
    assert loaded == [("spair", "here", "test"), ("pfpascal", None, "trn"), ("labels", None, "val")]
    with pytest.raises(ValueError, match="--split trn: PF-WILLOW has a test split only"):
        run("--dataset", "pfwillow", "--split", "trn")
    for args in (["--pairs", pairs, "--dataset", "spair"], []):
        with pytest.raises(SystemExit, match="2"):
            run(*args)
