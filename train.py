"""The cascade and its training loop (paper, sections 3.3 and 4.1).

L_all = lambda_1 L_I + lambda_2 L_R + lambda_3 L_P (Eq. 3), from class labels only, on the CPU, one GPU, or several:

    python train.py                                                     # built-in shapes, nothing to download
    python train.py --dataset folder --root DIR --backbone dinov2_vits14 --size 448
    torchrun --nproc_per_node=8 train.py --preset paper --root ILSVRC2012/train --saliency MAPS

Everything random follows from the seed and the position in the sequence of micro-batches: w processes that see one
micro-batch each give the gradients of one process that accumulates w, and a resumed run repeats an uninterrupted one.
"""

import argparse
import dataclasses
import datetime
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from evaluate import ALPHAS, DATASETS, match_sheet, predict, processes, score
from image_stage import ImageConfig, ImageStage
from modules import (
    BACKBONES,
    Conditioning,
    Features,
    Pairs,
    cosine_volume,
    hough_matching,
    load_backbone,
    neighbourhood_consensus,
    transfer_keypoints,
)
from pixel_stage import PixelConfig, PixelStage
from region_stage import RegionConfig, RegionStage

BACKBONE_METHODS = ("nn", "hough", "consensus")
STAGES = ("image", "region", "pixel")


@dataclass
class Config(ImageConfig, RegionConfig, PixelConfig):
    """A run: what the stages need, the data, and the optimisation. These defaults are for photographs on a GPU."""

    dataset: str = "shapes"  # shapes, folder (ROOT/<class>/*.jpg), spair or pfpascal (weak pairs of the training split)
    root: str | None = None  # folder of the data set
    saliency: str = "auto"  # folder of <class>/<image>_sal.png; attention; none; auto: silhouettes of shapes, or none
    augment: bool = True  # random crops (35-100 % of the area) and mirroring, each image on its own
    val: str = "auto"  # PCK is measured on it: shapes, pfwillow, none; auto: shapes if trained on, else none
    val_root: str | None = None  # folder of the validation set
    backbone: str = "ibot_vitb16"  # see modules.py; paper: ibot_vitb16
    weights: str | None = None  # local checkpoint of the backbone; none: downloaded on first use
    layer: str = "-1"  # block that is read, from 0, negative from the end; or several, side by side: 9,10
    axes: int = 0  # half-whitened principal axes that the features are projected on; 0: as they are; not given
    size: int = 512  # input side in pixels; paper: 512
    stages: int = 3  # 2: without the pixel stage (Table 5, V); 1: without the region stage too (VI)
    shared_attention: bool = False  # gated blocks shared by all stages (Table 4, VII)
    ablate: bool = False  # train every row of Tables 4 and 5 in turn, on the same views, and measure each on --val
    only: str | None = None  # train this stage alone; the ones before it stay as they are
    checkpoint: str | None = None  # stages to start from
    lambda_image: float = 1.0  # Eq. (3); the paper gives no weights
    lambda_region: float = 1.0  # Eq. (3)
    lambda_pixel: float = 1.0  # Eq. (3)
    steps: int = 2000  # optimiser steps
    batch: int = 4  # image pairs of a micro-batch; its negatives are rolled inside it; paper: 4 a GPU
    accumulate: int = 1  # micro-batches a step and process; paper: 8 GPUs x 4 = 32 pairs a step
    optimizer: str = "adamw"  # or sgd; paper: sgd
    lr: float = 1e-4  # paper: 3e-5
    mil_lr: float = 0.1  # learning rate of the image and region stages over that of the pixel stage; paper: 1
    momentum: float = 0.9  # of sgd; paper: 0.9
    weight_decay: float = 0.01  # not given
    schedule: str = "cosine"  # or constant; not given
    warmup: int = 20  # steps of linear warm-up
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 0  # of initial weights, pairing and crops
    workers: int = 0  # processes that load images
    cache_features: bool = False  # keep frozen features (images are still read); only without augmentation
    amp: bool = True  # bfloat16 around the network, on GPUs only
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda
    out: str = "runs/train"  # folder for checkpoints, metrics.jsonl, pictures
    log_every: int = 20  # steps
    val_every: int = 200  # steps between measurements on --val; 0: only before and after training
    save_every: int = 200  # steps; 0: only at the end

    @property
    def final_stage(self) -> str:
        return STAGES[self.stages - 1]


