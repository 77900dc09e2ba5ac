"""Which way objects face: how often it is found, and what it is worth.

    python -m experiments.facing --dataset spair --datapath CUB6 --checkpoint runs/photos/last.pt

The truth is read off the keypoints: a pair faces opposite ways if a similarity that mirrors fits them better
than one that does not. A pair is clear if the two fits differ by more than 0.3 of the points' variance.
Facing is found by a pair's own score (`support/ours.py:facing_score`), as evaluation does, and by agreement
of all images of its class, as labelling does, which uses the whole set. PCK is that of frozen features,
consensus of 3x3 neighbours, with the volume or the mirrored one as each says.
"""

import itertools

import torch
from torch import Tensor

import data
from evaluate import features_of, load_methods, load_pairs, print_scores, read_options, score, shared_options
from modules import transfer_keypoints
from support.ours import (
    FOREGROUND,
    faces_other_way,
    facing_score,
    neighbourhood_consensus,
    plain_and_mirrored,
)
from support.run import command

CLEAR = 0.3  # of the points' variance, between the two fits


def misfits(pair: data.KeypointPair) -> tuple[float, float]:
    """What the best similarity, and the best that mirrors, leave unexplained of a pair's points, as shares of
    the variance of the target's."""
    left = []
    for sign in (1, -1):
        s, t = (torch.complex(flip * kps[:, 0].double(), kps[:, 1].double())
                for flip, kps in ((sign, pair.src_kps), (1, pair.trg_kps)))
        s, t = s - s.mean(), t - t.mean()
        z = (s.conj() * t).sum() / (s.abs() ** 2).sum().clamp(min=1e-9)
        left.append(float((t - z * s).abs().square().sum() / t.abs().square().sum().clamp(min=1e-9)))
    return left[0], left[1]


def compare(matcher, src, trg) -> tuple[float, Tensor, Tensor]:
    """The score of two images, and their volumes of 3x3 neighbours, plain and of the mirrored target, in the
    target's own cells."""
    volumes = plain_and_mirrored(lambda s, t: matcher.volume(s, t, "nn"), src, trg)
    near = [neighbourhood_consensus(corr, 3) for corr in volumes]
    found = facing_score(*near, src.saliency >= FOREGROUND, trg.saliency >= FOREGROUND)
    return float(found), near[0], near[1].flip(4)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = read_options(shared_options(__doc__, "experiments.facing"), argv)
    keypoints = load_pairs(args)
    matcher, _ = load_methods(args)
    misfit = torch.tensor([misfits(pair) for pair in keypoints.pairs])
    truth, clear = misfit[:, 1] < misfit[:, 0], (misfit[:, 0] - misfit[:, 1]).abs() > CLEAR
    away = {name: torch.zeros(len(keypoints), dtype=torch.bool) for name in ("never", "pair", "class")}
    away["truth"] = truth
    places = {name: [None] * len(keypoints) for name in away}
    for category in sorted({pair.category for pair in keypoints.pairs}):
        members = [n for n, pair in enumerate(keypoints.pairs) if pair.category == category]
        images = sorted({i for n in members for i in keypoints.pairs[n][:2]})
        features = features_of(matcher, keypoints, images, 8, mirror=True)
        scores = torch.zeros(len(images), len(images))
        for a, b in itertools.combinations(range(len(images)), 2):
            scores[a, b] = scores[b, a] = compare(matcher, features[images[a]], features[images[b]])[0]
        signs = faces_other_way(scores)
        for n in members:
            pair = keypoints.pairs[n]
            src, trg = features[pair.src], features[pair.trg]
            found, plain, mirrored = compare(matcher, src, trg)
            away["pair"][n] = found > 0
            away["class"][n] = signs[images.index(pair.src), images.index(pair.trg)]
            cells = data.pixels_to_cells(pair.src_kps, keypoints.size(pair.src), src.grid)[None]
            for name, turned in away.items():
                moved = transfer_keypoints(mirrored if turned[n] else plain, cells.to(plain))[0].cpu()
                places[name][n] = data.cells_to_pixels(moved, keypoints.size(pair.trg), trg.grid)
    print(f"{int(truth.sum())} of {len(truth)} pairs face opposite ways, {int(clear.sum())} pairs are clear")
    for name in ("never", "pair", "class"):
        right = (away[name] == truth).float()
        shares = " ".join(f"{100 * float(some.mean()):.1f} %" for some in (right, right[clear]))
        print(f"facing by {name}: right in all and in clear pairs {shares}")
    for name, found in places.items():
        table = score(found, keypoints, args.alphas, args.rule)
        print_scores(table, f"consensus 3x3, mirrored by {name}", keypoints, args.alphas, matcher.cfg.size)


if __name__ == "__main__":
    with command():
        main()
