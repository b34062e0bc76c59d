"""Pytest settings for unit tests and for `pytest --nbval book/`."""

import os
from pathlib import Path
from typing import Any

from hypothesis import settings

ROOT = Path(__file__).parent

# The same examples everywhere; HYPOTHESIS_PROFILE=search draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_configure(config: Any) -> None:
    """Let nbval run the chapters as Jupyter does, from any folder."""
    if not config.getoption("nbval", False) and not config.getoption(
        "nbval_lax", False
    ):
        return
    from nbval.kernel import RunningKernel
    from nbval.plugin import IPyNbFile

    def execute_cell_input(self: Any, cell_input: str, allow_stdin: Any = None) -> Any:
        return self.kc.execute(cell_input, allow_stdin=allow_stdin, stop_on_error=False)

    # With its history on, IPython honours a trailing `;`.
    RunningKernel.execute_cell_input = execute_cell_input
    start = IPyNbFile.setup

    def setup(self: Any) -> None:
        start(self)
        # The pixels of animations vary with the machine, like those of PNG and JPEG.
        self.skip_compare = (*self.skip_compare, "image/gif", "image/webp")

    IPyNbFile.setup = setup
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    config.option.nbval_current_env = True
    config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
    config.option.nbval_cell_timeout = 600
