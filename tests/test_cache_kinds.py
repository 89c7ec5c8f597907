"""Layers in few bits against plain arithmetic, compiled steps over pre-allocated room, files, and mistakes that leave a cache as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CompileConfig

from model_strategies import GPT2, LLAMA, decoders, drawn_model, drawn_tokens
from test_cache import step, whole
from test_generation import MODELS, generated
from twofold.cache import QuantizedTiedLayer, StaticTiedLayer, TiedCache, load_cache, save_cache
from twofold.cache.quantization import quantize
from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.explain import explain
from twofold.spec import ModelSpec

# Few bits


def rounded(group: np.ndarray, bits: int) -> np.ndarray:
    """Some floats between their least and greatest in 2^bits levels, one by one."""
    least, greatest = group.min(), group.max()
    scale = (greatest - least) / (2**bits - 1)
    return np.array([least + scale * round((x - least) / scale) if scale else x for x in group])


class Ledger:
    """What a quantized layer should give, kept as a list of single tokens: no codes, no views, no groups of tensors."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec, self.tokens, self.coded = spec, [], 0

    def append(self, stream: Tensor) -> Tensor:
        read = [*self.tokens, *stream.unbind(2)]
        self.tokens = read.copy()
        self.settle()
        return torch.stack(read, dim=2)

    def settle(self) -> None:
        old = max(0, len(self.tokens) - self.spec.tail_tokens)
        if self.spec.axis == "token":
            for index in range(self.coded, old):
                self.tokens[index] = self.per_token(self.tokens[index])
            self.coded = max(self.coded, old)
            return
        while self.coded + self.spec.group_size <= old:
            end = self.coded + self.spec.group_size
            block = torch.stack(self.tokens[self.coded : end], dim=-1)
            flat = [rounded(channel, self.spec.bits) for channel in block.reshape(-1, block.shape[-1]).numpy()]
            self.tokens[self.coded : end] = torch.tensor(np.array(flat)).reshape(block.shape).unbind(-1)
            self.coded = end

    def per_token(self, token: Tensor) -> Tensor:
        group = min(self.spec.group_size, token.shape[-1])
        flat = [rounded(part, self.spec.bits) for part in token.reshape(-1, group).numpy()]
        return torch.tensor(np.array(flat)).reshape(token.shape)

    def crop(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]
        old = max(0, len(self.tokens) - self.spec.tail_tokens)
        size = 1 if self.spec.axis == "token" else self.spec.group_size
        self.coded = min(self.coded, old - old % size)


