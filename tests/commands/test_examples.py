"""The examples do what they say."""

import importlib.util
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_forks_share_the_past_and_pay_for_what_differs(capsys):
    spec = importlib.util.spec_from_file_location("fork_a_world", EXAMPLES / "fork_a_world.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    said = capsys.readouterr().out
    rows = re.findall(r"^ +\d+ +([\d,]+) +([\d,]+)$", said.replace(said.splitlines()[1], ""), re.MULTILINE)
    shared, private = zip(*([int(number.replace(",", "")) for number in row] for row in rows))
    alone = int(re.search(r"alone holds ([\d,]+) bytes", said)[1].replace(",", ""))
    assert shared[0] == alone and private[0] == 0  # sixteen forks cost no page
    assert list(shared) == sorted(shared, reverse=True) and list(private) == sorted(private)
    assert shared[-1] == 0 and private[-1] == 16 * alone  # once nothing of the common past is left in the window
