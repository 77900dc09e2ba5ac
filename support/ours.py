"""Ours, not the paper's, inside MVAM: the local feed-forward and the consensus of neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LocalFeedForward(nn.Module):
    """The feed-forward half of a transformer block with local context: two 3x3 convolutions over the cells.

    x + conv(GELU(conv(x))), the second convolution zero at first, so that the block starts as an identity.
    The border is repeated, since zeros around the grid would tell a cell where it lies. The class token
    passes unchanged.
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


def gaussian(side: int, deviation: float, like: Tensor) -> Tensor:
    """Weights of a Gaussian over an odd side, sum 1, with the type and device of another tensor: (side,)."""
    offset = torch.arange(side, device=like.device, dtype=like.dtype) - side // 2
    weights = torch.exp(-0.5 * (offset / deviation) ** 2)
    return weights / weights.sum()


def neighbourhood_consensus(corr: Tensor, side: int) -> Tensor:
    """A match is as good as its neighbours that move alike: C[i, j] = sum_d g(d) corr[i + d, j + d].

    The one 4D convolution whose kernel lies on the diagonal, fixed; what NC-Net's learn, and VAT's in front
    of its windows, starts here. d runs over side x side cells (odd), g is a Gaussian that ends at three
    standard deviations, sum 1; zeros outside. corr (B, Hs, Ws, Ht, Wt), same shape out; two passes of `side`
    shifted sums.
    """
    weights = gaussian(side, side / 6, corr)
    for src_axis in (1, 2):  # y, then x; the target's axis is two further
        sides = corr.shape
        pad = [side // 2 if axis in (src_axis, src_axis + 2) else 0 for axis in (4, 3, 2, 1) for _ in (0, 1)]
        padded = F.pad(corr, pad)
        corr = sum(
            weight * padded.narrow(src_axis, k, sides[src_axis]).narrow(src_axis + 2, k, sides[src_axis + 2])
            for k, weight in enumerate(weights)
        )
    return corr
