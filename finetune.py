"""CATs on labels, then on keypoints (paper, section 4.3), alone or with SemiMatch.

    python finetune.py --pretrain labels --dataset shapes --annotated 20                 # label.py's set, then 20 pairs
    python finetune.py --pretrain labels --dataset spair --root SPair-71k --out runs/spair
    python finetune.py --dataset spair --root SPair-71k --checkpoint runs/spair/pretrain/best.pt --semi
    torchrun --nproc_per_node=4 finetune.py --pretrain labels --dataset spair --root SPair-71k --batch 8

A label set and a benchmark's training split are both pairs with points, and one function trains on either: first
OUT/pretrain, then, from its best weights with a fresh optimiser, OUT/finetune. After every epoch the validation split
is scored; best.pt holds the best of its scores at alpha 0.10, last.pt what --resume goes on from. Test pairs are never
read here.
"""

import argparse
import dataclasses
import functools
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import data
from cats import GRID, Cats, CatsConfig, end_point_error, flow_of, flow_target
from evaluate import DATASETS, processes
from semimatch import SemiConfig, contrastive_loss, draw_warp, dynamic_weight, key_out, pseudo_labels, warp
from train import (
    Journal,
    add_options,
    cached_features,
    find_device,
    fit,
    leave_signals,
    print_header,
    read_checkpoint,
    report_skipped,
    start_processes,
    write_checkpoint,
)


@dataclass
class FinetuneConfig(CatsConfig, SemiConfig):
    """A run; the defaults are CATs' own on SPair-71k."""

    pretrain: str | None = None  # label set to train on first: of label.py, or any SC-ImageNet
    dataset: str | None = None  # spair, spair-small, pfpascal or shapes: keypoints to train on then; none: labels only
    root: str | None = None  # folder of the data set
    annotated: int = 0  # train on so many of its pairs, drawn by the seed; 0: all
    checkpoint: str | None = None  # matcher to start from, such as OUT/pretrain/best.pt of an earlier run
    augment: bool = True  # photometric changes and random crops; SemiMatch's strong view has its own; CATs: True
    cache_features: bool = False  # keep a frozen backbone's features (images are still read); with --no-augment
    original_target: bool = False  # flow targets as in CATs' released code, see cats.py:flow_target
    pretrain_epochs: int = 10  # on the labels; not given
    epochs: int = 100  # on the keypoints; CATs: 100
    epoch_steps: int = 0  # steps of an epoch; 0: as many as the pairs give batches
    batch: int = 32  # pairs of a micro-batch; CATs: 32, SemiMatch: 10
    accumulate: int = 1  # micro-batches a step and process
    lr: float = 3e-5  # of everything but the backbone; CATs: 3e-5
    backbone_lr: float = 3e-6  # 0: the backbone stays frozen; CATs: 3e-6
    weight_decay: float = 0.05  # CATs: 0.05
    schedule: str = "step"  # or cosine, down to 1e-6; CATs: either
    milestones: str = "70,80,90"  # of step: in per cent of the training; CATs: epochs 70, 80, 90 of 100
    gamma: float = 0.5  # of step: factor at a milestone; CATs: 0.5
    clip: float = 0.0  # largest gradient norm; 0: no clipping
    seed: int = 2021  # of initial weights, the pairs' choice and order, and views; CATs: 2021
    workers: int = 0  # processes that load images
    amp: bool = True  # bfloat16 around the network, on GPUs only
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda
    out: str = "runs/cats"  # folder for checkpoints and metrics.jsonl
    log_every: int = 20  # steps
    save_every: int = 200  # steps; every epoch saves too


# `shapes` is what runs on the built-in set start from: frozen features that were trained on photographs, a few minutes.
PRESETS = {
    "shapes": dict(
        backbone="dinov2_vits14",
        levels="10",
        size=224,
        augment=False,
        cache_features=True,
        batch=4,
        backbone_lr=0.0,
        epochs=2,
        pretrain_epochs=5,
        epoch_steps=100,
        seed=0,
        out="runs/cats_shapes",
    )
}


# ----------------------------------------------------------------------------------------------------------------------
# Views


