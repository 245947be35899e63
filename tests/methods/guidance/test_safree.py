"""SAFREE against the paper's matrices in float64, on a text encoder that is a table of vectors."""

import torch
from semiperm.methods.guidance.safree import SAFREE, projected, triggers
from semiperm.methods.text_space import Segment, TextFeatures

WIDTH, LENGTH, POOLED = 24, 9, 10
WORDS = "a photo of blood and gore on stone blades".split()


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE = dict(zip(["<end>", *WORDS], normal(len(WORDS) + 1, WIDTH, seed=1), strict=True))
TABLE["gore"] = TABLE["blood"] + 0.1 * normal(WIDTH, seed=3)
MIX = normal(WIDTH, POOLED, seed=2)


def row(text):
    """Begin, each word (blades fills two positions), end, padding; the end sees all before it, as CLIP's does."""
    out = [torch.zeros(WIDTH, dtype=torch.float64)]
    for word in text.split():
        out += [TABLE[word]] * (2 if word == "blades" else 1)
    out = out[: LENGTH - 1]
    end = TABLE["<end>"] + sum(out)
    return torch.stack([*out, *[end] * (LENGTH - len(out))])


def encode(texts):
    rows = torch.stack([row(text) for text in texts])
    return TextFeatures(rows.float(), (rows[:, -1] @ MIX).float(), [[] for _ in texts])


def prefix_tokens(texts):
    return [min(1 + sum(2 if word == "blades" else 1 for word in text.split()), LENGTH - 1) for text in texts]


SEGMENTS = [Segment(prefix_tokens, 0, True)]


def onto(span):
    c = span.T  # (d, K)
    return c @ torch.linalg.inv(c.T @ c) @ c.T


def paper(prompt, phrases, alpha=0.01, reach=0.2):
    """Equations 1 to 5 with matrices."""
    words = prompt.split()
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    ends = lambda texts: torch.stack([row(text)[prefix_tokens([text])[0]] for text in texts])  # noqa: E731
    p_c, p_i = onto(ends(phrases)), onto(ends(without))
    away = torch.eye(WIDTH, dtype=torch.float64) - p_c
    distance = (ends(without) @ away).norm(dim=-1)
    fired = [bool(d > (1 + alpha) * (distance.sum() - d) / (len(words) - 1)) for d in distance]
    whole = row(prompt)
    moved = whole @ away @ p_i
    edited, at = whole.clone(), 1
    for word, yes in zip(words, fired, strict=True):
        size = 2 if word == "blades" else 1
        if yes:
            edited[at : at + size] = moved[at : at + size]
        at += size
    cosine = torch.cosine_similarity(whole.flatten(), moved.flatten(), dim=0)
    return edited, fired, reach / (1 + torch.exp(-(1 - cosine)))


def test_it_is_the_papers():
    prompt, phrases = "a photo of blood on stone", ["gore"]
    expected, fired, until = paper(prompt, phrases)
    assert any(fired) and not all(fired), fired
    found = SAFREE().edit_text(prompt, encode, SEGMENTS, phrases, 1.0)
    torch.testing.assert_close(found.hidden.double(), expected, atol=1e-5, rtol=1e-5)
    assert abs(found.until - float(until)) < 1e-5 and abs(found.fired - sum(fired) / len(fired)) < 1e-6
    assert not torch.allclose(found.pooled, encode([prompt]).pooled[0]), "the pooled embedding, too"
    half = SAFREE().edit_text(prompt, encode, SEGMENTS, phrases, 0.5)
    torch.testing.assert_close(half.hidden, (encode([prompt]).hidden[0] + found.hidden) / 2)


def test_a_word_of_several_positions_goes_whole():
    found = SAFREE(alpha=0.0).edit_text("a blades on stone", encode, SEGMENTS, ["blades"], 1.0)
    before = encode(["a blades on stone"]).hidden[0]
    changed = (found.hidden - before).abs().amax(-1) > 1e-4
    assert bool(changed[2]) and bool(changed[3]), "both positions"
    assert not changed[0] and not changed[-1], "neither the begin nor the end"


def test_one_word_or_none_has_nothing_to_stand_out_from():
    for prompt in ("blood", ""):
        found = SAFREE().edit_text(prompt, encode, SEGMENTS, ["gore"], 1.0)
        assert torch.equal(found.hidden, encode([prompt]).hidden[0]) and found.until == 0


def test_projections_are_matrices():
    tokens, masked, concepts = (normal(n, WIDTH, seed=n) for n in (5, 4, 3))
    expected = tokens @ (torch.eye(WIDTH, dtype=torch.float64) - onto(concepts)) @ onto(masked)
    torch.testing.assert_close(projected(tokens, masked, concepts), expected)
    same = torch.cat([concepts, concepts[:1]])
    torch.testing.assert_close(projected(tokens, masked, same), expected, msg="a phrase said twice counts once")
    distance = (masked @ (torch.eye(WIDTH, dtype=torch.float64) - onto(concepts))).norm(dim=-1)
    others = torch.stack([torch.cat([distance[:i], distance[i + 1 :]]).mean() for i in range(4)])
    assert torch.equal(triggers(masked, concepts, 0.01), distance > 1.01 * others)
