"""Text as bytes: the source of Python's standard library, any file or folder, or a data set of the hub.

Documents are packed one behind another with a zero byte between them, and the stream is read in chunks of C bytes, each beginning
with the last byte of the one before: stride C - 1. So every byte but the stream's leading zero is predicted exactly once, and nothing is padded.
Held-out bytes make a shorter last chunk; training leaves the rest of its stream out.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.tasks.buckets import buckets, ranges_in, sums
from twofold.tasks.corpus import Corpus, Document, divide, hub_documents, local_documents, standard_library
from twofold.tasks.options import Options
from twofold.tasks.task import Batch, Task, TaskKind, data_hash

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """What is read, ``context`` (C), and how much of it is held out.

    ``path`` is a text, .gz, .jsonl or .parquet file, or a folder of them, whose files match ``pattern``; ``dataset`` is a name of the hub, with
    ``configuration`` and ``split``. Where both are empty, it is the standard library of the Python that runs. ``field`` names the field or
    column that holds the text, or several, ``question,answer``, to be joined by a line break. ``held_out_fraction`` of the documents is
    held out; ``max_bytes`` and ``held_out_bytes`` limit the two parts (0: no limit). ``by_position`` adds the bits per byte of the bytes that
    are predicted from so many before them: ``bits_per_byte@16-31``, and so on in powers of two.
    """

    path: str = ""
    pattern: str = "*"
    dataset: str = ""
    configuration: str = ""
    split: str = "train"
    field: str = "text"
    context: int = 256
    max_bytes: int = 0
    held_out_bytes: int = 262_144
    held_out_fraction: float = 0.05
    by_position: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path and self.dataset:
            raise TwofoldError("Give at most one of the options path and dataset.")
        self.require(
            "pattern", bool(self.pattern) and not self.pattern.startswith("/"), "a pattern of file names, such as *.txt"
        )
        self.require("field", all(self.fields), "the name of a field, or several with commas between them")
        self.require_at_least(2, "context")
        self.require_at_least(0, "max_bytes", "held_out_bytes")
        self.require("held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1")

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in ``field``."""
        return tuple(name.strip() for name in self.field.split(","))

    @property
    def source(self) -> str:
        """What is read, as a reader of the report should see it."""
        if self.dataset:
            return f"the data set {self.dataset}" + (f" ({self.configuration})" if self.configuration else "")
        return self.path or f"the source of Python {platform.python_version()}'s standard library"

    def documents(self) -> Iterator[Document]:
        """What is read, document by document."""
        if self.dataset:
            return hub_documents(self.dataset, self.configuration, self.split, self.fields)
        if self.path:
            return local_documents(Path(self.path), pattern=self.pattern, fields=self.fields)
        return standard_library()


class TextTask(Task):
    """The next byte. ``loss`` is in nats per byte, ``bits_per_byte`` and ``perplexity`` (of a byte) are the same number in other units."""

    loss_metric: ClassVar[str] = "bits_per_byte"
    score: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, options: TextOptions) -> None:
        corpus = divide(
            options.documents(),
            fraction=options.held_out_fraction,
            train_bytes=options.max_bytes,
            held_out_bytes=options.held_out_bytes,
            source=options.source,
        )
        self._context, self._stride = options.context, options.context - 1
        self._buckets = buckets(1, self._stride) if options.by_position else []
        self._train = torch.frombuffer(bytearray(corpus.train), dtype=torch.uint8)
        self._held_out = torch.frombuffer(bytearray(corpus.held_out), dtype=torch.uint8)
        if len(self._train) < options.context:
            raise TwofoldError(
                f"{options.source} is too short: its training part has {len(self._train):,} bytes, and a chunk has {options.context:,}: lower context."
            )
        super().__init__(
            name="text",
            description=_description(options, corpus),
            train_size=(len(self._train) - 1) // self._stride,
            held_out_size=math.ceil((len(self._held_out) - 1) / self._stride),
            tokens_per_example=options.context,
            data_hash=data_hash(train={"bytes": self._train}, held_out={"bytes": self._held_out}),
            model_fields={"architecture": "causal_lm", "vocab_size": VOCABULARY, "causal": True},
        )

    def train_batch(self, indices: Tensor) -> Batch:
        """Chunks ``indices`` of the training stream, int64 [B, context]; the labels are the bytes themselves."""
        return self._batch(self._train, indices)

    def held_out_batches(self, batch_size: int) -> Iterator[Batch]:
        """Whole chunks, then by itself the shorter one at the end, if there is one."""
        num_whole = (len(self._held_out) - 1) // self._stride
        for indices in torch.arange(num_whole).split(batch_size) if num_whole else ():
            yield self._batch(self._held_out, indices)
        if num_whole < self.held_out_size:
            rest = self._held_out[num_whole * self._stride :].long().unsqueeze(0)
            yield {"input_ids": rest, "labels": rest.clone()}

    def _batch(self, stream: Tensor, indices: Tensor) -> Batch:
        chunks = stream[indices[:, None] * self._stride + torch.arange(self._context)].long()
        return {"input_ids": chunks, "labels": chunks.clone()}

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task; where asked for, also the losses and counts of the bytes that are predicted from so many before them."""
        found = super().measure(logits, batch)
        if self._buckets:
            losses = self.losses(logits, batch)
            seen = torch.arange(1, losses.shape[1] + 1, device=losses.device)
            found |= sums(seen, {"loss": losses, "count": torch.ones_like(losses)}, self._buckets)
        return found

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Per byte, the zero that ends a document counted as one."""
        loss = totals["loss"] / totals["count"]
        found = {"loss": loss, "bits_per_byte": loss / math.log(2), "perplexity": math.exp(min(loss, 700.0))}
        for place, count in ranges_in(totals, "count"):
            if count:
                found[f"bits_per_byte@{place}"] = totals[f"loss@{place}"] / count / math.log(2)
        return found


def _description(options: TextOptions, corpus: Corpus) -> str:
    train, held_out = f"{len(corpus.train) - 1:,} bytes", f"{len(corpus.held_out) - 1:,} bytes"
    if corpus.is_cut:
        return f"Bytes of {options.source}: {train} for training, {held_out} from the end of the text held out."
    return (
        f"Bytes of {options.source}: {train} of {_documents(corpus.train_documents)} for training, {held_out} of "
        f"{_documents(corpus.held_out_documents)} held out, a zero byte behind each; no document in both."
    )


def _documents(number: int) -> str:
    return f"{number:,} document{'' if number == 1 else 's'}"


KINDS = (
    TaskKind(
        name="text",
        summary="the next byte of a text: Python's standard library, a file, a folder, or a data set of the hub",
        options=TextOptions,
        load=TextTask,
    ),
)
