"""CATs (Cho et al., NeurIPS 2021): the keypoint matcher that the labels are for (paper, section 4.3).

Hyperpixels of a ResNet, or several blocks of a ViT, at 16x16 cells -> a cosine volume a level, each filtered
by mutual nearest neighbours -> a transformer that reads the volumes' rows beside projected features, once for
the target's cells and once, with the same weights, for the source's -> mean over levels -> soft-argmax: where
in the source every cell of the target lies. Trained by `experiments.finetune`, scored by `experiments.peers`.

A volume is (B, Ns, Nt) here, source first, N = 16 * 16. Its roles are CATs' own: the target's cells look into
the source. `Cats.transfer` moves points source to target like the cascade's, the images handed in swapped.
Pairs are asked for and scored as `as_cats_reads` shows them, so that official weights give official points.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import data
from modules import Features, cells_to_xy, cosine_volume, read_at, transfer_keypoints
from support.backbone import BACKBONES, ViT, ViTBlock, load_backbone, plain_keys
from support.files import read_weights

GRID = 16  # cells a side; the aggregator's width is tied to it
HYPERPIXELS = "0,8,20,21,26,28,29,30"  # of a ResNet-101, CATs' choice on SPair-71k


@dataclass
class CatsConfig:
    """The matcher; the defaults are CATs' own on SPair-71k."""

    # group: matcher
    backbone: str = "resnet101"  # a ResNet of torchvision, or a ViT of support/backbone.py; CATs: resnet101
    backbone_weights: str | None = None  # local checkpoint of the backbone; none: downloaded on first use
    levels: str | None = None  # blocks that are read, such as 0,8,20; none: the last, or HYPERPIXELS
    size: int = 256  # input side in pixels; CATs: 256

    # group: no option
    projection: int = 128  # channels of the projected features that stand beside a volume's rows; CATs: 128
    depth: int = 1  # aggregator blocks; CATs: 1
    heads: int = 6  # attention heads of a block; CATs: 6
    beta: float = 0.02  # temperature of the soft-argmax; CATs: 0.02, SemiMatch: 0.1


# ------------------------------------------------------------------------------------------------------------
# Pairs as CATs' loader gives them


def squashed(image: Image.Image, size: int, box: data.Box | None = None) -> Image.Image:
    """An image, or a box of it, squashed to size x size as CATs and SemiMatch read it: bilinearly."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


class SquashedImages:
    """An ImageSet whose images are `squashed`."""

    def __init__(self, images: data.ImageSet, side: int) -> None:
        self.images, self.side = images, side

    def load(self, index: int) -> tuple[Image.Image, None]:
        return squashed(self.images.load(index)[0], self.side), None

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side


def as_cats_reads(keypoints: data.KeypointSet, size: int) -> data.KeypointSet:
    """Pairs in a frame of size x size as CATs' loader gives them: images squashed, points at x * size / W.

    There a query stands half a pixel of the frame, not of its image, from the edge of its pixel. What is
    scored stays what it was: d is as before, and `scale` leads back to where the pairs were scored.
    """
    found = data.KeypointSet(keypoints.name, SquashedImages(keypoints.images, size), [], keypoints.rule)
    for p in keypoints.pairs:
        src, trg = (size / torch.tensor(keypoints.size(image)) for image in (p.src, p.trg))
        d = max(keypoints.size(p.trg)) if keypoints.rule == "img" and p.d is None else p.extent
        scale = tuple((torch.tensor(p.scale or (1.0, 1.0)) / trg).tolist())
        found.pairs.append(p._replace(src_kps=p.src_kps * src, trg_kps=p.trg_kps * trg, d=d, scale=scale))
    return found


# ------------------------------------------------------------------------------------------------------------
# Features


class ResNetLevels(nn.Module):
    """Hyperpixels (HPF) of a ResNet: level 0 is the stem after max pooling, level k the k-th residual block's
    sum before its final ReLU. Blocks behind the last level are left away. Batch norm keeps its statistics."""

    patch = 16

    def __init__(self, name: str, levels: list[int], weights: str | None, load: bool) -> None:
        super().__init__()
        net = torchvision.models.get_model(name)
        if load:
            origin = weights or torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
            way_out = "give torchvision's file with --backbone-weights FILE"
            state = read_weights(origin, f"the weights of {name}", way_out)
            try:
                net.load_state_dict(plain_keys(state))
            except (RuntimeError, TypeError, AttributeError) as error:
                wrong = str(error).splitlines()[:2][-1].strip()
                raise ValueError(f"{origin} is not a {name} of torchvision ({wrong}); {way_out}") from None
            if broken := [key for key, value in net.state_dict().items() if not value.isfinite().all()]:
                raise ValueError(f"{origin} is damaged: {broken[0]} is not finite everywhere; {way_out}")
        blocks = [block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer]
        check_levels(name, levels, len(blocks))
        self.levels = levels
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.blocks = nn.ModuleList(blocks[: max(levels)])
        widths = [64] + [getattr(block, "conv3", block.conv2).out_channels for block in blocks]
        self.widths = [widths[k] for k in levels]
        self.eval()

    def train(self, mode: bool = True) -> "ResNetLevels":
        return super().train(False)  # the only thing that a mode changes here is batch norm

    @staticmethod
    def residual_sum(block: nn.Module, x: Tensor) -> Tensor:
        """A basic or bottleneck block of torchvision without its final ReLU."""
        out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        if hasattr(block, "conv3"):
            out = block.bn3(block.conv3(F.relu(out)))
        return out + (x if block.downsample is None else block.downsample(x))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised RGB (B, 3, H, W) to a map (B, C, h, w) a level, in ascending order."""
        x = self.stem(images)
        maps = [x] if 0 in self.levels else []
        for k, block in enumerate(self.blocks, 1):
            before_relu = self.residual_sum(block, x)
            if k in self.levels:
                maps.append(before_relu)
            x = F.relu(before_relu)
        return maps


