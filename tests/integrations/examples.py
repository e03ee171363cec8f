"""Scripts of examples/, run as a user runs them."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def said(name, capsys):
    """What a script prints."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out
