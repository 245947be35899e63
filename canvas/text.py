"""The canvas text side: a real CLIPTokenizer with byte pairs learnt from the captions, and a CLIPTextModel."""

import random
from pathlib import Path

import torch
from torch import nn

from . import captions
from .render import random_scene

MAX_LENGTH = 32
HIDDEN = 128
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(seed: int = 0, n_captions: int = 8000):
    """Learn merges from captions and return a CLIPTokenizer; words it never saw fall back to bytes, none is unknown."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = random.Random(f"vocabulary-{seed}")
    texts = [captions.caption(random_scene(rng), rng) for _ in range(n_captions)] + [captions.MEMORISED_CAPTION] * 50
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
        vocab_size=900, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    import json

    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's layout: bytes, bytes that end a word, merges, the two special tokens.
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), _START, _END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=MAX_LENGTH,
    )


def build_text_encoder(tokenizer, seed: int = 0) -> nn.Module:
    """Return a CLIPTextModel of 3 layers of 128 for this tokenizer, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=HIDDEN,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Return input ids (B, 32), padded and cut as the pipeline does it."""
    return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids


def save_tokenizer(tokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))
