"""What may be there after a crash: the journals of `torture_writer`, understood, against a tree.

A name has alternatives: what it may stand for, in the order in which they came to be; the last is what a living mount shows. fsync of a
directory settles the names in it. A file has lives (incarnations: one for each truncation to nothing), each with the least and the most
bytes it may have; fsync of the file settles the lives, the bytes, and, which is more than POSIX says but what this filesystem promises (a
commit takes all that was changed before it), the names the file has. A file renamed over another has, under that name, all it had at the
rename.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture_writer import content


@dataclass(slots=True)
class Life:
    """One incarnation: between `least` and `most` bytes of its content."""

    incarnation: int
    least: int = 0
    most: int = 0


@dataclass(eq=False, slots=True)
class File:
    """One inode."""

    #: What it may be; the last is what it is for who looks now.
    lives: list[Life]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name may stand for: nothing, a directory, or a file that has at least `floor` bytes if it is still the same incarnation."""

    file: File | None = None
    directory: bool = False
    incarnation: int = 0
    floor: int = 0


NOTHING = Meaning()
DIRECTORY = Meaning(directory=True)


@dataclass
class Tree:
    """What one writer's directory may hold. `seed`: of its contents."""

    seed: str
    names: dict[str, list[Meaning]] = field(default_factory=dict)
    #: Of this round: how much was acknowledged.
    acknowledged: int = 0
    #: The error that ended the writer.
    failure: str = ""
    _moves: list[tuple[str, str]] = field(default_factory=list)
    _files: dict[int, File] = field(default_factory=dict)
    #: Incarnations that no writer numbers: below zero.
    _empty: int = 0

    # ---- the journal

    def read(self, journal: Path, upto: int | None = None) -> None:
        """Take in what a writer noted, up to its end. `upto`: what was acknowledged after that many bytes of the journal does not count."""
        self.acknowledged = 0
        self.failure = ""
        place = 0
        for line in journal.read_bytes().split(b"\n")[:-1]:
            place += len(line) + 1
            what, *rest = json.loads(line)
            if what in ("synced", "named") and upto is not None and place > upto:
                continue
            getattr(self, f"_{what}")(*rest)

    def _create(self, path: str, incarnation: int) -> None:
        file = self._files[incarnation] = File([Life(incarnation)])
        self._now(path, Meaning(file))

    def _grow(self, incarnation: int, end: int) -> None:
        life = self._files[incarnation].lives[-1]
        life.most = max(life.most, end)

    def _synced(self, incarnation: int, end: int) -> None:
        file = self._files[incarnation]
        file.lives[:] = [file.lives[-1]]
        file.lives[0].least = end
        for meanings in self.names.values():
            if meanings[-1].file is file:
                meanings[:] = [meanings[-1]]
        self.acknowledged += 1

    def _named(self, directory: str) -> None:
        for path, meanings in self.names.items():
            if os.path.dirname(path) == directory:
                meanings[:] = [meanings[-1]]
        self._moves = [(source, target) for source, target in self._moves if os.path.dirname(target) != directory]
        self.acknowledged += 1

    def _replace(self, source: str, target: str) -> None:
        file = self.names[source][-1].file
        if file is None:
            raise ValueError(f"{source} is no file")
        life = file.lives[-1]
        self._now(target, Meaning(file, incarnation=life.incarnation, floor=life.most))
        self._now(source, NOTHING)

    def _move(self, source: str, target: str) -> None:
        self._left(source)
        if NOTHING not in self.names[source]:
            self._moves.append((source, target))
        self._now(target, self.names[source][-1])
        self._now(source, NOTHING)

    def _remove(self, path: str) -> None:
        self._left(path)
        self._now(path, NOTHING)

    def _left(self, path: str) -> None:
        """It may well be under neither name from now on."""
        self._moves = [(source, target) for source, target in self._moves if target != path]

    def _rewrite(self, path: str, incarnation: int) -> None:
        file = self.names[path][-1].file
        if file is None:
            raise ValueError(f"{path} is no file")
        self._files[incarnation] = file
        file.lives.append(Life(incarnation))

    def _mkdir(self, path: str) -> None:
        self._now(path, DIRECTORY)

    def _failed(self, number: int, step: str) -> None:
        self.failure = f"{os.strerror(number)} in {step}"

    def _now(self, path: str, meaning: Meaning) -> None:
        self.names.setdefault(path, [NOTHING]).append(meaning)

    # ---- the comparison

    @property
    def pending(self) -> int:
        """How much was under way, not acknowledged."""
        files = {id(one.file): one.file for meanings in self.names.values() for one in meanings if one.file is not None}
        return sum(len(meanings) > 1 for meanings in self.names.values()) + sum(
            len(file.lives) > 1 or file.lives[0].least < file.lives[0].most for file in files.values()
        )

    def compare(self, root: Path) -> list[str]:
        """One line for each thing that may not be. From here on what was found is what there is."""
        wrong = []
        found = _walk(root)
        where: dict[int, str] = {}
        adopted: dict[str, list[Meaning]] = {}
        files: dict[int, File] = {}
        for path in sorted({*self.names, *found}):
            meanings = self.names.get(path, [])
            data = found.get(path, NOTHING)
            matched = next((one for one in reversed(meanings) if self._fits(one, data) is not None), None)
            if matched is None:
                wrong.append(f"{path}: {self._describe(data)}; expected {self._expected(meanings)}")
            if matched is not None and isinstance(data, bytes) and matched.file is not None:
                if data and (other := where.setdefault(id(matched.file), path)) != path:
                    wrong.append(f"{path} and {other} are the same file: a rename was only half done")
                incarnation = self._fits(matched, data) or 0
                if incarnation in files:
                    # Both are empty: a file, and the empty one that was to replace it. From here on each has contents of its own.
                    self._empty -= 1
                    incarnation = self._empty
                file = File([Life(incarnation, len(data), len(data))])
                files[incarnation] = file
                adopted[path] = [Meaning(file)]
            elif matched == DIRECTORY:
                adopted[path] = [DIRECTORY]
        for source, target in self._moves:
            if source not in found and target not in found:
                wrong.append(f"{source} was being renamed to {target}, and is under neither name")
        self.names, self._files, self._moves = adopted, files, []
        return wrong

    def state(self) -> dict[str, list[int] | None]:
        """For the next writer, after a comparison."""
        known: dict[str, list[int] | None] = {}
        for path, (meaning, *_) in self.names.items():
            known[path] = None if meaning.file is None else [meaning.file.lives[0].incarnation, meaning.file.lives[0].least]
        return known

    def _fits(self, meaning: Meaning, data: bytes | Meaning) -> int | None:
        """The incarnation that `data` is (0: no file), or None."""
        if not isinstance(data, bytes):
            return 0 if meaning.file is None and meaning.directory == data.directory else None
        if meaning.file is None:
            return None
        for life in reversed(meaning.file.lives):
            least = max(life.least, meaning.floor if life.incarnation == meaning.incarnation else 0)
            if least <= len(data) <= life.most and data == content(self.seed, life.incarnation)[: len(data)]:
                return life.incarnation
        return None

    def _describe(self, data: bytes | Meaning) -> str:
        if not isinstance(data, bytes):
            return "is a directory" if data.directory else "is not there"
        for incarnation in self._files:
            if data and content(self.seed, incarnation).startswith(data):
                return f"has {len(data)} bytes of incarnation {incarnation}"
        return f"has {len(data)} bytes that were never written so, beginning with {data[:16].hex()}, {data.count(0)} of them zero"

    @staticmethod
    def _expected(meanings: list[Meaning]) -> str:
        words = []
        for one in meanings:
            if one.file is not None:
                words += [f"{max(life.least, one.floor)} to {life.most} bytes of incarnation {life.incarnation}" for life in one.file.lives]
            else:
                words.append("a directory" if one.directory else "nothing")
        return " or ".join(words) or "no such name"


def _walk(root: Path) -> dict[str, bytes | Meaning]:
    found: dict[str, bytes | Meaning] = {}
    pending = [root]
    while pending:
        directory = pending.pop()
        for entry in sorted(directory.iterdir()):
            path = str(entry.relative_to(root))
            if stat.S_ISDIR(entry.lstat().st_mode):
                found[path] = DIRECTORY
                pending.append(entry)
                continue
            try:
                found[path] = entry.read_bytes()
            except OSError as error:
                # Neither nothing nor any content.
                found[path] = f"unreadable: {error}".encode()
    return found
