"""PCK of a trained cascade, or of its frozen backbone alone, on annotated pairs (paper, section 4.2).

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
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import data
from modules import Features

ALPHAS = (0.05, 0.10, 0.15)
GREEN, RED, YELLOW = (40, 200, 60), (230, 40, 40), (250, 210, 40)


def correct_points(pred: Tensor, truth: Tensor, extent: float, alphas: tuple[float, ...]) -> Tensor:
    """PCK's test: ||pred - truth|| <= alpha * extent. pred, truth (n, 2) in pixels; returns (n, alphas) bool."""
    distance = (pred - truth).norm(dim=-1)
    return distance[:, None] <= torch.tensor(alphas) * extent


def padded_extent(kps: Tensor) -> float:
    """d of rule "bbox-padded": the extent of points (n, 2) after padding with -1: the largest coordinate + 1."""
    return float(kps.max()) + 1


def pair_hits(pred: Tensor, pair: data.KeypointPair, size: tuple[int, int], rule: str, alphas) -> Tensor:
    """Right points of one pair under a rule, (n, alphas) bool; size: (W, H) of the target image.

    "bbox-padded" is scored as its tables were made: in the image squashed to 256 x 256.
    """
    if rule == "bbox":
        return correct_points(pred, pair.trg_kps, pair.extent, alphas)
    scale = 256 / torch.tensor(size)
    return correct_points(pred * scale, pair.trg_kps * scale, padded_extent(pair.trg_kps * scale), alphas)


@torch.no_grad()
def predict(cascade, keypoints: data.KeypointSet, methods: list[str], batch: int = 8, quiet: bool = False):
    """Transfer every pair's source points by every method; the backbone runs once a distinct image.

    Returns {method: [(n, 2) points in target pixels, one entry a pair]}.
    """
    features = {}
    for index in tqdm(sorted({i for p in keypoints.pairs for i in p[:2]}), "features", disable=quiet, leave=False):
        image = keypoints.load(index)[0]
        tensor, _ = data.prepare(image, None, cascade.cfg.size, cascade.backbone.patch)
        features[index], keypoints.sizes[index] = cascade.features(tensor[None]), image.size
    predictions = {method: [] for method in methods}
    grid = next(iter(features.values())).grid
    for first in tqdm(range(0, len(keypoints), batch), "pairs", disable=quiet, leave=False):
        pairs = keypoints.pairs[first : first + batch]
        src, trg = (Features(*(torch.cat(x) for x in zip(*(features[p[side]] for p in pairs)))) for side in (0, 1))
        cells = [data.pixels_to_cells(p.src_kps, keypoints.size(p.src), grid) for p in pairs]
        points = torch.nn.utils.rnn.pad_sequence(cells, batch_first=True).to(src.feat.device)  # (B, n, 2)
        for method in methods:
            moved = cascade.transfer(src, trg, points, method).cpu()
            for k, pair in enumerate(pairs):
                pixels = data.cells_to_pixels(moved[k, : len(pair.src_kps)], keypoints.size(pair.trg), grid)
                predictions[method].append(pixels)
    return predictions


def score(predictions: list[Tensor], keypoints: data.KeypointSet, alphas: tuple[float, ...] = ALPHAS) -> dict:
    """PCK in per cent under every rule: {rule: {"per_image": [...], "per_point": [...], "per_class": {name: [...]}}}.

    Lists run over alphas; a class is the mean over its pairs.
    """
    table = {}
    for rule in ("bbox", "bbox-padded") if keypoints.name == "PF-WILLOW" else ("bbox",):
        hits = [
            pair_hits(pred, pair, keypoints.size(pair.trg), rule, alphas).float()
            for pred, pair in zip(predictions, keypoints.pairs, strict=True)
        ]
        pair_pck = torch.stack([h.mean(0) for h in hits]) * 100  # (pairs, alphas)
        classes = [p.category for p in keypoints.pairs]
        per_class = {
            name: pair_pck[torch.tensor([c == name for c in classes])].mean(0).tolist() for name in sorted(set(classes))
        }
        table[rule] = {
            "per_image": pair_pck.mean(0).tolist(),
            "per_point": (torch.cat(hits).mean(0) * 100).tolist(),
            "per_class": per_class,
        }
    return table


