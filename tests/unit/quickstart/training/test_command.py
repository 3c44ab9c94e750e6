"""The whole command, at its real size, on a few made-up packages and changelogs."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from granite_ray.quickstart.packages import APT_HELPER
from granite_ray.quickstart.training import __main__ as command
from tests.unit.quickstart.training.samples import make_entries, make_packages


def write_lists(folder: Path) -> None:
    """Write the packages as apt's lists have them."""
    folder.mkdir()
    index, translation = [], []
    for package in make_packages():
        stanza = f"Package: {package.name}\nDescription-md5: {package.name}\n"
        index.append(f"{stanza}Section: {package.section}\n")
        text = "\n".join(f" {line or '.'}" for line in package.text.split("\n"))
        translation.append(f"{stanza}Description-en: {package.synopsis}\n{text}\n")
    named = "mirror_dists_bookworm_main"
    (folder / f"{named}_binary-amd64_Packages").write_text("\n".join(index))
    (folder / f"{named}_i18n_Translation-en").write_text("\n".join(translation))


def write_changelogs(folder: Path) -> None:
    folder.mkdir()
    for source in {entry.source for entry in make_entries()}:
        texts = [entry.text for entry in make_entries() if entry.source == source]
        (folder / source).write_text("\n\n".join(texts))


@pytest.mark.slow
@pytest.mark.skipif(not Path(APT_HELPER).exists(), reason="needs apt, as the script does")
def test_command_trains_a_checkpoint_that_transformers_runs(tmp_path: Path):
    write_lists(tmp_path / "lists")
    write_changelogs(tmp_path / "changelogs")
    arguments = [
        *("--lists", str(tmp_path / "lists"), "--changelogs", str(tmp_path / "changelogs")),
        *("--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")),
        *("--steps", "2", "--device", "cpu"),
    ]
    command.main(arguments)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert len(first) < 40_000_000
    assert "## Quality of its jobs" in (tmp_path / "out" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "A tool."}]
    prompt = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]
    command.main(arguments)  # there is nothing left to do, and it does nothing
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
