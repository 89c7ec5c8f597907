"""The language model: GPT-2-like or Llama-like by its configuration, with a cache that holds what the tie needs and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from twofold.cache import TiedCache
from twofold.errors import TwofoldError
from twofold.models.blocks import Trunk
from twofold.models.cache_choice import cache_spec_of
from twofold.models.configuration import TwofoldConfig
from twofold.models.embedding import InputEmbedding
from twofold.models.loss import mean_cross_entropy
from twofold.models.pretrained import TwofoldPreTrainedModel
from twofold.models.sequence import Sequence, documents_of

CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Transformers renames ``past_key_values`` to ``cache``; this is the name that the installed one uses itself."""


class TwofoldForCausalLM(TwofoldPreTrainedModel, GenerationMixin):
    """Predicts the next token.

    >>> from twofold.models import TwofoldConfig, TwofoldForCausalLM
    >>> model = TwofoldForCausalLM(TwofoldConfig(tie="(Q, K=V)", vocab_size=11, hidden_size=8, num_attention_heads=2))
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    """

    architecture = "causal_lm"
    _last_room = 0
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embedding.tokens.weight"}

    def __init__(self, config: TwofoldConfig, *, backend: str = "auto", initial_seed: int | None = None) -> None:
        super().__init__(config, backend=backend, initial_seed=initial_seed)
        spec = config.spec
        self.embedding = InputEmbedding(spec)
        self.trunk = Trunk(spec, self.backend)
        self._spec = spec
        self._attention_specs = tuple(spec.attention(index) for index in range(spec.num_hidden_layers))
        self.lm_head: nn.Module = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Tokens [B, T] -> logits [B, T, N] (with ``logits_to_keep`` n the last n of the T, or those of the indices given), and the loss.

        ``attention_mask`` [B, S] is 0 where a token is padding, on either side, S counting what ``cache`` holds. ``labels`` [B, T] are the
        tokens themselves, -100 where they are not to be scored; padding never is, nor is the step from one document to the next.
        ``document_ids`` [B, T] are equal within each of the documents packed into a row, which do not see one another. ``cache`` may be
        called ``past_key_values``; one is made with ``use_cache`` (in evaluation without labels: unless it is False).
        Other ``options``: position_ids (of packed documents, in place of ``document_ids``), shift_labels (labels of the tokens that follow, in
        place of ``labels``), num_items_in_batch, output_hidden_states, output_attentions, return_dict.

        Raises TwofoldError for shapes and tokens that do not fit, and for a cache that cannot hold this model.
        """
        record = self._record(
            options, known=("past_key_values", "position_ids", "shift_labels", "num_items_in_batch", "cache_position")
        )
        cache = options.get("past_key_values") if cache is None else cache
        embedded = self._embedded(input_ids, inputs_embeds)
        position_ids = self._positions(options.get("position_ids"), embedded)
        if position_ids is not None and document_ids is None and attention_mask is None and cache is None:
            document_ids, position_ids = documents_of(position_ids), None
        if document_ids is not None and (cache is not None or use_cache):
            raise TwofoldError("Packed documents are read at once: they cannot continue a cache, nor fill one.")
        sequence = self._sequence(embedded, attention_mask, document_ids, cache)
        if position_ids is not None:
            sequence.check_positions(position_ids)
        if cache is None and self._makes_cache(use_cache, labels, document_ids):
            # A compiled graph cannot read the configuration, and reads what was read before.
            cache = TiedCache(self._spec if torch.compiler.is_compiling() else self.config.spec)
        elif cache is not None and self._recomputes_layers():
            raise TwofoldError(
                "Gradient checkpointing cannot continue a cache: call model.eval(), or leave the cache out."
            )
        hidden_states = self.trunk(self.embedding(embedded, sequence), sequence, cache=cache, record=record)
        loss, following = None, options.get("shift_labels")
        if labels is None and following is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        else:
            logits = self.lm_head(hidden_states)
            following = self._next_labels(sequence, labels, logits) if following is None else following
            loss = mean_cross_entropy(logits, following, options.get("num_items_in_batch"))
        return self._output(
            CausalLMOutputWithPast, options, loss=loss, logits=logits, record=record, **{CACHE_FIELD: cache}
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            return self.embedding.embed_tokens(input_ids)
        if inputs_embeds is not None and input_ids is None:
            return self.embedding.check_hidden_states("inputs_embeds", inputs_embeds)
        raise TwofoldError("Give the model exactly one of input_ids and inputs_embeds.")

    @staticmethod
    def _positions(position_ids: Tensor | None, embedded: Tensor) -> Tensor | None:
        """[B, T], also where it was given once for all rows."""
        if position_ids is None:
            return None
        shape = tuple(embedded.shape[:2])
        if tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise TwofoldError(
                f"position_ids has the shape {tuple(position_ids.shape)}, but must be (batch, tokens) = {shape}."
            )
        return position_ids.expand(shape)

    def _sequence(
        self, embedded: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, cache: Cache | None
    ) -> Sequence:
        """The tokens, and those before them; what the cache cannot continue or hold is refused before it holds any of it."""
        if cache is None:
            return Sequence.of(embedded, attention_mask=attention_mask, document_ids=document_ids)
        if not isinstance(cache, TiedCache):
            raise TwofoldError(
                f"A {type(cache).__name__} keeps keys and values apart and cannot hold tied streams: use twofold.cache.TiedCache(model.config.spec)."
            )
        cache.check_fits(self._attention_specs, embedded.shape[1])
        return Sequence.of(
            embedded, attention_mask=attention_mask, past_tokens=cache.past_tokens, max_tokens=cache.max_tokens
        )

    def _makes_cache(self, use_cache: bool | None, labels: Tensor | None, document_ids: Tensor | None) -> bool:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and document_ids is None
        return use_cache and not self._recomputes_layers()

    def _recomputes_layers(self) -> bool:
        """Whether layers are computed again on the way back, which would append their tokens to a cache twice."""
        # Asked of the layers: the model's own answer has another name in each release of Transformers.
        recomputes = any(layer.gradient_checkpointing for layer in self.trunk.layers)
        return recomputes and self.training and torch.is_grad_enabled()

    @staticmethod
    def _next_labels(sequence: Sequence, labels: Tensor | None, logits: Tensor) -> Tensor:
        assert labels is not None
        if labels.shape != logits.shape[:-1]:
            raise TwofoldError(
                f"labels have the shape {tuple(labels.shape)}, but must be like the tokens, {tuple(logits.shape[:-1])}."
            )
        return sequence.next_token_labels(labels)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if model_kwargs.get(CACHE_FIELD) is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        else:
            model_kwargs[CACHE_FIELD] = self._cache_for(generation_config, max_cache_length)

    def _cache_for(self, generation_config: GenerationConfig, max_tokens: int) -> TiedCache:
        max_tokens = max(max_tokens, getattr(generation_config, "max_cache_len", None) or 0)
        held = cache_spec_of(generation_config.cache_implementation, generation_config.cache_config, max_tokens)
        if held.max_tokens:
            # No less room than the last time: a compiled step is compiled for its room.
            held = replace(held, max_tokens=max(held.max_tokens, self._last_room))
            self._last_room = held.max_tokens
        cache = TiedCache(self.config.spec, held)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return cache

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **options: Any) -> Tensor | None:
        """A mask [B, S] as wide as the cache will ever be, so that a compiled step has one shape for all tokens."""
        cache = options.get("cache") or options.get("past_key_values")
        if attention_mask is None or not isinstance(cache, TiedCache) or not cache.max_tokens:
            return attention_mask
        return F.pad(attention_mask, (0, cache.max_tokens - attention_mask.shape[1]), value=1)

    # Where Transformers finds what it resizes and ties.

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        assert self.embedding.tokens is not None
        return self.embedding.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of tokens."""
        self.embedding.tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head; its matrix is the table of tokens where ``tie_word_embeddings``."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        # A head that will be tied need not be drawn first.
        if not (module is getattr(self, "lm_head", None) and self.config.tie_word_embeddings):
            super()._init_weights(module)
