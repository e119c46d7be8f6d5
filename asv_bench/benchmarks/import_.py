"""``import gdr``: in a new process, with NumPy imported already."""

from __future__ import annotations


class Import:
    def timeraw_import(self):
        return "import gdr", "import numpy"

    def timeraw_info(self):
        # asv reads the time from stdout
        code = "with contextlib.redirect_stdout(io.StringIO()): gdr.cli.main(['info'])"
        return f"import gdr.cli\n{code}", "import contextlib, io, numpy"
