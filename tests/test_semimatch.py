"""SemiMatch's pieces beside literal loops over pixels and cells."""

import math

import numpy as np
import pytest
import torch

import semimatch
from semimatch import SemiConfig

IDENTITY = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
STILL = torch.zeros(1, 9, 2)


def shift(dx: float, dy: float, h: int, w: int) -> torch.Tensor:
    """An affine map that reads dx, dy pixels further on."""
    return torch.tensor([[[1.0, 0, 2 * dx / w], [0, 1, 2 * dy / h]]])


def test_key_out_cuts_squares_round_the_drawn_keypoints():
    image, kps = torch.rand(3, 40, 60) + 1, torch.tensor([[10.2, 20.7], [59.0, 0.0], [30.0, 30.0]])
    box, before = (5.0, 0.0, 65.0, 30.0), image.clone()  # longer side 60: sides of 1 to 5 px
    for seed in range(20):
        got = semimatch.key_out(image, kps, box, 0.5, np.random.default_rng(seed))
        rng, want = np.random.default_rng(seed), image.clone()
        for x, y in ((10, 21), (59, 0), (30, 30)):
            if rng.random() >= 0.5:
                continue
            side = int(rng.integers(1, 6))
            for row in range(40):
                for column in range(60):
                    if 0 <= row - (y - side // 2) < side and 0 <= column - (x - side // 2) < side:
                        want[:, row, column] = 0
        assert torch.equal(got, want)
    assert torch.equal(image, before)


def test_key_out_never_and_always():
    image, kps = torch.ones(3, 50, 50), torch.tensor([[25.0, 10.0]])
    box = (0.0, 0.0, 50.0, 20.0)
    assert torch.equal(semimatch.key_out(image, kps, box, 0.0, np.random.default_rng(0)), image)
    assert semimatch.key_out(image, kps, box, 1.0, np.random.default_rng(0))[0, 10, 25] == 0
    tiny = (0.0, 0.0, 9.0, 9.0)  # floor(0.1 * 9) = 0: no side to draw
    assert torch.equal(semimatch.key_out(image, kps, tiny, 1.0, np.random.default_rng(0)), image)


def test_drawn_warps_stay_in_their_ranges():
    angles, seen = [], []
    for seed in range(300):
        affine, offsets = semimatch.draw_warp(np.random.default_rng(seed), 0.4)
        assert affine.shape == (2, 3) and offsets.shape == (9, 2) and offsets.abs().max() <= 0.4
        u, s, v = np.linalg.svd(affine[:, :2].double().numpy())
        assert 0.75 - 1e-6 <= s[1] <= s[0] <= 1.25 + 1e-6  # R(rot) times a symmetric matrix
        rotation = u @ v
        angles.append(math.degrees(math.atan2(rotation[1, 0], rotation[0, 0])))
        seen.append(affine[:, 2].abs().max())
    assert max(map(abs, angles)) <= 15 + 1e-3 and max(angles) > 13 and min(angles) < -13
    assert 0.2 < max(seen) <= 0.25


def test_affine_field_is_a_matrix_product_at_every_pixel():
    affine = torch.randn(2, 2, 3)
    field = semimatch.affine_field(affine, 4, 7)
    for b in range(2):
        for row in range(4):
            for column in range(7):
                x, y = (2 * column + 1) / 7 - 1, (2 * row + 1) / 4 - 1
                want = [affine[b, k, 0] * x + affine[b, k, 1] * y + affine[b, k, 2] for k in (0, 1)]
                assert torch.allclose(field[b, row, column], torch.stack(want), atol=1e-5)


def test_tps_field_is_the_spline_through_the_moved_control_points():
    rng = np.random.default_rng(0)
    offsets = rng.uniform(-0.4, 0.4, (2, 9, 2))
    control = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)]

    def u(a, b):
        r2 = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
        return r2 * math.log(r2) if r2 else 0.0

    system = np.zeros((12, 12))
    for i, p in enumerate(control):
        for j, q in enumerate(control):
            system[i, j] = u(p, q)
        system[i, 9:] = system[9:, i] = (1, *p)
    field = semimatch.tps_field(torch.tensor(offsets).float(), 5, 3)
    for b in range(2):
        right = np.concatenate([np.array(control) + offsets[b], np.zeros((3, 2))])
        w = np.linalg.solve(system, right)

        def spline(p, w=w):
            return sum(w[k] * u(p, q) for k, q in enumerate(control)) + w[9] + w[10] * p[0] + w[11] * p[1]

        for q, target in zip(control, np.array(control) + offsets[b]):
            assert np.allclose(spline(q), target)
        for row in range(5):
            for column in range(3):
                p = ((2 * column + 1) / 3 - 1, (2 * row + 1) / 5 - 1)
                assert np.allclose(field[b, row, column].numpy(), spline(p), atol=1e-5)
    assert torch.allclose(semimatch.tps_field(STILL, 6, 4), semimatch.affine_field(IDENTITY, 6, 4), atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_warp_by_whole_pixels_shifts_and_marks_what_came_from_outside(mode):
    x = torch.rand(1, 2, 6, 8) + 1
    got, inside = semimatch.warp(x, shift(2, -1, 6, 8), STILL, mode)
    for row in range(6):
        for column in range(8):
            r, c = row - 1, column + 2
            ok = 0 <= r < 6 and 0 <= c < 8
            assert inside[0, row, column] == ok
            want = x[0, :, r, c] if ok else torch.zeros(2)
            assert torch.allclose(got[0, :, row, column], want, atol=1e-4)


def test_between_pixels_nearest_takes_one_and_a_border_that_was_read_in_part_is_outside():
    x = torch.rand(1, 1, 5, 8)
    for mode in ("bilinear", "nearest"):
        got, inside = semimatch.warp(x, shift(0.4, 0, 5, 8), STILL, mode)
        want = 0.6 * x[..., :-1] + 0.4 * x[..., 1:] if mode == "bilinear" else x[..., :-1]
        assert torch.allclose(got[..., :-1], want, atol=1e-4)
        assert inside[..., :-1].all() and not inside[..., -1].any() and not got[..., -1].any()


def test_the_affine_map_comes_before_the_spline():
    x, affine = torch.rand(1, 1, 9, 9), torch.tensor([[[0.6, 0.3, 0.1], [-0.2, 0.7, 0.0]]])
    offsets = 0.3 * torch.rand(1, 9, 2) - 0.15
    first, _ = semimatch.warp(x, affine, STILL)
    both, _ = semimatch.warp(first, IDENTITY, offsets)
    got, inside = semimatch.warp(x, affine, offsets)
    assert inside.sum() > 9
    assert torch.allclose(got[:, 0][inside], both[:, 0][inside], atol=1e-5)


def test_uncertainty_is_the_entropy_of_every_column():
    corr = torch.randn(2, 12, 5)
    got = semimatch.uncertainty(corr, 0.3)
    for b in range(2):
        for t in range(5):
            e = [math.exp(v / 0.3) for v in corr[b, :, t].tolist()]
            p = [v / sum(e) + 1e-6 for v in e]
            assert float(got[b, t]) == pytest.approx(-sum(v * math.log(v) for v in p), rel=1e-4)
    assert float(semimatch.uncertainty(torch.zeros(1, 12, 1), 1.0)) == pytest.approx(math.log(12), abs=1e-4)


def test_forward_backward_check_by_loops():
    torch.manual_seed(0)
    hs, ws, ht, wt = 3, 4, 5, 2
    corr = torch.rand(40, hs * ws, ht * wt)
    got = semimatch.forward_backward_mask(corr, (hs, ws), (ht, wt))
    for b in range(40):
        for t in range(ht * wt):
            s = int(corr[b, :, t].argmax())
            back = int(corr[b, s].argmax())
            (x, y), (u, v), (p, q) = (t % wt, t // wt), (s % ws, s // ws), (back % wt, back // wt)
            f, g = (u - x, v - y), (p - u, q - v)
            off = (f[0] + g[0]) ** 2 + (f[1] + g[1]) ** 2
            assert bool(got[b, t]) == (off <= 0.1 * (f[0] ** 2 + f[1] ** 2 + g[0] ** 2 + g[1] ** 2) + 0.5)
    assert 0.1 < got.float().mean() < 0.9


def test_box_mask_rounds_and_includes_both_ends():
    boxes = torch.tensor([[0.6, -0.5, 2.4, 1.6], [3.0, 2.0, 9.0, 2.2]])
    got = semimatch.box_mask(boxes, 4, 6)
    for b in range(2):
        x0, y0, x1, y1 = (round(v) for v in boxes[b].tolist())
        for y in range(4):
            for x in range(6):
                assert bool(got[b, y, x]) == (x0 <= x <= x1 and y0 <= y <= y1)


GRIDS = (4, 5), (6, 3)


def sharp_volume() -> torch.Tensor:
    """Every target cell's best source cell is sure, and the check leads back for most."""
    torch.manual_seed(1)
    corr = 0.1 * torch.rand(1, 20, 18)
    corr[0, torch.arange(18), torch.arange(18)] = 2.0
    corr[0, 0, 16] = 2.5  # target 0 goes to source 0, whose own best is the far target 16: target 0 fails the check
    return corr


def literal_labels(corr, affine_shift, src_box, trg_box, cfg):
    """Labels by loops for a warp that reads `affine_shift` cells further on."""
    (hs, ws), (ht, wt) = GRIDS
    passed = semimatch.forward_backward_mask(corr, *GRIDS)[0]
    found = []
    for t in range(ht * wt):
        x, y = t % wt + affine_shift[0], t // wt + affine_shift[1]
        outside = not (0 <= x <= wt - 1 and 0 <= y <= ht - 1)
        x, y = round(x), round(y)
        if outside:
            found.append((None, None, False))
            continue
        column = corr[0, :, y * wt + x] / cfg.semi_temperature
        p = column.softmax(0)
        s = int(p.argmax())
        entropy = float(-((p + 1e-6) * (p + 1e-6).log()).sum())
        inside_src = src_box[0] <= s % ws <= src_box[2] and src_box[1] <= s // ws <= src_box[3]
        inside_trg = trg_box[0] <= x <= trg_box[2] and trg_box[1] <= y <= trg_box[3]
        ok = inside_src and inside_trg and float(p[s]) >= cfg.semi_threshold and bool(passed[y * wt + x])
        found.append((s, math.exp(-cfg.semi_uncertainty * entropy), ok))
    return found


@pytest.mark.parametrize("by", [(0, 0), (1, 0), (-1, 2), (0.4, 0)])
@pytest.mark.parametrize("boxes", [((0, 0, 4, 3), (0, 0, 2, 5)), ((1, 0, 4, 2), (0, 1, 1, 4))])
def test_pseudo_labels_by_loops(by, boxes):
    cfg, corr = SemiConfig(), sharp_volume()
    corr[0, :, 4] *= 0.01  # unsure
    src_box, trg_box = (torch.tensor([box]).float() for box in boxes)
    got = semimatch.pseudo_labels(corr, *GRIDS, shift(*by, *GRIDS[1]), STILL, src_box, trg_box, cfg)
    want = literal_labels(corr, by, *boxes, cfg)
    for t, (label, weight, ok) in enumerate(want):
        assert bool(got.mask[0, t]) == ok
        if label is not None and t != 4:
            assert int(got.label[0, t]) == label or weight < 0.1
            assert float(got.weight[0, t]) == pytest.approx(weight, rel=1e-3)
    assert 0 < got.mask.sum() < 18


def test_every_check_can_switch_a_label_off():
    whole = torch.tensor([[0.0, 0, 9, 9]])
    args = (GRIDS[0], GRIDS[1], IDENTITY, STILL)
    corr, cfg = sharp_volume(), SemiConfig()
    mask = semimatch.pseudo_labels(corr, *args, whole, whole, cfg).mask[0]
    assert mask[10] and not mask[0]  # 0 fails the forward-backward check
    nowhere = torch.tensor([[0.0, 0, 4, 1]])  # source 10 is (0, 2), target 10 is (1, 3)
    assert not semimatch.pseudo_labels(corr, *args, nowhere, whole, cfg).mask[0, 10]
    assert not semimatch.pseudo_labels(corr, *args, whole, nowhere, cfg).mask[0, 10]
    assert not semimatch.pseudo_labels(corr, *args, whole, whole, SemiConfig(semi_threshold=1.01)).mask.any()
    assert (semimatch.pseudo_labels(corr, *args, whole, whole, SemiConfig(semi_uncertainty=0.0)).weight == 1).all()


def test_contrastive_loss_by_loops_and_its_gradient():
    torch.manual_seed(2)
    corr = torch.randn(2, 6, 4, requires_grad=True)
    pseudo = semimatch.PseudoLabels(
        torch.randint(0, 6, (2, 4)),
        torch.rand(2, 4, requires_grad=True),
        torch.tensor([[True, False, True, True], [False, False, True, False]]),
    )
    total, count = 0.0, 0
    for b in range(2):
        for t in range(4):
            if pseudo.mask[b, t]:
                column = corr[b, :, t] / 0.1
                nll = torch.logsumexp(column, 0) - column[pseudo.label[b, t]]
                total, count = total + nll * pseudo.weight[b, t].detach(), count + 1
    want = total / count
    got = semimatch.contrastive_loss(corr, pseudo, 0.1)
    assert torch.allclose(got, want)
    (expected,) = torch.autograd.grad(want, corr)
    got.backward()
    assert torch.allclose(corr.grad, expected, atol=1e-6) and pseudo.weight.grad is None


def test_no_label_gives_no_loss_and_no_gradient():
    corr = torch.randn(1, 6, 4, requires_grad=True)
    empty = semimatch.PseudoLabels(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4), torch.zeros(1, 4).bool())
    loss = semimatch.contrastive_loss(corr, empty, 0.1)
    loss.backward()
    assert loss.item() == 0 and corr.grad.abs().max() == 0


def test_dynamic_weight_makes_both_terms_equal_and_carries_no_gradient():
    sup, unsup = torch.tensor(3.0, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    weight = semimatch.dynamic_weight(sup, unsup)
    assert not weight.requires_grad and (weight * unsup).item() == pytest.approx(3.0)
    assert semimatch.dynamic_weight(sup, torch.tensor(0.0)).item() == 0
