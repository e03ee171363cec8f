"""The Hopper kernels on the emulated GPU, threads in one random order after the other:

python -m tests.soak.soak_hopper --count 20 --seed 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cuda import machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="orders to try")
    parser.add_argument("--seed", type=int, default=1, help="of the first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = machine.build("attention_sm90.cpp", Path(folder))
        failed = 0
        for seed in range(options.seed, options.seed + options.count):
            result = subprocess.run([program, str(seed)], capture_output=True, text=True)
            wrong = result.returncode != 0
            failed += wrong
            print(f"order {seed}: {result.stdout.count('ok')} plans right{', ' + result.stderr if wrong else ''}")
    print(f"{options.count - failed} of {options.count} orders right")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
