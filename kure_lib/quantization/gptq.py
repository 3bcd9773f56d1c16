"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): weights rounded in turn, each error made good by those that follow.

As published, with the weights of every row in the order in which they stand. Steps are chosen beforehand.
"""

import torch
from torch import Tensor

from kure_lib.tensors.grids import Format
from kure_lib.tensors.quantizers import quantize

DAMPING = 0.01  # of the mean square of an input, added to every one's


def rounded(weight: Tensor, step: Tensor, bits: int, grid: Format, moment: Tensor) -> Tensor:
    """Levels Ŵ for the weights of a layer for which its mean squared error tr (Ŵ − W) H (Ŵ − W)ᵀ is small.

    Column by column the weights are rounded to the nearest level. Their error e_i is then carried over to all columns
    j > i that are still free: w_j ← w_j − e_i·[H_F⁻¹]_ij / [H_F⁻¹]_ii, with H_F the part of H that belongs to i and to
    them, which minimizes the layer's error (optimal brain surgeon). The rows of the inverses that this needs are, up
    to a factor, those of the Cholesky factor of H⁻¹ = UᵀU.

    Args:
        weight: [groups, rows, columns], one row for each output channel.
        step: Steps, of the same shape.
        bits: Bit-width of the grid.
        grid: Grid or codebook.
        moment: H = E[x xᵀ] of what the layer sees, [groups, columns, columns]; a hundredth of the mean of its
            diagonal is added to that.

    >>> from kure_lib.tensors.grids import SIGNED_INT
    >>> weight, ones = torch.tensor([[[0.4, 0.4]]]), torch.ones(1, 2, 2)  # two inputs that are always the same
    >>> rounded(weight, torch.ones(1, 1, 2), 4, SIGNED_INT, ones).tolist()
    [[[0.0, 1.0]]]
    """
    moment = moment.double()
    damping = DAMPING * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = torch.where(damping > 0, damping, 1.0)  # inputs that are always zero say nothing
    damped = moment + damping[:, None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    levels, step = weight.detach().double().clone(), step.double()
    for i in range(levels.shape[-1]):
        wanted = levels[..., i].clone()
        levels[..., i] = quantize(wanted, step[..., i], bits, grid)
        error = (wanted - levels[..., i]) / upper[:, i, i, None]
        levels[..., i + 1 :] -= error[..., None] * upper[:, None, i, i + 1 :]
    return levels.to(weight.dtype)
