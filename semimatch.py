"""SemiMatch (Kim et al., CVPR 2022) as pure functions, to be read beside its supplement's Algorithm 1.

    Algorithm 1                                          here
    compute_syn_theta                                    draw_warp
    photometric_strong(I_T, GTkeypoints)                 finetune.py:photometric, key_out
    geometric_warp(image, theta), of a correlation too   warp
    get_bbox_mask                                        box_mask
    forward_backward_check                               forward_backward_mask
    uncertainty, mask_thres                              uncertainty, pseudo_labels
    soft_argmax, geometric_warp(map, theta)              pseudo_labels: the volume is warped, its best source cell taken
    contrastive_loss, dynamic_lambda                     contrastive_loss, dynamic_weight

A volume is (B, Ns, Nt), source first. Where pseudo-code and released code differ, this follows the code: it warps the
volume and labels by its maximum, and weights the loss by exp(-T_u H) instead of scaling the mask.
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

    semi: bool = False  # SemiMatch's loss on unlabelled points beside that on keypoints
    semi_threshold: float = 0.5  # tau: least probability of a pseudo-label; SemiMatch: 0.5
    semi_uncertainty: float = 1.5  # T_u; 0: without (Tables 2 and 3); SemiMatch: 1.5
    semi_temperature: float = 0.1  # of the softmax that a pseudo-label's probability is read from; SemiMatch: 0.1
    semi_gamma: float = 0.1  # temperature of the contrastive loss; SemiMatch: 0.1
    semi_dynamic: bool = True  # scale the loss to that of the keypoints (Table 2: False)
    semi_weight: float = 0.5  # lambda where the scale is not dynamic; SemiMatch: 0.5
    semi_photometric: float = 0.2  # chance of every photometric change of source, weak and strong view; SemiMatch: 0.2
    semi_blur: bool = True  # the strong view is blurred (Table 4: False)
    semi_keyout: float = 0.2  # chance that a keypoint is cut out of the strong view; 0: without (Table 4)
    semi_tps: float = 0.4  # largest offset of the thin-plate spline's control points; SemiMatch: 0.4


# ----------------------------------------------------------------------------------------------------------------------
# The strong view


def key_out(
    image: Tensor, kps: Tensor, box: tuple[float, float, float, float], p: float, rng: np.random.Generator
) -> Tensor:
    """KeyOut: with probability p each, squares round keypoints become the mean colour.

    image (3, H, W) normalised; kps (n, 2) and box (x0, y0, x1, y1) in its pixels. A square's side is a whole number
    from floor(0.03 M) to floor(0.1 M) - 1, M the box's longer side; it covers `side` pixels from round(x) - side // 2.
    Returns a new image.
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
    """A random warp theta: an affine map (2, 3) and the offsets (9, 2) of a thin-plate spline's 3x3 control points.

    A = R(rotation) R(shear)^T diag(l1, l2) R(shear): rotation to 15 degrees, shear to 30, l from 0.75 to 1.25,
    translation to 0.25; coordinates run from -1 to 1.
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
    """Where every output pixel is read: A (x, y) + t. affine (B, 2, 3); returns (B, h, w, 2)."""
    points = plane(h, w, affine) @ affine[:, :, :2].transpose(1, 2) + affine[:, None, :, 2]
    return points.unflatten(1, (h, w))


def tps_field(offsets: Tensor, h: int, w: int) -> Tensor:
    """The thin-plate spline that moves a 3x3 grid of control points by offsets (B, 9, 2); returns (B, h, w, 2).

    f(p) = a_0 + a_x x + a_y y + sum_k w_k U(|p - c_k|), U(r) = r^2 log r^2, with the weights' side conditions.
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
    """Warp (B, C, H, W), affine first, then the spline; mode "bilinear" or "nearest".

    Returns what was warped, zero wherever a pixel was read from outside, and (B, H, W) bool, True inside.
    """
    h, w = x.shape[-2:]
    ones = x.new_ones(len(x), 1, h, w)
    for field in (affine_field(affine, h, w), tps_field(offsets, h, w)):
        x = F.grid_sample(x, field.to(x), mode=mode, padding_mode="zeros", align_corners=False)
        ones = F.grid_sample(ones, field.to(x), mode="bilinear", padding_mode="zeros", align_corners=False)
    inside = ones[:, 0] >= 0.9999
    return x * inside[:, None], inside


