"""Points of a head in three dimensions: one projection for queries, keys, values and all that happens to them.

The projection is affine, x -> (x - m) B, so it keeps what convex combinations are: the projection of an output lies in the convex hull of the
projected values that it is made of, as the output itself lies in theirs. The reverse does not hold, and distances shrink: three axes hold
only a part of the variance, which is said beside the picture.

Source: Pearson 1901 (principal components); Barber, Dobkin and Huhdanpaa 1996 (Quickhull) for hulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from twofold.geometry.capture import Layer, Shown

AXES = 3
ALL, VALUES = "all", "values"
"""What the axes are fitted to: a cloud that is small beside the others is a dot along the axes of all."""
GRID = 2000
"""Coordinates are whole numbers from -GRID to GRID."""
WEIGHT_UNITS = 1000
LATER_KEYS = 8
"""Of the weights after the first step, as many are kept as are largest."""


@dataclass(frozen=True, kw_only=True)
class Projection3:
    """``mean`` [D] and ``basis`` [D, 3]; the columns are orthonormal, or 0 where the points have fewer dimensions."""

    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, points: Tensor) -> Projection3:
        """The three principal axes of the points [N, D]."""
        mean = points.mean(dim=0)
        _, sizes, axes = torch.linalg.svd(points - mean, full_matrices=False)
        kept = [axes[i] * (float(sizes[i]) > 1e-9 * max(1e-30, float(sizes[0]))) for i in range(min(AXES, len(axes)))]
        kept += [torch.zeros_like(mean)] * (AXES - len(kept))
        # An axis has no sign of its own: let its largest entry be positive, so that the same model gives the same picture.
        return cls(mean=mean, basis=torch.stack([_signed(axis) for axis in kept], dim=1))

    def __call__(self, points: Tensor) -> Tensor:
        """[..., D] -> [..., 3]."""
        return (points - self.mean) @ self.basis

    def held(self, points: Tensor) -> list[float]:
        """The share of the points' variance around their own mean that each axis holds."""
        total = float((points - points.mean(dim=0)).square().sum())
        along = (points @ self.basis - (points @ self.basis).mean(dim=0)).square().sum(dim=0)
        return [float(part) / total if total else 0.0 for part in along]


@dataclass(frozen=True, kw_only=True)
class View:
    """A head along three axes: ``clouds`` by name, [S, 3] each, and ``states`` [S, n + 1, 3].

    ``hulls`` are triangles of value indices, and ``hull_of`` says which of them each query's output must lie in (-1: it sees fewer than
    four values, or they lie in a plane). ``held`` is the variance that each axis holds, of all points and of each cloud.
    """

    clouds: Mapping[str, Tensor]
    states: Tensor
    hulls: tuple[tuple[tuple[int, ...], ...], ...]
    hull_of: tuple[int, ...]
    held: Mapping[str, list[float]]

    def frame(self) -> tuple[Tensor, float]:
        """The middle of the points and states, and how far the farthest is from it; at least a little."""
        everything = torch.cat([*self.clouds.values(), self.states.flatten(0, 1)])
        middle = (everything.amax(dim=0) + everything.amin(dim=0)) / 2
        return middle, float((everything - middle).norm(dim=1).max()) or 1.0

    def packed(self) -> dict[str, Any]:
        """Coordinates on a grid, from the middle of the picture."""
        middle, size = self.frame()
        return {
            "clouds": {name: _grid((points - middle) / size) for name, points in self.clouds.items()},
            "states": _grid((self.states - middle) / size),
            "hulls": [[index for face in hull for index in face] for hull in self.hulls],
            "hullOf": list(self.hull_of),
            "held": {name: [round(share, 3) for share in shares] for name, shares in self.held.items()},
        }


@dataclass(frozen=True, kw_only=True)
class HeadPoints:
    """What the page draws of one head: along the axes of all its points, and along those of its values; ``weights`` [n, S, S]."""

    views: Mapping[str, View]
    weights: Tensor

    def packed(self) -> dict[str, Any]:
        """Whole numbers: coordinates on a grid, weights in thousandths, of later steps the largest ones, keys and weights by turns."""
        steps, tokens = self.weights.shape[0], self.weights.shape[1]
        return {
            "map": [_units(self.weights[0, t, : t + 1]) for t in range(tokens)],
            "later": [[_largest(self.weights[n, t]) for t in range(tokens)] for n in range(1, steps)],
            "views": {name: view.packed() for name, view in self.views.items()},
        }


def head_points(layer: Layer, head: int) -> HeadPoints:
    """One query head of a layer with its KV head."""
    shown, g = layer.shown, head // layer.group
    parts = {"Q": shown.query[head], "K": shown.key[g], "V": shown.value[g]}
    clouds = {"=".join(group): parts[group[0]].cpu() for group in layer.clouds}
    fitted = {ALL: torch.cat(list(clouds.values())), VALUES: parts["V"].cpu()}
    views = {name: _view(Projection3.fit(points), clouds, shown, head) for name, points in fitted.items()}
    return HeadPoints(views=views, weights=shown.weights[:, head].cpu())


def _view(projection: Projection3, clouds: Mapping[str, Tensor], shown: Shown, head: int) -> View:
    projected = {name: projection(points) for name, points in clouds.items()}
    values = next(points for name, points in projected.items() if "V" in name)
    hulls, hull_of = _hulls(values.numpy(), shown, head)
    everything = torch.cat(list(clouds.values()))
    return View(
        clouds=projected,
        states=projection(shown.states[head].cpu()),
        hulls=hulls,
        hull_of=hull_of,
        held={"all": projection.held(everything)} | {name: projection.held(points) for name, points in clouds.items()},
    )


def _hulls(
    values: NDArray[np.float64], shown: Shown, head: int
) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], tuple[int, ...]]:
    """The hull of the values that each query sees; most queries share one with the query before."""
    weights = shown.weights[0, head].cpu()
    known: dict[tuple[tuple[int, ...], ...], int] = {}
    hull_of = []
    for row in weights:
        seen = row.nonzero()[:, 0].numpy()
        faces = _faces(values, seen)
        hull_of.append(known.setdefault(faces, len(known)) if faces else -1)
    return tuple(known), tuple(hull_of)


def _faces(values: NDArray[np.float64], seen: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    if len(seen) <= AXES:
        return ()
    try:
        simplices = ConvexHull(values[seen]).simplices
    except QhullError:  # they lie in a plane
        return ()
    return tuple(sorted(tuple(sorted(int(index) for index in seen[face])) for face in simplices))


def _grid(points: Tensor) -> list[int]:
    return [round(value) for value in (points * GRID).flatten().tolist()]


def _units(weights: Tensor) -> list[int]:
    return [round(value) for value in (weights * WEIGHT_UNITS).tolist()]


def _largest(weights: Tensor) -> list[int]:
    top = weights.topk(min(LATER_KEYS, len(weights)))
    pairs = zip(top.indices.tolist(), _units(top.values), strict=True)
    return [number for index, weight in pairs if weight for number in (index, weight)]


def _signed(axis: Tensor) -> Tensor:
    largest = axis[int(axis.abs().argmax())]
    return -axis if float(largest) < 0 else axis
