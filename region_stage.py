"""Stage 2, region-level matching (paper, section 3.2).

The window pairs of the image stage -> a second MVAM -> 5^4 volumes, trained by Eq. (2) at the level of windows. Hough
matching and the foreground pick the one best cell pair of every window pair; mapped back to the image and thinned by
non-maximum suppression, 16 of them supervise the pixel stage.

    python region_stage.py                                  # trains this stage alone; the image stage stays as it is
    python region_stage.py --checkpoint runs/image/last.pt  # ... and comes from a checkpoint
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules import (
    MVAM,
    Features,
    MatchConfig,
    Pairs,
    Regions,
    adaptive_pooling,
    matching_scores,
    mil_loss,
    negatives,
    pair_nms,
    transfer_keypoints,
)


@dataclass
class RegionConfig(MatchConfig):
    """Settings of the region stage."""

    pairs: int = 16  # cell pairs of an image pair that supervise the pixel stage; paper: 16
    nms_radius: float = 1.0  # cells; a pair nearer than this to a better one, at either end, is dropped; not given


class RegionStage(nn.Module):
    """MVAM over window pairs, Eq. (2), one pair per window, back to the image, NMS.

    Takes a config that also holds the image stage's `ap`, `ap_temperature`, `mil_ffn` and `region_size`.
    """

    def __init__(self, dim: int, cfg: RegionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        # One attention window spans the whole 5^4 volume.
        window = -(-cfg.region_size // cfg.volume_patch)
        self.mvam = MVAM(dim, cfg, cfg.ffn_ratio if cfg.mil_ffn else 0, window)

    def forward(self, src: Features, trg: Features) -> Tensor:
        """Volumes of (B*K) window pairs, (B*K, r, r, r, r)."""
        return self.mvam(src, trg)

    def loss(self, corr: Tensor, regions: Regions, labels: Tensor) -> Tensor:
        """Eq. (2) at window level: window k of a source with window k of its target, against window k of the source
        that batch shifting puts in its place.

        corr (B*K, r, r, r, r): volumes of the positives; labels (B,): classes.
        """
        src, trg, valid = regions.src, regions.trg, regions.valid
        cfg, count = self.cfg, valid.shape[1]
        rolled, negative = negatives(src, labels, windows=count)  # windows of image b - 1 beside those of image b
        negative = negative[:, None] & valid & valid.roll(1, 0)
        keep_s, keep_t, keep_r = (x.foreground(cfg.saliency_threshold) for x in (src, trg, rolled))
        ap_pos = adaptive_pooling(corr, keep_s, keep_t, cfg.ap, cfg.ap_temperature)
        ap_neg = adaptive_pooling(self(rolled, trg), keep_r, keep_t, cfg.ap, cfg.ap_temperature)
        return mil_loss(ap_pos, ap_neg, valid.flatten(), negative.flatten())

    @torch.no_grad()
    def select(self, corr: Tensor, regions: Regions, grid_s: tuple[int, int], grid_t: tuple[int, int]) -> Pairs:
        """The best cell pair of every window pair, in cells of the whole images, after NMS: (B, `pairs`).

        corr (B*K, r, r, r, r); grid: (H, W) of the whole images.
        """
        cfg, r = self.cfg, self.cfg.region_size
        keep_s, keep_t = (x.foreground(cfg.saliency_threshold) for x in regions[:2])
        score = matching_scores(corr, keep_s, keep_t, cfg)
        inside = keep_s[:, :, :, None, None] & keep_t[:, None, None]
        score = score.masked_fill(~inside, float("-inf")).flatten(1)  # (B*K, r^4)
        best, index = score.max(1)
        best, index = best.view_as(regions.valid), index.view_as(regions.valid)
        cell_s, cell_t = index // (r * r), index % (r * r)
        flat_s = (regions.origin_s[..., 1] + cell_s // r) * grid_s[1] + regions.origin_s[..., 0] + cell_s % r
        flat_t = (regions.origin_t[..., 1] + cell_t // r) * grid_t[1] + regions.origin_t[..., 0] + cell_t % r
        valid = regions.valid & (best > float("-inf"))
        best = best.masked_fill(~valid, float("-inf"))
        order = best.argsort(descending=True, stable=True)
        pairs = Pairs(*(x.gather(1, order) for x in (flat_s, flat_t, best.masked_fill(~valid, 0), valid)))
        return pair_nms(pairs, grid_s[1], grid_t[1], cfg.nms_radius, cfg.pairs)

    @torch.no_grad()
    def refine(self, corr: Tensor, points: Tensor, regions: Regions) -> Tensor:
        """Source to target without a pixel stage (Table 5, V): points (B, K, 2) as (x, y) in cells of the whole source,
        one in each window pair, to the whole target's cells, read from the window volumes corr (B*K, r, r, r, r).
        """
        moved = transfer_keypoints(corr, (points - regions.origin_s).flatten(0, 1)[:, None])  # (B*K, 1, 2)
        return moved.view_as(points) + regions.origin_t


if __name__ == "__main__":
    from train import main

    main(only="region")
