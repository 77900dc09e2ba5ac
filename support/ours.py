"""What is ours in the volume, not the paper's: conditioned features and the consensus of neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def half_whitening(cells: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Mean (..., C) and half-whitened principal axes (..., C, axes) of cells (..., N, C), found in float64.

    Where the cells vary along fewer directions, the axes beyond them are zero.
    """
    x = cells.double()
    mean = x.mean(-2)
    x = x - mean[..., None, :]
    values, vectors = torch.linalg.eigh(x.mT @ x / x.shape[-2])  # ascending
    values, vectors = values.flip(-1)[..., :axes], vectors.flip(-1)[..., :axes]
    root = torch.where(values > 1e-9 * values[..., :1], values.clamp(min=0) ** 0.25, torch.inf)
    return mean, vectors / root[..., None, :]


class Conditioning(nn.Module):
    """Features on their principal axes, half whitened: (x - mean) U / eigenvalue^(1/4), U the first `axes` of
    them.

    A few directions that all cells share dominate the cosine of a ViT's cells, and whitening to the end would
    raise the noise of the last ones. Mean and axes are constants, found once from the cells of training
    images.
    """

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        if not 1 <= axes <= dim:
            raise ValueError(f"--axes {axes}: the backbone's cells have {dim} channels; 0: as they are")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim, axes))

    @torch.no_grad()
    def fit(self, cells: Tensor) -> None:
        """Find mean and axes. cells (N, C). ValueError if they vary along fewer directions than asked."""
        mean, axes = half_whitening(cells, self.axes.shape[1])
        if not axes.any(0).all():
            count = f"{axes.shape[1]}: {len(cells)} cells of the training images vary along fewer"
            raise ValueError(f"--axes {count}; lower it")
        self.mean.copy_(mean)
        self.axes.copy_(axes)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) to (..., axes), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() - self.mean) @ self.axes


@torch.no_grad()
def pair_axes(src: Tensor, trg: Tensor, axes: int = 256) -> tuple[Tensor, Tensor]:
    """The same without training images: cells (B, Ns, C), (B, Nt, C) on the axes of the couple's own cells
    together."""
    with torch.autocast(src.device.type, enabled=False):
        cells = torch.cat([src, trg], 1)
        mean, basis = half_whitening(cells, min(axes, cells.shape[-1]))
        projected = (cells.double() - mean[:, None]) @ basis
        return projected[:, : src.shape[1]].float(), projected[:, src.shape[1] :].float()
