"""Ours, not the paper's, inside MVAM: the local feed-forward and the consensus of neighbours."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LocalFeedForward(nn.Module):
    """The feed-forward half of a transformer block with local context: two 3x3 convolutions over the cells.

    x + conv(GELU(conv(x))), the second convolution zero at first, so that the block starts as an identity.
    The border is repeated, since zeros around the grid would tell a cell where it lies. The class token
    passes unchanged.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1, padding_mode="replicate")
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1, padding_mode="replicate")
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, 1 + H*W, C), class token first; same shape out."""
        cells = x[:, 1:].transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        y = self.conv2(F.gelu(self.conv1(cells))).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1], x[:, 1:] + y], dim=1)


def gaussian(side: int, deviation: float, like: Tensor) -> Tensor:
    """Weights of a Gaussian over an odd side, sum 1, with the type and device of another tensor: (side,)."""
    offset = torch.arange(side, device=like.device, dtype=like.dtype) - side // 2
    weights = torch.exp(-0.5 * (offset / deviation) ** 2)
    return weights / weights.sum()


def neighbourhood_consensus(corr: Tensor, side: int) -> Tensor:
    """A match is as good as its neighbours that move alike: C[i, j] = sum_d g(d) corr[i + d, j + d].

    The one 4D convolution whose kernel lies on the diagonal, fixed; what NC-Net's learn, and VAT's in front
    of its windows, starts here. d runs over side x side cells (odd), g is a Gaussian that ends at three
    standard deviations, sum 1; zeros outside. corr (B, Hs, Ws, Ht, Wt), same shape out; two passes of `side`
    shifted sums.
    """
    weights = gaussian(side, side / 6, corr)
    for src_axis in (1, 2):  # y, then x; the target's axis is two further
        sides = corr.shape
        pad = [side // 2 if axis in (src_axis, src_axis + 2) else 0 for axis in (4, 3, 2, 1) for _ in (0, 1)]
        padded = F.pad(corr, pad)
        corr = sum(
            weight * padded.narrow(src_axis, k, sides[src_axis]).narrow(src_axis + 2, k, sides[src_axis + 2])
            for k, weight in enumerate(weights)
        )
    return corr


# ------------------------------------------------------------------------------------------------------------
# Our reading of a volume: which way the target faces, and one affine map a couple

FACING_TEMPERATURE = 0.05  # of the soft maximum in match_score
FACING_MARGIN, FACING_SLOPE = 0.03, 0.01  # of match scores: symmetric objects have no facing to be found
FOREGROUND = 0.5  # of a saliency map, or of the class token's attention: cells that vote
AFFINE_INLIER = 2.5  # cells
AFFINE_SPREAD = 4.0  # cells; standard deviation of the Gaussian around where the map sends a cell


def cell_grid(height: int, width: int, like: Tensor) -> Tensor:
    """(x, y) of the cells of a grid, row by row: (height * width, 2)."""
    y, x = torch.meshgrid(*(torch.arange(n, device=like.device) for n in (height, width)), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1).float()


def match_score(corr: Tensor, mask_s: Tensor, mask_t: Tensor) -> Tensor:
    """How well two images match: the soft maximum of every foreground cell's row over the other foreground,
    mean over cells, both ways summed. corr (B, Hs, Ws, Ht, Wt), masks (B, H, W) bool; returns (B,)."""
    mask_s, mask_t = mask_s.flatten(1), mask_t.flatten(1)
    inside = mask_s[:, :, None] & mask_t[:, None]
    flat = (corr.flatten(3).flatten(1, 2) / FACING_TEMPERATURE).masked_fill(~inside, -1e4)
    total = 0.0
    for dim, mask in ((2, mask_s), (1, mask_t)):
        best = torch.logsumexp(flat, dim) * mask
        total = total + FACING_TEMPERATURE * best.sum(1) / mask.sum(1).clamp(min=1)
    return total


def fit_affine(x: Tensor, y: Tensor, weight: Tensor, pull: float = 0.1) -> tuple[Tensor, Tensor]:
    """Weighted least squares y = x A + c, pulled towards a similarity: A (B, 2, 2), c (B, 2).

    x, y (B, N, 2), weight (B, N). The pull is a ridge on A - S, S the similarity that fits best, of `pull`
    times the variance of x: three points in a row have a map too.
    """
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
    mean_x, mean_y = ((weight[..., None] * z).sum(1, keepdim=True) for z in (x, y))
    xc, yc = x - mean_x, y - mean_y
    xx, xy = (weight[..., None] * xc).mT @ xc, (weight[..., None] * xc).mT @ yc  # (B, 2, 2)
    spread = (xx[:, 0, 0] + xx[:, 1, 1]).clamp(min=1e-6)
    a, b = (xy[:, 0, 0] + xy[:, 1, 1]) / spread, (xy[:, 0, 1] - xy[:, 1, 0]) / spread
    similarity = torch.stack([a, b, -b, a], -1).view(-1, 2, 2)
    ridge = (pull * spread / 2)[:, None, None]
    eye = torch.eye(2, device=x.device)
    linear = torch.linalg.solve(xx + (ridge + 1e-6) * eye, xy + ridge * similarity)
    return linear, (mean_y - mean_x @ linear)[:, 0]


def is_usable(linear: Tensor) -> Tensor:
    """Which maps (R, 2, 2) neither mirror nor stretch or shrink any direction by more than three or four."""
    det, total = torch.linalg.det(linear), linear.square().sum((1, 2))  # s1 s2 and s1^2 + s2^2
    largest = ((total + (total**2 - 4 * det**2).clamp(min=0).sqrt()) / 2).sqrt()
    return (largest < 3) & (det > largest / 4)


@torch.no_grad()
def affine_voting(corr: Tensor, mask_s: Tensor, mask_t: Tensor,
                  hypotheses: int = 256) -> tuple[Tensor, Tensor]:
    """Hough matching that also knows scale, aspect and shear: RANSAC for the one affine map of a couple.

    Foreground cells vote with their best match, by score^3 and by how nearly it closes s -> t -> s. Each of
    `hypotheses` maps goes through three matches, drawn by weight (the same random numbers for all couples);
    the one with the most weight within AFFINE_INLIER cells is refitted three times on its inliers. Maps that
    mirror, or that stretch or shrink any direction by more than three or four, are none.

    corr (B, Hs, Ws, Ht, Wt); masks (B, H, W) bool. Returns where the map sends every source cell,
    (B, Hs*Ws, 2) as (x, y) in target cells, and the share (B,) of the votes that it explains.
    """
    (hs, ws, ht, wt), (mask_s, mask_t) = corr.shape[1:], (mask_s.flatten(1), mask_t.flatten(1))
    flat, x, places = corr.float().clamp(min=0).flatten(3).flatten(1, 2), *(
        cell_grid(h, w, corr) for h, w in ((hs, ws), (ht, wt)))
    best, match = (flat * mask_t[:, None]).max(2)
    back = (flat * mask_s[:, :, None]).argmax(1).gather(1, match)
    off = (x[back] - x).norm(dim=-1)
    weight = best**3 * torch.exp(-0.5 * (off / 1.5) ** 2) * mask_s + 1e-12
    x, y = x.expand(len(corr), -1, -1), places[match]

    draws = torch.rand(3 * hypotheses, generator=torch.Generator().manual_seed(0)).to(corr.device)
    share = weight.cumsum(1) / weight.sum(1, keepdim=True)
    pick = torch.searchsorted(share, draws.expand(len(corr), -1).contiguous()).clamp(max=hs * ws - 1)
    three_x, three_y = (z.gather(1, pick[..., None].expand(-1, -1, 2)).view(-1, 3, 2) for z in (x, y))
    linear, offset = fit_affine(three_x, three_y, torch.ones_like(three_x[..., 0]))
    usable = is_usable(linear)
    linear, offset = linear.view(len(corr), -1, 2, 2), offset.view(len(corr), -1, 1, 2)
    inlier = (x[:, None] @ linear + offset - y[:, None]).norm(dim=-1) < AFFINE_INLIER  # (B, R, Ns)
    votes = (inlier * weight[:, None]).sum(2).masked_fill(~usable.view(len(corr), -1), -1)

    each, winner = torch.arange(len(corr), device=corr.device), votes.argmax(1)
    linear, offset = linear[each, winner], offset[each, winner, 0]
    for _ in range(3):
        inlier = (x @ linear + offset[:, None] - y).norm(dim=-1) < AFFINE_INLIER
        new, moved = fit_affine(x, y, weight * inlier)
        kept = is_usable(new)
        linear = torch.where(kept[:, None, None], new, linear)
        offset = torch.where(kept[:, None], moved, offset)
    where = x @ linear + offset[:, None]
    inlier = (where - y).norm(dim=-1) < AFFINE_INLIER
    return where, is_usable(linear) * (weight * inlier).sum(1) / weight.sum(1)


def affine_reading(near: Tensor, wide: Tensor, mask_s: Tensor, mask_t: Tensor) -> Tensor:
    """A volume read by the couple's affine map, as far as that explains it: (1 - g) near + g wide Gaussian.

    near, wide (B, Hs, Ws, Ht, Wt): the consensus of few and of many neighbours; the Gaussian of AFFINE_SPREAD
    cells lies around where the map of `near` sends a cell; g: the votes for the map less those against it, at
    least 0. What bends, or faces another way, is read by its nearest neighbours alone. Same shape out.
    """
    where, share = affine_voting(near, mask_s, mask_t)
    off = where[:, :, None] - cell_grid(*near.shape[3:], near)  # (B, Ns, Nt, 2)
    around = torch.exp(-0.5 * off.square().sum(-1) / AFFINE_SPREAD**2).view_as(near)
    gate = (2 * share - 1).clamp(min=0)[:, None, None, None, None]
    return (1 - gate) * near.clamp(min=0) + gate * wide.clamp(min=0) * around


def both_faces(matcher, images: Tensor, saliency: Tensor | None = None):
    """Features of images (B, 3, H, W) with those of their mirror images beside them; the backbone runs twice.
    saliency (B, h, w) or None."""
    saliency = saliency if saliency is None else torch.cat([saliency, saliency.flip(-1)])
    several, count = matcher.features(torch.cat([images, images.flip(-1)]), saliency), len(images)
    return several.map(lambda x: x[:count])._replace(mirror=several.map(lambda x: x[count:]))


def plain_and_mirrored(volume: Callable, src, trg) -> tuple[Tensor, Tensor]:
    """Volumes of sources with targets and with their mirror images, the latter in the mirror image's cells.

    volume(src, trg) (B, Hs, Ws, Ht, Wt). Each is the mean of two that should be alike: both images as they
    are, and both mirrored.
    """
    plain = volume(src, trg) + volume(src.mirror, trg.mirror).flip(2, 4)
    mirrored = volume(src, trg.mirror) + volume(src.mirror, trg).flip(2, 4)
    return plain / 2, mirrored / 2


def facing_score(plain: Tensor, mirrored: Tensor, mask_s: Tensor, mask_t: Tensor) -> Tensor:
    """By how much the mirror image of the target matches better than the target, less FACING_MARGIN: (B,),
    positive where they face opposite ways. Volumes as of plain_and_mirrored, of the consensus of neighbours;
    masks (B, H, W) bool, mask_t of the target as it is."""
    better = match_score(mirrored, mask_s, mask_t.flip(-1)) - match_score(plain, mask_s, mask_t)
    return better - FACING_MARGIN


@torch.no_grad()
def face_the_source(volume: Callable, src, trg) -> tuple:
    """The targets (Features with their mirror images'), each by itself or mirrored, as it faces its source's
    way; and (B,) bool: mirrored. volume(src, trg): of frozen features."""
    near = [neighbourhood_consensus(corr, 3) for corr in plain_and_mirrored(volume, src, trg)]
    away = facing_score(*near, src.saliency >= FOREGROUND, trg.saliency >= FOREGROUND) > 0

    def choose(x: Tensor, mirrored: Tensor) -> Tensor:
        return torch.where(away.view(-1, *[1] * (x.dim() - 1)), mirrored, x)

    return trg._replace(mirror=None).map(choose, trg.mirror), away


def faces_other_way(scores: Tensor) -> Tensor:
    """Which pairs of K images face opposite ways (K, K) bool, by agreement of all: opposite signs in the
    leading eigenvector of minus their scores, (K, K), symmetric, those of facing_score."""
    right = torch.linalg.eigh(-scores.double())[1][:, -1] > 0
    return right[:, None] != right


class Reading(NamedTuple):
    """A couple's volumes in our reading, (B, Hs, Ws, Ht, Wt) in the target's own cells, and what it found."""

    volume: Tensor  # the reading itself
    near: Tensor  # the consensus of 3x3 neighbours, without the affine map
    away: Tensor  # (B,) the probability that the target faces the other way


@torch.no_grad()
def best_reading(volume: Callable, src, trg, smooth: bool) -> Reading:
    """Our reading of a volume: with the target as it is and with its mirror image, each read by the couple's
    affine map, mixed by the probability that the target faces the other way.

    volume(src, trg): the volume of features that have their mirror images'. smooth: it holds no consensus of
    neighbours yet.
    """
    mask_s, mask_t = (x.saliency >= FOREGROUND for x in (src, trg))
    near, wide = [], []
    for corr in plain_and_mirrored(volume, src, trg):
        near.append(neighbourhood_consensus(corr, 3) if smooth else corr)
        wide.append(neighbourhood_consensus(corr, 5 if smooth else 3))
    away = torch.sigmoid(facing_score(*near, mask_s, mask_t) / FACING_SLOPE)
    plain = affine_reading(near[0], wide[0], mask_s, mask_t)
    mirrored = affine_reading(near[1], wide[1], mask_s, mask_t.flip(-1))
    share = away[:, None, None, None, None]
    mixed = ((1 - share) * x + share * y.flip(4) for x, y in ((plain, mirrored), near))
    return Reading(*mixed, away)