# `quick` is what a bare `python train.py` runs; with another --dataset the defaults above hold unless one is named.
PRESETS = {
    "quick": dict(
        augment=False,  # shapes vary by themselves
        backbone="random_vit8",
        size=128,
        ffn_ratio=2.0,
        volume_window=2,
        candidates=16,
        temperature=0.1,
        steps=200,
        batch=6,
        lr=2e-3,
        out="runs/quick",
        val_every=100,
    ),
    # The run of the table on PF-WILLOW: half an hour on one CPU core.
    "photos": dict(
        dataset="folder",
        backbone="dinov2_vits14",
        layer="9,10",
        axes=256,
        size=224,
        volume_window=2,
        mil_ffn=False,
        saliency_threshold=0.2,
        loop_radius=1.5,
        hough=False,  # its votes and the consensus say the same: what it selects teaches nothing new
        consensus=5,
        frozen_share=0.5,
        steps=600,
        batch=6,
        lr=2e-4,
        mil_lr=0.01,
        out="runs/photos",
    ),
    "paper": dict(
        dataset="folder",
        optimizer="sgd",
        lr=3e-5,
        mil_lr=1.0,
        weight_decay=0.0,
        schedule="constant",
        warmup=0,
        clip=0.0,
        steps=20_000,
        workers=4,
        out="runs/paper",
        save_every=1000,
    ),
}

# Tables 4 and 5: what changes against the full cascade, and where its row is read. Without saliency every cell is
# foreground. No gradient of a stage reaches the stage before it, so that (V) and (VI) stand in the full run, up to the
# gradient norm that all stages are clipped by together.
ABLATIONS = {
    "full": ({}, "pixel"),
    "ours, without consensus": ({"consensus": 0}, "pixel"),
    "4 (II) without saliency": ({"saliency_threshold": 0.0}, "pixel"),
    "4 (III) without Hough matching": ({"hough": False}, "pixel"),
    "4 (IV) L = 3": ({"hough_side": 3}, "pixel"),
    "4 (VI) L = 7": ({"hough_side": 7}, "pixel"),
    "4 (VII) shared attention": ({"shared_attention": True}, "pixel"),
    "5 (II) half the size": ({"size": 1 / 2}, "pixel"),
    "5 (III) three quarters of the size": ({"size": 3 / 4}, "pixel"),
    "5 (V) without stage 3": ({}, "region"),
    "5 (VI) without stages 2 and 3": ({}, "image"),
}

# ----------------------------------------------------------------------------------------------------------------------
# The cascade


