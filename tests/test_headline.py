"""experiments/headline.py: what its rows hold, go on from and are scored by, and what is not made again."""

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune import Killed, checkpoint, files_in, interrupt, same_weights, shapes_labels, spair_shapes
from test_train import ROOT

import data
from evaluate import predict, score
from experiments import finetune, headline
from experiments.cache import Known
from experiments.cats import Cats, as_cats_reads
from experiments.finetune import FinetuneConfig, load_matcher
from experiments.headline import Remembered
from support import run
from support.benchmarks import label_pairs, pfwillow, spair_pairs
from support.shapes import shapes_pairs

ALPHAS = ("0.05", "0.1", "0.15")
TINY = dict(backbone="random_vit8", levels="0", size=64, batch=2, lr=1e-3, projection=16, heads=4)
TRAINED = ["labels", "a", "c", "b", "d"]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Two epochs of a step each with a small matcher, and all runs compute the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headline, "ALIKE", headline.ALIKE | TINY)
        patch.setattr(headline, "LABELS", headline.LABELS | dict(epoch_steps=1, pretrain_epochs=2))
        patch.setattr(headline, "KEYPOINTS", headline.KEYPOINTS | dict(epoch_steps=1, epochs=2))
        patch.setattr(headline, "SEMI", headline.SEMI | dict(lr=1e-3))
        yield
    torch.set_num_threads(threads)


def willow_shapes(root: Path) -> Path:
    """PF-WILLOW's form: a picture three times, wide and narrow, and ten points of it."""
    picture, rows, rng = shapes_pairs("val").load(0)[0], ["header"], np.random.default_rng(0)
    sides, points = [(120, 80), (80, 112), (128, 72)], rng.uniform(0.1, 0.9, (2, 10))
    (root / "car(G)").mkdir(parents=True)
    for k, side in enumerate(sides):
        picture.resize(side).save(root / f"car(G)/{k}.png")
    for pair in ((0, 1), (1, 2), (2, 0)):
        cells = [f"{v:.2f}" for k in pair for v in (points * np.array(sides[k])[:, None]).ravel()]
        rows.append(",".join([*(f"car(G)/{k}.png" for k in pair), *cells]))
    (root / "test_pairs.csv").write_text("\n".join(rows))
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> SimpleNamespace:
    """Eleven pairs to train on without a list to choose by, four and three to test on, two label sets."""
    root = tmp_path_factory.mktemp("places")
    (root / "half").mkdir()
    half = shapes_labels(root / "half")
    quarter = Path(shutil.copytree(half, root / "quarter", symlinks=True))
    layout = quarter / "SC-ImageNet/Layout/large/trn.txt"
    layout.write_text("\n".join(layout.read_text().split()[:3]))
    for labels, keep in ((half, 0.5), (quarter, 0.25)):
        (labels / "summary.json").write_text(json.dumps({"config": {"keep": keep, "pairs": 9}, "points": 5}))
    birds = spair_shapes(root / "birds", {"large/trn": [*range(0, 77, 7)], "large/test": [3, 12, 25, 60]})
    return SimpleNamespace(birds=birds, willow=willow_shapes(root / "willow"), half=half, quarter=quarter)


def command(places: SimpleNamespace, folder: Path, *more: object, seeds: tuple = (0,)) -> list[str]:
    flags = ["--keypoints", places.birds, "--csv", folder / "runs.csv", "--out", folder / "out"]
    return [*map(str, [*flags, "--device", "cpu", "--annotated", 4, "--seeds", *seeds, *more])]


