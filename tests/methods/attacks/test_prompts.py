"""Searches for tokens and embeddings, on losses whose minimum is known."""

import pytest
import torch
from semiperm.methods.attacks.arithmetic import combined
from semiperm.methods.attacks.embeddings import learn_tensors
from semiperm.methods.attacks.prompts import PromptSearch, search_tokens
from semiperm.methods.errors import SemipermError


def problem(vocabulary=60, width=8, tokens=3):
    table = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([7, 31, 52])[:tokens]
    asked = []

    def loss_of(ids, embeddings, step):
        asked.append(ids)
        return (embeddings - table[wanted]).square().flatten(1).sum(1)

    return table, wanted, loss_of, asked


@pytest.mark.parametrize(
    "settings", [dict(search="relaxed", learning_rate=0.3, steps=150), dict(search="projected", steps=150),
                 dict(search="coordinate", steps=10), dict(search="genetic", steps=60, population=60)],
    ids=lambda s: s["search"],
)  # fmt: skip
def test_each_search_finds_the_tokens(settings):
    table, wanted, loss_of, _ = problem()
    found = search_tokens(loss_of, table, torch.arange(60), PromptSearch(tokens=3, kept=3, **settings))
    start = search_tokens(loss_of, table, torch.arange(60), PromptSearch(tokens=3, **settings | {"steps": 1}))
    assert found[0].loss < 0.35 * start[0].loss
    assert sum(a == b for a, b in zip(found[0].ids, wanted.tolist(), strict=True)) >= 2
    assert [one.loss for one in found] == sorted(one.loss for one in found) and len({one.ids for one in found}) == 3


@pytest.mark.parametrize("search", ["relaxed", "projected", "coordinate", "genetic"])
def test_only_allowed_tokens_are_tried_and_the_seed_decides(search):
    table, _, loss_of, asked = problem()
    allowed, config = torch.arange(10, 20), PromptSearch(search=search, tokens=3, steps=5, seed=3)
    first = search_tokens(loss_of, table, allowed, config)
    assert set(torch.cat([ids.flatten() for ids in asked]).tolist()) <= set(range(10, 20))
    assert search_tokens(loss_of, table, allowed, config) == first


def test_what_cannot_be_searched_is_refused():
    table, _, loss_of, _ = problem()
    with pytest.raises(SemipermError, match="0 allowed tokens"):
        search_tokens(loss_of, table, torch.arange(0))
    with pytest.raises(SemipermError, match="nan at step 0"):
        search_tokens(lambda i, e, s: e.sum((1, 2)) * float("nan"), table, torch.arange(60), PromptSearch(steps=1))
    for wrong in ({"search": "beam"}, {"tokens": 0}, {"learning_rate": 0.0}, {"population": 1}):
        with pytest.raises(SemipermError, match=next(iter(wrong))):
            PromptSearch(**wrong)


def test_embeddings_are_learned_and_the_start_is_left_alone():
    start, goal = [torch.zeros(2, 3), torch.zeros(4)], [torch.ones(2, 3), torch.full((4,), -1.0)]

    def loss_of(tensors, step):
        return sum((t - g).square().sum() for t, g in zip(tensors, goal, strict=True))

    learned = learn_tensors(loss_of, start, 200, 0.05)
    assert len(learned.losses) == 200 and learned.losses[-1] < 0.01 * learned.losses[0]
    for tensor, wanted in zip(learned.tensors, goal, strict=True):
        torch.testing.assert_close(tensor, wanted, atol=0.1, rtol=0)
    assert not start[0].any()
    with pytest.raises(SemipermError, match="0 steps"):
        learn_tensors(loss_of, start, 0, 0.1)
    with pytest.raises(SemipermError, match="not|nan"):
        learn_tensors(lambda t, s: t[0].sum() * float("nan"), start[:1], 1, 0.1)


def test_arithmetic_is_guidance_for_one_term():
    none, e = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 4, 3, 3)
    torch.testing.assert_close(combined(none, e[:1], [1.0], 4.0), none + 4 * (e[0] - none))
    torch.testing.assert_close(combined(none, e, [1.0, -0.5], 2.0), none + 2 * (e[0] - none) - (e[1] - none))
    with pytest.raises(SemipermError, match="1 weights for 2"):
        combined(none, e, [1.0], 1.0)
