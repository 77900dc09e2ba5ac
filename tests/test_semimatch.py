"""SemiMatch's pieces against loops over pixels and cells and against closed forms."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments import semimatch
from experiments.semimatch import PseudoLabels, SemiConfig, contrastive_loss, key_out, pseudo_labels, warp
from support.options import fields_with_groups

IDENTITY = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
STILL = torch.zeros(9, 2)
CONTROL = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shift(dx: int, dy: int, h: int, w: int) -> Tensor:
    """The affine map (2, 3) under which every pixel reads the one dx to its right and dy below it."""
    return torch.tensor([[1.0, 0, 2 * dx / w], [0, 1, 2 * dy / h]])


def random_warps(count: int, tps_scale: float = 0.4) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(5)
    return tuple(torch.stack(x) for x in zip(*(semimatch.draw_warp(rng, tps_scale) for _ in range(count))))


# ------------------------------------------------------------------------------------------------------------
# Literal forms


def centre(i: int, side: int) -> float:
    return (2 * i + 1) / side - 1


def affine_literal(affine: Tensor, x: float, y: float) -> tuple[float, float]:
    (a, b, c), (d, e, f) = affine.tolist()
    return a * x + b * y + c, d * x + e * y + f


def tps_literal(offsets: Tensor):
    """The spline through the nine moved control points as a function of (x, y), in float64 and by loops."""

    def kernel(x, y, u, v):
        squared = (x - u) ** 2 + (y - v) ** 2
        return squared * math.log(squared) if squared else 0.0

    system = np.zeros((12, 12))
    for i, (x, y) in enumerate(CONTROL):
        for j, (u, v) in enumerate(CONTROL):
            system[i, j] = kernel(x, y, u, v)
        system[i, 9:] = system[9:, i] = 1, x, y
    moved = np.zeros((12, 2))
    moved[:9] = np.array(CONTROL) + offsets.double().numpy()
    weights = np.linalg.inv(system) @ moved

    def spline(x, y):
        out = weights[9] + x * weights[10] + y * weights[11]
        for weight, (u, v) in zip(weights, CONTROL):
            out = out + weight * kernel(x, y, u, v)
        return tuple(out)

    return spline


def sample_literal(image: Tensor, place, mode: str) -> Tensor:
    """(C, H, W) read where place(x, y) says, pixel by pixel; what lies outside is zero."""
    h, w = image.shape[1:]
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            x, y = place(centre(j, w), centre(i, h))
            u, v = (x + 1) * w / 2 - 0.5, (y + 1) * h / 2 - 0.5  # in pixels
            if mode == "nearest":
                corners = [(round(u), round(v), 1.0)]
            else:
                u0, v0 = math.floor(u), math.floor(v)
                corners = [(m, n, (1 - abs(u - m)) * (1 - abs(v - n)))
                           for m in (u0, u0 + 1) for n in (v0, v0 + 1)]
            for m, n, weight in corners:
                if 0 <= m < w and 0 <= n < h:
                    out[:, i, j] += weight * image[:, n, m]
    return out


def warp_literal(image: Tensor, affine: Tensor, offsets: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Affine, then spline, on one image (C, H, W)."""
    spline, ones = tps_literal(offsets), torch.ones(1, *image.shape[1:], dtype=torch.float64)
    image = sample_literal(image.double(), lambda x, y: affine_literal(affine, x, y), mode)
    image = sample_literal(image, spline, mode)
    ones = sample_literal(ones, lambda x, y: affine_literal(affine, x, y), "bilinear")
    inside = sample_literal(ones, spline, "bilinear")[0] >= 0.9999
    return torch.where(inside, image, 0.0).float(), inside


def softmax_literal(values: list[float], temperature: float) -> list[float]:
    exps = [math.exp((v - max(values)) / temperature) for v in values]
    return [e / sum(exps) for e in exps]


