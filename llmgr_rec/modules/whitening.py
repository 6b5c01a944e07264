"""Whitening of item text encodings: every direction of the encodings' space is to say equally much.

Hidden states of a decoder are anisotropic: a few directions, shared by all texts, hold most of their variance, so a
dot product sees little of what tells items apart. Whitening divides it out; with few items for many directions it would
divide by noise, so the covariance is shrunk first, by as much as its own uncertainty tells.

Shapes: V items, H columns of an encoding.
"""

import torch
from torch import Tensor

# Directions of less variance are taken to have this share of the mean variance.
_LEAST = 1e-6


def whitening_map(covariance_HH: Tensor, fourth_moment: float, count: int) -> Tensor:
    """The symmetric matrix that whitens centred encodings: (x - mean) @ map.

    It is the inverse square root of the covariance shrunk towards a multiple of the identity by the share of Ledoit and
    Wolf (A well-conditioned estimator for large-dimensional covariance matrices, 2004), then scaled so that whitened
    encodings have a root mean square norm of 1. With fewer items than columns little is left but the scaling.

    Args:
        covariance_HH: Covariance of the encodings, float64.
        fourth_moment: Mean fourth power of the centred encodings' norms.
        count: Encodings that both were taken from.

    Returns:
        The map, float64 [H, H]; zeros where the encodings have no variance at all.
    """
    width = covariance_HH.shape[0]
    variance = float(covariance_HH.trace()) / width
    if count < 2 or variance <= 0:
        return torch.zeros_like(covariance_HH)
    identity_HH = torch.eye(width, dtype=covariance_HH.dtype, device=covariance_HH.device)
    spread = float((covariance_HH - variance * identity_HH).square().sum())
    error = (fourth_moment - float(covariance_HH.square().sum())) / count
    share = min(1.0, max(error, 0.0) / spread) if spread > 0 else 1.0
    shrunk_HH = (1 - share) * covariance_HH + share * variance * identity_HH
    values_H, vectors_HH = torch.linalg.eigh(shrunk_HH)
    scales_H = values_H.clamp(min=_LEAST * variance).rsqrt()
    map_HH = (vectors_HH * scales_H) @ vectors_HH.T
    squared_norm = float((map_HH @ covariance_HH @ map_HH).trace())
    return map_HH / squared_norm**0.5


def whiten_encodings(encodings_VH: Tensor) -> Tensor:
    """Whitens the encodings of a catalogue that is held whole: what the pass over files and ranks is tested against.

    Args:
        encodings_VH: Encodings; items without text are zeros and stay zeros.

    Returns:
        Whitened encodings, float32 [V, H].
    """
    has_text_V = encodings_VH.any(dim=1)
    exact_VH = encodings_VH[has_text_V].double()
    if not len(exact_VH):
        return encodings_VH.float()
    centred_VH = exact_VH - exact_VH.mean(dim=0)
    covariance_HH = centred_VH.T @ centred_VH / len(centred_VH)
    fourth_moment = float(centred_VH.square().sum(dim=1).square().mean())
    whitened_VH = torch.zeros_like(encodings_VH, dtype=torch.float32)
    whitened_VH[has_text_V] = (centred_VH @ whitening_map(covariance_HH, fourth_moment, len(exact_VH))).float()
    return whitened_VH
