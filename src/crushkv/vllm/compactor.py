"""The worker's part: gathers queries, scores the tokens held, selects, and moves them within the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..config import CrushConfig
from ..core import Clock, Evictor, QueryTails
from ..importance import LayerView, kept_mass
from .layout import CacheLayout
from .schedule import Eviction


@dataclass(frozen=True)
class PagedLayer:
    """One attention layer of this worker.

    Attributes:
        index: among all layers of the model.
        cache: as vLLM has it.
        numbers: dtype of the stored numbers, if the cache holds them as bytes (fp8).
        key_scale, value_scale: what stored numbers are multiplied with.
        scaling, softcap: of the attention logits.
    """

    index: int
    cache: Tensor
    layout: CacheLayout
    kv_heads: int
    scaling: float
    softcap: float | None = None
    numbers: torch.dtype | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def block_size(self) -> int:
        return self.cache.shape[2]

    def read(self, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The first `tokens` tokens as they are stored, `[Hkv, tokens, D]` each."""
        keys, values = self.layout.read(self.cache, blocks)
        return keys[:, :tokens], values[:, :tokens]

    def decode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored numbers as what attention computes with."""
        if self.numbers is None:
            return keys, values
        return keys.view(self.numbers).float() * self.key_scale, values.view(self.numbers).float() * self.value_scale


class Compaction(Protocol):
    """What the scheduler asks for; see `blocks.Compaction`."""

    @property
    def eviction(self) -> Eviction: ...
    @property
    def blocks(self) -> list[int]: ...


@dataclass(frozen=True)
class StepRow:
    """One request in one step of the model.

    Attributes:
        computed: tokens seen before the step.
        first: place of its first query among the step's.
        tokens: computed in this step.
        blocks: its block table, of which what is held at the end of the step is a part.
        held: tokens in the cache at the end of the step.
    """

    request_id: str
    clock: Clock
    computed: int
    first: int
    tokens: int
    blocks: Tensor
    held: int

    @property
    def seen(self) -> int:
        return self.computed + self.tokens


@dataclass
class _Mass:
    """Of a request under a streaming policy: attention mass per layer, and how many queries are not in it yet."""

    layers: dict[int, Tensor] = field(default_factory=dict)  # [1, Hq, held]
    pending: int = 0


@dataclass
class Totals:
    """Counted since the start."""

    compactions: int = 0
    tokens_dropped: int = 0
    seconds: float = 0.0


class Compactor:
    """Knows tensors and requests, nothing of vLLM.

    Args:
        layers: of this worker, in the order of the model.
    """

    def __init__(self, config: CrushConfig, layers: Sequence[PagedLayer]) -> None:
        self.config = config
        self.evictor = Evictor(config)
        self.layers = layers
        self.totals = Totals()
        self._tails = QueryTails(len(layers), self.evictor.tail)
        self._mass: dict[str, _Mass] = {}
        self._failed: dict[str, str] = {}  # why these requests cannot be compressed
        self._sources: Tensor | None = None  # of the step's queries, those to remember
        self._places: Tensor | None = None
        self._streamed: list[StepRow] = []
        self._flushed: list[StepRow] = []

    def begin(self, rows: Sequence[StepRow]) -> None:
        """Before the model runs: works out which queries of the step have to be remembered."""
        self._sources = self._places = None
        self._streamed, self._flushed = [], []
        sources: list[int] = []
        places: list[int] = []
        for row in rows:
            if row.request_id in self._failed:
                continue
            start = self._stream(row) if self.evictor.streams else self._needed(row)
            if start is not None and start < row.seen:
                sources += range(row.first + start - row.computed, row.first + row.tokens)
                places += self._tails.places(row.request_id, start, row.seen)
        if sources:
            device = self.layers[0].cache.device
            self._sources, self._places = torch.tensor(sources, device=device), torch.tensor(places, device=device)

    def _needed(self, row: StepRow) -> int | None:
        """First position of the step whose query the next eviction needs. None: it needs none."""
        point = row.clock.next_point(row.computed)
        return None if point is None or not self.evictor.tail else max(row.computed, point - self.evictor.tail)

    def _stream(self, row: StepRow) -> int | None:
        """For streaming policies: uses the queries of a prompt at once, and gathers those of decoded tokens."""
        if row.clock.next_point(row.computed) is None:
            return None
        mass = self._mass.setdefault(row.request_id, _Mass())
        if row.clock.is_prompt(row.computed, row.tokens):
            self._streamed.append(row)
            return None
        mass.pending += 1
        if mass.pending == self.evictor.tail:
            self._flushed.append(row)
        return row.computed

    @torch.no_grad()
    def observe(self, layer: int, queries: Tensor) -> None:
        """After a layer has attended: `queries [tokens, Hq, D]` of the whole step, after RoPE."""
        if self._sources is not None and self._places is not None:
            self._tails.record(layer, queries.index_select(0, self._sources), self._places)
        for row in self._streamed:
            new = queries[row.first : row.first + row.tokens].transpose(0, 1)[None]
            self._accumulate(layer, row.request_id, row.blocks, row.held, new)
        for row in self._flushed:
            gathered = self._tails.last(layer, [row.request_id], row.seen, self.evictor.tail)
            self._accumulate(layer, row.request_id, row.blocks, row.held, gathered)

    def _accumulate(self, index: int, request_id: str, blocks: Tensor, held: int, queries: Tensor) -> None:
        if request_id in self._failed:
            return
        layer = self.layers[index]
        size = layer.block_size
        try:
            tokens = layer.decode(*layer.read(blocks[: -(-held // size)], held))
            mass = self._mass[request_id].layers
            mass[index] = self.evictor.gather(self._view(layer, tokens, queries, mass.get(index)))
        except Exception as error:  # the policy's, which may be anybody's: the others' answers do not depend on it
            self._failed[request_id] = _reason(error)

    def _view(
        self,
        layer: PagedLayer,
        tokens: tuple[Tensor, Tensor],
        queries: Tensor | None,
        mass: Tensor | None,
        seen: int = 0,
    ) -> LayerView:
        """What a policy reads: keys and values `[Hkv, held, D]`, `queries [1, Hq, q, D]`, `mass [1, Hq, held]`."""
        keys, values = tokens
        return LayerView(
            keys=keys[None],
            values=values[None],
            queries=None if queries is None else queries.to(keys.dtype),
            scaling=layer.scaling,
            softcap=layer.softcap,
            mass=mass,
            seed=self.evictor.seed(layer.index, seen),
        )

    def end(self) -> None:
        """After the model has run."""
        for row in self._flushed:
            self._mass[row.request_id].pending = 0
        self._sources = self._places = None
        self._streamed, self._flushed = [], []

    @torch.no_grad()
    def compact(self, compactions: Mapping[str, Compaction], tables: Mapping[str, Tensor]) -> dict[str, str]:
        """Between two steps: compacts what the scheduler says.

        Args:
            tables: block tables of these requests, int64, as they were during the step before.

        Returns:
            The requests whose tokens cannot be ranked (the scores are NaN, or the policy fails), and why. Their blocks
            hold nothing of use afterwards. They are not observed again until `forget`.
        """
        start = time.perf_counter()
        for request_id, compaction in compactions.items():
            if request_id in self._failed:
                continue
            try:
                self._compact(request_id, compaction, tables[request_id])
            except Exception as error:  # a policy may be anybody's, and the engine has other requests
                self._failed[request_id] = _reason(error)
        failed = {name: self._failed[name] for name in compactions if name in self._failed}
        for request_id in failed:
            self._release(request_id)
        self.totals.seconds += time.perf_counter() - start
        return failed

    def _compact(self, request_id: str, compaction: Compaction, table: Tensor) -> None:
        eviction = compaction.eviction
        target = torch.tensor(compaction.blocks, device=table.device)
        for index, layer in enumerate(self.layers):
            source = table[: -(-eviction.held // layer.block_size)]
            keys, values = layer.read(source, eviction.held)
            chosen = self._select(index, request_id, eviction, layer.decode(keys, values))  # [Hkv, kept]
            layer.cache[target[-1]].zero_()  # behind the last token may lie what others have left
            layer.layout.write(layer.cache, target, _gather(keys, chosen), _gather(values, chosen))
        self.totals.compactions += 1
        self.totals.tokens_dropped += eviction.held - eviction.kept
        if self.evictor.streams:
            self._mass[request_id].pending = 0
        elif self.config.interval == 0 or self.config.interval >= self.evictor.tail:
            self._tails.release(request_id)  # the next eviction needs none of these queries

    def _select(self, index: int, request_id: str, eviction: Eviction, tokens: tuple[Tensor, Tensor]) -> Tensor:
        layer = self.layers[index]
        mass = None
        queries = None
        if self.evictor.streams:
            state = self._mass[request_id]
            if state.pending:
                gathered = self._tails.last(index, [request_id], eviction.seen, state.pending)
                view = self._view(layer, tokens, gathered, state.layers.get(index))
                state.layers[index] = self.evictor.gather(view)
            mass = state.layers[index]
        elif self.evictor.tail:
            queries = self._tails.last(index, [request_id], eviction.seen, min(self.evictor.tail, eviction.seen))
        view = self._view(layer, tokens, queries, mass, eviction.seen)
        selection = self.evictor.select(self.evictor.score(view), layer.kv_heads, torch.tensor([eviction.budget]))
        selection.check()
        if mass is not None:
            self._mass[request_id].layers[index] = kept_mass(mass, selection.kept.indices)
        return selection.kept.indices[0]

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._failed.pop(request_id, None)
        self._release(request_id)

    def restart(self, request_id: str) -> None:
        """A request will be computed anew, from its first token."""
        self._release(request_id)

    def fail(self, request_id: str, reason: str) -> None:
        """Another worker cannot rank the tokens of this request."""
        self._failed[request_id] = reason
        self._release(request_id)

    def _release(self, request_id: str) -> None:
        self._tails.release(request_id)
        self._mass.pop(request_id, None)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _gather(tokens: Tensor, chosen: Tensor) -> Tensor:
    """`[Hkv, T, D]` at `chosen [Hkv, kept]`."""
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))
