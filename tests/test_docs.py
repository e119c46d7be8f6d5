"""The documentation: its code runs, its examples run, its links and its map of the repository hold."""

from __future__ import annotations

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
