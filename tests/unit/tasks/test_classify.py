"""Label arithmetic against a plain computation in probabilities."""

import asyncio
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_ray.config import ClassifyConfig, Example
from granite_ray.errors import ConfigError
from granite_ray.records import Result
from granite_ray.tasks import Task, TaskLimits, make_task
from granite_ray.tasks.labels import combine_chunks, mean_log_probabilities
from granite_ray.tokenizer import Tokenizer
from tests.unit.tasks.scripted import Call, ScriptedLLM, make_document

LIMITS = TaskLimits(max_model_len=800)

log_probabilities = st.lists(st.floats(-30, 0), min_size=3, max_size=3)


def make(tokenizer: Tokenizer, limits: TaskLimits = LIMITS, **options: object) -> Task:
    return make_task(ClassifyConfig(kind="classify", **options), tokenizer, limits)


def run(task: Task, llm: ScriptedLLM, tokenizer: Tokenizer, *texts: str) -> Result:
    return asyncio.run(task.run(make_document(tokenizer, *texts), llm))


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(log_probabilities, st.integers(1, 50)), min_size=1, max_size=4),
    log_probabilities,
)
def test_chunks_are_combined_by_the_weighted_geometric_mean_over_the_prior(
    chunks: list[tuple[list[float], int]], prior: list[float]
) -> None:
    total = sum(weight for _, weight in chunks)
    product = [
        math.prod(softmax(scores)[label] ** (weight / total) for scores, weight in chunks)
        / math.exp(prior[label])
        for label in range(3)
    ]
    expected = [value / sum(product) for value in product]
    rows = [scores for scores, _ in chunks]
    found = combine_chunks(rows, [weight for _, weight in chunks], prior)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(log_probabilities, min_size=1, max_size=3))
def test_the_prior_is_the_mean_of_probabilities(rows: list[list[float]]) -> None:
    means = [sum(softmax(row)[label] for row in rows) / len(rows) for label in range(3)]
    found = [math.exp(value) for value in mean_log_probabilities(rows)]
    assert found == pytest.approx(means, rel=1e-9)


def test_very_unlikely_labels_do_not_break_the_arithmetic() -> None:
    assert combine_chunks([[-2000.0, -3000.0]], [5], [0.0, 0.0]) == [1.0, 0.0]
    assert mean_log_probabilities([[-2000.0, 0.0]])[0] == pytest.approx(-2000.0)


def test_the_likeliest_label_wins_and_all_are_listed_best_first(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, rate=lambda _: [-3.0, -1.0, -2.0])
    result = run(make(tokenizer, labels=["news", "science", "sports"]), llm, tokenizer, "Atoms.")
    expected = softmax([-3.0, -1.0, -2.0])
    assert result.values["label"] == "science"
    assert result.values["confidence"] == pytest.approx(expected[1])
    scores = result.values["scores"]
    assert [score["label"] for score in scores] == ["science", "sports", "news"]
    assert [score["probability"] for score in scores] == pytest.approx(sorted(expected)[::-1])
    assert (result.finish_reason, result.num_completion_tokens) == (None, 0)
    assert result.num_prompt_tokens == len(llm.calls[0].prompt.token_ids)


