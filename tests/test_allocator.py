"""What the allocator keeps, as the system counts it."""

import os
import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import numpy as np
from samjax.allocator import keep_freed_memory, release_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

kept = keep_freed_memory()
start = resident()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MB, written to and freed
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = resident() - start
release_freed_memory()
print(kept, faults * resource.getpagesize(), held, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("variable", ["", "MALLOC_ARENA_MAX"])
def test_freed_memory_is_used_again_unless_the_user_says_otherwise(variable):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {variable: "2"} if variable else {}
    command = [sys.executable, "-c", _FAULTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, *sizes = done.stdout.split()
    faulted, held, left = map(int, sizes)
    assert kept == str(not variable)
    if variable:
        assert held < 2**24
    else:
        assert faulted < 2**22 and held > 2**25 and left < 2**24
