"""The benchmarks: their modules match the stems, and their pages draw a graph."""

from __future__ import annotations

import functools
import http.server
import json
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

# A benchmark, and how many commits have results of it; the last has them of a GPU alone.
GRAPHS = {
    "fused_recurrent.DecodeSmall.time_small": 6,
    "fused_recurrent.Traffic.track_state_traffic": 6,
    "fused_recurrent.Device.track_device_microseconds": 3,
}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_one_module_a_stem():
    modules = {path.stem for path in (BENCH / "benchmarks").glob("*.py")} - {"__init__", "common"}
    assert modules == {"chunk", "fused_recurrent", "gate", "import_", "jit", "ring", "state"}


def test_configuration_is_of_this_repository():
    config = json.loads((BENCH / "asv.conf.json").read_text(encoding="utf-8"))
    assert (BENCH / config["repo"]).resolve() == ROOT
    assert (BENCH / config["benchmark_dir"]).is_dir()


def test_results_of_several_commits_are_committed():
    measured = {name: set() for name in GRAPHS}
    for machine in (BENCH / "results").glob("*/machine.json"):
        of_machine = json.loads(machine.read_text())
        of_machine.pop("version")
        for path in set(machine.parent.glob("*.json")) - {machine}:
            run = json.loads(path.read_text())
            assert re.fullmatch("[0-9a-f]{40}", run["commit_hash"])
            assert path.name == f"{run['commit_hash'][:8]}-{run['env_name']}.json"
            # A graph is of one set of these, and asv puts paths into them.
            assert run["params"] == of_machine | run["requirements"] | {"python": run["python"]}
            assert re.fullmatch(r"3\.\d+", run["python"])
            assert "/" not in run["env_name"]
            for name in GRAPHS:
                # What a machine cannot run is null or NaN.
                if any(x is not None and x == x for x in run["results"].get(name, [[]])[0] or []):
                    measured[name].add(run["commit_hash"])
    assert all(len(measured[name]) >= least for name, least in GRAPHS.items()), measured
    assert sum(path.stat().st_size for path in (BENCH / "results").rglob("*.json")) < 1 << 20


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of the pages of the committed results."""
    pytest.importorskip("asv")
    if CHROMIUM is None or shutil.which("npm") is None or not (ROOT / ".git").exists():
        pytest.skip("needs chromium, npm and the repository's history")
    sys.path.insert(0, str(BENCH))
    try:
        import publish
    finally:
        sys.path.remove(str(BENCH))
    directory = tmp_path_factory.mktemp("asv")
    config = json.loads((BENCH / "asv.conf.json").read_text(encoding="utf-8"))
    config |= {name: str((BENCH / config[name]).resolve()) for name in ("repo", "benchmark_dir", "results_dir")}
    config |= {"html_dir": str(directory / "html"), "branches": ["HEAD"]}
    (directory / "asv.conf.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "asv", "publish"], cwd=directory, check=True, capture_output=True)
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
@pytest.mark.parametrize("name", GRAPHS)
def test_pages_open_and_draw_a_graph(pages, tmp_path, name):
    index = _rendered(pages, tmp_path / "profile")
    assert name in index
    assert "failed to load" not in index
    graph = _rendered(f"{pages}#{name}", tmp_path / "profile")
    assert re.search(r'<canvas class="flot-base"', graph)
