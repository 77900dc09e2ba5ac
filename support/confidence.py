"""How sure a match is: from its row of the volume, its closed loop, and how well the couple matches.

A logistic regression of four numbers, fitted once (`python -m experiments.calibrate`) so that of the matches
of confidence c a share c is right, that is within a tenth of the longer side of the target's box.
"""

from pathlib import Path

import torch
from torch import Tensor

from modules import read_at, transfer_keypoints
from support.files import write_whole
from support.ours import FOREGROUND, Reading, match_score
from support.pictures import draw_curve

CLOSE = 0.08  # of the longer side of the source's grid: how far off a loop may end
FEW = 10  # points of a bin that a curve leaves out
STANDS_OUT = 12.0  # standard deviations; above, as in a picture of one colour, they say nothing more
# Weights of the four and bias, for images that were read densely (True) and by whole cells
FITTED = {True: ((0.474, 1.12, 0.579, 2.81), -6.56), False: ((0.612, 0.797, 1.13, 4.78), -7.69)}


def evidence(reading: Reading, mask_s: Tensor, mask_t: Tensor, points: Tensor, places: Tensor) -> Tensor:
    """What tells right matches from wrong ones. points (B, n, 2) in source cells, places (B, n, 2) in target
    cells, masks (B, H, W) bool; returns (B, n, 4):

    by how many standard deviations of its row, up to STANDS_OUT, the reading stands out where it sends a
    point; how nearly the loop s -> t -> s closes in the reading, and in the consensus of neighbours, which
    knows nothing of the couple's map (1: it ends where it began); the couple's match score.
    """
    rows = read_at(reading.volume.flatten(3).permute(0, 3, 1, 2), points)  # (B, n, Nt)
    maps = rows.unflatten(2, reading.volume.shape[3:]).flatten(0, 1)[:, None]  # (B * n, 1, Ht, Wt)
    height = read_at(maps, places.flatten(0, 1)[:, None])[..., 0].view(rows.shape[:2])
    found = [((height - rows.mean(-1)) / rows.std(-1).clamp(min=1e-6)).clamp(max=STANDS_OUT)]
    for volume in (reading.volume, reading.near):
        off = (transfer_keypoints(volume.permute(0, 3, 4, 1, 2), places) - points).norm(dim=-1)
        found.append(torch.exp(-0.5 * (off / (CLOSE * max(volume.shape[1:3]))) ** 2))
    found.append(match_score(reading.near, mask_s, mask_t)[:, None].expand_as(height))
    return torch.stack(found, -1)


def confidence(found: Tensor, dense: bool) -> Tensor:
    """(..., 4) of `evidence` to the probability (...) that the match is right. dense: whether
    images were read so."""
    weights, bias = FITTED[dense]
    return torch.sigmoid(found @ found.new_tensor(weights) + bias)


@torch.no_grad()
def read_points(matcher, src, trg, points: Tensor, method: str) -> tuple[Reading, Tensor, Tensor]:
    """The reading of a couple, the places (B, n, 2) in target cells of points (B, n, 2) in source cells, and
    their `evidence`. matcher: a cascade, whole or dense; method: a reading that `best` of it knows."""
    reading = matcher.best(src, trg, method)
    places = transfer_keypoints(reading.volume, points)
    masks = (side.saliency >= FOREGROUND for side in (src, trg))
    return reading, places, evidence(reading, *masks, points, places)


def transfer_with_evidence(*couple) -> Tensor:
    """`read_points` without the reading: (B, n, 6), places and evidence side by side."""
    return torch.cat(read_points(*couple)[1:], -1)


def calibration(sure: Tensor, right: Tensor) -> list[tuple[int, int]]:
    """Matches by their confidence, in ten bins of a tenth: (how many, how many of them are right). sure (n,)
    in [0, 1], right (n,) bool."""
    place = (sure * 10).long().clamp(max=9)
    return [(int((place == k).sum()), int(right[place == k].sum())) for k in range(10)]


def report(found: dict[str, Tensor], right: dict[str, Tensor], dense: bool, name: str,
           folder: Path | None) -> dict:
    """Print how sure the matches of a data set are against how many are right, by method, and draw it into a
    folder, if there is one. found: `evidence` (n, 4); right (n,) bool. Returns both, for JSON."""
    curves, tables = {}, {}
    for method, known in found.items():
        table = tables[method] = calibration(confidence(known, dense), right[method])
        curves[method] = [100 * good / count if count else None for count, good in table]
        print(f"\nconfidence of {method} on {name}: right within 0.10 of the longer side of the target's box")
        for k, ((count, _), share) in enumerate(zip(table, curves[method])):
            print(f"  {k / 10:.1f} to {(k + 1) / 10:.1f} {count:7d} points"
                  + (f" {share:6.1f} % right" if count else ""))
        for low in (5, 8):
            count, good = (sum(column) for column in zip(*table[low:]))
            part = f"{100 * count / max(1, len(known)):.0f} % of {len(known)} points"
            print(f"  over {low / 10:.1f}: {part}" + (f", {100 * good / count:.1f} % right" if count else ""))
    if folder:
        middles = tuple((k + 0.5) / 10 for k in range(10))
        firm = {m: [share if count >= FEW else None for share, (count, _) in zip(curves[m], tables[m])]
                for m in curves}  # of a few points a share says nothing
        label = "% right within 0.10 of the box"
        page = draw_curve(firm, middles, f"matches on {name}", "confidence", label, diagonal=True)
        write_whole(folder / "confidence.png", page)
    return {method: {"dense": dense, "evidence": known.tolist(), "right": right[method].tolist()}
            for method, known in found.items()}
