"""A verb's work in several processes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from rich.console import Console

from samjax.arguments import Outcome
from samjax.hosts import Hosts, is_first, lost
from samjax.launcher import is_launched, launch
from samjax.terminal import notices_on


def in_processes(
    hosts: Hosts,
    verb: str,
    argv: Sequence[str],
    console: Console,
    work: Callable[[Console], Outcome],
) -> Outcome:
    """Does `work` in each of the processes, if there are several; the first one alone tells of it.

    `argv` are the verb's arguments. Before JAX is used for anything else.
    """
    if hosts.several:
        if not is_launched():
            raise SystemExit(launch(verb, argv, hosts.heartbeat))
        hosts.join()
    own = console if is_first() else Console(quiet=True)
    try:
        with notices_on(own):
            outcome = work(own)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise lost(error) from error
    return outcome if is_first() else ({}, False)
