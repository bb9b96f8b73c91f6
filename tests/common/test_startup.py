"""Setup before torch is imported."""

import os
import platform
import re
import subprocess
import sys

import pytest

from kd.common.utils.startup import WAIT_VARIABLES, set_wait_policy

FIRST = ("kd.common", "kd.common.cli", "kd.nlp", "kd.image_classification", "kd.reinforcement_learning")


def in_new_process(code: str, **user: str) -> tuple[str, str]:
    """Output and errors of Python code, with the variables of a user who sets only these."""
    environment = {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES} | user
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_openmp_starts_with_the_wait_policy_of_the_project():
    code = "import sys, kd.common.cli; assert 'torch' not in sys.modules; import torch; torch.zeros(1)"
    _, shown = in_new_process(code, OMP_DISPLAY_ENV="VERBOSE")
    spins = re.search(r"GOMP_SPINCOUNT = '(\d+)'", shown)
    if spins is None:
        pytest.skip("this torch does not use GNU's OpenMP")
    assert spins[1] == "0", shown


def test_every_package_sets_the_policy_before_torch_is_imported():
    code = "import os, sys, {}; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    for package in FIRST:
        assert in_new_process(code.format(package))[0] == "PASSIVE\n", package
    assert in_new_process(code.format(FIRST[0]), OMP_WAIT_POLICY="active")[0] == "active\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_used_again_without_page_faults():
    code = """import resource, kd.common, torch
for step in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2_000_000) for _ in range(20)]  # 8 MB each, all of which are freed after a step
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    assert int(in_new_process(code)[0]) < 1000
    assert int(in_new_process(code, MALLOC_TRIM_THRESHOLD_="131072")[0]) > 10_000, "a setting of the user is kept"


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_a_setting_of_the_user_is_kept(name, monkeypatch):
    for variable in WAIT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "7")
    set_wait_policy()
    assert {variable: os.environ.get(variable) for variable in WAIT_VARIABLES if variable in os.environ} == {name: "7"}
