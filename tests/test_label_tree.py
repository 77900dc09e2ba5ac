"""The tree that label.py writes, judged by a reader of its own: the layout of CATs' and DHPF's loaders."""

import errno
import glob
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train import ROOT, SMALL

from support import label_tree
from support.shapes import draw_shape

FLAGS = "--dataset folder --keep 0.8 --loops 6 --pairs 2 --batch 4 --size 64".split()
# The cascade here is untrained: hardly a loop closes, and cliques are small.
CONSTANTS = {"CAP = 0.1": "CAP = 9.0", "FEWEST = 8": "FEWEST = 1", "VAL = 0.05": "VAL = 0.5"}
# Two sanitise to the same name.
PLAIN = {"n0-1": "n0_1", "n0:1": "n0_1_2", "a [b]*?": "a_b_", "plain": "plain"}
FILES = "x-1.png,x:1.jpg,{}_7.png,odd name.png,2_5.png,5.png,5.jpg,y[1]*?.jpeg,Ü-.PNG".split(",")
SIZES = [(90, 60), (60, 90), (96, 96), (64, 50), (7, 40)]  # the last has more cells than pixels in a row
LIMIT = 40  # points a pair, of CATs
CODES = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")


def read_tree(root: Path, split: str) -> list[dict]:
    """The pairs of a split as the loaders read them: class, image files, padded points, random crops."""
    rng, pairs, classes = random.Random(0), [], sorted(os.listdir(root / "JPEGImages"))
    for line in (root / "Layout" / "large" / f"{split}.txt").read_bytes().decode().split("\n")[:-1]:
        _, src, rest = line.split("-")[:3]
        trg, category = rest.split(":")[:2]
        record = json.loads(Path(glob.glob(f"{root}/PairAnnotation/{split}/{line}.json")[0]).read_text())
        pair = {"line": line, "record": record, "category": category}
        pair["class"] = classes.index(record["category"])
        pair["codes"] = np.array([record[code] for code in CODES], np.int64)
        for end, ident in (("src", src), ("trg", trg)):
            path = root / "JPEGImages" / classes[pair["class"]] / f"{category}_{ident}.JPEG"
            with Image.open(path) as image:
                image.load()
            kps = np.array(record[f"{end}_kps"], float).T  # (2, N)
            x0, y0, x1, y1 = record[f"{end}_bndbox"]
            left, top = (rng.choice(range(v + 1)) for v in (x0, y0))  # whole numbers, or there is no range
            right, bottom = (rng.choice(range(v, side + 1)) for v, side in zip((x1, y1), image.size))
            scale = [[256 / (right - left)], [256 / (bottom - top)]]
            pair[end] = {"path": path, "ident": ident, "size": image.size}
            pair[end]["cropped"] = (kps - [[left], [top]]) * scale
            pair[end]["padded"] = np.pad(kps, ((0, 0), (0, LIMIT - kps.shape[1])), constant_values=-1)
        pairs.append(pair)
    return pairs


