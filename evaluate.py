"""PCK of a trained cascade, or of a frozen backbone alone, on annotated pairs (paper, section 4.2).

    python evaluate.py --dataset spair                                  # the frozen backbone, nothing trained
    python evaluate.py --dataset shapes --checkpoint runs/quick/last.pt --stage image region pixel
    python evaluate.py --dataset pfwillow --baseline nn hough --backbone dinov2_vits14 --layer 9,10 --size 224
    torchrun --nproc_per_node=8 evaluate.py --dataset spair --checkpoint runs/paper/last.pt

Protocol: source to target, scored in the target image's own pixels, unpadded points; a point is right if it
lies within alpha * d of the truth (<=). d is the longer side of the target's box (rule "bbox": the object's
box or, on PF-WILLOW, that of the target's points) or of the target image (rule "img"). "per image" is the
mean over pairs of a pair's share of right points, "per point" the share over all points. The tables of other
papers follow protocols of their own, and CATs is scored beside them: python -m experiments.peers.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
from modules import Features
from support.benchmarks import DATASETS, csv_pairs
from support.confidence import report, transfer_with_evidence
from support.dense import Dense
from support.download import download
from support.files import read_state, write_whole
from support.ours import both_faces
from support.pictures import draw_results
from support.presets import PRESETS
from support.run import command, find_device, processes, progress
from train import BEST, FROZEN, STAGES, Cascade, Config, best_of, load_cascade

ALPHAS = (0.05, 0.10, 0.15)

# ------------------------------------------------------------------------------------------------------------
# Keypoints from one image to the other


def blocks_of_pairs(keypoints: data.KeypointSet, numbers: list[int], held: int) -> list[list[int]]:
    """Pairs by category, in order, cut where a block would show more than `held` images (a pair has two)."""
    blocks, category, images = [], None, set()
    for n in sorted(numbers, key=lambda n: keypoints.pairs[n].category):
        p = keypoints.pairs[n]
        if p.category != category or len(images | {p.src, p.trg}) > held:
            blocks.append([])
            category, images = p.category, set()
        blocks[-1].append(n)
        images |= {p.src, p.trg}
    return blocks


def features_of(matcher, keypoints: data.KeypointSet, images: list[int], batch: int,
                mirror: bool, maps: bool = False) -> dict[int, Features]:
    """The features of every image, each of batch size 1; the sizes of the images are noted on the way.

    mirror: with those of the mirror images. maps: with the saliency maps of the set, which scoring never
    sees.
    """
    found: dict[int, Features] = {}
    for first in range(0, len(images), batch):
        some, views, cells = images[first : first + batch], [], []
        for index in some:
            image, saliency = keypoints.load(index)
            keypoints.sizes[index] = image.size
            saliency = saliency if maps else None
            view, cell = data.prepare(image, saliency, matcher.cfg.size, matcher.backbone.patch)
            views.append(view)
            cells += [] if cell is None else [cell]
        features = both_faces if mirror else type(matcher).features
        several = features(matcher, torch.stack(views), *([torch.stack(cells)] if cells else []))
        found |= {index: several.map(lambda x, k=k: x[k : k + 1]) for k, index in enumerate(some)}
    return found


@torch.no_grad()
def predict(matcher, keypoints: data.KeypointSet, methods: list[str], batch: int = 8, quiet: bool = False,
            numbers: list[int] | None = None, held: int = 1000,
            sure: bool = False) -> dict[str, list[Tensor]]:
    """Find the source's points in the target, by every method: {method: [(n, 2) target pixels, ...]}.

    matcher: features(images (B, 3, S, S)) -> Features, transfer(src, trg, points in cells (B, n, 2), method)
    -> cells of trg, cfg.size and backbone.patch. batch: images, and pairs, at a time. numbers: the pairs to
    do, all of them if None; results are in their order. sure: (n, 6), with what confidence is found from.

    Pairs are worked through by category, and the backbone runs once an image of it. Memory holds the features
    of one category, but of no more than `held` images (3 GiB at 512 px with ViT-B/16): larger ones are cut
    into blocks.
    """
    numbers = list(range(len(keypoints))) if numbers is None else numbers
    found: dict[str, dict[int, Tensor]] = {method: {} for method in methods}
    mirror = any(method.startswith("best") for method in methods)
    transfer = partial(transfer_with_evidence, matcher) if sure else matcher.transfer
    with progress(total=len(numbers), desc="pairs", disable=quiet, leave=False) as bar:
        for members in blocks_of_pairs(keypoints, numbers, held):
            images = sorted({i for n in members for i in keypoints.pairs[n][:2]})
            features = features_of(matcher, keypoints, images, batch, mirror)
            for first in range(0, len(members), batch):
                some = members[first : first + batch]
                pairs = [keypoints.pairs[n] for n in some]
                src, trg = (first.map(lambda *x: torch.cat(x), *rest) for first, *rest in (
                    [features[p[end]] for p in pairs] for end in (0, 1)))
                cells = [data.pixels_to_cells(p.src_kps, keypoints.size(p.src), src.grid) for p in pairs]
                points = pad_sequence(cells, batch_first=True).to(src.feat.device)  # (B, n, 2)
                for method in methods:
                    moved = transfer(src, trg, points, method).cpu()
                    for n, p, row in zip(some, pairs, moved):
                        places, more = row[: len(p.src_kps)].tensor_split((2,), 1)
                        places = data.cells_to_pixels(places, keypoints.size(p.trg), trg.grid)
                        found[method][n] = torch.cat([places, more], 1)
                bar.update(len(some))
            features.clear()  # before those of the next block are made
    return {method: [places[n] for n in numbers] for method, places in found.items()}


def predict_shared(matcher, keypoints: data.KeypointSet, methods: list[str],
                   sure: bool = False) -> dict[str, list[Tensor]]:
    """`predict`, its pairs shared out over torchrun's processes, each once; every process gets all."""
    start, (rank, world) = time.perf_counter(), processes()
    order = sorted(range(len(keypoints)), key=lambda n: keypoints.pairs[n].category)  # few share a category
    mine = order[len(order) * rank // world : len(order) * (rank + 1) // world]
    found = predict(matcher, keypoints, methods, quiet=rank > 0, numbers=mine, sure=sure)
    parts = [(mine, found, keypoints.sizes)]
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        parts = [None] * world
        dist.all_gather_object(parts, (mine, found, keypoints.sizes))
    everything: dict[str, list] = {method: [None] * len(keypoints) for method in methods}
    for numbers, predictions, sizes in parts:
        keypoints.sizes |= sizes
        for method, places in predictions.items():
            for number, place in zip(numbers, places):
                everything[method][number] = place
    if not rank:
        seconds, device = time.perf_counter() - start, next(matcher.backbone.parameters()).device
        rate = f"{len(keypoints) / seconds:.1f} pairs/s on {device}"
        print(f"\n{len(keypoints)} pairs by {len(methods)} methods in {seconds:.1f} s, {rate}")
    return everything


# ------------------------------------------------------------------------------------------------------------
# PCK


def correct_points(pred: Tensor, truth: Tensor, d: float, alphas: tuple[float, ...],
                   strict: bool = False) -> Tensor:
    """PCK's test: ||pred - truth|| <= alpha d, or < if strict. pred, truth (n, 2) to (n, alphas) bool."""
    distance, limit = (pred - truth).norm(dim=-1)[:, None], torch.tensor(alphas) * d
    return distance < limit if strict else distance <= limit


def right_points(pred: Tensor, keypoints: data.KeypointSet, number: int, alphas: tuple[float, ...], rule: str,
                 strict: bool = False) -> Tensor:
    """PCK's test of a pair: by rule "bbox" or "img", or its own d and frame. pred (n, 2) to (n, alphas)."""
    pair = keypoints.pairs[number]
    d = max(keypoints.size(pair.trg)) if rule == "img" and pair.d is None else pair.extent
    scale = torch.tensor(pair.scale or (1.0, 1.0))
    return correct_points(pred * scale, pair.trg_kps * scale, d, alphas, strict)


def right_at_ten(predictions: dict[str, list[Tensor]], keypoints: data.KeypointSet) -> dict:
    """Which points pictures show as right, those at alpha 0.10 of rule "bbox": {method: [(n,) bool, ...]}."""
    return {method: [right_points(pred, keypoints, n, (0.10,), "bbox")[:, 0] for n, pred in enumerate(found)]
            for method, found in predictions.items()}


def score(predictions: list[Tensor], keypoints: data.KeypointSet, alphas: tuple[float, ...] = ALPHAS,
          rule: str | None = None, strict: bool = False) -> dict:
    """PCK in per cent by "per_image", "per_point", "per_class" and "per_code", under the name of the rule.

    {rule: {"per_image": [...], "per_point": [...], "per_class": {name: [...]}, "per_code": {name: [...]}}},
    lists over alphas; a class, or a degree of one of SPair-71k's difficulties, is the mean over its pairs.
    rule: "bbox", "img"; None: the benchmark's own. ValueError unless there is one prediction a pair.
    """
    rule = rule or keypoints.rule
    right = [right_points(pred, keypoints, n, alphas, rule, strict).float()
             for n, pred in zip(range(len(keypoints)), predictions, strict=True)]
    pair_pck = torch.stack([r.mean(0) for r in right]) * 100  # (pairs, alphas)

    def mean_of(chosen: list[bool]) -> list[float]:
        return pair_pck[torch.tensor(chosen)].mean(0).tolist()

    pairs = keypoints.pairs
    classes = sorted({p.category for p in pairs})
    codes = sorted({(code, value) for p in pairs for code, value in p.codes.items()})
    return {rule: {
        "per_image": pair_pck.mean(0).tolist(),
        "per_point": (torch.cat(right).mean(0) * 100).tolist(),
        "per_class": {c: mean_of([p.category == c for p in pairs]) for c in classes},
        "per_code": {f"{c} {v}": mean_of([p.codes.get(c) == v for p in pairs]) for c, v in codes},
    }}


TARGET = "target: source to target, d of the target, own pixels, <= alpha d"  # the protocol, in words


def print_scores(table: dict, method: str, keypoints: data.KeypointSet, alphas: tuple[float, ...], size: int,
                 protocol: str = TARGET) -> None:
    """One method's table, headed by its protocol."""
    points = sum(len(p.src_kps) for p in keypoints.pairs)
    print(f"\n{method} on {keypoints.name}: {len(keypoints)} pairs, {points} points, input {size}x{size}")
    print(f"protocol {protocol}")
    print(f"{'PCK (%) at alpha':34s}" + "".join(f"{a:8g}" for a in alphas))
    for rule, block in table.items():
        rows = {f"{rule}, per image": block["per_image"], f"{rule}, per point": block["per_point"]}
        rows |= {f"  {name}": values for name, values in (block["per_class"] | block["per_code"]).items()}
        for name, values in rows.items():
            print(f"{name:34s}" + "".join(f"{v:8.1f}" for v in values))


# ------------------------------------------------------------------------------------------------------------
# Command line. What experiments/peers.py shares is a function of its own.


def shared_options(text: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Options for pairs, matcher and PCK."""
    parser = argparse.ArgumentParser(
        prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", choices=DATASETS)
    what.add_argument("--pairs", metavar="FILE", help="CSV of your own: source,target,XA,YA,XB,YB[,class];"
                                                      " images are beside it or in --datapath")
    add("--datapath", help="folder of the data set or one that holds it (default: ., datasets/, $COCR_DATA);"
        " of --pairs: of its images (default: that of FILE)")
    add("--split", help="trn, val or test (default; labels: val); shapes: train, val, test")
    add("--download", action="store_true", help="fetch the data set first, into --datapath or datasets/")
    add("--checkpoint", help="written by train.py; default: the frozen backbone by its reading best")
    add("--stage", nargs="+", choices=STAGES + BEST, help="default: the last one trained, and our reading")
    add("--dense", action="store_true", help="read images at half the patch's stride: four views each")
    add("--baseline", nargs="*", choices=FROZEN, help="readings of the frozen backbone; none named: all")
    add("--backbone", help="without a checkpoint (default ibot_vitb16, on shapes random_vit8)")
    add("--weights", help="backbone weights file instead of a download")
    add("--layer", help="backbone block that is read, or several: 9,10 or --layer=-2,-1")
    add("--size", type=int, help="input side in pixels; default: the checkpoint's, or 512 (shapes: 128)")
    add("--alpha", type=float, nargs="+", help="default 0.05 0.10 0.15, on SPair-71k 0.01 0.05 0.10")
    add("--thres", choices=("auto", "img", "bbox"), default="auto", help="d; auto: the benchmark's own")
    add("--json", help="write all scores to this file")
    add("--device", default="auto", help="auto, cpu, cuda")
    return parser


def read_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, checked; `alphas` and `rule` (None: the benchmark's own) mean --alpha and --thres."""
    args = parser.parse_args(argv)
    if args.stage and not args.checkpoint:
        raise ValueError("--stage needs --checkpoint")
    if wrong := [alpha for alpha in args.alpha or [] if not 0 <= alpha <= 1]:
        raise ValueError(f"--alpha {wrong[0]:g}: a share of d from 0 to 1, such as 0.10")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: at least 1")
    place = args.json and Path(args.json)
    if place and (place.is_dir() or not place.resolve().parent.is_dir()):
        raise ValueError(f"cannot write {place}: {'a folder' if place.is_dir() else 'no such folder'}")
    args.split = args.split or ("val" if args.dataset == "labels" else "test")
    if args.dataset == "pfwillow" and args.split != "test":
        raise ValueError(f"--split {args.split}: PF-WILLOW has a test split only")
    args.alphas = tuple(args.alpha or ((0.01, 0.05, 0.10) if "spair" in (args.dataset or "") else ALPHAS))
    args.rule = None if args.thres == "auto" else args.thres
    return args


def load_pairs(args: argparse.Namespace) -> data.KeypointSet:
    """The pairs that the options ask for, fetched first where they say so."""
    if args.download and processes()[1] > 1:
        raise ValueError("--download: fetch the data set with one process first")
    if args.download:
        download((args.dataset or "--pairs").removesuffix("-small"), args.datapath)
    if args.pairs:
        return csv_pairs(args.pairs, args.datapath)
    return DATASETS[args.dataset](args.datapath, args.split)


def load_methods(args: argparse.Namespace) -> tuple[Cascade | Dense, list[str]]:
    """The cascade of a checkpoint or of a frozen backbone, and the methods to score it by."""
    given = {k: v for k in ("backbone", "layer", "size") if (v := getattr(args, k)) is not None}
    device, baseline = find_device(args.device), list(FROZEN) if args.baseline == [] else args.baseline or []
    if args.checkpoint:
        cascade = load_cascade(args.checkpoint, weights=args.weights, device=device, **given)
        last = cascade.cfg.final_stage
        methods = (args.stage or [last, *best_of(last)]) + baseline
        if missing := [m for m in methods if m.split("-")[-1] in STAGES[cascade.cfg.stages :]]:
            raise ValueError(f"--stage {missing[0]}: {args.checkpoint} ends with the {last} stage")
    else:
        preset = PRESETS["quick"] if args.dataset == "shapes" else {}
        cascade = Cascade(Config(**preset | given | {"weights": args.weights})).to(device).eval()
        methods, cfg = baseline or ["best"], cascade.cfg
        if not baseline and not processes()[0]:
            block = "last block" if cfg.layer == "-1" else f"--layer {cfg.layer}"
            axes = f"{min(256, cascade.backbone.dim)} principal axes of the pair's own cells"
            best = f"facing and affine voting on {axes}"
            print(f"frozen {cfg.backbone}, {block}, {cfg.size} px, reading best ({best});"
                  " --checkpoint FILE reads a trained one")
    if args.dense and "region" in methods:
        raise ValueError("--dense: the region stage refines in whole cells; leave it out of --stage")
    return Dense(cascade) if args.dense else cascade, list(dict.fromkeys(methods))


def write_report(args: argparse.Namespace, matcher, keypoints: data.KeypointSet, scores: dict,
                 **more) -> None:
    """All scores as JSON. scores: {protocol: {method: table of `score`}}; more: further entries."""
    record = {"dataset": keypoints.name, "pairs": len(keypoints), "alphas": args.alphas, "dense": args.dense}
    record |= {key: getattr(matcher.cfg, key, None) for key in ("backbone", "layer", "levels", "size")}
    record |= {"checkpoint": args.checkpoint, "scores": scores} | more
    write_whole(args.json, json.dumps(record, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = shared_options(__doc__)
    add = parser.add_argument
    add("--visualize", type=int, default=0, metavar="N", help="draw N worst, middle and best pairs a class")
    add("--confidence", action="store_true", help="confidence of our reading's matches against the share"
        " that is right: a table, and with --visualize a curve")
    add("--out", default="matches", help="folder for --visualize: a sheet a class and the PCK curve")
    args = read_options(parser, argv)
    if args.visualize < 0:
        raise ValueError(f"--visualize {args.visualize}: not negative")
    if args.checkpoint and read_state(args.checkpoint)["program"] == "experiments.finetune":
        line = f"python -m experiments.peers {shlex.join(sys.argv[1:] if argv is None else argv)}"
        raise ValueError(f"{args.checkpoint} holds CATs, which is scored with its peers: {line}")
    keypoints = load_pairs(args)
    matcher, methods = load_methods(args)
    if args.confidence and not (methods := [m for m in methods if m.startswith("best")]):
        raise ValueError("--confidence is of our reading: name best, best-image or best-pixel")
    folder = Path(args.out)
    if args.visualize:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {folder}: cannot make this folder: {error.strerror}") from None
    found = predict_shared(matcher, keypoints, methods, args.confidence)
    if dist.is_initialized():
        dist.destroy_process_group()
    if processes()[0]:
        return
    if args.confidence:
        known = {m: torch.cat(rows)[:, 2:] for m, rows in found.items()}
        found = {m: [row[:, :2] for row in rows] for m, rows in found.items()}
    scores = {m: score(pred, keypoints, args.alphas, args.rule) for m, pred in found.items()}
    for method, table in scores.items():
        print_scores(table, method, keypoints, args.alphas, matcher.cfg.size)
    right, more = right_at_ten(found, keypoints) if args.confidence or args.visualize else {}, {}
    if args.confidence:
        judged = {m: torch.cat(right[m]) for m in methods}
        place = folder if args.visualize else None
        more["confidence"] = report(known, judged, args.dense, keypoints.name, place)
    if args.visualize:
        steps, rule = tuple(k / 100 for k in range(1, 11)), args.rule or keypoints.rule
        curves = {m: score(pred, keypoints, steps, rule)[rule]["per_image"] for m, pred in found.items()}
        draw_results(folder, found, right, keypoints, args.visualize, curves, steps, rule)
        print(f"worst, middle and best pairs of every class, and curves, drawn in {folder}")
    if args.json:
        write_report(args, matcher, keypoints, {"target": scores}, **more)


if __name__ == "__main__":
    with command():
        main()
