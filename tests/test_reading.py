"""Our reading of a volume: facing and affine voting against loops and closed forms, and its uses."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from literal import cells, ransac, ridge_fit
from PIL import Image
from test_train import configured
from torch import Tensor

import data
import support.ours as ours
from label import build_clique, clique_maps
from modules import Features, Pairs, cosine_volume, kernel_soft_argmax, put_back, select_pairs
from support.dense import Dense
from support.ours import (
    FACING_MARGIN,
    FACING_SLOPE,
    affine_reading,
    affine_voting,
    best_reading,
    both_faces,
    face_the_source,
    faces_other_way,
    facing_score,
    fit_affine,
    match_score,
    neighbourhood_consensus,
    plain_and_mirrored,
)
from train import Cascade, Config, train

GRID_S, GRID_T = (9, 12), (11, 10)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def cosines(src: Features, trg: Features) -> Tensor:
    return cosine_volume(src.feat, trg.feat, src.grid, trg.grid)


def image(feat: Tensor, saliency: Tensor | None = None) -> Features:
    """Features of cells (B, H, W, C), all foreground unless there is saliency."""
    saliency = torch.ones(feat.shape[:3]) if saliency is None else saliency
    return Features(feat.flatten(1, 2), feat.mean((1, 2)), saliency)


def two_faces(feat: Tensor, saliency: Tensor | None = None) -> Features:
    """The same of a backbone that sees each cell alone, with those of the mirror image."""
    turned = image(feat.flip(2), saliency if saliency is None else saliency.flip(2))
    return image(feat, saliency)._replace(mirror=turned)


# ------------------------------------------------------------------------------------------------------------
# One affine map


def test_the_fit_finds_a_known_map_and_is_weighted_least_squares_with_a_ridge():
    x, weight = torch.randn(3, 40, 2) * 4 + 5, torch.rand(3, 40) * 7
    linear, offset = torch.randn(3, 2, 2), torch.randn(3, 2) * 9
    y = x @ linear + offset[:, None]
    found = fit_affine(x, y, weight, pull=0)
    torch.testing.assert_close(found[0], linear, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], offset, rtol=1e-3, atol=1e-3)
    y = y + torch.randn(3, 40, 2) * 3
    for pull in (0.0, 0.1, 2.0):
        found = fit_affine(x, y, weight, pull)
        for b in range(3):
            expected = ridge_fit(*(z[b].double().numpy() for z in (x, y, weight)), pull)
            for got, want in zip(found, expected):
                np.testing.assert_allclose(got[b], want, rtol=1e-3, atol=1e-3)


def test_a_strong_pull_gives_the_best_similarity_and_points_in_a_row_have_a_map():
    x, y, weight = torch.randn(2, 30, 2), torch.randn(2, 30, 2) * 3, torch.rand(2, 30)
    linear, offset = fit_affine(x, y, weight, pull=1e5)
    for b in range(2):
        w = (weight[b] / weight[b].sum()).double().numpy()
        p, q = (z[b].double().numpy() @ [1, 1j] for z in (x, y))
        centred = p - w @ p
        turn = (w * centred.conj() * q).sum() / (w * abs(centred) ** 2).sum()
        shift = w @ q - turn * (w @ p)
        expected = [[turn.real, turn.imag], [-turn.imag, turn.real]]
        np.testing.assert_allclose(linear[b], expected, atol=1e-3)
        np.testing.assert_allclose(offset[b], [shift.real, shift.imag], atol=1e-3)
    row = torch.tensor([[[0.0, 0], [1, 2], [2, 4]]])
    linear, offset = fit_affine(row, 2 * row + 1, torch.ones(1, 3))
    torch.testing.assert_close(linear, 2 * torch.eye(2)[None], rtol=1e-3, atol=1e-3)


def planted(linear: list, offset: list, outliers: float, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """A volume (1, Hs, Ws, Ht, Wt) of bumps around where an affine map sends cells, but for some rows that
    peak at least four cells from there; the map's places (Ns, 2), and which rows are right."""
    rng = torch.Generator().manual_seed(number)
    src, trg = (torch.tensor(cells(*grid), dtype=torch.float32) for grid in (GRID_S, GRID_T))
    truth = src @ torch.tensor(linear) + torch.tensor(offset)
    right, peaks = torch.rand(len(src), generator=rng) >= outliers, truth.clone()
    for n in (~right).nonzero()[:, 0].tolist():
        far = trg[(trg - truth[n]).norm(dim=1) > 4]
        peaks[n] = far[int(torch.randint(len(far), (), generator=rng))]
    height = 0.6 + 0.4 * torch.rand(len(src), 1, generator=rng)
    corr = height * torch.exp(-0.5 * (peaks[:, None] - trg).square().sum(-1))
    return (corr + 0.02 * torch.rand(corr.shape, generator=rng)).view(1, *GRID_S, *GRID_T), truth, right


