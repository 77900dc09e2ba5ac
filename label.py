"""Pseudo-labels of a trained cascade, written as SC-ImageNet (paper, sections 3.4 and 3.5; supplement, sections 2 and 3).

    python label.py --checkpoint runs/quick/last.pt                                              # the built-in shapes
    python label.py --checkpoint F --dataset folder --root DIR --saliency MAPS --out labels --draw 20
    torchrun --nproc_per_node=8 label.py --checkpoint F --dataset folder --root ILSVRC2012/train --detector --out labels

1. Classes: --keep-classes, --drop-classes.  2. Single instances: one confident box an image, by a detector (--detector).
3. Closed loops: every foreground cell of s travels s -> m -> t -> s; how far from its start it ends is the loop's error.
4. Images: the most consistent share of every class.  5. Pairs of kept images: one-to-one matches whose loops close and
whose direct transfer s -> t agrees with the one through m.  6. Merging into one tree that keypoint matchers read.

A loop needs three volumes, but the volumes of all pairs of a clique of K images hold K (K-1) (K-2) loops: K = 12 gives 110
loops an image for 5.5 volumes an image. Of a volume only its two transfer maps stay (one point a cell), so a loop is three
look-ups. Every clique is a shard of its own under OUT/work: a killed run goes on where it stopped.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from evaluate import correct_points, draw_matches
from modules import Features, Pairs, cells_to_xy, kernel_soft_argmax, pair_nms, select_pairs
from shapes import corresponding_points
from train import Cascade, add_options, find_device, leave_signals, load_cascade


@dataclass
class LabelConfig:
    """A labelling run."""

    checkpoint: str | None = None  # written by train.py
    weights: str | None = None  # backbone weights file, where the checkpoint's own path is gone
    dataset: str = "shapes"  # shapes, or folder (ROOT/<class>/*.jpg)
    root: str | None = None  # folder of class folders
    saliency: str = "auto"  # folder of <class>/<image>_sal.png; attention; none; auto: silhouettes of shapes, or none
    out: str = "labels"  # folder for the label set, its pictures and the shards of the work
    size: int = 0  # input side in pixels; 0: the checkpoint's
    keep_classes: str | None = None  # file with the names of the only classes to label, one a line
    drop_classes: str | None = None  # file with names of classes to leave out; paper: 321 of 1,000, by hand
    drop_worst: float = 0.0  # share of the classes to leave out by their mean loop error, the worst first
    detector: bool = False  # keep images with exactly one object over 0.9 (COCO detector, downloaded on first use)
    detector_weights: str | None = None  # local file of its weights
    loops: int = 100  # closed loops an image at least, where its class is large enough; paper: 100
    cap: float = 0.1  # a loop's error counts at most this share of the box's longer side; inf: the plain mean
    keep: float = 0.3  # share of the images that is kept; paper: 0.3
    keep_by: str = "class"  # class: that share of every class, rounded down; all: of all images together
    pairs: int = 7  # pairs an image that is kept; paper: 794,612 / 113,516 = 7
    points: int = 32  # matches a pair at most; paper: 32
    fewest: int = 8  # matches a pair needs
    val: float = 0.05  # share of the kept images that makes the val split, shared with no trn pair
    images: str = "link"  # link or copy the photographs into the tree
    draw: int = 0  # pairs on each of the pictures in OUT/drawn
    seed: int = 0  # of the cliques
    batch: int = 8  # volumes at a time
    workers: int = 0  # processes that load images
    amp: bool = True  # bfloat16 around the network, on GPUs only
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda

    @property
    def clique(self) -> int:
        """The smallest K with (K - 1) (K - 2) >= loops."""
        return next(k for k in range(3, 10_000) if (k - 1) * (k - 2) >= self.loops)


# ----------------------------------------------------------------------------------------------------------------------
# Closed loops (section 3.4)


@torch.no_grad()
def clique_maps(cascade: Cascade, feats: Features, batch: int, matched: bool = False) -> tuple[Tensor, Tensor | None]:
    """Transfer maps between all ordered pairs of K images, from one volume for every two of them.

    A pair's volume is that of the image that comes first, read along its rows from first to second and along its columns
    back; no volume is kept. Returns maps (K, K, h, w, 2), maps[a, b, y, x] being the place (x, y) in cells of b that
    a's cell goes to, and, if `matched`, partners (K, K, h*w): the cell of b that Hough matching and Algorithm 1 pair
    with a's cell, -1 where they give it none.
    """
    count, (h, w) = len(feats.feat), feats.grid
    maps = feats.saliency.new_zeros(count, count, h, w, 2)
    partners = torch.full((count, count, h * w), -1, device=maps.device) if matched else None
    first, second = torch.triu_indices(count, count, 1, device=maps.device)
    for a, b in zip(first.split(batch), second.split(batch)):
        src, trg = (Features(*(x[index] for x in feats)) for index in (a, b))
        corr = cascade.volume(src, trg)
        maps[a, b] = kernel_soft_argmax(corr)
        maps[b, a] = kernel_soft_argmax(corr.permute(0, 3, 4, 1, 2))
        if matched:
            pairs = select_pairs(corr, src, trg, cascade.cfg)
            k, n = pairs.valid.nonzero(as_tuple=True)
            i, j = pairs.src[k, n], pairs.trg[k, n]
            partners[a[k], b[k], i] = j
            partners[b[k], a[k], j] = i
    return maps, partners


def follow(maps: Tensor, points: Tensor) -> Tensor:
    """Where points land: maps (B, h, w, 2) read bilinearly at points (B, n, 2), (x, y) in cells; returns (B, n, 2)."""
    h, w = maps.shape[1:3]
    grid = 2 * (points + 0.5) / points.new_tensor([w, h]) - 1
    places = F.grid_sample(maps.permute(0, 3, 1, 2), grid[:, :, None], padding_mode="border", align_corners=False)
    return places[..., 0].transpose(1, 2)


def closed_loops(maps: Tensor, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """All loops s -> m -> t -> s of all N cells of image s (section 3.4).

    maps (K, K, h, w, 2) of clique_maps. Returns `via` (K, K, N, 2), where m sends them in t, `back` (K, K, N, 2), where t
    sends those in s, both indexed [m, t] and in cells, and (K, K) bool: s, m and t are three images.
    """
    count = len(maps)
    direct = maps[s].flatten(1, 2).repeat_interleave(count, 0)  # (m, t) -> s's cells in m
    via = follow(maps.flatten(0, 1), direct)
    back = follow(maps[:, s].repeat(count, 1, 1, 1), via)
    real = ~torch.eye(count, dtype=torch.bool, device=maps.device)
    real[s], real[:, s] = False, False
    return via.unflatten(0, (count, count)), back.unflatten(0, (count, count)), real


class Clique(NamedTuple):
    """K images of one class on their way: features, frames, and what the transfer maps are measured with."""

    index: list[int]  # of the images in their set
    feats: Features
    sizes: list[tuple[int, int]]  # (W, H)
    boxes: list[tuple[int, int, int, int]]  # (xmin, ymin, xmax, ymax) in pixels of the image
    stride: Tensor  # (K, 2): pixels of the image a cell, along x and y
    side: Tensor  # (K,): longer side of the box in pixels, the yardstick of PCK
    foreground: Tensor  # (K, N) bool


def loop_errors(clique: Clique, s: int, back: Tensor, cap: float) -> Tensor:
    """How far loops end from their start, in shares of the longer side of s's box and at most `cap`.

    back (..., N, 2), the ends of loops of all N cells of image s; returns (..., N).
    """
    start = cells_to_xy(torch.arange(back.shape[-2], device=back.device), clique.feats.grid[1])
    return (((back - start) * clique.stride[s]).norm(dim=-1) / clique.side[s]).clamp(max=cap)


def image_errors(clique: Clique, maps: Tensor, cap: float) -> list[float]:
    """An image's error: the mean over its foreground cells and over all loops of the clique that start in it."""
    errors = []
    for s in range(len(maps)):
        _, back, real = closed_loops(maps, s)
        errors.append(float(loop_errors(clique, s, back[real], cap)[:, clique.foreground[s]].mean()))
    return errors


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of a clique


