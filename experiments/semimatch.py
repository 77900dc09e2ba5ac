"""SemiMatch (Kim et al., CVPR 2022) as pure functions, to be read beside its supplement's Algorithm 1.

    Algorithm 1                                     here
    compute_syn_theta                               draw_warp
    photometric_strong(I_T, GTkeypoints)            views.py:photometric, key_out
    geometric_warp(image, theta), of volumes too    warp (affine_field, then tps_field)
    get_bbox_mask                                   box_mask
    forward_backward_check                          forward_backward_mask
    uncertainty, mask_thres                         uncertainty, pseudo_labels
    soft_argmax, geometric_warp(map, theta)         pseudo_labels: warps the volume, takes its best cell
    contrastive_loss, dynamic_lambda                contrastive_loss, dynamic_weight

A volume is (B, Ns, Nt), source first; a cell's flat index is y * W + x, a grid is (h, w). Where pseudo-code
and code released with the paper differ, this follows the code: it warps the volume and labels by its maximum,
and weights the loss by exp(-T_u H) instead of scaling the mask. All is float32, whatever the volume's type.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modules import cells_to_xy


@dataclass
class SemiConfig:
    """The supplement's Table 1, and its Tables 2 to 4 as switches."""

    # group: SemiMatch
    semi: bool = False  # SemiMatch's unsupervised loss beside that on keypoints
    semi_threshold: float = 0.5  # tau: least probability of a pseudo-label; SemiMatch: 0.5 (Table 3 III: 0.9)
    semi_uncertainty: float = 1.5  # T_u: a label's weight is exp(-T_u entropy); SemiMatch: 1.5 (0: none)
    semi_dynamic: bool = True  # lambda = sup / unsup: both losses equally large (Table 2 b III: no)
    semi_blur: bool = True  # the strong view is blurred (Table 4: no)
    semi_keyout: float = 0.2  # chance that the strong view lacks a keypoint; SemiMatch: 0.2 (Table 4: 0)

    # group: no option
    semi_temperature: float = 0.1  # of the softmax behind a pseudo-label's probability; released trainer: 0.1
    semi_gamma: float = 0.1  # temperature of the contrastive loss; SemiMatch: 0.1
    semi_weight: float = 0.5  # lambda where it is not dynamic; released trainer: 0.5
    semi_photometric: float = 0.2  # chance of every colour change of each view; SemiMatch: 0.2
    semi_tps: float = 0.4  # largest offset of the spline's points, in half image sides; SemiMatch: 0.4


# ------------------------------------------------------------------------------------------------------------
# The strong view


def key_out(image: Tensor, kps: Tensor, box: tuple[float, ...], p: float, rng: np.random.Generator) -> Tensor:
    """KeyOut (released trainer; the pseudo-code hides it): squares round keypoints become the mean colour, 0.

    Each keypoint with probability p. A square's side k is drawn from floor(0.03 M) to floor(0.1 M) - 1
    pixels, M the box's longer side; no such number: no square. It covers columns round(x) - k // 2 to
    round(x) - k // 2 + k - 1, rows alike, as far as they lie in the image.
    image (3, H, W) normalised; kps (n, 2) and box (x0, y0, x1, y1) in its pixels. Returns a new image.
    """
    image, longer = image.clone(), max(box[2] - box[0], box[3] - box[1])
    low, high = math.floor(0.03 * longer), math.floor(0.1 * longer)
    for x, y in kps.round().long().tolist():
        if rng.random() < p and low < high:
            side = int(rng.integers(low, high))
            top, left = y - side // 2, x - side // 2
            image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    return image


