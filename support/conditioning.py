"""Features on half-whitened principal axes: of the cells of training images, or of a couple's own."""

import torch
from torch import Tensor, nn

import data
from support.backbone import Backbone


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
    """Features on their first `axes` principal axes U, half whitened: (x - mean) U / eigenvalue^(1/4).

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
def pair_axes(src, trg, axes: int = 256) -> tuple:
    """The same without training images: Features (B, N, C) of sources and targets, and of their mirror images
    if they have those, on the axes of the couple's own cells."""
    sides = [x for side in (src, trg) for x in (side, side.mirror) if x is not None]
    with torch.autocast(src.feat.device.type, enabled=False):
        cells = torch.cat([x.feat for x in sides], 1)
        mean, basis = half_whitening(cells, min(axes, cells.shape[-1]))
        projected = ((cells.double() - mean[:, None]) @ basis).float()
    parts = iter(projected.split([x.feat.shape[1] for x in sides], 1))
    return tuple(x._replace(feat=next(parts), mirror=x.mirror and x.mirror._replace(feat=next(parts)))
                 for x in (src, trg))


@torch.no_grad()
def training_cells(backbone: Backbone, images: data.ImageSet, size: int, count: int = 256) -> Tensor:
    """The cells (N, C) of up to `count` training images, evenly spaced and whole, that axes are found from.

    Unreadable ones are passed over; ValueError if all are. Nothing is random: every process finds the same.
    """
    cells, skipped, device = [], [], next(backbone.parameters()).device
    for index in range(0, len(images), max(1, len(images) // count)):
        try:
            view, _ = data.prepare(images.load(index)[0], None, size, backbone.patch)
        except ValueError as error:  # training meets the file again, and reports it
            skipped.append(str(error))
            continue
        cells.append(backbone(view[None].to(device))[0][0])
    if not cells:
        raise ValueError(f"no training image can be read; the first: {skipped[0]}")
    return torch.cat(cells)
