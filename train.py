"""The cascade and its training loop (paper, sections 3.3 and 4.1).

L_all = lambda_1 L_I + lambda_2 L_R + lambda_3 L_P (Eq. 3), from class labels, on the CPU, a GPU or several:

    python train.py                                                     # built-in shapes, nothing to download
    python train.py --root DIR --backbone dinov2_vits14 --size 448      # DIR/<class>/<image>.jpg
    torchrun --nproc_per_node=8 train.py --preset paper --root ILSVRC2012/train --saliency MAPS

Everything random follows from the seed and the position in the sequence of micro-batches: w processes that
see one micro-batch each give the gradients of one process that accumulates w, and a resumed run repeats an
uninterrupted one.
"""

import argparse
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import data
from image_stage import REGION, ImageStage
from modules import HEADS, Features, autocast, cosine_volume, hough_matching, put_back, transfer_keypoints
from pixel_stage import PixelStage
from region_stage import RegionStage
from support import run
from support.backbone import BACKBONES, load_backbone
from support.benchmarks import keypoint_set, training_set
from support.conditioning import Conditioning, pair_axes, training_cells
from support.files import check_record, load_optimizer, read_checkpoint, write_whole
from support.options import ABOVE_0, AT_LEAST_1, SEEDS, SHARE, add_options, check_ranges
from support.ours import Reading, best_reading, both_faces, face_the_source, neighbourhood_consensus
from support.pictures import match_sheet
from support.presets import PRESETS

STAGES = ("image", "region", "pixel")
FROZEN = ("nn", "hough", "consensus", "best")  # ways to read the frozen backbone
BEST = ("best-image", "best-pixel")  # our reading of a stage's volume
BackboneName = Literal[tuple(BACKBONES)]
TrainSet = Literal["shapes", "folder", "spair", "pfpascal"]
ValSet = Literal["auto", "none", "shapes", "pfwillow", "pfpascal", "spair", "spair-small", "labels"]

# The optimisers' constants. sgd is the paper's: constant rate, momentum 0.9, nothing else. adamw is ours.
MOMENTUM = 0.9
WEIGHT_DECAY = 0.01
WARMUP = 20  # steps of linear warm-up before the cosine
CLIP = 1.0  # largest gradient norm

# What --resume may change: none of it changes the numbers.
FREE = "root weights device workers val val_root out log_every val_every save_every".split()
RANGES = {  # of other numbers: not negative
    **dict.fromkeys("candidates pairs batch accumulate log_every hough_side".split(), AT_LEAST_1),
    **dict.fromkeys("temperature mil_lr lr".split(), ABOVE_0),
    **dict.fromkeys("saliency_threshold frozen_share".split(), SHARE),
    "size": (1, 8192),
    "seed": SEEDS,
}


