"""Files of measurements in docs/data: where, when and with what each was taken."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import gdr

PACKAGES = {"numpy": ["numpy", "scipy"], "numba": ["numpy", "numba"], "cuda": ["cupy-cuda12x", "cupy-cuda13x"]}


def provenance(backend: str) -> dict[str, Any]:
    """The head of a data file: the backend, its device, the date, versions and the command."""
    versions = {"gdr": gdr.__version__, "python": platform.python_version()}
    for name in PACKAGES[backend]:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = platform.machine()
    if backend == "cuda":
        import cupy

        runtime = cupy.cuda.runtime
        device = runtime.getDeviceProperties(0)["name"].decode()
        driver = runtime.driverGetVersion()
        versions["cuda of the driver"] = f"{driver // 1000}.{driver % 1000 // 10}"
    command = " ".join(["python", f"docs/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {
        "backend": backend,
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "command": command,
    }


def write(name: str, data: dict[str, Any]) -> None:
    """Write a data file."""
    path = Path(__file__).resolve().parent / "data" / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(path)