def photometric(p: float, blur: bool = False) -> v2.Compose:
    """CATs' photometric changes of an image, each with probability p; SemiMatch's strong view blurs, not sharpens.

    Their ranges are those of albumentations, which CATs uses; Sharpen is torchvision's, of factor 1.5 instead of a
    drawn one, and Blur a Gaussian.
    """
    sharpness = v2.RandomApply([v2.GaussianBlur(7)], p) if blur else v2.RandomAdjustSharpness(1.5, p)
    return v2.Compose(
        [
            v2.RandomGrayscale(p),
            v2.RandomPosterize(4, p),
            v2.RandomEqualize(p),
            sharpness,
            v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2)], p),
            v2.RandomSolarize(128, p),
            v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.2)], p),
        ]
    )


def random_crop(size: tuple[int, int], box: data.Box, rng: np.random.Generator) -> data.Box:
    """CATs' crop: each side anywhere between the image's and the box's, in whole pixels of a (W, H) image."""
    width, height = size
    x0, y0 = (int(np.clip(v, 0, side - 1)) for v, side in zip(box[:2], size))
    x1, y1 = (int(np.clip(math.ceil(v), low + 1, side)) for v, low, side in zip(box[2:], (x0, y0), size))
    left, top = rng.integers(0, x0 + 1), rng.integers(0, y0 + 1)
    return tuple(map(float, (left, top, rng.integers(x1, width + 1), rng.integers(y1, height + 1))))


def to_view(points: Tensor, crop: data.Box, cells: int) -> Tensor:
    """Points (..., 2) in pixels of an image to those of its view of cells x cells; clamped to it."""
    x0, y0, x1, y1 = crop
    moved = data.pixels_to_cells(points - torch.tensor([x0, y0]), (x1 - x0, y1 - y0), (cells, cells))
    return moved.clamp(-0.5, cells - 0.5)


