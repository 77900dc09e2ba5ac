"""The paper's headline (section 4.3) and its supplement's Figure 1, on a benchmark of SPair-71k's form.

    python -m experiments.headline --keypoints CUB6 --willow PF-WILLOW --labels runs/labels_photos \\
        --backbone-weights FILE --csv runs/headline.csv

CATs on frozen, cached features: (a) on keypoints alone, (b) then with SemiMatch, (c) on labels, then on
keypoints, (d) then with SemiMatch; on labels alone, and not trained at all. A line of the CSV is one run: its
row, the share of images that its labels were chosen from (--keep of label.py), annotated pairs, seed, best
step and score of the validation pairs, and PCK on test pairs at .05, .10 and .15, per image, by CATs' own
soft-argmax and by the project's ("kernel"). A fifth of trn chooses the step, no test pair does.
Runs that the CSV holds are not made again: a stopped command goes on, and rows, seeds and label sets can be
added.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

import numpy as np
from torch import Tensor

import data
from evaluate import ALPHAS, predict, score
from experiments.cache import Known
from experiments.cats import Cats, as_cats_reads
from experiments.finetune import CachedCats, FinetuneConfig, check, finetune
from modules import Features
from support.benchmarks import DATASETS
from support.files import read_state, write_whole
from support.pictures import draw_curve
from support.run import command, find_device

READINGS = ("cats", "kernel")
ROWS = ("frozen", "labels", "a", "c", "b", "d")  # b goes on from a, d from c, c from labels
KEYS = ("row", "share", "annotated", "seed")

# Chosen on the pairs that are held back: docs/finetuning.md.
ALIKE = dict(backbone="dinov2_vits14", levels="10", size=224, backbone_lr=0.0, augment=False, batch=4,
             cache_features=True, lr=1e-4, save_every=0)
LABELS = dict(epoch_steps=250, pretrain_epochs=4)
KEYPOINTS = dict(dataset="spair", epoch_steps=100, epochs=20, patience=5)
SEMI = dict(semi=True, beta=0.1)  # released recipe from trained CATs, but for its rate, 1e-6


class Remembered(CachedCats):
    """CATs on the frozen features of all runs, whose last volume is there for its other readings."""

    last = None, None, None  # source, target, volume

    def train(self, mode: bool = True) -> "Remembered":
        self.last = None, None, None  # the weights of its volume may change
        return super().train(mode)

    def forward(self, src: Features, trg: Features) -> Tensor:
        if self.training:
            return super().forward(src, trg)
        if self.last[0] is not src or self.last[1] is not trg:
            self.last = src, trg, super().forward(src, trg)
        return self.last[2]


def share_of(labels: str) -> float:
    """The share of images that a label set keeps, from the summary that label.py wrote into its folder."""
    try:
        return float(json.loads(Path(labels, "summary.json").read_text())["config"]["keep"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--labels {labels}: no summary.json of label.py in it ({error!r})") from None


def read_csv(path: str) -> dict[tuple, dict]:
    """The finished runs, {KEYS: row}."""
    if not Path(path).exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def check_csv(path: str, tests: dict[str, data.KeypointSet]) -> None:
    """ValueError unless the finished runs were scored on these test pairs, or the file can be begun."""
    scores = [f"{name} {reading} {a:g}" for name in tests for reading in READINGS for a in ALPHAS]
    if any(list(row) != [*KEYS, "step", "val", *scores, "seconds"] for row in read_csv(path).values()):
        raise ValueError(f"--csv {path}: its runs were scored on other test pairs; give --willow as before")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--csv {path}: no such folder")


def check_figure(path: str | None) -> None:
    """ValueError unless a picture can be written there."""
    kinds = ".png", ".jpg", ".jpeg"
    if path and (Path(path).suffix.lower() not in kinds or not Path(path).resolve().parent.is_dir()):
        raise ValueError(f"--figure {path}: a name that ends in .png or .jpg, in a folder that exists")


def append_csv(path: str, row: dict) -> None:
    """Add a finished run."""
    new = not Path(path).exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def checkpoint_of(out: str, row: str, share: str, annotated: str, seed: str) -> Path:
    """The best weights of a run."""
    phase = "pretrain" if row == "labels" else "finetune"
    return Path(out, f"{row}_{share}_{annotated}_{seed}", phase, "best.pt")


def train_row(args: argparse.Namespace, key: tuple, labels: str | None, known: Known) -> Cats:
    """Train one run, from the weights of the run that it goes on from; returns the best matcher."""
    row, share, annotated, seed = key
    own = dict(backbone_weights=args.backbone_weights, device=args.device)
    if row == "frozen":
        return Remembered(FinetuneConfig(**ALIKE, **own), True, known).to(find_device(args.device)).eval()
    if row == "labels":
        changes = ALIKE | LABELS | dict(pretrain=labels)
    else:
        changes = ALIKE | KEYPOINTS | dict(root=args.keypoints) | (SEMI if row in "bd" else {})
    out = checkpoint_of(args.out, *key).parents[1]
    before = {"b": ("a", share, annotated), "c": ("labels", share, "0"), "d": ("c", share, annotated)}
    if row in before:
        changes["checkpoint"] = str(checkpoint_of(args.out, *before[row], seed))
    cfg = FinetuneConfig(**changes, **own, annotated=int(annotated), seed=int(seed), out=str(out))
    check(cfg)
    return finetune(cfg, build=lambda cfg, load: Remembered(cfg, load, known))


def chosen_step(out: str, key: tuple) -> dict:
    """The step that the validation pairs chose, and their PCK at .10."""
    state = {"step": 0, "best": math.nan} if key[0] == "frozen" else read_state(str(checkpoint_of(out, *key)))
    return {"step": state["step"], "val": f"{state['best']:.2f}"}


def tested(matcher: Cats, tests: dict[str, data.KeypointSet]) -> dict:
    """PCK on test pairs, {"<set> <reading> <alpha>": per cent}."""
    found = {}
    for name, keypoints in tests.items():
        seen = as_cats_reads(keypoints, matcher.cfg.size)
        for reading, places in predict(matcher, seen, READINGS).items():
            values = score(places, seen)[seen.rule]["per_image"]
            found |= {f"{name} {reading} {a:g}": f"{v:.2f}" for a, v in zip(ALPHAS, values)}
    return found


def wanted_runs(args: argparse.Namespace) -> list[tuple[tuple, str | None]]:
    """(KEYS, label set) of every run that was asked for, those first that others go on from."""
    sets, found = {f"{share_of(labels):g}": labels for labels in args.labels}, []
    if len(sets) < len(args.labels):
        raise ValueError("--labels: two label sets of the same --keep")
    if not sets and set(args.rows) & {"labels", "c", "d"}:
        raise ValueError(f"--rows {' '.join(args.rows)}: give --labels, or --rows frozen a b")
    for seed in args.seeds:
        for row in (row for row in ROWS if row in args.rows):
            for share in sets if row in ("labels", "c", "d") else ["0"]:
                for annotated in map(str, args.annotated) if row in "abcd" else ["0"]:
                    found.append(((row, share, annotated, str(seed)), sets.get(share)))
    return found


def print_table(rows: dict[tuple, dict]) -> None:
    """Mean and standard deviation over seeds of every kind of run."""
    groups: dict[tuple, list[dict]] = {}
    for (row, share, annotated, _), found in sorted(rows.items()):
        groups.setdefault((row, share, annotated), []).append(found)
    columns = [name for name in next(iter(rows.values())) if name.endswith("0.1")]
    print(f"{'row, share, pairs (seeds)':28s}" + "".join(f"{name:>22s}" for name in ["val", *columns]))
    for (row, share, annotated), some in groups.items():
        text = f"{row}, {share}, {annotated} ({len(some)})"
        for name in ["val", *columns]:
            values = [float(found[name]) for found in some]
            text = f"{text:28s}" if name == "val" else text
            text += f"{np.mean(values):14.1f} +- {np.std(values):4.1f}"
        print(text)


def draw_figure(path: str, rows: dict[tuple, dict]) -> None:
    """Figure 1 of the supplement: PCK at .10 by CATs' own soft-argmax over the share of images that labels
    were chosen from, mean over seeds; where it is 0, without labels."""
    scores: dict[str, dict[float, list[float]]] = {}
    for (row, share, annotated, _), found in rows.items():
        pairs = "all" if annotated == "0" else annotated
        what = "labels alone" if row in ("frozen", "labels") else f"labels, then {pairs} pairs"
        for test in ("test", "willow"):
            if row not in "bd" and (value := found.get(f"{test} cats 0.1")):
                curve = scores.setdefault(f"{test}: {what}", {})
                curve.setdefault(float(share), []).append(float(value))
    shares = sorted({share for curve in scores.values() for share in curve})
    curves = {name: [np.mean(curve[x]) if x in curve else None for x in shares]
              for name, curve in scores.items() if sum(x > 0 for x in curve) > 1}
    if not curves:
        raise ValueError(f"--figure {path}: runs with labels of two shares at least; give --labels")
    values = [v for curve in curves.values() for v in curve if v is not None]
    span = 10 * math.floor(min(values) / 10), min(100, 10 * math.floor(max(values) / 10) + 10)
    page = draw_curve(curves, tuple(shares), "Share of images that labels are chosen from",
                      "share of every class's images; 0: no labels", "PCK at 0.10 (%)", span=span)
    write_whole(path, page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.headline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--keypoints", required=True, help="folder in SPair-71k's layout: trn is trained on, test is scored")
    add("--willow", help="folder of PF-WILLOW, scored too")
    add("--labels", nargs="*", default=[], help="label sets of label.py, each of its own --keep")
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all")
    add("--annotated", nargs="+", type=int, default=[100], help="pairs of trn; 0: all (default 100)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default 0 1 2")
    add("--backbone-weights", help="ViT-S/14's; default: downloaded")
    add("--csv", required=True, help="one line a finished run")
    add("--figure", metavar="FILE", help="picture of PCK over the share of images (supplement, Figure 1)")
    add("--out", default="runs/headline", help="folder for checkpoints (default runs/headline)")
    add("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    tests = {"test": DATASETS["spair"](args.keypoints, "test")}
    if args.willow:
        tests["willow"] = DATASETS["pfwillow"](args.willow, "test")
    check_csv(args.csv, tests)
    check_figure(args.figure)
    known = Known()
    for key, labels in wanted_runs(args):
        if key not in read_csv(args.csv):
            print("----", *key)
            start = time.perf_counter()
            matcher = train_row(args, key, labels, known)
            row = dict(zip(KEYS, key)) | chosen_step(args.out, key) | tested(matcher, tests)
            append_csv(args.csv, row | {"seconds": round(time.perf_counter() - start)})
    if rows := read_csv(args.csv):
        print_table(rows)
        if args.figure:
            draw_figure(args.figure, rows)


if __name__ == "__main__":
    with command():
        main()
