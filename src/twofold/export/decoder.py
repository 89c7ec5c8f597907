"""An exported decoder, run by onnxruntime: the cache between steps, and generation on top of it.

Shapes: B batch, T new tokens, S all tokens so far, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twofold.errors import TwofoldError
from twofold.export.files import model_path, read_config, read_max_tokens
from twofold.export.libraries import onnx_library
from twofold.export.sampling import Sampling
from twofold.export.tensors import ATTENTION_MASK, INPUT_IDS, LOGITS, cached_tensors

Ids = npt.NDArray[np.int64]
PREFILL_TOKENS = 512
"""Of a prompt, as many tokens at a time: a step gives logits for all of its tokens, and holds weights from each of them to all before it."""
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDecoder:
    """The model of a folder that :func:`~twofold.export.export_onnx` wrote.

    Calling it continues the text that it holds, as a Transformers model with a cache does; :meth:`reset` begins a new one. ``threads`` 0 leaves
    their number to onnxruntime, ``providers`` are onnxruntime's (``CUDAExecutionProvider`` ...), tried in order.

    Raises TwofoldError where the folder holds no whole exported model, and where onnxruntime is not installed.
    """

    def __init__(
        self, folder: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        self._runtime = onnx_library("onnxruntime", "run an exported model")
        path = model_path(Path(folder))
        self.config = read_config(path.parent)
        self.spec = self.config.spec
        self.max_tokens = read_max_tokens(path.parent)
        self._tensors = [tensor for layer in cached_tensors(self.spec) for tensor in layer]
        self._session = self._open(path, threads, providers)
        self.reset()

    def _open(self, path: Path, threads: int, providers: Sequence[str]) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        try:
            session = self._runtime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # noqa: BLE001 (onnxruntime's own exceptions share no ancestor)
            reason = str(error).splitlines()[0]
            raise TwofoldError(
                f"{path} cannot be run ({reason}): it is damaged or was moved without its weights, export it again."
            ) from None
        self._types = {value.name: FLOATS.get(value.type) for value in session.get_inputs()}
        wanted = [INPUT_IDS, ATTENTION_MASK, *(tensor.input for tensor in self._tensors)]
        if list(self._types) != wanted:
            raise TwofoldError(f"{path} and the config.json beside it do not belong together: export the model again.")
        return session

    def reset(self) -> None:
        """Forget the text."""
        self._mask: Ids = np.zeros((0, 0), dtype=np.int64)
        self._past: dict[str, Any] = {}

    @property
    def tokens_seen(self) -> int:
        """Tokens of the text so far, padding included."""
        return int(self._mask.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tensors; equals ``cost.cache_bytes``."""
        return sum(value.tensor_size_in_bytes() for value in self._past.values())

    def __call__(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> npt.NDArray[Any]:
        """The next tokens [B, T] of each text -> logits [B, T, N] in float32.

        ``attention_mask`` [B, S] is 0 where a token of the text is padding; left out, the new tokens are not. Raises TwofoldError, and holds what it
        held, for tokens and shapes that do not fit.
        """
        tokens = self._checked_tokens(input_ids)
        mask = self._checked_mask(attention_mask, tokens.shape)
        value_of = self._runtime.OrtValue.ortvalue_from_numpy
        feed = {INPUT_IDS: value_of(tokens), ATTENTION_MASK: value_of(mask)}
        feed |= self._past or {name: value_of(empty) for name, empty in self._nothing(len(tokens)).items()}
        names = [LOGITS, *(tensor.output for tensor in self._tensors)]
        logits, *present = self._session.run_with_ort_values(names, feed)
        self._past = {tensor.input: value for tensor, value in zip(self._tensors, present, strict=True)}
        self._mask = mask
        return np.asarray(logits.numpy(), dtype=np.float32)

    def generate(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> Ids:
        """Prompts [B, T] -> prompts and what follows, [B, T + n] with n <= ``max_new_tokens``, as Transformers' ``generate``.

        It begins a new text, and stops where every text has ended with the configuration's ``eos_token_id``; the rest of a text that has ended
        earlier is padding. Prompts of different lengths are padded on the left. Raises TwofoldError for what :meth:`stream` refuses.
        """
        steps = list(self.stream(input_ids, attention_mask, max_new_tokens=max_new_tokens, sampling=sampling))
        return np.concatenate(
            [self._checked_tokens(input_ids, begins=True), *(step[:, None] for step in steps)], axis=1
        )

    def stream(
        self,
        input_ids: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> Iterator[Ids]:
        """:meth:`generate`, the next token [B] of every text as soon as it is known.

        Raises TwofoldError for prompts that are padded on the right, for tokens and shapes that do not fit, and for a text beyond ``max_tokens``.
        """
        tokens = self._checked_tokens(input_ids, begins=True)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape == tokens.shape and not mask[:, -1].all():
            raise TwofoldError("A prompt ends with padding, after which nothing can follow: pad prompts on the left.")
        if max_new_tokens < 0 or tokens.shape[1] + max_new_tokens > self.max_tokens:
            raise TwofoldError(
                f"{max_new_tokens} tokens cannot follow a prompt of {tokens.shape[1]}: "
                f"this file was exported for texts of up to {self.max_tokens} tokens."
            )
        self.reset()
        return self._steps(tokens, mask, max_new_tokens, sampling or Sampling())

    def _steps(self, tokens: Ids, mask: npt.NDArray[Any], count: int, sampling: Sampling) -> Iterator[Ids]:
        generator, ended = sampling.generator(), np.zeros(len(tokens), dtype=bool)
        ends = np.atleast_1d([] if self.config.eos_token_id is None else self.config.eos_token_id)
        padding = self.config.pad_token_id if self.config.pad_token_id is not None else (ends[0] if ends.size else 0)
        for _ in range(count):
            for start in range(0, tokens.shape[1], PREFILL_TOKENS):
                part = tokens[:, start : start + PREFILL_TOKENS]
                logits = self(part, None if self.tokens_seen >= mask.shape[1] else mask[:, : start + part.shape[1]])
            chosen = np.where(ended, padding, sampling.choose(logits[:, -1], generator)).astype(np.int64)
            yield chosen
            ended |= np.isin(chosen, ends)
            if ended.all():
                return
            tokens = chosen[:, None]

    def _nothing(self, batch: int) -> dict[str, npt.NDArray[Any]]:
        """The cached tensors before the first token."""
        return {
            tensor.input: np.zeros((batch, tensor.heads, 0, tensor.dim), dtype=self._types[tensor.input])
            for tensor in self._tensors
        }

    def _checked_tokens(self, input_ids: npt.ArrayLike, *, begins: bool = False) -> Ids:
        tokens = np.asarray(input_ids)
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise TwofoldError(
                f"input_ids are {tokens.dtype} of the shape {tokens.shape}, but must be whole numbers (batch, tokens), at least one."
            )
        if tokens.min() < 0 or tokens.max() >= self.spec.vocab_size:
            raise TwofoldError(
                f"input_ids hold {tokens.max()} (least {tokens.min()}), but the vocabulary ends at {self.spec.vocab_size - 1}."
            )
        if not begins and self._past and len(tokens) != len(self._mask):
            raise TwofoldError(
                f"The text so far has a batch of {len(self._mask)}, and the new tokens one of {len(tokens)}: call reset() to begin a new one."
            )
        return tokens.astype(np.int64)

    def _checked_mask(self, attention_mask: npt.ArrayLike | None, shape: tuple[int, ...]) -> Ids:
        wanted = (shape[0], self.tokens_seen + shape[1])
        if attention_mask is None:
            held = self._mask if self._past else self._mask.reshape(shape[0], 0)
            mask = np.concatenate([held, np.ones(shape, dtype=np.int64)], axis=1)
        else:
            mask = np.asarray(attention_mask).astype(np.int64)
        if mask.shape != wanted:
            raise TwofoldError(
                f"attention_mask has the shape {mask.shape}, but must be (batch, tokens, those held included) = {wanted}."
            )
        if wanted[1] > self.max_tokens:
            raise TwofoldError(
                f"The text would have {wanted[1]} tokens, but this file was exported for up to {self.max_tokens}: export it with a larger max_tokens."
            )
        return mask