class KeypointViews(Dataset):
    """Pairs with points as training sees them. Keys are (epoch, pair, place in the epoch), so that everything random
    follows from the key and the seed: the order of work, workers and resumption change nothing.
    """

    def __init__(self, keypoints: data.KeypointSet, numbers: list[int], cfg: FinetuneConfig, patch: int) -> None:
        self.keypoints, self.numbers, self.cfg, self.patch = keypoints, numbers, cfg, patch
        self.weak = photometric(cfg.semi_photometric if cfg.semi else 0.2)
        self.strong = photometric(cfg.semi_photometric, cfg.semi_blur)

    def epoch_pairs(self, seed: int, epoch: int) -> list[tuple[int, int]]:
        """All pairs in random order; fewer than a batch are repeated until they fill one."""
        rng = np.random.default_rng((seed, epoch))
        repeats = math.ceil(self.cfg.batch / len(self.numbers))
        order = [n for _ in range(repeats) for n in rng.permutation(self.numbers).tolist()]
        return [(n, place) for place, n in enumerate(order)]

    def side(self, image: int, points: Tensor, box: data.Box, rng: np.random.Generator) -> tuple:
        """One image of a pair: the picture, its crop, points and box (4,) in cells of the crop's view."""
        picture = self.keypoints.load(image)[0]
        # a crop loses neither the object nor a point; a box has edges, points are centres of pixels
        around = torch.cat([torch.tensor(box).view(2, 2), points + 0.5])
        crop = (0.0, 0.0, *map(float, picture.size))
        if self.cfg.augment and rng.random() < 0.5:
            crop = random_crop(picture.size, (*around.amin(0).tolist(), *around.amax(0).tolist()), rng)
        edges = to_view(torch.tensor(box).view(2, 2) - 0.5, crop, GRID).flatten()
        return picture, crop, to_view(points, crop, GRID), edges

    def view(self, picture, crop: data.Box, change: v2.Compose | None) -> Tensor:
        """A crop as the network wants it, (3, S, S)."""
        return data.prepare(change(picture) if change else picture, None, self.cfg.size, self.patch, crop)[0]

    def item(self, number: int, rng: np.random.Generator) -> dict:
        """The views of one pair and what they should be matched to."""
        cfg, pair, weak = self.cfg, self.keypoints.pairs[number], self.weak if self.cfg.augment else None
        src, src_crop, src_kps, src_box = self.side(pair.src, pair.src_kps, pair.src_box, rng)
        trg, trg_crop, trg_kps, trg_box = self.side(pair.trg, pair.trg_kps, pair.trg_box, rng)
        flow, valid = flow_target(src_kps, trg_kps, cfg.original_target)
        item = {"src": self.view(src, src_crop, weak), "trg": self.view(trg, trg_crop, weak)}
        item |= {"flow": flow, "valid": valid, "index": torch.tensor([pair.src, pair.trg])}
        if cfg.semi:
            pixel = cfg.size / GRID
            kps, edges = (trg_kps + 0.5) * pixel - 0.5, ((trg_box + 0.5) * pixel).tolist()
            strong = key_out(self.view(trg, trg_crop, self.strong), kps, tuple(edges), cfg.semi_keyout, rng)
            affine, offsets = draw_warp(rng, cfg.semi_tps)
            item |= {"plain": self.view(trg, trg_crop, None), "strong": strong, "affine": affine, "offsets": offsets}
            item |= {"src_box": src_box, "trg_box": trg_box}
        return item

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        """What is at the key's pair or, where that cannot be read, at the next one; `skipped` names the file."""
        epoch, number, place = key
        at, skipped = self.numbers.index(number), []
        for other in self.numbers[at:] + self.numbers[:at]:
            rng = np.random.default_rng((self.cfg.seed, epoch, place))
            with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
                torch.default_generator.manual_seed(int(rng.integers(2**62)))
                try:
                    return self.item(other, rng) | {"skipped": "\n".join(skipped)}
                except ValueError as error:
                    skipped.append(str(error))
        raise ValueError(f"no pair can be read; the first: {skipped[0]}")


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def batch_loss(matcher: Cats, batch: dict, cfg: FinetuneConfig, cache: dict | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a micro-batch and what is logged: CATs' end-point error, and with --semi SemiMatch's Algorithm 1."""
    size, grid = len(batch["src"]), (GRID, GRID)
    pair = torch.cat([batch["src"], batch["trg"]])
    both = cached_features(matcher.features, batch["index"].T.flatten().tolist(), [pair], cache, pair.device)
    src, weak = both.map(lambda x: x[:size]), both.map(lambda x: x[size:])
    supervised = end_point_error(flow_of(matcher(src, weak), cfg.beta), batch["flow"], batch["valid"])
    if not cfg.semi:
        return supervised, {}
    with torch.no_grad():
        plain = matcher.features(batch["plain"]) if cfg.augment else weak
        boxes = batch["src_box"], batch["trg_box"]
        pseudo = pseudo_labels(matcher(src, plain), grid, grid, batch["affine"], batch["offsets"], *boxes, cfg)
    strong = matcher.features(warp(batch["strong"], batch["affine"], batch["offsets"], "bilinear")[0])
    unsupervised = contrastive_loss(matcher(src, strong), pseudo, cfg.semi_gamma)
    weight = dynamic_weight(supervised, unsupervised) if cfg.semi_dynamic else cfg.semi_weight
    parts = {"epe": supervised, "unsup": unsupervised, "pseudo": pseudo.mask.float().mean()}
    return supervised + weight * unsupervised, parts


def build_optimizer(matcher: Cats, cfg: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW over the matcher and, at its own rate unless that is 0, the backbone."""
    matcher.backbone.requires_grad_(cfg.backbone_lr > 0)
    named = [(name.startswith("backbone."), p) for name, p in matcher.named_parameters() if p.requires_grad]
    groups = [{"params": [p for b, p in named if not b], "scale": 1.0}]
    if cfg.backbone_lr:
        groups.append({"params": [p for b, p in named if b], "scale": cfg.backbone_lr / cfg.lr})
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay)


def learning_rate(cfg: FinetuneConfig, step: int, steps: int) -> float:
    """Halved at the milestones, or a cosine down to 1e-6 (CATs). Steps count from 0."""
    if cfg.schedule == "cosine":
        return 1e-6 + (cfg.lr - 1e-6) * 0.5 * (1 + math.cos(math.pi * step / steps))
    passed = sum(step >= steps * percent / 100 for percent in map(float, cfg.milestones.split(",")))
    return cfg.lr * cfg.gamma**passed


# ----------------------------------------------------------------------------------------------------------------------
# Training


def load_matcher(path: str, device: torch.device | str = "cpu") -> Cats:
    """The matcher of a checkpoint, in eval mode; the file holds the backbone's weights too."""
    state = read_checkpoint(path, FinetuneConfig, "finetune.py")
    matcher = Cats(FinetuneConfig(**state["config"]), load=False)
    matcher.load_state_dict(state["model"])
    return matcher.to(device).eval()


