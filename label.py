"""Pseudo-labels of a trained cascade, written as SC-ImageNet (paper, sections 3.4 and 3.5; supplement, 3).

    python label.py                                               # the built-in shapes, after python train.py
    python label.py --checkpoint F --root DIR --saliency MAPS --out labels --draw 20
    torchrun --nproc_per_node=8 label.py --checkpoint F --root ILSVRC2012/train --saliency MAPS \\
        --drop-classes FILE --detector --workers 4 --out labels

The steps are the calls of `main`:

1. Classes            those that a file names are left out
2. Single instances   one confident box per image, by a detector (--detector)
3. Closed loops       every foreground cell travels s -> m -> t -> s; how far from its start it ends is the
                      loop's error
4. Images             the most consistent share of every class
5. Pairs              of kept images: one-to-one matches, the best by their loops, whose direct transfer
                      s -> t agrees with the one through m
6. Label set          one tree that keypoint matchers read, and a summary of what came of it

A loop needs three volumes, but the volumes of all pairs of a clique of K images hold K (K-1) (K-2) loops:
K = 12 gives 110 loops an image for 5.5 volumes an image. Of a volume only its two transfer maps stay (one
point a cell), so a loop is three look-ups. Every clique is a shard of its own under OUT/work: a killed run
goes on where it stopped.
"""

import argparse
import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from modules import Features, Pairs, cells_to_xy, kernel_soft_argmax, pair_nms, read_at, select_pairs
from support import shards
from support.benchmarks import training_set
from support.detector import Boxes, Singles, detect
from support.files import reason_of
from support.label_report import report
from support.label_tree import check_places, write_label_tree
from support.options import AT_LEAST_1, SEEDS, SHARE, add_options, check_ranges
from support.ours import FACING_MARGIN, both_faces, faces_other_way, match_score
from support.run import command, find_device
from support.shapes import Shapes
from support.shards import ImageGroups, Members, Records, interruptible, run_shards, say
from train import Cascade, load_cascade

# Nobody sets these, and the paper does not give them.
CAP = 0.1  # a loop's error counts at most this share of the box: a lost loop is lost, however far it went
FEWEST = 8  # matches a pair needs; the paper's pairs have 32 each
VAL = 0.05  # share of the kept images that makes the val split: the loaders of label sets want one

RANGES = {  # of other numbers: not negative
    "loops": (2, 10**6), "keep": SHARE, "pairs": (1, 1000), "points": (FEWEST, 40), "draw": (0, 500),
    "seed": SEEDS, "batch": AT_LEAST_1,
}


@dataclass
class LabelConfig:
    """A labelling run."""

    # group: data
    checkpoint: str = "runs/quick/last.pt"  # checkpoint written by train.py
    weights: str | None = None  # backbone weights file, where the checkpoint's own path is gone
    dataset: Literal["shapes", "folder"] = "shapes"  # folder: ROOT/<class>/*.jpg, which --root alone means
    root: str | None = None  # folder of class folders
    saliency: str = "auto"  # folder of <class>/<image>_sal.png; attention; none; auto: silhouettes of shapes
    size: int = 0  # input side in pixels; 0: the checkpoint's
    # group: paper
    drop_classes: str | None = None  # file with names of classes to leave out; paper: 321 of 1,000, by hand
    detector: bool = False  # keep images with one object over 0.9 (COCO detector, downloaded on first use)
    detector_weights: str | None = None  # local file of its weights
    facing: bool = True  # ours: pairs that face opposite ways, as their clique decides, are matched mirrored
    loops: int = 100  # closed loops an image at least, where its class is large enough; paper: 100
    keep: float = 0.3  # share of every class's images that is kept, rounded down; paper: 0.3
    pairs: int = 7  # pairs an image that is kept; paper: 794,612 / 113,516 = 7
    points: int = 32  # matches a pair at most; paper: 32
    # group: run
    out: str = "labels"  # folder for the label set, its pictures and the shards of the work
    images: Literal["link", "copy"] = "link"  # how photographs come into the tree
    draw: int = 0  # pairs on each of the pictures in OUT/drawn
    seed: int = 0  # of the cliques
    batch: int = 8  # volumes at a time
    workers: int = 0  # processes that load images
    device: str = "auto"  # auto: a GPU if there is one; cpu; cuda

    @property
    def clique_size(self) -> int:
        """The smallest K with (K - 1) (K - 2) >= loops."""
        return next(k for k in range(3, 10_000) if (k - 1) * (k - 2) >= self.loops)

    @property
    def pair_clique_size(self) -> int:
        """The K of cliques with half a pair an image more than are wanted."""
        return 2 * self.pairs + 2


