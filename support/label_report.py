"""What came of a labelling run: counts, errors, precision where the truth is known, and pictures."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import data
from support.files import write_whole
from support.pictures import draw_histograms, draw_pair, error_legend, picture_page
from support.shapes import Shapes, corresponding_points
from support.shards import Members, Records

KINDS = ("kept", "dropped pairs", "dropped images")


def every_pair(pairs: Records, dropped: Records) -> Iterator[tuple[str, int, int, dict, dict]]:
    """(kind, shard, place in it, record, pair) of the pairs of kept images and of those of dropped ones."""
    for records in (pairs, dropped):
        for shard, record in enumerate(records):
            for place, pair in enumerate(record["pairs"]):
                kind = "kept" if pair["kept"] else "dropped images" if records is dropped else "dropped pairs"
                yield kind, shard, place, record, pair


def right_matches(images: Shapes, pair: dict) -> list[bool]:
    """Which matches of a pair of shapes lie within a tenth of the target's box of the true partner."""
    src, trg = (images.draw(pair[side]) for side in ("src", "trg"))
    truth = corresponding_points(src, trg, np.array(pair["src_kps"]))
    x0, y0, x1, y1 = trg["bbox"]
    return (np.linalg.norm(pair["trg_kps"] - truth, axis=1) <= 0.1 * max(x1 - x0, y1 - y0)).tolist()


def face_alike(images: Shapes, pair: dict) -> bool:
    """Whether both objects of a pair of shapes are drawn facing the same way: their polygons wind alike."""
    outlines = (images.draw(pair[side])["parts"][0] for side in ("src", "trg"))
    src, trg = ((np.roll(z, -1) * z.conj()).imag.sum() for z in outlines)  # twice the signed areas
    return bool(src * trg > 0)


def precision_table(judged: list[tuple[str, float, bool, bool]], cap: float) -> dict[str, list]:
    """Share of right matches in per cent, and their number, by kind and, of kept ones, by facing and by
    quarters of the loop error up to its cap. judged: (kind, loop error, right, whether its pair faces alike)
    of every match."""
    rows = {kind: [right for what, _, right, _ in judged if what == kind] for kind in KINDS}
    for name, alike in (("kept, facing alike", True), ("kept, facing opposite ways", False)):
        rows[name] = [right for what, _, right, same in judged if what == "kept" and same == alike]
    edges = np.linspace(0, min(cap, 1), 5)
    for low, high in zip(edges, edges[1:]):
        name = f"kept, loop error {100 * low:.1f} to {100 * high:.1f} %"
        last = high == edges[-1]
        mine = [(e, right) for what, e, right, _ in judged if what == "kept"]
        rows[name] = [right for e, right in mine if low <= e and (e < high or last)]
    return {name: [round(100 * float(np.mean(some)), 1), len(some)] for name, some in rows.items() if some}


def quantiles(values: list[float]) -> list[float]:
    """Minimum, quartiles and maximum."""
    return [round(float(v), 4) for v in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))]


def class_rows(images: data.ImageSet, measured, kept: Members) -> dict[str, dict]:
    """What the summary says of every class, the counts of its pairs still at 0."""
    rows = {}
    for k, (name, members) in enumerate(zip(images.classes, images.members())):
        mine = [i for i in members if i in measured.errors]
        rows[name] = {
            "images": len(members),
            "measured": len(mine),
            "loops": min((measured.loops[i] for i in mine), default=0),
            "error": round(float(np.mean([measured.errors[i] for i in mine])), 4) if mine else None,
            "kept": len(kept.get(k, [])),
        } | dict.fromkeys(("trn", "val", "points"), 0)
    return rows


def image_counts(cfg, images: data.ImageSet, seen: int, singles, measured) -> dict[str, int]:
    """Where images were left: of those seen, every one is counted once below."""
    counts = {"seen": seen + len(images.empty), "unreadable": len(measured.skipped) + len(images.empty)}
    if cfg.detector:
        counts["without_a_single_object"] = seen - len(singles.boxes) - len(singles.skipped)
    counts |= {"without_foreground": len(measured.empty), "measured": len(measured.errors)}
    # in classes or cliques of less than three
    return counts | {"alone": 2 * counts["seen"] - sum(counts.values())}


