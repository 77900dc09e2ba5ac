"""CATs against literal computations: hyperpixels, the filter, the aggregator, flow, targets and loss."""

import math

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from data import KeypointPair, KeypointSet
from evaluate import predict, score
from experiments import cats
from experiments.cats import (
    GRID,
    HYPERPIXELS,
    Aggregator,
    Cats,
    CatsConfig,
    as_cats_reads,
    end_point_error,
    flow_target,
)
from experiments.peers import PROTOCOLS
from modules import Features
from support.backbone import BACKBONES, ViTSpec, load_backbone

N = GRID * GRID
SMALL = {"backbone": "deep_vit8", "size": 128, "projection": 16, "heads": 4}
ON_PASCAL = "2,17,21,22,25,26,28"  # CATs' hyperpixels on PF-PASCAL
NEVER_APPLIED = 2 * 384  # CATs holds one more LayerNorm than it uses


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(BACKBONES, "deep_vit8", ViTSpec("random", 128, 2, 8, 16, None, depth=3))


def small(load: bool = False, **changes) -> Cats:
    return Cats(CatsConfig(**SMALL | changes), load=load)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shaken(module: nn.Module, by: float = 0.1) -> nn.Module:
    """Move every parameter off its start, where zeros and ones hide what is done with them."""
    for p in module.parameters():
        p.data += by * torch.randn_like(p)
    return module


def features(batch: int, channels: int) -> Features:
    return Features(torch.randn(batch, N, channels), torch.zeros(batch, 0), torch.ones(batch, GRID, GRID))


# ------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.fixture(scope="module")
def resnet101() -> nn.Module:
    """torchvision's network with statistics and gains of batch norm that a wrong order would show in."""
    torch.manual_seed(1)
    return unlike_its_start(torchvision.models.resnet101())


def unlike_its_start(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias)
    return net.eval()


@pytest.mark.parametrize(
    "levels, decoder, projections", [(HYPERPIXELS, 3_697_408, 926_720), (ON_PASCAL, 3_691_264, 820_096)]
)
def test_as_many_parameters_as_cats(resnet101, monkeypatch, levels, decoder, projections):
    assert sum(p.numel() for p in resnet101.parameters()) == 44_549_160
    monkeypatch.setattr(torchvision.models, "get_model", lambda name: resnet101)
    matcher = Cats(CatsConfig(levels=levels), load=False)
    assert size(matcher.aggregator) == decoder - NEVER_APPLIED
    assert size(matcher.project) == projections
    last = max(matcher.backbone.levels)
    assert size(matcher.backbone) == 44_549_160 - size(resnet101.fc) - size_of_blocks(resnet101, last + 1, 33)


def size_of_blocks(net: nn.Module, first: int, last: int) -> int:
    """Parameters of the residual blocks first to last, counted from 1."""
    blocks = [block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer]
    return sum(map(size, blocks[first - 1 : last]))


def test_only_what_learns_is_a_parameter():
    """CATs' released code has the grid of its soft-argmax among the parameters; here no constant is."""
    wanted = {"aggregator.position_x", "aggregator.position_y"}
    both = ("weight", "bias")
    wanted |= {f"{name}.{kind}" for name in ("aggregator.proj", "project.0", "project.1") for kind in both}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    wanted |= {
        f"aggregator.blocks.0.{axis}.{layer}.{kind}"
        for axis in ("cells", "levels")
        for layer in layers
        for kind in both
    }
    matcher = small(levels="0,1")
    assert {name for name, _ in matcher.named_parameters() if not name.startswith("backbone.")} == wanted
    single = {name for name, _ in small().aggregator.named_parameters()}
    assert not any(".levels." in name for name in single)


# ------------------------------------------------------------------------------------------------------------
# Features


