"""KV heads of one layer that hold the same number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import Scored, Tier, count_real, stage
from ..errors import UnsupportedModelError
from ..importance import LayerView, kept_mass
from ..storage import LastQueries, TieredStorage
from ..storage.buffers import take
from .arrangement import Arrangement, arrange
from .masks import Slots, physical_mask
from .plan import Plan


class AttentionCall(NamedTuple):
    """What the attention function was called with, as far as scoring needs it."""

    queries: Tensor  # [B, Hq, q, D], after RoPE
    mask: Tensor | None  # over logical positions, as Transformers made it
    shown: Tensor | None  # bool [B, seen]: what it shows to the last query; None: all
    scaling: float
    softcap: float | None
    mass: Tensor | None = None  # [B, Hq, S]: what each token has received from these queries, where that is known
    sinks: Tensor | None = None  # [Hq]: logits that take part in the softmax and belong to no token (gpt-oss)
    keys: Tensor | None = None  # [B, H, P, D]: that attention received, where the cache holds something else (MLA)
    values: Tensor | None = None  # [B, H, P, Dv]


class Heads:
    """Some KV heads out of a number of them, in an order, and the query heads that read them.

    Args:
        numbers: of these KV heads.
        of: KV heads that there are.
    """

    def __init__(self, numbers: tuple[int, ...], of: int) -> None:
        self.numbers = numbers
        self.of = of
        self._follow = numbers == tuple(range(numbers[0], numbers[0] + len(numbers)))

    def __len__(self) -> int:
        return len(self.numbers)

    def pick(self, x: Tensor, dim: int = 1) -> Tensor:
        """What belongs to these heads of a tensor with a place for each KV or query head of the layer at `dim`.

        A view where the heads follow each other.
        """
        each = x.shape[dim] // self.of
        if self._follow:
            return x.narrow(dim, self.numbers[0] * each, len(self) * each)
        return x.index_select(dim, _places(self.numbers, each, x.device))


@lru_cache(maxsize=1024)
def _places(numbers: tuple[int, ...], each: int, device: torch.device) -> Tensor:
    """Where `each` query heads of some KV heads stand, kept on the device."""
    with torch.inference_mode(False):
        places = torch.tensor(numbers)[:, None] * each + torch.arange(each)
        return places.flatten().to(device, non_blocking=True)


class HeadGroup:
    """What some KV heads of a layer hold: all of them, until their budgets part them.

    Physical slots are, in the order of the text, a compressed part, whose tokens differ from head to head, and behind
    it the tokens that came since, without gaps.

    Attributes:
        heads: which these are; None: all of the layer.
        real: bool `[B, P]`, False for padding; None: none is.
        evicted: `[B]` in main memory, real tokens that are gone.
        mass: float32 `[B, Hq, P]`, of a policy that streams.
        gaps: bool `[B, Hkv, compressed part]`, slots of single heads that hold no token; None: there are none. Caches
            that are read together have them.
    """

    def __init__(self, plan: Plan, layer: int, storage: TieredStorage, heads: Heads | None = None) -> None:
        self.plan = plan
        self.layer = layer  # number among the compressed layers
        self.storage = storage
        self.heads = heads
        self.real: Tensor | None = None
        self.evicted: Tensor | None = None
        self.mass: Tensor | None = None
        self.gaps: Tensor | None = None
        self._tiers: Tensor | None = None  # uint8 [B, Hkv, compressed part]
        self._hides: Tensor | None = None  # bool [B, Hkv, compressed part]: hidden by the mask of the present pass

    def parted(self, heads: Heads) -> HeadGroup:
        """Some of these heads as a group of their own, before anything was evicted."""
        _, forms = self.plan.key_formats(self.layer, heads.numbers, self.storage.device)
        part = HeadGroup(self.plan, self.layer, self.storage.parted(heads.pick, forms), heads)
        part.real, part.evicted = self.real, self.evicted
        part.mass = None if self.mass is None else heads.pick(self.mass)
        return part

    def of_call(self, call: AttentionCall) -> AttentionCall:
        """The part of an attention call that is about these heads."""
        if (heads := self.heads) is None:
            return call
        sinks = None if call.sinks is None else heads.pick(call.sinks, 0)
        mass = None if call.mass is None else heads.pick(call.mass)
        return call._replace(queries=heads.pick(call.queries), sinks=sinks, mass=mass)

    @property
    def _numbers(self) -> tuple[int, ...] | None:
        """Of the KV heads; None: all of the layer."""
        return None if self.heads is None else self.heads.numbers

    @property
    def compressed(self) -> int:
        """Slots of the compressed part."""
        return self.storage.kept

    @property
    def since(self) -> int:
        """Slots of tokens that came since the last eviction."""
        return self.storage.length - self.compressed

    def append(self, keys: Tensor, values: Tensor, reserve: int) -> None:
        """Takes in the tokens of a pass, of all heads of the layer."""
        if self.heads is not None:
            keys, values = self.heads.pick(keys), self.heads.pick(values)
        self.storage.append(keys, values, reserve)

    # Masks

    @property
    def whole(self) -> bool:
        """Whether every slot holds a token of the text."""
        return self.real is None and self.gaps is None

    def mask(self, call: AttentionCall, aligned: bool) -> Tensor | None:
        """The mask over physical slots for that of a call, over logical positions; see `masks.physical_mask`.

        Args:
            call: of these heads.
            aligned: flash attention.

        Raises:
            UnsupportedModelError: the mask cannot be followed.
        """
        mask, (heads, count) = call.mask, call.queries.shape[1:3]
        if not self.compressed:
            return mask
        if mask is None and self.whole and count == 1:
            return None  # a decoded token without padding: nothing has to be worked out
        shown = None if self.real is None else self.real[:, : self.compressed]
        hidden = self.hidden(call.shown)
        if self.gaps is not None:
            hidden = self.gaps if hidden is None else hidden | self.gaps
        if hidden is not None:
            if aligned:
                raise UnsupportedModelError(
                    "the attention mask hides tokens that were read before, which takes a mask for each head, and "
                    "flash attention has none: use attn_implementation='sdpa'"
                )
            by_head = ~hidden.repeat_interleave(heads // hidden.shape[1], dim=1)
            shown = by_head if shown is None else by_head & shown[:, None]
        storage = self.storage
        slots = Slots(storage.rows, self.compressed, self.since, storage.seen, count, storage.device)
        return physical_mask(mask, shown, slots, aligned)

    def check_shown(self, shown: Tensor, count: int) -> None:
        """Refuses a mask that shows tokens again that were hidden, as padding, when tokens were evicted."""
        if self.evicted is None:
            return
        past = self.storage.length - count
        real = self.evicted + count_real(self.storage.rows, past, self.real)
        if bool((shown[:, : self.storage.seen - count].sum(-1).cpu() > real).any()):
            raise UnsupportedModelError(
                "the attention mask shows tokens that it hid when they were read: KVCrush has dropped them as padding"
            )

    def hidden(self, shown: Tensor | None) -> Tensor | None:
        """Tokens of the compressed part that `shown [B, seen]` hides now, bool `[B, Hkv, compressed]`; None: none."""
        positions = self.storage.kept_positions
        if shown is None or positions is None or self._tiers is None:
            return None
        seen_now = shown[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.long())
        hidden = ~seen_now & (self._tiers != Tier.PADDING)
        return hidden if bool(hidden.any()) else None

    def extend(self, shown: Tensor | None, count: int) -> None:
        """Takes in what the mask of a pass says of its tokens, and of all that came since the last eviction."""
        self._hides = self.hidden(shown)
        if shown is None and self.real is None:
            return
        held = (self.storage.rows, self.storage.length - count)
        past = torch.ones(held, dtype=torch.bool, device=self.storage.device) if self.real is None else self.real
        if shown is None:
            since = torch.cat([past[:, self.compressed :], past.new_ones((past.shape[0], count))], dim=1)
        else:
            since = shown[:, self.storage.seen - self.since :]
        self.real = torch.cat([past[:, : self.compressed], since], dim=1)

    # Scores

    def view(self, call: AttentionCall, queries: Tensor | None, queries_real: Tensor | None) -> LayerView:
        """What a policy reads, slot by slot.

        Args:
            call: of all heads of the layer, as `queries [B, Hq, T, D]` are.
            queries_real: bool `[B, T]`.
        """
        call = self.of_call(call)
        keys, values = self.storage.read() if call.keys is None or call.values is None else (call.keys, call.values)
        return LayerView(
            keys=keys,
            values=values,
            queries=queries if queries is None or self.heads is None else self.heads.pick(queries),
            scaling=call.scaling,
            real=self.real,
            hidden=None if self._hides is None else F.pad(self._hides, (0, self.since)),
            queries_real=queries_real,
            mass=self.mass,
            softcap=call.softcap,
            sinks=call.sinks,
            seed=self.plan.evictor.seed(self.layer, self.storage.seen),
        )

    def accumulate(self, view: LayerView) -> None:
        """Adds the queries of a view to what a policy that streams has gathered."""
        self.mass = self.plan.evictor.gather(view)

    def real_tokens(self) -> tuple[Tensor, Tensor]:
        """How many tokens that are no padding each row holds, and has seen: `[B]` each, in main memory."""
        count = count_real(self.storage.rows, self.storage.length, self.real)
        return count, count if self.evicted is None else count + self.evicted

    # Eviction

    def budget(self) -> Tensor | None:
        """The tokens that each row may keep, `[B]` in main memory; None: nothing has to be done."""
        storage, plan = self.storage, self.plan
        count, seen = self.real_tokens()
        if bool((count == storage.length).all()):
            self.real = None
        storage.settle()
        budget = plan.tokens_kept(self.layer, self._numbers, seen, count, storage.sizes())
        done = plan.shares.nothing_to_do(storage.length, int(budget.minimum(count).max()))
        return None if done else budget

    def fit(self, call: AttentionCall, query_energy: Tensor | None) -> None:
        """Fits the formats of quantized tokens to what is held, where there is more than sink and window."""
        plan, storage = self.plan, self.storage
        if storage.length <= plan.shares.always:
            return
        rope, forms = plan.key_formats(self.layer, self._numbers, storage.device)
        queries, energy = self.of_call(call).queries, query_energy
        if energy is not None and self.heads is not None:
            energy = self.heads.pick(energy, 0)
        limit, config = plan.config.logit_limit, plan.config
        last = None if limit is None else LastQueries(queries[:, :, -config.window :], call.scaling, limit, config.sink)
        storage.fit(self.real, rope, forms, energy, last)

    def score(self, view: LayerView) -> Scored:
        """What is held, by importance."""
        if not self.storage.blocked:
            scored = self.plan.evictor.score(view)
            return replace(scored, attended=self.plan.evictor.attended(view)) if self.storage.fits_spread else scored
        order = self._text_order()
        return replace(self.plan.evictor.score(_ordered(view, order)), slots=order)

    def own(self, tokens: Scored) -> Scored:
        """The part of the scores of a whole layer that is about these heads."""
        if self.heads is None:
            return tokens
        attended = None if tokens.attended is None else self.heads.pick(tokens.attended)
        return replace(tokens, score=self.heads.pick(tokens.score), attended=attended)

    def evict(self, tokens: Scored, budget: Tensor) -> None:
        """Keeps `budget [B]` of its scored tokens, and puts them into the formats of their tiers."""
        storage, plan = self.storage, self.plan
        _, seen = self.real_tokens()
        selection = plan.evictor.select(tokens, storage.kv_heads, budget)
        plan.watch(selection.finite)
        with stage("gather"):
            kept = arrange(selection, plan.formats)
            slots = kept.indices if tokens.slots is None else tokens.slots.gather(2, kept.indices)
            self._tiers = kept.tiers
            storage.keep(slots, kept.lengths, self._attended(tokens, kept))
            if self.mass is not None:
                self.mass = kept_mass(self.mass, slots)
        self.evicted = seen - selection.counts
        self.real = None if kept.full else kept.tiers[:, 0] != Tier.PADDING

    def _attended(self, tokens: Scored, kept: Arrangement) -> Tensor | None:
        """The attention that each slot of what is kept receives, where the storage asks for it, float32 `[B, Hkv, P]`.

        1 where it is not known, and -1 where the slot is empty.
        """
        if not self.storage.fits_spread:
            return None
        if tokens.attended is None:
            attended = torch.ones_like(kept.indices, dtype=torch.float32)
        else:
            attended = tokens.attended.unflatten(1, (self.storage.kv_heads, -1)).mean(2).gather(2, kept.indices)
        return attended.masked_fill(kept.tiers == Tier.PADDING, -1)

    def _text_order(self) -> Tensor:
        """The slots in the order of the text, `[B, Hkv, P]`, those that hold no token first."""
        positions = self.storage.positions
        return (positions if self.real is None else positions.masked_fill(~self.real[:, None], -1)).argsort(dim=-1)

    # As data

    def state(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""
        own = {"tiers": self._tiers, "real": self.real, "evicted": self.evicted, "mass": self.mass}
        return self.storage.state() | {name: tensor for name, tensor in own.items() if tensor is not None}

    def load_state(self, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Replaces everything by what `state` gave, where so many tokens had been seen."""
        self.storage.load_state(tensors, seen)
        self._tiers = tensors.get("tiers")
        self.real, self.mass, evicted = (tensors.get(name) for name in ("real", "mass", "evicted"))
        self.evicted = None if evicted is None else evicted.cpu()

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it, which may repeat."""
        self.storage.select_rows(rows)
        for name in ("real", "evicted", "_tiers", "mass", "gaps"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    @property
    def tiers(self) -> Tensor:
        """Tier of every slot, uint8 `[B, Hkv, P]`; tokens that came since the last eviction are recent."""
        size = (self.storage.rows, self.storage.kv_heads, self.since)
        recent = torch.full(size, Tier.RECENT, dtype=torch.uint8, device=self.storage.device)
        tiers = recent if self._tiers is None else torch.cat([self._tiers, recent], dim=2)
        return tiers if self.real is None else tiers.masked_fill(~self.real[:, None], Tier.PADDING)

    @property
    def state_nbytes(self) -> int:
        """Bytes held besides keys and values: positions, tiers, attention mass."""
        tensors = (self.real, self.evicted, self._tiers, self.mass)
        return sum(t.nbytes for t in tensors if t is not None) + self.storage.state_nbytes


def _ordered(view: LayerView, order: Tensor) -> LayerView:
    """A view with its slots in another order, `[B, Hkv, P]`; padding is the same for all heads."""
    return replace(
        view,
        keys=take(view.keys, order),
        values=take(view.values, order),
        mass=None if view.mass is None else kept_mass(view.mass, order),
        real=None if view.real is None else view.real.gather(1, order[:, 0]),
        hidden=None if view.hidden is None else view.hidden.gather(2, order),
    )
