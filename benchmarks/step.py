"""A training step of our model against the same model in plain PyTorch, and of (Q, K=V) against (Q, K, V): time and peak memory.

    python benchmarks/step.py            # a table of ratios
    python benchmarks/step.py --json     # rows for programs

Both models are checked to be one function (same weights, same loss) before anything is timed. Steps of all models are interleaved in one process,
and a ratio is the median over the rounds of the ratio within a round, so that a busy machine slows both sides alike. Peak memory is that of a
fresh process per model: resident on a CPU, allocated on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from processes import output_of, peak_resident_bytes
from rows import Row, in_turn, ratio, row, show
from twofold.layouts import convert
from twofold.models import build_model
from twofold.positions import LearnedPositions
from twofold.spec import GPT2_BLOCK, ModelSpec

TIES = {"ours (Q, K, V)": "(Q, K, V)", "ours (Q, K=V)": "(Q, K=V)"}
SHAPES = {
    "cpu": {"width": 256, "layers": 4, "heads": 4, "vocabulary": 256, "context": 256, "batch": 8},
    "cuda": {"width": 1024, "layers": 20, "heads": 16, "vocabulary": 50304, "context": 2048, "batch": 8},
    # Says whether the benchmark works, and nothing about speed.
    "tiny": {"width": 8, "layers": 1, "heads": 2, "vocabulary": 11, "context": 7, "batch": 2},
}


class PlainBlock(nn.Module):
    """A GPT-2 block as everybody writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).split(width, dim=2)
        q, k, v = (y.view(batch, tokens, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class PlainModel(nn.Module):
    """Learned positions, tied embeddings, mean cross-entropy of the next token."""

    def __init__(self, width: int, layers: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def spec_of(shape: dict[str, int], tie: str) -> ModelSpec:
    return ModelSpec(
        tie=tie,
        architecture="causal_lm",
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        head_dim=shape["width"] // shape["heads"],
        intermediate_size=4 * shape["width"],
        vocab_size=shape["vocabulary"],
        positions=LearnedPositions(length=shape["context"]),
        **GPT2_BLOCK,
    )


def plain_with_weights_of(ours: nn.Module, shape: dict[str, int]) -> PlainModel:
    """The plain model with our model's numbers."""
    plain = PlainModel(**{name: shape[name] for name in ("width", "layers", "heads", "vocabulary", "context")})
    weights, spec = ours.state_dict(), ours.config.spec.attention(0)
    new = {
        "tokens.weight": weights["embedding.tokens.weight"],
        "positions.weight": weights["embedding.positions.weight"],
    }
    names = {"attention_norm": "norm_1", "mlp_norm": "norm_2", "attention.qkv_proj": "qkv", "attention.o_proj": "out"}
    names |= {"mlp.up_proj": "up", "mlp.down_proj": "down"}
    for layer in range(shape["layers"]):
        prefix = f"trunk.layers.{layer}."
        fused = convert(weights, spec, source="free", target="fused", prefix=f"{prefix}attention.")
        for theirs, mine in names.items():
            for kind in ("weight", "bias"):
                new[f"blocks.{layer}.{mine}.{kind}"] = fused[f"{prefix}{theirs}.{kind}"]
    new |= {f"norm.{kind}": weights[f"trunk.norm.{kind}"] for kind in ("weight", "bias")}
    plain.load_state_dict(new)
    return plain


def step_of(name: str, shape: dict[str, int], device: str, *, waits: bool = True) -> Callable[[], None]:
    """One optimiser step of the model called ``name``, on the same batch each time; it ``waits`` for a GPU to be done with it."""
    ours = build_model(spec_of(shape, TIES.get(name, "(Q, K, V)")), seed=0)
    model = (ours if name in TIES else plain_with_weights_of(ours, shape)).to(device)
    ids = torch.randint(shape["vocabulary"], (shape["batch"], shape["context"]), device=device)
    loss_of = (lambda: model(input_ids=ids, labels=ids).loss) if name in TIES else (lambda: model(ids))
    if device == "cuda":
        loss_of = torch.compile(loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda" and waits:
            torch.cuda.synchronize()

    return step


def check_same_function(shape: dict[str, int]) -> None:
    small = {**shape, "layers": 2, "vocabulary": 97, "context": 33}
    ours = build_model(spec_of(small, "(Q, K, V)"), seed=0).double()
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(97, (2, 33), generator=draws)
    with torch.no_grad():
        for parameter in ours.parameters():  # as large as those of a trained model: what is newly drawn hardly attends
            parameter.normal_(std=0.3, generator=draws)
        theirs, mine = plain_with_weights_of(ours, small).double()(ids), ours(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(theirs, mine.float())  # the plain model's loss is float32 whatever its weights are


def time_rounds(shape: dict[str, int], device: str, rounds: int) -> dict[str, list[float]]:
    steps = {name: step_of(name, shape, device) for name in ("plain", *TIES)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(), step()
    for index in range(rounds):
        for name in in_turn(list(steps), index):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(name: str, shape: dict[str, int], device: str) -> int:
    """In this process, which must be fresh: bytes above those held before the first step."""
    step = step_of(name, shape, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return torch.cuda.max_memory_allocated()
    step(), step()
    return peak_resident_bytes()


def peaks(arguments: argparse.Namespace) -> dict[str, float]:
    """The median peak of fresh processes, less that of a process that has only imported everything."""
    found, rounds = {}, min(3, arguments.rounds)
    for name in ("nothing", "plain", *TIES):
        command = ["--peak", name, "--device", arguments.device, "--shape", arguments.shape]
        found[name] = statistics.median(int(output_of(__file__, *command)) for _ in range(rounds))
    return {name: bytes_ - found["nothing"] for name, bytes_ in found.items() if name != "nothing"}


def rows(shape: dict[str, int], arguments: argparse.Namespace) -> list[Row]:
    seconds = time_rounds(shape, arguments.device, arguments.rounds)
    memory = peaks(arguments)
    result = []
    pairs = (("ours (Q, K, V)", "plain", 1.03), ("ours (Q, K=V)", "ours (Q, K, V)", 1.0))
    for ours, other, goal in pairs:
        result.append(row(f"step time, {ours} / {other}", ratio(seconds[ours], seconds[other]), "ratio", f"<= {goal}"))
        result.append(row(f"peak memory, {ours} / {other}", memory[ours] / memory[other], "ratio", f"<= {goal}"))
    tokens = shape["batch"] * shape["context"]
    for name, values in seconds.items():
        result.append(row(f"speed, {name}", tokens / statistics.median(values), "tokens/s"))
        result.append(row(f"peak memory, {name}", memory[name] / 2**20, "MiB"))
    return result


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=90, help="steps of each model")
    parser.add_argument("--shape", choices=SHAPES, help="size of the models (without it: that of the device)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: use --device cpu")
    arguments.shape = arguments.shape or arguments.device
    shape = SHAPES[arguments.shape]
    if arguments.peak == "nothing":
        torch.zeros(1, device=arguments.device)
        print(0 if arguments.device == "cuda" else peak_resident_bytes())
        return
    if arguments.peak:
        print(peak_bytes(arguments.peak, shape, arguments.device))
        return
    check_same_function(shape)
    show(rows(shape, arguments), as_json=arguments.json)


if __name__ == "__main__":
    main()
