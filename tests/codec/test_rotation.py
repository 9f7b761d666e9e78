"""Bases: the published rotation, and the joint eigenbasis."""

import pytest
import torch

from oscar_radix.codec.rotation import bit_reversal, bit_reversed_order, hadamard, joint_basis, oscar_rotation


def test_bit_reversal():
    assert bit_reversal(8) == [0, 4, 2, 6, 1, 5, 3, 7]


def test_column_order_of_ascending_eigenvalues():
    assert bit_reversed_order(torch.tensor([1.0, 2, 3, 4])).tolist() == [3, 1, 2, 0]
    assert bit_reversed_order(torch.arange(1.0, 9)).tolist() == [7, 3, 5, 1, 6, 2, 4, 0]


def test_hadamard_of_four():
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * hadamard(4)).round().tolist() == signs
    with pytest.raises(ValueError, match="order 6"):
        hadamard(6)


def test_oscar_rotation_of_a_diagonal_covariance():
    # E is the identity (eigenvalues ascend already), so R is H with its columns in the order [1, 0].
    rotation = oscar_rotation(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    r = 0.5**0.5
    torch.testing.assert_close(rotation, torch.tensor([[r, r], [-r, r]], dtype=torch.float64))


def test_oscar_rotation_is_orthonormal_and_equalises(random_covariance):
    rotation = oscar_rotation(random_covariance)
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(64, dtype=torch.float64).expand(2, 3, 64, 64))
    variances = torch.diagonal(rotation.mT @ random_covariance @ rotation, dim1=-2, dim2=-1)
    torch.testing.assert_close(variances, variances.mean(-1, keepdim=True).expand_as(variances))


def test_joint_basis_by_hand():
    # C_Q = diag(4, 1), Sigma_K = diag(1, 9): L = diag(2, 1), L^T Sigma L = diag(4, 9), so the second channel comes first:
    # y = (k_1, 2 k_0) with variances (9, 4), and a query is q_b = (q_1, q_0 / 2).
    c = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    s = torch.diag(torch.tensor([1.0, 9.0], dtype=torch.float64))
    basis, inverse_transpose, variances = joint_basis(c, s, ridge=0.0)
    assert variances.tolist() == pytest.approx([9, 4])
    torch.testing.assert_close(basis, torch.tensor([[0.0, 2], [1, 0]], dtype=torch.float64))
    torch.testing.assert_close(inverse_transpose, torch.tensor([[0.0, 0.5], [1, 0]], dtype=torch.float64))


def test_joint_basis_whitens_queries_and_decorrelates_keys(random_covariance):
    keys = random_covariance.flip(1)
    basis, inverse_transpose, variances = joint_basis(random_covariance, keys, ridge=0.0)
    torch.testing.assert_close(inverse_transpose.mT @ random_covariance @ inverse_transpose, torch.eye(64).double().expand(2, 3, 64, 64))
    torch.testing.assert_close(basis.mT @ keys @ basis, torch.diag_embed(variances), rtol=1e-6, atol=1e-6)
    assert bool((variances.diff(dim=-1) <= 0).all())
