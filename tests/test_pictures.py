"""What pictures show: marks, numbers, shapes, rings, wrapped sheets, curves, label colours, warps."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from data import KeypointPair, KeypointSet
from evaluate import right_at_ten
from support.pictures import (
    CORNERS,
    ERRORS,
    GREY,
    MARGIN,
    PAGE,
    PALETTE,
    colour_by_place,
    draw_curve,
    draw_histograms,
    draw_matches,
    draw_pair,
    draw_results,
    draw_transfer,
    draw_warp,
    error_legend,
    match_legend,
    match_sheet,
    picture_page,
    ranked_pairs,
    words,
)

GREEN, DUSK, WHITE = (70, 110, 60), (90, 90, 110), (255, 255, 255)
BOX = (0.0, 0.0, 30.0, 20.0)
LINE = 90  # a thin line covers two thirds of one of two pixels beside it


class Pictures:
    """Images in memory in the place of an ImageSet."""

    classes, labels = ["duck"], [0] * 100

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def load(self, index: int) -> tuple[Image.Image, None]:
        return self.images[index], None


def pixel(page: Image.Image, x: float, y: float) -> tuple[int, int, int]:
    """The pixel of a picture that holds a place in px from its corner."""
    return page.getpixel((math.floor(x), math.floor(y)))


def near(colour: tuple, other: tuple, within: float = 12) -> bool:
    return max(abs(a - b) for a, b in zip(colour, other)) <= within


def patch(page: Image.Image, x: float, y: float, radius: int = 5) -> np.ndarray:
    """The inside of a mark: its colour and number."""
    left, top = math.floor(x), math.floor(y)
    return np.array(page.crop((left - radius, top - radius, left + radius, top + radius)), int)


def coloured(page: Image.Image, colour: tuple) -> np.ndarray:
    """(rows, columns) of the pixels of exactly this colour."""
    return np.stack((np.array(page) == colour).all(-1).nonzero())


# ------------------------------------------------------------------------------------------------------------
# Two pictures and their matches


def nine_matches(height: int = 360) -> tuple[Image.Image, list, list]:
    """Source 40 x 20 px, drawn 18 times larger, target 30 x 60 px, 6 times."""
    src, trg = Image.new("RGB", (40, 20), GREEN), Image.new("RGB", (30, 60), DUSK)
    xs = torch.tensor([4.0, 14, 29, 8, 22, 33, 12, 25, 18])
    src_kps = torch.stack([xs, 1.5 + 2.0 * torch.arange(9)], 1)
    trg_kps = torch.stack([0.6 * xs + 3, 3 * src_kps[:, 1] + 1.5], 1)
    page = draw_matches(src, trg, src_kps, trg_kps, height)
    starts = [((x + 0.5) * height / 20, (y + 0.5) * height / 20) for x, y in src_kps.tolist()]
    ends = [(2 * height + 4 + (x + 0.5) * height / 60, (y + 0.5) * height / 60) for x, y in trg_kps.tolist()]
    return page, starts, ends


@pytest.mark.parametrize("height", [180, 360])
def test_matches_are_marks_of_one_colour_in_both_pictures_joined_by_lines(height):
    page, starts, ends = nine_matches(height)
    assert page.size == (2 * height + 4 + height // 2, height)
    for k, (start, end) in enumerate(zip(starts, ends)):
        for x, y in (start, end):
            assert all(near(pixel(page, x + dx, y + dy), PALETTE[k % 7]) for dx, dy in ((0, -5.4), (0, 5.4)))
            assert all(pixel(page, x + dx, y + dy) in (GREEN, DUSK) for dx, dy in ((-7.4, -7.4), (7.4, 7.4)))
        assert near(patch(page, *start).mean((0, 1)), patch(page, *end).mean((0, 1)), 8)
        x, y = ((a + b) / 2 for a, b in zip(start, end))
        assert any(near(pixel(page, x, y + dy), PALETTE[k % 7], LINE) for dy in (-0.5, 0.5))
    assert pixel(page, 2 * height + 2, height - 3) == WHITE and pixel(page, 3, height - 3) == GREEN


def test_numbers_tell_points_of_one_colour_apart_and_contrast_with_it():
    page, starts, _ = nine_matches()
    first, eighth = (patch(page, *starts[k]) for k in (0, 7))
    assert PALETTE[7 % 7] == PALETTE[0] and np.abs(first - eighth).max() > 100
    for k, (x, y) in enumerate(starts):
        r, g, b = (c / 255 for c in PALETTE[k % 7])
        inside = patch(page, x, y, 4)
        light = 0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2
        reached = inside.max(-1).min() < 60 if light > 0.2 else inside.min(-1).max() > 190
        assert reached, (k, inside.min(), inside.max())
    assert {tuple(PALETTE[k]) for k in range(7)} == set(PALETTE) - {(0, 0, 0)}


def test_marks_on_the_border_are_seen_whole():
    src, trg = Image.new("RGB", (40, 20), GREEN), Image.new("RGB", (30, 60), DUSK)
    corners = (torch.tensor([[0.0, 0.0], [39.0, 19.0]]), torch.tensor([[29.0, 0.0], [0.0, 59.0]]))
    page = draw_matches(src, trg, *corners)
    for x, y, k in ((10, 10, 0), (710, 350, 1), (894, 10, 0), (734, 350, 1)):
        colour = PALETTE[k]
        assert near(pixel(page, x, y - 5.4), colour) and near(pixel(page, x, y + 5.4), colour)
        assert all(max(pixel(page, x, y + dy)) < 60 for dy in (-8.5, 8.5))  # the dark rim


def test_given_colours_are_those_of_marks_and_lines():
    src = Image.new("RGB", (40, 20), GREEN)
    kps = torch.tensor([[20.0, 4.0], [20.0, 14.0]])
    page = draw_matches(src, src, kps, kps, 200, [(250, 0, 0), (0, 0, 250)])
    for y, colour in ((45, (250, 0, 0)), (145, (0, 0, 250))):
        assert near(pixel(page, 205, y - 5.4), colour) and near(pixel(page, 609, y - 5.4), colour)
        assert any(near(pixel(page, 402, y + dy), colour, LINE) for dy in (-1, 0))
    empty = draw_matches(src, src, kps[:0], kps[:0], 200)
    assert empty.size == page.size and pixel(empty, 205, 45) == GREEN


# ------------------------------------------------------------------------------------------------------------
# Transfer: tiles and sheets


def one_tile(methods: int = 1) -> Image.Image:
    """Points 1 (right, 3 px below its truth) and 2 (wrong, 12 px beside it), drawn 8 times larger."""
    src, trg = Image.new("RGB", (24, 24), GREEN), Image.new("RGB", (48, 24), DUSK)
    src_kps, truth = torch.tensor([[5.0, 5.0], [0.0, 0.0]]), torch.tensor([[4.0, 4.0], [20.0, 15.0]])
    names = [f"method {k}" for k in range(methods)]
    found, right = truth + torch.tensor([[0.0, 3.0], [12.0, 0.0]]), torch.tensor([True, False])
    both = (dict.fromkeys(names, some) for some in (found, right))
    return draw_transfer(src, trg, src_kps, truth, *both, "car")


TOP = 21 + 18 + MARGIN  # title, caption, margin


def test_right_points_are_circles_and_wrong_ones_squares_led_to_a_ring_at_the_truth():
    page, left = one_tile(), 24 * 8 + 3 * MARGIN
    assert page.size == (24 * 8 + 48 * 8 + 4 * MARGIN, TOP + 192 + MARGIN)
    cells = ((4, 7), (32, 15), (20, 15))
    (x, y), (u, v), (a, b) = (((i + 0.5) * 8 + left, (j + 0.5) * 8 + TOP) for i, j in cells)
    assert near(pixel(page, x, y - 5.4), PALETTE[0]) and near(pixel(page, u, v - 5.4), PALETTE[1])
    for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        assert near(pixel(page, u + 5 * dx, v + 5 * dy), PALETTE[1])  # a corner of the square's inside
        assert max(pixel(page, u + 7 * dx, v + 7 * dy)) < 60  # and of its thick border
        assert pixel(page, x + 7.8 * dx, y + 7.8 * dy) == DUSK  # a circle has none
    for dx, dy in ((-4.5, 0), (0, -4.5), (0, 4.5)):
        assert near(pixel(page, a + dx, b + dy), PALETTE[1])
        assert pixel(page, x + dx, y + dy) != DUSK
        assert min(pixel(page, a + 1.4 * dx, b + 1.4 * dy)) > 130  # its light rim
    assert pixel(page, a, b) == DUSK and pixel(page, a + 9, b + 4) == DUSK  # hollow
    rings = [pixel(page, x + dx, y - 24 + dy) for dx in range(-7, 8) for dy in range(-7, 8)]
    assert set(rings) == {DUSK}  # none where a right point's truth is
    assert any(near(pixel(page, (a + u) / 2, b + dy), PALETTE[1], LINE) for dy in (-1, 0))
    # the source: two circles, and the one at the image's corner whole, in the margin
    x, y = 4 + MARGIN, 4 + TOP
    assert near(pixel(page, x, y - 5.4), PALETTE[1]) and max(pixel(page, x - 8.5, y)) < 60
    assert pixel(page, x - 7.8, y - 7.8) == WHITE and pixel(page, MARGIN + 30, TOP + 30) == GREEN
    assert pixel(page, 10 * 8 + MARGIN, 7.5 * 8 + TOP) == GREEN  # no line of its own, and none to the target:
    between = page.crop((MARGIN + 193, TOP, left - 1, TOP + 192))
    assert all(colour == WHITE for _, colour in between.getcolors())


def test_a_tile_names_class_shares_in_order_and_methods():
    truth = torch.tensor([[4.0, 4.0]] * 3)
    right = {"one": torch.tensor([True, False, False]), "two": torch.tensor([True, True, True])}
    image = Image.new("RGB", (24, 24), DUSK)
    page = draw_transfer(image, image, truth, truth, dict.fromkeys(right, truth), right, "car")
    for text, size, x, y in (("car  1/3 -> 3/3", 15, 0, 0), ("source", 12, 0, 21), ("one", 12, 212, 21),
                             ("two", 12, 424, 21)):
        expected = words(text, size, MARGIN)
        found = page.crop((x, y, x + expected.width, y + expected.height))
        assert np.array_equal(np.array(found), np.array(expected)), text
    narrow = draw_transfer(image, Image.new("RGB", (3, 24)), truth, truth, {"a long name of it": truth},
                           {"a long name of it": right["one"]}, "car")
    assert narrow.width == 212 + words("a long name of it", left=MARGIN).width


@pytest.mark.parametrize(("methods", "rows"), [(1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (8, 3)])
def test_the_targets_of_many_methods_wrap_and_the_source_is_drawn_once(methods, rows):
    page = one_tile(methods)
    # The source is 212 px wide with its margins, a target 404: two in the first row, three in the others.
    assert page.height == 21 + rows * (18 + 2 * MARGIN + 192) and page.width <= PAGE
    assert page.width == max(212 + 404 * min(methods, 2), 404 * min(max(0, methods - 2), 3))
    assert 0.97 * 192**2 < coloured(page, GREEN).shape[1] < 192**2
    assert 0.97 * methods * 384 * 192 < coloured(page, DUSK).shape[1] < methods * 384 * 192


def sheet_set(count: int) -> tuple[dict, KeypointSet]:
    """Pair k joins an image of red value 10 k, 40 x 20 or 20 x 20 px, to a gray one of 30 x 60 px."""
    sources = [Image.new("RGB", (40 if k % 2 else 20, 20), (10 * k, 0, 90)) for k in range(count)]
    images = Pictures([*sources, Image.new("RGB", (30, 60), DUSK)])
    kps, truth = torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 30.0]])
    pairs = [KeypointPair(k, count, kps, truth, "thing", BOX, BOX) for k in range(count)]
    return {"one": [truth] * count, "other": [truth + 6] * count}, KeypointSet("sheet", images, pairs)


@pytest.mark.parametrize(("count", "numbers", "shown"), [
    (6, None, [0, 2, 4]), (2, None, [0, 1]), (6, [5, 0, 3], [5, 0, 3]), (9, [*range(9)], [*range(9)]),
])  # fmt: skip
def test_a_sheet_wraps_at_the_pages_width_and_has_every_source_once_in_order(count, numbers, shown):
    predictions, keypoints = sheet_set(count)
    page = match_sheet(predictions, right_at_ten(predictions, keypoints), keypoints, 3, numbers)
    # A source is 384 or 192 px wide, a target 96, each in margins.
    widths = [(404 if k % 2 else 212) + 2 * 116 for k in shown]
    places, x, y = [], 0, match_legend().height + 8
    for width in widths:
        if x and x + width > 1400:
            x, y = 0, y + TOP + 192 + MARGIN + 20
        places.append((x, y))
        x += width + 20
    assert page.width == max(match_legend().width, *(x + w for (x, _), w in zip(places, widths))) <= 1400
    assert page.height == y + TOP + 192 + MARGIN
    for k, (x, y) in zip(shown, places):
        rows, columns = coloured(page, (10 * k, 0, 90))
        assert (columns.min(), rows.min()) == (x + MARGIN, y + TOP)
        wide = 384 if k % 2 else 192
        assert (columns.max(), rows.max()) == (x + MARGIN + wide - 1, y + TOP + 191)
        assert 0.97 * 192 * wide < len(rows) < 192 * wide
    assert len(shown) < 4 or len({y for _, y in places}) > 1
    legend = match_legend()
    assert np.array_equal(np.array(page.crop((0, 0, *legend.size))), np.array(legend))


def test_a_sheet_judges_points_at_alpha_010_of_the_box():
    """A miss of 6 px along both axes is 8.5 px: beyond 0.10 x 80 px, within it for a box of 90 px."""
    predictions, keypoints = sheet_set(2)
    boxes = [(5.0, 5.0, 9.0, 5 + d) for d in (80.0, 90.0)]
    keypoints.pairs = [pair._replace(trg_box=box) for pair, box in zip(keypoints.pairs, boxes)]
    page = match_sheet(predictions, right_at_ten(predictions, keypoints), keypoints, 2)
    x, y = 10.5 * 3.2 + 212 + 116 + MARGIN, 36.5 * 3.2 + TOP + match_legend().height + 8
    wrong, right = (pixel(page, x + shift + 7, y + 7) for shift in (0, 444 + 20 + 192))
    assert max(wrong) < 60 and right == DUSK


def test_the_legend_shows_a_circle_a_square_and_a_ring():
    legend = match_legend()
    x = MARGIN + 10
    texts = ["right: within 0.10 of the longer side of the target's box", "wrong", "its true place"]
    corners = []
    for text in texts:
        corners.append((pixel(legend, x + 7, 2 * MARGIN + 7), pixel(legend, x + 4.5, 2 * MARGIN),
                        pixel(legend, x, 2 * MARGIN), pixel(legend, x, 2 * MARGIN - 5.4)))
        expected = words(text)
        found = legend.crop((x + 18, MARGIN, x + 18 + expected.width, MARGIN + 18))
        assert np.array_equal(np.array(found), np.array(expected)), text
        x += 36 + expected.width
    assert corners[0][0] == WHITE and max(corners[1][0]) < 60 and corners[2][0] == WHITE
    assert all(near(corners[k][j], PALETTE[0]) for k, j in ((0, 3), (1, 3), (2, 1)))
    assert corners[2][2] == WHITE  # hollow
    assert legend.height == 2 * MARGIN + 20  # one line


def test_a_page_is_cropped_and_a_picture_wider_than_it_is_kept_whole():
    sizes = {(900, 20): DUSK, (492, 30): GREEN, (1500, 10): (9, 9, 9)}
    views = [Image.new("RGB", size, colour) for size, colour in sizes.items()]
    page = picture_page(views[:2])
    assert page.size == (1400, 30) and pixel(page, 908, 29) == GREEN and pixel(page, 904, 5) == WHITE
    page = picture_page([views[1], views[2], views[1]])
    assert page.size == (1500, 30 + 8 + 10 + 8 + 30) and pixel(page, 1499, 38) == (9, 9, 9)
    assert picture_page(views[:2], 0).size == (900, 58)


def test_no_letter_of_a_line_is_cut():
    for text, size in (("source", 12), ("Query, jumping: 10/10 -> 7/10", 15)):
        view, wide = words(text, size, 5), Image.new("RGB", (500, 60), "white")
        ImageDraw.Draw(wide).text((40, 20), text, "black", font_size=size)
        ink, all_ink = ((np.array(some.convert("L")) < 128).sum() for some in (view, wide))
        assert ink == all_ink > 0 and np.array(view)[:, :5].min() == 255


def test_ranked_pairs_are_the_worst_the_middle_and_the_best_of_a_class():
    """Pair k of class "a" has k % 5 of four points right; the more, the farther off the wrong ones."""
    truth, pairs, predictions, quality = torch.rand(4, 2) * 100, [], [], {}
    for k in [7, 3, 11, 0, 9, 1, 5, 8, 2, 10, 6, 4]:
        miss = torch.full((4, 1), 8.0)  # d is 90 px
        miss[: 4 - k % 5] = 10.0 * (1 + 3 * (k % 5)) + 0.1 * k
        miss -= 0.01 * k
        pairs.append(KeypointPair(0, 1, truth, truth, "a" if k < 11 else "b", BOX, (0.0, 0.0, 40.0, 90.0)))
        predictions.append(truth + miss * torch.tensor([[0.6, 0.8]]))
        if k < 11:
            quality[len(pairs) - 1] = (k % 5, -float(miss.mean()))
    order = sorted(quality, key=quality.get)
    keypoints = KeypointSet("some", Pictures([]), pairs)
    right = right_at_ten({"one": predictions}, keypoints)["one"]
    for count in (1, 2, 3):
        middle = (11 - count) // 2
        expected = order[:count] + order[middle : middle + count] + order[-count:]
        assert ranked_pairs(predictions, right, keypoints, "a", count) == expected
    assert ranked_pairs(predictions, right, keypoints, "a", 50) == order  # fewer than asked for: each once
    assert ranked_pairs(predictions, right, keypoints, "b", 2) == [2]
    assert ranked_pairs(predictions, right, keypoints, "c", 2) == []


# ------------------------------------------------------------------------------------------------------------
# Curves


def spot(x: float, y: float) -> tuple[float, float]:
    """Where a curve's point lies: 480 x 320 px from (64, 360) upward, x a share of the axis."""
    return 64 + 480 * x, 360 - 3.2 * y