@torch.no_grad()
def pair_matches(clique: Clique, maps: Tensor, partners: Tensor, cfg: LabelConfig) -> list[dict]:
    """The matches of every two images of a clique, each pair once, in one of its directions in turn.

    A match starts at a cell of s that one-to-one selection paired, and goes to its direct, sub-cell transfer s -> t. It
    is kept if that lies within 1.5 cells of the selected partner, inside t's box, and within a tenth of the box of
    where at least half of the other images m send it. Its score is its mean loop error over m; of those kept, the best
    `points` are taken that non-maximum suppression of the largest possible radius (up to 4 cells) leaves.

    Returns one dict a pair that has `fewest` matches: src and trg (places in the clique), src_kps and trg_kps in pixels,
    errors (shares of the source box), score (their mean).
    """
    count, (h, w) = len(maps), clique.feats.grid
    cells = cells_to_xy(torch.arange(h * w, device=maps.device), w)
    order, score = [], []
    for s in range(count):
        via, back, real = closed_loops(maps, s)
        direct = maps[s].flatten(1, 2)  # (K, N, 2)
        loop = loop_errors(clique, s, back, cfg.cap)  # (m, t, N)
        apart = ((via - direct) * clique.stride[:, None]).norm(dim=-1) / clique.side[:, None]  # (m, t, N)
        weight = real[:, :, None] / real.sum(0).clamp(min=1)[None, :, None]
        agree = ((apart <= 0.1) * weight).sum(0) >= 0.5
        near = (direct - cells[partners[s].clamp(min=0)]).norm(dim=-1) <= 1.5
        low, high = (torch.tensor(clique.boxes, device=maps.device)[:, None, k : k + 2] for k in (0, 2))
        pixels = (direct + 0.5) * clique.stride[:, None] - 0.5
        inside = ((pixels >= low) & (pixels <= high)).all(-1)
        good = (partners[s] >= 0) & agree & near & inside
        for t in range(count):
            if (t > s) == bool((s + t) % 2) and t != s:  # each pair once, every image source and target alike
                order.append((s, t))
                score.append(torch.where(good[t], (loop[:, t] * weight[:, t]).sum(0), math.inf))
    found = []
    for first in range(0, len(order), cfg.batch):
        some = order[first : first + cfg.batch]
        src, trg = torch.tensor(some, device=maps.device).T
        error, cell = torch.stack(score[first : first + cfg.batch]).sort(dim=1, stable=True)  # best first
        valid = error.isfinite()
        error, cell, valid = (x[:, : max(1, int(valid.sum(1).max()))] for x in (error, cell, valid))
        place = maps.flatten(2, 3)[src[:, None], trg[:, None], cell]  # (P, n, 2)
        ends = place.round().long()
        pairs = Pairs(cell, ends[..., 1] * w + ends[..., 0], error, valid)
        chosen = pair_nms(pairs, w, w, 1, cfg.points)
        for radius in (2, 3, 4):
            spread = pair_nms(pairs, w, w, radius, cfg.points)
            enough = spread.valid.sum(1) >= chosen.valid.sum(1)
            chosen = Pairs(*(torch.where(enough[:, None], b, a) for a, b in zip(chosen, spread)))
        for k, (s, t) in enumerate(some):
            take = chosen.valid[k]
            if take.sum() < cfg.fewest:
                continue
            ends = [cells[chosen.src[k, take]], maps[s, t].flatten(0, 1)[chosen.src[k, take]]]
            kps = [data.cells_to_pixels(e.cpu(), clique.sizes[i], (h, w)) for e, i in zip(ends, (s, t))]
            # an image narrower than the grid has cells whose centres lie half a pixel off it
            kps = [p.clamp(min=0).round(decimals=2).double() for p in kps]
            errors = chosen.score[k, take].cpu().double()
            found.append(
                {
                    "src": s,
                    "trg": t,
                    "src_kps": [[round(v, 2) for v in p] for p in kps[0].tolist()],
                    "trg_kps": [[round(v, 2) for v in p] for p in kps[1].tolist()],
                    "errors": [round(e, 4) for e in errors.tolist()],
                    "score": round(float(errors.mean()), 6),
                }
            )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Images: classes, single instances, cliques


