"""Time the parallel selection modules against their literal forms, in one run: python tests/benchmark.py"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from literal import greedy_literal, hough_table  # noqa: E402

from modules import cosine_volume, greedy_selection, hough_matching  # noqa: E402


def clock(function, repeats: int) -> float:
    """Least seconds of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


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


if __name__ == "__main__":
    main()
