"""llama.cpp's attention at the shape of a decoding step: a model of one layer with random weights and a cache of 16-bit floats, timed with few and with many tokens in it.

    python benchmarks/decode_llama.py 8 4 128 8192 --threads 2     # KV heads, queries of each, head_dim, tokens

It needs `llama-cpp-python` and `gguf`, and may be run by another Python than the project's. It prints JSON: for llama.cpp's two kinds of attention the
milliseconds of a step over so many tokens less those of a step over a few, which is what attention takes. The cache is filled by reading, which takes seconds
at 8,192 tokens and minutes at 32,768.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import llama_cpp
import numpy as np

WIDTH, VOCABULARY, BATCH, FEW, STEPS = 256, 64, 512, 16, 24
KINDS = {"plain": 0, "flash": 1}


def write_model(path: Path, kv_heads: int, group: int, head_dim: int, context: int) -> None:
    """A Llama of one layer, narrow in all but its attention."""
    heads, prefix, draw = kv_heads * group, "blk.0.", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    writer.add_file_type(1)
    matrices = {
        "token_embd": (VOCABULARY, WIDTH),
        "output": (VOCABULARY, WIDTH),
        f"{prefix}attn_q": (heads * head_dim, WIDTH),
        f"{prefix}attn_k": (kv_heads * head_dim, WIDTH),
        f"{prefix}attn_v": (kv_heads * head_dim, WIDTH),
        f"{prefix}attn_output": (WIDTH, heads * head_dim),
        f"{prefix}ffn_gate": (WIDTH, WIDTH),
        f"{prefix}ffn_up": (WIDTH, WIDTH),
        f"{prefix}ffn_down": (WIDTH, WIDTH),
    }
    for name, shape in matrices.items():
        writer.add_tensor(f"{name}.weight", (0.1 * draw.standard_normal(shape)).astype(np.float16))
    for name in ("output_norm", f"{prefix}attn_norm", f"{prefix}ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Text:
    """A context of llama.cpp, and where its text ends."""

    def __init__(self, model: Any, tokens: int, threads: int, kind: int) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = tokens + 2 * STEPS + FEW
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = kind
        self.context = llama_cpp.llama_init_from_model(model, options)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.end = 0

    def read(self, count: int) -> None:
        """So many tokens at once."""
        self.batch.n_tokens = count
        for i in range(count):
            self.batch.token[i] = (self.end + i) % VOCABULARY
            self.batch.pos[i] = self.end + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = i == count - 1
        if code := llama_cpp.llama_decode(self.context, self.batch):
            raise SystemExit(f"llama.cpp could not decode: code {code}.")
        llama_cpp.llama_synchronize(self.context)
        self.end += count

    def seconds_of_a_step(self) -> float:
        """The median of some."""
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            self.read(1)
            times.append(time.perf_counter() - start)
        return median(times)


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: object) -> None:
    del level, text, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kv_heads", "group", "head_dim", "tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.gguf"
        write_model(path, options.kv_heads, options.group, options.head_dim, options.tokens + 2 * STEPS + FEW)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        for name, kind in KINDS.items():
            text = Text(model, options.tokens, options.threads, kind)
            text.read(FEW)
            few = text.seconds_of_a_step()
            while text.end < options.tokens:
                text.read(min(BATCH, options.tokens - text.end))
            told[name] = 1e3 * (text.seconds_of_a_step() - few)
            llama_cpp.llama_free(text.context)
        llama_cpp.llama_model_free(model)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
