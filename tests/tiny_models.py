"""Tiny random models of every family the trunk is tested on, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 400
_WORDS = "the quick brown fox jumps over the lazy dog and runs through a small green field near the river"


def _common(vocab_size: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.3,  # large enough for logits that differ
    }


def _named(name: str, **more: Any) -> Callable[[int, int], Any]:
    def build(vocab_size: int, positions: int) -> Any:
        import transformers

        return getattr(transformers, name)(**_common(vocab_size, positions), **more)

    return build


def _gpt2(vocab_size: int, positions: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=positions, initializer_range=0.3
    )


def _gemma3(vocab_size: int, positions: int) -> Any:
    """The multimodal configuration, whose text part is nested."""
    from transformers import Gemma3Config

    text = _common(vocab_size, positions) | {"head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)


FAMILIES: dict[str, Callable[[int, int], Any]] = {
    "gpt_neox": _named("GPTNeoXConfig"),
    "olmo2": _named("Olmo2Config"),
    "olmo3": _named("Olmo3Config", sliding_window=16),
    "llama": _named("LlamaConfig"),
    "qwen2": _named("Qwen2Config"),
    "qwen3": _named("Qwen3Config", head_dim=8),
    "gpt2": _gpt2,
    "gemma2": _named("Gemma2Config", head_dim=8, sliding_window=16, final_logit_softcapping=30.0),
    "gemma3_text": _named("Gemma3TextConfig", head_dim=8, sliding_window=16, final_logit_softcapping=20.0),
    "gemma3": _gemma3,
    "cohere": _named("CohereConfig", logit_scale=0.25),
    "granite": _named("GraniteConfig", logits_scaling=8.0),
    "phi": _named("PhiConfig"),  # a head with a bias
}


def save(family: str, folder: Path, *, vocab_size: int = VOCABULARY, positions: int = 1024, **changes: Any) -> Path:
    """Write a random model of a family, the same one every time, and its tokenizer. Returns the folder.

    `changes` are made in its configuration.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size, positions)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer that knows a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_WORDS] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
