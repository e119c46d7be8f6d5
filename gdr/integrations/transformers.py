"""transformers: the linear-attention layers of Qwen3-Next and Qwen3.5 models on gdr, for inference.

Prefill and decode of a patched model run on gdr, on the host and on CUDA devices, with the model's own cache::

    from gdr.integrations.transformers import patched

    with patched(model), torch.no_grad():
        model.generate(**inputs)

Only the given model changes: its layers get functions of their own, and the classes and modules of transformers stay
as they are.  A patched model has no gradients, and torch.compile leaves its linear-attention layers as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import transformers

from gdr import _backends, _inputs
from gdr._spec import GIVEN_GATES, TOKENS, Form
from gdr.chunk import chunk_gated_delta_rule
from gdr.fused_recurrent import fused_recurrent_gated_delta_rule
from gdr.integrations._torch import refuse_grad, with_unit_rows

FIRST_VERSION, LAST_VERSION = (4, 57), (5, 24)
LAYERS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")

__all__ = ["FIRST_VERSION", "LAST_VERSION", "LAYERS", "patch", "patched", "unpatch"]

# What a layer's forward calls: attributes of the layer up to transformers 5.9 or so, globals of its module after.
_ATTRIBUTES = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule")
_GLOBALS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")

_UNDO = "_gdr_replaced"
_UPDATE = Form("fused_recurrent", (*TOKENS, *GIVEN_GATES), {"q": "query", "k": "key", "v": "value"})


def patch(model: Any) -> Any:
    """Make the linear-attention layers of a model run on gdr.

    Parameters
    ----------
    model : torch.nn.Module
        A Qwen3-Next or Qwen3.5 model of transformers, or any module that holds one.  Layers that are patched already
        are left alone.

    Returns
    -------
    model : torch.nn.Module
        The same model.

    Raises
    ------
    ImportError
        A version of transformers that is not known; it is named.
    ValueError
        The model has no layer that gdr can run.

    Notes
    -----
    Tested with transformers 4.57 to 5.24.  Calls that need gradients, and packed sequences (`cu_seq_lens_q`), which
    the model's own convolution cannot keep apart, are refused when the model runs.
    """
    _check_version(transformers.__version__)
    found = [(layer, _replacements(layer)) for layer in _layers(model) if _UNDO not in vars(layer)]
    for layer, new in found:
        vars(layer)[_UNDO] = {name: vars(layer).get(name) for name in new}
        vars(layer).update(new)
    return model


def unpatch(model: Any) -> Any:
    """Undo `patch`: layers of the model that are not patched are left alone.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    model : torch.nn.Module
        The same model.
    """
    for layer in _layers(model):
        _restore(layer)
    return model


@contextmanager
def patched(model: Any) -> Iterator[Any]:
    """Context in which the linear-attention layers of a model run on gdr; see `patch`.

    Parameters
    ----------
    model : torch.nn.Module
        Layers that are patched already stay so.

    Yields
    ------
    model : torch.nn.Module
        The same model.
    """
    before = [layer for layer in _layers(model) if _UNDO in vars(layer)]
    try:
        yield patch(model)
    finally:
        for layer in _layers(model):
            if layer not in before:
                _restore(layer)


def _check_version(version: str) -> None:
    major, minor = (int(part) for part in version.split(".")[:2])
    if not FIRST_VERSION <= (major, minor) <= LAST_VERSION:
        first, last = (".".join(map(str, v)) for v in (FIRST_VERSION, LAST_VERSION))
        raise ImportError(f"transformers {version}: this version of gdr knows transformers {first} to {last}")


def _layers(model: Any) -> list[Any]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [layer for layer in model.modules() if type(layer).__name__ in LAYERS]
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no layer of {', '.join(LAYERS)}")
    return found


def _replacements(layer: Any) -> dict[str, Any]:
    """The attributes that make a layer run on gdr."""
    # Accelerate wraps a layer's forward in one that moves arguments, and keeps the layer's own as _old_forward.
    slot = "_old_forward" if "_old_forward" in vars(layer) else "forward"
    forward = getattr(getattr(layer, slot), "__func__", None)
    names = _names_used(forward) if isinstance(forward, FunctionType) else set()
    # Where the cache copies new states over the old ones, the old ones can be updated in place.
    recurrent = _update if "update_recurrent_state" in names else _recurrent
    # The compiler can look into none of them, and would take a copied function's globals from its module.
    if names.issuperset(_ATTRIBUTES):
        return dict(zip(_ATTRIBUTES, map(torch.compiler.disable, (_chunk, recurrent)), strict=True))
    if isinstance(forward, FunctionType) and names.issuperset(_GLOBALS):
        copied = _with_globals(forward, dict(zip(_GLOBALS, (_chunk, recurrent), strict=True)))
        return {slot: MethodType(torch.compiler.disable(copied), layer)}
    raise ValueError(
        f"model: {type(layer).__name__}.forward is not the one of transformers, which calls "
        f"{' and '.join(_ATTRIBUTES)} or {' and '.join(_GLOBALS)}"
    )


def _restore(layer: Any) -> None:
    for name, value in vars(layer).pop(_UNDO, {}).items():
        if value is None:
            del vars(layer)[name]
        else:
            vars(layer)[name] = value


def _wrapped(function: FunctionType) -> Iterator[FunctionType]:
    """The functions that a decorated one holds."""
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, FunctionType):
            yield cell.cell_contents


def _names_used(function: FunctionType) -> set[str]:
    return set(function.__code__.co_names).union(*map(_names_used, _wrapped(function)))


def _with_globals(function: FunctionType, new: dict[str, Any]) -> FunctionType:
    """A copy of a function, and of those that it decorates, with other values for some of its globals."""
    cells = tuple(
        CellType(_with_globals(cell.cell_contents, new)) if isinstance(cell.cell_contents, FunctionType) else cell
        for cell in function.__closure__ or ()
    )
    values = {**function.__globals__, **new}
    copy = FunctionType(function.__code__, values, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    return copy


def _checked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, packed: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    refuse_grad(query=query, key=key, value=value, g=g, beta=beta)
    if packed is not None:
        raise ValueError("cu_seq_lens_q: packed sequences are refused, the model's convolution would mix them")
    # The convolution of a prefill leaves its channels apart.
    return with_unit_rows(query), with_unit_rows(key), with_unit_rows(value), g, beta


# The functions that a layer calls.  The last parameter takes the keywords of the model's forward, which transformers
# hands on to whatever a layer calls; none of them is about the rule.


def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    operands = _checked(query, key, value, g, beta, cu_seqlens)
    short = query.shape[1] < _backends.CHUNK_FROM["cuda" if query.is_cuda else "cpu"]
    rule: Callable[..., Any] = fused_recurrent_gated_delta_rule if short else chunk_gated_delta_rule
    return rule(
        *operands,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )


def _recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return fused_recurrent_gated_delta_rule(
        *_checked(query, key, value, g, beta, cu_seqlens),
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )


def _update(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    output_final_state: bool = True,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_recurrent`, but the state that comes back is `initial_state` itself: the cache need not copy it."""
    q, k, v, g, beta = _checked(query, key, value, g, beta, cu_seqlens)
    states = initial_state, None, initial_state, None
    operands = q, k, v, None, None, None, None, None, g, beta, *states, None
    call = _inputs.prepare(_UPDATE, operands, l2norm=use_qk_l2norm_in_kernel)
    _backends.run(call)
    return call.library.release(call.out), initial_state
