"""What Orbax says of a save that failed."""

import asyncio
import gc
import logging

import pytest

from samjax.orbax_saves import clean_save

WRITER = "async def write():\n    raise ValueError('no space')"


async def abandon(file):
    """A task defined in `file` fails, and nobody asks for its result."""
    names = {}
    exec(compile(WRITER, file, "exec"), names)
    task = asyncio.create_task(names["write"]())
    await asyncio.sleep(0)
    del task
    gc.collect()


def test_its_other_writers_are_not_heard_later(caplog):
    with pytest.raises(OSError, match="full"), clean_save(lambda: ()):
        raise OSError("full")
    with caplog.at_level(logging.ERROR, "asyncio"):
        asyncio.run(abandon("site-packages/orbax/checkpoint/writer.py"))
        assert not caplog.records
        asyncio.run(abandon("mine/writer.py"))
    [record] = caplog.records
    assert "never retrieved" in record.getMessage()