def copy_weights(matcher: Cats, path: str) -> None:
    """Start from another run's matcher; ValueError in one line if it is built otherwise."""
    try:
        matcher.load_state_dict(read_checkpoint(path, FinetuneConfig, "finetune.py")["model"])
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit --backbone, --levels, --projection or --depth: {wrong}") from None


def chosen_pairs(keypoints: data.KeypointSet, annotated: int, seed: int) -> list[int]:
    """All pairs, or so many of them, drawn by the seed."""
    if annotated > len(keypoints):
        raise ValueError(f"--annotated {annotated}: {keypoints.name} has {len(keypoints)} pairs")
    order = np.random.default_rng(seed).permutation(len(keypoints)).tolist()
    return sorted(order[:annotated]) if annotated else list(range(len(keypoints)))


class Sets(NamedTuple):
    """What a phase trains on and what chooses its best weights."""

    train: data.KeypointSet
    numbers: list[int]  # the pairs of it that are used
    val: data.KeypointSet


def load_sets(cfg: FinetuneConfig, phase: str) -> Sets:
    """The label set of "pretrain", the benchmark of "finetune"."""
    name, root = ("labels", cfg.pretrain) if phase == "pretrain" else (cfg.dataset, cfg.root)
    train, val = (DATASETS[name](root, split) for split in ("train" if name == "shapes" else "trn", "val"))
    return Sets(train, chosen_pairs(train, cfg.annotated if phase == "finetune" else 0, cfg.seed), val)


def run_phase(
    cfg: FinetuneConfig, phase: str, sets: Sets, matcher: Cats, device: torch.device, state: dict | None
) -> bool:
    """Train on the labels ("pretrain") or the keypoints ("finetune"), from `state` if that is a checkpoint of this
    phase; leaves the best weights in the matcher and in OUT/phase/best.pt. Returns False if it was stopped."""
    rank, world = processes()
    keypoints, numbers, val = sets
    semi = cfg.semi and phase == "finetune"
    own = dataclasses.replace(cfg, semi=semi)  # what the views and losses of this phase are
    per_epoch = cfg.epoch_steps or max(1, len(numbers) // (cfg.batch * cfg.accumulate * world))
    steps = per_epoch * (cfg.epochs if phase == "finetune" else cfg.pretrain_epochs)
    optimizer, start, best = build_optimizer(matcher, cfg), 0, -1.0
    if state:
        matcher.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, best = state["step"], state["best"]

    views = KeypointViews(keypoints, numbers, own, matcher.backbone.patch)
    stream = data.PairStream(views, cfg.batch, cfg.seed, start * cfg.accumulate * world, rank, world)
    cuda, folder, skipped, journal = device.type == "cuda", Path(cfg.out, phase), set(), None
    cache, measured = ({}, {}) if cfg.cache_features else (None, None)  # features of training and validation images
    loader = iter(
        DataLoader(views, batch_sampler=stream, num_workers=cfg.workers, pin_memory=cuda, worker_init_fn=leave_signals)
    )

    def save(file: str, step: int) -> None:
        content = {"program": "finetune.py", "model": matcher.state_dict(), "config": dataclasses.asdict(cfg)}
        content |= {"phase": phase, "step": step, "best": best}
        if file == "last.pt":
            content["optimizer"] = optimizer.state_dict()
        write_checkpoint(folder / file, content)

    def measure(step: int) -> None:
        nonlocal best
        found, _ = journal.measure(step, matcher, val, ("cats",), measured)
        if found["cats"][1] > best:
            best = found["cats"][1]
            save("best.pt", step)

    def loss_of() -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(loader)
        skipped.update(line for item in batch.pop("skipped") for line in item.splitlines())
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda and cfg.amp):
            return batch_loss(matcher, batch, own, cache)

    def after(done: int, logged: dict[str, float]) -> None:
        if rank == 0 and done % per_epoch == 0:
            measure(done)
        if rank == 0 and (done % per_epoch == 0 or (cfg.save_every and done % cfg.save_every == 0)):
            save("last.pt", done)

    if rank == 0:
        journal = Journal(folder, start)
        print(f"{phase} on {keypoints.name}: {len(numbers)} pairs, {steps} steps, best of {val.name}")
        if not start:
            measure(0)
            save("last.pt", 0)
    matcher.train()
    clock = time.perf_counter()
    rate = functools.partial(learning_rate, cfg, steps=steps)
    done, stopped = fit(cfg, optimizer, start, steps, loss_of, rate, journal, after)
    report_skipped(skipped)
    if stopped and (done < steps or phase == "pretrain"):
        if rank == 0:
            save("last.pt", done)
            print(f"stopped after step {done}; go on with --resume {folder / 'last.pt'}")
        return False
    if world > 1:
        dist.barrier()
    copy_weights(matcher, str(folder / "best.pt"))
    if rank == 0:
        seconds = time.perf_counter() - clock
        print(f"best of {val.name} at .10: {best:.1f}, checkpoint {folder / 'best.pt'}, {seconds:.0f} s")
    return True


