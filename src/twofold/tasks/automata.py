"""In-context language learning: strings of an automaton that no other sequence has, to be continued symbol by symbol.

    b c a | b c c a b | b ?        after "b" this automaton goes on with "c" and nothing else

Each sequence has a random automaton of its own: a few states, from each a few edges with different symbols to other states, all equally
likely. Its strings begin in the first state and stand one behind another. A prediction counts as right if the automaton allows the
symbol; beside that stands how far the predicted distribution is from the automaton's (total variation). Separators and padding are not scored.
Source: RegBench of "In-Context Language Learning: Architectures and Algorithms" (arXiv:2401.12973) and its published generator, which draws
numbers of edges, strings and symbols below its maxima of 4, 20 and 50; the defaults here are what it can draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.tasks.options import Options
from twofold.tasks.task import IGNORED, Batch, TableTask, TaskKind, commonest_so_far, data_hash, generator

MAX_FAILURES = 1_000


@dataclass(frozen=True, kw_only=True)
class AutomataOptions(Options):
    """An automaton has ``min_states`` to ``max_states`` states, 1 to ``max_edges`` edges from each, and some of ``num_symbols`` symbols.

    A sequence has ``min_strings`` to ``max_strings`` strings of 1 to ``max_length`` symbols. No two sequences have the same language, so
    none of a held-out one was trained on.
    """

    num_symbols: int = 18
    min_states: int = 4
    max_states: int = 12
    max_edges: int = 3
    min_strings: int = 10
    max_strings: int = 19
    max_length: int = 49
    train_size: int = 5_000
    held_out_size: int = 500
    data_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "max_edges", "min_strings", "max_length", "train_size", "held_out_size")
        self.require("num_symbols", self.max_edges < self.num_symbols <= 120, f"from {self.max_edges + 1} to 120, more than edges")  # fmt: skip
        self.require("min_states", self.min_states > self.max_edges, f"at least {self.max_edges + 1}: edges lead to different other states")  # fmt: skip
        self.require("max_states", self.min_states <= self.max_states <= 100, f"from min_states = {self.min_states} to 100")  # fmt: skip
        self.require("max_strings", self.max_strings >= self.min_strings, f"at least min_strings = {self.min_strings}")
        self.require("max_length", self.length > 1, "at least 2, with a single string")
        self.require_seed()

    @property
    def length(self) -> int:
        """Tokens of a sequence, padding included."""
        return self.max_strings * (self.max_length + 1) - 1


Edges = list[dict[int, int]]
"""Of each state the symbols that lead on, and where to. The first state begins."""


class AutomataTask(TableTask):
    """``accuracy`` counts symbols that the automaton allows, ``exact`` those that came; ``total_variation`` is a mean over predictions, from 0 to 1.

    ``automata`` are those of the training part, then of the held-out part, in the order of the rows.
    """

    def __init__(self, options: AutomataOptions) -> None:
        self._options = options
        self.automata: list[Edges] = []
        self._rows: dict[bytes, int] = {}
        languages: set[tuple[object, ...]] = set()
        train = self._draw("train", options.train_size, languages)
        held_out = self._draw("held_out", options.held_out_size, languages)
        self._allowed = np.zeros((len(self.automata), options.max_states, options.num_symbols + 2), dtype=bool)
        for row, edges in enumerate(self.automata):
            for state, leads in enumerate(edges):
                self._allowed[row, state, list(leads)] = True
        super().__init__(
            name="automata",
            train=train,
            held_out=held_out,
            description=f"Strings of random automata of up to {options.max_states} states, {options.min_strings} to {options.max_strings} strings of each: "
            f"{options.train_size:,} automata for training, {options.held_out_size:,} others held out.",
            tokens_per_example=options.length,
            chance=self._chance(held_out),
            data_hash=data_hash(train=train, held_out=held_out, automata={"allowed": torch.from_numpy(self._allowed)}),
            model_fields={"architecture": "causal_lm", "vocab_size": options.num_symbols + 2, "causal": True},
        )

    def _draw(self, part: str, size: int, languages: set[tuple[object, ...]]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of so many new automata. Raises TwofoldError where the options allow too few."""
        options, draws = self._options, generator(self._options.data_seed, part)
        tokens = np.full((size, options.length), options.num_symbols + 1, dtype=np.int8)
        row = failures = 0
        while row < size:
            edges = random_automaton(draws, options)
            sequence = _strings(draws, options, edges)
            tokens[row, : len(sequence)], tokens[row, len(sequence) :] = sequence, options.num_symbols + 1
            language = canonical(edges)
            if language in languages or tokens[row].tobytes() in self._rows:
                failures += 1
                if failures > MAX_FAILURES:
                    raise TwofoldError(
                        f"Task automata: after {len(self.automata):,} automata no new ones are found: allow more states, symbols or strings, or fewer sequences."
                    )
                continue
            languages.add(language)
            self._rows[tokens[row].tobytes()] = len(self.automata)
            self.automata.append(edges)
            row, failures = row + 1, 0
        labels = np.where(tokens < options.num_symbols, tokens.astype(np.int16), IGNORED)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels.astype(np.int16))}

    def allowed(self, batch: Batch) -> np.ndarray:
        """bool [B, T, V]: for each place which symbols the sequence's automaton allows there; False all over behind a string's end."""
        tokens = batch["input_ids"].cpu().numpy().astype(np.int8)
        found = np.zeros((*tokens.shape, self._options.num_symbols + 2), dtype=bool)
        for index, sequence in enumerate(tokens):
            row = self._rows[sequence.tobytes()]
            states, state = np.zeros(len(sequence), dtype=np.int64), 0
            for place, token in enumerate(sequence.tolist()):
                states[place] = state
                state = self.automata[row][state].get(token, 0)
            found[index] = self._allowed[row, states]
        found[tokens >= self._options.num_symbols] = False
        return found

    def _chance(self, held_out: dict[str, Tensor]) -> float:
        """How often an automaton allows the symbol that was commonest so far in its strings."""
        allowed, labels = self.allowed(held_out), held_out["labels"].numpy().copy()
        labels[:, 0] = IGNORED  # nobody predicts the first symbol
        return commonest_so_far(held_out["input_ids"].numpy(), labels, allowed)

    def measure(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As every task, and the sums of allowed predictions and of total variations."""
        allowed = torch.from_numpy(self.allowed(batch)[:, 1:]).to(logits.device)
        scored = self.targets(batch).to(logits.device) != IGNORED
        predictions = logits[:, :-1]
        right = allowed.gather(-1, predictions.argmax(-1, keepdim=True)).squeeze(-1) & scored
        wanted = allowed.double() / allowed.sum(dim=-1, keepdim=True).clamp(min=1)
        distances = (predictions.double().softmax(-1) - wanted).abs().sum(-1) / 2
        return super().measure(logits, batch) | {
            "allowed": right.double().sum(),
            "variation": distances.masked_fill(~scored, 0.0).sum(),
        }

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Per prediction."""
        count = totals["count"]
        return {
            "loss": totals["loss"] / count,
            "accuracy": totals["allowed"] / count,
            "exact": totals["correct"] / count,
            "total_variation": totals["variation"] / count,
        }


def random_automaton(draws: np.random.RandomState, options: AutomataOptions) -> Edges:
    """States, edges and symbols as many as the options allow, each number equally likely; no edge leads back to its own state."""
    num_states = int(draws.randint(options.min_states, options.max_states + 1))
    num_symbols = int(draws.randint(options.max_edges + 1, options.num_symbols + 1))
    alphabet = draws.permutation(options.num_symbols)[:num_symbols]
    edges: Edges = []
    for state in range(num_states):
        count = int(draws.randint(1, options.max_edges + 1))
        symbols = alphabet[draws.permutation(num_symbols)[:count]].tolist()
        others = (state + 1 + draws.permutation(num_states - 1)[:count]) % num_states
        edges.append(dict(zip(symbols, others.tolist(), strict=True)))
    return edges


def canonical(edges: Edges) -> tuple[object, ...]:
    """The smallest automaton of the same language, its states numbered as they are reached: equal exactly where languages are.

    States are told apart by the symbols they allow, then by the states that these lead to, until nothing changes (Moore, 1956).
    """
    kinds: list[object] = [tuple(sorted(leads)) for leads in edges]
    while True:
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        kind_of = [numbers[kind] for kind in kinds]
        finer = [
            (kind_of[state], tuple((s, kind_of[leads[s]]) for s in sorted(leads))) for state, leads in enumerate(edges)
        ]
        if len(set(finer)) == len(numbers):
            break
        kinds = list(finer)
    order, found = {kind_of[0]: 0}, list[tuple[object, ...]]()
    waiting = [0]
    for state in waiting:
        leads = edges[state]
        for symbol in sorted(leads):
            if kind_of[leads[symbol]] not in order:
                order[kind_of[leads[symbol]]] = len(order)
                waiting.append(leads[symbol])
        found.append(tuple((symbol, order[kind_of[leads[symbol]]]) for symbol in sorted(leads)))
    return tuple(found)


def _strings(draws: np.random.RandomState, options: AutomataOptions, edges: Edges) -> list[int]:
    """Strings of the automaton with a separator between two of them."""
    lengths = draws.randint(1, options.max_length + 1, size=draws.randint(options.min_strings, options.max_strings + 1))
    shares = draws.random_sample(int(lengths.sum())).tolist()
    choices = [list(leads.items()) for leads in edges]
    tokens: list[int] = []
    for length in lengths.tolist():
        state = 0
        for _ in range(length):
            symbol, state = choices[state][int(shares.pop() * len(choices[state]))]
            tokens.append(symbol)
        tokens.append(options.num_symbols)
    return tokens[:-1]


KINDS = (
    TaskKind(
        name="automata",
        summary="strings of a random automaton, learnt from the context (RegBench)",
        options=AutomataOptions,
        load=AutomataTask,
    ),
)
