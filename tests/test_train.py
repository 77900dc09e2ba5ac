"""The training loop and its command lines: what resumes, what splits over processes, what stops and what is
refused."""

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

from data import prepare
from support.files import read_checkpoint as read_any
from support.options import option_help
from support.presets import PRESETS
from support.shapes import Shapes, draw_shape
from train import Cascade, Config, build_optimizer, learning_rate, load_cascade, parse_config, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--backbone random_vit8 --size 64 --batch 3 --candidates 6 --ffn-ratio 0.25 --val none --log-every 1"
    " --device cpu"
).split()


def run(*arguments: str, launcher: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    """A command line of the project, from its folder."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def configured(out: Path, *arguments: str) -> tuple[Config, str | None]:
    return parse_config([*SMALL, "--out", str(out), *arguments], None)


def read_checkpoint(path: str) -> dict:
    return read_any(path, Config, "train.py")


def losses(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: Path, b: Path, **tolerance) -> None:
    one, two = (read_checkpoint(str(path / "last.pt")) for path in (a, b))
    assert one["step"] == two["step"] and one["model"].keys() == two["model"].keys()
    for key, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][key], msg=lambda m, k=key: f"{k}: {m}", **tolerance)


def test_two_processes_equal_one_that_accumulates(tmp_path):
    """torchrun with two processes against one process with two micro-batches: losses and weights after five
    steps."""
    steps = ["--steps", "5", "--optimizer", "sgd", "--lr", "0.05"]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
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
    train(*parse_config(["--resume", last, "--steps", "3"]))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3]
    with pytest.raises(
        ValueError, match="--resume goes on with the run as it was: --optimizer cannot change"
    ):
        parse_config(["--resume", last, "--optimizer", "sgd"], None)
    with pytest.raises(ValueError, match="--only cannot change"):
        parse_config(["--resume", last], "region")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    steep = "--steps 60 --optimizer sgd --lr 1e30 --save-every 1".split()
    out = run("train.py", *SMALL, *steep, "--out", tmp_path)
    assert out.returncode == 1
    assert re.search(r"^error: step \d+: loss .* is not finite", out.stderr, re.MULTILINE)
    assert "Traceback" not in out.stderr
    assert read_checkpoint(str(tmp_path / "last.pt"))["step"] >= 1


def test_backbone_runs_once_per_image_and_step(tmp_path, monkeypatch):
    seen = []
    original = Cascade.features
    monkeypatch.setattr(
        Cascade, "features", lambda self, x, s=None: seen.append(len(x)) or original(self, x, s)
    )
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
    assert line["loss"] == pytest.approx(
        0.5 * line["image"] + 2 * line["region"] + 0.25 * line["pixel"], rel=1e-5
    )


def test_learning_rate_schedule():
    cfg = Config(lr=2.0, steps=60)
    assert [learning_rate(cfg, s) for s in (0, 4, 9, 19)] == [0.1, 0.5, 1.0, 2.0]
    assert learning_rate(cfg, 20) == 2.0 and learning_rate(cfg, 40) == pytest.approx(1.0)
    assert learning_rate(dataclasses.replace(cfg, optimizer="sgd"), 0) == 2.0  # the paper's rate is constant
    assert learning_rate(dataclasses.replace(cfg, optimizer="sgd"), 53) == 2.0


def test_every_option_is_used_explained_and_known_by_its_name():
    names = ("train", "modules", "image_stage", "region_stage", "pixel_stage", "support/benchmarks")
    source = "".join((ROOT / f"{name}.py").read_text() for name in names)
    help_of = option_help(Config)
    for field in dataclasses.fields(Config):
        assert re.search(rf'cfg\.{field.name}\b|cfg, "{field.name}"', source), f"--{field.name} is never read"
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
    (["--backbone", "resnet50"], "unknown backbone 'resnet50'"),
    (["--size", "60"], "--size 60: not a multiple"),
    (["--size", "24"], "raise --size"),
    (["--batch", "9999"], "--batch 9999"),
    (["--resume", "nowhere.pt"], "no such checkpoint: nowhere.pt"),
    (["--hough-side", "4"], "--hough-side 4"),
    (["--consensus", "4"], "--consensus 4"),
    (["--frozen-share", "1.5"], "--frozen-share 1.5: from 0 to 1"),
    (["--axes", "10"], "--axes 10: a multiple of 4"),
    (["--device", "abacus"], "--device abacus"),
    (["--accumulate", "0"], "--accumulate 0: at least 1"),
    (["--seed", "-1"], "--seed -1: not negative"),
    (["--val", "pfwillow", "--val-root", "nowhere"], "PF-WILLOW folder nowhere: expected"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, flags, words, capsys):
    from train import main

    with pytest.raises(SystemExit) as error:
        main([*SMALL, "--out", str(tmp_path), "--steps", "1", *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_value_that_is_no_choice_is_refused_with_the_choices(capsys):
    for flags, known in (
        (["--optimizer", "lion"], "adamw"),
        (["--dataset", "cub"], "folder"),
        (["--stages", "4"], "3"),
    ):
        with pytest.raises(SystemExit) as error:
            parse_config(flags)
        said = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and f"argument {flags[0]}: invalid choice" in said and known in said
    with pytest.raises(ValueError, match="--shared-attention ties the stages together"):
        parse_config(["--shared-attention"], "region")


def test_a_root_alone_means_class_folders():
    assert parse_config(["--root", "x"])[0].dataset == "folder"
    assert parse_config(["--root", "x"])[0].backbone == "ibot_vitb16"  # and not the preset of shapes
    assert parse_config(["--root", "x", "--dataset", "spair"])[0].dataset == "spair"
    assert parse_config([])[0] == parse_config(["--preset", "quick"])[0]


def test_literal_is_the_paper_without_anything_of_ours():
    cfg, _ = parse_config(["--preset", "literal", "--root", "x"])
    assert not (
        cfg.residual or cfg.ffn_ratio or cfg.augment or cfg.consensus or cfg.loop_radius or cfg.frozen_share
    )
    assert (cfg.temperature, cfg.ap, cfg.mil_lr, cfg.saliency_rescale) == (1, "max", 1, False)
    assert (cfg.optimizer, cfg.lr, cfg.batch, cfg.size, cfg.backbone) == ("sgd", 3e-5, 4, 512, "ibot_vitb16")
    rates = build_optimizer(Cascade(dataclasses.replace(cfg, backbone="random_vit8", size=64))).param_groups
    assert [(g["scale"], g["momentum"], g["weight_decay"]) for g in rates] == [(1, 0.9, 0), (1, 0.9, 0)]


def test_help_shows_the_values_of_the_preset_that_would_run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    for flags, size in (([], 128), (["--preset", "photos"], 224), (["--root", "x"], 512)):
        with pytest.raises(SystemExit):
            parse_config([*flags, "--help"])
        printed = capsys.readouterr().out
        assert f"input side in pixels; paper: 512 (default: {size})" in printed
        assert all(f"\n{group}:\n" in printed for group in ("data", "paper", "ours", "optimisation", "run"))
        assert len(printed.splitlines()) <= 130 and max(map(len, printed.splitlines())) <= 110


def test_a_checkpoint_refuses_another_backbone_and_another_shape(tmp_path):
    train(*configured(tmp_path, "--steps", "1"))
    path = str(tmp_path / "last.pt")
    other = {k: v + 0.1 for k, v in load_cascade(path).backbone.vit.state_dict().items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="trained on other backbone weights"):
        load_cascade(path, weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="does not fit the image stage"):
        load_cascade(path, ffn_ratio=0.5)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"] | {"heads": 4}}, path)  # as before this layout
    with pytest.raises(
        ValueError, match="written by another version of train.py .option heads.; train it anew"
    ):
        load_cascade(path)


def test_conditioning_is_found_from_training_images_and_goes_with_the_checkpoint(tmp_path):
    train(*configured(tmp_path, "--steps", "1", "--axes", "12"))
    path = str(tmp_path / "last.pt")
    cascade, images = load_cascade(path), Shapes("train", False)
    assert cascade.image.mvam.gated.q.in_features == 12
    views = [prepare(images.load(k)[0], None, 64, 8)[0] for k in range(0, len(images), len(images) // 256)]
    feat = cascade.backbone(torch.stack(views))[0].flatten(0, 1)
    torch.testing.assert_close(cascade.conditioning.mean, feat.mean(0), rtol=1e-3, atol=1e-4)
    variance = torch.linalg.eigvalsh(
        (feat - feat.mean(0)).T.double() @ (feat - feat.mean(0)).double() / len(feat)
    )
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
    flags = [
        "--dataset",
        "folder",
        "--root",
        tmp_path / "images",
        "--saliency",
        tmp_path / "maps",
        "--steps",
        "4",
    ]
    out = run("train.py", *SMALL, *flags, "--out", tmp_path / "run")
    assert out.returncode == 0, out.stderr
    assert "12 images of 3 classes" in out.stdout
    assert re.search(r"1 unreadable files passed over: cannot read image .*im_2\.jpg", out.stderr)
    assert len(losses(tmp_path / "run")) == 4
    out = run(
        "train.py", *SMALL, *flags, "--saliency", tmp_path, "--axes", "12", "--out", tmp_path / "no maps"
    )
    assert out.returncode != 0 and out.stderr.count("\n") == 1
    assert re.search(
        r"no training image can be read; the first: no such image: .*dog.im_0_sal\.png", out.stderr
    )
