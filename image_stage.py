"""Stage 1, image-level matching (paper, section 3.2).

A couple, two images of one class -> MVAM -> volume, trained by the multiple-instance loss (Eq. 2) against
couples of two different classes. Hough matching and Algorithm 1 inside the foreground find suspected pairs of
cells in it, and around every suspected pair a 5x5 region of features in either image is cut out for stage 2.

    python image_stage.py                                   # trains this stage alone, on the built-in shapes
    python image_stage.py --root DIR ...                    # every option of train.py
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modules import MVAM, Features, Pairs, best_pairs, cells_to_xy, multiple_instance_loss, select_pairs

REGION = 5  # cells a side; paper: 5x5 windows


class Regions(NamedTuple):
    """The r x r cells around both ends of K suspected pairs of each of B couples."""

    src: Features  # B * K regions: feat (B*K, r*r, C), token (B*K, C), saliency (B*K, r, r)
    trg: Features
    origin_s: Tensor  # (B, K, 2): (x, y) of a region's first cell in the source image's grid
    origin_t: Tensor
    valid: Tensor  # (B, K) bool: False for regions that only fill up the batch


def region_cells(origin: Tensor, width: int, size: int = REGION) -> Tensor:
    """Flat indices (B, K, size*size) of the cells of regions that begin at (x, y), in a grid of `width`."""
    step = torch.arange(size, device=origin.device)
    x, y = origin[..., 0, None, None], origin[..., 1, None, None]
    return ((y + step[:, None]) * width + x + step).flatten(2)


def crop_regions(image: Features, centre: Tensor, size: int = REGION) -> tuple[Features, Tensor]:
    """size x size cells around each `centre`, shifted inward at the border so that every region is whole.

    centre (B, K): flat cell indices. A region's global token T is the mean of its own cells (it has no class
    token of its own). Returns regions as Features of batch B*K and their first cells (B, K, 2) as (x, y).
    """
    h, w = image.grid
    x0 = (centre % w - size // 2).clamp(0, w - size)
    y0 = (centre // w - size // 2).clamp(0, h - size)
    origin = torch.stack([x0, y0], -1)
    index = region_cells(origin, w, size).flatten(1)  # (B, K*r*r)
    feat = image.feat.gather(1, index[..., None].expand(-1, -1, image.feat.shape[-1]))
    feat = feat.unflatten(1, (-1, size * size)).flatten(0, 1)  # (B*K, r*r, C)
    saliency = image.saliency.flatten(1).gather(1, index).view(-1, size, size)
    return Features(feat, feat.mean(1), saliency), origin


def closes_loop(corr: Tensor, pairs: Pairs, radius: float) -> Tensor:
    """Ours, not section 3.4's loop: which pairs the volume itself, without Hough matching, confirms both
    ways: the source's best match lies within `radius` cells of the pair's target, and the target's within
    `radius` of its source.

    corr (B, Hs, Ws, Ht, Wt); returns (B, K) bool.
    """
    flat = corr.detach().flatten(3).flatten(1, 2)  # (B, Ns, Nt)
    closed = torch.ones_like(pairs.valid)
    for best, query, answer, width in (
        (flat.argmax(2), pairs.src, pairs.trg, corr.shape[4]),
        (flat.argmax(1), pairs.trg, pairs.src, corr.shape[2]),
    ):
        found = cells_to_xy(best.gather(1, query), width)
        closed &= (found - cells_to_xy(answer, width)).norm(dim=-1) <= radius
    return closed


class ImageStage(nn.Module):
    """MVAM over whole images, Eq. (2), suspected pairs and their regions. cfg: train.Config."""

    def __init__(self, dim: int, cfg) -> None:
        super().__init__()
        self.cfg = cfg
        self.mvam = MVAM(dim, cfg.residual, cfg.ffn_ratio if cfg.mil_ffn else 0, cfg.volume_window,
                         amp=cfg.amp)

    def forward(self, src: Features, trg: Features) -> Tensor:
        """The volume of B couples, (B, Hs, Ws, Ht, Wt)."""
        return self.mvam(src, trg)

    def loss(self, src: Features, trg: Features, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The volume of B couples, as above, and Eq. (2) over the batch; labels (B,): classes."""
        all_valid = torch.ones_like(labels, dtype=torch.bool)[:, None]
        return multiple_instance_loss(self.mvam, src, trg, labels, all_valid, self.cfg)

    @torch.no_grad()
    def select(self, corr: Tensor, src: Features, trg: Features) -> Pairs:
        """Suspected pairs: Hough matching and Algorithm 1 inside the foreground; of those that close their
        loop, the best `candidates`."""
        pairs = select_pairs(corr, src, trg, self.cfg)
        kept = pairs.valid
        if self.cfg.loop_radius:
            kept = kept & closes_loop(corr, pairs, self.cfg.loop_radius)
        return best_pairs(pairs, kept, self.cfg.candidates)

    @torch.no_grad()
    def regions(self, pairs: Pairs, src: Features, trg: Features) -> Regions:
        """The 5x5 regions of features around every suspected pair."""
        src_regions, origin_s = crop_regions(src, pairs.src)
        trg_regions, origin_t = crop_regions(trg, pairs.trg)
        return Regions(src_regions, trg_regions, origin_s, origin_t, pairs.valid)


if __name__ == "__main__":
    from train import main

    main(only="image", description=__doc__)
