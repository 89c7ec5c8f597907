"""Documents from files, and their division into a training and a held-out part that share none.

A document's part is decided by a hash of its name: nothing else moves it. Documents of the same content are taken once, so that no
text stands in both parts. A corpus of a single document is cut, and its end is held out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.tasks.tables import hub_split, opened_parquet, require_columns

SEPARATOR = b"\0"
# Not installed everywhere (tests, Tk, pip's wheels, what Python 3.12 and 3.13 dropped), not of the library, or tables made by a program.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo"}
    | {"ensurepip", "lib2to3", "distutils", "encodings", "pydoc_data"}
)
ROWS_PER_READ = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """A name that is its own within its corpus, and bytes."""

    name: str
    content: bytes

    @property
    def place(self) -> float:
        """From 0 up to 1, spread evenly over names."""
        return place(self.name)


def place(name: str) -> float:
    """The first 53 bits of the name's SHA-256, as a fraction of 2^53."""
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 11) / 2**53


# Reading


def standard_library() -> Iterator[Document]:
    """The Python files of the standard library. Raises TwofoldError where it has no files."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        names += [(Path(parent) / file).relative_to(folder).as_posix() for file in files if file.endswith(".py")]
    if not names:
        raise TwofoldError(
            f"This Python keeps no source of its standard library in {folder}: give a text with the option path."
        )
    for name in sorted(names, key=place):
        with _reading(folder / name):
            content = (folder / name).read_bytes()
        yield Document(name, content)


def local_documents(path: Path, *, pattern: str, fields: tuple[str, ...]) -> Iterator[Document]:
    """The documents of a file, or of all files of a folder that match ``pattern``, hidden and binary ones left out.

    A row of a .jsonl or .parquet file is a document; so is every other file. A name that ends in .gz is unpacked.
    Raises TwofoldError for a path that is not there and a file that cannot be read.
    """
    if path.is_file():
        yield from _documents_of(path, path.name, fields)
        return
    if not path.is_dir():
        raise TwofoldError(f"There is no file or folder {path}: check the option path.")
    names = [file.relative_to(path).as_posix() for file in path.rglob(pattern) if file.is_file()]
    for name in sorted(names, key=place):
        if not any(part.startswith(".") for part in Path(name).parts):
            for document in _documents_of(path / name, name, fields):
                if b"\0" not in document.content[:8192]:
                    yield document


def hub_documents(dataset: str, configuration: str, split: str, fields: tuple[str, ...]) -> Iterator[Document]:
    """The rows of one split of a data set of the hub. Raises TwofoldError where it or a field of it cannot be had."""
    table = hub_split(dataset, configuration, split)
    where = f"{dataset}, split {split},"
    require_columns(fields, table.column_names, where)
    yield from _rows(table.select_columns(list(fields)).iter(ROWS_PER_READ), where, fields)


def _documents_of(path: Path, name: str, fields: tuple[str, ...]) -> Iterator[Document]:
    stem = name.removesuffix(".gz")
    if stem.endswith((".jsonl", ".ndjson")):
        yield from _json_lines(path, name, fields)
    elif name.endswith(".parquet"):
        with opened_parquet(path) as file:
            require_columns(fields, file.schema_arrow.names, str(path))
            yield from _rows(file.iter_batches(ROWS_PER_READ, columns=list(fields)), str(path), fields, name)
    else:
        with _reading(path):
            content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        yield Document(name, content)


def _json_lines(path: Path, name: str, fields: tuple[str, ...]) -> Iterator[Document]:
    with _reading(path), gzip.open(path) if name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number},"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TwofoldError(f"{where} is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise TwofoldError(
                    f"{where} is JSON but not an object: every line must be one, with the text in a field."
                )
            for field in fields:
                if field not in row:
                    raise TwofoldError(
                        f"{where} has no field {field!r}; its fields are {', '.join(row)}: set the option field."
                    )
            yield Document(f"{name}:{number}", _joined([row[field] for field in fields], where, fields))


def _rows(batches: Iterable[Any], where: str, fields: tuple[str, ...], name: str = "row") -> Iterator[Document]:
    number = 0
    for batch in batches:
        for values in zip(*(batch.column(field).to_pylist() for field in fields), strict=True):
            yield Document(f"{name}:{number}", _joined(values, f"{where} row {number},", fields))
            number += 1


def _joined(values: Iterable[Any], where: str, fields: tuple[str, ...]) -> bytes:
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str):
            raise TwofoldError(f"{where} holds {type(value).__name__} in the field {field!r}, where text is wanted.")
    return "\n".join(values).encode("utf-8", "surrogatepass")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise TwofoldError(f"{path} is not a whole gzip file: fetch it again.") from None
    except OSError as error:
        raise TwofoldError(f"{path} cannot be read: {error.strerror or error}.") from None


# Dividing


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Both parts as streams: a zero byte, and behind every document another. Counts are of documents; ``is_cut``: both are of one."""

    train: bytes
    held_out: bytes
    train_documents: int
    held_out_documents: int
    is_cut: bool