def finetune(cfg: FinetuneConfig, resume: str | None = None) -> Cats:
    """Pre-train and fine-tune as configured; returns the matcher with the best weights of the last phase."""
    device, state = find_device(cfg.device), None
    rank, _ = start_processes(device)
    if rank == 0:
        print_header(cfg, device)
    phases = ["pretrain"] * bool(cfg.pretrain) + ["finetune"] * bool(cfg.dataset)
    if resume:
        state = read_checkpoint(resume, FinetuneConfig, "finetune.py")
        phases = phases[phases.index(state["phase"]) :]
    sets = [load_sets(cfg, phase) for phase in phases]
    torch.manual_seed(cfg.seed)  # the same initial weights in every process
    matcher = Cats(cfg, load=not (resume or cfg.checkpoint)).to(device)
    if cfg.checkpoint and not resume:
        copy_weights(matcher, cfg.checkpoint)
    for phase, pairs in zip(phases, sets):
        if not run_phase(cfg, phase, pairs, matcher, device, state):
            break
        state = None
    if dist.is_initialized():
        dist.destroy_process_group()
    return matcher.eval()


def parse_config(argv: list[str] | None) -> tuple[FinetuneConfig, str | None]:
    """Command line to configuration, and --resume's file, whose own configuration then takes the defaults' place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--preset", choices=PRESETS, help="shapes: on shapes the default; replaces some defaults below")
    parser.add_argument("--resume", help="last.pt of this run to go on from")
    add_options(parser, FinetuneConfig)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", None)
    preset = given.pop("preset", "shapes" if given.get("dataset") == "shapes" else None)
    base = dict(PRESETS[preset]) if preset else {}
    if "backbone" in given:
        base.pop("levels", None)  # they are those of the preset's backbone
    if resume:
        state = read_checkpoint(resume, FinetuneConfig, "finetune.py")
        if "optimizer" not in state:
            raise ValueError(f"{resume} cannot be gone on from: --resume takes last.pt, best.pt is for --checkpoint")
        base = state["config"]
        free = {"root", "workers", "device", "log_every", "save_every", "pretrain"}
        if changed := [name for name in given if name not in free and given[name] != base[name]]:
            raise ValueError(f"--resume goes on with the run as it was: --{changed[0].replace('_', '-')} cannot change")
    cfg = FinetuneConfig(**base | given)
    known = [name for name in DATASETS if name not in ("labels", "pfwillow")]
    if not (cfg.pretrain or cfg.dataset):
        raise ValueError(f"give --pretrain LABELS, --dataset {', '.join(known)}, or both")
    if cfg.dataset not in (None, *known):
        raise ValueError(f"--dataset {cfg.dataset}: {', '.join(known)}; --pretrain takes a label set")
    for name in ("size", "projection", "depth", "heads", "epochs", "pretrain_epochs", "batch", "accumulate"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1")
    for name in ("annotated", "epoch_steps", "backbone_lr", "save_every", "workers", "seed", "clip"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: not negative")
    for name in ("lr", "beta", "semi_gamma", "semi_temperature", "log_every"):
        if getattr(cfg, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: above 0")
    if cfg.cache_features and (cfg.augment or cfg.backbone_lr):
        raise ValueError("--cache-features needs --no-augment and --backbone-lr 0: features change otherwise")
    if cfg.schedule not in ("step", "cosine"):
        raise ValueError(f"--schedule {cfg.schedule}: step or cosine")
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?)*", cfg.milestones):
        raise ValueError(f"--milestones {cfg.milestones}: per cents joined by commas, such as 70,80,90")
    return cfg, resume


def main(argv: list[str] | None = None) -> None:
    try:
        finetune(*parse_config(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