CODES = st.builds(
    CacheSpec,
    bits=st.sampled_from([4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    group_size=st.sampled_from([2, 4, 8]),
    tail_tokens=st.sampled_from([0, 1, 3, 9]),
)


@given(
    CODES, st.lists(st.tuples(st.sampled_from(["append", "append", "crop"]), st.integers(1, 6)), max_size=8), st.data()
)
@settings(max_examples=150)
def test_codes_are_what_rounding_one_by_one_gives(spec: CacheSpec, deeds: list[tuple[str, int]], data: st.DataObject):
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    layer, ledgers, tolerance = QuantizedTiedLayer(spec), [Ledger(spec), Ledger(spec)], 1e-12
    for deed, count in [("append", 5), *deeds, ("append", 1)]:
        if deed == "crop":
            count = min(count, layer.tokens_seen - 1)
            layer.crop(-count)
            for ledger in ledgers:
                ledger.crop(count)
            for found, ledger in zip(layer.streams, ledgers, strict=True):
                torch.testing.assert_close(found, torch.stack(ledger.tokens, dim=2), rtol=1e-12, atol=tolerance)
            if spec.axis == "channel":
                # Floats that were codes lie evenly: in a new group they may fall in the middle of two levels.
                tolerance = 8.0 / (2**spec.bits - 1)
        else:
            new = [torch.randn(2, heads, count, 8, dtype=torch.float64, generator=generator) for heads in (3, 1)]
            for found, stream, ledger in zip(layer.append(new), new, ledgers, strict=True):
                torch.testing.assert_close(found, ledger.append(stream), rtol=0, atol=tolerance)
        counted = [old.codes.shape[2] for old in layer.old] or [0, 0]
        assert counted == [spec.quantized_tokens(layer.tokens_seen)] * 2


@given(CODES, st.integers(0, 2**31))
def test_codes_are_off_by_half_a_step_at_most(spec: CacheSpec, seed: int):
    stream = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 100
    quantized = quantize(stream, spec)
    error = (quantized.read(spec) - stream).abs()
    assert float(error.max()) <= float(quantized.scale.max()) * 0.5001 + 1e-4
    assert quantized.codes.dtype == torch.uint8


def test_equal_floats_stay_as_they_are():
    spec = CacheSpec(bits=4, group_size=4)
    stream = torch.full((1, 1, 3, 8), 0.3)
    assert torch.equal(quantize(stream, spec).read(spec), stream)


@given(
    decoders(), CODES, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(["fp64", "fp32", "bf16"])
)
@settings(max_examples=60)
def test_bytes_are_measured_counted_and_explained(spec: ModelSpec, held: CacheSpec, chunks: list[int], dtype: str):
    """The storages, the formula and what ``explain`` prints are one number."""
    extension = spec.positions.key_extension_dim
    assume(held.axis == "channel" or not extension or extension % min(held.group_size, extension) == 0)
    torch_dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = drawn_model(spec).to(torch_dtype)
    codes = CacheSpec(bits=8, axis="head")
    for way in (held, CacheSpec(), CacheSpec(max_tokens=30), codes, replace(codes, max_tokens=30)):
        cache, tokens = TiedCache(spec, way), sum(chunks)
        for part in drawn_tokens(2, tokens).split(chunks, dim=1):
            step(model, cache, part)
        assert cache.nbytes == cache_bytes(spec, tokens, dtype, 2, way)
    explained = explain(str(spec.tie.tie(0)), spec.with_changes(tie=spec.tie.tie(0)), tokens=tokens, dtype=dtype)
    assert explained.cost.cache_bytes == cache_bytes(spec.with_changes(tie=spec.tie.tie(0)), tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [CacheSpec(), CacheSpec(max_tokens=24)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_lower_precision_decodes_near_what_it_recomputes(name: str, held: CacheSpec, dtype: torch.dtype):
    """Within 32 units of the last place of the greatest logit, over two layers."""
    model, tokens = drawn_model(MODELS[name], std=0.2).to(dtype), drawn_tokens(2, 24)
    wanted, cache = whole(model, tokens).double(), TiedCache(MODELS[name], held)
    found = torch.cat([step(model, cache, part) for part in tokens.split([9, 1, 1, 6, 7], dim=1)], dim=1).double()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 32 * torch.finfo(dtype).eps


# Compiled steps


@pytest.mark.parametrize("held", [CacheSpec(max_tokens=20), CacheSpec(bits=8, axis="head", max_tokens=20)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_compiled_step_serves_every_token(name: str, held: CacheSpec):
    """One graph without a break, from a prefix read eagerly to the last slot, through windows that wrap around."""
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(2, 20)
    wanted = step(model, TiedCache(MODELS[name], held), tokens)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    cache = TiedCache(MODELS[name], held)
    step(model, cache, tokens[:, :8])
    for index in range(8, 20):
        found = compiled(tokens[:, index : index + 1].clone(), cache=cache).logits
        torch.testing.assert_close(found, wanted[:, index : index + 1], rtol=1e-9, atol=1e-9)
    assert len(graphs) == 1
    assert int(cache.get_seq_length()) == 20


@pytest.mark.parametrize("name", ["llama", "windows", "gpt2"])
def test_generate_compiles_for_a_static_cache(name: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(3, 7)
    mask = (torch.arange(7) >= torch.tensor([[0], [2], [5]])).long()
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    for options in ({}, {"attention_mask": mask}):
        found = generated(model, tokens, cache_implementation="static", compile_config=compiling, **options)
        assert torch.equal(found, generated(model, tokens, **options))


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_inductor_gives_the_same(name: str):
    model, tokens = drawn_model(MODELS[name]), drawn_tokens(2, 7)
    compiling = CompileConfig(fullgraph=True)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    found = generated(model, tokens, cache_implementation="static", compile_config=compiling)
    assert torch.equal(found, generated(model, tokens))


# Files


@pytest.mark.parametrize(
    "held",
    [
        CacheSpec(),
        CacheSpec(max_tokens=12),
        CacheSpec(bits=4, group_size=8, tail_tokens=2),
        CacheSpec(bits=8, axis="head"),
        CacheSpec(bits=8, axis="head", max_tokens=12),
    ],
)
def test_a_saved_prefix_is_gone_on_from(held: CacheSpec, tmp_path: Path):
    model, tokens, cache = drawn_model(LLAMA), drawn_tokens(2, 12), TiedCache(LLAMA, held)
    step(model, cache, tokens[:, :9])
    save_cache(cache, tmp_path / "prefix.safetensors")
    loaded = load_cache(tmp_path / "prefix.safetensors", LLAMA)
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(step(model, loaded, tokens[:, 9:]), step(model, cache, tokens[:, 9:]))


def test_files_that_are_no_cache_of_this_model(tmp_path: Path):
    path, cache = tmp_path / "prefix.safetensors", TiedCache(LLAMA)
    step(drawn_model(LLAMA), cache, drawn_tokens(2, 5))
    save_cache(cache, path)
    with pytest.raises(TwofoldError, match=r"in layer 0 its tie is \(Q, K=V\), and this model's is \(Q, K, V\)"):
        load_cache(path, LLAMA.with_changes(tie="(Q, K, V)"))
    with pytest.raises(TwofoldError, match="of a model of 2 layers, and this model has 4"):
        load_cache(path, LLAMA.with_changes(num_hidden_layers=4))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TwofoldError, match=r"prefix.safetensors cannot be read as a cache .*truncated or damaged"):
        load_cache(path, LLAMA)
    with pytest.raises(TwofoldError, match="missing, truncated or damaged"):
        load_cache(tmp_path / "gone.safetensors", LLAMA)
    with pytest.raises(TwofoldError, match="cannot be written to"):
        save_cache(cache, tmp_path / "gone" / "prefix.safetensors")


# Mistakes leave a cache as it was


def assert_unchanged(cache: TiedCache, before: list[list[Tensor]], tokens: int) -> None:
    assert int(cache.get_seq_length()) == tokens
    for streams, kept in zip(cache, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(streams, kept, strict=True))


@pytest.mark.parametrize(
    "held",
    [
        CacheSpec(),
        CacheSpec(max_tokens=6),
        CacheSpec(bits=8, group_size=8),
        CacheSpec(bits=8, axis="head", max_tokens=6),
    ],
)
@torch.no_grad()
def test_what_a_cache_refuses(held: CacheSpec):
    model, tokens, cache = drawn_model(LLAMA), drawn_tokens(2, 5), TiedCache(LLAMA, held)
    step(model, cache, tokens)
    before = [[stream.clone() for stream in streams] for streams in cache]
    for other in (LLAMA.with_changes(tie="(Q, K, V)"), LLAMA.with_changes(tie="V = 2K"), GPT2):
        with pytest.raises(TwofoldError, match="The cache is of another model: in layer 0"):
            step(drawn_model(other), cache, tokens)
    with pytest.raises(TwofoldError, match="one cache for one batch of one model"):
        step(model, cache, tokens[:1, :1])
    if held.axis != "head":  # codes stand for floats of any dtype
        with pytest.raises(TwofoldError, match="of dtype float64 and was given float32"):
            step(drawn_model(LLAMA).float(), cache, tokens[:, :1])
    with pytest.raises(TwofoldError, match=r"attention_mask has the shape \(2, 1\), but must be .*\(2, 6\)"):
        model(tokens[:, :1], cache=cache, attention_mask=torch.ones(2, 1))
    if held.max_tokens:
        with pytest.raises(TwofoldError, match="has room for 6 tokens, holds 5 and was given 2 more"):
            step(model, cache, tokens[:, :2])
    assert_unchanged(cache, before, 5)
    step(model, cache, tokens[:, :1])


def test_static_layers_say_what_they_hold():
    layer = StaticTiedLayer(max_tokens=9, window_tokens=4)
    assert (layer.is_compileable, layer.get_max_length(), layer.is_croppable, layer.batch_size) == (True, 9, False, -1)
    layer.append([torch.ones(2, 1, 6, 8)])
    assert layer.nbytes == 2 * 4 * 8 * 4
    assert layer.get_mask_sizes(1) == (4, 0)
    assert layer.get_mask_sizes(3) == (7, 0)
    assert layer.key_positions(4).tolist() == [4, 5, 2, 3]
    with pytest.raises(TwofoldError, match="has room for 9 tokens, holds 6 and was given 4 more"):
        layer.append([torch.ones(2, 1, 4, 8)])


def test_room_beyond_learned_positions_is_refused():
    with pytest.raises(TwofoldError, match="goes beyond the 100 positions that this model has learned"):
        TiedCache(GPT2, CacheSpec(max_tokens=101))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": -1}, "max_tokens is -1, but must be a whole number of at least 0"),
        ({"tail_tokens": 1.5}, "tail_tokens is 1.5"),
        ({"group_size": 0}, "group_size is 0"),
        ({"bits": 3}, "A cache of 3 bits cannot be had: use 8 or 4"),
        ({"bits": 8, "axis": "row"}, "axis is 'row', but must be one of token, channel, head"),
        ({"bits": 8, "max_tokens": 9}, "A quantized cache grows: leave max_tokens out, or bits, or say axis='head'"),
        ({"bits": 4, "axis": "head"}, "holds codes of 8 bits, and 4 were asked for: say bits=8"),
        ({"axis": "head"}, "holds codes of 8 bits, and 0 were asked for: say bits=8"),
        ({"bits": 8, "axis": "head", "tail_tokens": 3}, "keeps no tail as computed: leave tail_tokens out"),
        ({"bits": 8, "axis": "head", "group_size": 8}, "the group is the head: leave group_size out"),
    ],
)
def test_impossible_caches(fields: dict, told: str):
    with pytest.raises(TwofoldError, match=told):
        CacheSpec(**fields)


def test_as_many_caches_as_layers():
    with pytest.raises(TwofoldError, match="3 caches were described for a model of 2 layers"):
        TiedCache(LLAMA, (CacheSpec(),) * 3)
    with pytest.raises(TwofoldError, match="room for 4 tokens cannot hold 5"):
        cache_bytes(LLAMA, 5, cache=CacheSpec(max_tokens=4))
