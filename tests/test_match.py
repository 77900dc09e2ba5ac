"""Matching pictures of one's own: support/match.py through `python pixel_stage.py`."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import support.confidence
import support.match
from data import open_image, prepare
from evaluate import load_methods
from modules import Features, transfer_keypoints
from support.backbone import Backbone
from support.match import (
    Side,
    main,
    object_cells,
    open_side,
    parse_points,
    read_options,
    read_pairs,
    wants_pictures,
)
from support.ours import Reading, both_faces
from support.shapes import draw_shape
from train import Cascade, Config, parse_config, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--backbone random_vit8 --size 64 --batch 3 --candidates 6 --ffn-ratio 0.25 --val none --log-every 1"
         " --device cpu --steps 1").split()
FROZEN = "--backbone random_vit8 --size 64 --device cpu".split()  # 16 x 16 cells, 8 x 8 with --no-dense
LINE = re.compile(r"^(-?[\d.]+),(-?[\d.]+) -> (-?[\d.]+),(-?[\d.]+)  confidence (\d\.\d\d)$", re.MULTILINE)


def run(*arguments: object) -> subprocess.CompletedProcess:
    """`python pixel_stage.py`, from its folder."""
    command = [sys.executable, "pixel_stage.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def match(*arguments: object) -> SimpleNamespace:
    """The same, in this process and folder, without the interpreter's start."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*map(str, arguments)], load_methods)
        except SystemExit as error:
            code = error.code
    if isinstance(code, str):  # what Python prints, and then exits with 1
        code = print(code, file=err) or 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def matched(*arguments: object) -> str:
    """What a run of the frozen backbone that ends well prints."""
    done = match(*arguments, *FROZEN)
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Every test in an empty folder of its own, where matches.png goes."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures, of maps, and of what cannot be matched."""
    folder = tmp_path_factory.mktemp("pictures")
    for k, seed in enumerate((3, 11, 5)):  # of 150x100, 120x100 and 90x110 px
        size = ((150, 100), (120, 100), (90, 110))[k]
        draw_shape("bicycle", seed)["image"].resize(size).save(folder / f"{k}.png")
    left, top = Image.new("L", (150, 100)), Image.new("L", (60, 50))
    left.paste(255, (0, 0, 75, 100))
    top.paste(255, (0, 0, 60, 25))
    left.save(folder / "left.png"), top.save(folder / "top.png")
    dot = Image.new("L", (150, 100))
    dot.putpixel((40, 40), 255)
    dot.save(folder / "dot.png")
    Image.new("L", (90, 120), 77).save(folder / "high.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (50, 40), "white").save(folder / "white.png")
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    (folder / "corrupt.png").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "empty.txt").write_text("x,y\n\n")
    (folder / "list.csv").write_text("source,target\n0.png,1.png\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a cascade after one step, last.pt, and one without a pixel stage, two/last.pt."""
    folder = tmp_path_factory.mktemp("trained")
    train(*parse_config([*SMALL, "--out", str(folder)]))
    train(*parse_config([*SMALL, "--stages", "2", "--out", str(folder / "two")]))
    return folder


@pytest.fixture
def images_read(monkeypatch) -> list[int]:
    """How many images the backbone was given, a call each."""
    counts, forward = [], Backbone.forward

    def count(self, images, attention=False):
        counts.append(len(images))
        return forward(self, images, attention)

    monkeypatch.setattr(Backbone, "forward", count)
    return counts


# ------------------------------------------------------------------------------------------------------------
# The door


@pytest.mark.parametrize("line, pictures", [
    ("a.png b.jpg --checkpoint F", True),
    ("folder/a b", True),  # without endings that tell, the first word does
    ("--count 5 --points 1,2 3,4 a.JPG b.webp", True),
    ("--checkpoint F a.heic b.tif", True),
    ("--pairs list.csv --json x.jsonl", True),
    ("--pairs=list.csv", True),
    ("--size 64 --pairs pairs", True),
    ("--pairs", True),
    ("--help a.png b.png", True),
    ("a.png b.png --help", True),
    ("", False),
    ("--help", False),
    ("-h", False),
    ("--pairs 16", False),
    ("--pairs=16 --steps 3", False),
    ("--preset quick --root photos --saliency maps", False),
    ("--resume runs/pixel/last.pt", False),
])  # fmt: skip
def test_a_command_line_with_pictures_or_a_list_of_pairs_is_for_matching(line, pictures):
    assert wants_pictures(line.split()) is pictures


@pytest.mark.parametrize("line, of_matching", [("--help", False), ("a.png b.png --help", True)])
def test_help_is_of_training_alone_and_of_matching_beside_pictures(monkeypatch, capsys, line, of_matching):
    monkeypatch.setattr(sys, "argv", ["pixel_stage.py", *line.split()])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "pixel_stage.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert left.value.code == 0 and ("--warp" in said) == of_matching == ("--lr" not in said)
    first = said[: said.index("\noptions:" if of_matching else "\ndata:")]
    for words in ("SOURCE TARGET", "--pairs FILE") if of_matching else ("a.jpg b.jpg", "--pairs pairs.csv"):
        assert f"python pixel_stage.py {words}" in first or f"`{words}`" in first


@pytest.mark.parametrize("line, points", [
    ("b.png a.jpg", None),
    ("--points 1,2 3,4 b.png a.jpg", ["1,2", "3,4"]),
    ("b.png --points 1,2 a.jpg", ["1,2"]),
    ("--points 1,2 b.png a.jpg --count 3", ["1,2"]),
    ("--points 1,2 b.png --count 3 a.jpg", ["1,2"]),
    ("--count 3 b.png --points places.txt --threshold 1 a.jpg", ["places.txt"]),
    ("--saliency c.png d.png b.png --no-dense a.jpg --out e.png", None),
])  # fmt: skip
def test_pictures_stand_anywhere_among_the_options_and_keep_their_order(line, points):
    args = read_options(line.split())
    assert args.pictures == ["b.png", "a.jpg"] and args.points == points


def test_pictures_whose_ending_is_no_training_sets_stand_behind_points_too(pictures):
    with Image.open(pictures / "0.png") as picture:
        picture.save("0.tif")
    found = LINE.findall(matched("--count", 3, "--points", "40,52", "0.tif", pictures / "1.png"))
    assert found == LINE.findall(matched(pictures / "0.png", pictures / "1.png", "--points", "40,52"))
    assert [start for *start, _, _, _ in found] == [["40.0", "52.0"]]


def test_the_frozen_backbone_matches_two_pictures_and_says_so(pictures, tmp_path):
    """Through the shell: pictures last, no checkpoint, what is drawn and said."""
    out = run("--points", "40,52", "118.5,60", pictures / "0.png", pictures / "1.png", *FROZEN, "--out",
              tmp_path / "m.png", "--threshold", 1)  # points that were asked for are drawn all the same
    assert (out.returncode, out.stderr) == (0, "")
    lines = out.stdout.splitlines()
    assert lines[0].startswith("frozen random_vit8, ") and "pixel stage" not in out.stdout
    assert [pair[:2] for pair in LINE.findall(out.stdout)] == [("40.0", "52.0"), ("118.5", "60.0")]
    assert lines[-1].startswith(f"2 matches drawn in {tmp_path / 'm.png'}, confidence 0.")
    with Image.open(tmp_path / "m.png") as page:
        assert page.size == (round(150 * 3.6) + 4 + round(120 * 3.6), 360)
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


def test_a_checkpoint_is_matched_by_its_pixel_stage_and_says_so(trained, pictures):
    pair, rest = (pictures / "0.png", pictures / "2.png"), ("--device", "cpu", "--threshold", 0, "--count", 4)
    out = match(*pair, "--checkpoint", trained / "last.pt", *rest, "--json", "trained.json")
    assert (out.code, out.err) == (0, "") and "frozen" not in out.out
    assert f"pixel stage of {trained / 'last.pt'}" in out.out and "4 matches drawn in matches.png" in out.out
    with Image.open("matches.png") as page:
        assert page.size == (540 + 4 + round(90 * 360 / 110), 360)
    matched(*pair, *rest, "--json", "frozen.json")
    one, two = (json.loads(Path(name).read_text()) for name in ("trained.json", "frozen.json"))
    assert one["settings"]["checkpoint"] == str(trained / "last.pt") and one["matches"] != two["matches"]
    assert one["settings"]["reading"] == "best-pixel" and two["settings"]["reading"] == "best"


# ------------------------------------------------------------------------------------------------------------
# Where points go


def test_points_of_a_line_and_of_a_file_are_read_alike(pictures):
    pair = pictures / "0.png", pictures / "1.png"
    Path("places.txt").write_text("x,y\n40,52\n\n 118.5 , 60 \n0 0\n")
    Path("windows.txt").write_bytes(b"\xef\xbb\xbfx,y\r\n40,52\r\n118.5,60\r\n0,0\r\n")
    texts = [LINE.findall(matched(*pair, "--points", *points))
             for points in (("40,52", "118.5,60", "0,0"), ("places.txt",), ("windows.txt",))]
    assert [line[:2] for line in texts[0]] == [("40.0", "52.0"), ("118.5", "60.0"), ("0.0", "0.0")]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("dense, side", [("--dense", 16), ("--no-dense", 8)])
def test_a_point_goes_where_the_volume_sends_it_with_its_confidence(pictures, dense, side):
    """Pixels to cells, the reading's volume, cells to pixels, and a logistic function, by hand."""
    paths, points = (pictures / "0.png", pictures / "1.png"), [(40, 52), (118.5, 60), (149.2, -0.3)]
    found = LINE.findall(matched(*paths, dense, "--points", *(f"{x},{y}" for x, y in points[:2])))
    args = read_options([*map(str, paths), dense, *FROZEN])
    with contextlib.redirect_stdout(io.StringIO()):
        matcher, _ = load_methods(args)
    views = [prepare(open_image(path), None, 64, 8)[0][None] for path in paths]
    src, trg = (both_faces(matcher, view) for view in views)
    reading = matcher.best(src, trg, "best")
    cells = [((x + 0.5) * side / 150 - 0.5, (y + 0.5) * side / 100 - 0.5) for x, y in points]
    places = transfer_keypoints(reading.volume, torch.tensor([cells]))
    everything = torch.ones(1, side, side, dtype=torch.bool)
    known = support.confidence.evidence(reading, everything, everything, torch.tensor([cells]), places)
    weights, bias = support.confidence.FITTED[dense == "--dense"]
    for (x, y), (u, v), row, line in zip(points, places[0].tolist(), known[0].tolist(), found):
        sure = 1 / (1 + math.exp(-bias - sum(w * e for w, e in zip(weights, row))))
        place = ((u + 0.5) * 120 / side - 0.5, (v + 0.5) * 100 / side - 0.5)
        assert [float(part) for part in line] == pytest.approx([x, y, *place, sure], abs=0.06)
        assert float(line[4]) == pytest.approx(sure, abs=0.006)


def test_parse_points_reads_x_then_y():
    assert parse_points(["40,52.5", "-0.5,0"], (60, 80)).tolist() == [[40.0, 52.5], [-0.5, 0.0]]


@pytest.mark.parametrize("text", ["40", "40,50,60", "x,5", "59.6,5", "5,39.6", "-0.6,5", "nan,5", "inf,5"])
def test_parse_points_names_a_point_that_is_malformed_or_outside(text):
    Path("places.txt").write_text(f"1,1\n{text}\n")
    for texts, where in ((["1,1", text], "--points"), (["places.txt"], "places.txt")):
        with pytest.raises(ValueError, match=f"{where} '?{text}"):
            parse_points(texts, (60, 40))


# ------------------------------------------------------------------------------------------------------------
# The surest matches


def test_a_record_holds_every_match_in_pixels_and_cells_with_its_confidence(pictures):
    pair = pictures / "0.png", pictures / "1.png"
    said = matched(*pair, "--json", "m.json", "--threshold", 0.6, "--count", 40)
    record = json.loads(Path("m.json").read_text())
    assert list(record) == ["source", "target", "source_size", "target_size", "source_grid", "target_grid",
                            "mirrored", "matches", "settings"]  # fmt: skip
    assert [record["source"], record["target"]] == [*map(str, pair)]
    assert record["source_size"] == [150, 100] and record["target_size"] == [120, 100]
    assert record["source_grid"] == record["target_grid"] == [16, 16] and 0 <= record["mirrored"] <= 1
    wanted = {"backbone": "random_vit8", "layer": "-1", "size": 64, "checkpoint": None, "dense": True,
              "reading": "best", "count": 40, "saliency": None}
    assert record["settings"].items() >= wanted.items()
    sure = [m["confidence"] for m in record["matches"]]
    assert len(sure) == 40 and sure == sorted(sure, reverse=True) and 0 <= sure[-1] < 0.6 < sure[0] <= 1
    for m in record["matches"]:
        assert m.keys() == {"source", "target", "confidence", "source_cell", "target_cell"}
        for end, (w, h) in (("source", (150, 100)), ("target", (120, 100))):
            (x, y), (u, v) = m[end], m[f"{end}_cell"]
            assert -0.5 <= x <= w - 0.5 and -0.5 <= y <= h - 0.5 and 0 <= u <= 15 and 0 <= v <= 15
            assert x == pytest.approx((u + 0.5) * w / 16 - 0.5, abs=0.06)  # both are rounded to 0.01
            assert y == pytest.approx((v + 0.5) * h / 16 - 0.5, abs=0.06)
    drawn = sum(c >= 0.6 for c in sure)
    span = f"confidence {sure[drawn - 1]:.2f} to {sure[0]:.2f}"
    assert f"\n{drawn} matches drawn in matches.png, {span}, {40 - drawn} below 0.6 left out\n" in said
    assert said.splitlines()[-1] == "all of them, 40, in m.json"


def test_a_table_holds_the_numbers_of_the_record(pictures):
    pair = pictures / "0.png", pictures / "1.png"
    for name in ("m.json", "m.csv"):
        matched(*pair, "--json", name, "--count", 7)
    record, table = (Path(name).read_text() for name in ("m.json", "m.csv"))
    record, rows = json.loads(record), list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == len(record["matches"]) == 7
    for row, m in zip(rows, record["matches"]):
        expected = {f"{end}_{axis}": m[end][k] for end in ("source", "target", "source_cell", "target_cell")
                    for k, axis in enumerate("xy")}
        expected |= {"number": 1 + record["matches"].index(m), "confidence": m["confidence"]}
        expected |= {"mirrored": record["mirrored"]}
        assert {name: float(value) for name, value in row.items()} == expected


def test_a_threshold_leaves_matches_out_of_the_picture_alone(pictures, monkeypatch):
    drawn, draw = [], support.match.draw_matches

    def spy(src, trg, starts, ends, height):
        drawn.append((starts, ends))
        return draw(src, trg, starts, ends, height)

    monkeypatch.setattr(support.match, "draw_matches", spy)
    for threshold in (0, 0.5, 1):
        said = matched(pictures / "0.png", pictures / "1.png", "--json", "m.json", "--threshold", threshold)
        every = json.loads(Path("m.json").read_text())["matches"]
        sure = [m for m in every if m["confidence"] >= threshold]
        assert len(every) == 32
        for ends, end in zip(drawn[-1], ("source", "target")):
            torch.testing.assert_close(ends, torch.tensor([m[end] for m in sure]).view(-1, 2))
    assert said.splitlines()[-2] == "0 matches drawn in matches.png, 32 below 1 left out"
    assert len(drawn[0][0]) == 32 > len(drawn[1][0]) > 0


def test_matches_are_the_surest_that_keep_their_distance_in_both_pictures(pictures, monkeypatch):
    """Against a loop over all cells; the source's 150x100 px and the target's 90x110 are 16 x 16 cells."""
    pair = pictures / "0.png", pictures / "2.png"
    monkeypatch.setattr(support.match, "SPACING", 0)
    matched(*pair, "--json", "all.json", "--count", 999)
    every = json.loads(Path("all.json").read_text())["matches"]
    cells = [tuple(m["source_cell"]) for m in every]
    assert sorted(cells) == [(x, y) for x in range(16) for y in range(16)]
    monkeypatch.setattr(support.match, "SPACING", 3 / 16)
    matched(*pair, "--json", "some.json", "--count", 9)
    kept = []
    for m in every:
        ends = m["source_cell"], [round(v) for v in m["target_cell"]]
        apart = [max(abs(a - b) for a, b in zip(*both)) for k in kept for both in zip(ends, k[0])]
        if all(distance >= 3 for distance in apart):
            kept.append((ends, m))
    assert json.loads(Path("some.json").read_text())["matches"] == [m for _, m in kept[:9]]
    assert 9 < len(kept) < len(every) / 4 and [m for _, m in kept[:9]] != every[:9]


@pytest.mark.parametrize("dense, half", [("--dense", 8), ("--no-dense", 4)])
def test_maps_keep_matches_on_the_object_in_both_pictures(pictures, dense, half):
    """The left half of the source and the upper half of the target."""
    line = [pictures / "0.png", pictures / "1.png", dense, "--json", "m.json", "--count", 999]
    found = []
    for maps in ([], ["--saliency", pictures / "left.png", pictures / "top.png"]):
        matched(*line, *maps)
        found.append(json.loads(Path("m.json").read_text())["matches"])
    places = [[(m["source_cell"][0], round(m["target_cell"][1])) for m in some] for some in found]
    assert places[1] and all(x < half and y < half for x, y in places[1])
    assert any(x >= half for x, _ in places[0]) and any(y >= half for _, y in places[0])
    assert all(m["source"][0] < 75 and m["target"][1] < 53 for m in found[1])


@pytest.mark.parametrize("name", ["1.png", "2.png"])
def test_a_picture_matches_itself_cell_by_cell(pictures, name):
    said = matched(pictures / name, pictures / name, "--json", "m.json", "--count", 500)
    record = json.loads(Path("m.json").read_text())
    assert record["mirrored"] < 0.5 and "faces the other way" not in said and len(record["matches"]) > 200
    for m in record["matches"]:
        assert m["target_cell"] == pytest.approx(m["source_cell"], abs=1)


def test_the_mirror_image_of_a_picture_is_found_to_face_the_other_way(pictures):
    with Image.open(pictures / "1.png") as picture:
        ImageOps.mirror(picture).save("mirror.png")
    said = matched(pictures / "1.png", "mirror.png", "--json", "m.json", "--count", 500)
    record = json.loads(Path("m.json").read_text())
    assert record["mirrored"] > 0.5 and len(record["matches"]) > 200
    assert f"mirror.png faces the other way than {pictures / '1.png'}" in said
    for m in record["matches"]:
        (x, y), (u, v) = m["source"], m["target"]
        assert abs(u - (119 - x)) < 120 / 16 and abs(v - y) < 100 / 16


def blocks() -> tuple[Features, torch.Tensor]:
    """A block of like cells in a ground of others, 20 x 24, a fifth of which attention sees; the block."""
    torch.manual_seed(0)
    block, seen = torch.zeros(20, 24, dtype=torch.bool), torch.zeros(20, 24)
    block[4:16, 5:19], seen[6:12, 7:13] = True, 1.0
    kinds = torch.randn(2, 32)
    feat = kinds[block.long()] + 0.4 * torch.randn(20, 24, 32)
    return Features(feat.flatten(0, 1)[None], feat.mean((0, 1))[None], seen[None]), block


def test_the_object_is_all_of_what_is_like_the_part_that_attention_sees():
    features, block = blocks()
    found = object_cells(features)
    assert found.shape == (20, 24) and found.dtype == torch.bool
    assert float((found & block).sum() / (found | block).sum()) > 0.9
    assert float((features.saliency[0] > 0.5).sum() / block.sum()) < 0.25  # far from it before
    other = object_cells(features._replace(saliency=(~block[None]).float()))
    assert float((other & ~block).sum() / (other | ~block).sum()) > 0.9


def test_an_object_is_never_empty():
    features, block = blocks()
    nothing, dots = torch.zeros(2, 1, 20, 24)
    dots[0, ::6, ::6] = 1.0  # smoothed, none of them is high
    for saliency in (torch.ones(1, 20, 24), nothing, dots):
        for feat in (features.feat, torch.ones_like(features.feat)):
            assert object_cells(features._replace(feat=feat, saliency=saliency)).any()


def test_the_object_is_found_from_attention_where_there_is_any_and_no_map(pictures):
    """Attention of a random ViT is as good as any to tell the cases apart."""
    matcher = Cascade(Config(backbone="random_vit8", size=64, saliency="attention")).eval()
    side = open_side(matcher, str(pictures / "0.png"))
    seen = side.features.saliency[0] >= 0.5
    assert torch.equal(side.mask, object_cells(side.features)) and not torch.equal(side.mask, seen)
    side = open_side(matcher, str(pictures / "0.png"), str(pictures / "left.png"))
    assert torch.equal(side.mask, (torch.arange(8) < 4).expand(8, 8))
    side = open_side(Cascade(Config(backbone="random_vit8", size=64)).eval(), str(pictures / "0.png"))
    assert side.mask.all() and side.image.size == (150, 100)


# ------------------------------------------------------------------------------------------------------------
# The warp


def test_a_warp_pulls_the_target_to_the_source_by_the_volume_and_back(monkeypatch):
    """One-hot rows: source cell (x, y) of 6 x 9 is target cell (x - 1, y + 1) of 7 x 8."""
    volume = torch.zeros(1, 6, 9, 7, 8)
    for y in range(6):
        for x in range(1, 9):
            volume[0, y, x, y + 1, x - 1] = 1.0
    sides = []
    for (h, w), size in (((6, 9), (300, 120)), ((7, 8), (90, 210))):
        mask = torch.ones(h, w, dtype=torch.bool)
        mask[:, 0] = False
        features = Features(torch.ones(1, h * w, 4), torch.ones(1, 4), torch.ones(1, h, w))
        sides.append(Side("", Image.new("RGB", size), features, mask))
    seen = []
    monkeypatch.setattr(support.match, "draw_warp", lambda *all_of_it: seen.extend(all_of_it))
    support.match.warp(*sides, Reading(volume, volume.roll(2, 3), torch.zeros(1)), height=96)
    src, trg, places, mask, back, back_mask = seen
    assert src.size == (240, 96) and trg.size == (round(90 * 96 / 210), 96)
    sizes = {"src": (9, 6, 240, 96), "trg": (8, 7, 41, 96)}
    for one, other, found, inside, (dx, dy), first in (("src", "trg", places, mask, (-1, 1), 1.0),
                                                       ("trg", "src", back, back_mask, (1, -1), 0.0)):
        (w, h, wide, high), (w2, h2, wide2, high2) = sizes[one], sizes[other]
        assert found.shape == (high, wide, 2) and inside.shape == (high, wide) and inside.dtype == torch.bool
        for y in range(high):
            for x in range(wide):
                u, v = (x + 0.5) * w / wide - 0.5, (y + 0.5) * h / high - 0.5  # in cells
                assert bool(inside[y, x]) == (u >= 0.5) or abs(u - 0.5) < 1e-3
                rows = (0, h - 1) if one == "src" else (1, h - 1)  # the target's first row has no source
                if first <= u <= w - 1 and rows[0] <= v <= rows[1]:
                    expected = (u + dx + 0.5) * wide2 / w2 - 0.5, (v + dy + 0.5) * high2 / h2 - 0.5
                    assert found[y, x].tolist() == pytest.approx(expected, abs=0.05)


def test_the_warp_of_a_picture_to_itself_is_the_picture(pictures):
    said = matched(pictures / "0.png", pictures / "0.png", "--warp", "w.png")
    assert "w.png: " in said.splitlines()[-1]
    with Image.open("w.png") as page, Image.open(pictures / "0.png") as picture:
        assert page.size == (2 * 384 + 20, 2 * (18 + 2 + 256) + 8)
        warped = np.asarray(page.crop((0, 304, 384, 560)), float)[24:-24, 36:-36]
        own = np.asarray(picture.convert("RGB").resize((384, 256)), float)
    off = abs(warped - own[24:-24, 36:-36]).mean()
    moved = abs(warped - own[24:-24, 12:-60]).mean()  # one cell to the left
    assert off < moved / 3 and off < 12


# ------------------------------------------------------------------------------------------------------------
# Many pairs


PAIRS = "source,target,note\n0.png,1.png,x\n\n2.png, 0.png\n0.png,1.png,again\n1.png,2.png\n"


@pytest.fixture
def album(pictures, tmp_path) -> Path:
    """A folder with a list of three pairs, in a folder of its own beside the pictures."""
    folder = tmp_path / "album"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.png").symlink_to(pictures / f"{k}.png")
    (folder / "list.csv").write_text(PAIRS)
    return folder


def test_pairs_of_a_list_are_matched_as_alone_and_the_backbone_sees_a_picture_once(album, images_read):
    line = ["--pairs", album / "list.csv", "--no-dense", "--count", 6]
    said = matched(*line)
    assert sum(images_read) == 3 * 2 and said.splitlines()[-1] == "3 pairs in matches.jsonl"
    lines = [json.loads(text) for text in Path("matches.jsonl").read_text().splitlines()]
    names = [(record["source"], record["target"]) for record in lines]
    assert names == [("0.png", "1.png"), ("2.png", "0.png"), ("1.png", "2.png")]
    for (src, trg), record in zip(names, lines):
        matched(album / src, album / trg, "--no-dense", "--count", 6, "--json", "alone.json")
        alone = json.loads(Path("alone.json").read_text())
        assert record == alone | {"source": src, "target": trg} and len(record["matches"]) == 6
    assert not (album / "matches.jsonl").exists()


def test_few_pictures_are_held_at_a_time(album, images_read, monkeypatch):
    matched("--pairs", album / "list.csv", "--no-dense")
    whole = Path("matches.jsonl").read_bytes()
    images_read.clear()
    monkeypatch.setattr(support.match, "HELD", 2)
    matched("--pairs", album / "list.csv", "--no-dense", "--json", "two.jsonl")
    assert Path("two.jsonl").read_bytes() == whole and sum(images_read) > 3 * 2


def test_a_stopped_list_goes_on_behind_its_last_whole_line(album, images_read):
    line = ["--pairs", album / "list.csv", "--no-dense"]
    matched(*line)
    whole = Path("matches.jsonl").read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    for kept, cut in ((first + second[:70], 3), (first, 3), (whole[:-1], 0), (second[:1], 3), (b"", 3)):
        Path("matches.jsonl").write_bytes(kept)
        images_read.clear()
        said = matched(*line).splitlines()[-1]
        assert Path("matches.jsonl").read_bytes() == whole and sum(images_read) == cut * 2
        before = kept.count(b"settings")
        assert said == "3 pairs in matches.jsonl" + f", {before} of them before" * (before > 0)


def test_a_second_run_skips_finished_pairs_whose_pictures_are_gone(album):
    matched("--pairs", album / "list.csv", "--no-dense")
    whole = Path("matches.jsonl").read_bytes()
    (album / "2.png").unlink()
    matched("--pairs", album / "list.csv", "--no-dense")
    assert Path("matches.jsonl").read_bytes() == whole


def test_pictures_that_cannot_be_read_are_passed_over_and_named(album, pictures):
    bad = "".join(f"{pictures / name},1.png\n" for name in ("pixel.png", "corrupt.png"))
    (album / "list.csv").write_text(f"0.png,gone.png\n{bad}1.png,2.png\n")
    done = match("--pairs", album / "list.csv", "--no-dense", *FROZEN)
    (line,) = done.err.splitlines()
    assert done.code == 0 and line.startswith("3 pairs passed over: ")
    assert all(f"{name}" in line for name in (album / "gone.png", "pixel.png", "corrupt.png"))
    (record,) = map(json.loads, Path("matches.jsonl").read_text().splitlines())
    assert (record["source"], record["target"]) == ("1.png", "2.png")
    assert done.out.splitlines()[-1] == "1 pairs in matches.jsonl"


@pytest.mark.parametrize("what", ["settings", "another file", "the list", "a line", "bytes"])
def test_a_file_of_other_settings_or_of_something_else_is_left_as_it_is(album, pictures, what):
    place, more = Path("matches.jsonl"), ["--no-dense"]
    if what == "settings":
        matched("--pairs", album / "list.csv", *more)
        more += ["--count", 5]
    elif what == "another file":
        place = Path("notes.json")
        matched(pictures / "0.png", pictures / "1.png", *more, "--json", place)
    elif what == "the list":
        place = album / "list.csv"
    else:
        place.write_bytes(b"my notes\n" if what == "a line" else b"\xff\xfe\x00")
    before = place.read_bytes()
    done = match("--pairs", album / "list.csv", *more, "--json", place, *FROZEN)
    (line,) = done.err.splitlines()
    assert done.code == 1 and str(place) in line and place.read_bytes() == before


def test_read_pairs_reads_two_columns_under_a_header_or_none():
    for text in ("source,target\na.png,b.png\nc.png,d.png\n", "a.png , b.png,1,2\n\nc.png,d.png",
                 '\ufeffsource,target,class\n"a.png",b.png,dog\nc.png,d.png\n'):
        Path("list.csv").write_text(text, encoding="utf-8")
        assert read_pairs("list.csv") == [("a.png", "b.png"), ("c.png", "d.png")]


@pytest.mark.parametrize("text, words", [("a.png,b.png\na.png\n", "list.csv: 'a.png' is not source,target"),
                                         ("a.png,\n", "list.csv: 'a.png,' is not source,target"),
                                         ("source,target\n", "list.csv: no pairs in it"),
                                         ("", "list.csv: no pairs in it"),
                                         (None, "cannot read --pairs list.csv: ")])  # fmt: skip
def test_a_list_that_is_no_list_of_pairs_is_refused(text, words):
    if text is not None:
        Path("list.csv").write_text(text)
    done = match("--pairs", "list.csv", *FROZEN)
    (line,) = done.err.splitlines()
    assert done.code == 1 and words in line and not Path("matches.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------
# Bad input


BAD = [
    ("0.png gone.png", "no such image: "),
    ("0.png corrupt.png", "cannot read image "),
    ("0.png list.csv", "cannot read image "),
    ("0.png .", "cannot read image "),
    ("pixel.png 1.png", "pixel.png of 1x1 px: at least 16 px a side"),
    ("0.png huge.png", "huge.png: Image size (400000000 pixels)"),
    ("0.png", "two pictures, SOURCE and TARGET, or --pairs FILE alone; 1 given: "),
    ("0.png 1.png 2.png", "3 given: "),
    ("0.png --pairs list.csv", "or --pairs FILE alone; 1 given: "),
    ("--count 3", "none given"),
    ("0.png 1.png --points 400,52", "--points 400,52: outside the source image of 150x100 px"),
    ("0.png 1.png --points 40,52 5,-9", "--points 5,-9: outside the source image of 150x100 px"),
    ("0.png 1.png --points nan,5", "--points nan,5: outside the source image"),
    ("0.png 1.png --points 40;52", "--points 40;52: neither x,y nor a file"),
    ("0.png 1.png --points 40,52 40;52", "--points '40;52': write a point as x,y"),
    ("0.png 1.png --points empty.txt", "empty.txt: no points in it"),
    ("0.png 1.png --points gone.txt", "gone.txt: neither x,y nor a file that can be read"),
    ("0.png white.png", "white.png is of one colour"),
    ("0.png 1.png --points list.csv", "list.csv 'source,target': write a point as x,y"),
    ("0.png 1.png --saliency high.png high.png", "high.png of 90x120 px does not fit image"),
    ("0.png 1.png --saliency gone.png top.png", "no such image: "),
    ("0.png 0.png --saliency dot.png left.png", "dot.png"),  # too small for any cell
    ("0.png 1.png --out gone/m.png", "--out gone/m.png: must be a file, in an existing folder"),
    ("0.png 1.png --out m.txt", "--out m.txt: must be a file, in an existing folder, that ends in "),
    ("0.png 1.png --out .", "--out .: must be a file, in an existing folder"),
    ("0.png 1.png --warp gone/m.png", "--warp gone/m.png: must be a file, in an existing folder"),
    ("0.png 1.png --warp w.csv", "--warp w.csv: must be a file, in an existing folder, that ends in "),
    ("0.png 1.png --json gone/m.csv", "--json gone/m.csv: must be a file, in an existing folder"),
    ("0.png 1.png --json m.png", "--json m.png: must be a file, in an existing folder, that ends in "),
    ("0.png 1.png --threshold 2", "--threshold 2: a confidence from 0 to 1"),
    ("0.png 1.png --threshold nan", "--threshold nan: a confidence from 0 to 1"),
    ("0.png 1.png --count 0", "--count 0: at least 1"),
    ("0.png 1.png --count -3", "--count -3: at least 1"),
    ("0.png 1.png --size 60", "--size 60: not a multiple of the backbone's patch of 8 px"),
    ("0.png 1.png --size 0", "--size 0: "),
    ("--pairs list.csv --points 3,4", "--points is of two pictures, not of --pairs"),
    ("--pairs list.csv --out m.png", "--out is of two pictures, not of --pairs"),
    ("--pairs list.csv --saliency left.png top.png", "--saliency is of two pictures, not of --pairs"),
    ("0.png 1.png --checkpoint gone.pt", "no such checkpoint: gone.pt"),
    ("0.png 1.png --backbone vgg", "unknown backbone 'vgg'"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_matching_refuses_in_one_line_and_writes_nothing(pictures, tmp_path, line, words):
    files = {path.name for path in pictures.iterdir()}
    given = [pictures / word if word in files else word for word in line.split()]
    done = match(*(FROZEN if "--checkpoint" not in given else ()), *given)  # the last of two counts
    (text,) = done.err.splitlines()
    assert done.code == 1 and text.startswith("error: ") and words in text
    assert not any(tmp_path.iterdir()) and {path.name for path in pictures.iterdir()} == files


def test_a_refusal_is_one_line_in_the_shell_too(trained, pictures, tmp_path):
    done = run(pictures / "0.png", pictures / "1.png", "--checkpoint", trained / "last.pt", "--points",
               "118.5,160", "--out", tmp_path / "m.png", "--device", "cpu")  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and not any(tmp_path.iterdir())
    assert line == "error: --points 118.5,160: outside the source image of 150x100 px"


@pytest.mark.parametrize("dense", ["--dense", "--no-dense"])
def test_a_checkpoint_without_a_pixel_stage_is_named(trained, pictures, dense):
    place = trained / "two" / "last.pt"
    done = match(pictures / "0.png", pictures / "1.png", dense, "--checkpoint", place, "--device", "cpu")
    (line,) = done.err.splitlines()
    assert done.code == 1 and str(place) in line and "stage" in line


@pytest.mark.parametrize("option", ["--out", "--warp"])
def test_what_is_written_never_takes_the_place_of_a_picture(pictures, option):
    for name in ("0.png", "1.png"):
        Path(name).write_bytes((pictures / name).read_bytes())
    done = match(option, "./1.png", "0.png", "1.png", *FROZEN)
    (line,) = done.err.splitlines()
    assert done.code == 1 and option in line
    assert Path("1.png").read_bytes() == (pictures / "1.png").read_bytes()


def test_a_picture_is_written_whole_or_not_at_all(pictures, monkeypatch, tmp_path):
    def full(*names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("m.png").write_text("from before")
    monkeypatch.setattr(os, "replace", full)
    done = match(pictures / "0.png", pictures / "1.png", *FROZEN, "--out", "m.png")
    words = "No space left on device; what was finished before is kept"
    assert done.err == f"error: cannot write m.png: {words}\n" and done.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]
    assert Path("m.png").read_text() == "from before"


# ------------------------------------------------------------------------------------------------------------
# Pictures of all kinds


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "bmp", "webp"])
def test_pictures_of_every_ending_are_written(pictures, ending):
    matched(pictures / "0.png", pictures / "1.png", "--out", f"m.{ending}", "--no-dense")
    with Image.open(f"m.{ending}") as page:
        assert page.format == {"jpg": "JPEG"}.get(ending, ending.upper())


def same_matches(first: tuple, second: tuple) -> bool:
    """Whether two pairs of pictures match alike, to the last digit."""
    found = []
    for pair in (first, second):
        match(*pair, "--no-dense", "--json", "m.json", *FROZEN)
        found.append(json.loads(Path("m.json").read_text()) | {"source": 0, "target": 0})
        Path("m.json").unlink()
    return found[0] == found[1]


def test_of_an_animated_picture_the_first_frame_is_matched_with_a_line_about_it(pictures):
    frames = [Image.open(pictures / f"{k}.png").convert("L").resize((150, 100)) for k in (0, 2)]
    frames[0].save("film.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save("still.png")
    done = match("film.webp", pictures / "1.png", *FROZEN)
    (line,) = done.err.splitlines()
    assert done.code == 0 and line == "film.webp: animated, its first frame is matched"
    assert same_matches(("film.webp", pictures / "1.png"), ("still.png", pictures / "1.png"))


def test_transparent_and_turned_pictures_are_matched_as_they_are_seen(pictures):
    clear = Image.open(pictures / "0.png").convert("RGBA")
    alpha = Image.new("L", clear.size, 255)
    alpha.paste(0, (0, 0, 60, 100)), alpha.paste(128, (60, 0, 90, 100))
    clear.putalpha(alpha)
    clear.save("clear.png")
    seen = np.asarray(clear, float)
    share = seen[..., 3:] / 255
    flat = (seen[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8)
    Image.fromarray(flat).save("flat.png")
    assert abs(np.asarray(open_image("clear.png"), float) - flat).max() <= 1
    open_image("clear.png").save("flat.png")  # which rounds in its own way
    assert same_matches(("clear.png", pictures / "1.png"), ("flat.png", pictures / "1.png"))
    assert not same_matches(("clear.png", pictures / "1.png"), (pictures / "0.png", pictures / "1.png"))
    lying, tag = Image.open(pictures / "0.png").convert("RGB"), Image.Exif()
    tag[0x0112] = 6  # the camera was turned: shown turned by 90 degrees clockwise
    lying.save("lying.png", exif=tag)
    lying.rotate(-90, expand=True).save("upright.png")
    assert same_matches(("lying.png", pictures / "1.png"), ("upright.png", pictures / "1.png"))
