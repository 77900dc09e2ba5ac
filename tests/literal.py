"""Literal forms of what modules.py and support/ours.py compute: loops and tables as the sources write them,
the yardstick of the tests."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def greedy_literal(
    score: Tensor, keep_s: Tensor | None = None, keep_t: Tensor | None = None
) -> list[tuple[int, int]]:
    """Algorithm 1 line by line on one volume (Hs, Ws, Ht, Wt): argmax, take both cells out, until one side is
    empty."""
    table = score.flatten(2).flatten(0, 1).clone()
    sources = table.shape[0] if keep_s is None else int(keep_s.sum())
    targets = table.shape[1] if keep_t is None else int(keep_t.sum())
    if keep_s is not None:
        table[~keep_s.flatten()] = float("-inf")
    if keep_t is not None:
        table[:, ~keep_t.flatten()] = float("-inf")
    pairs = []
    for _ in range(min(sources, targets)):
        i, j = divmod(int(table.argmax()), table.shape[1])
        pairs.append((i, j))
        table[i], table[:, j] = float("-inf"), float("-inf")
    return pairs


def hough_table(corr: Tensor, side: int = 5, exponent: float = 3.0) -> Tensor:
    """Hough matching as HPF writes it, one volume (Hs, Ws, Ht, Wt): votes scattered into a table of N x
    bins."""
    hs, ws, ht, wt = corr.shape
    a = corr.clamp(min=0).pow(exponent).flatten(2).flatten(0, 1)  # (Ns, Nt)
    s = torch.stack([torch.arange(hs * ws) % ws, torch.arange(hs * ws) // ws], -1)
    t = torch.stack([torch.arange(ht * wt) % wt, torch.arange(ht * wt) // wt], -1)
    delta = t[None] - s[:, None] + torch.tensor([ws - 1, hs - 1])  # (Ns, Nt, 2)
    bins = delta[..., 1] * (ws + wt - 1) + delta[..., 0]
    table = torch.zeros(hs * ws, (hs + ht - 1) * (ws + wt - 1)).scatter_add_(1, bins, a)
    votes = table.sum(0).view(1, 1, hs + ht - 1, ws + wt - 1)
    offset = torch.arange(side).float() - side // 2
    gauss = torch.exp(-0.5 * (offset[:, None] ** 2 + offset[None] ** 2) / (side / 4.708) ** 2)
    votes = F.conv2d(votes, (gauss / gauss.sum())[None, None], padding=side // 2).flatten()
    return (a * votes[bins]).view(hs, ws, ht, wt)


def hough_loop(corr: Tensor, side: int, exponent: float) -> Tensor:
    """The same by four nested loops and a dictionary of displacements."""
    hs, ws, ht, wt = corr.shape
    cells = [(a, b, c, d) for a in range(hs) for b in range(ws) for c in range(ht) for d in range(wt)]
    similarity = {cell: max(0.0, float(corr[cell])) ** exponent for cell in cells}
    votes: dict[tuple[int, int], float] = {}
    for (a, b, c, d), value in similarity.items():
        votes[c - a, d - b] = votes.get((c - a, d - b), 0.0) + value
    half, sigma = side // 2, side / 4.708
    weights = {
        (i, j): math.exp(-0.5 * (i * i + j * j) / sigma**2)
        for i in range(-half, half + 1)
        for j in range(-half, half + 1)
    }
    total = sum(weights.values())
    out = torch.zeros_like(corr)
    for a, b, c, d in cells:
        smooth = sum(w / total * votes.get((c - a + i, d - b + j), 0.0) for (i, j), w in weights.items())
        out[a, b, c, d] = similarity[a, b, c, d] * smooth
    return out


def cells(height: int, width: int) -> list[tuple[int, int]]:
    """(x, y) of a grid's cells, row by row."""
    return [(x, y) for y in range(height) for x in range(width)]


def ridge_fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, pull: float) -> tuple[np.ndarray, np.ndarray]:
    """What fit_affine minimises, as rows of one least squares problem: (A, c), y = x A + c."""
    weight = weight / weight.sum()
    xc, yc = ((z - weight @ z) @ [1, 1j] for z in (x, y))  # as complex numbers
    turn = (weight * xc.conj() * yc).sum() / (weight * abs(xc) ** 2).sum()
    similarity = np.array([[turn.real, turn.imag], [-turn.imag, turn.real]])
    ridge = math.sqrt(pull * (weight * abs(xc) ** 2).sum() / 2)
    rows = np.vstack([np.sqrt(weight)[:, None] * np.c_[x, np.ones(len(x))], ridge * np.eye(2, 3)])
    right = np.vstack([np.sqrt(weight)[:, None] * y, ridge * similarity])
    found = np.linalg.lstsq(rows, right, rcond=None)[0]
    return found[:2], found[2]


def ransac(corr: Tensor, mask_s: Tensor, mask_t: Tensor, hypotheses: int = 256) -> tuple[np.ndarray, float]:
    """affine_voting of one couple, one hypothesis and one match at a time."""
    src, trg = (np.array(cells(*mask.shape), float) for mask in (mask_s, mask_t))
    keep_s, keep_t = (mask.flatten().numpy() for mask in (mask_s, mask_t))
    table = np.maximum(corr.double().flatten(2).flatten(0, 1).numpy(), 0)
    weight, match = np.full(len(src), 1e-12), np.zeros(len(src), int)
    for i in range(len(src)):
        match[i] = np.argmax(table[i] * keep_t)
        back = np.argmax(table[:, match[i]] * keep_s)
        off = math.dist(src[back], src[i])
        vote = (table[i, match[i]] * keep_t[match[i]]) ** 3 * math.exp(-0.5 * (off / 1.5) ** 2)
        weight[i] += vote * keep_s[i]
    y, share = trg[match], np.cumsum(weight) / weight.sum()
    draws = torch.rand(3 * hypotheses, generator=torch.Generator().manual_seed(0)).numpy().reshape(-1, 3)

    def explained(linear, offset):
        return np.array([math.dist(p @ linear + offset, q) < 2.5 for p, q in zip(src, y)])

    best, winner = -1.0, None
    for three in draws:
        index = [min(int(np.searchsorted(share, u)), len(src) - 1) for u in three]
        fit = ridge_fit(src[index], y[index], np.ones(3), 0.1) if len(set(index)) > 1 else None
        if fit is None:  # three times one cell: no map
            continue
        large, small = np.linalg.svd(fit[0])[1]
        if np.linalg.det(fit[0]) > 0 and large < 3 and small > 1 / 4:
            votes = weight[explained(*fit)].sum()
            if votes > best + 1e-9:
                best, winner = votes, fit
    for _ in range(3):
        winner = ridge_fit(src, y, weight * explained(*winner), 0.1)
    return src @ winner[0] + winner[1], weight[explained(*winner)].sum() / weight.sum()
