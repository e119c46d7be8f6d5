"""The command ``gdr``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gdr
from gdr import _cuda_loader, cli, demo


def _gdr(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "gdr", *args], capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


def test_version_and_help(capsys):
    done = _gdr("--version")
    assert (done.returncode, done.stdout) == (0, f"gdr {gdr.__version__}\n")
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_demo_reads_files(tmp_path):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_bytes(b"one two three four five six seven " * 30)
    short.write_bytes(b"ab")
    done = _gdr("demo", str(long), str(short), "--bytes", "300", "--plot", str(tmp_path / "curve.svg"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar where there is no terminal
    assert "2 texts, 302 bytes" in done.stdout
    assert "delta rule" in done.stdout
    assert "tokens/s" in done.stdout
    assert (tmp_path / "curve.svg").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("missing.txt", "cannot read"), ("folder", "cannot read"), ("empty.txt", "at least 2")],
)
def test_demo_refuses_in_one_line(tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    done = _gdr("demo", str(tmp_path / name))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gdr demo: ")
    assert says in line
    assert name in line


@pytest.mark.parametrize("limit", ["1", "-3", "many"])
def test_demo_refuses_a_limit_that_leaves_nothing(limit, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--bytes", limit])
    assert stop.value.code == 2
    assert "--bytes" in capsys.readouterr().err


def test_demo_says_why_there_is_no_cuda(capsys, monkeypatch):
    if _cuda_loader.cuda_status().usable:
        pytest.skip("CUDA is usable here")
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "gdr demo: device cuda: " in capsys.readouterr().err


def test_interrupting_the_demo_is_no_traceback(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "read", interrupted)
    assert cli.main(["demo"]) == 130


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("GDR_NUM_THREADS", "1")
    assert cli.main(["info"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert gdr.__version__ in rows["gdr"]
    assert {"Python", "NumPy", "SciPy", "CPU backend", "CUDA", "CUDA sources", "kernel cache"} <= {
        name.strip() for name in rows
    }
    assert "GDR_NUM_THREADS" in rows


def test_info_shows_devices(capsys, monkeypatch):
    device = _cuda_loader.Device(0, "NVIDIA Imaginary", "9.0", 80 * 2**30)
    monkeypatch.setattr(_cuda_loader, "cuda_status", lambda: _cuda_loader.Status(True, "CuPy 14", [device]))
    cli.main(["info"])
    out = capsys.readouterr().out
    assert "usable: CuPy 14" in out
    assert "NVIDIA Imaginary, compute capability 9.0, 80 GiB" in out


def test_the_command_is_light_to_start():
    code = "import sys, gdr.cli; print(sorted({'cupy', 'torch', 'matplotlib', 'numba', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_selftest_takes_its_options(monkeypatch):
    from gdr import selftest

    seen = {}
    monkeypatch.setattr(selftest, "run", lambda args: seen.update(vars(args)) or 1)
    assert cli.main(["selftest", "--quick", "--device", "cpu"]) == 1
    assert (seen["quick"], seen["device"], seen["seed"]) == (True, "cpu", 0)
