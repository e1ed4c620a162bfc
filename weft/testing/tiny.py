"""A tiny language model, a tokenizer of characters and some records, made in memory: no file, no download."""

from typing import Any

import torch
from torch import nn

RECORDS: list[dict[str, Any]] = [
    {
        "question": f"what is {thing} {place}",
        "answer": f"a {thing} of {place * 7} grams" + " and more" * (place % 3),
        "prompt": f"how heavy is {thing} {place}",
        "chosen": f"{thing} weighs {place * 7} grams" + " or more" * (place % 2),
        "rejected": "heavy" + " indeed" * (place % 3),
        "text": f"the {thing} costs {place}" + " coins" * (place % 4),
        "label": thing,
        "source": f"site {place % 3}",
    }
    for place in range(6)
    for thing in ("card", "rain", "bread", "engine")
]
"""Records with the columns that Weft's own tasks and splits ask for."""


def tokenizer(chat_template: str | None = None, *, bos: bool = False) -> Any:
    """Return a tokenizer of one token a character: <pad> 0, <s> 1, </s> 2, <unk> 3, then ASCII by code."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = ["\n", *map(chr, range(32, 127))]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + letters)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    if bos:
        words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    made.chat_template = chat_template
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(auto: str = "AutoModelForCausalLM", *, labels: int = 2) -> nn.Module:
    """Return a Llama, or a T5 for an encoder-decoder, of two layers; random weights, always the same, frozen."""
    import transformers

    if auto == "AutoModelForSeq2SeqLM":
        config: Any = transformers.T5Config(
            **SIZES, d_ff=24, d_kv=8, num_layers=2, decoder_start_token_id=0, initializer_factor=1.0, dropout_rate=0.0
        )
    else:
        config = transformers.LlamaConfig(
            **SIZES,
            intermediate_size=24,
            num_hidden_layers=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.3,
            num_labels=labels,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: nn.Module = getattr(transformers, auto).from_config(config)
    return net.requires_grad_(False).eval()
