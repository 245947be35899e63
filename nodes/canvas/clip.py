"""The embedded models' text encoders in ComfyUI's classes, with our vocabulary and widths.

`canvas` and `canvas-scenes` read as Stable Diffusion 1.5 does; the flow models as Stable Diffusion 3 does, with two
encoders and no T5.
"""

from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import torch
from torch import Tensor

HEADS = 4  # of every text encoder; their other sizes are read from the weights


def sd1_clip(weights: dict[str, Tensor], tokenizer: Path) -> comfy.sd.CLIP:
    """The CLIP of a UNet: one encoder, whose last hidden state is read."""
    weights = _comfy_names(weights)
    return _clip(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=_words(weights, tokenizer, "clip_l")),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=_encoder(weights, return_projected_pooled=False)),
        {"clip_l": weights},
    )


def sd3_clip(first: dict[str, Tensor], second: dict[str, Tensor], tokenizer: Path) -> comfy.sd.CLIP:
    """The CLIP of a flow model: two encoders, whose last hidden state but one is read, and the pooled states."""
    weights = {"clip_l": _comfy_names(first), "clip_g": _comfy_names(second)}
    read = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
    encoders = {name: _encoder(own, return_projected_pooled=name == "clip_g", **read) for name, own in weights.items()}
    words = {name: _words(own, tokenizer, name) for name, own in weights.items()}
    return _clip(partial(_FlowTokenizer, words), partial(_FlowTextModel, encoders), weights)


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with our vocabulary, where it always takes CLIP's 49408 words."""

    def __init__(self, config: dict, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        size = config["vocab_size"], config["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


class _FlowTokenizer(comfy.text_encoders.sd3_clip.SD3Tokenizer):
    """SD3's tokenizer with our words, which gives nothing to the T5 that is not there."""

    def __init__(self, words: dict[str, partial], embedding_directory=None, tokenizer_data=None):
        options = {"embedding_directory": embedding_directory, "tokenizer_data": tokenizer_data or {}}
        self.clip_l, self.clip_g, self.t5xxl = words["clip_l"](**options), words["clip_g"](**options), None

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict:
        by_name = {"g": self.clip_g, "l": self.clip_l}
        out = {name: words.tokenize_with_weights(text, return_word_ids, **kwargs) for name, words in by_name.items()}
        return {**out, "t5xxl": []}  # CLIP Text Encode (SD3) asks for it


class _FlowTextModel(comfy.text_encoders.sd3_clip.SD3ClipModel):
    """SD3's text model without T5, its encoders of our widths."""

    def __init__(self, encoders: dict[str, partial], device="cpu", dtype=None, model_options=None):
        torch.nn.Module.__init__(self)  # SD3's own builds encoders of its own widths
        options = {"device": device, "dtype": dtype, "model_options": model_options or {}}
        self.clip_l, self.clip_g, self.t5xxl = encoders["clip_l"](**options), encoders["clip_g"](**options), None
        self.dtypes = {dtype}


def _comfy_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """By ComfyUI's names, whatever transformers' version called them; projected by the identity where by nothing."""
    projection = "text_projection.weight"
    named = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items() if k != projection}
    width = named["text_model.final_layer_norm.weight"].shape[0]
    return {**named, projection: weights.get(projection, torch.eye(width))}  # ComfyUI leaves it uninitialised


def _vocabulary(weights: dict[str, Tensor]) -> tuple[int, int]:
    return weights["text_model.embeddings.token_embedding.weight"].shape


def _length(weights: dict[str, Tensor]) -> int:
    return weights["text_model.embeddings.position_embedding.weight"].shape[0]


def _encoder(weights: dict[str, Tensor], **read) -> partial:
    """SDClipModel of the weights' sizes, which lacks device, dtype and options alone."""
    vocabulary, width = _vocabulary(weights)
    start, end = vocabulary - 2, vocabulary - 1  # the special tokens come last, see canvas.text and canvas.vocabulary
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith("mlp.fc1.weight") for name in weights),
        "num_attention_heads": HEADS,
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "quick_gelu",
        "max_position_embeddings": _length(weights),
        "eos_token_id": end,
    }
    return partial(
        comfy.sd1_clip.SDClipModel,
        textmodel_json_config=config,
        max_length=_length(weights),
        special_tokens={"start": start, "end": end, "pad": end},
        model_class=_TextModel,
        **read,
    )


def _words(weights: dict[str, Tensor], tokenizer: Path, name: str) -> partial:
    from transformers import CLIPTokenizerFast  # the class that reads tokenizer.json in transformers 4 as well

    return partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(tokenizer),
        tokenizer_class=CLIPTokenizerFast,
        max_length=_length(weights),
        embedding_size=_vocabulary(weights)[1],
        embedding_key=name,
    )


def _clip(tokenizer: partial, model: partial, weights: dict[str, dict[str, Tensor]]) -> comfy.sd.CLIP:
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(tokenizer, model),
        parameters=sum(tensor.numel() for own in weights.values() for tensor in own.values()),
        model_options={"dtype": torch.float32},
    )
    for name, own in weights.items():
        getattr(clip.cond_stage_model, name).transformer.load_state_dict(own)
    return clip
