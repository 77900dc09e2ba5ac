"""CATs on labels, then on keypoints (paper, section 4.3), alone or with SemiMatch.

    python -m experiments.finetune --pretrain labels --dataset shapes --annotated 20    # label.py's, 20 pairs
    python -m experiments.finetune --pretrain labels --dataset spair --out runs/spair
    python -m experiments.finetune --dataset spair --checkpoint runs/spair/pretrain/best.pt --semi
    torchrun --nproc_per_node=4 -m experiments.finetune --pretrain labels --dataset spair --batch 8

A label set and a benchmark's training split are both pairs with points, and one loop trains on either: first
OUT/pretrain, then, from its best weights with a fresh optimiser, OUT/finetune. After every epoch the
validation split is scored; best.pt holds the best of its scores at alpha 0.10, last.pt what --resume goes on
from. Test pairs are never read here.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import data
from experiments import semimatch
from experiments.cache import remembered
from experiments.cats import GRID, Cats, CatsConfig, end_point_error, flow_of, flow_target
from modules import Features
from support import run
from support.benchmarks import DATASETS
from support.files import read_checkpoint, write_whole
from support.options import add_options, check_ranges
from train import measure

PROGRAM = "experiments.finetune"
KeypointSource = Literal["none", "shapes", "pfpascal", "spair", "spair-small"]
WEIGHT_DECAY = 0.05  # CATs
MILESTONES = (70, 80, 90)  # per cent of the training where the rate is halved; CATs: epochs 70, 80, 90 of 100


@dataclass
class FinetuneConfig(semimatch.SemiConfig, CatsConfig):
    """A run; the defaults are CATs' own on SPair-71k."""

    # group: data
    pretrain: str | None = None  # label set to train on first: of label.py, or any SC-ImageNet
    dataset: KeypointSource = "none"  # benchmark whose keypoints are trained on then
    root: str | None = None  # folder of the data set
    annotated: int = 0  # train on so many of its pairs, drawn by the seed; 0: all
    augment: bool = True  # photometric changes and random crops; SemiMatch's strong view has its own

    # group: optimisation
    pretrain_epochs: int = 10  # on the labels; not given
    epochs: int = 100  # on the keypoints; CATs: 100
    epoch_steps: int = 0  # steps of an epoch; 0: as many as the pairs give batches
    batch: int = 32  # pairs of a micro-batch; CATs: 32, SemiMatch: 10
    accumulate: int = 1  # micro-batches a step and process
    lr: float = 3e-5  # of everything but the backbone; CATs: 3e-5
    backbone_lr: float = 3e-6  # 0: the backbone stays frozen; CATs: 3e-6
    seed: int = 2021  # of initial weights, the pairs' choice and order, and views; CATs: 2021

    # group: run
    checkpoint: str | None = None  # matcher to start from, such as OUT/pretrain/best.pt of an earlier run
    cache_features: bool = False  # a frozen backbone sees a view once; with --no-augment
    workers: int = 0  # processes that load images
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda
    out: str = "runs/cats"  # folder for checkpoints and metrics.jsonl
    save_every: int = 200  # steps; every epoch saves too

    # group: no option
    original_target: bool = False  # flow targets as in CATs' released code, see cats.py:flow_target
    log_every: int = 20  # steps


# Where runs on the built-in set start from: frozen features that were trained on photographs, a few minutes.
PRESETS = {
    "shapes": dict(
        backbone="dinov2_vits14", levels="10", size=224, backbone_lr=0.0, augment=False, cache_features=True,
        batch=4, pretrain_epochs=5, epochs=2, epoch_steps=100, seed=0, out="runs/cats_shapes"),
}


# ------------------------------------------------------------------------------------------------------------
# Views


