"""A slice of the soak with kills: two kinds, one kill each."""

from pathlib import Path

from tests.soak.soak_kills import soak


def test_what_a_kill_leaves_is_whole_or_a_beginning(tmp_path: Path) -> None:
    """Generating and saving; `python -m tests.soak.soak_kills` has all kinds, as often as one likes."""
    failed, _ = soak(times=2, seed=1, folder=tmp_path)
    assert failed == []
