"""Bases: eigenvectors, the Hadamard mix that equalises their variances, and the joint query/key eigenbasis."""

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    """Sylvester's Hadamard matrix, normalised to be orthonormal: float64 [order, order], order a power of two."""
    if order < 1 or order & (order - 1):
        raise ValueError(f"a Hadamard matrix of order {order} is not available; the order must be a power of two")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h / order**0.5


def bit_reversal(order: int) -> list[int]:
    """Every index with its log2(order) bits reversed."""
    bits = order.bit_length() - 1
    return [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(order)]


def bit_reversed_order(eigenvalues: Tensor) -> Tensor:
    """The column order of P_br: perm[bit_reversal[i]] = the index of the i-th largest of `eigenvalues` [D]."""
    order = torch.argsort(eigenvalues, descending=True, stable=True)
    perm = torch.empty_like(order)
    perm[torch.tensor(bit_reversal(len(order)))] = order
    return perm


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip eigenvector columns [..., D, D] so that each one's largest entry is positive: the same on every machine."""
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0)


def oscar_rotation(covariance: Tensor) -> Tensor:
    """E . H . P_br of a symmetric [..., D, D]: orthonormal, rows times it have equal variance in every channel (float64)."""
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    order = covariance.shape[-1]
    mixed = fix_signs(vectors) @ hadamard(order)
    pairs = zip(mixed.reshape(-1, order, order), eigenvalues.reshape(-1, order), strict=True)
    flat = [rotation[:, bit_reversed_order(values)] for rotation, values in pairs]
    return torch.stack(flat).view_as(mixed)


def joint_basis(query_second: Tensor, key_covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A, A^-T, variances): y = (k - mu) A has a diagonal covariance, and equal errors in y cost equal logit error.

    query_second, key_covariance: [..., D, D]. With C_Q + ridge * mean eigenvalue = L L^T and U the eigenvectors of
    L^T Sigma_K L: A = L U. Variances [..., D] fall. float64.
    """
    values, vectors = torch.linalg.eigh((query_second + query_second.mT) / 2)
    values = values.clamp(min=0)
    root = (values + ridge * values.mean(-1, keepdim=True)).sqrt()
    left = vectors * root.unsqueeze(-2)
    inner = left.mT @ key_covariance @ left
    variances, directions = torch.linalg.eigh((inner + inner.mT) / 2)
    variances, directions = variances.flip(-1), directions.flip(-1)
    basis = left @ directions
    inverse_transpose = (vectors / root.unsqueeze(-2)) @ directions
    flip = torch.where(basis.gather(-2, basis.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
    return basis * flip, inverse_transpose * flip, variances.clamp(min=0)