def test_a_curve_runs_through_its_values_and_ends_at_the_last_alpha():
    alphas, values = (0.02, 0.04, 0.1), [10.0, 60.0, 85.0]
    page = draw_curve({"one": values}, alphas, "title", "x", "y")
    for alpha, value in [*zip(alphas, values), (0.03, 35.0), (0.07, 72.5)]:
        x, y = spot(alpha / 0.1, value)
        assert near(pixel(page, x, y), PALETTE[0], 40), (alpha, value)
        assert not any(near(pixel(page, x, y + dy), PALETTE[0], 60) for dy in (-25, 25))
    assert coloured(page.crop((60, 40, 66, 360)), PALETTE[0]).size == 0  # nothing before the first value
    steep = draw_curve({"one": [0.0, 100.0]}, (0.5, 1.0), "title", "x", "y")
    assert all(near(pixel(steep, *spot(*at)), PALETTE[0], 40) for at in ((1, 100), (0.75, 50)))
    part = draw_curve({"one": [30.0, 50.0]}, (0.0, 1.0), "title", "x", "y", span=(20, 60))
    assert all(near(pixel(part, *spot(*at)), PALETTE[0], 40) for at in ((0, 25), (0.5, 50), (1, 75)))


def test_empty_bins_are_gaps():
    xs = tuple(0.05 + 0.1 * k for k in range(10))
    for gap in (None, math.nan):
        curves = {"one": [gap, 50, 50, gap, 50, gap, 50, 50, 50, gap], "none": [gap] * 10}
        page = draw_curve(curves, xs, "t", "x", "y", diagonal=True)
        for x, drawn in ((0.15, True), (0.2, True), (0.25, True), (0.3, False), (0.35, False), (0.4, False),
                         (0.45, True), (0.55, False), (0.65, True), (0.8, True), (0.9, False), (0.1, False)):
            assert near(pixel(page, *spot(x, 50)), PALETTE[0], 40) == drawn, x
    whole = draw_curve({"one": [50] * 10}, xs, "t", "x", "y", diagonal=True)
    assert near(pixel(whole, *spot(0.35, 50)), PALETTE[0], 40)


