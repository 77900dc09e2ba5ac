"""The training loop and its command lines: what resumes, what splits over processes, what stops and what is refused."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import Shapes, prepare
from evaluate import DATASETS
from shapes import draw_shape
from train import (
    PRESETS,
    Cascade,
    Config,
    ablate,
    cached_features,
    learning_rate,
    load_cascade,
    option_help,
    parse_config,
    read_checkpoint,
    train,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--backbone random_vit8 --size 64 --batch 3 --candidates 6 --volume-width 4 --volume-heads 1 --ffn-ratio 0.25 "
    "--val none --log-every 1 --device cpu --warmup 2"
).split()


def run(*arguments: str, launcher: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    """A command line of the project, from its folder."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def configured(out: Path, *arguments: str) -> tuple[Config, str | None]:
    return parse_config([*SMALL, "--out", str(out), *arguments], None)


def losses(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: Path, b: Path, **tolerance) -> None:
    one, two = (read_checkpoint(str(path / "last.pt")) for path in (a, b))
    assert one["step"] == two["step"] and one["model"].keys() == two["model"].keys()
    for key, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][key], msg=lambda m, k=key: f"{k}: {m}", **tolerance)


def test_two_processes_equal_one_that_accumulates(tmp_path):
    """torchrun with two processes against one process with two micro-batches: losses and weights after five steps."""
    steps = ["--steps", "5", "--optimizer", "sgd", "--lr", "0.05"]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617")
    two = run("train.py", *SMALL, *steps, "--out", tmp_path / "two", launcher=torchrun)
    assert two.returncode == 0, two.stderr
    assert "2 process(es)" in two.stdout
    train(*configured(tmp_path / "one", *steps, "--accumulate", "2"))
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        for key in ("image", "region", "pixel", "loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-5)
    start = torch.load(tmp_path / "one" / "last.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    fresh = Cascade(configured(tmp_path)[0]).trained_state()
    assert any(not torch.equal(start[key], fresh[key]) for key in fresh)  # something was trained at all


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL after a checkpoint; the resumed run ends bit for bit where an uninterrupted one ends."""
    common = [*SMALL, "--steps", "8", "--save-every", "3"]
    process = subprocess.Popen([sys.executable, "train.py", *common, "--out", tmp_path / "killed"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    while not (tmp_path / "killed" / "last.pt").exists():
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert read_checkpoint(str(tmp_path / "killed" / "last.pt"))["step"] < 8
    resumed = run("train.py", "--resume", tmp_path / "killed" / "last.pt")
    assert resumed.returncode == 0, resumed.stderr
    whole = run("train.py", *common, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert_same_weights(tmp_path / "killed", tmp_path / "whole", rtol=0, atol=0)
    assert [line["step"] for line in losses(tmp_path / "killed")] == list(range(1, 9))
    for a, b in zip(losses(tmp_path / "killed"), losses(tmp_path / "whole")):
        assert a["loss"] == b["loss"]


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_on_the_terminal_reaches_loaders_too_and_still_saves(tmp_path, workers):
    """A terminal sends SIGINT to the whole group of processes."""
    flags = ["--steps", "5000", "--workers", str(workers), "--augment", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "train.py", *SMALL, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    printed, complaint = process.communicate(timeout=60)
    done = read_checkpoint(str(tmp_path / "last.pt"))["step"]
    assert process.returncode == 0 and 1 <= done < 5000
    assert f"stopped after step {done}; go on with --resume" in printed
    assert "Traceback" not in complaint


def test_resume_survives_a_torn_line_and_refuses_another_optimiser(tmp_path, capsys):
    train(*configured(tmp_path, "--steps", "2"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    last = str(tmp_path / "last.pt")
    train(*parse_config(["--resume", last, "--steps", "3"], None))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3]
    with pytest.raises(ValueError, match="--resume goes on with the run as it was: --optimizer cannot change"):
        parse_config(["--resume", last, "--optimizer", "sgd"], None)
    with pytest.raises(ValueError, match="--only cannot change"):
        parse_config(["--resume", last], "region")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    out = run("train.py", *SMALL, "--steps", "60", "--optimizer", "sgd", "--lr", "1e30", "--warmup", "0", "--clip", "0",
              "--out", tmp_path, "--save-every", "1")  # fmt: skip
    assert out.returncode == 1
    assert re.search(r"^error: step \d+: loss .* is not finite", out.stderr, re.MULTILINE)
    assert "Traceback" not in out.stderr
    assert read_checkpoint(str(tmp_path / "last.pt"))["step"] >= 1


def test_cached_features_change_nothing(tmp_path):
    for name, flags in (("plain", []), ("cached", ["--cache-features"])):
        train(*configured(tmp_path / name, "--steps", "4", "--no-augment", *flags))
    assert_same_weights(tmp_path / "plain", tmp_path / "cached", rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="--cache-features needs --no-augment"):
        configured(tmp_path, "--augment", "--cache-features")


def test_a_cached_image_has_the_same_bits_whatever_it_was_first_seen_with():
    cascade, views = Cascade(configured(Path("unused"))[0]), torch.randn(5, 3, 64, 64)
    for first in ([3], [0, 3], [4, 1, 3, 0, 2]):
        cache: dict = {}
        cached_features(cascade.features, first, [views[first]], cache, torch.device("cpu"))
        later = cached_features(cascade.features, [2, 3], [views[[2, 3]]], cache, torch.device("cpu"))
        assert torch.equal(later.feat[1], cascade.features(views[3:4]).feat[0])
        torch.testing.assert_close(later.feat, cascade.features(views[[2, 3]]).feat, rtol=1e-3, atol=1e-4)


def test_ablations_share_their_views_and_change_what_they_say(tmp_path, monkeypatch, capsys):
    shapes = Shapes("train", True)
    few = DATASETS["shapes"](None, "test")
    few.pairs = few.pairs[:3]
    monkeypatch.setattr("train.keypoint_set", lambda cfg, split: few)
    monkeypatch.setattr("train.training_set", lambda cfg: shapes)
    seen: dict[int, int] = {}
    original = Cascade.features

    def counted(self, images, saliency=None):
        if saliency is not None:  # training images come with their silhouettes
            seen[self.cfg.size] = seen.get(self.cfg.size, 0) + len(images)
        return original(self, images, saliency)

    monkeypatch.setattr(Cascade, "features", counted)
    cfg, _ = configured(tmp_path / "all", "--steps", "2", "--size", "96", "--augment", "--consensus", "3", "--ablate")
    ablate(cfg)
    assert seen == {96: 12, 48: 12, 72: 12}
    configs = {path.parent.name: read_checkpoint(str(path))["config"] for path in (tmp_path / "all").glob("*/last.pt")}
    full = configs.pop("0")
    assert not full["ablate"]
    changed = {n: {k: v for k, v in c.items() if v != full[k] and k != "out"} for n, c in sorted(configs.items())}
    assert list(changed.values()) == [
        *({"consensus": 0}, {"saliency_threshold": 0.0}, {"hough": False}, {"hough_side": 3}, {"hough_side": 7}),
        *({"shared_attention": True}, {"size": 48}, {"size": 72}),
    ]
    table = capsys.readouterr().out.split("PCK@")[-1].splitlines()[1:]
    pck = losses(tmp_path / "all" / "0")[-1]["pck"]
    assert len(table) == 11 and all(line.startswith(("full", "ours", "4 (", "5 (")) for line in table)
    for line, stage in ((table[0], "pixel"), (table[9], "region"), (table[10], "image")):
        assert line.split()[-3:] == [f"{v:.1f}" for v in pck[stage]]
    # A second call trains what is missing (4), was cut off (5) or trained otherwise (6), and prints the same table.
    (tmp_path / "all" / "4" / "last.pt").unlink()
    (tmp_path / "all" / "5" / "metrics.jsonl").write_text((tmp_path / "all" / "5" / "metrics.jsonl").read_text()[:-9])
    state = torch.load(tmp_path / "all" / "6" / "last.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"lr": 1.0}}, tmp_path / "all" / "6" / "last.pt")
    seen.clear()
    ablate(cfg)
    assert seen == {96: 12}
    again = capsys.readouterr().out
    assert again.count("finished before") == 6 and again.split("PCK@")[-1].splitlines()[1:] == table
    train(*configured(tmp_path / "plain", "--steps", "2", "--size", "96", "--augment", "--consensus", "3"))
    assert_same_weights(tmp_path / "all" / "0", tmp_path / "plain", rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="--ablate trains all three stages"):
        ablate(configured(tmp_path, "--ablate", "--stages", "2")[0])
    with pytest.raises(ValueError, match="--size 72: a row trains at half of it, and a region needs 80"):
        ablate(configured(tmp_path, "--ablate", "--size", "72")[0])


def test_backbone_runs_once_per_image_and_step(tmp_path, monkeypatch):
    seen = []
    original = Cascade.features
    monkeypatch.setattr(Cascade, "features", lambda self, x, s=None: seen.append(len(x)) or original(self, x, s))
    train(*configured(tmp_path, "--steps", "2", "--accumulate", "2"))
    assert seen == [6] * 4  # a source and a target for each of three pairs, in every micro-batch


def test_same_seed_same_losses_other_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(*configured(tmp_path / name, "--steps", "2", "--seed", str(seed)))
    a, b, c = (losses(tmp_path / name)[-1]["loss"] for name in "abc")
    assert a == b != c


def test_one_stage_alone_leaves_the_others_as_they_were(tmp_path):
    train(*configured(tmp_path / "all", "--steps", "2"))
    before = read_checkpoint(str(tmp_path / "all" / "last.pt"))["model"]
    out = run("region_stage.py", *SMALL, "--steps", "2", "--checkpoint", tmp_path / "all" / "last.pt",
              "--out", tmp_path / "region")  # fmt: skip
    assert out.returncode == 0, out.stderr
    after = read_checkpoint(str(tmp_path / "region" / "last.pt"))["model"]
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"region"}
    assert {key.split(".")[0] for key in after} == {"image", "region"}


def test_eq3_weights_the_losses(tmp_path):
    weights = ["--lambda-image", "0.5", "--lambda-region", "2", "--lambda-pixel", "0.25"]
    train(*configured(tmp_path, "--steps", "1", *weights))
    line = losses(tmp_path)[0]
    assert line["loss"] == pytest.approx(0.5 * line["image"] + 2 * line["region"] + 0.25 * line["pixel"], rel=1e-5)


def test_learning_rate_schedule():
    cfg = Config(lr=2.0, warmup=4, steps=14, schedule="cosine")
    assert [learning_rate(cfg, s) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(cfg, 4) == 2.0 and learning_rate(cfg, 9) == pytest.approx(1.0)
    assert learning_rate(dataclasses.replace(cfg, schedule="constant"), 13) == 2.0


def test_every_option_is_used_explained_and_known_by_its_name():
    source = "".join(
        (ROOT / f"{name}.py").read_text() for name in ("train", "modules", "image_stage", "region_stage", "pixel_stage")
    )
    help_of = option_help(Config)
    for field in dataclasses.fields(Config):
        used = rf"cfg\.{field.name}\b" if not field.name.startswith("lambda_") else r'f"lambda_\{stage\}"'
        assert re.search(used, source), f"--{field.name} is parsed and never read"
    for name in ("hough_side", "pairs", "ap", "lr", "size"):
        assert "paper" in help_of[name]
    unknown = run("train.py", "--leraning-rate", "1")
    assert unknown.returncode == 2 and "--leraning-rate" in unknown.stderr


def test_single_options_override_a_preset():
    cfg, _ = parse_config(["--preset", "paper", "--root", "x", "--lr", "0.5"], None)
    assert (cfg.lr, cfg.size, cfg.batch, cfg.optimizer) == (0.5, 512, 4, "sgd")
    assert set(PRESETS["paper"]) <= {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "folder", "--root", "nowhere"], "--root nowhere: expected a folder of class folders"),
    (["--dataset", "cub"], "--dataset cub"),
    (["--backbone", "resnet50"], "unknown backbone 'resnet50'"),
    (["--size", "60"], "--size 60: not a multiple"),
    (["--size", "24"], "raise --size"),
    (["--batch", "9999"], "--batch 9999"),
    (["--resume", "nowhere.pt"], "no such checkpoint: nowhere.pt"),
    (["--hough-side", "4"], "--hough-side 4"),
    (["--heads", "7"], "--heads 7 does not divide"),
    (["--optimizer", "lion"], "--optimizer lion"),
    (["--device", "abacus"], "--device abacus"),
    (["--accumulate", "0"], "--accumulate 0: at least 1"),
    (["--seed", "-1"], "--seed -1: not negative"),
    (["--val", "pfwillow"], "PF-WILLOW folder .: expected"),
    (["--only", "region", "--shared-attention"], "--shared-attention ties the stages together"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, flags, words, capsys):
    from train import main

    with pytest.raises(SystemExit) as error:
        main([*SMALL, "--out", str(tmp_path), "--steps", "1", *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_refuses_another_backbone_and_another_shape(tmp_path):
    train(*configured(tmp_path, "--steps", "1"))
    path = str(tmp_path / "last.pt")
    other = {k: v + 0.1 for k, v in load_cascade(path).backbone.vit.state_dict().items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="trained on other backbone weights"):
        load_cascade(path, weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="does not fit the image stage"):
        load_cascade(path, volume_width=8)


def test_conditioning_is_found_from_training_images_and_goes_with_the_checkpoint(tmp_path):
    train(*configured(tmp_path, "--steps", "1", "--axes", "12"))
    path = str(tmp_path / "last.pt")
    cascade, images = load_cascade(path), Shapes("train", False)
    assert cascade.image.mvam.gated[0].q.in_features == 12
    views = [prepare(images.load(k)[0], None, 64, 8)[0] for k in range(0, len(images), len(images) // 256)]
    feat = cascade.backbone(torch.stack(views))[0].flatten(0, 1)
    torch.testing.assert_close(cascade.conditioning.mean, feat.mean(0), rtol=1e-3, atol=1e-4)
    variance = torch.linalg.eigvalsh((feat - feat.mean(0)).T.double() @ (feat - feat.mean(0)).double() / len(feat))
    found = cascade.conditioning(feat).var(0, correction=0)
    torch.testing.assert_close(found, variance.flip(0)[:12].sqrt().float(), rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit the conditioning"):
        load_cascade(path, axes=8)
    again = train(*configured(tmp_path / "again", "--steps", "1", "--axes", "12", "--checkpoint", path))
    assert torch.equal(again.conditioning.axes, cascade.conditioning.axes)


def test_class_folders_train_with_maps_crops_and_a_corrupt_file(tmp_path):
    """Photographs on disk, saliency maps beside them, one file damaged: named, counted, passed over."""
    rng = np.random.default_rng(0)
    for category in ("dog", "fish", "lamp"):
        (tmp_path / "images" / category).mkdir(parents=True)
        (tmp_path / "maps" / category).mkdir(parents=True)
        for k in range(4):
            record = draw_shape(category, k, 96)
            record["image"].crop((0, 0, 96, 80)).save(tmp_path / "images" / category / f"im_{k}.jpg")
            Image.fromarray(rng.integers(40, 200, (32, 32), dtype=np.uint8)).save(
                tmp_path / f"maps/{category}/im_{k}_sal.png"
            )
    (tmp_path / "images/dog/im_2.jpg").write_bytes(b"\xff\xd8 cut short")
    flags = ["--dataset", "folder", "--root", tmp_path / "images", "--saliency", tmp_path / "maps", "--steps", "4"]
    out = run("train.py", *SMALL, *flags, "--out", tmp_path / "run")
    assert out.returncode == 0, out.stderr
    assert "12 images of 3 classes" in out.stdout
    assert re.search(r"1 unreadable files passed over: cannot read image .*im_2\.jpg", out.stderr)
    assert len(losses(tmp_path / "run")) == 4
    out = run("train.py", *SMALL, *flags, "--saliency", tmp_path, "--axes", "12", "--out", tmp_path / "no maps")
    assert out.returncode != 0 and out.stderr.count("\n") == 1
    assert re.search(r"no training image can be read; the first: no such image: .*dog.im_0_sal\.png", out.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(*configured(folder, "--steps", "1"))
    images = Shapes("test")
    for k in range(2):
        images.load(k)[0].resize((150 - 30 * k, 100)).save(folder / f"{k}.png")
    return folder


def test_two_pictures_of_ones_own_are_matched_and_drawn(trained):
    out = run("pixel_stage.py", trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt",
              "--out", trained / "m.png", "--count", "5")  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert f"5 matches drawn in {trained / 'm.png'}" in out.stdout
    with Image.open(trained / "m.png") as page:
        assert page.size == (round(150 * 2.56) + 4 + round(120 * 2.56), 256)


def test_given_points_are_transferred_in_pixels(trained):
    out = run("pixel_stage.py", trained / "0.png", trained / "1.png", "--checkpoint", trained / "last.pt", "--out",
              trained / "p.png", "--points", "40,52", "118.5,60")  # fmt: skip
    assert out.returncode == 0, out.stderr
    found = re.findall(r"^([\d.]+),([\d.]+) -> (-?[\d.]+),(-?[\d.]+)$", out.stdout, re.MULTILINE)
    assert [pair[:2] for pair in found] == [("40.0", "52.0"), ("118.5", "60.0")]
    assert all(0 <= float(x) < 120 and 0 <= float(y) < 100 for *_, x, y in found)


@pytest.mark.parametrize("arguments, words", [
    (["0.png", "1.png", "--points", "400,52"], "--points 400,52: outside the source image of 150x100 px"),
    (["0.png", "1.png", "--points", "40;52"], "write a point as x,y"),
    (["0.png", "absent.png"], "no such image"),
    (["0.png", "last.pt"], "cannot read image"),
])  # fmt: skip
def test_matching_refuses_in_one_line(trained, arguments, words):
    arguments = [trained / a if a.endswith((".png", ".pt")) else a for a in arguments]
    out = run("pixel_stage.py", *arguments, "--checkpoint", trained / "last.pt", "--out", trained / "x.png")
    assert out.returncode == 1 and words in out.stderr and "Traceback" not in out.stderr
    assert not (trained / "x.png").exists()
