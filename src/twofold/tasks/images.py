"""Labelled images of the hub (MNIST, Fashion-MNIST, CIFAR-10 and -100, Tiny ImageNet, any other), or a folder of parquet files like them.

Nothing is said of a data set in code but its name: splits, columns, size, channels and the number of labels are found in the data.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twofold.errors import TwofoldError
from twofold.tasks.extras import data_library
from twofold.tasks.options import Options
from twofold.tasks.pixels import Pictures, PixelTask
from twofold.tasks.tables import hub_splits, parquet_columns, parquet_table, require_columns
from twofold.tasks.task import TaskKind, generator

HUB_NAMES: Mapping[str, str] = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar-10": "uoft-cs/cifar10",
    "cifar-100": "uoft-cs/cifar100",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
HELD_OUT_SPLITS = ("test", "validation", "valid", "val")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Where images come from: ``dataset`` (a short name of :data:`HUB_NAMES`, or a name of the hub) or ``path`` (a folder of parquet files).

    A file belongs to the split that its name, or its folder's, begins with: ``train.parquet``, ``data/test-00000-of-00001.parquet``.
    Empty columns and an empty ``held_out_split`` mean the first of the usual names that is there. 0 means: as the first image is
    (``image_size``, ``num_channels``), all there are (``train_size``, ``held_out_size``). Images of another shape are scaled to the square.
    ``data_seed`` draws which images are used where not all are.
    """

    dataset: str = ""
    configuration: str = ""
    path: str = ""
    train_split: str = "train"
    held_out_split: str = ""
    image_column: str = ""
    label_column: str = ""
    image_size: int = 0
    num_channels: int = 0
    patch_size: int = 4
    train_size: int = 0
    held_out_size: int = 0
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.dataset) == bool(self.path):
            raise TwofoldError(
                f"Give exactly one of the options path and dataset; known data sets are {', '.join(HUB_NAMES)}."
            )
        self.require_at_least(0, "image_size", "train_size", "held_out_size")
        self.require_at_least(1, "patch_size")
        self.require("num_channels", self.num_channels in (0, 1, 3), "1 (grey), 3 (colours) or 0 (as the images are)")
        self.require_seed()

    @property
    def source(self) -> str:
        """What is read, as a reader of the report should see it."""
        return self.dataset or self.path


@dataclass(frozen=True, kw_only=True)
class _Split:
    """The columns of one split: encoded images (a ``pyarrow`` column) and whole labels."""

    name: str
    images: Any
    labels: np.ndarray


def _load(options: ImageOptions) -> PixelTask:
    train, held_out = _splits(options)
    num_labels = int(max(train.labels.max(), held_out.labels.max())) + 1
    shape = _shape(options, train)
    pictures = {
        "train": _decoded(
            train, _chosen(options, "train", options.train_size, len(train.labels)), shape, options.source
        ),
        "held_out": _decoded(
            held_out, _chosen(options, "held_out", options.held_out_size, len(held_out.labels)), shape, options.source
        ),
    }
    sizes = {part: f"{len(chosen.labels):,}" for part, chosen in pictures.items()}
    return PixelTask(
        name="images",
        **pictures,
        num_labels=num_labels,
        patch_size=options.patch_size,
        description=f"Images of {options.source}, {shape[1]} × {shape[1]} pixels, {shape[0]} channel{'s' if shape[0] > 1 else ''}, "
        f"{num_labels} labels: {sizes['train']} of {train.name} for training, {sizes['held_out']} of {held_out.name} held out.",
    )


def _splits(options: ImageOptions) -> tuple[_Split, _Split]:
    """The training and the held-out split. Raises TwofoldError for a split or column that is not there."""
    if options.path:
        files = _files_by_split(Path(options.path))
        names, columns = list(files), {split: parquet_columns(paths[0]) for split, paths in files.items()}
    else:
        tables = hub_splits(HUB_NAMES.get(options.dataset, options.dataset), options.configuration)
        names, columns = list(tables), {split: list(table.column_names) for split, table in tables.items()}
    train_name = _first((options.train_split,), names, f"{options.source} has no split", "train_split")
    wanted = (options.held_out_split,) if options.held_out_split else HELD_OUT_SPLITS
    held_out_name = _first(wanted, names, f"{options.source} has no split", "held_out_split")
    if train_name == held_out_name:
        raise TwofoldError(
            f"Task images: {train_name} is both the training and the held-out split: change held_out_split."
        )

    def split(name: str) -> _Split:
        where = f"{options.source}, split {name},"
        found = [
            _first((given,) if given else usual, columns[name], f"{where} has no column", option)
            for given, usual, option in (
                (options.image_column, IMAGE_COLUMNS, "image_column"),
                (options.label_column, LABEL_COLUMNS, "label_column"),
            )
        ]
        table = parquet_table(files[name], found) if options.path else tables[name].select_columns(found)[:]
        require_columns(found, table.column_names, where)
        return _Split(name=name, images=table.column(found[0]), labels=_labels(table.column(found[1]), where))

    return split(train_name), split(held_out_name)


