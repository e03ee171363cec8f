"""Random steps on the KV store, with failures and interruptions, against a model of it; see store_model.py.

    python -m tests.soak.soak_store --steps 100000 --seed 0

Prints what was done and ends with 0, or with the step and the seed at which store and model differ.
"""

import argparse
import random
from collections import Counter

import torch

from tests.store.store_model import PAIRS
from tests.store.store_play import Play

GAME = 500  # steps on one store


def soak(steps, seed, failures=20, tell=lambda text: None):
    """Counts of what was done. Raises AssertionError, naming the seed of the store's steps, at the first difference."""
    counts = Counter()
    for game in range(-(-steps // GAME)):
        play = Play(random.Random(f"{seed}/{game}"), PAIRS[game % len(PAIRS)], failures, instructions=True)
        try:
            for _ in range(min(GAME, steps - game * GAME)):
                play.step()
            play.end()
        except BaseException as error:
            where = f"seed {seed}/{game}, formats {play.formats}, step {play.counts['steps']}"
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        counts.update(play.counts)
        if game % 20 == 19:
            tell(f"{counts['steps']} steps, {counts['failures']} failures")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = soak(args.steps, args.seed, tell=lambda text: print(text, flush=True))
    formats = ", ".join(format for format, _ in PAIRS)
    print(f"seed {args.seed}, formats {formats}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    print("0 differences, 0 leaks")


if __name__ == "__main__":
    main()
