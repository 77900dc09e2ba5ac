"""The tree that label.py writes, judged by a reader of its own: the layout that CATs' and DHPF's loaders read."""

import builtins
import errno
import glob
import io
import json
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shapes import draw_shape
from test_train import ROOT, SMALL

FLAGS = "--dataset folder --keep 0.8 --fewest 1 --loops 6 --pairs 2 --val 0.2 --batch 4 --device cpu --size 64".split()
CLASSES = {"n0-1": "fish", "n0:1": "truck", "a [b]*?": "dog", "plain": "teapot"}  # two of them sanitise to one name
FILES = ["x-1.png", "x:1.jpg", "{}_7.png", "odd name.png", "2_5.png", "5.png", "y[1]*?.jpeg", "z.PNG"]
SIZES = [(90, 60), (60, 90), (96, 96), (64, 50)]
LOADERS_LIMIT = 40  # points a pair, of CATs
IMAGE_KEYS = ("imname", "imsize", "bndbox", "kps")
TENSORS = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")


# ----------------------------------------------------------------------------------------------------------------------
# The reader: what the loaders make of a split


def read_tree(root: Path, split: str, side: int = 256) -> list[dict]:
    """Every pair of a split as the loaders read it: class ids, image files, padded points, a random crop of each image."""
    rng, pairs = random.Random(0), []
    classes = sorted(os.listdir(root / "JPEGImages"))
    lines = (root / "Layout" / "large" / f"{split}.txt").read_bytes().decode().split("\n")
    for line in lines[:-1]:
        _, src, rest = line.split("-")[:3]
        trg, category = rest.split(":")[:2]
        record = json.loads(Path(glob.glob(f"{root}/PairAnnotation/{split}/{line}.json")[0]).read_text())
        pair = {"line": line, "record": record, "category": category, "class": classes.index(record["category"])}
        pair["tensors"] = np.array([record[key] for key in TENSORS])
        for end, ident in (("src", src), ("trg", trg)):
            path = root / "JPEGImages" / classes[pair["class"]] / f"{category}_{ident}.JPEG"
            with Image.open(path) as image:
                image.load()
                width, height = image.size
            kps = np.array(record[f"{end}_kps"], float).T  # (2, N)
            x0, y0, x1, y1 = record[f"{end}_bndbox"]
            left, top = rng.randrange(0, x0 + 1), rng.randrange(0, y0 + 1)  # anything but whole numbers is an error
            right, bottom = rng.randrange(x1, width + 1), rng.randrange(y1, height + 1)
            scale = [[side / (right - left)], [side / (bottom - top)]]
            pair[end] = {"path": path, "ident": ident, "size": (width, height), "kps": kps.T}
            pair[end]["padded"] = np.pad(kps, ((0, 0), (0, LOADERS_LIMIT - kps.shape[1])), constant_values=-1)
            pair[end]["cropped"] = (kps - [[left], [top]]) * scale
        pairs.append(pair)
    return pairs


