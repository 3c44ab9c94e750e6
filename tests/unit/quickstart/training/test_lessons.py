"""What is taught: right answers, nothing held out, the prompts of real tasks."""

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from granite_ray.config import TaskConfig
from granite_ray.quickstart.make_tokenizer import CHECKPOINT_PATH
from granite_ray.quickstart.training.data import Data, split_data
from granite_ray.quickstart.training.disguise import Disguise
from granite_ray.quickstart.training.exam import make_exam
from granite_ray.quickstart.training.groups import GROUP_TOKENS, Epochs, Group
from granite_ray.quickstart.training.lessons import (
    ANSWER_WEIGHT,
    GUESS_WEIGHT,
    LABEL_WEIGHT,
    Lessons,
)
from granite_ray.quickstart.training.prompts import PromptShape, PromptShapes
from granite_ray.quickstart.training.records import ENTRY_FIELDS, record_of
from granite_ray.quickstart.training.timetable import SHARES, Kind, deal_groups
from granite_ray.records import Chunk, Completion, Document, Grammar, Prompt, SamplingParams
from granite_ray.tasks import TaskLimits, make_task
from granite_ray.tokenizer import Tokenizer
from tests.unit.quickstart.training.samples import (
    SECTIONS,
    SEED,
    is_drawn_for_testing,
    make_entries,
    make_packages,
)

NUM_STEPS = 40
NUM_GROUPS = 3


