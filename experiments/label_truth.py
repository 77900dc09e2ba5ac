"""How many labels of annotated photographs are right: label.py's maps against keypoints that it never saw.

    python -m experiments.label_truth --checkpoint runs/photos/last.pt --datapath CUB6 --saliency CUB6_MAPS

The images of a split in SPair-71k's layout go through the labeller's steps: loops, the choice of images,
pairs of kept images and, for comparison, of dropped ones. A pair's labels come from the map between its two
images. Moved by it, a keypoint of the source is right if it ends within a tenth of the longer side of the
target's box of the target's keypoint of the same name.
"""

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
from evaluate import correct_points
from experiments.facing import misfits
from label import (
    CliqueSet,
    LabelConfig,
    Singles,
    map_clique,
    measure_loops,
    pair_matches,
    select_images,
    settings_of,
    split_cliques,
)
from modules import read_at
from support.benchmarks import benchmark_file
from support.run import command, find_device
from train import load_cascade


class Annotated(NamedTuple):
    """What is known of an image."""

    points: dict[str, tuple[float, float]]  # by the keypoint's name, in pixels
    box: data.Box


class Couple(NamedTuple):
    """A labelled pair, judged."""

    kind: str  # kept or dropped, its images
    error: float  # of its loops
    right: list[bool]  # this and the next two: what `judge` returns
    labelled: list[bool]
    alike: bool | None


def read_images(root: str, split: str) -> tuple[list[Path], list[str], list[Annotated]]:
    """The images of a split, their classes and annotations, gathered from all its pairs."""
    listed = benchmark_file("spair", root, f"Layout/large/{split}.txt")
    folder, points, boxes = listed.parents[2], defaultdict(dict), {}
    for path in sorted((folder / "PairAnnotation" / split).glob("*.json")):
        record = json.loads(path.read_text())
        for side in ("src", "trg"):
            image = folder / "JPEGImages" / record["category"] / record[f"{side}_imname"]
            points[image] |= dict(zip(record["kps_ids"], map(tuple, record[f"{side}_kps"])))
            boxes[image] = tuple(record[f"{side}_bndbox"])
    images = sorted(points)
    return images, [image.parent.name for image in images], [Annotated(points[i], boxes[i]) for i in images]


def judge(known: list[Annotated], clique, maps: Tensor,
          pair: dict) -> tuple[list[bool], list[bool], bool | None]:
    """Which common keypoints of a labelled pair its map moves to their partners, which have a label of the
    pair within a cell, and whether the pair faces alike by them; None where they are less than three."""
    ends = [clique.index.index(pair[side]) for side in ("src", "trg")]
    src, trg = (known[pair[side]] for side in ("src", "trg"))
    names = sorted(src.points.keys() & trg.points.keys())
    start, truth = (torch.tensor([one.points[n] for n in names]).view(-1, 2) for one in (src, trg))
    labels = torch.tensor(pair["src_kps"], dtype=start.dtype).view(-1, 2)
    cells, marks = (data.pixels_to_cells(places, clique.sizes[ends[0]], clique.feats.grid)
                    for places in (start, labels))
    near = ((cells[:, None] - marks).norm(dim=-1) <= 1).any(1)
    moved = read_at(maps[ends[0], ends[1]].permute(2, 0, 1)[None].cpu(), cells[None])[0]
    found = data.cells_to_pixels(moved, clique.sizes[ends[1]], clique.feats.grid)
    couple, alike = data.KeypointPair(*ends, start, truth, "", src.box, trg.box), None
    if len(names) >= 3:
        plain, mirrored = misfits(couple)
        alike = plain <= mirrored
    return correct_points(found, truth, couple.extent, (0.1,))[:, 0].tolist(), near.tolist(), alike


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.label_truth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint written by train.py")
    add("--weights", help="backbone weights file, where the checkpoint's own path is gone")
    add("--datapath", required=True, help="a data set in SPair-71k's layout")
    add("--split", default="trn", help="trn (default), val or test")
    add("--saliency", default="attention", help="folder of <class>/<image>_sal.png, or attention (default)")
    add("--keep", type=float, default=0.3, help="share of every class's images that is kept (default 0.3)")
    add("--no-facing", dest="facing", action="store_false", help="no mirror images")
    add("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    paths, classes, known = read_images(args.datapath, args.split)
    names = sorted(set(classes))
    maps = None if args.saliency == "attention" else args.saliency
    images = data.ImageSet(paths, [names.index(c) for c in classes], names, maps)
    mode = {"saliency": "none" if maps else "attention"}
    cascade = load_cascade(args.checkpoint, args.weights, find_device(args.device), **mode)
    members = dict(enumerate(images.members()))
    with tempfile.TemporaryDirectory() as out:
        cfg = LabelConfig(checkpoint=args.checkpoint, dataset="folder", saliency=args.saliency, out=out,
                          size=cascade.cfg.size, keep=args.keep, facing=args.facing)
        singles = Singles(members, {}, {})
        measured = measure_loops(cfg, cascade, images, singles, settings_of(cfg, images, singles))
    kept = select_images(measured.errors, images.labels, cfg.keep)
    rows = []
    for k, some in members.items():
        rest = [i for i in some if i in measured.errors and i not in kept[k]]
        for kind, chosen in (("kept", kept[k]), ("dropped", rest)):
            groups = [g for g in split_cliques(chosen, cfg.pair_clique_size) if len(g) >= 3]
            items = CliqueSet(images, groups, cascade)
            for number in range(len(groups)):
                clique, _, moves, partners = map_clique(cascade, items[number], {}, cfg, matched=True)
                if not clique:
                    continue
                found = sorted(pair_matches(clique, moves, partners, cfg), key=lambda pair: pair["score"])
                most = cfg.pairs * len(clique.index)
                rows += [Couple(kind, pair["score"], *judge(known, clique, moves, pair))
                         for pair in found[:most]]
    print(f"{len(paths)} images of {len(names)} classes, {sum(map(len, kept.values()))} kept")
    tables = {kind: [row for row in rows if row.kind == kind] for kind in ("kept", "dropped")}
    tables |= {f"{kind}, a cell or less from a label": [
        row._replace(right=list(itertools.compress(row.right, row.labelled))) for row in tables[kind]]
        for kind in ("kept", "dropped")}
    tables |= {f"kept, facing {name}": [row for row in tables["kept"] if row.alike == alike]
               for name, alike in (("alike", True), ("opposite ways", False))}
    ranked, edges = sorted(rows, key=lambda row: row.error), [q * len(rows) // 4 for q in range(5)]
    tables |= {f"all, quarter {q + 1} by loop error": ranked[edges[q] : edges[q + 1]] for q in range(4)}
    for name, chosen in tables.items():
        right = [good for row in chosen for good in row.right]
        share = f"{100 * sum(right) / len(right):5.1f} %" if right else "    -"
        print(f"{name:40s} {share} of {len(right):5d} keypoints in {len(chosen)} pairs")


if __name__ == "__main__":
    with command():
        main()
