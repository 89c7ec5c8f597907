"""The measures of geometry against closed forms, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from twofold.geometry import measures
from twofold.geometry.points import Projection3

FEW = settings(max_examples=25)
seeds = st.integers(0, 10_000)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(normal(seed, size, size)).Q


# Cosines


@FEW
@given(seeds, st.floats(0.01, 100))
def test_cosines_are_those_of_the_entries_and_know_no_scale(seed, factor):
    a, b = normal(seed, 4, 6), normal(seed + 1, 4, 6)
    p, q = a.flatten().numpy(), b.flatten().numpy()
    by_hand = np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q)
    assert measures.cosine(a, factor * b) == pytest.approx(by_hand)
    assert measures.cosine(a, -a) == pytest.approx(-1)
    rows = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert measures.mean_cosine(a, factor * b) == pytest.approx(np.mean(rows))


def test_the_cosine_of_two_matrices_is_not_that_of_their_rows():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 10.0]]), torch.tensor([[1.0, 0.0], [0.0, -10.0]])
    assert measures.mean_cosine(a, b) == pytest.approx(0)
    assert measures.cosine(a, b) == pytest.approx((1 - 100) / 101)


def test_nothing_has_no_direction():
    zero = torch.zeros(3, 4)
    for value in (measures.cosine(zero, zero), measures.mean_cosine(zero, zero), measures.linear_cka(zero, zero),
                  measures.effective_rank(zero), measures.symmetry(torch.zeros(3, 3)), measures.symmetry_of_product(zero, zero)):  # fmt: skip
        assert value == 0


# CKA


@FEW
@given(seeds, st.floats(0.01, 100), st.floats(-50, 50))
def test_cka_knows_neither_rotation_nor_scale_nor_place(seed, factor, shift):
    x, y = normal(seed, 12, 5), normal(seed + 1, 12, 3)
    value = measures.linear_cka(x, y)
    assert 0 <= value <= 1
    assert measures.linear_cka(factor * x @ rotation(seed + 2, 5) + shift, y) == pytest.approx(value, abs=1e-6)
    assert measures.linear_cka(y, x) == pytest.approx(value)
    assert measures.linear_cka(x, x @ rotation(seed + 3, 5)) == pytest.approx(1)


def test_cka_of_orthogonal_signals_is_0_and_knows_stretching():
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert measures.linear_cka(x, y) == 0
    both = torch.cat([x, y], dim=1)
    # Two orthogonal signals of sizes 1 and 1, against the same with sizes 1 and s: (1 + s²) / √(2 (1 + s⁴)).
    assert measures.linear_cka(both, torch.cat([x, 3 * y], dim=1)) == pytest.approx(10 / math.sqrt(2 * 82))


# Effective rank


@FEW
@given(st.integers(1, 9), st.floats(0.01, 100), seeds)
def test_the_effective_rank_of_n_equal_singular_values_is_n(n, factor, seed):
    assert measures.effective_rank(factor * torch.eye(n)) == pytest.approx(n)
    assert measures.effective_rank(factor * rotation(seed, n)) == pytest.approx(n)
    left = torch.linalg.qr(normal(seed, 12, n)).Q
    assert measures.effective_rank(left @ rotation(seed + 1, n)) == pytest.approx(n)


@FEW
@given(seeds)
def test_the_effective_rank_is_the_exponential_of_an_entropy(seed):
    matrix = normal(seed, 5, 7)
    sizes = np.linalg.svd(matrix.numpy(), compute_uv=False)
    shares = sizes / sizes.sum()
    assert measures.effective_rank(matrix) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert 1 <= measures.effective_rank(matrix) <= 5
    assert measures.effective_rank(rotation(seed, 5) @ matrix) == pytest.approx(measures.effective_rank(matrix))
    assert measures.effective_rank(torch.outer(matrix[0], matrix[1])) == pytest.approx(1, abs=1e-6)


# Principal angles


@FEW
@given(seeds)
def test_equal_spaces_have_no_angle_between_them_whatever_their_basis(seed):
    a = normal(seed, 4, 9)
    other = normal(seed + 1, 4, 4)
    assume(float(torch.linalg.cond(other)) < 1e4)
    assert measures.principal_angles(a, other @ a).max() < 1e-6
    assert measures.overlap(a, other @ a) == pytest.approx(1)
    b = normal(seed + 2, 3, 9)
    assert measures.overlap(other @ a, b) == pytest.approx(measures.overlap(a, b), abs=1e-6)
    turned = rotation(seed + 3, 9)
    assert measures.principal_angles(a @ turned, b @ turned) == pytest.approx(measures.principal_angles(a, b), abs=1e-6)


@FEW
@given(st.floats(0.0, math.pi / 2))
def test_the_angle_between_two_planes_is_the_one_they_were_turned_by(angle):
    plane = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], dtype=torch.float64)
    other = torch.tensor([[math.cos(angle), 0, math.sin(angle), 0], [0, 1, 0, 0]], dtype=torch.float64)
    assert measures.principal_angles(plane, other).tolist() == pytest.approx([0, angle], abs=1e-7)
    assert measures.overlap(plane, other) == pytest.approx((1 + math.cos(angle) ** 2) / 2)


def test_random_spaces_overlap_by_their_share_of_all_dimensions():
    found = [measures.overlap(normal(seed, 8, 32), normal(seed + 500, 8, 32)) for seed in range(60)]
    assert np.mean(found) == pytest.approx(8 / 32, abs=0.01)


# Symmetry


@FEW
@given(seeds)
def test_a_symmetric_matrix_is_all_symmetric_and_an_antisymmetric_one_not_at_all(seed):
    m = normal(seed, 5, 5)
    assert measures.symmetry(m + m.T) == pytest.approx(1)
    assert measures.symmetry(m - m.T) == pytest.approx(0, abs=1e-9)
    a, b = normal(seed + 1, 3, 8), normal(seed + 2, 3, 8)
    assert measures.symmetry_of_product(a, b) == pytest.approx(measures.symmetry(a.T @ b))
    assert measures.symmetry_of_product(a, a) == pytest.approx(1)
    basis = normal(seed + 3, 3, 3)
    assume(float(torch.linalg.cond(basis)) < 1e4)
    # Queries and keys in another basis are the same logits.
    assert measures.symmetry_of_product(basis @ a, torch.linalg.inv(basis).T @ b) == pytest.approx(
        measures.symmetry_of_product(a, b)
    )


def test_a_random_matrix_is_half_symmetric():
    found = [measures.symmetry(normal(seed, 40, 40)) for seed in range(20)]
    assert np.mean(found) == pytest.approx(math.sqrt(0.5), abs=0.02)


# Entropy


def test_entropy_is_1_where_all_keys_are_alike_and_0_where_one_is_looked_at():
    visible = torch.arange(1, 6)
    even = torch.ones(5, 5).tril() / visible[:, None]
    assert measures.relative_entropy(torch.stack([even, torch.eye(5)]), visible).tolist() == pytest.approx([1, 0])
    half = torch.zeros(1, 4)
    half[0, :2] = 0.5
    assert float(measures.relative_entropy(half, torch.tensor([4]))) == pytest.approx(0.5)
    assert math.isnan(measures.relative_entropy(torch.ones(1, 1), torch.tensor([1])))


# Axes


@FEW
@given(seeds)
def test_axes_are_those_of_greatest_variance_and_keep_means_of_points(seed):
    points = normal(seed, 20, 6) * torch.tensor([5.0, 3.0, 2.0, 0.5, 0.3, 0.1]) @ rotation(seed + 1, 6) + 7
    project = Projection3.fit(points)
    assert project.basis.T @ project.basis == pytest.approx(torch.eye(3).numpy(), abs=1e-9)
    variances = torch.linalg.eigvalsh(torch.cov(points.T)).flip(0)
    assert project.held(points) == pytest.approx((variances[:3] / variances.sum()).tolist())
    weights = torch.softmax(normal(seed + 2, 20), dim=0)
    assert project(weights @ points) == pytest.approx((weights @ project(points)).numpy())
    again = Projection3.fit(points.flip(0))
    assert again.basis == pytest.approx(project.basis.numpy(), abs=1e-6)


def test_a_line_has_one_axis():
    project = Projection3.fit(torch.outer(torch.arange(5.0, dtype=torch.float64), torch.tensor([3.0, 4.0]).double()))
    assert project.held(torch.outer(torch.arange(5.0).double(), torch.tensor([3.0, 4.0]).double())) == pytest.approx(
        [1, 0, 0]
    )
    assert project.basis[:, 0].tolist() == pytest.approx([0.6, 0.8])
