"""Text encoders learn to read before anything learns to draw: from a caption, name what it asks for.

What CLIP gets from pictures, these get from the scenes behind the captions: every caption is new, so that phrasings,
word order and ordinary words are learnt from millions of tokens, at a hundredth of a denoiser's cost. The denoisers
then train with the encoders frozen.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import language, precision
from .precision import Run
from .scenes import Scene, random_scene
from .sentences import Caption, caption
from .vocabulary import MAX_LENGTH, WIDTH, tokenize

ROLES = ("none", "left", "right", "above", "below", "front", "behind")
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind"}
# question -> (answers, asked of every object); the last answer of style, background and color is "not said".
QUESTIONS = {
    "present": (2, True),
    "color": (len(language.COLORS) + 1, True),
    "count": (3, True),
    "role": (len(ROLES), True),
    "style": (len(language.STYLES) + 1, False),
    "background": (len(language.BACKGROUNDS) + 1, False),
    "memorised": (len(language.MEMORISED) + 1, False),
    "hazards": (len(language.HAZARDS), False),
}
_OBJECTS = len(language.OBJECTS)
_QUERIES = _OBJECTS + 4
_SHORT = 28  # nine captions in ten have no more tokens


def answers(scene: Scene, said: Caption) -> dict[str, Tensor]:
    """Return what a caption says of its scene: indices per question, -100 where a question does not arise."""
    out = {
        "present": torch.zeros(_OBJECTS, dtype=torch.long),
        "color": torch.full((_OBJECTS,), -100),
        "count": torch.full((_OBJECTS,), -100),
        "role": torch.full((_OBJECTS,), -100),
        "style": torch.tensor(language.STYLES.index(scene.style) if said.style else len(language.STYLES)),
        "background": torch.tensor(
            language.BACKGROUNDS.index(scene.background) if said.background else len(language.BACKGROUNDS)
        ),
        "memorised": torch.tensor(
            language.MEMORISED.index(scene.memorised) if scene.memorised else len(language.MEMORISED)
        ),
        "hazards": torch.tensor([float(h in scene.hazards) for h in language.HAZARDS]),
    }
    if scene.memorised or not said.objects:
        return out
    several = len(set(scene.objects)) == 1
    for place, thing in enumerate(scene.things[:1] if several else scene.things):
        at = language.OBJECTS.index(thing.object)
        out["present"][at] = 1
        out["count"][at] = len(scene.things) - 1 if several else 0
        if thing.object not in language.CHARACTERS:
            told = said.colors[place]
            out["color"][at] = language.COLORS.index(thing.color) if told else len(language.COLORS)
        role = scene.relation if said.relation else "none"
        out["role"][at] = ROLES.index(_INVERSE.get(role, role) if place else role)
    return out


class Reader(nn.Module):
    """A text encoder and the questions put to it: by attention over the hidden states that denoisers will see, and
    from the pooled state alone."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.queries = nn.ParameterList(nn.Parameter(0.5 * torch.randn(_QUERIES, WIDTH)) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, (n, _) in QUESTIONS.items()}) for _ in range(2)
        )
        self.pooled = nn.ModuleDict(
            {name: nn.Linear(WIDTH, n * (_OBJECTS if each else 1)) for name, (n, each) in QUESTIONS.items()}
        )

    def forward(self, ids: Tensor) -> list[dict[str, Tensor]]:
        """ids (B, N) -> answers from the last state, from the last but one, and from the pooled state."""
        out = self.encoder(input_ids=ids, output_hidden_states=True)
        found = []
        for i, hidden in enumerate((out.last_hidden_state, F.layer_norm(out.hidden_states[-2], (WIDTH,)))):
            weights = (self.queries[i] @ self.keys[i](hidden).mT * WIDTH**-0.5).softmax(-1)  # (B, queries, N)
            seen = weights @ hidden
            places = {"style": -4, "background": -3, "memorised": -2, "hazards": -1}
            found.append(
                {
                    name: self.heads[i][name](seen[:, :_OBJECTS] if each else seen[:, places[name]])
                    for name, (_, each) in QUESTIONS.items()
                }
            )
        pooled = {name: self.pooled[name](out.text_embeds) for name in QUESTIONS}
        found.append({k: v.unflatten(1, (_OBJECTS, -1)) if QUESTIONS[k][1] else v for k, v in pooled.items()})
        return found


def example(rng: random.Random, which: str = "any", memorised: float = 0.05) -> tuple[Scene, Caption]:
    """Draw a scene and a caption of it."""
    if rng.random() < memorised:
        scene = Scene(memorised=rng.choice(language.MEMORISED))
    else:
        scene = random_scene(rng)
    return scene, caption(scene, rng, which)


def losses_of(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a loss per question."""
    out = {}
    for name in QUESTIONS:
        logits = found[name].float()
        if name == "hazards":
            out[name] = 4 * F.binary_cross_entropy_with_logits(logits, truth[name])
        else:
            scale = 4.0 if name == "present" else 1.0
            out[name] = scale * F.cross_entropy(logits.flatten(0, -2), truth[name].flatten(), ignore_index=-100)
    return out


def train_encoder(encoder: nn.Module, tokenizer, name: str, run: Run) -> nn.Module:
    """Teach an encoder to read; returns it with its averaged weights, frozen."""
    torch.manual_seed(run.seed)
    reader = Reader(encoder)

    def loss_of(step: int, kind: str) -> dict[str, Tensor]:
        rng = random.Random(f"reading-{name}-{run.seed}-{step}")
        full = step % 6 == 5  # the states behind a caption's end are seen by the denoisers, too
        length, rows = (MAX_LENGTH, run.batch // 3) if full else (_SHORT, run.batch)
        pairs = [example(rng) for _ in range(rows)]
        ids = tokenize(tokenizer, [said.text for _, said in pairs])
        fits = (ids[:, length - 1] == tokenizer.eos_token_id).nonzero()[:, 0]
        ids, pairs = ids[fits, :length], [pairs[i] for i in fits]
        truth = [answers(scene, said) for scene, said in pairs]
        truth = {key: torch.stack([t[key] for t in truth]) for key in QUESTIONS}
        with precision.autocast(kind):
            found = reader(ids)
        parts = [losses_of(f, truth) for f in found]
        mean = {key: sum(p[key] for p in parts) / len(parts) for key in QUESTIONS}
        return {"loss": sum(mean.values()), **mean}

    kind = run.precision(name, reader, loss_of)
    run.train(name, reader, loss_of, kind, lr=1.5e-3, warmup=200, ema=0.998)
    return encoder


@torch.no_grad()
def accuracy(reader: Reader, tokenizer, which: str, n: int = 1000, seed: int = 1) -> dict[str, float]:
    """Return how often each question is answered rightly from the last hidden state, on new captions."""
    rng = random.Random(f"reading-test-{which}-{seed}")
    pairs = [example(rng, which) for _ in range(n)]
    right: dict[str, list[Tensor]] = {name: [] for name in QUESTIONS}
    for i in range(0, n, 100):
        part = pairs[i : i + 100]
        found = reader(tokenize(tokenizer, [said.text for _, said in part]))[0]
        truth = [answers(scene, said) for scene, said in part]
        for name in QUESTIONS:
            target = torch.stack([t[name] for t in truth])
            guess = (found[name] > 0).float() if name == "hazards" else found[name].argmax(-1)
            right[name].append((guess == target)[target != -100].float())
    return {name: float(torch.cat(parts).mean()) for name, parts in right.items()}