def entropy_literal(p: list[float]) -> float:
    return -sum((v + 1e-6) * math.log(v + 1e-6) for v in p)


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def visible_literal(corr: Tensor, src_grid: tuple[int, int], trg_grid: tuple[int, int]) -> list[bool]:
    """The forward-backward check of one volume (Ns, Nt), flows as lists of (x, y)."""
    (_, ws), (_, wt) = src_grid, trg_grid
    forward, backward = [], []
    for t in range(corr.shape[1]):
        s = best(corr[:, t].tolist())
        forward.append((s % ws - t % wt, s // ws - t // wt))
    for s in range(corr.shape[0]):
        t = best(corr[s].tolist())
        backward.append((t % wt - s % ws, t // wt - s // ws))
    out = []
    for t, (fx, fy) in enumerate(forward):
        bx, by = backward[(t // wt + fy) * ws + t % wt + fx]
        lhs, rhs = (fx + bx) ** 2 + (fy + by) ** 2, fx * fx + fy * fy + bx * bx + by * by
        out.append(10 * lhs <= rhs + 5)  # in whole numbers
    return out


def in_box_literal(box: Tensor, x: int, y: int) -> bool:
    x0, y0, x1, y1 = map(round, box.tolist())
    return x0 <= x <= x1 and y0 <= y <= y1


def volume(batch: int, src_grid: tuple[int, int], trg_grid: tuple[int, int], noise: float = 0.15) -> Tensor:
    """A volume (B, Ns, Nt) that peaks where both grids agree in relative position, with noise."""
    ends = []
    for h, w in (src_grid, trg_grid):
        ends.append(torch.tensor([(centre(x, w), centre(y, h)) for y in range(h) for x in range(w)]))
    corr = torch.exp(-4 * torch.cdist(*ends) ** 2)
    return corr + noise * torch.randn(batch, *corr.shape)


# ------------------------------------------------------------------------------------------------------------
# Configuration


def test_defaults_are_the_supplements_and_every_option_has_its_help():
    cfg = SemiConfig()
    # Table 1
    assert (cfg.semi_threshold, cfg.semi_uncertainty, cfg.semi_tps, cfg.semi_gamma) == (0.5, 1.5, 0.4, 0.1)
    assert (cfg.semi_photometric, cfg.semi_keyout) == (0.2, 0.2)
    assert (cfg.semi_temperature, cfg.semi_weight) == (0.1, 0.5)
    assert (cfg.semi, cfg.semi_dynamic, cfg.semi_blur) == (False, True, True)
    helps = {name: text for name, (_, text) in fields_with_groups(SemiConfig).items()}
    assert all(helps[field.name] for field in dataclasses.fields(SemiConfig))


# ------------------------------------------------------------------------------------------------------------
# The strong view


def test_keyout_zeroes_the_drawn_squares_and_nothing_else():
    image = torch.rand(3, 40, 60) + 1
    kps = torch.tensor([[10.4, 9.6], [0.0, 39.0], [59.2, 0.3], [30.0, 20.0], [45.7, 33.1], [-20.0, 5.0]])
    for seed in range(20):
        before, rng = image.clone(), np.random.default_rng(seed)
        out = key_out(image, kps, (5.0, 3.0, 45.0, 203.0), 0.6, rng)
        assert torch.equal(image, before)
        replay, expected = np.random.default_rng(seed), image.clone()
        for x, y in kps.tolist():
            if replay.random() < 0.6:
                side = int(replay.integers(6, 20))  # M = 200
                left, top = round(x) - side // 2, round(y) - side // 2
                for v in range(40):
                    for u in range(60):
                        if left <= u < left + side and top <= v < top + side:
                            expected[:, v, u] = 0
        assert torch.equal(out, expected)


def test_keyout_sides_run_from_3_to_10_percent_of_the_boxs_longer_side():
    image, kps = torch.ones(3, 60, 50), torch.tensor([[25.0, 30.0]])
    for box in ((0.0, 7.0, 30.0, 152.0), (7.0, 0.0, 152.0, 30.0)):  # M = 145: floor(4.35) to floor(14.5) - 1
        rng, sides = np.random.default_rng(0), []
        for _ in range(300):
            cut = (key_out(image, kps, box, 1.0, rng) == 0).all(0)
            assert cut[30, 25]
            sides.append(int(cut[30].sum()))
            assert sides[-1] == int(cut[:, 25].sum()) and sides[-1] ** 2 == int(cut.sum())
        assert set(sides) == set(range(4, 14))


def test_keyout_cuts_every_point_or_none_at_the_ends_of_p():
    image, kps = torch.ones(3, 50, 50), torch.tensor([[8.0 * k, 40.0 - 7 * k] for k in range(6)])
    box, rng = (0.0, 0.0, 100.0, 20.0), np.random.default_rng(0)
    for _ in range(20):
        assert torch.equal(key_out(image, kps, box, 0.0, rng), image)
        out = key_out(image, kps, box, 1.0, rng)
        assert all((out[:, int(y), int(x)] == 0).all() for x, y in kps.tolist())
    cuts = [(key_out(image, kps, box, 0.2, rng)[0, 40 - 7 * k, 8 * k] == 0).item()
            for _ in range(200) for k in (0, 5)]
    assert 0.14 < np.mean(cuts) < 0.26  # 0.2 with a standard deviation of 0.02


@pytest.mark.parametrize("longer", [0.0, 9.0, 15.0])  # no side to draw; none; 0 alone
def test_keyout_leaves_the_image_where_the_box_is_too_small(longer):
    image = torch.ones(3, 20, 20)
    box = (2.0, 2.0, 2.0 + longer, 3.0 if longer else 2.0)
    assert torch.equal(key_out(image, torch.tensor([[4.0, 4.0]]), box, 1.0, np.random.default_rng(0)), image)


def test_drawn_warps_stay_within_their_ranges_and_fill_them():
    rng = np.random.default_rng(0)
    turns, stretches, axes, shifts, offsets = [], [], [], [], []
    for _ in range(3000):
        affine, offset = semimatch.draw_warp(rng, 0.4)
        assert affine.shape == (2, 3) and offset.shape == (9, 2)
        assert affine.dtype == offset.dtype == torch.float32
        matrix = affine[:, :2].double().numpy()
        u, s, vt = np.linalg.svd(matrix)
        turn = u @ vt  # polar decomposition: matrix = turn @ stretch, stretch symmetric
        assert np.linalg.det(turn) == pytest.approx(1)
        turns.append(math.degrees(math.atan2(turn[1, 0], turn[0, 0])))
        stretches.append(s)
        if s[0] - s[1] > 0.05:  # an axis of the stretch, which has four equivalent directions
            axis = math.degrees(math.atan2(vt[0, 1], vt[0, 0]))
            axes.append((axis + 45) % 90 - 45)
        shifts.append(affine[:, 2].numpy())
        offsets.append(offset.numpy())
    for values, limit in ((turns, 15), (axes, 30), (shifts, 0.25), (offsets, 0.4)):
        values = np.array(values).reshape(len(values), -1)
        assert abs(values).max() <= limit * (1 + 1e-4)
        assert (values.max(0) > 0.98 * limit).all() and (values.min(0) < -0.98 * limit).all()
        assert abs(values.mean(0)).max() < 0.05 * limit  # standard deviation of the mean: 0.011
        assert abs(values.std(0) - limit / 3**0.5).max() < 0.04 * limit  # uniform
    stretches = np.array(stretches)
    assert 0.75 - 1e-5 < stretches.min() < 0.755 and 1.245 < stretches.max() < 1.25 + 1e-5
    assert abs(stretches.mean() - 1) < 0.01
    assert abs((stretches[:, 0] - stretches[:, 1]).mean() - 0.5 / 3) < 0.01
    assert not semimatch.draw_warp(rng, 0.0)[1].any()


def test_affine_field_is_the_product_at_every_pixel_centre():
    affine = torch.randn(2, 2, 3)
    field = semimatch.affine_field(affine, 3, 5)
    assert field.shape == (2, 3, 5, 2)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                expected = affine_literal(affine[b], centre(j, 5), centre(i, 3))
                assert field[b, i, j].tolist() == pytest.approx(expected, abs=1e-6)


def test_tps_field_is_the_spline_through_the_moved_control_points():
    offsets = torch.rand(2, 9, 2) - 0.5
    field = semimatch.tps_field(offsets, 5, 8)
    assert field.shape == (2, 5, 8, 2) and field.dtype == torch.float32
    for b in range(2):
        spline = tps_literal(offsets[b])
        for (x, y), (dx, dy) in zip(CONTROL, offsets[b].tolist()):
            assert spline(x, y) == pytest.approx((x + dx, y + dy), abs=1e-9)
        for i in range(5):
            for j in range(8):
                assert field[b, i, j].tolist() == pytest.approx(spline(centre(j, 8), centre(i, 5)), abs=1e-6)


def test_tps_field_meets_every_control_point():
    offsets = torch.rand(1, 9, 2) - 0.5
    field = semimatch.tps_field(offsets, 301, 501)  # fine enough for the outer pixels to be at the corners
    for k, (x, y) in enumerate(CONTROL):
        at = field[0, (y + 1) * 150, (x + 1) * 250]
        assert (at - torch.tensor([x, y]) - offsets[0, k]).abs().max() < 0.02


def test_tps_field_of_a_linear_displacement_is_affine():
    affine = torch.tensor([[[0.9, 0.2, 0.1], [-0.3, 1.1, -0.2]]])
    moved = torch.tensor([affine_literal(affine[0], x, y) for x, y in CONTROL])
    field = semimatch.tps_field((moved - torch.tensor(CONTROL))[None], 4, 7)
    assert torch.allclose(field, semimatch.affine_field(affine, 4, 7), atol=1e-6)
    still, same = semimatch.tps_field(STILL[None], 4, 7), semimatch.affine_field(IDENTITY[None], 4, 7)
    assert torch.allclose(still, same, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_is_affine_then_spline_pixel_by_pixel(mode):
    x = torch.randn(3, 2, 9, 12) + 3
    affine, offsets = random_warps(3)
    out, inside = warp(x, affine, offsets, mode)
    assert 0.2 < inside.float().mean() < 0.98
    for b in range(3):
        expected, kept = warp_literal(x[b], affine[b], offsets[b], mode)
        assert torch.equal(inside[b], kept) and not out[b][:, ~kept].any()
        assert torch.allclose(out[b], expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_by_whole_pixels_shifts(mode):
    x = torch.rand(1, 2, 5, 7) + 1
    for dx, dy in ((2, -1), (-3, 2), (0, 0), (7, 0)):
        out, inside = warp(x, shift(dx, dy, 5, 7)[None], STILL[None], mode)
        for i in range(5):
            for j in range(7):
                within = 0 <= i + dy < 5 and 0 <= j + dx < 7
                assert inside[0, i, j] == within
                expected = x[0, :, i + dy, j + dx] if within else torch.zeros(2)
                assert torch.allclose(out[0, :, i, j], expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_drops_pixels_that_miss_a_ten_thousandth(mode):
    for missing, dropped in ((5e-5, False), (2e-4, True)):  # of a pixel, at the left border
        affine = shift(-missing, 0, 6, 8)[None]
        out, inside = warp(torch.ones(1, 1, 6, 8), affine, STILL[None], mode)
        assert inside[0, :, 1:].all() and inside[0, :, 0].any() != dropped
        assert (out[0, 0, :, 0] == 0).all() == dropped


def test_warp_keeps_its_precision_in_half_precision():
    affine, offsets = random_warps(1)
    x = torch.rand(1, 1, 64, 48).bfloat16()
    out, inside = warp(x.float(), affine, offsets, "bilinear")
    half, half_inside = warp(x, affine, offsets, "bilinear")
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_inside = warp(x.float(), affine, offsets, "bilinear")
    assert half.dtype == torch.float32
    assert torch.equal(out, half) and torch.equal(out, cast)
    assert torch.equal(inside, half_inside) and torch.equal(inside, cast_inside)


# ------------------------------------------------------------------------------------------------------------
# Pseudo-labels


def test_uncertainty_is_the_entropy_over_source_cells():
    corr = torch.randn(2, 6, 4)
    expected = [[entropy_literal(softmax_literal(corr[b, :, t].tolist(), 0.7)) for t in range(4)]
                for b in range(2)]
    assert torch.allclose(semimatch.uncertainty(corr, 0.7), torch.tensor(expected), atol=1e-5)
    half = corr.bfloat16()
    assert torch.equal(semimatch.uncertainty(half, 0.7), semimatch.uncertainty(half.float(), 0.7))


def test_uncertainty_of_equal_and_of_single_matches():
    n = 500
    corr = torch.zeros(1, n, 2)
    corr[0, 7, 1] = 50  # 500 at the temperature
    equal, single = semimatch.uncertainty(corr, 0.1)[0].tolist()
    assert equal == pytest.approx(-n * (1 / n + 1e-6) * math.log(1 / n + 1e-6), rel=1e-5)
    # The second term is 0.0069, what adding 1e-6 to every probability is worth.
    expected = -(1 + 1e-6) * math.log(1 + 1e-6) - (n - 1) * 1e-6 * math.log(1e-6)
    assert single == pytest.approx(expected, rel=1e-3)


def test_forward_backward_check_by_loops():
    grids = (((5, 7), (6, 4)), ((6, 4), (5, 7)), ((4, 4), (7, 9)), ((3, 8), (3, 8)))
    shares = []
    for src_grid, trg_grid in grids:
        corr = volume(4, src_grid, trg_grid, noise=0.5)
        corr[0] = torch.randn_like(corr[0])  # long flows that rarely lead back
        mask = semimatch.forward_backward_mask(corr, src_grid, trg_grid)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [visible_literal(c, src_grid, trg_grid) for c in corr]
        shares.append(mask.float().mean())
    assert all(0.1 < share < 0.9 for share in shares)


@pytest.mark.parametrize(
    "there, back, visible",
    [
        (2, 1, True),  # f = 2, b = -1: 1 <= 0.1 * 5 + 0.5, the edge
        (0, 1, False),  # f = 0, b = 1: 1 > 0.1 * 1 + 0.5
        (1, 1, False),  # f = 1, b = 0
        (3, 1, True),  # f = 3, b = -2: 1 <= 0.1 * 13 + 0.5
        (4, 2, False),  # f = 4, b = -2: 4 > 0.1 * 20 + 0.5
        (8, 2, True),  # f = 8, b = -6: 4 <= 0.1 * 100 + 0.5
        (5, 0, True),
    ],
)
def test_forward_backward_threshold(there, back, visible):
    for axis in (0, 1):
        grid = (1, 10) if axis else (10, 1)
        corr = torch.zeros(1, 10, 10)
        corr[0, there, 0], corr[0, there, back] = 0.5, 1 if back else 0.5
        assert semimatch.forward_backward_mask(corr, grid, grid)[0, 0] == visible


def test_box_mask_rounds_and_includes_both_ends():
    boxes = torch.tensor(
        [[0.6, 1.4, 3.4, 2.6], [-2.0, -0.4, 9.0, 0.4], [1.5, 2.5, 2.5, 3.5], [2, 2, 2, 2], [3, 1, 1, 4]]
    )
    mask = semimatch.box_mask(boxes, 4, 6)
    assert mask.dtype == torch.bool and mask.shape == (5, 4, 6)
    for b in range(5):
        assert mask[b].tolist() == [[in_box_literal(boxes[b], x, y) for x in range(6)] for y in range(4)]
    assert mask.sum((1, 2)).tolist() == [9, 6, 2, 1, 0]


SRC, TRG = (4, 6), (6, 5)
CFG = SemiConfig(semi_threshold=0.4, semi_temperature=0.15, semi_uncertainty=1.2)


def pseudo_literal(corr, affine, offsets, src_box, trg_box, cfg, src_grid=SRC, trg_grid=TRG):
    """One volume (Ns, Nt) by loops: labels, weights and the four terms of the mask, in the facts' order."""
    h, w = trg_grid
    planes = [[float(in_box_literal(trg_box, x, y)) for y in range(h) for x in range(w)]]
    planes.append([float(v) for v in visible_literal(corr, src_grid, trg_grid)])
    stack = torch.cat([corr, torch.tensor(planes)]).view(-1, h, w)
    warped = warp_literal(stack, affine, offsets, "nearest")[0].flatten(1)
    labels, weights, terms = [], [], []
    for t in range(h * w):
        p = softmax_literal(warped[:-2, t].tolist(), cfg.semi_temperature)
        label = best(p)
        labels.append(label)
        weights.append(math.exp(-cfg.semi_uncertainty * entropy_literal(p)))
        in_source = in_box_literal(src_box, label % src_grid[1], label // src_grid[1])
        sure = p[label] >= cfg.semi_threshold
        terms.append((in_source, sure, warped[-2, t].item() == 1, warped[-1, t].item() == 1))
    return labels, weights, terms


@pytest.mark.parametrize("kind", ["identity", "shift", "warp"])
def test_pseudo_labels_by_loops(kind):
    batch = 6
    corr = volume(batch, SRC, TRG, noise=0.3)
    affine, offsets = random_warps(batch, 0.2)
    if kind != "warp":
        affine = (IDENTITY if kind == "identity" else shift(2, -1, *TRG)).expand(batch, -1, -1)
        offsets = STILL.expand(batch, -1, -1)
    src_box = torch.tensor([[0.6, 0.0, 3.8, 2.6]]).repeat(batch, 1)
    trg_box = torch.tensor([[0.0, 1.2, 3.4, 4.6]]).repeat(batch, 1)
    src_box[1], trg_box[2] = torch.tensor([1.0, 1, 5, 3]), torch.tensor([1.0, 0, 4, 3])
    pseudo = pseudo_labels(corr, SRC, TRG, affine, offsets, src_box, trg_box, CFG)
    decisive, kept = [0] * 4, 0
    for b in range(batch):
        labels, weights, terms = pseudo_literal(corr[b], affine[b], offsets[b], src_box[b], trg_box[b], CFG)
        assert pseudo.label[b].tolist() == labels
        assert pseudo.weight[b].tolist() == pytest.approx(weights, abs=1e-5)
        assert pseudo.mask[b].tolist() == [all(term) for term in terms]
        kept += sum(map(all, terms))
        for k in range(4):
            decisive[k] += sum(not term[k] and sum(term) == 3 for term in terms)
    assert kept and all(decisive)  # every term of the mask alone switches a cell off


def test_pseudo_labels_weigh_nothing_without_uncertainty_and_teach_nothing():
    corr = volume(2, SRC, TRG).requires_grad_()
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(2, 1)
    warps = IDENTITY.expand(2, -1, -1), STILL.expand(2, -1, -1)
    pseudo = pseudo_labels(corr, SRC, TRG, *warps, boxes, boxes, SemiConfig(semi_uncertainty=0.0))
    assert (pseudo.weight == 1).all() and not pseudo.weight.requires_grad and pseudo.label.dtype == torch.long
    half = corr.detach().bfloat16()
    same = zip(*(pseudo_labels(c, SRC, TRG, *warps, boxes, boxes, CFG) for c in (half, half.float())))
    assert all(torch.equal(*pair) for pair in same)


def test_a_probability_of_just_tau_counts_and_less_does_not():
    corr, box = torch.zeros(1, 2, 3), torch.tensor([[0.0, 0, 9, 9]])  # two source cells, alike: 0.5
    for tau, kept in ((0.5, True), (0.5001, False)):
        cfg = SemiConfig(semi_threshold=tau)
        pseudo = pseudo_labels(corr, (1, 2), (1, 3), IDENTITY[None], STILL[None], box, box, cfg)
        assert pseudo.mask[0, 0] == kept


def test_cells_from_outside_the_target_are_uniform_and_never_count():
    corr, box = volume(1, SRC, TRG, noise=0.0), torch.tensor([[0.0, 0, 9, 9]])
    cfg = SemiConfig(semi_threshold=0.0)
    pseudo = pseudo_labels(corr, SRC, TRG, shift(2, 0, *TRG)[None], STILL[None], box, box, cfg)
    mask, weight = pseudo.mask.view(TRG), pseudo.weight.view(TRG)
    assert not mask[:, 3:].any() and mask[:, :3].any()
    even = math.exp(-1.5 * entropy_literal([1 / 24] * 24))
    assert weight[:, 3:].flatten().tolist() == pytest.approx([even] * 12)


# ------------------------------------------------------------------------------------------------------------
# Losses


def some_labels(batch: int, sources: int, targets: int) -> PseudoLabels:
    mask = torch.rand(batch, targets) < 0.5
    mask[0], mask[1, :2] = False, True  # images with different numbers of labels
    return PseudoLabels(torch.randint(sources, (batch, targets)), torch.rand(batch, targets), mask)


def loss_literal(corr: np.ndarray, pseudo: PseudoLabels, gamma: float) -> float:
    terms = []
    for b, t in pseudo.mask.nonzero().tolist():
        p = softmax_literal(corr[b, :, t].tolist(), gamma)
        terms.append(-math.log(p[int(pseudo.label[b, t])]) * float(pseudo.weight[b, t]))
    return sum(terms) / len(terms)


def test_contrastive_loss_and_its_gradient_by_loops():
    corr, pseudo = torch.randn(3, 6, 5, requires_grad=True), some_labels(3, 6, 5)
    loss = contrastive_loss(corr, pseudo, 0.3)
    loss.backward()
    values = corr.detach().double().numpy()
    assert loss.item() == pytest.approx(loss_literal(values, pseudo, 0.3), rel=1e-5)
    for index in np.ndindex(values.shape):
        sides = []
        for step in (1e-5, -1e-5):
            moved = values.copy()
            moved[index] += step
            sides.append(loss_literal(moved, pseudo, 0.3))
        assert corr.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-5)


def test_contrastive_loss_is_float32_inside():
    corr, pseudo = torch.randn(2, 6, 5).bfloat16(), some_labels(2, 6, 5)
    loss = contrastive_loss(corr, pseudo, 0.1)
    assert loss.dtype == torch.float32 and loss == contrastive_loss(corr.float(), pseudo, 0.1)


def test_without_a_label_the_loss_is_zero_and_so_is_its_gradient():
    corr, pseudo = torch.randn(2, 6, 5, requires_grad=True), some_labels(2, 6, 5)
    loss = contrastive_loss(corr, pseudo._replace(mask=torch.zeros(2, 5, dtype=torch.bool)), 0.1)
    loss.backward()
    assert loss.item() == 0 and corr.grad.shape == corr.shape and not corr.grad.any()


def test_no_gradient_reaches_the_weights_of_labels():
    corr, pseudo = torch.randn(2, 6, 5, requires_grad=True), some_labels(2, 6, 5)
    weight = pseudo.weight.requires_grad_()
    contrastive_loss(corr, pseudo._replace(weight=weight), 0.1).backward()
    assert weight.grad is None and corr.grad.any()


def test_dynamic_weight_makes_both_terms_equal_and_is_a_constant():
    a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    sup, unsup = a**2, 4 * b  # 9, 2
    weight = semimatch.dynamic_weight(sup, unsup)
    assert weight.item() == 4.5 and (weight * unsup).item() == sup.item() and not weight.requires_grad
    (sup + weight * unsup).backward()
    assert a.grad.item() == 6 and b.grad.item() == 4.5 * 4


def test_dynamic_weight_of_no_loss_is_zero():
    for sup in (0.0, 2.0):
        b = torch.tensor(1.0, requires_grad=True)
        unsup = b * 0
        weight = semimatch.dynamic_weight(torch.tensor(sup), unsup)
        (weight * unsup).backward()
        assert weight.item() == 0 and (weight * unsup).item() == 0 and b.grad.item() == 0


# ------------------------------------------------------------------------------------------------------------
# Device


def test_everything_stays_on_the_inputs_device():
    corr, affine, offsets, box = (torch.rand(2, *s, device="meta") for s in ((24, 30), (2, 3), (9, 2), (4,)))
    # the meta device takes no other's tensors
    pseudo = pseudo_labels(corr, SRC, TRG, affine, offsets, box, box, CFG)
    loss = contrastive_loss(corr, pseudo, 0.1)
    assert all(x.is_meta for x in (*pseudo, loss, semimatch.dynamic_weight(loss, loss)))