MAPS = {  # within the target's grid
    "scaled": ([[0.7, 0.0], [0.0, 0.7]], [1.2, 2.1]),
    "of another aspect": ([[0.5, 0.0], [0.0, 1.2]], [2.3, 0.4]),
    "sheared": ([[0.6, 0.2], [0.25, 0.8]], [0.3, 0.9]),
    "turned": ([[0.6, 0.35], [-0.35, 0.6]], [2.9, 0.7]),
}


def test_affine_voting_finds_the_map_of_a_literal_ransac():
    for number, (linear, offset) in enumerate(MAPS.values()):
        corr, _, _ = planted(linear, offset, 0.3, number)
        mask_s, mask_t = torch.rand(1, *GRID_S) > 0.2, torch.rand(1, *GRID_T) > 0.1
        where, share = affine_voting(corr, mask_s, mask_t)
        expected, votes = ransac(corr[0], mask_s[0], mask_t[0])
        np.testing.assert_allclose(where[0], expected, atol=0.02)
        assert float(share) == pytest.approx(votes, abs=1e-3)


def test_affine_voting_finds_the_map_of_every_couple_and_the_share_that_it_explains():
    """Scale, aspect, shear and rotation, each with 35 % of the cells astray, in one batch and alone."""
    found = [planted(linear, offset, 0.35, 9 + k) for k, (linear, offset) in enumerate(MAPS.values())]
    corr = torch.cat([volume for volume, _, _ in found])
    everything = [torch.ones(len(corr), *grid, dtype=torch.bool) for grid in (GRID_S, GRID_T)]
    where, share = affine_voting(corr, *everything)
    for b, (volume, truth, right) in enumerate(found):
        assert float((where[b] - truth).norm(dim=1).max()) < 0.5, list(MAPS)[b]
        assert abs(float(share[b]) - float(right.float().mean())) < 0.1
        alone = affine_voting(volume, *(mask[:1] for mask in everything))
        torch.testing.assert_close(alone[0][0], where[b], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone[1][0], share[b], rtol=1e-3, atol=1e-3)


def test_cells_outside_the_foreground_have_no_vote():
    """Two maps in one volume, each of its own half of the source: the mask says which is found."""
    one, two = (planted(*MAPS[name], 0.0, 3) for name in ("scaled", "of another aspect"))
    left = (torch.arange(GRID_S[1]) < 6).expand(1, *GRID_S)
    corr = torch.where(left[..., None, None], one[0], two[0])
    everywhere = torch.ones(1, *GRID_T, dtype=torch.bool)
    for mask, (_, truth, _) in ((left, one), (~left, two)):
        where, share = affine_voting(corr, mask, everywhere)
        assert float((where[0] - truth)[mask.flatten()].norm(dim=1).max()) < 0.5 and float(share) > 0.95
    corr = planted(*MAPS["scaled"], 0.0, 3)[0]
    corr[..., 0, 0] = 2.0  # the best match of every cell, were it foreground
    everywhere[0, 0, 0] = False
    where, _ = affine_voting(corr, torch.ones_like(left), everywhere)
    assert float((where[0] - one[1]).norm(dim=1).max()) < 0.5


@pytest.mark.parametrize("linear, offset", [([[-0.7, 0.0], [0.0, 0.9]], [8.5, 1.0]),
                                            ([[0.7, 0.0], [0.0, -0.9]], [1.0, 8.5])])  # fmt: skip
