"""Stage 3, pixel-level matching: the pseudo-label generator (paper, section 3.2); and matching two pictures.

Whole images -> a third MVAM -> volume, trained by binary cross-entropy (after MMNet) on the 16 pairs of the
region stage, in both directions. At inference it transfers keypoints and makes labels.

    python pixel_stage.py                                         # trains this stage alone
    python pixel_stage.py a.jpg b.jpg                             # matches two pictures, nothing trained
    python pixel_stage.py a.jpg b.jpg --checkpoint F --points 40,52 118.5,60    # by the trained stage
    python pixel_stage.py --pairs pairs.csv                       # many pairs, a JSON line each

`python pixel_stage.py a.jpg b.jpg --help` explains the options of matching, `--help` alone those of training.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import MVAM, Features, Pairs, cells_to_xy, gaussian_smooth


def soft_target(points: Tensor, height: int, width: int) -> Tensor:
    """Heat map of a point (MMNet): its four cells weighted by inverse distance, then a 3x3 Gaussian.

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
    """MVAM over whole images, cross-entropy on selected pairs. cfg: train.Config."""

    def __init__(self, dim: int, cfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.mvam = MVAM(dim, cfg.residual, cfg.ffn_ratio, cfg.volume_window, cfg.consensus, cfg.frozen_share,
                         cfg.amp)

    def forward(self, src: Features, trg: Features) -> Tensor:
        """The volume of B couples, (B, Hs, Ws, Ht, Wt)."""
        return self.mvam(src, trg)

    def loss(self, corr: Tensor, pairs: Pairs) -> Tensor:
        """Binary cross-entropy between the softmax p of a point's row of the volume and its partner's heat
        map t, source to target and target to source.

        Summed over cells, mean over the real pairs of the batch and the two directions; 0 where there are
        none.
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


if __name__ == "__main__":
    from support.match import main as match
    from support.match import wants_pictures

    if wants_pictures(sys.argv[1:]):
        from evaluate import load_methods

        match(sys.argv[1:], load_methods)
    else:
        from train import main

        main(only="pixel", description=__doc__)
