"""The language model: GPT-2-like or Llama-like by its configuration, with a cache that holds what the tie needs and no more."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from twofold.cache import TiedCache
from twofold.errors import TwofoldError
from twofold.models.blocks import Trunk
from twofold.models.configuration import TwofoldConfig
from twofold.models.embedding import InputEmbedding
from twofold.models.loss import mean_cross_entropy
from twofold.models.pretrained import TwofoldPreTrainedModel
from twofold.models.sequence import Sequence

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
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embedding.tokens.weight"}

    def __init__(self, config: TwofoldConfig, *, backend: str = "auto", initial_seed: int | None = None) -> None:
        super().__init__(config, backend=backend, initial_seed=initial_seed)
        spec = config.spec
        self.embedding = InputEmbedding(spec)
        self.trunk = Trunk(spec, backend)
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
        **options: Any,
    ) -> Any:
        """Tokens [B, T] -> logits [B, T, N] (with ``logits_to_keep`` n the last n of the T, or those of the indices given), and the loss.

        ``attention_mask`` [B, S] is 0 where a token is padding, on either side, S counting what ``cache`` holds. ``labels`` [B, T] are the
        tokens themselves, -100 where they are not to be scored; padding never is, nor is the step from one document to the next.
        ``document_ids`` [B, T] are equal within each of the documents packed into a row, which do not see one another. ``cache`` may be
        called ``past_key_values``; one is made with ``use_cache`` (in evaluation without labels: unless it is False).
        Other ``options``: inputs_embeds, num_items_in_batch, output_hidden_states, return_dict.

        Raises TwofoldError for shapes and tokens that do not fit, and for a cache that cannot hold this model.
        """
        states = self._states(
            options, known=("past_key_values", "inputs_embeds", "num_items_in_batch", "cache_position")
        )
        cache = options.get("past_key_values") if cache is None else cache
        if document_ids is not None and (cache is not None or use_cache):
            raise TwofoldError("Packed documents are read at once: they cannot continue a cache, nor fill one.")
        embedded = self._embedded(input_ids, options.get("inputs_embeds"))
        past_tokens = 0 if cache is None else cache.get_seq_length()
        sequence = Sequence.of(
            embedded, attention_mask=attention_mask, document_ids=document_ids, past_tokens=past_tokens
        )
        if cache is None and self._makes_cache(use_cache, labels, document_ids):
            cache = TiedCache(self.config.spec)
        elif cache is not None and self._recomputes_layers():
            raise TwofoldError(
                "Gradient checkpointing cannot continue a cache: call model.eval(), or leave the cache out."
            )
        hidden_states = self.trunk(self.embedding(embedded, sequence), sequence, cache=cache, states=states)
        loss = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        else:
            logits = self.lm_head(hidden_states)
            loss = mean_cross_entropy(
                logits, self._next_labels(sequence, labels, logits), options.get("num_items_in_batch")
            )
        return self._output(
            CausalLMOutputWithPast, options, loss=loss, logits=logits, states=states, **{CACHE_FIELD: cache}
        )

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            return self.embedding.embed_tokens(input_ids)
        if inputs_embeds is not None and input_ids is None:
            return self.embedding.check_hidden_states("inputs_embeds", inputs_embeds)
        raise TwofoldError("Give the model exactly one of input_ids and inputs_embeds.")

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
    def _next_labels(sequence: Sequence, labels: Tensor, logits: Tensor) -> Tensor:
        if labels.shape != logits.shape[:-1]:
            raise TwofoldError(
                f"labels have the shape {tuple(labels.shape)}, but must be like the tokens, {tuple(logits.shape[:-1])}."
            )
        return sequence.next_token_labels(labels)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise TwofoldError(
                f"A tied cache grows with its tokens; there is no {implementation!r} one: leave cache_implementation out."
            )
        given = model_kwargs.get(CACHE_FIELD)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **options)
        if given is None and model_kwargs.get(CACHE_FIELD) is not None:
            cache = TiedCache(self.config.spec)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE_FIELD] = cache

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
