"""Merging tokens with Ward's criterion, compared with a search over all pairs."""

import itertools

import pytest
import torch
from diffusers_ssr.token_merging import merge_tokens


def merged_by_hand(tokens: list[torch.Tensor], counts: list[float], number: int) -> list[tuple[float, torch.Tensor]]:
    groups = list(zip(counts, tokens, strict=True))
    while len(groups) > number:

        def cost(pair):
            (m, a), (n, b) = groups[pair[0]], groups[pair[1]]
            return (m * n / (m + n) * (a - b).square().sum()).item()

        i, j = min(itertools.combinations(range(len(groups)), 2), key=cost)
        (m, a), (n, b) = groups[i], groups[j]
        groups[i] = (m + n, (m * a + n * b) / (m + n))
        del groups[j]
    return groups


@pytest.mark.parametrize("number", [1, 4, 11])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_two_most_similar_tokens_are_merged(number, weighted):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 12, 5, generator=generator)
    counts = torch.randint(1, 9, (1, 12), generator=generator).float() if weighted else None
    merged, sizes = merge_tokens(embeds, counts, number)
    given = [1.0] * 12 if counts is None else counts[0].tolist()
    expected = merged_by_hand(list(embeds[0].double()), given, number)
    assert merged.shape == (1, number, 5) and sizes.tolist()[0] == [size for size, _ in expected]
    torch.testing.assert_close(merged[0], torch.stack([token for _, token in expected]).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merging_equal_tokens_does_not_change_the_attention(dtype):
    """A token with count n has the same effect as n equal tokens, because log(n) is added to its logit."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(1, 6, 8, generator=generator)
    many = few[:, [0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5]]
    merged, counts = merge_tokens(many.to(dtype), None, 6)
    assert merged.dtype == dtype and counts.dtype == torch.float32
    query = torch.randn(1, 3, 8, generator=generator)

    def attend(tokens, bias=None):
        return torch.nn.functional.scaled_dot_product_attention(query, tokens, tokens, attn_mask=bias)

    expected = attend(many.to(dtype).float())
    torch.testing.assert_close(attend(merged.float(), counts.log()[:, None]), expected, atol=1e-2, rtol=1e-2)