def test_a_mirrored_map_is_not_found(linear, offset):
    corr, truth, _ = planted(linear, offset, 0.1, 1)
    where, share = affine_voting(corr, *(torch.ones(1, *grid, dtype=torch.bool) for grid in (GRID_S, GRID_T)))
    rows = np.c_[np.array(cells(*GRID_S)), np.ones(len(truth))]
    found = np.linalg.lstsq(rows, where[0].numpy(), rcond=None)[0][:2]
    assert np.linalg.det(found) > 0 and float(share) < 0.5
    assert float((where[0] - truth).norm(dim=1).mean()) > 1


@pytest.mark.parametrize("scale, side_s, side_t", [(0.0, 9, 11), (5.0, 5, 21)])
def test_cells_that_all_match_one_place_or_lie_five_times_further_apart_have_no_map(scale, side_s, side_t):
    src, trg = (torch.tensor(cells(side, side), dtype=torch.float32) for side in (side_s, side_t))
    corr = torch.exp(-0.5 * (scale * src[:, None] + 0.3 - trg).square().sum(-1))
    masks = [torch.ones(1, side, side, dtype=torch.bool) for side in (side_s, side_t)]
    _, share = affine_voting(corr.view(1, side_s, side_s, side_t, side_t), *masks)
    assert float(share) < 0.5


def test_a_map_that_explains_everything_is_the_wide_volume_around_it(monkeypatch):
    near, wide = torch.rand(4, 3, 4, 4, 5) - 0.3, torch.rand(4, 3, 4, 4, 5) - 0.3
    where, share = torch.rand(4, 12, 2) * 4, torch.tensor([0.2, 0.5, 0.8, 1.0])
    masks = torch.rand(4, 3, 4) > 0.5, torch.rand(4, 4, 5) > 0.5
    asked = []
    monkeypatch.setattr(ours, "affine_voting", lambda *args: asked.append(args) or (where, share))
    found = affine_reading(near, wide, *masks)
    (given,) = asked
    assert given[0] is near and given[1] is masks[0] and given[2] is masks[1]
    for b, gate in enumerate((0.0, 0.0, 0.6, 1.0)):
        for i, (x, y) in enumerate(cells(3, 4)):
            for u, v in cells(4, 5):
                distance = math.dist(where[b, i].tolist(), (u, v))
                bump = math.exp(-0.5 * (distance / 4) ** 2) * max(float(wide[b, y, x, v, u]), 0)
                expected = (1 - gate) * max(float(near[b, y, x, v, u]), 0) + gate * bump
                assert float(found[b, y, x, v, u]) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Facing


def soft_best(corr: Tensor, mask_s: Tensor, mask_t: Tensor) -> float:
    """match_score of one couple by loops."""
    total = 0.0
    for table, mask, other in (
        (corr.flatten(2).flatten(0, 1), mask_s, mask_t),
        (corr.flatten(2).flatten(0, 1).T, mask_t, mask_s),
    ):
        rows = [
            0.05 * math.log(sum(math.exp(v / 0.05) for v, k in zip(row, other.flatten().tolist()) if k))
            for row, keep in zip(table.tolist(), mask.flatten().tolist()) if keep
        ]  # fmt: skip
        total += sum(rows) / len(rows)
    return total


def test_a_match_score_is_the_mean_soft_maximum_of_foreground_over_foreground_both_ways():
    corr = torch.rand(3, 3, 5, 4, 2) * 2 - 1
    mask_s, mask_t = torch.rand(3, 3, 5) > 0.4, torch.rand(3, 4, 2) > 0.4
    expected = [soft_best(*one) for one in zip(corr, mask_s, mask_t)]
    torch.testing.assert_close(match_score(corr, mask_s, mask_t), torch.tensor(expected))
    mask_s[1], mask_t[2] = False, False
    found = match_score(corr, mask_s, mask_t)
    assert found.isfinite().all() and float(found[0]) == pytest.approx(expected[0], abs=1e-5)


