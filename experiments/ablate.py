"""Tables 4 and 5 of the paper: what the cascade loses without each of its parts.

    python -m experiments.ablate --out runs/ablation                                  # on the built-in shapes
    python -m experiments.ablate --preset photos --root DIR --val pfwillow --out runs/ablation

The options are train.py's and describe the full cascade. Every row is trained on the same couples and crops,
in a folder of its own under --out, and measured on --val; a view passes the frozen backbone once for all rows
of its size, as far as its features fit in memory (4 GiB, experiments/cache.py). What an earlier, stopped call
finished is not trained again.
"""

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from evaluate import ALPHAS
from experiments.cache import Known, remembered
from image_stage import REGION
from modules import Features
from support.backbone import BACKBONES
from support.benchmarks import keypoint_set
from support.files import read_checkpoint
from support.run import command, processes
from train import Cascade, Config, parse_config, train

# What changes against the full cascade, and where its row is read. Without saliency every cell is foreground.
# No gradient of a stage reaches the stage before it, so that (V) and (VI) stand in the full run, up to the
# gradient norm that all stages are clipped by together.
ABLATIONS = {
    "full": ({}, "pixel"),
    "ours, without consensus": ({"consensus": 0}, "pixel"),
    "4 (II) without saliency": ({"saliency_threshold": 0.0}, "pixel"),
    "4 (III) without Hough matching": ({"hough": False}, "pixel"),
    "4 (IV) L = 3": ({"hough_side": 3}, "pixel"),
    "4 (VI) L = 7": ({"hough_side": 7}, "pixel"),
    "4 (VII) shared attention": ({"shared_attention": True}, "pixel"),
    "5 (II) half the size": ({"size": 1 / 2}, "pixel"),
    "5 (III) three quarters of the size": ({"size": 3 / 4}, "pixel"),
    "5 (V) without stage 3": ({}, "region"),
    "5 (VI) without stages 2 and 3": ({}, "image"),
}


class CachedCascade(Cascade):
    """A cascade whose frozen features are remembered from one row of the tables to the next."""

    def __init__(self, cfg: Config, known: Known) -> None:
        super().__init__(cfg)
        self.known = known

    def features(self, images: Tensor, saliency: Tensor | None = None) -> Features:
        return remembered(self.known, super().features, next(self.parameters()).device, images, saliency)


def measured(run: Config) -> dict | None:
    """The record of a run's PCK after its last step, if its folder holds one with these very options."""
    log, last = (Path(run.out) / name for name in ("metrics.jsonl", "last.pt"))
    if not (log.exists() and last.exists()):
        return None
    if read_checkpoint(str(last), Config, "train.py")["config"] != dataclasses.asdict(run):
        return None
    try:
        record = json.loads(log.read_text().splitlines()[-1])
        return record if "pck" in record and record["step"] == run.steps else None
    except (IndexError, ValueError, KeyError, TypeError):  # a kill may cut the file short
        return None


def row_config(cfg: Config, number: int, changes: dict) -> Config:
    """The run of one row: the full cascade's options, its changes, a folder of its own."""
    row = dataclasses.replace(cfg, **changes, out=str(Path(cfg.out) / str(number)))
    patch = BACKBONES[cfg.backbone].patch
    row.size = round(cfg.size * changes.get("size", 1) / patch) * patch
    return row


def ablate(cfg: Config) -> None:
    """Train what is missing of Tables 4 and 5 and print every row's PCK on --val.

    Raises ValueError in one line where a row could not be trained or measured.
    """
    if keypoint_set(cfg, "test") is None:
        raise ValueError("every row is measured on --val: name one")
    if cfg.only or cfg.checkpoint or cfg.stages < 3 or processes()[1] > 1:
        raise ValueError("every row trains all three stages from the start, in one process")
    smallest = 2 * REGION * BACKBONES[cfg.backbone].patch
    if cfg.size < smallest:
        raise ValueError(f"--size {cfg.size}: a row trains at half of it, and a region needs {smallest}")
    known, found = Known(), {}
    for number, (name, (changes, _)) in enumerate(ABLATIONS.items()):
        if name != "full" and not changes:
            continue
        row = row_config(cfg, number, changes)
        found[name] = measured(row)
        print(f"---- {name}{', finished before' * bool(found[name])}")
        if not found[name]:
            try:
                train(row, build=lambda row: CachedCascade(row, known))
            except SystemExit:  # Ctrl-C
                print("the rows before it are kept: the same command goes on with this one")
                raise
            found[name] = measured(row)
    print(f"PCK@{'/'.join(map(str, ALPHAS))} on {found['full']['on']}, per image, seed {cfg.seed}")
    for name, (changes, stage) in ABLATIONS.items():
        values = found[name if changes else "full"]["pck"][stage]
        print(f"{name:36s}" + "".join(f"{value:7.1f}" for value in values))


def main(argv: list[str] | None = None) -> None:
    with command():
        cfg, resume = parse_config(argv, description=__doc__, prog="python -m experiments.ablate")
        if resume:
            raise ValueError("--resume: give the same command again, and it trains the rows that are missing")
        ablate(cfg)


if __name__ == "__main__":
    main()
