"""Which item of a set is the odd one: all but one are of one class, over features that stay as they are.

The model reads a set (no positions) and gives each item two logits, "as the others" and "odd"; its own loss is trained, item by item.
The score is that of the paper: in how many sets the item whose logits lean most to "odd" is the odd one.
Source: paper, section on vision (10 items over frozen ResNet-34 features of CIFAR-100; features of any network can be given as a file).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.tasks.digits import handwritten_digits
from twofold.tasks.options import Options
from twofold.tasks.tables import parquet_table
from twofold.tasks.task import Batch, Part, TableTask, TaskKind, data_hash, generator

NUM_FILTERS = 16
ODD = 1


@dataclass(frozen=True, kw_only=True)
class AnomalyOptions(Options):
    """``path``: a .npz, .safetensors or .parquet file with ``features`` (a row of floats per item) and whole ``labels``.

    Empty: features of scikit-learn's digits. ``held_out_fraction`` of every class's items appear in held-out sets and in no other.
    """

    path: str = ""
    set_size: int = 10
    train_size: int = 10_000
    held_out_size: int = 2_000
    held_out_fraction: float = 0.2
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(3, "set_size")
        self.require_at_least(1, "train_size", "held_out_size")
        self.require("held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1")
        self.require_seed()


class AnomalyTask(TableTask):
    """Sets are rows of item numbers; the features of all items are one table, normalised by the training items."""

    def __init__(self, options: AnomalyOptions) -> None:
        features, labels = _features(options.path) if options.path else digit_features()
        pools = _pools(options, labels)
        train = _sets(options, "train", options.train_size, pools["train"])
        held_out = _sets(options, "held_out", options.held_out_size, pools["held_out"])
        source = options.path or "random convolutions of scikit-learn's digits"
        super().__init__(
            name="anomaly",
            train=train,
            held_out=held_out,
            description=f"The odd one of {options.set_size} items, the others of one class, over {features.shape[1]} frozen features ({source}): "
            f"{options.train_size:,} sets for training, {options.held_out_size:,} of other items held out.",
            tokens_per_example=options.set_size,
            data_hash=data_hash(train=train, held_out=held_out, items={"features": torch.from_numpy(features)}),
            model_fields={
                "architecture": "token_classification",
                "feature_size": features.shape[1],
                "num_labels": 2,
                "causal": False,
                "positions": {"kind": "none"},
            },
        )
        known = features[np.concatenate(pools["train"])].astype(np.float64)
        deviation = known.std(axis=0)
        scaled = (features - known.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        self._features = torch.from_numpy(scaled.astype(np.float32))

    def batch(self, part: Part, rows: Tensor) -> Batch:
        """``features`` float32 [B, set_size, F], and ``labels`` that are 1 at the odd item and 0 elsewhere."""
        return {"features": self._features[part["items"][rows].long()], "labels": part["labels"][rows].long()}

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task, and how many sets there are and in how many the odd item was picked."""
        leaning = logits[..., ODD].double() - logits[..., 1 - ODD].double()
        picked = batch["labels"].to(logits.device).gather(1, leaning.argmax(dim=1, keepdim=True)) == ODD
        sets = torch.tensor(float(len(picked)), dtype=torch.float64, device=logits.device)
        return super().measure(logits, batch) | {"picked": picked.double().sum(), "sets": sets}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """``loss`` per item, ``accuracy`` per set."""
        return {"loss": totals["loss"] / totals["count"], "accuracy": totals["picked"] / totals["sets"]}


def digit_features() -> tuple[np.ndarray, np.ndarray]:
    """float32 [1797, 64] and labels: 16 random 3 × 3 filters of ±1, ReLU, summed over the four quarters of the image.

    All of it is exact in whole numbers, so the features have the same bytes on every machine.
    """
    pictures = handwritten_digits()
    filters = 2 * generator(0, "filters").randint(0, 2, size=(NUM_FILTERS, 3, 3)) - 1
    windows = np.lib.stride_tricks.sliding_window_view(pictures.pixels[:, 0].astype(np.int64), (3, 3), axis=(1, 2))  # type: ignore[call-overload]
    maps = np.maximum(np.einsum("nyxij,fij->nfyx", windows, filters), 0)
    quarters = maps.reshape(len(maps), NUM_FILTERS, 2, 3, 2, 3).sum(axis=(3, 5))
    return quarters.reshape(len(maps), -1).astype(np.float32), pictures.labels