class ViTLevels(nn.Module):
    """The cells of several blocks of a ViT, each through the final LayerNorm."""

    def __init__(self, name: str, levels: list[int], weights: str | None, load: bool) -> None:
        super().__init__()
        try:
            self.vit = load_backbone(name, weights).vit if load else ViT(BACKBONES[name])
        except ValueError as error:  # it speaks of train.py's option
            given = f"--backbone-weights {weights}: " * bool(weights)
            raise ValueError(given + str(error).replace("--weights", "--backbone-weights")) from None
        check_levels(name, levels, len(self.vit.blocks) - 1)
        self.levels, self.patch = levels, self.vit.spec.patch
        self.vit.blocks = self.vit.blocks[: max(levels) + 1]
        self.widths = [self.vit.spec.width] * len(levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised RGB (B, 3, H, W) to a map (B, C, h, w) a level, in ascending order."""
        h, w = (side // self.patch for side in images.shape[-2:])
        tokens, _ = self.vit.read(images, self.levels)
        return [x[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)) for x in tokens]


def check_levels(name: str, levels: list[int], last: int) -> None:
    """ValueError unless the levels are some of a backbone's, ascending and each once."""
    if levels != sorted(set(levels)) or not 0 <= levels[0] <= levels[-1] <= last:
        given, such = (",".join(map(str, some)) for some in (levels, sorted({0, last})))
        text = f"some of 0 to {last} in ascending order, such as {such}"
        raise ValueError(f"--levels {given}: of {name}, {text}")


def load_levels(cfg: CatsConfig, load: bool) -> ResNetLevels | ViTLevels:
    """The backbone of a configuration; `load`: with its weights. ValueError names a wrong option."""
    vit = cfg.backbone in BACKBONES
    resnets = torchvision.models.list_models(include="resnet*")
    if not vit and cfg.backbone not in resnets:
        raise ValueError(f"--backbone {cfg.backbone}: {', '.join([*resnets, *BACKBONES])}")
    text = cfg.levels or (str(BACKBONES[cfg.backbone].depth - 1) if vit else HYPERPIXELS)
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--levels {text}: numbers joined by commas, such as {HYPERPIXELS}") from None
    kind = ViTLevels if vit else ResNetLevels
    return kind(cfg.backbone, levels, cfg.backbone_weights, load)


# ------------------------------------------------------------------------------------------------------------
# The matcher


def mutual_filter(corr: Tensor) -> Tensor:
    """Mutual nearest neighbours, softly (NC-Net): c * (c / best of its row) * (c / best of its column).

    corr (..., Ns, Nt); a best of exactly zero counts as 1e-30.
    """
    best_src, best_trg = corr.amax(-2, keepdim=True), corr.amax(-1, keepdim=True)
    best_src, best_trg = (best + 1e-30 * (best == 0) for best in (best_src, best_trg))
    return corr * (corr / best_src) * (corr / best_trg)


class AggregatorBlock(nn.Module):
    """Attention among the cells of a level, then, where there are several, among the levels of a cell."""

    def __init__(self, dim: int, heads: int, levels: int) -> None:
        super().__init__()
        self.cells = ViTBlock(dim, heads, layer_scale=False)
        self.levels = ViTBlock(dim, heads, layer_scale=False) if levels > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L levels, N cells, C), likewise returned."""
        batch = len(x)
        x = self.cells(x.flatten(0, 1)).unflatten(0, (batch, -1))
        if self.levels is None:
            return x
        x = x.transpose(1, 2)  # (B, N, L, C)
        return self.levels(x.flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


class Aggregator(nn.Module):
    """CATs' transformer: refines the volumes of all levels, sees both ways, keeps a residual to each."""

    def __init__(self, levels: int, projection: int, depth: int, heads: int) -> None:
        super().__init__()
        cells, dim = GRID**2, GRID**2 + projection
        if dim % heads or dim % 2:
            raise ValueError(f"heads {heads}: must divide {cells} + projection {projection}, an even number")
        self.position_x = nn.Parameter(torch.zeros(1, levels, 1, GRID, dim // 2))
        self.position_y = nn.Parameter(torch.zeros(1, levels, GRID, 1, dim // 2))
        self.blocks = nn.Sequential(*(AggregatorBlock(dim, heads, levels) for _ in range(depth)))
        self.proj = nn.Linear(dim, cells)
        for name, p in self.named_parameters():
            if name.startswith("position") or (name.endswith("weight") and p.ndim > 1):
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        nn.init.zeros_(self.proj.weight)  # the first volume is the backbone's own; CATs draws this one too

    def forward(self, corr: Tensor, src: Tensor, trg: Tensor) -> Tensor:
        """corr (B, L, Ns, Nt), projected src (B, L, Ns, P) and trg (B, L, Nt, P); returns (B, Ns, Nt)."""
        shape = (-1, -1, GRID, GRID, -1)
        position = torch.cat([self.position_x.expand(shape), self.position_y.expand(shape)], -1).flatten(2, 3)
        # the target's cells are tokens: what each sees of the source
        tokens = torch.cat([corr.transpose(-1, -2), trg], -1) + position
        x = self.proj(self.blocks(tokens)).transpose(-1, -2) + corr
        # the source's cells are tokens, same weights; the residual is the first volume again
        tokens = torch.cat([x, src], -1) + position
        return (self.proj(self.blocks(tokens)) + corr).mean(1)


class Cats(nn.Module):
    """CATs. `load`: with the backbone's weights; a checkpoint of fine-tuning holds them itself."""

    def __init__(self, cfg: CatsConfig, load: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = load_levels(cfg, load)
        if cfg.size % self.backbone.patch:
            patch = f"the patch of {cfg.backbone}, {self.backbone.patch} px"
            raise ValueError(f"--size {cfg.size}: not a multiple of {patch}")
        widths = self.backbone.widths
        self.project = nn.ModuleList(nn.Linear(width, cfg.projection) for width in widths)
        self.aggregator = Aggregator(len(widths), cfg.projection, cfg.depth, cfg.heads)

    def features(self, images: Tensor) -> Features:
        """Images (B, 3, S, S) to Features whose cells hold the channels of all levels, side by side."""
        images = images.to(next(self.parameters()).device, non_blocking=True)
        size = (GRID, GRID)
        maps = [F.interpolate(m, size, mode="bilinear", align_corners=True) for m in self.backbone(images)]
        feat = torch.cat(maps, 1).flatten(2).transpose(1, 2)  # (B, N, sum of C)
        return Features(feat, feat.new_zeros(len(feat), 0), feat.new_ones(len(feat), *size))

    def forward(self, src: Features, trg: Features) -> Tensor:
        """The refined volume (B, Ns, Nt), float32."""
        levels = [side.feat.split(self.backbone.widths, -1) for side in (src, trg)]
        volumes = [cosine_volume(s, t, src.grid, trg.grid).flatten(3).flatten(1, 2) for s, t in zip(*levels)]
        corr = torch.stack([mutual_filter(c) for c in volumes], 1)  # (B, L, Ns, Nt)
        projected = (torch.stack([p(f) for p, f in zip(self.project, side)], 1) for side in levels)
        return self.aggregator(corr, *projected).float()

    @torch.no_grad()
    def transfer(self, src: Features, trg: Features, points: Tensor, method: str = "cats") -> Tensor:
        """Source to target: points (B, n, 2) as (x, y) in source cells to target cells.

        "cats": the flow around a point is read bilinearly; beyond the outermost centres it is theirs.
        "kernel": the volume's row is, and the soft-argmax is the project's, under a Gaussian around the best.
        """
        corr = self(trg, src)  # the source's cells look into the target
        if method == "kernel":
            grid = (GRID, GRID)
            return transfer_keypoints(corr.transpose(1, 2).unflatten(2, grid).unflatten(1, grid), points)
        return points + read_at(flow_of(corr, self.cfg.beta), points)


# ------------------------------------------------------------------------------------------------------------
# Flow and loss. Flow is in cells, defined on the target's cells, and points into the source.


def soft_argmax(corr: Tensor, beta: float) -> Tensor:
    """Where in the source a target cell lies: softmax(corr / beta) times the source cells' places, summed.

    corr (B, Ns, Nt); returns (B, Nt, 2) as (x, y) in cells.
    """
    places = cells_to_xy(torch.arange(GRID**2, device=corr.device), GRID)  # (Ns, 2)
    with torch.autocast(corr.device.type, enabled=False):  # bfloat16 is off by tenths of a cell
        return (corr.float() / beta).softmax(1).transpose(1, 2) @ places


def flow_of(corr: Tensor, beta: float) -> Tensor:
    """Soft-argmax minus every target cell's own place. corr (B, Ns, Nt); returns (B, 2, 16, 16)."""
    own = cells_to_xy(torch.arange(GRID**2, device=corr.device), GRID)
    return (soft_argmax(corr, beta) - own).transpose(1, 2).unflatten(2, (GRID, GRID))


def flow_target(src_kps: Tensor, trg_kps: Tensor, original: bool = False) -> tuple[Tensor, Tensor]:
    """The flow that keypoints ask for, and where: CATs' fields of 35 px at 256 px, 17/16 cells to each side.

    src_kps, trg_kps (n, 2) in cells; returns flow (2, 16, 16) in cells and valid (16, 16) bool. A cell that
    some target keypoints lie in gets the mean of their source keypoints minus their own mean.

    original: CATs' released code, which takes the last source keypoint of a shared cell with the mean of its
    target keypoints, and leaves out cells whose flow is exactly zero.
    """
    own = cells_to_xy(torch.arange(GRID**2), GRID).unflatten(0, (GRID, GRID))  # (16, 16, 2)
    inside = ((trg_kps[:, None, None] - own).abs() <= 17 / 16).all(-1)  # (n, 16, 16)
    share = inside / inside.sum(0).clamp(min=1)
    src, trg = (torch.einsum("nyx,nc->cyx", share, kps) for kps in (src_kps, trg_kps))
    valid = inside.any(0)
    if original:
        last = len(src_kps) - 1 - inside.flip(0).int().argmax(0)  # (16, 16)
        src = src_kps[last].permute(2, 0, 1)
    flow = (src - trg) * valid
    return flow, (flow != 0).any(0) if original else valid


def end_point_error(flow: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean distance in cells of two flows (B, 2, h, w) over all valid cells (B, h, w); 0 without any."""
    distance = (flow - target).norm(dim=1)
    return (distance * valid).sum() / valid.sum().clamp(min=1)
