"""Whatever is done to a cache, in whatever order and however it holds its streams, the next logits are those of full recomputation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_strategies import LLAMA, decoders, drawn_model, drawn_tokens
from test_cache import assert_near, step, whole
from twofold.cache import StaticTiedLayer, TiedCache, load_cache, save_cache
from twofold.cache_spec import CacheSpec
from twofold.cost import cache_bytes
from twofold.errors import TwofoldError
from twofold.spec import ModelSpec

ROOM = 48
# A quantized cache whose tail is never full is exact; what its codes are is asked of its layers, in test_cache_kinds.
KINDS = {
    "growing": CacheSpec(),
    "static": CacheSpec(max_tokens=ROOM),
    "static on the device": CacheSpec(max_tokens=ROOM),
    "tail": CacheSpec(bits=4, group_size=8, tail_tokens=ROOM),
    "mixed": (CacheSpec(), CacheSpec(max_tokens=ROOM)),
    "codes": CacheSpec(bits=8, axis="head"),
    "codes in room": CacheSpec(bits=8, axis="head", max_tokens=ROOM),
}


@contextmanager
def not_looking() -> Iterator[None]:
    """The way of a GPU and of a compiled step: where tokens stand is known to the device alone."""
    with mock.patch.object(StaticTiedLayer, "_may_look", property(lambda _: False)):
        yield


class Story:
    """A cache, and the tokens that it should hold."""

    def __init__(self, spec: ModelSpec, *, kind: str = "growing", records: bool = False) -> None:
        self.spec, self.kind = spec, KINDS[kind]
        self.model = drawn_model(spec, 5)
        self.cache = TiedCache(spec, self.kind)
        self.tokens = drawn_tokens(2, 0)
        self.generator = torch.Generator().manual_seed(7)
        self.records = records and kind in ("growing", "codes")
        self.is_coded = kind.startswith("codes")
        self.windows = [spec.attention(index).window_tokens or 10**9 for index in range(spec.num_hidden_layers)]
        self.held = [0] * len(self.windows)
        if self.records:
            self.cache.activate_past_recording()

    def append(self, count: int) -> None:
        if self.tokens.shape[1] + count > ROOM:
            return
        new = torch.randint(37, (len(self.tokens), count), generator=self.generator)
        self.tokens = torch.cat((self.tokens, new), dim=1)
        self.held = [
            held + count if self.records else min(held + count, window)
            for held, window in zip(self.held, self.windows, strict=True)
        ]
        found = step(self.model, self.cache, new)
        if (
            self.is_coded
        ):  # what is read is what is held: one pass reads the same codes, but for scales on the edge of two float32
            wanted = step(self.model, TiedCache(self.spec, self.kind), self.tokens)[:, -count:]
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        else:
            assert_near(found, whole(self.model, self.tokens)[:, -count:])

    def crop(self, count: int) -> None:
        """A window that has dropped what would be needed refuses, and then nothing has happened."""
        kept = self.tokens.shape[1] - count
        possible = kept >= 0 and all(
            max(0, held - count) >= min(kept, window - 1) for held, window in zip(self.held, self.windows, strict=True)
        )
        before = [[stream.clone() for stream in streams] for streams in self.cache]
        try:
            self.cache.crop(torch.tensor(-count) if count % 2 else -count)
        except TwofoldError:
            assert not possible
            for held, kept in zip(before, self.cache, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
        else:
            assert possible
            self.tokens = self.tokens[:, :kept]
            self.held = [
                min(max(0, held - count), window) for held, window in zip(self.held, self.windows, strict=True)
            ]

    def choose(self, count: int) -> None:
        indices = torch.randint(len(self.tokens), (count,), generator=self.generator)
        self.cache.batch_select_indices(indices)
        self.tokens = self.tokens[indices]

    def reorder(self, _: int) -> None:
        indices = torch.randint(len(self.tokens), (len(self.tokens),), generator=self.generator)
        self.cache.reorder_cache(indices)
        self.tokens = self.tokens[indices]

    def repeat(self, count: int) -> None:
        if len(self.tokens) < 5:
            self.cache.batch_repeat_interleave(count)
            self.tokens = self.tokens.repeat_interleave(count, dim=0)

    def move(self, _: int) -> None:
        for index in range(len(self.cache.layers)):
            self.cache.offload(index, only_non_sliding=False)
            self.cache.layers[index].prefetch()

    def copy(self, _: int) -> None:
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        original.reset()

    def save(self, _: int) -> None:
        with TemporaryDirectory() as folder:
            save_cache(self.cache, Path(folder) / "cache.safetensors")
            self.cache.reset()
            self.cache = load_cache(Path(folder) / "cache.safetensors", self.spec)
        if self.records:
            self.cache.activate_past_recording()

    def reset(self, _: int) -> None:
        batch = len(self.tokens)
        self.cache.reset()
        self.tokens = self.tokens[:, :0]
        self.held = [0] * len(self.windows)
        assert len(self.tokens) == batch


DEEDS = ["append", "append", "append", "crop", "crop", "choose", "reorder", "repeat", "move", "copy", "save", "reset"]
STORIES = st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(1, 4)), max_size=7)


def tell(spec: ModelSpec, kind: str, deeds: list[tuple[str, int]], *, records: bool) -> None:
    with not_looking() if kind == "static on the device" else nullcontext():
        story = Story(spec, kind=kind, records=records)
        story.append(3)
        for deed, count in deeds:
            getattr(story, deed)(count)
            assert int(story.cache.get_seq_length()) == story.tokens.shape[1]
            if story.tokens.shape[1]:
                assert story.cache.batch_size == len(story.tokens)
        story.append(2)
        if not story.records:
            check_bytes(story)


def check_bytes(story: Story) -> None:
    """Measured bytes are counted ones, unless cropping has left a window less than full."""
    tokens = story.tokens.shape[1]
    if all(held == min(tokens, window) for held, window in zip(story.held, story.windows, strict=True)):
        counted = cache_bytes(story.spec, tokens, "fp64", len(story.tokens), story.kind)
        assert story.cache.nbytes == counted


@pytest.mark.parametrize("kind", KINDS)
@given(decoders(), st.booleans(), STORIES)
@settings(max_examples=60)
def test_any_story_goes_on_as_full_recomputation(
    kind: str, spec: ModelSpec, records: bool, deeds: list[tuple[str, int]]
):
    tell(spec, kind, deeds, records=records)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@given(decoders(), st.booleans(), STORIES)
@settings(max_examples=2000)
def test_ten_thousand_stories(kind: str, spec: ModelSpec, records: bool, deeds: list[tuple[str, int]]):
    tell(spec, kind, deeds, records=records)


@pytest.mark.parametrize("windows", [(3, 0), (0, 3)])
@pytest.mark.parametrize(("kind", "records"), [("growing", False), ("growing", True), ("static", False)])
def test_a_window_goes_back_as_far_as_it_can(kind: str, records: bool, windows: tuple[int, ...]):
    """One token without a record of the past; with one, all that came since the last crop."""
    story = Story(LLAMA.with_changes(window_tokens=windows), kind=kind, records=records)
    story.append(8)
    assert story.cache.is_croppable == records
    story.crop(4)
    assert story.tokens.shape[1] == (4 if records else 8)
    story.crop(2)
    assert story.tokens.shape[1] == (4 if records else 8)
    story.crop(1)
    assert story.tokens.shape[1] == (3 if records else 7)
    story.crop(1)
    assert story.tokens.shape[1] == (3 if records else 7)
    story.append(5)


def test_cropping_nothing_drops_what_the_window_no_longer_needs():
    spec = LLAMA.with_changes(window_tokens=(3,))
    story = Story(spec, records=True)
    story.append(8)
    assert story.cache.nbytes == cache_bytes(spec.with_changes(window_tokens=(0,)), 8, "fp64", batch=2)
    story.cache.crop(0)
    assert story.cache.nbytes == cache_bytes(spec, 8, "fp64", batch=2)
    story.append(1)
