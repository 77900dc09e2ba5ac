"""Pseudo-labels of a trained cascade, written as SC-ImageNet (paper, sections 3.4 and 3.5; supplement, section 3).

    python label.py --checkpoint runs/quick/last.pt                                              # the built-in shapes
    python label.py --checkpoint F --dataset folder --root DIR --saliency MAPS --out labels --draw 20
    torchrun --nproc_per_node=8 label.py --checkpoint F --dataset folder --root ILSVRC2012/train --detector --out labels

1. Classes            a list of those to keep or to drop
2. Single instances   one confident box an image, by a detector (--detector)
3. Closed loops       every foreground cell travels s -> m -> t -> s; how far from its start it ends is the loop's error
4. Images             the most consistent share of every class
5. Pairs              of kept images: one-to-one matches, the best by their loops, whose direct transfer s -> t agrees
                      with the one through m
6. Merging            one tree that keypoint matchers read

A loop needs three volumes, but the volumes of all pairs of a clique of K images hold K (K-1) (K-2) loops: K = 12 gives
110 loops an image for 5.5 volumes an image. Of a volume only its two transfer maps stay (one point a cell), so a loop
is three look-ups. Every clique is a shard of its own under OUT/work: a killed run goes on where it stopped.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from evaluate import correct_points, draw_histograms, draw_pair, picture_page, processes
from modules import Features, Pairs, cells_to_xy, kernel_soft_argmax, pair_nms, select_pairs
from shapes import corresponding_points
from train import Cascade, add_options, find_device, leave_signals, load_cascade, training_set


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
    def clique_size(self) -> int:
        """The smallest K with (K - 1) (K - 2) >= loops."""
        return next(k for k in range(3, 10_000) if (k - 1) * (k - 2) >= self.loops)


# ----------------------------------------------------------------------------------------------------------------------
# Closed loops (section 3.4)


@torch.no_grad()
def clique_maps(cascade: Cascade, feats: Features, batch: int, matched: bool = False) -> tuple[Tensor, Tensor | None]:
    """Transfer maps between all ordered pairs of K images, from one volume for every two of them.

    A pair's volume is that of the image that comes first, read along its rows from first to second and along its
    columns back; no volume is kept. Returns maps (K, K, h, w, 2), maps[a, b, y, x] being the place (x, y) in cells of b
    that a's cell goes to, and, if `matched`, partners (K, K, h*w): the cell of b that Hough matching and Algorithm 1
    pair with a's cell, -1 where they give it none.
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

    maps (K, K, h, w, 2) of clique_maps. Returns `via` (K, K, N, 2), where m sends them in t, `back` (K, K, N, 2), where
    t sends those in s, both indexed [m, t] and in cells, and (K, K) bool: s, m and t are three images.
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
    """The matches of every two images of a clique, each pair in one direction.

    A match starts at a cell of s that one-to-one selection paired, and goes to its direct, sub-cell transfer s -> t. It
    is kept if that lies within 1.5 cells of the selected partner, inside t's box, and within a tenth of the box of
    where at least half of the other images m send it, and if any loop closes. Its score is the mean over m of its
    capped loop errors; of those kept, the best `points` are taken after non-maximum suppression with the largest
    radius, up to 4 cells, that loses no match against a radius of one. Every image is source and target equally often.

    Returns one dict a pair that has `fewest` matches: src and trg (numbers in the clique), src_kps and trg_kps in
    pixels, errors (shares of the source box), score (their mean).
    """
    count, (h, w) = len(maps), clique.feats.grid
    cells = cells_to_xy(torch.arange(h * w, device=maps.device), w)
    low, high = (torch.tensor(clique.boxes, device=maps.device)[:, None, k : k + 2] for k in (0, 2))
    order, score = [], []
    for s in range(count):
        via, back, real = closed_loops(maps, s)
        direct = maps[s].flatten(1, 2)  # (K, N, 2)
        loop = loop_errors(clique, s, back, cfg.cap)  # (m, t, N)
        apart = ((via - direct) * clique.stride[:, None]).norm(dim=-1) / clique.side[:, None]  # (m, t, N)
        votes, most = ((apart <= 0.1) & real[:, :, None]).sum(0), real.sum(0)[:, None]  # (t, N), (t, 1)
        agree = (votes > 0) & (2 * votes >= most)
        mean = (loop * real[:, :, None]).sum(0) / most.clamp(min=1)
        near = (direct - cells[partners[s].clamp(min=0)]).norm(dim=-1) <= 1.5
        pixels = (direct + 0.5) * clique.stride[:, None] - 0.5
        inside = ((pixels >= low) & (pixels <= high)).all(-1)
        good = (partners[s] >= 0) & agree & near & inside & (mean < cfg.cap)
        for t in range(count):
            if (t > s) == bool((s + t) % 2) and t != s:
                order.append((s, t))
                score.append(torch.where(good[t], mean[t], math.inf))
    found = []
    for first in range(0, len(order), cfg.batch):
        some = order[first : first + cfg.batch]
        src, trg = torch.tensor(some, device=maps.device).T
        error, cell = torch.stack(score[first : first + cfg.batch]).sort(dim=1, stable=True)  # best first
        valid = error.isfinite()
        error, cell, valid = (x[:, : max(1, int(valid.sum(1).max()))] for x in (error, cell, valid))
        ends = maps.flatten(2, 3)[src[:, None], trg[:, None], cell].round().long()  # (P, n, 2)
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
            kps = []
            for end, i in zip(ends, (s, t)):
                pixels, box = data.cells_to_pixels(end.cpu(), clique.sizes[i], (h, w)), torch.tensor(clique.boxes[i])
                # a foreground cell smaller than a pixel has its centre up to half a pixel off the box
                pixels = pixels.maximum(box[:2]).minimum(box[2:]).double().tolist()
                kps.append([[round(v, 2) for v in point] for point in pixels])
            errors = chosen.score[k, take].cpu().double()
            found.append(
                {
                    "src": s,
                    "trg": t,
                    "src_kps": kps[0],
                    "trg_kps": kps[1],
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
        names = {line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()}
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
        raise ValueError(
            f"cannot read the detector from {origin} ({reason}); give it with --detector-weights"
        ) from None
    return detector.to(device).eval()


def single_box(scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box of the only object over 0.9, whatever its class, in whole pixels inside the (W, H) image; None if there
    is not exactly one (section 3.5)."""
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

    def read(self, number: int) -> tuple[list[tuple], list[tuple[int, str]]]:
        """(index, image, saliency map) of what can be read, and (index, why) of the rest."""
        found, skipped = [], []
        for i in self.cliques[number]:
            try:
                found.append((i, *self.images.load(i)))
            except ValueError as error:
                skipped.append((i, str(error)))
        return found, skipped

    def __getitem__(self, number: int) -> dict:
        found, skipped = self.read(number)
        index, sizes = [i for i, *_ in found], [image.size for _, image, _ in found]
        pairs = [data.prepare(image, saliency, self.size, self.patch) for _, image, saliency in found]
        views, cells = ([pair[k] for pair in pairs if pair[k] is not None] for k in (0, 1))
        views, cells = (torch.stack(some) if some else None for some in (views, cells))
        return {"index": index, "views": views, "cells": cells, "sizes": sizes, "skipped": skipped}


def build_clique(cascade: Cascade, item: dict, boxes: dict[int, list[int]]) -> tuple[Clique | None, list[int]]:
    """Features, boxes and foreground of one item of CliqueSet; None if it has fewer than three usable images.

    boxes: those of a detector; outside of its box an image has no foreground. Without one, the box is that of the
    foreground. Also returns the images that have no foreground.
    """
    if not item["index"]:
        return None, []
    device = next(cascade.parameters()).device
    feats = cascade.features(item["views"], item["cells"])
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
    # 1 in the foreground and -1 elsewhere stand for it under every threshold
    feats = Features(feats.feat[keep], feats.token[keep], masks.view(-1, h, w) * 2.0 - 1)
    return Clique(index, feats, sizes, frames, stride, side, masks), empty


def split_cliques(members: list[int], size: int) -> list[list[int]]:
    """Cut a class into groups of at least `size` (fewer only where the class has fewer) and less than twice that."""
    count = max(1, len(members) // size)
    edges = [round(k * len(members) / count) for k in range(count + 1)]
    return [members[a:b] for a, b in zip(edges, edges[1:])]


# ----------------------------------------------------------------------------------------------------------------------
# Selection (section 3.5)


def share_of(share: float, count: int) -> int:
    """A share of a count, rounded down; 0.29 of 100 is 29."""
    return int(share * count + 1e-9)


def select_images(errors: dict[int, float], labels: list[int], cfg: LabelConfig) -> tuple[dict, set[int]]:
    """The images to keep, {class: [image, ...]}, the most consistent first, and the classes dropped as the worst."""
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
    """Kept images to trn and val, no image to both, in random order.

    Pairs need company, so a class gives val six images or more (half of its own, where it has fewer than twelve) or
    none. What it does not give is owed by the next. Six are owed from the start, so that some class gives some.
    """
    splits, due = {"trn": {}, "val": {}}, 6.0 if share else 0.0
    for label, members in kept.items():
        order = np.random.default_rng((seed, 1, label)).permutation(members).tolist()
        due += share * len(order)
        take = min(int(due), len(order) // 2) if due >= 6 and len(order) >= 6 else 0
        due -= take
        splits["val"][label], splits["trn"][label] = order[:take], order[take:]
    return splits


# ----------------------------------------------------------------------------------------------------------------------
# Pictures, precision, summary


def draw_pages(out: Path, images: data.ImageSet, entries: list[tuple], cfg: LabelConfig) -> None:
    """Pictures in OUT/drawn: the best, the worst and any kept pairs, and the worst that were not kept.

    entries: (kind, score, step, shard, place) of every pair there is; kind is "kept", "dropped pairs" or "dropped
    images".
    """

    def load(some: list[tuple]) -> list[dict]:
        return [read_json(shard_path(out, step, shard))["pairs"][place] for *_, step, shard, place in some]

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
            picture_page([draw_pair(images, pair) for pair in load(some)]).save(path, quality=85)


def precision(images: data.Shapes, pair: dict) -> list[bool]:
    """Which matches of a pair of shapes lie within a tenth of the target's box of the true partner."""
    src, trg = (images.draw(pair[side]) for side in ("src", "trg"))
    truth = torch.from_numpy(corresponding_points(src, trg, np.array(pair["src_kps"])))
    x0, y0, x1, y1 = trg["bbox"]
    found = torch.tensor(pair["trg_kps"], dtype=torch.float64)
    return correct_points(found, truth, max(x1 - x0, y1 - y0), (0.1,))[:, 0].tolist()


def precision_table(judged: list[tuple[str, float, bool]], cap: float) -> dict[str, list]:
    """Share of right matches in per cent, and their number, by kind and, of kept ones, by quarters of the loop error.

    judged: (kind, loop error, right) of every match.
    """
    rows = {
        kind: [right for what, _, right in judged if what == kind]
        for kind in ("kept", "dropped pairs", "dropped images")
    }
    edges = np.linspace(0, min(cap, 1), 5)
    for low, high in zip(edges, edges[1:]):
        name = f"kept, loop error {100 * low:.1f} to {100 * high:.1f} %"
        last = high == edges[-1]
        rows[name] = [right for what, e, right in judged if what == "kept" and low <= e and (e < high or last)]
    return {name: [round(100 * float(np.mean(some)), 1), len(some)] for name, some in rows.items() if some}


def quantiles(values: list[float]) -> list[float]:
    """Minimum, quartiles and maximum."""
    return [round(float(v), 4) for v in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))]


# ----------------------------------------------------------------------------------------------------------------------
# The run


def progress(*arguments, **options) -> tqdm:
    """A progress bar: often on a terminal, a line a minute in the log of a job, nothing in that of a short one."""
    slow = {} if sys.stderr.isatty() else {"delay": 60, "mininterval": 60}
    return tqdm(*arguments, **options, **slow)


def shard_path(out: str | Path, step: str, number: int) -> Path:
    """The file of one shard."""
    return Path(out, "work", step, f"{number:06d}.json")


def read_json(path: Path) -> dict:
    """A file of the work; ValueError names it if a crash has damaged it."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged; delete it, and the same command makes it anew") from None


def digest(content) -> str:
    """Sixteen characters that tell one bytes, text or plain value from another."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(raw).hexdigest()[:16]


class PhotoSet(CliqueSet):
    """The images of one chunk at a time for the detector: RGB bytes (3, H, W) of their own size."""

    def __getitem__(self, number: int) -> dict:
        found, skipped = self.read(number)
        photos = []
        for i, image, _ in found:
            if max(image.size) > 20 * min(image.size):
                size = f"{image.width}x{image.height} px"
                skipped.append((i, f"{self.images.paths[i]}: {size} is too narrow to detect in"))
            else:
                photos.append((i, torch.from_numpy(np.array(image)).permute(2, 0, 1)))
        return {"found": photos, "skipped": skipped}


class Labeller:
    """The steps of a run, in the paper's order. All of torchrun's processes go through all of them and share out the
    shards: one file a clique, written whole or not at all."""

    def __init__(self, cfg: LabelConfig) -> None:
        check(cfg)
        self.rank, self.world = processes()
        self.cfg, self.device = cfg, find_device(cfg.device)
        overrides = {"saliency": "attention" if cfg.saliency == "attention" else "none"}
        overrides |= {"size": cfg.size} if cfg.size else {}
        self.cascade = load_cascade(cfg.checkpoint, cfg.weights, self.device, **overrides)
        if self.cascade.cfg.stages == 2:
            raise ValueError(f"{cfg.checkpoint} ends with the region stage, which has no volume of whole images")
        if (size := self.cascade.cfg.size) % (patch := self.cascade.backbone.patch):
            raise ValueError(f"--size {size}: not a multiple of the backbone's patch of {patch} px")
        self.images = training_set(cfg)
        names = self.images.classes
        chosen = read_names(cfg.keep_classes, names) if cfg.keep_classes else set(names)
        chosen -= read_names(cfg.drop_classes, names) if cfg.drop_classes else set()
        every = self.images.members()
        self.members = {k: some for k, (name, some) in enumerate(zip(names, every)) if name in chosen}
        self.skipped: dict[int, str] = {}  # unreadable images and why
        self.boxes: dict[int, list[int]] = {}  # a detector's
        if not self.members:
            raise ValueError(f"--keep-classes {cfg.keep_classes}, --drop-classes {cfg.drop_classes}: no class remains")
        self.seen = sum(map(len, self.members.values()))
        self.use_detector = cfg.detector or cfg.detector_weights is not None
        # What shards depend on; it grows from step to step. Folders may move; the names in them may not change.
        listing = [f"{names[k]}/{self.images.paths[i].name}" for k, some in self.members.items() for i in some]
        self.settings = {"file names": digest(listing)}
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if self.world > 1:
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))

    def wait(self) -> None:
        """For the other processes."""
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def shards(self, step: str, items: CliqueSet, costs: list[int], unit: str, make) -> None:
        """Make the shards of one step that are not there yet, `make(number, item)` being the record of one. costs: each
        shard's part of the progress bar, in `unit`s.

        Raises ValueError if the shards that are there were made with other settings, of other images or boxes.
        """
        folder = Path(self.cfg.out, "work", step)
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            groups = digest([items.cliques, sorted(self.boxes.items())])
            stored, settings = folder / "settings.json", json.loads(json.dumps(self.settings | {"groups": groups}))
            old = read_json(stored) if stored.exists() else settings
            if old != settings:
                what = next(k for k in settings | old if settings.get(k) != old.get(k))
                raise ValueError(
                    f"{folder} was made with {what} {old.get(what)}, not {settings.get(what)}; give another --out,"
                    f" or delete {folder} to make it anew"
                )
            data.write_whole(stored, json.dumps(settings, indent=1))
        self.wait()
        todo = [k for k in range(self.rank, len(costs), self.world) if not shard_path(self.cfg.out, step, k).exists()]
        loader = DataLoader(
            items, sampler=todo, batch_size=None, num_workers=self.cfg.workers, worker_init_fn=leave_signals
        )
        start, total = time.perf_counter(), sum(costs[k] for k in todo)
        with progress(total=total, desc=step, unit=f" {unit}", unit_scale=True, disable=self.rank != 0) as bar:
            for number, item in zip(todo, loader):
                data.write_whole(shard_path(self.cfg.out, step, number), json.dumps(make(number, item)))
                bar.update(costs[number])
        self.wait()
        seconds = time.perf_counter() - start
        if todo:
            others = f" in each of {self.world} processes" if self.world > 1 else ""
            self.say(f"{step}: {total:,} {unit} in {seconds:.0f} s, {total / seconds:,.1f} a second{others}")

    def records(self, step: str, count: int) -> Iterator[dict]:
        """The records of a step's shards, in order, read one at a time."""
        for number in progress(range(count), desc=f"reading {step}", leave=False, disable=self.rank != 0):
            yield read_json(shard_path(self.cfg.out, step, number))

    def clique_set(self, groups: list[list[int]]) -> CliqueSet:
        return CliqueSet(self.images, groups, self.cascade.cfg.size, self.cascade.backbone.patch)

    def clique(self, item: dict, matched: bool = False) -> tuple:
        """build_clique and, unless it is None, clique_maps: clique, images without foreground, maps, partners."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and self.cfg.amp):
            clique, empty = build_clique(self.cascade, item, self.boxes)
            found = clique_maps(self.cascade, clique.feats, self.cfg.batch, matched) if clique else (None, None)
        return clique, empty, *found

    def detect(self) -> None:
        """Single instances: images with exactly one object over 0.9, and its box (section 3.5)."""
        if not self.use_detector:
            return
        if self.cfg.detector_weights:
            self.settings["detector"] = digest(Path(self.cfg.detector_weights).read_bytes())
        chunks = split_cliques([i for some in self.members.values() for i in some], 16)
        detector = load_detector(self.cfg.detector_weights, self.device)

        @torch.no_grad()
        def make(number: int, item: dict) -> dict:
            boxes = {}
            for i, photo in item["found"]:
                result = detector([photo.to(self.device) / 255])[0]
                boxes[i] = single_box(result["scores"].cpu(), result["boxes"].cpu(), (photo.shape[2], photo.shape[1]))
            return {"boxes": {i: box for i, box in boxes.items() if box}, "skipped": item["skipped"]}

        items = PhotoSet(self.images, chunks, 0, 1)
        self.shards("detector", items, [len(chunk) for chunk in chunks], "images", make)
        boxes = {}
        for record in self.records("detector", len(chunks)):
            boxes |= {int(i): box for i, box in record["boxes"].items()}
            self.skipped |= dict(record["skipped"])
        self.boxes, self.undetected = boxes, set(self.skipped)
        self.members = {k: [i for i in some if i in self.boxes] for k, some in self.members.items()}
        self.say(f"{len(self.boxes)} images with exactly one object over 0.9")

    def measure(self) -> None:
        """Closed loops in cliques of every class: the error of every image and how many loops it is the mean of."""
        cfg = self.cfg
        self.settings |= {name: getattr(cfg, name) for name in ("loops", "cap", "seed")}
        folder = self.images.saliency and str(Path(self.images.saliency).resolve())
        self.settings |= {"saliency": folder or cfg.saliency, "size": self.cascade.cfg.size}
        self.settings |= {"checkpoint": digest(Path(cfg.checkpoint).read_bytes())}
        cliques = []
        for k, some in self.members.items():
            if len(some) < 3:
                self.say(f"class {self.images.classes[k]}: {len(some)} images, a loop needs 3; left out")
                continue
            order = np.random.default_rng((cfg.seed, 0, k)).permutation(some).tolist()
            cliques += split_cliques(order, cfg.clique_size)

        def make(number: int, item: dict) -> dict:
            clique, empty, maps, _ = self.clique(item)
            errors = image_errors(clique, maps, cfg.cap) if clique else []
            found = {i: round(e, 6) for i, e in zip(clique.index, errors)} if clique else {}
            return {"skipped": item["skipped"], "empty": empty, "errors": found}

        costs = [6 * math.comb(len(some), 3) for some in cliques]
        self.errors, self.loops, self.empty, self.volumes = {}, {}, set(), 0
        self.shards("loops", self.clique_set(cliques), costs, "loops", make)
        for record in self.records("loops", len(cliques)):
            self.errors |= {int(i): e for i, e in record["errors"].items()}
            n = len(record["errors"])
            self.loops |= {int(i): (n - 1) * (n - 2) for i in record["errors"]}
            self.volumes += math.comb(n, 2)
            self.skipped |= dict(record["skipped"])
            self.empty |= set(record["empty"])
        if not self.errors:
            counts = f"{len(self.skipped)} unreadable, {len(self.empty)} without foreground"
            first = f"; the first: {min(self.skipped.values())}" if self.skipped else ""
            raise ValueError(f"no class has three usable images ({counts}){first}")

    def pair(self) -> None:
        """Pairs of kept images in new cliques; to be looked at, also of dropped ones."""
        cfg, names = self.cfg, self.images.classes
        chosen = ("drop_worst", "keep", "keep_by", "pairs", "points", "fewest", "val")
        self.settings |= {name: getattr(cfg, name) for name in chosen}
        self.kept, self.worst = select_images(self.errors, self.images.labels, cfg)
        for k, some in self.kept.items():
            if len(some) < 3:
                self.say(f"class {names[k]}: {len(some)} images kept, a loop needs 3; left out")
        size = 2 * cfg.pairs + 2  # such a clique has half a pair an image more than are wanted
        self.groups = {"pairs": [], "dropped": []}
        for split, classes in split_images(self.kept, cfg.val, cfg.seed).items():
            for k, some in classes.items():
                self.groups["pairs"] += [(split, k, g) for g in split_cliques(some, size) if len(g) >= 3]
        if not self.groups["pairs"]:
            raise ValueError(
                f"--keep {cfg.keep} and --drop-worst {cfg.drop_worst} leave no class three images; keep more"
            )
        self.best = {i for some in self.kept.values() for i in some}
        if self.truth or cfg.draw:
            for k, some in self.members.items():
                rest = [i for i in some if i in self.errors and i not in self.best]
                cut = split_cliques(rest, size) if self.truth else [rest[:6]]  # of photographs, a few to look at
                self.groups["dropped"] += [("dropped", k, group) for group in cut if len(group) >= 3]
        for step, groups in self.groups.items():

            def make(number: int, item: dict, groups=groups) -> dict:
                split, k, _ = groups[number]
                clique, _, maps, partners = self.clique(item, matched=True)
                record = {"split": split, "class": k, "images": {}, "pairs": []}
                if clique:
                    pairs = pair_matches(clique, maps, partners, cfg)
                    for rank, pair in enumerate(sorted(pairs, key=lambda p: p["score"])):
                        kept = split != "dropped" and rank < cfg.pairs * len(clique.index)
                        pair |= {"src": clique.index[pair["src"]], "trg": clique.index[pair["trg"]], "kept": kept}
                        record["pairs"].append(pair)
                    frames = zip(clique.index, clique.sizes, clique.boxes)
                    record["images"] = {i: {"size": size, "box": box} for i, size, box in frames}
                return record

            costs = [math.comb(len(group), 2) for *_, group in groups]
            self.shards(step, self.clique_set([g for *_, g in groups]), costs, "pairs", make)

    @property
    def truth(self) -> bool:
        """Whether the true partner of any point is known."""
        return isinstance(self.images, data.Shapes)

    def merge(self) -> dict:
        """The label set from the shards of pairs, its summary and its pictures, by one process."""
        cfg, out, names = self.cfg, Path(self.cfg.out), self.images.classes
        entries, judged, used, rows = [], [], set(), {}
        for k, (name, members) in enumerate(zip(names, self.images.members())):
            mine = [i for i in members if i in self.errors]
            rows[name] = {
                "images": len(members),
                "measured": len(mine),
                "loops": min((self.loops[i] for i in mine), default=0),
                "error": round(float(np.mean([self.errors[i] for i in mine])), 4) if mine else None,
                "kept": len(self.kept.get(k, [])),
            } | dict.fromkeys(("trn", "val", "points"), 0)
        for step, groups in self.groups.items():
            for number, record in enumerate(self.records(step, len(groups))):
                self.volumes += math.comb(len(record["images"]), 2) if step == "pairs" else 0
                for place, pair in enumerate(record["pairs"]):
                    kind = "kept" if pair["kept"] else "dropped images" if step == "dropped" else "dropped pairs"
                    entries.append((kind, pair["score"], step, number, place))
                    if kind == "kept":
                        used |= {pair["src"], pair["trg"]}
                        rows[names[record["class"]]][record["split"]] += 1
                        rows[names[record["class"]]]["points"] += len(pair["errors"])
                    if self.truth:
                        judged += [(kind, *both) for both in zip(pair["errors"], precision(self.images, pair))]
        if not used:
            raise ValueError(f"no pair has --fewest {cfg.fewest} matches; ask for fewer, or a larger --size")
        data.write_label_tree(out, self.images, self.records("pairs", len(self.groups["pairs"])), cfg.images)

        empty = [f"empty file: {path}" for path in self.images.empty]
        funnel = {"seen": self.seen + len(empty), "unreadable": len(self.skipped) + len(empty)}
        if self.use_detector:
            funnel["without_a_single_object"] = self.seen - len(self.boxes) - len(self.undetected)
        funnel |= {"without_foreground": len(self.empty), "measured": len(self.errors)}
        funnel["alone"] = 2 * funnel["seen"] - sum(funnel.values())  # in classes or cliques with fewer than three
        summary = {
            "config": dataclasses.asdict(cfg) | {"size": self.cascade.cfg.size, "cap": min(cfg.cap, 1e9)},
            "box": "detector" if self.use_detector else "foreground",
            "images": funnel | {"kept": len(self.best), "used": len(used)},
            "loops": sum(self.loops.values()),
            "volumes": self.volumes,
            "pairs": {split: sum(row[split] for row in rows.values()) for split in ("trn", "val")},
            "points": sum(row["points"] for row in rows.values()),
            "image_error_quantiles": quantiles(list(self.errors.values())),
            "pair_error_quantiles": quantiles([score for kind, score, *_ in entries if kind == "kept"]),
            "unreadable": sorted(self.skipped.values()) + empty,
            "worst_classes": sorted(names[k] for k in self.worst),
            "classes": rows,
        }
        if self.truth:
            summary["precision"] = precision_table(judged, cfg.cap)
        data.write_whole(out / "summary.json", json.dumps(summary, indent=1))
        if cfg.draw:
            draw_pages(out, self.images, entries, cfg)
            lists = [{name: [] for name in rows if rows[name]["measured"]} for _ in range(2)]
            for i, error in self.errors.items():
                for some in lists if i in self.best else lists[:1]:
                    some[names[self.images.labels[i]]].append(error)
            draw_histograms(*lists).save(out / "drawn" / "errors.png")
        return summary


def check(cfg: LabelConfig) -> None:
    """ValueError, in one line, for options that cannot be."""
    if not cfg.checkpoint:
        raise ValueError("give --checkpoint FILE, written by train.py")
    for name, known in (("dataset", ("shapes", "folder")), ("keep_by", ("class", "all")), ("images", ("link", "copy"))):
        if getattr(cfg, name) not in known:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {' or '.join(known)}")
    if cfg.dataset == "shapes" and cfg.saliency not in ("auto", "attention", "none"):
        raise ValueError(f"--saliency {cfg.saliency}: shapes have silhouettes of their own; auto, attention or none")
    limits = {"loops": (2, 10**6), "cap": (1e-3, math.inf), "keep": (0, 1), "drop_worst": (0, 0.99), "val": (0, 0.5)}
    limits |= {"pairs": (1, 1000), "points": (1, 40), "fewest": (1, cfg.points), "batch": (1, 10**6), "draw": (0, 500)}
    limits |= {"size": (0, 10**4), "seed": (0, 2**63), "workers": (0, 1000)}
    for name, (low, high) in limits.items():
        if not low <= getattr(cfg, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: from {low} to {high}")
    if bad := set("[]*?") & set(str(Path(cfg.out).resolve())):
        raise ValueError(f"--out {cfg.out}: the loaders of label sets glob, so no {min(bad)} may be in the path")


def print_summary(summary: dict, out: str) -> None:
    """The summary in a dozen lines, and one a class."""
    print(f"{'class':24s}{'images':>8s}{'loops':>8s}{'error %':>9s}{'kept':>7s}{'trn':>8s}{'val':>7s}{'points':>9s}")
    for name, row in summary["classes"].items():
        error = "-" if row["error"] is None else f"{100 * row['error']:.1f}"
        counts = f"{row['kept']:7d}{row['trn']:8d}{row['val']:7d}{row['points']:9d}"
        print(f"{name[:23]:24s}{row['measured']:8d}{row['loops']:8d}{error:>9s}{counts}")
    print("images: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in summary["images"].items()))
    print(f"boxes are those of the {summary['box']}")
    for text in summary["unreadable"][:5]:
        print(f"    {text}", file=sys.stderr)
    if summary["unreadable"]:
        print(f"    to read them again, delete {out}/work", file=sys.stderr)
    pairs = sum(summary["pairs"].values())
    print(f"{summary['loops']:,} closed loops and {pairs:,} pairs from {summary['volumes']:,} volumes")
    for name in ("image", "pair"):
        values = " ".join(f"{100 * v:.1f}" for v in summary[f"{name}_error_quantiles"])
        print(f"{name} errors, minimum, quartiles and maximum, in % of the box: {values}")
    for kind, (share, count) in summary.get("precision", {}).items():
        print(f"right within a tenth of the box, {kind}: {share} % of {count:,} matches")
    trn, val = summary["pairs"].values()
    if not val:
        print("val has no pairs, and the loaders want some: see --val, --keep and --fewest", file=sys.stderr)
    print(f"{out}/SC-ImageNet: {trn:,} trn and {val:,} val pairs, {summary['points'] / pairs:.1f} points a pair")


def label(cfg: LabelConfig) -> dict:
    """Label a data set: writes OUT/SC-ImageNet, names.json, summary.json and pictures; returns the summary."""
    run = Labeller(cfg)
    run.detect()
    run.measure()
    run.pair()
    summary = run.merge() if run.rank == 0 else {}
    run.wait()
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    add_options(parser, LabelConfig)
    cfg = LabelConfig(**vars(parser.parse_args()))
    if summary := label(cfg):
        print_summary(summary, cfg.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
