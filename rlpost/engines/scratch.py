"""Builds a small Llama policy and its byte-level tokenizer from nothing, as a normal Hugging Face directory.

Llama rather than Qwen2: for a directory whose model type is "qwen2", transformers' AutoTokenizer ignores how
tokenizer.json splits text and puts Qwen2's own splitting (and end token) in place, whatever tokenizer_config.json says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from rlpost.data.generated import problems

PAD, EOS = "<|pad|>", "<|eos|>"
SMALLEST_VOCABULARY = 256 + 2
"""Every byte, padding and end: what any text can be written in."""
NUM_TOKENIZER_PROBLEMS = 2000
TOKENIZER_FAMILIES = ("arithmetic", "functions")
"""Not all: a family more would change every model that is built."""
"""Training problems per family that the merges are learned from."""
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def build_model(
    path: Path,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    vocab_size: int,
    seed: int,
    max_positions: int = 2048,
) -> None:
    """Write an untrained Llama model and its tokenizer to `path`; transformers and vLLM load it as any other.

    Args:
        vocab_size: most tokens the tokenizer may learn; fewer when the generated problems offer fewer merges.
        seed: of the initial weights. The tokenizer is always the same.

    Raises:
        ValueError: when the sizes do not fit together.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check_sizes(hidden_size, num_heads, num_kv_heads, vocab_size)
    tokenizer = build_tokenizer(_generated_texts(), vocab_size=vocab_size, max_length=max_positions)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(hidden_size),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_positions,
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # Sampling parameters are the recipe's; a directory that carries defaults of its own would change them silently.
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    path.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(path)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(path)


def build_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text comes back as it was, digits are one token each, merges reach across words.

    Merging across words turns the fixed phrases of `texts` into single tokens, which makes responses short.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _generated_texts() -> Iterator[str]:
    for family in TOKENIZER_FAMILIES:
        for problem in islice(problems(family, split="train", seed=0), NUM_TOKENIZER_PROBLEMS):
            yield problem.prompt
            yield problem.demonstration


def _intermediate_size(hidden_size: int) -> int:
    """8/3 of the width, as is usual for gated layers, in whole blocks of 32."""
    return -(-hidden_size * 8 // 3 // 32) * 32


def _check_sizes(hidden_size: int, num_heads: int, num_kv_heads: int, vocab_size: int) -> None:
    if hidden_size % (32 * num_heads):
        raise ValueError(
            f"hidden_size = {hidden_size} over num_heads = {num_heads} is not a head size that vLLM serves:"
            f" use hidden_size = {32 * num_heads} or {64 * num_heads}"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads = {num_heads} is not a multiple of num_kv_heads = {num_kv_heads}")
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size = {vocab_size} cannot hold every byte: use {SMALLEST_VOCABULARY} or more")
