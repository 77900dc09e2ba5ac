"""Time fast forms against literal ones, each in one run: python tests/benchmark.py

On a machine with a GPU, also the label generator at the paper's size (ViT-B/16, 512 px, random weights).
"""

import math
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from literal import greedy_literal, hough_table  # noqa: E402

import data  # noqa: E402
from label import Clique, LabelConfig, clique_maps, follow, image_errors, loop_errors, pair_matches  # noqa: E402
from modules import (  # noqa: E402  # noqa: E402
    BACKBONES,
    Features,
    ViT,
    cells_to_xy,
    cosine_volume,
    greedy_selection,
    hough_matching,
    kernel_soft_argmax,
)
from train import PRESETS, Cascade, Config  # noqa: E402


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
    points = cells_to_xy(torch.arange(clique.foreground.shape[1], device=clique.side.device), clique.feats.grid[1])[
        None
    ]
    for ends in ((s, m), (m, t), (t, s)):
        corr = cascade.volume(*(Features(*(x[i : i + 1] for x in clique.feats)) for i in ends))
        points = follow(kernel_soft_argmax(corr), points)
    return loop_errors(clique, s, points[0], 0.1)


@torch.no_grad()
def label_speed(cascade: Cascade, device: torch.device, count: int = 12) -> None:
    """Closed loops of one clique of twelve shapes against loops with three volumes each; then its pairs."""
    cascade, size = cascade.to(device).eval(), cascade.cfg.size
    images, patch = data.Shapes("train"), cascade.backbone.patch
    views, maps = zip(*(data.prepare(*images.load(i), size, patch) for i in range(count)))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def features() -> Features:
        return cascade.features(torch.stack(views), torch.stack(maps))

    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        feats = features()
        grid = size // patch
        one = torch.ones(count, device=device)
        frames = [(128, 128)] * count, [(0, 0, 128, 128)] * count, one[:, None].expand(-1, 2) * 128 / grid, one * 128
        clique = Clique(list(range(count)), feats, *frames, feats.foreground(0.5).flatten(1))

        def loops() -> None:
            image_errors(clique, clique_maps(cascade, features(), 8)[0], 0.1)
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


def main() -> None:
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
            print(f"{n}^4 {name:31s} {fast * 1e3:7.2f} ms, literal {slow * 1e3:8.2f} ms, {slow / fast:6.1f} times")
    label_speed(Cascade(Config(**PRESETS["quick"])), torch.device("cpu"))
    if torch.cuda.is_available():
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(ViT(BACKBONES["ibot_vitb16"]).state_dict(), file.name)
            label_speed(Cascade(Config(weights=file.name)), torch.device("cuda"))


if __name__ == "__main__":
    main()
