"""The modules that the three stages share (paper, section 3.1, and the supplement's Algorithm 1).

MVAM                gated cross-attention, Eq. (1) -> cosine 4D volume -> 4D shifted-window aggregation
Eq. (2)             adaptive pooling and the multiple-instance loss
PMPS                Hough matching -> one-to-one greedy selection, Algorithm 1; NMS of pairs
keypoint transfer   kernel soft-argmax on the rows of a volume, source to target

A volume is (B, Hs, Ws, Ht, Wt), source first. A cell's flat index is y * W + x. `cfg` is train.Config.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.ours import LocalFeedForward, gaussian, neighbourhood_consensus

HEADS = 4  # of gated cross-attention; the paper gives no number
AP_TEMPERATURE = 0.05  # of the softmax in Eq. (2)'s pooling; not given
HOUGH_EXPONENT = 3.0  # of the similarities that vote; HPF: 3


class Features(NamedTuple):
    """What the backbone, once per image, gives to all stages."""

    feat: Tensor  # (B, H*W, C) tokens of the cells
    token: Tensor  # (B, C) global token T of Eq. (1)
    saliency: Tensor  # (B, H, W) in [0, 1]; ones where no saliency is used
    mirror: "Features | None" = None  # of the mirror image, in its own cells; where facing is looked for

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.saliency.shape[1:])

    def foreground(self, threshold: float) -> Tensor:
        """Algorithm 1, lines 4 and 5: a cell stays where S >= T. Returns (B, H, W) bool."""
        return self.saliency >= threshold

    def map(self, function, *others: "Features") -> "Features":
        """Apply a function to each tensor, or to each with those of other Features that stand beside it."""
        several = (self, *others)
        mirror = self.mirror and self.mirror.map(function, *(x.mirror for x in others))
        return Features(*(function(*tensors) for tensors in zip(*(x[:3] for x in several))), mirror)


# ------------------------------------------------------------------------------------------------------------
# MVAM: matching volume aggregation module


def autocast(x: Tensor, amp: bool) -> torch.autocast:
    """bfloat16 where x lies on a GPU and amp is set. Around backbone and MVAM alone: pairs, losses and places
    are found in float32."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=amp and x.is_cuda)


class GatedCrossAttention(nn.Module):
    """Eq. (1): cross-attention between two images, gated by the other image's class token.

    G_s = sigmoid(F_s . T_t),  G_t = sigmoid(F_t . T_s),  F~_s = MHA(F_s, F_t * G_t) * G_s,  F~_t likewise.

    residual=False is the equation to the letter. Otherwise (default) a transformer block around it: LayerNorm
    before, F~ added to F through an output projection that starts at zero (the first volume is the backbone's
    own), and the product inside each gate divided by sqrt(C): between normalised vectors it would saturate
    the sigmoid.
    """

    def __init__(self, dim: int, heads: int = HEADS, residual: bool = True) -> None:
        super().__init__()
        self.heads, self.residual = heads, residual
        self.gate_scale = dim**-0.5 if residual else 1.0
        self.norm = nn.LayerNorm(dim) if residual else nn.Identity()
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if residual:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def mha(self, x: Tensor, y: Tensor) -> Tensor:
        """Multi-head attention: queries from x (B, N, C), keys and values from y (B, M, C)."""
        q, k, v = (f(z).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or M, C / heads)
                   for f, z in ((self.q, x), (self.k, y), (self.v, y)))
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
        return (src + out_s, trg + out_t) if self.residual else (out_s, out_t)


def cosine_volume(feat_s: Tensor, feat_t: Tensor, grid_s: tuple[int, int], grid_t: tuple[int, int]) -> Tensor:
    """Phi: cosine similarity of every source cell with every target cell, in float32.

    feat_s (B, Hs*Ws, C), feat_t (B, Ht*Wt, C), without class tokens; returns (B, Hs, Ws, Ht, Wt) in [-1, 1].
    """
    with torch.autocast(feat_s.device.type, enabled=False):
        s, t = F.normalize(feat_s.float(), dim=-1), F.normalize(feat_t.float(), dim=-1)
        return (s @ t.transpose(1, 2)).unflatten(2, grid_t).unflatten(1, grid_s)


