"""Match two pictures of one's own: `python pixel_stage.py SOURCE TARGET --checkpoint FILE`."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import data
from modules import Features, cells_to_xy, transfer_keypoints
from support.files import write_whole
from support.pictures import draw_matches
from support.run import command, find_device


def parse_points(texts: list[str], size: tuple[int, int]) -> Tensor:
    """["40,52", ...] to (n, 2) pixels; ValueError names a malformed point or one outside the (W, H) image."""
    points = []
    for text in texts:
        try:
            x, y = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"--points {text!r}: write a point as x,y in pixels, such as 40,52.5") from None
        if not (-0.5 <= x <= size[0] - 0.5 and -0.5 <= y <= size[1] - 0.5):
            raise ValueError(f"--points {text}: outside the source image of {size[0]}x{size[1]} px")
        points.append((x, y))
    return torch.tensor(points)


def read_options(argv: list[str]) -> argparse.Namespace:
    """The command line; ValueError, in one line, for what cannot be."""
    what = "Match two pictures of one's own: draw the generator's pairs, or transfer and print given points."
    parser = argparse.ArgumentParser(prog="pixel_stage.py", description=what)
    add = parser.add_argument
    add("source")
    add("target")
    add("--checkpoint", required=True, help="checkpoint written by train.py")
    add("--weights", help="backbone weights file, where the checkpoint's own path is gone")
    add("--points", nargs="+", metavar="x,y", help="source points in pixels, to transfer to the target")
    add("--count", type=int, default=32, help="pairs to draw (default 32)")
    add("--saliency", nargs=2, metavar="MAP", help="8-bit saliency maps of the two pictures")
    add("--out", default="matches.png", help="picture to write (default matches.png)")
    add("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise ValueError(f"--count {args.count}: at least 1")
    if Path(args.out).suffix.lower() not in data.EXTENSIONS or not Path(args.out).resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: give a picture in an existing folder, such as matches.png")
    return args


@torch.no_grad()
def match(args: argparse.Namespace, load: Callable) -> None:
    """Draw the generator's pairs of two pictures, or transfer given points and print them."""
    cascade = load(args.checkpoint, weights=args.weights, device=find_device(args.device))
    if cascade.pixel is None:
        stages = f"--stages {cascade.cfg.stages}"
        raise ValueError(f"{args.checkpoint} was trained without a pixel stage ({stages})")
    files = zip((args.source, args.target), args.saliency or (None, None))
    images, maps = zip(*(data.open_with_map(*pair, cascade.cfg.saliency_rescale) for pair in files))
    points = parse_points(args.points, images[0].size) if args.points else None
    sides: list[Features] = []
    for image, saliency in zip(images, maps):
        tensor, cells = data.prepare(image, saliency, cascade.cfg.size, cascade.backbone.patch)
        sides.append(cascade.features(tensor[None], None if cells is None else cells[None]))
    corr = cascade.pixel(*sides)
    grids = [side.grid for side in sides]
    if points is None:
        pairs = cascade.pixel.select(corr, *sides, args.count, radius=2.0)
        source_cells = cells_to_xy(pairs.src, grids[0][1])[pairs.valid][None]
        if not source_cells.shape[1]:
            raise ValueError("no pairs: a picture has no foreground; give --saliency maps or --points")
        target_cells = cells_to_xy(pairs.trg, grids[1][1])[pairs.valid][None]
    else:
        source_cells = data.pixels_to_cells(points, images[0].size, grids[0])[None].to(corr)
        target_cells = transfer_keypoints(corr, source_cells)
    src_kps = data.cells_to_pixels(source_cells[0].cpu(), images[0].size, grids[0])
    trg_kps = data.cells_to_pixels(target_cells[0].cpu(), images[1].size, grids[1])
    if points is not None:
        for (x, y), (u, v) in zip(src_kps.tolist(), trg_kps.tolist()):
            print(f"{x:.1f},{y:.1f} -> {u:.1f},{v:.1f}")
    write_whole(args.out, draw_matches(*images, src_kps, trg_kps))
    print(f"{len(src_kps)} matches drawn in {args.out}")


def main(argv: list[str], load: Callable) -> None:
    """load: train.load_cascade, handed in, since nothing in this folder knows of training."""
    with command():
        match(read_options(argv), load)
