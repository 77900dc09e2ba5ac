"""Coordinates, views, training sets, their order of work, keypoint sets and the drawn shapes."""

import csv
import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import MEAN, STD, ImageSet, PairStream, TrainPairs, cells_to_pixels, pixels_to_cells, prepare
from support.benchmarks import pfpascal_train, pfwillow, spair_train
from support.shapes import SHAPE_CLASSES, SHAPE_SPLITS, Shapes, draw_shape, shapes_pairs

ROOT = Path(__file__).parent.parent


def save_image(path: Path, size: tuple[int, int] = (40, 28), seed: int = 0) -> Path:
    """A picture of smooth random colour, different for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).save(path)
    return path


def photograph(path: Path, size: tuple[int, int], tag: int) -> Path:
    """A picture whose camera's orientation tag is set; 6: it was held a quarter turn to the side."""
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.open(save_image(path, size)).save(path, exif=exif)
    return path


def truncate(path: Path) -> Path:
    """Cut a file in half, as a broken download leaves it."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.fixture
def folders(tmp_path):
    """Class folders a (5 images) and b (4), no two of the same content, of different sizes."""
    for k in range(9):
        save_image(tmp_path / "ab"[k // 5] / f"{k}.png", (40 + 3 * k, 28 + k), seed=k)
    return tmp_path


@pytest.fixture(scope="module")
def willow():
    if not os.environ.get("COCR_DATA"):
        pytest.skip("set COCR_DATA to a folder with PF-WILLOW to run this")
    return Path(os.environ["COCR_DATA"], "PF-WILLOW")


# ------------------------------------------------------------------------------------------------------------
# Coordinates


def test_cell_centres_lie_at_their_closed_form_on_a_non_square_image():
    size, (h, w) = (300, 200), (5, 6)
    for i in range(w):
        for j in range(h):
            pixel = torch.tensor([(i + 0.5) * 300 / 6 - 0.5, (j + 0.5) * 200 / 5 - 0.5])
            cell = torch.tensor([float(i), float(j)])
            torch.testing.assert_close(cells_to_pixels(cell, size, (h, w)), pixel)
            torch.testing.assert_close(pixels_to_cells(pixel, size, (h, w)), cell)
    by_hand = cells_to_pixels(torch.tensor([[2.0, 1.0]]), size, (h, w))
    assert by_hand.tolist() == [[124.5, 59.5]]


def test_image_borders_are_half_a_cell_outside_the_outer_centres():
    corners = pixels_to_cells(torch.tensor([[-0.5, -0.5], [299.5, 199.5]]), (300, 200), (5, 6))
    torch.testing.assert_close(corners, torch.tensor([[-0.5, -0.5], [5.5, 4.5]]))


def test_pixels_to_cells_and_back_is_the_identity():
    points = torch.rand(3, 7, 2, dtype=torch.float64) * 400 - 50
    back = cells_to_pixels(pixels_to_cells(points, (317, 211), (9, 14)), (317, 211), (9, 14))
    torch.testing.assert_close(back, points)


# ------------------------------------------------------------------------------------------------------------
# Images and views


def test_open_image_names_a_missing_and_a_damaged_file(tmp_path):
    with pytest.raises(ValueError, match="nothing.png"):
        data.open_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="half.jpg"):
        data.open_image(truncate(save_image(tmp_path / "half.jpg")))


def test_open_image_turns_gray_and_palette_files_into_rgb(tmp_path):
    Image.new("L", (5, 3), 77).save(tmp_path / "gray.png")
    Image.new("RGB", (5, 3), (10, 200, 30)).quantize(4).save(tmp_path / "palette.png")
    for name, colour in (("gray", (77, 77, 77)), ("palette", (10, 200, 30))):
        image = data.open_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB" and image.size == (5, 3) and image.getpixel((4, 2)) == colour


def test_a_photograph_is_turned_upright_only_on_request(tmp_path):
    photograph(tmp_path / "photo.jpg", (30, 20), 6)
    assert data.open_image(tmp_path / "photo.jpg").size == (30, 20)
    assert data.open_image(tmp_path / "photo.jpg", upright=True).size == (20, 30)


@pytest.mark.parametrize("tag", range(1, 9))
def test_the_header_tells_the_size_of_an_upright_photograph(tmp_path, tag):
    photograph(tmp_path / "photo.jpg", (30, 20), tag)
    for upright in (False, True):
        assert data.image_size(tmp_path / "photo.jpg", upright) == data.open_image(
            tmp_path / "photo.jpg", upright).size
    images = ImageSet([tmp_path / "photo.jpg"], [0], ["a"])
    assert images.as_stored(0) and images.size(0) == (30, 20)  # a benchmark's
    images.upright = True
    assert images.as_stored(0) == (tag == 1) and images.size(0) == images.load(0)[0].size
    truncate(tmp_path / "photo.jpg").write_bytes(b"\xff\xd8 no more")
    with pytest.raises(ValueError, match="photo.jpg"):
        images.size(0)


def test_a_photograph_of_sixteen_bits_is_turned_too(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 8
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(tmp_path / "a.png", exif=tag)
    assert data.open_image(tmp_path / "a.png", upright=True).size == (20, 30)


# (W, H) of an image and of a map: what covers the whole of the image, and what cannot.
FITTING = [((120, 90), (120, 90)), ((120, 90), (64, 64)), ((120, 90), (128, 128)), ((120, 90), (8, 6)),
           ((500, 333), (36, 24)), ((500, 333), (35, 23)), ((500, 333), (512, 352)), ((97, 31), (4, 1)),
           ((100, 99), (8, 7)), ((100, 99), (7, 7)), ((333, 500), (2, 3)), ((20, 16), (2, 1))]
UNFITTING = [((120, 90), (90, 120)), ((120, 90), (6, 8)), ((100, 97), (97, 100)), ((120, 90), (120, 60)),
             ((120, 90), (160, 90)), ((90, 90), (120, 90)), ((333, 500), (3, 2)), ((1920, 1080), (32, 24))]


@pytest.mark.parametrize("image,size,fits", [(*sizes, True) for sizes in FITTING]
                         + [(*sizes, False) for sizes in UNFITTING])
def test_a_map_is_square_or_has_the_orientation_and_aspect_of_its_image(tmp_path, image, size, fits):
    Image.new("RGB", image).save(tmp_path / "a.png")
    Image.new("L", size).save(tmp_path / "a_sal.png")
    if fits:
        assert data.open_with_map(tmp_path / "a.png", tmp_path / "a_sal.png")[1].size == size
        return
    with pytest.raises(ValueError) as found:
        data.open_with_map(tmp_path / "a.png", tmp_path / "a_sal.png")
    names = "a_sal.png of {}x{} px", "a.png of {}x{} px upright"
    assert all(name.format(*sides) in str(found.value) for name, sides in zip(names, (size, image)))
    assert "\n" not in str(found.value)


def test_open_saliency_rescales_to_its_own_minimum_and_maximum(tmp_path):
    gray = np.array([[50, 80, 110], [140, 170, 200]], np.uint8)
    Image.fromarray(gray).save(tmp_path / "map.png")
    found = np.asarray(data.open_saliency(tmp_path / "map.png"))
    np.testing.assert_allclose(found, [[0, 0.2, 0.4], [0.6, 0.8, 1]], atol=1e-6)


def test_open_saliency_keeps_the_maps_own_values_where_it_is_told_to(tmp_path):
    for name, gray in (("map", [[51, 102], [0, 153]]), ("flat", [[102, 102], [102, 102]])):
        Image.fromarray(np.array(gray, np.uint8)).save(tmp_path / f"{name}.png")
        found = data.open_saliency(tmp_path / f"{name}.png", rescale=False)
        assert found.mode == "F"
        np.testing.assert_allclose(np.asarray(found), np.array(gray) / 255, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(data.open_saliency(tmp_path / "flat.png")), np.ones((2, 2)))


def test_prepare_normalises_by_the_channel_means_and_deviations_of_imagenet():
    tensor, cells = prepare(Image.new("RGB", (30, 20), (51, 102, 204)), None, 16, 8)
    assert cells is None and tensor.shape == (3, 16, 16)
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for channel, value, mean, std in zip(tensor, (0.2, 0.4, 0.8), means, deviations):
        torch.testing.assert_close(channel, torch.full((16, 16), (value - mean) / std))


@pytest.mark.parametrize("mirror", [False, True])
def test_crop_and_mirror_move_image_and_saliency_alike(mirror):
    """A bright rectangle is its own map, at 1/2 x 1/4 of the resolution; a cell's share has a closed form."""
    pixels, coarse = np.zeros((64, 96, 3), np.uint8), np.zeros((16, 48), np.float32)
    pixels[12:44, 40:80] = 255
    coarse[3:11, 20:40] = 1
    # The crop is 80 x 48 px, a cell of the 4 x 4 grid 20 x 12 px; in it the rectangle is x 32-72, y 8-40.
    tensor, cells = prepare(Image.fromarray(pixels), Image.fromarray(coarse), 64, 16, (8, 4, 88, 52), mirror)
    columns, rows = torch.tensor([0, 8 / 20, 1, 12 / 20]), torch.tensor([4 / 12, 1, 1, 4 / 12])
    expected = rows[:, None] * (columns.flip(0) if mirror else columns)
    torch.testing.assert_close(cells, expected)
    image = tensor * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    means = image.unflatten(2, (4, 16)).unflatten(1, (4, 16)).mean((2, 4))  # (3, 4, 4)
    torch.testing.assert_close(means, expected.expand(3, 4, 4), atol=0.03, rtol=0)


