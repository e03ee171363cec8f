"""A sample of FlashAttention's own grids; all of them: python -m tests.integrations.flash_attn_grids --all."""

import itertools

import pytest

from inferix_kernels._dispatch import Unsupported
from tests.integrations import flash_attn_grids
from tests.integrations.flash_attn_grids import FA2_OUTPUT, FA3_KVCACHE, GRIDS, every, run, sample

COUNTS = {"FA2_KVCACHE": 50, "FA3_KVCACHE": 16, "FA2_OUTPUT": 22}


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_a_sample_of_the_grid_passes_by_its_librarys_rule(name, count):
    cases, unsupported = sample(GRIDS[name], count, seed=1), []
    for case in cases:
        try:
            run(name, case)
        except Unsupported as error:
            unsupported.append((case, str(error)))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    assert not unsupported


def test_a_sample_holds_every_value_of_each_axis_but_slow_sizes():
    for name, count in COUNTS.items():
        cases = sample(GRIDS[name], count, seed=1)
        for axis, values in GRIDS[name].items():
            assert {case[axis] for case in cases} == set(values) - flash_attn_grids.SLOW, (name, axis)


def test_the_grid_leaves_out_what_the_library_skips():
    for case in itertools.islice(every(FA3_KVCACHE), 1000):
        assert case["new_kv"] or not case["rotary_fraction"]


def test_a_result_that_is_wrong_fails(monkeypatch):
    right = flash_attn_grids.flash_attn.flash_attn_func

    def wrong(*args, window_size, **kwargs):
        left, right_side = window_size
        return right(*args, window_size=(left + 1, right_side), **kwargs)

    case = sample(FA2_OUTPUT, 1, seed=0)[0] | {"local": True, "softcap": 0.0}
    run("FA2_OUTPUT", case)
    monkeypatch.setattr(flash_attn_grids.flash_attn, "flash_attn_func", wrong)
    with pytest.raises(AssertionError):
        run("FA2_OUTPUT", case)
