"""Generate text with an exported model of bytes. It needs numpy and onnxruntime, and neither PyTorch nor Twofold.

twofold train --task text --tie "(Q, K=V)" --folder runs/text
twofold export runs/text onnx/text
python examples/onnx_generate.py onnx/text --prompt "def " --tokens 200
"""

from __future__ import annotations

import argparse
import codecs
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

PREFILL_TOKENS = 512
"""Of a prompt, as many tokens at a time: a step gives logits for all of its tokens."""


class Decoder:
    """The graph, and what it must be given again in the next step: one tensor per layer where K and V are one."""

    def __init__(self, folder: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        # Every cached tensor is an input "past_key_values.{layer}.{part}" [batch, heads, past, dim] and an output "present.{layer}.{part}".
        self.cache: dict[str, np.ndarray] = {}
        for tensor in self.session.get_inputs():
            if tensor.name.startswith("past_key_values."):
                _, heads, _, dim = tensor.shape
                dtype = np.float16 if tensor.type == "tensor(float16)" else np.float32
                self.cache[tensor.name] = np.zeros((1, heads, 0, dim), dtype=dtype)
        self.seen = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        """The logits [N] of the token that follows these."""
        self.seen += len(tokens)
        feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, self.seen), dtype=np.int64)}
        outputs = [name.replace("past_key_values.", "present.") for name in self.cache]
        logits, *present = self.session.run(["logits", *outputs], feed | self.cache)
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits[0, -1].astype(np.float64)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tensors that are kept between steps."""
        return sum(tensor.nbytes for tensor in self.cache.values())


def choose(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    """The most likely token, or with a temperature one that is drawn."""
    if temperature:
        logits = logits / temperature + generator.gumbel(size=logits.shape)
    return int(logits.argmax())


def generate(decoder: Decoder, prompt: bytes, arguments: argparse.Namespace) -> Iterator[int]:
    """Bytes that follow the prompt."""
    generator = np.random.default_rng(arguments.seed)
    tokens = list(prompt)
    for _ in range(arguments.tokens):
        for start in range(0, len(tokens), PREFILL_TOKENS):
            logits = decoder.step(tokens[start : start + PREFILL_TOKENS])
        tokens = [choose(logits, arguments.temperature, generator)]
        yield tokens[0]


def main() -> None:
    """Print the text as it comes, then how fast it came and what its cache weighs."""
    parser = argparse.ArgumentParser(description="Generate text with an exported model of bytes.")
    parser.add_argument("folder", type=Path, help="a folder that `twofold export` wrote")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely byte, always")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as onnxruntime likes")
    arguments = parser.parse_args()

    config = json.loads((arguments.folder / "config.json").read_text(encoding="utf-8"))
    prompt = arguments.prompt.encode()
    if config["vocab_size"] != 256 or not prompt:
        parser.error("this example reads and writes bytes: it needs a model with a vocabulary of 256, and a prompt")
    longest = json.loads((arguments.folder / "cache.json").read_text(encoding="utf-8"))["max_tokens"]
    if len(prompt) + arguments.tokens > longest:
        parser.error(f"this model was exported for texts of up to {longest} bytes, the prompt included")
    decoder = Decoder(arguments.folder, arguments.threads)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start = time.perf_counter()
    print(arguments.prompt, end="")
    for token in generate(decoder, prompt, arguments):
        print(text.decode(bytes([token])), end="", flush=True)
    print(text.decode(b"", final=True), end="")
    seconds = time.perf_counter() - start
    print(f"\n\ntie           {config['tie']}")
    print(f"tokens/s      {arguments.tokens / seconds:.1f}")
    print(f"cache bytes   {decoder.cache_bytes:,} for {decoder.seen} tokens")


if __name__ == "__main__":
    main()
