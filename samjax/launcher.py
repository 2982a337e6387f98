"""A process of several, and the small one around it that says how it ended.

Where a process of a run is lost, JAX's runtime aborts the others, from a thread of its own and with
no word that a user could understand. Each process of a run is therefore the child of one that does
not use JAX: it passes signals on, waits, and says in one sentence what became of its child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

# In the environment of a child: a file that ends when its launcher does.
_LAUNCHER = "SAMJAX_LAUNCHER"
# Seconds that a process which failed waits for the others to have failed alike.
_PATIENCE = 5.0


def is_launched() -> bool:
    """Whether this process is the child of `launch`."""
    return _LAUNCHER in os.environ


def launch(verb: str, arguments: Sequence[str], heartbeat: int) -> int:
    """Runs `samjax VERB` in a child; returns its exit code, having said what is not its to say."""
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "samjax.launcher", verb, *arguments],
        env={**os.environ, _LAUNCHER: str(read)},
        pass_fds=(read,),
        start_new_session=True,  # a terminal's Ctrl-C would reach it twice
    ) as child:
        os.close(read)

        def pass_on(number: int, frame: Any) -> None:
            child.send_signal(number)

        before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
        code = child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    os.close(write)
    if code >= 0:
        return code
    how = signal.Signals(-code).name
    if code == -signal.SIGABRT:
        how = (
            f"{how}, as JAX does where another process was lost: nothing was heard of it for "
            f"{heartbeat} s, or its connection broke"
        )
    sys.stderr.write(
        f"samjax: this process of the run ended by {how}; start all of them again; training goes "
        "on with --resume from the last checkpoint\n"
    )
    return 1


def _end_with(launcher: int) -> None:
    """Ends this process once its launcher has, however that ended."""
    os.read(launcher, 1)
    os._exit(1)


def _main() -> None:
    from samjax.cli import main

    launcher = int(os.environ[_LAUNCHER])
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    import jax

    if jax.distributed.is_initialized():
        # All leave together, or the first one's end would abort the others. One that has failed on
        # its own cannot wait: the others will not come.
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(_PATIENCE if code else None)
    os._exit(code)


if __name__ == "__main__":
    _main()
