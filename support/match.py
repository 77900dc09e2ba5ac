"""Match pictures of one's own: `python pixel_stage.py SOURCE TARGET`, or `--pairs FILE` for many.

Every foreground cell of the source is sent to the target by our reading, of the frozen backbone or, with
--checkpoint, of the trained pixel stage; those that land on the foreground of the target are matches, and
the surest that do not crowd each other are drawn.
"""

import argparse
import csv
import io
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
from modules import Features, Pairs, gaussian_smooth, pair_nms, transfer_keypoints
from support.confidence import confidence, read_points
from support.dense import Dense
from support.files import write_whole
from support.ours import FOREGROUND, Reading, both_faces, cell_grid
from support.pictures import PAGE, at_height, draw_matches, draw_warp
from support.run import command, progress, stop_signals
from support.shards import digest

HELD = 200  # pictures whose features are kept at a time by --pairs: 1.3 GB at 224 px with ViT-S/14
SPACING = 1 / 16  # of the longer side of the source's grid: how near two drawn matches may be
SMALLEST = 16  # px a side


def is_picture(name: str) -> bool:
    """Whether a name ends as a picture's does, one that cannot be read among them."""
    return Path(name).suffix.lower() in {*data.EXTENSIONS, *data.UNREAD}


def wants_pictures(argv: list[str]) -> bool:
    """Whether a command line of pixel_stage.py is about matching pictures, and not about training: one stands
    first or anywhere among the options, or --pairs names a file, not a number."""
    after = dict(zip(argv, [*argv[1:], ""])) | dict(a.split("=", 1) for a in argv if a.startswith("--pairs="))
    first = bool(argv) and not argv[0].startswith("-")
    return any(map(is_picture, argv)) or first or not after.get("--pairs", "0").isdigit()


def parse_points(texts: list[str], size: tuple[int, int]) -> Tensor:
    """["40,52", ...], or the name of a file with a point a line, to (n, 2) pixels; ValueError names a
    malformed point or one outside the (W, H) image."""
    points, where = [], "--points"
    if len(texts) == 1 and "," not in texts[0]:
        where = texts[0]
        try:
            lines = Path(where).read_text("utf-8-sig").replace(",", " ").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--points {where}: neither x,y nor a file that can be read ({error})") from None
        rows = [line.lower().split() for line in lines if line.strip() and not line.startswith("#")]
        texts = [",".join(row) for row in rows if row != ["x", "y"]]
    for text in texts:
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"{where} {text!r}: write a point as x,y in pixels, such as 40,52.5") from None
        if not (-0.5 <= x <= size[0] - 0.5 and -0.5 <= y <= size[1] - 0.5):
            raise ValueError(f"{where} {text}: outside the source image of {size[0]}x{size[1]} px")
        points.append((x, y))
    if not points:
        raise ValueError(f"{where}: no points in it")
    return torch.tensor(points)


