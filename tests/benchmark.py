"""Time fast forms against literal ones, each in one run: python tests/benchmark.py

On a machine with a GPU, also the label generator and an evaluation of SPair-71k's size, both as the paper has
them (ViT-B/16, 512 px; random weights). With --pfwillow DIR --weights FILE, also PF-WILLOW with the backbone
run once an image against twice a pair.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from literal import greedy_literal, hough_table  # noqa: E402

import data  # noqa: E402
from evaluate import predict  # noqa: E402
from label import Clique, LabelConfig, clique_maps, image_errors, loop_errors, pair_matches  # noqa: E402
from modules import (  # noqa: E402
    Features,
    cells_to_xy,
    cosine_volume,
    greedy_selection,
    hough_matching,
    kernel_soft_argmax,
    read_at,
)
from support.backbone import BACKBONES, ViT  # noqa: E402
from support.benchmarks import pfwillow  # noqa: E402
from support.presets import PRESETS  # noqa: E402
from support.shapes import Shapes  # noqa: E402
from train import Cascade, Config  # noqa: E402


def clock(function, repeats: int) -> float:
    """Least seconds of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def single_loop(cascade: Cascade, clique: Clique, s: int, m: int, t: int) -> torch.Tensor:
    """The errors of one loop from three volumes of its own."""
    points = cells_to_xy(
        torch.arange(clique.foreground.shape[1], device=clique.side.device), clique.feats.grid[1]
    )[None]
    for ends in ((s, m), (m, t), (t, s)):
        corr = cascade.volume(*(clique.feats.map(lambda x, i=i: x[i : i + 1]) for i in ends))
        points = read_at(kernel_soft_argmax(corr).permute(0, 3, 1, 2), points)
    return loop_errors(clique, s, points[0])


@torch.no_grad()
def label_speed(cascade: Cascade, device: torch.device, count: int = 12) -> None:
    """Closed loops of one clique of twelve shapes against loops with three volumes each; then its pairs."""
    cascade, size = cascade.to(device).eval(), cascade.cfg.size
    images, patch = Shapes("train"), cascade.backbone.patch
    views, maps = zip(*(data.prepare(*images.load(i), size, patch) for i in range(count)))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def features() -> Features:
        return cascade.features(torch.stack(views), torch.stack(maps))

    feats = features()
    grid = size // patch
    one = torch.ones(count, device=device)
    frames = (
        [(128, 128)] * count,
        [(0, 0, 128, 128)] * count,
        one[:, None].expand(-1, 2) * 128 / grid,
        one * 128,
    )
    clique = Clique(list(range(count)), feats, *frames, feats.foreground(0.5).flatten(1))

    def loops() -> None:
        image_errors(clique, clique_maps(cascade, features(), 8)[0])
        wait()

    def one_by_one() -> None:
        for m in range(1, count):
            for t in range(1, count):
                if m != t:
                    single_loop(cascade, clique, 0, m, t)
        wait()

    def pairs() -> None:
        pair_matches(clique, *clique_maps(cascade, features(), 8, matched=True), LabelConfig())
        wait()

    fast, slow, matched = clock(loops, 3), clock(one_by_one, 1), clock(pairs, 3)
    n, volumes = (count - 1) * (count - 2), math.comb(count, 2)
    print(f"{cascade.cfg.backbone}, {size} px, {device}, backbone included: {n} loops an image")
    rate = f"{n * count / fast:7.1f} loops/s, {volumes / fast:.1f} volumes/s"
    print(f"  clique of {count}, {(count - 1) / 2} volumes an image: {rate}")
    rate = f"{n / slow:8.1f} loops/s; the clique is {count * slow / fast:.0f} times as fast"
    print(f"  one by one, {3 * n} volumes an image: {rate}")
    print(f"  its pairs, matched and selected: {volumes / matched:.1f} pairs/s")


def once_an_image(root: str, weights: str, pairs: int = 180) -> None:
    """Evaluate the first pairs of PF-WILLOW with the backbone run once a distinct image, and twice a pair."""
    keypoints = pfwillow(root)
    cascade = Cascade(Config(backbone="dinov2_vits14", weights=weights, layer=10, size=224)).eval()
    numbers = list(range(pairs))
    fast = clock(lambda: predict(cascade, keypoints, ["nn"], 1, True, numbers=numbers), 1)
    slow = clock(lambda: [predict(cascade, keypoints, ["nn"], 1, True, numbers=[n]) for n in numbers], 1)
    print(f"PF-WILLOW, {pairs} pairs, 224 px: {fast:.1f} s, with the backbone twice a pair {slow:.1f} s")


class Noise:
    """Random images in place of photographs."""

    def load(self, index: int) -> tuple[Image.Image, None]:
        pixels = np.random.default_rng(index).integers(0, 256, (375, 500, 3), dtype=np.uint8)
        return Image.fromarray(pixels), None


def spair_speed(cascade: Cascade, device: torch.device) -> None:
    """An evaluation of SPair-71k's size: 18 categories of 100 images, 12,234 pairs of ten points."""
    rng, pairs = np.random.default_rng(0), []
    for number in range(12_234):
        category = number % 18
        src, trg = (int(k) + 100 * category for k in rng.choice(100, 2, replace=False))
        kps = [torch.from_numpy(rng.uniform(0, 370, (10, 2))).float() for _ in range(2)]
        box = (0.0, 0.0, 499.0, 374.0)
        pairs.append(data.KeypointPair(src, trg, *kps, str(category), box, box))
    keypoints = data.KeypointSet("noise", Noise(), pairs)
    start = time.perf_counter()
    predict(cascade.to(device).eval(), keypoints, ["pixel"], batch=16, quiet=True)
    seconds = time.perf_counter() - start
    rate = f"{seconds:.0f} s, {12_234 / seconds:.0f} pairs/s"
    print(f"1,800 images, 12,234 pairs, {cascade.cfg.size} px, {device}: {rate}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pfwillow", help="folder of PF-WILLOW")
    parser.add_argument("--weights", help="a file of DINOv2 ViT-S/14's weights")
    args = parser.parse_args()
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; least of several calls")
    generator = torch.Generator().manual_seed(0)
    for n in (16, 32):
        corr = cosine_volume(*torch.randn(2, 1, n * n, 64, generator=generator), (n, n), (n, n))
        score = hough_matching(corr)
        rows = (
            (
                "greedy against the argmax loop",
                lambda s=score: greedy_selection(s),
                lambda s=score: greedy_literal(s[0]),
            ),
            ("hough against N x bins", lambda c=corr: hough_matching(c), lambda c=corr: hough_table(c[0])),
        )
        for name, ours, literal in rows:
            fast, slow = clock(ours, 20), clock(literal, 3)
            times = f"{fast * 1e3:7.2f} ms, literal {slow * 1e3:8.2f} ms, {slow / fast:6.1f} times"
            print(f"{n}^4 {name:31s} {times}")
    label_speed(Cascade(Config(**PRESETS["quick"])), torch.device("cpu"))
    if torch.cuda.is_available():
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(ViT(BACKBONES["ibot_vitb16"]).state_dict(), file.name)
            cascade = Cascade(Config(weights=file.name))
            label_speed(cascade, torch.device("cuda"))
            spair_speed(cascade, torch.device("cuda"))
    if args.pfwillow:
        once_an_image(args.pfwillow, args.weights)


if __name__ == "__main__":
    main()
