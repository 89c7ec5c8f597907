"""The attention module against the oracle: outputs and gradients in float64, for any tie, heads, positions and mask; and what it must not copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_strategies import (
    EXACT_BACKENDS,
    NAMED_TIES,
    POSITIONS,
    Case,
    cases,
    drawn_layer,
    random_ties,
    serves,
    specs,
)
from twofold import oracle
from twofold.attention import Attention, problem_of
from twofold.cost import attention_parameters, cached_streams
from twofold.errors import TwofoldError
from twofold.kernels import Inputs, choose, scaled_dot_product
from twofold.positions import NoPositions, RotaryPositions, SharedRotaryPositions
from twofold.rotations import Span
from twofold.spec import AttentionSpec
from twofold.tie import Tie

TOLERANCE = 1e-10


def outputs_and_gradients(compute, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradient of a fixed random function of it with respect to the input and to every weight."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in case.layer.state_dict().items()}
    states = case.hidden_states.clone().requires_grad_()
    output = compute(weights, states)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    names = ["hidden_states", *weights]
    gradients = torch.autograd.grad((output * probe).sum(), [states, *weights.values()], allow_unused=True)
    return output, {
        name: torch.zeros(()) if gradient is None else gradient for name, gradient in zip(names, gradients, strict=True)
    }


def by_module(case: Case):
    def compute(weights: dict[str, Tensor], states: Tensor) -> Tensor:
        masks = {"key_mask": case.key_mask, "segments": case.segments}
        return torch.func.functional_call(case.layer, weights, (states,), masks)

    return compute


def by_oracle(case: Case):
    def compute(weights: dict[str, Tensor], states: Tensor) -> Tensor:
        return oracle.layer(case.layer.spec, weights, states, key_mask=case.key_mask, segments=case.segments)

    return compute


def assert_agrees(case: Case) -> None:
    output, gradients = outputs_and_gradients(by_module(case), case)
    wanted, wanted_gradients = outputs_and_gradients(by_oracle(case), case)
    torch.testing.assert_close(output, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    for name, gradient in wanted_gradients.items():
        size = float(gradient.abs().max()) + 1.0
        found = gradients[name].expand_as(gradient)
        assert float((found - gradient).abs().max()) <= TOLERANCE * size, name


@pytest.mark.parametrize("backend", EXACT_BACKENDS)
@given(data=st.data())
@settings(max_examples=150)
def test_the_module_is_the_oracle(backend: str, data: st.DataObject):
    assert_agrees(data.draw(cases(backend=backend)))


@pytest.mark.parametrize("positions", sorted(POSITIONS))
@given(data=st.data())
@settings(max_examples=15)
def test_each_position_scheme_is_the_oracle(positions: str, data: st.DataObject):
    assert_agrees(data.draw(cases(positions=positions)))


@pytest.mark.long
@given(cases())
@settings(max_examples=3000)
def test_the_module_is_the_oracle_at_length(case: Case):
    assert_agrees(case)


@given(case=cases())
@settings(max_examples=10)
def test_the_comparison_can_fail(case: Case):
    """A liar: weights that are not the module's give another output."""
    assume(case.key_mask is None)
    wrong = {name: value + 0.1 for name, value in case.layer.state_dict().items()}
    output = case.layer(case.hidden_states, segments=case.segments).detach()
    lie = oracle.layer(case.layer.spec, wrong, case.hidden_states, segments=case.segments)
    assert float((output - lie).abs().max()) > 1e-6


def spec_with(**changes: object) -> AttentionSpec:
    fields = {
        "tie": Tie.parse("(Q, K=V)"), "hidden_size": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "causal": True,
    }  # fmt: skip
    return AttentionSpec(**{**fields, **changes})


@pytest.mark.parametrize("positions", sorted(POSITIONS))
@pytest.mark.parametrize("tie", ["(Q, K, V)", "(Q, K=V)", "3V = -2K"])
def test_gradcheck(positions: str, tie: str):
    scheme = POSITIONS[positions]
    if not serves(scheme, Tie.parse(tie)):
        tie = "(Q=K=V)" if scheme.turns_stream else "V = -K"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2 if tie == "(Q=K=V)" else 1}
    layer = drawn_layer(
        spec_with(tie=Tie.parse(tie), positions=scheme, hidden_size=3, qk_norm=True, **heads),
        torch.Generator().manual_seed(0),
    )
    names = [name for name, _ in layer.named_parameters()]

    def function(states: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (states,))

    states = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(function, (states, *weights), fast_mode=True)