def test_the_two_volumes_are_means_of_both_images_as_they_are_and_both_mirrored():
    """By loops, of features whose mirror image is another image, as a real backbone's nearly is."""
    faces = [torch.randn(2, *grid, 6) for grid in ((3, 5), (3, 5), (4, 3), (4, 3))]
    s, s_turned, t, t_turned = map(image, faces)
    plain, mirrored = plain_and_mirrored(cosines, s._replace(mirror=s_turned), t._replace(mirror=t_turned))
    s, s_turned, t, t_turned = (x / x.norm(dim=-1, keepdim=True) for x in faces)
    for b in range(2):
        for x, y in cells(3, 5):
            for u, v in cells(4, 3):
                here, there, back = s[b, y, x], s_turned[b, y, 4 - x], 2 - u
                as_is = (here @ t[b, v, u] + there @ t_turned[b, v, back]) / 2
                turned = (here @ t_turned[b, v, u] + there @ t[b, v, back]) / 2
                assert float(plain[b, y, x, v, u]) == pytest.approx(float(as_is), abs=1e-5)
                assert float(mirrored[b, y, x, v, u]) == pytest.approx(float(turned), abs=1e-5)


def couples() -> tuple[Features, Features, Tensor]:
    """Four crops of canvases and, one column on, their targets: 0 and 3 face the other way."""
    canvas, away = torch.randn(4, 7, 10, 32), torch.tensor([True, False, False, True])
    trg = canvas[:, :, 2:]
    trg = torch.where(away.view(4, 1, 1, 1), trg.flip(2), trg) + 0.1 * torch.randn(trg.shape)
    maps = [(torch.rand(4, *grid) > 0.15).float() for grid in ((6, 9), (7, 8))]
    return two_faces(canvas[:, :6, 1:], maps[0]), two_faces(trg, maps[1]), away


def test_targets_that_face_the_other_way_are_mirrored_and_no_others():
    src, trg, away = couples()
    facing, found = face_the_source(cosines, src, trg)
    assert torch.equal(found, away) and facing.mirror is None
    for b, turned in enumerate(away.tolist()):
        for got, plain, mirrored in zip(facing[:3], trg[:3], trg.mirror[:3]):
            assert torch.equal(got[b], (mirrored if turned else plain)[b])
    src, trg = (x.map(lambda y: y[:1]) for x in (src, trg))
    assert face_the_source(cosines, src, src)[1].tolist() == [False]
    even = two_faces(src.feat.unflatten(1, src.grid) + src.mirror.feat.unflatten(1, src.grid))
    assert face_the_source(cosines, even, even)[1].tolist() == [False]  # symmetric: nothing to be found


def test_a_facing_score_compares_the_mirror_image_under_its_own_mask_less_the_margin():
    plain, mirrored = torch.rand(3, 3, 5, 4, 2), torch.rand(3, 3, 5, 4, 2)
    mask_s, mask_t = torch.rand(3, 3, 5) > 0.4, torch.tensor([[True, False]] * 4).expand(3, 4, 2)
    for b, found in enumerate(facing_score(plain, mirrored, mask_s, mask_t).tolist()):
        turned = torch.tensor([[False, True]] * 4)
        better = soft_best(mirrored[b], mask_s[b], turned) - soft_best(plain[b], mask_s[b], mask_t[b])
        assert found == pytest.approx(better - FACING_MARGIN, abs=1e-4)


def test_facing_is_found_and_put_back_where_the_target_is_the_mirrored_source():
    src, trg, away = couples()
    found = best_reading(cosines, src, trg, smooth=True).volume
    assert found.shape == (4, 6, 9, 7, 8)
    for b, turned in enumerate(away.tolist()):
        for y in range(6):
            for x in range(1, 9):
                peak = divmod(int(found[b, y, x].argmax()), 8)
                assert peak == (y, 7 - (x - 1) if turned else x - 1)