def summarise(cfg, images: data.ImageSet, members: Members, singles, measured,
              kept: Members, pairs: Records, dropped: Records, cap: float) -> dict:
    """The content of summary.json from what label.py's steps were given and returned.

    cap: the largest error of a loop. Where the truth is known, "precision" is precision_table of every match.
    """
    rows, used, scores, judged = class_rows(images, measured, kept), set(), [], []
    for kind, _, _, record, pair in every_pair(pairs, dropped):
        if kind == "kept":
            used |= {pair["src"], pair["trg"]}
            scores.append(pair["score"])
            row = rows[images.classes[record["class"]]]
            row[record["split"]] += 1
            row["points"] += len(pair["errors"])
        if isinstance(images, Shapes):
            alike = face_alike(images, pair)
            judged += [(kind, *both, alike) for both in zip(pair["errors"], right_matches(images, pair))]
    counts = image_counts(cfg, images, sum(map(len, members.values())), singles, measured)
    summary = {
        "config": dataclasses.asdict(cfg),
        "box": "detector" if cfg.detector else "foreground",
        "images": counts | {"kept": sum(map(len, kept.values())), "used": len(used)},
        "loops": sum(measured.loops.values()),
        "volumes": (1 + cfg.facing) * (measured.volumes + sum(math.comb(len(r["images"]), 2) for r in pairs)),
        "pairs": {split: sum(row[split] for row in rows.values()) for split in ("trn", "val")},
        "points": sum(row["points"] for row in rows.values()),
        "image_error_quantiles": quantiles(list(measured.errors.values())),
        "pair_error_quantiles": quantiles(scores),
        "unreadable": sorted(measured.skipped.values()) + [f"empty file: {path}" for path in images.empty],
        "classes": rows,
    }
    return summary | ({"precision": precision_table(judged, cap)} if judged else {})


def draw_pages(out: Path, images: data.ImageSet, pairs: Records, dropped: Records, count: int) -> None:
    """Pictures in OUT/drawn: `count` kept pairs, the best, the worst and any, and any that were not kept."""
    of: dict[str, list[tuple[float, int, int]]] = {kind: [] for kind in KINDS}
    for kind, shard, place, _, pair in every_pair(pairs, dropped):
        of[kind].append((pair["score"], shard, place))
    kept, *rest = (sorted(some) for some in of.values())

    def drawn_from(some: list) -> list:
        return [some[k] for k in np.random.default_rng(0).permutation(len(some))[:count]]

    pages = {"best": kept[:count], "worst": kept[::-1][:count], "typical": drawn_from(kept)}
    pages |= {kind.replace(" ", "_"): drawn_from(some) for kind, some in zip(KINDS[1:], rest)}
    (out / "drawn").mkdir(exist_ok=True)
    for name, some in pages.items():
        path, records = out / "drawn" / f"{name}.jpg", dropped if name == "dropped_images" else pairs
        path.unlink(missing_ok=True)
        if some:
            chosen = (records.read(shard)["pairs"][place] for _, shard, place in some)
            views = [draw_pair(images, pair) for pair in chosen]
            write_whole(path, picture_page([error_legend(), picture_page(views)], 0))


def draw_errors(images: data.ImageSet, errors: dict[int, float], kept: Members) -> Image.Image:
    """Histograms of the images' errors by class, those of kept images blue."""
    every: dict[str, list[float]] = {}
    for i, error in errors.items():
        every.setdefault(images.classes[images.labels[i]], []).append(error)
    best = {images.classes[k]: [errors[i] for i in some] for k, some in kept.items()}
    return draw_histograms(every, best)


def print_summary(summary: dict, out: str) -> None:
    """The summary in a dozen lines, and one a class."""
    heads = f"{'images':>8s}{'loops':>8s}{'error %':>9s}{'kept':>7s}{'trn':>8s}{'val':>7s}{'points':>9s}"
    print(f"{'class':24s}{heads}")
    for name, row in summary["classes"].items():
        error = "-" if row["error"] is None else f"{100 * row['error']:.1f}"
        counts = f"{row['kept']:7d}{row['trn']:8d}{row['val']:7d}{row['points']:9d}"
        print(f"{name[:23]:24s}{row['measured']:8d}{row['loops']:8d}{error:>9s}{counts}")
    print("images: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in summary["images"].items()))
    print(f"boxes are those of the {summary['box']}")
    for text in summary["unreadable"][:5]:
        print(f"    {text}", file=sys.stderr)
    if summary["unreadable"]:
        print(f"    to read them again, delete {out}/work", file=sys.stderr)
    pairs = sum(summary["pairs"].values())
    print(f"{summary['loops']:,} closed loops and {pairs:,} pairs from {summary['volumes']:,} volumes")
    for name in ("image", "pair"):
        values = " ".join(f"{100 * v:.1f}" for v in summary[f"{name}_error_quantiles"])
        print(f"{name} errors, minimum, quartiles and maximum, in % of the box: {values}")
    for kind, (share, count) in summary.get("precision", {}).items():
        print(f"right within a tenth of the box, {kind}: {share} % of {count:,} matches")
    trn, val = summary["pairs"].values()
    points = summary["points"] / pairs
    print(f"{out}/SC-ImageNet: {trn:,} trn and {val:,} val pairs, {points:.1f} points a pair")


def report(cfg, images: data.ImageSet, members: Members, singles, measured,
           kept: Members, pairs: Records, dropped: Records, cap: float) -> dict:
    """`summarise`, into OUT/summary.json, and print it; with cfg.draw, pictures in OUT/drawn."""
    out = Path(cfg.out)
    summary = summarise(cfg, images, members, singles, measured, kept, pairs, dropped, cap)
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    if cfg.draw:
        draw_pages(out, images, pairs, dropped, cfg.draw)
        write_whole(out / "drawn" / "errors.png", draw_errors(images, measured.errors, kept))
    print_summary(summary, cfg.out)
    return summary