@pytest.fixture(scope="module")
def groups(lessons: Lessons) -> list[Group]:
    dealt = deal_groups(NUM_STEPS, NUM_STEPS // 10, NUM_GROUPS)
    return [group for number, kinds in enumerate(dealt) for group in lessons.step(kinds, number)]


def answers_of(group: Group, tokenizer: Tokenizer, *weights: float) -> Iterator[tuple[str, str]]:
    """The text of each row before its answer, and the answer, whose tokens have these weights."""
    for row in group.rows:
        first = next(at for at, weight in enumerate(row.weights) if weight in weights)
        last = first
        while last < len(row.weights) and row.weights[last] in weights:
            last += 1
        assert row.token_ids[last - 1] in tokenizer.eos_token_ids
        yield (
            tokenizer.decode([*group.shared, *row.token_ids[:first]]),
            tokenizer.decode(row.token_ids[first:last]),
        )


# the split ───────────────────────────────────────────────────────────────────────────────────────


def test_held_out_packages_and_sources_never_appear_in_lessons(
    groups: list[Group], tokenizer: Tokenizer
):
    taught = "".join(
        tokenizer.decode([*group.shared, *row.token_ids])
        for group in groups
        if group.kind != "copy"
        for row in group.rows
    )
    names = [package.name for package in make_packages()]
    assert not [name for name in names if is_drawn_for_testing(name) and name in taught]
    seen = [name for name in names if name in taught]
    assert len(seen) > 0.8 * sum(not is_drawn_for_testing(name) for name in names)
    sources = sorted({entry.source for entry in make_entries()})
    assert any(is_drawn_for_testing(source) for source in sources)
    assert not [one for one in sources if is_drawn_for_testing(one) and f" of {one}." in taught]
    assert any(f" of {one}." in taught for one in sources)


def test_what_is_held_out_shares_no_first_paragraph_with_training():
    data = split_data(make_packages(), make_entries())
    held_out = [package for package in make_packages() if is_drawn_for_testing(package.name)]
    repeating = [package for package in held_out if package.text.startswith("Common opening.\n")]
    assert repeating
    assert list(data.held_out_packages) == [p for p in held_out if p not in repeating]
    assert all(is_drawn_for_testing(entry.source) for entry in data.held_out_entries)
    assert not [
        entry
        for entry in data.entries
        if is_drawn_for_testing(entry.source) or is_drawn_for_testing(entry.maintainer)
    ]


# answers ─────────────────────────────────────────────────────────────────────────────────────────


def test_sections_and_synopses_are_those_of_the_text(groups: list[Group], tokenizer: Tokenizer):
    packages = {package.name: package for package in make_packages()}
    num_seen = 0
    for group in groups:
        if group.kind not in ("section", "synopsis"):
            continue
        is_section = group.kind == "section"
        weights = [LABEL_WEIGHT] if is_section else [ANSWER_WEIGHT, GUESS_WEIGHT]
        for shown, answer in answers_of(group, tokenizer, *weights):
            names = [name for name in packages if f"{name} " in shown]
            if len(names) != 1:  # a piece from the middle does not tell its name
                continue
            num_seen += 1
            package = packages[names[0]]
            assert answer == (package.section if is_section else package.synopsis)
            assert not is_section or f"\n- {answer}\n" in shown
    assert num_seen > 50


def test_words_of_a_synopsis_that_stand_nowhere_in_its_text_count_less(
    groups: list[Group], tokenizer: Tokenizer
):
    num_seen = 0
    for row in (row for group in groups if group.kind == "synopsis" for row in group.rows):
        pairs = list(zip(row.token_ids, row.weights, strict=True))
        text = tokenizer.decode(row.token_ids)
        if text.startswith("pack"):  # as its synopsis does
            num_seen += 1
            assert all(weight == ANSWER_WEIGHT for _, weight in pairs[-1:])
            guessed = [one for one, weight in pairs if weight == GUESS_WEIGHT]
            assert tokenizer.decode(guessed).strip() == "in short"
    assert num_seen > 10


def test_records_hold_what_stands_in_the_text_and_all_bugs(
    groups: list[Group], tokenizer: Tokenizer
):
    records = [
        (shown, json.loads(answer))
        for group in groups
        if group.kind in ("entry", "history")
        for shown, answer in answers_of(group, tokenizer, ANSWER_WEIGHT)
    ]
    assert len(records) > 50
    for shown, record in records:
        assert list(record) == [name for name, _ in ENTRY_FIELDS]
        for value in record.values():
            values = value if isinstance(value, list) else [value] if value else []
            assert all(one in shown for one in values)
    assert sum(record["package"] is not None for _, record in records) > len(records) // 2
    assert sum(record["date"] is None for _, record in records) > 0


def test_disguised_entry_says_what_was_put_in():
    lot = random.Random(0)
    disguise = Disguise([p.name for p in make_packages()], ["Ada King Lovelace", "Grace Hopper"])
    entries = make_entries()
    for _ in range(300):
        entry = lot.choice(entries)
        worn = disguise.wear(entry, lot)
        assert record_of(worn.text) == {
            "package": worn.package,
            "version": worn.version,
            "distribution": worn.distribution,
            "urgency": worn.urgency,
            "bugs": list(worn.bugs),
            "cves": list(worn.cves),
            "maintainer": worn.maintainer,
            "date": worn.date,
        }
        values = (worn.package, worn.version, worn.distribution, worn.urgency, worn.maintainer)
        assert all(value and value in worn.text for value in (*values, worn.date))
        assert all(value in worn.text for value in (*worn.bugs, *worn.cves))
        assert len(worn.bugs) >= 2
        assert len(worn.cves) >= 1
        old = {entry.version, entry.maintainer, entry.date, *entry.bugs, *entry.cves}
        assert old.isdisjoint({*values, worn.date, *worn.bugs, *worn.cves})


def test_copied_tokens_stand_in_the_piece_before(lessons: Lessons, tokenizer: Tokenizer):
    [newline] = tokenizer.encode_text("\n")
    group = lessons.group("copy", 0, random.Random(1))
    for row in group.rows:
        learnt = [at for at, weight in enumerate(row.weights) if weight]
        for at in learnt:
            pair = row.token_ids[at - 1 : at + 1]
            earlier = [row.token_ids[place : place + 2] for place in range(at - 1)]
            assert pair in earlier
        assert newline in row.token_ids
        assert learnt


# groups ──────────────────────────────────────────────────────────────────────────────────────────


def test_groups_keep_to_their_budget(groups: list[Group]):
    assert {group.kind for group in groups} == set(SHARES)
    for group in groups:
        longest = max(len(row.token_ids) for row in group.rows)
        second_turns = 60 * len(group.rows) if group.kind == "section" else 0
        rows = group.num_tokens - len(group.shared)
        assert rows <= GROUP_TOKENS + longest + second_turns
        assert all(len(row.token_ids) == len(row.weights) for row in group.rows)
        assert all(row.weights[0] == 0 for row in group.rows)


def test_every_text_is_asked_about_once_an_epoch():
    sizes = [random.Random(number).randint(40, 300) for number in range(100)]
    epochs = Epochs("section", sizes, seed=1)
    first, second = epochs.groups(0), epochs.groups(1)
    assert sorted(index for group in first for index in group) == list(range(100))
    assert sorted(index for group in second for index in group) == list(range(100))
    assert first != second
    assert all(sum(sizes[index] for index in group) <= GROUP_TOKENS for group in first)
    assert [epochs.indexes(place) for place in range(len(first) + 3)] == first + second[:3]


def test_kinds_come_in_their_shares_and_none_is_asked_twice():
    steps = deal_groups(400, 0, 3)
    dealt: list[tuple[Kind, int]] = [one for step in steps for one in step]
    for kind, share in SHARES.items():
        places = [place for name, place in dealt if name == kind]
        assert places == list(range(len(places)))
        assert len(places) == pytest.approx(share * len(dealt), abs=1)


def test_lessons_depend_on_seed_and_step_alone(data: Data, tokenizer: Tokenizer, lessons: Lessons):
    dealt: list[tuple[Kind, int]] = [("section", 1), ("history", 0), ("copy", 0), ("entry", 2)]
    again = Lessons(data, tokenizer, SEED)
    assert again.step(dealt, 7) == lessons.step(dealt, 7)
    assert again.step(dealt, 8) != lessons.step(dealt, 7)
    assert again.digest() == lessons.digest()
    other = split_data(make_packages()[:-3], make_entries())
    assert Lessons(other, tokenizer, SEED).digest() != lessons.digest()


def test_exam_asks_about_held_out_texts_and_what_its_chunks_say(data: Data, tokenizer: Tokenizer):
    exam = make_exam(data, tokenizer)
    packages = {package.name: package for package in data.held_out_packages}
    for kind in ("section", "synopsis"):
        pairs = [pair for group in exam[kind] for pair in answers_of(group, tokenizer, 1.0)]
        assert len(pairs) == len(packages)
        for shown, answer in pairs:
            [name] = [name for name in packages if f"{name} " in shown]
            assert answer == getattr(packages[name], kind)
    pairs = [pair for group in exam["entry"] for pair in answers_of(group, tokenizer, 1.0)]
    records = [(shown, json.loads(answer)) for shown, answer in pairs]
    assert all((" -- " in shown) == (record["date"] is not None) for shown, record in records)
    assert {record["date"] is None for _, record in records} == {True, False}


# prompts ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Recorder:
    tokenizer: Tokenizer
    answer: str
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,  # noqa: ARG002
        grammar: Grammar | None = None,  # noqa: ARG002
    ) -> Completion:
        self.prompts.append(prompt.token_ids)
        return Completion(self.answer, len(prompt.token_ids), 1, "stop")

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        self.prompts.append(prompt.token_ids)
        return [-1.0] * len(choices)

    def count(self, text: str) -> int:
        return self.tokenizer.count(text)