def draw_warp(rng: np.random.Generator, tps_scale: float) -> tuple[Tensor, Tensor]:
    """compute_syn_theta: an affine map (2, 3) and offsets (9, 2) of a thin-plate spline's 3x3 control points.

    A = R(rotation) R(shear)^T diag(l1, l2) R(shear), uniform (released trainer): rotation to 15 degrees
    either way, shear to 30, l from 0.75 to 1.25, translation to 0.25, offsets to tps_scale. Coordinates run
    from -1 to 1.
    """

    def turn(angle: float) -> np.ndarray:
        c, s = math.cos(angle), math.sin(angle)
        return np.array([[c, -s], [s, c]])

    rotation, shear = (turn(math.radians(rng.uniform(-limit, limit))) for limit in (15, 30))
    matrix = rotation @ shear.T @ np.diag(rng.uniform(0.75, 1.25, 2)) @ shear
    affine = np.concatenate([matrix, rng.uniform(-0.25, 0.25, (2, 1))], 1)
    return torch.tensor(affine).float(), torch.tensor(rng.uniform(-tps_scale, tps_scale, (9, 2))).float()


def plane(h: int, w: int, like: Tensor) -> Tensor:
    """Centres of h x w pixels as (x, y) from -1 to 1 at the outer edges (align_corners=False): (h * w, 2)."""
    index = torch.arange(h * w, device=like.device)
    return (cells_to_xy(index, w) + 0.5) * (2 / torch.tensor([w, h], device=like.device)) - 1


def affine_field(affine: Tensor, h: int, w: int) -> Tensor:
    """Where an output pixel is read: A (x, y) + t from -1 to 1. affine (B, 2, 3); returns (B, h, w, 2)."""
    # Not a matmul: autocast would round it to bfloat16, half a pixel of an image.
    points = (plane(h, w, affine)[:, None] * affine[:, None, :, :2]).sum(-1) + affine[:, None, :, 2]
    return points.unflatten(1, (h, w))


