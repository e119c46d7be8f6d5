"""Publish the benchmarks' results as pages that need no other host: ``python asv_bench/publish.py``.

``asv publish`` writes pages into ``asv_bench/html`` that load their scripts from content delivery networks.  This puts
the scripts beside the pages (npm fetches them), so that they open without a network and with nobody watching.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HTML = HERE / "html"

PACKAGES = (
    "blueimp-md5@2.19.0",
    "bootstrap@3.1.1",
    "flot-orderbars@1.0.0",
    "flot@0.8.3",
    "jquery@3.3.1",
    "stupid-table-plugin@1.1.3",
)

# The end of an address in asv's pages, and the file of the packages that stands in for it.
FILES = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}


def main() -> None:
    """Publish, then bring the scripts."""
    subprocess.run([sys.executable, "-m", "asv", "publish", *sys.argv[1:]], cwd=HERE, check=True)
    bring_scripts(HTML)


def bring_scripts(html: Path) -> None:
    """Put what the pages load from elsewhere beside them, and load it from there."""
    vendor = html / "vendor"
    vendor.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        options = ("--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", directory)
        subprocess.run(["npm", "install", *options, *PACKAGES], check=True)
        for path in FILES.values():
            shutil.copy(Path(directory) / "node_modules" / path, vendor)
    index = html / "index.html"
    text = index.read_text(encoding="utf-8")
    # A checksum is of the file it was made for, and some of these are not minified.
    text = re.sub(r' (integrity|crossorigin|referrerpolicy)="[^"]*"', "", text)
    text = re.sub(r'(src|href)="(https://(?:cdn|code)[^"]+)"', _local, text)
    index.write_text(text, encoding="utf-8")


def _local(match: re.Match[str]) -> str:
    attribute, address = match.groups()
    path = FILES[address.rsplit("/", 1)[1]]
    return f'{attribute}="vendor/{path.rsplit("/", 1)[1]}"'


if __name__ == "__main__":
    main()
