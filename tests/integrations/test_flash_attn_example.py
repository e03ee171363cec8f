import importlib.util
import re
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "flash_attn_drop_in.py"


def test_decoding_over_pages_is_attention_over_the_whole(capsys):
    spec = importlib.util.spec_from_file_location("flash_attn_drop_in", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    said = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +(\d+)  (\S+)$", said, re.MULTILINE)
    assert [row[:2] for row in rows] == [("720", "3"), ("51", "1"), ("270", "2")]
    assert all(float(row[2]) < 2e-2 for row in rows)  # a rounding of bfloat16, of outputs below 4
    assert "cache of 1,572,864 bytes" in said
