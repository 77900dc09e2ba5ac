"""CATs on labels, then on keypoints (paper, section 4.3), alone or with SemiMatch.

    python -m experiments.finetune --pretrain labels --dataset shapes --annotated 20    # label.py's, 20 pairs
    python -m experiments.finetune --pretrain labels --dataset spair --out runs/spair
    python -m experiments.finetune --dataset spair --checkpoint runs/spair/pretrain/best.pt --semi
    torchrun --nproc_per_node=4 -m experiments.finetune --pretrain labels --dataset spair --batch 8

A label set and a benchmark's training split are both pairs with points, and one loop trains on either: first
OUT/pretrain, then, from its best weights with a fresh optimiser, OUT/finetune. After every epoch the
validation split is scored; best.pt holds the best of its scores at alpha 0.10, last.pt what --resume goes on
from. Test pairs are never read here. `--preset semimatch` is SemiMatch's released recipe.
"""

import argparse
import dataclasses
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
from experiments import semimatch
from experiments.cache import Known, remembered
from experiments.cats import GRID, Cats, CatsConfig, as_cats_reads, end_point_error, flow_of
from experiments.views import KeypointViews
from modules import Features, autocast
from support import run
from support.benchmarks import DATASETS
from support.download import benchmark_file
from support.files import check_record, load_optimizer, read_checkpoint, write_whole
from support.options import ABOVE_0, AT_LEAST_1, SEEDS, SHARE, add_options, check_ranges
from train import measure

PROGRAM = "experiments.finetune"
KeypointSource = Literal["none", "shapes", "pfpascal", "spair", "spair-small"]
WEIGHT_DECAY = 0.05  # CATs

# What --resume may change: none of it changes the numbers. OUT is not of it: best.pt would stay behind.
FREE = set("root pretrain backbone_weights workers device save_every".split())
RANGES = {  # of other numbers: not negative
    **dict.fromkeys("size projection depth heads epochs pretrain_epochs batch accumulate log_every".split(),
                    AT_LEAST_1),
    **dict.fromkeys("lr beta semi_temperature semi_gamma".split(), ABOVE_0),
    **dict.fromkeys("semi_threshold semi_keyout semi_photometric".split(), SHARE),
    "seed": SEEDS,
}


@dataclass
class FinetuneConfig(semimatch.SemiConfig, CatsConfig):
    """A run; the defaults are CATs' own on SPair-71k."""

    # group: data
    pretrain: str | None = None  # folder of the label set to train on first: of label.py, or any SC-ImageNet
    dataset: KeypointSource = "none"  # benchmark whose keypoints are trained on then
    root: str | None = None  # folder of the data set
    annotated: int = 0  # train on so many of its pairs, drawn by the seed; 0: all
    augment: bool = True  # photometric changes and random crops; SemiMatch's strong view has its own

    # group: optimisation
    pretrain_epochs: int = 10  # on the labels; not given
    epochs: int = 100  # on the keypoints; CATs: 100
    epoch_steps: int = 0  # steps of an epoch; 0: as many as the pairs give batches
    patience: int = 0  # epochs on the keypoints without a better score that end it; 0: all epochs are trained
    batch: int = 32  # pairs of a micro-batch; CATs: 32, SemiMatch: 10, its released recipe: 8
    accumulate: int = 1  # micro-batches a step and process
    lr: float = 3e-5  # of everything but the backbone; CATs: 3e-5
    backbone_lr: float = 3e-6  # 0: the backbone stays frozen; CATs: 3e-6
    seed: int = 2021  # of initial weights, the pairs' choice and order, and views; CATs: 2021

    # group: run
    checkpoint: str | None = None  # checkpoint to start from, such as OUT/pretrain/best.pt of an earlier run
    cache_features: bool = False  # a frozen backbone sees a view once; with --no-augment
    workers: int = 0  # processes that load images
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda
    out: str = "runs/cats"  # folder for checkpoints and metrics.jsonl
    save_every: int = 200  # steps; every epoch saves too

    # group: no option
    original_target: bool = False  # flow targets as in CATs' released code, see cats.py:flow_target
    milestones: tuple[int, ...] = (70, 80, 90)  # per cent of the training where the rate is halved; CATs' own
    log_every: int = 20  # steps