@dataclass
class Config:
    """A run; --help shows the comments. Defaults: photographs on a GPU; support/presets.py changes them."""

    # group: data
    dataset: TrainSet = "shapes"  # folder: ROOT/<class>/*.jpg; spair, pfpascal: weak pairs of training splits
    root: str | None = None  # folder of the data set; alone it means --dataset folder
    saliency: str = "auto"  # folder of <class>/<image>_sal.png; attention; none; auto: silhouettes of shapes
    augment: bool = True  # random crops (35-100 % of the area) and mirroring, each image on its own
    val: ValSet = "auto"  # PCK is measured on it; auto: shapes if trained on, else none
    val_root: str | None = None  # folder of the validation set

    # group: paper
    backbone: BackboneName = "ibot_vitb16"  # frozen; paper: ibot_vitb16
    weights: str | None = None  # local checkpoint of the backbone; none: downloaded on first use
    layer: str = "-1"  # block that is read, from 0, or from the end; or several: 9,10 or --layer=-2,-1
    size: int = 512  # input side in pixels; paper: 512
    saliency_threshold: float = 0.5  # T of Algorithm 1; paper: not given
    hough: bool = True  # pairs are selected by Hough matching; off: by the volume itself (Table 4, III)
    hough_side: int = 5  # L of Table 4, side of the Gaussian over displacements, in cells; paper's best: 5
    shared_attention: bool = False  # gated blocks shared by all stages (Table 4, VII)
    ap: Literal["softmax", "max"] = "softmax"  # AP of Eq. (2); the paper says adaptive pooling
    candidates: int = 32  # suspected pairs of a couple that go on to the region stage; paper: not given
    pairs: int = 16  # cell pairs of a couple that supervise the pixel stage; paper: 16
    stages: Literal[1, 2, 3] = 3  # 2: without the pixel stage (Table 5, V); 1: nor the region stage (VI)
    lambda_image: float = 1.0  # Eq. (3); the paper gives no weights
    lambda_region: float = 1.0  # Eq. (3)
    lambda_pixel: float = 1.0  # Eq. (3)

    # group: ours
    ffn_ratio: float = 1.0  # hidden width over width of the 3x3 feed-forward behind the attention; 0: none
    axes: int = 0  # half-whitened principal axes that the features are projected on; 0: as they are
    consensus: int = 0  # pixel stage: side in cells of the neighbourhood that has to agree; 0: none
    loop_radius: float = 0.0  # cells within which a suspected pair has to close its loop s -> t -> s; 0: none
    temperature: float = 0.05  # of the softmax over similarities that the pixel loss sees; MMNet: none (1)
    facing: bool = False  # where couples face opposite ways, pairs are found with the target mirrored
    frozen_share: float = 0.0  # pixel stage: share of frozen features once trained (WiSE-FT)
    mil_lr: float = 0.1  # learning rate of the image and region stages over that of the pixel stage; paper: 1

    # group: optimisation
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw: warm-up, cosine, clip 1; sgd, paper: constant
    lr: float = 1e-4  # learning rate of the pixel stage; paper: 3e-5
    steps: int = 2000  # optimiser steps
    batch: int = 4  # couples of a micro-batch; its negatives are rolled inside it; paper: 4 a GPU
    accumulate: int = 1  # micro-batches a step and process; paper: 8 GPUs x 4 = 32 couples a step

    # group: run
    checkpoint: str | None = None  # checkpoint of stages to start from
    seed: int = 0  # of initial weights, pairing and crops
    workers: int = 0  # processes that load images
    amp: bool = True  # bfloat16 in backbone and stages, on GPUs only
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda
    out: str = "runs/train"  # folder for checkpoints, metrics.jsonl, pictures
    log_every: int = 20  # steps between lines of the log
    val_every: int = 200  # steps between measurements on --val; 0: only before and after training
    save_every: int = 200  # steps; 0: only at the end

    # group: no option
    residual: bool = True  # False: Eq. (1) to the letter
    mil_ffn: bool = False  # the feed-forward in the image and region stage too: half of all heads' time
    volume_window: int = 4  # 4D patches a side of an attention window; not given (VAT: 4)
    saliency_rescale: bool = True  # maps to their own minimum and maximum; False: their own values against T
    only: str | None = None  # the stage that is trained alone; the ones before it stay as they are

    @property
    def final_stage(self) -> str:
        return STAGES[self.stages - 1]


# ------------------------------------------------------------------------------------------------------------
# The cascade


