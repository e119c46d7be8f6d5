"""What a user installs: the wheel, the README's commands and examples, the files that name the version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gdr

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")


def _readme_blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = directory.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_the_cuda_sources(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gdr").rglob("*.py")}
    assert package | {"gdr/py.typed"} <= names
    sources = {f"gdr/_cuda_src/{path.relative_to(ROOT / 'cuda')}" for path in (ROOT / "cuda").rglob("*.cu*")}
    assert sources
    assert sources <= names
    assert {name.split("/")[0] for name in names} == {"gdr", f"gdr-{gdr.__version__}.dist-info"}


def test_installed_wheel_finds_its_cuda_sources(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel's content is what pip lays down
        archive.extractall(site)
    code = "import gdr; from gdr import _cuda_loader; print(gdr.__file__); print(_cuda_loader.sources())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    module, sources = map(Path, done.stdout.split())
    assert module == site / "gdr" / "__init__.py"
    assert sources == site / "gdr" / "_cuda_src"


def test_checkout_finds_its_cuda_sources():
    from gdr import _cuda_loader

    assert _cuda_loader.sources() == ROOT / "cuda"
    assert not (ROOT / "cuda" / "__init__.py").exists()  # it would shadow NVIDIA's `cuda` namespace package


def test_files_agree_on_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {gdr.__version__}\n" in citation
    assert re.search(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("code", _readme_blocks("python"), ids=lambda code: code.split("\n")[3][:30])
def test_readme_example_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_readme_has_an_example_of_each_use():
    text = "\n".join(_readme_blocks("python"))
    for name in ("DeltaRuleState", "cu_seqlens", "fused_sigmoid_gating_delta_rule_update"):
        assert name in text


def test_readme_has_two_commands_and_links_to_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = "".join(_readme_blocks("sh")).splitlines()
    assert len(commands) == 2
    assert commands[0].endswith("gdr demo")
    assert commands[1].endswith("python -m pytest -n 2")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