def sums_before_relu(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The stem's map and the input of every residual block's last ReLU, by hooks on torchvision's network."""
    kept: list[Tensor] = []
    blocks = [block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer]
    inputs: dict[nn.Module, list[Tensor]] = {block.relu: [] for block in blocks}
    handles = [net.maxpool.register_forward_hook(lambda m, x, y: kept.append(y.clone()))]
    for relu in inputs:
        handles.append(relu.register_forward_pre_hook(lambda m, x: inputs[m].append(x[0].clone())))
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return kept + [inputs[block.relu][-1] for block in blocks]


def test_hyperpixels_are_the_sums_before_the_last_relu(resnet101, monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name: resnet101)
    images, every = torch.randn(2, 3, 64, 96), ",".join(map(str, range(34)))
    truth = sums_before_relu(resnet101, images)
    channels = [64] + [256] * 3 + [512] * 4 + [1024] * 23 + [2048] * 3
    for text in (HYPERPIXELS, ON_PASCAL, every):
        levels = Cats(CatsConfig(levels=text), load=False).backbone
        with torch.no_grad():
            maps = levels(images)
        ids = [int(part) for part in text.split(",")]
        assert levels.widths == [channels[k] for k in ids] == [m.shape[1] for m in maps]
        for k, found in zip(ids, maps, strict=True):
            message = f"level {k}: {{}}".format
            torch.testing.assert_close(found, truth[k], rtol=1e-4, atol=1e-4, msg=message)
            assert k == 0 or (found < 0).any()


def test_basic_blocks_and_weights_from_a_file(tmp_path):
    net, images = unlike_its_start(torchvision.models.resnet18()), torch.randn(1, 3, 64, 64)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    cfg = CatsConfig(backbone="resnet18", levels="0,1,4,8", backbone_weights=str(tmp_path / "resnet18.pth"))
    levels, truth = Cats(cfg).eval().backbone, sums_before_relu(net, images)
    assert levels.widths == [64, 64, 128, 512]
    for k, found in zip((0, 1, 4, 8), levels(images), strict=True):
        torch.testing.assert_close(found, truth[k], rtol=1e-4, atol=1e-4)


def test_levels_of_a_vit_are_its_blocks_through_the_last_norm():
    matcher, images = small(load=True, levels="0,2"), torch.randn(2, 3, 128, 128)
    shaken(matcher.backbone.vit.norm, 0.5)
    for k, found in enumerate(matcher.backbone(images)):
        one = load_backbone("deep_vit8", layer=(0, 2)[k])
        one.vit.norm.load_state_dict(matcher.backbone.vit.norm.state_dict())
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), one(images)[0])
    assert small(load=True).backbone.levels == [2]
    assert len(small(load=True, levels="0").backbone.vit.blocks) == 1


