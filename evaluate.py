"""PCK of a trained cascade, of CATs, or of a frozen backbone alone, on annotated pairs (paper, section 4.2).

    python evaluate.py --dataset shapes --checkpoint runs/quick/last.pt
    python evaluate.py --dataset pfwillow --datapath PF-WILLOW --checkpoint runs/caltech/last.pt
    python evaluate.py --dataset pfwillow --datapath PF-WILLOW --baseline nn hough --backbone dinov2_vits14 --layer 10

Protocol: source to target, scored in the target image's own pixels, unpadded points; a point is right if it lies within
alpha * d of the truth (<=). d is the longer side of the target's box: "bbox" takes the object's box or, on PF-WILLOW,
the box of the target's points. "bbox-padded" is what many older PF-WILLOW tables hold: in an image squashed to 256x256,
the extent of points that were padded with -1 (on average 1.28 times too large). "per image" is the mean over pairs of a
pair's share of right points, "per point" the share over all points.
"""

import argparse
import csv
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import data
from modules import Features, transfer_keypoints

ALPHAS = (0.05, 0.10, 0.15)
GREEN, RED, YELLOW = (40, 200, 60), (230, 40, 40), (250, 210, 40)


def processes() -> tuple[int, int]:
    """This process's rank and how many there are, by torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def hsv(hue: int, saturation: int, value: int) -> tuple[int, int, int]:
    """A colour of Pillow's HSV space, 0 to 255 each, as RGB."""
    return Image.new("HSV", (1, 1), (hue, saturation, value)).convert("RGB").getpixel((0, 0))


def correct_points(pred: Tensor, truth: Tensor, d: float, alphas: tuple[float, ...], strict: bool = False) -> Tensor:
    """PCK's test: ||pred - truth|| <= alpha d, or < if strict. pred, truth (n, 2); returns (n, alphas) bool."""
    distance, limit = (pred - truth).norm(dim=-1)[:, None], torch.tensor(alphas) * d
    return distance < limit if strict else distance <= limit


class Protocol(NamedTuple):
    """How a table was scored. A number can only be put beside others of its protocol."""

    frame: int | tuple[int, int] | None = None  # squashed to S x S or (W, H) pixels; None: the image's own pixels
    swap: bool = False  # target points go to the source, are compared there, and d is the source's
    pad: int | None = None  # on PF-WILLOW d is the extent of points padded with this value: too large
    strict: bool = False  # < instead of <=
    whole: bool = False  # the points asked for are cut to whole pixels of the frame


PROTOCOLS = {
    "target": Protocol(),  # HPF, DIFT, SD4Match
    "proposalflow": Protocol(strict=True),
    "geoaware": Protocol(strict=True),
    "densematching": Protocol(swap=True),
    "ncnet": Protocol(frame=224, swap=True),  # on PF-PASCAL
    "ncnet-willow": Protocol(swap=True),
    "mmnet": Protocol(frame=(320, 224)),
    "dhpf": Protocol(frame=240, pad=-1),
    "chm": Protocol(frame=240, pad=-2),
    "transformatcher": Protocol(frame=240, pad=-2),
    "cats": Protocol(frame=256, swap=True, pad=-1, whole=True),
    "semimatch": Protocol(frame=256, swap=True, pad=-1, whole=True),
    "scorrsan": Protocol(frame=256, swap=True, pad=-1, whole=True),
    "vat": Protocol(frame=512, swap=True, pad=-1, whole=True),
    "cats++": Protocol(frame=512, swap=True, pad=-1, whole=True),
    "actr": Protocol(frame=512, swap=True, pad=-1, whole=True),
}


class Task(NamedTuple):
    """A pair as a protocol asks for it: points of one image to be found in the other."""

    query: int  # ids in the KeypointSet
    answer: int
    points: Tensor  # (n, 2) in pixels of the query image
    truth: Tensor  # (n, 2) in pixels of the answer image
    scale: Tensor  # (2,): frame over pixels of the answer image
    d: float  # the threshold at alpha = 1, in the frame