PRESETS = {
    # Runs on the built-in set start from frozen features that were trained on photographs: a few minutes.
    "shapes": dict(
        backbone="dinov2_vits14", levels="10", size=224, backbone_lr=0.0, augment=False, cache_features=True,
        batch=4, pretrain_epochs=5, epochs=2, epoch_steps=100, seed=0, out="runs/cats_shapes"),
    # SemiMatch on SPair-71k as released: starts from CATs trained there, trains and decodes at temperature
    # 0.1, halves the rates after epochs 150 and 220 of 500. The supplement's Table 1 says B = 10.
    "semimatch": dict(
        dataset="spair", semi=True, beta=0.1, batch=8, lr=1e-6, backbone_lr=3e-6, epochs=500,
        milestones=(30, 44), out="runs/semimatch"),
}


# ------------------------------------------------------------------------------------------------------------
# Losses


class CachedCats(Cats):
    """CATs whose frozen backbone sees a view once; its features stay in memory, as far as there is room.
    known: those of earlier runs, to go on with."""

    def __init__(self, cfg: FinetuneConfig, load: bool = True, known: Known | None = None) -> None:
        super().__init__(cfg, load)
        self.known = Known() if known is None else known

    def features(self, images: Tensor) -> Features:
        return remembered(self.known, super().features, next(self.parameters()).device, images)


def batch_loss(matcher: Cats, batch: dict, cfg: FinetuneConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a micro-batch, and what is logged: CATs' end-point error, and with --semi SemiMatch's loss."""
    size, grid = len(batch["src"]), (GRID, GRID)
    both = matcher.features(torch.cat([batch["src"], batch["trg"]]))
    src, weak = both.map(lambda x: x[:size]), both.map(lambda x: x[size:])
    corr = matcher(src, weak)
    supervised = end_point_error(flow_of(corr, cfg.beta), batch["flow"], batch["valid"])
    if not cfg.semi:
        return supervised, {}
    with torch.no_grad():
        plain = matcher(src, matcher.features(batch["plain"])) if cfg.augment else corr
        boxes = batch["src_box"], batch["trg_box"]
        pseudo = semimatch.pseudo_labels(plain, grid, grid, batch["affine"], batch["offsets"], *boxes, cfg)
    warped, _ = semimatch.warp(batch["strong"], batch["affine"], batch["offsets"], "bilinear")
    strong = Cats.features(matcher, warped)  # past a cache: no strong view comes twice
    unsupervised = semimatch.contrastive_loss(matcher(src, strong), pseudo, cfg.semi_gamma)
    weight = semimatch.dynamic_weight(supervised, unsupervised) if cfg.semi_dynamic else cfg.semi_weight
    parts = {"epe": supervised, "unsup": unsupervised, "pseudo": pseudo.mask.float().mean()}
    return supervised + weight * unsupervised, parts


def build_optimizer(matcher: Cats, cfg: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW over the matcher and, at its own rate unless that is 0, the backbone."""
    matcher.backbone.requires_grad_(cfg.backbone_lr > 0)
    named = [(name.startswith("backbone."), p) for name, p in matcher.named_parameters() if p.requires_grad]
    groups = [{"params": [p for b, p in named if not b], "scale": 1.0}]
    if cfg.backbone_lr:
        groups.append({"params": [p for b, p in named if b], "scale": cfg.backbone_lr / cfg.lr})
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=WEIGHT_DECAY)


def learning_rate(cfg: FinetuneConfig, step: int, steps: int) -> float:
    """Halved at every milestone (CATs). Steps count from 0."""
    return cfg.lr * 0.5 ** sum(step >= steps * percent / 100 for percent in cfg.milestones)


