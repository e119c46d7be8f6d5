"""The command ``gdr``: a demonstration, what there is to know about this installation, and a self-test."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import gdr
from gdr import selftest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gdr", description="The gated delta rule on NumPy and CuPy.")
    parser.add_argument("--version", action="version", version=f"gdr {gdr.__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="predict the next byte of texts, learning while reading",
        description="Read texts with a memory of fast weights that predicts every next byte, and compare the delta "
        "rule with the same memory without error correction and with the most frequent byte.",
    )
    demo.add_argument("files", nargs="*", metavar="FILE", help="texts to read (default: topics of Python's help)")
    demo.add_argument("--bytes", type=_positive, default=4096, metavar="N", help="read at most N bytes a text (4096)")
    demo.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the state lives (cpu)")
    demo.add_argument("--plot", metavar="FILE", help="draw the learning curve into FILE (.png, .svg or .pdf)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, backends and devices, and why CUDA is or is not usable")
    info.set_defaults(run=_info)

    selftest_parser = commands.add_parser(
        "selftest",
        help="check every operation on this machine against the float64 reference",
        description="Check every operation, dtype and layout on this machine against the float64 reference, with "
        "random and adversarial inputs.",
    )
    selftest.add_arguments(selftest_parser)
    selftest_parser.set_defaults(run=selftest.run)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {value}")
    return value


def _demo(args: argparse.Namespace) -> int:
    from gdr import demo

    try:
        texts = demo.read_texts(args.files, args.bytes)
        if args.plot and importlib.util.find_spec("matplotlib") is None:
            raise demo.DemoError('--plot needs matplotlib: pip install "gdr[plot]"')
        total = sum(len(text.data) for text in texts)
        print(
            f"{len(texts)} text{'s' * (len(texts) > 1)}, {total:,} bytes; a memory of {demo.HEADS} heads x "
            f"{demo.KEY_DIM} x {demo.VALUE_DIM} for each, empty at first, on {args.device}:"
        )
        print("  " + ", ".join(text.name for text in texts))
        with _progress(total) as update:
            reading = demo.read(texts, args.device, update)
        print(f"\n{demo.table(reading)}\n")
        print(demo.summary(reading))
        if args.plot:
            demo.plot(reading, args.plot)
            print(f"learning curve: {args.plot}")
    except demo.DemoError as error:
        print(f"gdr demo: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], Any]]:
    """A tqdm bar on a terminal's stderr; nothing elsewhere or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
    else:
        with tqdm(total=total, unit="byte", unit_scale=True, desc="reading", leave=False, disable=None) as bar:
            yield bar.update


def _info(args: argparse.Namespace) -> int:
    from gdr import _backends, _cuda_loader, _threads

    status = _cuda_loader.cuda_status()
    cache = _cuda_loader.cache_info()
    rows: list[tuple[str, Any]] = [
        ("gdr", f"{gdr.__version__}  ({os.path.dirname(os.path.abspath(gdr.__file__))})"),
        ("Python", f"{platform.python_version()}  ({platform.platform()})"),
    ]
    rows += [(name, _version(*distributions)) for name, *distributions in _PACKAGES]
    rows += [
        ("CPU backend", f"{_backends.cpu_backend()}, {_threads.thread_count()} threads"),
        ("CUDA", f"usable: {status.reason}" if status.usable else f"not usable: {status.reason}"),
    ]
    for device in status.devices:
        rows.append(
            (
                f"  device {device.ordinal}",
                f"{device.name}, compute capability {device.capability}, {device.memory / 2**30:.0f} GiB",
            )
        )
    rows += [
        ("CUDA sources", cache["sources"] or "missing"),
        ("kernel cache", f"{cache['cache_dir']}  ({cache['cached_files']} kernels)"),
    ]
    rows += [(name, os.environ[name]) for name in sorted(os.environ) if name.startswith("GDR_")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    return 0


# A name to print and the distributions that may provide it.
_PACKAGES = (
    ("NumPy", "numpy"),
    ("SciPy", "scipy"),
    ("ml_dtypes", "ml_dtypes"),
    ("Numba", "numba"),
    ("CuPy", "cupy-cuda13x", "cupy-cuda12x", "cupy"),
    ("PyTorch", "torch"),
    ("JAX", "jax"),
)


def _version(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "not installed"