# ------------------------------------------------------------------------------------------------------------
# Closed loops (section 3.4)


class Clique(NamedTuple):
    """K images of one class on their way: features, frames, and what transfer maps are measured with."""

    index: list[int]  # of the images in their set
    feats: Features
    sizes: list[tuple[int, int]]  # (W, H)
    boxes: list[tuple[int, int, int, int]]  # (xmin, ymin, xmax, ymax) in pixels of the image
    stride: Tensor  # (K, 2): pixels of the image a cell, along x and y
    side: Tensor  # (K,): longer side of the box in pixels, the yardstick of PCK
    foreground: Tensor  # (K, N) bool


@torch.no_grad()
def clique_maps(cascade: Cascade, feats: Features, batch: int,
                matched: bool = False) -> tuple[Tensor, Tensor]:
    """Transfer maps between all ordered pairs of K images, from one volume for every two of them, or, of
    features with their mirror images', from two: the second with the mirror image, its map put back into the
    image, is taken where the clique finds that the two face opposite ways.

    A pair's volume is that of the image that comes first, read along its rows from first to second and along
    its columns back; no volume is kept. Returns maps (K, K, h, w, 2), maps[a, b, y, x] being the place (x, y)
    in cells of b that a's cell goes to, and partners (K, K, h*w): the cell of b that Hough matching and
    Algorithm 1 pair with a's cell; -1 where they give it none, and everywhere unless `matched`.
    """
    count, (h, w) = len(feats.feat), feats.grid
    views = [feats] if feats.mirror is None else [feats, feats.mirror]
    maps = feats.saliency.new_zeros(len(views), count, count, h, w, 2)
    partners = torch.full(maps.shape[:3] + (h * w,), -1, device=maps.device)
    scores = maps.new_zeros(maps.shape[:3])
    first, second = torch.triu_indices(count, count, 1, device=maps.device)
    groups = list(zip(first.split(batch), second.split(batch)))
    for (k, view), (a, b) in itertools.product(enumerate(views), groups):
        src, trg = feats.map(lambda x, a=a: x[a]), view.map(lambda x, b=b: x[b])
        corr = cascade.volume(src, trg)
        own = corr.flip(4) if k else corr  # in the target's own cells
        maps[k, a, b], maps[k, b, a] = kernel_soft_argmax(own), kernel_soft_argmax(own.permute(0, 3, 4, 1, 2))
        scores[k, a, b] = scores[k, b, a] = match_score(corr, src.saliency > 0, trg.saliency > 0)
        if matched:
            pairs = select_pairs(corr, src, trg, cascade.cfg)
            m, n = pairs.valid.nonzero(as_tuple=True)
            i, j = pairs.src[m, n], pairs.trg[m, n]
            j = j + k * (w - 1 - 2 * (j % w))  # put back
            partners[k, a[m], b[m], i], partners[k, b[m], a[m], j] = j, i
    away = faces_other_way(scores[-1] - scores[0] - FACING_MARGIN)  # none, of one view
    maps = torch.where(away[..., None, None, None], maps[-1], maps[0])
    return maps, torch.where(away[..., None], partners[-1], partners[0])


