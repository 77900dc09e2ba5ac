"""The frozen ViT: one plain vision transformer for iBOT, DINO and DINOv2, and their official checkpoints."""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.files import read_weights


class ViTSpec(NamedTuple):
    """Architecture and origin of one official checkpoint."""

    family: str  # how position embeddings interpolate: "dino" (iBOT too), "dinov2", "dinov2_reg" or "random"
    width: int
    heads: int
    patch: int  # pixels
    grid: int  # patches a side of the stored position embedding
    url: str | None
    depth: int = 12


IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"
DINO = "https://dl.fbaipublicfiles.com/dino"
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
BACKBONES = {
    "ibot_vitb16": ViTSpec("dino", 768, 12, 16, 14, f"{IBOT}/vitb_16/checkpoint_teacher.pth"),
    "ibot_vits16": ViTSpec("dino", 384, 6, 16, 14, f"{IBOT}/vits_16/checkpoint_teacher.pth"),
    "dino_vitb16": ViTSpec("dino", 768, 12, 16, 14,
                           f"{DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dino_vits16": ViTSpec("dino", 384, 6, 16, 14,
                           f"{DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "dino_vits8": ViTSpec("dino", 384, 6, 8, 28,
                          f"{DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "dinov2_vitb14": ViTSpec("dinov2", 768, 12, 14, 37, f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    "dinov2_vits14": ViTSpec("dinov2", 384, 6, 14, 37, f"{DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14_reg": ViTSpec("dinov2_reg", 768, 12, 14, 37,
                                 f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2_vits14_reg": ViTSpec("dinov2_reg", 384, 6, 14, 37,
                                 f"{DINOV2}/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
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
        """x (B, N, C) to queries, keys and values, each (B, heads, N, C / heads)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

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
    """One plain vision transformer for every family, with the parameter names of the official checkpoints."""

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

        DINO, iBOT and plain DINOv2 hand bicubic a scale factor of (h + 0.1) / grid and sample with it; DINOv2
        with registers asks for the size and antialiases. The class token's entry is never touched. Returns
        (1, 1 + h*w, C).
        """
        grid, pos = self.spec.grid, self.pos_embed.float()
        if (h, w) == (grid, grid):
            return pos
        patch_pos = pos[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
        if self.spec.family == "dinov2_reg":
            patch_pos = F.interpolate(
                patch_pos, size=(h, w), mode="bicubic", align_corners=False, antialias=True)
        else:
            scale = ((h + 0.1) / grid, (w + 0.1) / grid)
            patch_pos = F.interpolate(patch_pos, scale_factor=scale, mode="bicubic", align_corners=False)
        assert patch_pos.shape[-2:] == (h, w), (patch_pos.shape, h, w)
        return torch.cat([pos[:, :1], patch_pos.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to what enters the first block: class token, registers if any, cells, (B, N,
        C)."""
        h, w = (side // self.spec.patch for side in images.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        x = x + self.position_embedding(h, w).to(x.dtype)
        if self.spec.family == "dinov2_reg":  # registers carry no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def read(self, images: Tensor, layers: list[int]) -> tuple[list[Tensor], Tensor]:
        """The outputs of some blocks (ascending), each through the final LayerNorm, (B, N, C), and what
        entered the last of them. Blocks behind it do not run."""
        x, tokens = self.embed(images), []
        for k, block in enumerate(self.blocks[: layers[-1] + 1]):
            before, x = x, block(x)
            if k in layers:
                tokens.append(self.norm(x))
        return tokens, before


class Backbone(nn.Module):
    """A frozen ViT that always stays in eval mode and never receives a gradient.

    layer: index of the block whose output is read (negative from the end), or several as "9,10": their
    outputs, each through the final LayerNorm, stand side by side in a cell's C channels, in the order of the
    blocks.
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

        With attention=True a third tensor (B, h, w): the class token's attention to every cell in the last
        block that is read, mean over heads, as a saliency map that costs nothing: 0 where it is least, 1 for
        the most attended tenth of the cells, and linear in between. The maximum would not do as the 1: single
        outlier cells get many times the attention of the object (docs/running.md). Raises ValueError if a
        side is not a multiple of the patch.
        """
        h, w = (side // self.patch for side in images.shape[-2:])
        if (h * self.patch, w * self.patch) != tuple(images.shape[-2:]) or not h * w:
            shape = f"{images.shape[-1]}x{images.shape[-2]} px"
            raise ValueError(f"image of {shape}: both sides must be multiples of {self.patch}")
        several, before = self.vit.read(images, self.layers)
        tokens = torch.cat(several, -1)
        feat, token = tokens[:, -h * w :], tokens[:, 0]
        if not attention:
            return feat, token
        last = self.vit.blocks[self.layers[-1]]
        q, k, _ = last.attn.split(last.norm1(before))
        weights = (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, 1, N)
        weights = weights[:, :, 0, -h * w :].mean(1).unflatten(1, (h, w)).float()
        low, high = weights.flatten(1).quantile(weights.new_tensor([0, 0.9]), 1)[..., None, None]
        return feat, token, ((weights - low) / (high - low).clamp(min=1e-12)).clamp(max=1)


def load_backbone(name: str, weights: str | None = None, layer: int | str = -1) -> Backbone:
    """A frozen backbone with official weights: from `weights`, or downloaded once into torch.hub's cache.

    Accepts the flat checkpoints of DINO and DINOv2, iBOT's teacher-only file and its full training checkpoint
    (student, teacher, optimiser; the teacher is taken), and DINOv2's training checkpoint; prefixes of
    wrappers are dropped. Raises ValueError in one line for a file that is missing, unreadable, of another
    architecture or incomplete.
    """
    backbone = Backbone(name, layer)
    spec = backbone.vit.spec
    if weights is None and spec.url is None:
        draw_weights(backbone.vit)
        return backbone
    origin = weights or spec.url
    way_out = "give a checkpoint with --weights FILE"
    state = read_weights(origin, f"the weights of {name}", way_out, f"{name}.pth")
    for key in ("teacher", "state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{origin} holds a {type(state).__name__}, not the state dict of a ViT")
    state, expected = plain_keys(state), backbone.vit.state_dict()
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = f"{origin} is not a checkpoint of {name}"
    if missing or extra:
        raise ValueError(f"{wrong}: {len(missing)} keys missing (such as {min(missing, default='-')}),"
                         f" {len(extra)} unknown (such as {min(extra, default='-')})")
    for key, value in expected.items():
        if not isinstance(state[key], Tensor) or state[key].shape != value.shape:
            found = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
            raise ValueError(f"{wrong}: {key} is {found}, not {tuple(value.shape)}")
        if not state[key].isfinite().all():
            raise ValueError(f"{origin} is damaged: {key} holds values that are not finite")
    backbone.vit.load_state_dict(state)  # copies into float32, whatever the file's precision
    return backbone


def plain_keys(state: dict) -> dict:
    """A state dict under the official names: of teacher and student side by side the teacher, without the
    prefixes of wrappers (DDP, torch.compile, the trainers of DINO and DINOv2) and what is not part of the
    features."""
    state = {str(key): value for key, value in state.items()}
    teacher = {key.removeprefix("teacher."): x for key, x in state.items() if key.startswith("teacher.")}
    wrappers = r"^(module\.|_orig_mod\.|backbone\.)+"
    plain = {re.sub(wrappers, "", key): x for key, x in (teacher or state).items()}
    unused = ("head.", "dino_head.", "ibot_head.", "masked_embed", "mask_token")
    return {key: value for key, value in plain.items() if not key.startswith(unused)}


def draw_weights(vit: ViT) -> None:
    """Seeded weights under which every block mixes: LeCun-normal maps, positions well below content."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted(vit.state_dict().items()):
        if name.endswith("weight") and value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif name in ("cls_token", "pos_embed"):
            value.normal_(0, 0.02, generator=generator)
        elif name.endswith("bias"):
            value.zero_()
