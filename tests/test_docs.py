"""The documentation: its code runs, its examples run, its links and its map of the repository hold."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gdr

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs a checkout")

_BLOCK = re.compile(r"^```python(?: (?P<needs>\w+))?\n(?P<code>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def _pages():
    if not DOCS.exists():
        return []
    return sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def _blocks(needs):
    """Pages with the code of their blocks that need `needs`; a block may use what blocks before it made."""
    params = []
    for page in _pages():
        blocks = list(_BLOCK.finditer(page.read_text(encoding="utf-8")))
        own = [block for block in blocks if block["needs"] == needs]
        if own:
            code = "".join(b["code"] for b in (blocks if needs else own) if b["needs"] in (None, needs))
            params.append(pytest.param(page, code, id=str(page.relative_to(DOCS))))
    return params


def _run(page, code):
    exec(compile(code, str(page), "exec"), {"__name__": "__docs__"})


@pytest.mark.parametrize(("page", "code"), _blocks(None))
def test_code_runs(page, code):
    _run(page, code)


@pytest.mark.gpu
@pytest.mark.parametrize(("page", "code"), _blocks("gpu"))
def test_code_runs_on_a_gpu(page, code):
    _run(page, code)


@pytest.mark.parametrize("needs", ["torch", "transformers"])
def test_code_for_other_libraries_runs(needs):
    pytest.importorskip(needs)
    blocks = _blocks(needs)
    assert blocks
    for block in blocks:
        _run(*block.values)


@pytest.mark.parametrize("name", ["streaming", "continuous_batching", "remembering"])
def test_example_runs(name, tmp_path):
    options = {"continuous_batching": ["--check"], "remembering": ["--plot", str(tmp_path / "plot.svg")]}
    script = DOCS / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script, *options.get(name, [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (DOCS / "examples" / f"{name.replace('_', '-')}.md").exists()


def test_layout_page_is_true():
    text = (DOCS / "layout.md").read_text(encoding="utf-8")
    named = re.findall(
        r"`([^`]+)`", "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    )
    assert named
    for pattern in named:
        assert list(ROOT.glob(pattern.rstrip("/"))), f"{pattern} is not there"
    covered = {path for pattern in named for path in ROOT.glob(pattern.rstrip("/"))}
    modules = set((ROOT / "gdr").glob("*.py"))
    assert modules <= covered, f"not in docs/layout.md: {sorted(path.name for path in modules - covered)}"


def test_environment_page_names_every_variable():
    text = (DOCS / "environment.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "gdr").rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", source))
    assert read
    assert read <= set(re.findall(r"`(\w+)`", text))


def test_reference_has_every_public_name():
    text = (DOCS / "api" / "index.md").read_text(encoding="utf-8") + (DOCS / "api" / "state.md").read_text(
        encoding="utf-8"
    )
    for name in gdr.__all__:
        assert re.search(rf"\b{name}\b", text), name


def test_data_say_where_when_and_with_what_they_were_measured():
    files = sorted((DOCS / "data").glob("*.json"))
    assert files
    for path in files:
        missing = {"device", "date", "versions", "command"} - json.loads(path.read_text(encoding="utf-8")).keys()
        assert not missing, f"{path.name}: no {', '.join(missing)}"


def test_data_hold_numbers():
    def refuse(constant):
        raise ValueError(constant)

    for path in sorted((DOCS / "data").glob("performance-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)  # no NaN
        times = [row["us"] if "us" in row else row["ms"] for row in data["rows"]]
        assert times, path.name
        assert min(times) > 0, path.name
        rows = [(row["suite"], row["case"], row.get("T"), row["impl"]) for row in data["rows"]]
        assert len(set(rows)) == len(rows), f"{path.name} has a time twice"


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What draws docs/data, with a folder of its own for the data."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(DOCS)
    module = importlib.import_module("figures.measured")
    monkeypatch.setattr(module, "DATA", tmp_path)
    return module


def _write(directory, name, rows, **more):
    head = {"device": "NVIDIA X", "date": "2000-01-01", "versions": {}, "command": "x", "title": name}
    (directory / f"performance-x-{name}.json").write_text(json.dumps(head | more | {"rows": rows}), encoding="utf-8")


def _row(suite, case, impl, us, **more):
    return {"suite": suite, "case": case, "impl": impl, "us": us, **more}


def test_performance_page_compares_with_each_library_and_the_fastest(measured, tmp_path):
    rows = [_row("decode", "B=1 float32", impl, us) for impl, us in (("gdr kv", 4), ("A", 8), ("B", 10))]
    rows += [_row("decode", "B=8 float32", impl, us) for impl, us in (("gdr kv", 9), ("A", 6), ("B", 4.5))]
    rows += [_row("decode", "B=9 float32", impl, us) for impl, us in (("gdr kv", 9), ("B", 9), ("in-place stream", 1))]
    _write(tmp_path, "decode", rows)
    page = measured.page().replace("\u2060", "")
    # Over the fastest 1/2, 2 and 1; over A 1/2 and 3/2; over B 2/5, 2 and 1.
    assert "| decode, gdr kv | 3 | 1.00 (0.50–2.00) | 0.87 (0.50–1.50); 2 cases | 0.93 (0.40–2.00) |" in page
    assert "A, decode: B=9 float32." in page
    assert "performance-x-decode-decode" in measured.figures()


def test_performance_page_gives_the_share_of_a_plain_kernel(measured, tmp_path):
    plain = {"impl": "in-place stream", "us": 9.0, "GBps": 2000.0}
    rows = [_row("decode", "m B=128 float32", **plain), _row("decode", "m B=32 float32", **plain)]
    rows += [
        _row("decode", f"m B={B} float32", f"gdr {x}", us) for B in (32, 128) for x, us in (("kv", 12), ("vk", 10))
    ]
    _write(tmp_path, "decode", rows, ceilings={"in_place_GBps": 3000.0})
    page = measured.page()
    assert "| m B=128 float32 | 2,000 | 1,800 | 90.0% | 60.0% |" in page
    assert "| m B=32 float32" not in page


def test_performance_page_sets_rings_beside_other_libraries_on_the_same_device(measured, tmp_path):
    case = "m B=8 float32"
    _write(tmp_path, "ring", [_row("deferral", case, "gdr ring=16", 3, worst=6)])
    _write(tmp_path, "decode", [_row("decode", case, impl, 5) for impl in ("A", "gdr kv", "in-place stream")])
    _write(tmp_path, "elsewhere", [_row("decode", case, "A", 1)], device="NVIDIA Y")
    page = measured.page()
    assert "| deferral, gdr ring=16 | 1 | 0.60 |" in page
    assert "those of “decode”, taken on 2000-01-01" in page
    assert "| float32, ring=16 | 2.00 |" in page


def test_performance_page_gives_what_calls_cost_and_how_exact_they_are(measured, tmp_path):
    rows = [
        _row("prefill", f"1x{i}", impl, 5, host_us=10.0 * i, err_o=i * 1e-3, err_h=i * 1e-4)
        for impl in ("gdr", "A")
        for i in (1, 2, 4)
    ]
    rows += [_row("sweep", "m bfloat16", impl, us, T=T) for impl, us in (("gdr", 1500), ("A", 3)) for T in (1, 2048)]
    _write(tmp_path, "prefill", rows)
    page = measured.page()
    assert "| gdr | 20 | 4.0e-03 | 4.0e-04 |" in page
    assert "| 2,048 | 1,500 | 3 |" in page
    assert "performance-x-prefill-sweep" in measured.figures()


def test_kernels_page_gives_the_share_of_each_kernel(measured, tmp_path):
    rows = [
        {"case": "m 1x64", "us": 50.0, "floor_us": 10.0},
        {"case": "m 1x64", "kernel": "chunk_prepare"},
        {"case": "m 1x64", "kernel": "chunk_state_sm90", "us": 40.0},
        {"case": "m 64x2", "us": 20.0, "floor_us": 5.0},
        {"case": "m 64x2", "kernel": "chunk_fused_sm90", "us": 20.0},
    ]
    head = {"device": "NVIDIA X", "date": "2000-01-01", "versions": {}, "command": "run", "note": "Alone."}
    (tmp_path / "kernels-x.json").write_text(json.dumps(head | {"rows": rows}), encoding="utf-8")
    page = measured.kernels_page()
    assert "| m 1x64 | 10 | 50 | chunk_prepare beside, chunk_state_sm90 40 (80%) |" in page
    assert "| m 64x2 | 5 | 20 | chunk_fused_sm90 20 (100%) |" in page


def test_links_within_the_documentation():
    for page in _pages():
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The pages, built with no warning."""
    for name in ("sphinx", "pydata_sphinx_theme", "numpydoc", "myst_parser", "sphinx_design"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the docs extra")
    directory = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", directory / "doctrees", DOCS, directory / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory / "html"


@pytest.mark.slow
def test_methods_are_in_the_reference(html):
    text = (html / "api" / "state.html").read_text(encoding="utf-8")
    for name in vars(gdr.DeltaRuleState):
        assert name.startswith("_") or f"DeltaRuleState.{name}" in text, name


def _linked(page):
    """The pages of this documentation that a page's own text links to, its navigation left out."""
    text = page.read_text(encoding="utf-8")
    article = text[text.index('<article class="bd-article') : text.index("</article>")]
    targets = re.findall(r'href="([^"#:]+\.html)', article)
    return {(page.parent / target).resolve() for target in targets}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    ["state.step(", "cu_seqlens_of(lengths)", "gdr import fused_sigmoid_gating_delta_rule_update", "asv continuous"],
)
def test_two_clicks_from_the_front_page(html, what):
    first = _linked(html / "index.html")
    assert first
    reached = first.union(*(_linked(page) for page in first))
    text = "".join(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8")) for page in reached)
    assert what in text


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(html):
    for page in html.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]* (?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not loaded, page
