"""The benchmarks: their modules match the stems, and their pages draw a graph."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "asv_bench"

pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="needs a checkout")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_one_module_a_stem():
    modules = {path.stem for path in (BENCH / "benchmarks").glob("*.py")} - {"__init__", "common"}
    assert modules == {"chunk", "fused_recurrent", "gate", "import_", "jit", "state"}


def test_configuration_is_of_this_repository():
    config = json.loads((BENCH / "asv.conf.json").read_text(encoding="utf-8"))
    assert (BENCH / config["repo"]).resolve() == ROOT
    assert (BENCH / config["benchmark_dir"]).is_dir()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of pages published from a small repository of one commit and one result."""
    pytest.importorskip("asv")
    if CHROMIUM is None or shutil.which("npm") is None or shutil.which("git") is None:
        pytest.skip("needs chromium, npm and git")
    sys.path.insert(0, str(BENCH))
    try:
        import publish
    finally:
        sys.path.remove(str(BENCH))
    directory = tmp_path_factory.mktemp("asv")
    # asv keeps what it knows of machines in the home directory.
    run = functools.partial(
        subprocess.run, cwd=directory, env={**os.environ, "HOME": str(directory)}, check=True, capture_output=True
    )
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    run([*git, "init", "-q", "-b", "main"])
    for message in ("first", "second"):
        run([*git, "commit", "-q", "--allow-empty", "-m", message])
    commits = run([*git, "rev-list", "main"]).stdout.decode().split()
    config = {
        "version": 1,
        "project": "gdr",
        "repo": ".",
        "branches": ["main"],
        "environment_type": "existing",
        "benchmark_dir": "benchmarks",
    }
    (directory / "asv.conf.json").write_text(json.dumps(config))
    (directory / "benchmarks").mkdir()
    (directory / "benchmarks" / "__init__.py").touch()
    (directory / "benchmarks" / "one.py").write_text("def track_one():\n    return 1\n")
    asv = (sys.executable, "-m", "asv")
    run([*asv, "machine", "--yes", "--machine", "m"])
    for commit in commits:
        run([*asv, "run", "--python=same", "--machine", "m", "--set-commit-hash", commit])
    run([*asv, "publish"])
    publish.bring_scripts(directory / "html")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory / "html"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


def _rendered(address, profile):
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}",
            "--virtual-time-budget=8000", "--dump-dom", address,
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.browser
def test_pages_open_and_draw_a_graph(pages, tmp_path):
    index = _rendered(pages, tmp_path / "profile")
    assert "one.track_one" in index
    assert "failed to load" not in index
    graph = _rendered(f"{pages}#one.track_one", tmp_path / "profile")
    assert re.search(r'<canvas class="flot-base"', graph)
