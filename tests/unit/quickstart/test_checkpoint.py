import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GraniteMoeForCausalLM

from granite_ray.quickstart import make_tokenizer
from granite_ray.quickstart.make_tokenizer import ANSWER_TOKENS, CHECKPOINT_PATH, CONTROL_TOKENS


@pytest.fixture(scope="module")
def auto_tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT_PATH)


# the tokenizer ───────────────────────────────────────────────────────────────────────────────────


def test_training_twice_gives_the_same_tokenizer(corpus: dict[str, list[str]]):
    once, again = (make_tokenizer.train_tokenizer(corpus["text"], 1_000) for _ in range(2))
    assert once.to_str() == again.to_str()
    assert once.get_vocab_size() == 1_000


def test_tokenizer_equals_auto_tokenizer(
    corpus: dict[str, list[str]], tokenizer: Tokenizer, auto_tokenizer
):
    texts = [*corpus["text"], "<|start_of_role|>user<|end_of_role|>ünï 日本 😀<|end_of_text|>\n"]
    ours = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert ours == auto_tokenizer(texts)["input_ids"]
    assert len(auto_tokenizer) == make_tokenizer.VOCAB_SIZE


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokenizer_is_lossless(tokenizer: Tokenizer, text: str):
    # The spelling of a control token is text as well.
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer):
    tokens = tokenizer.encode("version 2026.07.11, 100 digits").tokens
    assert "".join(token for token in tokens if token.isdigit()) == "20260711100"
    assert all(len(token) == 1 for token in tokenizer.get_vocab() if any(map(str.isdigit, token)))


def test_every_control_token_is_one_token_with_its_own_mark(tokenizer: Tokenizer):
    added = {
        token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()
    }
    assert added == dict.fromkeys(CONTROL_TOKENS, True) | dict.fromkeys(ANSWER_TOKENS, False)
    for token in added:
        assert tokenizer.encode(f"a{token}b").tokens == ["a", token, "b"]


# the chat template ───────────────────────────────────────────────────────────────────────────────


def test_turns_have_the_form_of_granite(auto_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " keep  my spaces "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "Thanks."}]},
    ]
    assert auto_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|> keep  my spaces <|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Yes.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Thanks.<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    )


def test_tools_and_documents_stand_in_the_system_turn(auto_tokenizer):
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    document = {"title": "Naïve <b>", "text": "Facts."}
    text = auto_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tools=[tool], documents=[document], tokenize=False
    )
    system, user = text.split("<|end_of_text|>\n")[:2]
    assert system.startswith("<|start_of_role|>system<|end_of_role|>")
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in system
    assert f"<documents>\n{json.dumps(document, ensure_ascii=False)}\n</documents>" in system
    assert user == "<|start_of_role|>user<|end_of_role|>Who?"


def test_tool_calls_and_their_answers_are_wrapped(auto_tokenizer):
    call = {"type": "function", "function": {"name": "find", "arguments": {"who": "Ada"}}}
    text = auto_tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "42"},
        ],
        tokenize=False,
    )
    called = '<tool_call>\n{"name": "find", "arguments": {"who": "Ada"}}\n</tool_call>'
    assert f"assistant<|end_of_role|>{called}\n{called}<|end_of_text|>" in text
    assert "user<|end_of_role|><tool_response>\n42\n</tool_response><|end_of_text|>" in text


# the checkpoint ──────────────────────────────────────────────────────────────────────────────────


def test_checkpoint_loads_in_transformers_unchanged():
    model, told = GraniteMoeForCausalLM.from_pretrained(CHECKPOINT_PATH, output_loading_info=True)
    assert not any(told.values()), told
    assert model.dtype == torch.bfloat16
    assert 8e6 <= sum(weight.numel() for weight in model.parameters()) <= 20e6


def test_checkpoint_has_every_part_of_a_mixture_of_experts():
    config = AutoConfig.from_pretrained(CHECKPOINT_PATH)
    assert config.model_type == "granitemoe"
    assert config.num_local_experts >= 8
    assert config.num_experts_per_tok >= 2
    # An implementation that forgets a multiplier must not give the same answers.
    assert 1 not in (config.embedding_multiplier, config.residual_multiplier)
    assert 1 not in (config.attention_multiplier, config.logits_scaling)


def test_checkpoint_agrees_with_its_tokenizer(auto_tokenizer):
    config = AutoConfig.from_pretrained(CHECKPOINT_PATH)
    generation = GenerationConfig.from_pretrained(CHECKPOINT_PATH)
    assert config.vocab_size == len(auto_tokenizer)
    assert generation.eos_token_id == auto_tokenizer.eos_token_id
    assert config.pad_token_id == auto_tokenizer.pad_token_id
    assert config.max_position_embeddings == auto_tokenizer.model_max_length >= 2_048


def test_repository_carries_less_than_forty_megabytes_of_quickstart():
    files = [path for path in CHECKPOINT_PATH.parent.rglob("*.*") if path.is_file()]
    kept = [path for path in files if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in kept) < 40_000_000