def make_document(tokenizer: Tokenizer, texts: Sequence[str]) -> Document:
    chunks, start = [], 0
    for index, text in enumerate(texts):
        token_ids = tuple(tokenizer.encode_text(text))
        chunks.append(Chunk(index, start, start + len(text), token_ids))
        start += len(text)
    return Document("a", "rows", 0, "".join(texts), "", tuple(chunks))


def ask(tokenizer: Tokenizer, values: dict[str, Any], texts: Sequence[str]) -> Recorder:
    config: TaskConfig = TypeAdapter(TaskConfig).validate_python(values)
    answer = json.dumps(record_of("")) if values["kind"] == "extract" else "Partial one."
    recorder = Recorder(tokenizer, answer)
    task = make_task(config, tokenizer, TaskLimits(2_048))
    result = asyncio.run(task.run(make_document(tokenizer, texts), recorder))
    assert result.error is None
    return recorder


def shapes_of(shapes: PromptShapes, kind: str) -> list[PromptShape]:
    match kind:
        case "classify":
            return shapes.classify(SECTIONS)
        case "summarize":
            return shapes.summarize()
        case _:
            return shapes.extract()


TASKS: dict[str, dict[str, Any]] = {
    "classify": {"labels": list(SECTIONS), "instruction": "Sort this package into its section."},
    "summarize": {"length": "sentence", "max_tokens": 40},
    "extract": {
        "schema": {
            "type": "object",
            "properties": {
                name: {"type": "array", "items": {"type": "string", "x-copy": True}}
                if name in ("bugs", "cves")
                else {"type": ["string", "null"], "x-copy": True}
                for name in (
                    *("package", "version", "distribution", "urgency"),
                    *("bugs", "cves", "maintainer", "date"),
                )
            },
            "required": [
                *("package", "version", "distribution", "urgency"),
                *("bugs", "cves", "maintainer", "date"),
            ],
        },
        "instruction": "Find these fields in the changelog.",
    },
}
TEXTS = ["A greeter.\n\nIt says héllo to the ", "wörld, in 100 tongues.\n"]


@pytest.mark.parametrize("order", ["instruction_first", "document_first"])
@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("kind", ["classify", "summarize", "extract"])
def test_lessons_have_the_prompts_of_real_tasks(
    tokenizer: Tokenizer, kind: str, num_chunks: int, order: str
):
    texts = TEXTS if num_chunks == 2 else ["".join(TEXTS)]
    asked = ask(tokenizer, {"kind": kind, "prompt_order": order, **TASKS[kind]}, texts)
    shapes = shapes_of(PromptShapes(tokenizer), kind)
    shown = [tokenizer.encode_text(text) for text in texts]
    if kind == "summarize" and num_chunks == 2:
        before, part, after = map(tokenizer.encode_text, ("Part:\n", "Partial one.", "\n\n"))
        shown.append([*part, *after, *before, *part])  # what stands between the outermost words
    assert len(asked.prompts) == len(shown)
    taught = {(*shape.before, *token_ids, *shape.after) for shape in shapes for token_ids in shown}
    assert set(asked.prompts) <= taught


def test_exam_asks_as_transformers_would(tokenizer: Tokenizer):
    shape = PromptShapes(tokenizer).exam(SECTIONS)["section"]
    instruction = "Name the archive section of the Debian package that this text describes."
    labels = "".join(f"\n- {section}" for section in SECTIONS)
    turn = f"{instruction} Answer with exactly one of these labels:{labels}\n\nDocument:\nA tool."
    auto = AutoTokenizer.from_pretrained(CHECKPOINT_PATH)
    expected = auto.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
    )
    prompt = [*shape.before, *tokenizer.encode_text("A tool."), *shape.after]
    assert auto.decode(prompt, clean_up_tokenization_spaces=False) == expected