def frame_scale(protocol: Protocol, size: tuple[int, int]) -> Tensor:
    """Frame over image, along x and y, for an image of (W, H) pixels."""
    frame = protocol.frame or size
    return torch.tensor((frame, frame) if isinstance(frame, int) else frame) / torch.tensor(size)


def task_of(keypoints: data.KeypointSet, number: int, protocol: Protocol, rule: str) -> Task:
    """What a protocol asks of one pair; rule: "bbox" or "img"."""
    p = keypoints.pairs[number]
    ends = [(p.src, p.src_kps, p.src_box), (p.trg, p.trg_kps, p.trg_box)]
    (query, points, _), (answer, truth, box) = ends[::-1] if protocol.swap else ends
    size = keypoints.size(answer)
    scale = frame_scale(protocol, size)
    if rule == "img":
        d = float((scale * torch.tensor(size)).max())
    elif protocol.pad is not None and keypoints.name == "PF-WILLOW":
        d = float((truth * scale).max()) - protocol.pad
    else:
        x0, y0, x1, y1 = box
        d = float((scale * torch.tensor([x1 - x0, y1 - y0])).max())
    if protocol.whole:
        at = frame_scale(protocol, keypoints.size(query))
        points = (points * at).trunc().clamp(0, protocol.frame - 1) / at
    return Task(query, answer, points, truth, scale, d)


def hits(pred: Tensor, task: Task, alphas: tuple[float, ...], strict: bool = False) -> Tensor:
    """PCK's test of one pair: ||pred - truth|| <= alpha d in the frame. pred (n, 2) in pixels; returns (n, alphas)."""
    return correct_points(pred * task.scale, task.truth * task.scale, task.d, alphas, strict)


PADDED = Protocol(frame=256, pad=-1)  # what "bbox-padded" shows beside PF-WILLOW's own rule


# Where the four views of dense features lie in a grid of twice their cells: every second row and column.
VIEWS = [(slice(y, None, 2), slice(x, None, 2)) for y in (0, 1) for x in (0, 1)]