def photometric(p: float, blur: bool = False) -> v2.Compose:
    """CATs' photometric changes, each with probability p; SemiMatch's strong view blurs, not sharpens.

    Their ranges are those of albumentations, which CATs uses; Sharpen is torchvision's, of factor 1.5 instead
    of a drawn one, and Blur a Gaussian.
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
    """Pairs with points as training sees them. Keys are (epoch, pair, place in the epoch), so that everything
    random follows from the key and the seed: the order of work, workers and resumption change nothing."""

    def __init__(self, keypoints: data.KeypointSet, numbers: list[int], cfg: FinetuneConfig, patch: int):
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
        item |= {"flow": flow, "valid": valid}
        if cfg.semi:
            pixel = cfg.size / GRID
            kps, edges = (trg_kps + 0.5) * pixel - 0.5, ((trg_box + 0.5) * pixel).tolist()
            strong = self.view(trg, trg_crop, self.strong)
            strong = semimatch.key_out(strong, kps, tuple(edges), cfg.semi_keyout, rng)
            affine, offsets = semimatch.draw_warp(rng, cfg.semi_tps)
            item |= {"plain": self.view(trg, trg_crop, None), "strong": strong}
            item |= {"affine": affine, "offsets": offsets, "src_box": src_box, "trg_box": trg_box}
        return item

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        """What is at the key's pair or, if that cannot be read, at the next; `skipped` names the file."""
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


# ------------------------------------------------------------------------------------------------------------
# Losses


class CachedCats(Cats):
    """CATs whose frozen backbone sees a view once; the features of all views stay in memory."""

    def __init__(self, cfg: FinetuneConfig, load: bool = True) -> None:
        super().__init__(cfg, load)
        self.known: dict[bytes, Features] = {}

    def features(self, images: Tensor) -> Features:
        return remembered(self.known, super().features, next(self.parameters()).device, images)


