"""Fine-tuning with LoRA (PEFT): adapters on the BERT of texts.py, which is frozen.

    python ddp.py --definitions tests/examples/lora.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/lora.py

Needs peft. Nothing is downloaded: the frozen weights are random ones. To fine-tune a
trained model, load it with from_pretrained instead of texts.make_model.
"""

import warnings

import texts
from peft import LoraConfig, get_peft_model

make_datasets, collate = texts.make_datasets, texts.collate
compute_loss, count_items = texts.compute_loss, texts.count_items
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # of PEFT 0.21


def make_model(args):
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    return get_peft_model(texts.make_model(args), config)
