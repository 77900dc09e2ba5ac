"""Fit the confidence of matches: a logistic regression of `support/confidence.py:evidence`.

    python evaluate.py --dataset shapes --split val ... --dense --confidence --json shapes.json
    python evaluate.py --dataset spair --split trn --datapath CUB6 ... --dense --confidence --json birds.json
    python -m experiments.calibrate shapes.json birds.json

Every file, and in it every method, weighs alike. Prints the weights and the bias of FITTED in
support/confidence.py, which holds those of dense and of whole reading.
"""

import argparse
import json

import torch
from torch import Tensor

from support.run import command

RIDGE = 1e-3  # on weights of evidence in units of its standard deviation


def fit(found: list[Tensor], right: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logistic regression by Newton's method, float64: weights (4,) and bias of evidence [(n, 4), ...], each
    set of the same weight, that makes right [(n,) bool, ...] likeliest."""
    x, y = torch.cat(found).double(), torch.cat(right).double()
    share = torch.cat([torch.full((len(part),), 1 / len(part) / len(found)) for part in found]).double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = torch.cat([(x - mean) / scale, x.new_ones(len(x), 1)], 1)
    ridge, theta = RIDGE * torch.eye(x.shape[1]).double(), x.new_zeros(x.shape[1])
    ridge[-1, -1] = 0
    for _ in range(30):
        p = torch.sigmoid(x @ theta)
        slope = x.T @ (share * (p - y)) + ridge @ theta
        theta = theta - torch.linalg.solve((x.T * (share * p * (1 - p))) @ x + ridge, slope)
    weights = theta[:-1] / scale
    return weights, theta[-1] - weights @ mean


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.calibrate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="what evaluate.py --confidence --json wrote")
    found, right, dense = [], [], set()
    for path in parser.parse_args(argv).files:
        try:
            with open(path) as file:
                tables = list(json.load(file)["confidence"].values())
            sets = [(torch.tensor(table["evidence"]), torch.tensor(table["right"])) for table in tables]
            sound = bool(sets) and all(len(y) and x.shape == (len(y), 4) for x, y in sets)
            dense |= {table["dense"] for table in tables}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is not what evaluate.py --confidence --json writes")
        found, right = found + [x for x, _ in sets], right + [y for _, y in sets]
    if len(dense) > 1:
        raise ValueError("some files were read densely and some by whole cells: they are fitted apart")
    weights, bias = fit(found, right)
    print(f"{dense.pop()}: (({', '.join(f'{w:.3g}' for w in weights)}), {bias:.3g})")
    print(f"fitted on {sum(map(len, right))} points of {len(right)} sets")


if __name__ == "__main__":
    with command():
        main()