class Cascade(nn.Module):
    """Frozen backbone -> image stage -> region stage -> pixel stage."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = load_backbone(cfg.backbone, cfg.weights, cfg.layer)
        self.conditioning = Conditioning(self.backbone.dim, cfg.axes) if cfg.axes else None
        dim = cfg.axes or self.backbone.dim
        if dim % HEADS:
            raise ValueError(f"--axes {cfg.axes}: a multiple of {HEADS}, the heads of the gated attention")
        self.image = ImageStage(dim, cfg)
        self.region = RegionStage(dim, cfg) if cfg.stages >= 2 else None
        self.pixel = PixelStage(dim, cfg) if cfg.stages >= 3 else None
        if cfg.shared_attention:
            for stage in STAGES[1 : cfg.stages]:
                getattr(self, stage).mvam.gated = self.image.mvam.gated

    def features(self, images: Tensor, saliency: Tensor | None = None) -> Features:
        """Images (B, 3, H, W) and maps (B, h, w) or None to Features: the backbone runs once per image."""
        images = images.to(next(self.backbone.parameters()).device, non_blocking=True)
        # evaluation has no maps; attention means something unless weights are random
        guess = not self.training and self.cfg.saliency != "none" and self.cfg.backbone != "random_vit8"
        guess = saliency is None and (self.cfg.saliency == "attention" or guess)
        with autocast(images, self.cfg.amp):
            feat, token, *attention = self.backbone(images, attention=guess)
        if self.conditioning is not None:
            feat, token = self.conditioning(feat), self.conditioning(token)
        if saliency is None:
            grid = (side // self.backbone.patch for side in images.shape[-2:])
            saliency = attention[0] if guess else feat.new_ones(len(images), *grid)
        return Features(feat, token, saliency.to(images.device, torch.float32))

    def forward(self, src: Features, trg: Features, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch of same-class couples to the loss of Eq. (3), and what is logged: the losses of the
        stages that are trained and, of the pixel stage, the mean number of its pairs."""
        cfg, log, as_is = self.cfg, {}, trg
        train_image, train_region, train_pixel = (cfg.only in (None, stage) for stage in STAGES)
        if cfg.facing:  # pairs are found in the view of the target that faces as the source does
            trg, away = face_the_source(lambda s, t: self.volume(s, t, "nn"), src, trg)
        if train_image:
            corr, log["image"] = self.image.loss(src, trg, labels)
        else:
            corr = self.image(src, trg)
        if cfg.stages >= 2 and cfg.only != "image":
            suspected = self.image.select(corr, src, trg)
            regions = self.image.regions(suspected, src, trg)
            if train_region:
                region_corr, log["region"] = self.region.loss(regions, labels)
            else:
                region_corr = self.region(regions.src, regions.trg)
        if cfg.stages >= 3 and train_pixel:
            chosen = self.region.select(region_corr, regions, src.grid, trg.grid)
            if cfg.facing:
                chosen, trg = put_back(chosen, away, trg.grid[1]), as_is
            log["pixel"] = self.pixel.loss(self.pixel(src, trg), chosen)
            log["pairs"] = chosen.valid.float().sum(1).mean()
        # Eq. (3): L_all = lambda_1 L_I + lambda_2 L_R + lambda_3 L_P
        loss_image, loss_region, loss_pixel = (log.get(stage, 0.0) for stage in STAGES)
        loss = cfg.lambda_image * loss_image + cfg.lambda_region * loss_region + cfg.lambda_pixel * loss_pixel
        return loss, log

    def volume(self, src: Features, trg: Features, method: str | None = None) -> Tensor:
        """The volume (B, Hs, Ws, Ht, Wt) of a stage, or of the frozen features: "nn" nearest neighbour,
        "hough" matching, "consensus" of neighbours (5x5 where the pixel stage has none), "best" our reading
        (facing and affine voting, of features with their mirror images'), on the principal axes of the
        couple's own cells unless the features lie on those of training images already. "best-pixel",
        "best-image": our reading of a stage's volume."""
        method = method or self.cfg.final_stage
        if method in STAGES:
            if method == "region":
                raise ValueError("the region stage has no volume of whole images")
            return getattr(self, method)(src, trg)
        if method.startswith("best"):
            return self.best(src, trg, method).volume
        corr = cosine_volume(src.feat, trg.feat, src.grid, trg.grid)
        if method == "hough":
            return hough_matching(corr, side=self.cfg.hough_side)
        return neighbourhood_consensus(corr, self.cfg.consensus or 5) if method == "consensus" else corr

    def best(self, src: Features, trg: Features, method: str, volume: Callable | None = None) -> Reading:
        """Our reading "best" of the frozen features or "best-<stage>", of volume(src, trg, stage or "nn");
        None: `self.volume`."""
        stage = method.removeprefix("best").removeprefix("-") or "nn"
        if stage == "nn" and self.conditioning is None:
            src, trg = pair_axes(src, trg)
        smooth = stage != "pixel" or not self.cfg.consensus
        return best_reading(lambda s, t: (volume or self.volume)(s, t, stage), src, trg, smooth)

    @torch.no_grad()
    def transfer(self, src: Features, trg: Features, points: Tensor, method: str | None = None,
                 volume: Callable | None = None) -> Tensor:
        """Source to target: points (B, n, 2) as (x, y) in source cells to target cells. A stage's match comes
        after its Hough matching, as PMPS has it. volume(src, trg, method): None: `self.volume`."""
        method = method or self.cfg.final_stage
        if method == "region":
            return self.region.transfer(self.image, src, trg, points)
        corr = (volume or self.volume)(src, trg, method)
        corr = hough_matching(corr, side=self.cfg.hough_side) if method in STAGES else corr
        return transfer_keypoints(corr, points)

    def trained_state(self) -> dict[str, Tensor]:
        """State of everything but the frozen backbone."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}


def best_of(stage: str) -> list[str]:
    """The name of our reading of a stage, if it has one."""
    return [name for name in BEST if name.endswith(stage)]


def fingerprint(module: nn.Module) -> float:
    """A number that tells one set of weights from another."""
    return float(sum(p.double().abs().sum() for p in module.parameters()))


def load_stages(cascade: Cascade, state: dict, path: str, stages: tuple[str, ...]) -> None:
    """Load the named stages, and the conditioning, strictly; refuses those of other backbone weights."""
    check_record(path, state, {"backbone": float})
    if not math.isclose(fingerprint(cascade.backbone), state["backbone"], rel_tol=1e-7):
        given = cascade.cfg.weights or cascade.cfg.backbone
        raise ValueError(f"{path} was trained on other backbone weights than {given}")
    for part in stages if cascade.conditioning is None else ("conditioning", *stages):
        name = f"{part}."
        weights = {k.removeprefix(name): v for k, v in state["model"].items() if k.startswith(name)}
        try:
            getattr(cascade, part).load_state_dict(weights)
        except RuntimeError as error:
            what, why = f"{part} stage" if part in STAGES else part, str(error).splitlines()[1].strip()
            raise ValueError(f"{path} does not fit the {what}: {why}") from None


def load_cascade(path: str, weights: str | None = None, device: str = "cpu", **overrides) -> Cascade:
    """The trained cascade of a checkpoint, in eval mode. weights: the backbone's file, if it has moved."""
    state = read_checkpoint(path, Config, "train.py")
    cfg = Config(**state["config"] | ({"weights": weights} if weights else {}) | overrides)
    cascade = Cascade(cfg)
    load_stages(cascade, state, path, STAGES[: cfg.stages])
    return cascade.to(device).eval()


