"""Each stage against literal computations, and the cascade's gradients."""

import itertools
import math

import pytest
import torch
from literal import greedy_literal, hough_table

from image_stage import ImageStage, closes_loop, crop_regions
from modules import (
    Features,
    Pairs,
    adaptive_pooling,
    cosine_volume,
    greedy_selection,
    kernel_soft_argmax,
    negatives,
    transfer_keypoints,
)
from pixel_stage import PixelStage, soft_target
from region_stage import RegionStage
from support.conditioning import pair_axes
from support.ours import best_reading, both_faces, neighbourhood_consensus
from train import STAGES, Cascade, Config

DIM = 16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**changes) -> Config:
    small = {"backbone": "random_vit8", "volume_window": 2, "candidates": 12, "pairs": 5}
    return Config(**small | changes)


def features(batch: int, grid: tuple[int, int], dim: int = DIM) -> Features:
    return Features(
        torch.randn(batch, grid[0] * grid[1], dim), torch.randn(batch, dim), torch.rand(batch, *grid)
    )


def shaken(stage: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off its start, where zero-initialised outputs hide most of the network."""
    for p in stage.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return stage


# ------------------------------------------------------------------------------------------------------------
# Image stage


def test_negatives_are_the_previous_source_and_never_of_the_same_class():
    src = features(4, (2, 3))
    rolled, negative = negatives(src, torch.tensor([5, 5, 2, 5]))
    assert torch.equal(rolled.feat[2], src.feat[1]) and torch.equal(rolled.saliency[0], src.saliency[3])
    assert negative.tolist() == [False, False, True, True]  # 5|5, 5|5, 5|2, 2|5


def test_image_loss_is_eq2_over_rolled_pairs():
    cfg = config()
    stage = shaken(ImageStage(DIM, cfg))
    src, trg, labels = features(3, (6, 5)), features(3, (5, 7)), torch.tensor([0, 1, 1])
    total = 0.0
    for k in range(3):
        for other, sign, count in ((k, -1, 3), (k - 1, 1, 2)):
            if sign == 1 and labels[other] == labels[k]:
                continue
            s, t = src.map(lambda x, o=other: x[o % 3][None]), trg.map(lambda x, k=k: x[k][None])
            ap = adaptive_pooling(stage(s, t), s.saliency >= 0.5, t.saliency >= 0.5, cfg.ap)
            total += sign * ap.item() / count
    assert stage.loss(src, trg, labels)[1].item() == pytest.approx(total, abs=1e-5)


def test_suspected_pairs_are_hough_then_algorithm1_inside_the_foreground():
    cfg = config()
    stage = shaken(ImageStage(DIM, cfg))
    src, trg = features(2, (6, 5)), features(2, (5, 7))
    corr = stage(src, trg)
    pairs = stage.select(corr, src, trg)
    for b in range(2):
        keep_s, keep_t = src.saliency[b] >= 0.5, trg.saliency[b] >= 0.5
        cut = corr[b].detach() * keep_s[:, :, None, None] * keep_t
        expected = greedy_literal(hough_table(cut), keep_s, keep_t)[: cfg.candidates]
        count = int(pairs.valid[b].sum())
        assert list(zip(pairs.src[b].tolist(), pairs.trg[b].tolist()))[:count] == expected


def test_without_hough_pairs_follow_the_volume_itself():
    stage = shaken(ImageStage(DIM, config(hough=False, candidates=99)))
    src, trg = features(1, (3, 5)), features(1, (5, 4))
    corr = stage(src, trg)
    pairs = stage.select(corr, src, trg)
    expected = greedy_literal(corr[0].detach(), src.saliency[0] >= 0.5, trg.saliency[0] >= 0.5)
    assert pairs.trg[0, : len(expected)].tolist() == [j for _, j in expected]


def test_a_pair_closes_its_loop_where_both_best_matches_end_near_it():
    corr = torch.rand(2, 3, 5, 5, 4)
    pairs = greedy_selection(corr)
    for radius in (0.0, 1.0, 1.5, 2.3):
        closed = closes_loop(corr, pairs, radius)
        for b in range(2):
            for k in range(15):
                (ys, xs), (yt, xt) = divmod(int(pairs.src[b, k]), 5), divmod(int(pairs.trg[b, k]), 4)
                yf, xf = divmod(int(corr[b, ys, xs].argmax()), 4)
                yb, xb = divmod(int(corr[b, :, :, yt, xt].argmax()), 5)
                near = math.hypot(yf - yt, xf - xt) <= radius and math.hypot(yb - ys, xb - xs) <= radius
                assert bool(closed[b, k]) == near
    image = ImageStage(DIM, config(hough=False, saliency_threshold=0.0, candidates=9, loop_radius=1.0))
    src, trg = features(2, (3, 5)), features(2, (5, 4))
    chosen = image.select(corr, src, trg)
    closed = closes_loop(corr, pairs, 1.0)
    for b in range(2):
        expected = pairs.src[b][closed[b]][:9].tolist()
        assert 0 < len(expected) < 15
        assert chosen.src[b][chosen.valid[b]].tolist() == expected


def test_regions_are_five_cells_wide_and_shift_inward_at_the_border():
    image = features(1, (6, 9))
    centres = torch.tensor([[0, 2 * 9 + 4, 5 * 9 + 8]])  # a corner, the middle, the opposite corner
    windows, origin = crop_regions(image, centres, 5)
    assert origin[0].tolist() == [[0, 0], [2, 0], [4, 1]]
    for k, (x0, y0) in enumerate(origin[0].tolist()):
        block = image.feat[0].view(6, 9, -1)[y0 : y0 + 5, x0 : x0 + 5].flatten(0, 1)
        assert torch.equal(windows.feat[k], block)
        torch.testing.assert_close(windows.token[k], block.mean(0))
        assert torch.equal(windows.saliency[k], image.saliency[0, y0 : y0 + 5, x0 : x0 + 5])


# ------------------------------------------------------------------------------------------------------------
# Region stage


def test_region_loss_is_eq2_over_regions_of_rolled_images():
    cfg = config()
    image, region = ImageStage(DIM, cfg), shaken(RegionStage(DIM, cfg))
    src, trg, labels = features(3, (6, 5)), features(3, (5, 7)), torch.tensor([0, 1, 1])
    regions = image.regions(image.select(image(src, trg), src, trg), src, trg)
    valid = regions.valid.clone()
    valid[0, 2:], valid[1, 3:] = False, False
    _, got = region.loss(regions._replace(valid=valid), labels)
    count, pos, neg = valid.shape[1], [], []
    for b in range(3):
        for k in range(count):
            t = regions.trg.map(lambda x, i=b * count + k: x[i][None])
            for other, scores in ((b, pos), ((b - 1) % 3, neg)):
                if not valid[b, k] or (other != b and (labels[other] == labels[b] or not valid[other, k])):
                    continue
                s = regions.src.map(lambda x, i=other * count + k: x[i][None])
                ap = adaptive_pooling(region(s, t), s.saliency >= 0.5, t.saliency >= 0.5, cfg.ap)
                scores.append(ap.item())
    assert len(neg) < len(pos)
    assert got.item() == pytest.approx(-sum(pos) / len(pos) + sum(neg) / len(neg), abs=1e-5)


def test_one_best_foreground_pair_per_region_mapped_back_to_the_image(monkeypatch):
    """The volume of every window pair is set by hand; the pair that comes back must be its best one, in image
    cells."""
    monkeypatch.setattr("region_stage.NMS_RADIUS", 0.0)
    cfg = config(hough=False, pairs=3)
    region = RegionStage(DIM, cfg)
    grid_s, grid_t = (7, 9), (8, 6)
    src, trg = features(1, grid_s), features(1, grid_t)
    centres = Pairs(
        torch.tensor([[0, 30, 62]]), torch.tensor([[47, 20, 3]]), torch.ones(1, 3), torch.ones(1, 3) > 0
    )
    regions = ImageStage(DIM, cfg).regions(centres, src, trg)
    ones = [x._replace(saliency=torch.ones(3, 5, 5)) for x in (regions.src, regions.trg)]
    ones[1].saliency[1, 2, 2] = 0  # the best target cell of window 1 is background
    corr = torch.zeros(3, 5, 5, 5, 5)
    corr[0, 1, 2, 3, 4], corr[1, 0, 0, 2, 2], corr[1, 4, 3, 0, 1], corr[2, 2, 4, 1, 0] = 0.9, 0.95, 0.5, 0.7
    pairs = region.select(corr, regions._replace(src=ones[0], trg=ones[1]), grid_s, grid_t)
    expected = []
    for k, (ys, xs, yt, xt) in ((0, (1, 2, 3, 4)), (2, (2, 4, 1, 0)), (1, (4, 3, 0, 1))):  # by falling score
        (x0, y0), (u0, v0) = regions.origin_s[0, k].tolist(), regions.origin_t[0, k].tolist()
        expected.append(((y0 + ys) * 9 + x0 + xs, (v0 + yt) * 6 + u0 + xt))
    assert list(zip(pairs.src[0].tolist(), pairs.trg[0].tolist())) == expected


def test_only_positive_scores_are_pairs():
    """Hough votes of an all-negative volume are 0 everywhere: nothing is suspected, and its windows yield
    nothing."""
    cfg = config(pairs=3)
    src, trg = (
        x._replace(saliency=torch.ones_like(x.saliency)) for x in (features(1, (6, 7)), features(1, (7, 5)))
    )
    corr = -torch.rand(1, 6, 7, 7, 5)
    corr[0, 2, 3, 4, 1] = 0.5
    image, region = ImageStage(DIM, cfg), RegionStage(DIM, cfg)
    suspected = image.select(corr, src, trg)
    assert suspected.valid.sum() == 1 and (suspected.src[0, 0], suspected.trg[0, 0]) == (2 * 7 + 3, 4 * 5 + 1)
    regions = image.regions(suspected, src, trg)._replace(valid=torch.ones(1, cfg.candidates) > 0)
    volumes = -torch.rand(cfg.candidates, 5, 5, 5, 5)
    volumes[4, 1, 2, 3, 4] = 0.5
    assert region.select(volumes, regions, src.grid, trg.grid).valid.sum() == 1


def test_region_aggregation_is_one_window_over_the_whole_volume():
    region = RegionStage(DIM, config())
    torch.nn.init.normal_(region.mvam.aggregation.redistribute.weight)
    corr = torch.randn(1, 5, 5, 5, 5, requires_grad=True)
    region.mvam.aggregation(corr)[0, 0, 0, 0, 0].backward()
    assert (corr.grad != 0).all()


# ------------------------------------------------------------------------------------------------------------
# Pixel stage


def test_soft_target_matches_mmnets_formula():
    """Inverse-distance weights on the surrounding cells, then a 3x3 Gaussian that loses what leaves the
    grid."""
    height, width = 4, 6
    for x, y in ((2.3, 1.6), (0.0, 0.0), (5.0, 2.5), (4.0, 3.0)):
        near = [(i, j) for j in {math.floor(y), math.ceil(y)} for i in {math.floor(x), math.ceil(x)}]
        weights = {c: 1 / max(math.hypot(c[0] - x, c[1] - y), 1e-5) for c in near}
        total, sigma = sum(weights.values()), 3 / 2 / 2.354
        kernel = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma**2)) for i in (-1, 0, 1) for j in (-1, 0, 1)}
        mass = sum(kernel.values())
        expected = torch.zeros(height, width)
        for (i, j), weight in weights.items():
            for (di, dj), k in kernel.items():
                if 0 <= i + di < width and 0 <= j + dj < height:
                    expected[j + dj, i + di] += weight / total * k / mass
        with torch.autocast("cpu", torch.bfloat16):  # float32 all the same
            got = soft_target(torch.tensor([x, y]), height, width)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_pixel_loss_is_binary_cross_entropy_in_both_directions():
    stage = PixelStage(DIM, config(temperature=0.2))
    corr = torch.randn(2, 3, 4, 4, 2).clamp(-1, 1)
    pairs = Pairs(torch.tensor([[3, 7], [11, 0]]), torch.tensor([[5, 2], [0, 0]]), torch.ones(2, 2),
                  torch.tensor([[True, True], [True, False]]))  # fmt: skip
    total, count = 0.0, 0
    for b, k in ((0, 0), (0, 1), (1, 0)):
        i, j = int(pairs.src[b, k]), int(pairs.trg[b, k])
        table = corr[b].flatten(2).flatten(0, 1)
        for row, (x, y), (h, w) in (
            (table[i], (j % 2, j // 2), (4, 2)),
            (table[:, j], (i % 4, i // 4), (3, 4)),
        ):
            p = (row / 0.2).softmax(0)
            t = soft_target(torch.tensor([float(x), float(y)]), h, w).flatten()
            total += float(torch.nn.functional.binary_cross_entropy(p, t, reduction="sum"))
            count += 1
    assert float(stage.loss(corr, pairs)) == pytest.approx(total / count, rel=1e-4)


def test_pixel_loss_without_pairs_is_zero_and_still_differentiable():
    stage = shaken(PixelStage(DIM, config()))
    none = Pairs(
        *(torch.zeros(1, 4, dtype=torch.long),) * 2, torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool)
    )
    loss = stage.loss(stage(features(1, (5, 6)), features(1, (6, 5))), none)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in stage.parameters())


# ------------------------------------------------------------------------------------------------------------
# The cascade


def small_cascade(**changes) -> Cascade:
    return shaken(Cascade(config(**changes)))


def one_batch(cascade: Cascade) -> tuple[Features, Features, torch.Tensor]:
    src, trg = (cascade.features(torch.randn(3, 3, 48, 56), torch.rand(3, 6, 7)) for _ in range(2))
    return src, trg, torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "changes", [{}, {"residual": False, "ffn_ratio": 0.0}, {"ap": "max"}, {"hough": False}]
)
def test_gradients_reach_every_trainable_parameter_and_never_the_backbone(changes):
    cascade = small_cascade(**changes)
    _, losses = cascade(*one_batch(cascade))
    for name, loss in ((name, losses[name]) for name in STAGES):
        cascade.zero_grad()
        loss.backward(retain_graph=True)
        for key, p in cascade.named_parameters():
            reached = p.grad is not None and bool((p.grad != 0).any())
            # A softmax over keys does not feel a bias that is the same for all of them.
            if not key.endswith(".k.bias"):
                assert reached == key.startswith(name), f"{name} loss, {key}"


def test_the_pixel_stage_learns_from_the_pairs_of_the_region_stage(monkeypatch):
    """Image stage -> windows -> region stage -> pairs, step by step; at most `pairs` of them, a quarter-dozen
    here."""
    cascade = small_cascade(pairs=3)
    src, trg, labels = one_batch(cascade)
    taught = []
    monkeypatch.setattr(cascade.pixel, "loss", lambda corr, pairs: taught.append((corr, pairs)) or corr.sum())
    _, log = cascade(src, trg, labels)
    ((corr, pairs),) = taught
    regions = cascade.image.regions(cascade.image.select(cascade.image(src, trg), src, trg), src, trg)
    expected = cascade.region.select(cascade.region(regions.src, regions.trg), regions, src.grid, trg.grid)
    assert all(torch.equal(a, b) for a, b in zip(pairs, expected)) and pairs.src.shape == (3, 3)
    assert torch.equal(corr, cascade.pixel(src, trg))
    assert log["pairs"] == pairs.valid.sum() / 3 and log["pairs"] > 1
    suspected = cascade.image.select(cascade.image(src, trg), src, trg)
    assert not torch.equal(pairs.src, suspected.src[:, :3])


def test_later_stages_give_no_gradient_to_earlier_ones_when_trained_alone():
    cascade = small_cascade(only="region")
    loss, losses = cascade(*one_batch(cascade))
    assert list(losses) == ["region"] and loss == losses["region"]
    loss.backward()
    assert all(p.grad is None for p in cascade.image.parameters())
    assert all(p.grad is None for p in cascade.pixel.parameters())


def test_shared_attention_is_one_set_of_gated_blocks():
    def count(**changes):
        return sum(p.numel() for p in Cascade(config(**changes)).parameters() if p.requires_grad)

    shared = Cascade(config(shared_attention=True))
    assert shared.region.mvam.gated is shared.image.mvam.gated is shared.pixel.mvam.gated
    gated = sum(p.numel() for p in shared.image.mvam.gated.parameters())
    assert count() - count(shared_attention=True) == 2 * gated


def test_feed_forward_halves_of_the_first_two_stages_can_be_left_out():
    everywhere, last = (Cascade(config(mil_ffn=on)) for on in (True, False))
    assert [getattr(everywhere, s).mvam.ffn is not None for s in STAGES] == [True, True, True]
    assert [getattr(last, s).mvam.ffn is not None for s in STAGES] == [False, False, True]


def test_stages_switch_leaves_out_later_stages():
    for stages in (1, 2, 3):
        cascade = small_cascade(stages=stages)
        _, losses = cascade(*one_batch(cascade))
        assert [name for name in losses if name in STAGES] == list(STAGES[:stages])
        assert cascade.cfg.final_stage == STAGES[stages - 1]


def test_region_transfer_refines_inside_the_regions_around_the_image_match():
    cascade = small_cascade()
    src, trg, _ = one_batch(cascade)
    points = torch.rand(3, 4, 2) * torch.tensor([6.0, 5.0])
    coarse, fine = cascade.transfer(src, trg, points, "image"), cascade.transfer(src, trg, points, "region")
    assert not torch.allclose(coarse, fine)
    assert (coarse - fine).abs().max() <= 5  # a window's width
    one = cascade.transfer(src.map(lambda x: x[1:2]), trg.map(lambda x: x[1:2]), points[1:2, 2:3], "region")
    torch.testing.assert_close(one[0, 0], fine[1, 2], rtol=1e-3, atol=1e-3)


def test_region_transfer_reads_the_product_of_both_stages_scores_in_the_window():
    """By hand: coarse match after Hough matching, the two whole windows round both ends, their volume after
    Hough matching times the image stage's in the target's window, and the window's origin added."""
    cascade = small_cascade()
    src, trg, _ = one_batch(cascade)
    points = torch.tensor([[[2.3, 3.4], [5.9, 0.2]]]).expand(3, -1, -1)
    found = cascade.transfer(src, trg, points, "region")
    votes = torch.stack([hough_table(corr) for corr in cascade.image(src, trg).detach()])
    coarse = transfer_keypoints(votes, points)
    for b, n in itertools.product(range(3), range(2)):
        ends = []
        for image, (x, y) in ((src, points[b, n].tolist()), (trg, coarse[b, n].tolist())):
            x0, y0 = min(max(round(x) - 2, 0), 7 - 5), min(max(round(y) - 2, 0), 6 - 5)
            block = image.feat[b].view(6, 7, -1)[y0 : y0 + 5, x0 : x0 + 5].flatten(0, 1)[None]
            ends.append((Features(block, block.mean(1), torch.ones(1, 5, 5)), torch.tensor([x0, y0])))
        (window_s, origin_s), (window_t, origin_t) = ends
        fine = hough_table(cascade.region(window_s, window_t).detach()[0])
        fine = read_by_hand(fine, points[b, n] - origin_s)
        row = read_by_hand(votes[b], points[b, n])
        product = torch.zeros(5, 5)
        for y, x in itertools.product(range(5), range(5)):
            product[y, x] = fine[y, x] * row[int(origin_t[1]) + y, int(origin_t[0]) + x]
        torch.testing.assert_close(found[b, n], kernel_soft_argmax(product) + origin_t, rtol=1e-3, atol=1e-3)


def read_by_hand(corr: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """A volume (Hs, Ws, Ht, Wt) between its source cells at (x, y), the border repeated: (Ht, Wt)."""
    h, w = corr.shape[:2]
    x, y = min(max(float(point[0]), 0), w - 1), min(max(float(point[1]), 0), h - 1)
    found = torch.zeros(corr.shape[2:])
    for j, i in itertools.product(range(h), range(w)):
        found += max(0.0, 1 - abs(x - i)) * max(0.0, 1 - abs(y - j)) * corr[j, i]
    return found


def test_neighbourhood_consensus_is_the_pixel_stages_alone():
    cascade = Cascade(config(consensus=3))
    src, trg, _ = one_batch(cascade)
    plain = cosine_volume(src.feat, trg.feat, src.grid, trg.grid)
    torch.testing.assert_close(cascade.volume(src, trg, "image"), plain)
    torch.testing.assert_close(cascade.volume(src, trg, "pixel"), neighbourhood_consensus(plain, 3))
    assert not torch.allclose(cascade.volume(src, trg, "pixel"), plain, atol=0.01)
    torch.testing.assert_close(cascade.volume(src, trg, "consensus"), neighbourhood_consensus(plain, 3))
    without = Cascade(config())
    torch.testing.assert_close(without.volume(src, trg, "consensus"), neighbourhood_consensus(plain, 5))
    torch.testing.assert_close(without.volume(src, trg, "pixel"), plain)


def two_faces(cascade: Cascade, batch: int = 2) -> tuple[Features, Features]:
    return tuple(
        both_faces(cascade, torch.randn(batch, 3, 48, 56), torch.rand(batch, 6, 7)) for _ in range(2)
    )


def cosines(src: Features, trg: Features) -> torch.Tensor:
    return cosine_volume(src.feat, trg.feat, src.grid, trg.grid)


def test_the_best_frozen_reading_is_on_the_couples_own_axes_unless_there_are_others():
    cascade = Cascade(config())
    src, trg = two_faces(cascade)
    found, axes = cascade.volume(src, trg, "best"), pair_axes(src, trg, 256)
    torch.testing.assert_close(found, best_reading(cosines, *axes, smooth=True).volume)
    assert not torch.allclose(found, best_reading(cosines, src, trg, smooth=True).volume, atol=0.01)
    trained = Cascade(config(axes=16))  # on axes of training images already
    src, trg = two_faces(trained)
    expected = best_reading(cosines, src, trg, smooth=True).volume
    torch.testing.assert_close(trained.volume(src, trg, "best"), expected)


@pytest.mark.parametrize("stage, consensus, smooth", [("image", 3, True), ("pixel", 3, False),
                                                      ("pixel", 0, True)])  # fmt: skip
def test_the_best_reading_of_a_stage_is_of_its_own_volume(stage, consensus, smooth):
    """The pixel stage's holds a consensus of neighbours already, where it has one."""
    cascade = small_cascade(consensus=consensus)
    src, trg = two_faces(cascade)
    with torch.no_grad():
        found = cascade.volume(src, trg, f"best-{stage}")
        expected = best_reading(getattr(cascade, stage), src, trg, smooth).volume
        other = best_reading(getattr(cascade, stage), src, trg, not smooth).volume
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, other, atol=1e-3)
    points = torch.rand(2, 5, 2) * 5
    torch.testing.assert_close(
        cascade.transfer(src, trg, points, f"best-{stage}"), transfer_keypoints(expected, points)
    )


def test_a_stages_match_comes_after_its_hough_matching_and_that_of_frozen_features_does_not():
    cascade = small_cascade(hough_side=3)
    src, trg, _ = one_batch(cascade)
    points = torch.rand(3, 6, 2) * 5
    for method in ("image", "pixel"):
        corr = cascade.volume(src, trg, method).detach()
        votes = torch.stack([hough_table(c, 3) for c in corr])
        found = cascade.transfer(src, trg, points, method)
        torch.testing.assert_close(found, transfer_keypoints(votes, points), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found, transfer_keypoints(corr, points), atol=0.1)
    found = cascade.transfer(src, trg, points, "nn")
    torch.testing.assert_close(found, transfer_keypoints(cosines(src, trg), points))


def test_frozen_share_averages_features_of_the_pixel_stage_in_eval_mode_alone():
    torch.manual_seed(0)
    cascade = Cascade(config(frozen_share=0.25))
    src, trg, _ = one_batch(cascade)
    mvam = cascade.pixel.mvam
    for p in (*mvam.gated.parameters(), *mvam.ffn.parameters()):  # away from the identity they start as
        torch.nn.init.normal_(p, std=0.1)
    s, t = mvam.gated(*(torch.cat([x.token[:, None], x.feat], 1) for x in (src, trg)))
    s, t = mvam.ffn(s, src.grid)[:, 1:], mvam.ffn(t, trg.grid)[:, 1:]
    torch.testing.assert_close(cascade.train().volume(src, trg), cosine_volume(s, t, src.grid, trg.grid))
    s, t = 0.75 * s + 0.25 * src.feat, 0.75 * t + 0.25 * trg.feat
    torch.testing.assert_close(cascade.eval().volume(src, trg), cosine_volume(s, t, src.grid, trg.grid))


def test_saliency_modes():
    images = torch.randn(2, 3, 48, 56)
    assert (small_cascade(saliency="none").features(images).saliency == 1).all()
    attention = small_cascade(saliency="attention").features(images).saliency
    assert attention.shape == (2, 6, 7) and float(attention.max()) == 1 and float(attention.min()) == 0
    maps = torch.rand(2, 6, 7)
    assert torch.equal(small_cascade(saliency="auto").features(images, maps).saliency, maps)
