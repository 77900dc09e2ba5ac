"""Stage 3, pixel-level matching: the pseudo-label generator (paper, section 3.2).

Whole images -> a third MVAM -> volume, trained by binary cross-entropy (after MMNet) on the 16 pairs of the region
stage, in both directions. At inference it is the matcher: it transfers keypoints and generates pairs.

    python pixel_stage.py                                                     # trains this stage alone
    python pixel_stage.py a.jpg b.jpg --checkpoint F --out m.png              # matches two pictures and draws it
    python pixel_stage.py a.jpg b.jpg --checkpoint F --points 40,52 118.5,60  # transfers points (pixels of a.jpg)

The pictures come first; `python pixel_stage.py a.jpg b.jpg --help` explains the options of matching, `--help` alone
those of training.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import (
    MVAM,
    Features,
    MatchConfig,
    Pairs,
    cells_to_xy,
    gaussian_smooth,
    pair_nms,
    select_pairs,
    transfer_keypoints,
)


@dataclass
class PixelConfig(MatchConfig):
    """Settings of the pixel stage."""

    temperature: float = 0.05  # of the softmax over similarities that the loss sees; MMNet: none (1)
    consensus: int = 0  # side of the neighbourhood, in cells, whose matches have to agree; 0: none; ours
    frozen_share: float = 0.0  # of the frozen features in those that a trained stage matches with (WiSE-FT); ours


def soft_target(points: Tensor, height: int, width: int) -> Tensor:
    """Heat map of a point (MMNet): its four surrounding cells weighted by inverse distance, then a 3x3 Gaussian.

    Weights 1 / max(distance, 1e-5), normalised to 1; what the Gaussian spreads beyond the border is lost.
    points (..., 2) as (x, y) in cells, inside the grid; returns (..., H, W).
    """
    x, y = points[..., 0, None, None], points[..., 1, None, None]
    xs, ys = torch.arange(width, device=points.device), torch.arange(height, device=points.device)[:, None]
    around = ((xs - x).abs() < 1) & ((ys - y).abs() < 1)
    weight = around / ((xs - x) ** 2 + (ys - y) ** 2).sqrt().clamp(min=1e-5)
    weight = weight / weight.sum((-2, -1), keepdim=True)
    return gaussian_smooth(weight, 3)


class PixelStage(nn.Module):
    """MVAM over whole images, cross-entropy on selected pairs, the generator's pairs."""

    def __init__(self, dim: int, cfg: PixelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.mvam = MVAM(dim, cfg, cfg.ffn_ratio, None, cfg.consensus, cfg.frozen_share)

    def forward(self, src: Features, trg: Features) -> Tensor:
        """The volume of B image pairs, (B, Hs, Ws, Ht, Wt)."""
        return self.mvam(src, trg)

    def loss(self, corr: Tensor, pairs: Pairs) -> Tensor:
        """Binary cross-entropy between the softmaxed similarities of a point and its partner's heat map, both ways.

        Summed over cells, mean over the real pairs of the batch and the two directions; 0 where there are none.
        """
        grid_s, grid_t = corr.shape[1:3], corr.shape[3:]
        flat = corr.flatten(3).flatten(1, 2)  # (B, Ns, Nt)
        total = flat.new_zeros(())
        for volume, query, answer, (h, w) in (
            (flat, pairs.src, pairs.trg, grid_t),
            (flat.transpose(1, 2), pairs.trg, pairs.src, grid_s),
        ):
            rows = volume.gather(1, query[..., None].expand(-1, -1, h * w))  # (B, K, h*w)
            log_p = F.log_softmax(rows / self.cfg.temperature, -1)
            target = soft_target(cells_to_xy(answer, w), h, w).flatten(2)
            # BCE = -t log p - (1 - t) log(1 - p)
            bce = -(target * log_p + (1 - target) * torch.log1p(-log_p.exp().clamp(max=1 - 1e-6)))
            total = total + (bce.sum(-1) * pairs.valid).sum()
        return total / (2 * pairs.valid.sum()).clamp(min=1)

    @torch.no_grad()
    def select(self, corr: Tensor, src: Features, trg: Features, count: int, radius: float) -> Pairs:
        """The generator's pairs: Hough matching, Algorithm 1 inside the foreground, NMS, the best `count`."""
        return pair_nms(select_pairs(corr, src, trg, self.cfg), src.grid[1], trg.grid[1], radius, count)


@torch.no_grad()
def match_files(argv: list[str]) -> None:
    """Match two pictures of one's own: draw the generator's pairs, or transfer given points and print them."""
    import data
    from evaluate import draw_matches
    from train import find_device, load_cascade

    parser = argparse.ArgumentParser(prog="pixel_stage.py", description=match_files.__doc__)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--checkpoint", required=True, help="checkpoint written by train.py")
    parser.add_argument("--weights", help="backbone weights file, where the checkpoint's own path is gone")
    parser.add_argument("--points", nargs="+", metavar="x,y", help="source points in pixels, to transfer to the target")
    parser.add_argument("--count", type=int, default=32, help="pairs to draw (default 32)")
    parser.add_argument("--saliency", nargs=2, metavar="MAP", help="8-bit saliency maps of the two pictures")
    parser.add_argument("--out", default="matches.png", help="picture to write (default matches.png)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    if Path(args.out).suffix.lower() not in data.EXTENSIONS or not Path(args.out).resolve().parent.is_dir():
        parser.error(f"--out {args.out}: give a picture in an existing folder, such as matches.png")
    cascade = load_cascade(args.checkpoint, weights=args.weights, device=find_device(args.device))
    if cascade.pixel is None:
        raise ValueError(f"{args.checkpoint} was trained without a pixel stage (--stages {cascade.cfg.stages})")
    images = [data.open_image(path, upright=True) for path in (args.source, args.target)]
    points = data.parse_points(args.points, images[0].size) if args.points else None
    maps = args.saliency or (None, None)
    sides = []
    for image, path in zip(images, maps):
        sal = data.open_saliency(path) if path else None
        tensor, cells = data.prepare(image, sal, cascade.cfg.size, cascade.backbone.patch)
        sides.append(cascade.features(tensor[None], None if cells is None else cells[None]))
    corr = cascade.pixel(*sides)
    grids = [side.grid for side in sides]
    if points is None:
        pairs = cascade.pixel.select(corr, *sides, args.count, radius=2.0)
        source_cells = cells_to_xy(pairs.src, grids[0][1])[pairs.valid][None]
        if not source_cells.shape[1]:
            sys.exit("no pairs: one of the pictures has no foreground; give --saliency maps or --points")
        target_cells = cells_to_xy(pairs.trg, grids[1][1])[pairs.valid][None]
    else:
        source_cells = data.pixels_to_cells(points, images[0].size, grids[0])[None].to(corr)
        target_cells = transfer_keypoints(corr, source_cells)
    src_kps = data.cells_to_pixels(source_cells[0].cpu(), images[0].size, grids[0])
    trg_kps = data.cells_to_pixels(target_cells[0].cpu(), images[1].size, grids[1])
    if points is not None:
        for (x, y), (u, v) in zip(src_kps.tolist(), trg_kps.tolist()):
            print(f"{x:.1f},{y:.1f} -> {u:.1f},{v:.1f}")
    draw_matches(*images, src_kps, trg_kps).save(args.out)
    print(f"{len(src_kps)} matches drawn in {args.out}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        try:
            match_files(sys.argv[1:])
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    else:
        from train import main

        main(only="pixel")