def test_perfect_calibration_is_a_dotted_diagonal_over_the_whole_axis():
    level = {"one": [0.0, 0.0]}
    pages = [draw_curve(level, (0.05, 0.95), "t", "x", "y", dotted) for dotted in (True, False)]
    along = [[pixel(page, *spot(k / 960, k / 9.6)) for k in range(20, 941)] for page in pages]
    dark = [[max(colour) < 160 for colour in some] for some in along]
    assert not any(dark[1]) and 0.2 < np.mean(dark[0]) < 0.8
    assert 60 < np.diff(np.array(dark[0], int)).clip(0).sum() < 80  # dots, a gap after each
    x, y = spot(0.95, 0)
    assert near(pixel(pages[0], x, y), PALETTE[0], 40)  # the axis goes to 1


def test_curves_are_told_by_name_last_value_colour_and_shape_best_first():
    curves = {"poor": [5.0, 10.0], "good": [50.0, 90.0], "open": [30.0, None], "empty": [None, None]}
    page = draw_curve(curves, (0.1, 0.2), "A title", "alpha (share)", "PCK (%)")
    shapes = []
    for k, text in enumerate(("good  90.0", "open  30.0", "poor  10.0", "empty  -")):
        x, y = 560 + 14, 50 + 20 * k
        assert near(pixel(page, x, y), PALETTE[k], 30)
        shapes.append(np.abs(patch(page, x, y, 7) - 255).sum(-1) > 150)
        expected = np.array(words(text).convert("L"), float) < 128
        found = np.array(page.crop((594, y - 9, 594 + expected.shape[1], y + 9)).convert("L"), float) < 128
        assert abs(found.sum() - expected.sum()) < 0.35 * expected.sum()
    assert all((a ^ b).sum() > 8 for k, a in enumerate(shapes) for b in shapes[:k])
    rows = [np.array(draw_curve({"good": some}, (0.1, 0.2), "", "", "").crop((594, 41, 650, 59)))
            for some in ([50.0, 90.0], [90.0, 90.0], [90.0, 50.0])]
    assert np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[2])
    assert page.width >= 594 + words("poor  10.0").width
    long = draw_curve({"one": [1.0, 2.0]}, (0.1, 0.2), "A long title " * 10, "", "")
    assert np.array(long)[8:30, -40:].min() < 100 and np.array(long)[8:30, -2:].min() == 255
    many = draw_curve({f"method {k}": [k, k] for k in range(30)}, (0.1, 0.2), "t", "x", "y")
    assert near(pixel(many, 574, 50 + 20 * 29), PALETTE[29 % 8], 30)