def read_options(argv: list[str]) -> argparse.Namespace:
    """The command line; ValueError, in one line, for what cannot be."""
    usage = "pixel_stage.py SOURCE TARGET [options]\n       pixel_stage.py --pairs FILE [options]"
    parser = argparse.ArgumentParser("pixel_stage.py", usage, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", nargs="*", metavar="SOURCE TARGET", help="the two pictures, anywhere among the options")
    add("--pairs", metavar="FILE", help="CSV of many pairs instead: source,target, relative to FILE; a JSON"
        " line a pair goes to --json, and a second run goes on where the first was stopped")
    add("--checkpoint", help="written by train.py; default: the frozen backbone, nothing trained")
    add("--backbone", help="without a checkpoint (default ibot_vitb16, 512 px)")
    add("--weights", help="backbone weights file instead of a download")
    add("--layer", help="backbone block that is read, or several: 9,10 or --layer=-2,-1")
    add("--size", type=int, help="input side in pixels")
    add("--dense", action=argparse.BooleanOptionalAction, default=True,
        help="read pictures at half the patch's stride (default)")
    add("--points", nargs="+", metavar="x,y", help="source points in pixels, or a file of them, a line each")
    add("--count", type=int, default=32, help="matches at most (default 32)")
    add("--threshold", type=float, default=0.5, help="confidence below which none is drawn (default 0.5)")
    add("--saliency", nargs=2, metavar="MAP", help="8-bit saliency maps of both (default: attention)")
    add("--out", help="picture to write (default matches.png)")
    add("--warp", metavar="PICTURE", help="also: the target in the source's frame, and colours by place")
    add("--json", metavar="FILE", help="also: matches with confidence and cells; a table if it ends in .csv")
    add("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_intermixed_args(argv)
    spare = [a for a in args.points or [] if is_picture(a)]
    args.points = [a for a in args.points or [] if a not in spare] or None
    args.pictures = sorted(args.pictures + spare, key=argv.index)
    if len(args.pictures) != (0 if args.pairs else 2):
        given = f"{len(args.pictures)} given: {' '.join(args.pictures)}" if args.pictures else "none given"
        raise ValueError(f"two pictures, SOURCE and TARGET, or --pairs FILE alone; {given}")
    if args.pairs and (other := [n for n in ("points", "saliency", "out", "warp") if getattr(args, n)]):
        raise ValueError(f"--{other[0]} is of two pictures, not of --pairs")
    if args.count < 1:
        raise ValueError(f"--count {args.count}: at least 1")
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: at least 1")
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: a confidence from 0 to 1")
    args.out = args.out or "matches.png"
    args.json = args.json or ("matches.jsonl" if args.pairs else None)
    tables = {".json", ".jsonl"} if args.pairs else {".json", ".csv"}
    kinds = {"out": data.EXTENSIONS, "warp": data.EXTENSIONS, "json": tables}
    taken = {Path(p).resolve() for p in (*args.pictures, *(args.saliency or []), args.pairs, args.checkpoint,
                                         args.weights) if p}
    for name in kinds:
        if not getattr(args, name):
            continue
        place = Path(getattr(args, name))
        if place.suffix.lower() not in kinds[name] or place.is_dir() or not place.resolve().parent.is_dir():
            raise ValueError(f"--{name} {place}: must be a file, in an existing folder, that ends in"
                             f" {', '.join(sorted(kinds[name]))}")
        if place.resolve() in taken:
            raise ValueError(f"--{name} {place}: would take the place of another file of this command")
        taken.add(place.resolve())
    args.stage = ["best-pixel"] if args.checkpoint else None
    args.dataset = args.baseline = None  # what evaluate.load_methods asks for besides
    return args


# ------------------------------------------------------------------------------------------------------------
# Two pictures


class Side(NamedTuple):
    """A picture and what the backbone sees in it."""

    path: str
    image: Image.Image
    features: Features  # of batch size 1, with those of the mirror image
    mask: Tensor  # (H, W) bool: the cells of the object


class Matches(NamedTuple):
    """Matches of two pictures, the surest first unless points were given."""

    points: Tensor  # (n, 2) source cells
    places: Tensor  # (n, 2) target cells
    sure: Tensor  # (n,) confidence
    reading: Reading


def object_cells(features: Features) -> Tensor:
    """The cells of the object, (H, W) bool, where there is only attention, which sees parts of it.

    Seeds are where attention, smoothed, is high. Every cell then belongs to the nearer of two means, that
    of the seeds and that of the rest, and a majority of its neighbours decides.
    """
    grid = features.grid
    side = max(grid) // 10 * 2 + 1  # a fifth of the image
    seed = (gaussian_smooth(features.saliency, side) >= FOREGROUND).float().flatten()
    if not seed.any():
        return torch.ones_like(features.saliency[0], dtype=torch.bool)
    feat = F.normalize(features.feat[0] - features.feat[0].mean(0), dim=-1)
    inside, outside = ((m @ feat) / m.sum().clamp(min=1) for m in (seed, 1 - seed))
    nearer = feat @ (inside - outside) - (inside @ inside - outside @ outside) / 2
    found = gaussian_smooth(torch.tanh(5 * nearer).view(1, *grid), side)[0] > 0
    return found if found.any() else seed.view(grid) > 0


@torch.no_grad()
def open_side(matcher, path: str, saliency: str | None = None) -> Side:
    """A picture with its features. ValueError, naming the file, for what cannot be read or is too small."""
    with data.opened(path) as picture:
        if getattr(picture, "is_animated", False):
            print(f"{path}: animated, its first frame is matched", file=sys.stderr)
    image, place = data.open_with_map(path, saliency, matcher.cfg.saliency_rescale)
    if min(image.size) < SMALLEST:
        raise ValueError(f"{path} of {image.width}x{image.height} px: at least {SMALLEST} px a side")
    if all(low == high for low, high in image.getextrema()):
        raise ValueError(f"{path} is of one colour: there is nothing to match in it")
    view, cells = data.prepare(image, place, matcher.cfg.size, matcher.backbone.patch)
    features = both_faces(matcher, view[None], None if cells is None else cells[None])
    mask = features.saliency[0] >= FOREGROUND
    if cells is not None and not mask.any():
        raise ValueError(f"saliency map {saliency}: too small a foreground for any cell of {path}")
    return Side(path, image, features, mask if cells is not None or mask.all() else object_cells(features))


@torch.no_grad()
def find_matches(matcher, method: str, src: Side, trg: Side, points: Tensor | None, count: int) -> Matches:
    """Where given points (n, 2) in source cells lie or, without any, the `count` surest matches of the object
    that keep their distance in both pictures."""
    (hs, ws), (ht, wt), given = src.features.grid, trg.features.grid, points is not None
    points = points if given else cell_grid(hs, ws, src.features.feat)[src.mask.flatten()]
    reading, places, known = read_points(matcher, src.features, trg.features, points[None], method)
    sure = confidence(known[0], isinstance(matcher, Dense))
    if not given:
        order, (x, y) = sure.argsort(descending=True), places[0].round().long().unbind(-1)
        landed = y.clamp(0, ht - 1) * wt + x.clamp(0, wt - 1)
        pairs = Pairs((points[:, 1] * ws + points[:, 0]).long(), landed, sure, trg.mask.flatten()[landed])
        best = pair_nms(Pairs(*(x[order][None] for x in pairs)), ws, wt, SPACING * max(hs, ws), count)
        kept = best.valid[0].nonzero()[:, 0]
        chosen = (best.src[0, kept, None] == pairs.src).nonzero()[:, 1]  # a source cell is there once
        points, places, sure = points[chosen], places[:, chosen], sure[chosen]
    return Matches(points, places[0], sure, reading)


def record(src: Side, trg: Side, found: Matches, settings: dict) -> dict:
    """What --json holds of two pictures: points in pixels of the upright pictures, (x, y), pixel centres at
    integers; cells likewise."""
    sides = ((src, found.points), (trg, found.places))
    pixels = [data.cells_to_pixels(xy.cpu(), side.image.size, side.features.grid) for side, xy in sides]
    columns = zip(*(xy.tolist() for xy in (*pixels, found.sure, found.points, found.places)))
    names = ("source", "target", "confidence", "source_cell", "target_cell")

    def plain(value):
        return round(value, 3) if isinstance(value, float) else [round(x, 2) + 0.0 for x in value]

    return {
        "source": src.path, "target": trg.path, "source_size": src.image.size, "target_size": trg.image.size,
        "source_grid": src.features.grid[::-1], "target_grid": trg.features.grid[::-1],
        "mirrored": round(float(found.reading.away), 3),
        "matches": [dict(zip(names, map(plain, row))) for row in columns], "settings": settings,
    }  # fmt: skip


def as_csv(found: dict) -> str:
    """The matches of a record as a table."""
    table = io.StringIO()
    ends = [f"{name}_{axis}" for name in ("source", "target", "source_cell", "target_cell") for axis in "xy"]
    rows = [[k, *m["source"], *m["target"], *m["source_cell"], *m["target_cell"], m["confidence"],
             found["mirrored"]] for k, m in enumerate(found["matches"], 1)]
    csv.writer(table, lineterminator="\n").writerows([["number", *ends, "confidence", "mirrored"], *rows])
    return table.getvalue()


def warp(src: Side, trg: Side, reading: Reading, height: int = 384) -> Image.Image:
    """The target pulled into the source's frame over its foreground, and colours by place, in one picture."""
    sides, maps = (src, trg), []
    images = [at_height(side.image, height) for side in sides]
    sizes = [image.size for image in images]
    for one, other, volume in ((0, 1, reading.volume), (1, 0, reading.volume.permute(0, 3, 4, 1, 2))):
        grid, size = sides[one].features.grid, sizes[one][::-1]
        places = transfer_keypoints(volume, cell_grid(*grid, volume)[None])[0]
        places = data.cells_to_pixels(places, sizes[other], sides[other].features.grid)
        cells = places.T.unflatten(1, grid)[None], sides[one].mask[None, None].float()
        where, mask = (F.interpolate(x.cpu(), size, mode="bilinear", align_corners=False)[0] for x in cells)
        maps += [where.permute(1, 2, 0), mask[0] >= 0.5]
    return draw_warp(*images, *maps)


def match_two(args: argparse.Namespace, matcher, method: str, settings: dict) -> None:
    """Match two pictures; print and write what the options ask for."""
    src, trg = (open_side(matcher, *pair) for pair in zip(args.pictures, args.saliency or (None, None)))
    points = None
    if args.points:
        points = parse_points(args.points, src.image.size).to(src.features.feat)
        points = data.pixels_to_cells(points, src.image.size, src.features.grid)
    found = find_matches(matcher, method, src, trg, points, args.count)
    result = record(src, trg, found, settings)
    if args.points:
        for m in result["matches"]:
            (x, y), (u, v) = m["source"], m["target"]
            print(f"{x:.1f},{y:.1f} -> {u:.1f},{v:.1f}  confidence {m['confidence']:.2f}")
    if result["mirrored"] > 0.5:
        print(f"{trg.path} faces the other way than {src.path} (probability {result['mirrored']:.2f})")
    drawn = [m for m in result["matches"] if args.points or m["confidence"] >= args.threshold]
    ends = (torch.tensor([m[end] for m in drawn]).view(-1, 2) for end in ("source", "target"))
    widest = max(side.image.width / side.image.height for side in (src, trg))
    height = max(1, min(360, round(PAGE / 2 / widest)))  # panoramas are shown smaller
    write_whole(args.out, draw_matches(src.image, trg.image, *ends, height=height))
    below = len(result["matches"]) - len(drawn)
    left = f", {below} below {args.threshold:g} left out" if below else ""
    sure = [m["confidence"] for m in drawn]
    span = f", confidence {min(sure):.2f} to {max(sure):.2f}" if sure else ""
    print(f"{len(drawn)} {'match' if len(drawn) == 1 else 'matches'} drawn in {args.out}{span}{left}")
    if args.warp:
        write_whole(args.warp, warp(src, trg, found.reading))
        print(f"{args.warp}: {trg.path} in the frame of {src.path}")
    if args.json:
        write_whole(args.json, as_csv(result) if args.json.endswith(".csv") else json.dumps(result, indent=1))
        print(f"all of them, {len(result['matches'])}, in {args.json}")


# ------------------------------------------------------------------------------------------------------------
# Many pairs


def read_pairs(path: str) -> list[tuple[str, str]]:
    """Two columns of names, relative to the file, with or without a header; more columns are left alone."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read --pairs {path}: {error}") from None
    if rows and not any(Path(cell).suffix for cell in rows[0][:2]):
        rows = rows[1:]  # a header
    if wrong := [row for row in rows if len(row) < 2 or not all(row[:2])]:
        raise ValueError(f"{path}: {','.join(wrong[0])!r} is not source,target")
    if not rows:
        raise ValueError(f"{path}: no pairs in it")
    return [(row[0], row[1]) for row in rows]


def finished_pairs(path: str, settings: dict) -> set[tuple[str, str]]:
    """The pairs whose lines a stopped run has left; a line that it could not finish is cut off. ValueError if
    they were made with other settings."""
    kept, done, start = [], set(), '{"source": '
    lines = Path(path).read_bytes().decode(errors="replace").splitlines() if Path(path).exists() else []
    for k, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            done.add((found["source"], found["target"]))
            other = found["settings"] != settings
        except (ValueError, KeyError, TypeError):
            if k < len(lines) or line[: len(start)] != start[: len(line)]:
                raise ValueError(f"--json {path} holds something else: give another file") from None
            break
        if other:
            raise ValueError(f"--json {path} holds pairs matched with other settings: give another file")
        kept.append(line + "\n")
    write_whole(path, "".join(kept))
    return done


def match_many(args: argparse.Namespace, matcher, method: str, settings: dict) -> None:
    """A JSON line a pair; the backbone runs once a picture, of which HELD are kept."""
    pairs, folder = read_pairs(args.pairs), Path(args.pairs).parent
    done, sides, skipped = finished_pairs(args.json, settings), OrderedDict(), []
    left = [pair for pair in dict.fromkeys(pairs) if pair not in done]

    def side(name: str) -> Side:
        sides[name] = sides.pop(name, None) or open_side(matcher, str(folder / name))._replace(path=name)
        while len(sides) > HELD:
            sides.popitem(last=False)
        return sides[name]

    with open(args.json, "a") as file, stop_signals() as stop:
        for names in progress(left, desc="pairs"):
            try:
                src, trg = map(side, names)
            except ValueError as error:
                skipped.append(str(error))
                continue
            found = find_matches(matcher, method, src, trg, None, args.count)
            file.write(json.dumps(record(src, trg, found, settings)) + "\n")
            file.flush()
            if stop:
                print("stopped; the same command goes on", file=sys.stderr)
                sys.exit(128 + stop[0])
    if len(skipped) == len(left) and not done:
        raise ValueError(f"none of {len(left)} pairs could be matched; the first: {skipped[0]}")
    before = f", {len(done)} of them before" if done else ""
    print(f"{len(done) + len(left) - len(skipped)} pairs in {args.json}{before}")
    if skipped:
        reasons = "; ".join(list(dict.fromkeys(skipped))[:5])
        print(f"{len(skipped)} pairs passed over: {reasons}", file=sys.stderr)


def main(argv: list[str], load: Callable) -> None:
    """load: evaluate.load_methods, handed in, since nothing in this folder knows of training."""
    with command():
        args = read_options(argv)
        matcher, methods = load(args)
        if args.checkpoint:
            print(f"pixel stage of {args.checkpoint}, by our reading")
        settings = {key: getattr(matcher.cfg, key) for key in ("backbone", "layer", "size")}
        settings |= {key: getattr(args, key) for key in ("checkpoint", "dense", "count", "saliency")}
        settings |= {"reading": methods[-1], "weights": args.weights and Path(args.weights).name}
        settings["stage"] = args.checkpoint and digest(Path(args.checkpoint).read_bytes())
        (match_many if args.pairs else match_two)(args, matcher, methods[-1], settings)
