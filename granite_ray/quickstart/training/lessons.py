"""What the embedded model is trained on, step by step: texts in prompts, and what should follow.

Everything is drawn from a seed and a number, so that a training that goes on later sees the same.
"""

import hashlib
import random
from collections.abc import Callable, Sequence

from granite_ray.quickstart.changelogs import ChangelogEntry
from granite_ray.quickstart.packages import Package
from granite_ray.quickstart.training.bag import BagLesson
from granite_ray.quickstart.training.data import Data
from granite_ray.quickstart.training.disguise import Disguise
from granite_ray.quickstart.training.groups import GROUP_TOKENS, Epochs, Group, Row, ask_about
from granite_ray.quickstart.training.prompts import (
    SYNOPSIS_INSTRUCTIONS,
    PromptShape,
    PromptShapes,
)
from granite_ray.quickstart.training.records import record_of
from granite_ray.quickstart.training.texts import (
    MAX_CHANGELOG_TOKENS,
    MAX_DESCRIPTION_TOKENS,
    crop,
    shorten,
    tear,
)
from granite_ray.quickstart.training.timetable import Kind
from granite_ray.tasks.wording import compact_json
from granite_ray.tokenizer import Tokenizer

MAX_TEXT_TOKENS = 3 * MAX_DESCRIPTION_TOKENS
"""What is kept of a description, to cut pieces from."""
HISTORY_TOKENS = 500
"""A piece of a changelog with its answer, about."""
SECOND_TURN_SHARE = 0.75
"""Of the texts whose section is asked for: their synopsis is asked for next, at little cost."""
OTHER_LABELS_SHARE = 0.2
NUM_OTHER_LABELS = 24
DISGUISE_SHARE = 0.7
LABEL_WEIGHT = 4.0
ANSWER_WEIGHT = 1.0
GUESS_WEIGHT = 0.4
"""Of a token of a synopsis that stands nowhere in its text."""
READING_WEIGHTS: dict[Kind, float] = {"section": 0.3, "synopsis": 0.3, "entry": 0.1}
"""What predicting the text itself counts, on a sample of its tokens."""
READ_SHARE = 0.3
MIN_COPIED_ID = 16
"""Token ids from here on are copied: control tokens are below."""