def _first(wanted: Sequence[str], names: Sequence[str], sentence: str, option: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise TwofoldError(
        f"{sentence} {' or '.join(map(repr, wanted))}; there is {', '.join(names)}: set the option {option}."
    )


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise TwofoldError(f"There is no folder {folder}: give the folder that holds train.parquet and test.parquet.")
    files: dict[str, list[Path]] = {}
    known = {"train", *HELD_OUT_SPLITS}
    for path in sorted(folder.rglob("*.parquet")):
        words = [re.split(r"[^A-Za-z]", name)[0] for name in (path.stem, path.parent.name)]
        split = next((word for word in words if word in known), words[0])
        files.setdefault(split, []).append(path)
    if not files:
        raise TwofoldError(
            f"{folder} holds no parquet file: give the folder that holds train.parquet and test.parquet."
        )
    return files


def _labels(column: Any, where: str) -> np.ndarray:
    values = column.to_pylist()
    if not values:
        raise TwofoldError(f"{where} holds no image.")
    for row, value in enumerate(values):
        if type(value) is not int or value < 0:
            raise TwofoldError(f"{where} row {row} is labelled {value!r}, but a label must be a whole number from 0.")
    return np.array(values, dtype=np.int64)


def _chosen(options: ImageOptions, part: str, size: int, available: int) -> np.ndarray:
    if size > available:
        raise TwofoldError(
            f"Task images: {part}_size is {size}, but {options.source} has {available} images there: lower it, or use 0 for all."
        )
    order = generator(options.data_seed, part).permutation(available)
    return np.sort(order[:size]) if size else np.arange(available)


def _shape(options: ImageOptions, split: _Split) -> tuple[int, int]:
    """Channels and size of all images."""
    first = _opened(split.images[0].as_py(), f"{options.source}, split {split.name}, row 0")
    return options.num_channels or (1 if first.mode[0] in "1LIF" else 3), options.image_size or first.size[0]


def _decoded(split: _Split, rows: np.ndarray, shape: tuple[int, int], source: str) -> Pictures:
    """Pixels of those rows, every image scaled to ``shape`` (channels, size)."""
    num_channels, size = shape
    bilinear = data_library("PIL.Image", "decode images").Resampling.BILINEAR
    pixels = np.empty((len(rows), size, size, num_channels), dtype=np.uint8)
    for place, (row, encoded) in enumerate(zip(rows, split.images.take(rows).to_pylist(), strict=True)):
        image = _opened(encoded, f"{source}, split {split.name}, row {row}").convert(
            "L" if num_channels == 1 else "RGB"
        )
        image = image if image.size == (size, size) else image.resize((size, size), bilinear)
        pixels[place] = np.asarray(image).reshape(size, size, num_channels)
    return Pictures(pixels=np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels=split.labels[rows])


def _opened(encoded: Any, where: str) -> Any:
    """The image in a cell: its file's bytes, or the struct around them that ``datasets`` writes."""
    images = data_library("PIL.Image", "decode images")
    content = encoded.get("bytes") if isinstance(encoded, Mapping) else encoded
    if not isinstance(content, bytes):
        raise TwofoldError(f"{where}: the cell holds no image file's bytes.")
    try:
        image = images.open(io.BytesIO(content))
        image.load()
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, images.DecompressionBombError):
        raise TwofoldError(f"{where}: this is not an image that can be decoded; mend or leave out the row.") from None
    return image


KINDS = (
    TaskKind(
        name="images",
        summary="labelled images of the hub (mnist, fashion-mnist, cifar-10, cifar-100, tiny-imagenet, ...) or of a folder of parquet files",
        options=ImageOptions,
        load=_load,
    ),
)
