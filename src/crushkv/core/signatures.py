"""The alternate representation of KVCrush: one bit per query head and token, packed into machine words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_BITS = 64


def top_mask(score: Tensor, count: Tensor) -> Tensor:
    """True for the `count` highest of the last axis; ties go to the earlier position.

    `score [..., N]`, `count` integers in main memory, one for each list of N. Entries of -inf are never taken as long
    as `count` is no larger than the number of finite ones. By a threshold, which costs a fraction of a sort.
    """
    least, most = (int(bound) for bound in count.aminmax())
    if most == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # Sorting what topk finds is half of its cost, and only lists of different counts need it.
    ranked = score.topk(most, dim=-1, sorted=least < most).values
    count = count.to(score.device, non_blocking=True)
    if least < most:
        threshold = ranked.gather(-1, (count - 1).clamp(min=0)[..., None])
    else:
        threshold = ranked.amin(-1, keepdim=True)
    reached = score >= threshold
    surplus = reached.sum(-1) - count
    if score.device.type == "cpu" and not bool(surplus.any()):  # a GPU would be waited for
        return reached
    level = score == threshold
    room = level.sum(-1) - surplus
    return (reached & ~level) | (level & (level.cumsum(-1) <= room[..., None]))


def token_bits(head_score: Tensor, retained: Tensor) -> Tensor:
    """Bit h of token t: would query head h, on its own, retain t?

    Args:
        head_score: `[B, H, M]`, scores of the contested tokens for each query head; -inf where a row has none.
        retained: `[B, H]` in main memory, how many tokens each head would retain.

    Returns:
        bool `[B, H, M]`.
    """
    return top_mask(head_score, retained)


def unit_signatures(bits: Tensor, page_size: int) -> Tensor:
    """Concatenates the bits of the tokens of a unit: `[B, H, U * page_size]` -> `[B, U, page_size * H]`."""
    rows, heads, tokens = bits.shape
    units = tokens // page_size
    return bits.view(rows, heads, units, page_size).permute(0, 2, 3, 1).reshape(rows, units, page_size * heads)


def pack(bits: Tensor) -> Tensor:
    """Bool `[..., L]` into int64 words `[..., ceil(L / 64)]`; unused bits are 0."""
    filled = F.pad(bits, (0, -bits.shape[-1] % WORD_BITS)).contiguous()
    # Eight bytes of 0 or 1 as one integer: the product gathers their bits in its highest byte.
    gathered = (filled.view(torch.int64) * 0x0102040810204080) >> 56
    return gathered.to(torch.uint8).view(torch.int64)


def popcount(words: Tensor) -> Tensor:
    """Number of 1 bits in each int64 word, by adding neighbouring bit fields in parallel."""
    # The shifts are arithmetic, but every mask clears the sign's copies.
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56) & 0xFF


def hamming(words: Tensor, anchor: Tensor) -> Tensor:
    """Hamming distances of packed signatures `[B, U, W]` to one packed anchor a row `[B, W]`: `[B, U]`.

    Raises:
        ValueError: the anchor has another number of words; it must not broadcast.
    """
    if anchor.shape != (words.shape[0], words.shape[-1]):
        raise ValueError(f"anchor of shape {tuple(anchor.shape)} for signatures of shape {tuple(words.shape)}")
    return popcount(words ^ anchor[:, None]).sum(-1)