def check_tree(out: Path, most: int = 32) -> dict:
    """Assert every rule of the layout; returns the numbers of points and pairs and the images in use."""
    root, seen, numbers, images = out / "SC-ImageNet", set(), set(), {"trn": set(), "val": set()}
    counts: dict = {"points": 0}
    assert (out / "SC-IMAGENET").samefile(root)
    for folder, names in ((".", "JPEGImages Layout PairAnnotation made_by_label.txt"), ("Layout", "large"),
                          ("PairAnnotation", "trn val"), ("Layout/large", "trn.txt val.txt")):
        assert sorted(os.listdir(root / folder)) == names.split()
    for split, used in images.items():
        raw = (root / "Layout" / "large" / f"{split}.txt").read_bytes().decode("ascii")
        assert "\r" not in raw and "\n\n" not in raw and raw[:1] != "\n" and raw[-1:] in ("\n", "")
        there = sorted(os.listdir(root / "PairAnnotation" / split))
        assert there == sorted(f"{line}.json" for line in raw.split())
        for pair in (pairs := read_tree(root, split)):
            record, category, ends = pair["record"], pair["category"], (pair["src"], pair["trg"])
            number, one, two = pair["line"].split("-")[0], *(end["ident"] for end in ends)
            assert pair["line"] == record["filename"] == f"{number}-{one}-{two}:{category}"
            assert record["category"] == category and not set(category + one + two) & set("-:[]*?/\\")
            assert number not in numbers and record["pair_id"] == int(number)
            assert one != two and (category, frozenset((one, two))) not in seen
            assert all(type(record[code]) is int for code in CODES)
            count = len(record["src_kps"])
            assert 1 <= count <= min(most, LIMIT) and len(record["trg_kps"]) == count
            for name, end in zip(("src", "trg"), ends):
                box, (width, height) = record[f"{name}_bndbox"], end["size"]
                assert record[f"{name}_imname"] == end["path"].name
                assert record[f"{name}_imsize"] == [width, height, 3]
                assert [type(v) for v in box] == [int] * 4
                assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
                assert all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in record[f"{name}_kps"])
                assert end["cropped"].min() >= 0 and end["cropped"].max() <= 256
                assert end["padded"].shape == (2, LIMIT) and (end["padded"][:, count:] == -1).all()
                used.add(end["path"])
            seen.add((category, frozenset((one, two))))
            numbers.add(number)
            counts["points"] += count
        counts[split] = len(pairs)
    counts["used"] = images["trn"] | images["val"]
    assert len(counts["used"]) == len(images["trn"]) + len(images["val"])
    assert set((root / "JPEGImages").rglob("*")) == counts["used"] | {path.parent for path in counts["used"]}
    return counts


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Contents of every file and target of every link below a folder, but for the shards of the work."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
    paths = {name: path for name, path in paths.items() if not name.startswith("work/")}
    return {name: os.readlink(p) if p.is_symlink() else p.read_bytes() for name, p in paths.items()}


# As torchrun sets the threads: all runs compute the same bits.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def label_here(made, monkeypatch):
    """label.py as a command within this process; returns what it ends with: None, or its line for stderr."""

    def call(*arguments: object) -> str | int | None:
        monkeypatch.setattr(sys, "argv", ["label.py", *map(str, arguments)])
        try:
            return runpy.run_path(str(made.label), run_name="__main__") and None
        except SystemExit as end:
            return end.code

    return call


class Made:
    """Pictures on disk: as they should be with saliency maps, and damaged; the label sets made of both."""

    def __init__(self, base: Path) -> None:
        self.last, self.root, self.maps = base / "checkpoint" / "last.pt", base / "images", base / "maps"
        self.damaged, self.link, self.copy = base / "damaged", base / "link", base / "copy"
        self.label, source = base / "label.py", (ROOT / "label.py").read_text()
        for constant, value in CONSTANTS.items():
            assert source.count(f"\n{constant} ") == 1
            source = source.replace(f"\n{constant} ", f"\n{value} ")
        self.label.write_text(source)
        for folder, category in zip(PLAIN, ("fish", "truck", "dog", "teapot")):
            (self.root / folder).mkdir(parents=True)
            (self.maps / folder).mkdir(parents=True)
            for k, name in enumerate(FILES):
                record, path = draw_shape(category, k, 96), self.root / folder / name.format(folder)
                record["image"].resize(SIZES[k % 5]).save(path)
                record["mask"].resize(SIZES[k % 5]).save(self.maps / folder / f"{path.stem}_sal.png")
        shutil.copytree(self.root, self.damaged)
        shutil.copytree(self.root / "plain", self.damaged / "two", ignore=lambda _, names: sorted(names)[2:])
        self.cut, self.empty = self.damaged / "plain" / "5.png", self.damaged / "n0-1" / "x-1.png"
        self.cut.write_bytes(self.cut.read_bytes()[:900])
        self.empty.write_bytes(b"")
        self.before = {folder: snapshot(folder) for folder in (self.root, self.damaged, self.maps)}
        self.flags = [*FLAGS, "--checkpoint", self.last, "--root", self.root, "--saliency", self.maps]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    made = Made(tmp_path_factory.mktemp("label"))
    run("train.py", *SMALL, "--steps", "2", "--out", made.last.parent)
    run(made.label, *made.flags, "--out", made.link)
    flags = ["--checkpoint", made.last, "--root", made.damaged, "--images", "copy", "--points", "3"]
    made.copied = run(made.label, *FLAGS, *flags, "--keep", "1", "--out", made.copy)
    return made


