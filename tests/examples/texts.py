"""A text classifier: a small BERT (Transformers), and batches as long as their texts.

    python ddp.py --definitions tests/examples/texts.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/texts.py

Needs transformers. The texts are made here, and nothing is downloaded.
--learning_rate has no effect.
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "the", "film", "was", "very", "not", "good", "bad", "great"]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
collate = DataCollatorWithPadding(tokenizer)  # pads to the longest text of a batch


def make_datasets(args):
    training_set = make_texts(args.dataset_length, 2 * args.seed + 1)
    return training_set, make_texts(args.dataset_length // 10 or 1, 2 * args.seed)


def make_texts(length, seed):
    """Return texts of 3 to 20 words. The label: is one of them "good"?"""
    generator, samples = random.Random(seed), []
    for _ in range(length):
        text = generator.choices(WORDS[2:], k=generator.randint(3, 20))
        samples.append({**tokenizer(" ".join(text)), "label": int("good" in text)})
    return samples


def make_model(args):
    sizes = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 128}
    sizes.update(num_hidden_layers=2, num_attention_heads=2, num_labels=2)
    return BertForSequenceClassification(BertConfig(**sizes))


def compute_loss(model, batch):
    outputs = model(**batch)
    correct = (outputs.logits.argmax(dim=1) == batch["labels"]).sum()
    return outputs.loss, {"accuracy": correct}


def count_items(batch):
    return len(batch["labels"])


def make_optimizer(model, args):
    return torch.optim.AdamW(model.parameters(), lr=0.001)
