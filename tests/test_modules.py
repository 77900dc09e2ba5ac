"""Backbone, MVAM, PMPS and keypoint transfer against literal computations."""

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from literal import greedy_literal, hough_loop, hough_table

import support.backbone
from modules import (
    MVAM,
    Features,
    GatedCrossAttention,
    Pairs,
    VolumeAggregation,
    WindowAttention4D,
    adaptive_pooling,
    cosine_volume,
    greedy_selection,
    hough_matching,
    kernel_soft_argmax,
    mil_loss,
    pair_nms,
    patch_shuffle,
    patch_split,
    read_at,
    transfer_keypoints,
    window_merge,
    window_partition,
)
from support.backbone import Backbone, load_backbone
from support.conditioning import Conditioning, pair_axes
from support.ours import LocalFeedForward, neighbourhood_consensus


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------
# Backbone


@pytest.fixture
def small(monkeypatch):
    """Every family at a width that takes no time, under its own names."""
    for name, spec in list(support.backbone.BACKBONES.items()):
        monkeypatch.setitem(support.backbone.BACKBONES, name, spec._replace(width=24, heads=3, depth=3))


def literal_vit(
    state: dict, images: torch.Tensor, heads: int, patch: int, pos: torch.Tensor, layer: int
) -> torch.Tensor:
    """A ViT written with nothing but matrix products, from an official state dict."""

    def norm(x, key):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]

    h, w = images.shape[-2] // patch, images.shape[-1] // patch
    weight = state["patch_embed.proj.weight"].flatten(1)
    cells = (
        images.unfold(2, patch, patch)
        .unfold(3, patch, patch)
        .permute(0, 2, 3, 1, 4, 5)
        .reshape(len(images), h * w, -1)
    )
    x = torch.cat(
        [state["cls_token"].expand(len(images), -1, -1), cells @ weight.T + state["patch_embed.proj.bias"]], 1
    )
    x = x + pos
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(layer + 1):
        key = f"blocks.{i}"
        y = norm(x, f"{key}.norm1") @ state[f"{key}.attn.qkv.weight"].T + state[f"{key}.attn.qkv.bias"]
        q, k, v = y.view(*y.shape[:2], 3, heads, -1).unbind(2)  # (B, N, heads, C)
        attention = torch.einsum("bnhc,bmhc->bhnm", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        y = torch.einsum("bhnm,bmhc->bnhc", attention, v).flatten(2)
        y = y @ state[f"{key}.attn.proj.weight"].T + state[f"{key}.attn.proj.bias"]
        x = x + y * state.get(f"{key}.ls1.gamma", torch.ones(()))
        y = F.gelu(norm(x, f"{key}.norm2") @ state[f"{key}.mlp.fc1.weight"].T + state[f"{key}.mlp.fc1.bias"])
        y = y @ state[f"{key}.mlp.fc2.weight"].T + state[f"{key}.mlp.fc2.bias"]
        x = x + y * state.get(f"{key}.ls2.gamma", torch.ones(()))
    return norm(x, "norm")


def randomise(backbone: Backbone) -> dict:
    for p in backbone.vit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return {k: v.clone() for k, v in backbone.vit.state_dict().items()}


@pytest.mark.parametrize("name", ["ibot_vitb16", "dino_vits8", "dinov2_vits14", "dinov2_vitb14_reg"])
def test_backbone_matches_a_vit_of_matrix_products(small, name):
    backbone = Backbone(name, layer=1)
    state, spec = randomise(backbone), backbone.vit.spec
    images = torch.randn(2, 3, 3 * spec.patch, 5 * spec.patch)
    feat, token, attention = backbone(images, attention=True)
    expected = literal_vit(
        state, images, spec.heads, spec.patch, backbone.vit.position_embedding(3, 5), layer=1
    )
    torch.testing.assert_close(feat, expected[:, -15:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(token, expected[:, 0], rtol=1e-3, atol=1e-4)
    assert attention.shape == (2, 3, 5)
    assert attention.amin((1, 2)).tolist() == [0, 0] and attention.amax((1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("outlier", [1, 3, 1000])
def test_an_outlier_cell_does_not_set_the_scale_of_the_attention(monkeypatch, outlier):
    """Given attention of 1 to 40 over 40 cells, the last of them times an outlier."""
    backbone, values = load_backbone("random_vit8"), torch.arange(1.0, 41)
    values[39] *= outlier
    attn = backbone.vit.blocks[-1].attn
    q, k = torch.zeros(1, 2, 41, 64), torch.zeros(1, 2, 41, 64)
    q[..., 0], k[:, :, 1:, 0] = 8, values.log()  # softmax(q k / 8) gives the values, but for their sum
    monkeypatch.setattr(attn, "split", lambda x: (q, k, k))
    attention = backbone(torch.randn(1, 3, 40, 64), attention=True)[2]
    expected = ((torch.arange(1.0, 41) - 1) / (36.1 - 1)).clamp(max=1)  # 36.1: the 0.9 quantile of 1 to 40
    torch.testing.assert_close(attention, expected.view(1, 5, 8))


def test_the_attention_map_is_that_of_the_class_token(small):
    """Its row of softmax(q k / sqrt d) in the last block, mean over heads, from its minimum to its 0.9
    quantile."""
    backbone = Backbone("dinov2_vits14_reg", layer=1)
    state = randomise(backbone)
    images = torch.randn(2, 3, 3 * 14, 5 * 14)
    _, before = backbone.vit.read(images, [1])
    y = F.layer_norm(before, (24,), state["blocks.1.norm1.weight"], state["blocks.1.norm1.bias"], 1e-6)
    q, k, _ = (y @ state["blocks.1.attn.qkv.weight"].T + state["blocks.1.attn.qkv.bias"]).chunk(3, -1)
    rows = torch.zeros(2, 15)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        rows += (
            torch.einsum("bc,bnc->bn", q[:, 0, part], k[..., part]).div(math.sqrt(8)).softmax(-1)[:, -15:] / 3
        )
    low, high = rows.amin(1, keepdim=True), rows.quantile(0.9, 1, keepdim=True)
    expected = ((rows - low) / (high - low)).clamp(max=1).view(2, 3, 5)
    torch.testing.assert_close(backbone(images, attention=True)[2], expected, rtol=1e-3, atol=1e-4)


def test_several_blocks_stand_side_by_side(small):
    several, alone = Backbone("dino_vits8", "-1,0"), [Backbone("dino_vits8", layer) for layer in (0, -1)]
    state = randomise(several)
    images = torch.randn(2, 3, 24, 40)
    feat, token, attention = several(images, attention=True)
    for k, one in enumerate(alone):
        one.vit.load_state_dict(state)
        of_one, token_of_one, attention_of_one = one(images, attention=True)
        channels = slice(k * one.dim, (k + 1) * one.dim)
        assert torch.equal(feat[..., channels], of_one) and torch.equal(token[..., channels], token_of_one)
    assert feat.shape[-1] == several.dim == 2 * alone[0].dim
    assert torch.equal(attention, attention_of_one)  # that of the last block
    with pytest.raises(ValueError, match="--layer 0;1: a block, or several"):
        Backbone("dino_vits8", "0;1")


def test_conditioning_is_half_whitened_principal_axes():
    """Against numpy's SVD: the projected cells have no mean, no correlations, and the root of the variance
    they had."""
    cells = torch.randn(400, 7) @ torch.randn(7, 7) + 5 * torch.randn(7)
    conditioning = Conditioning(7, 3)
    conditioning.fit(cells)
    x = cells.double().numpy()
    _, singular, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    variance = singular[:3] ** 2 / len(x)
    expected = (x - x.mean(0)) @ axes[:3].T / variance**0.25
    found = conditioning(cells).double().numpy()
    np.testing.assert_allclose(
        found @ found.T, expected @ expected.T, rtol=1e-3, atol=1e-3
    )  # axes may change sign
    np.testing.assert_allclose(found.T @ found / len(x), np.diag(variance**0.5), atol=1e-3)
    np.testing.assert_allclose(conditioning(torch.from_numpy(x.mean(0)).float()).numpy(), 0, atol=1e-4)
    with pytest.raises(ValueError, match="--axes 3: 400 cells .* vary along fewer"):
        conditioning.fit(cells[:, :1] @ torch.ones(1, 7))
    with pytest.raises(ValueError, match="--axes 8: the backbone's cells have 7 channels"):
        Conditioning(7, 8)


def test_pair_axes_are_those_of_the_couples_own_cells():
    """Against the conditioning of both images' cells together, and of their mirror images' where there are
    such, a couple at a time; few cells leave axes at zero."""

    def image(feat: torch.Tensor) -> Features:
        return Features(feat, torch.randn(2, 12), torch.rand(2, feat.shape[1], 1))

    src, trg = image(torch.randn(2, 30, 12) + 3), image(torch.randn(2, 20, 12))
    turned_s, turned_t = image(torch.randn(2, 30, 12) - 2), image(torch.randn(2, 20, 12) * 2)
    for ends in ((src, trg), (src._replace(mirror=turned_s), trg._replace(mirror=turned_t))):
        found = pair_axes(*ends, axes=5)
        sides = [x for end in ends for x in (end, end.mirror) if x is not None]
        got = [x for end in found for x in (end, end.mirror) if x is not None]
        assert [x.feat.shape for x in got] == [(2, x.feat.shape[1], 5) for x in sides]
        assert all(x.token is y.token and x.saliency is y.saliency for x, y in zip(got, sides))
        for b in range(2):
            conditioning = Conditioning(12, 5)
            conditioning.fit(torch.cat([x.feat[b] for x in sides]))
            for x, y in zip(got, sides):
                torch.testing.assert_close(
                    x.feat[b].abs(), conditioning(y.feat[b]).abs(), rtol=1e-3, atol=1e-4
                )
    few = pair_axes(*(image(x.feat[:, :2]) for x in (src, trg)), axes=99)
    few = torch.cat([x.feat for x in few], 1)  # four cells vary along three directions
    assert few.shape == (2, 4, 12) and (few.abs().amax(1) > 1e-4).sum(1).tolist() == [3, 3]
    assert few.isfinite().all()


def test_position_embedding_samples_with_the_official_scale_factor(small):
    """DINO, iBOT and DINOv2 sample at (i + 0.5) * grid / (h + 0.1) - 0.5; DINOv2 with registers at the exact
    ratio."""

    def cubic(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys' cubic convolution, a = -0.75, along the first axis, borders repeated."""
        out = []
        for x in positions.tolist():
            left, row = math.floor(x), 0.0
            for k in range(left - 1, left + 3):
                d = abs(x - k)
                near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
                row = (
                    row + (near if d <= 1 else far if d < 2 else 0.0) * table[min(max(k, 0), len(table) - 1)]
                )
            out.append(row)
        return torch.stack(out)

    for name, h, w in (("ibot_vits16", 32, 17), ("dino_vits8", 40, 30), ("dinov2_vits14", 16, 40)):
        vit = Backbone(name).vit
        torch.nn.init.normal_(vit.pos_embed)
        grid = vit.spec.grid
        table = vit.pos_embed[0, 1:].view(grid, grid, -1)
        rows = cubic(table, (torch.arange(h) + 0.5) * grid / (h + 0.1) - 0.5)
        both = cubic(rows.transpose(0, 1), (torch.arange(w) + 0.5) * grid / (w + 0.1) - 0.5).transpose(0, 1)
        pos = vit.position_embedding(h, w)
        torch.testing.assert_close(pos[0, 1:], both.flatten(0, 1), rtol=1e-3, atol=1e-4)
        assert torch.equal(pos[:, 0], vit.pos_embed[:, 0])
        assert torch.equal(vit.position_embedding(grid, grid), vit.pos_embed)
    vit = Backbone("dinov2_vits14_reg").vit
    torch.nn.init.normal_(vit.pos_embed)
    table = vit.pos_embed[0, 1:].view(37, 37, -1)
    rows = cubic(table, (torch.arange(74) + 0.5) / 2 - 0.5)  # antialiasing changes nothing when enlarging
    both = cubic(rows.transpose(0, 1), (torch.arange(111) + 0.5) / 3 - 0.5).transpose(0, 1)
    # Pillow-style resampling, which antialias=True selects, has a = -0.5: compare with torch's own on the
    # exact size.
    official = F.interpolate(table.permute(2, 0, 1)[None], size=(74, 111), mode="bicubic", antialias=True)
    torch.testing.assert_close(vit.position_embedding(74, 111)[0, 1:], official[0].flatten(1).T)
    assert (official[0].permute(1, 2, 0) - both).abs().mean() < 0.1  # the same grid, another kernel


def test_checkpoints_of_every_form_load_strictly(small, tmp_path):
    """Flat, teacher-only, and iBOT's full training file with prefixes, head, masks, an argparse Namespace;
    half too."""
    source = Backbone("ibot_vits16")
    flat = randomise(source)
    prefixed = {f"module.backbone.{k}": v for k, v in flat.items()}
    prefixed |= {
        "module.backbone.masked_embed": torch.zeros(1, 24),
        "module.head.mlp.0.weight": torch.zeros(3),
    }
    forms = {
        "flat": flat,
        "half": {k: v.half() for k, v in flat.items()},
        "teacher_only": {"state_dict": flat},
        "full": {
            "student": {f"module.backbone.{k}": v + 1 for k, v in flat.items()},
            "teacher": prefixed,
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small"),
        },
        "compiled": {f"module._orig_mod.{k}": v for k, v in flat.items()},
        "dinov2_trainer": {
            "teacher": {f"backbone.{k}": v for k, v in flat.items()}
            | {"dino_head.last.weight": torch.zeros(3), "ibot_head.mlp.0.weight": torch.zeros(3)}
        },
        "side_by_side": {f"teacher.backbone.{k}": v for k, v in flat.items()}
        | {f"student.backbone.{k}": v + 1 for k, v in flat.items()},
    }
    for name, state in forms.items():
        torch.save(state, tmp_path / f"{name}.pth")
        loaded = load_backbone("ibot_vits16", str(tmp_path / f"{name}.pth")).vit.state_dict()
        assert loaded.keys() == flat.keys()
        for key, value in flat.items():
            assert loaded[key].dtype == torch.float32
            torch.testing.assert_close(loaded[key], value, rtol=1e-3, atol=1e-3, msg=f"{name}: {key}")


def test_a_wrong_checkpoint_is_one_clear_error(small, tmp_path):
    flat = Backbone("dino_vits16").vit.state_dict()
    missing = {k: v for k, v in flat.items() if k != "blocks.1.norm1.weight"}
    wide = flat | {"norm.weight": torch.ones(48)}
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint at all")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"evil": Path}, tmp_path / "code.pth")
    broken = flat | {"norm.weight": torch.full((24,), float("nan"))}
    for name, state, words in (
        ("missing", missing, ("1 keys missing", "blocks.1.norm1.weight")),
        (
            "extra",
            flat | {"blocks.9.norm1.weight": flat["norm.weight"]},
            ("1 unknown", "blocks.9.norm1.weight"),
        ),
        ("wide", wide, ("norm.weight is (48,), not (24,)",)),
        ("broken", broken, ("broken.pth is damaged: norm.weight holds values that are not finite",)),
        ("numbered", {0: flat["norm.weight"]}, ("is not a checkpoint of dino_vits16", "unknown (such as 0)")),
        ("text", flat | {"norm.weight": "ones"}, ("norm.weight is str, not (24,)",)),
        ("code", None, ("code.pth", "not a plain file of torch.save")),
        ("noise", None, ("noise.pth", "--weights")),
        ("list", None, ("holds a list",)),
        ("absent", None, ("absent.pth", "--weights")),
    ):
        if state is not None:
            torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError) as error:
            load_backbone("dino_vits16", str(tmp_path / f"{name}.pth"))
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
        assert "weights_only" not in str(error.value)
        assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(ValueError, match="unknown backbone 'resnet'"):
        load_backbone("resnet")
    with pytest.raises(ValueError, match="--layer 3"):
        load_backbone("random_vit8", layer=3)


def test_weights_are_downloaded_once_into_the_hub_cache(small, tmp_path, monkeypatch):
    flat = randomise(Backbone("dino_vitb16"))
    torch.save(flat, tmp_path / "official.pth")
    spec = support.backbone.BACKBONES["dino_vitb16"]
    monkeypatch.setitem(
        support.backbone.BACKBONES, "dino_vitb16", spec._replace(url=(tmp_path / "official.pth").as_uri())
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    assert torch.equal(load_backbone("dino_vitb16").vit.cls_token, flat["cls_token"])
    (tmp_path / "official.pth").unlink()
    assert torch.equal(load_backbone("dino_vitb16").vit.cls_token, flat["cls_token"])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="give a checkpoint with --weights"):
        load_backbone("dino_vitb16")
    assert not list((tmp_path / "empty").rglob("*.pth*"))


def test_a_short_or_damaged_download_is_not_kept(small, tmp_path, monkeypatch):
    """What cannot be read never gets its name in the cache; a file that is damaged there is named."""
    flat = randomise(Backbone("dino_vits16"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "dino_vits16.pth"
    spec = support.backbone.BACKBONES["dino_vits16"]._replace(url=(tmp_path / "official.pth").as_uri())
    monkeypatch.setitem(support.backbone.BACKBONES, "dino_vits16", spec)
    torch.save(flat, tmp_path / "official.pth")
    whole = (tmp_path / "official.pth").read_bytes()
    (tmp_path / "official.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read the weights of dino_vits16 from file://"):
        load_backbone("dino_vits16")
    assert not list(cached.parent.iterdir())
    (tmp_path / "official.pth").write_bytes(whole)
    assert torch.equal(load_backbone("dino_vits16").vit.cls_token, flat["cls_token"])
    cached.write_bytes(b"<html>moved</html>")
    with pytest.raises(ValueError) as error:
        load_backbone("dino_vits16")
    assert str(cached) in str(error.value) and "delete it to download it again" in str(error.value)


def test_official_parameter_counts():
    for name, count in (
        ("ibot_vits16", 21_665_664),
        ("ibot_vitb16", 85_798_656),
        ("dinov2_vits14", 22_056_192),
        ("dinov2_vitb14", 86_579_712),
    ):  # DINOv2's files hold a mask token of one width more
        with torch.device("meta"):
            assert sum(p.numel() for p in Backbone(name).parameters()) == count


def test_backbone_stays_frozen_and_in_eval_mode():
    backbone = load_backbone("random_vit8")
    assert not backbone.train().training
    feat, token = backbone(torch.randn(1, 3, 16, 24))
    assert not feat.requires_grad and not token.requires_grad
    assert not any(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="30x16 px: both sides must be multiples of 8"):
        backbone(torch.randn(1, 3, 16, 30))


# ------------------------------------------------------------------------------------------------------------
# MVAM


def test_eq1_matches_naive_loop():
    """Eq. (1) cell by cell and head by head; residual=False is the equation itself."""
    dim, heads = 12, 3
    module = GatedCrossAttention(dim, heads, residual=False)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    f_s, f_t = torch.randn(2, 7, dim), torch.randn(2, 9, dim)
    out_s, out_t = module(f_s, f_t)

    def naive(x, y):
        result = torch.zeros_like(x)
        for b in range(len(x)):
            gate_x = [1 / (1 + math.exp(-float(x[b, i] @ y[b, 0]))) for i in range(len(x[b]))]
            gate_y = [1 / (1 + math.exp(-float(y[b, j] @ x[b, 0]))) for j in range(len(y[b]))]
            gated = torch.stack([y[b, j] * g for j, g in enumerate(gate_y)])
            q, k, v = module.q(x[b]), module.k(gated), module.v(gated)
            for i in range(len(x[b])):
                parts = []
                for h in range(heads):
                    part = slice(h * dim // heads, (h + 1) * dim // heads)
                    logits = torch.stack([q[i, part] @ k[j, part] for j in range(len(y[b]))]) / math.sqrt(
                        dim / heads
                    )
                    parts.append(sum(p * v[j, part] for j, p in enumerate(logits.softmax(0))))
                result[b, i] = module.proj(torch.cat(parts)) * gate_x[i]
        return result

    torch.testing.assert_close(out_s, naive(f_s, f_t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out_t, naive(f_t, f_s), rtol=1e-4, atol=1e-5)


def test_the_default_block_is_eq1_in_a_transformer_block():
    """F + MHA(...) * G on normalised features, gates over sqrt(C), written out; it starts as the identity."""
    dim, heads = 8, 2
    module = GatedCrossAttention(dim, heads)
    f_s, f_t = 2 + 3 * torch.randn(2, 7, dim), torch.randn(2, 9, dim)
    assert all(torch.equal(out, x) for out, x in zip(module(f_s, f_t), (f_s, f_t)))
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    weight, bias = module.norm.weight, module.norm.bias
    s, t = (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * weight
        + bias
        for x in (f_s, f_t)
    )
    gate_s = torch.sigmoid(torch.einsum("bnc,bc->bn", s, t[:, 0]) / math.sqrt(dim))[..., None]
    gate_t = torch.sigmoid(torch.einsum("bnc,bc->bn", t, s[:, 0]) / math.sqrt(dim))[..., None]

    def attend(x, y):
        q, k, v = (f(z).unflatten(-1, (heads, -1)) for f, z in ((module.q, x), (module.k, y), (module.v, y)))
        weights = torch.einsum("bnhc,bmhc->bhnm", q, k).div(math.sqrt(dim / heads)).softmax(-1)
        return module.proj(torch.einsum("bhnm,bmhc->bnhc", weights, v).flatten(2))

    out_s, out_t = module(f_s, f_t)
    torch.testing.assert_close(out_s, f_s + attend(s, t * gate_t) * gate_s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out_t, f_t + attend(t, s * gate_s) * gate_t, rtol=1e-4, atol=1e-5)


def features(batch: int, grid: tuple[int, int], dim: int) -> Features:
    return Features(
        torch.randn(batch, grid[0] * grid[1], dim), torch.randn(batch, dim), torch.rand(batch, *grid)
    )


def test_untrained_mvam_is_the_backbones_own_cosine_volume():
    src, trg = features(2, (3, 5), 16), features(2, (4, 2), 16)
    corr = MVAM(16, residual=True, ffn_ratio=0.5, window=4)(src, trg)
    assert corr.shape == (2, 3, 5, 4, 2)
    for b, ys, xs, yt, xt in ((0, 0, 0, 0, 0), (1, 2, 4, 3, 1), (0, 1, 3, 2, 0)):
        expected = F.cosine_similarity(src.feat[b, ys * 5 + xs], trg.feat[b, yt * 2 + xt], dim=0)
        torch.testing.assert_close(corr[b, ys, xs, yt, xt], expected)


def test_local_feed_forward_sees_neighbours_of_the_same_image_only():
    block = LocalFeedForward(8, 12)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(2, 1 + 6 * 7, 8, requires_grad=True)
    block(x, (6, 7))[0, 1 + 1 * 7 + 2].sum().backward()  # cell (1, 2)
    touched = x.grad.abs().sum(-1) > 0
    cells = touched[0, 1:].view(6, 7)
    assert cells[0:4, 0:5].all() and int(cells.sum()) == 4 * 5  # two 3x3 convolutions: 5x5 around (1, 2)
    assert not touched[0, 0] and not touched[1].any()


def test_local_feed_forward_does_not_tell_a_cell_where_it_lies():
    block = LocalFeedForward(8, 12)
    torch.nn.init.normal_(block.conv2.weight)
    x = torch.randn(1, 1, 8).expand(1, 1 + 4 * 5, 8)  # the same everywhere
    y = block(x, (4, 5))
    torch.testing.assert_close(y[:, 1:], y[:, 1:2].expand(1, 20, 8))
    cell = x[0, 0]  # of a constant map every tap of a 3x3 kernel sees the same: its sum is a linear map
    hidden = F.gelu(block.conv1.weight.sum((2, 3)) @ cell + block.conv1.bias)
    torch.testing.assert_close(y[0, 1], cell + block.conv2.weight.sum((2, 3)) @ hidden + block.conv2.bias)


@pytest.mark.parametrize("side", [3, 5])
def test_neighbourhood_consensus_matches_naive_loop(side):
    corr, reach = torch.rand(2, 4, 6, 7, 3, dtype=torch.float64) - 0.3, side // 2
    found = neighbourhood_consensus(corr, side)
    weight = {d: math.exp(-0.5 * (d / (side / 6)) ** 2) for d in range(-reach, reach + 1)}
    norm = sum(weight.values()) ** 2
    for b, ys, xs, yt, xt in itertools.product(*map(range, corr.shape)):
        total = 0.0
        for dy, dx in itertools.product(weight, weight):
            i, j, k, m = ys + dy, xs + dx, yt + dy, xt + dx
            if 0 <= i < 4 and 0 <= j < 6 and 0 <= k < 7 and 0 <= m < 3:
                total += weight[dy] * weight[dx] * float(corr[b, i, j, k, m])
        assert math.isclose(total / norm, float(found[b, ys, xs, yt, xt]), abs_tol=1e-9)
    torch.testing.assert_close(neighbourhood_consensus(corr, 1), corr)


@pytest.mark.parametrize("sides", [(4, 4, 4, 4), (5, 7, 6, 3), (8, 4, 2, 6)])
@pytest.mark.parametrize("shift", [False, True])
def test_window_attention_equals_full_attention_with_a_mask(sides, shift):
    """One attention over all tokens, where a token sees those of its window and, shifted, on its side of the
    seam."""
    dim, heads, window = 6, 2, 3
    block = WindowAttention4D(dim, heads, window, shift)
    torch.nn.init.normal_(block.bias)
    x = torch.randn(2, *sides, dim)
    tokens = torch.tensor(list(itertools.product(*map(range, sides))))
    same = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    index = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
    for axis, n in enumerate(sides):
        w = min(window, n)
        step = w // 2 if shift and n > w else 0
        # Windows of a shifted side start at step - w, step, step + w, ...; the border cuts the first and the
        # last.
        cell = (tokens[:, axis] - step).div(w, rounding_mode="floor")
        same &= cell[:, None] == cell[None]
        delta = (tokens[:, None, axis] - tokens[None, :, axis]).clamp(1 - window, window - 1)
        index = index * (2 * window - 1) + delta + window - 1
    y = block.norm1(x).flatten(1, 4)
    q, k, v = block.qkv(y).view(2, len(tokens), 3, heads, -1).unbind(2)
    logits = torch.einsum("bnhc,bmhc->bhnm", q, k) / math.sqrt(dim // heads) + block.bias[index].permute(
        2, 0, 1
    )
    attention = logits.masked_fill(~same, float("-inf")).softmax(-1)
    y = block.proj(torch.einsum("bhnm,bmhc->bnhc", attention, v).flatten(2)).view_as(x)
    expected = x + y
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_patch_shuffle_and_windows_round_trip():
    volume = torch.randn(2, 4, 6, 2, 8)
    split = patch_split(volume, 2)
    assert split.shape == (2, 2, 3, 1, 4, 16)
    # channel ((i * 2 + j) * 2 + k) * 2 + l of a patch is its cell (i, j, k, l)
    assert split[1, 1, 2, 0, 3, 0b1011] == volume[1, 3, 4, 1, 7]
    assert torch.equal(patch_shuffle(split, 2), volume)
    window = (2, 3, 1, 4)
    windows = window_partition(volume[..., None], window)
    assert windows.shape == (2, 2 * 2 * 2 * 2, 24, 1)
    assert torch.equal(windows[0, 0, :, 0], volume[0, :2, :3, :1, :4].flatten())
    assert torch.equal(window_merge(windows, window, (4, 6, 2, 8))[..., 0], volume)


def test_every_second_block_looks_across_the_windows_of_the_first():
    """Windows of 2^4 patches of 2^4 cells: cell 3 lies in the first, and sees cell 4 of the second through
    the shift."""
    module = VolumeAggregation(window=2, width=8)
    torch.nn.init.normal_(module.redistribute.weight)
    corr = torch.randn(1, 8, 8, 8, 8, requires_grad=True)
    module(corr)[0, 3, 3, 3, 3].backward()
    assert corr.grad[0, :4, :4, :4, :4].abs().min() > 0 and corr.grad[0, 4:6, 3, 3, 3].abs().min() > 0


def test_a_cell_at_the_threshold_is_foreground():
    image = Features(torch.zeros(1, 2, 1), torch.zeros(1, 1), torch.tensor([[[0.5, 0.499]]]))
    assert image.foreground(0.5).tolist() == [[[True, False]]]  # S >= T, Algorithm 1


def test_volume_aggregation_takes_any_size_and_padding_changes_nothing():
    module = VolumeAggregation(window=2, width=8)
    torch.nn.init.normal_(module.redistribute.weight)
    corr = torch.randn(1, 5, 7, 6, 3)
    out = module(corr)
    assert out.shape == corr.shape and out.abs().max() < 1
    # The even part of the volume is that of the volume padded by hand to whole patches.
    assert torch.equal(out, module(F.pad(corr, [0, 1, 0, 0, 0, 1, 0, 1]))[:, :5, :7, :6, :3])


# ------------------------------------------------------------------------------------------------------------
# Eq. (2)


@pytest.mark.parametrize("form", ["max", "softmax"])
def test_adaptive_pooling_matches_naive_loop(form):
    corr, temperature = torch.randn(2, 2, 3, 3, 2) * 0.3, 0.1
    mask_s, mask_t = torch.rand(2, 2, 3) > 0.4, torch.rand(2, 3, 2) > 0.4
    for b, got in enumerate(adaptive_pooling(corr, mask_s, mask_t, form, temperature)):
        table = corr[b].flatten(2).flatten(0, 1)
        means = []
        for rows, mask in ((table, mask_s[b].flatten()), (table.T, mask_t[b].flatten())):
            best = []
            for row, keep in zip(rows, mask):
                if keep:
                    best.append(
                        float((row / temperature).softmax(0).max() if form == "softmax" else row.max())
                    )
            means.append(sum(best) / len(best) if best else 0.0)
        assert float(got) == pytest.approx(sum(means) / 2, abs=1e-5)


def test_eq2_matches_naive_sum_and_leaves_out_same_class_negatives():
    pos, neg = torch.tensor([0.5, 0.3, 0.9]), torch.tensor([0.4, 0.1, 0.7])
    every = torch.ones(3, dtype=torch.bool)
    loss = mil_loss(pos, neg, every, torch.tensor([True, False, True]))
    assert float(loss) == pytest.approx(-(0.5 + 0.3 + 0.9) / 3 + (0.4 + 0.7) / 2)
    assert float(mil_loss(pos, neg, every, ~every)) == pytest.approx(-(0.5 + 0.3 + 0.9) / 3)


# ------------------------------------------------------------------------------------------------------------
# PMPS


def random_volume(kind: int, sides: list[int]) -> torch.Tensor:
    """Volumes with and without ties: continuous, few levels, mostly zero, all equal."""
    volume = torch.randn(*sides)
    return (volume, volume.round(), (volume - 1).clamp(min=0), torch.zeros(*sides))[kind]


def test_greedy_equals_algorithm1_on_thousands_of_volumes():
    generator = torch.Generator().manual_seed(1)
    for trial in range(1500):
        sides = torch.randint(1, 6, (4,), generator=generator).tolist()
        batch = torch.stack([random_volume((trial + k) % 4, sides) for k in range(2)])
        keep_s, keep_t = torch.rand(2, *sides[:2]) > 0.25, torch.rand(2, *sides[2:]) > 0.25
        pairs = greedy_selection(batch, keep_s, keep_t)
        assert pairs.src.shape[1] == min(sides[0] * sides[1], sides[2] * sides[3])
        for b in range(2):
            got = list(zip(pairs.src[b].tolist(), pairs.trg[b].tolist()))[: int(pairs.valid[b].sum())]
            assert got == greedy_literal(batch[b], keep_s[b], keep_t[b]), (trial, b)
            for (i, j), value in zip(got, pairs.score[b]):
                assert value == batch[b].flatten(2).flatten(0, 1)[i, j]


@pytest.mark.parametrize("kind", range(4))
def test_greedy_equals_algorithm1_on_larger_grids(kind):
    volume = random_volume(kind, [9, 13, 12, 8])
    pairs = greedy_selection(volume[None])
    assert list(zip(pairs.src[0].tolist(), pairs.trg[0].tolist())) == greedy_literal(volume)


def test_an_empty_foreground_gives_no_pairs():
    pairs = greedy_selection(
        torch.rand(2, 3, 2, 2, 4), torch.tensor([False, True])[:, None, None].expand(2, 3, 2)
    )
    assert pairs.valid.sum(1).tolist() == [0, 6]


@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_hough_matches_loops_over_displacements(side):
    corr = torch.randn(1, 3, 2, 2, 4)
    torch.testing.assert_close(
        hough_matching(corr, side=side, exponent=2.0)[0], hough_loop(corr[0], side, 2.0)
    )


def test_hough_equals_the_table_of_bins_on_a_thousand_volumes():
    for trial in range(1000):
        sides = torch.randint(1, 8, (4,)).tolist()
        corr = torch.stack([random_volume((trial + k) % 4, sides) for k in range(2)])
        expected = torch.stack([hough_table(c) for c in corr])
        torch.testing.assert_close(hough_matching(corr), expected, rtol=1e-4, atol=1e-5)


def test_background_neither_votes_nor_matches():
    corr = torch.rand(1, 4, 3, 3, 5)
    mask_s, mask_t = torch.rand(1, 4, 3) > 0.4, torch.rand(1, 3, 5) > 0.4
    cut = corr * mask_s[:, :, :, None, None] * mask_t[:, None, None]
    torch.testing.assert_close(hough_matching(corr, mask_s, mask_t), hough_matching(cut))


def test_hough_works_in_float32_whatever_comes_in():
    corr = torch.rand(1, 3, 3, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = hough_matching(corr)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], hough_table(corr[0].float()))


def test_pair_nms_matches_naive_loop():
    for _ in range(200):
        src, trg = torch.randint(0, 35, (2, 20)), torch.randint(0, 48, (2, 20))
        score = torch.rand(2, 20).sort(descending=True).values
        valid = torch.arange(20) < torch.tensor([[20], [11]])
        out = pair_nms(Pairs(src, trg, score, valid), 7, 6, 2.0, 6)
        for b in range(2):
            kept: list[int] = []
            for k in range(int(valid[b].sum())):
                far = True
                for m in kept:
                    for index, width in ((src[b], 7), (trg[b], 6)):
                        dx = abs(int(index[k]) % width - int(index[m]) % width)
                        dy = abs(int(index[k]) // width - int(index[m]) // width)
                        far &= max(dx, dy) >= 2
                if far:
                    kept.append(k)
            count = int(out.valid[b].sum())
            assert out.src[b, :count].tolist() == src[b, kept[:6]].tolist()
            assert out.trg[b, :count].tolist() == trg[b, kept[:6]].tolist()
            assert torch.equal(out.score[b, :count], score[b, kept[:6]])


# ------------------------------------------------------------------------------------------------------------
# Keypoint transfer


def test_rows_are_read_bilinearly():
    corr, points = torch.randn(2, 4, 5, 3, 2), torch.rand(2, 6, 2) * torch.tensor([4.0, 3.0])

    def rows(points: torch.Tensor) -> torch.Tensor:
        return read_at(corr.flatten(3).permute(0, 3, 1, 2), points).unflatten(2, (3, 2))

    got = rows(points)
    grid = points / torch.tensor([4.0, 3.0]) * 2 - 1  # the outermost cells at -1 and 1
    sampled = F.grid_sample(
        corr.flatten(3).permute(0, 3, 1, 2), grid[:, None], align_corners=True
    )  # (B, Ht*Wt, 1, n)
    torch.testing.assert_close(
        got, sampled[:, :, 0].transpose(1, 2).unflatten(2, (3, 2)), rtol=1e-4, atol=1e-5
    )
    outside = rows(torch.tensor([[[-3.0, 9.0]]]).expand(2, 1, 2))
    assert torch.equal(outside[:, 0], corr[:, 3, 0])


def test_kernel_soft_argmax_matches_naive_loop():
    rows = torch.rand(3, 4, 6)
    for row, got in zip(rows, kernel_soft_argmax(rows, temperature=0.1, sigma=1.5)):
        top = divmod(int(row.argmax()), 6)
        weights = torch.zeros(4, 6)
        for y in range(4):
            for x in range(6):
                gauss = math.exp(-0.5 * ((x - top[1]) ** 2 + (y - top[0]) ** 2) / 1.5**2)
                weights[y, x] = math.exp(float(row[y, x] / row.max()) / 0.1) * gauss
        weights /= weights.sum()
        expected = (
            float((weights.sum(0) * torch.arange(6)).sum()),
            float((weights.sum(1) * torch.arange(4)).sum()),
        )
        assert got.tolist() == pytest.approx(expected, abs=1e-4)


def test_transfer_goes_from_source_to_target():
    """A volume that maps source cell (x, y) to target cell (x + 2, y + 1) moves points by that, source to
    target."""
    corr = torch.zeros(1, 4, 5, 6, 8)
    for y in range(4):
        for x in range(5):
            corr[0, y, x, y + 1, x + 2] = 1.0
    moved = transfer_keypoints(corr, torch.tensor([[[0.0, 0.0], [4.0, 3.0], [1.0, 2.0]]]), temperature=0.02)
    torch.testing.assert_close(moved, torch.tensor([[[2.0, 1.0], [6.0, 4.0], [3.0, 3.0]]]), atol=0.02, rtol=0)


def test_soft_argmax_is_in_full_precision_under_autocast():
    rows = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    plain = kernel_soft_argmax(rows)
    with torch.autocast("cpu", torch.bfloat16):  # of whose 8 bits a place in 56 cells would need more
        found = kernel_soft_argmax(rows)
    assert found.dtype == torch.float32 and torch.equal(found, plain)


def test_cosine_volume_is_float32_under_autocast():
    feat = torch.randn(1, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        corr = cosine_volume(feat, feat, (2, 3), (2, 3))
    assert corr.dtype == torch.float32
    torch.testing.assert_close(corr.flatten(3).flatten(1, 2)[0].diagonal(), torch.ones(6))
