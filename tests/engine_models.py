"""Small random models of many families, and the bytes that Transformers' own cache holds for them: what counts are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from twofold.cache import storage_bytes
from twofold.estimate.engine import CACHE_FIELDS

LLAMA = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6}
GPT2 = {"vocab_size": 67, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64, "n_inner": 20}
MLA = {
    **LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 10, "q_lora_rank": 7, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA4 = {
    **LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "vocab_size_per_layer_input": 67,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
V4 = {
    "vocab_size": 67, "hidden_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
    "q_lora_rank": 10, "n_routed_experts": 4, "num_experts_per_tok": 2, "o_groups": 2, "o_lora_rank": 6, "index_n_heads": 2,
    "index_head_dim": 6, "index_topk": 4, "sliding_window": 7, "partial_rotary_factor": 0.25,
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
    "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 5},
}  # fmt: skip
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama GQA": ("llama", {**LLAMA, "num_key_value_heads": 2}),
    "llama with wide heads": ("llama", {**LLAMA, "num_key_value_heads": 3, "head_dim": 10}),
    "gpt2": ("gpt2", GPT2),
    "mistral window": ("mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 5}),
    "gemma 2": ("gemma2", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "layer_types": MIXED}),
    "gemma 3": ("gemma3_text", {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "layer_types": MIXED}),
    "gemma 3 with images": (
        "gemma3",
        {
            "text_config": {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "layer_types": MIXED},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma 3n": (
        "gemma3n_text",
        {
            **LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "layer_types": [*MIXED, *MIXED[:2]], "num_hidden_layers": 5,
            "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 67, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
            "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 5,
        },
    ),
    "gemma 4": ("gemma4_text", GEMMA4),
    "gemma 4 K=V": ("gemma4_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma 4 shared": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2}),
    "deepseek v2": ("deepseek_v2", {**MLA, "topk_method": "greedy", "n_group": 1}),
    "deepseek v3": ("deepseek_v3", MLA),
    "deepseek v4": ("deepseek_v4", V4),
    "falcon MQA": ("falcon", {**LLAMA, "multi_query": True}),
    "falcon MHA": ("falcon", {**LLAMA, "multi_query": False}),
    "falcon GQA, stored whole": ("falcon", {**LLAMA, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "starcoder": ("gpt_bigcode", {**GPT2, "multi_query": True}),
    "qwen 2": ("qwen2", {**LLAMA, "num_key_value_heads": 2}),
    "qwen 2, windows above": (
        "qwen2",
        {**LLAMA, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen 3": ("qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 10}),
    "phi": ("phi", LLAMA),
    "phi 3": ("phi3", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": 0}),
    "gpt neox": ("gpt_neox", {**LLAMA, "rotary_pct": 0.5}),
    "opt": ("opt", {**LLAMA, "ffn_dim": 20, "word_embed_proj_dim": 24, "max_position_embeddings": 64}),
    "mpt": ("mpt", {"vocab_size": 67, "d_model": 24, "n_heads": 3, "n_layers": 2, "max_seq_len": 64}),
    "bloom": ("bloom", {"vocab_size": 67, "hidden_size": 24, "n_layer": 2, "n_head": 3}),
    "gpt oss": (
        "gpt_oss",
        {**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "llama 4 chunks": (
        "llama4_text",
        {
            **LLAMA, "num_key_value_heads": 2, "head_dim": 8, "attention_chunk_size": 5, "intermediate_size_mlp": 12, "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 0, 1], "moe_layers": [],
        },
    ),
}  # fmt: skip
"""Name -> model type and the fields of its configuration; sizes are odd and distinct, so that a swapped one cannot pass."""

STATES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}),
    "qwen 3 next": (
        "qwen3_next",
        {
            **LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 6, "linear_value_head_dim": 10, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        },
    ),
}  # fmt: skip
"""Models some of whose layers keep a state."""


def config_of(family: tuple[str, dict[str, Any]]) -> Any:
    kind, fields = family
    return AutoConfig.for_model(kind, **fields)


def folder_of(family: tuple[str, dict[str, Any]], folder: Path) -> Path:
    """A folder that holds the model's configuration and nothing else."""
    config_of(family).save_pretrained(folder)
    return folder


def random_model(family: tuple[str, dict[str, Any]], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(family)
    kind = AutoModelForImageTextToText if "vision_config" in family[1] else AutoModelForCausalLM
    return kind.from_config(config, dtype=dtype).eval()


def measured_bytes(model: PreTrainedModel, *, batch: int, prompt: int, further: int) -> int:
    """Bytes of the storages under a real cache after a prompt that is read at once and ``further`` tokens that come one by one."""
    cache, name = None, ""
    with torch.no_grad():
        for length in (*([prompt] if prompt else []), *[1] * further):
            tokens = torch.randint(60, (batch, length)) + 1
            output = model(input_ids=tokens, use_cache=True, **({name: cache} if cache is not None else {}))
            name = next(field for field in CACHE_FIELDS if output.get(field) is not None)
            cache = output[name]
    return storage_bytes(tensor for layer in cache.layers for tensor in _tensors(vars(layer)))


def _tensors(values: Mapping[Any, Any]) -> Iterator[Tensor]:
    for value in values.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.ndim > 1:  # a single number is bookkeeping
            yield value