def closed_loops(maps: Tensor, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """All loops s -> m -> t -> s of all N cells of image s (section 3.4).

    maps (K, K, h, w, 2) of clique_maps. Returns `via` (K, K, N, 2), where m sends them in t, `back`
    (K, K, N, 2), where t sends those in s, both indexed [m, t] and in cells, and (K, K) bool: s, m and t are
    three images.
    """
    count, planes = len(maps), maps.permute(0, 1, 4, 2, 3)  # (K, K, 2, h, w)
    direct = maps[s].flatten(1, 2).repeat_interleave(count, 0)  # (m, t) -> s's cells in m
    via = read_at(planes.flatten(0, 1), direct)
    back = read_at(planes[:, s].repeat(count, 1, 1, 1), via)
    real = ~torch.eye(count, dtype=torch.bool, device=maps.device)
    real[s], real[:, s] = False, False
    return via.unflatten(0, (count, count)), back.unflatten(0, (count, count)), real


def loop_errors(clique: Clique, s: int, back: Tensor) -> Tensor:
    """How far loops end from their start, in shares of the longer side of s's box and at most CAP.

    back (..., N, 2), the ends of loops of all N cells of image s; returns (..., N).
    """
    start = cells_to_xy(torch.arange(back.shape[-2], device=back.device), clique.feats.grid[1])
    return (((back - start) * clique.stride[s]).norm(dim=-1) / clique.side[s]).clamp(max=CAP)


def image_errors(clique: Clique, maps: Tensor) -> list[float]:
    """An image's error: the mean over its foreground cells and over all loops that start in it."""
    errors = []
    for s in range(len(maps)):
        _, back, real = closed_loops(maps, s)
        errors.append(float(loop_errors(clique, s, back[real])[:, clique.foreground[s]].mean()))
    return errors


# ------------------------------------------------------------------------------------------------------------
# Pairs of a clique: 32 matches of two images, by their loops (section 3.4)


def match_errors(clique: Clique, maps: Tensor, partners: Tensor, s: int) -> Tensor:
    """Errors (K, N) of the matches from image s's N cells to every image t; inf where a cell has none.

    A match starts at a cell of s that one-to-one selection paired, and goes to its direct, sub-cell transfer
    s -> t. It is kept if that lies within 1.5 cells of the selected partner, inside t's box, and within a
    tenth of the box of where at least half of the other images m send it, and if any loop closes. Its error
    is the mean over m of its loops' errors.
    """
    cells = cells_to_xy(torch.arange(partners.shape[-1], device=maps.device), clique.feats.grid[1])
    low, high = (torch.tensor(clique.boxes, device=maps.device)[:, None, k : k + 2] for k in (0, 2))
    via, back, real = closed_loops(maps, s)
    direct = maps[s].flatten(1, 2)  # (K, N, 2)
    loop = loop_errors(clique, s, back)  # (m, t, N)
    apart = ((via - direct) * clique.stride[:, None]).norm(dim=-1) / clique.side[:, None]  # (m, t, N)
    votes, most = ((apart <= 0.1) & real[:, :, None]).sum(0), real.sum(0)[:, None]  # (t, N), (t, 1)
    agree = (votes > 0) & (2 * votes >= most)
    error = (loop * real[:, :, None]).sum(0) / most.clamp(min=1)
    near = (direct - cells[partners[s].clamp(min=0)]).norm(dim=-1) <= 1.5
    pixels = (direct + 0.5) * clique.stride[:, None] - 0.5
    inside = ((pixels >= low) & (pixels <= high)).all(-1)
    return torch.where((partners[s] >= 0) & agree & near & inside & (error < CAP), error, math.inf)


def spread_out(pairs: Pairs, width: int, count: int) -> Pairs:
    """The best `count` matches after non-maximum suppression with the largest radius, up to 4 cells, that
    loses no match against a radius of one."""
    chosen = pair_nms(pairs, width, width, 1, count)
    for radius in (2, 3, 4):
        spread = pair_nms(pairs, width, width, radius, count)
        enough = spread.valid.sum(1) >= chosen.valid.sum(1)
        chosen = Pairs(*(torch.where(enough[:, None], b, a) for a, b in zip(chosen, spread)))
    return chosen


def annotate(clique: Clique, ends: tuple[int, int], cells: tuple[Tensor, Tensor], errors: Tensor) -> dict:
    """A pair's record: src and trg (images of the set), src_kps and trg_kps in pixels, errors in shares of
    src's box, and score, their mean. ends: two images of the clique; cells (n, 2) in each; errors (n,)."""
    kps = []
    for i, points in zip(ends, cells):
        box = torch.tensor(clique.boxes[i])
        pixels = data.cells_to_pixels(points.cpu(), clique.sizes[i], clique.feats.grid)
        # a foreground cell smaller than a pixel has its centre up to half a pixel off the box
        pixels = pixels.maximum(box[:2]).minimum(box[2:]).double().tolist()
        kps.append([[round(v, 2) for v in point] for point in pixels])
    (src, trg), errors = (clique.index[i] for i in ends), errors.cpu().double()
    return {"src": src, "trg": trg, "src_kps": kps[0], "trg_kps": kps[1],
            "errors": [round(e, 4) for e in errors.tolist()], "score": round(float(errors.mean()), 6)}


@torch.no_grad()
def pair_matches(clique: Clique, maps: Tensor, partners: Tensor, cfg: LabelConfig) -> list[dict]:
    """The matches of every two images of a clique, each pair in one direction, every image source and target
    equally often: `annotate`'s record of those that have FEWEST matches."""
    count, w = len(maps), clique.feats.grid[1]
    errors = [match_errors(clique, maps, partners, s) for s in range(count)]
    order = [(s, t) for s in range(count) for t in range(count) if t != s and (t > s) == bool((s + t) % 2)]
    found = []
    for first in range(0, len(order), cfg.batch):
        some = order[first : first + cfg.batch]
        src, trg = torch.tensor(some, device=maps.device).T
        error, cell = torch.stack([errors[s][t] for s, t in some]).sort(dim=1, stable=True)  # best first
        valid = error.isfinite()
        error, cell, valid = (x[:, : max(1, int(valid.sum(1).max()))] for x in (error, cell, valid))
        ends = maps.flatten(2, 3)[src[:, None], trg[:, None], cell].round().long()  # (P, n, 2)
        chosen = spread_out(Pairs(cell, ends[..., 1] * w + ends[..., 0], error, valid), w, cfg.points)
        for k, (s, t) in enumerate(some):
            take = chosen.valid[k]
            if take.sum() >= FEWEST:
                start = chosen.src[k, take]
                places = cells_to_xy(start, w), maps[s, t].flatten(0, 1)[start]
                found.append(annotate(clique, (s, t), places, chosen.score[k, take]))
    return found


# ------------------------------------------------------------------------------------------------------------
# From image files to cliques


def foreground_box(foreground: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of foreground cells (h, w) bool in whole pixels of a (W, H) image: (xmin, ymin, xmax, ymax)."""
    (h, w), (width, height) = foreground.shape, size
    ys, xs = (foreground.any(dim).nonzero()[:, 0].tolist() for dim in (1, 0))
    low = math.floor(xs[0] * width / w), math.floor(ys[0] * height / h)
    return *low, math.ceil((xs[-1] + 1) * width / w), math.ceil((ys[-1] + 1) * height / h)


def split_cliques(members: list[int], size: int) -> list[list[int]]:
    """A class cut into groups of at least `size` (fewer only where it has fewer) and less than twice that."""
    count = max(1, len(members) // size)
    edges = [round(k * len(members) / count) for k in range(count + 1)]
    return [members[a:b] for a, b in zip(edges, edges[1:])]


class CliqueSet(ImageGroups):
    """The views of one clique at a time; what cannot be read is left out and named."""

    def __init__(self, images: data.ImageSet, cliques: list[list[int]], cascade: Cascade) -> None:
        super().__init__(images, cliques)
        self.size, self.patch = cascade.cfg.size, cascade.backbone.patch

    def __getitem__(self, number: int) -> dict:
        found, skipped = self.read(number)
        index, sizes = [i for i, *_ in found], [image.size for _, image, _ in found]
        pairs = [data.prepare(image, saliency, self.size, self.patch) for _, image, saliency in found]
        views, cells = ([pair[k] for pair in pairs if pair[k] is not None] for k in (0, 1))
        views, cells = (torch.stack(some) if some else None for some in (views, cells))
        return {"index": index, "views": views, "cells": cells, "sizes": sizes, "skipped": skipped}


def build_clique(cascade: Cascade, item: dict, boxes: Boxes,
                 facing: bool) -> tuple[Clique | None, list[int]]:
    """Features, boxes and foreground of one item of CliqueSet; None if fewer than three images are usable.

    boxes: those of a detector; outside of its box an image has no foreground. Without one, the box is that of
    the foreground. facing: with the features of the mirror images. Also returns the images that have no
    foreground.
    """
    if not item["index"]:
        return None, []
    feats = (both_faces if facing else Cascade.features)(cascade, item["views"], item["cells"])
    device, (h, w) = feats.feat.device, feats.grid
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
    side = torch.tensor([float(max(x1 - x0, y1 - y0)) for x0, y0, x1, y1 in frames], device=device)
    masks = masks.to(device)
    # 1 in the foreground and -1 elsewhere stand for it under every threshold
    marks = masks.view(-1, h, w) * 2.0 - 1
    feats = feats.map(lambda x: x[keep])._replace(saliency=marks)
    if feats.mirror is not None:
        feats = feats._replace(mirror=feats.mirror._replace(saliency=marks.flip(-1)))
    return Clique(index, feats, sizes, frames, stride, side, masks), empty


def map_clique(cascade: Cascade, item: dict, boxes: Boxes, cfg: LabelConfig,
               matched: bool = False) -> tuple:
    """build_clique, then clique_maps: (clique or None, images without foreground, maps, partners)."""
    clique, empty = build_clique(cascade, item, boxes, cfg.facing)
    maps = clique_maps(cascade, clique.feats, cfg.batch, matched) if clique else (None, None)
    return clique, empty, *maps


# ------------------------------------------------------------------------------------------------------------
# The steps of section 3.5


def choose_classes(images: data.ImageSet, path: str | None) -> Members:
    """Step 1: the images of every class, without the classes that a file names, one a line.

    ValueError if there is no such file, or class, or if none remains.
    """
    names = set()
    if path:
        try:
            names = {line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()}
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read class names from {path}: {reason_of(error)}") from None
    if unknown := sorted(names - set(images.classes)):
        known = ", ".join(images.classes[:5])
        raise ValueError(f"{path}: no class is named {unknown[0]!r}; there are {known}, ...")
    if names == set(images.classes):
        raise ValueError(f"--drop-classes {path}: no class remains")
    return {k: some for k, some in enumerate(images.members()) if images.classes[k] not in names}


def share_of(share: float, count: int) -> int:
    """A share of a count, rounded down; 0.29 of 100 is 29."""
    return int(share * count + 1e-9)


def check_sizes(cfg: LabelConfig, kept: dict[str, int]) -> None:
    """Name the classes that keep less than the three images a loop needs: before the work starts, as far as
    their sizes tell, and when images have been chosen.

    kept: images, by class. ValueError, with the numbers, if the rest is too little for trn and val.
    """
    if sum(count // 3 for count in kept.values()) < 2:
        raise ValueError(f"--keep {cfg.keep}: trn and val each need three kept images of one class, and no"
                         f" class keeps more than {max(kept.values())}; keep more, or give more images")
    if small := [f"{name} ({count})" for name, count in kept.items() if count < 3]:
        most = math.ceil(3 / cfg.keep - 1e-9)
        say(f"classes that keep fewer than three images give nothing, and --keep {cfg.keep} keeps three of"
            f" {most}: {', '.join(small)}", error=True)


class Measured(NamedTuple):
    """What closed loops tell of images."""

    errors: dict[int, float]  # {image: mean error of its loops}
    loops: dict[int, int]  # {image: how many they are}
    empty: set[int]  # images without foreground
    skipped: dict[int, str]  # images that cannot be read, and why
    volumes: int  # that this took


def measure_loops(cfg: LabelConfig, cascade: Cascade, images: data.ImageSet, singles: Singles,
                  settings: dict) -> Measured:
    """Step 3: the error of every image, from loops in cliques of its class."""
    cliques = []
    for k, some in singles.members.items():
        if len(some) < 3:
            say(f"class {images.classes[k]}: {len(some)} images, a loop needs 3; left out")
            continue
        order = np.random.default_rng((cfg.seed, 0, k)).permutation(some).tolist()
        cliques += split_cliques(order, cfg.clique_size)

    def make(number: int, item: dict) -> dict:
        clique, empty, maps, _ = map_clique(cascade, item, singles.boxes, cfg)
        errors = zip(clique.index, image_errors(clique, maps)) if clique else ()
        return {"skipped": item["skipped"], "empty": empty, "errors": {i: round(e, 6) for i, e in errors}}

    items, costs = CliqueSet(images, cliques, cascade), [6 * math.comb(len(some), 3) for some in cliques]
    errors, loops, empty, skipped, volumes = {}, {}, set(), dict(singles.skipped), 0
    for record in run_shards(cfg, "loops", "loops", items, costs, settings, make):
        n = len(record["errors"])
        errors |= {int(i): e for i, e in record["errors"].items()}
        loops |= {int(i): (n - 1) * (n - 2) for i in record["errors"]}
        empty |= set(record["empty"])
        skipped |= dict(record["skipped"])
        volumes += math.comb(n, 2)
    if not errors:
        first = f"; the first: {min(skipped.values())}" if skipped else ""
        counts = f"{len(skipped)} unreadable, {len(empty)} without foreground"
        raise ValueError(f"no class has three usable images ({counts}){first}")
    return Measured(errors, loops, empty, skipped, volumes)


def select_images(errors: dict[int, float], labels: list[int], keep: float) -> Members:
    """Step 4: the images to keep, the most consistent share of every class, the best first."""
    by_class: Members = {}
    for i in sorted(errors, key=lambda i: (errors[i], i)):
        by_class.setdefault(labels[i], []).append(i)
    return {label: by_class[label][: share_of(keep, len(by_class[label]))] for label in sorted(by_class)}


def split_images(kept: Members, share: float, seed: int) -> dict[str, Members]:
    """Kept images to trn and val, no image to both, in random order.

    Pairs need company, so a class gives val six images or more (half of its own, where it has fewer than
    twelve) or none. What it does not give is owed by the next. Six are owed from the start, so that some
    class gives some.
    """
    splits, due = {"trn": {}, "val": {}}, 6.0 if share else 0.0
    for label, members in kept.items():
        order = np.random.default_rng((seed, 1, label)).permutation(members).tolist()
        due += share * len(order)
        take = min(int(due), len(order) // 2) if due >= 6 and len(order) >= 6 else 0
        due -= take
        splits["val"][label], splits["trn"][label] = order[:take], order[take:]
    return splits


def kept_groups(cfg: LabelConfig, kept: Members, classes: list[str]) -> list[tuple]:
    """Cliques of kept images to pair: (split, class, images)."""
    check_sizes(cfg, {classes[k]: len(some) for k, some in kept.items()})
    groups = []
    for split, by_class in split_images(kept, VAL, cfg.seed).items():
        for k, some in by_class.items():
            cut = split_cliques(some, cfg.pair_clique_size)
            groups += [(split, k, group) for group in cut if len(group) >= 3]
    return groups


def dropped_groups(cfg: LabelConfig, errors: dict[int, float], kept: Members, members: Members,
                   known: bool) -> list[tuple]:
    """Cliques of dropped images, where pictures of their pairs are wanted: of six images a class, or of all
    where the true matches are known, to judge them."""
    groups = []
    for k, some in members.items() if cfg.draw else ():
        rest = [i for i in some if i in errors and i not in kept[k]]
        cut = split_cliques(rest, cfg.pair_clique_size) if known else [rest[:6]]
        groups += [("dropped", k, group) for group in cut if len(group) >= 3]
    return groups


def pair_groups(cfg: LabelConfig, cascade: Cascade, images: data.ImageSet, boxes: Boxes, step: str,
                groups: list[tuple], settings: dict) -> Records:
    """A record of every group (split, class, images): its split and class, the frames of its images, and its
    pairs, the best first, of which `cfg.pairs` an image are marked as kept, but none of dropped images."""

    def make(number: int, item: dict) -> dict:
        split, k, _ = groups[number]
        clique, _, maps, partners = map_clique(cascade, item, boxes, cfg, matched=True)
        if not clique:
            return {"split": split, "class": k, "images": {}, "pairs": []}
        frames = zip(clique.index, clique.sizes, clique.boxes)
        frames = {i: {"size": size, "box": box} for i, size, box in frames}
        pairs = sorted(pair_matches(clique, maps, partners, cfg), key=lambda pair: pair["score"])
        most = 0 if split == "dropped" else cfg.pairs * len(clique.index)
        pairs = [pair | {"kept": rank < most} for rank, pair in enumerate(pairs)]
        return {"split": split, "class": k, "images": frames, "pairs": pairs}

    cliques = [group for *_, group in groups]
    costs = [math.comb(len(group), 2) for group in cliques]
    return run_shards(cfg, step, "pairs", CliqueSet(images, cliques, cascade), costs, settings, make)


def fill_splits(pairs: Records) -> Records:
    """No split is empty, since loaders divide by their lengths: where all pairs fell to one, the clique with
    the fewest makes val and the others trn. No image comes to be in both: cliques share none.

    ValueError, with the numbers, if fewer than two cliques have pairs.
    """
    counts = [(sum(pair["kept"] for pair in record["pairs"]), number, record["split"])
              for number, record in enumerate(pairs)]
    some = sorted(count for count in counts if count[0])
    if len({split for *_, split in some}) == 2:
        return pairs
    if len(some) < 2:
        found = f"{sum(n for n, *_ in some)} pairs have {FEWEST} matches, in {len(some)} of {len(counts)}"
        raise ValueError(f"{found} cliques of images, and trn and val need a clique each; give a larger"
                         " --size, train for longer, or raise --keep")
    say(f"all pairs were {some[0][2]}: val has the {some[0][0]} of the clique with the fewest")
    splits = {number: "trn" if k else "val" for k, (_, number, _) in enumerate(some)}
    return dataclasses.replace(pairs, splits=splits)


def pair_images(cfg: LabelConfig, cascade: Cascade, images: data.ImageSet, singles: Singles,
                measured: Measured, kept: Members, settings: dict) -> tuple[Records, Records]:
    """Step 5: pairs of the kept images of a class; and, only to be looked at, of dropped ones."""
    settings = settings | {f"--{name}": getattr(cfg, name) for name in ("keep", "pairs", "points")}
    groups = kept_groups(cfg, kept, images.classes)
    pairs = fill_splits(pair_groups(cfg, cascade, images, singles.boxes, "pairs", groups, settings))
    groups = dropped_groups(cfg, measured.errors, kept, singles.members, isinstance(images, Shapes))
    return pairs, pair_groups(cfg, cascade, images, singles.boxes, "dropped", groups, settings)


# ------------------------------------------------------------------------------------------------------------
# The run


def parse_config(argv: list[str] | None) -> LabelConfig:
    """Command line to configuration; ValueError, in one line, for options that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, LabelConfig)
    given = vars(parser.parse_args(argv))
    cfg = LabelConfig(**({"dataset": "folder"} if "root" in given else {}) | given)
    cfg.detector = cfg.detector or cfg.detector_weights is not None
    if cfg.dataset == "folder" and "checkpoint" not in given:
        raise ValueError("give --checkpoint FILE, written by train.py for such images")
    if cfg.dataset == "shapes" and cfg.saliency not in ("auto", "attention", "none"):
        raise ValueError(f"--saliency {cfg.saliency}: shapes have silhouettes; auto, attention or none")
    check_ranges(cfg, RANGES)
    if bad := set("[]*?") & set(str(Path(cfg.out).resolve())):
        raise ValueError(f"--out {cfg.out}: the loaders of label sets glob, so no {min(bad)} may be in it")
    return cfg


def load(cfg: LabelConfig) -> tuple[Cascade, data.ImageSet]:
    """The trained cascade, and the images to label, read as those it was trained on."""
    overrides = {"size": cfg.size} if cfg.size else {}
    overrides |= {"saliency": "attention" if cfg.saliency == "attention" else "none"}
    cascade = load_cascade(cfg.checkpoint, cfg.weights, find_device(cfg.device), **overrides)
    if cascade.cfg.final_stage == "region":
        raise ValueError(f"{cfg.checkpoint} ends with the region stage, which has no volume of whole images")
    data.check_size(cascade.cfg.size, cascade.backbone.patch)
    source = {"dataset": cfg.dataset, "root": cfg.root, "saliency": cfg.saliency}
    return cascade, training_set(dataclasses.replace(cascade.cfg, **source))


def settings_of(cfg: LabelConfig, images: data.ImageSet, singles: Singles) -> dict:
    """What the shards of steps 3 and 5 depend on, beside the images: options, and digests of the rest."""
    return {
        "--dataset": cfg.dataset,
        "--saliency": "maps" if any(images.maps) else cfg.saliency,
        "checkpoint (--checkpoint)": shards.digest(Path(cfg.checkpoint).read_bytes()),
        "choice of single instances (--detector)": shards.digest(sorted(singles.boxes.items())),
        **{f"--{name}": getattr(cfg, name) for name in ("size", "loops", "seed", "facing")},
    }


def main(argv: list[str] | None = None) -> dict:
    """The steps in the paper's order, which all of torchrun's processes take together.

    Writes OUT/SC-ImageNet, names.json, summary.json and pictures. Returns the summary, in the first process.
    """
    cfg = parse_config(argv)
    check_places(Path(cfg.out))
    cascade, images = load(cfg)
    cfg = dataclasses.replace(cfg, size=cascade.cfg.size)
    rank = shards.connect()

    members = choose_classes(images, cfg.drop_classes)
    check_sizes(cfg, {images.classes[k]: share_of(cfg.keep, len(some)) for k, some in members.items()})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    singles = detect(cfg, images, members) if cfg.detector else Singles(members, {}, {})
    settings = settings_of(cfg, images, singles)
    measured = measure_loops(cfg, cascade, images, singles, settings)
    kept = select_images(measured.errors, images.labels, cfg.keep)
    pairs, dropped = pair_images(cfg, cascade, images, singles, measured, kept, settings)
    summary = {}
    if rank == 0:
        write_label_tree(Path(cfg.out), images, pairs, cfg.images)
        summary = report(cfg, images, members, singles, measured, kept, pairs, dropped, CAP)
    shards.disconnect()
    return summary


if __name__ == "__main__":
    with command(), interruptible():
        main()