@given(random_ties(), st.booleans())
@settings(max_examples=60)
def test_a_new_tie_needs_no_code(tie: Tie, causal: bool):
    """Weights are those of the free projections, and the roles obey the tie's equations."""
    spec = spec_with(tie=tie, num_key_value_heads=4, causal=causal)
    layer = drawn_layer(spec, torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in layer.parameters()) == attention_parameters(spec)
    states = torch.randn(1, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        query, key, value = layer._roles(states)
    value = float(tie.value_over_key) * key if value is None else value
    for a, b, c in tie.equations:
        assert float((a * query + b * key + c * value).abs().max()) < 1e-12


def test_a_factor_between_key_and_value_is_the_output_projections():
    """Theorem 1: V = cK is V = K with c in W_O."""
    scaled, plain = spec_with(tie=Tie.parse("2V = -3K")), spec_with()
    layer = drawn_layer(scaled, torch.Generator().manual_seed(3))
    other = drawn_layer(plain, torch.Generator().manual_seed(4))
    weights = layer.state_dict()
    other.load_state_dict({**weights, "o_proj.weight": -1.5 * weights["o_proj.weight"]})
    states = torch.randn(2, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(states), other(states))


def test_one_head_loses_nothing():
    """Theorem 2: with one square head, any (Q, K, V) layer is a (Q, K=V) layer with W_O' = W_K⁻¹ W_V W_O."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 8, "head_dim": 8}
    layer = drawn_layer(spec_with(tie=Tie.parse("(Q, K, V)"), **heads), torch.Generator().manual_seed(3))
    other = drawn_layer(spec_with(**heads), torch.Generator().manual_seed(4))
    w = layer.state_dict()
    folded = torch.linalg.solve(w["k_proj.weight"].T, w["v_proj.weight"].T) @ w["o_proj.weight"].T
    other.load_state_dict(
        {"q_proj.weight": w["q_proj.weight"], "k_proj.weight": w["k_proj.weight"], "o_proj.weight": folded.T}
    )
    states = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(states), other(states))


# What must not be computed or copied


class Allocations(TorchDispatchMode):
    """Counts operations that make a tensor with a storage of its own, by name, of at least so many elements."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given_storages = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            is_large = isinstance(tensor, Tensor) and tensor.numel() >= self.at_least
            if is_large and tensor.untyped_storage().data_ptr() not in given_storages:
                self.made.append(function.overloadpacket.__name__)
        return result


def large_tensors(tie: str, **changes: object) -> list[str]:
    spec = spec_with(
        tie=Tie.parse(tie), num_attention_heads=4, num_key_value_heads=4, hidden_size=32, use_bias=False, **changes
    )
    layer, states = Attention(spec), torch.randn(2, 50, 32)
    with torch.no_grad(), Allocations(2 * 50 * 32) as seen:
        layer(states)
    return seen.made


def test_shared_roles_are_one_tensor():
    """Q, K, V, attention and output are 5 tensors; (Q, K=V) makes 4, (Q=K=V) 3, and none of them copies anything."""
    made = {tie: len(large_tensors(tie)) for tie in ("(Q, K, V)", "(Q, K=V)", "(Q=K, V)", "(Q=K=V)")}
    assert made == {"(Q, K, V)": 5, "(Q, K=V)": 4, "(Q=K, V)": 4, "(Q=K=V)": 3}, large_tensors("(Q, K=V)")


def test_the_count_of_tensors_can_fail():
    assert len(large_tensors("(Q, K=V)", positions=RotaryPositions())) > 4


def test_the_kernel_is_given_one_tensor_twice(monkeypatch: pytest.MonkeyPatch):
    seen: list[Inputs] = []
    real = scaled_dot_product._call

    def record(query: Tensor, key: Tensor, value: Tensor, *arguments: object, **options: object) -> Tensor:
        seen.append(key.data_ptr() == value.data_ptr())
        return real(query, key, value, *arguments, **options)

    monkeypatch.setattr(scaled_dot_product, "_call", record)
    for positions in (NoPositions(), SharedRotaryPositions(dim=4), RotaryPositions(rotate="stream")):
        Attention(spec_with(positions=positions))(torch.randn(1, 5, 7))
    assert seen == [True, True, True]
    Attention(spec_with(tie=Tie.parse("(Q, K, V)")))(torch.randn(1, 5, 7))
    assert seen[-1] is False


# The cache's side


class Streams:
    """A cache that keeps everything, for tests of attention alone."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, ...] = ()

    @property
    def tokens_seen(self) -> int:
        return self.held[0].shape[2] if self.held else 0

    def update(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = zip(self.held, streams, strict=True) if self.held else ()
        self.held = tuple(torch.cat(pair, dim=2) for pair in pairs) or streams
        return self.held

    def key_positions(self, num_keys: int) -> Span:
        return Span(self.tokens_seen - num_keys, self.tokens_seen)

    max_tokens = 0

    def remember(self, _: str, make: Callable[[], Any]) -> Any:
        return make()


@given(specs(causal=True), st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=1, max_size=5))
@settings(max_examples=120)
def test_cached_decoding_is_full_recomputation(spec: AttentionSpec, seed: int, chunks: list[int]):
    generator = torch.Generator().manual_seed(seed)
    layer = drawn_layer(spec, generator)
    states = torch.randn(2, sum(chunks), spec.hidden_size, generator=generator, dtype=torch.float64)
    cache = Streams()
    parts = [layer(part, cache=cache) for part in states.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(states), rtol=TOLERANCE, atol=TOLERANCE)
    assert [(stream.shape[1], stream.shape[3]) for stream in cache.held] == cached_streams(spec)


@pytest.mark.parametrize(
    "positions", ["rotary", "partial", "proportional", "stream", "partial stream", "shared", "bias"]
)
def test_a_shifted_text_gives_the_same_answers(positions: str):
    assert shift_changes(spec_with(positions=POSITIONS[positions])) < 1e-12


def test_a_turned_stream_must_be_turned_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Attention, "_finish", lambda _, output, *__: output.transpose(1, 2).flatten(2))
    assert shift_changes(spec_with(positions=POSITIONS["stream"])) > 0.01


def shift_changes(spec: AttentionSpec) -> float:
    """How far the answers move when five masked tokens are put before a text."""
    layer = drawn_layer(spec, torch.Generator().manual_seed(7))
    states = torch.randn(1, 11, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    key_mask = (torch.arange(11) >= 5)[None]
    with torch.no_grad():
        return float((layer(states, key_mask=key_mask)[:, 5:] - layer(states[:, 5:])).abs().max())


# dtypes, compilers, and mistakes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_lower_precision_stays_near_float64(dtype: torch.dtype, positions: str):
    spec = spec_with(positions=POSITIONS[positions], hidden_size=32, head_dim=16)
    layer = drawn_layer(spec, torch.Generator().manual_seed(5))
    states = torch.randn(2, 33, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wanted = layer(states).detach()
    found = layer.to(dtype)(states.to(dtype)).detach()
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 16 * eps


def test_tables_serve_training_after_inference_mode():
    layer = Attention(spec_with(positions=RotaryPositions(theta=12345.0)))
    with torch.inference_mode():
        layer(torch.randn(1, 5, 7))
    layer(torch.randn(1, 5, 7)).sum().backward()
    assert layer.k_proj.weight.grad is not None


def test_far_positions_keep_their_precision():
    """At position 100,000 float32 angles would be off by 0.004 radians."""
    scheme = RotaryPositions()
    angles, _ = scheme.angles(torch.tensor([100_000]), head_dim=8)
    assert angles.dtype == torch.float64
    assert float(angles[0, 1]) == pytest.approx(100_000 * 10000.0 ** (-2 / 8), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"hidden_states": torch.zeros(2, 5, 6)}, "hidden_states"),
        ({"hidden_states": torch.zeros(5, 7)}, "hidden_states"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_mask"),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, "segments"),
    ],
)
def test_shapes_that_do_not_fit(arguments: dict[str, Tensor], names: str):
    states = arguments.pop("hidden_states", torch.zeros(2, 5, 7))
    with pytest.raises(TwofoldError, match=names):
        Attention(spec_with())(states, **arguments)


def test_what_a_layer_refuses():
    with pytest.raises(TwofoldError, match="backend 'fast'"):
        Attention(spec_with(), backend="fast")
    with pytest.raises(TwofoldError, match="not causal"):
        Attention(spec_with(causal=False))(torch.zeros(1, 2, 7), cache=Streams())
    with pytest.raises(TwofoldError, match="V = K up to a factor"):
        spec_with(tie=Tie.parse("(Q, K, V)"), positions=RotaryPositions(rotate="stream"))
    with pytest.raises(TwofoldError, match="even number"):
        spec_with(positions=RotaryPositions(fraction=0.3))
    with pytest.raises(TwofoldError, match="as many KV heads"):
        spec_with(tie=Tie.parse("(Q=K, V)"))


@pytest.mark.parametrize("tie", NAMED_TIES, ids=str)
@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_the_problem_told_is_the_problem_posed(tie: Tie, positions: str, monkeypatch: pytest.MonkeyPatch):
    """``problem_of`` describes what the layer really hands to its kernel."""
    scheme = POSITIONS[positions]
    if not serves(scheme, tie):
        return
    spec = spec_with(tie=tie, positions=scheme, num_key_value_heads=4)
    posed: list[object] = []
    monkeypatch.setattr(
        "twofold.attention.attend",
        lambda inputs, _: (posed.append(inputs.problem), inputs.query.new_zeros(1, 4, 5, 8))[1],
    )
    with torch.no_grad():
        Attention(spec)(torch.zeros(1, 5, 7))
    told = problem_of(spec, device="cpu", dtype="float32", num_queries=5, num_keys=5)
    assert posed == [told]
    assert choose(told).name == "sdpa"
    assert choose(replace(told, needs_gradient=True), "reference").why == "asked for"
