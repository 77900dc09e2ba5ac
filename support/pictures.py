"""Pictures of matches, of PCK and calibration, of labelled pairs and their loop errors, of whole warps.

What is judged elsewhere is handed in: which points are right, and the curves. Nothing is told by colour
alone: points bear numbers, right and wrong ones differ in shape, and so do the marks of curves.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import data
from support.files import write_whole

Colour = tuple[int, int, int]
# Okabe and Ito's, which colour-blind readers tell apart; points do without the black, their borders' colour
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
           (240, 228, 66), (0, 0, 0))
ERRORS = ((38, 70, 140), (33, 145, 140), (122, 209, 81), (253, 231, 37))  # ever lighter: grey tells them too
CORNERS = (((255, 225, 50), (235, 45, 100)), ((0, 190, 160), (60, 65, 225)))  # of colour_by_place
SHAPES = ((32, 0, 4), (4, 0, 6), (3, 0, 6), (4, 45, 6), (3, 180, 6))  # a curve's marks: sides, turn, radius
GREY = (190, 190, 200)
RADIUS, MARGIN, PAGE = 7, 10, 1400  # px: of a mark, what a mark on a border needs, the widest page
FINE = 3  # strokes are drawn this much larger and shrunk, which smooths them


def words(text: str, size: int = 12, left: int = 2) -> Image.Image:
    """A line of text of a font size, from `left` px on."""
    width = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((left, 0), text, font_size=size)[2]
    view = Image.new("RGB", (math.ceil(width) + 2, size + 6), "white")
    ImageDraw.Draw(view).text((left, size // 2 + 3), text, "black", anchor="lm", font_size=size)
    return view


def picture_page(views: list[Image.Image], width: float = PAGE, gap: int = 8) -> Image.Image:
    """Pictures set in rows of at most a width (0: one below the other); as wide as the widest row."""
    places, x, y, row = [], 0, 0, 0
    for view in views:
        if x and x + view.width > width:
            x, y, row = 0, y + row + gap, 0
        places.append((x, y))
        x, row = x + view.width + gap, max(row, view.height)
    page = Image.new("RGB", (max(x + v.width for v, (x, _) in zip(views, places)), y + row), "white")
    for view, place in zip(views, places):
        page.paste(view, place)
    return page


def at_height(image: Image.Image, height: int) -> Image.Image:
    return image.resize((max(1, round(image.width * height / image.height)), height))


def placed(kps: Tensor, image: Image.Image, view: Image.Image, margin: int = 0) -> Tensor:
    """Points (n, 2) in an image's pixels to px of a view of it in a margin; points too near to the view's
    border for a whole mark are moved inward."""
    places = (kps + 0.5) * (view.height - 2 * margin) / image.height + margin
    return places.minimum(torch.tensor(view.size) - MARGIN).clamp(min=MARGIN)


def mark(view: Image.Image, places: Tensor, colours: list[Colour] | None = None, right: Tensor | None = None,
         links: Tensor | None = None) -> None:
    """Draw points 1, 2, ... on a view. places, links (n, 2) in its px; right (n,) bool.

    Points are circles, lines join them to their links. With `right`, wrong ones are squares, and only they
    have lines, which end in rings.
    """
    layer = Image.new("RGBA", (FINE * view.width, FINE * view.height))
    draw = ImageDraw.Draw(layer)
    colours = colours or [PALETTE[k % 7] for k in range(len(places))]
    good = [True] * len(places) if right is None else right.tolist()
    at, ends = ([] if some is None else (FINE * some).round().tolist() for some in (places, links))
    joined = [link for link, g in zip(zip(at, ends, colours), good) if right is None or not g]

    def fill(shape, centre: list[float], *rims: tuple[float, str | tuple]) -> None:
        for radius, colour in rims:
            corners = ([c - FINE * radius for c in centre], [c + FINE * radius - 1 for c in centre])
            shape([round(c) for corner in corners for c in corner], colour)

    for width, halo in ((8, (255, 255, 255, 150)), (4, None)):
        for start, end, colour in joined:
            draw.line((*start, *end), halo or colour, width)
    for _, end, colour in joined if right is not None else ():
        fill(draw.ellipse, end, (6.5, "white"), (5.5, colour), (3.5, (0, 0, 0, 0)))
    for k, (centre, colour, g) in enumerate(zip(at, colours, good), 1):
        if g:
            fill(draw.ellipse, centre, (RADIUS + 2, "black"), (RADIUS + 1, "white"), (RADIUS, colour))
        else:
            fill(draw.rectangle, centre, (RADIUS + 2, "white"), (RADIUS + 1, "black"), (RADIUS - 1, colour))
        light = sum(w * (c / 255) ** 2.2 for w, c in zip((0.2126, 0.7152, 0.0722), colour))
        ink = "black" if light > 0.18 else "white"  # where the contrast of both is the same
        draw.text(centre, f"{k}", ink, anchor="mm", font_size=10 * FINE, stroke_width=1)
    layer = layer.reduce(FINE)
    view.paste(layer, (0, 0), layer)


def draw_matches(src: Image.Image, trg: Image.Image, src_kps: Tensor, trg_kps: Tensor, height: int = 360,
                 colours: list[Colour] | None = None) -> Image.Image:
    """Two images side by side at one height, matches (n, 2) in their image's pixels joined by lines."""
    views = [at_height(image, height) for image in (src, trg)]
    page = picture_page(views, math.inf, gap=4)
    starts, ends = placed(src_kps, src, views[0]), placed(trg_kps, trg, views[1])
    mark(page, ends + torch.tensor([views[0].width + 4, 0]), colours, links=starts)
    mark(page, starts, colours)
    return page


