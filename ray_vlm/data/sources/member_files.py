"""Rows that are files: one annotation file for each image, as YOLO, Pascal VOC and labelme have them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from posixpath import splitext
from typing import Any, NamedTuple

from ray_vlm.data.records import BadRow
from ray_vlm.data.sources.pieces import MAX_LINE_BYTES, PIECE_ROWS, NumberedRow, Piece, row_digest
from ray_vlm.storage import open_file


class Member(NamedTuple):
    """A row. `image`: its name under the folder of images, empty where the annotation names it. `annotation`: the
    address of the file, empty for an image without one; `size` and `changed`: its bytes and the time of its last change
    (ns)."""

    image: str
    annotation: str
    size: int = 0
    changed: int = 0


ReadMember = Callable[[Member, bytes | None], Mapping[str, Any]]


class MemberFiles:
    """Rows that are files. It pickles, and is small: pieces hold the members.

    `read` returns the cells of a row from its member and the bytes of its annotation, None where there is none; it
    raises `ValueError` with the reason why the row cannot be used. `labels`: class names that the data set lists, in
    order. `settings`: what `read` depends on beside these. An annotation of more than `max_bytes` makes its row bad.
    `columns`: None, as no file names columns.
    """

    columns: tuple[str, ...] | None = None

    def __init__(
        self,
        address: str,
        members: Sequence[Member],
        read: ReadMember,
        labels: Sequence[str] = (),
        settings: object = None,
        max_bytes: int = MAX_LINE_BYTES,
    ):
        self.address, self.read_member, self.labels = address, read, tuple(labels)
        self.settings, self.max_bytes = settings, max_bytes
        self._members: Sequence[Member] = members

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": ()}

    @property
    def version(self) -> list[Any]:
        """What identifies the present content of all files; it is small, and nothing is read for it."""
        digest = self._digest(0, self._members)
        return [self.address, len(self._members), digest]

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[Piece]:
        """Yield the pieces of the data set. A change of an annotation changes its piece."""
        for first in range(0, len(self._members), rows):
            some = tuple(self._members[first : first + rows])
            yield Piece(first, len(some), self._digest(first, some), entries=some, labels=self.labels)

    def _digest(self, first: int, members: Sequence[Member]) -> str:
        digest = row_digest(first, self.labels, self.settings)
        for member in members:
            digest.update(repr(tuple(member)).encode("utf-8", "replace"))
        return digest.hexdigest()

    def read(self, piece: Piece) -> list[NumberedRow | BadRow]:
        """Return the rows of a piece."""
        return [self._read(number, member) for number, member in enumerate(piece.entries, piece.first_row)]

    def _read(self, number: int, member: Member) -> NumberedRow | BadRow:
        try:
            return number, dict(self.read_member(member, self._read_annotation(member)))
        except (OSError, ValueError) as error:
            name = member.image or member.annotation.removeprefix(f"{self.address.rstrip('/')}/")
            return BadRow(number, splitext(name)[0], f"{member.annotation or name}: {error}")

    def _read_annotation(self, member: Member) -> bytes | None:
        if not member.annotation:
            return None
        try:
            with open_file(member.annotation) as file:
                data = file.read(self.max_bytes + 1)
        except FileNotFoundError:
            raise ValueError("no such file; add it, or take its name out of the list that has it") from None
        if len(data) > self.max_bytes:
            raise ValueError(f"the file has {max(member.size, len(data))} bytes, above {self.max_bytes}; mend it")
        return data