def test_batch_norm_keeps_its_statistics():
    matcher = Cats(CatsConfig(backbone="resnet18", levels="0,8"), load=False).train()
    assert matcher.training and matcher.aggregator.training
    norms = [m for m in matcher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and not any(m.training for m in norms)
    before = [m.running_mean.clone() for m in norms]
    matcher.features(torch.randn(2, 3, 64, 64) + 1)
    assert all(torch.equal(m.running_mean, mean) for m, mean in zip(norms, before))


def test_batch_norm_keeps_its_statistics_in_a_matcher_as_built():
    matcher = Cats(CatsConfig(backbone="resnet18", levels="0,8"), load=False)
    assert not any(m.training for m in matcher.modules() if isinstance(m, nn.BatchNorm2d))


def test_maps_are_resized_with_their_corners_on_corners_and_stand_one_after_the_other():
    matcher, maps = small(levels="0,1"), [torch.randn(1, 3, 5, 7), torch.randn(1, 2, 32, 16)]
    matcher.backbone.forward = lambda images: maps
    got = matcher.features(torch.zeros(1, 3, 8, 8)).feat[0].view(GRID, GRID, 5)
    for first, m in ((0, maps[0][0]), (3, maps[1][0])):
        channels, h, w = m.shape
        for r in range(GRID):
            for c in range(GRID):
                y, x = r * (h - 1) / 15, c * (w - 1) / 15
                torch.testing.assert_close(got[r, c, first : first + channels], read_bilinear(m, x, y))


def read_bilinear(m: Tensor, x: float, y: float) -> Tensor:
    """m (C, h, w) at column x and row y, which are first brought into the map."""
    h, w = m.shape[1:]
    x, y = min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1 = min(x0 + 1, w - 1), min(y0 + 1, h - 1)
    top = m[:, y0, x0] * (1 - (x - x0)) + m[:, y0, x1] * (x - x0)
    bottom = m[:, y1, x0] * (1 - (x - x0)) + m[:, y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


# ------------------------------------------------------------------------------------------------------------
# Volume and aggregator


def filtered_by_loops(corr: Tensor) -> Tensor:
    """The soft mutual filter of one volume (Ns, Nt)."""
    rows, columns = corr.tolist(), corr.T.tolist()
    best_of_row, best_of_column = ([max(line) or 1e-30 for line in lines] for lines in (rows, columns))
    return torch.tensor(
        [[c * (c / best_of_row[i]) * (c / best_of_column[j]) for j, c in enumerate(row)]
         for i, row in enumerate(rows)]
    )


def test_mutual_filter_by_loops():
    corr = torch.rand(2, 3, 5, 7) * 2 - 0.7
    corr[0, 1, 2] = 0  # the best of a source cell is zero
    corr[1, 2, :, 3] = corr[1, 2, :, 3].clamp(max=0).mul(1e-9)  # and of a target cell, beside tiny negatives
    corr[1, 2, 0, 3] = 0
    got = cats.mutual_filter(corr)
    assert got.isfinite().all() and (got[0, 1, 2] == 0).all()
    for b in range(2):
        for level in range(3):
            torch.testing.assert_close(got[b, level], filtered_by_loops(corr[b, level]), rtol=1e-4, atol=1e-6)


def linear(x: Tensor, weights: dict, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: dict, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def block(x: Tensor, weights: dict, name: str, heads: int) -> Tensor:
    """A pre-norm block on tokens (n, C): attention a head at a time, then an MLP of four times the width."""
    dim = x.shape[-1]
    qkv = linear(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn.qkv")
    seen, wide = [], dim // heads
    for head in range(heads):
        q, k, v = (qkv[:, part * dim + head * wide : part * dim + (head + 1) * wide] for part in range(3))
        logits = q @ k.T / math.sqrt(wide)
        weight = (logits - logits.amax(1, keepdim=True)).exp()
        seen.append(weight / weight.sum(1, keepdim=True) @ v)
    x = x + linear(torch.cat(seen, 1), weights, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def aggregate(corr: Tensor, src: Tensor, trg: Tensor, weights: dict, depth: int, heads: int) -> Tensor:
    """The whole transformer for one pair: corr (L, Ns, Nt), src and trg (L, N, P)."""
    levels = len(corr)

    def one_pass(tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        for level in range(levels):
            for row in range(GRID):
                for column in range(GRID):
                    x = weights["position_x"][0, level, 0, column]
                    y = weights["position_y"][0, level, row, 0]
                    tokens[level, row * GRID + column] += torch.cat([x, y])
        for d in range(depth):
            cells = f"blocks.{d}.cells"
            tokens = torch.stack([block(tokens[k], weights, cells, heads) for k in range(levels)])
            if levels > 1:
                several = [block(tokens[:, n], weights, f"blocks.{d}.levels", heads) for n in range(N)]
                tokens = torch.stack(several, 1)
        return torch.stack([linear(tokens[k], weights, "proj") for k in range(levels)])

    first = one_pass(torch.stack([torch.cat([corr[k].T, trg[k]], 1) for k in range(levels)]))
    refined = torch.stack([first[k].T + corr[k] for k in range(levels)])
    second = one_pass(torch.stack([torch.cat([refined[k], src[k]], 1) for k in range(levels)]))
    return sum(second[k] + corr[k] for k in range(levels)) / levels


@pytest.mark.parametrize("levels, depth", [(1, 1), (3, 1), (3, 2), (1, 2)])
def test_aggregator_is_two_passes_of_one_transformer(levels, depth):
    aggregator = shaken(Aggregator(levels, 16, depth, 4), 0.05)
    corr, src, trg = torch.randn(2, levels, N, N), *torch.randn(2, 2, levels, N, 16)
    with torch.no_grad():
        got, weights = aggregator(corr, src, trg), aggregator.state_dict()
        for b in range(2):
            expected = aggregate(corr[b], src[b], trg[b], weights, depth, 4)
            assert (expected - corr[b].mean(0)).abs().max() > 0.1
            torch.testing.assert_close(got[b], expected, rtol=1e-3, atol=1e-4)


def literal_volumes(matcher: Cats, src: Tensor, trg: Tensor) -> Tensor:
    """The filtered cosine volumes (L, Ns, Nt) of one pair's features (N, C)."""
    volumes, first = [], 0
    for width in matcher.backbone.widths:
        s, t = (side[:, first : first + width] for side in (src, trg))
        s, t = (side / side.square().sum(1, keepdim=True).sqrt() for side in (s, t))
        volumes.append(filtered_by_loops(s @ t.T))
        first += width
    return torch.stack(volumes)


def test_matcher_is_filter_projection_and_aggregator():
    matcher, src, trg = shaken(small(levels="0,1"), 0.05), features(2, 256), features(2, 256)
    src.feat.mul_(3)  # features are projected as they are, and compared without their lengths
    weights, heads = matcher.aggregator.state_dict(), matcher.state_dict()
    with torch.no_grad():
        got = matcher(src, trg)
        for b in range(2):
            sides = ([x.feat[b, :, 128 * k : 128 * (k + 1)] for k in (0, 1)] for x in (src, trg))
            parts = [torch.stack([linear(x, heads, f"project.{k}") for k, x in enumerate(side)])
                     for side in sides]
            volumes = literal_volumes(matcher, src.feat[b], trg.feat[b])
            expected = aggregate(volumes, *parts, weights, 1, 4)
            torch.testing.assert_close(got[b], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("levels", ["1", "0,1"])
def test_an_untrained_matcher_is_the_mean_of_the_filtered_volumes(levels):
    matcher, channels = small(levels=levels), 128 * len(levels.split(","))
    src, trg = features(1, channels), features(1, channels)
    with torch.no_grad():
        got = matcher(src, trg)
    expected = literal_volumes(matcher, src.feat[0], trg.feat[0]).mean(0)
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)


def test_positions_and_weights_start_random_and_the_last_projection_at_zero():
    aggregator = Aggregator(3, 128, 1, 6)
    for name, p in aggregator.named_parameters():
        if name.startswith("proj.") or name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert (p == 1).all(), name


# ------------------------------------------------------------------------------------------------------------
# Flow


def test_soft_argmax_and_flow_by_loops():
    corr, beta = torch.randn(2, N, N) * 0.05, 0.02
    places, flow = cats.soft_argmax(corr, beta), cats.flow_of(corr, beta)
    assert places.shape == (2, N, 2) and flow.shape == (2, 2, GRID, GRID)
    for b, column in ((0, 0), (0, 37), (1, 255), (1, 128)):
        exps = [math.exp(v / beta) for v in corr[b, :, column].tolist()]
        x = sum(e * (i % 16) for i, e in enumerate(exps)) / sum(exps)
        y = sum(e * (i // 16) for i, e in enumerate(exps)) / sum(exps)
        assert places[b, column].tolist() == pytest.approx([x, y], abs=1e-4)
        r, c = divmod(column, 16)
        assert flow[b, :, r, c].tolist() == pytest.approx([x - c, y - r], abs=1e-4)


def target_by_loops(src: Tensor, trg: Tensor, original: bool) -> tuple[Tensor, Tensor]:
    """Flow and valid from points in the pixels of 256x256 images whose left edge is at 0, cell by cell."""
    flow, valid = torch.zeros(2, GRID, GRID), torch.zeros(GRID, GRID, dtype=torch.bool)
    for r in range(GRID):
        for c in range(GRID):
            cx, cy = 16 * c + 8, 16 * r + 8
            inside = [k for k, (x, y) in enumerate(trg.tolist()) if abs(x - cx) <= 17 and abs(y - cy) <= 17]
            if not inside:
                continue
            mean = [sum(float(trg[k, axis]) for k in inside) / len(inside) for axis in (0, 1)]
            chosen = inside[-1:] if original else inside
            start = [sum(float(src[k, axis]) for k in chosen) / len(chosen) for axis in (0, 1)]
            flow[:, r, c] = torch.tensor([(s - m) / 16 for s, m in zip(start, mean)])
            valid[r, c] = not original or any(v != 0 for v in flow[:, r, c].tolist())
    return flow, valid


@pytest.mark.parametrize("original", [False, True])
def test_flow_target_by_loops(original):
    src, trg = torch.rand(2, 12, 2) * 256
    trg[:4] = torch.tensor([100.0, 90.0]) + torch.rand(4, 2) * 20  # shared cells
    trg[4] = torch.tensor([25.0, 41.0])  # exactly 17 px from the cells at 8, 24 and 42 px
    src[5] = trg[5] = torch.tensor([248.0, 8.0])  # no flow, alone in its cells
    trg[6:] = torch.rand(6, 2) * torch.tensor([256.0, 100.0]) + torch.tensor([0.0, 156.0])
    flow, valid = flow_target(src / 16 - 0.5, trg / 16 - 0.5, original)
    expected = target_by_loops(src, trg, original)
    assert torch.equal(valid, expected[1]) and 20 < int(valid.sum()) < 200
    torch.testing.assert_close(flow, expected[0], rtol=1e-4, atol=1e-5)
    assert bool(valid[0, 15]) != original  # the true zero
    corner = flow_target(torch.zeros(1, 2), torch.tensor([[-0.5, -0.5]]), original)[1]
    assert corner.nonzero().tolist() == [[0, 0]]  # the corner is 8 px from one centre, 24 px from the next


def test_flow_is_in_full_precision_under_autocast():
    corr = torch.randn(2, GRID**2, GRID**2)
    with torch.autocast("cpu", torch.bfloat16):
        found = cats.flow_of(corr, 0.1)
    assert torch.equal(found, cats.flow_of(corr, 0.1))


def test_end_point_error_by_loops_over_the_whole_batch():
    flow, target = torch.randn(2, 3, 2, 4, 5)
    valid = torch.rand(3, 4, 5) < 0.4
    valid[1] = False
    valid[2, 0] = True
    places = valid.nonzero().tolist()
    found = [math.hypot(*(flow[b, :, r, c] - target[b, :, r, c]).tolist()) for b, r, c in places]
    assert float(end_point_error(flow, target, valid)) == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_end_point_error_has_a_gradient_everywhere():
    target, valid = torch.randn(1, 2, 4, 4), torch.rand(1, 4, 4) < 0.5
    flow = target.clone().requires_grad_()
    end_point_error(flow, target, valid).backward()
    assert flow.grad.isfinite().all()
    nothing = end_point_error(flow * 2, target, torch.zeros_like(valid))
    nothing.backward()
    assert float(nothing.detach()) == 0 and flow.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Points


def test_transfer_reads_the_flow_bilinearly(monkeypatch):
    flow = torch.randn(2, 2, GRID, GRID)
    monkeypatch.setattr(cats, "flow_of", lambda corr, beta: flow)
    points = torch.rand(2, 40, 2) * 16 - 0.5
    points[0, :6] = torch.tensor([[-0.5, -0.5], [15.5, 15.5], [0, 0], [15, 15], [15.4, 3.25], [6.5, -0.3]])
    got = small().transfer(features(2, 128), features(2, 128), points)
    for b in range(2):
        for (x, y), moved in zip(points[b].tolist(), got[b]):
            expected = torch.tensor([x, y]) + read_bilinear(flow[b], x, y)
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_points_move_from_source_to_target():
    """Every source cell has the features of one target cell, and of no other."""
    partner = torch.stack([torch.randperm(N) for _ in range(2)])
    src = features(2, 128)
    trg = features(2, 128)
    for b in range(2):
        trg.feat[b, partner[b]] = src.feat[b]
    centres = torch.tensor([[n % GRID, n // GRID] for n in range(N)]).float()
    moved = small().transfer(src, trg, centres.expand(2, -1, -1))
    for b in range(2):
        torch.testing.assert_close(moved[b], centres[partner[b]], rtol=0, atol=0.02)


def test_the_source_asks_and_the_target_is_looked_into(monkeypatch):
    src, trg, known = features(1, 128), features(1, 128), torch.randperm(N)

    def volume(self, searched: Features, query: Features) -> Tensor:
        assert torch.equal(searched.feat, trg.feat) and torch.equal(query.feat, src.feat)
        corr = torch.zeros(1, N, N)
        corr[0, known, torch.arange(N)] = 1  # (cells of what is looked into, cells that ask)
        return corr

    monkeypatch.setattr(Cats, "forward", volume)
    centres = torch.tensor([[n % GRID, n // GRID] for n in range(N)]).float()
    moved = small().transfer(src, trg, centres[None])
    torch.testing.assert_close(moved[0], centres[known], rtol=0, atol=1e-3)


def peak_by_loops(row: list[float]) -> list[float]:
    """Softmax at 0.05 of a row over its maximum, under a Gaussian of 2.5 cells around it: its mean place."""
    top = max(row)
    r, c = divmod(row.index(top), GRID)
    total = x = y = 0.0
    for n, value in enumerate(row):
        j, i = divmod(n, GRID)
        weight = math.exp((value / top - 1) / 0.05) * math.exp(-((i - c) ** 2 + (j - r) ** 2) / (2 * 2.5**2))
        total, x, y = total + weight, x + weight * i, y + weight * j
    return [x / total, y / total]


@pytest.mark.parametrize("peaked", [True, False])
def test_the_kernel_reads_the_volumes_rows_by_loops(monkeypatch, peaked):
    """Of the volume in which the source's cells look into the target; CATs' own reading is the default."""
    matcher, src, trg = shaken(small()), features(2, 128), features(2, 128)
    if not peaked:  # many cells have a say, and the Gaussian which
        flat = {id(src.feat): torch.rand(2, N, N), id(trg.feat): 1 + 0.2 * torch.rand(2, N, N)}
        monkeypatch.setattr(Cats, "forward", lambda self, searched, query: flat[id(searched.feat)])
    points = torch.rand(2, 30, 2) * 16 - 0.5
    points[0, :6] = torch.tensor([[-0.5, -0.5], [15.5, 15.5], [0, 0], [15, 15], [15.4, 3.25], [6.5, -0.3]])
    got = matcher.transfer(src, trg, points, "kernel")
    with torch.no_grad():
        corr = matcher(trg, src)  # (B, target cells, source cells)
    for b in range(2):
        for (x, y), moved in zip(points[b].tolist(), got[b].tolist()):
            row = read_bilinear(corr[b].view(N, GRID, GRID), x, y).tolist()
            assert max(row) > 0 and moved == pytest.approx(peak_by_loops(row), abs=1e-3)
    own = matcher.transfer(src, trg, points)
    assert torch.equal(own, matcher.transfer(src, trg, points, "cats"))
    torch.testing.assert_close(own, points + cats.read_at(cats.flow_of(corr, 0.02), points))
    assert (own - got).norm(dim=2).mean() > 0.1


# ------------------------------------------------------------------------------------------------------------
# Pairs as CATs' loader gives them


class Pictures:
    """Photographs of noise in the place of an ImageSet."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        rng = np.random.default_rng(0)
        coarse = [rng.integers(0, 256, (9, 9, 3), dtype=np.uint8) for _ in sizes]
        self.images = [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC)
                       for c, size in zip(coarse, sizes)]

    def load(self, index: int) -> tuple[Image.Image, None]:
        return self.images[index], None

    def size(self, index: int) -> tuple[int, int]:
        return self.images[index].size


SIZES = [(500, 375), (300, 200), (97, 333), (640, 480)]


def couples(rule: str = "bbox", n: int = 9) -> KeypointSet:
    pairs = []
    for src, trg in ((0, 1), (1, 2), (2, 3), (3, 0)):
        kps = [torch.rand(n, 2) * torch.tensor(SIZES[image]) for image in (src, trg)]
        boxes = [(3.0, 2.0, w * 0.9, h * 0.7) for w, h in (SIZES[src], SIZES[trg])]
        pairs.append(KeypointPair(src, trg, *kps, "noise", *boxes))
    return KeypointSet("SPair-71k test", Pictures(SIZES), pairs, rule)


def released_points(matcher: Cats, source: Image.Image, target: Image.Image, trg_kps: Tensor) -> Tensor:
    """What CATs' released evaluation does, in its 256 x 256 frame: resize, flow to full size, read, add."""
    to_tensor = transforms.Compose([transforms.Resize((256, 256)), transforms.ToTensor(),
                                    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    src, trg = (matcher.features(to_tensor(image)[None]) for image in (source, target))
    flow = nn.functional.interpolate(cats.flow_of(matcher(src, trg), 0.02), (256, 256), mode="bilinear") * 16
    found = []
    for x, y in trg_kps.tolist():
        column, row = (min(max(int(v), 0), 255) for v in (x * 256 / target.width, y * 256 / target.height))
        found.append(torch.tensor([column, row]) + flow[0, :, row, column])
    return torch.stack(found)


def test_the_points_are_those_of_cats_released_evaluation():
    """To a hundredth of a pixel; read bicubically, with half a pixel of the image, they are 0.1 and more off.
    """
    matcher, keypoints = shaken(small(load=True, size=256, levels="0,1"), 0.03).eval(), couples()
    asked = PROTOCOLS["cats"](keypoints)
    found = predict(matcher, as_cats_reads(asked, 256), ["cats"], quiet=True)["cats"]
    bare = predict(matcher, asked, ["cats"], quiet=True)["cats"]
    off = []
    for pair, pred, own in zip(keypoints.pairs, found, bare, strict=True):
        images = [keypoints.load(image)[0] for image in (pair.src, pair.trg)]
        with torch.no_grad():
            truth = released_points(matcher, *images, pair.trg_kps)
        torch.testing.assert_close(pred, truth, rtol=0, atol=0.01)
        off.append((own * 256 / torch.tensor(images[0].size) - truth).norm(dim=1))
    assert torch.cat(off).mean() > 0.1


@pytest.mark.parametrize("rule", ["bbox", "img"])
@pytest.mark.parametrize("name", [None, "target", "cats", "actr", "vat"])
def test_pairs_as_cats_reads_them_are_scored_as_before(rule, name):
    """Points that are moved into the frame with their pairs are right where they were."""
    keypoints = couples(rule)
    asked = PROTOCOLS[name](keypoints) if name else keypoints
    framed = as_cats_reads(asked, 256)
    assert [framed.size(image) for image in range(4)] == [(256, 256)] * 4
    assert framed.load(0)[0].size == (256, 256)
    predictions, moved = [], []
    for p, q in zip(asked.pairs, framed.pairs, strict=True):
        src, trg = (256 / torch.tensor(SIZES[image]) for image in (p.src, p.trg))
        torch.testing.assert_close(q.src_kps, p.src_kps * src)
        torch.testing.assert_close(q.trg_kps, p.trg_kps * trg)
        predictions.append(p.trg_kps + torch.randn(9, 2) * 30)
        moved.append(predictions[-1] * trg)
    before, after = score(predictions, asked)[rule], score(moved, framed)[rule]
    assert before == after and 0 < before["per_image"][0] < before["per_image"][2] < 100


def test_images_are_squashed_bilinearly():
    image = Pictures(SIZES).load(0)[0]
    framed = as_cats_reads(couples(), 64).load(0)[0]
    for filter_, same in ((Image.Resampling.BILINEAR, True), (Image.Resampling.BICUBIC, False)):
        assert np.array_equal(framed, image.resize((64, 64), filter_)) == same
    crop = (10.0, 20.0, 300.0, 200.0)
    expected = image.resize((64, 64), Image.Resampling.BILINEAR, box=crop)
    assert np.array_equal(cats.squashed(image, 64, crop), expected)


# ------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("options, words", [
    ({"backbone": "resnet999"}, "--backbone resnet999: resnet101"),
    ({"backbone": "vgg16"}, "--backbone vgg16"),
    ({"levels": "2,1"}, "--levels 2,1: of deep_vit8, some of 0 to 2 in ascending order"),
    ({"levels": "1,1"}, "--levels 1,1"),
    ({"levels": "3"}, "--levels 3"),
    ({"levels": "-1"}, "--levels -1"),
    ({"levels": "one"}, "--levels one: numbers joined by commas"),
    ({"levels": "1,"}, "--levels 1,"),
    ({"backbone": "resnet18", "levels": "3,9"}, "--levels 3,9: of resnet18, some of 0 to 8"),
    ({"backbone": "resnet18"}, "--levels 0,8,20"),
    ({"size": 100}, "--size 100: not a multiple of the patch of deep_vit8, 8 px"),
    ({"backbone": "resnet18", "levels": "8", "size": 250}, "--size 250: not a multiple"),
    ({"heads": 7}, "heads 7: must divide 256 + projection 16"),
    ({"projection": 13, "heads": 1}, "projection 13"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError) as error:
        small(**options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_wrapped_resnet_are_read(tmp_path, prefix):
    state = unlike_its_start(torchvision.models.resnet18()).state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "wrapped.pth")
    cfg = CatsConfig(backbone="resnet18", levels="1", backbone_weights=str(tmp_path / "wrapped.pth"))
    assert torch.equal(Cats(cfg).backbone.stem[0].weight, state["conv1.weight"])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError) as error:
        small(load=True, backbone="resnet18", backbone_weights=str(tmp_path / "nan.pth"), levels="1")
    assert f"{tmp_path / 'nan.pth'} is damaged: layer1.0.conv1.weight is not finite" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["missing", "text", "list", "numbers", "other"])
@pytest.mark.parametrize("backbone", ["resnet18", "deep_vit8"])
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, content, backbone):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content != "missing":
        torch.save({"list": [1], "numbers": {"a": 1}, "other": {"a": torch.zeros(1)}}[content], path)
    with pytest.raises(ValueError) as error:
        small(load=True, backbone=backbone, backbone_weights=str(path), levels="1")
    assert str(path) in str(error.value) and "--backbone-weights" in str(error.value)
    assert "\n" not in str(error.value)