def window_partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, n1, n2, n3, n4, D), each n a multiple of its window side, to (B, windows, tokens of one, D)."""
    batch, *sides, dim = x.shape
    x = x.reshape(batch, *(k for n, w in zip(sides, window) for k in (n // w, w)), dim)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).reshape(batch, -1, math.prod(window), dim)


def window_merge(x: Tensor, window: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """Inverse of window_partition; `sides` is (n1, n2, n3, n4)."""
    x = x.reshape(len(x), *(n // w for n, w in zip(sides, window)), *window, x.shape[-1])
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).reshape(len(x), *sides, x.shape[-1])


def patch_split(volume: Tensor, patch: int) -> Tensor:
    """4D down-sampling, space to channels: (B, n1, n2, n3, n4) to (B, n1/p, n2/p, n3/p, n4/p, p^4)."""
    patches = window_partition(volume[..., None], (patch,) * 4)  # (B, patches, p^4, 1)
    return patches.view(len(volume), *(n // patch for n in volume.shape[1:]), patch**4)


def patch_shuffle(x: Tensor, patch: int) -> Tensor:
    """Feature channel redistribution, inverse of patch_split: p^4 channels to p times the cells a side."""
    sides = tuple(n * patch for n in x.shape[1:5])
    return window_merge(x.reshape(len(x), -1, patch**4, 1), (patch,) * 4, sides)[..., 0]


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept may meet gradients later
def relative_index(window: tuple[int, ...], side: int, device: torch.device) -> Tensor:
    """Which of side^4 relative positions every token pair of one window has: (N, N), N = the product of the
    window's sides."""
    index = 0
    for axis in torch.meshgrid(*(torch.arange(w, device=device) for w in window), indexing="ij"):
        axis = axis.flatten()  # index = sum_d (delta_d + W - 1) (2W - 1)^(3 - d)
        index = index * side + (axis[:, None] - axis[None, :] + side // 2)
    return index


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def attention_mask(sides: tuple, padded: tuple, window: tuple, shift: tuple, device: torch.device) -> Tensor:
    """Which token pairs of each window are neighbours in the volume: (windows, N, N) bool.

    sides, padded: tokens a side without and with padding. Along every side a token lies before or behind
    the seam of the roll, and is real or padding; two tokens are neighbours where all of that is the same.
    """
    label = torch.zeros((), dtype=torch.long, device=device)
    for real, n, step in zip(sides, padded, shift):
        index = torch.arange(n, device=device)
        label = label[..., None] * 4 + 2 * (index >= n - step) + (index.roll(-step) < real)
    label = window_partition(label[None, ..., None], window)[0, :, :, 0]  # (windows, N)
    return label[:, :, None] == label[:, None, :]


class WindowAttention4D(nn.Module):
    """Pre-norm transformer block on the tokens of 4D windows, with 4D relative position bias (after VAT).

    Windows are `window` tokens a side, or the whole side where that is shorter; with shift=True they are
    moved by half a window along every side that is longer than one (cyclic roll). Tokens that the roll, or
    padding, brought into one window without being neighbours do not see each other.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 4, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n1, n2, n3, n4, D) of any size; same shape out."""
        sides = tuple(x.shape[1:5])
        window = tuple(min(self.window, n) for n in sides)
        shift = tuple(w // 2 if self.shift and n > w else 0 for n, w in zip(sides, window))
        padded = tuple(-(-n // w) * w for n, w in zip(sides, window))
        pad = [p for n, m in zip(reversed(sides), reversed(padded)) for p in (0, m - n)]
        y = F.pad(self.norm1(x), [0, 0, *pad]).roll([-s for s in shift], (1, 2, 3, 4))
        qkv = self.qkv(window_partition(y, window)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, N, d)
        bias = self.bias[relative_index(window, 2 * self.window - 1, x.device)]
        bias, first = bias.permute(2, 0, 1)[None], 0  # (1, heads, N, N), of every window
        if sides != padded or any(shift):
            seen = attention_mask(sides, padded, window, shift, x.device)
            bias, first = bias.masked_fill(~seen[:, None], float("-inf")).flatten(0, 1)[None], 1
        # Fused attention takes four dimensions: windows join the batch or, where each has a mask, the heads.
        q, k, v = (z.flatten(first, first + 1) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = y.view(len(x), -1, self.heads, *y.shape[-2:]).transpose(2, 3).flatten(3)
        y = window_merge(self.proj(y), window, padded)
        y = y.roll(shift, (1, 2, 3, 4))[:, : sides[0], : sides[1], : sides[2], : sides[3]]
        x = x + y
        return x + self.mlp(self.norm2(x))


class VolumeAggregation(nn.Module):
    """rho: 4D patch embedding -> shifted-window attention -> 4D shuffle back to the full volume.

    Returns what is to be added to the volume, in (-1, 1) and zero before training, so that scores stay
    bounded whatever Eq. (2) rewards. The paper gives none of these numbers: `window` 4D patches a side of an
    attention window (VAT: 4), `patch` cells a side of a patch, `width` channels, `depth` blocks, every second
    one shifted.
    """

    def __init__(self, window: int, width: int = 16, heads: int = 2, depth: int = 2, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch**4, width)
        blocks = (WindowAttention4D(width, heads, window, shift=i % 2 == 1) for i in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.redistribute = nn.Linear(width, patch**4)
        nn.init.zeros_(self.redistribute.weight)
        nn.init.zeros_(self.redistribute.bias)

    def forward(self, corr: Tensor) -> Tensor:
        """corr (B, Hs, Ws, Ht, Wt) of any size; same shape out."""
        hs, ws, ht, wt = corr.shape[1:]
        pad = [p for n in (wt, ht, ws, hs) for p in (0, -n % self.patch)]
        x = self.embed(patch_split(F.pad(corr, pad), self.patch))  # (B, hs, ws, ht, wt, D)
        out = patch_shuffle(self.redistribute(self.blocks(x)), self.patch)
        return torch.tanh(out[:, :hs, :ws, :ht, :wt].float())


class MVAM(nn.Module):
    """Matching volume aggregation module: features of two images to one volume.

    ffn_ratio: hidden width of the feed-forward half over that of the features; 0: gated attention alone.
    window: side of the 4D windows, in patches. consensus: side of the neighbourhood that the volume is
    averaged over before its windows; 0: none. frozen_share: in eval mode, the refined features are averaged
    with those that came in, which have this share (after WiSE-FT, Wortsman et al., 2022). amp: `autocast`.
    """

    def __init__(self, dim: int, residual: bool, ffn_ratio: float, window: int,
                 consensus: int = 0, frozen_share: float = 0.0, amp: bool = True) -> None:
        super().__init__()
        self.consensus, self.frozen_share, self.amp = consensus, frozen_share, amp
        self.gated = GatedCrossAttention(dim, residual=residual)
        self.ffn = LocalFeedForward(dim, int(dim * ffn_ratio)) if ffn_ratio else None
        self.aggregation = VolumeAggregation(window)

    def forward(self, src: Features, trg: Features) -> Tensor:
        """Features of B source and B target images to a volume (B, Hs, Ws, Ht, Wt), float32."""
        with autocast(src.feat, self.amp):
            return self.volume(src, trg)

    def volume(self, src: Features, trg: Features) -> Tensor:
        """The same, in the precision that surrounds it."""
        s, t = (torch.cat([x.token[:, None], x.feat], 1) for x in (src, trg))
        s, t = self.gated(s, t)  # Psi, Eq. (1)
        if self.ffn is not None:
            s, t = self.ffn(s, src.grid), self.ffn(t, trg.grid)
        s, t = s[:, 1:], t[:, 1:]
        if self.frozen_share and not self.training:
            s, t = (torch.lerp(x, frozen.feat.to(x), self.frozen_share) for x, frozen in ((s, src), (t, trg)))
        corr = cosine_volume(s, t, src.grid, trg.grid)  # Phi
        if self.consensus:
            corr = neighbourhood_consensus(corr, self.consensus)
        return corr + self.aggregation(corr)  # rho


# ------------------------------------------------------------------------------------------------------------
# Eq. (2), used by the image and the region stage


def adaptive_pooling(corr: Tensor, mask_s: Tensor, mask_t: Tensor, form: str = "softmax",
                     temperature: float = AP_TEMPERATURE) -> Tensor:
    """AP(v) of Eq. (2): a volume to one score a couple.

    form "softmax": the probability of every cell's best match in the other image, under a softmax over its
    cells (NC-Net), mean over the foreground cells, both ways. It rewards matches that are distinct rather
    than merely high. form "max": the same of the similarities themselves.

    corr (B, Hs, Ws, Ht, Wt); masks (B, H, W) bool; returns (B,); a direction whose mask is empty counts 0.
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


def negatives(src: Features, labels: Tensor, regions: int = 1) -> tuple[Features, Tensor]:
    """Negatives by batch shifting (NC-Net): source k-1 with target k, and which of them differ in class.

    src: B images, or `regions` regions of each of B images; labels (B,): their classes. Returns the rolled
    sources and a bool (B,).
    """
    return src.map(lambda x: x.roll(regions, 0)), labels.roll(1, 0) != labels


def mil_loss(ap_pos: Tensor, ap_neg: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Eq. (2): L = 1/N sum_i -AP(v_i[pos]) + AP(v_i[neg]), each mean over its real couples alone.

    ap (N,); positive, negative (N,) bool: negative is False where a rolled couple happens to share its class,
    either is False for regions that only fill up a batch (couples with fewer suspected pairs). Returns a
    scalar.
    """
    pos, neg = positive.float(), negative.float()
    # L = 1/N sum -AP(v[pos]) + AP(v[neg])
    return -(ap_pos * pos).sum() / pos.sum().clamp(min=1) + (ap_neg * neg).sum() / neg.sum().clamp(min=1)


def multiple_instance_loss(mvam: MVAM, src: Features, trg: Features, labels: Tensor, valid: Tensor,
                           cfg) -> tuple[Tensor, Tensor]:
    """Eq. (2) of a batch: the volumes of its couples, the positives, and the loss against those of the rolled
    sources, the negatives. The module sees both at once.

    src, trg: K regions of each of B images (K = 1: the images themselves), B * K in all; labels (B,); valid
    (B, K) bool: False for regions that only fill up the batch. Returns (B * K, Hs, Ws, Ht, Wt) and a scalar.
    """
    rolled, other_class = negatives(src, labels, regions=valid.shape[1])
    negative = other_class[:, None] & valid & valid.roll(1, 0)
    mask_s, mask_t, mask_r = (x.foreground(cfg.saliency_threshold) for x in (src, trg, rolled))
    both = (x.map(lambda *two: torch.cat(two), y) for x, y in ((src, rolled), (trg, trg)))
    pos, neg = mvam(*both).chunk(2)
    ap_pos = adaptive_pooling(pos, mask_s, mask_t, cfg.ap)
    ap_neg = adaptive_pooling(neg, mask_r, mask_t, cfg.ap)
    return pos, mil_loss(ap_pos, ap_neg, valid.flatten(), negative.flatten())


# ------------------------------------------------------------------------------------------------------------
# PMPS: pseudo matching pair selection


class Pairs(NamedTuple):
    """Selected cell pairs, best first: flat indices, scores and which entries are real, each (B, K)."""

    src: Tensor
    trg: Tensor
    score: Tensor
    valid: Tensor


def cells_to_xy(index: Tensor, width: int) -> Tensor:
    """Flat cell indices (...) to float (x, y) cell positions (..., 2)."""
    return torch.stack([index % width, index // width], -1).float()


def sum_diagonals(a: Tensor) -> Tensor:
    """(..., N, M) to (..., N + M - 1): entry k is the sum of a[i, j] over j - i = k - (N - 1)."""
    n, m = a.shape[-2:]
    # Reverse the rows, pad each by n and re-read them n + m - 1 long: every row moves one further to the
    # right than the one before, so that diagonals become columns.
    skewed = F.pad(a.flip(-2), (0, n)).flatten(-2)[..., : n * (n + m - 1)]
    return skewed.unflatten(-1, (n, n + m - 1)).sum(-2)


def gaussian_smooth(x: Tensor, side: int) -> Tensor:
    """Gaussian of an odd side, standard deviation side / 4.708 (the side is twice its full width at half
    maximum), sum 1, zeros outside, over the last two axes of (..., H, W): HPF's for votes, MMNet's for heat
    maps.

    Sums of shifted copies: exact in float32 on every device, where a convolution may round to TF32 or
    bfloat16.
    """
    h, w = x.shape[-2:]
    weights = gaussian(side, side / 4.708, x)
    x = F.pad(x, [side // 2] * 4)
    x = sum(weight * x[..., k : k + h, :] for k, weight in enumerate(weights))
    return sum(weight * x[..., k : k + w] for k, weight in enumerate(weights))


@torch.no_grad()
def hough_matching(corr: Tensor, mask_s: Tensor | None = None, mask_t: Tensor | None = None,
                   side: int = 5, exponent: float = HOUGH_EXPONENT) -> Tensor:
    """Regularised Hough matching (HPF) with one bin per integer displacement.

    A = max(0, corr)^exponent,  H[d] = sum_i A[i, i + d],  C[i, j] = A[i, j] (H * Gaussian)[j - i], the
    Gaussian of side L with standard deviation L / 4.708 bins, normalised, zeros outside. HPF's own bins are
    0.71 cells wide at 512 px and stride 16, and its 7x7 Gaussian as wide (1.05 cells) as ours of side 5
    (1.06); with bins one cell wide its code gives these numbers.

    corr (B, Hs, Ws, Ht, Wt); masks (B, H, W) bool keep cells from voting and from being matched. Float32
    whatever the input; no gradient (votes weigh, they do not teach). Costs a few passes over the volume.
    """
    a = corr.float().clamp(min=0) ** exponent
    if mask_s is not None:
        a = a * mask_s[:, :, :, None, None]
    if mask_t is not None:
        a = a * mask_t[:, None, None]
    ht, wt = a.shape[3:]
    votes = sum_diagonals(a.transpose(2, 3))  # (B, Hs, Ht, Ws + Wt - 1)
    votes = sum_diagonals(votes.permute(0, 3, 1, 2)).transpose(1, 2)  # (B, Hs + Ht - 1, Ws + Wt - 1)
    votes = gaussian_smooth(votes, side)
    # Behind the flip, entry i along Hs (Ws) starts at displacement -i: (B, Hs, Ws, Ht, Wt), no table of bins.
    return a * votes.unfold(1, ht, 1).unfold(2, wt, 1).flip(1, 2)


@torch.no_grad()
def greedy_selection(score: Tensor, mask_s: Tensor | None = None, mask_t: Tensor | None = None) -> Pairs:
    """Algorithm 1: take the best remaining pair, remove its source and target cell, until one side is empty.

    The literal loop (tests/literal.py) is N argmaxes over the volume. Here every round takes all pairs that
    are the best of their row and of their column at once: under the order (score, then lowest flat index)
    such a pair stays the best of both until the loop reaches it, so the set, and after sorting the order, are
    exactly the loop's. Rounds of all B couples go together.

    score (B, Hs, Ws, Ht, Wt), finite; masks (B, H, W) bool: the foreground. Returns min(Ns, Nt) entries,
    best first.
    """
    score, gone = score.flatten(3).flatten(1, 2).float(), float("-inf")  # (B, Ns, Nt)
    (batch, ns, nt), device = score.shape, score.device
    rows, cols = (torch.arange(n, device=device).expand(batch, n) for n in (ns, nt))  # cells of the table's
    left_s, left_t = (index >= 0 if mask is None else mask.flatten(1)
                      for index, mask in ((rows, mask_s), (cols, mask_t)))
    table, partner, found = score, torch.full((batch, ns), -1, device=device), left_s.sum(1)
    rounds = 8 if score.is_cuda else 1  # a GPU's round costs less than to wait for its outcome
    while True:
        *counts, few = torch.stack([left_s.sum(1).max(), left_t.sum(1).max(), found.min()]).tolist()
        if not min(counts):
            break
        # Cut the tables to what any couple has left, and mark what is not left of this one.
        if counts[0] * counts[1] < 0.75 * table[0].numel():
            r, c = ((~x).long().argsort(dim=1, stable=True)[:, :n] for x, n in zip((left_s, left_t), counts))
            first = table.shape[1] * torch.arange(batch, device=device)[:, None]
            table = table.flatten(0, 1).index_select(0, (first + r).flatten()).unflatten(0, r.shape)
            table = table.gather(2, c[:, None].expand(-1, r.shape[1], -1))
            left_s, rows, left_t, cols = (
                x.gather(1, k) for x, k in ((left_s, r), (rows, r), (left_t, c), (cols, c)))
        for left, dim in ((left_s, 2), (left_t, 1)):
            table = torch.minimum(table, torch.where(left, -gone, gone).unsqueeze(dim))
        own_s, own_t = (torch.arange(n, device=device) for n in table.shape[1:])
        for _ in range(rounds):
            (best, j), (top, i) = table.max(2), table.max(1)  # ties: the first, that is the lowest index
            left_s, left_t = best > gone, top > gone
            mutual, taken = left_s & (i.gather(1, j) == own_s), left_t & (j.gather(1, i) == own_t)
            if few < 2:  # where all are equal, a round finds one pair; the loop gives row k column k
                lowest = table.masked_fill(table == gone, -gone).amin((1, 2))
                equal = (best.amax(1) == lowest)[:, None]
                place_s, place_t = left_s.cumsum(1) - 1, left_t.cumsum(1) - 1
                column = (~left_t).long().argsort(dim=1, stable=True)
                j = torch.where(equal, column.gather(1, place_s.clamp(0, top.shape[1] - 1)), j)
                mutual = torch.where(equal, left_s & (place_s < left_t.sum(1, keepdim=True)), mutual)
                taken = torch.where(equal, left_t & (place_t < left_s.sum(1, keepdim=True)), taken)
            partner.scatter_reduce_(1, rows, torch.where(mutual, cols.gather(1, j), -1), "amax")
            if rounds > 1:
                table.masked_fill_(mutual[:, :, None], gone).masked_fill_(taken[:, None], gone)
        left_s, left_t = left_s & ~mutual, left_t & ~taken
        found = mutual.sum(1) + ns * ~left_s.any(1)  # nothing is left: many
    value = score.gather(2, partner.clamp(min=0)[:, :, None])[..., 0].masked_fill(partner < 0, gone)
    value, src = (x[:, :nt] for x in value.sort(dim=1, descending=True, stable=True))  # ties: lowest first
    valid = value > gone
    return Pairs(src * valid, partner.gather(1, src) * valid, value.masked_fill(~valid, 0), valid)


def matching_scores(corr: Tensor, mask_s: Tensor, mask_t: Tensor, cfg) -> Tensor:
    """What pairs are selected by: Hough matching inside the foreground, or, without, the volume itself."""
    return hough_matching(corr, mask_s, mask_t, cfg.hough_side) if cfg.hough else corr.detach().float()


@torch.no_grad()
def select_pairs(corr: Tensor, src: Features, trg: Features, cfg) -> Pairs:
    """PMPS on whole images: Hough matching and Algorithm 1, both inside the foreground; all, best first.

    Only positive scores are pairs: Algorithm 1 goes on until one side is empty, whatever is left to pair.
    """
    mask_s, mask_t = (x.foreground(cfg.saliency_threshold) for x in (src, trg))
    pairs = greedy_selection(matching_scores(corr, mask_s, mask_t, cfg), mask_s, mask_t)
    return pairs._replace(valid=pairs.valid & (pairs.score > 0))


def put_back(pairs: Pairs, away: Tensor, width: int) -> Pairs:
    """Ours: pairs with the target's mirror image to pairs with the target as it is, x -> W - 1 - x, for those
    couples (B,) bool whose target faces away."""
    trg = torch.where(away[:, None], pairs.trg + width - 1 - 2 * (pairs.trg % width), pairs.trg)
    return pairs._replace(trg=trg)


def best_pairs(pairs: Pairs, kept: Tensor, count: int) -> Pairs:
    """The first `count` pairs that kept (B, K) bool marks; what stands behind them is not valid."""
    order = (~kept).long().argsort(stable=True)[:, :count]
    return Pairs(*(x.gather(1, order) for x in pairs._replace(valid=kept)))


@torch.no_grad()
def pair_nms(pairs: Pairs, width_s: int, width_t: int, radius: float, keep: int) -> Pairs:
    """Non-maximum suppression of pairs: one is dropped if either of its ends lies nearer than `radius` cells
    (the larger of the two axis distances) to the same end of a better, kept pair. Returns the best `keep`
    that remain.

    pairs: best first, flat cell indices in grids of width_s and width_t columns.
    """
    ends = cells_to_xy(pairs.src, width_s), cells_to_xy(pairs.trg, width_t)  # (B, K, 2)
    apart = torch.minimum(*((xy[:, :, None] - xy[:, None]).abs().amax(-1) for xy in ends))  # (B, K, K)
    near = (apart < radius).tril(-1).float()  # [k, j]: j is better than k
    # kept[k] = valid[k] and no better one that is kept is near: a round more, one more at least is right
    kept, before = pairs.valid, None
    while before is None or not torch.equal(kept, before):
        kept, before = pairs.valid & ((near @ kept.float()[:, :, None])[:, :, 0] == 0), kept
    return best_pairs(pairs, kept, keep)


# ------------------------------------------------------------------------------------------------------------
# Keypoint transfer, source to target


def read_at(maps: Tensor, points: Tensor) -> Tensor:
    """Maps read bilinearly between cells, the border repeated: maps (B, C, H, W) at points (B, n, 2), (x, y)
    in cells; returns (B, n, C)."""
    h, w = maps.shape[2:]
    grid = 2 * (points + 0.5) / points.new_tensor([w, h]) - 1
    found = F.grid_sample(maps, grid[:, :, None], mode="bilinear", padding_mode="border", align_corners=False)
    return found[..., 0].transpose(1, 2)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def cell_distances(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cells of a grid, (N, 2) as (x, y), and the squared distances between all of them, (N, N)."""
    cells = cells_to_xy(torch.arange(height * width, device=device), width)
    return cells, (cells[:, None] - cells).square().sum(-1)


def kernel_soft_argmax(rows: Tensor, temperature: float = 0.05, sigma: float = 2.5) -> Tensor:
    """Sub-cell position of the best match in each map: a soft-argmax under a Gaussian around the maximum.

    rows (..., H, W), each divided by its maximum; temperature of the softmax; sigma of the Gaussian in cells.
    Returns (..., 2) as (x, y) in cells, float32.
    """
    cells, distance2 = cell_distances(*rows.shape[-2:], rows.device)
    rows = rows.float().flatten(-2)
    top, index = rows.max(-1)
    # Dividing by the maximum makes the temperature relative; a row without any positive score keeps its own
    # scale.
    scale = temperature * torch.where(top > 1e-6, top, 1.0)[..., None]
    weight = (rows / scale).sub(distance2[index], alpha=0.5 / sigma**2).softmax(-1)
    with torch.autocast(rows.device.type, enabled=False):  # bfloat16: an eighth of a cell off at 32 cells
        return weight @ cells


def transfer_keypoints(corr: Tensor, points: Tensor, temperature: float = 0.05, sigma: float = 2.5) -> Tensor:
    """Source to target: points (B, n, 2), (x, y) in source cells of corr's grids, to target cells."""
    rows = read_at(corr.float().flatten(3).permute(0, 3, 1, 2), points)  # (B, n, Ht * Wt)
    return kernel_soft_argmax(rows.unflatten(2, corr.shape[3:]), temperature, sigma)
