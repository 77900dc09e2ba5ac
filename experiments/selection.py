"""What the stages select, judged by keypoints: which share of the selected pairs is right.

    python -m experiments.selection --dataset shapes --split val --checkpoint runs/quick/last.pt
    python -m experiments.selection --dataset spair --datapath CUB6 --split trn --checkpoint FILE

A selected pair is judged if its source cell is the cell of a keypoint that the couple shares, and right if
its target cell's centre lies within alpha d of the partner. "plain" is Algorithm 1 on the frozen cosine
volume, the best `pairs` of it; "image" the suspected pairs of stage 1, "region" those that go on to the pixel
stage, by an untrained cascade and by the checkpoint's. Where it was trained with facing, pairs are found as
in training, with the target mirrored where the couple faces opposite ways, and put back.
"""

import torch
from torch import Tensor

import data
from evaluate import features_of, load_methods, load_pairs, read_options, right_points, shared_options
from modules import Pairs, best_pairs, cells_to_xy, greedy_selection, put_back
from support.ours import face_the_source
from support.run import command
from train import Cascade


@torch.no_grad()
def selections(cascade: Cascade, src, trg) -> dict[str, Pairs]:
    """Pairs of one couple (Features with mirror images') by every selection, in cells of the images."""
    cfg, away = cascade.cfg, torch.zeros(1, dtype=torch.bool)
    if cfg.facing:
        trg, away = face_the_source(lambda s, t: cascade.volume(s, t, "nn"), src, trg)
    masks = [x.foreground(cfg.saliency_threshold) for x in (src, trg)]
    plain = greedy_selection(cascade.volume(src, trg, "nn"), *masks)
    found = {"plain": best_pairs(plain, plain.valid & (plain.score > 0), cfg.pairs)}
    found["image"] = cascade.image.select(cascade.image(src, trg), src, trg)
    if cascade.region is not None:
        regions = cascade.image.regions(found["image"], src, trg)
        corr = cascade.region(regions.src, regions.trg)
        found["region"] = cascade.region.select(corr, regions, src.grid, trg.grid)
    return {name: put_back(pairs, away.to(pairs.src.device), trg.grid[1]) for name, pairs in found.items()}


def judge(pairs: Pairs, keypoints: data.KeypointSet, number: int, grids: list, alphas: tuple) -> Tensor:
    """Which judged pairs of a couple are right, (n, alphas) bool."""
    pair, found = keypoints.pairs[number], []
    cells = data.pixels_to_cells(pair.src_kps, keypoints.size(pair.src), grids[0]).round().tolist()
    start, end = (cells_to_xy(index[pairs.valid], grid[1]).cpu() for index, grid in zip(pairs[:2], grids))
    places = data.cells_to_pixels(end, keypoints.size(pair.trg), grids[1])
    for n, cell in enumerate(cells):
        for place in places[(start == torch.tensor(cell)).all(1)]:
            prediction = pair.trg_kps.clone()
            prediction[n] = place
            found.append(right_points(prediction, keypoints, number, alphas, "bbox")[n])
    return torch.stack(found) if found else torch.zeros(0, len(alphas), dtype=torch.bool)


def main(argv: list[str] | None = None) -> None:
    args = read_options(shared_options(__doc__, "experiments.selection"), argv)
    if not args.checkpoint:
        raise ValueError("give --checkpoint FILE, written by train.py")
    keypoints, (trained, _) = load_pairs(args), load_methods(args)
    untrained = Cascade(trained.cfg).to(next(trained.parameters()).device).eval()
    if trained.conditioning is not None:
        untrained.conditioning.load_state_dict(trained.conditioning.state_dict())
    images = sorted({i for pair in keypoints.pairs for i in pair[:2]})
    features = features_of(trained, keypoints, images, 8, mirror=True, maps=True)
    right: dict[str, list[Tensor]] = {}
    count: dict[str, int] = {}
    for number, pair in enumerate(keypoints.pairs):
        src, trg = features[pair.src], features[pair.trg]
        for when, cascade in (("untrained", untrained), ("trained", trained)):
            for name, pairs in selections(cascade, src, trg).items():
                row = name if name == "plain" else f"{name}, {when}"
                if row == "plain" and cascade is trained:
                    continue
                judged = judge(pairs, keypoints, number, [src.grid, trg.grid], args.alphas)
                right.setdefault(row, []).append(judged)
                count[row] = count.get(row, 0) + int(pairs.valid.sum())
    what = "right within alpha (%), judged pairs, pairs a couple"
    print(f"{len(keypoints)} couples of {keypoints.name}; {what}")
    for row, found in right.items():
        judged = torch.cat(found)
        shares = "".join(f"{100 * float(v):8.1f}" for v in judged.float().mean(0))
        print(f"{row:20s}{shares}{len(judged):8d}{count[row] / len(keypoints):8.1f}")


if __name__ == "__main__":
    with command():
        main()