def draw_transfer(src: Image.Image, trg: Image.Image, src_kps: Tensor, truth: Tensor,
                  predictions: dict[str, Tensor], right: dict[str, Tensor], title: str,
                  height: int = 192) -> Image.Image:
    """A pair: the source and, once a method, the target with the places it found and, of wrong ones, the
    truth, (n, 2) in its pixels. right: by method, (n,) bool; the title goes on with their shares."""

    def panel(name: str, image: Image.Image, kps: Tensor, good: Tensor | None = None) -> Image.Image:
        view = ImageOps.expand(ImageOps.expand(at_height(image, height), 1, GREY), MARGIN - 1, "white")
        places, links = (placed(points, image, view, MARGIN) for points in (kps, truth))
        mark(view, places, right=good, links=None if good is None else links)
        return picture_page([words(name, left=MARGIN), view], 0, gap=0)

    panels = [panel("source", src, src_kps), *(panel(m, trg, predictions[m], right[m]) for m in predictions)]
    shares = " -> ".join(f"{int(right[m].sum())}/{len(truth)}" for m in predictions)
    return picture_page([words(f"{title}  {shares}", 15, MARGIN), picture_page(panels, gap=0)], 0, gap=0)


def match_legend() -> Image.Image:
    """What the marks of draw_transfer mean."""
    icons, wrong = [Image.new("RGB", (20, 20), "white") for _ in range(3)], torch.tensor([False])
    centre, beyond = torch.tensor([[10.0, 10.0]]), torch.tensor([[-30.0, 10.0]])
    mark(icons[0], centre)
    mark(icons[1], centre, right=wrong, links=centre)
    mark(icons[2], beyond, right=wrong, links=centre)
    texts = ("right: within 0.10 of the longer side of the target's box", "wrong", "its true place")
    row = picture_page([view for icon, text in zip(icons, texts) for view in (icon, words(text))], math.inf)
    return ImageOps.expand(row, MARGIN, "white")


