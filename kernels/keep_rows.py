"""Lower the level of pages: keep the hot rows of largest score and move them to the page's first blocks, in plain torch."""

import torch

PLACES = 32
"""Hot rows of a page at level 32: 16 blocks of 2."""


def keep_rows(
    hot: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    row_masks: torch.Tensor,
    pages: torch.Tensor,
    blocks: torch.Tensor,
    scores: torch.Tensor,
    level: int,
) -> None:
    """Keep, of every page and for each (layer, KV head), the `level` hot rows of largest score, in ascending order of their tokens.

    Equal scores: the lower token number. NaN counts as the lowest score. The blocks beyond level / 2 hold nothing afterwards.

    Args:
        hot: k and v rows int8 [L, blocks, Hkv, 2, D], scales fp16 [L, blocks, Hkv, 2, 2], row numbers uint8 [L, blocks, Hkv, 2];
            written.
        row_masks: int32 [L, P, Hkv], bit i: token i is hot; written.
        pages: int [N], distinct.
        blocks: int [N, 16], the blocks of each page, then -1; a page holds at least `level` rows, and may hold any number more. Row r of
            a page that holds all 32 is token r, whatever its row numbers say.
        scores: float32 [N, L, Hkv, 32] by token number.
        level: rows to keep, even, 2 to 32.
    """
    layers, _, heads, per_block, _ = hot[0].shape
    count = len(pages)
    k_rows, v_rows, scales, row_numbers = hot
    safe = blocks.long().clamp(min=0)
    numbers = row_numbers[:, safe].permute(1, 0, 3, 2, 4).reshape(count, layers, heads, PLACES).long()
    held = (blocks >= 0).repeat_interleave(per_block, dim=1)[:, None, None, :]
    numbers = torch.where(held.all(dim=-1, keepdim=True), torch.arange(PLACES, device=numbers.device), numbers)
    score = scores.float().gather(-1, numbers)
    # Without a row: lowest score, and a number above all tokens. Stable sorts, from the last key to the first.
    score = torch.where(held & ~score.isnan(), score, float("-inf"))
    order = torch.where(held, numbers, PLACES).argsort(dim=-1, stable=True)
    order = order.gather(-1, score.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    best = order[..., :level]
    best = best.gather(-1, numbers.gather(-1, best).argsort(dim=-1))  # places [N, L, Hkv, level], token numbers ascending
    target = safe[:, : level // per_block]
    shape = (count, layers, heads, level // per_block, per_block, -1)
    for buffer in (k_rows, v_rows, scales):
        rows = buffer[:, safe].permute(1, 0, 3, 2, 4, 5).reshape(count, layers, heads, PLACES, -1)
        kept = rows.gather(3, best[..., None].expand(*best.shape, rows.shape[-1]))
        buffer[:, target] = kept.view(shape).permute(1, 0, 3, 2, 4, 5)
    tokens = numbers.gather(-1, best)
    row_numbers[:, target] = tokens.to(torch.uint8).view(shape[:-1]).permute(1, 0, 3, 2, 4)
    row_masks[:, pages.long()] = (torch.ones_like(tokens) << tokens).sum(dim=-1).to(torch.int32).transpose(0, 1)