def read_names(path: str, known: list[str]) -> set[str]:
    """Class names, one a line; ValueError names one that the data set lacks."""
    try:
        names = {line.strip() for line in Path(path).read_text().splitlines() if line.strip()}
    except OSError as error:
        raise ValueError(f"cannot read class names from {path}: {error.strerror}") from None
    if unknown := sorted(names - set(known)):
        raise ValueError(f"{path}: no class is named {unknown[0]!r}; there are {', '.join(known[:5])}, ...")
    return names


def load_detector(weights: str | None, device: torch.device) -> torch.nn.Module:
    """torchvision's Faster R-CNN (ResNet-50, FPN, v2) with COCO weights: from a file, or downloaded on first use."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights, fasterrcnn_resnet50_fpn_v2

    detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    origin = weights or FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(origin, map_location="cpu", weights_only=True)
        detector.load_state_dict(state)
    except Exception as error:  # unpickling, urllib and strict loading raise many kinds; the way out is the same
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the detector from {origin} ({reason}); give it with --detector-weights") from None
    return detector.to(device).eval()


def single_box(scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box of the only object over 0.9, whatever its class, in whole pixels inside the (W, H) image; None if there is
    not exactly one (section 3.5)."""
    sure = boxes[scores > 0.9]
    if len(sure) != 1:
        return None
    (x0, y0, x1, y1), (width, height) = sure[0].tolist(), size
    x0, y0 = (max(0, min(math.floor(v), side - 1)) for v, side in ((x0, width), (y0, height)))
    return x0, y0, max(x0 + 1, min(math.ceil(x1), width)), max(y0 + 1, min(math.ceil(y1), height))


