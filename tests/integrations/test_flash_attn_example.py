import importlib.util
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, capsys):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    return capsys.readouterr().out


def test_decoding_over_pages_is_attention_over_the_whole(capsys):
    said = run("flash_attn_drop_in", capsys)
    rows = re.findall(r"^ +(\d+) +(\d+)  (\S+)$", said, re.MULTILINE)
    assert [row[:2] for row in rows] == [("720", "3"), ("51", "1"), ("270", "2")]
    assert all(float(row[2]) < 2e-2 for row in rows)  # a rounding of bfloat16, of outputs below 4
    assert "cache of 1,572,864 bytes" in said


def test_the_backend_runs_or_says_why_not(capsys):
    said = run("flash_attn_backend", capsys)
    difference = re.fullmatch(r"largest difference from flash-attn: (\S+)\n", said)
    assert float(difference[1]) < 2e-2 if difference else said.startswith("flash-attn does not run here: ")
