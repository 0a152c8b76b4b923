"""A layer's storage through any steps: appended to, evicted from, narrowed, branched, reordered, saved and loaded."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from crushkv import kernels
from crushkv.storage import Formats, LayerSizes, TieredStorage
from stores import FORMATS, rope_of

HEADS, SIZE, VALUE_SIZE = 2, 16, 12
MOST_ROWS, MOST_SLOTS = 4, 400
DENSE, NOT_HELD = -1, -2  # in place of a block's number


class Steps(RuleBasedStateMachine):
    """`tokens [rows, heads]` lists what each slot has to hold, in order: the token's position and block."""

    formats: Formats

    @initialize(seed=st.integers(0, 2**20), rows=st.integers(1, 3), count=st.integers(40, 120), turns=st.booleans())
    def read_a_prompt(self, seed: int, rows: int, count: int, turns: bool) -> None:
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.rope = rope_of(SIZE) if turns else None
        self.constant = 5 * torch.randn(HEADS, 1, SIZE)
        self.storage = TieredStorage(self.formats, growth=5)
        self.seen = 0
        self.keys = torch.empty(rows, HEADS, 0, SIZE)
        self.values = torch.empty(rows, HEADS, 0, VALUE_SIZE)
        self.tokens: list[list[list[tuple[int, int]]]] = [[[] for _ in range(HEADS)] for _ in range(rows)]
        self.before = torch.empty(rows, HEADS, 0, SIZE + VALUE_SIZE)  # what was held of each position
        self.blocks_before = torch.empty(rows, HEADS, 0, dtype=torch.int64)
        self.append(count)

    @property
    def rows(self) -> int:
        return len(self.tokens)

    # Steps

    @precondition(lambda self: self.storage.length < MOST_SLOTS)
    @rule(count=st.integers(1, 20))
    def append(self, count: int) -> None:
        keys = self.constant + torch.randn(self.rows, HEADS, count, SIZE)
        if self.rope is not None:
            keys = self.rope.turned(keys, torch.arange(self.seen, self.seen + count))
        values = torch.randn(self.rows, HEADS, count, VALUE_SIZE)
        self.storage.append(keys, values)
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        for slots in (slots for row in self.tokens for slots in row):
            slots += [(position, DENSE) for position in range(self.seen, self.seen + count)]
        self.before = F.pad(self.before, (0, 0, 0, count))
        self.blocks_before = F.pad(self.blocks_before, (0, count), value=NOT_HELD)
        self.seen += count

    # The coordinates are fitted to what is held when something is packed for the first time, never to a handful.
    @precondition(lambda self: self.storage.bases is not None or self.storage.length >= 40)
    @rule(part=st.floats(0.2, 1), share=st.floats(0, 1), always=st.floats(0, 0.5))
    def evict(self, part: float, share: float, always: float) -> None:
        """Keeps a part. What leaves the model's dtype or a block moves to a later one, or to that of recent tokens."""
        kept = max(1, int(part * self.storage.length))
        recent = min(int(always * kept), *(len(self._as_they_were(slots)) for row in self.tokens for slots in row))
        last = len(self.formats.contested) - 1
        slots = torch.zeros(self.rows, HEADS, kept, dtype=torch.int64)
        first = int(share * (kept - recent))
        for b, row in enumerate(self.tokens):
            for h, own in enumerate(self._chosen(slots, kept, recent) for slots in row):
                of_recent, rest = own[:recent], own[recent:]
                rest.sort(key=lambda slot: max(0, self.tokens[b][h][slot][1]))  # those of the last block behind
                order = rest + of_recent
                slots[b, h] = torch.tensor(order)
                blocks = [0] * first + [last] * (len(rest) - first) + [self._recent_block] * recent
                if self.formats.raw:
                    blocks = [DENSE] * kept
                self.tokens[b][h] = [(self.tokens[b][h][s][0], to) for s, to in zip(order, blocks, strict=True)]
        contested = [kept - recent] if last == 0 else [first, kept - recent - first]
        lengths = [kept] if self.formats.raw else [*contested, recent]
        self.storage.fit(None, self.rope)
        self.storage.keep(slots, [*lengths, 0] if self.formats.recent_block else lengths)
        if not self.storage.blocked:
            self.tokens = [[[(position, DENSE) for position, _ in slots] for slots in row] for row in self.tokens]

    @property
    def _recent_block(self) -> int:
        return len(self.formats.contested) if self.formats.recent_block else DENSE

    def _as_they_were(self, slots: list[tuple[int, int]]) -> list[int]:
        """Slots of tokens that may go on as sink and recent tokens."""
        return [s for s, (_, block) in enumerate(slots) if block in (DENSE, self._recent_block)]

    def _chosen(self, slots: list[tuple[int, int]], kept: int, recent: int) -> list[int]:
        """Slots that stay, first those of sink and recent tokens."""
        first = self.draw.sample(self._as_they_were(slots), recent)
        rest = [s for s in range(len(slots)) if s not in set(first)]
        return first + self.draw.sample(rest, kept - recent)

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        """Beams are reordered, rows are dropped, and branches share what came before."""
        chosen = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=MOST_ROWS))
        rows = torch.tensor(chosen)
        self.storage.select_rows(rows)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.tokens = [[list(slots) for slots in self.tokens[row]] for row in chosen]
        self.before, self.blocks_before = self.before[rows], self.blocks_before[rows]

    @rule()
    def save_and_load(self) -> None:
        state = {name: tensor.clone() for name, tensor in self.storage.state().items()}
        self.storage = TieredStorage(self.formats, growth=5)
        self.storage.load_state(state, self.seen)

    # What holds after every step

    @invariant()
    def nothing_is_lost_or_held_twice(self) -> None:
        positions = [[[position for position, _ in slots] for slots in row] for row in self.tokens]
        assert self.storage.positions.tolist() == positions
        assert all(len(set(slots)) == len(slots) for row in positions for slots in row)
        assert self.storage.length == len(positions[0][0]) and self.storage.seen == self.seen

    @invariant()
    def every_slot_holds_its_token(self) -> None:
        """Exactly, where it is not packed. What is packed stays as it is until it moves to another block."""
        held = torch.cat(self.storage.read(), -1)
        at = self.storage.positions[..., None].expand_as(held)
        exact = torch.cat([self.keys, self.values], -1).gather(2, at)
        blocks = torch.tensor([[[block for _, block in slots] for slots in row] for row in self.tokens])
        dense = blocks == DENSE
        torch.testing.assert_close(held[dense], exact[dense], rtol=1e-5, atol=1e-5)
        stayed = ~dense & (self.blocks_before.gather(2, at[..., 0]) == blocks)
        torch.testing.assert_close(held[stayed], self.before.gather(2, at)[stayed], rtol=1e-5, atol=1e-5)
        # In so few bits a token is still nearer to itself than others are.
        error, scale = (held - exact).square().mean(), (exact - exact.mean(2, keepdim=True)).square().mean()
        assert error <= 0.6 * scale or self.storage.length < 8
        self.blocks_before = torch.full((self.rows, HEADS, self.seen), NOT_HELD).scatter(2, at[..., 0], blocks)
        self.before = torch.zeros(self.rows, HEADS, self.seen, SIZE + VALUE_SIZE).scatter(2, at, held)

    @invariant()
    def bytes_are_counted(self) -> None:
        if self.formats.raw or not self.storage.blocked:
            return
        s, sizes = self.storage, self.storage.sizes()
        halves = LayerSizes(s.formats, HEADS, sizes.sizes, sizes.ranks, raw_bytes=2)
        blocks = sum(halves.block(bits, b[0].tokens) for bits, b in zip(s.formats.blocks, s.blocks, strict=True))
        assert s.nbytes_at_16_bits == self.rows * (blocks + halves.raw(s.dense.length) + halves.bases)

    @invariant()
    def attention_is_over_what_is_held(self) -> None:
        queries = torch.randn(self.rows, HEADS * 3, 1, SIZE)
        keys, values = (x.repeat_interleave(3, 1) for x in self.storage.read())
        expected = (queries @ keys.transpose(-1, -2) / 4).softmax(-1) @ values
        torch.testing.assert_close(kernels.attend(queries, self.storage, 0.25), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["16 bits", *FORMATS])
def test_steps_in_any_order(name: str) -> None:
    class Case(Steps):
        formats = Formats() if name == "16 bits" else FORMATS[name]

    limits = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Case, settings=limits)  # type: ignore[no-untyped-call]
