"""One layer of a `CrushCache`: what it holds, and when it evicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .. import kernels
from ..core import BatchTail, Scored
from ..errors import UnsupportedModelError
from ..storage import TieredStorage
from ..storage.buffers import no_grad
from .head_group import AttentionCall, HeadGroup, Heads
from .plan import Plan

# Tokens of room made at a time while decoding; never more than come before the next eviction.
GROWTH = 64


class CrushLayer(CacheLayerMixin):
    """Keys and values of one attention layer, compressed at the end of a prompt and while decoding.

    The *logical* length counts every token seen and is what Transformers reads (positions, masks). The
    *physical* length counts what is held, and may differ between groups of heads.

    Attributes:
        groups: what the heads hold: one group of them all, until heads of unequal budgets part.
        stores: what each of them holds. heads: the KV heads of each; none, where it is one group of them all.
        any_storage: of one of the groups, for what is the same in all.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, plan: Plan, index: int) -> None:
        self.plan = plan
        self.index = index  # among the compressed layers
        self.reset()

    def reset(self) -> None:
        self._set_groups([self._new_group()])
        self.last_point = 0  # logical length at the last point of the clock
        self.query_energy: Tensor | None = None  # float32 [Hq, D], where no profile of the model says it
        self.queries = BatchTail(self.plan.evictor.tail)

    def _new_group(self, heads: Heads | None = None) -> HeadGroup:
        """One that holds nothing yet."""
        growth = min(GROWTH, self.plan.config.interval or GROWTH)
        return HeadGroup(self.plan, self.index, TieredStorage(self.plan.formats, growth, self.plan.workspace), heads)

    def _set_groups(self, groups: list[HeadGroup]) -> None:
        self.groups = groups
        self.any_storage = groups[0].storage
        self.stores = [group.storage for group in groups]
        self.heads = [group.heads.numbers for group in groups if group.heads is not None]
        places = [head for numbers in self.heads for head in numbers]
        # Where each head of the model stands when what the groups hold is joined.
        self._back = Heads(tuple(map(places.index, range(len(places)))), len(places)) if places else None

    # What Transformers reads

    @property
    def seen(self) -> int:
        """Logical length, padding included."""
        return self.any_storage.seen

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self.any_storage.empty else self.read()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.any_storage.empty else self.read()[1]

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return not self.any_storage.empty

    @property
    def batch_size(self) -> int:
        return -1 if self.any_storage.empty else self.any_storage.rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update brings shapes, dtype and device."""

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Takes in the tokens of a pass; returns all keys and values, or a part of them.

        The attention function, which sees what is returned here, reads packed tokens as they are, and heads that hold
        different numbers of tokens group by group: while decoding, and from heads that have parted, it gets what came
        in. Before anything is packed, it has received a whole prompt's keys from here.
        """
        rows, _, new, _ = key_states.shape
        if not (storage := self.any_storage).empty:
            if storage.rows != rows:
                raise UnsupportedModelError(
                    f"the cache holds {storage.rows} rows, but the input has {rows}: use one cache a batch"
                )
            if storage.device != key_states.device:
                self._move(key_states.device)
        end = self.plan.clock.prompt_end
        reserve = 0 if end is None else max(0, end - self.seen - new)
        at_once = new == 1 and self.parted
        if not at_once or not kernels.append(key_states, value_states, self.stores, self.heads):
            for group in self.groups:
                group.append(key_states, value_states, reserve)
        if self.parted or (self.plan.reads_packed and new == 1 and not torch.is_grad_enabled()):
            return key_states.view_as(key_states), value_states
        return self.storage.attended()

    # Its heads

    @property
    def parted(self) -> bool:
        """Whether heads hold different numbers of tokens."""
        return len(self.groups) > 1

    @property
    def storage(self) -> TieredStorage:
        """What all heads hold, as long as they hold the same number of tokens."""
        assert not self.parted, "heads hold different numbers of tokens: read `groups`"
        return self.any_storage

    @property
    def length(self) -> int:
        """Slots of the heads that hold most: P."""
        return max(group.storage.length for group in self.groups)

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return sum(group.storage.kv_heads for group in self.groups)

    def joined(self, parts: list[Tensor], dim: int = 1) -> Tensor:
        """What was computed group by group, with the heads at `dim` in the model's order."""
        return parts[0] if self._back is None else self._back.pick(torch.cat(parts, dim), dim)

    def _slots(self, parts: list[Tensor]) -> Tensor:
        """`[B, H, P, ...]` of each group in one tensor; heads that hold fewer tokens are filled up in front."""
        longest = self.length
        filled = [F.pad(x, (*(0, 0) * (x.ndim - 3), longest - x.shape[2], 0)) for x in parts]
        return self.joined(filled)

    def _part(self) -> HeadGroup | None:
        """Parts the heads whose budgets differ, when something is evicted or packed for the first time.

        Returns:
            What they were before, if they parted.
        """
        if self.parted or self.any_storage.kept or self.plan.shares.needs is None:
            return None
        whole = self.groups[0]
        found = self.plan.shares.groups(self.index, int(whole.real_tokens()[1].max()), self.any_storage.sizes())
        if len(found) == 1:
            return None
        self._set_groups([whole.parted(Heads(heads, self.any_storage.kv_heads)) for heads in found])
        return whole

    # Around attention

    def shown(self, mask: Tensor | None, count: int) -> Tensor | None:
        """Which tokens seen the mask shows to the last of so many queries, bool `[B, seen]`; None: all."""
        shown = self.plan.masks.shown(mask, count, self.seen)
        return None if shown is None else shown.expand(self.any_storage.rows, -1)

    def check_shown(self, shown: Tensor | None, count: int) -> None:
        """Refuses a mask that shows tokens again that were hidden when they were read."""
        if self.index == 0 and shown is not None:
            self.groups[0].check_shown(shown, count)

    @property
    def streams(self) -> bool:
        """Whether the policy is shown every query."""
        return self.plan.evictor.streams

    @no_grad
    def before_attention(self, call: AttentionCall) -> None:
        """Puts to the device what decides on formats, where it is time to evict: it is known when attention is done."""
        count, shown = call.queries.shape[2], call.shown
        for group in self.groups:
            group.extend(shown, count)
        if self.plan.measures_energy and self.any_storage.bases is None:
            squares = call.queries.float().square()
            squares = squares if shown is None else squares * shown[:, None, self.seen - count :, None]
            energy = squares.sum((0, 2))
            self.query_energy = energy if self.query_energy is None else self.query_energy + energy
        if self._evicts_after(count) and not self._untouched:
            for group in self.groups:
                group.fit(call, self.query_energy)
            if self.any_storage.bases is not None:
                self.query_energy = None

    @no_grad
    def after_attention(self, call: AttentionCall) -> None:
        """Scores are gathered from the queries, and where it is time, tokens are evicted."""
        count, shown = call.queries.shape[2], call.shown
        new_real = None
        if shown is not None:
            past, new_real = shown[:, : self.seen - count], shown[:, self.seen - count :]
            self.queries.show(past[:, past.shape[1] - self.queries.count :])
        self.remember(call, new_real, self.plan.clock.is_prompt(self.seen - count, count))
        if not self._evicts_after(count):
            return
        # The keys that a layer makes of its latents are not held for longer than it attends.
        if count > 1 and not self.plan.latent and self.plan.puts_off(call.queries.device):
            nothing = call.queries.new_empty((*call.queries.shape[:2], 0, call.queries.shape[3]))
            of_call = call._replace(queries=nothing, mask=None)  # what evicting reads of them is in `queries`
            self.plan.put_off(partial(self.evict, of_call), last=self.index == self.plan.layers - 1)
        else:
            self.evict(call)
            self.plan.evicted(call.queries.device)

    def _evicts_after(self, count: int) -> bool:
        """Whether it is time to evict behind a pass of so many tokens."""
        return self.plan.clock.is_point(self.seen - count, count, self.last_point)

    @property
    def _untouched(self) -> bool:
        """Whether all rows have seen too few tokens."""
        return bool(self.plan.shares.untouched(self.groups[0].real_tokens()[1]).all())

    def remember(self, call: AttentionCall, new_real: Tensor | None, reading: bool) -> None:
        """Gathers what the policy will read of this call's queries."""
        if call.mass is not None:  # of a whole prompt
            for group in self.groups:
                view = group.view(call, call.queries, None)
                group.accumulate(replace(view, received=group.of_call(call).mass))
        elif self.streams:
            # Decoded tokens' queries are gathered for a while; until they are used, every key they saw is here.
            if reading:
                self._accumulate(call, *self.queries.joined(call.queries, new_real))
            else:
                self.queries.append(call.queries, new_real)
                if self.queries.count == self.queries.length:
                    self._accumulate_gathered(call)
        elif self.queries.length:
            self.queries.append(call.queries, new_real)

    def _accumulate(self, call: AttentionCall, queries: Tensor, real: Tensor | None) -> None:
        for group in self.groups:
            group.accumulate(group.view(call, queries, real))
        self.queries.clear()

    def _accumulate_gathered(self, call: AttentionCall) -> None:
        if (queries := self.queries.queries) is not None:
            self._accumulate(call, queries, self.queries.real)

    def evict(self, call: AttentionCall) -> None:
        """Keeps the budget of what is held, and puts it into the formats of its tiers."""
        self.last_point = self.seen
        if not self._untouched:
            if self.streams:
                self._accumulate_gathered(call)
            whole = self._part()
            budgets = [(group, group.budget()) for group in self.groups]
            # Heads that part now are scored together.
            of_all = None if whole is None else self._scored(whole, call)
            for group, budget in budgets:
                if budget is not None:
                    self.evict_group(group, self._scored(group, call) if of_all is None else group.own(of_all), budget)
                elif of_all is not None:  # what stays must not hold on to the memory of all heads
                    group.storage.dense.copied()
        if self.index == self.plan.layers - 1:
            self.plan.look()

    def _scored(self, group: HeadGroup, call: AttentionCall) -> Scored:
        return group.score(group.view(call, self.queries.queries, self.queries.real))

    def evict_group(self, group: HeadGroup, tokens: Scored, budget: Tensor) -> None:
        """Keeps `budget [B]` tokens of what a group of heads holds."""
        group.evict(tokens, budget)

    # As data

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the layer holds: tensors, and numbers."""
        own = {
            "query_energy": self.query_energy,
            "queries": self.queries.queries,
            "queries_real": self.queries.real,
        }
        tensors = {name: tensor for name, tensor in own.items() if tensor is not None}
        for number, group in enumerate(self.groups):
            held = group.state()
            if group.heads is not None:
                held = {f"group{number}.{name}": x for name, x in held.items()}
                held[f"group{number}.heads"] = torch.tensor(group.heads.numbers)
            tensors |= held
        return tensors, {"seen": self.seen, "since_eviction": self.seen - self.last_point}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Replaces everything by what `state` gave, of this or another layer of the same formats."""
        self.reset()
        groups = of_groups(tensors)
        if parts := [tuple(held["heads"].tolist()) for held in groups if "heads" in held]:
            self._set_groups([self._new_group(Heads(heads, sum(map(len, parts)))) for heads in parts])
        for group, held in zip(self.groups, groups, strict=True):
            group.load_state(held, counts["seen"])
        if (queries := tensors.get("queries")) is not None and self.queries.length:
            self.queries.append(queries, tensors.get("queries_real"))
        self.query_energy = tensors.get("query_energy")
        self.last_point = counts["seen"] - counts["since_eviction"]

    def _move(self, device: torch.device) -> None:
        """To where the layer's model computes: a cache that was read from a file lies in main memory."""
        tensors, counts = self.state()
        self.load_state({name: tensor.to(device) for name, tensor in tensors.items()}, counts)

    # What is held

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, P, D]` as the model made them, but for what quantization lost."""
        keys, values = zip(*(group.storage.read() for group in self.groups), strict=True)
        return self._slots(list(keys)), self._slots(list(values))

    @property
    def positions(self) -> Tensor:
        """Logical position of every slot, int64 `[B, Hkv, P]`, padding counted; of no meaning where a slot is empty."""
        return self._slots([group.storage.positions for group in self.groups])

    @property
    def tiers(self) -> Tensor:
        """Tier of every slot, uint8 `[B, Hkv, P]`; tokens that came since the last eviction are recent."""
        return self._slots([group.tiers for group in self.groups])

    @property
    def widened_by(self) -> int:
        """Bits more than was asked for of a key's number, in the heads that got most."""
        return max(group.storage.widened_by for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(group.storage.nbytes for group in self.groups)

    @property
    def state_nbytes(self) -> int:
        """Bytes held besides keys and values: positions, tiers, attention mass, last queries."""
        return sum(group.state_nbytes for group in self.groups) + self.queries.nbytes

    # What generation does with a cache

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it, which may repeat."""
        for group in self.groups:
            group.select_rows(rows)
        self.queries.select_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.seen:
            self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self.select_rows(torch.arange(self.batch_size)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedModelError(
            "a compressed cache cannot be cropped: evicted tokens do not come back. Assisted decoding and prompt "
            "lookup need that; generate without them"
        )

    def offload(self) -> None:
        raise UnsupportedModelError(
            "offloading is not supported together with KVCrush: leave cache_implementation unset"
        )


def of_groups(tensors: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """The tensors of each group of heads, out of what `CrushLayer.state` gives."""
    numbers = sorted({name.partition(".")[0] for name in tensors if name.startswith("group")})
    if not numbers:
        return [tensors]
    return [
        {name.removeprefix(f"{group}."): x for name, x in tensors.items() if name.startswith(f"{group}.")}
        for group in numbers
    ]
