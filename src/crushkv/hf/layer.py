"""One layer of a `CrushCache`: what it holds, and when it evicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..core import BatchTail, Tier, layer_seed, select, stage, tail_length
from ..errors import UnsupportedModelError
from ..importance import LayerView, kept_mass, scores
from ..storage import LastQueries, TieredStorage
from ..storage.buffers import take
from .arrangement import arrange
from .masks import Slots, physical_mask
from .plan import Plan

# Tokens of room made at a time while decoding; never more than come before the next eviction.
GROWTH = 64


@dataclass(frozen=True)
class AttentionCall:
    """What the attention function was called with, as far as scoring needs it."""

    queries: Tensor  # [B, Hq, q, D], after RoPE
    mask: Tensor | None  # over logical positions, as Transformers made it
    scaling: float
    softcap: float | None
    mass: Tensor | None = None  # [B, Hq, S]: what each token has received from these queries, where that is known
    sinks: Tensor | None = None  # [Hq]: logits that take part in the softmax and belong to no token (gpt-oss)
    keys: Tensor | None = None  # [B, H, P, D]: that attention received, where the cache holds something else (MLA)
    values: Tensor | None = None  # [B, H, P, Dv]


class CrushLayer(CacheLayerMixin):
    """Keys and values of one attention layer, compressed at the end of a prompt and while decoding.

    The *logical* length counts every token seen and is what Transformers reads (positions, masks). The
    *physical* length counts what is held. Physical slots are, in the order of the text, a compressed part, whose
    tokens differ from head to head, and behind it the tokens that came since, without gaps.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, plan: Plan, index: int) -> None:
        self.plan = plan
        self.index = index  # among the compressed layers
        growth = min(GROWTH, plan.config.interval or GROWTH)
        self.storage = TieredStorage(plan.formats, growth, plan.workspace)
        self.reset()

    def reset(self) -> None:
        self.storage.clear()
        self.last_point = 0  # logical length at the last point of the clock
        self.real: Tensor | None = None  # bool [B, P], False for padding; None: none is
        self.evicted: Tensor | None = None  # [B], real tokens that are gone
        self._tiers: Tensor | None = None  # uint8 [B, Hkv, compressed part]
        self._hides: Tensor | None = None  # bool [B, Hkv, compressed part]: hidden by the mask of the present pass
        self.mass: Tensor | None = None  # float32 [B, Hq, P]
        self.query_energy: Tensor | None = None  # float32 [Hq, D], where no profile of the model says it
        self.queries = BatchTail(tail_length(self.plan.config, self.plan.policy))

    # What Transformers reads

    @property
    def seen(self) -> int:
        """Logical length, padding included."""
        return self.storage.seen

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self.storage.empty else self.storage.read()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.storage.empty else self.storage.read()[1]

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return not self.storage.empty

    @property
    def batch_size(self) -> int:
        return -1 if self.storage.empty else self.storage.rows

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
        """Takes in the tokens of a pass; returns all keys and values, or, while decoding, those that are not packed.

        The attention function, which sees what is returned here, reads the packed ones as they are, or asks for
        `attended()`. Before anything is packed, it has received a whole prompt's keys from here.
        """
        if self.batch_size not in (-1, key_states.shape[0]):
            raise UnsupportedModelError(
                f"the cache holds {self.batch_size} rows, but the input has {key_states.shape[0]}: use one cache a "
                "batch"
            )
        if not self.storage.empty and self.storage.device != key_states.device:
            self._move(key_states.device)
        end = self.plan.clock.prompt_end
        reserve = 0 if end is None else max(0, end - self.seen - key_states.shape[2])
        not_packed = self.storage.append(key_states, value_states, reserve)
        decodes = key_states.shape[2] == 1 and not torch.is_grad_enabled()
        return not_packed if decodes and self.plan.reads_packed else self.storage.attended()

    # Around attention

    @property
    def compressed(self) -> int:
        """Slots of the compressed part."""
        return self.storage.kept

    def mask(self, mask: Tensor | None, query: Tensor, aligned: bool) -> Tensor | None:
        """The mask over physical slots for a mask over logical positions; see `masks.physical_mask`.

        Args:
            query: `[B, Hq, q, D]`, of this pass.
            aligned: flash attention.

        Raises:
            UnsupportedModelError: the mask cannot be followed.
        """
        heads, count = query.shape[1:3]
        shown_to_last = self._shown(mask, count)
        if self.index == 0 and shown_to_last is not None:
            self._check_shown(shown_to_last, count)
        if not self.compressed:
            return mask
        shown = None if self.real is None else self.real[:, : self.compressed]
        hidden = self._hidden(shown_to_last)
        if hidden is not None:
            if aligned:
                raise UnsupportedModelError(
                    "the attention mask hides tokens that were read before, which takes a mask for each head, and "
                    "flash attention has none: use attn_implementation='sdpa'"
                )
            by_head = ~hidden.repeat_interleave(heads // hidden.shape[1], dim=1)
            shown = by_head if shown is None else by_head & shown[:, None]
        storage = self.storage
        slots = Slots(storage.rows, self.compressed, self._since, self.seen, count, storage.device)
        return physical_mask(mask, shown, slots, aligned)

    def _shown(self, mask: Tensor | None, count: int) -> Tensor | None:
        """Which tokens seen the mask shows, bool `[B, seen]`; None: all."""
        shown = self.plan.masks.shown(mask, count, self.seen)
        return None if shown is None else shown.expand(self.storage.rows, -1)

    def _check_shown(self, shown: Tensor, count: int) -> None:
        """Refuses a mask that shows tokens again that were hidden, as padding, when tokens were evicted."""
        if self.evicted is None:
            return
        past = self.storage.length - count
        real = self.evicted + (past if self.real is None else self.real.sum(-1))
        if bool((shown[:, : self.seen - count].sum(-1) > real).any()):
            raise UnsupportedModelError(
                "the attention mask shows tokens that it hid when they were read: KVCrush has dropped them as padding"
            )

    def _hidden(self, shown: Tensor | None) -> Tensor | None:
        """Tokens of the compressed part that `shown [B, seen]` hides now, bool `[B, Hkv, compressed]`; None: none."""
        positions = self.storage.kept_positions
        if shown is None or positions is None or self._tiers is None:
            return None
        seen_now = shown[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.long())
        hidden = ~seen_now & (self._tiers != Tier.PADDING)
        return hidden if bool(hidden.any()) else None

    @property
    def streams(self) -> bool:
        """Whether the policy is shown every query."""
        return self.plan.policy.streams

    @torch.no_grad()
    def after_attention(self, call: AttentionCall) -> None:
        """Scores are gathered from the queries, and where it is time, tokens are evicted."""
        count = call.queries.shape[2]
        shown = self._shown(call.mask, count)
        self._hides = self._hidden(shown)
        new_real = None
        if shown is not None:
            past, new_real = shown[:, : self.seen - count], shown[:, self.seen - count :]
            self.queries.show(past[:, past.shape[1] - self.queries.count :])
        self._extend_real(shown, count)

        before, clock = self.seen - count, self.plan.clock
        self.remember(call, new_real, clock.is_prompt(before, count))
        if clock.is_point(before, count, self.last_point):
            self.evict(call)

    def _extend_real(self, shown: Tensor | None, count: int) -> None:
        """Takes in the tokens of a pass, and what its mask says of all that came since the last eviction."""
        if shown is None and self.real is None:
            return
        held = (self.storage.rows, self.storage.length - count)
        past = torch.ones(held, dtype=torch.bool, device=self.storage.device) if self.real is None else self.real
        if shown is None:
            since = torch.cat([past[:, self.compressed :], past.new_ones((past.shape[0], count))], dim=1)
        else:
            since = shown[:, self.seen - self._since :]
        self.real = torch.cat([past[:, : self.compressed], since], dim=1)

    def remember(self, call: AttentionCall, new_real: Tensor | None, reading: bool) -> None:
        """Gathers what the policy will read of this call's queries."""
        policy = self.plan.policy
        if self.plan.measures_energy and self.storage.bases is None:
            squares = call.queries.float().square()
            squares = squares if new_real is None else squares * new_real[:, None, :, None]
            energy = squares.sum((0, 2))
            self.query_energy = energy if self.query_energy is None else self.query_energy + energy
        if call.mass is not None:
            self.mass = policy.accumulate(replace(self._view(call), queries=call.queries, received=call.mass))
        elif policy.streams:
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
        with stage("importance"):
            view = replace(self._view(call), queries=queries, queries_real=real)
            self.mass = self.plan.policy.accumulate(view)
        self.queries.clear()

    def _accumulate_gathered(self, call: AttentionCall) -> None:
        if (queries := self.queries.queries) is not None:
            self._accumulate(call, queries, self.queries.real)

    def _view(self, call: AttentionCall, order: Tensor | None = None) -> LayerView:
        """What a policy reads, slot by slot, or with the slots in the given order `[B, Hkv, P]`."""
        keys, values = self.storage.read() if call.keys is None or call.values is None else (call.keys, call.values)
        real, mass = self.real, self.mass
        hidden = None if self._hides is None else F.pad(self._hides, (0, self._since))
        if hidden is not None and order is not None:
            hidden = hidden.gather(2, order)
        if order is not None:
            keys, values = take(keys, order), take(values, order)
            mass = None if mass is None else kept_mass(mass, order)
            if real is not None:
                real = real.gather(1, order[:, 0])
        return LayerView(
            keys=keys,
            values=values,
            queries=self.queries.queries,
            scaling=call.scaling,
            real=real,
            hidden=hidden,
            queries_real=self.queries.real,
            mass=mass,
            softcap=call.softcap,
            sinks=call.sinks,
            seed=self._seed,
        )

    @property
    def _seed(self) -> int:
        """Differs between layers and evictions, and only there."""
        return layer_seed(self.plan.config.seed, self.index, self.seen)

    def evict(self, call: AttentionCall) -> None:
        """Scores what is held, keeps the budget of it, and puts it into the formats of its tiers."""
        self.last_point = self.seen
        storage, plan = self.storage, self.plan
        if self.real is not None and bool(self.real.all()):
            self.real = None
        held = storage.length
        count, seen = self.real_tokens()
        if bool(plan.shares.untouched(seen).all()):
            return
        self._fit_formats(call)
        budget = self._tokens_kept(seen, count)
        if plan.shares.nothing_to_do(held, int(budget.minimum(count).max())):
            return
        if plan.policy.streams:
            self._accumulate_gathered(call)
        order = self._text_order() if storage.blocked else None
        with stage("importance"):
            view = self._view(call, order)
            head_score = scores(plan.policy, view)
        with stage("selection"):
            selection = select(head_score, storage.kv_heads, budget, plan.config, view.real, self._seed)
        with stage("gather"):
            kept = arrange(selection, plan.formats)
            slots = kept.indices if order is None else order.gather(2, kept.indices)
            self._tiers = kept.tiers
            storage.keep(slots, kept.lengths)
            if self.mass is not None:
                self.mass = kept_mass(self.mass, slots)
        self.evicted = seen - selection.counts
        filled = kept.tiers[:, 0] != Tier.PADDING
        self.real = None if bool(filled.all()) else filled

    def real_tokens(self) -> tuple[Tensor, Tensor]:
        """How many tokens that are no padding each row holds, and has seen: `[B]` each."""
        if self.real is None:
            count = torch.full((self.storage.rows,), self.storage.length, device=self.storage.device)
        else:
            count = self.real.sum(-1)
        return count, count if self.evicted is None else count + self.evicted

    def _fit_formats(self, call: AttentionCall) -> None:
        """Fits the formats of quantized tokens to what is held, where there is more than sink and window."""
        if self.storage.length > self.plan.shares.always:
            rope, forms = self.plan.key_formats(self.index, self.storage.device)
            config = self.plan.config
            queries, limit = call.queries[:, :, -config.window :], config.logit_limit
            last = None if limit is None else LastQueries(queries, call.scaling, limit, config.sink)
            self.storage.fit(self.real, rope, forms, self.query_energy, last)
            self.query_energy = None

    def _tokens_kept(self, seen: Tensor, held: Tensor) -> Tensor:
        """How many tokens are kept of rows that have seen and hold so many real ones, `[B]`."""
        return self.plan.tokens_kept(self.index, seen, held, self.storage.sizes())

    def _text_order(self) -> Tensor:
        """The slots in the order of the text, `[B, Hkv, P]`, those that hold no token first."""
        positions = self.positions
        return (positions if self.real is None else positions.masked_fill(~self.real[:, None], -1)).argsort(dim=-1)

    # As data

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the layer holds: tensors, and numbers."""
        tensors = {
            "tiers": self._tiers,
            "real": self.real,
            "evicted": self.evicted,
            "mass": self.mass,
            "query_energy": self.query_energy,
            "queries": self.queries.queries,
            "queries_real": self.queries.real,
        }
        held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return self.storage.state() | held, {"seen": self.seen, "since_eviction": self.seen - self.last_point}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Replaces everything by what `state` gave, of this or another layer of the same formats."""
        self.reset()
        self.storage.load_state(tensors, counts["seen"])
        self._tiers = tensors.get("tiers")
        self.real, self.evicted, self.mass = tensors.get("real"), tensors.get("evicted"), tensors.get("mass")
        if (queries := tensors.get("queries")) is not None and self.queries.length:
            self.queries.append(queries, tensors.get("queries_real"))
        self.query_energy = tensors.get("query_energy")
        self.last_point = counts["seen"] - counts["since_eviction"]

    def _move(self, device: torch.device) -> None:
        """To where the layer's model computes: a cache that was read from a file lies in main memory."""
        tensors, counts = self.state()
        self.load_state({name: tensor.to(device) for name, tensor in tensors.items()}, counts)

    # What is held

    @property
    def positions(self) -> Tensor:
        """Logical position of every slot, int64 `[B, Hkv, P]`, padding counted; meaningless where `real` is False."""
        return self.storage.positions

    @property
    def tiers(self) -> Tensor:
        """Tier of every slot, uint8 `[B, Hkv, P]`; tokens that came since the last eviction are recent."""
        size = (self.storage.rows, self.storage.kv_heads, self._since)
        recent = torch.full(size, Tier.RECENT, dtype=torch.uint8, device=self.storage.device)
        tiers = recent if self._tiers is None else torch.cat([self._tiers, recent], dim=2)
        return tiers if self.real is None else tiers.masked_fill(~self.real[:, None], Tier.PADDING)

    @property
    def _since(self) -> int:
        """Slots of tokens that came since the last eviction."""
        return self.storage.length - self.compressed

    @property
    def state_nbytes(self) -> int:
        """Bytes held besides keys and values: positions, tiers, attention mass, last queries."""
        tensors = (self.real, self.evicted, self._tiers, self.mass)
        return sum(t.nbytes for t in tensors if t is not None) + self.queries.nbytes + self.storage.state_nbytes

    # What generation does with a cache

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it, which may repeat."""
        self.storage.select_rows(rows)
        self.queries.select_rows(rows)
        for name in ("real", "evicted", "_tiers", "mass"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

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
