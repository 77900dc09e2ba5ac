"""Stage 2, region-level matching (paper, section 3.2).

The pairs of regions that the image stage cut out -> a second MVAM -> 5^4 volumes, trained by Eq. (2) at the
level of regions. Hough matching and the foreground pick the one best cell pair of every region pair; mapped
back to the image and thinned by non-maximum suppression, 16 of them (cfg.pairs) supervise the pixel stage.

    python region_stage.py                                  # this stage alone; the image stage untrained
    python region_stage.py --checkpoint runs/image/last.pt  # the image stage is loaded from a checkpoint
"""

import torch
from torch import Tensor, nn

from image_stage import REGION, ImageStage, Regions, region_cells
from modules import (
    MVAM,
    Features,
    Pairs,
    hough_matching,
    kernel_soft_argmax,
    matching_scores,
    multiple_instance_loss,
    pair_nms,
    read_at,
    transfer_keypoints,
)

# A pair nearer than this to a better one, at either end, is dropped, so that no two share a cell; not given
NMS_RADIUS = 1.0


class RegionStage(nn.Module):
    """MVAM over region pairs, Eq. (2), one cell pair of each, back to the image, NMS. cfg: train.Config."""

    def __init__(self, dim: int, cfg) -> None:
        super().__init__()
        self.cfg = cfg
        # One attention window, in patches of two cells, spans the whole 5^4 volume.
        self.mvam = MVAM(dim, cfg.residual, cfg.ffn_ratio if cfg.mil_ffn else 0, window=(REGION + 1) // 2,
                         amp=cfg.amp)

    def forward(self, src: Features, trg: Features) -> Tensor:
        """Volumes of B*K region pairs, (B*K, r, r, r, r)."""
        return self.mvam(src, trg)

    def loss(self, regions: Regions, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The volumes of B*K region pairs, as above, and Eq. (2) at region level: positive is region k of a
        source with region k of its target, negative region k of the previous couple's source with that
        target. labels (B,): classes."""
        src, trg, valid = regions.src, regions.trg, regions.valid
        return multiple_instance_loss(self.mvam, src, trg, labels, valid, self.cfg)

    @torch.no_grad()
    def select(self, corr: Tensor, regions: Regions, grid_s: tuple[int, int],
               grid_t: tuple[int, int]) -> Pairs:
        """The best cell pair of every region pair, in cells of the whole images, after NMS: (B, `pairs`).

        corr (B*K, r, r, r, r); grid: (H, W) of the whole images.
        """
        r = corr.shape[1]
        mask_s, mask_t = (x.foreground(self.cfg.saliency_threshold) for x in (regions.src, regions.trg))
        score = matching_scores(corr, mask_s, mask_t, self.cfg)
        inside = mask_s[:, :, :, None, None] & mask_t[:, None, None]
        score = score.masked_fill(~inside, float("-inf")).flatten(1)  # (B*K, r^4)
        best, index = (x.view_as(regions.valid) for x in score.max(1))
        cell_s, cell_t = index // (r * r), index % (r * r)
        flat_s = (regions.origin_s[..., 1] + cell_s // r) * grid_s[1] + regions.origin_s[..., 0] + cell_s % r
        flat_t = (regions.origin_t[..., 1] + cell_t // r) * grid_t[1] + regions.origin_t[..., 0] + cell_t % r
        valid = regions.valid & (best > 0)  # a region without any positive score has no pair
        order = best.masked_fill(~valid, float("-inf")).argsort(descending=True, stable=True)
        found = (flat_s, flat_t, best.masked_fill(~valid, 0), valid)
        pairs = Pairs(*(x.gather(1, order) for x in found))
        return pair_nms(pairs, grid_s[1], grid_t[1], NMS_RADIUS, self.cfg.pairs)

    @torch.no_grad()
    def transfer(self, image: ImageStage, src: Features, trg: Features, points: Tensor) -> Tensor:
        """Source to target without a pixel stage (Table 5, V): the image stage's match of points (B, n, 2),
        (x, y) in source cells, refined in the region pair around it, by the product of both stages' scores
        there, each after its Hough matching. Returns (B, n, 2) in target cells."""
        corr = hough_matching(image(src, trg), side=self.cfg.hough_side)
        coarse = transfer_keypoints(corr, points)
        ends = []
        for xy, (h, w) in ((points, src.grid), (coarse, trg.grid)):
            x, y = xy[..., 0].round().long().clamp(0, w - 1), xy[..., 1].round().long().clamp(0, h - 1)
            ends.append(y * w + x)
        all_valid = torch.ones_like(ends[0], dtype=torch.bool)
        regions = image.regions(Pairs(*ends, torch.zeros_like(coarse[..., 0]), all_valid), src, trg)
        inside = (points - regions.origin_s).flatten(0, 1)[:, None]  # (B*n, 1, 2)
        fine = hough_matching(self(regions.src, regions.trg), side=self.cfg.hough_side)
        fine = read_at(fine.flatten(3).permute(0, 3, 1, 2), inside).view(-1, REGION * REGION)
        rows = read_at(corr.flatten(3).permute(0, 3, 1, 2), points)  # (B, n, Ht*Wt), of the image stage
        both = rows.gather(2, region_cells(regions.origin_t, trg.grid[1])).flatten(0, 1) * fine
        return kernel_soft_argmax(both.view(-1, REGION, REGION)).view_as(points) + regions.origin_t


if __name__ == "__main__":
    from train import main

    main(only="region", description=__doc__)