def print_scores(table: dict, method: str, keypoints: data.KeypointSet, alphas: tuple[float, ...], size: int) -> None:
    """One method's table, headed by its protocol."""
    points = sum(len(p.src_kps) for p in keypoints.pairs)
    print(
        f"\n{method} on {keypoints.name}: {len(keypoints)} pairs, {points} points, input {size}x{size},"
        " source to target, target pixels, <="
    )
    print(f"{'PCK (%) at alpha':34s}" + "".join(f"{a:8g}" for a in alphas))
    for rule, block in table.items():
        frame = f"{rule} (256x256)" if rule == "bbox-padded" else rule
        lines = [(f"{frame}, per image", block["per_image"]), (f"{frame}, per point", block["per_point"])]
        if rule == "bbox":
            lines += [(f"  {name}", values) for name, values in block["per_class"].items()]
        for name, values in lines:
            print(f"{name:34s}" + "".join(f"{v:8.1f}" for v in values))


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
            colour = Image.new("HSV", (1, 1), (k * 255 // max(len(ends), 1), 220, 255)).convert("RGB").getpixel((0, 0))
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


def match_sheet(predictions: dict[str, list[Tensor]], keypoints: data.KeypointSet, count: int = 8) -> Image.Image:
    """A page of pairs spread over the set, one column a method, at alpha 0.10 of rule "bbox"."""
    rows = []
    count = min(count, len(keypoints))
    for k in (i * len(keypoints) // count for i in range(count)):
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


def draw_pair(images: data.ImageSet, pair: dict) -> Image.Image:
    """A labelled pair; matches from green (their loops close) over yellow to red (they miss by a tenth of the box)."""
    colours = [
        tuple(Image.new("HSV", (1, 1), (int(85 * (1 - min(e / 0.1, 1))), 230, 240)).convert("RGB").getpixel((0, 0)))
        for e in pair["errors"]
    ]
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


def main() -> None:
    from train import BACKBONE_METHODS, PRESETS, STAGES, Cascade, Config, find_device, load_cascade

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", choices=DATASETS)
    what.add_argument("--pairs", metavar="FILE", help="pairs of your own: CSV of source,target,XA,YA,XB,YB[,class]")
    parser.add_argument("--datapath", help="folder of the data set, or one that holds it; default: the current one")
    parser.add_argument("--split", help="trn, val or test (default; labels: val); shapes: train, val, test")
    parser.add_argument("--download", action="store_true", help="fetch the data set into --datapath if it is not there")
    parser.add_argument("--checkpoint", help="checkpoint written by train.py")
    parser.add_argument(
        "--stage", nargs="+", choices=("image", "region", "pixel"), help="default: the last one trained"
    )
    parser.add_argument("--baseline", nargs="*", choices=BACKBONE_METHODS, help="score the frozen backbone")
    parser.add_argument("--backbone", help="without a checkpoint (default ibot_vitb16, on shapes random_vit8)")
    parser.add_argument("--weights", help="backbone weights file instead of a download")
    parser.add_argument("--layer", type=int, help="backbone block that is read")
    parser.add_argument("--size", type=int, help="input side in pixels; default: the checkpoint's")
    parser.add_argument("--alpha", type=float, nargs="+", default=list(ALPHAS))
    parser.add_argument("--batch", type=int, default=8, help="pairs at a time")
    parser.add_argument("--visualize", type=int, default=0, metavar="N", help="draw N pairs into --out")
    parser.add_argument("--out", default="matches.png", help="picture written by --visualize")
    parser.add_argument("--json", help="write all scores to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    if args.baseline is not None and not args.baseline:
        args.baseline = list(BACKBONE_METHODS)
    if not (args.checkpoint or args.baseline):
        parser.error("give --checkpoint FILE, or --baseline nn hough to score the frozen backbone")
    if args.stage and not args.checkpoint:
        parser.error("--stage needs --checkpoint")
    if args.batch < 1 or args.visualize < 0 or min(args.alpha) < 0:
        parser.error("--batch must be at least 1, --visualize and --alpha at least 0")
    for place in (args.json, args.out if args.visualize else None):
        if place and not Path(place).resolve().parent.is_dir():
            parser.error(f"cannot write {place}: no such folder")
    device = find_device(args.device)
    overrides = {k: v for k in ("backbone", "layer", "size") if (v := getattr(args, k)) is not None}
    split = args.split or ("val" if args.dataset == "labels" else "test")
    if args.dataset == "pfwillow" and split != "test":
        parser.error(f"--split {split}: PF-WILLOW has a test split only")
    if args.download:
        data.download((args.dataset or "--pairs").removesuffix("-small"), args.datapath)
    keypoints = data.csv_pairs(args.pairs) if args.pairs else DATASETS[args.dataset](args.datapath, split)
    if args.checkpoint:
        cascade = load_cascade(args.checkpoint, weights=args.weights, device=device, **overrides)
        methods = (args.stage or [cascade.cfg.final_stage]) + (args.baseline or [])
    else:
        preset = PRESETS["quick"] if args.dataset == "shapes" else {}
        cascade = Cascade(Config(**preset | overrides | {"weights": args.weights})).to(device).eval()
        methods = args.baseline
    if missing := [m for m in methods if m in STAGES[cascade.cfg.stages :]]:
        raise ValueError(f"--stage {missing[0]}: {args.checkpoint} ends with the {cascade.cfg.final_stage} stage")
    methods = list(dict.fromkeys(methods))
    start = time.perf_counter()
    predictions = predict(cascade, keypoints, methods, args.batch, quiet=not sys.stderr.isatty())
    seconds = time.perf_counter() - start
    scores = {method: score(predictions[method], keypoints, tuple(args.alpha)) for method in methods}
    for method, table in scores.items():
        print_scores(table, method, keypoints, tuple(args.alpha), cascade.cfg.size)
    print(f"\n{len(keypoints)} pairs by {len(methods)} methods in {seconds:.1f} s on {device}")
    if args.visualize:
        match_sheet(predictions, keypoints, args.visualize).save(args.out)
        print(f"{min(args.visualize, len(keypoints))} pairs drawn in {args.out}")
    if args.json:
        cfg = {key: getattr(cascade.cfg, key) for key in ("backbone", "layer", "size")}
        report = {"dataset": keypoints.name, "pairs": len(keypoints), "alphas": args.alpha} | cfg
        Path(args.json).write_text(json.dumps(report | {"checkpoint": args.checkpoint, "scores": scores}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