@pytest.mark.parametrize("smooth", [True, False])
def test_the_best_reading_mixes_both_views_by_the_probability_that_the_target_faces_away(monkeypatch, smooth):
    src, trg, _ = couples()
    asked, reads = [], [torch.rand(4, 6, 9, 7, 8), torch.rand(4, 6, 9, 7, 8)]
    score = torch.tensor([-0.03, 0.0, 0.005, 0.04])  # the score is asked for before the readings
    monkeypatch.setattr(ours, "facing_score", lambda *args: asked.append(args) or score)
    monkeypatch.setattr(ours, "affine_reading", lambda *args: asked.append(args) or reads[len(asked) - 2])
    found = best_reading(cosines, src, trg, smooth).volume
    volumes = plain_and_mirrored(cosines, src, trg)
    near = [neighbourhood_consensus(corr, 3) if smooth else corr for corr in volumes]
    wide = [neighbourhood_consensus(corr, 5 if smooth else 3) for corr in volumes]
    mask_s, mask_t = src.saliency >= 0.5, trg.saliency >= 0.5
    expected = (*near, mask_s, mask_t), (near[0], wide[0], mask_s, mask_t)
    expected += ((near[1], wide[1], mask_s, mask_t.flip(2)),)
    assert all(torch.equal(a, b) for got, want in zip(asked, expected) for a, b in zip(got, want))
    for b, value in enumerate(score.tolist()):
        away = 1 / (1 + math.exp(-value / FACING_SLOPE))
        mixed = (1 - away) * reads[0][b] + away * torch.stack([reads[1][b, ..., 7 - u] for u in range(8)], -1)
        torch.testing.assert_close(found[b], mixed)


def test_planted_signs_are_found_under_noise():
    for count in (2, 3, 7, 12):
        for _ in range(20):
            way = torch.randint(2, (count,)) * 2 - 1
            noise = torch.randn(count, count) * (0 if count < 7 else 0.7)
            scores = -0.8 * way[:, None] * way + (noise + noise.T) / 2
            scores = scores.fill_diagonal_(-0.02)
            assert torch.equal(faces_other_way(scores), way[:, None] != way)
    assert not faces_other_way(torch.full((5, 5), -0.02)).any()


def test_features_of_both_faces_are_those_of_the_images_and_of_their_mirror_images():
    cascade = Cascade(Config(backbone="random_vit8"))
    images, maps = torch.randn(2, 3, 48, 56), torch.rand(2, 6, 7)
    for saliency in (maps, None):
        found = both_faces(cascade, images, saliency)
        turned = torch.stack([images[..., 55 - x] for x in range(56)], -1)
        back = torch.tensor([6, 5, 4, 3, 2, 1, 0])
        for got, views, own in ((found, images, maps), (found.mirror, turned, maps[..., back])):
            expected = cascade.features(views, None if saliency is None else own)
            for x, y in zip(got[:3], expected[:3]):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        assert found.mirror.mirror is None and len(found.mirror.feat) == 2


def test_a_map_over_features_reaches_the_mirror_images_and_takes_others_beside_them():
    one, two = two_faces(torch.randn(2, 3, 4, 5)), two_faces(torch.randn(2, 3, 4, 5))
    found = one.map(lambda x, y: x - 2 * y, two)
    for got, x, y in ((found, one, two), (found.mirror, one.mirror, two.mirror)):
        assert all(torch.equal(a, b - 2 * c) for a, b, c in zip(got[:3], x[:3], y[:3]))
    assert one._replace(mirror=None).map(lambda x: x[:1]).mirror is None


# ------------------------------------------------------------------------------------------------------------
# Where facing is used


def test_pairs_of_the_mirror_image_are_put_back():
    trg, score = torch.randint(15, (3, 4)), torch.rand(3, 4)
    pairs = Pairs(torch.arange(12).view(3, 4), trg, score, score > 0.5)
    away, width = torch.tensor([True, False, True]), 5
    found = put_back(pairs, away, width)
    for b in range(3):
        for k in range(4):
            y, x = divmod(int(pairs.trg[b, k]), width)
            assert int(found.trg[b, k]) == y * width + (width - 1 - x if away[b] else x)
    assert all(getattr(found, name) is getattr(pairs, name) for name in ("src", "score", "valid"))


