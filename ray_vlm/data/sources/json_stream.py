"""Parse JSON while it is read, one value after another."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from ray_vlm.errors import DataError

_CUT_OFF = 16  # characters at the end of what was read, in which a number or a word may go on
_BLANK = re.compile(r"[ \t\n\r]*")  # between values of JSON
DECODER = json.JSONDecoder()


def not_json(address: str, error: object) -> DataError:
    """Return the error for a file that is no JSON. `error`: why."""
    return DataError(f"{address}: not readable as UTF-8 JSON ({error}). Mend it and save it as UTF-8.")


class JsonStream:
    """The values in a JSON text, parsed one after another by Python's own parser while blocks of it are read."""

    def __init__(self, address: str, blocks: Iterator[bytes]):
        """`blocks`: the bytes of the file at `address`, which messages name."""
        self.address, self.blocks = address, blocks
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0  # what has been read and not dropped, and the position in it
        self.num_bytes, self.num_characters = 0, 0  # read, dropped
        self.num_lines, self.column = 1, 1  # of the first character of `text`
        self.ended = False

    def _more(self) -> bool:
        """Read as much again as is still unparsed, and drop what has been parsed. Return whether there was more."""
        rest, parts, size = self.text[self.at :], [], 0
        while size <= len(rest) and not self.ended:
            block = next(self.blocks, b"")
            self.ended = not block
            parts.append(self._decode(block))
            size += len(parts[-1])
        if not size:
            return False
        self.num_lines, self.column = self._line_of(self.at)
        self.num_characters += self.at
        self.text, self.at = "".join([rest, *parts]), 0
        return True

    def _decode(self, block: bytes) -> str:
        pending = len(self.decoder.getstate()[0])
        try:
            text = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte, start = error.object[error.start], self.num_bytes - pending + error.start
            reason = f"'utf-8' codec can't decode byte {byte:#04x} in position {start}: {error.reason}"
            raise not_json(self.address, reason) from None
        text = text.removeprefix("\ufeff") if self.num_bytes == 0 else text
        self.num_bytes += len(block)
        return text

    def _line_of(self, at: int) -> tuple[int, int]:
        """Return the number of the line with a character of `text`, and its number in that line."""
        lines = self.text.count("\n", 0, at)
        return self.num_lines + lines, at - self.text.rfind("\n", 0, at) if lines else self.column + at

    def fail(self, reason: object, at: int | None = None) -> NoReturn:
        """Raise `DataError` with the place of a character, by default of the next one."""
        at = self.at if at is None else at
        line, column = self._line_of(at)
        raise not_json(self.address, f"{reason}: line {line} column {column} (char {self.num_characters + at})")

    def peek(self) -> str:
        """Return the next character that is no white space, or an empty text at the end."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> tuple[Any, str]:
        """Parse the next value, and return it with its text."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) - _CUT_OFF or not self._more():
                    text, self.at = self.text[self.at : end], end
                    return value, text
                continue
            except json.JSONDecodeError as error:
                reason, wrong = error.msg, error.pos
            except ValueError as error:  # a number of too many digits
                reason, wrong = str(error), self.at
            except RecursionError as error:
                raise not_json(self.address, error) from None
            cut_off = wrong >= len(self.text) - _CUT_OFF or reason.startswith("Unterminated string")
            if not cut_off or not self._more():
                self.fail(reason, wrong)

    def items(self) -> Iterator[tuple[str, bytes]]:
        """Yield the values of the list that begins here, as text and as bytes."""
        yield from ((text, text.encode()) for _, text in self._parts("]"))

    def values(self) -> Iterator[Any]:
        """Yield the values of the list that begins here."""
        yield from (value for value, _ in self._parts("]"))

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that begins here; the caller parses the value of each."""
        for key, _ in self._parts("}"):
            yield key

    def _parts(self, closing: str) -> Iterator[tuple[Any, str]]:
        self.at += 1
        if self.peek() == closing:
            self.at += 1
            return
        while True:
            if closing == "}" and self.peek() != '"':
                self.fail("Expecting property name enclosed in double quotes")
            member = self.value()
            if closing == "}":
                self._expect(":")
            yield member
            if self.peek() == closing:
                self.at += 1
                return
            self._expect(",")

    def _expect(self, mark: str) -> None:
        if self.peek() != mark:
            self.fail(f"Expecting {mark!r} delimiter")
        self.at += 1
