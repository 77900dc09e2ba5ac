"""The modules that every stage shares (paper, section 3.1).

backbone            frozen ViT (iBOT, DINO, DINOv2) with the official parameter names
MVAM                gated cross-attention, Eq. (1) -> cosine 4D volume -> 4D shifted-window aggregation
PMPS                Hough matching -> one-to-one greedy selection (supplement, Algorithm 1) -> pair NMS
Eq. (2)             adaptive pooling and the multiple-instance loss
keypoint transfer   kernel soft-argmax on the rows of a volume, source to target

A volume is (B, Hs, Ws, Ht, Wt), source first. A cell's flat index is y * W + x.
"""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class MatchConfig:
    """What the three stages have in common: their MVAM and their PMPS."""

    layers: int = 1  # gated cross-attention blocks; the paper gives no number
    heads: int = 4  # heads of a gated block; not given
    residual: bool = True  # False: Eq. (1) to the letter
    ffn_ratio: float = 1.0  # hidden width of the 3x3 feed-forward behind a gated block over its width; 0: none
    volume_depth: int = 2  # 4D window-attention blocks, every second one shifted; 0: none; not given
    volume_patch: int = 2  # cells a side that one 4D patch embeds (down-sampling); not given
    volume_window: int = 4  # 4D patches a side of an attention window; not given (VAT: 4)
    volume_width: int = 16  # channels of a 4D patch; not given
    volume_heads: int = 2  # heads of a window block; not given
    hough: bool = True  # Table 4 (III): False
    hough_side: int = 5  # L of Table 4, side of the Gaussian over displacements, in cells; the paper's best: 5
    hough_exponent: float = 3.0  # similarity exponent; HPF: 3
    saliency_threshold: float = 0.5  # T of Algorithm 1; not given


class Features(NamedTuple):
    """What the backbone, once per image, gives to all stages."""

    feat: Tensor  # (B, H*W, C) tokens of the cells
    token: Tensor  # (B, C) global token T of Eq. (1)
    saliency: Tensor  # (B, H, W) in [0, 1]; ones where no saliency is used

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.saliency.shape[1:])

    def foreground(self, threshold: float) -> Tensor:
        """Algorithm 1, lines 4 and 5: a cell stays where S >= T. Returns (B, H, W) bool."""
        return self.saliency >= threshold

    def map(self, function) -> "Features":
        """Apply a function to each of the three tensors."""
        return Features(*(function(x) for x in self))


# ----------------------------------------------------------------------------------------------------------------------
# Backbone


class ViTSpec(NamedTuple):
    """Architecture and origin of one official checkpoint."""

    family: str  # how position embeddings interpolate: "dino" (iBOT too), "dinov2", "dinov2_reg" or "random"
    width: int
    heads: int
    patch: int  # pixels
    grid: int  # patches a side of the stored position embedding
    url: str | None
    depth: int = 12