@pytest.mark.parametrize("only", [None, "pixel"])
def test_a_facing_cascade_teaches_the_target_as_it_is_the_pairs_of_its_mirror_image(monkeypatch, only):
    """The planted couples 0 and 3 face the other way; the pixel stage sees no mirrored target."""
    cascade = Cascade(Config(backbone="random_vit8", volume_window=2, candidates=12, pairs=6, facing=True,
                             only=only, axes=32, mil_ffn=True))  # fmt: skip
    src, trg, away = couples()
    seen, loss_of = [], cascade.pixel.loss
    monkeypatch.setattr(cascade.pixel, "loss", lambda *args: seen.append(args) or loss_of(*args))
    loss, log = cascade(src, trg, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    ((corr, pairs),) = seen
    assert torch.equal(corr, cascade.pixel(src._replace(mirror=None), trg._replace(mirror=None)))
    right = total = 0
    for b in range(4):
        for i, j, valid in zip(pairs.src[b].tolist(), pairs.trg[b].tolist(), pairs.valid[b].tolist()):
            (y, x), partner = divmod(i, 9), divmod(j, 8)
            total += valid
            right += valid and partner == (y, 7 - (x - 1) if away[b] else x - 1)
    assert total >= 12 and right >= 0.9 * total
    assert loss.isfinite() and all(value.isfinite() for value in log.values())
    for stage in ("image", "region", "pixel"):
        grads = [p.grad for p in getattr(cascade, stage).parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in grads)
        assert any((g != 0).any() for g in grads) == (only in (None, stage))


def test_training_with_facing_gives_the_cascade_both_faces_of_every_view(tmp_path, monkeypatch):
    seen = []

    def spy(volume, src, trg):
        seen.append((src, trg))
        return face_the_source(volume, src, trg)

    monkeypatch.setattr("train.face_the_source", spy)
    cascade = train(*configured(tmp_path / "on", "--steps", "2", "--facing"))
    assert len(seen) == 2 and all(p.isfinite().all() for p in cascade.parameters())
    for view in seen[0] + seen[1]:
        assert view.feat.shape == view.mirror.feat.shape == (3, 64, 128)
        assert torch.equal(view.mirror.saliency, view.saliency.flip(2))
        assert not torch.allclose(view.mirror.feat, view.feat, atol=0.1)
    train(*configured(tmp_path / "off", "--steps", "1"))
    assert len(seen) == 2


def test_a_clique_maps_images_that_face_the_other_way_by_their_mirror_images():
    """Five crops of one canvas, two of them mirrored, whose cells are nothing alike to a backbone that sees
    which way they face: every map and partner lands on the same cell."""
    canvases, turned = torch.randn(2, 6, 16, 24), [False, True, False, False, True]  # right, left
    right, left = (torch.stack([canvas[:5, k : k + 8] for k in range(5)]) for canvas in canvases)
    right, left = (x + 0.1 * torch.randn(x.shape) for x in (right, left.flip(2)))
    way = torch.tensor(turned)[:, None, None, None]
    feats = image(torch.where(way, left, right))._replace(mirror=image(torch.where(way, right, left)))
    cfg = SimpleNamespace(saliency_threshold=0.5, hough=False)
    cascade = SimpleNamespace(cfg=cfg, volume=lambda s, t: neighbourhood_consensus(cosines(s, t), 3))
    maps, partners = clique_maps(cascade, feats, batch=3, matched=True)
    for a in range(5):
        for b in range(5):
            for x, y in cells(5, 8) if a != b else ():
                place = (7 - x if turned[a] else x) + a  # on the canvas
                if not 1 <= place - b <= 6 or not 1 <= place - a <= 6:
                    continue
                target = 7 - (place - b) if turned[b] else place - b
                assert maps[a, b, y, x].tolist() == pytest.approx([target, y], abs=0.3)
                assert int(partners[a, b, y * 8 + x]) == y * 8 + target
    alone, found = feats._replace(mirror=None), feats.map(lambda x: x)
    maps, partners = clique_maps(cascade, alone, batch=4, matched=True)
    for a in range(5):
        for b in range(a + 1, 5):
            corr = cascade.volume(*(found.map(lambda x, i=i: x[i : i + 1]) for i in (a, b)))
            torch.testing.assert_close(maps[a, b], kernel_soft_argmax(corr)[0], rtol=1e-4, atol=1e-4)
            pairs = select_pairs(corr, *(alone.map(lambda x, i=i: x[i : i + 1]) for i in (a, b)), cfg)
            assert partners[a, b, pairs.src[0, :9]].tolist() == pairs.trg[0, :9].tolist()
    assert (clique_maps(cascade, feats, batch=4)[1] == -1).all()


def test_a_clique_is_built_with_the_mirror_images_and_their_mirrored_foreground():
    cascade = Cascade(Config(backbone="random_vit8"))
    item = {"index": [4, 5, 6, 9], "views": torch.randn(4, 3, 48, 56), "cells": torch.rand(4, 6, 7),
            "sizes": [(70, 60)] * 4}  # fmt: skip
    item["cells"][1] = 0  # no foreground: left out
    clique, empty = build_clique(cascade, item, {}, facing=True)
    assert clique.index == [4, 6, 9] and empty == [5]
    mirror, kept = clique.feats.mirror, [0, 2, 3]
    turned = cascade.features(item["views"][kept].flip(3))
    torch.testing.assert_close(mirror.feat, turned.feat, rtol=1e-4, atol=1e-4)
    for k, n in enumerate(kept):
        for x, y in cells(6, 7):
            sign = 1.0 if item["cells"][n, y, x] >= cascade.cfg.saliency_threshold else -1.0
            assert float(clique.feats.saliency[k, y, x]) == sign == float(mirror.saliency[k, y, 6 - x])
    assert build_clique(cascade, item, {}, facing=False)[0].feats.mirror is None


def test_our_reading_of_dense_cells_is_that_of_their_own_volume():
    cascade = Cascade(Config(backbone="random_vit8", consensus=3, volume_window=2, saliency="attention"))
    matcher = Dense(cascade.eval())
    src, trg = (both_faces(matcher, torch.randn(1, 3, 24, side)) for side in (32, 24))
    assert src.grid == (6, 8) and float(src.saliency.min()) < 0.5 < float(src.saliency.max())
    with torch.no_grad():
        found = matcher.volume(src, trg, "best-pixel")
        expected = best_reading(lambda s, t: matcher.volume(s, t, "pixel"), src, trg, smooth=False).volume
    torch.testing.assert_close(found, expected)
    assert found.shape == (1, 6, 8, 6, 6)


def pictures(folder: Path, names: list[str], grey: int) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 12), grey, np.uint8)).save(folder / name)


