import re

from tests.integrations.examples import said


def test_decoding_over_pages_is_attention_over_the_whole(capsys):
    text = said("flash_attn_drop_in", capsys)
    rows = re.findall(r"^ +(\d+) +(\d+)  (\S+)$", text, re.MULTILINE)
    assert [row[:2] for row in rows] == [("720", "3"), ("51", "1"), ("270", "2")]
    assert all(float(row[2]) < 2e-2 for row in rows)  # a rounding of bfloat16, of outputs below 4
    assert "cache of 1,572,864 bytes" in text


def test_the_backend_runs_or_says_why_not(capsys):
    text = said("flash_attn_backend", capsys)
    difference = re.fullmatch(r"largest difference from flash-attn: (\S+)\n", text)
    assert float(difference[1]) < 2e-2 if difference else text.startswith("flash-attn does not run here: ")