class Cascade(nn.Module):
    """Frozen backbone -> image stage -> region stage -> pixel stage."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.stages not in (1, 2, 3):
            raise ValueError(f"--stages {cfg.stages}: 1, 2 or 3")
        self.cfg = cfg
        self.backbone = load_backbone(cfg.backbone, cfg.weights, cfg.layer)
        self.conditioning = Conditioning(self.backbone.dim, cfg.axes) if cfg.axes else None
        dim = cfg.axes or self.backbone.dim
        self.image = ImageStage(dim, cfg)
        self.region = RegionStage(dim, cfg) if cfg.stages >= 2 else None
        self.pixel = PixelStage(dim, cfg) if cfg.stages >= 3 else None
        if cfg.shared_attention:
            for stage in (self.region, self.pixel):
                if stage is not None:
                    stage.mvam.gated = self.image.mvam.gated

    def features(self, images: Tensor, saliency: Tensor | None = None) -> Features:
        """Images (B, 3, H, W) and maps (B, h, w) or None to Features: the backbone's one run an image."""
        device = next(self.backbone.parameters()).device
        images = images.to(device, non_blocking=True)
        if saliency is None and self.cfg.saliency == "attention":
            feat, token, saliency = self.backbone(images, attention=True)
        else:
            feat, token = self.backbone(images)
        if self.conditioning is not None:
            feat, token = self.conditioning(feat), self.conditioning(token)
        if saliency is None:
            h, w = (side // self.backbone.patch for side in images.shape[-2:])
            saliency = feat.new_ones(len(images), h, w)
        return Features(feat, token, saliency.to(device, torch.float32))

    def forward(self, src: Features, trg: Features, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One micro-batch of same-class pairs to the losses of its stages and to counts for the log."""
        cfg, losses, counts = self.cfg, {}, {}
        train = {stage: cfg.only in (None, stage) for stage in STAGES}
        with torch.set_grad_enabled(train["image"]):
            corr = self.image(src, trg)
            if train["image"]:
                losses["image"] = self.image.loss(corr, src, trg, labels)
        if cfg.stages >= 2 and cfg.only != "image":
            suspected = self.image.select(corr, src, trg)
            regions = self.image.regions(suspected, src, trg)
            with torch.set_grad_enabled(train["region"]):
                region_corr = self.region(regions.src, regions.trg)
                if train["region"]:
                    losses["region"] = self.region.loss(region_corr, regions, labels)
        if cfg.stages >= 3 and train["pixel"]:
            chosen = self.region.select(region_corr, regions, src.grid, trg.grid)
            losses["pixel"] = self.pixel.loss(self.pixel(src, trg), chosen)
            counts["pairs"] = chosen.valid.float().sum(1).mean()
        return losses, counts

    def volume(self, src: Features, trg: Features, method: str | None = None) -> Tensor:
        """The volume (B, Hs, Ws, Ht, Wt) of a stage, or of the frozen features: "nn" nearest neighbour, "hough"
        matching, "consensus" of neighbours (5x5 where the pixel stage has none)."""
        method = method or self.cfg.final_stage
        if method in BACKBONE_METHODS:
            corr = cosine_volume(src.feat, trg.feat, src.grid, trg.grid)
            if method == "hough":
                corr = hough_matching(corr, side=self.cfg.hough_side, exponent=self.cfg.hough_exponent)
            if method == "consensus":
                corr = neighbourhood_consensus(corr, self.cfg.consensus or 5)
            return corr
        if method == "region":
            raise ValueError("the region stage has no volume of whole images")
        return getattr(self, method)(src, trg)

    @torch.no_grad()
    def transfer(self, src: Features, trg: Features, points: Tensor, method: str | None = None) -> Tensor:
        """Source to target: points (B, n, 2) as (x, y) in source cells to target cells.

        The region stage (Table 5, V) refines the image stage's match inside the 5x5 windows around it.
        """
        method = method or self.cfg.final_stage
        if method != "region":
            return transfer_keypoints(self.volume(src, trg, method), points)
        coarse = transfer_keypoints(self.volume(src, trg, "image"), points)
        ends = []
        for xy, (h, w) in ((points, src.grid), (coarse, trg.grid)):
            x, y = xy[..., 0].round().long().clamp(0, w - 1), xy[..., 1].round().long().clamp(0, h - 1)
            ends.append(y * w + x)
        valid = torch.ones_like(ends[0], dtype=torch.bool)
        regions = self.image.regions(Pairs(*ends, coarse[..., 0], valid), src, trg)
        return self.region.refine(self.region(regions.src, regions.trg), points, regions)

    def trained_state(self) -> dict[str, Tensor]:
        """State of everything but the frozen backbone."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}


def _fingerprint(module: nn.Module) -> float:
    """A number that tells one set of weights from another."""
    return float(sum(p.double().abs().sum() for p in module.parameters()))


def read_state(path: str) -> dict:
    """What a checkpoint of this project holds; ValueError in one line if the file is missing or something else.

    Its "program" wrote it: train.py, or finetune.py.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no such checkpoint: {path}") from None
    except Exception as error:  # a damaged or foreign file fails in many ways
        reason = "not a file of torch.save" if "weights_only" in str(error) else str(error).partition("\n")[0]
        raise ValueError(f"cannot read checkpoint {path} ({reason or type(error).__name__})") from None
    if not isinstance(state, dict) or not {"model", "config"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint written by train.py or finetune.py")
    return {"program": "train.py"} | state


def read_checkpoint(path: str, cls: type = Config, program: str = "train.py") -> dict:
    """A checkpoint that one program wrote, with that program's configuration class."""
    state = read_state(path)
    if state["program"] != program:
        raise ValueError(f"{path} is a checkpoint of {state['program']}, not of {program}")
    if unknown := state["config"].keys() - {field.name for field in dataclasses.fields(cls)}:
        raise ValueError(f"{path} was written by another version of {program}: it has an option {min(unknown)}")
    return state


def load_stages(cascade: Cascade, state: dict, path: str, stages: tuple[str, ...]) -> None:
    """Load the named stages, and the conditioning, strictly; refuses weights that were trained on another backbone."""
    found = _fingerprint(cascade.backbone)
    if not math.isclose(found, state["backbone"], rel_tol=1e-7):
        given = cascade.cfg.weights or cascade.cfg.backbone
        raise ValueError(f"{path} was trained on other backbone weights than {given}")
    for stage in ("conditioning",) * (cascade.conditioning is not None) + stages:
        part = {k.removeprefix(f"{stage}."): v for k, v in state["model"].items() if k.startswith(f"{stage}.")}
        try:
            getattr(cascade, stage).load_state_dict(part)
        except RuntimeError as error:
            what = stage + " stage" * (stage in STAGES)
            raise ValueError(f"{path} does not fit the {what}: {str(error).splitlines()[1].strip()}") from None


def load_cascade(path: str, weights: str | None = None, device: str = "cpu", **overrides) -> Cascade:
    """The trained cascade of a checkpoint, in eval mode. weights: the backbone's file, if not where it was."""
    state = read_checkpoint(path)
    cfg = Config(**state["config"] | ({"weights": weights} if weights else {}) | overrides)
    cascade = Cascade(cfg)
    load_stages(cascade, state, path, STAGES[: cfg.stages])
    return cascade.to(device).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Options, data


def option_help(cls: type) -> dict[str, str]:
    """Help of every option: the comment behind its field."""
    lines = "\n".join(inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c))
    return dict(re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", lines, re.MULTILINE))


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """One option for every field of a configuration."""
    help_of = option_help(cls)
    for field in dataclasses.fields(cls):
        flag, text = f"--{field.name.replace('_', '-')}", help_of.get(field.name, "").replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=f"{text} (default {field.default})")
        else:
            kind = str if field.type == str | None else field.type
            parser.add_argument(flag, type=kind, help=f"{text} (default {field.default})")


def parse_config(argv: list[str] | None, only: str | None) -> tuple[Config, str | None]:
    """Command line to configuration: the preset, over it the single options. Returns it and --resume's file.

    On --resume the checkpoint's own configuration takes the preset's place.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    preset_help = (
        "paper: section 4.1; photos: class folders on a CPU; quick: on shapes the default. Each replaces some defaults"
    )
    parser.add_argument("--preset", choices=PRESETS, help=preset_help)
    parser.add_argument("--resume", help="checkpoint of this run to go on from")
    add_options(parser, Config)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", None)
    preset = given.pop("preset", "quick" if given.get("dataset", "shapes") == "shapes" else None)
    base = PRESETS[preset] if preset else {}
    if resume:
        base = read_checkpoint(resume)["config"]
    elif only:
        base = base | {"only": only, "out": f"runs/{only}"}
    cfg = Config(**base | given)
    fixed = ("optimizer", "mil_lr", "weight_decay", "momentum", "only", "stages", "shared_attention")
    given |= {"only": only} if only else {}
    if resume and (changed := [name for name in fixed if name in given and given[name] != base[name]]):
        raise ValueError(f"--resume goes on with the run as it was: --{changed[0].replace('_', '-')} cannot change")
    positive = "volume_window volume_patch region_size candidates pairs accumulate log_every heads volume_heads"
    for name in positive.split():
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1")
    for name in ("seed", "warmup", "steps", "layers", "volume_depth", "ffn_ratio", "workers", "clip"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: not negative")
    if cfg.only and cfg.shared_attention:
        raise ValueError("--shared-attention ties the stages together; it cannot be combined with --only")
    if cfg.only not in (None, *STAGES):
        raise ValueError(f"--only {cfg.only}: image, region or pixel")
    if cfg.only:
        cfg.stages = max(cfg.stages, 1 + STAGES.index(cfg.only)) if "stages" in given else 1 + STAGES.index(cfg.only)
    if cfg.batch < 2 and cfg.only != "pixel":
        raise ValueError(f"--batch {cfg.batch}: Eq. (2) rolls the batch for its negatives and needs at least 2 pairs")
    if cfg.cache_features and cfg.augment:
        raise ValueError("--cache-features needs --no-augment: cropped views change every epoch")
    for name, known in (("optimizer", ("adamw", "sgd")), ("schedule", ("cosine", "constant"))):
        if getattr(cfg, name) not in known:
            raise ValueError(f"--{name} {getattr(cfg, name)}: {' or '.join(known)}")
    return cfg, resume


def training_set(cfg: Config) -> data.ImageSet:
    """The images of --dataset with their saliency maps, if any."""
    maps = None if cfg.saliency in ("auto", "attention", "none") else cfg.saliency
    if cfg.dataset == "shapes":
        return data.Shapes("train", cfg.saliency == "auto")
    builders = {"folder": data.class_folders, "spair": data.spair_train, "pfpascal": data.pfpascal_train}
    if cfg.dataset not in builders:
        raise ValueError(f"--dataset {cfg.dataset}: shapes, {', '.join(builders)}")
    return builders[cfg.dataset](cfg.root, maps)


def keypoint_set(cfg: Config, split: str) -> data.KeypointSet | None:
    """The annotated pairs of --val; of shapes the objects of `split` ("val" or "test"), never those trained on."""
    name = cfg.val if cfg.val != "auto" else ("shapes" if cfg.dataset == "shapes" else "none")
    if name == "none":
        return None
    if name not in DATASETS:
        raise ValueError(f"--val {name}: {', '.join(DATASETS)}, none")
    return DATASETS[name](cfg.val_root, split)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then constant or half a cosine down to zero. Steps count from 0."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    if cfg.schedule == "constant":
        return cfg.lr
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


def cached_features(
    compute: Callable[..., Features],
    ids: list[int],
    views: list[Tensor | None],
    cache: dict | None,
    device: torch.device,
) -> Features:
    """compute(*views), views (B, ...) of the images `ids`; with a cache no image passes the backbone twice."""
    if cache is None:
        return compute(*views)
    for k, i in enumerate(ids):
        if i not in cache:  # alone, so that what a batch or an earlier run began with does not change the last bits
            fresh = compute(*(None if view is None else view[k : k + 1] for view in views))
            cache[i] = fresh.map(lambda x: x[0].cpu())
    return Features(*(torch.stack(x).to(device) for x in zip(*(cache[i] for i in ids))))


def batch_features(cascade: Cascade, batch: dict, cache: dict | None) -> tuple[Features, Features]:
    """Features of a micro-batch's sources and targets; an image passes the backbone once, or never again if cached."""
    ids = torch.cat(batch["index"]).tolist()  # sources, then targets
    images = torch.cat([batch["src_img"], batch["trg_img"]])
    saliency = torch.cat([batch["src_sal"], batch["trg_sal"]])
    views = [images, saliency if saliency.numel() else None]
    both = cached_features(cascade.features, ids, views, cache, next(cascade.parameters()).device)
    half = len(ids) // 2
    return both.map(lambda x: x[:half]), both.map(lambda x: x[half:])


@torch.no_grad()
def fit_conditioning(cascade: Cascade, images: data.ImageSet, count: int = 256) -> None:
    """Find the principal axes of the cells of up to `count` training images, evenly spaced and whole.

    Unreadable ones are passed over. Nothing is random, so that every process finds the same.
    """
    cells, size, patch, skipped = [], cascade.cfg.size, cascade.backbone.patch, []
    device = next(cascade.parameters()).device
    for index in range(0, len(images), max(1, len(images) // count)):
        try:
            view, _ = data.prepare(images.load(index)[0], None, size, patch)
        except ValueError as error:  # training meets the file again, and reports it
            skipped.append(str(error))
            continue
        cells.append(cascade.backbone(view[None].to(device))[0][0])
    if not cells:
        raise ValueError(f"no training image can be read; the first: {skipped[0]}")
    cascade.conditioning.fit(torch.cat(cells))


def write_checkpoint(path: Path, state: dict) -> None:
    """Plain types and tensors, written beside the target and renamed, so that a kill leaves the old file or the new."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def save_checkpoint(path: Path, cascade: Cascade, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Everything that a resumed run needs."""
    state = {
        "program": "train.py",
        "model": cascade.trained_state(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": dataclasses.asdict(cascade.cfg),
        "backbone": _fingerprint(cascade.backbone),
    }
    write_checkpoint(path, state)


def commit_of_source() -> str:
    """The commit of this checkout, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def find_device(name: str) -> torch.device:
    """--device to a device that works; "auto" and "cuda" mean this process's own GPU. ValueError if there is none."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def leave_signals(worker: int) -> None:
    """Ctrl-C reaches the loaders too: they live on, so that the training process can finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def build_optimizer(cascade: Cascade) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: the image and region stage at `mil_lr` times the rate of the pixel stage and of
    blocks that it shares with them.

    AdamW's steps do not depend on the scale of a loss, so the weights of Eq. (3) cannot slow a stage down; this can.
    """
    cfg = cascade.cfg
    trained = [(name, p) for name, p in cascade.named_parameters() if p.requires_grad]

    def fast(name: str) -> bool:
        return name.startswith("pixel.") or (cfg.shared_attention and ".gated." in name)

    groups = [
        {"params": [p for name, p in trained if fast(name) == pixel], "scale": scale}
        for pixel, scale in ((False, cfg.mil_lr), (True, 1.0))
    ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay)


def average_over_processes(params: list[nn.Parameter], logged: dict[str, float]) -> dict[str, float]:
    """Replace gradients by their mean over all processes, in one message; returns the mean of what is logged."""
    values = torch.tensor(list(logged.values()), device=params[0].device)
    flat = torch.cat([p.grad.flatten() for p in params] + [values])
    dist.all_reduce(flat)
    *grads, values = (flat / dist.get_world_size()).split([p.numel() for p in params] + [len(values)])
    for p, grad in zip(params, grads):
        p.grad.copy_(grad.view_as(p))
    return dict(zip(logged, values.tolist()))


class Journal:
    """metrics.jsonl and the lines on the terminal, of one process. A resumed run's file is cut back to its start."""

    def __init__(self, out: Path, start: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        kept = []
        for line in self.path.read_text().splitlines() if start and self.path.exists() else []:
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except ValueError:  # a kill may cut the last line short
                break
        self.path.write_text("".join(line + "\n" for line in kept))

    def record(self, step: int, values: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def measure(
        self, step: int, matcher, keypoints: data.KeypointSet, methods: tuple[str, ...], cache: dict | None = None
    ) -> tuple[dict[str, list[float]], dict[str, list[Tensor]]]:
        """PCK of the given methods, printed and recorded; returns it by method, and the predictions.

        cache: features of this set's images from one measurement to the next, of a frozen backbone.
        """
        mode = matcher.training
        matcher.eval()
        predictions = predict(matcher, keypoints, methods, quiet=True, cache=cache)
        matcher.train(mode)
        found = {
            m: score(p, keypoints, rule=keypoints.rule)[keypoints.rule]["per_image"] for m, p in predictions.items()
        }
        self.record(step, {"pck": found, "alphas": ALPHAS, "on": keypoints.name})
        protocol = f"{keypoints.name}, {len(keypoints)} pairs, {keypoints.rule}, per image"
        tqdm.write(f"step {step}: PCK@{'/'.join(map(str, ALPHAS))} on {protocol}")
        for method, values in found.items():
            tqdm.write(f"    {method:9s}" + "".join(f"{v:7.1f}" for v in values))
        return found, predictions


def start_processes(device: torch.device) -> tuple[int, int]:
    """This process's rank and how many there are; connects them if there are several."""
    rank, world = processes()
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # One process measures PCK while the others wait.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world


def print_header(cfg, device: torch.device) -> None:
    """Versions, device, commit and every option."""
    print(f"torch {torch.__version__}, {device}, {processes()[1]} process(es), commit {commit_of_source()}")
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))


def report_skipped(skipped: set[str]) -> None:
    """Name what any process passed over; every process has to call this."""
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, skipped)
        skipped = set().union(*gathered)
    if skipped and not processes()[0]:
        print(f"{len(skipped)} unreadable files passed over: {'; '.join(sorted(skipped)[:5])}", file=sys.stderr)


def fit(
    cfg,
    optimizer: torch.optim.Optimizer,
    start: int,
    steps: int,
    loss_of: Callable[[], tuple[Tensor, dict[str, Tensor]]],
    rate: Callable[[int], float],
    journal: Journal | None,
    after: Callable[[int, dict[str, float]], None],
) -> tuple[int, bool]:
    """The one training loop, from step `start` to `steps`; returns the step it came to and if Ctrl-C stopped it.

    cfg: accumulate, clip, log_every. loss_of: loss of the next micro-batch, and what is logged. rate: the learning rate
    of a step, which every group of the optimiser takes times its "scale". journal: of the process that writes one.
    after: called after every step with its number and what was logged, to measure and save.
    Raises ValueError when the loss is no longer finite.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    chief, stop, stopped, clock, done = journal is not None, [], False, time.perf_counter(), start
    # finish the step, save, leave
    signals = {n: signal.signal(n, lambda number, frame: stop.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    for step in tqdm(range(start, steps), initial=start, total=steps, disable=not (chief and sys.stderr.isatty())):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["scale"]
        logged: dict[str, float] = {}
        for _ in range(cfg.accumulate):
            loss, parts = loss_of()
            (loss / cfg.accumulate).backward()
            for key, value in {**parts, "loss": loss}.items():
                logged[key] = logged.get(key, 0.0) + value.item() / cfg.accumulate
        if dist.is_initialized():
            logged = average_over_processes(params, logged)
        norm = float(torch.nn.utils.clip_grad_norm_(params, cfg.clip or math.inf))
        if not math.isfinite(norm + logged["loss"]):
            raise ValueError(
                f"step {step}: loss {logged} with gradient norm {norm} is not finite;"
                " what was saved before stands. Lower --lr, or set --clip"
            )
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if chief and (done % cfg.log_every == 0 or done == steps):
            speed = (done - start) / (time.perf_counter() - clock)
            journal.record(done, logged | {"lr": rate(step), "grad_norm": norm, "steps_per_s": speed})
            text = " ".join(f"{k} {v:.4f}" for k, v in logged.items())
            tqdm.write(f"step {done}/{steps} {text} lr {rate(step):.2e} {speed:.2f} steps/s")
        after(done, logged)
        halt = torch.tensor(len(stop), device=params[0].device)
        if dist.is_initialized():
            dist.all_reduce(halt)
        if stopped := bool(halt):
            break
    for number, handler in signals.items():
        signal.signal(number, handler)
    return done, stopped


def train(cfg: Config, resume: str | None = None, caches: tuple[dict, dict] | None = None) -> Cascade:
    """Train as configured; writes metrics.jsonl, last.pt and matches.png under cfg.out and returns the cascade.

    caches: features of training views and of test images, from one run to the next of the same backbone, size and seed.
    """
    device = find_device(cfg.device)
    cuda = device.type == "cuda"
    rank, world = start_processes(device)
    chief, stages, out = rank == 0, STAGES[: cfg.stages], Path(cfg.out)
    images = training_set(cfg)
    val, test = (keypoint_set(cfg, split) if chief else None for split in ("val", "test"))
    torch.manual_seed(cfg.seed)  # the same initial weights in every process
    cascade = Cascade(cfg).to(device)
    for stage in stages:
        getattr(cascade, stage).requires_grad_(cfg.only in (None, stage))
    if cfg.checkpoint and not resume:
        state = read_checkpoint(cfg.checkpoint)
        load_stages(cascade, state, cfg.checkpoint, stages[: state["config"]["stages"]])
    elif cascade.conditioning is not None and not resume:
        fit_conditioning(cascade, images)
    optimizer, start = build_optimizer(cascade), 0
    if resume:
        state = read_checkpoint(resume)
        load_stages(cascade, state, resume, stages)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    stream = data.PairStream(images, cfg.batch, cfg.seed, start * cfg.accumulate * world, rank, world)
    pairs = data.TrainPairs(images, cfg.size, cascade.backbone.patch, cfg.augment, cfg.seed)
    loader = iter(
        DataLoader(pairs, batch_sampler=stream, num_workers=cfg.workers, pin_memory=cuda, worker_init_fn=leave_signals)
    )
    cache, test_cache = caches or ({} if cfg.cache_features else None, None)
    before, journal, skipped = {}, None, set()
    if chief:
        print_header(cfg, device)
        millions = sum(p.numel() for p in cascade.parameters() if p.requires_grad) / 1e6
        print(f"{len(images)} images of {len(images.classes)} classes, {millions:.2f} M trainable parameters")
        journal = Journal(out, start)
        if test:
            _, before = journal.measure(start, cascade, test, BACKBONE_METHODS, test_cache)

    def loss_of() -> tuple[Tensor, dict[str, Tensor]]:
        batch = next(loader)
        skipped.update(line for item in batch["skipped"] for line in item.splitlines())
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda and cfg.amp):
            src, trg = batch_features(cascade, batch, cache)
            losses, counts = cascade(src, trg, batch["label"].to(device))
        # Eq. (3): L_all = lambda_1 L_I + lambda_2 L_R + lambda_3 L_P
        return sum(getattr(cfg, f"lambda_{stage}") * loss for stage, loss in losses.items()), losses | counts

    def after(done: int, logged: dict[str, float]) -> None:
        if not chief:
            return
        if logged.get("pairs") == 0 and done % cfg.log_every == 0:
            tqdm.write("no pairs were found: is the foreground of --saliency empty?", file=sys.stderr)
        if done < cfg.steps and cfg.save_every and done % cfg.save_every == 0:
            save_checkpoint(out / "last.pt", cascade, optimizer, done)
        if done < cfg.steps and val and cfg.val_every and done % cfg.val_every == 0:
            journal.measure(done, cascade, val, stages)

    clock = time.perf_counter()
    done, _ = fit(cfg, optimizer, start, cfg.steps, loss_of, lambda step: learning_rate(cfg, step), journal, after)
    seconds = time.perf_counter() - clock
    report_skipped(skipped)
    if chief:
        save_checkpoint(out / "last.pt", cascade, optimizer, done)
        if done < cfg.steps:
            print(f"stopped after step {done}; go on with --resume {out / 'last.pt'}")
        elif test:
            _, after_training = journal.measure(done, cascade, test, stages, test_cache)
            shown = {"frozen backbone": before["nn"], f"{stages[-1]} stage": after_training[stages[-1]]}
            match_sheet(shown, test).save(out / "matches.png")
            print(f"matches drawn in {out / 'matches.png'}")
        print(f"checkpoint {out / 'last.pt'}, {seconds:.0f} s of training")
    if world > 1:
        dist.destroy_process_group()
    return cascade


def measured(run: Config) -> dict | None:
    """The record of a run's PCK after its last step, if its folder holds one with these very options; else None."""
    log, last = (Path(run.out) / name for name in ("metrics.jsonl", "last.pt"))
    if not (log.exists() and last.exists()) or read_checkpoint(str(last))["config"] != dataclasses.asdict(run):
        return None
    try:
        record = json.loads(log.read_text().splitlines()[-1])
    except (IndexError, ValueError):  # a kill may leave the file empty or its last line cut short
        return None
    return record if "pck" in record and record["step"] == run.steps else None


def ablate(cfg: Config) -> None:
    """Train every row of Tables 4 and 5 on the same pairs and crops, and print its PCK on --val beside the full one's.

    A view passes the backbone once for all rows of its size. Every run has its own folder under cfg.out; a row that an
    earlier, stopped call has finished there is not trained again.
    """
    if keypoint_set(cfg, "test") is None:
        raise ValueError("--ablate measures every row on --val: name one")
    if cfg.only or cfg.checkpoint or cfg.stages < 3 or processes()[1] > 1:
        raise ValueError("--ablate trains all three stages from the start, in one process")
    caches, found, patch = {}, {}, BACKBONES[cfg.backbone].patch
    smallest = 2 * cfg.region_size * patch
    if cfg.size < smallest:
        raise ValueError(f"--ablate --size {cfg.size}: a row trains at half of it, and a region needs {smallest}")
    for number, (row, (changes, _)) in enumerate(ABLATIONS.items()):
        if row != "full" and not changes:
            continue
        run = dataclasses.replace(cfg, **changes, ablate=False, out=str(Path(cfg.out) / str(number)))
        run.size = round(cfg.size * changes.get("size", 1) / patch) * patch
        found[row] = measured(run)
        print(f"---- {row}{', finished before' * bool(found[row])}")
        if not found[row]:
            train(run, caches=caches.setdefault(run.size, ({}, {})))
            found[row] = measured(run)
        if not found[row]:  # Ctrl-C
            print("the rows before it are kept: the same command goes on with this one")
            return
    print(f"PCK@{'/'.join(map(str, ALPHAS))} on {found['full']['on']}, per image, seed {cfg.seed}")
    for row, (changes, stage) in ABLATIONS.items():
        values = found[row if changes else "full"]["pck"][stage]
        print(f"{row:36s}" + "".join(f"{value:7.1f}" for value in values))


def main(argv: list[str] | None = None, only: str | None = None) -> None:
    """Command line of train.py and, with `only`, of a stage's file."""
    try:
        cfg, resume = parse_config(argv, only)
        if cfg.ablate:
            ablate(cfg)
        else:
            train(cfg, resume)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