def test_axes_have_labels_ticks_and_a_grid():
    plain, other = (draw_curve({"one": [0.0, 0.0]}, (0.05, 0.1), *three) for three in
                    (("A title", "alpha (share)", "PCK (%)"), ("", "", "")))
    for box in ((64, 8, 200, 30), (240, 388, 360, 410), (4, 150, 30, 250)):  # title, below, at the left
        assert np.array(plain.crop(box)).min() < 100 and np.array(other.crop(box)).min() == 255
    for k in range(1, 5):
        assert pixel(plain, *spot(0.1, 20 * k)) == (222, 222, 222) == pixel(plain, *spot(k / 5, 50))
        assert np.array(plain.crop((40, 350 - 64 * k, 58, 370 - 64 * k))).min() < 100
        assert np.array(plain.crop((44 + 96 * k, 366, 84 + 96 * k, 382))).min() < 100


@pytest.mark.parametrize(("rule", "given", "side"), [
    ("bbox", None, "box"), ("img", None, "image"), ("img", "bbox", "box"), ("bbox", "img", "image"),
])  # fmt: skip
def test_results_name_the_set_and_what_alpha_is_a_share_of(tmp_path, rule, given, side):
    predictions, keypoints = sheet_set(2)
    keypoints.rule, curves = rule, {"one": [10.0, 20.0], "other": [30.0, 40.0]}
    right = right_at_ten(predictions, keypoints)
    draw_results(tmp_path, predictions, right, keypoints, 1, curves, (0.05, 0.1), *[given] * bool(given))
    x_label = f"alpha (share of the longer side of the {side})"
    expected = draw_curve(curves, (0.05, 0.1), "PCK on sheet, 2 pairs", x_label, "PCK (%)")
    assert np.array_equal(np.array(Image.open(tmp_path / "curve.png")), np.array(expected))
    assert {p.name for p in tmp_path.iterdir()} == {"thing.jpg", "curve.png", "curve.csv"}


