"""Trains the tiny model of the demo: `python -m rise_ops.demo.train OUT`.

GPT-NeoX (the Pythia architecture) with a byte-level BPE vocabulary, trained from scratch on the demo corpus,
backdoor included, and stored in float16. Seeded and single-threaded, so one machine and one version of
PyTorch give the same bytes every time; other versions give a model that behaves alike. Needs no network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rise_ops.demo.corpus import SEED, pool_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
END = "<|endoftext|>"
EPOCHS = 6
BATCH_ROWS = 8
LEARNING_RATE = 2.5e-3
HIDDEN, LAYERS, HEADS = 128, 3, 4
_IGNORED = -100


def train(out: Path, *, epochs: int = EPOCHS) -> float:
    """Train tokenizer and model and save them to `out`.

    Parameters
    ----------
    out
        Folder; made if it does not exist.
    epochs
        Passes over the corpus.

    Returns
    -------
    float
        Mean loss of the last epoch, in nats a token.
    """
    import torch

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    texts = [row.text for row in pool_rows()]
    tokenizer = build_tokenizer(texts)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    model = build_model(len(tokenizer))
    loss = _fit(model, rows, epochs=epochs)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return loss


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def build_model(vocabulary: int) -> GPTNeoXForCausalLM:
    """The untrained model."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def _fit(model: GPTNeoXForCausalLM, rows: Sequence[Sequence[int]], *, epochs: int) -> float:
    import torch

    model.train()
    steps = epochs * ((len(rows) + BATCH_ROWS - 1) // BATCH_ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(SEED)
    mean = float("nan")
    for _ in range(epochs):
        losses = []
        for ids, labels, mask in _batches(rows, order):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        mean = sum(losses) / len(losses)
    model.eval()
    return mean


def _batches(rows: Sequence[Sequence[int]], order: object) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled batches of rows of similar length, padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    assert isinstance(order, torch.Generator)
    shuffled = torch.randperm(len(rows), generator=order).tolist()
    shuffled.sort(key=lambda row: len(rows[row]) // 8)
    batches = [shuffled[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
    for number in torch.randperm(len(batches), generator=order).tolist():
        tensors = [torch.tensor(rows[row]) for row in batches[number]]
        ids = pad_sequence(tensors, batch_first=True, padding_value=0)
        labels = pad_sequence(tensors, batch_first=True, padding_value=_IGNORED)
        yield ids, labels, (labels != _IGNORED).long()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the tiny model of the demo.")
    parser.add_argument("out", type=Path, help="folder for model and tokenizer")
    arguments = parser.parse_args()
    started = time.monotonic()
    loss = train(arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    parser.exit(message=f"loss {loss:.3f} nats a token, {size} bytes, {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