def match_sheet(predictions: dict[str, list[Tensor]], right: dict[str, list[Tensor]],
                keypoints: data.KeypointSet, count: int = 10,
                numbers: list[int] | None = None) -> Image.Image:
    """A page of pairs as draw_transfer shows them.

    predictions, right: by method, a pair each: places (n, 2) in target pixels, and which of them are right
    (n,). numbers: the pairs to draw; None: `count` that are spread over the set.
    """
    count, tiles = min(count, len(keypoints)), []
    for k in [i * len(keypoints) // count for i in range(count)] if numbers is None else numbers:
        pair = keypoints.pairs[k]
        images = (keypoints.load(i)[0] for i in (pair.src, pair.trg))
        found, good = ({method: some[method][k] for method in predictions} for some in (predictions, right))
        tiles.append(draw_transfer(*images, pair.src_kps, pair.trg_kps, found, good, pair.category))
    return picture_page([match_legend(), picture_page(tiles, gap=20)], 0)


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


def draw_curve(curves: dict[str, list[float | None]], xs: tuple[float, ...], title: str, x_label: str,
               y_label: str, diagonal: bool = False, span: tuple[int, int] = (0, 100)) -> Image.Image:
    """Curves in per cent over xs that ascend from 0 on; None and nan are gaps. The legend names last values.
    diagonal: xs go up to 1, and perfect calibration, y = 100 x, is dotted instead. span: of the axis of y."""
    left, top, width, height, limit = 64, 40, 480, 320, 1 if diagonal else max(xs)
    low, high = span
    values = {name: [math.nan if v is None else v for v in some] for name, some in curves.items()}
    last = {name: [v for v in some if v == v][-1:] for name, some in values.items()}
    order = sorted(curves, key=lambda name: last[name], reverse=True)
    ends = {name: f"  {last[name][0]:.1f}" if last[name] else "  -" for name in order}
    legend = [name if diagonal else name + ends[name] for name in order]
    legend += ["dotted: perfect calibration"] * diagonal
    across = left + max(width + 60 + max(words(line).width for line in legend), words(title, 15).width)
    page = Image.new("RGB", (FINE * across, FINE * max(top + height + 56, top + 20 * len(legend))), "white")
    draw = ImageDraw.Draw(page)

    def at(x: float, y: float) -> tuple[float, float]:
        up = (y - low) / (high - low)
        points = FINE * (left + width * x / limit), FINE * (top + height * (1 - up))
        return tuple(p if math.isnan(p) else round(p) + 1 for p in points)

    def text(x: float, y: float, line: str, anchor: str = "mm", size: int = 12) -> None:
        draw.text((FINE * x, FINE * y), line, "black", anchor=anchor, font_size=FINE * size)

    def stroke(k: int, points: list[tuple[float, float]], marks: list[tuple[float, float]]) -> None:
        colour, (sides, turn, radius) = PALETTE[k % len(PALETTE)], SHAPES[k % len(SHAPES)]
        for start, end in zip(points, points[1:]):
            if not math.isnan(start[1] + end[1]):
                draw.line((*start, *end), colour, 2 * FINE)
        for x, y in marks:
            if not math.isnan(y):
                draw.regular_polygon((x, y, FINE * radius), sides, turn, colour, "black", 2)

    for k in range(6):
        level, along = low + k / 5 * (high - low), limit * k / 5
        for ends in (((0, level), (limit, level)), ((along, low), (along, high))):
            draw.line((*at(*ends[0]), *at(*ends[1])), (222, 222, 222), FINE)
        text(left - 8, top + height * (1 - k / 5), f"{level:g}", "rm")
        text(left + width * k / 5, top + height + 14, f"{limit * k / 5:g}")
    for x, y in [at(k / 80, k / 0.8) for k in range(81)] * diagonal:
        draw.ellipse((x - FINE, y - FINE, x + FINE, y + FINE), (90, 90, 90))
    for k, line in enumerate(legend):
        text(left + width + 52, top + 10 + 20 * k, line, "lm")
    for k, name in enumerate(order):
        x, y = FINE * (left + width + 16), FINE * (top + 10 + 20 * k)
        stroke(k, [(x, y), (x + 28 * FINE, y)], [(x + 14 * FINE, y)])
        points = [at(*point) for point in zip(xs, values[name])]
        stroke(k, points, points)
    text(left, 18, title, "lm", 15)
    text(left + width / 2, top + height + 38, x_label)
    page, side = page.reduce(FINE), words(y_label).rotate(90, expand=True)
    page.paste(side, (8, top + (height - side.height) // 2))
    return page


def draw_results(folder: Path, predictions: dict[str, list[Tensor]], right: dict[str, list[Tensor]],
                 keypoints: data.KeypointSet, count: int, curves: dict[str, list[float]],
                 alphas: tuple[float, ...], rule: str | None = None) -> None:
    """Into a folder: a sheet a class, pairs ranked by the first method; PCK over alpha as curve and CSV.

    rule: the curves' d, "bbox" or "img"; None: the benchmark's own.
    """
    first = next(iter(predictions))
    for category in sorted({p.category for p in keypoints.pairs}):
        numbers = ranked_pairs(predictions[first], right[first], keypoints, category, count)
        page = match_sheet(predictions, right, keypoints, numbers=numbers)
        write_whole(folder / f"{category.replace('/', '_')}.jpg", page)
    title = f"PCK on {keypoints.name}, {len(keypoints)} pairs"
    what = {"bbox": "box", "img": "image"}[rule or keypoints.rule]
    page = draw_curve(curves, alphas, title, f"alpha (share of the longer side of the {what})", "PCK (%)")
    write_whole(folder / "curve.png", page)
    rows, table = zip(alphas, *([f"{v:.2f}" for v in values] for values in curves.values())), io.StringIO()
    csv.writer(table).writerows([["alpha", *curves], *rows])
    write_whole(folder / "curve.csv", table.getvalue())


def error_colour(error: float) -> Colour:
    """A loop error over the box's longer side: dark blue where loops close, yellow from a tenth on."""
    steps = np.linspace(0, 0.1, len(ERRORS))
    return tuple(round(float(np.interp(error, steps, channel))) for channel in zip(*ERRORS))


def error_legend() -> Image.Image:
    """The colours of draw_pair."""
    bar = Image.new("RGB", (201, 18))
    for k in range(201):
        bar.paste(error_colour(k / 2000), (k, 0, k + 1, 18))
    return picture_page([words("loop error  0 %"), bar, words("10 % of the box or more")])


def draw_pair(images: data.ImageSet, pair: dict) -> Image.Image:
    """A labelled pair, its matches in the colours of their loop errors."""
    points = (torch.tensor(pair[f"{side}_kps"]) for side in ("src", "trg"))
    pictures = (images.load(pair[side])[0] for side in ("src", "trg"))
    view = draw_matches(*pictures, *points, height=224, colours=[error_colour(e) for e in pair["errors"]])
    name = images.classes[images.labels[pair["src"]]]
    return picture_page([words(f"{name}  loop error {100 * pair['score']:.1f} % of the box"), view], 0, gap=0)


def draw_histograms(errors: dict[str, list[float]], kept: dict[str, list[float]]) -> Image.Image:
    """Histograms of the images' errors by class, from 0 to the largest, best class first; kept ones blue."""
    views, top = [], max(map(max, errors.values()))
    for name in sorted(errors, key=lambda n: np.mean(errors[n])):
        view = Image.new("RGB", (232, 74), "white")
        draw = ImageDraw.Draw(view)
        every, best = (np.histogram(e[name], 20, (0, top))[0] for e in (errors, kept))
        for counts, colour in ((every, GREY), (best, PALETTE[0])):
            for k in counts.nonzero()[0]:
                draw.rectangle((6 + 11 * k, 54 - 50 * counts[k] / every.max(), 14 + 11 * k, 54), colour)
        draw.line((4, 55, 227, 55), "black")
        for x, line, anchor in ((4, "0", "lm"), (227, f"{100 * top:.1f} %", "rm")):
            draw.text((x, 65), line, "black", anchor=anchor, font_size=12)
        share = f"{100 * np.mean(errors[name]):.1f} %, kept {len(kept[name])} of {len(errors[name])}"
        views.append(picture_page([words(f"{name[:15]}  {share}", left=4), view], 0, gap=0))
    axes = "across: an image's loop error in % of the box;  up: images, the fullest bin to full height"
    swatches = [Image.new("RGB", (18, 18), colour) for colour in (GREY, PALETTE[0])]
    legend = [swatches[0], words("all images"), swatches[1], words("kept"), words(axes)]
    return picture_page([picture_page(legend), picture_page(views)], 0)


def colour_by_place(height: int, width: int) -> Image.Image:
    """A colour a place: those of four corners, blended."""
    corners = Image.fromarray(np.array(CORNERS, np.uint8))
    return corners.resize((width, height), Image.Resampling.BILINEAR, (0.5, 0.5, 1.5, 1.5))


def sampled(image: Image.Image, places: Tensor) -> Tensor:
    """An image at places (h, w, 2) in its pixels, bilinear, beyond its border continued: (h, w, 3)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    grid = (places + 0.5) / torch.tensor(image.size) * 2 - 1
    return F.grid_sample(pixels, grid[None], padding_mode="border", align_corners=False)[0].permute(1, 2, 0)


def draw_warp(src: Image.Image, trg: Image.Image, places: Tensor, mask: Tensor, back: Tensor,
              back_mask: Tensor) -> Image.Image:
    """Four panels: both images coloured by the source place of every pixel, the target warped to the source,
    and that in every other square over the source.

    places (H, W, 2): where each source pixel lies, in target pixels; mask (H, W) bool: the source's
    foreground. back (H', W', 2), back_mask (H', W'): the same from target to source.
    """
    own = torch.stack(torch.meshgrid(torch.arange(src.width), torch.arange(src.height), indexing="xy"), -1)
    inside = own[mask] if mask.any() else own.flatten(0, 1)
    corner, size = inside.amin(0), inside.amax(0) - inside.amin(0) + 1
    colours, panels = colour_by_place(int(size[1]), int(size[0])), {}
    for caption, image, found, seen in (("source coloured by place", src, own, mask),
                                        ("target, coloured by where it matches", trg, back, back_mask)):
        # grey, since an object's own colours would pass for places
        grey = torch.from_numpy(np.array(image.convert("L"))).float()[..., None]
        tinted = 0.3 * grey + 0.7 * sampled(colours, found - corner)
        panels[caption] = tinted.where(seen[..., None], 0.4 * grey + 153)
    warped = sampled(trg, places).where(mask[..., None], torch.tensor(255.0))
    squares = mask & ((own // max(1, src.height // 8)).sum(-1) % 2 == 0)
    panels["target pulled into the source's frame"] = warped
    panels["half and half"] = warped.where(squares[..., None], torch.from_numpy(np.array(src)).float())
    views = [(words(c), at_height(Image.fromarray(p.round().byte().numpy()), 256)) for c, p in panels.items()]
    tiles = [picture_page(both, 0, gap=2) for both in views]
    return picture_page([picture_page(row, math.inf, gap=20) for row in (tiles[:2], tiles[2:])], 0)