def tps_field(offsets: Tensor, h: int, w: int) -> Tensor:
    """Where an output pixel is read under the thin-plate spline that sends the points c_k to c_k + offset_k.

    f(p) = a_0 + a_x x + a_y y + sum_k w_k U(|p - c_k|), U(r) = r^2 log r^2, sum w, w c_x and w c_y = 0;
    the c_k are the points of {-1, 0, 1}^2, row by row. offsets (B, 9, 2); returns (B, h, w, 2). In float64.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = (a[:, None] - b).square().sum(-1)
        return squared * squared.clamp(min=1e-12).log()

    def linear(points: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(points[:, :1]), points], 1)  # 1, x, y

    control = cells_to_xy(torch.arange(9, device=offsets.device), 3).double() - 1
    side = linear(control)
    system = torch.cat([torch.cat([kernel(control, control), side], 1), F.pad(side.T, (0, 3))])  # (12, 12)
    weights = torch.linalg.solve(system, F.pad(control + offsets.double(), (0, 0, 0, 3)))  # (B, 12, 2)
    points = plane(h, w, offsets).double()
    field = torch.cat([kernel(points, control), linear(points)], 1) @ weights
    return field.unflatten(1, (h, w)).float()


def warp(x: Tensor, affine: Tensor, offsets: Tensor, mode: str = "bilinear") -> tuple[Tensor, Tensor]:
    """geometric_warp: (B, C, H, W) read through the affine map, then through the spline (released trainer).

    mode: "bilinear" or "nearest". Returns what was warped, float32, and (B, H, W) bool: False, and zero in
    the first, where less than 0.9999 of a pixel comes from inside the image.
    """
    x = x.float()
    h, w = x.shape[-2:]
    ones = x.new_ones(len(x), 1, h, w)
    for field in (affine_field(affine.float(), h, w), tps_field(offsets, h, w)):
        x = F.grid_sample(x, field, mode=mode, padding_mode="zeros", align_corners=False)
        ones = F.grid_sample(ones, field, mode="bilinear", padding_mode="zeros", align_corners=False)
    inside = ones[:, 0] >= 0.9999
    return x * inside[:, None], inside


# ------------------------------------------------------------------------------------------------------------
# Pseudo-labels


def uncertainty(corr: Tensor, temperature: float) -> Tensor:
    """Entropy H, in nats, of every target cell's probabilities over source cells, (B, Nt).

    Algorithm 1's, but 1e-6 is added to the probabilities (released trainer). corr (B, Ns, Nt).
    """
    p = (corr.float() / temperature).softmax(1) + 1e-6
    return -(p * p.log()).sum(1)


def forward_backward_mask(corr: Tensor, src_grid: tuple[int, int], trg_grid: tuple[int, int]) -> Tensor:
    """forward_backward_check: target cells whose match leads back: |f + b|^2 <= 0.1 (|f|^2 + |b|^2) + 0.5.

    f: from a target cell to its best source cell; b: from that one to its own best target cell, in cells
    (constants of the released trainer). corr (B, Ns, Nt); returns (B, Nt) bool.
    """
    forward = corr.argmax(1)  # (B, Nt)
    back = corr.argmax(2).gather(1, forward)
    own = torch.arange(corr.shape[2], device=corr.device)
    start, end = cells_to_xy(own, trg_grid[1]), cells_to_xy(back, trg_grid[1])
    there = cells_to_xy(forward, src_grid[1])
    f, b = there - start, end - there
    return (f + b).square().sum(-1) <= 0.1 * (f.square().sum(-1) + b.square().sum(-1)) + 0.5


def box_mask(boxes: Tensor, h: int, w: int) -> Tensor:
    """get_bbox_mask: cells inside boxes (x0, y0, x1, y1), rounded, both ends included (released trainer).

    boxes (B, 4) in cells; returns (B, h, w) bool.
    """
    x0, y0, x1, y1 = boxes.round()[..., None, None].unbind(1)  # (B, 1, 1)
    x, y = torch.arange(w, device=boxes.device), torch.arange(h, device=boxes.device)[:, None]
    return (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


class PseudoLabels(NamedTuple):
    """What the strong view should be matched to."""

    label: Tensor  # (B, Nt) long, the source cell of every cell of the warped target
    weight: Tensor  # (B, Nt) exp(-T_u H), H the entropy of the cell's probabilities
    mask: Tensor  # (B, Nt) bool: the labels that count


@torch.no_grad()
def pseudo_labels(
    corr: Tensor, src_grid: tuple[int, int], trg_grid: tuple[int, int], affine: Tensor, offsets: Tensor,
    src_box: Tensor, trg_box: Tensor, cfg: SemiConfig,
) -> PseudoLabels:
    """Labels for the warped target from the weak view's volume (B, Ns, Nt); boxes (B, 4) in cells.

    One counts if it lies in the source's box, has a probability of at least tau, and if the target cell that
    the warp brought to its place lies in the target's box and passed the forward-backward check. This is
    Algorithm 1's mask; to warp the volume before its maximum is taken, and to ask the source's box, is the
    released trainer's.
    """
    warped = warp(corr.unflatten(2, trg_grid), affine, offsets, "nearest")[0].flatten(2)  # (B, Ns, Nt)
    score, label = (warped / cfg.semi_temperature).softmax(1).max(1)
    consistent = forward_backward_mask(corr, src_grid, trg_grid).unflatten(1, trg_grid)
    checks = torch.stack([box_mask(trg_box, *trg_grid), consistent], 1)
    passed, _ = warp(checks.to(corr), affine, offsets, "nearest")  # (B, 2, ht, wt)
    mask = box_mask(src_box, *src_grid).flatten(1).gather(1, label) & (score >= cfg.semi_threshold)
    weight = torch.exp(-cfg.semi_uncertainty * uncertainty(warped, cfg.semi_temperature))
    return PseudoLabels(label, weight, mask & (passed > 0.5).all(1).flatten(1))


# ------------------------------------------------------------------------------------------------------------
# Losses


def contrastive_loss(corr_strong: Tensor, pseudo: PseudoLabels, gamma: float) -> Tensor:
    """Cross-entropy of corr / gamma over source cells, times the labels' weights; mean of labels that count.

    corr_strong (B, Ns, Nt) of the warped strong view. A scalar; 0, with a gradient of 0, if none counts.
    """
    loss = F.cross_entropy(corr_strong.float() / gamma, pseudo.label, reduction="none")
    loss = loss * pseudo.weight.detach()
    return (loss * pseudo.mask).sum() / pseudo.mask.sum().clamp(min=1)


def dynamic_weight(sup: Tensor, unsup: Tensor) -> Tensor:
    """dynamic_lambda = sup / unsup of two scalar losses, without a gradient; 0 where unsup is 0."""
    return torch.where(unsup > 0, sup / unsup, 0.0).detach()