def test_prepare_without_a_box_takes_the_whole_image(folders):
    image = data.open_image(folders / "a" / "3.png")
    whole, _ = prepare(image, None, 24, 8)
    boxed, _ = prepare(image, None, 24, 8, (0, 0, *image.size))
    squashed = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC), np.float64) / 255
    assert torch.equal(whole, boxed)
    expected = torch.from_numpy((squashed - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()
    torch.testing.assert_close(whole, expected)


def test_prepare_refuses_a_size_that_is_no_multiple_of_the_patch():
    with pytest.raises(ValueError, match="100.*14"):
        prepare(Image.new("RGB", (30, 20)), None, 100, 14)


def test_random_box_keeps_35_to_100_percent_inside_the_image_within_the_aspect_limits():
    rng, (width, height) = np.random.default_rng(0), (120, 70)
    boxes = np.array([data.random_box((width, height), rng) for _ in range(3000)])
    x0, y0, x1, y1 = boxes.T
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= width).all() and (y1 <= height).all()
    w, h = (x1 - x0) / width, (y1 - y0) / height
    assert (w * h >= 0.35 - 1e-9).all() and (w * h <= 1 + 1e-9).all()
    assert (w / h >= 3 / 4 - 1e-9).all() and (w / h <= 4 / 3 + 1e-9).all()
    # The limits are reached, and a box may lie anywhere.
    assert (w * h).min() < 0.37 and (w * h).max() > 0.95 and (w / h).min() < 0.77 and (w / h).max() > 1.3
    for low, high, side in ((x0, x1, width), (y0, y1, height)):
        room = side - (high - low)
        share = low[room > 5] / room[room > 5]
        assert share.min() < 0.02 and share.max() > 0.98 and abs(share.mean() - 0.5) < 0.03


# ------------------------------------------------------------------------------------------------------------
# Training sets


def test_class_folders_sorts_classes_and_leaves_out_what_cannot_be_paired(tmp_path, capsys):
    for name in ("b/3.JPG", "b/1.png", "b/2.webp", "a/1.jpeg", "a/2.bmp", "single/1.png", "ruined/1.png"):
        save_image(tmp_path / name)
    for name in ("a/empty.png", "ruined/empty.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    save_image(tmp_path / "loose.png")
    images = data.class_folders(str(tmp_path))
    assert images.classes == ["a", "b"]
    names = [str(path.relative_to(tmp_path)) for path in images.paths]
    assert names == ["a/1.jpeg", "a/2.bmp", "b/1.png", "b/2.webp", "b/3.JPG"]
    assert images.labels == [0, 0, 1, 1, 1] and len(images) == 5
    errors = capsys.readouterr().err
    assert "class single" in errors and "class ruined" in errors and "class a" not in errors
    assert "class b" not in errors
    assert "2 empty files" in errors and "a/empty.png" in errors and "ruined/empty.jpg" in errors


def test_class_folders_names_a_root_that_is_missing_or_holds_no_classes(tmp_path):
    save_image(tmp_path / "loose.png")
    save_image(tmp_path / "lonely" / "single" / "1.png")
    for root in (tmp_path / "nowhere", tmp_path / "lonely" / "single", tmp_path / "lonely", None):
        with pytest.raises(ValueError, match=f"--root {root or ''}: "):
            data.class_folders(root and str(root))


def test_hidden_folders_and_files_are_none(tmp_path, capsys):
    for name in ("a/1.png", "a/2.png", "a/._1.png", ".ipynb_checkpoints/1.png", ".ipynb_checkpoints/2.png"):
        save_image(tmp_path / name)
    (tmp_path / "a/._2.png").write_bytes(b"\0\5\x16\7 no picture")
    for folder in ("__MACOSX", "a/__MACOSX"):
        (tmp_path / folder).mkdir()
        for k in range(3):
            (tmp_path / folder / f"._{k}.jpg").write_bytes(b"\0\5\x16\7 no picture")
    images = data.class_folders(str(tmp_path))
    assert images.classes == ["a"] and [path.name for path in images.paths] == ["1.png", "2.png"]
    assert images.empty == [] and capsys.readouterr().err == ""
    (tmp_path / "a").rename(tmp_path / ".a")
    with pytest.raises(ValueError, match="expected a folder of class folders"):
        data.class_folders(str(tmp_path))


def test_pictures_that_are_not_read_are_counted_by_their_ending(tmp_path, capsys):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.jpg"):
        save_image(tmp_path / name)
    for name in ("a/3.tif", "a/4.TIF", "a/5.gif", "b/6.heic", "b/7.tif", "b/notes.txt", "b/.8.tif"):
        (tmp_path / name).write_bytes(b"content")
    assert len(data.class_folders(str(tmp_path))) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("5 pictures of endings that are not read skipped (3 .tif, 1 .gif, 1 .heic): ")
    assert line.endswith("one of .bmp .jpeg .jpg .png .webp")


def test_a_photograph_and_its_map_are_upright_in_class_folders_and_as_stored_in_benchmarks(tmp_path):
    """A 120x90 JPEG with orientation 6 and a map by a tool that turns, 90x120, or does not."""
    path = photograph(tmp_path / "a/1.jpg", (120, 90), 6)
    photograph(tmp_path / "a/2.jpg", (120, 90), 6)
    bright = np.zeros((90, 120), np.uint8)
    bright[:30] = 255  # the stored top is the right side of what is seen
    (tmp_path / "maps/a").mkdir(parents=True)
    Image.fromarray(np.rot90(bright, 3)).save(tmp_path / "maps/a/1_sal.png")
    Image.fromarray(bright).save(tmp_path / "maps/a/2_sal.png")
    images = data.class_folders(str(tmp_path), str(tmp_path / "maps"))
    image, saliency = images.load(0)
    assert image.size == saliency.size == images.size(0) == (90, 120)
    assert image.tobytes() == data.open_image(path).transpose(Image.Transpose.ROTATE_270).tobytes()
    assert np.asarray(saliency)[:, 60:].min() == 1 and np.asarray(saliency)[:, :60].max() == 0
    with pytest.raises(ValueError, match="2_sal.png of 120x90 px .*a/2.jpg of 90x120 px upright"):
        images.load(1)
    item = TrainPairs(images, 16, 8, augment=False, seed=0)
    with pytest.raises(ValueError, match="no class has two images.*2_sal.png of 120x90 px"):
        item[0, 0, 1, 0]
    stored = ImageSet(images.paths, [0, 0], ["a"], str(tmp_path / "maps"))
    assert [side.size for side in stored.load(1)] == [(120, 90)] * 2
    with pytest.raises(ValueError, match="1_sal.png of 90x120 px .*a/1.jpg of 120x90 px:"):
        stored.load(0)
    photograph(tmp_path / "maps/a/2_sal.png", (120, 90), 6)  # as many tools do: turned by its own tag
    assert images.load(1)[1].size == (90, 120)


def test_saliency_maps_are_found_by_class_and_image_name(folders):
    for k in range(9):
        path = folders / "maps" / "ab"[k // 5] / f"{k}_sal.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array([[0, 10 + k], [100, 20]], np.uint8)).save(path)
    images = data.class_folders(str(folders), str(folders / "maps"))
    at = images.classes.index("b"), [p.name for p in images.paths].index("7.png")
    image, saliency = images.load(at[1])
    assert images.labels[at[1]] == at[0] and image.size == (61, 35)
    np.testing.assert_allclose(np.asarray(saliency), [[0, 0.17], [1, 0.2]], atol=1e-6)
    kept = data.class_folders(str(folders), str(folders / "maps"), rescale=False).load(at[1])[1]
    np.testing.assert_allclose(np.asarray(kept), np.array([[0, 17], [100, 20]]) / 255, atol=1e-6)
    with pytest.raises(ValueError, match="no_such_maps"):
        data.class_folders(str(folders), str(folders / "no_such_maps"))


def image_set(*counts: int) -> ImageSet:
    """Classes of so many images, none of which is ever opened; members of a class do not lie together."""
    labels = [c for k in range(max(counts)) for c, count in enumerate(counts) if k < count]
    paths = [Path(f"{k}.png") for k in range(len(labels))]
    return ImageSet(paths, labels, [f"class {c}" for c in range(len(counts))])


def test_epoch_pairs_stay_in_a_class_and_leave_out_one_image_of_an_odd_class():
    images = image_set(5, 4, 2)
    left_out = set()
    for epoch in range(40):
        pairs = images.epoch_pairs(3, epoch)
        used = [i for pair in pairs for i in pair]
        assert all(images.labels[s] == images.labels[t] for s, t in pairs)
        assert len(used) == len(set(used)) == 10
        (missing,) = set(range(11)) - set(used)
        left_out.add(missing)
    assert left_out == {i for i, label in enumerate(images.labels) if label == 0}


def test_epoch_pairs_follow_from_seed_and_epoch_alone():
    images = image_set(9, 8)
    assert images.epoch_pairs(1, 2) == images.epoch_pairs(1, 2) == image_set(9, 8).epoch_pairs(1, 2)
    drawn = {tuple(images.epoch_pairs(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(drawn) == 9


def test_epoch_pairs_mix_the_classes():
    images = image_set(20, 20)
    order = [images.labels[s] for s, _ in images.epoch_pairs(0, 0)]
    assert sorted(order) != order and sorted(order, reverse=True) != order


def spair(root: Path, lines: str) -> Path:
    (root / "Layout" / "large").mkdir(parents=True)
    (root / "Layout" / "large" / "trn.txt").write_text(lines)
    return root


SPAIR = """000001-2008_002719-2008_004100:aeroplane
000002-2008_002719-2009_000001:aeroplane
000003-2010_000005-2008_002719:tvmonitor
"""


def test_spair_train_reads_the_pairs_and_categories_of_its_layout(tmp_path):
    images = spair_train(str(spair(tmp_path, SPAIR)))
    assert images.classes == ["aeroplane", "tvmonitor"]
    pairs = [tuple(str(images.paths[i].relative_to(tmp_path)) for i in pair) for pair in images.pairs]
    folder = "JPEGImages/aeroplane"
    assert pairs == [
        (f"{folder}/2008_002719.jpg", f"{folder}/2008_004100.jpg"),
        (f"{folder}/2008_002719.jpg", f"{folder}/2009_000001.jpg"),
        ("JPEGImages/tvmonitor/2010_000005.jpg", "JPEGImages/tvmonitor/2008_002719.jpg"),
    ]
    assert len(images) == 5  # 2008_002719 counts once in either category
    assert [[images.classes[images.labels[i]] for i in pair] for pair in images.pairs] == [
        ["aeroplane"] * 2,
        ["aeroplane"] * 2,
        ["tvmonitor"] * 2,
    ]


def test_given_pairs_come_once_an_epoch_in_an_order_drawn_from_seed_and_epoch(tmp_path):
    lines = "".join(f"{k:06d}-2008_{k:06d}-2009_{k * 3 % 8:06d}:boat\n" for k in range(8))
    images = spair_train(str(spair(tmp_path, lines)))
    epochs = [images.epoch_pairs(5, epoch) for epoch in range(4)]
    assert all(sorted(pairs) == sorted(images.pairs) for pairs in epochs)
    assert len({tuple(pairs) for pairs in epochs}) == 4 and images.epoch_pairs(5, 2) == epochs[2]


@pytest.mark.parametrize("line", ["000001-2008_002719:aeroplane", "000001-2008_002719-2008_004100"])
def test_spair_train_names_file_and_line_of_a_malformed_pair(tmp_path, line):
    with pytest.raises(ValueError, match="trn.txt line 4"):
        spair_train(str(spair(tmp_path, SPAIR + line + "\n")))


PASCAL = """source_image,target_image,class,flip
{0}2008_000008.jpg,{0}2009_000100.jpg,1,0
{0}2008_000008.jpg,{0}2009_000100.jpg,1,1
{0}2010_000003.jpg,{0}2008_000021.jpg,20,0
{0}2010_000003.jpg,{0}2008_000021.jpg,20,1
{0}2010_000009.jpg,{0}2010_000010.jpg,7,0
"""


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("trn_pairs.csv", ""), ("train_pairs_pf_pascal.csv", "PF-dataset-PASCAL/JPEGImages/")],
)
def test_pfpascal_train_reads_pairs_and_classes_and_drops_flipped_rows(tmp_path, name, prefix):
    (tmp_path / name).write_text(PASCAL.format(prefix))
    images = pfpascal_train(str(tmp_path))
    assert images.classes == ["aeroplane", "car", "tvmonitor"]
    pairs = [tuple(str(images.paths[i].relative_to(tmp_path)) for i in pair) for pair in images.pairs]
    assert pairs == [
        ("JPEGImages/2008_000008.jpg", "JPEGImages/2009_000100.jpg"),
        ("JPEGImages/2010_000003.jpg", "JPEGImages/2008_000021.jpg"),
        ("JPEGImages/2010_000009.jpg", "JPEGImages/2010_000010.jpg"),
    ]
    labels = [[images.classes[images.labels[i]] for i in pair] for pair in images.pairs]
    assert labels == [["aeroplane"] * 2, ["tvmonitor"] * 2, ["car"] * 2]


def test_an_image_of_two_classes_has_the_label_of_the_pair_it_is_used_in(tmp_path):
    """VOC pictures of a horse and its rider are in PF-PASCAL under both classes, in one folder of images."""
    rows = "both.jpg,horse.jpg,13,0\nboth.jpg,rider.jpg,15,0\nother.jpg,both.jpg,13,0\n"
    (tmp_path / "trn_pairs.csv").write_text("source_image,target_image,class,flip\n" + rows)
    images = pfpascal_train(str(tmp_path))
    shown = [(path.name, images.classes[label]) for path, label in zip(images.paths, images.labels)]
    found = [[shown[i] for i in pair] for pair in images.pairs]
    assert found == [
        [("both.jpg", "horse"), ("horse.jpg", "horse")],
        [("both.jpg", "person"), ("rider.jpg", "person")],
        [("other.jpg", "horse"), ("both.jpg", "horse")],
    ]


@pytest.mark.parametrize("row", ["a.jpg,b.jpg,1", "a.jpg,b.jpg,cat,0", "a.jpg,b.jpg,0,0", "a.jpg,b.jpg,21,0"])
def test_pfpascal_train_names_file_and_line_of_a_malformed_row(tmp_path, row):
    (tmp_path / "trn_pairs.csv").write_text(PASCAL.format("") + row + "\n")
    with pytest.raises(ValueError, match="trn_pairs.csv line 7"):
        pfpascal_train(str(tmp_path))


@pytest.mark.parametrize("build", [spair_train, pfpascal_train])
def test_pair_lists_name_the_root_they_are_missing_from(tmp_path, build):
    with pytest.raises(ValueError, match=f"folder {tmp_path}/gone"):
        build(str(tmp_path / "gone"))


# ------------------------------------------------------------------------------------------------------------
# Pairs of views


def test_views_without_augmentation_are_whole_images_in_every_epoch(folders):
    images = data.class_folders(str(folders))
    pairs = TrainPairs(images, 32, 8, augment=False, seed=0)
    for epoch in (0, 5):
        item = pairs[epoch, 2, 6, 8]
        for side, index in (("src", 6), ("trg", 8)):
            whole, _ = prepare(data.open_image(images.paths[index]), None, 32, 8)
            assert torch.equal(item[f"{side}_img"], whole)
            assert item[f"{side}_sal"].numel() == 0
        assert item["label"] == 1 and item["skipped"] == ""


def test_augmented_views_follow_from_key_and_seed_alone(folders):
    images = data.class_folders(str(folders))
    pairs = TrainPairs(images, 32, 8, augment=True, seed=4)
    first = pairs[3, 0, 0, 1]
    pairs[0, 1, 2, 4], pairs[3, 2, 6, 7]  # other work in between changes nothing
    again = pairs[3, 0, 0, 1]
    assert torch.equal(first["src_img"], again["src_img"]) and torch.equal(first["trg_img"], again["trg_img"])
    fresh = TrainPairs(images, 32, 8, augment=True, seed=4)[3, 0, 0, 1]
    assert torch.equal(first["src_img"], fresh["src_img"])
    for other in (pairs[4, 0, 0, 1], TrainPairs(images, 32, 8, augment=True, seed=5)[3, 0, 0, 1]):
        assert not torch.equal(first["src_img"], other["src_img"])
        assert not torch.equal(first["trg_img"], other["trg_img"])


def test_an_image_of_two_couples_of_an_epoch_is_cropped_differently_in_each(folders):
    """Weak pairs of a benchmark: an image stands in many, and used to keep one crop and mirror."""
    pairs = TrainPairs(data.class_folders(str(folders)), 32, 8, augment=True, seed=4)
    views = [pairs[3, place, 0, other]["src_img"] for place, other in enumerate((1, 2, 3, 4))]
    views += [pairs[3, place, other, 0]["trg_img"] for place, other in ((4, 1), (5, 2))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))
    again = pairs[3, 1, 0, 2]["src_img"]
    assert torch.equal(again, views[1])


def test_augmentation_crops_and_mirrors_each_image_on_its_own(tmp_path):
    """Images that encode a pixel's place as its colour: their corners tell box and mirroring."""
    y, x = np.mgrid[0:64, 0:96]
    place = Image.fromarray(np.stack([x * 255 / 95, y * 255 / 63, 0 * x], -1).astype(np.uint8))
    (tmp_path / "a").mkdir()
    for k in range(2):
        place.save(tmp_path / "a" / f"{k}.png")
    pairs = TrainPairs(data.class_folders(str(tmp_path)), 64, 8, augment=True, seed=0)
    mirrored, areas, twins = [], [], 0
    for epoch in range(60):
        item = pairs[epoch, 0, 0, 1]
        for key in ("src_img", "trg_img"):
            red, green = (item[key][c] * STD[c] + MEAN[c] for c in (0, 1))
            across, down = float(red[32, -2] - red[32, 1]), float(green[-2, 32] - green[1, 32])
            mirrored.append(across < 0)
            areas.append(abs(across) * down * (64 / 61) ** 2)
        twins += torch.equal(item["src_img"], item["trg_img"])
    assert 0.3 < np.mean(mirrored) < 0.7 and 0.32 < min(areas) < 0.45 and 0.85 < max(areas) < 1.03
    assert twins == 0


def test_an_unreadable_image_is_named_and_the_next_of_its_class_taken(folders):
    images = data.class_folders(str(folders))
    pairs = TrainPairs(images, 32, 8, augment=False, seed=0)
    for number, replacement in ((1, 2), (4, 0)):  # after the last, the first
        bad = folders / "a" / f"{number}.png"
        truncate(bad)
        item = pairs[0, 0, images.paths.index(bad), 3]
        expected, _ = prepare(data.open_image(images.paths[replacement]), None, 32, 8)
        assert torch.equal(item["src_img"], expected) and item["label"] == 0
        assert str(bad) in item["skipped"] and len(item["skipped"].splitlines()) == 1
    assert pairs[0, 0, 2, 3]["skipped"] == ""


def test_several_unreadable_images_in_a_row_are_all_named(folders):
    images = data.class_folders(str(folders))
    bad = [truncate(folders / "b" / f"{k}.png") for k in (5, 7)]
    pairs = TrainPairs(images, 32, 8, augment=False, seed=0)
    item = pairs[0, 0, 5, 6]
    assert torch.equal(item["src_img"], pairs[0, 0, 8, 6]["src_img"])  # 6 is the partner, 7 is damaged too
    assert [str(path) in line for path, line in zip(bad, item["skipped"].splitlines())] == [True] * 2


@pytest.fixture
def thinned(tmp_path):
    """Classes a, b and c of six images each, as decoded by brightness; b has a single one to be read."""
    for k in range(18):
        path = tmp_path / "abc"[k // 6] / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (10 * k,) * 3).save(path)
        if k // 6 == 1 and k != 9:
            truncate(path)
    return data.class_folders(str(tmp_path))


def shown(item: dict) -> list[int]:
    """Which of `thinned`'s images both ends of an item are."""
    return [round(float(item[f"{side}_img"][0, 4, 4] * STD[0] + MEAN[0]) * 25.5) for side in ("src", "trg")]


@pytest.mark.parametrize("src,trg", [(6, 7), (9, 7), (7, 9), (10, 11)])
def test_a_class_of_one_readable_image_is_left_out_and_named_and_another_takes_its_place(thinned, src, trg):
    pairs, found = TrainPairs(thinned, 16, 8, augment=True, seed=0), set()
    for place in range(12):
        item = pairs[1, place, src, trg]
        *files, last = item["skipped"].splitlines()
        assert last == "class b: fewer than two readable images; left out"
        assert all("cannot read image" in line and "/b/" in line for line in files)
        assert item["label"] == 2 and len(set(shown(item))) == 2 and set(shown(item)) <= set(range(12, 18))
        found |= set(shown(item))
        assert torch.equal(item["src_img"], pairs[1, place, src, trg]["src_img"])
    assert len(found) > 3  # not the same two each time


def test_both_ends_are_never_the_same_image(thinned):
    """Two of the class can be read: whatever stands in for the others, they are the two ends."""
    save_image(thinned.paths[6], (40, 30))
    Image.new("RGB", (40, 30), (60,) * 3).save(thinned.paths[6])
    pairs = TrainPairs(thinned, 16, 8, augment=False, seed=0)
    for src, trg in itertools.permutations(range(6, 12), 2):
        assert sorted(shown(pairs[0, 0, src, trg])) == [6, 9]


def test_where_no_class_has_two_readable_images_the_first_reason_is_named(folders):
    images = data.class_folders(str(folders))
    for k in (0, 1, 2, 3, 5, 6, 7, 8):
        truncate(folders / "ab"[k // 5] / f"{k}.png")
    with pytest.raises(ValueError, match="no class has two images that can be read; the first: .*b/8.png"):
        TrainPairs(images, 32, 8, augment=False, seed=0)[0, 0, 8, 5]


def test_a_readable_image_costs_no_search_for_substitutes(folders, monkeypatch):
    """The search runs over all labels: 50 ms a view on ImageNet."""
    images = data.class_folders(str(folders))
    searched = []
    monkeypatch.setattr(images, "substitutes", lambda index: searched.append(index) or [])
    TrainPairs(images, 32, 8, augment=False, seed=0)[0, 0, 0, 1]
    assert searched == []


# ------------------------------------------------------------------------------------------------------------
# Order of work


def literal_stream(images: ImageSet, batch: int, seed: int, epochs: int) -> list[list[tuple[int, ...]]]:
    """All micro-batches of the first epochs: an epoch's pairs, numbered and cut into whole batches, the rest
    dropped."""
    batches = []
    for epoch in range(epochs):
        keys = [(epoch, place, s, t) for place, (s, t) in enumerate(images.epoch_pairs(seed, epoch))]
        while len(keys) >= batch:
            batches.append(keys[:batch])
            keys = keys[batch:]
    return batches


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_turns_over_one_sequence_across_epochs(world):
    images = image_set(9, 8, 6)  # 11 pairs an epoch: 3 batches of 3, 2 pairs left over
    whole = literal_stream(images, 3, 7, 6)
    assert len(whole) == 18
    for rank in range(world):
        stream = PairStream(images, 3, 7, rank=rank, world=world)
        assert list(itertools.islice(stream, 18 // world)) == whole[rank::world]


@pytest.mark.parametrize("start", [1, 3, 4, 8])
def test_a_resumed_stream_goes_on_in_the_middle_of_the_sequence(start):
    images = image_set(9, 8, 6)
    whole = literal_stream(images, 3, 7, 6)
    for world in (1, 2):
        for rank in range(world):
            expected = whole[start + rank :: world]
            stream = PairStream(images, 3, 7, start, rank, world)
            assert list(itertools.islice(stream, len(expected))) == expected


def test_a_batch_larger_than_an_epoch_is_refused_with_the_number_of_pairs():
    with pytest.raises(ValueError, match="--batch 12.*11 pairs"):
        PairStream(image_set(9, 8, 6), 12, 0)
    assert len(next(iter(PairStream(image_set(9, 8, 6), 11, 0)))) == 11


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_without_pairs_is_refused(batch):
    with pytest.raises(ValueError, match=f"--batch {batch}"):
        PairStream(image_set(9, 8, 6), batch, 0)


def test_two_workers_load_what_one_process_loads(folders):
    images = data.class_folders(str(folders))
    pairs = TrainPairs(images, 16, 8, augment=True, seed=1)
    loaded = []
    for workers in (0, 2):
        loader = DataLoader(pairs, batch_sampler=PairStream(images, 2, 1), num_workers=workers)
        loaded.append(list(itertools.islice(loader, 5)))
    for alone, together in zip(*loaded):
        assert torch.equal(alone["src_img"], together["src_img"])
        assert torch.equal(alone["trg_img"], together["trg_img"])
        assert alone["label"].tolist() == together["label"].tolist()


# ------------------------------------------------------------------------------------------------------------
# PF-WILLOW

NUMBERS = (f"{axis}{image}{k}" for image in "AB" for axis in "XY" for k in range(1, 11))
HEADER = ",".join(["imageA", "imageB", *NUMBERS])


def willow_row(src: str, trg: str, start: float) -> list:
    """Points k = 0..9: source (start + k, start + 20 + 2k), target (start + 40 + 3k, start + 90 - 5k)."""
    ks = range(10)
    xa, ya = [start + k for k in ks], [start + 20 + 2 * k for k in ks]
    return [src, trg, *xa, *ya, *(start + 40 + 3 * k for k in ks), *(start + 90 - 5 * k for k in ks)]


def write_willow(root: Path, rows: list[list], name: str = "test_pairs.csv") -> str:
    (root / name).write_text("\n".join([HEADER, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(root)


CAR, DUCK = "PF-dataset/car(G)", "PF-dataset/duck(S)"


@pytest.mark.parametrize("name", ["test_pairs.csv", "test_pairs_pf.csv"])
def test_pfwillow_reads_ten_x_then_ten_y_of_either_image(tmp_path, name):
    rows = [willow_row(f"{CAR}/1.png", f"{CAR}/2.png", 0.5), willow_row(f"{DUCK}/7.png", f"{DUCK}/8.png", 10)]
    keypoints = pfwillow(write_willow(tmp_path, rows, name))
    assert keypoints.name == "PF-WILLOW" and len(keypoints) == 2
    for pair, start, category in zip(keypoints.pairs, (0.5, 10), ("car(G)", "duck(S)")):
        assert pair.src_kps.tolist() == [[start + k, start + 20 + 2 * k] for k in range(10)]
        assert pair.trg_kps.tolist() == [[start + 40 + 3 * k, start + 90 - 5 * k] for k in range(10)]
        assert pair.category == category
        assert pair.src_box == (start, start + 20, start + 9, start + 38)
        assert pair.trg_box == (start + 40, start + 45, start + 67, start + 90)
        assert pair.extent == 45  # the target's points span 27 x 45 px, the source's 9 x 18
    assert keypoints.rule == "bbox"


def test_a_pair_with_its_own_d_has_that_extent(tmp_path):
    (pair,) = pfwillow(write_willow(tmp_path, [GOOD])).pairs
    assert (pair.d, pair.scale, pair.extent) == (None, None, 45)
    assert pair._replace(d=12.5).extent == 12.5 and pair._replace(d=0.0).extent == 0


def test_pfwillow_knows_an_image_by_folder_and_name(tmp_path):
    rows = [
        willow_row(f"{CAR}/1.png", f"{CAR}/2.png", 0),
        willow_row(f"{DUCK}/1.png", f"{DUCK}/2.png", 1),
        willow_row(f"{CAR}/2.png", f"{CAR}/1.png", 2),
    ]
    keypoints = pfwillow(write_willow(tmp_path, rows))
    paths = [[keypoints.images.paths[i].relative_to(tmp_path) for i in pair[:2]] for pair in keypoints.pairs]
    assert [[str(p) for p in pair] for pair in paths] == [
        ["car(G)/1.png", "car(G)/2.png"],
        ["duck(S)/1.png", "duck(S)/2.png"],
        ["car(G)/2.png", "car(G)/1.png"],
    ]
    assert len(keypoints.images) == 4
    first, _, third = keypoints.pairs
    assert (first.src, first.trg) == (third.trg, third.src)
    images = keypoints.images
    labels = [[images.classes[images.labels[i]] for i in pair[:2]] for pair in keypoints.pairs]
    assert labels == [["car(G)"] * 2, ["duck(S)"] * 2, ["car(G)"] * 2]


GOOD = willow_row(f"{CAR}/1.png", f"{CAR}/2.png", 0)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(GOOD[:41], id="a column short"),
        pytest.param([*GOOD, 5], id="a column too many"),
        pytest.param([*GOOD[:20], "x", *GOOD[21:]], id="no number"),
        pytest.param([*GOOD[:20], "nan", *GOOD[21:]], id="nan"),
        pytest.param(["1.png", *GOOD[1:]], id="source without folder"),
        pytest.param([GOOD[0], "2.png", *GOOD[2:]], id="target without folder"),
    ],
)
def test_pfwillow_names_file_and_line_of_a_broken_row(tmp_path, broken):
    with pytest.raises(ValueError, match=r"test_pairs.csv line 3\b"):
        pfwillow(write_willow(tmp_path, [GOOD, broken, GOOD]))


def test_pfwillow_refuses_points_outside_their_images_and_all_equal(tmp_path):
    for name, size in (("1.png", (10, 39)), ("2.png", (68, 91))):
        save_image(tmp_path / "car(G)" / name, size)
    assert len(pfwillow(write_willow(tmp_path, [GOOD]))) == 1  # up to (9, 38) and (67, 90)
    equal = [*GOOD[:2], *[5] * 20, *GOOD[22:]]
    with pytest.raises(ValueError, match="test_pairs.csv line 3: the source's box, 5,5 to 5,5, has no"):
        pfwillow(write_willow(tmp_path, [GOOD, equal]))
    save_image(tmp_path / "car(G)" / "2.png", (66, 91))
    with pytest.raises(ValueError, match=r"pairs.csv line 2: target point 10 \(67, 45\).*2.png of 66x91"):
        pfwillow(write_willow(tmp_path, [GOOD]))


def test_pfwillow_names_a_folder_without_its_list_and_a_list_without_pairs(tmp_path):
    with pytest.raises(ValueError, match=f"PF-WILLOW folder {tmp_path}/gone"):
        pfwillow(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="test_pairs.csv"):
        pfwillow(write_willow(tmp_path, []))


def test_pfwillow_names_an_image_that_is_missing(tmp_path):
    keypoints = pfwillow(write_willow(tmp_path, [GOOD]))
    save_image(tmp_path / "car(G)" / "2.png", (30, 50))
    assert keypoints.load(keypoints.pairs[0].trg)[0].size == (30, 50)
    with pytest.raises(ValueError, match=r"car\(G\)/1.png"):
        keypoints.load(keypoints.pairs[0].src)


def test_real_pfwillow_has_900_pairs_in_10_folders_with_all_points_inside(willow):
    keypoints = pfwillow(str(willow))
    assert len(keypoints) == 900 and len(keypoints.images) == 100
    assert sorted(Counter(p.category for p in keypoints.pairs).values()) == [90] * 10
    sizes = [data.open_image(path).size for path in keypoints.images.paths]
    assert {max(size) for size in sizes} == {300} and len(set(sizes)) > 10
    for pair in keypoints.pairs:
        for index, kps in ((pair.src, pair.src_kps), (pair.trg, pair.trg_kps)):
            assert kps.min() >= 0 and (kps <= torch.tensor(sizes[index]) - 1).all()
            assert keypoints.images.classes[keypoints.images.labels[index]] == pair.category


def test_real_pfwillow_points_are_the_named_columns_of_the_list(willow):
    keypoints = pfwillow(str(willow))
    with open(willow / "test_pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(keypoints)
    for row, pair in zip(rows, keypoints.pairs):
        for image, index, kps in (("A", pair.src, pair.src_kps), ("B", pair.trg, pair.trg_kps)):
            named = [[float(row[f"{axis}{image}{k}"]) for axis in "XY"] for k in range(1, 11)]
            torch.testing.assert_close(kps, torch.tensor(named))
            assert row[f"image{image}"].endswith("/".join(keypoints.images.paths[index].parts[-2:]))


# ------------------------------------------------------------------------------------------------------------
# shapes

FINGERPRINT = """
import hashlib, sys
from support.shapes import SHAPE_CLASSES, draw_shape
for category in SHAPE_CLASSES:
    record = draw_shape(category, 17, 96)
    pixels = record["image"].tobytes() + record["mask"].tobytes()
    text = repr((record["kps"], record["bbox"])).encode() + pixels
    print(category, hashlib.sha256(text).hexdigest())
"""


def test_shapes_are_the_same_in_every_process():
    here = []
    for category in SHAPE_CLASSES:
        record = draw_shape(category, 17, 96)
        pixels = record["image"].tobytes() + record["mask"].tobytes()
        text = repr((record["kps"], record["bbox"])).encode() + pixels
        here.append(f"{category} {hashlib.sha256(text).hexdigest()}")
    assert len({line.split()[1] for line in here}) == len(SHAPE_CLASSES)
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", FINGERPRINT]
        there = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        assert there.splitlines() == here


@pytest.mark.parametrize("category", SHAPE_CLASSES)
def test_keypoints_of_a_shape_lie_in_the_image_on_or_beside_the_object(category):
    names = None
    for seed in range(5):
        record = draw_shape(category, seed, 128)
        ys, xs = np.nonzero(np.asarray(record["mask"]))
        assert record["image"].size == record["mask"].size == (128, 128)
        assert record["bbox"] == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert names in (None, list(record["kps"]))
        names = list(record["kps"])
        assert len(names) >= 5
        for x, y in record["kps"].values():
            assert 0 <= x <= 127 and 0 <= y <= 127
            assert np.hypot(xs - x, ys - y).min() < 3


def test_keypoints_of_a_shape_scale_with_the_image():
    """The same object at twice the size: pixel centres at integers, so x becomes 2x + 0.5."""
    small, large = draw_shape("fish", 3, 64), draw_shape("fish", 3, 128)
    for name, (x, y) in small["kps"].items():
        assert math.isclose(large["kps"][name][0], 2 * x + 0.5, abs_tol=1e-6)
        assert math.isclose(large["kps"][name][1], 2 * y + 0.5, abs_tol=1e-6)


def test_shape_splits_share_no_seed_and_repeat_none():
    drawn, seeds = [], []
    for split, (_, count) in SHAPE_SPLITS.items():
        images = Shapes(split)
        assert sorted(images.labels) == sorted(list(range(len(SHAPE_CLASSES))) * count)
        drawn += zip(images.labels, images.seeds)
        seeds.append(set(images.seeds))
    assert len(set(drawn)) == len(drawn)
    assert len(set().union(*seeds)) == sum(map(len, seeds))


def test_shapes_load_what_their_label_and_seed_draw():
    images = Shapes("val")
    index = len(images) // 2 + 1
    image, saliency = images.load(index)
    record = draw_shape(images.classes[images.labels[index]], images.seeds[index])
    assert image.tobytes() == record["image"].tobytes()
    np.testing.assert_array_equal(np.asarray(saliency), np.asarray(record["mask"]) / 255)
    assert Shapes("val", saliency=False).load(index)[1] is None


def test_shape_pairs_join_two_images_of_a_class_keypoint_by_keypoint():
    keypoints = shapes_pairs("val")
    assert [pair.src for pair in keypoints.pairs] == list(range(len(keypoints.images)))
    assert len({pair.trg for pair in keypoints.pairs}) > len(keypoints) / 3
    for pair in keypoints.pairs:
        a, b = (keypoints.images.draw(i) for i in pair[:2])
        assert pair.src != pair.trg and a["image"].tobytes() != b["image"].tobytes()
        assert {keypoints.images.classes[keypoints.images.labels[i]] for i in pair[:2]} == {pair.category}
        assert list(a["kps"]) == list(b["kps"]) and len(pair.src_kps) == len(pair.trg_kps) == len(a["kps"])
        for name, src, trg in zip(a["kps"], pair.src_kps, pair.trg_kps):
            torch.testing.assert_close(src, torch.tensor(a["kps"][name]))
            torch.testing.assert_close(trg, torch.tensor(b["kps"][name]))
        rows, columns = np.nonzero(np.asarray(b["mask"]))
        assert pair.extent == max(np.ptp(columns), np.ptp(rows)) + 1
        assert (pair.src_box, pair.trg_box) == (a["bbox"], b["bbox"])


def test_shape_pairs_are_drawn_alike_every_time():
    first, second = shapes_pairs("val"), shapes_pairs("val")
    assert [pair[:2] for pair in first.pairs] == [pair[:2] for pair in second.pairs]


def test_unknown_shapes_and_splits_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unicorn.*fish"):
        draw_shape("unicorn", 0)
    for build in (Shapes, shapes_pairs):
        with pytest.raises(ValueError, match="holdout.*train"):
            build("holdout")


def test_sixteen_bit_pictures_keep_their_tones(tmp_path):
    ramp = np.linspace(0, 65535, 60).astype(np.uint16).reshape(6, 10)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    found = np.asarray(data.open_image(tmp_path / "deep.png"))[..., 0]
    assert np.abs(found.astype(float) - ramp / 257).max() <= 1
