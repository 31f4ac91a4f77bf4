"""Text for people and terminals: names and data are shown and never obeyed, and give no secret away."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# What a terminal would obey, or show elsewhere than where it stands: control characters but the tab, marks that turn
# the direction of text, separators of lines, and halves of characters, which cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# Who asks is named in an address: https://name:password@host; or a key stands before its value: api_key=...
# A path has one slash left of an address's two.
USER_INFORMATION = re.compile(r"(?<=://)[^/\s@\"']+(?=@)|(?<=:/)[^/\s@\"':]+:[^/\s@\"']+(?=@)")
SECRET_VALUE = re.compile(
    r"((?:token|secret|password|passwd|api[_-]?key|access[_-]?key)=)[^\s&;,\"']{8,}", re.IGNORECASE
)


def why_no_text(word: str) -> tuple[str, str] | None:
    """What is wrong with a word of a command line that holds bytes which are no characters, and what to do about it.

    None if it is text, which can be kept in a file.
    """
    try:
        word.encode()
    except UnicodeEncodeError:
        try:
            word.encode(errors="surrogateescape").decode()
        except UnicodeError:
            return "is not valid UTF-8", "Rename the file or directory"
        return "cannot be read in this locale", "Set PYTHONUTF8=1, or a locale of UTF-8 such as C.UTF-8"
    return None


def redacted(text: str) -> str:
    """The text without what opens doors: who asks in an address, and values after keys that are named so."""
    if ":/" in text:
        text = USER_INFORMATION.sub("***", text)
    return SECRET_VALUE.sub(r"\1***", text) if "=" in text else text


def printable(text: str) -> str:
    """The text as one line that does nothing to a terminal and gives no secret away.

    What is not to be printed is shown as an escape, \\x1b.
    """
    text = redacted(text)
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """1 step, 2 steps; plural if that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def say(text: str) -> None:
    """A line on the error stream, from any rank; whether it arrives is not looked at.

    Not by print, which a signal may have met in the middle of a line.
    """
    with suppress(OSError):
        os.write(2, f"megalith: {printable(text)}\n".encode())


class Answer:
    """Standard output of a command of which nothing is left but what it prints: a write that fails says what is lost.

    Raises OSError, BrokenPipeError where the reader has gone; all else is the stream's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is left in the buffer must not complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise OSError(f"standard output cannot be written to ({error.strerror}): the answer is lost") from error