class Lessons:
    """All that there is to learn, and the prompts to learn it in."""

    def __init__(self, data: Data, tokenizer: Tokenizer, seed: int) -> None:
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        people = sorted({entry.maintainer for entry in data.entries})
        self._disguise = Disguise([package.name for package in data.packages], people)
        encoded = tokenizer.encode_texts([package.text for package in data.packages])
        self._texts = [token_ids[:MAX_TEXT_TOKENS] for token_ids in encoded]
        # Words are the same at the beginning of a line as within it.
        self._folded = [
            tokenizer.decode([token_id]).strip().lower() for token_id in range(tokenizer.vocab_size)
        ]
        shapes = PromptShapes(tokenizer)
        self._sections = shapes.classify(data.labels)
        self._synopses = shapes.summarize()
        self._records = shapes.extract()
        self._other_sections = self._draw_labels(shapes)
        descriptions, entries = description_sizes(self._texts), entry_sizes(data.entries)
        self._epochs = {
            "section": Epochs("section", descriptions, seed),
            "synopsis": Epochs("synopsis", descriptions, seed),
            "entry": Epochs("entry", entries, seed),
            "history": Epochs("history", [HISTORY_TOKENS] * len(entries), seed),
        }

    def step(self, dealt: Sequence[tuple[Kind, int]], number: int) -> list[Group]:
        """Return the groups of one training step, as `deal_groups` dealt them."""
        lot = random.Random(f"{self._seed} step {number}")
        return [self.group(kind, place, lot) for kind, place in dealt]

    def group(self, kind: Kind, place: int, lot: random.Random) -> Group:
        """Return the group of a kind with that number, counted from the first step."""
        if kind == "copy":
            return self._copies(lot)
        indexes = self._epochs[kind].indexes(place)
        match kind:
            case "section":
                return self._ask_sections(indexes, lot)
            case "synopsis":
                return self._ask_synopses(indexes, lot)
            case _:
                return self._ask_records(kind, indexes, lot)

    def digest(self) -> str:
        """Return the SHA-256 of the data, in the prompts and tokens in which it is taught."""
        digest = hashlib.sha256(self._data.digest().encode())
        digest.update(repr(self._texts).encode())
        for shapes in (self._sections, self._synopses, self._records, self._other_sections):
            digest.update(repr(shapes).encode())
        return digest.hexdigest()

    def _draw_labels(self, shapes: PromptShapes) -> list[tuple[Sequence[str], list[PromptShape]]]:
        """Return other lists of labels: all in another order, or some of them."""
        lot = random.Random(f"{self._seed} labels")
        labels = self._data.labels
        drawn: dict[tuple[str, ...], list[PromptShape]] = {}
        for _ in range(NUM_OTHER_LABELS):
            size = lot.choice((len(labels), len(labels), 35, 20))
            names = tuple(lot.sample(labels, min(size, len(labels))))
            drawn[names] = shapes.classify(names)
        return list(drawn.items())

    def _ask_sections(self, indexes: Sequence[int], lot: random.Random) -> Group:
        names: Sequence[str] = self._data.labels
        shapes = self._sections
        if lot.random() < OTHER_LABELS_SHARE:
            names, shapes = lot.choice(self._other_sections)
        # Labels that follow each text cost their length again and again: less of that.
        costs = [len(shape.after) ** -0.5 for shape in shapes]
        [shape] = lot.choices(shapes, costs)
        packages = self._data.packages
        known = [index for index in indexes if packages[index].section in names] or indexes
        texts = [crop(self._texts[index], lot) for index in known]
        answers = [self._answer(packages[index].section, LABEL_WEIGHT) for index in known]
        group = ask_about("section", shape, texts, answers, _reader("section", lot))
        if lot.random() < SECOND_TURN_SHARE:
            synopses = [packages[index].synopsis for index in known]
            self._ask_again(group, list(map(self._synopsis, synopses, texts)), lot)
        return group

    def _ask_again(self, group: Group, answers: Sequence[Row], lot: random.Random) -> None:
        """Let each row go on with another turn, about the same text."""
        instruction = lot.choice(SYNOPSIS_INSTRUCTIONS[1:])
        turn = self._tokenizer.encode_template(
            f"\n<|start_of_role|>user<|end_of_role|>{instruction}<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>"
        )
        for row, answer in zip(group.rows, answers, strict=False):  # late texts found no room
            row.token_ids.extend([*turn, *answer.token_ids])
            row.weights.extend([0.0] * len(turn) + answer.weights)

    def _ask_synopses(self, indexes: Sequence[int], lot: random.Random) -> Group:
        shape = lot.choice(self._synopses)
        texts = [crop(self._texts[index], lot) for index in indexes]
        synopses = [self._data.packages[index].synopsis for index in indexes]
        answers = list(map(self._synopsis, synopses, texts))
        return ask_about("synopsis", shape, texts, answers, _reader("synopsis", lot))

    def _ask_records(self, kind: Kind, indexes: Sequence[int], lot: random.Random) -> Group:
        texts, answers = [], []
        for index in indexes:
            text, token_ids = shorten(self._changelog(kind, index, lot), self._tokenizer)
            texts.append(token_ids)
            answers.append(self._answer(compact_json(record_of(text))))
        shape = lot.choice(self._records)
        return ask_about(kind, shape, texts, answers, _reader(kind, lot))

    def _changelog(self, kind: Kind, index: int, lot: random.Random) -> str:
        """Return an entry, or a piece of several neighbours: as a rule they are of one source."""
        num_more = lot.randint(1, 3) if kind == "history" else 0
        number = len(self._data.entries)
        chosen = [self._data.entries[at % number] for at in range(index, index + num_more + 1)]
        if lot.random() < DISGUISE_SHARE:
            chosen = [self._disguise.wear(entry, lot) for entry in chosen]
        text = "\n\n".join(entry.text for entry in chosen)
        return tear(text, lot) if kind == "history" else text

    def _copies(self, lot: random.Random) -> Group:
        """Tokens without sense, and the same again: nothing but looking back predicts them."""
        newline = self._tokenizer.encode_text("\n")
        length, num_copies = lot.randint(8, 48), lot.randint(1, 3)
        rows = []
        for _ in range(GROUP_TOKENS // ((num_copies + 1) * length)):
            piece = self._nonsense(length, lot)
            token_ids, weights = list(piece), [0.0] * len(piece)
            for _ in range(num_copies):
                # Where a copy starts in the piece is a guess; how it goes on is not.
                copied = piece[lot.randrange(max(1, len(piece) // 2)) :]
                token_ids += [*newline, *copied]
                weights += [0.0] * (len(newline) + 1) + [ANSWER_WEIGHT] * (len(copied) - 1)
            rows.append(Row(token_ids, weights))
        return Group("copy", tuple(newline), rows)

    def _nonsense(self, length: int, lot: random.Random) -> list[int]:
        if lot.random() < 0.5:
            text = lot.choice(self._texts)
            start = lot.randrange(max(1, len(text) - length))
            piece = text[start : start + length]
            lot.shuffle(piece)
            return piece
        return [lot.randrange(MIN_COPIED_ID, self._tokenizer.vocab_size) for _ in range(length)]

    def _answer(self, text: str, weight: float = ANSWER_WEIGHT) -> Row:
        token_ids = [*self._tokenizer.encode_text(text), self._tokenizer.eos_token_ids[0]]
        return Row(token_ids, [weight] * len(token_ids))

    def _synopsis(self, synopsis: str, text: Sequence[int]) -> Row:
        """Return a synopsis to write: what cannot be read in the text is a guess and counts less.

        A model of this size guesses badly: it had better say what it has read.
        """
        answer = self._answer(synopsis)
        read = {self._folded[token_id] for token_id in text}
        last = len(answer.token_ids) - 1
        weights = [
            ANSWER_WEIGHT if at == last or self._folded[token_id] in read else GUESS_WEIGHT
            for at, token_id in enumerate(answer.token_ids)
        ]
        return Row(answer.token_ids, weights)


def bag_lessons(packages: Sequence[Package], tokenizer: Tokenizer) -> list[BagLesson]:
    """Return what a bag of words can learn of packages: their sections and synopses."""
    columns = zip(
        tokenizer.encode_texts([package.text for package in packages]),
        tokenizer.encode_texts([package.section for package in packages]),
        tokenizer.encode_texts([package.synopsis for package in packages]),
        strict=True,
    )
    return [
        BagLesson(text[:MAX_DESCRIPTION_TOKENS], section[0], synopsis)
        for text, section, synopsis in columns
    ]


def description_sizes(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return about how many tokens each description takes in a group, given its tokens."""
    return [min(len(text), MAX_DESCRIPTION_TOKENS) + 40 for text in texts]


def entry_sizes(entries: Sequence[ChangelogEntry]) -> list[int]:
    """Return about how many tokens each entry takes in a group."""
    return [min(len(entry.text) // 3 + 80, MAX_CHANGELOG_TOKENS) for entry in entries]


def _reader(kind: Kind, lot: random.Random) -> Callable[[], float]:
    weight = READING_WEIGHTS.get(kind, 0.0)
    return lambda: weight if lot.random() < READ_SHARE else 0.0