def read(path: Path) -> dict[tuple, dict]:
    """The lines of the CSV by row, share, annotated pairs and seed."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {tuple(list(row.values())[:4]): row for row in rows}
    assert len(found) == len(rows) and None not in {key for row in rows for key in row}
    return found


@pytest.fixture(scope="module")
def made(places, tmp_path_factory) -> SimpleNamespace:
    """All kinds of runs that are trained, once."""
    folder, said = tmp_path_factory.mktemp("made"), io.StringIO()
    flags = command(places, folder, "--rows", *TRAINED, "--labels", places.half, "--willow", places.willow)
    with contextlib.redirect_stdout(said):
        headline.main(flags)
    return SimpleNamespace(folder=folder, csv=folder / "runs.csv", flags=flags, said=said.getvalue())


@pytest.fixture
def trained(monkeypatch) -> list[FinetuneConfig]:
    """The configurations of the runs that are trained, as they begin."""
    found, original = [], headline.finetune

    def train(cfg: FinetuneConfig, *arguments, **options) -> Cats:
        found.append(cfg)
        return original(cfg, *arguments, **options)

    monkeypatch.setattr(headline, "finetune", train)
    return found


# ------------------------------------------------------------------------------------------------------------
# The CSV


def test_a_row_is_a_run(made):
    columns = ["row", "share", "annotated", "seed", "step", "val"]
    columns += [f"{where} {reading} {alpha}"
                for where in ("test", "willow") for reading in ("cats", "kernel") for alpha in ALPHAS]
    assert made.csv.read_text().splitlines()[0].split(",") == [*columns, "seconds"]
    assert list(read(made.csv)) == [
        ("labels", "0.5", "0", "0"), ("a", "0", "4", "0"), ("c", "0.5", "4", "0"), ("b", "0", "4", "0"),
        ("d", "0.5", "4", "0"),
    ]  # fmt: skip


def scores_of(matcher: Cats, keypoints: data.KeypointSet, reading: str) -> list[str]:
    """PCK at .05, .10 and .15 as the CSV has it."""
    asked = as_cats_reads(keypoints, 64)
    found = score(predict(matcher, asked, [reading], quiet=True)[reading], asked, (0.05, 0.1, 0.15))
    return [f"{value:.2f}" for value in found["bbox"]["per_image"]]


def columns_of(row: dict, where: str, reading: str) -> list[str]:
    return [row[f"{where} {reading} {alpha}"] for alpha in ALPHAS]


def held_back(places: SimpleNamespace) -> data.KeypointSet:
    keypoints = spair_pairs(str(places.birds), "trn")
    held = finetune.held_back("spair", str(places.birds), keypoints)
    keypoints.pairs = [keypoints.pairs[n] for n in sorted(held)]
    assert len(held) == 2
    return keypoints


def test_a_row_holds_the_scores_of_its_best_weights_in_plain_cats(places, made):
    tests = {"test": spair_pairs(str(places.birds), "test"), "willow": pfwillow(str(places.willow))}
    different = set()
    for key, row in read(made.csv).items():
        path = headline.checkpoint_of(str(made.folder / "out"), *key)
        matcher = load_matcher(str(path))
        assert type(matcher) is Cats
        for where, keypoints in tests.items():
            for reading in ("cats", "kernel"):
                expected = scores_of(matcher, keypoints, reading)
                assert columns_of(row, where, reading) == expected, (key, where, reading)
                different.add(tuple(expected))
        val = label_pairs(str(places.half), "val") if key[0] == "labels" else held_back(places)
        assert row["val"] == scores_of(matcher, val, "cats")[1]
        assert row["step"] == str(checkpoint(path)["step"]) and int(row["seconds"]) < 60
    assert len(different) > 8  # the numbers tell runs, sets and readings apart


def test_the_frozen_backbone_is_scored_as_it_is(places, tmp_path, trained):
    """It is the same whatever the seed, and the table stands without a score of validation pairs."""
    headline.main(command(places, tmp_path, "--rows", "frozen", seeds=(0, 1)))
    (first, second), keypoints = read(tmp_path / "runs.csv").values(), spair_pairs(str(places.birds), "test")
    assert not trained and not (tmp_path / "out").exists()
    matcher = Cats(FinetuneConfig(**headline.ALIKE)).eval()
    for reading in ("cats", "kernel"):
        expected = scores_of(matcher, keypoints, reading)
        assert columns_of(first, "test", reading) == columns_of(second, "test", reading) == expected
        assert float(expected[2]) > 0
    assert (first["row"], first["share"], first["annotated"], first["step"]) == ("frozen", "0", "0", "0")


def test_figure_1_is_the_mean_over_seeds_and_begins_without_labels(made, tmp_path, monkeypatch):
    drawn, draw, rows, scores = [], headline.draw_curve, {}, iter(range(20, 80))
    monkeypatch.setattr(headline, "draw_curve", lambda *a, **k: (drawn.append((a, k)), draw(*a, **k))[1])
    for name in ("frozen 0", "labels 0.5", "labels 1", "a 0", "c 1", "c 0.5"):
        row, share = name.split()
        for seed in "012"[: 1 if row == "frozen" else 3]:
            key = row, share, "4" if row in "ac" else "0", seed
            rows[key] = {"val": "0", "test cats 0.1": str(next(scores)), "test kernel 0.1": "0"}
    headline.draw_figure(str(tmp_path / "figure.png"), rows)
    ((curves, xs, *_), options), = drawn
    assert xs == (0, 0.5, 1) and options["span"] == (20, 40)
    assert curves == {"test: labels alone": [20, 22, 25], "test: labels, then 4 pairs": [28, 34, 31]}
    assert Image.open(tmp_path / "figure.png").size[0] > 480
    wrong = {"none.png": "labels of two shares", "none.txt": "ends in .png", "no/none.png": "that exists"}
    for name, what in wrong.items():
        with pytest.raises(SystemExit, match=what), run.command():
            headline.main([*made.flags, "--figure", str(tmp_path / name)])


# ------------------------------------------------------------------------------------------------------------
# What is made again


def test_what_the_csv_holds_is_not_made_again(made, trained, capsys):
    before = files_in(made.folder)
    headline.main(made.flags)
    assert not trained and files_in(made.folder) == before
    assert capsys.readouterr().out.splitlines() == made.said.splitlines()[-6:]  # the table alone


def test_seeds_label_sets_and_numbers_of_pairs_are_added(places, made, trained, tmp_path):
    shutil.copy(made.csv, tmp_path / "runs.csv")
    flags = command(places, tmp_path, "--rows", "labels", "a", "--labels", places.half, places.quarter,
                    "--willow", places.willow, "--annotated", 4, 9, seeds=(0, 1))
    headline.main(flags)
    assert (tmp_path / "runs.csv").read_text().startswith(made.csv.read_text())
    wanted = [("labels", "0.25", "0", "0"), ("a", "0", "9", "0"), ("labels", "0.5", "0", "1"),
              ("labels", "0.25", "0", "1"), ("a", "0", "4", "1"), ("a", "0", "9", "1")]  # fmt: skip
    rows = read(tmp_path / "runs.csv")
    assert set(list(rows)[:5]) == set(read(made.csv)) and set(list(rows)[5:]) == set(wanted)
    sets = {"0": None, "0.5": str(places.half), "0.25": str(places.quarter)}
    assert sorted((str(cfg.pretrain), cfg.annotated, cfg.seed) for cfg in trained) == sorted(
        (str(sets[share]), int(annotated), int(seed)) for _, share, annotated, seed in wanted)
    assert all(cfg.root == str(places.birds) for cfg in trained if not cfg.pretrain)
    scores = [tuple(value for name, value in row.items() if name.startswith("test")) for row in rows.values()]
    assert len(set(scores)) > 6


def test_a_stopped_command_goes_on(made, trained, tmp_path, monkeypatch):
    """Killed in the second step of its third run, it makes that run anew and ends as if it had not been."""
    flags = [flag.replace(str(made.folder), str(tmp_path)) for flag in made.flags]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        interrupt(patched, 5, "kill")
        headline.main(flags)
    assert len(read(tmp_path / "runs.csv")) == 2 and len(trained) == 3
    trained.clear()
    headline.main(flags)
    assert len(trained) == 3

    def untimed(path: Path) -> list[str]:
        return [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]

    assert untimed(tmp_path / "runs.csv") == untimed(made.csv)


# ------------------------------------------------------------------------------------------------------------
# What goes on from what


def test_runs_go_on_from_the_best_weights_of_the_run_before(places, trained, tmp_path, monkeypatch):
    """Of the same seed, label set and number of pairs. The second of two epochs is never the best."""
    starts: dict[str, dict] = {}

    def measure(log: Path, step: int, matcher: Cats, *_) -> tuple[dict, dict]:
        weights = {key: value.clone() for key, value in matcher.state_dict().items()}
        starts.setdefault(log.parents[1].name, weights)
        return {"cats": [99.0, {0: 10.0, 1: 30.0, 2: 20.0}[step], 99.0]}, {}

    monkeypatch.setattr(finetune, "measure", measure)
    out = tmp_path / "out"
    headline.main(command(places, tmp_path, "--rows", *TRAINED, "--labels", places.half, places.quarter,
                          seeds=(3, 4)))  # fmt: skip
    rows = read(tmp_path / "runs.csv")
    assert len(rows) == 16 and {(row["step"], row["val"]) for row in rows.values()} == {("1", "30.00")}
    before = {"b": ("a", None), "c": ("labels", "0"), "d": ("c", None)}
    for (row, share, annotated, seed) in rows:
        folder = headline.checkpoint_of(str(out), row, share, annotated, seed).parents[1]
        if row in before:
            name, other = before[row]
            best = headline.checkpoint_of(str(out), name, share, other or annotated, seed)
            last = checkpoint(best.with_name("last.pt"))["model"]
            assert same_weights(starts[folder.name], checkpoint(best)["model"])
            assert not same_weights(starts[folder.name], last)
        else:
            torch.manual_seed(int(seed))
            assert same_weights(starts[folder.name], Cats(FinetuneConfig(**headline.ALIKE)).state_dict())
    made = {Path(cfg.out).name: cfg for cfg in trained}
    assert made.keys() == starts.keys() and len(trained) == 16
    for cfg in trained:
        row = Path(cfg.out).name.split("_")[0]
        assert cfg.semi == (row in ("b", "d")) and bool(cfg.pretrain) == (row == "labels")
        assert cfg.dataset == ("none" if row == "labels" else "spair")


# ------------------------------------------------------------------------------------------------------------
# Features and volumes that are remembered


@pytest.fixture
def twins(monkeypatch) -> tuple[Cats, Remembered, list]:
    """Plain CATs and one that remembers, of the same weights, and a list that grows with every volume."""
    torch.manual_seed(0)
    cfg, computed, original = FinetuneConfig(**headline.ALIKE), [], Cats.forward
    plain, other = Cats(cfg).eval(), Remembered(cfg, True, Known()).eval()
    for p in plain.parameters():
        p.data += 0.05 * torch.randn_like(p)
    other.load_state_dict(plain.state_dict())

    def forward(self, src, trg):
        computed.append(type(self))
        return original(self, src, trg)

    monkeypatch.setattr(Cats, "forward", forward)
    return plain, other, computed


@torch.no_grad()
def test_remembered_volumes_are_those_of_plain_cats(twins):
    plain, other, computed = twins
    images = torch.randn(3, 2, 3, 64, 64)
    theirs, ours = ([matcher.features(some) for some in images] for matcher in (plain, other))
    for a, b in zip(theirs, ours):
        torch.testing.assert_close(a.feat, b.feat, rtol=1e-4, atol=1e-5)
    points = torch.rand(2, 5, 2) * 16 - 0.5
    for src, trg in ((0, 1), (1, 0), (1, 2), (0, 2), (0, 1), (2, 2), (0, 1), (0, 1)):
        expected = plain(theirs[src], theirs[trg])
        torch.testing.assert_close(other(ours[src], ours[trg]), expected, rtol=1e-4, atol=1e-4)
    assert computed.count(Remembered) == 7  # the last was asked for twice
    computed.clear()
    for reading in ("cats", "kernel"):
        expected = plain.transfer(theirs[2], theirs[0], points, reading)
        found = other.transfer(ours[2], ours[0], points, reading)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    assert computed.count(Remembered) == 1  # for both readings


def move(*matchers: Cats) -> None:
    """The same new weights for all."""
    for same in zip(*(matcher.aggregator.parameters() for matcher in matchers)):
        by = 0.05 * torch.randn_like(same[0])
        for p in same:
            p.data += by


def test_scores_are_those_of_plain_cats_before_and_after_training(places, twins):
    plain, other, computed = twins
    keypoints, found = as_cats_reads(spair_pairs(str(places.birds), "test"), 64), []
    for _ in range(2):
        for matcher in (plain, other):
            found.append(predict(matcher, keypoints, ["cats", "kernel"], quiet=True))
        for reading in ("cats", "kernel"):
            for a, b in zip(found[-2][reading], found[-1][reading], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0.05)
        move(plain, other)
    assert (torch.cat(found[0]["cats"]) - torch.cat(found[2]["cats"])).abs().max() > 1
    assert computed.count(Cats) == 2 * computed.count(Remembered)


def test_a_volume_is_not_remembered_beyond_a_change_of_weights(twins):
    plain, other, _ = twins
    src, trg = (plain.features(torch.randn(1, 3, 64, 64)) for _ in range(2))
    before = other(src, trg)
    other.train()
    trained = other(src, trg)
    assert trained.requires_grad and trained is not other(src, trg)
    move(plain, other)
    other.eval()
    torch.testing.assert_close(other(src, trg), plain(src, trg), rtol=1e-4, atol=1e-4)
    assert (other(src, trg) - before).abs().max() > 0.01


def test_matchers_share_their_features_and_nothing_else(twins, monkeypatch):
    _, one, _ = twins
    known, images = Known(), torch.randn(2, 3, 64, 64)
    two = Remembered(one.cfg, True, known).eval()
    three = Remembered(one.cfg, True, known).eval()
    move(two)
    first = two.features(images)
    monkeypatch.setattr(Cats, "features", None)  # the backbone is not asked again
    again = three.features(images.flip(0))
    assert torch.equal(again.feat, first.feat.flip(0))
    assert (two(first, again) - three(first, again)).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------------------
# What is refused


def refused(flags: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        headline.main(flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"config": {}}', '{"config": {"keep": null}}'])
def test_a_folder_without_a_summary_of_labels_is_one_line(places, tmp_path, content):
    (tmp_path / "labels").mkdir()
    if content:
        (tmp_path / "labels/summary.json").write_text(content)
    before = files_in(tmp_path)
    flags = command(places, tmp_path, "--labels", places.half, tmp_path / "labels")
    assert f"--labels {tmp_path / 'labels'}: no summary.json of label.py in it" in refused(flags)
    assert files_in(tmp_path) == before


def test_a_refusal_on_the_command_line_is_one_line_and_code_1(places, tmp_path):
    line = [sys.executable, "-m", "experiments.headline", *command(places, tmp_path, "--labels", tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: --labels {tmp_path}: no summary.json")


def test_what_cannot_be_made_is_one_line_and_no_row(places, tmp_path):
    before = headline.checkpoint_of(str(tmp_path / "out"), "a", "0", "4", "0")
    for more, words in (
        (["--rows", "b"], f"no such checkpoint: {before}"),
        (["--rows", "a", "--annotated", 10], "--annotated 10: SPair-71k trn has 9 pairs"),
        (["--rows", "a", "--keypoints", tmp_path / "gone"], "gone"),
        (["--rows", "a", "--willow", tmp_path / "gone"], "gone"),
        (["--rows", "a", "--annotated", -1], "--annotated -1: not negative"),
        (["--rows", "a", "--csv", tmp_path / "gone/runs.csv"], "gone/runs.csv: no such folder"),
        (["--labels", places.half, places.half], "--labels: two label sets of the same --keep"),
    ):
        assert words in refused(command(places, tmp_path, *more))
        assert not (tmp_path / "runs.csv").exists()


def test_runs_that_are_scored_on_other_test_pairs_are_not_added(places, made, tmp_path):
    shutil.copy(made.csv, tmp_path / "runs.csv")
    words = f"--csv {tmp_path / 'runs.csv'}: its runs were scored on other test pairs"
    assert words in refused(command(places, tmp_path, "--rows", "a", seeds=(1,)))
    assert (tmp_path / "runs.csv").read_bytes() == made.csv.read_bytes()


# ------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_has_means_and_deviations_over_seeds(places, tmp_path, capsys):
    rng, columns = np.random.default_rng(0), ["val"]
    columns += [f"test {reading} {alpha}" for reading in ("cats", "kernel") for alpha in ALPHAS]
    groups = {("a", "0", "4"): 3, ("a", "0", "20"): 1, ("c", "0.25", "4"): 2, ("labels", "0.5", "0"): 4}
    values = {group: rng.uniform(0, 100, (count, len(columns))).round(2) for group, count in groups.items()}
    text = ["row,share,annotated,seed,step," + ",".join([*columns, "seconds"])]
    for seed in range(4):  # the seeds of a kind do not stand one after the other
        for group, table in values.items():
            if seed < len(table):
                text.append(",".join([*group, str(seed), "7", *(f"{v:.2f}" for v in table[seed]), "99"]))
    (tmp_path / "runs.csv").write_text("\n".join(text) + "\n")
    headline.main(command(places, tmp_path, "--rows", "a"))
    said = capsys.readouterr().out.splitlines()
    shown = [name for name in columns if name == "val" or name.endswith(" 0.1")]
    assert re.split(r"\s{2,}", said[0].split(")", 1)[1].strip()) == shown and len(said) == 1 + len(groups)
    found = {}
    for line in said[1:]:
        row, share, annotated, count, rest = re.fullmatch(r"(\w+), (\S+), (\d+) \((\d)\)(.*)", line).groups()
        numbers = re.findall(r"([\d.]+) \+- +([\d.]+)", rest)
        found[row, share, annotated] = int(count), [tuple(map(float, pair)) for pair in numbers]
    assert found.keys() == groups.keys()
    for group, (count, numbers) in found.items():
        table = values[group][:, [columns.index(name) for name in shown]]
        expected = [*zip(table.mean(0), np.sqrt(((table - table.mean(0)) ** 2).mean(0)))]
        assert count == groups[group] and np.abs(np.array(numbers) - expected).max() < 0.0501