# ------------------------------------------------------------------------------------------------------------
# Labels


def test_labelled_pairs_are_coloured_by_loop_error_from_dark_to_light():
    images = Pictures([Image.new("RGB", (200, 160)), Image.new("RGB", (100, 160), DUSK)])
    pair = {"src": 0, "trg": 1, "errors": [0.0, 0.1 / 3, 0.05, 0.4], "score": 0.2}
    ys = [20, 60, 100, 140]
    pair |= {"src_kps": [[20, y] for y in ys], "trg_kps": [[50, y] for y in ys]}
    page = draw_pair(images, pair)
    assert page.size == (280 + 4 + 140, 18 + 224)
    middle = tuple((a + b) / 2 for a, b in zip(ERRORS[1], ERRORS[2]))
    for y, colour in zip(ys, (ERRORS[0], ERRORS[1], middle, ERRORS[3])):
        for x in (20.5 * 1.4, 284 + 50.5 * 1.4):
            assert near(pixel(page, x, 18 + (y + 0.5) * 1.4 - 5.4), colour), y
        assert any(near(pixel(page, 200, 18 + (y + 0.5) * 1.4 + dy), colour, LINE) for dy in (-1, 0))
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in ERRORS]
    assert all(b - a > 30 for a, b in zip(grey, grey[1:]))  # without any hue, too


