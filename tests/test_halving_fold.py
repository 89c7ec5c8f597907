"""Values from keys in float64: what the iteration says of a projection is what all of its singular values say."""

from __future__ import annotations

import pytest
import torch

from twofold.existing.fold import Fold, Projection, fold


def drawn(spectrum: torch.Tensor, seed: int = 0) -> Projection:
    """A projection that has these singular values."""
    draw = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q for _ in range(2))
    return Projection(left * spectrum @ right, torch.randn(size, dtype=torch.float64, generator=draw))


SPECTRA = {
    "one": torch.tensor([3.0]),
    "as of random numbers": torch.linspace(2.0, 0.01, 50),
    "far apart": torch.logspace(2, -6, 40),
    "alike but for one": torch.tensor([1.0] * 30 + [1e-5]),
    "two clusters": torch.cat((torch.linspace(1.0, 0.98, 20), torch.linspace(1.1e-3, 1e-3, 20))),
    "all alike": torch.ones(17),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_condition_is_that_of_all_singular_values(name: str):
    source, target = drawn(SPECTRA[name].double()), drawn(torch.ones(len(SPECTRA[name]), dtype=torch.float64), 1)
    found = fold("keys", source, target, 1e-7)
    assert isinstance(found, Fold)
    values = torch.linalg.svdvals(source.weight)
    assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=0.01)
    inputs = torch.randn(9, len(values), dtype=torch.float64)
    made = (inputs @ source.weight + source.bias) @ found.matrix + found.offset
    torch.testing.assert_close(made, inputs @ target.weight + target.bias, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("how", ["zero", "two rows alike", "rank", "smallest"])
def test_what_has_no_inverse(how: str):
    weight = drawn(torch.linspace(2.0, 0.1, 40, dtype=torch.float64)).weight
    if how == "zero":
        weight = torch.zeros_like(weight)
    elif how == "two rows alike":
        weight[3] = weight[17]
    elif how == "rank":
        weight = weight[:, :30] @ weight[:30]
    else:
        weight = drawn(torch.tensor([1.0] * 39 + [1e-16], dtype=torch.float64)).weight
    source = Projection(weight, torch.zeros(40, dtype=torch.float64))
    said = fold("keys", source, drawn(torch.ones(40, dtype=torch.float64)), 1e-7)
    assert said == "the projection of keys, which would be kept, has no inverse"
