"""How torch's threads wait, which the command says before torch is loaded."""

import os
import subprocess
import sys

import pytest

from inferix.commands.cli import main

BAD = ["convert", "there is no such file", "out.safetensors"]


def test_threads_sleep_while_they_wait(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "inferix", *BAD]
    env["OMP_DISPLAY_ENV"] = "VERBOSE"
    ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "inferix convert:" in ran.stderr
    if "GOMP_SPINCOUNT" not in ran.stderr:
        pytest.skip("the OpenMP of this torch does not say how long it spins")
    assert "GOMP_SPINCOUNT = '0'" in ran.stderr  # else 300000


def test_what_the_user_chose_stays(monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main(BAD) == 2
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