def test_several_roots_share_their_classes_and_have_a_folder_of_maps_each(tmp_path):
    one, two, maps_one, maps_two = (tmp_path / name for name in ("one", "two", "maps one", "maps two"))
    for root, folder, classes, grey in ((one, maps_one, "ab", 50), (two, maps_two, "bc", 100)):
        pictures(root, [f"{c}/{k}.png" for c in classes for k in range(2)], grey)
        pictures(folder, [f"{c}/{k}_sal.png" for c in classes for k in range(2)], grey * 2)
    both = f"{one}:{two}"
    images = data.class_folders(both, f"{maps_one}:{maps_two}", rescale=False)
    assert images.classes == ["a", "b", "c"] and images.members() == [[0, 1], [2, 3, 4, 5], [6, 7]]
    for index in range(8):
        picture, saliency = images.load(index)
        grey = np.asarray(picture)[0, 0, 0]
        assert grey == (50 if index < 4 else 100)
        assert np.asarray(saliency)[0, 0] == pytest.approx(int(grey) * 2 / 255)
        assert images.paths[index].parent.name == images.classes[images.labels[index]]
    assert {data.class_folders(both, str(maps_one)).map_path(i).parent.parent for i in range(8)} == {maps_one}
    assert data.class_folders(both).map_path(7) is None
    for root, maps in ((both, f"{maps_one}:{maps_two}:{maps_one}"), (str(one), f"{maps_one}:{maps_two}")):
        line = "--saliency .*: one folder of maps for each of the [12] of --root$"
        with pytest.raises(ValueError, match=line) as caught:
            data.class_folders(root, maps)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"--root {tmp_path / 'gone'}: "):
        data.class_folders(f"{one}:{tmp_path / 'gone'}")
