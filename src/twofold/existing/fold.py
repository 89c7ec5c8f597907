"""Values from keys: with as many KV heads as query heads, V = (K - b_K) F + b_V, F = W_K⁻¹ W_V, without retraining.

What is cached is rounded to the cache's dtype, and F makes that rounding larger: how much larger is known beforehand, from the weights alone. All of this
is computed in float64.

Source: "Slim attention" (2503.05840), equation 2, which has no biases and no rounding.

Shapes: C hidden_size, N = heads · head_dim outputs of a projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kept = Literal["keys", "values"]
BLOCK, ITERATIONS = 8, 24


@dataclass(frozen=True)
class Projection:
    """x -> x W + b in float64: ``weight`` [C, N], ``bias`` [N]."""

    weight: Tensor
    bias: Tensor

    @property
    def variances(self) -> Tensor:
        """Mean squares [N] of the outputs for inputs of unit variance, as a norm makes them."""
        return self.weight.square().sum(dim=0) + self.bias.square()


@dataclass(frozen=True)
class Fold:
    """How one of K and V follows from the other: lost = kept F + offset; F [N, N], offset [N].

    ``condition`` is the condition number of the kept projection; ``error`` the root mean square of what rounding the kept one to ``epsilon`` does to the
    lost one, over the root mean square of the lost one.
    """

    kept: Kept
    matrix: Tensor
    offset: Tensor
    condition: float
    error: float


def fold(kept: Kept, source: Projection, target: Projection, epsilon: float) -> Fold | str:
    """The map from ``source`` (what is kept) to ``target``; or why there is none.

    Rounding moves every kept number, and every number of F, by a relative error of root mean square ε/√12 (ε, ``epsilon``, is the spacing of numbers at 1;
    errors are even over half of it, on average over a binade a little less), independently of one another. So the lost ones move by
    2 Σ_i σ_i² F_ij² · ε²/12 in the mean square.
    """
    rows, columns = source.weight.shape
    if rows != columns:
        return f"its projections make {columns} floats of {rows}, and only as many floats of as many can be undone"
    for made, projection in ((kept, source), ("values" if kept == "keys" else "keys", target)):
        if not bool(torch.isfinite(projection.variances).all()):
            return f"the projection of {made} holds numbers that are not finite"
    inverse, failed = torch.linalg.inv_ex(source.weight)
    condition = math.inf if bool(failed) else _norm(source.weight) * _norm(inverse)
    if not condition * torch.finfo(torch.float64).eps * rows < 1:
        return f"the projection of {kept}, which would be kept, has no inverse"
    matrix = inverse @ target.weight
    moved = 2 * (source.variances[:, None] * matrix.square()).sum()
    return Fold(
        kept=kept,
        matrix=matrix,
        offset=target.bias - source.bias @ matrix,
        condition=condition,
        error=_share(moved, target.variances.sum()) * epsilon / 12**0.5,
    )


def _norm(matrix: Tensor) -> float:
    """The greatest singular value, to a part in a hundred, in a thousandth of the work of all: a block of vectors turns towards those that grow most."""
    block = torch.randn(len(matrix), BLOCK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = block.to(matrix.device)
    for _ in range(ITERATIONS):
        block = torch.linalg.qr(matrix.T @ (matrix @ block)).Q
    return float(torch.linalg.matrix_norm(matrix @ block, ord=2))


def measured_error(
    found: Fold, source: Projection, target: Projection, dtype: torch.dtype, *, samples: int = 256
) -> float:
    """What rounding the kept ones and the map to ``dtype`` does, measured on drawn inputs of unit variance: the error of the lost ones over their size."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, source.weight.shape[0], dtype=torch.float64, generator=draw).to(source.weight.device)
    kept = (inputs @ source.weight + source.bias).to(dtype).double()
    lost = inputs @ target.weight + target.bias
    matrix, offset = found.matrix.to(dtype).double(), found.offset.to(dtype).double()
    return _share((kept @ matrix + offset - lost).square().mean(), lost.square().mean())


def _share(moved: Tensor, whole: Tensor) -> float:
    """Of two mean squares, as a ratio of roots; where nothing moves there need be nothing that could, and what is no number is beyond any bound."""
    ratio = float((moved / whole).sqrt()) if bool(moved) else 0.0
    return math.inf if math.isnan(ratio) else ratio
