"""The file of a saved state pool: a NumPy .npz archive with a JSON header, written whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from gdr import _arrays

FORMAT = "gdr.DeltaRuleState"
VERSION = 1


def save(path: Path, parameters: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write to a temporary file beside `path`, then rename it: a reader never sees half a file."""
    header = {"format": FORMAT, "version": VERSION, "parameters": parameters}
    stored = dict(arrays, states=_bits(arrays["states"]), header=np.array(json.dumps(header)))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **stored)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters and arrays of a saved pool.

    Raises
    ------
    ValueError
        `path` is no state file, of another version, truncated or damaged.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}  # reading checks each member's CRC
            header = json.loads(str(arrays.pop("header")))
            if header["format"] != FORMAT:
                raise KeyError("format")
            version, parameters = header["version"], header["parameters"]
            dtype = _arrays.numpy_dtype(parameters["dtype"])
            states = arrays["states"]
            arrays["states"] = states.view(dtype) if states.dtype != dtype else states
            arrays["slots"]
        except Exception as error:  # damaged archives fail in many ways, down to codecs that do not exist
            raise ValueError(f"{path}: not a state file of gdr, or a damaged one ({error})") from None
    if version != VERSION:
        raise ValueError(f"{path}: expected a state file of version {VERSION}, got version {version}")
    return parameters, arrays


def _bits(states: np.ndarray) -> np.ndarray:
    """`states`, with bfloat16, which .npz does not know, as its bits."""
    return states.view(np.uint16) if states.dtype.name == "bfloat16" else states
