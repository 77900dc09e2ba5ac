"""Pictures of matches, of PCK over its threshold, of labelled pairs and of loop errors.

What is judged elsewhere is handed in: which points are right, and the curves.
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import data
from support.files import write_whole

GREEN, RED, YELLOW = (40, 200, 60), (230, 40, 40), (250, 210, 40)


def hsv(hue: int, saturation: int, value: int) -> tuple[int, int, int]:
    """A colour of Pillow's HSV space, 0 to 255 each, as RGB."""
    return Image.new("HSV", (1, 1), (hue, saturation, value)).convert("RGB").getpixel((0, 0))


def draw_matches(src: Image.Image, trg: Image.Image, src_kps: Tensor, trg_kps: Tensor,
                 truth: Tensor | None = None, right: Tensor | None = None, height: int = 256,
                 colours: list[tuple[int, int, int]] | None = None) -> Image.Image:
    """Two images side by side at one height, matches joined by lines.

    src_kps, trg_kps, truth (n, 2) in their image's pixels. With truth, crosses mark it and a line is green
    where `right` (n,) holds and red elsewhere; without, every line has its own hue, or its own of the given
    colours.
    """
    scales = [height / image.height for image in (src, trg)]
    views = [image.resize((max(1, round(image.width * s)), height)) for image, s in zip((src, trg), scales)]
    canvas = Image.new("RGB", (views[0].width + views[1].width + 4, height), "white")
    canvas.paste(views[0], (0, 0))
    canvas.paste(views[1], (views[0].width + 4, 0))
    draw, shift = ImageDraw.Draw(canvas), torch.tensor([views[0].width + 4.0, 0.0])
    if colours is None and right is not None:
        colours = [GREEN if good else RED for good in right]
    elif colours is None:
        colours = [hsv(k * 255 // len(src_kps), 220, 255) for k in range(len(src_kps))]
    starts, ends = ((src_kps + 0.5) * scales[0]).tolist(), ((trg_kps + 0.5) * scales[1] + shift).tolist()
    crosses = [None] * len(ends) if truth is None else ((truth + 0.5) * scales[1] + shift).tolist()
    for (x, y), (u, v), cross, colour in zip(starts, ends, crosses, colours):
        draw.line((x, y, u, v), fill=colour, width=1)
        for cx, cy in ((x, y), (u, v)):
            draw.ellipse((cx - 3, cy - 3, cx + 3, cy + 3), fill=colour, outline="black")
        if cross:
            cx, cy = cross
            draw.line((cx - 4, cy, cx + 4, cy), fill=YELLOW, width=2)
            draw.line((cx, cy - 4, cx, cy + 4), fill=YELLOW, width=2)
    return canvas


def match_sheet(predictions: dict[str, list[Tensor]], right: dict[str, list[Tensor]],
                keypoints: data.KeypointSet, count: int = 10,
                numbers: list[int] | None = None) -> Image.Image:
    """A page of pairs, one column a method.

    predictions, right: by method, a pair each: places (n, 2) in target pixels, and which of them are right
    (n,). numbers: the pairs to draw; None: `count` that are spread over the set.
    """
    count = min(count, len(keypoints))
    numbers = [i * len(keypoints) // count for i in range(count)] if numbers is None else numbers
    rows = []
    for k in numbers:
        pair = keypoints.pairs[k]
        images = [keypoints.load(i)[0] for i in (pair.src, pair.trg)]
        rows.append([
            draw_matches(*images, pair.src_kps, predictions[m][k], pair.trg_kps, right[m][k], height=192)
            for m in predictions
        ])
    widths = [max(row[c].width for row in rows) for c in range(len(predictions))]
    page = Image.new("RGB", (sum(widths) + 8 * len(widths), 200 * len(rows) + 16), "white")
    draw, x = ImageDraw.Draw(page), 0
    for column, (name, width) in enumerate(zip(predictions, widths)):
        draw.text((x + 4, 2), name, fill="black")
        for r, row in enumerate(rows):
            page.paste(row[column], (x, 16 + 200 * r))
        x += width + 8
    return page


def ranked_pairs(pred: list[Tensor], right: list[Tensor], keypoints: data.KeypointSet, category: str,
                 count: int) -> list[int]:
    """The `count` worst, middle and best pairs of a category, in this order, by their share of right points,
    then by mean distance over the target's extent.
    """
    quality = []
    for number, pair in enumerate(keypoints.pairs):
        if pair.category == category:
            distance = (pred[number] - pair.trg_kps).norm(dim=-1) / pair.extent
            quality.append((float(right[number].float().mean()), -float(distance.mean()), number))
    order = [number for *_, number in sorted(quality)]
    middle = max(0, (len(order) - count) // 2)
    return list(dict.fromkeys(order[:count] + order[middle : middle + count] + order[-count:]))


def draw_curve(curves: dict[str, list[float]], alphas: tuple[float, ...]) -> Image.Image:
    """PCK in per cent over alpha, a line a method."""
    left, top, width, height = 50, 16, 480, 320
    page = Image.new("RGB", (left + width + 130, top + height + 40), "white")
    draw = ImageDraw.Draw(page)

    def at(alpha: float, pck: float) -> tuple[float, float]:
        return left + width * alpha / max(alphas), top + height * (1 - pck / 100)

    for pck in range(0, 101, 20):
        draw.line((*at(0, pck), *at(max(alphas), pck)), fill=(220, 220, 220))
        draw.text((left - 28, at(0, pck)[1] - 6), f"{pck}", fill="black")
    for alpha in alphas:
        draw.text((at(alpha, 0)[0] - 8, top + height + 4), f"{alpha:g}", fill="black")
    draw.text((left + width // 2, top + height + 22), "alpha", fill="black")
    row = top - 12
    for k, (name, values) in enumerate(sorted(curves.items(), key=lambda curve: -curve[1][-1])):
        row = max(row + 12, at(0, values[-1])[1] - 6)  # names of curves that end together stay apart
        colour = hsv(k * 255 // len(curves), 220, 200)
        draw.line([at(a, v) for a, v in zip(alphas, values)], fill=colour, width=2)
        draw.text((left + width + 6, row), f"{name} {values[-1]:.1f}", fill=colour)
    return page


def draw_results(folder: Path, predictions: dict[str, list[Tensor]], right: dict[str, list[Tensor]],
                 keypoints: data.KeypointSet, count: int, curves: dict[str, list[float]],
                 alphas: tuple[float, ...]) -> None:
    """Into a folder: a sheet a class, pairs ranked by the first method; PCK over alpha as curve and CSV."""
    first = next(iter(predictions))
    for category in sorted({p.category for p in keypoints.pairs}):
        numbers = ranked_pairs(predictions[first], right[first], keypoints, category, count)
        page = match_sheet(predictions, right, keypoints, numbers=numbers)
        write_whole(folder / f"{category.replace('/', '_')}.jpg", page)
    write_whole(folder / "curve.png", draw_curve(curves, alphas))
    rows, table = zip(alphas, *([f"{v:.2f}" for v in values] for values in curves.values())), io.StringIO()
    csv.writer(table).writerows([["alpha", *curves], *rows])
    write_whole(folder / "curve.csv", table.getvalue())


def draw_pair(images: data.ImageSet, pair: dict) -> Image.Image:
    """A labelled pair; matches from green (loops close) over yellow to red (a tenth of the box off)."""
    colours = [hsv(int(85 * (1 - min(e / 0.1, 1))), 230, 240) for e in pair["errors"]]
    points = (torch.tensor(pair[f"{side}_kps"]) for side in ("src", "trg"))
    pictures = (images.load(pair[side])[0] for side in ("src", "trg"))
    view = draw_matches(*pictures, *points, height=160, colours=colours)
    page = Image.new("RGB", (view.width, view.height + 14), "white")
    page.paste(view, (0, 14))
    name = images.classes[images.labels[pair["src"]]]
    ImageDraw.Draw(page).text((2, 1), f"{name}  loop error {100 * pair['score']:.1f} %", fill="black")
    return page


def picture_page(views: list[Image.Image], width: int = 1400) -> Image.Image:
    """Pictures of one height set in rows."""
    places, x, y = [], 0, 0
    step = max(view.height for view in views) + 4
    for view in views:
        if x and x + view.width > width:
            x, y = 0, y + step
        places.append((x, y))
        x += view.width + 8
    page = Image.new("RGB", (width, y + step), "white")
    for view, place in zip(views, places):
        page.paste(view, place)
    return page


def draw_histograms(errors: dict[str, list[float]], kept: dict[str, list[float]]) -> Image.Image:
    """Histograms of the images' errors by class, from 0 to the largest, best class first; kept ones green."""
    views, top = [], max(map(max, errors.values()))
    for name in sorted(errors, key=lambda n: np.mean(errors[n])):
        view = Image.new("RGB", (168, 76), "white")
        draw = ImageDraw.Draw(view)
        every, best = (np.histogram(e[name], 20, (0, top))[0] for e in (errors, kept))
        for k, (n, m) in enumerate(zip(every * 50 / every.max(), best * 50 / every.max())):
            draw.rectangle((4 + 8 * k, 72 - n, 10 + 8 * k, 72), fill=(190, 190, 200))
            draw.rectangle((4 + 8 * k, 72 - m, 10 + 8 * k, 72), fill=(40, 170, 70))
        draw.line((2, 73, 166, 73), fill="black")
        draw.text((4, 2), f"{name[:17]}  {100 * np.mean(errors[name]):.1f} %", fill="black")
        views.append(view)
    return picture_page(views)
