"""The training loop and its command lines: what resumes, what splits over processes, what stops and what is
refused."""

import dataclasses
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image

from data import prepare
from image_stage import REGION
from modules import AP_TEMPERATURE, HEADS, HOUGH_EXPONENT
from region_stage import NMS_RADIUS
from support.files import read_checkpoint as read_any
from support.options import fields_with_groups
from support.presets import PRESETS
from support.shapes import Shapes, draw_shape
from train import (
    MOMENTUM,
    Cascade,
    Config,
    batches,
    build_optimizer,
    learning_rate,
    load_cascade,
    main,
    parse_config,
    train,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--backbone random_vit8 --size 64 --batch 3 --candidates 6 --ffn-ratio 0.25 --val none --log-every 1"
    " --device cpu"
).split()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a checkout's own runs/ holds must not matter."""
    monkeypatch.chdir(tmp_path)


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


def test_every_process_gets_the_weights_of_the_first(tmp_path):
    """Parameters and buffers, of processes that drew their own."""
    program = tmp_path / "share.py"
    program.write_text(
        "import json\nimport torch\n"
        "from support import run\n"
        "rank, _ = run.start_processes(torch.device('cpu'))\n"
        "torch.manual_seed(rank)\n"
        "module = torch.nn.BatchNorm1d(3)\n"
        "torch.nn.init.normal_(module.weight)\n"
        "module.running_var += torch.rand(3)\n"
        "before = torch.cat([module.weight.detach(), module.running_var]).tolist()\n"
        "run.share_weights(module)\n"
        "after = torch.cat([module.weight.detach(), module.running_var]).tolist()\n"
        "open(f'{__file__}.{rank}', 'w').write(json.dumps([before, after]))\n"
        "torch.distributed.destroy_process_group()\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    done = run(program, launcher=torchrun, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert not done.returncode, done.stderr
    first, second = (json.loads((tmp_path / f"share.py.{rank}").read_text()) for rank in (0, 1))
    assert first[0] != second[0] and first[1] == second[1] == first[0]


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
    assert process.returncode == 130 and 1 <= done < 5000  # as a shell knows Ctrl-C: && goes no further
    assert f"stopped after step {done}; go on with --resume" in printed
    assert "Traceback" not in complaint


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_too_and_exits_as_a_shell_expects(tmp_path, workers):
    """A job manager sends SIGTERM to the whole group: the loaders among it."""
    command = [sys.executable, "train.py", *SMALL, "--steps", "5000", "--workers", str(workers)]
    process = subprocess.Popen([*command, "--out", tmp_path], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in complaint
    assert read_checkpoint(str(tmp_path / "last.pt"))["step"] >= 1


def stopped(tmp_path: Path, *options: str) -> str:
    """last.pt of a run that was stopped after two of its four steps."""
    train(*configured(tmp_path, "--steps", "4", *options))
    state = torch.load(tmp_path / "last.pt", weights_only=True) | {"step": 2}
    torch.save(state, tmp_path / "last.pt")
    return str(tmp_path / "last.pt")


def test_resume_survives_a_torn_line(tmp_path):
    last = stopped(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    train(*parse_config(["--resume", last]))
    assert [line["step"] for line in losses(tmp_path)] == [1, 2, 3, 4]


def test_resume_refuses_whatever_would_change_the_numbers(tmp_path, monkeypatch):
    """Every option but those that only say where things lie, what is measured and how often something is
    written."""
    last = stopped(tmp_path)
    base = read_checkpoint(last)["config"]
    free = set("root weights device workers val val_root out log_every val_every save_every".split())
    for field in dataclasses.fields(Config):
        if field.name in free or fields_with_groups(Config)[field.name][0] == "no option":
            continue
        flag, value = f"--{field.name.replace('_', '-')}", base[field.name]
        if isinstance(value, bool):
            given = [flag.replace("--", "--no-" if value else "--", 1)]
        elif get_origin(field.type) is Literal:
            given = [flag, str(next(c for c in get_args(field.type) if c != value))]
        else:
            given = [flag, str(value + 1) if isinstance(value, int | float) else "other"]
        with pytest.raises(
            ValueError, match=f"--resume goes on with the run as it was: {flag} cannot change"
        ):
            parse_config(["--resume", last, *given])
    for given in (["--preset", "quick"], ["--checkpoint", last]):
        with pytest.raises(ValueError, match=f"{given[0]} cannot change"):
            parse_config(["--resume", last, *given])
    with pytest.raises(ValueError, match="--only cannot change"):
        parse_config(["--resume", last], "region")
    same, _ = parse_config(
        ["--resume", last, "--seed", "0", "--save-every", "7", "--out", str(tmp_path / "b")]
    )
    assert (same.save_every, same.out) == (7, str(tmp_path / "b"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"by 1 process\(es\), not by 2"):
        parse_config(["--resume", last])


def test_a_resumed_run_begins_with_the_micro_batch_that_comes_next(monkeypatch):
    """Step 3 of two micro-batches each, alone and as the second of two processes, in the one sequence."""
    cfg, images, cpu = Config(size=16, batch=2, accumulate=2), Shapes("train", False), torch.device("cpu")
    every = list(itertools.islice(batches(cfg, images, 8, 0, cpu), 14))
    assert torch.equal(next(batches(cfg, images, 8, 3, cpu))["src_img"], every[3 * 2]["src_img"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert torch.equal(next(batches(cfg, images, 8, 3, cpu))["src_img"], every[3 * 2 * 2 + 1]["src_img"])


def test_only_a_constant_rate_may_be_followed_for_longer(tmp_path):
    last = stopped(tmp_path / "sgd", "--optimizer", "sgd")
    assert parse_config(["--resume", last, "--steps", "9"])[0].steps == 9
    train(*parse_config(["--resume", last]))
    with pytest.raises(ValueError, match="this run has finished its 4 steps"):
        parse_config(["--resume", last])
    maps = {"saliency": "maps"}
    state = torch.load(last, weights_only=True)
    torch.save(state | {"step": 2, "config": state["config"] | maps}, last)
    assert parse_config(["--resume", last, "--saliency", "moved"])[0].saliency == "moved"
    with pytest.raises(ValueError, match="--saliency cannot change"):
        parse_config(["--resume", last, "--saliency", "none"])


def test_a_folder_keeps_the_run_that_it_holds(tmp_path, monkeypatch):
    """A stopped run is not written over, a finished one only by name, and a mistyped option changes
    nothing."""
    monkeypatch.chdir(tmp_path)
    last = stopped(tmp_path / "runs" / "quick")
    with pytest.raises(
        ValueError, match="runs/quick holds a run that was stopped: go on with --resume .*last.pt"
    ):
        parse_config(SMALL)
    train(*parse_config(["--resume", last]))
    assert parse_config(SMALL)[0].out == "runs/quick-2"
    stopped(tmp_path / "runs" / "quick-2")
    with pytest.raises(ValueError, match="runs/quick-2 holds a run that was stopped"):
        parse_config(SMALL)
    assert parse_config([*SMALL, "--out", "runs/quick"])[0].out == "runs/quick"  # asked for by name
    before = (tmp_path / "runs/quick/metrics.jsonl").read_text()
    for flags in (
        ["--lr", "-1"],
        ["--val", "pfwillow", "--val-root", "nowhere"],
        ["--batch", "9999"],
        ["--size", "63"],
        ["--weights", "absent.pth"],
    ):
        with pytest.raises(SystemExit):
            main([*SMALL, "--out", "runs/quick", *flags])
        assert (tmp_path / "runs/quick/metrics.jsonl").read_text() == before
    (tmp_path / "runs/quick/last.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match="cannot read a checkpoint from runs/quick/last.pt"):
        parse_config(SMALL)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
    """A limit on the size of files stands for a full disk: the log fits, a checkpoint does not."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    out = run("train.py", *SMALL, "--steps", "2", "--out", tmp_path, preexec_fn=limit)
    assert out.returncode == 1 and "Traceback" not in out.stderr
    assert out.stderr.splitlines()[-1].startswith(
        f"error: cannot write {tmp_path / 'last.pt'}: File too large"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"] and len(losses(tmp_path)) == 2


def test_what_would_train_something_else_is_said(tmp_path):
    for category in ("dog", "fish"):
        (tmp_path / "two" / category).mkdir(parents=True)
        for k in range(4):
            draw_shape(category, k, 96)["image"].save(tmp_path / "two" / category / f"{k}.png")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "dog").symlink_to(tmp_path / "two" / "dog")
    (tmp_path / "maps").mkdir()
    for category in ("dog", "fish"):  # a single bright corner
        (tmp_path / "maps" / category).mkdir()
        for k in range(4):
            dark = Image.new("L", (8, 8))
            dark.putpixel((0, 0), 255)
            dark.save(tmp_path / "maps" / category / f"{k}_sal.png")
    steps = ["--steps", "1", "--batch", "2", "--candidates", "32"]
    two = run("train.py", *SMALL, *steps, "--root", tmp_path / "two", "--out", tmp_path / "a")
    assert two.returncode == 0 and two.stderr.count("\n") == 1
    assert "no saliency maps, so every cell is foreground (Table 4, II)" in two.stderr
    one = run(
        "train.py", *SMALL, *steps, "--root", tmp_path / "one", "--saliency", "none", "--out", tmp_path / "b"
    )
    assert one.returncode == 0 and one.stderr.startswith("one class only: Eq. (2) has no negatives")
    maps = ["--saliency", tmp_path / "maps", "--no-augment"]
    few = run("train.py", *SMALL, *steps, "--root", tmp_path / "two", *maps, "--out", tmp_path / "c")
    assert few.returncode == 0 and few.stderr.count("\n") == 1
    assert re.match(
        r"only [01]\.\d of 16 pairs a couple are found: the foreground may be small, lower --", few.stderr
    )


def test_a_nearly_dead_class_is_left_out_while_two_others_live(tmp_path):
    for category in ("dog", "fish", "lamp"):
        (tmp_path / "images" / category).mkdir(parents=True)
        for k in range(6):
            draw_shape(category, k, 96)["image"].save(tmp_path / "images" / category / f"{k}.png")
    for k in range(5):
        (tmp_path / "images" / "fish" / f"{k}.png").write_bytes(b"damaged")
    flags = ["--root", tmp_path / "images", "--saliency", "none", "--steps", "6"]
    out = run("train.py", *SMALL, *flags, "--out", tmp_path / "run")
    assert out.returncode == 0, out.stderr
    assert "class fish: fewer than two readable images; left out" in out.stderr
    assert "5 unreadable files passed over" in out.stderr
    for k in range(5):
        (tmp_path / "images" / "lamp" / f"{k}.png").write_bytes(b"damaged")
    out = run("train.py", *SMALL, *flags, "--out", tmp_path / "few")
    assert out.returncode == 1 and "fewer than two classes have two readable images" in out.stderr


def test_every_number_has_a_range():
    """Negative ones, nan and infinity are refused by name, wherever they may stand."""
    for field in dataclasses.fields(Config):
        if field.type not in (int, float) or fields_with_groups(Config)[field.name][0] == "no option":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        for value in ("-1", *(("nan", "inf") if field.type is float else ())):
            with pytest.raises(ValueError, match=f"^{flag} {value}[.0]*: "):
                parse_config([*SMALL, flag, value])
    for flag in ("--mil-lr", "--temperature", "--lr", "--pairs"):
        with pytest.raises(ValueError, match=f"^{flag} 0[.0]*: (above 0|at least 1)"):
            parse_config([*SMALL, flag, "0"])
    with pytest.raises(ValueError, match="^--size 0: from 1 to 8192"):
        parse_config([*SMALL, "--size", "0"])
    with pytest.raises(ValueError, match="^--seed 1180591620717411303424: from 0 to"):
        parse_config([*SMALL, "--seed", str(2**70)])


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


def test_what_the_paper_gives_is_the_default_or_the_preset():
    """Sections 3.2, 3.3 and 4.1, Table 4: every number that the paper names."""
    cfg = Config()
    assert (cfg.backbone, cfg.size, cfg.pairs, cfg.hough, cfg.hough_side) == ("ibot_vitb16", 512, 16, True, 5)
    assert (cfg.batch, cfg.stages, cfg.shared_attention, REGION) == (4, 3, False, 5)
    assert (cfg.lambda_image, cfg.lambda_region, cfg.lambda_pixel) == (1, 1, 1)
    assert (HEADS, AP_TEMPERATURE, HOUGH_EXPONENT, NMS_RADIUS) == (4, 0.05, 3, 1)  # ours, where it gives none
    assert (cfg.candidates, cfg.temperature, cfg.saliency_threshold, cfg.volume_window) == (32, 0.05, 0.5, 4)
    for preset in ("paper", "literal"):
        paper, _ = parse_config(["--preset", preset, "--root", "x", "--out", "unused"])
        assert (paper.optimizer, paper.lr, paper.mil_lr, paper.batch, MOMENTUM) == ("sgd", 3e-5, 1, 4, 0.9)
        assert learning_rate(paper, 0) == learning_rate(paper, paper.steps - 1) == 3e-5


def test_the_optimisers_groups():
    """Image and region stage at mil_lr times the rate; the pixel stage, and blocks it shares, at the whole
    rate."""
    for shared in (False, True):
        cascade = Cascade(Config(backbone="random_vit8", size=64, mil_lr=0.25, shared_attention=shared))
        optimizer, names = build_optimizer(cascade), {p: name for name, p in cascade.named_parameters()}
        slow, fast = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
        assert [group["scale"] for group in optimizer.param_groups] == [0.25, 1.0]
        assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 0.01
        trained = {name for name in names.values() if not name.startswith("backbone.")}
        assert slow | fast == trained and not slow & fast
        expected = {n for n in trained if n.startswith("pixel.") or (shared and ".gated." in n)}
        assert fast == expected and len(slow) > 40


def test_every_option_is_used_explained_and_known_by_its_name():
    names = ("train", "modules", "image_stage", "region_stage", "pixel_stage", "support/benchmarks")
    source = "".join((ROOT / f"{name}.py").read_text() for name in names)
    help_of = {name: text for name, (_, text) in fields_with_groups(Config).items()}
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
    (["--seed", "-1"], "--seed -1: from 0 to"),
    (["--val", "pfwillow", "--val-root", "nowhere"], "PF-WILLOW folder nowhere: expected"),
])  # fmt: skip
def test_bad_options_are_one_line(tmp_path, flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        main([*SMALL, "--out", str(tmp_path), "--steps", "1", *flags])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_value_that_is_no_choice_is_refused_with_the_choices(capsys):
    for flags, known in (
        (["--optimizer", "lion"], "adamw"),
        (["--dataset", "cub"], "folder"),
        (["--stages", "4"], "3"),
        (["--backbone", "resnet50"], "ibot_vitb16"),
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


def test_a_damaged_checkpoint_is_one_line_that_names_it(tmp_path, capsys):
    last = stopped(tmp_path)
    whole = torch.load(last, weights_only=True)
    key = next(iter(whole["model"]))
    for changes, words in (
        ({"model": [1]}, "its model is a list"),
        ({"model": whole["model"] | {key: "no weights"}}, f"its {key} is no tensor of finite"),
        ({"model": whole["model"] | {key: whole["model"][key] * torch.nan}}, f"its {key} is no tensor"),
        ({"model": {k: v for k, v in whole["model"].items() if k != key}}, "does not fit the image stage"),
        ({"config": whole["config"] | {"size": "64"}}, "its size is a str"),
        (
            {"config": {k: v for k, v in whole["config"].items() if k != "size"}},
            "another version of train.py",
        ),
        ({"step": None}, "its step is a NoneType"),
        ({"backbone": None}, "its backbone is a NoneType"),
        ({"optimizer": {}}, "its optimizer does not fit"),
        ({"program": "another"}, "is a checkpoint of another, not of train.py"),
    ):
        torch.save(whole | changes, last)
        with pytest.raises(SystemExit) as error:
            main(["--resume", last])
        assert last in str(error.value) and words in str(error.value) and "\n" not in str(error.value), (
            changes
        )
    for content in (b"", b"PK\x03\x04 cut short", (ROOT / "README.md").read_bytes()):
        Path(last).write_bytes(content)
        with pytest.raises(SystemExit, match=f"cannot read a checkpoint from {last}"):
            main(["--resume", last])


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