# ------------------------------------------------------------------------------------------------------------
# Training


def load_matcher(path: str, device: torch.device | str = "cpu") -> Cats:
    """The matcher of a checkpoint, in eval mode; the file holds the backbone's weights too."""
    state = read_checkpoint(path, FinetuneConfig, PROGRAM)
    matcher = Cats(FinetuneConfig(**state["config"]), load=False)
    copy_weights(matcher, path, state)
    return matcher.to(device).eval()


def copy_weights(matcher: Cats, path: str, state: dict | None = None) -> None:
    """The weights of a checkpoint, read already or not; ValueError in one line if it is built otherwise."""
    state = state or read_checkpoint(path, FinetuneConfig, PROGRAM)
    try:
        matcher.load_state_dict(state["model"])
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit --backbone or --levels: {wrong}") from None


def chosen_pairs(keypoints: data.KeypointSet, annotated: int, seed: int,
                 held: frozenset[int] = frozenset()) -> list[int]:
    """All pairs but those that are held back, or so many of them, drawn by the seed."""
    order = [n for n in np.random.default_rng(seed).permutation(len(keypoints)).tolist() if n not in held]
    if annotated > len(order):
        raise ValueError(f"--annotated {annotated}: {keypoints.name} has {len(order)} pairs")
    return sorted(order[:annotated] if annotated else order)


