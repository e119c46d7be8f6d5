"""``import gdr``: in a new process, with NumPy imported already."""

from __future__ import annotations


class Import:
    def timeraw_import(self):
        return "import gdr", "import numpy"

    def timeraw_command(self):
        return "from gdr.cli import main; main(['info'])", "import sys, io; sys.stdout = io.StringIO(); import numpy"