# ----------------------------------------------------------------------------------------------------------------------
# Pseudo-labels


def uncertainty(corr: Tensor, temperature: float) -> Tensor:
    """Entropy H of every target cell's matching probabilities, (B, Nt); the released code adds 1e-6 to them."""
    p = (corr / temperature).softmax(1) + 1e-6
    return -(p * p.log()).sum(1)


def forward_backward_mask(corr: Tensor, src_grid: tuple[int, int], trg_grid: tuple[int, int]) -> Tensor:
    """Target cells whose match leads back: |f + b|^2 <= 0.1 (|f|^2 + |b|^2) + 0.5, in cells; (B, Nt) bool.

    f: from a target cell to its best source cell; b: from that one to its own best target cell.
    """
    forward, back = corr.argmax(1), corr.argmax(2).gather(1, corr.argmax(1))  # (B, Nt)
    own = torch.arange(corr.shape[2], device=corr.device)
    start, there, end = cells_to_xy(own, trg_grid[1]), cells_to_xy(forward, src_grid[1]), cells_to_xy(back, trg_grid[1])
    f, b = there - start, end - there
    return (f + b).square().sum(-1) <= 0.1 * (f.square().sum(-1) + b.square().sum(-1)) + 0.5


def box_mask(boxes: Tensor, h: int, w: int) -> Tensor:
    """Cells inside boxes (B, 4) given in cells, both rounded ends included; (B, h, w) bool."""
    x0, y0, x1, y1 = boxes.round()[..., None, None].unbind(1)  # (B, 1, 1)
    x, y = torch.arange(w, device=boxes.device), torch.arange(h, device=boxes.device)[:, None]
    return (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)


class PseudoLabels(NamedTuple):
    """What the strong view should be matched to."""

    label: Tensor  # (B, Nt) the source cell of every cell of the warped target
    weight: Tensor  # (B, Nt) exp(-T_u H)
    mask: Tensor  # (B, Nt) bool: the labels that count


@torch.no_grad()
def pseudo_labels(
    corr: Tensor,
    src_grid: tuple[int, int],
    trg_grid: tuple[int, int],
    affine: Tensor,
    offsets: Tensor,
    src_box: Tensor,
    trg_box: Tensor,
    cfg: SemiConfig,
) -> PseudoLabels:
    """Labels for the warped target from the weak view's volume (B, Ns, Nt); boxes (B, 4) in cells.

    One counts if it lies in the source's box, is probable enough, and if the target cell that the warp brought to its
    place lies in the target's box and passed the forward-backward check.
    """
    warped, _ = warp(corr.unflatten(2, trg_grid), affine, offsets, "nearest")
    warped = warped.flatten(2)  # (B, Ns, Nt)
    score, label = (warped / cfg.semi_temperature).softmax(1).max(1)
    checks = [box_mask(trg_box, *trg_grid), forward_backward_mask(corr, src_grid, trg_grid).unflatten(1, trg_grid)]
    passed, _ = warp(torch.stack(checks, 1).to(corr), affine, offsets, "nearest")  # (B, 2, ht, wt)
    mask = box_mask(src_box, *src_grid).flatten(1).gather(1, label) & (score >= cfg.semi_threshold)
    weight = torch.exp(-cfg.semi_uncertainty * uncertainty(warped, cfg.semi_temperature))
    return PseudoLabels(label, weight, mask & (passed > 0.5).all(1).flatten(1))


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def contrastive_loss(corr: Tensor, pseudo: PseudoLabels, gamma: float) -> Tensor:
    """Cross-entropy of corr / gamma over source cells, times the labels' weights, mean over the labels that count.

    corr (B, Ns, Nt) of the strong view; 0 where no label counts.
    """
    loss = F.cross_entropy(corr.float() / gamma, pseudo.label, reduction="none") * pseudo.weight.detach()
    return (loss * pseudo.mask).sum() / pseudo.mask.sum().clamp(min=1)


def dynamic_weight(supervised: Tensor, unsupervised: Tensor) -> Tensor:
    """Dynamic lambda: sup / unsup without a gradient, which makes both terms equal; 0 where there is no loss."""
    ratio = supervised.detach() / unsupervised.detach()
    return torch.where(unsupervised > 0, ratio, torch.zeros_like(ratio))
