"""What the integrations ask of torch tensors."""

from __future__ import annotations

from typing import Any

import torch


def refuse_grad(**tensors: Any) -> None:
    """Refuse tensors through which torch would have to differentiate."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor) and x.requires_grad:
                raise TypeError(
                    f"{name}: requires grad, and gdr has no backward pass; call under torch.no_grad(), or detach it"
                )


def with_unit_rows(x: Any) -> Any:
    """`x`, or a copy where the kernels could not read it: on a CUDA device the last axis must have stride 1."""
    return x.contiguous() if x.is_cuda and x.shape[-1] > 1 and x.stride(-1) != 1 else x