def check_tree(out: Path, most: int = 32) -> dict:
    """Assert every rule of the layout; returns counts, and for every image that is used how many pairs use it."""
    root, used, seen, numbers = out / "SC-ImageNet", {"trn": {}, "val": {}}, set(), []
    assert (out / "SC-IMAGENET").samefile(root)
    for folder, names in ((".", "JPEGImages Layout PairAnnotation"), ("Layout", "large"), ("PairAnnotation", "trn val"),
                          ("Layout/large", "trn.txt val.txt")):  # fmt: skip
        assert sorted(os.listdir(root / folder)) == names.split()
    counts: dict = {"points": 0, "used": used}
    for split in ("trn", "val"):
        raw = (root / "Layout" / "large" / f"{split}.txt").read_bytes().decode("ascii")
        assert "\r" not in raw and "\n\n" not in raw and not raw.startswith("\n")
        assert raw.endswith("\n") or not raw
        pairs = read_tree(root, split)
        assert sorted(os.listdir(root / "PairAnnotation" / split)) == sorted(f"{line}.json" for line in raw.split())
        assert [pair["line"] for pair in pairs] == raw.split("\n")[:-1]
        for pair in pairs:
            record, category, ends = pair["record"], pair["category"], (pair["src"], pair["trg"])
            assert record["category"] == category and record["filename"] == pair["line"]
            number = pair["line"].split("-")[0]
            assert re.fullmatch(r"\d{6}", number) and record["pair_id"] == int(number)
            idents = tuple(end["ident"] for end in ends)
            assert pair["line"] == f"{number}-{idents[0]}-{idents[1]}:{category}"
            assert not any(set(name) & set("-:[]*?/ ") for name in (category, *idents))
            assert idents[0] != idents[1]
            assert (key := (category, frozenset(idents))) not in seen
            assert all(type(record[name]) is int and record[name] == 0 for name in TENSORS)
            count = len(record["src_kps"])
            assert 1 <= count <= min(most, LOADERS_LIMIT) and len(record["trg_kps"]) == count
            for name, end in (("src", pair["src"]), ("trg", pair["trg"])):
                imname, imsize, box, kps = (record[f"{name}_{key}"] for key in IMAGE_KEYS)
                width, height = end["size"]
                assert imname == end["path"].name and imsize == [width, height, 3]
                assert [type(v) for v in box] == [int] * 4
                assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
                assert all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in kps)
                assert len({tuple(point) for point in record["src_kps"]}) == count
                assert 0 <= end["cropped"].min() and end["cropped"].max() <= 256
                assert (end["padded"][:, count:] == -1).all() and end["padded"].shape == (2, LOADERS_LIMIT)
                used[split][end["path"]] = used[split].get(end["path"], 0) + 1
            seen.add(key)
            numbers.append(number)
            counts["points"] += count
        counts[split] = len(pairs)
    assert len(set(numbers)) == len(numbers)
    assert not used["trn"].keys() & used["val"].keys()
    folders = list((root / "JPEGImages").iterdir())
    assert all(folder.is_dir() and any(folder.iterdir()) for folder in folders)
    assert {path for folder in folders for path in folder.iterdir()} == used["trn"].keys() | used["val"].keys()
    return counts


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Contents of every file and target of every link below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def run(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """A command line of the project; one thread, so that torchrun's processes compute what a single one does."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def label_here(monkeypatch):
    """label.py as a command within this process; what it ends with (None, or a line for stderr and exit code 1)."""

    def call(*arguments: object) -> str | int | None:
        monkeypatch.setattr(sys, "argv", ["label.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "label.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return None

    return call


class Made:
    """Pictures on disk and the two label sets made of them."""

    def __init__(self, base: Path) -> None:
        self.base, self.last = base, base / "checkpoint" / "last.pt"
        self.root, self.maps, self.damaged = base / "images", base / "maps", base / "damaged"
        for folder, category in CLASSES.items():
            (self.root / folder).mkdir(parents=True)
            (self.maps / folder).mkdir(parents=True)
            for k, name in enumerate(FILES):
                record, path = draw_shape(category, k, 96), self.root / folder / name.format(folder)
                record["image"].resize(SIZES[k % 4]).save(path)
                record["mask"].resize(SIZES[k % 4]).save(self.maps / folder / f"{path.stem}_sal.png")
        shutil.copytree(self.root, self.damaged)
        (self.damaged / "two").mkdir()
        for k in range(2):
            shutil.copy(self.root / "plain" / "5.png", self.damaged / "two" / f"{k}.png")
        for folder, name in (("plain", "5.png"), ("n0-1", "x-1.png")):
            content = (self.damaged / folder / name).read_bytes()
            (self.damaged / folder / name).write_bytes(content[: len(content) // 2 if folder == "plain" else 0])
        self.before = {folder: snapshot(folder) for folder in (self.root, self.damaged, self.maps)}
        self.flags = [*FLAGS, "--checkpoint", self.last, "--root", self.root, "--saliency", self.maps]
        self.link, self.copy = base / "link", base / "copy"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    made = Made(tmp_path_factory.mktemp("label"))
    trained = run("train.py", *SMALL, "--steps", "2", "--out", made.last.parent)
    assert trained.returncode == 0, trained.stderr
    made.linked = run("label.py", *made.flags, "--out", made.link)
    made.copied = run("label.py", *FLAGS, "--checkpoint", made.last, "--root", made.damaged, "--images", "copy",
                      "--points", "3", "--keep", "1", "--out", made.copy)  # fmt: skip
    for result in (made.linked, made.copied):
        assert result.returncode == 0, result.stderr
    return made


# ----------------------------------------------------------------------------------------------------------------------
# The tree


def test_the_tree_keeps_every_rule_of_the_layout_with_links_and_with_copies(made):
    linked, copied = check_tree(made.link), check_tree(made.copy, most=3)
    for counts in (linked, copied):
        assert counts["trn"] >= 8 and counts["val"] >= 2 and counts["points"] > counts["trn"] + counts["val"]
    for split in ("trn", "val"):
        one, two = (
            [(p["line"], p["class"]) for p in read_tree(made.link / n, split)] for n in ("SC-ImageNet", "SC-IMAGENET")
        )
        assert one == two
    assert sorted(os.listdir(made.link / "SC-ImageNet" / "JPEGImages")) == ["a_b_", "n0_1", "n0_1_2", "plain"]
    boxes = [p["record"]["src_bndbox"] for p in read_tree(made.link / "SC-ImageNet", "trn")]
    assert any(box[0] > 0 or box[1] > 0 for box in boxes)  # the maps were looked at


@pytest.mark.parametrize("damage", [
    lambda root, line, file: (root / "Layout/large/trn.txt").write_text("".join(line)[:-1]),
    lambda root, line, file: (root / "Layout/large/trn.txt").write_bytes("".join(line).replace("\n", "\r\n").encode()),
    lambda root, line, file: (root / "Layout/large/val.txt").unlink(),
    lambda root, line, file: (root / "Layout/large/val.txt").write_text("".join(line)),
    lambda root, line, file: (root / "JPEGImages/Thumbs.db").touch(),
    lambda root, line, file: (root / "JPEGImages/plain/plain_more.JPEG").touch(),
    lambda root, line, file: (root / "PairAnnotation/val" / file.name).write_bytes(file.read_bytes()),
    lambda root, line, file: (root.parent / "SC-IMAGENET").unlink(),
    *(
        lambda root, line, file, key=key, new=new: file.write_text(json.dumps((r := json.loads(file.read_text()))
                                                                              | {key: new(r[key])}))
        for key, new in [
            ("src_bndbox", lambda box: [float(v) for v in box]), ("trg_bndbox", lambda box: [*box[:2], 97, box[3]]),
            ("src_bndbox", lambda box: [False, *box[1:]]), ("src_kps", lambda kps: []), ("trg_kps", lambda kps: kps[1:]),
            ("trg_kps", lambda kps: [[-1, 5], *kps[1:]]), ("category", lambda name: "n0_1_2"),
            ("trg_imsize", lambda size: [size[1] + 1, size[0], 3]), ("truncation", lambda code: None),
        ]
    ),
])  # fmt: skip
def test_the_reader_notices_damage(made, tmp_path, damage):
    shutil.copytree(made.link, tmp_path / "out", symlinks=True)
    root = tmp_path / "out" / "SC-ImageNet"
    check_tree(root.parent)
    lines = (root / "Layout" / "large" / "trn.txt").read_text().splitlines(keepends=True)
    damage(root, lines, root / "PairAnnotation" / "trn" / f"{lines[0].strip()}.json")
    with pytest.raises((AssertionError, ValueError, TypeError, FileNotFoundError)):
        check_tree(root.parent)


@pytest.mark.parametrize("kind", ["link", "copy"])
def test_images_are_linked_or_copied_unchanged_and_names_lead_back_to_the_originals(made, kind):
    out, root = getattr(made, kind), made.root if kind == "link" else made.damaged
    for folder, content in made.before.items():
        assert snapshot(folder) == content
    names = json.loads((out / "names.json").read_text())
    files = sorted((out / "SC-ImageNet" / "JPEGImages").rglob("*.JPEG"))
    origins = {path: Path(names.get(f"{path.parent.name}/{path.name}") or names[path.name]) for path in files}
    assert len(names) == len(files) == len(set(origins.values()))
    for path, origin in origins.items():
        assert root in origin.parents and path.is_symlink() == (kind == "link")
        assert path.read_bytes() == origin.read_bytes()
        with Image.open(path) as one, Image.open(origin) as two:
            assert np.array_equal(one.convert("RGB"), two.convert("RGB"))
        if kind == "link":
            assert path.resolve() == origin.resolve()
    categories = {path.parent.name: origin.parent.name for path, origin in origins.items()}
    assert sorted(categories.values()) == sorted(CLASSES)


@pytest.mark.parametrize("kind", ["link", "copy"])
def test_the_summary_counts_what_the_reader_counts(made, kind):
    out = getattr(made, kind)
    counts, summary = check_tree(out), json.loads((out / "summary.json").read_text())
    used = counts["used"]["trn"] | counts["used"]["val"]
    assert summary["pairs"]["trn"] == counts["trn"] and summary["pairs"]["val"] == counts["val"]
    assert summary["points"] == counts["points"] and summary["images"]["used"] == len(used)
    plain = {"n0-1": "n0_1", "n0:1": "n0_1_2", "a [b]*?": "a_b_", "plain": "plain"}
    for name, row in ((name, summary["classes"][name]) for name in CLASSES):
        assert row["used"] == sum(path.parent.name == plain[name] for path in used)
        for split in ("trn", "val"):
            lines = (out / "SC-ImageNet" / "Layout" / "large" / f"{split}.txt").read_text().split()
            assert row[f"pairs_{split}"] == sum(line.endswith(f":{plain[name]}") for line in lines)
        assert row["used"] <= row["kept"] and 0 < row["pairs_trn"] + row["pairs_val"] <= 2 * row["kept"]
        assert row["kept"] == int((0.8 if kind == "link" else 1) * row["measured"])


def test_damaged_and_empty_images_are_left_out_and_counted_and_a_class_of_two_is_named(made):
    summary = json.loads((made.copy / "summary.json").read_text())
    origins = set(json.loads((made.copy / "names.json").read_text()).values())
    bad = {str(made.damaged / "plain" / "5.png"), str(made.damaged / "n0-1" / "x-1.png")}
    assert summary["images"]["measured"] == len(CLASSES) * len(FILES) - 2
    assert not origins & bad and not any("/two/" in path for path in origins)
    assert re.search(r"class two: 2 usable images", made.copied.stdout + made.copied.stderr)
    assert not list((made.copy / "SC-ImageNet" / "JPEGImages").glob("two*"))
    assert any(str(made.damaged / "plain" / "5.png") in line for line in summary["unreadable"])
    assert summary["images"]["unreadable"] == 2  # the empty one too


# ----------------------------------------------------------------------------------------------------------------------
# Runs that stop and go on, runs of two processes


def tree(out: Path) -> dict[str, bytes | str]:
    return {name: content for name, content in snapshot(out).items() if not name.startswith("work/")}


def assert_same_labels(out: Path, made: Made) -> None:
    """The same tree and names.json; summary.json but for its --out."""
    one, two = tree(out), tree(made.link)
    assert one.keys() == two.keys()
    a, b = (json.loads(files.pop("summary.json")) for files in (one, two))
    assert [name for name in one if one[name] != two[name]] == []
    assert a | {"config": None} == b | {"config": None} and a["config"] | {"out": ""} == b["config"] | {"out": ""}


def test_lost_shards_are_made_anew_and_the_tree_is_the_same(made, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made.link, out, symlinks=True)
    loops, pairs = (sorted((out / "work" / name).glob("0*.json")) for name in ("loops", "pairs"))
    assert len(loops) >= 4 and len(pairs) >= 4
    for path in (loops[1], loops[3], pairs[0], pairs[-1]):
        path.unlink()
    (loops[1].parent / f"{loops[1].name}.4711.tmp").write_text('{"errors": {"0"')
    for path in (out / "SC-ImageNet", out / "names.json", out / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "SC-ImageNet.tmp" / "JPEGImages" / "left").mkdir(parents=True)  # of a merge that was killed
    result = run("label.py", *made.flags, "--out", out)
    assert result.returncode == 0, result.stderr
    check_tree(out)
    assert_same_labels(out, made)


def test_killed_after_the_first_shard_and_resumed_equals_uninterrupted(made, tmp_path):
    command = [sys.executable, "label.py", *map(str, made.flags), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "out" / "work" / "loops" / "000000.json").exists():
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "summary.json").exists() and not (tmp_path / "out" / "SC-ImageNet").exists()
    result = run("label.py", *made.flags, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert_same_labels(tmp_path / "out", made)


def test_two_processes_write_the_tree_of_one(made, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    result = run("label.py", *made.flags, "--out", tmp_path / "out", launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert_same_labels(tmp_path / "out", made)


@pytest.mark.parametrize("left", ["SC-ImageNet.tmp", "SC-ImageNet.old"])
def test_what_a_killed_merge_left_beside_a_finished_tree_does_not_stop_the_next(made, tmp_path, label_here, left):
    """SC-ImageNet.old stays where a run was killed while it cleared the earlier tree away."""
    shutil.copytree(made.link, tmp_path / "out", symlinks=True)
    shutil.copytree(made.link / "SC-ImageNet", tmp_path / "out" / left, symlinks=True)
    assert label_here(*made.flags, "--out", tmp_path / "out") is None
    assert_same_labels(tmp_path / "out", made)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("after", [0, 5, 20])
def test_a_full_disk_leaves_an_earlier_tree_or_none_and_the_command_goes_on(made, tmp_path, label_here, monkeypatch,
                                                                             earlier, after):  # fmt: skip
    out, written, real = tmp_path / "out", [], io.open
    shutil.copytree(made.link, out, symlinks=True)
    if not earlier:
        for path in (out / "SC-ImageNet", out / "names.json", out / "summary.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (out / "SC-IMAGENET").unlink()
    before = tree(out)

    def full(file, mode="r", *rest, **options):
        if "r" not in mode and "SC-ImageNet" in str(file):
            written.append(file)
            if len(written) > after:
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(io, "open", full)
        patched.setattr(builtins, "open", full)
        complaint = label_here(*made.flags, "--out", out)
    assert str(complaint).startswith("error: ") and "No space left on device" in complaint and "\n" not in complaint
    assert tree(out) == before and not (out / "SC-ImageNet.tmp").exists()
    assert label_here(*made.flags, "--out", out) is None
    assert_same_labels(out, made)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_the_command_ends_with_code_1_and_a_single_line_on_stderr(made, tmp_path):
    result = run("label.py", *made.flags, "--checkpoint", tmp_path / "absent.pt", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr == f"error: no such checkpoint: {tmp_path / 'absent.pt'}\n"


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint", "{dir}/file"], "{dir}/file"),
    (["--drop-classes", "{dir}/file"], "'unicorn'"),
    (["--keep-classes", "{dir}/absent"], "{dir}/absent"),
    (["--root", "{dir}"], "--root {dir}"),
    (["--saliency", "{dir}/absent"], "--saliency {dir}/absent"),
    (["--out", "{dir}/file"], "{dir}/file"),
    (["--keep", "0.5"], "0.5"),
    (["--keep", "0.01", "--out", "{dir}/new"], "--keep 0.01"),
    (["--size", "60"], "--size 60"),
    (["--points", "41", "--out", "{dir}/new"], "--points 41"),
    (["--fewest", "0", "--out", "{dir}/new"], "--fewest 0"),
    (["--images", "move"], "--images move"),
    (["--keep-by", "luck", "--out", "{dir}/new"], "--keep-by luck"),
])  # fmt: skip
def test_refused_in_one_line_that_names_the_file_or_the_value(made, tmp_path, label_here, capfd, flags, words):
    (tmp_path / "file").write_text("plain\nunicorn\n")
    before = tree(made.link)
    end = label_here(*made.flags, "--out", made.link, *(flag.format(dir=tmp_path) for flag in flags))
    printed = capfd.readouterr().err
    if end == 2:  # argparse says it itself, below its usage
        end = printed.strip().splitlines()[-1].partition(" ")[2]
    else:
        assert printed == ""
    assert isinstance(end, str) and end.startswith("error: ") and "\n" not in end
    assert words.format(dir=tmp_path) in end
    assert tree(made.link) == before and not list(tmp_path.rglob("SC-I*"))