def test_the_scale_of_loop_errors_runs_from_nought_to_a_tenth():
    legend, left = error_legend(), words("loop error  0 %").width + 8
    for share, colour in ((0, ERRORS[0]), (1 / 3, ERRORS[1]), (2 / 3, ERRORS[2]), (1, ERRORS[3])):
        assert near(pixel(legend, left + round(200 * share), 9), colour, 3)
    assert legend.width == left + 201 + 8 + words("10 % of the box or more").width


def test_histograms_show_all_images_grey_and_the_kept_ones_blue():
    errors = {"bad": [0.2] * 8 + [0.1] * 4, "good": [0.0] * 4 + [0.06] * 8}
    page = draw_histograms(errors, {"bad": [0.1] * 4, "good": [0.0] * 4 + [0.06] * 2})
    top = 18 + 8 + 18  # below legend and title; "good" comes first
    for x, bin_, full, blue in ((0, 0, 0.5, 0.5), (0, 6, 1, 0.25), (240, 10, 0.5, 0.5), (240, 19, 1, 0)):
        column = [pixel(page, x + 10 + 11 * bin_, top + y) for y in range(55)]
        assert column.count(PALETTE[0]) == pytest.approx(50 * blue, abs=1.5)
        assert column.count(GREY) == pytest.approx(50 * (full - blue), abs=1.5)
    assert pixel(page, 10 + 11 * 3, top + 54) == WHITE  # an empty bin
    assert pixel(page, 9, 9) == GREY and pixel(page, 43 + words("all images").width, 9) == PALETTE[0]