class _Stream:
    """Documents up to ``limit`` bytes (0: all of them). Two are always kept, so that one can be given to the other part."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size, self.documents = limit, 0, list[Document]()

    @property
    def is_full(self) -> bool:
        return 0 < self.limit <= self.size

    def add(self, document: Document) -> None:
        if not self.is_full or len(self.documents) < 2:
            self.documents.append(document)
            self.size += len(document.content) + 1

    def joined(self) -> tuple[bytes, int]:
        """The stream, cut behind ``limit`` bytes and the leading zero, and how many documents are in it."""
        kept, size = [], 0
        for document in self.documents:
            if 0 < self.limit <= size:
                break
            kept.append(document.content)
            size += len(document.content) + 1
        whole = SEPARATOR.join([b"", *kept, b""])
        return whole[: self.limit + 1] if self.limit else whole, len(kept)


def divide(
    documents: Iterable[Document], *, fraction: float, train_bytes: int, held_out_bytes: int, source: str
) -> Corpus:
    """Hold out the documents whose place is below ``fraction``, or one at least; no part is longer than its bytes (0: no limit).

    Reads no further than both parts are full. Raises TwofoldError for a corpus without text.
    """
    train, held_out = _Stream(train_bytes), _Stream(held_out_bytes)
    seen = set[bytes]()
    for document in documents:
        digest = hashlib.sha256(document.content).digest()
        if document.content and digest not in seen:
            seen.add(digest)
            (held_out if document.place < fraction else train).add(document)
        if train.is_full and held_out.is_full:
            break
    if not seen:
        raise TwofoldError(f"{source} holds no text: every document is empty, or there is none.")
    is_cut = len(seen) == 1
    if is_cut:
        only = (train.documents + held_out.documents)[0]
        train.documents, held_out.documents = _cut(only, fraction, source)
    elif not held_out.documents:
        _give(train, held_out, min(train.documents, key=lambda document: document.place))
    elif not train.documents:
        _give(held_out, train, max(held_out.documents, key=lambda document: document.place))
    (train_stream, num_train), (held_out_stream, num_held_out) = train.joined(), held_out.joined()
    return Corpus(
        train=train_stream, held_out=held_out_stream, train_documents=num_train, held_out_documents=num_held_out, is_cut=is_cut
    )  # fmt: skip


def _give(giver: _Stream, taker: _Stream, document: Document) -> None:
    giver.documents.remove(document)
    taker.documents.append(document)


def _cut(document: Document, fraction: float, source: str) -> tuple[list[Document], list[Document]]:
    """The document's beginning, and its last ``fraction``: between two lines where there are some."""
    content = document.content
    if len(content) < 2:
        raise TwofoldError(f"{source} is too short: a text of {len(content)} byte has no end to hold out.")
    middle = min(max(int(len(content) * (1 - fraction)), 1), len(content) - 1)
    middle = content.rfind(b"\n", 0, middle) + 1 or middle
    return [Document(document.name, content[:middle])], [Document(f"{document.name}, its end", content[middle:])]
