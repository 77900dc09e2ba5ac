"""Matching two pictures of one's own: support/match.py through `python pixel_stage.py`."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support.match import main, parse_points
from support.shapes import Shapes
from train import load_cascade, parse_config, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--backbone random_vit8 --size 64 --batch 3 --candidates 6 --ffn-ratio 0.25 --val none --log-every 1"
         " --device cpu --steps 1").split()


def run(*arguments: object) -> subprocess.CompletedProcess:
    """`python pixel_stage.py`, from its folder."""
    command = [sys.executable, "pixel_stage.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a cascade after one step, last.pt, one without a pixel stage, and two pictures."""
    folder = tmp_path_factory.mktemp("trained")
    train(*parse_config([*SMALL, "--out", str(folder)]))
    train(*parse_config([*SMALL, "--stages", "2", "--out", str(folder / "two")]))
    images = Shapes("test")
    for k in range(2):
        images.load(k)[0].resize((150 - 30 * k, 100)).save(folder / f"{k}.png")
    Image.new("L", (90, 120), 77).save(folder / "map.png")
    return folder


def test_two_pictures_of_ones_own_are_matched_and_drawn(trained):
    out = run(trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt", "--out",
              trained / "m.png", "--count", "5")
    assert out.returncode == 0, out.stderr
    assert f"5 matches drawn in {trained / 'm.png'}" in out.stdout
    with Image.open(trained / "m.png") as page:
        assert page.size == (round(150 * 2.56) + 4 + round(120 * 2.56), 256)


def test_given_points_are_transferred_in_pixels(trained):
    out = run(trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt", "--out",
              trained / "p.png", "--points", "40,52", "118.5,60")
    assert out.returncode == 0, out.stderr
    found = re.findall(r"^([\d.]+),([\d.]+) -> (-?[\d.]+),(-?[\d.]+)$", out.stdout, re.MULTILINE)
    assert [pair[:2] for pair in found] == [("40.0", "52.0"), ("118.5", "60.0")]
    assert all(0 <= float(x) < 120 and 0 <= float(y) < 100 for *_, x, y in found)


def test_the_door_of_pixel_stage_py_hands_in_the_cascade(trained, capsys):
    """The same in this process, with whatever loads the cascade."""
    seen = []

    def load(path, **options):
        seen.append((path, options["weights"]))
        return load_cascade(path, **options)

    line = [trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt", "--points", "40,52"]
    main([*map(str, line), "--out", str(trained / "q.png"), "--device", "cpu"], load)
    assert seen == [(str(trained / "last.pt"), None)]
    assert capsys.readouterr().out.startswith("40.0,52.0 -> ") and (trained / "q.png").exists()


@pytest.mark.parametrize("arguments, words", [
    (["0.png", "1.png", "--points", "400,52"], "--points 400,52: outside the source image of 150x100 px"),
    (["0.png", "1.png", "--points", "40;52"], "write a point as x,y"),
    (["0.png", "absent.png"], "no such image"),
    (["0.png", "last.pt"], "cannot read image"),
    (["0.png", "1.png", "--count", "0"], "--count 0: at least 1"),
    (["0.png", "1.png", "--count", "-3"], "--count -3: at least 1"),
    (["0.png", "1.png", "--points", "nan,5"], "--points nan,5: outside the source image"),
    (["0.png", "1.png", "--saliency", "map.png", "map.png"], "map.png of 90x120 px does not fit image"),
    (["0.png", "1.png", "--checkpoint", "two/last.pt"], "was trained without a pixel stage (--stages 2)"),
])  # fmt: skip
def test_matching_refuses_in_one_line(trained, arguments, words):
    arguments = [trained / a if a.endswith((".png", ".pt")) else a for a in arguments]
    out = run(arguments[0], "--checkpoint", trained / "last.pt", *arguments[1:], "--out", trained / "x.png")
    assert out.returncode == 1 and words in out.stderr and "Traceback" not in out.stderr
    assert len(out.stderr.splitlines()) == 1 and not (trained / "x.png").exists()


def test_a_picture_is_written_whole_or_not_at_all(trained, monkeypatch, tmp_path):
    def full(*names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "m.png").write_text("from before")
    line = [trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt", "--device", "cpu"]
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as error:
        main([*map(str, line), "--out", str(tmp_path / "m.png")], load_cascade)
    words = "No space left on device; what was finished before is kept"
    assert str(error.value) == f"error: cannot write {tmp_path / 'm.png'}: {words}"
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]
    assert (tmp_path / "m.png").read_text() == "from before"


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "bmp", "webp"])
def test_pictures_of_every_ending_are_written(trained, tmp_path, ending):
    line = [trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt", "--device", "cpu"]
    main([*map(str, line), "--out", str(tmp_path / f"m.{ending}")], load_cascade)
    with Image.open(tmp_path / f"m.{ending}") as page:
        assert page.format == {"jpg": "JPEG"}.get(ending, ending.upper())


def test_parse_points_reads_x_then_y():
    assert parse_points(["40,52.5", "-0.5,0"], (60, 80)).tolist() == [[40.0, 52.5], [-0.5, 0.0]]


@pytest.mark.parametrize("text", ["40", "40,50,60", "x,5", "59.6,5", "5,39.6", "-0.6,5", "nan,5"])
def test_parse_points_names_a_point_that_is_malformed_or_outside(text):
    with pytest.raises(ValueError, match=text):
        parse_points(["1,1", text], (60, 40))