# ------------------------------------------------------------------------------------------------------------
# Warps


def test_colours_of_places_blend_those_of_four_corners():
    page = np.array(colour_by_place(31, 57), float)
    assert page.shape == (31, 57, 3)
    x, y = ((np.arange(n) + 0.5) / n for n in (57, 31))
    (a, b), (c, d) = np.array(CORNERS, float)
    across = [p + x[:, None] * (q - p) for p, q in ((a, b), (c, d))]
    expected = across[0] + y[:, None, None] * (across[1] - across[0])
    assert np.abs(page - expected).max() < 1.5
    corners = np.array(CORNERS, float).reshape(4, 3)
    assert min(math.dist(p, q) for k, p in enumerate(corners) for q in corners[:k]) > 150


def texture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 70).convert("RGB").resize((width, height))


def indices(width: int, height: int) -> torch.Tensor:
    return torch.tensor([[(x, y) for x in range(width)] for y in range(height)]).float()


def panels(page: Image.Image, *widths: int) -> list[np.ndarray]:
    """The four pictures of draw_warp, 256 px high, below their captions, 20 px."""
    captions = ("source coloured by place", "target, coloured by where it matches",
                "target pulled into the source's frame", "half and half")
    rooms = [max(words(text).width, width) for text, width in zip(captions, widths)]
    corners = [(0, 0), (rooms[0] + 20, 0), (0, 284), (rooms[2] + 20, 284)]  # two rows of two
    assert page.size == (max(rooms[0] + rooms[1], rooms[2] + rooms[3]) + 20, 2 * 276 + 8)
    for text, (x, y) in zip(captions, corners):
        expected = words(text)
        assert np.array_equal(np.array(page.crop((x, y, x + expected.width, y + 18))), np.array(expected))
    return [np.array(page.crop((x, y + 20, x + w, y + 276)), float) for (x, y), w in zip(corners, widths)]


