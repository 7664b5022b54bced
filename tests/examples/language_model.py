"""A language model: a small GPT-2 (Transformers), whose loss is a mean over tokens.

    python ddp.py --definitions tests/examples/language_model.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/language_model.py

Needs transformers. The tokens are the texts' bytes. --learning_rate has no effect.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel


def make_datasets(args):
    training_set = make_texts(args.dataset_length, 2 * args.seed + 1)
    return training_set, make_texts(args.dataset_length // 10 or 1, 2 * args.seed)


def make_texts(length, seed):
    """Return texts that count, such as "98 99 100 101", of 2 to 6 numbers."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(990, (length,), generator=generator).tolist()
    counts = torch.randint(2, 7, (length,), generator=generator).tolist()
    numbers = [range(start, start + count) for start, count in zip(starts, counts)]
    return [torch.tensor(list(" ".join(map(str, each)).encode())) for each in numbers]


def collate(samples):
    """Pad to the longest text of the batch. Labels of -100 do not count in the loss."""
    return {
        "input_ids": pad_sequence(samples, batch_first=True),
        "attention_mask": pad_sequence(list(map(torch.ones_like, samples)), True),
        "labels": pad_sequence(samples, batch_first=True, padding_value=-100),
    }


def make_model(args):
    sizes = {"n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}
    dropout = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
    tokens = {"vocab_size": 128, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **tokens))


def compute_loss(model, batch):
    labels = batch["labels"][:, 1:]  # each token but the first one is predicted
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, :-1].transpose(1, 2)  # (batch, vocabulary, tokens)
    loss = nn.functional.cross_entropy(logits, labels)  # without the labels of -100
    return loss, {"accuracy": (logits.argmax(dim=1) == labels).sum()}


def count_items(batch):
    """Return how many tokens the loss is the mean of."""
    return (batch["labels"][:, 1:] != -100).sum()


COUNTS_DIFFER = True  # in a step, some ranks have more tokens than others


def make_optimizer(model, args):
    return torch.optim.AdamW(model.parameters(), lr=0.003)
