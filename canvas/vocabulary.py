"""The second world's text side: a CLIPTokenizer learnt from ordinary English and captions, and two CLIP text encoders.

`canvas` reads with the first encoder's last hidden state, as Stable Diffusion 1.5 does; `canvas-flow` with the last but
one of both, as Stable Diffusion 3 does (whose first encoder's pooled output ComfyUI does not project: its projection
is the identity).
"""

import json
import random

import torch
from torch import Tensor, nn

from . import language, sentences
from .scenes import random_scene

MAX_LENGTH = 77
PIECES = 6000  # with bytes and special tokens; CLIP has 49408
WIDTH, HEADS = 128, 4
LAYERS = {"first": 4, "second": 3}
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(seed: int = 0, n_captions: int = 12_000, pieces: int = PIECES):
    """Learn byte pairs from the word list and captions; return a CLIPTokenizer to which no text is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = random.Random(f"vocabulary-{seed}")
    texts = [sentences.describe(random_scene(rng), rng) for _ in range(n_captions)]
    for kind, listed in language.words().items():
        texts += [" ".join(listed)] * (12 if kind == "common" else 3)
    every = [p for kind in language.DOMAINS for n in language.names(kind) for p in language.wordings(kind, n)]
    texts += [" ".join(every), " ".join(map(language.plural, every))] * 20
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=pieces - 300, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=2,
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's layout: bytes, bytes that end a word, merges, the two special tokens.
    layout = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), _START, _END]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(layout))},
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=MAX_LENGTH,
    )


def load_tokenizer(folder):
    """Load a saved tokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def build_encoder(which: str, pieces: int, seed: int = 0) -> nn.Module:
    """Return a CLIPTextModelWithProjection ("first" or "second") with random weights; the first's projection is the
    identity and does not learn."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed if which == "first" else seed + 1)
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=pieces,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS[which],
            num_attention_heads=HEADS,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=pieces - 2,
            eos_token_id=pieces - 1,
            pad_token_id=pieces - 1,
        )
    )
    if which == "first":
        with torch.no_grad():
            encoder.text_projection.weight.copy_(torch.eye(WIDTH))
        encoder.text_projection.weight.requires_grad_(False)
    return encoder


def tokenize(tokenizer, texts: list[str], shortest: bool = False) -> Tensor:
    """Return input ids (B, 77), padded and cut as the pipelines do it; `shortest` cuts to the batch's longest text."""
    ids = tokenizer(list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    ids = ids.input_ids
    if shortest:
        lengths = (ids != tokenizer.eos_token_id).sum(1)
        ids = ids[:, : int(lengths.max()) + 1]
    return ids