_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"
_META = "https://dl.fbaipublicfiles.com"
BACKBONES = {
    "ibot_vitb16": ViTSpec("dino", 768, 12, 16, 14, f"{_IBOT}/vitb_16/checkpoint_teacher.pth"),
    "ibot_vits16": ViTSpec("dino", 384, 6, 16, 14, f"{_IBOT}/vits_16/checkpoint_teacher.pth"),
    "dino_vitb16": ViTSpec(
        "dino", 768, 12, 16, 14, f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
    ),
    "dino_vits16": ViTSpec(
        "dino", 384, 6, 16, 14, f"{_META}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
    ),
    "dino_vits8": ViTSpec("dino", 384, 6, 8, 28, f"{_META}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "dinov2_vitb14": ViTSpec("dinov2", 768, 12, 14, 37, f"{_META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    "dinov2_vits14": ViTSpec("dinov2", 384, 6, 14, 37, f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14_reg": ViTSpec(
        "dinov2_reg", 768, 12, 14, 37, f"{_META}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    ),
    "dinov2_vits14_reg": ViTSpec(
        "dinov2_reg", 384, 6, 14, 37, f"{_META}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    ),
    # Never trained: its weights are drawn from a fixed seed, so that the quick run downloads nothing.
    "random_vit8": ViTSpec("random", 128, 2, 8, 16, None, depth=1),
}


class Attention(nn.Module):
    """Multi-head self-attention of a ViT block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, heads, N, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1 -> GELU -> fc2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """DINOv2's learned gain per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, h * w, C)


class ViT(nn.Module):
    """One plain vision transformer for every family; its parameter names are those of the official checkpoints."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = spec.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + spec.grid**2, dim))
        if spec.family == "dinov2_reg":
            self.register_tokens = nn.Parameter(torch.zeros(1, 4, dim))
        self.patch_embed = PatchEmbed(spec.patch, dim)
        self.blocks = nn.ModuleList(
            ViTBlock(dim, spec.heads, spec.family.startswith("dinov2")) for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def position_embedding(self, h: int, w: int) -> Tensor:
        """Interpolate the stored grid to h x w cells as the official code of each family does.

        DINO, iBOT and plain DINOv2 hand bicubic a scale factor of (h + 0.1) / grid and sample with it; DINOv2 with
        registers asks for the size and antialiases. The class token's entry is never touched. Returns (1, 1 + h*w, C).
        """
        grid, pos = self.spec.grid, self.pos_embed.float()
        if (h, w) == (grid, grid):
            return pos
        patch_pos = pos[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
        if self.spec.family == "dinov2_reg":
            patch_pos = F.interpolate(patch_pos, size=(h, w), mode="bicubic", align_corners=False, antialias=True)
        else:
            scale = ((h + 0.1) / grid, (w + 0.1) / grid)
            patch_pos = F.interpolate(patch_pos, scale_factor=scale, mode="bicubic", align_corners=False)
        assert patch_pos.shape[-2:] == (h, w), (patch_pos.shape, h, w)
        return torch.cat([pos[:, :1], patch_pos.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what enters the first block: class token, registers if any, cells, (B, N, C)."""
        h, w = (side // self.spec.patch for side in images.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        x = x + self.position_embedding(h, w).to(x.dtype)
        if self.spec.family == "dinov2_reg":  # registers carry no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def read(self, images: Tensor, layers: list[int]) -> tuple[list[Tensor], Tensor]:
        """The outputs of some blocks (ascending), each through the final LayerNorm, (B, N, C), and what entered the
        last of them. Blocks behind it do not run."""
        x, tokens = self.embed(images), []
        for k, block in enumerate(self.blocks[: layers[-1] + 1]):
            before, x = x, block(x)
            if k in layers:
                tokens.append(self.norm(x))
        return tokens, before


class Backbone(nn.Module):
    """A frozen ViT that always stays in eval mode and never receives a gradient.

    layer: index of the block whose output is read (negative from the end), or several as "9,10": their outputs, each
    through the final LayerNorm, stand side by side in a cell's C channels, in the order of the blocks.
    """

    def __init__(self, name: str, layer: int | str = -1) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
        self.vit = ViT(BACKBONES[name])
        depth, self.patch = self.vit.spec.depth, self.vit.spec.patch
        try:
            layers = [int(part) for part in str(layer).split(",")]
        except ValueError:
            raise ValueError(f"--layer {layer}: a block, or several joined by commas, such as 9,10") from None
        if not all(-depth <= k < depth for k in layers):
            raise ValueError(f"--layer {layer}: {name} has blocks 0 to {depth - 1} (or -{depth} to -1)")
        self.layers = sorted({k % depth for k in layers})
        self.dim = self.vit.spec.width * len(self.layers)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, attention: bool = False) -> tuple[Tensor, ...]:
        """ImageNet-normalised RGB (B, 3, H, W) to tokens (B, h*w, C) and the class token (B, C).

        With attention=True a third tensor (B, h, w): the class token's attention to every cell in the last block
        that is read, mean over heads, rescaled to its own minimum and maximum (a saliency map that costs nothing).
        Raises ValueError if a side is not a multiple of the patch.
        """
        h, w = (side // self.patch for side in images.shape[-2:])
        if (h * self.patch, w * self.patch) != tuple(images.shape[-2:]) or not h * w:
            raise ValueError(
                f"image of {images.shape[-1]}x{images.shape[-2]} px: both sides must be multiples of {self.patch}"
            )
        several, before = self.vit.read(images, self.layers)
        tokens = torch.cat(several, -1)
        feat, token = tokens[:, -h * w :], tokens[:, 0]
        if not attention:
            return feat, token
        last = self.vit.blocks[self.layers[-1]]
        q, k, _ = last.attn.split(last.norm1(before))
        weights = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, 1, N)
        weights = weights[:, :, 0, -h * w :].mean(1).unflatten(1, (h, w)).float()
        low, high = weights.amin((1, 2), keepdim=True), weights.amax((1, 2), keepdim=True)
        return feat, token, (weights - low) / (high - low).clamp(min=1e-12)


def load_backbone(name: str, weights: str | None = None, layer: int | str = -1) -> Backbone:
    """Build a frozen backbone with official weights: from `weights`, or downloaded once into torch.hub's cache.

    Accepts the flat checkpoints of DINO and DINOv2, iBOT's teacher-only file and its full training checkpoint
    (student, teacher, optimiser; the teacher is taken, its `module.` and `backbone.` prefixes dropped).
    Raises ValueError in one line for a file that is missing, unreadable, of another architecture or incomplete.
    """
    backbone = Backbone(name, layer)
    spec = backbone.vit.spec
    if weights is None and spec.url is None:
        _draw_weights(backbone.vit)
        return backbone
    origin = weights or spec.url
    # A full iBOT checkpoint stores its argparse.Namespace: a plain record, safe to admit.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            if weights:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            else:
                state = torch.hub.load_state_dict_from_url(
                    spec.url, map_location="cpu", weights_only=True, file_name=f"{name}.pth"
                )
        except Exception as error:  # unpickling and urllib raise many kinds; the way out is the same for all
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(
                f"cannot read the weights of {name} from {origin} ({reason}); give a checkpoint with --weights FILE"
            ) from error
    for key in ("teacher", "state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{origin} holds a {type(state).__name__}, not the state dict of a ViT")
    state = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}
    unused = ("head.", "masked_embed", "mask_token")  # training heads and masks: not part of the features
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    expected = backbone.vit.state_dict()
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or extra:
        raise ValueError(
            f"{origin} is not a checkpoint of {name}: {len(missing)} keys missing (such as"
            f" {min(missing, default='-')}), {len(extra)} unknown (such as {min(extra, default='-')})"
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(
                f"{origin} is not a checkpoint of {name}: {key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
            )
    backbone.vit.load_state_dict(state)  # copies into float32, whatever the file's precision
    return backbone


def _draw_weights(vit: ViT) -> None:
    """Seeded weights under which every block mixes: LeCun-normal maps, position embeddings well below content."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(vit.state_dict().items()):
        if name.endswith("weight") and value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif name in ("cls_token", "pos_embed"):
            value.normal_(0, 0.02, generator=generator)
        elif name.endswith("bias"):
            value.zero_()


class Conditioning(nn.Module):
    """Features on their principal axes, half whitened: (x - mean) U / eigenvalue^(1/4), U the first `axes` of them.

    A few directions that all cells share dominate the cosine of a ViT's cells, and whitening to the end would raise
    the noise of the last ones. Mean and axes are constants, found once from the cells of training images.
    """

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        if not 1 <= axes <= dim:
            raise ValueError(f"--axes {axes}: the backbone's cells have {dim} channels; 0: as they are")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim, axes))

    @torch.no_grad()
    def fit(self, cells: Tensor) -> None:
        """Find mean and axes, in float64. cells (N, C). ValueError if they vary along fewer directions than asked."""
        x = cells.double()
        mean = x.mean(0)
        x = x - mean
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # ascending
        values, vectors = values.flip(0)[: self.axes.shape[1]], vectors.flip(1)[:, : self.axes.shape[1]]
        if values[-1] <= 1e-9 * values[0]:
            raise ValueError(f"--axes {len(values)}: {len(x)} cells of the training images vary along fewer; lower it")
        self.mean.copy_(mean)
        self.axes.copy_(vectors / values**0.25)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) to (..., axes), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean) @ self.axes


# ----------------------------------------------------------------------------------------------------------------------
# MVAM: matching volume aggregation module


class LocalFeedForward(nn.Module):
    """The feed-forward half of a transformer block with local context: two 3x3 convolutions over the cells.

    x + conv(GELU(conv(x))), the second convolution zero at first, so that the block starts as an identity. The border
    is repeated, since zeros around the grid would tell a cell where it lies. The class token passes unchanged.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 3, padding=1, padding_mode="replicate")
        self.conv2 = nn.Conv2d(hidden, dim, 3, padding=1, padding_mode="replicate")
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, 1 + H*W, C), class token first; same shape out."""
        cells = x[:, 1:].transpose(1, 2).unflatten(2, grid)  # (B, C, H, W)
        y = self.conv2(F.gelu(self.conv1(cells))).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1], x[:, 1:] + y], dim=1)


class GatedCrossAttention(nn.Module):
    """Eq. (1): cross-attention between two images, gated by the other image's class token.

    G_s = sigmoid(F_s . T_t),  G_t = sigmoid(F_t . T_s),  F~_s = MHA(F_s, F_t * G_t) * G_s,  and the same for F~_t.

    residual=False is the equation to the letter. Otherwise (default) a transformer block around it: LayerNorm before,
    F~ added to F through an output projection that starts at zero (the first volume is the backbone's own), and the
    inner product of the gates divided by sqrt(C), since that of two normalised C-vectors saturates the sigmoid.
    """

    def __init__(self, dim: int, heads: int, residual: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"--heads {heads} does not divide the width {dim}")
        self.heads, self.residual = heads, residual
        self.gate_scale = dim**-0.5 if residual else 1.0
        self.norm = nn.LayerNorm(dim) if residual else nn.Identity()
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if residual:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def mha(self, x: Tensor, y: Tensor) -> Tensor:
        """Multi-head attention: queries from x (B, N, C), keys and values from y (B, M, C)."""
        q, k, v = (
            f(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, src: Tensor, trg: Tensor) -> tuple[Tensor, Tensor]:
        """src (B, 1 + Hs*Ws, C) and trg (B, 1 + Ht*Wt, C), class token first; returns both refined."""
        s, t = self.norm(src), self.norm(trg)
        # G_s = sigmoid(F_s . T_t),  G_t = sigmoid(F_t . T_s)
        gate_s = torch.sigmoid(self.gate_scale * (s @ t[:, 0, :, None]))  # (B, 1 + Ns, 1)
        gate_t = torch.sigmoid(self.gate_scale * (t @ s[:, 0, :, None]))  # (B, 1 + Nt, 1)
        # F~_s = MHA(F_s, F_t * G_t) * G_s
        out_s = self.mha(s, t * gate_t) * gate_s
        out_t = self.mha(t, s * gate_s) * gate_t
        if self.residual:
            out_s, out_t = src + out_s, trg + out_t
        return out_s, out_t


def cosine_volume(feat_s: Tensor, feat_t: Tensor, grid_s: tuple[int, int], grid_t: tuple[int, int]) -> Tensor:
    """Cosine similarity of every source cell with every target cell, in float32.

    feat_s (B, Hs*Ws, C), feat_t (B, Ht*Wt, C), without class tokens; returns (B, Hs, Ws, Ht, Wt) in [-1, 1].
    """
    with torch.autocast(feat_s.device.type, enabled=False):
        s, t = F.normalize(feat_s.float(), dim=-1), F.normalize(feat_t.float(), dim=-1)
        return (s @ t.transpose(1, 2)).unflatten(2, grid_t).unflatten(1, grid_s)


def _gaussian(side: int, deviation: float, like: Tensor) -> Tensor:
    """Weights of a Gaussian over an odd side, sum 1, with the type and device of another tensor: (side,)."""
    offset = torch.arange(side, device=like.device, dtype=like.dtype) - side // 2
    gauss = torch.exp(-0.5 * (offset / deviation) ** 2)
    return gauss / gauss.sum()


def neighbourhood_consensus(corr: Tensor, side: int) -> Tensor:
    """A match is as good as its neighbours that move alike: C[i, j] = sum_d g(d) corr[i + d, j + d].

    The one 4D convolution whose kernel lies on the diagonal, fixed; what NC-Net's learn, and VAT's in front of its
    windows, starts here. d runs over side x side cells, g is a Gaussian that ends at three standard deviations, sum 1;
    zeros outside. corr (B, Hs, Ws, Ht, Wt), same shape out; two passes of `side` shifted sums.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"--consensus {side}: the neighbourhood's side must be odd, or 0 for none")
    gauss = _gaussian(side, side / 6, corr)
    for src_axis in (1, 2):  # y, then x; the target's axis is two further
        sides = corr.shape
        pad = [side // 2 if axis in (src_axis, src_axis + 2) else 0 for axis in (4, 3, 2, 1) for _ in (0, 1)]
        padded = F.pad(corr, pad)
        corr = sum(
            weight * padded.narrow(src_axis, k, sides[src_axis]).narrow(src_axis + 2, k, sides[src_axis + 2])
            for k, weight in enumerate(gauss)
        )
    return corr


def window_partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, n1, n2, n3, n4, D), each n a multiple of its window side, to (B, windows, tokens of a window, D)."""
    x = x.unflatten(4, (-1, window[3])).unflatten(3, (-1, window[2])).unflatten(2, (-1, window[1]))
    x = x.unflatten(1, (-1, window[0]))  # (B, m1, w1, m2, w2, m3, w3, m4, w4, D)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).flatten(5, 8).flatten(1, 4)


def window_merge(x: Tensor, window: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Inverse of window_partition; `size` is (n1, n2, n3, n4)."""
    x = x.unflatten(2, window).unflatten(1, [n // w for n, w in zip(size, window)])
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def patch_split(volume: Tensor, patch: int) -> Tensor:
    """4D space to channels (down-sampling): (B, n1, n2, n3, n4) to (B, n1/p, n2/p, n3/p, n4/p, p^4)."""
    for dim in (4, 3, 2, 1):
        volume = volume.unflatten(dim, (-1, patch))
    return volume.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5)


def patch_shuffle(x: Tensor, patch: int) -> Tensor:
    """Feature channel redistribution, the inverse of patch_split: p^4 channels back to p times the cells a side."""
    x = x.unflatten(5, (patch,) * 4).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
    return x.flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class WindowAttention4D(nn.Module):
    """Pre-norm transformer block on the tokens of 4D windows, with 4D relative position bias (after VAT).

    Windows are `window` tokens a side, or the whole side where that is shorter; with shift=True they are moved by half
    a window along every side that is longer than one (cyclic roll). Tokens that the roll, or padding, brought into one
    window without being neighbours do not see each other.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"--volume-heads {heads} does not divide --volume-width {dim}")
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 2 * dim)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 4, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def relative_bias(self, window: tuple[int, ...]) -> Tensor:
        """Bias of every token pair of one window: (heads, N, N), N = the product of the window's sides."""
        side = 2 * self.window - 1
        axes = torch.meshgrid(*(torch.arange(w, device=self.bias.device) for w in window), indexing="ij")
        index = 0
        for axis in axes:  # index = sum_d (delta_d + W - 1) (2W - 1)^(3 - d)
            axis = axis.flatten()
            index = index * side + (axis[:, None] - axis[None, :] + self.window - 1)
        return self.bias[index].permute(2, 0, 1)

    def allowed(
        self, sides: tuple[int, ...], padded: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
    ) -> Tensor | None:
        """Which token pairs of each window are neighbours in the volume: (windows, N, N) bool, or None if all are.

        sides, padded: tokens a side without and with padding. A token's region is, per side, the part it came from
        (before or behind the seam of the roll); padding is a region of its own.
        """
        if sides == padded and not any(shift):
            return None
        device = self.bias.device
        region, real = torch.zeros((), dtype=torch.long, device=device), torch.ones((), dtype=torch.bool, device=device)
        for dim, (n, step) in enumerate(zip(padded, shift)):
            shape = [-1 if d == dim else 1 for d in range(4)]
            index = torch.arange(n, device=device)
            region = region * 2 + (index >= n - step).long().view(shape)  # behind the seam or not
            real = real & (index.roll(-step) < sides[dim]).view(shape)
        label = region * 2 + real.long()  # (n1, n2, n3, n4)
        label = window_partition(label[None, ..., None], window)[0, :, :, 0]  # (windows, N)
        return label[:, :, None] == label[:, None, :]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n1, n2, n3, n4, D) of any size; same shape out."""
        sides = tuple(x.shape[1:5])
        window = tuple(min(self.window, n) for n in sides)
        shift = tuple(w // 2 if self.shift and n > w else 0 for n, w in zip(sides, window))
        padded = tuple(-(-n // w) * w for n, w in zip(sides, window))
        pad = [p for n, m in zip(reversed(sides), reversed(padded)) for p in (0, m - n)]
        y = F.pad(self.norm1(x), [0, 0, *pad]).roll([-s for s in shift], (1, 2, 3, 4))
        q, k, v = self.qkv(window_partition(y, window)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_bias(window)[None]  # (1, heads, N, N), broadcast over windows and batch
        mask = self.allowed(sides, padded, window, shift)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], float("-inf"))  # (windows, heads, N, N)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))  # (B, windows, heads, N, D/heads)
        y = window_merge(self.proj(y.transpose(2, 3).flatten(3)), window, padded)
        y = y.roll(shift, (1, 2, 3, 4))[:, : sides[0], : sides[1], : sides[2], : sides[3]]
        x = x + y
        return x + self.mlp(self.norm2(x))


class VolumeAggregation(nn.Module):
    """4D patch embedding -> shifted-window attention -> 4D shuffle back to the full volume (rho of section 3.1).

    Returns what is to be added to the volume, in (-1, 1) and zero before training, so that scores stay bounded
    whatever Eq. (2) rewards.
    """

    def __init__(self, width: int, heads: int, depth: int, patch: int, window: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**4, width)
        self.blocks = nn.ModuleList(WindowAttention4D(width, heads, window, shift=i % 2 == 1) for i in range(depth))
        self.redistribute = nn.Linear(width, patch**4)
        nn.init.zeros_(self.redistribute.weight)
        nn.init.zeros_(self.redistribute.bias)

    def forward(self, corr: Tensor) -> Tensor:
        """corr (B, Hs, Ws, Ht, Wt) of any size; same shape out."""
        sides = corr.shape[1:]
        pad = [p for n in reversed(sides) for p in (0, -n % self.patch)]
        x = self.embed(patch_split(F.pad(corr, pad), self.patch))  # (B, hs, ws, ht, wt, D)
        for block in self.blocks:
            x = block(x)
        out = patch_shuffle(self.redistribute(x), self.patch)
        return torch.tanh(out[:, : sides[0], : sides[1], : sides[2], : sides[3]].float())


class MVAM(nn.Module):
    """Matching volume aggregation module: features of two images to one volume.

    ffn_ratio: hidden width of the feed-forward halves over that of the features; 0: gated attention alone.
    volume_window overrides the configured window (the region stage sees its whole 5^4 volume at once). consensus: side
    of the neighbourhood that the volume is averaged over before its windows; 0: none. frozen_share: in eval mode, the
    refined features are averaged with those that came in, which have this share (after WiSE-FT, Wortsman et al., 2022).
    """

    def __init__(
        self,
        dim: int,
        cfg: MatchConfig,
        ffn_ratio: float,
        volume_window: int | None = None,
        consensus: int = 0,
        frozen_share: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= frozen_share <= 1:
            raise ValueError(f"--frozen-share {frozen_share}: a share between 0 and 1")
        self.consensus, self.frozen_share = consensus, frozen_share
        self.gated = nn.ModuleList(GatedCrossAttention(dim, cfg.heads, cfg.residual) for _ in range(cfg.layers))
        self.ffn = nn.ModuleList(LocalFeedForward(dim, int(dim * ffn_ratio)) for _ in range(cfg.layers) if ffn_ratio)
        self.aggregation = None
        if cfg.volume_depth:
            window = volume_window or cfg.volume_window
            self.aggregation = VolumeAggregation(
                cfg.volume_width, cfg.volume_heads, cfg.volume_depth, cfg.volume_patch, window
            )

    def forward(self, src: Features, trg: Features) -> Tensor:
        """Features of B source and B target images to a volume (B, Hs, Ws, Ht, Wt), float32."""
        s, t = (torch.cat([x.token[:, None], x.feat], 1) for x in (src, trg))
        for k, block in enumerate(self.gated):  # Psi
            s, t = block(s, t)
            if self.ffn:
                s, t = self.ffn[k](s, src.grid), self.ffn[k](t, trg.grid)
        s, t = s[:, 1:], t[:, 1:]
        if self.frozen_share and not self.training:
            s, t = torch.lerp(s, src.feat.to(s), self.frozen_share), torch.lerp(t, trg.feat.to(t), self.frozen_share)
        corr = cosine_volume(s, t, src.grid, trg.grid)  # Phi
        if self.consensus:
            corr = neighbourhood_consensus(corr, self.consensus)
        return corr if self.aggregation is None else corr + self.aggregation(corr)  # rho


# ----------------------------------------------------------------------------------------------------------------------
# Eq. (2), used by the image and the region stage


def adaptive_pooling(corr: Tensor, mask_s: Tensor, mask_t: Tensor, form: str = "softmax", temperature: float = 0.05):
    """AP(v) of Eq. (2): a volume to one score a pair.

    form "max": the best similarity of every cell in the other image, mean over the (foreground) cells, both directions.
    form "softmax": the same on similarities that were softmaxed over the other image (NC-Net), which rewards matches
    that are distinct rather than merely high.

    corr (B, Hs, Ws, Ht, Wt); masks (B, H, W) bool; returns (B,), 0 where a mask is empty.
    """
    flat = corr.flatten(3).flatten(1, 2)  # (B, Ns, Nt)
    scores = []
    for dim, mask in ((2, mask_s), (1, mask_t)):
        best = flat.amax(dim)  # (B, N)
        if form == "softmax":  # max of a softmax = exp(max - logsumexp)
            best = torch.exp(best / temperature - torch.logsumexp(flat / temperature, dim))
        weight = mask.flatten(1).float()
        scores.append((best * weight).sum(1) / weight.sum(1).clamp(min=1))
    return (scores[0] + scores[1]) / 2


def negatives(src: Features, labels: Tensor, windows: int = 1) -> tuple[Features, Tensor]:
    """Negative pairs by batch shifting (NC-Net): source k-1 with target k, and which of them differ in class.

    src: B images, or `windows` regions of each of B images; labels (B,): their classes. Returns the rolled sources and
    a bool (B,).
    """
    return src.map(lambda x: x.roll(windows, 0)), labels.roll(1, 0) != labels


def mil_loss(ap_pos: Tensor, ap_neg: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Eq. (2): L = 1/N sum_i -AP(v_i[pos]) + AP(v_i[neg]), each mean over its real pairs alone.

    ap (N,); positive, negative (N,) bool: negative is False where a rolled pair happens to share its class, either is
    False for windows that only fill up a batch. Returns a scalar.
    """
    pos, neg = positive.float(), negative.float()
    # L = 1/N sum -AP(v[pos]) + AP(v[neg])
    return -(ap_pos * pos).sum() / pos.sum().clamp(min=1) + (ap_neg * neg).sum() / neg.sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# PMPS: pseudo matching pair selection


class Pairs(NamedTuple):
    """Selected cell pairs, best first: flat indices, scores and which entries are real, each (B, K)."""

    src: Tensor
    trg: Tensor
    score: Tensor
    valid: Tensor


class Regions(NamedTuple):
    """The windows of r x r cells around K suspected pairs of each of B image pairs."""

    src: Features  # (B * K) windows: feat (B*K, r*r, C), token (B*K, C), saliency (B*K, r, r)
    trg: Features
    origin_s: Tensor  # (B, K, 2): (x, y) of a window's first cell in the source image's grid
    origin_t: Tensor
    valid: Tensor  # (B, K) bool: False for windows that only fill up the batch


def _sum_diagonals(a: Tensor) -> Tensor:
    """(..., N, M) to (..., N + M - 1): entry k is the sum of a[i, j] over j - i = k - (N - 1)."""
    n, m = a.shape[-2:]
    # Rows padded by n and re-read at a length one shorter move right by one more each: diagonals become columns.
    skewed = F.pad(a.flip(-2), (0, n)).flatten(-2)[..., : n * (n + m - 1)]
    return skewed.unflatten(-1, (n, n + m - 1)).sum(-2)


def gaussian_smooth(x: Tensor, side: int) -> Tensor:
    """Gaussian of an odd side, standard deviation side / 4.708 (so that the side is twice its half-width), sum 1, zeros
    outside, over the last two axes of (..., H, W): HPF's for votes, MMNet's for heat maps.

    Sums of shifted copies: exact in float32 on every device, where a convolution may round to TF32 or bfloat16.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"--hough-side {side}: the Gaussian's side must be odd and positive")
    h, w = x.shape[-2:]
    gauss = _gaussian(side, side / 4.708, x)
    x = F.pad(x, [side // 2] * 4)
    x = sum(weight * x[..., k : k + h, :] for k, weight in enumerate(gauss))
    return sum(weight * x[..., k : k + w] for k, weight in enumerate(gauss))


@torch.no_grad()
def hough_matching(
    corr: Tensor,
    mask_s: Tensor | None = None,
    mask_t: Tensor | None = None,
    side: int = 5,
    exponent: float = 3.0,
) -> Tensor:
    """Regularised Hough matching (HPF) with one bin per integer displacement.

    A = max(0, corr)^exponent,  H[d] = sum_i A[i, i + d],  C[i, j] = A[i, j] (H * Gaussian)[j - i], the Gaussian of
    side L with standard deviation L / 4.708 bins, normalised, zeros outside. At 512 px and stride 16 HPF's own bins
    are these.

    corr (B, Hs, Ws, Ht, Wt); masks (B, H, W) bool keep cells from voting and from being matched. Float32 whatever the
    input; no gradient (votes weigh, they do not teach). Costs a few passes over the volume.
    """
    a = corr.float().clamp(min=0) ** exponent
    if mask_s is not None:
        a = a * mask_s[:, :, :, None, None]
    if mask_t is not None:
        a = a * mask_t[:, None, None]
    ht, wt = a.shape[3:]
    votes = _sum_diagonals(a.transpose(2, 3))  # (B, Hs, Ht, Ws + Wt - 1)
    votes = _sum_diagonals(votes.permute(0, 3, 1, 2)).transpose(1, 2)  # (B, Hs + Ht - 1, Ws + Wt - 1)
    votes = gaussian_smooth(votes, side)
    # Row i of the unfolded view starts at displacement -i: (B, Hs, Ws, Ht, Wt) without a table of bins.
    return a * votes.unfold(1, ht, 1).unfold(2, wt, 1).flip(1, 2)


def matching_scores(corr: Tensor, keep_s: Tensor, keep_t: Tensor, cfg: MatchConfig) -> Tensor:
    """The scores that pairs are selected by: Hough matching inside the foreground, or the volume itself without it."""
    if cfg.hough:
        return hough_matching(corr, keep_s, keep_t, cfg.hough_side, cfg.hough_exponent)
    return corr.detach().float()


@torch.no_grad()
def greedy_selection(score: Tensor, keep_s: Tensor | None = None, keep_t: Tensor | None = None) -> Pairs:
    """Algorithm 1: take the best remaining pair, remove its source and target cell, until one side is empty.

    The literal loop is N argmaxes over the volume. Here every round takes all pairs that are the best of their row and
    of their column at once: under the order (score, then lowest flat index) such a pair stays the best of both until
    the loop reaches it, so the set, and after sorting the order, are exactly the loop's. About half of the cells leave
    a round, and what remains is compacted.

    score (B, Hs, Ws, Ht, Wt), finite; keep (B, H, W) bool is the foreground. Returns min(Ns, Nt) entries, best first.
    """
    table = score.flatten(3).flatten(1, 2)  # (B, Ns, Nt)
    batch, ns, nt = table.shape
    device, none = table.device, float("-inf")
    if keep_s is not None:
        table = table.masked_fill(~keep_s.flatten(1)[:, :, None], none)
    if keep_t is not None:
        table = table.masked_fill(~keep_t.flatten(1)[:, None, :], none)
    rows = torch.arange(ns, device=device).expand(batch, -1)  # original index of every row and column of the table
    cols = torch.arange(nt, device=device).expand(batch, -1)
    match = torch.full((batch, ns), -1, device=device)
    value = torch.full((batch, ns), none, dtype=table.dtype, device=device)
    while True:
        best, j = table.max(2)  # ties: the first, that is the lowest index
        col_best, i = table.max(1)
        alive_r, alive_c = best > none, col_best > none
        if not alive_r.any():
            break
        mutual = alive_r & (i.gather(1, j) == torch.arange(table.shape[1], device=device))
        # Where all remaining scores are equal, rounds would yield one pair each; the loop pairs such a table in order.
        if 8 * mutual.sum() < alive_r.sum():
            flat = best.amax(1) == table.masked_fill(table == none, float("inf")).amin((1, 2))
            rank = alive_r.cumsum(1) - 1
            in_order = (~alive_c).long().argsort(stable=True)  # alive columns first, ascending
            paired = alive_r & (rank < alive_c.sum(1, keepdim=True))
            mutual = torch.where(flat[:, None], paired, mutual)
            j = torch.where(flat[:, None], in_order.gather(1, rank.clamp(0, table.shape[2] - 1)), j)
        b, r = mutual.nonzero(as_tuple=True)
        c = j[b, r]
        match[b, rows[b, r]] = cols[b, c]
        value[b, rows[b, r]] = best[b, r]
        alive_r[b, r] = False
        alive_c[b, c] = False
        alive_c &= alive_r.any(1, keepdim=True)
        alive_r &= alive_c.any(1, keepdim=True)
        keep_r = (~alive_r).long().argsort(stable=True)[:, : max(1, int(alive_r.sum(1).max()))]
        keep_c = (~alive_c).long().argsort(stable=True)[:, : max(1, int(alive_c.sum(1).max()))]
        b = torch.arange(batch, device=device)[:, None]
        table = table[b, keep_r].gather(2, keep_c[:, None].expand(-1, keep_r.shape[1], -1))
        table.masked_fill_(~(alive_r[b, keep_r][:, :, None] & alive_c[b, keep_c][:, None, :]), none)
        rows, cols = rows[b, keep_r], cols[b, keep_c]
    order = value.argsort(descending=True, stable=True)[:, : min(ns, nt)]  # ties: the lowest source index first
    match, value = match.gather(1, order), value.gather(1, order)
    valid = match >= 0
    return Pairs(order * valid, match.clamp(min=0), value.masked_fill(~valid, 0), valid)


@torch.no_grad()
def select_pairs(corr: Tensor, src: Features, trg: Features, cfg: MatchConfig) -> Pairs:
    """PMPS on whole images: Hough matching and Algorithm 1, both inside the foreground; all pairs, best first."""
    keep_s, keep_t = (x.foreground(cfg.saliency_threshold) for x in (src, trg))
    return greedy_selection(matching_scores(corr, keep_s, keep_t, cfg), keep_s, keep_t)


def best_pairs(pairs: Pairs, kept: Tensor, count: int) -> Pairs:
    """The first `count` of the pairs that are marked in kept (B, K) bool, the only valid ones of the result."""
    order = (~kept).long().argsort(stable=True)[:, :count]
    return Pairs(*(x.gather(1, order) for x in pairs._replace(valid=kept)))


@torch.no_grad()
def pair_nms(pairs: Pairs, width_s: int, width_t: int, radius: float, keep: int) -> Pairs:
    """Non-maximum suppression of pairs: one is dropped if either of its ends lies nearer than `radius` cells (the
    larger of the two axis distances) to the same end of a better, kept pair. Returns the best `keep` that remain.

    pairs: best first, flat cell indices in grids of width_s and width_t columns.
    """
    ends = []
    for index, width in ((pairs.src, width_s), (pairs.trg, width_t)):
        xy = torch.stack([index % width, index // width], -1).float()
        ends.append((xy[:, :, None] - xy[:, None]).abs().amax(-1))  # (B, K, K)
    near = torch.minimum(*ends) < radius
    kept = pairs.valid.clone()
    for k in range(1, kept.shape[1]):
        kept[:, k] &= ~(near[:, k, :k] & kept[:, :k]).any(1)
    return best_pairs(pairs, kept, keep)


# ----------------------------------------------------------------------------------------------------------------------
# Keypoint transfer, source to target


def gather_rows(corr: Tensor, points: Tensor) -> Tensor:
    """Rows of a volume at fractional source positions, bilinear between the four cells around each.

    corr (B, Hs, Ws, Ht, Wt); points (B, n, 2) as (x, y) in source cells, clamped to the grid. Returns (B, n, Ht, Wt).
    """
    hs, ws = corr.shape[1:3]
    x, y = points[..., 0].clamp(0, ws - 1), points[..., 1].clamp(0, hs - 1)
    x0, y0 = x.floor().clamp(max=max(ws - 2, 0)), y.floor().clamp(max=max(hs - 2, 0))
    rows, b = 0.0, torch.arange(len(corr), device=corr.device)[:, None]
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - (x - x0 - dx).abs()) * (1 - (y - y0 - dy).abs())
            yi, xi = (y0 + dy).long().clamp(max=hs - 1), (x0 + dx).long().clamp(max=ws - 1)
            rows = rows + weight[..., None, None] * corr[b, yi, xi].float()
    return rows


def kernel_soft_argmax(rows: Tensor, temperature: float = 0.05, sigma: float = 2.5) -> Tensor:
    """Sub-cell position of the best match in each map: a soft-argmax under a Gaussian around the maximum.

    rows (..., H, W), each divided by its maximum; temperature of the softmax; sigma of the Gaussian in cells. Returns
    (..., 2) as (x, y) in cells.
    """
    h, w = rows.shape[-2:]
    flat = rows.float().flatten(-2)
    top, index = flat.max(-1, keepdim=True)
    xs = torch.arange(w, device=rows.device).repeat(h)
    ys = torch.arange(h, device=rows.device).repeat_interleave(w)
    distance2 = (xs - index % w) ** 2 + (ys - index // w) ** 2
    # Dividing by the maximum makes the temperature relative; a row without any positive score keeps its own scale.
    scaled = flat / torch.where(top > 1e-6, top, torch.ones_like(top))
    weight = (scaled / temperature - 0.5 * distance2 / sigma**2).softmax(-1)
    return torch.stack([(weight * xs).sum(-1), (weight * ys).sum(-1)], -1)


def transfer_keypoints(corr: Tensor, points: Tensor, temperature: float = 0.05, sigma: float = 2.5) -> Tensor:
    """Source to target: points (B, n, 2) as (x, y) in source cells to (B, n, 2) in target cells of corr's grids."""
    return kernel_soft_argmax(gather_rows(corr, points), temperature, sigma)


def cells_to_xy(index: Tensor, width: int) -> Tensor:
    """Flat cell indices (...) to float (x, y) cell positions (..., 2)."""
    return torch.stack([index % width, index // width], -1).float()