class Dense:
    """A cascade that reads an image at half its patch's stride: four views of it, each moved by half a patch.

    What overlapping patches give (Amir et al., 2021) for a fraction of their attention. Features are those of the four
    views, interleaved to twice the cells a side; a volume is that of every view of the source with every view of the
    target, as the stages know them, interleaved likewise. The border is repeated.
    """

    def __init__(self, cascade) -> None:
        self.cascade, self.cfg, self.backbone = cascade, cascade.cfg, cascade.backbone

    def features(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to Features of 2H/patch x 2W/patch cells; the class token is the mean of four."""
        (height, width), half = images.shape[-2:], self.backbone.patch // 2
        first = (half + 1) // 2  # cells then lie where those of a grid of twice the cells do, to half a pixel
        padded = F.pad(images, (first, half - first, first, half - first), mode="replicate")
        views = [
            self.cascade.features(padded[..., y : y + height, x : x + width]) for y in (0, half) for x in (0, half)
        ]
        h, w = views[0].grid
        cells = views[0].feat.new_empty(len(images), 2 * h, 2 * w, views[0].feat.shape[-1])
        for (y, x), view in zip(VIEWS, views):
            cells[:, y, x] = view.feat.unflatten(1, (h, w))
        token = torch.stack([view.token for view in views]).mean(0)
        return Features(cells.flatten(1, 2), token, torch.ones_like(cells[..., 0]))

    def volume(self, src: Features, trg: Features, method: str) -> Tensor:
        """Features of `features` to a volume of their cells, (B, Hs, Ws, Ht, Wt)."""
        s, t = (x.feat.unflatten(1, x.grid) for x in (src, trg))
        corr = s.new_empty(len(s), *src.grid, *trg.grid)
        for ys, xs in VIEWS:
            for yt, xt in VIEWS:
                views = (
                    Features(cells[:, y, x].flatten(1, 2), image.token, image.saliency[:, y, x])
                    for cells, image, y, x in ((s, src, ys, xs), (t, trg, yt, xt))
                )
                corr[:, ys, xs, yt, xt] = self.cascade.volume(*views, method)
        return corr

    @torch.no_grad()
    def transfer(self, src: Features, trg: Features, points: Tensor, method: str) -> Tensor:
        """Source to target: points (B, n, 2) as (x, y) in source cells to target cells."""
        return transfer_keypoints(self.volume(src, trg, method), points)


def blocks_of_pairs(keypoints: data.KeypointSet, numbers: list[int], held: int) -> list[list[int]]:
    """Pairs by category, in order, cut where a block would show more than `held` images (a pair shows two)."""
    blocks, category, images = [], None, set()
    for n in sorted(numbers, key=lambda n: keypoints.pairs[n].category):
        p = keypoints.pairs[n]
        if p.category != category or len(images | {p.src, p.trg}) > held:
            blocks.append([])
            category, images = p.category, set()
        blocks[-1].append(n)
        images |= {p.src, p.trg}
    return blocks


@torch.no_grad()
def predict(
    matcher,
    keypoints: data.KeypointSet,
    methods: list[str],
    batch: int = 8,
    quiet: bool = False,
    protocol: Protocol = PROTOCOLS["target"],
    numbers: list[int] | None = None,
    held: int = 1000,
    cache: dict[int, Features] | None = None,
) -> dict[str, list[Tensor]]:
    """Find the points that a protocol asks for, by every method: {method: [(n, 2) pixels of the answer image, ...]}.

    matcher: features(images (B, 3, S, S)) -> Features, transfer(src, trg, points in cells (B, n, 2), method) -> cells
    of trg, cfg.size and backbone.patch. numbers: the pairs to do, all of them if None; results are in their order.

    Pairs are worked through by category, and the backbone runs once an image of it. Memory holds the features of one
    category, but of no more than `held` images (3 GiB at 512 px with ViT-B/16): larger categories are cut into blocks.
    With a cache, features of all images by their ids, it holds whatever the cache does.
    """
    numbers = list(range(len(keypoints))) if numbers is None else numbers
    size, patch = matcher.cfg.size, matcher.backbone.patch
    found: dict[str, dict[int, Tensor]] = {method: {} for method in methods}
    with tqdm(total=len(numbers), desc="pairs", disable=quiet, leave=False) as bar:
        for members in blocks_of_pairs(keypoints, numbers, held):
            features = {} if cache is None else cache
            images = sorted({i for n in members for i in keypoints.pairs[n][:2]} - features.keys())
            for first in range(0, len(images), batch):
                views = []
                for index in images[first : first + batch]:
                    image = keypoints.load(index)[0]
                    keypoints.sizes[index] = image.size
                    views.append(data.prepare(image, None, size, patch)[0])
                several = matcher.features(torch.stack(views))
                for k in range(len(views)):
                    features[images[first + k]] = several.map(lambda x, k=k: x[k : k + 1])
            for first in range(0, len(members), batch):
                some = members[first : first + batch]
                tasks = [task_of(keypoints, n, protocol, keypoints.rule) for n in some]
                src, trg = (
                    Features(*(torch.cat(x) for x in zip(*(features[t[side]] for t in tasks)))) for side in (0, 1)
                )
                cells = [data.pixels_to_cells(t.points, keypoints.size(t.query), src.grid) for t in tasks]
                points = torch.nn.utils.rnn.pad_sequence(cells, batch_first=True).to(src.feat.device)  # (B, n, 2)
                for method in methods:
                    moved = matcher.transfer(src, trg, points, method).cpu()
                    for k, (n, t) in enumerate(zip(some, tasks)):
                        place = moved[k, : len(t.points)]
                        found[method][n] = data.cells_to_pixels(place, keypoints.size(t.answer), trg.grid)
                bar.update(len(some))
    return {method: [places[n] for n in numbers] for method, places in found.items()}


def score(
    predictions: list[Tensor],
    keypoints: data.KeypointSet,
    alphas: tuple[float, ...] = ALPHAS,
    protocol: str | None = None,
    rule: str | None = None,
) -> dict:
    """PCK in per cent: {rule: {"per_image": [...], "per_point": [...], "per_class": {name: [...]}, "per_code": {...}}}.

    Lists run over alphas; a class, or a degree of one of SPair-71k's difficulties, is the mean over its pairs.
    protocol: that of the predictions. rule: "bbox", "img"; None: the benchmark's own, on PF-WILLOW "bbox-padded" too.
    """
    rows = {rule or keypoints.rule: PROTOCOLS[protocol or "target"]}
    if keypoints.name == "PF-WILLOW" and protocol is None and rule is None:
        rows["bbox-padded"] = PADDED
    table = {}
    for name, how in rows.items():
        d_rule = name.removesuffix("-padded")
        right = []
        for number, pred in zip(range(len(keypoints)), predictions, strict=True):
            right.append(hits(pred, task_of(keypoints, number, how, d_rule), alphas, how.strict).float())
        pair_pck = torch.stack([r.mean(0) for r in right]) * 100  # (pairs, alphas)

        def mean_of(chosen: list[bool], pair_pck: Tensor = pair_pck) -> list[float]:
            return pair_pck[torch.tensor(chosen)].mean(0).tolist()

        classes = [p.category for p in keypoints.pairs]
        codes = {(code, value) for p in keypoints.pairs for code, value in p.codes.items()}
        table[name] = {
            "per_image": pair_pck.mean(0).tolist(),
            "per_point": (torch.cat(right).mean(0) * 100).tolist(),
            "per_class": {c: mean_of([c == other for other in classes]) for c in sorted(set(classes))},
            "per_code": {f"{c} {v}": mean_of([p.codes.get(c) == v for p in keypoints.pairs]) for c, v in sorted(codes)},
        }
    return table


def print_scores(
    table: dict,
    method: str,
    keypoints: data.KeypointSet,
    alphas: tuple[float, ...],
    size: int,
    protocol: str = "target",
) -> None:
    """One method's table, headed by its protocol."""
    how, points = PROTOCOLS[protocol], sum(len(p.src_kps) for p in keypoints.pairs)
    frame = (how.frame, how.frame) if isinstance(how.frame, int) else how.frame
    where = "own pixels" if frame is None else f"squashed to {frame[0]}x{frame[1]}"
    way = "target to source, d of the source" if how.swap else "source to target, d of the target"
    padded = how.pad is not None and keypoints.name == "PF-WILLOW"
    print(f"\n{method} on {keypoints.name}: {len(keypoints)} pairs, {points} points, input {size}x{size}")
    print(f"protocol {protocol}: {way}, {where}, {'<' if how.strict else '<='} alpha d")
    print(f"{'PCK (%) at alpha':34s}" + "".join(f"{a:8g}" for a in alphas))
    for rule, block in table.items():
        own = f"{rule}-padded" if padded and rule == "bbox" else rule
        shown = "bbox-padded (256x256)" if rule == "bbox-padded" else own
        lines = [(f"{shown}, per image", block["per_image"]), (f"{shown}, per point", block["per_point"])]
        if rule != "bbox-padded":
            parts = (block["per_class"], block["per_code"])
            lines += [(f"  {name}", values) for part in parts for name, values in part.items()]
        for name, values in lines:
            print(f"{name:34s}" + "".join(f"{v:8.1f}" for v in values))


def print_paper(dataset: str, ours: dict[str, dict[tuple[str, str], float]] | None = None) -> None:
    """The rows of the paper's and its supplement's tables for one benchmark, and below each table our own.

    ours: {name: {(class or "all", alpha as text): PCK in per cent}}.
    """
    with open(Path(__file__).parent / "docs" / "paper_tables.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    if not rows:
        print("\nThe paper has no rows on these pairs")
        return
    print(f"\nThe paper's rows on {dataset}; their rules are not stated, most likely those of protocol cats")
    for table in dict.fromkeys(row["table"] for row in rows):
        some = [row for row in rows if row["table"] == table]
        columns = list(dict.fromkeys((row["class"], row["alpha"]) for row in some))
        print(f"{table:30s}" + "".join(f"{(a if c == 'all' else c)[:6]:>7s}" for c, a in columns))
        for method in dict.fromkeys(row["method"] for row in some):
            found = {(row["class"], row["alpha"]): row["pck"] for row in some if row["method"] == method}
            print(f"  {method:28s}" + "".join(f"{found.get(column, '-'):>7s}" for column in columns))
        for name, found in (ours or {}).items():
            cells = (f"{found[column]:.1f}" if column in found else "-" for column in columns)
            print(f"  here: {name[:22]:22s}" + "".join(f"{cell:>7s}" for cell in cells))


def draw_matches(
    src: Image.Image,
    trg: Image.Image,
    src_kps: Tensor,
    trg_kps: Tensor,
    truth: Tensor | None = None,
    right: Tensor | None = None,
    height: int = 256,
    colours: list[tuple[int, int, int]] | None = None,
) -> Image.Image:
    """Two images side by side at one height, matches joined by lines.

    src_kps, trg_kps, truth (n, 2) in their image's pixels. With truth, crosses mark it and a line is green where
    `right` (n,) holds and red elsewhere; without, every line has its own hue, or its own of the given colours.
    """
    scales = [height / image.height for image in (src, trg)]
    views = [image.resize((max(1, round(image.width * s)), height)) for image, s in zip((src, trg), scales)]
    canvas = Image.new("RGB", (views[0].width + views[1].width + 4, height), "white")
    canvas.paste(views[0], (0, 0))
    canvas.paste(views[1], (views[0].width + 4, 0))
    draw, shift = ImageDraw.Draw(canvas), torch.tensor([views[0].width + 4.0, 0.0])
    starts = ((src_kps + 0.5) * scales[0]).tolist()
    ends = ((trg_kps + 0.5) * scales[1] + shift).tolist()
    crosses = [None] * len(ends) if truth is None else ((truth + 0.5) * scales[1] + shift).tolist()
    for k, ((x, y), (u, v), cross) in enumerate(zip(starts, ends, crosses)):
        if colours:
            colour = colours[k]
        elif right is None:
            colour = hsv(k * 255 // max(len(ends), 1), 220, 255)
        else:
            colour = GREEN if right[k] else RED
        draw.line((x, y, u, v), fill=colour, width=1)
        for cx, cy in ((x, y), (u, v)):
            draw.ellipse((cx - 3, cy - 3, cx + 3, cy + 3), fill=colour, outline="black")
        if cross:
            cx, cy = cross
            draw.line((cx - 4, cy, cx + 4, cy), fill=YELLOW, width=2)
            draw.line((cx, cy - 4, cx, cy + 4), fill=YELLOW, width=2)
    return canvas


def match_sheet(
    predictions: dict[str, list[Tensor]], keypoints: data.KeypointSet, count: int = 10, numbers: list[int] | None = None
) -> Image.Image:
    """A page of pairs, one column a method, at alpha 0.10 of rule "bbox".

    numbers: the pairs to draw; None: `count` that are spread over the set.
    """
    rows = []
    count = min(count, len(keypoints))
    for k in [i * len(keypoints) // count for i in range(count)] if numbers is None else numbers:
        pair = keypoints.pairs[k]
        images = [keypoints.load(i)[0] for i in (pair.src, pair.trg)]
        cells = []
        for method in predictions.values():
            right = correct_points(method[k], pair.trg_kps, pair.extent, (0.10,))[:, 0]
            cells.append(draw_matches(*images, pair.src_kps, method[k], pair.trg_kps, right, height=192))
        rows.append(cells)
    widths = [max(row[c].width for row in rows) for c in range(len(predictions))]
    page = Image.new("RGB", (sum(widths) + 8 * len(widths), 200 * len(rows) + 16), "white")
    draw, x = ImageDraw.Draw(page), 0
    for column, (name, width) in enumerate(zip(predictions, widths)):
        draw.text((x + 4, 2), name, fill="black")
        for r, row in enumerate(rows):
            page.paste(row[column], (x, 16 + 200 * r))
        x += width + 8
    return page


def ranked_pairs(pred: list[Tensor], keypoints: data.KeypointSet, category: str, count: int) -> list[int]:
    """The `count` worst, middle and best pairs of a category, in this order, by PCK at 0.10, then by mean distance."""
    quality = []
    for number, pair in enumerate(keypoints.pairs):
        if pair.category == category:
            distance = (pred[number] - pair.trg_kps).norm(dim=-1) / pair.extent
            quality.append((float((distance <= 0.10).float().mean()), -float(distance.mean()), number))
    order = [number for *_, number in sorted(quality)]
    middle = max(0, (len(order) - count) // 2)
    return list(dict.fromkeys(order[:count] + order[middle : middle + count] + order[-count:]))


def draw_curve(curves: dict[str, list[float]], alphas: list[float]) -> Image.Image:
    """PCK in per cent over alpha, a line a method."""
    left, top, width, height = 50, 16, 480, 320
    page = Image.new("RGB", (left + width + 130, top + height + 40), "white")
    draw = ImageDraw.Draw(page)

    def at(alpha: float, pck: float) -> tuple[float, float]:
        return left + width * alpha / max(alphas), top + height * (1 - pck / 100)

    for pck in range(0, 101, 20):
        draw.line((*at(0, pck), *at(max(alphas), pck)), fill=(220, 220, 220))
        draw.text((left - 28, at(0, pck)[1] - 6), f"{pck}", fill="black")
    for alpha in alphas:
        draw.text((at(alpha, 0)[0] - 8, top + height + 4), f"{alpha:g}", fill="black")
    draw.text((left + width // 2, top + height + 22), "alpha", fill="black")
    row = top - 12
    for k, (name, values) in enumerate(sorted(curves.items(), key=lambda curve: -curve[1][-1])):
        row = max(row + 12, at(0, values[-1])[1] - 6)  # names of curves that end together stay apart
        colour = hsv(k * 255 // len(curves), 220, 200)
        draw.line([at(a, v) for a, v in zip(alphas, values)], fill=colour, width=2)
        draw.text((left + width + 6, row), f"{name} {values[-1]:.1f}", fill=colour)
    return page


def draw_results(
    folder: Path, predictions: dict[str, list[Tensor]], keypoints: data.KeypointSet, count: int, rule: str | None
) -> None:
    """Into a folder: a sheet a class of pairs ranked by the first method, and PCK over alpha as a curve and as CSV."""
    for category in sorted({p.category for p in keypoints.pairs}):
        numbers = ranked_pairs(next(iter(predictions.values())), keypoints, category, count)
        page = match_sheet(predictions, keypoints, numbers=numbers)
        page.save(folder / f"{category.replace('/', '_')}.jpg", quality=85)
    steps, rule = tuple(k / 100 for k in range(1, 11)), rule or keypoints.rule
    curves = {m: score(p, keypoints, steps, rule=rule)[rule]["per_image"] for m, p in predictions.items()}
    draw_curve(curves, list(steps)).save(folder / "curve.png")
    with open(folder / "curve.csv", "w", newline="") as file:
        rows = zip(steps, *([f"{v:.2f}" for v in values] for values in curves.values()))
        csv.writer(file).writerows([["alpha", *curves], *rows])


def draw_pair(images: data.ImageSet, pair: dict) -> Image.Image:
    """A labelled pair; matches from green (their loops close) over yellow to red (they miss by a tenth of the box)."""
    colours = [hsv(int(85 * (1 - min(e / 0.1, 1))), 230, 240) for e in pair["errors"]]
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


def draw_histograms(errors: dict[str, list[float]], kept: dict[str, list[float]]) -> Image.Image:
    """Histograms of the images' errors by class, from 0 to the largest, the best class first; kept images green."""
    views, top = [], max(map(max, errors.values()))
    for name in sorted(errors, key=lambda n: np.mean(errors[n])):
        view = Image.new("RGB", (168, 76), "white")
        draw = ImageDraw.Draw(view)
        every, best = (np.histogram(e[name], 20, (0, top))[0] for e in (errors, kept))
        for k, (n, m) in enumerate(zip(every * 50 / every.max(), best * 50 / every.max())):
            draw.rectangle((4 + 8 * k, 72 - n, 10 + 8 * k, 72), fill=(190, 190, 200))
            draw.rectangle((4 + 8 * k, 72 - m, 10 + 8 * k, 72), fill=(40, 170, 70))
        draw.line((2, 73, 166, 73), fill="black")
        draw.text((4, 2), f"{name[:17]}  {100 * np.mean(errors[name]):.1f} %", fill="black")
        views.append(view)
    return picture_page(views)


DATASETS = {
    "shapes": lambda root, split: data.shapes_pairs(split),
    "pfwillow": lambda root, split: data.pfwillow(root),  # it has a test split only
    "pfpascal": data.pfpascal_pairs,
    "spair": data.spair_pairs,
    "spair-small": lambda root, split: data.spair_pairs(root, split, "small"),
    "labels": data.label_pairs,
}


def predict_shared(matcher, keypoints: data.KeypointSet, methods: list[str], batch: int, protocol: Protocol) -> dict:
    """`predict`, its pairs shared out over torchrun's processes, each pair once; every process gets all results."""
    rank, world = processes()
    order = sorted(range(len(keypoints)), key=lambda n: keypoints.pairs[n].category)  # few processes share a category
    mine = order[len(order) * rank // world : len(order) * (rank + 1) // world]
    quiet = rank > 0 or not sys.stderr.isatty()
    found = predict(matcher, keypoints, methods, batch, quiet, protocol, mine)
    parts = [(mine, found, keypoints.sizes)]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (mine, found, keypoints.sizes))
    everything: dict[str, list] = {method: [None] * len(keypoints) for method in methods}
    for numbers, predictions, sizes in parts:
        keypoints.sizes |= sizes
        for method, places in predictions.items():
            for number, place in zip(numbers, places):
                everything[method][number] = place
    return everything


def main() -> None:
    from finetune import load_matcher
    from train import BACKBONE_METHODS, PRESETS, STAGES, Cascade, Config, find_device, load_cascade, read_state

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", choices=DATASETS)
    what.add_argument("--pairs", metavar="FILE", help="pairs of your own: CSV of source,target,XA,YA,XB,YB[,class]")
    parser.add_argument("--datapath", help="folder of the data set, or one that holds it; default: the current one")
    parser.add_argument("--split", help="trn, val or test (default; labels: val); shapes: train, val, test")
    parser.add_argument("--download", action="store_true", help="fetch the data set into --datapath if it is not there")
    parser.add_argument("--checkpoint", help="checkpoint written by train.py or finetune.py")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="default: the last one trained")
    parser.add_argument("--dense", action="store_true", help="read images at half the patch's stride: four views each")
    parser.add_argument("--baseline", nargs="*", choices=BACKBONE_METHODS, help="score the frozen backbone")
    parser.add_argument("--backbone", help="without a checkpoint (default ibot_vitb16, on shapes random_vit8)")
    parser.add_argument("--weights", help="backbone weights file instead of a download")
    parser.add_argument("--layer", help="backbone block that is read, or several joined by commas")
    parser.add_argument("--size", type=int, help="input side in pixels; default: the checkpoint's")
    parser.add_argument("--alpha", type=float, nargs="+", help="default 0.05 0.10 0.15, on SPair-71k 0.01 0.05 0.10")
    parser.add_argument("--thres", choices=("auto", "img", "bbox"), default="auto", help="d; auto: the benchmark's own")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, help="score as these peers do (default: target)")
    parser.add_argument("--compare", action="store_true", help="print the paper's own rows too")
    parser.add_argument("--batch", type=int, default=8, help="pairs at a time")
    parser.add_argument("--visualize", type=int, default=0, metavar="N", help="N worst, middle and best pairs a class")
    parser.add_argument("--out", default="matches", help="folder for --visualize: a sheet a class and the PCK curve")
    parser.add_argument("--json", help="write all scores to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    if args.baseline is not None and not args.baseline:
        args.baseline = list(BACKBONE_METHODS)
    if not (args.checkpoint or args.baseline):
        parser.error("give --checkpoint FILE, or --baseline nn to score the frozen backbone")
    if args.stage and not args.checkpoint:
        parser.error("--stage needs --checkpoint")
    if args.batch < 1 or args.visualize < 0 or min(args.alpha or [0]) < 0:
        parser.error("--batch must be at least 1, --visualize and --alpha at least 0")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        parser.error(f"cannot write {args.json}: {'a folder' if Path(args.json).is_dir() else 'no such folder'}")
    names = list(dict.fromkeys(args.protocol or [None]))
    if args.visualize:
        if all(PROTOCOLS[name or "target"].swap for name in names):
            raise ValueError("--visualize draws source to target: give a --protocol of that direction, such as target")
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {args.out}: cannot make this folder: {error.strerror}") from None
    rank, world = processes()
    device = find_device(args.device)
    overrides = {k: v for k in ("backbone", "layer", "size") if (v := getattr(args, k)) is not None}
    split = args.split or ("val" if args.dataset == "labels" else "test")
    if args.dataset == "pfwillow" and split != "test":
        parser.error(f"--split {split}: PF-WILLOW has a test split only")
    if args.download and world > 1:
        raise ValueError("--download: fetch the data set with one process first")
    if args.download:
        data.download((args.dataset or "--pairs").removesuffix("-small"), args.datapath)
    keypoints = data.csv_pairs(args.pairs) if args.pairs else DATASETS[args.dataset](args.datapath, split)
    if args.checkpoint and read_state(args.checkpoint)["program"] == "finetune.py":
        if args.stage or args.baseline or args.weights or overrides or args.dense:
            raise ValueError(
                f"{args.checkpoint} is CATs: no --stage, --baseline, --weights, --backbone, --layer, --size or --dense"
            )
        matcher, methods = load_matcher(args.checkpoint, device), ["cats"]
    elif args.checkpoint:
        matcher = load_cascade(args.checkpoint, weights=args.weights, device=device, **overrides)
        methods = (args.stage or [matcher.cfg.final_stage]) + (args.baseline or [])
        trained = matcher.cfg.stages
        if missing := [m for m in methods if m in STAGES[trained:]]:
            raise ValueError(f"--stage {missing[0]}: {args.checkpoint} ends with the {matcher.cfg.final_stage} stage")
    else:
        preset = PRESETS["quick"] if args.dataset == "shapes" else {}
        matcher = Cascade(Config(**preset | overrides | {"weights": args.weights})).to(device).eval()
        methods = args.baseline
    methods = list(dict.fromkeys(methods))
    if args.dense:
        if "region" in methods:
            raise ValueError("--dense: the region stage refines in whole cells; leave it out of --stage")
        matcher = Dense(matcher)
    alphas = tuple(args.alpha or ((0.01, 0.05, 0.10) if (args.dataset or "").startswith("spair") else ALPHAS))
    rule = None if args.thres == "auto" else args.thres
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    scores, done = {}, {}
    for name in names:
        start, how = time.perf_counter(), PROTOCOLS[name or "target"]
        asked = how.swap, how.frame if how.whole else None  # what the predictions depend on
        if asked not in done:
            done[asked] = predict_shared(matcher, keypoints, methods, args.batch, how)
            seconds = time.perf_counter() - start
            if not rank:
                rate = f"{len(keypoints) / seconds:.1f} pairs/s on {device}"
                print(f"\n{len(keypoints)} pairs by {len(methods)} methods in {seconds:.1f} s, {rate}")
        found = done[asked]
        if rank:
            continue
        scores[name or "target"] = {m: score(p, keypoints, alphas, name, rule) for m, p in found.items()}
        for method, table in scores[name or "target"].items():
            print_scores(table, method, keypoints, alphas, matcher.cfg.size, name or "target")
        if not how.swap:
            predictions = found
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    if args.compare:
        ours = {}
        for name, methods_scores in scores.items():
            for method, table in methods_scores.items():
                block = next(iter(table.values()))
                rows = {"all": block["per_image"]} | block["per_class"]
                ours[f"{method}, {name}"] = {
                    (c, f"{a:g}"): v for c, values in rows.items() for a, v in zip(alphas, values)
                }
        print_paper((args.dataset or "").removesuffix("-small"), ours)
    if args.visualize:
        draw_results(Path(args.out), predictions, keypoints, args.visualize, rule)
        print(f"worst, middle and best pairs of every class, and the PCK curve, drawn in {Path(args.out)}")
    if args.json:
        cfg = {key: getattr(matcher.cfg, key, None) for key in ("backbone", "layer", "levels", "size")}
        report = {"dataset": keypoints.name, "pairs": len(keypoints), "alphas": alphas, "dense": args.dense} | cfg
        Path(args.json).write_text(json.dumps(report | {"checkpoint": args.checkpoint, "scores": scores}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
