"""What each config of configs/ that the model cards ask for reads, in small."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VIENNA = "The company was founded in Vienna by three people. It makes small archives that last"
ARTICLES = [f"{first} {VIENNA}, and the dog does not mind." for first in ("A fox", "News!", "I")]
LANGUAGES = {
    "English": "Where is the library?",
    "German": "Der Hund läuft über die Straße. Warum?",
    "Spanish": "¿Quién comió la manzana?",
    "French": "Où est la bibliothèque?",
    "Japanese": "東京は日本の首都ですか。",
    "Portuguese": "São Paulo fica longe?",
    "Arabic": "مرحبا بالعالم",
    "Czech": "Kde je knihovna, prosím?",
    "Italian": "Perché il cane è veloce?",
    "Korean": "도서관은 어디에 있습니까?",
    "Dutch": "Waar is de bibliotheek?",
    "Chinese": "你好世界。",
}


def _chat(language: str, *, has_history: bool) -> dict[str, Any]:
    first = {"role": "user", "content": LANGUAGES[language]}
    history = [first, {"role": "assistant", "content": "OK."}] if has_history else None
    return {"chat_id": language, "message": LANGUAGES[language], "history": history}


ROWS: dict[str, list[dict[str, Any]]] = {
    "answer_questions": [
        {"question_id": f"q{n}", "passage": f"{VIENNA} {n} years.", "question": question}
        for n, question in enumerate(["Who founded it?", "Where was it founded?", "Does it last?"])
    ],
    "answer_from_documents": [
        {"question_id": "none", "question": "Is anything known?", "passages": []},
        {
            "question_id": "untitled",
            "question": "Who minds?",
            "passages": [{"title": None, "text": "The dog"}, {"title": None, "text": "A fox"}],
        },
        {
            "question_id": "titled",
            "question": "Where is it?",
            "passages": [
                {"title": "Vienna", "text": VIENNA},
                {"title": "Granite", "text": 'It says "coarse rock"\nand lasts'},
            ],
        },
    ],
    "write_code": [
        {"name": name, "specification": f"{name} reads a file", "programming_language": language}
        for name, language in [("first", "Python"), ("second", "Rust"), ("third", "Go")]
    ],
    "fill_in_the_middle": [
        {"gap_id": "a", "prefix": "def add(first, second):\n    ", "suffix": "\n    return total"},
        {"gap_id": "b", "prefix": "for file in files:\n\t", "suffix": ""},
        {"gap_id": "c", "prefix": "paid = ", "suffix": " and items  # see the report"},
    ],
    "call_functions": [
        {"request_id": str(n), "request": request}
        for n, request in enumerate(["Where is order A-1?", "The lamp is broken.", "Hello!"])
    ],
    "reply_in_many_languages": [
        _chat(language, has_history=n % 2 == 0) for n, language in enumerate(LANGUAGES)
    ],
    "prompt_a_base_model": [{"text": article} for article in ARTICLES],
    "summarize_in_one_pass": [{"text": "\n\n".join([article] * 20)} for article in ARTICLES],
    "summarize_in_parts": [{"text": "\n\n".join([article] * 20)} for article in ARTICLES],
}
"""By the config's name."""


def write_rows(folder: Path, file_format: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as a source of `file_format` has them."""
    folder.mkdir()
    if file_format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    elif file_format == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    else:
        for number, row in enumerate(rows):
            (folder / f"{number}.txt").write_text(row["text"], encoding="utf-8")