# ------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(cfg: Config, step: int) -> float:
    """sgd: constant. adamw: linear warm-up, then half a cosine down to zero. Steps count from 0."""
    if cfg.optimizer == "sgd":
        return cfg.lr
    if step < WARMUP:
        return cfg.lr * (step + 1) / WARMUP
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, cfg.steps - WARMUP)))


def build_optimizer(cascade: Cascade) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: the image and region stage at `mil_lr` times the rate of the pixel stage
    and of blocks that it shares with them.

    AdamW's steps do not depend on the scale of a loss, so the weights of Eq. (3) cannot slow a stage down;
    this can.
    """
    cfg = cascade.cfg
    trained = [(name, p) for name, p in cascade.named_parameters() if p.requires_grad]

    def fast(name: str) -> bool:
        return name.startswith("pixel.") or (cfg.shared_attention and ".gated." in name)

    groups = [{"params": [p for name, p in trained if not fast(name)], "scale": cfg.mil_lr},
              {"params": [p for name, p in trained if fast(name)], "scale": 1.0}]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, cfg.lr, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=WEIGHT_DECAY)


def prepare_run(cascade: Cascade, images: data.ImageSet,
                resume: str | None) -> tuple[torch.optim.Optimizer, int]:
    """Weights and optimiser as a run starts or goes on with them; returns the optimiser and the step."""
    cfg, stages = cascade.cfg, STAGES[: cascade.cfg.stages]
    patch = cascade.backbone.patch
    data.check_size(cfg.size, patch)
    if cfg.stages >= 2 and cfg.size < REGION * patch:
        raise ValueError(f"--size {cfg.size}: the image has fewer cells than a region of {REGION}x{REGION};"
                         f" raise --size to {REGION * patch} or more")
    for stage in stages:
        getattr(cascade, stage).requires_grad_(cfg.only in (None, stage))
    optimizer = build_optimizer(cascade)
    if resume:
        state = read_checkpoint(resume, Config, "train.py")
        load_stages(cascade, state, resume, stages)
        load_optimizer(optimizer, state, resume)
        return optimizer, state["step"]
    if cfg.checkpoint:
        state = read_checkpoint(cfg.checkpoint, Config, "train.py")
        load_stages(cascade, state, cfg.checkpoint, stages[: state["config"]["stages"]])
    elif cascade.conditioning is not None:
        cascade.conditioning.fit(training_cells(cascade.backbone, images, cfg.size))
    return optimizer, 0


def save(path: Path, cascade: Cascade, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Everything that a resumed run needs."""
    write_whole(path, {
        "program": "train.py",
        "model": cascade.trained_state(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "processes": run.processes()[1],
        "config": dataclasses.asdict(cascade.cfg),
        "backbone": fingerprint(cascade.backbone),
    })


def measure(log: Path, step: int, matcher, keypoints: data.KeypointSet,
            methods: tuple[str, ...]) -> tuple[dict, dict]:
    """PCK of some methods, in eval mode, printed and recorded; returns it and the predictions, by method."""
    from evaluate import ALPHAS, predict, score  # evaluate.py builds on this file

    mode = matcher.training
    matcher.eval()
    predictions = predict(matcher, keypoints, methods, quiet=True)
    matcher.train(mode)
    rule = keypoints.rule
    found = {method: score(places, keypoints)[rule]["per_image"] for method, places in predictions.items()}
    run.record(log, step, {"pck": found, "alphas": ALPHAS, "on": keypoints.name})
    protocol = f"{keypoints.name}, {len(keypoints)} pairs, {rule}, per image"
    tqdm.write(f"step {step}: PCK@{'/'.join(map(str, ALPHAS))} on {protocol}")
    for method, values in found.items():
        tqdm.write(f"    {method:9s}" + "".join(f"{v:7.1f}" for v in values))
    return found, predictions


def batches(cfg: Config, images: data.ImageSet, patch: int, start: int,
            device: torch.device) -> Iterator[dict]:
    """The endless micro-batches of this process, from the one that step `start` begins with."""
    rank, world = run.processes()
    stream = data.PairStream(images, cfg.batch, cfg.seed, start * cfg.accumulate * world, rank, world)
    couples = data.TrainPairs(images, cfg.size, patch, cfg.augment, cfg.seed)
    return run.endless(couples, stream, cfg.workers, device)


def train(cfg: Config, resume: str | None = None, build: Callable[[Config], Cascade] = Cascade) -> Cascade:
    """Train as configured; writes metrics.jsonl, last.pt, matches.png under cfg.out; returns the cascade.

    Raises ValueError when the loss is no longer finite.
    """
    device = run.find_device(cfg.device)
    rank, world = run.start_processes(device)
    chief, stages, out = rank == 0, STAGES[: cfg.stages], Path(cfg.out)
    images = training_set(cfg)
    val, test = (keypoint_set(cfg, split) if chief else None for split in ("val", "test"))
    torch.manual_seed(cfg.seed)
    cascade = build(cfg).to(device)
    optimizer, start = prepare_run(cascade, images, resume)
    run.share_weights(cascade)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loader, skipped = batches(cfg, images, cascade.backbone.patch, start, device), set()
    if chief:
        run.print_header(cfg, device)
        print(f"{len(images)} images of {len(images.classes)} classes,"
              f" {sum(p.numel() for p in params) / 1e6:.2f} M trainable parameters")
        warn(cfg, images)
        log = run.open_log(out, start)
        if test:
            _, before = measure(log, start, cascade, test, FROZEN)

    clock, done = time.perf_counter(), start
    with run.stop_signals() as stop:  # Ctrl-C: finish the step, save, leave
        for step in tqdm(range(start, cfg.steps), initial=start, total=cfg.steps,
                         disable=None if chief else True):
            rate = learning_rate(cfg, step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]

            # Forward and backward, a micro-batch at a time
            logged: dict[str, Tensor] = {}
            for _ in range(cfg.accumulate):
                batch = next(loader)
                skipped.update(line for item in batch["skipped"] for line in item.splitlines())
                if sum(line.startswith("class ") for line in skipped) > max(0, len(images.classes) - 2):
                    raise ValueError(f"fewer than two classes have two readable images; {min(skipped)}")
                views, maps = (torch.cat([batch[f"{side}_{kind}"].to(device, non_blocking=True)
                                          for side in ("src", "trg")]) for kind in ("img", "sal"))
                features = both_faces if cfg.facing else type(cascade).features
                both = features(cascade, views, maps if maps.numel() else None)
                src, trg = both.map(lambda x: x[: cfg.batch]), both.map(lambda x: x[cfg.batch :])
                loss, parts = cascade(src, trg, batch["label"].to(device))
                (loss / cfg.accumulate).backward()
                for key, value in (parts | {"loss": loss}).items():
                    logged[key] = logged.get(key, 0) + value.detach() / cfg.accumulate

            # Step
            logged = run.average_over_processes(params, logged)  # the first wait for the GPU
            norm = float(nn.utils.clip_grad_norm_(params, CLIP if cfg.optimizer == "adamw" else math.inf))
            if not math.isfinite(norm + logged["loss"]):
                raise ValueError(f"step {step}: loss {logged} with gradient norm {norm} is not finite;"
                                 " what was saved before stands. Lower --lr, or take --optimizer adamw")
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1

            # Log, save, measure
            if chief and (done % cfg.log_every == 0 or done == cfg.steps):
                speed = (done - start) / (time.perf_counter() - clock)
                run.record(log, done, logged | {"lr": rate, "grad_norm": norm, "steps_per_s": speed})
                text = " ".join(f"{key} {value:.4f}" for key, value in logged.items())
                tqdm.write(f"step {done}/{cfg.steps} {text} lr {rate:.2e} {speed:.2f} steps/s")
                if logged.get("pairs", 16) < min(4, cfg.pairs) and done <= start + cfg.log_every:
                    found = f"only {logged['pairs']:.1f} of {cfg.pairs} pairs a couple are found"
                    tqdm.write(f"{found}: the foreground may be small, lower --saliency-threshold or look at"
                               " --saliency; or raise --candidates", file=sys.stderr)
            if chief and done < cfg.steps and cfg.save_every and done % cfg.save_every == 0:
                save(out / "last.pt", cascade, optimizer, done)
            if val and done < cfg.steps and cfg.val_every and done % cfg.val_every == 0:
                measure(log, done, cascade, val, stages)
            if run.any_process(bool(stop), device):
                break

    seconds = time.perf_counter() - clock
    run.report_skipped(skipped)
    if chief:
        save(out / "last.pt", cascade, optimizer, done)
        if done < cfg.steps:
            print(f"stopped after step {done}; go on with --resume {out / 'last.pt'}")
        elif test:
            _, after = measure(log, done, cascade, test, (*stages, *best_of(stages[-1])))
            draw(out / "matches.png", test, before["nn"], after[stages[-1]], stages[-1])
        print(f"checkpoint {out / 'last.pt'}, {seconds:.0f} s of training")
    if world > 1:
        dist.destroy_process_group()
    if done < cfg.steps:  # the code by which a shell knows a signal: nothing goes on with half a model
        sys.exit(128 + (stop or [signal.SIGTERM])[0])
    return cascade


def warn(cfg: Config, images: data.ImageSet) -> None:
    """A line on stderr for what would quietly train something else than the paper's cascade."""
    if len(images.classes) == 1 and cfg.only != "pixel":
        print("one class only: Eq. (2) has no negatives and keeps its first term alone; give two or more",
              file=sys.stderr)
    if cfg.saliency == "auto" and cfg.dataset != "shapes":
        print("no saliency maps, so every cell is foreground (Table 4, II): give --saliency MAPS or"
              " --saliency attention, or say --saliency none", file=sys.stderr)


def draw(path: Path, test: data.KeypointSet, before: list[Tensor], after: list[Tensor], stage: str) -> None:
    """Ten couples with the points that the frozen backbone and that the trained stage found."""
    from evaluate import right_at_ten

    shown = {"frozen backbone": before, f"{stage} stage": after}
    write_whole(path, match_sheet(shown, right_at_ten(shown, test), test))
    print(f"matches drawn in {path}")


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_config(argv: list[str] | None, only: str | None = None,
                 description: str | None = __doc__, prog: str | None = None) -> tuple[Config, str | None]:
    """Command line to configuration: the preset, over it the single options. Returns it and --resume's file.

    On --resume the checkpoint's own configuration takes the preset's place. only: the stage whose file was
    run.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("preset", "resume", "dataset", "root"):
        first.add_argument(f"--{name}")
    early = vars(first.parse_known_args(argv)[0])
    resume, dataset = early.get("resume"), early.get("dataset", "folder" if "root" in early else "shapes")
    if resume:
        state = read_checkpoint(resume, Config, "train.py")
        base = state["config"]
    else:
        preset = early.get("preset", "quick" if dataset == "shapes" else None)
        base = {"dataset": dataset} | PRESETS.get(preset, {})
        base |= {"only": only, "out": f"runs/{only}"} if only else {}
    shown = Config(**base)

    parser = argparse.ArgumentParser(
        prog, "%(prog)s [options]", description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    presets = ("quick: on shapes the default; photos: class folders on a CPU; paper: section 4.1; literal:"
               " Eq. (1) and section 4.1 to the letter. Values below are those of the preset that would run")
    parser.add_argument("--preset", choices=PRESETS, help=presets)
    parser.add_argument("--resume", metavar="FILE", help="last.pt of the run to go on with")
    add_options(parser, Config, shown)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if k not in ("preset", "resume")}
    cfg = dataclasses.replace(shown, **given)
    if resume:
        free, modes = set(FREE), ("auto", "attention", "none")
        free |= {"steps"} if base["optimizer"] == "sgd" else set()  # at a constant rate a run may be longer
        free |= {"saliency"} if not {base["saliency"], cfg.saliency} & set(modes) else set()  # maps may move
        run.check_resume(state, given | early | ({"only": only} if only else {}), free, resume)
    if cfg.only:
        cfg.stages = max(cfg.stages if "stages" in given else 1, 1 + STAGES.index(cfg.only))
    check(cfg)
    if not resume:
        cfg.out = run.free_folder(cfg.out, named="out" in given)
    return cfg, resume


def check(cfg: Config) -> None:
    """ValueError, in one line, for options that cannot be."""
    check_ranges(cfg, RANGES)
    if cfg.hough_side % 2 == 0:
        raise ValueError(f"--hough-side {cfg.hough_side}: the Gaussian's side must be odd")
    if cfg.consensus and cfg.consensus % 2 == 0:
        raise ValueError(f"--consensus {cfg.consensus}: the neighbourhood's side must be odd, or 0 for none")
    if cfg.only and cfg.shared_attention:
        raise ValueError("--shared-attention ties the stages together; one of them cannot be trained alone")
    if cfg.batch < 2 and cfg.only != "pixel":
        raise ValueError(f"--batch {cfg.batch}: Eq. (2) rolls the batch for its negatives; at least 2")


def main(argv: list[str] | None = None, only: str | None = None, description: str | None = __doc__) -> None:
    """Command line of train.py and, with `only`, of a stage's file."""
    with run.command():
        train(*parse_config(argv, only, description))


if __name__ == "__main__":
    main()
