"""Tables that others made: parquet files of this machine, and data sets of the hub, both read as Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError
from twofold.tasks.extras import data_library


@contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``. Raises TwofoldError, also for what is found out while it is read."""
    parquet = data_library("pyarrow.parquet", "read parquet files")
    arrow = data_library("pyarrow", "read parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (arrow.ArrowException, EOFError) as error:
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise TwofoldError(f"{path} is not a whole parquet file ({first_line}): fetch it again.") from None
    except OSError as error:
        raise TwofoldError(f"{path} cannot be read: {error.strerror or error}.") from None


def parquet_table(paths: Sequence[Path], columns: Sequence[str]) -> Any:
    """The columns of all files together, a ``pyarrow.Table``. Raises TwofoldError for a file that is broken or lacks a column."""
    tables = []
    for path in paths:
        with opened_parquet(path) as file:
            require_columns(columns, file.schema_arrow.names, str(path))
            tables.append(file.read(columns=list(columns)))
    return data_library("pyarrow", "read parquet files").concat_tables(tables)


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns."""
    with opened_parquet(path) as file:
        return list(file.schema_arrow.names)


def hub_splits(name: str, configuration: str) -> dict[str, Any]:
    """Split -> ``datasets.Dataset`` that gives Arrow tables. Raises TwofoldError for a data set that cannot be had."""
    return {split: table.with_format("arrow") for split, table in _load(name, configuration, None).items()}


def hub_split(name: str, configuration: str, split: str) -> Any:
    """One split, a ``datasets.Dataset`` that gives Arrow tables. Raises TwofoldError for a data set or split that cannot be had."""
    return _load(name, configuration, split).with_format("arrow")


def _load(name: str, configuration: str, split: str | None) -> Any:
    datasets = data_library("datasets", "read data sets of the hub")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise TwofoldError(
            f"The data set {name!r} cannot be loaded ({reason}): check its name, configuration and split, and the network, or give the path of a copy."
        ) from None


def require_columns(wanted: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise TwofoldError for the first wanted column that is not among a table's."""
    for column in wanted:
        if column not in names:
            raise TwofoldError(f"{where} has no column {column!r}; its columns are {', '.join(names)}.")