def test_the_tree_keeps_every_rule_of_the_layout_with_links_and_with_copies(made):
    for counts in (check_tree(made.link), check_tree(made.copy, most=3)):
        assert counts["trn"] >= 5 and counts["val"] >= 1 and counts["points"] > counts["trn"] + counts["val"]
    one, two = (read_tree(made.link / name, "trn") for name in ("SC-ImageNet", "SC-IMAGENET"))
    assert [(p["line"], p["class"]) for p in one] == [(p["line"], p["class"]) for p in two]
    assert sorted(os.listdir(made.link / "SC-ImageNet" / "JPEGImages")) == sorted(PLAIN.values())
    trees = [read_tree(out / "SC-ImageNet", "trn") for out in (made.link, made.copy)]
    full = [[p["src"]["size"] == tuple(p["record"]["src_bndbox"][2:]) for p in pairs] for pairs in trees]
    assert not all(full[0]) and all(full[1])  # a box around the map's foreground, or the whole image


def change(key: str, new):
    """A change of one entry of the first pair's annotation."""

    def damage(_, file: Path, lines: str) -> None:
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {key: new(record[key])}))

    return damage


DAMAGE = {
    "no newline at the end": lambda root, file, lines: (root / "Layout/large/trn.txt").write_text(lines[:-1]),
    "CRLF": lambda root, file, lines: (root / "Layout/large/trn.txt").write_text(lines, newline="\r\n"),
    "blank line": lambda root, file, lines: (root / "Layout/large/trn.txt").write_text(lines + "\n"),
    "no val": lambda root, file, lines: (root / "Layout/large/val.txt").unlink(),
    "stray file shifts classes": lambda root, file, lines: (root / "JPEGImages/Thumbs.db").touch(),
    "unused image": lambda root, file, lines: (root / "JPEGImages/plain/plain_more.JPEG").touch(),
    "unlisted annotation": lambda root, file, _: (root / "PairAnnotation/val" / file.name).write_text("{}"),
    "one root name": lambda root, file, lines: (root.parent / "SC-IMAGENET").unlink(),
    "float box": change("src_bndbox", lambda box: [float(v) for v in box]),
    "bool box": change("src_bndbox", lambda box: [False, *box[1:]]),
    "box beyond the image": change("trg_bndbox", lambda box: [*box[:2], 97, box[3]]),
    "empty box": change("trg_bndbox", lambda box: [box[2], box[1], box[2], box[3]]),
    "41 points": change("src_kps", lambda kps: kps[:1] * 41),
    "no points": change("src_kps", lambda kps: []),
    "one point short": change("trg_kps", lambda kps: kps[1:]),
    "point outside": change("trg_kps", lambda kps: [[-1, 5], *kps[1:]]),
    "other category": change("category", lambda name: "plain" if name != "plain" else "n0_1"),
    "sides swapped": change("trg_imsize", lambda size: [size[1], size[0] + 1, 3]),
    "null code": change("truncation", lambda code: None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_reader_notices_damage(made, tmp_path, damage):
    shutil.copytree(made.link, tmp_path / "out", symlinks=True)
    root = tmp_path / "out" / "SC-ImageNet"
    lines = (root / "Layout" / "large" / "trn.txt").read_text()
    DAMAGE[damage](root, root / "PairAnnotation" / "trn" / f"{lines.splitlines()[0]}.json", lines)
    with pytest.raises((AssertionError, ValueError, TypeError, LookupError, FileNotFoundError)):
        check_tree(root.parent)


@pytest.mark.parametrize("kind", ["link", "copy"])
def test_images_are_linked_or_copied_unchanged_and_names_lead_back_to_the_originals(made, kind):
    out, root = getattr(made, kind), made.root if kind == "link" else made.damaged
    for folder, content in made.before.items():
        assert snapshot(folder) == content
    names = json.loads((out / "names.json").read_text())
    files = sorted((out / "SC-ImageNet" / "JPEGImages").rglob("*.JPEG"))
    for path in files:
        origin = Path(names.get(f"{path.parent.name}/{path.name}") or names[path.name])
        assert origin.is_relative_to(root) and PLAIN[origin.parent.name] == path.parent.name
        assert path.read_bytes() == origin.read_bytes() and path.is_symlink() == (kind == "link")
        assert kind == "copy" or path.resolve() == origin.resolve()
    assert len(names) == len(files) == len(set(names.values()))


@pytest.mark.parametrize("kind", ["link", "copy"])
def test_the_summary_counts_what_the_reader_counts(made, kind):
    out = getattr(made, kind)
    counts, summary = check_tree(out), json.loads((out / "summary.json").read_text())
    assert summary["pairs"] == {split: counts[split] for split in ("trn", "val")}
    assert summary["points"] == counts["points"]
    for name, category in PLAIN.items():
        row = summary["classes"][name]
        pairs = {split: read_tree(out / "SC-ImageNet", split) for split in ("trn", "val")}
        for split, some in pairs.items():
            assert row[split] == sum(p["category"] == category for p in some)
        assert row["kept"] == int((0.8 if kind == "link" else 1) * row["measured"])
        assert 2 <= sum(path.parent.name == category for path in counts["used"]) <= row["kept"]
        assert 0 < row["trn"] + row["val"] <= 2 * row["kept"]
    assert summary["images"]["used"] == len(counts["used"])


def test_a_damaged_image_and_a_class_of_two_are_named_and_left_out(made):
    summary, names = (json.loads((made.copy / f"{name}.json").read_text()) for name in ("summary", "names"))
    assert summary["images"]["measured"] == len(PLAIN) * len(FILES) - 2
    assert not {str(made.cut), str(made.empty)} & set(names.values())
    assert not any("/two/" in path for path in names.values()) and "class two: 2 " in made.copied.stdout
    small = "classes that keep fewer than three images give nothing, and --keep 1.0 keeps three of 3: two (2)"
    assert small in made.copied.stderr.splitlines()
    assert any(f"cannot read image {made.cut}" in text for text in summary["unreadable"])
    assert str(made.cut) in made.copied.stderr and str(made.empty) in made.copied.stderr


def test_the_summary_counts_the_damaged_image_and_the_empty_one(made):
    images = json.loads((made.copy / "summary.json").read_text())["images"]
    assert images["unreadable"] == 2 and images["seen"] == len(PLAIN) * len(FILES) + 2


def assert_same_labels(out: Path, made: Made) -> None:
    """The same tree and names.json, byte for byte; the same summary.json but for --out."""
    one, two = snapshot(out), snapshot(made.link)
    a, b = (json.loads(files.pop("summary.json")) for files in (one, two))
    assert one.keys() == two.keys() and [name for name in one if one[name] != two[name]] == []
    assert a.pop("config") | {"out": ""} == b.pop("config") | {"out": ""} and a == b


def test_lost_shards_are_made_anew_and_the_tree_is_the_same(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made.link / "work", out / "work")
    loops, pairs = (sorted((out / "work" / name).glob("0*.json")) for name in ("loops", "pairs"))
    for path in (loops[1], loops[3], pairs[0], pairs[-1]):
        path.unlink()
    (loops[1].parent / f"{loops[1].name}.4711.tmp").write_text('{"errors": {"0"')
    run(made.label, *made.flags, "--out", out)
    assert_same_labels(out, made)


def test_killed_after_the_first_shard_and_resumed_equals_uninterrupted(made, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(made.label), *map(str, made.flags), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=ONE_THREAD)
    while not (out / "work" / "loops" / "000000.json").exists():
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    assert process.wait() < 0 and not (out / "SC-ImageNet").exists()
    run(made.label, *made.flags, "--out", out)
    assert_same_labels(out, made)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_ends_with_its_code_and_keeps_its_work(made, tmp_path, label_here, number):
    """A terminal, or the manager of a job, sends it to the whole group of processes."""
    out = tmp_path / "out"
    command = [sys.executable, *map(str, (made.label, *made.flags, "--workers", 1, "--out", out))]
    process = subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    while not (out / "work" / "loops" / "000000.json").exists():
        assert process.poll() is None
        time.sleep(0.0005)
    os.killpg(process.pid, number)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (
        128 + number, "stopped; the same command goes on where it was\n")
    assert not (out / "names.json").exists() and not list((out / "work").rglob("*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in (out / "work" / "loops").iterdir()}
    assert label_here(*made.flags, "--out", out) is None
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert_same_labels(out, made)


def test_a_signal_while_the_tree_is_written_keeps_the_earlier_one(made, tmp_path, monkeypatch, label_here):
    shutil.copytree(made.link, tmp_path / "out", symlinks=True)
    before, real = snapshot(tmp_path / "out"), Path.rename

    def stop(path: Path, target: Path) -> None:
        real(path, target)
        if path.name == "SC-ImageNet":  # the earlier tree has just been put aside
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Path, "rename", stop)
    assert label_here(*made.flags, "--out", tmp_path / "out") == 143
    assert snapshot(tmp_path / "out") == before and not list(tmp_path.glob("out/SC-ImageNet.*"))


def test_two_processes_write_the_tree_of_one(made, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    run(*launcher, made.label, *made.flags, "--out", tmp_path / "out")
    assert_same_labels(tmp_path / "out", made)


@pytest.mark.parametrize("left", ["SC-ImageNet.tmp", "SC-ImageNet.old"])
def test_what_a_killed_merge_left_does_not_stop_the_next(made, tmp_path, label_here, left):
    """.old stays beside a finished tree where a run was killed while it cleared the earlier tree away."""
    shutil.copytree(made.link, tmp_path / "out", symlinks=True)
    shutil.copytree(made.link / "SC-ImageNet", tmp_path / "out" / left, symlinks=True)
    assert label_here(*made.flags, "--out", tmp_path / "out") is None
    assert_same_labels(tmp_path / "out", made)


PLACES = ["SC-ImageNet", "SC-ImageNet.tmp", "SC-ImageNet.4711.tmp", "SC-ImageNet.old", "SC-IMAGENET"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("place", PLACES)
def test_a_tree_that_label_did_not_make_is_left_alone(made, tmp_path, label_here, capfd, place, kind):
    """Such as the authors' own download: refused before the work starts."""
    theirs, place = tmp_path / "theirs", tmp_path / "out" / place
    (theirs / "PairAnnotation").mkdir(parents=True)
    (theirs / "PairAnnotation" / "1.json").write_text("{}")
    place.parent.mkdir()
    make = {"folder": lambda: theirs.rename(place), "file": lambda: place.write_text("an archive"),
            "link": lambda: place.symlink_to(theirs)}  # fmt: skip
    make[kind]()
    before = snapshot(tmp_path)
    end = label_here(*made.flags, "--out", place.parent)
    assert end == f"error: {place} was not made by this label.py; give another --out, or move it away"
    assert snapshot(tmp_path) == before and os.listdir(place.parent) == [place.name]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["names.json", "summary.json", "drawn/best.jpg"])
def test_files_of_others_in_out_are_left_alone(made, tmp_path, label_here, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    end = label_here(*made.flags, "--out", tmp_path, "--draw", "2")
    assert f"{tmp_path / name.split('/')[0]} was not made by this label.py" in end
    assert snapshot(tmp_path) == {name: b"mine"}


def test_an_empty_folder_is_taken_and_what_a_kill_leaves_of_a_tree_is_known(tmp_path, made, monkeypatch):
    (tmp_path / "SC-ImageNet").mkdir()
    assert label_tree.check_places(tmp_path) == []
    shutil.copytree(made.link / "SC-ImageNet", tmp_path / "SC-ImageNet.7.tmp", symlinks=True)
    real, left = shutil.rmtree, []

    def killed(path: Path, **options) -> None:
        real(path, **options)
        left.append(sorted(os.listdir(tmp_path / "SC-ImageNet.7.tmp")))
        if len(left) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        label_tree.remove_tree(tmp_path / "SC-ImageNet.7.tmp")
    assert left[-1] == ["made_by_label.txt"]
    assert label_tree.check_places(tmp_path) == [tmp_path / "SC-ImageNet.7.tmp"]


def test_pictures_are_made_later_into_the_same_out_and_whole(made, tmp_path, label_here, monkeypatch):
    """Pairs of dropped images are for pictures only; a full disk leaves no half of one."""
    out, real = tmp_path / "out", io.open
    shutil.copytree(made.link, out, symlinks=True)
    flags = [*made.flags, "--out", out, "--draw", "2"]
    assert not (out / "work" / "dropped").exists() and not (out / "drawn").exists()

    def full(file, mode="r", *rest, **options):
        if "r" not in mode and Path(file).name.startswith(("best", "errors")):
            real(file, mode, *rest, **options).write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr("io.open", full)
        patched.setattr("builtins.open", full)
        end = label_here(*flags)
    assert end.startswith(f"error: cannot write {out / 'drawn' / 'best.jpg'}: No space left on device")
    assert list((out / "drawn").iterdir()) == []
    assert label_here(*flags) is None
    assert {"best.jpg", "worst.jpg", "typical.jpg", "errors.png"} <= set(os.listdir(out / "drawn"))
    shutil.rmtree(out / "drawn")
    (out / "summary.json").write_text((made.link / "summary.json").read_text())
    assert_same_labels(out, made)


def test_three_kept_images_of_a_class_give_val_its_pairs(made, tmp_path, label_here, capfd):
    """No class is large enough to be split: the clique with the fewest pairs is val."""
    assert label_here(*made.flags, "--keep", "0.4", "--out", tmp_path / "out") is None
    assert "all pairs were trn: val has the" in capfd.readouterr().out
    counts = check_tree(tmp_path / "out")
    assert counts["trn"] > 0 and 1 <= counts["val"] <= 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pairs"] == {split: counts[split] for split in ("trn", "val")}
    assert sum(row["val"] > 0 for row in summary["classes"].values()) == 1


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("where", ["000001-", "000009-", "trn.txt", "names.json"])
def test_a_full_disk_keeps_an_earlier_tree_or_leaves_none(made, tmp_path, label_here, monkeypatch, where,
                                                          earlier):
    out, real = tmp_path / "out", io.open
    shutil.copytree(made.link / ("" if earlier else "work"), out / ("" if earlier else "work"), symlinks=True)
    before = snapshot(out)

    def full(file, mode="r", *rest, **options):
        if "r" not in mode and Path(file).is_relative_to(out) and Path(file).name.startswith(where):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr("io.open", full)
        patched.setattr("builtins.open", full)
        end = label_here(*made.flags, "--out", out)
    assert end.startswith("error: ") and "No space left on device" in end and "\n" not in end
    assert snapshot(out) == before and not list(out.glob("SC-ImageNet.*"))
    assert label_here(*made.flags, "--out", out) is None
    assert_same_labels(out, made)


def test_the_command_ends_with_code_1_and_a_single_line_on_stderr(made, tmp_path):
    result = run(made.label, *made.flags, "--checkpoint", tmp_path / "absent.pt", "--out", tmp_path, code=1)
    assert result.stderr == f"error: no such checkpoint: {tmp_path / 'absent.pt'}\n"


@pytest.mark.parametrize("flags, words", [
    ("--checkpoint DIR/file", "DIR/file"),
    ("--drop-classes DIR/file", "DIR/file: no class is named 'unicorn'"),
    ("--drop-classes DIR/absent", "DIR/absent: no such file"), ("--root DIR", "--root DIR"),
    ("--drop-classes DIR", "cannot read class names from DIR: "), ("--out DIR/file", "DIR/file"),
    ("--drop-classes DIR/binary", "cannot read class names from DIR/binary: "),
    ("--saliency DIR/absent", "--saliency DIR/absent"),
    ("--keep 0.5", "work/pairs was made with --keep 0.8, not --keep 0.5; give another --out, or delete"),
    ("--loops 12", "work/loops was made with --loops 6, not --loops 12; give"),
    ("--saliency none", "work/loops was made with --saliency maps, not --saliency none; give"),
    ("--drop-classes DIR/drop", "work/loops was made from other photographs: 9 gone (plain/"),
    ("--out DIR/new --keep 0.3", "--keep 0.3: trn and val each need three kept images of one class, and no"
     " class keeps more than 2; keep more, or give more images"),
    ("--out DIR/new --keep 0", "--keep 0.0: "), ("--out DIR/new --points 41", "--points 41"),
    ("--out DIR/new --batch 0", "--batch 0"), ("--out DIR/a[b]", "DIR/a[b]"),
])
def test_refused_in_one_line_that_names_the_file_or_the_value(made, tmp_path, label_here, capfd, flags,
                                                              words):
    (tmp_path / "file").write_text("plain\nunicorn\n")
    (tmp_path / "drop").write_text("plain\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    before = snapshot(made.link)
    end = label_here(*made.flags, "--out", made.link, *flags.replace("DIR", str(tmp_path)).split())
    assert end.startswith("error: ") and words.replace("DIR", str(tmp_path)) in end
    assert "\n" not in end and capfd.readouterr().err == ""
    assert snapshot(made.link) == before and not list(tmp_path.rglob("SC-I*"))


def test_an_unknown_choice_is_refused_with_those_there_are(made, label_here, capfd):
    assert label_here(*made.flags, "--images", "move") == 2
    error = capfd.readouterr().err
    assert "--images" in error and "'move'" in error and "'link', 'copy'" in error


def test_long_file_names_fit_into_pair_ids(made, tmp_path, label_here):
    shutil.copytree(made.root / "plain", tmp_path / "images" / "plain")
    for path in sorted((tmp_path / "images" / "plain").iterdir()):
        path.rename(path.with_name("long" * 30 + path.name))
    flags = ["--root", tmp_path / "images", "--saliency", "none", "--out", tmp_path]
    assert label_here(*made.flags, *flags) is None
    assert check_tree(tmp_path)["trn"] > 0
