"""The ways out of a run: a text stream and a file of JSON lines. Neither ever stops the training.

A closed pipe, a full disk or a lost file system is announced once through another channel; what could not be written is
dropped, and the next line is tried again.
"""

import errno
import json
import math
import os
import re
import select
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

from megalith.terminal import redacted

PATIENCE = 1.0  # seconds to wait for a full pipe
BLOCK = 64 << 10  # bytes read at once from the end of a file
LONGEST_LINE = 16 << 20  # bytes of a record


class Outlet:
    """A text stream that takes everything and raises nothing; on_loss is told, once, why it does not write.

    A stream of the system's is written past Python's buffer, so that nothing is left there on which Python would fail
    when it exits.
    """

    def __init__(self, stream: TextIO, on_loss: Callable[[str], None]) -> None:
        self._stream = stream
        self._on_loss = on_loss
        self._told = False
        self._gone = False
        try:
            self._descriptor: int | None = stream.fileno()
        except (OSError, ValueError):  # in memory, or closed
            self._descriptor = None

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write what can be; characters that the stream's encoding lacks are written as escapes."""
        if self._stream.closed:
            self._lose("it is closed")
        elif not self._gone:
            try:
                self._put(text.encode(self.encoding, "backslashreplace"))
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.EIO):
                    self._discard()
                self._lose(str(error))
        return len(text)

    def flush(self) -> None:
        """Nothing: a write does not wait."""

    def _put(self, data: bytes) -> None:
        self._stream.flush()  # what others wrote before
        if self._descriptor is None:
            self._stream.write(data.decode(self.encoding))
            self._stream.flush()
            return
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # a pipe that another program made non-blocking, and that is full
                if not select.select([], [self._descriptor], [], PATIENCE)[1]:
                    raise

    def _lose(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._on_loss(reason)

    def _discard(self) -> None:
        """The reader or the terminal is gone for good: let what anyone still writes there go nowhere."""
        self._gone = True
        if self._descriptor is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)


class JsonLines:
    """A file of JSON objects, one a line, that is only ever appended to, each line by one write.

    A line that a kill, a power loss or a full disk has cut short is removed before the next one is written, so only the
    owner of the file may write. on_loss is told, once, why nothing is written.
    """

    def __init__(self, path: Path, on_loss: Callable[[str], None]) -> None:
        self.path = path
        self._on_loss = on_loss
        self._told = False
        self._descriptor: int | None = None
        self._torn = False  # the file ends within a line
        self._lost = 0  # lines since the last that was written

    def write(self, line: str) -> None:
        try:
            if self._descriptor is None:
                self._open()
            assert self._descriptor is not None
            if self._torn:
                self._mend(self._descriptor)
            note = [json.dumps({"event": "lines_lost", "lines": self._lost})] if self._lost else []
            data = ("\n".join([*note, line]) + "\n").encode("utf-8")
            written = os.write(self._descriptor, data)
            if written < len(data):
                self._torn = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            self._lost += 1
            if not self._told:
                self._told = True
                self._on_loss(str(error))
            return
        self._lost = 0

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What a link points at may be another's. Without O_NONBLOCK a full named pipe would be waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o666)
        size = os.fstat(self._descriptor).st_size
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def _mend(self, descriptor: int) -> None:
        """End the file with a whole line: what stands behind the last one gets an end if it is an object, or goes.

        What is longer than any record gets an end, too: it was not begun here.
        """
        size = begin = os.fstat(descriptor).st_size
        newline = -1
        while newline < 0 < begin and size - begin <= LONGEST_LINE:
            start = max(0, begin - BLOCK)
            newline = os.pread(descriptor, begin - start, start).rfind(b"\n")
            begin = start + newline + 1
        if size - begin > LONGEST_LINE or _is_object(os.pread(descriptor, size - begin, begin)):
            if not os.write(descriptor, b"\n"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        else:
            os.ftruncate(descriptor, begin)
        self._torn = False

    def close(self) -> None:
        if self._descriptor is not None:
            if self._torn:
                with suppress(OSError):
                    self._mend(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def record_of(event: Any, *, time: float, step: int | None) -> dict[str, Any]:
    """An event as a JSON object: its kind, the Unix time, the step (its own, else the one given), then its values."""
    values = {field.name: plain(getattr(event, field.name)) for field in fields(event)}
    own = values.pop("step", None)
    return {"event": event_name(type(event)), "time": time, "step": step if own is None else own, **values}


def event_name(kind: type) -> str:
    """step_done for StepDone."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def plain(value: Any) -> Any:
    """A value as JSON has it, numbers at full precision; those that JSON lacks as the strings NaN and ±Infinity."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else ("NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [plain(entry) for entry in value]
    if isinstance(value, SupportsFloat):  # a number of numpy or torch
        return plain(float(value))
    return str(value)


def json_line(record: Mapping[str, Any]) -> str:
    """One line of ASCII that is also harmless to a terminal, and gives no secret away."""
    return redacted(json.dumps(record, allow_nan=False)).replace("\x7f", "\\u007f")