def held_back(dataset: str, root: str | None, train: data.KeypointSet) -> frozenset[int]:
    """A fifth of the training pairs, whatever the seed, to validate on where a benchmark of SPair-71k's form
    has no list "val"."""
    layout = {"spair": "large", "spair-small": "small"}.get(dataset)
    if not layout or benchmark_file("spair", root, f"Layout/{layout}/trn.txt").with_name("val.txt").exists():
        return frozenset()
    return frozenset(np.random.default_rng(0).permutation(len(train)).tolist()[: len(train) // 5])


class Phase(NamedTuple):
    """What is trained on, for how long, and what chooses the best weights."""

    name: str  # "pretrain" on the label set, "finetune" on the benchmark
    train: data.KeypointSet
    numbers: list[int]  # the pairs of it that are used
    val: data.KeypointSet
    epoch: int  # steps of an epoch
    steps: int  # of the phase


def phases_of(cfg: FinetuneConfig) -> list[str]:
    """The names of a run's phases, in order."""
    return ["pretrain"] * bool(cfg.pretrain) + ["finetune"] * (cfg.dataset != "none")


def load_phase(cfg: FinetuneConfig, name: str) -> Phase:
    """The sets of a phase and its length; ValueError if the data are not there or too few."""
    labels = name == "pretrain"
    dataset, root = ("labels", cfg.pretrain) if labels else (cfg.dataset, cfg.root)
    split = "train" if dataset == "shapes" else "trn"
    train = DATASETS[dataset](root, split)
    if held := held_back(dataset, root, train):
        pairs = [train.pairs[n] for n in sorted(held)]
        val = data.KeypointSet(f"{train.name} held back", train.images, pairs, train.rule)
    else:
        val = DATASETS[dataset](root, "val")
    val = val if run.processes()[0] else as_cats_reads(val, cfg.size)  # one process scores
    numbers = chosen_pairs(train, 0 if labels else cfg.annotated, cfg.seed, held)
    epoch = cfg.epoch_steps or max(1, len(numbers) // (cfg.batch * cfg.accumulate * run.processes()[1]))
    return Phase(name, train, numbers, val, epoch, epoch * (cfg.pretrain_epochs if labels else cfg.epochs))


def batches(
    cfg: FinetuneConfig, phase: Phase, patch: int, start: int, device: torch.device
) -> Iterator[dict]:
    """The endless micro-batches of this process, from the one that step `start` begins with."""
    rank, world = run.processes()
    views = KeypointViews(phase.train, phase.numbers, cfg, patch)
    stream = data.PairStream(views, cfg.batch, cfg.seed, start * cfg.accumulate * world, rank, world)
    return run.endless(views, stream, cfg.workers, device)


class Best(NamedTuple):
    """The highest score of the validation pairs so far, and after which step it was."""

    score: float = -1.0
    step: int = 0


def save(path: Path, matcher: Cats, phase: Phase, step: int, best: Best,
         optimizer: torch.optim.Optimizer | None = None) -> None:
    """A checkpoint: best.pt or, with the optimiser, last.pt."""
    content = {"program": PROGRAM, "model": matcher.state_dict(), "config": dataclasses.asdict(matcher.cfg),
               "phase": phase.name, "step": step, "steps": phase.steps, "best": best.score,
               "best_step": best.step, "processes": run.processes()[1]}
    write_whole(path, content | ({"optimizer": optimizer.state_dict()} if optimizer else {}))


def keep_best(folder: Path, matcher: Cats, phase: Phase, step: int, best: Best) -> Best:
    """Score the validation pairs; best.pt if PCK at 0.10 is above the best so far. Returns the best."""
    found, _ = measure(folder / "metrics.jsonl", step, matcher, phase.val, ("cats",))
    if found["cats"][1] > best.score:
        best = Best(found["cats"][1], step)
        save(folder / "best.pt", matcher, phase, step, best)
    return best


def has_stalled(cfg: FinetuneConfig, phase: Phase, done: int, best: Best, device: torch.device) -> bool:
    """Whether --patience ends the training on keypoints here; every process has to call this."""
    if not cfg.patience or phase.name != "finetune" or done % phase.epoch:
        return False
    chief = run.processes()[0] == 0  # the one that knows the best
    return run.any_process(chief and done - best.step >= cfg.patience * phase.epoch, device)


def prepare_phase(matcher: Cats, phase: Phase,
                  resume: str | None) -> tuple[torch.optim.Optimizer, int, Best]:
    """Weights and optimiser as a phase starts or goes on with them; returns optimiser, step, best score."""
    optimizer = build_optimizer(matcher, matcher.cfg)
    if not resume:
        return optimizer, 0, Best()
    state = read_checkpoint(resume, FinetuneConfig, PROGRAM)
    if state["steps"] != phase.steps:
        steps = f"{phase.steps} steps here, not {state['steps']}"
        raise ValueError(f"--resume {resume}: {phase.name} on {phase.train.name} takes {steps}: other pairs")
    copy_weights(matcher, resume, state)
    load_optimizer(optimizer, state, resume)
    return optimizer, state["step"], Best(state["best"], state["best_step"])


def run_phase(phase: Phase, matcher: Cats, device: torch.device, resume: str | None) -> int:
    """Train on a phase's pairs, from a checkpoint of it if one is given; OUT/phase/best.pt is its outcome.

    Returns the exit code by which a shell knows the signal that stopped it, 0 without. Raises ValueError when
    the loss is no longer finite.
    """
    cfg, steps, chief = matcher.cfg, phase.steps, run.processes()[0] == 0
    own = dataclasses.replace(cfg, semi=cfg.semi and phase.name == "finetune")
    optimizer, start, best = prepare_phase(matcher, phase, resume)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loader, skipped = batches(own, phase, matcher.backbone.patch, start, device), set()
    folder = Path(cfg.out, phase.name)
    if chief:
        log, last = run.open_log(folder, start), folder / "last.pt"
        print(f"{phase.name} on {phase.train.name}: {len(phase.numbers)} pairs, {steps} steps,"
              f" best of {phase.val.name}")
        if not start:
            best = keep_best(folder, matcher, phase, 0, best)
            save(last, matcher, phase, 0, best, optimizer)

    clock, done, stopped = time.perf_counter(), start, False
    with run.stop_signals() as stop:  # Ctrl-C: finish the step, save, leave
        for step in tqdm(range(start, steps), initial=start, total=steps, disable=None if chief else True):
            rate = learning_rate(cfg, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

            # Forward and backward, a micro-batch at a time
            logged: dict[str, Tensor] = {}
            for _ in range(cfg.accumulate):
                batch = next(loader)
                skipped.update(line for item in batch.pop("skipped") for line in item.splitlines())
                batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                with autocast(batch["src"], True):
                    loss, parts = batch_loss(matcher, batch, own)
                (loss / cfg.accumulate).backward()
                for key, value in (parts | {"loss": loss}).items():
                    logged[key] = logged.get(key, 0) + value.detach() / cfg.accumulate

            # Step
            logged = run.average_over_processes(params, logged)
            norm = float(torch.nn.utils.clip_grad_norm_(params, math.inf))  # read, not clipped
            if not math.isfinite(norm + logged["loss"]):
                raise ValueError(f"step {step}: loss {logged} with gradient norm {norm} is not finite;"
                                 " what was saved before stands. Lower --lr")
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1

            # Log, measure, save
            if chief and (done % cfg.log_every == 0 or done == steps):
                speed = (done - start) / (time.perf_counter() - clock)
                run.record(log, done, logged | {"lr": rate, "grad_norm": norm, "steps_per_s": speed})
                text = " ".join(f"{key} {value:.4f}" for key, value in logged.items())
                tqdm.write(f"step {done}/{steps} {text} lr {rate:.2e} {speed:.2f} steps/s")
            if chief and done % phase.epoch == 0:
                best = keep_best(folder, matcher, phase, done, best)
            if ended := has_stalled(cfg, phase, done, best, device):
                phase = phase._replace(steps=done)
            if chief and (done % phase.epoch == 0 or (cfg.save_every and done % cfg.save_every == 0)):
                save(last, matcher, phase, done, best, optimizer)
            if (stopped := run.any_process(bool(stop), device)) or ended:
                break

    run.report_skipped(skipped)
    stopped = stopped and (done < phase.steps or phase.name != phases_of(cfg)[-1])  # else it is done
    if chief and stopped:
        save(last, matcher, phase, done, best, optimizer)
        print(f"stopped after step {done}; go on with --resume {last}")
    elif chief:
        print(f"best of {phase.val.name} at .10: {best.score:.1f} at step {best.step}, checkpoint"
              f" {folder / 'best.pt'}, {time.perf_counter() - clock:.0f} s")
    return 128 + (stop or [signal.SIGTERM])[0] if stopped else 0


def finetune(cfg: FinetuneConfig, resume: str | None = None,
             build: Callable[[FinetuneConfig, bool], Cats] | None = None) -> Cats:
    """Pre-train and fine-tune as configured; returns the matcher with the best weights of the last phase.

    Stopped by a signal, it leaves by sys.exit with the code by which a shell knows it.
    """
    device, code = run.find_device(cfg.device), 0
    rank, world = run.start_processes(device)
    if rank == 0:
        run.print_header(cfg, device)
    names = phases_of(cfg)
    if resume:
        names = names[names.index(Path(resume).parent.name) :]
    phases = [load_phase(cfg, name) for name in names]
    torch.manual_seed(cfg.seed)
    build = build or (CachedCats if cfg.cache_features else Cats)
    matcher = build(cfg, not (resume or cfg.checkpoint)).to(device)
    if cfg.checkpoint and not resume:
        copy_weights(matcher, cfg.checkpoint)
    run.share_weights(matcher)
    if rank == 0 and not resume:  # a finished run in this folder is replaced, all its phases at once
        for name, file in itertools.product(names, ("last.pt", "best.pt")):
            Path(cfg.out, name, file).unlink(missing_ok=True)
    for phase in phases:
        if code := run_phase(phase, matcher, device, resume):
            break
        if world > 1:
            dist.barrier()  # the first process has written best.pt
        copy_weights(matcher, str(Path(cfg.out, phase.name, "best.pt")))
        resume = None
    if world > 1:
        dist.destroy_process_group()
    if code:  # nothing goes on with half a matcher
        sys.exit(code)
    return matcher.eval()


# ------------------------------------------------------------------------------------------------------------
# Command line


def was_stopped(last: Path, state: dict) -> bool:
    """Whether a phase has steps left, or fine-tuning has yet to follow a finished pre-training."""
    waits = last.parent.name == "pretrain" and state["config"].get("dataset") != "none"
    followed = (last.parent.parent / "finetune" / "last.pt").exists()
    return run.has_steps_left(last, state) or (waits and not followed)


def check_progress(state: dict, cfg: FinetuneConfig, path: str) -> None:
    """ValueError, in one line, for a checkpoint that is not where its run goes on."""
    names, phase = phases_of(cfg), state["phase"]
    own, last = (Path(cfg.out, name, "last.pt") for name in (phase, names[-1]))
    if phase not in names or Path(path).resolve() != own.resolve():  # best.pt lies beside it
        raise ValueError(f"--resume {path}: this run's own checkpoint is {own}")
    if own != last and last.exists():
        raise ValueError(f"--resume {path}: the run has come further, go on with --resume {last}")
    if own == last and state["step"] >= state["steps"]:
        raise ValueError(f"--resume {path}: this run has finished its {state['step']} steps")


def parse_config(argv: list[str] | None) -> tuple[FinetuneConfig, str | None]:
    """Command line to configuration, and --resume's file, whose configuration takes the defaults' place."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("preset", "resume", "dataset", "backbone"):
        first.add_argument(f"--{name}")
    early = vars(first.parse_known_args(argv)[0])
    resume, base = early.get("resume"), dict(PRESETS.get(early.get("preset", early.get("dataset")), {}))
    if resume:
        state = read_checkpoint(resume, FinetuneConfig, PROGRAM)
        if "optimizer" not in state:
            raise ValueError(f"{resume} cannot be gone on from: --resume takes last.pt, --checkpoint best.pt")
        kinds = {"phase": str, "optimizer": dict, "best": (int, float),
                 **dict.fromkeys(("steps", "best_step", "processes"), int)}
        base = check_record(resume, state, kinds)["config"]
    elif "backbone" in early:
        base.pop("levels", None)  # they are those of the preset's backbone
    shown = FinetuneConfig(**base)

    parser = argparse.ArgumentParser(
        f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    presets = "shapes: on that data set the default; semimatch: its released recipe, from --checkpoint"
    parser.add_argument("--preset", choices=PRESETS, help=presets)
    parser.add_argument("--resume", metavar="FILE", help="last.pt of the run to go on with")
    add_options(parser, FinetuneConfig, shown)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if k not in ("preset", "resume")}
    cfg = dataclasses.replace(shown, **given)
    if resume:
        run.check_resume(state, given | early, FREE, resume)
        check_progress(state, cfg, resume)
    check(cfg)
    if not resume:
        if early.get("preset") == "semimatch" and not cfg.checkpoint:
            raise ValueError("--preset semimatch starts from trained CATs: give --checkpoint FILE")
        cfg.out = run.free_folder(cfg.out, "out" in given, ("finetune", "pretrain"), was_stopped)
    return cfg, resume


def check(cfg: FinetuneConfig) -> None:
    """ValueError, in one line, for options that cannot be."""
    if not cfg.pretrain and cfg.dataset == "none":
        known = ", ".join(get_args(KeypointSource)[1:])
        raise ValueError(f"give --pretrain LABELS, --dataset {known}, or both")
    check_ranges(cfg, RANGES)
    if cfg.cache_features and (cfg.augment or cfg.backbone_lr):
        raise ValueError("--cache-features needs --no-augment and --backbone-lr 0: features change otherwise")


def main(argv: list[str] | None = None) -> None:
    with run.command():
        finetune(*parse_config(argv))


if __name__ == "__main__":
    main()