def batch_loss(matcher: Cats, batch: dict, cfg: FinetuneConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a micro-batch, and what is logged: CATs' end-point error, and with --semi SemiMatch's loss."""
    size, grid = len(batch["src"]), (GRID, GRID)
    both = matcher.features(torch.cat([batch["src"], batch["trg"]]))
    src, weak = both.map(lambda x: x[:size]), both.map(lambda x: x[size:])
    supervised = end_point_error(flow_of(matcher(src, weak), cfg.beta), batch["flow"], batch["valid"])
    if not cfg.semi:
        return supervised, {}
    with torch.no_grad():
        plain = matcher.features(batch["plain"]) if cfg.augment else weak
        boxes = batch["src_box"], batch["trg_box"]
        corr = matcher(src, plain)
        pseudo = semimatch.pseudo_labels(corr, grid, grid, batch["affine"], batch["offsets"], *boxes, cfg)
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
    return cfg.lr * 0.5 ** sum(step >= steps * percent / 100 for percent in MILESTONES)


# ------------------------------------------------------------------------------------------------------------
# Training


def load_matcher(path: str, device: torch.device | str = "cpu") -> Cats:
    """The matcher of a checkpoint, in eval mode; the file holds the backbone's weights too."""
    state = read_checkpoint(path, FinetuneConfig, PROGRAM)
    matcher = Cats(FinetuneConfig(**state["config"]), load=False)
    matcher.load_state_dict(state["model"])
    return matcher.to(device).eval()


def copy_weights(matcher: Cats, path: str) -> None:
    """Start from another run's matcher; ValueError in one line if it is built otherwise."""
    try:
        matcher.load_state_dict(read_checkpoint(path, FinetuneConfig, PROGRAM)["model"])
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit --backbone or --levels: {wrong}") from None


def chosen_pairs(keypoints: data.KeypointSet, annotated: int, seed: int) -> list[int]:
    """All pairs, or so many of them, drawn by the seed."""
    if annotated > len(keypoints):
        raise ValueError(f"--annotated {annotated}: {keypoints.name} has {len(keypoints)} pairs")
    order = np.random.default_rng(seed).permutation(len(keypoints)).tolist()
    return sorted(order[:annotated]) if annotated else list(range(len(keypoints)))


class Phase(NamedTuple):
    """What is trained on, for how long, and what chooses the best weights."""

    name: str  # "pretrain" on the label set, "finetune" on the benchmark
    train: data.KeypointSet
    numbers: list[int]  # the pairs of it that are used
    val: data.KeypointSet
    epoch: int  # steps of an epoch
    steps: int  # of the phase


def load_phase(cfg: FinetuneConfig, name: str) -> Phase:
    """The sets of a phase and its length; ValueError if the data are not there or too few."""
    labels = name == "pretrain"
    dataset, root = ("labels", cfg.pretrain) if labels else (cfg.dataset, cfg.root)
    split = "train" if dataset == "shapes" else "trn"
    train, val = DATASETS[dataset](root, split), DATASETS[dataset](root, "val")
    numbers = chosen_pairs(train, 0 if labels else cfg.annotated, cfg.seed)
    epoch = cfg.epoch_steps or max(1, len(numbers) // (cfg.batch * cfg.accumulate * run.processes()[1]))
    return Phase(name, train, numbers, val, epoch, epoch * (cfg.pretrain_epochs if labels else cfg.epochs))


def batches(
    cfg: FinetuneConfig, phase: Phase, patch: int, start: int, device: torch.device
) -> Iterator[dict]:
    """The endless micro-batches of this process, from the one that step `start` begins with."""
    rank, world = run.processes()
    views = KeypointViews(phase.train, phase.numbers, cfg, patch)
    stream = data.PairStream(views, cfg.batch, cfg.seed, start * cfg.accumulate * world, rank, world)
    return iter(DataLoader(views, batch_sampler=stream, num_workers=cfg.workers,
                           pin_memory=device.type == "cuda", worker_init_fn=run.leave_signals))


def save(path: Path, matcher: Cats, phase: Phase, step: int, best: float,
         optimizer: torch.optim.Optimizer | None = None) -> None:
    """A checkpoint: best.pt or, with the optimiser, last.pt. best: the highest score so far."""
    content = {"program": PROGRAM, "model": matcher.state_dict(), "config": dataclasses.asdict(matcher.cfg)}
    content |= {"phase": phase.name, "step": step, "best": best}
    write_whole(path, content | ({"optimizer": optimizer.state_dict()} if optimizer else {}))


def keep_best(folder: Path, matcher: Cats, phase: Phase, step: int, best: float) -> float:
    """Score the validation pairs; best.pt if PCK at 0.10 is above the best so far. Returns the best."""
    found, _ = measure(folder / "metrics.jsonl", step, matcher, phase.val, ("cats",))
    if found["cats"][1] > best:
        best = found["cats"][1]
        save(folder / "best.pt", matcher, phase, step, best)
    return best


def prepare_phase(matcher: Cats, state: dict | None) -> tuple[torch.optim.Optimizer, int, float]:
    """Weights and optimiser as a phase starts or goes on with them; returns optimiser, step, best score."""
    optimizer = build_optimizer(matcher, matcher.cfg)
    if not state:
        return optimizer, 0, -1.0
    matcher.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return optimizer, state["step"], state["best"]


def run_phase(phase: Phase, matcher: Cats, device: torch.device, state: dict | None) -> bool:
    """Train on a phase's pairs, from `state` if that is a checkpoint of it; OUT/phase/best.pt is its outcome.

    Returns False if it was stopped. Raises ValueError when the loss is no longer finite.
    """
    cfg, steps, chief = matcher.cfg, phase.steps, run.processes()[0] == 0
    own = dataclasses.replace(cfg, semi=cfg.semi and phase.name == "finetune")
    optimizer, start, best = prepare_phase(matcher, state)
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
            logged: dict[str, float] = {}
            for _ in range(cfg.accumulate):
                batch = next(loader)
                skipped.update(line for item in batch.pop("skipped") for line in item.splitlines())
                batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss, parts = batch_loss(matcher, batch, own)
                (loss / cfg.accumulate).backward()
                for key, value in (parts | {"loss": loss}).items():
                    logged[key] = logged.get(key, 0.0) + value.item() / cfg.accumulate

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
            if chief and (done % phase.epoch == 0 or (cfg.save_every and done % cfg.save_every == 0)):
                save(last, matcher, phase, done, best, optimizer)
            if stopped := run.any_process(bool(stop), device):
                break

    run.report_skipped(skipped)
    stopped = stopped and (done < steps or phase.name == "pretrain")  # the last step of all ends the run
    if chief and stopped:
        save(last, matcher, phase, done, best, optimizer)
        print(f"stopped after step {done}; go on with --resume {last}")
    elif chief:
        print(f"best of {phase.val.name} at .10: {best:.1f}, checkpoint {folder / 'best.pt'},"
              f" {time.perf_counter() - clock:.0f} s")
    return not stopped


def finetune(cfg: FinetuneConfig, resume: str | None = None) -> Cats:
    """Pre-train and fine-tune as configured; returns the matcher with the best weights of the last phase."""
    device, state = run.find_device(cfg.device), None
    rank, world = run.start_processes(device)
    if rank == 0:
        run.print_header(cfg, device)
    names = ["pretrain"] * bool(cfg.pretrain) + ["finetune"] * (cfg.dataset != "none")
    if resume:
        state = read_checkpoint(resume, FinetuneConfig, PROGRAM)
        names = names[names.index(state["phase"]) :]
    phases = [load_phase(cfg, name) for name in names]
    torch.manual_seed(cfg.seed)  # the same initial weights in every process
    kind = CachedCats if cfg.cache_features else Cats
    matcher = kind(cfg, load=not (resume or cfg.checkpoint)).to(device)
    if cfg.checkpoint and not resume:
        copy_weights(matcher, cfg.checkpoint)
    for phase in phases:
        if not run_phase(phase, matcher, device, state):
            break
        if world > 1:
            dist.barrier()  # the first process has written best.pt
        copy_weights(matcher, str(Path(cfg.out, phase.name, "best.pt")))
        state = None
    if world > 1:
        dist.destroy_process_group()
    return matcher.eval()


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
        base = state["config"]
    elif "backbone" in early:
        base.pop("levels", None)  # they are those of the preset's backbone
    shown = FinetuneConfig(**base)

    parser = argparse.ArgumentParser(
        f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="replaces some defaults below; of shapes, its own")
    parser.add_argument("--resume", metavar="FILE", help="last.pt of the run to go on with")
    add_options(parser, FinetuneConfig, shown)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if k not in ("preset", "resume")}
    free = ("root", "workers", "device", "save_every", "pretrain")
    if resume and (changed := [name for name in given if name not in free and given[name] != base[name]]):
        flag = changed[0].replace("_", "-")
        raise ValueError(f"--resume goes on with the run as it was: --{flag} cannot change")
    cfg = dataclasses.replace(shown, **given)
    check(cfg)
    return cfg, resume


def check(cfg: FinetuneConfig) -> None:
    """ValueError, in one line, for options that cannot be."""
    if not cfg.pretrain and cfg.dataset == "none":
        known = ", ".join(get_args(KeypointSource)[1:])
        raise ValueError(f"give --pretrain LABELS, --dataset {known}, or both")
    at_least_1 = "size epochs pretrain_epochs batch accumulate"
    not_negative = "annotated epoch_steps backbone_lr save_every workers seed"
    check_ranges(cfg, {name: (1, math.inf) for name in at_least_1.split()}
                 | {name: (0, math.inf) for name in not_negative.split()})
    if cfg.lr <= 0:
        raise ValueError(f"--lr {cfg.lr}: above 0")
    if cfg.cache_features and (cfg.augment or cfg.backbone_lr):
        raise ValueError("--cache-features needs --no-augment and --backbone-lr 0: features change otherwise")


def main(argv: list[str] | None = None) -> None:
    try:
        finetune(*parse_config(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