def test_no_choice_is_the_beginning_of_another(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    run(make(tokenizer, labels=["a", "ab", "abc", "a b"]), llm, tokenizer, "x")
    choices = llm.calls[0].choices
    assert all(
        first == second[: len(first)] if first is second else first != second[: len(first)]
        for first in choices
        for second in choices
    )
    assert {choice[-1] for choice in choices} == {tokenizer.eos_token_ids[0]}


def test_longer_chunks_weigh_more(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(
        tokenizer, rate=lambda call: [-0.1, -2.0] if "LONG" in call.text else [-2.0, -0.1]
    )
    task = make(tokenizer, labels=["a", "b"])
    result = run(task, llm, tokenizer, "LONG " * 20, "x")
    assert result.values["label"] == "a"
    result = run(task, llm, tokenizer, "LONG", "x " * 40)
    assert result.values["label"] == "b"


def test_below_the_bar_the_label_is_null_and_the_scores_stay(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, rate=lambda _: [0.0, 0.0])
    result = run(make(tokenizer, labels=["a", "b"], abstain_below=0.6), llm, tokenizer, "x")
    assert result.values["label"] is None
    assert result.values["confidence"] == pytest.approx(0.5)
    assert len(result.values["scores"]) == 2
    assert result.error is None


def is_content_free(call: Call) -> bool:
    return "fox" not in call.text


def test_calibration_divides_by_what_labels_get_without_a_document(tokenizer: Tokenizer) -> None:
    document, prejudice = [-1.0, -2.0], [-0.5, -3.0]
    llm = ScriptedLLM(tokenizer, rate=lambda call: prejudice if is_content_free(call) else document)
    task = make(tokenizer, labels=["a", "b"], calibration="contextual")
    result = run(task, llm, tokenizer, "A fox.")
    ratio = [p / q for p, q in zip(softmax(document), softmax(prejudice), strict=True)]
    assert result.values["label"] == "b"
    assert result.values["confidence"] == pytest.approx(ratio[1] / sum(ratio))


def test_documents_share_one_calibration_and_none_pays_for_it(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    task = make(tokenizer, labels=["a", "b"], calibration="contextual")

    async def run_both() -> list[Result]:
        documents = [make_document(tokenizer, "A fox."), make_document(tokenizer, "A fox.")]
        return await asyncio.gather(*(task.run(document, llm) for document in documents))

    first, second = asyncio.run(run_both())
    assert first == second
    assert sum(map(is_content_free, llm.calls)) == 3
    assert len(llm.calls) == 3 + 2


def test_a_document_cancelled_while_calibrating_does_not_take_others_along(
    tokenizer: Tokenizer,
) -> None:
    llm = ScriptedLLM(tokenizer)
    task = make(tokenizer, labels=["a", "b"], calibration="contextual")

    async def cancel_the_first() -> Result:
        first, second = (
            asyncio.ensure_future(task.run(make_document(tokenizer, "A fox."), llm))
            for _ in range(2)
        )
        while not any(map(is_content_free, llm.calls)):
            await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(cancel_the_first()).error is None


def rate_by_path(call: Call) -> list[float]:
    if "It is about animals." in call.text:
        return [-0.2, -1.5]
    return [-0.1, -2.0, -5.0]


def test_a_tree_is_descended_and_confidence_multiplied(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, rate=rate_by_path)
    labels = {"animals": ["fox", "dog"], "plants": {"trees": None, "herbs": None}, "other": None}
    result = run(make(tokenizer, labels=labels), llm, tokenizer, "A fox.")
    top, below = softmax([-0.1, -2.0, -5.0]), softmax([-0.2, -1.5])
    assert result.values["label"] == "animals/fox"
    assert result.values["confidence"] == pytest.approx(top[0] * below[0])
    scores = {score["label"]: score["probability"] for score in result.values["scores"]}
    assert scores == pytest.approx(
        {
            "animals": top[0],
            "plants": top[1],
            "other": top[2],
            "animals/fox": top[0] * below[0],
            "animals/dog": top[0] * below[1],
        }
    )
    assert len(llm.calls) == 2


def test_several_labels_are_asked_one_by_one_with_the_document_first(
    tokenizer: Tokenizer,
) -> None:
    llm = ScriptedLLM(
        tokenizer, rate=lambda call: [-0.1, -2.0] if "'dog'" not in call.text else [-2.0, -0.1]
    )
    task = make(tokenizer, labels=["fox", "dog", "cat"], multi_label=True)
    result = run(task, llm, tokenizer, "A fox and a cat.")
    assert [field.name for field in task.output_fields] == ["labels", "scores"]
    assert result.values["labels"] == ["fox", "cat"]
    yes, no = softmax([-0.1, -2.0])
    scores = [(score["label"], score["probability"]) for score in result.values["scores"]]
    assert scores == [
        ("cat", pytest.approx(yes)),
        ("fox", pytest.approx(yes)),
        ("dog", pytest.approx(no)),
    ]
    texts = [call.text for call in llm.calls]
    assert all(text.index("A fox and a cat.") < text.index("Does the label") for text in texts)


def test_several_labels_have_their_own_bar_and_calibration(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(
        tokenizer, rate=lambda call: [-0.1, -2.0] if is_content_free(call) else [-1.0, -1.0]
    )
    options = {"labels": ["a", "b"], "multi_label": True}
    assert run(make(tokenizer, **options), llm, tokenizer, "A fox.").values["labels"] == ["a", "b"]
    strict = make(tokenizer, **options, abstain_below=0.6)
    assert run(strict, llm, tokenizer, "A fox.").values["labels"] == []
    calibrated = make(tokenizer, **options, calibration="contextual")
    result = run(calibrated, llm, tokenizer, "A fox.")
    assert result.values["labels"] == []
    assert result.values["scores"][0]["probability"] == pytest.approx(softmax([-0.1, -2.0])[1])


def test_several_labels_of_a_tree_are_its_leaves(tokenizer: Tokenizer) -> None:
    task = make(tokenizer, labels={"a": ["x", "y"], "b": None}, multi_label=True)
    result = run(task, ScriptedLLM(tokenizer), tokenizer, "x")
    assert {score["label"] for score in result.values["scores"]} == {"a/x", "a/y", "b"}


def test_a_failed_chunk_is_left_out_of_all_levels(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, rate=lambda call: [0.0] * len(call.choices), max_model_len=200)
    task = make(
        tokenizer, TaskLimits(300, max_failed_chunks=1), labels={"a": ["x", "y"], "b": None}
    )
    result = run(task, llm, tokenizer, "short", "long " * 200)
    assert result.error is None
    assert result.num_failed_chunks == 1
    assert len(llm.calls) == 2


def examples(*pairs: tuple[str, object]) -> list[Example]:
    return [Example(input=text, output=output) for text, output in pairs]


def test_an_example_shows_the_label_of_each_level(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer, rate=lambda _: [0.0, -1.0])
    shown = examples(("EX1", "a/y"), ("EX2", "b"))
    run(make(tokenizer, labels={"a": ["x", "y"], "b": None}, examples=shown), llm, tokenizer, "D")
    top, below = (call.text for call in llm.calls)
    assert re.findall(r"(EX\d)\|\n\|assistant\|(\w)", top) == [("EX1", "a"), ("EX2", "b")]
    assert re.findall(r"(EX\d)\|\n\|assistant\|(\w)", below) == [("EX1", "y")]


def test_an_example_answers_each_of_several_labels(tokenizer: Tokenizer) -> None:
    llm = ScriptedLLM(tokenizer)
    shown = examples(("EX1", "a, b"), ("EX2", ""))
    run(
        make(tokenizer, labels=["a", "b", "c"], multi_label=True, examples=shown),
        llm,
        tokenizer,
        "D",
    )
    answers = [re.findall(r"assistant\|(yes|no)\|", call.text) for call in llm.calls]
    assert answers == [["yes", "no"], ["yes", "no"], ["no", "no"]]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"language": "German"}, r"task\.language"),
        ({"examples": examples(("x", "zzz"))}, r"task\.examples\[0\]\.output 'zzz'.*fox, dog"),
        ({"examples": examples(("x", ""))}, r"task\.examples\[0\]\.output ''"),
        ({"examples": examples(("x", {"a": 1}))}, r"must be a label"),
        ({"labels": {"a/b": None, "c": None}}, "stands between the levels"),
        ({"labels": {"a": ["x", "y/z"], "c": None}}, "stands between the levels"),
        ({"template": "{{ instruction }}"}, "never shows the document"),
        ({"template": "{{ text }}", "multi_label": True}, "names the labels"),
        ({"template": "{{ text }}", "labels": {"a": ["x", "y"], "b": None}}, "names the labels"),
        (
            {"template": "{{ text }}{{ n + 1 }}", "calibration": "contextual"},
            r"task\.calibration fills",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(
    tokenizer: Tokenizer, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make(tokenizer, **{"labels": ["fox", "dog"], **options})


def test_a_flat_label_may_hold_a_slash(tokenizer: Tokenizer) -> None:
    result = run(make(tokenizer, labels=["a/b", "c"]), ScriptedLLM(tokenizer), tokenizer, "x")
    assert result.values["label"] == "a/b"
