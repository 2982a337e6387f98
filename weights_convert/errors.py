"""How a checkpoint is refused: in one sentence that names the thing and the fix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; its message is one sentence with the fix."""


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns whatever a parser raises on damaged bytes into one sentence about `what`.

    Raises CheckpointError. Sentences of our own, and files that are not there, pass unchanged.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise CheckpointError(f"{what} may not be read; change its permissions") from error
    # Anything: zipfile, numpy, safetensors and orbax have no common error for damaged bytes.
    except Exception as error:
        detail = shown(str(error), 120) if str(error) else type(error).__name__
        raise CheckpointError(
            f"{what} cannot be read, it is damaged or incomplete ({detail}); copy or download it "
            "again"
        ) from error


def shown(text: object, limit: int = 80) -> str:
    """`text` on one line, without control characters, cut to `limit` characters.

    Names come out of files that anyone may have written.
    """
    line = str(text)[: limit + 1].encode("unicode_escape").decode("ascii")
    return line if len(line) <= limit else line[: limit - 3] + "..."


def listed(
    items: Collection[str], kind: str, show: Callable[[str], str] = shown, most: int = 3
) -> str:
    """`"12 missing (a, b, c, ...)"`; the empty string where there are none."""
    if not items:
        return ""
    first = [show(item) for item in sorted(items)[:most]]
    return f"{len(items)} {kind} ({', '.join(first)}{', ...' if len(items) > most else ''})"
