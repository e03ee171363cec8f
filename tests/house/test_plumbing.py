"""How many lines and files one more parameter, or one more op, may take."""

from tests.house import plumbing


def test_one_more_scalar_of_attention_stands_on_few_lines():
    found = plumbing.lines_of("accumulate", {"latent_attention"})
    assert sum(map(len, found.values())) <= 28 and len(found) <= 9, found
    both = plumbing.lines_of("accumulate", set())
    assert sum(map(len, both.values())) <= 36 and len(both) <= 10, both


def test_one_more_op_touches_few_files():
    """merge_attention has all that an op can have: kernels in C++, CUDA and Triton, tiles, a proof, a benchmark."""
    found = plumbing.files_of("merge_attention")
    assert len(found) <= 12, found


def test_what_is_counted(tmp_path):
    python = tmp_path / "x.py"
    python.write_text('"""scale"""\ndef f(scale):  # scale\n    return g("scale", "a scale", SCALE=1)\n')
    assert [i for i, line in plumbing.words(python).items() if {"scale", "SCALE"} & line] == [2, 3]
    native = tmp_path / "x.h"
    native.write_text("// scale\n/* scale\n scale */ float scale;  // scale\nint scales;\n")
    assert [i for i, line in plumbing.words(native).items() if "scale" in line] == [3]
