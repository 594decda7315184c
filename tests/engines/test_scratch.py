"""A model built from nothing is a directory like any other: what is written is what is loaded back."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlpost.data.generated import problems
from rlpost.engines.scratch import build_model

SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 448}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scratch") / "model"
    build_model(path, **SIZES, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_as_loaded_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["2024", "x12y345", "1,234.50", " 7 8", "def f(xs):\n\treturn 10**9", "don 't  .  , n't"]
)
def test_every_digit_is_a_token_of_its_own(tokenizer: PreTrainedTokenizerBase, text: str):
    pieces = [str(tokenizer.decode([i])) for i in encode(tokenizer, text)]
    assert "".join(pieces) == text
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))


def test_fixed_phrases_are_single_tokens_once_the_directory_is_loaded_again(tokenizer: PreTrainedTokenizerBase):
    """Loading may replace how text is split (as for the model type "qwen2"): then these are 58 and 45 tokens long.

    By hand: "Compute |3|4|7|+|2|8|.\\n" is 8 tokens,
    "7|+|8|=|5|, carry |1|\\n|4|+|2|+|1|=|7|\\n\\boxed{|3|7|5|}" is 20.
    """
    for family, longest_prompt, longest_demonstration in (("arithmetic", 8, 20), ("functions", 8, 8)):
        for problem in islice(problems(family, split="heldout", seed=0), 100):
            assert len(encode(tokenizer, problem.prompt)) <= longest_prompt
            assert len(encode(tokenizer, problem.demonstration)) <= longest_demonstration


def test_no_token_lies_outside_the_model_and_the_end_is_the_one_the_configuration_names(
    directory: Path, tokenizer: PreTrainedTokenizerBase
):
    config = json.loads((directory / "config.json").read_text())
    assert max(tokenizer.get_vocab().values()) < config["vocab_size"] <= SIZES["vocab_size"]
    assert config["eos_token_id"] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert not config["tie_word_embeddings"]
    assert encode(tokenizer, str(tokenizer.eos_token)) == [tokenizer.eos_token_id]
    neutral = GenerationConfig.from_pretrained(directory)
    assert neutral.eos_token_id == tokenizer.eos_token_id
    assert {neutral.temperature, neutral.top_p, neutral.repetition_penalty, neutral.max_length} <= {None, 1.0}
    assert neutral.top_k in (None, 0)


def test_the_model_loads_as_written_and_starts_out_knowing_nothing(directory: Path, tokenizer: PreTrainedTokenizerBase):
    """An untrained model gives every token about 1/V: cross entropy within half of ln V (6.06 for V = 429)."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    written = load_file(directory / "model.safetensors")
    loaded = model.state_dict()
    assert written.keys() == loaded.keys()
    assert all(torch.equal(written[name], loaded[name]) for name in written)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    ids = torch.tensor([encode(tokenizer, "Compute 347+28.\n")])
    loss = model(input_ids=ids, labels=ids).loss.item()
    uniform = torch.tensor(float(len(tokenizer))).log().item()
    assert 0.5 * uniform < loss < 1.5 * uniform


def test_a_seed_fixes_the_weights_and_leaves_the_callers_generator_alone(directory: Path, tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    build_model(tmp_path / "again", **SIZES, seed=0)
    assert torch.equal(torch.rand(1), expected)
    build_model(tmp_path / "other", **SIZES, seed=1)
    first, again, other = (
        load_file(path / "model.safetensors") for path in (directory, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert (directory / "tokenizer.json").read_bytes() == (tmp_path / "other" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 3}, r"hidden_size = 64 over num_heads = 3 .* use hidden_size = 96 or 192"),
        ({"num_heads": 2, "num_kv_heads": 3}, r"num_heads = 2 is not a multiple of num_kv_heads = 3"),
        ({"vocab_size": 100}, r"vocab_size = 100 .* use 258 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_ones_that_do(tmp_path: Path, wrong: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        build_model(tmp_path / "model", **{**SIZES, **wrong}, seed=0)
    assert not (tmp_path / "model").exists()