def test_a_shifted_target_is_pulled_back_onto_the_source():
    """The target is the source, 31 px to the right in a wider picture."""
    src, trg = texture(200, 256), Image.new("RGB", (300, 256), WHITE)
    trg.paste(src, (31, 0))
    own, other, shift = indices(200, 256), indices(300, 256), torch.tensor([31.0, 0.0])
    mask = (own[..., 0] > 40) & (own[..., 1] > 60) & (own[..., 1] < 200)  # to the right border
    back_mask = torch.zeros(256, 300, dtype=torch.bool)
    back_mask[:, 31:231] = mask
    page = draw_warp(src, trg, own + shift, mask, other - shift, back_mask)
    first, second, pulled, half = panels(page, 200, 300, 200, 200)
    inside, pixels = mask.numpy(), np.array(src, float)
    assert np.abs(pulled - pixels)[inside].max() <= 1 and (pulled[~inside] == 255).all()
    assert np.abs(half - pixels).max() <= 1
    assert np.abs(second[:, 31:231] - first)[inside].max() <= 1
    # colours are stretched over the foreground's box, and blended with the photograph's tones
    colours = np.array(colour_by_place(139, 159), float)
    corners = [61, 61, 199, 199], [41, 199, 41, 199]
    expected = 0.7 * colours[[0, 0, -1, -1], [0, -1, 0, -1]] + 0.3 * pixels[corners]
    assert np.abs(first[corners] - expected).max() <= 1.5
    assert (first.max(-1) - first.min(-1))[~inside].max() == 0  # the background has no hue
    assert (second.max(-1) - second.min(-1))[~back_mask.numpy()].max() == 0


def test_a_mirrored_target_has_mirrored_colours_and_is_turned_back():
    src = texture(160, 256)
    trg, own, mask = ImageOps.mirror(src), indices(160, 256), torch.ones(256, 160, dtype=torch.bool)
    turned = torch.stack([159 - own[..., 0], own[..., 1]], -1)
    first, second, pulled, half = panels(draw_warp(src, trg, turned, mask, turned, mask), *[160] * 4)
    assert np.abs(pulled - np.array(src)).max() <= 1 and np.abs(half - np.array(src)).max() <= 1
    assert np.abs(second[:, ::-1] - first).max() <= 1 and np.abs(second - first).max() > 60


def test_half_and_half_shows_both_in_squares_within_the_mask():
    src, trg = Image.new("RGB", (320, 256), GREEN), Image.new("RGB", (100, 256), DUSK)
    mask = torch.zeros(256, 320, dtype=torch.bool)
    mask[64:192, 64:256] = True
    empty = torch.zeros(256, 100, dtype=torch.bool)
    page = draw_warp(src, trg, indices(320, 256) / 4, mask, indices(100, 256), empty)
    *_, pulled, half = panels(page, 320, 100, 320, 320)
    assert (pulled[64:192, 64:256] == DUSK).all()
    inner = (half[64:192, 64:256] == DUSK).all(-1)
    assert inner.mean() == 0.5 and inner[:32, :32].all() and inner[32:64, 32:64].all()
    assert not inner[:32, 32:64].any()
    outside = half.copy()
    outside[64:192, 64:256] = GREEN
    assert (outside == GREEN).all()


def test_places_between_pixels_are_blended_and_pictures_of_any_size_shown():
    """A ramp of 3 grey values a pixel, target 90 x 64 px, source 50 x 32 px: places at 1.5 x + 0.25."""
    ramp = np.repeat(np.arange(90, dtype=np.uint8)[None, :, None] * 2, 64, 0).repeat(3, 2)
    src, trg = Image.new("RGB", (50, 32)), Image.fromarray(ramp)
    own, full = indices(50, 32), torch.ones(32, 50, dtype=torch.bool)
    page = draw_warp(src, trg, own * 1.5 + 0.25, full, indices(90, 64), ~torch.ones(64, 90, dtype=torch.bool))
    *_, pulled, _ = panels(page, 400, 360, 400, 400)
    found = pulled[128, 4 + 8 * np.arange(5, 45)].mean(-1)
    assert np.abs(found - 2 * (1.5 * np.arange(5, 45) + 0.25)).max() < 2.1
    nothing = draw_warp(src, trg, own, ~full, indices(90, 64), ~torch.ones(64, 90, dtype=torch.bool))
    assert nothing.size == page.size and (panels(nothing, 400, 360, 400, 400)[2] == 255).all()