def foreground_box(foreground: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole-pixel box of foreground cells (h, w) bool in an image of (W, H) pixels: (xmin, ymin, xmax, ymax)."""
    (h, w), (width, height) = foreground.shape, size
    ys, xs = (foreground.any(dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    return (
        *(math.floor(xs[0] * width / w), math.floor(ys[0] * height / h)),
        *(math.ceil((xs[-1] + 1) * width / w), math.ceil((ys[-1] + 1) * height / h)),
    )


class CliqueSet(Dataset):
    """The images of one clique at a time; what cannot be read is left out and named."""

    def __init__(self, images: data.ImageSet, cliques: list[list[int]], size: int, patch: int) -> None:
        self.images, self.cliques, self.size, self.patch = images, cliques, size, patch

    def __getitem__(self, number: int) -> dict:
        index, views, cells, sizes, skipped = [], [], [], [], []
        for i in self.cliques[number]:
            try:
                image, saliency = self.images.load(i)
            except ValueError as error:
                skipped.append((i, str(error)))
                continue
            view, cell = data.prepare(image, saliency, self.size, self.patch)
            index, views, sizes = index + [i], views + [view], sizes + [image.size]
            cells += [] if cell is None else [cell]
        return {"index": index, "views": views, "cells": cells, "sizes": sizes, "skipped": skipped}


def build_clique(cascade: Cascade, item: dict, boxes: dict[int, list[int]], amp: bool) -> tuple[Clique | None, list[int]]:
    """Features, boxes and foreground of one item of CliqueSet; None if it has fewer than three usable images.

    boxes: those of a detector; outside of its box an image has no foreground. Without one, the box is that of the
    foreground. Also returns the images that have no foreground.
    """
    if not item["index"]:
        return None, []
    device = next(cascade.parameters()).device
    saliency = torch.stack(item["cells"]) if item["cells"] else None
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and amp):
        feats = cascade.features(torch.stack(item["views"]), saliency)
    h, w = feats.grid
    centres = cells_to_xy(torch.arange(h * w), w)
    masks, keep = feats.foreground(cascade.cfg.saliency_threshold).flatten(1).cpu(), []
    for k, (i, size) in enumerate(zip(item["index"], item["sizes"])):
        if i in boxes:
            at, box = data.cells_to_pixels(centres, size, (h, w)), torch.tensor(boxes[i])
            masks[k] &= ((at >= box[:2]) & (at <= box[2:])).all(-1)
        if masks[k].any():
            keep.append(k)
    empty = [i for k, i in enumerate(item["index"]) if k not in keep]
    if len(keep) < 3:
        return None, empty
    index, sizes = ([item[name][k] for k in keep] for name in ("index", "sizes"))
    masks = masks[keep]
    frames = [boxes.get(i) or foreground_box(m.view(h, w), s) for i, m, s in zip(index, masks, sizes)]
    stride = torch.tensor([[width / w, height / h] for width, height in sizes], device=device)
    side = torch.tensor([max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in frames], device=device, dtype=torch.float32)
    masks = masks.to(device)
    feats = Features(feats.feat[keep], feats.token[keep], masks.view(-1, h, w) * 2.0 - 1)  # under every threshold or over
    return Clique(index, feats, sizes, frames, stride, side, masks), empty


def split_cliques(members: list[int], size: int) -> list[list[int]]:
    """Cut a class into groups of at least `size` (fewer only where the class has fewer) and less than twice that."""
    count = max(1, len(members) // size)
    edges = [round(k * len(members) / count) for k in range(count + 1)]
    return [members[a:b] for a, b in zip(edges, edges[1:])]


# ----------------------------------------------------------------------------------------------------------------------
# Shards: one file a clique, written whole or not at all


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it; OSError, in one line, leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; what was finished before is kept") from None


def read_shards(folder: Path, count: int):
    """The records of shards 0 to count - 1, in order."""
    for number in range(count):
        yield json.loads((folder / f"{number:06d}.json").read_text())


class Worker:
    """This process's part of the work: which shards are its own, and when all processes have come as far."""

    def __init__(self, cfg: LabelConfig) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.out, self.workers = Path(cfg.out), cfg.workers
        if self.world > 1:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def shards(self, name: str, settings: dict, items: Dataset, count: int, make, cost=lambda number: 1, unit="clique"):
        """Make the shards of one step that are not there yet; returns their folder.

        settings: whatever the shards depend on. Raises ValueError if those that are there came from others.
        make(number, item) gives a shard's record, cost(number) its share of the progress bar.
        """
        folder, text = self.out / "work" / name, json.dumps(settings, indent=1, sort_keys=True)
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            stored = folder / "settings.json"
            old = json.loads(stored.read_text()) if stored.exists() else settings
            if old != json.loads(text):
                what = next(k for k in settings | old if settings.get(k) != old.get(k))
                raise ValueError(
                    f"{folder} was made with {what} {old.get(what)}, not {settings.get(what)}; give another --out,"
                    f" or delete {folder} to make it anew"
                )
            write_whole(stored, text)
        self.wait()
        todo = [k for k in range(self.rank, count, self.world) if not (folder / f"{k:06d}.json").exists()]
        loader = DataLoader(
            items, sampler=todo, batch_size=None, num_workers=self.workers, worker_init_fn=leave_signals
        )
        quiet = self.rank != 0 or not sys.stderr.isatty()
        with tqdm(total=sum(map(cost, todo)), desc=name, unit=unit, unit_scale=True, disable=quiet) as bar:
            for number, item in zip(todo, loader):
                write_whole(folder / f"{number:06d}.json", json.dumps(make(number, item)))
                bar.update(cost(number))
        self.wait()
        return folder


# ----------------------------------------------------------------------------------------------------------------------
# Selection (section 3.5)


def share_of(share: float, count: int) -> int:
    """A share of a count, rounded down; 0.29 of 100 is 29."""
    return int(share * count + 1e-9)


def select_images(errors: dict[int, float], labels: list[int], cfg: LabelConfig) -> tuple[dict, set[int]]:
    """The images to keep, {class: [image, ...]} with the most consistent first, and the classes dropped as the worst."""
    by_class: dict[int, list[int]] = {}
    for i in sorted(errors, key=lambda i: (errors[i], i)):
        by_class.setdefault(labels[i], []).append(i)
    mean = {label: float(np.mean([errors[i] for i in members])) for label, members in by_class.items()}
    worst = sorted(mean, key=lambda label: (-mean[label], label))[: share_of(cfg.drop_worst, len(mean))]
    by_class = {label: by_class[label] for label in sorted(by_class) if label not in worst}
    if cfg.keep_by == "all":
        ranked = sorted((errors[i], i) for members in by_class.values() for i in members)
        best = {i for _, i in ranked[: share_of(cfg.keep, len(ranked))]}
        return {label: [i for i in members if i in best] for label, members in by_class.items()}, set(worst)
    return {label: m[: share_of(cfg.keep, len(m))] for label, m in by_class.items()}, set(worst)


def split_images(kept: dict[int, list[int]], share: float, seed: int) -> dict[str, dict[int, list[int]]]:
    """Kept images to trn and val. A loop needs three images, so a class gives val three or more, or none; what it owes
    is carried to the next class. Both lists are in random order."""
    splits, due = {"trn": {}, "val": {}}, 0.0
    for label, members in kept.items():
        order = np.random.default_rng((seed, 1, label)).permutation(members).tolist()
        due += share * len(order)
        take = min(int(due), len(order) - 3) if due >= 3 and len(order) >= 6 else 0
        due -= take
        splits["val"][label], splits["trn"][label] = order[:take], order[take:]
    return splits


# ----------------------------------------------------------------------------------------------------------------------
# The tree on disk: SC-ImageNet as the authors' CATs and DHPF read it


def plain_names(names: list[str]) -> list[str]:
    """Names without '-', ':', glob characters, spaces or anything but letters, digits, '_' and '.'; all different."""
    found: list[str] = []
    taken = set()
    for name in names:
        plain = new = re.sub(r"[^A-Za-z0-9_.]+", "_", name) or "_"
        number = 2
        while new in taken:
            new, number = f"{plain}_{number}", number + 1
        taken.add(new)
        found.append(new)
    return found


def image_names(images: data.ImageSet) -> list[tuple[str, str]]:
    """(category, id) of every image: its file in the tree is <category>/<category>_<id>.JPEG, ImageNet's own naming."""
    categories, ids = plain_names(images.classes), {}
    for label, name in enumerate(images.classes):
        members = [i for i, of in enumerate(images.labels) if of == label]
        ids |= dict(zip(members, plain_names([images.paths[i].stem.removeprefix(f"{name}_") for i in members])))
    return [(categories[label], ids[i]) for i, label in enumerate(images.labels)]


def annotation(pair: dict, number: int, sides: tuple[dict, dict], names: list[tuple[str, str]]) -> tuple[str, dict]:
    """A pair's id and its record in SPair-71k's form, with the loop error of every match (source pixels) added."""
    (category, src), (_, trg) = (names[pair[side]] for side in ("src", "trg"))
    name = f"{number:06d}-{src}-{trg}:{category}"
    record: dict = {"pair_id": number, "filename": name, "category": category}
    for side, image, ident in (("src", sides[0], src), ("trg", sides[1], trg)):
        record |= {
            f"{side}_imname": f"{category}_{ident}.JPEG",
            f"{side}_imsize": [*image["size"], 3],
            f"{side}_bndbox": image["box"],
            f"{side}_pose": "Unspecified",
            f"{side}_kps": pair[f"{side}_kps"],
        }
    x0, y0, x1, y1 = sides[0]["box"]
    record |= {"kps_ids": [str(k) for k in range(len(pair["errors"]))]}
    record |= dict.fromkeys(("mirror", "viewpoint_variation", "scale_variation", "truncation", "occlusion"), 0)
    return name, record | {"loop_error": [round(e * max(x1 - x0, y1 - y0), 2) for e in pair["errors"]]}


def place_image(images: data.ImageSet, index: int, path: Path, how: str) -> None:
    """Link or copy an image into the tree; drawn ones are saved. The original is never touched."""
    if isinstance(images, data.Shapes):
        images.load(index)[0].save(path, "JPEG", quality=95)
    elif how == "copy":
        shutil.copyfile(images.paths[index], path)
    else:
        path.symlink_to(images.paths[index].resolve())


def write_tree(out: Path, images: data.ImageSet, records, how: str) -> None:
    """Write OUT/SC-ImageNet (and its second name SC-IMAGENET, which DHPF wants) from the records of pair shards.

    Written under a temporary name and put in place as a whole; OSError leaves an earlier tree as it was.
    """
    final, temporary = out / "SC-ImageNet", out / "SC-ImageNet.tmp"
    names, placed = image_names(images), {}
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for split in ("trn", "val"):
            (temporary / "PairAnnotation" / split).mkdir(parents=True)
        (temporary / "JPEGImages").mkdir()
        (temporary / "Layout" / "large").mkdir(parents=True)
        lines: dict[str, list[str]] = {"trn": [], "val": []}
        number = 0
        for record in records:
            for pair in record["pairs"]:
                if not pair["kept"]:
                    continue
                number += 1
                name, text = annotation(pair, number, tuple(record["images"][str(pair[x])] for x in ("src", "trg")), names)
                (temporary / "PairAnnotation" / record["split"] / f"{name}.json").write_text(json.dumps(text))
                lines[record["split"]].append(f"{name}\n")
                for i in (pair["src"], pair["trg"]):
                    if i not in placed:
                        category, ident = names[i]
                        placed[i] = path = temporary / "JPEGImages" / category / f"{category}_{ident}.JPEG"
                        path.parent.mkdir(exist_ok=True)
                        place_image(images, i, path, how)
        for split, found in lines.items():
            (temporary / "Layout" / "large" / f"{split}.txt").write_text("".join(found))
        origin = {f"{a}_{b}.JPEG": str(images.paths[i]) for i, (a, b) in enumerate(names) if i in placed}
        write_whole(out / "names.json", json.dumps(origin, indent=0))
        old = out / "SC-ImageNet.old"
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        if not (out / "SC-IMAGENET").exists():
            (out / "SC-IMAGENET").symlink_to("SC-ImageNet")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write the label set: {error}; the shards are kept, the same command goes on") from None


# ----------------------------------------------------------------------------------------------------------------------
# Pictures, precision, summary


def draw_pair(images: data.ImageSet, pair: dict, cap: float) -> Image.Image:
    """A pair with its matches, from green (the loops close) over yellow to red (they end `cap` of the box away)."""
    colours = [tuple(Image.new("HSV", (1, 1), (int(85 * (1 - min(e / cap, 1))), 230, 240)).convert("RGB").getpixel((0, 0)))
               for e in pair["errors"]]
    points = (torch.tensor(pair[f"{side}_kps"]) for side in ("src", "trg"))
    view = draw_matches(*(images.load(pair[side])[0] for side in ("src", "trg")), *points, height=160, colours=colours)
    page = Image.new("RGB", (view.width, view.height + 14), "white")
    page.paste(view, (0, 14))
    name = images.classes[images.labels[pair["src"]]]
    ImageDraw.Draw(page).text((2, 1), f"{name}  loop error {100 * pair['score']:.1f} %", fill="black")
    return page


def picture_page(views: list[Image.Image], width: int = 1400) -> Image.Image:
    """Pictures of one height set in rows."""
    places, x, y = [], 0, 0
    step = max(view.height for view in views) + 4
    for view in views:
        if x and x + view.width > width:
            x, y = 0, y + step
        places.append((x, y))
        x += view.width + 8
    page = Image.new("RGB", (width, y + step), "white")
    for view, place in zip(views, places):
        page.paste(view, place)
    return page


def draw_histograms(errors: dict[str, list[float]], kept: dict[str, list[float]], cap: float) -> Image.Image:
    """A histogram of the images' errors (0 to `cap`) for every class, the best class first; kept images green."""
    views = []
    for name in sorted(errors, key=lambda n: np.mean(errors[n])):
        view = Image.new("RGB", (168, 76), "white")
        draw = ImageDraw.Draw(view)
        every, best = (np.histogram(e[name], 20, (0, cap))[0] for e in (errors, kept))
        for k, (n, m) in enumerate(zip(every * 50 / every.max(), best * 50 / every.max())):
            draw.rectangle((4 + 8 * k, 72 - n, 10 + 8 * k, 72), fill=(190, 190, 200))
            draw.rectangle((4 + 8 * k, 72 - m, 10 + 8 * k, 72), fill=(40, 170, 70))
        draw.line((2, 73, 166, 73), fill="black")
        draw.text((4, 2), f"{name[:17]}  {100 * np.mean(errors[name]):.1f} %", fill="black")
        views.append(view)
    return picture_page(views)


def draw_pages(out: Path, images: data.ImageSet, folders: dict[str, Path], entries: list[tuple], cfg: LabelConfig) -> None:
    """Pictures in OUT/drawn: the best, the worst and any kept pairs, and the worst that were not kept.

    entries: (kind, score, step, shard, place) of every pair there is.
    """
    def load(some: list[tuple]) -> list[dict]:
        shards = ((place, json.loads((folders[step] / f"{k:06d}.json").read_text())) for _, _, step, k, place in some)
        return [shard["pairs"][place] for place, shard in shards]

    of = {kind: sorted(e for e in entries if e[0] == kind) for kind in ("kept", "dropped pairs", "dropped images")}
    any_order = np.random.default_rng(0).permutation(len(of["kept"]))[: cfg.draw]
    pages = {"best": of["kept"][: cfg.draw], "worst": of["kept"][::-1][: cfg.draw]}
    pages |= {"typical": [of["kept"][k] for k in any_order]}
    pages |= {k.replace(" ", "_"): of[k][::-1][: cfg.draw] for k in ("dropped pairs", "dropped images")}
    (out / "drawn").mkdir(exist_ok=True)
    for name, some in pages.items():
        path = out / "drawn" / f"{name}.jpg"
        path.unlink(missing_ok=True)
        if some:
            picture_page([draw_pair(images, pair, cfg.cap) for pair in load(some)]).save(path, quality=85)


def precision(images: data.Shapes, pair: dict) -> list[bool]:
    """Which matches of a pair of shapes lie within a tenth of the target's box of the true partner."""
    src, trg = (images.draw(pair[side]) for side in ("src", "trg"))
    truth = torch.from_numpy(corresponding_points(src, trg, np.array(pair["src_kps"])))
    x0, y0, x1, y1 = trg["bbox"]
    found = torch.tensor(pair["trg_kps"], dtype=torch.float64)
    return correct_points(found, truth, max(x1 - x0, y1 - y0), (0.1,))[:, 0].tolist()


def quantiles(values) -> list[float]:
    """Minimum, quartiles and maximum."""
    return [round(float(v), 4) for v in np.quantile(list(values), (0, 0.25, 0.5, 0.75, 1))] if len(values) else []


# ----------------------------------------------------------------------------------------------------------------------
# The run


class PhotoSet(CliqueSet):
    """The images of one chunk at a time as the detector takes them: RGB tensors in [0, 1] of their own size."""

    def __getitem__(self, number: int) -> dict:
        found, skipped = [], []
        for i in self.cliques[number]:
            try:
                image = self.images.load(i)[0]
            except ValueError as error:
                skipped.append((i, str(error)))
                continue
            found.append((i, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255))
        return {"found": found, "skipped": skipped}


def label(cfg: LabelConfig) -> dict:
    """Label a data set as configured; writes OUT/SC-ImageNet, names.json, summary.json and pictures; returns the summary."""
    out, worker, device = Path(cfg.out), Worker(cfg), find_device(cfg.device)
    saliency = {"saliency": "attention" if cfg.saliency == "attention" else "none"}
    cascade = load_cascade(cfg.checkpoint, cfg.weights, device, **saliency, **({"size": cfg.size} if cfg.size else {}))
    if cascade.cfg.stages == 2:
        raise ValueError(f"{cfg.checkpoint} ends with the region stage, which has no volume of whole images to label with")
    size, patch = cascade.cfg.size, cascade.backbone.patch
    maps = None if cfg.saliency in ("auto", "attention", "none") else cfg.saliency
    if cfg.dataset == "shapes":
        images = data.Shapes("train", cfg.saliency == "auto")
    else:
        images = data.class_folders(cfg.root, maps)
    chosen = read_names(cfg.keep_classes, images.classes) if cfg.keep_classes else set(images.classes)
    chosen -= read_names(cfg.drop_classes, images.classes) if cfg.drop_classes else set()
    members = {k: [i for i, of in enumerate(images.labels) if of == k] for k, n in enumerate(images.classes) if n in chosen}
    skipped: dict[int, str] = {}
    out.mkdir(parents=True, exist_ok=True)

    # What shards depend on; a path alone changes nothing.
    listing = "\n".join(f"{k}/{images.paths[i].name}" for k, some in members.items() for i in some)
    base = {"images": hashlib.sha256(listing.encode()).hexdigest()[:16]}
    boxes: dict[int, list[int]] = {}
    use_detector = cfg.detector or cfg.detector_weights is not None
    if use_detector:
        chunks = split_cliques([i for some in members.values() for i in some], 16)
        detector = load_detector(cfg.detector_weights, device)

        def detect(number: int, item: dict) -> dict:
            found = {}
            for i, photo in item["found"]:
                result = detector([photo.to(device)])[0]
                box = single_box(result["scores"].cpu(), result["boxes"].cpu(), (photo.shape[2], photo.shape[1]))
                if box:
                    found[i] = box
            return {"boxes": found, "skipped": item["skipped"]}

        with torch.no_grad():
            folder = worker.shards("detector", base, PhotoSet(images, chunks, size, patch), len(chunks), detect,
                                   lambda k: len(chunks[k]), " images")
        for record in read_shards(folder, len(chunks)):
            boxes |= {int(i): box for i, box in record["boxes"].items()}
            skipped |= {i: text for i, text in record["skipped"]}
        members = {k: [i for i in some if i in boxes] for k, some in members.items()}
        worker.say(f"{len(boxes)} images with exactly one object over 0.9")
        del detector

    # Closed loops in cliques of one class.
    usable = {k: some for k, some in members.items() if len(some) >= 3}
    for k in members.keys() - usable.keys():
        worker.say(f"class {images.classes[k]}: {len(members[k])} usable images, a loop needs 3; left out")
    cliques = []
    for k, some in usable.items():
        order = np.random.default_rng((cfg.seed, 0, k)).permutation(some).tolist()
        cliques += split_cliques(order, cfg.clique)
    if not cliques:
        raise ValueError("no class has three usable images" + (f"; the first: {min(skipped.values())}" if skipped else ""))

    def measure(number: int, item: dict) -> dict:
        clique, empty = build_clique(cascade, item, boxes, cfg.amp)
        record = {"skipped": item["skipped"], "empty": empty, "errors": {}, "loops": 0, "volumes": 0}
        if clique:
            n = len(clique.index)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and cfg.amp):
                found, _ = clique_maps(cascade, clique.feats, cfg.batch)
            errors = image_errors(clique, found, cfg.cap)
            record["errors"] = {i: round(e, 6) for i, e in zip(clique.index, errors)}
            record |= {"loops": (n - 1) * (n - 2), "volumes": n * (n - 1) // 2}
        return record

    def loops_of(number: int) -> int:
        n = len(cliques[number])
        return n * (n - 1) * (n - 2)

    base |= {name: getattr(cfg, name) for name in ("saliency", "loops", "cap", "seed")}
    base |= {"checkpoint": hashlib.sha256(Path(cfg.checkpoint).read_bytes()).hexdigest()[:16]}
    base |= {"size": size, "detector": use_detector}
    start = time.perf_counter()
    folder = worker.shards("loops", base, CliqueSet(images, cliques, size, patch), len(cliques), measure, loops_of, " loops")
    seconds = time.perf_counter() - start
    errors, loops, empty, totals = {}, {}, set(), [0, 0]
    for record in read_shards(folder, len(cliques)):
        errors |= {int(i): e for i, e in record["errors"].items()}
        loops |= {int(i): record["loops"] for i in record["errors"]}
        skipped |= {i: text for i, text in record["skipped"]}
        empty |= set(record["empty"])
        totals = [totals[0] + record["loops"] * len(record["errors"]), totals[1] + record["volumes"]]
    worker.say(f"{totals[0]:,} closed loops of {len(errors)} images from {totals[1]:,} volumes; this run: {seconds:.0f} s")
    if not errors:
        reason = f"; the first: {min(skipped.values())}" if skipped else "; no image has a foreground"
        raise ValueError(f"no clique of three usable images{reason}")

    # Images, then pairs of them.
    kept, worst = select_images(errors, images.labels, cfg)
    groups = [(split, k, group) for split, some in split_images(kept, cfg.val, cfg.seed).items()
              for k, found in some.items() if len(found) >= 3 for group in split_cliques(found, 2 * cfg.pairs + 2)]
    for k, found in kept.items():
        if len(found) < 3:
            worker.say(f"class {images.classes[k]}: {len(found)} of {len(usable[k])} images kept, no loops; left out")
    if not groups:
        raise ValueError(f"--keep {cfg.keep} keeps fewer than three images of every class; keep more, or --keep-by all")

    def pair_up(split: str, label: int, item: dict) -> dict:
        clique, _ = build_clique(cascade, item, boxes, cfg.amp)
        record = {"split": split, "class": label, "images": {}, "pairs": [], "volumes": 0, "possible": 0}
        if clique:
            n = len(clique.index)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and cfg.amp):
                found, partners = clique_maps(cascade, clique.feats, cfg.batch, matched=True)
            pairs = sorted(pair_matches(clique, found, partners, cfg), key=lambda p: p["score"])
            for k, pair in enumerate(pairs):
                pair |= {"src": clique.index[pair["src"]], "trg": clique.index[pair["trg"]]}
                pair["kept"] = split != "dropped" and k < cfg.pairs * n
            frames = zip(clique.index, clique.sizes, clique.boxes)
            record["images"] = {i: {"size": size, "box": box} for i, size, box in frames}
            record |= {"pairs": pairs, "volumes": n * (n - 1) // 2, "possible": n * (n - 1) // 2}
        return record

    base |= {name: getattr(cfg, name) for name in ("drop_worst", "keep", "keep_by", "pairs", "points", "fewest", "val")}
    steps = {"pairs": groups}
    truth = isinstance(images, data.Shapes)
    if truth or cfg.draw:  # what was dropped, to look at: never written to the label set
        rest = {k: [i for i in usable[k] if i in errors and i not in kept.get(k, [])] for k in usable}
        some = [("dropped", k, group) for k, found in rest.items() if len(found) >= 3
                for group in split_cliques(found, 2 * cfg.pairs + 2)[: None if truth else 1]]
        steps["dropped"] = some if truth else some[:: max(1, len(some) // 20)]
    folders, start = {}, time.perf_counter()
    for step, some in steps.items():
        folders[step] = worker.shards(step, base, CliqueSet(images, [g for *_, g in some], size, patch), len(some),
                                      lambda k, item, some=some: pair_up(*some[k][:2], item),
                                      lambda k, some=some: math.comb(len(some[k][2]), 2), " pairs")
    seconds = time.perf_counter() - start
    if worker.rank:
        return {}

    # Merging, by one process.
    write_tree(out, images, read_shards(folders["pairs"], len(groups)), cfg.images)
    entries, by_class, judged, volumes, possible = [], {}, [], 0, 0
    for step, some in steps.items():
        for number, record in enumerate(read_shards(folders[step], len(some))):
            row = by_class.setdefault(images.classes[record["class"]], {"trn": 0, "val": 0, "points": 0, "used": set()})
            volumes += record["volumes"]
            possible += record["possible"] if step == "pairs" else 0
            for place, pair in enumerate(record["pairs"]):
                kind = "kept" if pair["kept"] else "dropped images" if step == "dropped" else "dropped pairs"
                entries.append((kind, pair["score"], step, number, place))
                if kind == "kept":
                    row[record["split"]] += 1
                    row["points"] += len(pair["errors"])
                    row["used"] |= {pair["src"], pair["trg"]}
                if truth:
                    judged += [(kind, e, right) for e, right in zip(pair["errors"], precision(images, pair))]
    scores = [e[1] for e in entries if e[0] == "kept"]
    table = {}
    for k, name in enumerate(images.classes):
        mine = [i for i in errors if images.labels[i] == k]
        row = by_class.get(name, {"trn": 0, "val": 0, "points": 0, "used": set()})
        table[name] = {
            "images": images.labels.count(k),
            "measured": len(mine),
            "loops_an_image": min((loops[i] for i in mine), default=0),
            "error": round(float(np.mean([errors[i] for i in mine])), 4) if mine else None,
            "kept": len(kept.get(k, [])),
            "used": len(row["used"]),
            "pairs_trn": row["trn"],
            "pairs_val": row["val"],
            "points": row["points"],
        }
    used = {i for row in by_class.values() for i in row["used"]}
    summary = {
        "config": dataclasses.asdict(cfg) | {"size": size},
        "box": "detector" if use_detector else "foreground",
        "foreground": cfg.saliency if maps or cfg.saliency == "attention" else ("silhouettes" if images.__dict__.get("use_saliency") else "everything"),
        "images": {
            "seen": len(images), "unreadable": len(skipped), "without_foreground": len(empty), "measured": len(errors),
            "kept": sum(map(len, kept.values())), "used": len(used),
        },
        "classes_dropped": sorted(set(images.classes) - chosen), "classes_worst": [images.classes[k] for k in sorted(worst)],
        "loops": totals[0], "volumes": totals[1] + volumes,
        "pairs": {"trn": sum(r["pairs_trn"] for r in table.values()), "val": sum(r["pairs_val"] for r in table.values()),
                  "possible": possible},
        "points": sum(r["points"] for r in table.values()),
        "error_quantiles": {"images": quantiles(list(errors.values())), "kept_pairs": quantiles(scores)},
        "unreadable": sorted(skipped.values())[:20],
        "classes": table,
    }
    if truth:
        summary["precision"] = {
            kind: [round(100 * float(np.mean(some)), 1), len(some)]
            for kind in ("kept", "dropped pairs", "dropped images") if (some := [r for what, _, r in judged if what == kind])
        }
        edges = np.linspace(0, cfg.cap, 5)
        summary["precision"]["kept, by loop error"] = {
            f"{100 * a:.1f} to {100 * b:.1f} %": [round(100 * float(np.mean(some)), 1), len(some)] for a, b in zip(edges, edges[1:])
            if (some := [r for what, e, r in judged if what == "kept" and a <= e < b])
        }
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    if cfg.draw:
        draw_pages(out, images, folders, entries, cfg)
        best = {i for some in kept.values() for i in some}
        named = {name: [i for i in errors if images.labels[i] == k] for k, name in enumerate(images.classes)}
        histograms = [{n: [errors[i] for i in some if i in best or every] for n, some in named.items() if some}
                      for every in (True, False)]
        draw_histograms(*histograms, cfg.cap).save(out / "drawn" / "errors.png")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add_options(parser, LabelConfig)
    cfg = LabelConfig(**vars(parser.parse_args()))
    summary = label(cfg)
    if summary:
        print(json.dumps({k: v for k, v in summary.items() if k not in ("config", "classes")}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