def _features(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, F] and labels int64 [N] from a file. Raises TwofoldError for one that is broken or does not fit."""
    path = Path(name)
    if not path.is_file():
        raise TwofoldError(
            f"There is no file {path}: give a .npz, .safetensors or .parquet file of features and labels."
        )
    try:
        arrays = _arrays(path)
        features, labels = np.asarray(arrays["features"], dtype=np.float32), np.asarray(arrays["labels"])
    except KeyError as error:
        raise TwofoldError(f"{path} holds no array {error}: it must hold features and labels.") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, SafetensorError) as error:
        raise TwofoldError(
            f"{path} cannot be read as features and labels: {' '.join(str(error).split()).partition('. ')[0].rstrip('.')}."
        ) from None
    if features.ndim != 2 or labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise TwofoldError(
            f"{path} holds features {features.shape} and {labels.dtype} labels {labels.shape}, but must hold features (items, F) and whole labels (items,)."
        )
    if not np.isfinite(features).all():
        raise TwofoldError(f"{path} holds features that are not finite numbers.")
    return np.ascontiguousarray(features), labels.astype(np.int64)


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    if path.suffix == ".npz":
        # Opened here, because NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".parquet":
        table = parquet_table([path], ("features", "labels"))
        return {name: np.array(table.column(name).to_pylist()) for name in ("features", "labels")}
    raise TwofoldError(
        f"{path} ends in {path.suffix!r}, but features are read from .npz, .safetensors and .parquet files."
    )


def _pools(options: AnomalyOptions, labels: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Part -> class -> items. Raises TwofoldError where there are too few classes, or too few items of one."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise TwofoldError(f"Task anomaly: all items are of one class; {options.path} must hold at least two.")
    draws = generator(options.data_seed, "items")
    pools: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    for label in classes:
        items = draws.permutation(np.flatnonzero(labels == label))
        num_held_out = round(len(items) * options.held_out_fraction)
        for part, pool in (("held_out", items[:num_held_out]), ("train", items[num_held_out:])):
            if len(pool) < options.set_size - 1:
                raise TwofoldError(
                    f"Task anomaly: class {label} has {len(pool)} {part.replace('_', '-')} items, but a set of {options.set_size} takes "
                    f"{options.set_size - 1} of one class: change set_size or held_out_fraction."
                )
            pools[part].append(pool)
    return pools


def _sets(options: AnomalyOptions, part: str, size: int, pools: list[np.ndarray]) -> dict[str, Tensor]:
    """``items`` int32 [size, set_size], all different in a set, and ``labels`` uint8 that are 1 at the odd one."""
    draws = generator(options.data_seed, part)
    usual = draws.randint(0, len(pools), size=size)
    odd = (usual + draws.randint(1, len(pools), size=size)) % len(pools)
    others = np.empty((size, options.set_size - 1), dtype=np.int32)
    for number, pool in enumerate(pools):
        of_class = np.flatnonzero(usual == number)
        order = draws.random_sample((len(of_class), len(pool))).argsort(axis=1, kind="stable")
        others[of_class] = pool[order[:, : options.set_size - 1]]
    shares = draws.random_sample(size)
    odd_items = [pools[number][int(share * len(pools[number]))] for number, share in zip(odd, shares, strict=True)]
    is_odd = np.zeros((size, options.set_size), dtype=bool)
    is_odd[np.arange(size), draws.randint(0, options.set_size, size=size)] = True
    items = np.empty((size, options.set_size), dtype=np.int32)
    items[is_odd], items[~is_odd] = odd_items, others.ravel()
    return {"items": torch.from_numpy(items), "labels": torch.from_numpy(is_odd.astype(np.uint8))}


KINDS = (
    TaskKind(
        name="anomaly",
        summary="the odd one of ten items, nine of one class, over frozen features",
        options=AnomalyOptions,
        load=AnomalyTask,
    ),
)
