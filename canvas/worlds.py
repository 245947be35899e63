"""The second edition's workshop: every part trains on its own, in the order of PARTS, and resumes from its checkpoint."""

from pathlib import Path

from . import reading, vocabulary
from .loop import save_tensors

TOKENIZER = "tokenizer"


def tokenizer_of(workdir: Path, seed: int = 0):
    """Return the tokenizer in a working folder; learnt where it is missing."""
    folder = Path(workdir) / TOKENIZER
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary.build_tokenizer(seed).save_pretrained(str(folder))
    return vocabulary.load_tokenizer(folder)


def train_reading(workdir: Path, which: str, steps: int = 3000, seed: int = 0, stop_after: int | None = None) -> None:
    """Train a text encoder ("first" or "second") and write `text-<which>.safetensors`."""
    tokenizer = tokenizer_of(workdir, seed)
    encoder = vocabulary.build_encoder(which, len(tokenizer), seed)
    reading.train_encoder(
        encoder, tokenizer, workdir, f"reading-{which}", steps, seed + (which == "second"), stop_after=stop_after
    )
    save_tensors(encoder.state_dict(), Path(workdir) / f"text-{which}.safetensors")
