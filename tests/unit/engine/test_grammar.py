import json

import numpy as np
import pytest

from granite_ray.engine.grammar import GrammarCompiler, check_schema
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import Grammar
from tests.schemas import REFUSED, SCHEMAS

VOCAB_SIZE = 768  # beyond the tokenizer's own, as in real checkpoints


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer.tokenizer_json, VOCAB_SIZE, tokenizer.eos_token_ids)


def spell(tokenizer, text):
    return tokenizer.encode_text(text)


def test_there_are_enough_schemas():
    assert len(SCHEMAS) >= 30


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_accepted_at_start(name):
    check_schema(json.dumps(SCHEMAS[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_keyword(name, compiler):
    schema, word = REFUSED[name]
    with pytest.raises(ConfigError, match=r"task\.schema") as at_start:
        check_schema(json.dumps(schema))
    with pytest.raises(ConfigError) as when_compiled:
        compiler.matcher(Grammar(json.dumps(schema)))
    assert word in str(at_start.value)
    assert str(at_start.value) == str(when_compiled.value)


@pytest.mark.parametrize("text", ["[]", "true", "{", ""])
def test_what_is_no_json_object_is_no_schema(text):
    with pytest.raises(ConfigError, match=r"task\.schema"):
        check_schema(text)


def test_a_schema_cannot_loosen_the_rules_for_itself():
    options = {"lenient": True, "whitespace_flexible": True}
    with pytest.raises(ConfigError, match="uniqueItems"):
        check_schema(json.dumps({"type": "array", "uniqueItems": True, "x-guidance": options}))


def test_white_space_is_not_allowed_between_values(compiler, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    matcher = compiler.matcher(Grammar(json.dumps(schema)))
    for token_id in spell(tokenizer, '{"a":'):
        matcher.consume(token_id)
    allowed = {tokenizer.decode([i]) for i in np.flatnonzero(matcher.allowed_tokens())}
    assert "1" in allowed
    assert not any(text[:1].isspace() for text in allowed)


def test_mask_covers_the_models_vocabulary_and_no_padding(compiler, tokenizer):
    allowed = compiler.matcher(Grammar('{"type": "string"}')).allowed_tokens()
    assert allowed.shape == (VOCAB_SIZE,)
    assert allowed.dtype == np.bool_
    assert not allowed[tokenizer.vocab_size :].any()


def test_control_tokens_are_never_part_of_a_string(compiler, tokenizer):
    matcher = compiler.matcher(Grammar('{"type": "string"}'))
    for token_id in spell(tokenizer, '"a'):
        matcher.consume(token_id)
    allowed = set(np.flatnonzero(matcher.allowed_tokens()).tolist())
    [start_of_role] = tokenizer.encode_template("<|start_of_role|>")
    assert start_of_role not in allowed
    assert not allowed & set(tokenizer.eos_token_ids)


def test_the_end_is_allowed_exactly_where_the_answer_is_whole(compiler, tokenizer):
    [end] = tokenizer.eos_token_ids
    matcher = compiler.matcher(Grammar('{"type": "integer"}'))
    assert not matcher.allowed_tokens()[end]
    matcher.consume(spell(tokenizer, "7")[0])
    assert matcher.allowed_tokens()[end]
    assert not matcher.is_finished


def test_an_answer_that_nothing_can_follow_is_finished(compiler, tokenizer):
    matcher = compiler.matcher(Grammar('{"enum": ["ab"]}'))
    for token_id in spell(tokenizer, '"ab"'):
        assert not matcher.is_finished
        matcher.consume(token_id)
    assert matcher.is_finished


def test_matchers_of_one_schema_do_not_share_their_place(compiler, tokenizer):
    grammar = Grammar('{"enum": ["ab"]}')
    first, second = compiler.matcher(grammar), compiler.matcher(grammar)
    before = second.allowed_tokens()
    first.consume(spell(tokenizer, '"')[0])
    assert (second.allowed_tokens() == before).all()
    assert (first.allowed_tokens() != before).any()


def test_a_token_against_the_grammar_fails_the_row_without_quoting_it(compiler, tokenizer):
    matcher = compiler.matcher(Grammar('{"type": "integer"}'))
    with pytest.raises(RowFailure) as caught:
        matcher.consume(spell(tokenizer, " documentation")[0])
    assert caught.value.error_type == "schema_violation"
    assert "documentation" not in caught.value.message
