"""AdaRound (Nagel et al. 2020, arXiv:2004.10568): learned, weight by weight, whether to round up or down.

What differs from the paper: the gradient of the layer's error comes from moments of all calibration inputs, which give
it exactly, so that no batch is drawn, nothing is random, and 1000 iterations with a learning rate of 0.02 do instead of
10,000 with 0.001; a ReLU behind the layer is not part of its output; and the error is counted in units of what nearest
rounding costs, so that one weight of the regularizer suits layers of every scale.
"""

import torch
from torch import Tensor

from kure_lib.quantization.spec import ITERATIONS
from kure_lib.tensors.grids import Grid
from kure_lib.tensors.quantizers import quantize

REACH = 0.1  # by which the sigmoid is stretched beyond 0 and 1, so that it reaches both
LEARNING_RATE = 0.02
WEIGHT = 3.0  # of the regularizer, beside an error that is one for nearest rounding
WARM_UP = 0.2  # part of the iterations without it
BETA = 20.0, 2.0  # its exponent, from the first to the last iteration with it


@torch.enable_grad()
def rounded(
    weight: Tensor, step: Tensor, bits: int, grid: Grid, moment: Tensor, cross: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """Levels Ŵ next to the weights of a layer, above or below, whose output Ŵx is close to W x⁰.

    Here x is what the layer sees and x⁰ what it would see in full precision. Each code is the lower one plus
    h = clip(1.2·σ(v) − 0.1, 0, 1), which begins where the weight lies; Adam lowers E‖Ŵx − Wx⁰‖² and a regularizer
    mean(1 − |2h − 1|^β), which drives h to 0 or 1, the more so near to them the smaller β has become.

    Args:
        weight: [groups, rows, columns], one row for each output channel.
        step: Steps, of the same shape.
        bits: Bit-width of the grid.
        grid: An even grid.
        moment: E[x xᵀ], [groups, columns, columns].
        cross: E[x⁰ xᵀ], of the same shape.
        iterations: Steps of Adam.
    """
    weight, step, moment, cross = (each.detach().float() for each in (weight, step, moment, cross))
    position = weight / step - grid.offset
    low = position.floor()
    value = torch.logit((position - low + REACH) / (1 + 2 * REACH)).requires_grad_()
    nearest = quantize(weight, step, bits, grid) - weight
    unit = ((nearest @ moment) * nearest).sum()
    unit = torch.where(unit > 0, unit, 1.0)  # weights that are levels already, or inputs that are always zero
    drift = weight @ (moment - cross)  # what the layers before have done to the output already

    def levels(up: Tensor) -> Tensor:
        return ((low + up).clamp(grid.lowest(bits), grid.highest(bits)) + grid.offset) * step

    optimizer = torch.optim.Adam([value], lr=LEARNING_RATE)
    for i in range(iterations):
        up = (value.sigmoid() * (1 + 2 * REACH) - REACH).clamp(0, 1)
        change = levels(up) - weight
        slope = 2 * (change.detach() @ moment + drift) / unit
        loss = (slope * change).sum()  # not the error, but its gradient
        if (done := (i / iterations - WARM_UP) / (1 - WARM_UP)) >= 0:
            beta = BETA[0] + (BETA[1] - BETA[0]) * done
            loss = loss + WEIGHT * (1 - (2 * up - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return levels((value.detach() >= 0).float())
