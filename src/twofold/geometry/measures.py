"""How alike queries, keys and values are: pure functions of matrices, each with its formula.

Everything is computed in float64. Rows of x and y are tokens ([T, D] and [T, E]), rows of a and b are dimensions of a head ([D, C] and
[E, C], C being the width of the model); W_Q, W_K and W_V are such matrices, and a token's key is W_K x.

None of these numbers means much by itself. A head may be given another basis without changing what it computes: W_Q and W_K
with A and A⁻ᵀ, W_V and W_O likewise. Cosines change with it, CKA does not where A is a rotation, principal angles never do.
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import subspace_angles
from torch import Tensor

__all__ = [
    "cosine",
    "effective_rank",
    "linear_cka",
    "mean_cosine",
    "overlap",
    "principal_angles",
    "relative_entropy",
    "symmetry",
    "symmetry_of_product",
]


def cosine(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ / (‖a‖ ‖b‖) of two matrices of one shape, in Frobenius' product and norm; 0 where one of them is zero.

    >>> cosine(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]])) == math.sqrt(0.8)
    True
    """
    a, b = a.double(), b.double()
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else 0.0


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """The mean over tokens of ⟨x_t, y_t⟩ / (‖x_t‖ ‖y_t‖), both [T, D]; 0 for a token that has no length."""
    return float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """‖yᵀx‖² / (‖xᵀx‖ ‖yᵀy‖) with the mean over tokens taken off both, from 0 to 1; 0 where one of them is constant.

    It does not change when x or y is turned, scaled or moved. With few tokens for its dimensions it is large for unrelated x and y too.
    Source: Kornblith et al. 2019 (1905.00414), section 3.
    """
    x, y = (z.double() - z.double().mean(dim=0) for z in (x, y))
    size = float((x.T @ x).norm() * (y.T @ y).norm())
    return float((y.T @ x).square().sum()) / size if size else 0.0


def effective_rank(matrix: Tensor) -> float:
    """exp(-Σ p ln p), p being the singular values over their sum: n for a matrix with n equal ones and no others; 0 for zero.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = torch.linalg.svdvals(matrix.double())
    if not float(values.sum()):
        return 0.0
    return math.exp(float(torch.special.entr(values / values.sum()).sum()))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The angles, in radians from 0 to π/2 and ascending, between the spaces that the rows of a and of b span: [min(rank a, rank b)].

    Source: Björck and Golub 1973, "Numerical methods for computing angles between linear subspaces"; computed as Knyazev and Argentati
    (2002) do, by which small angles are as sure as large ones.
    """
    angles = subspace_angles(a.double().T.numpy(force=True), b.double().T.numpy(force=True))
    return torch.from_numpy(angles.copy()).flip(0)


def overlap(a: Tensor, b: Tensor) -> float:
    """The mean of cos² over the principal angles between the row spaces: 1 for one space, 0 for orthogonal ones.

    For two random spaces of D dimensions among C its mean is D / C.
    """
    return float(principal_angles(a, b).cos().square().mean())


def symmetry(matrix: Tensor) -> float:
    """‖(m + mᵀ) / 2‖ / ‖m‖ of a square matrix: 1 where it is symmetric, 0 where it is antisymmetric, near √½ where it is random."""
    m = matrix.double()
    size = float(m.norm())
    return float(((m + m.T) / 2).norm()) / size if size else 0.0


def symmetry_of_product(a: Tensor, b: Tensor) -> float:
    """:func:`symmetry` of aᵀb, [C, C], of matrices [D, C], without making it.

    ‖aᵀb‖² = ⟨aaᵀ, bbᵀ⟩ and ⟨aᵀb, bᵀa⟩ = tr((baᵀ)²), so ‖(aᵀb + bᵀa) / 2‖² is half of their sum.
    """
    a, b = a.double(), b.double()
    size = float(((a @ a.T) * (b @ b.T)).sum())
    crossed = b @ a.T
    return math.sqrt(max(0.0, (size + float((crossed * crossed.T).sum())) / 2 / size)) if size else 0.0


def relative_entropy(weights: Tensor, visible: Tensor) -> Tensor:
    """-Σ w ln w / ln n over the keys that a query sees, mean over those queries that see n ≥ 2: [...] for weights [..., T, S].

    1 where every query spreads evenly over the ``visible`` [T] keys that it may see, 0 where each looks at one. NaN where none sees two.
    """
    entropy = torch.special.entr(weights.double()).sum(dim=-1)
    choosing = visible >= 2
    return (entropy[..., choosing] / visible[choosing].double().log()).mean(dim=-1)
