"""A training that was stopped goes on as if it had not been, or is refused; and its model card."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from granite_ray.errors import ConfigError
from granite_ray.quickstart.training import __main__ as command
from granite_ray.quickstart.training import card, run
from granite_ray.quickstart.training.checkpoint import write_checkpoint
from granite_ray.quickstart.training.data import Data
from granite_ray.quickstart.training.exam import examine, make_exam
from granite_ray.quickstart.training.lessons import Lessons
from granite_ray.quickstart.training.network import Network
from granite_ray.quickstart.training.run import Training
from granite_ray.quickstart.training.summary import summarize_training, write_summary
from granite_ray.quickstart.training.timetable import Kind
from granite_ray.tokenizer import Tokenizer
from tests.unit.quickstart.training.samples import SEED, make_network

NUM_STEPS = 6
ONE_EACH: Mapping[Kind, int] = {"section": 1, "synopsis": 1, "entry": 1}
EVALUATION = {
    "task": "classify",
    "truth": "section",
    "is_partial": False,
    "rows": {"measured": 1000},
    "metrics": {
        "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "about": "rows whose label is right"},
        "precision": {"value": None, "low": None, "high": None, "about": "not defined"},
    },
}


@pytest.fixture
def network(tokenizer: Tokenizer) -> Network:
    return small_network(tokenizer)


def small_network(tokenizer: Tokenizer) -> Network:
    end = tokenizer.eos_token_ids[0]
    return make_network(vocab_size=tokenizer.vocab_size, hidden_size=24, eos_token_id=end)


def weights_of(network: Network) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


# going on ────────────────────────────────────────────────────────────────────────────────────────


def test_interrupted_training_ends_like_an_undisturbed_one(
    lessons: Lessons, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "STEPS_A_SAVE", 2)
    undisturbed, first, second = (small_network(tokenizer) for _ in range(3))
    before = weights_of(undisturbed)
    Training(undisturbed, lessons, tmp_path / "one", NUM_STEPS, SEED).run({})

    training = Training(first, lessons, tmp_path / "two", NUM_STEPS, SEED)
    with monkeypatch.context() as patch:
        patch.setattr(lessons, "step", interrupt_at(3, lessons))
        with pytest.raises(KeyboardInterrupt):
            training.run({})
    assert training.step == 3  # one more than was saved
    resumed = Training(second, lessons, tmp_path / "two", NUM_STEPS, SEED)
    assert resumed.step == 2
    resumed.run({})
    assert torch.equal(weights_of(second), weights_of(undisturbed))
    assert (weights_of(second) - before).abs().max() > 1e-3
    assert resumed.num_tokens == lessons_tokens(tmp_path / "one")


def interrupt_at(number: int, lessons: Lessons):
    step = lessons.step

    def interrupted(dealt, at):
        if at == number:
            raise KeyboardInterrupt
        return step(dealt, at)

    return interrupted


def lessons_tokens(work_path: Path) -> int:
    state = torch.load(work_path / run.STATE_FILE, weights_only=True)
    assert state["step"] == NUM_STEPS
    return state["num_tokens"]


def test_another_training_is_not_gone_on_with(
    lessons: Lessons, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin(lessons, network, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="--steps is 7, but 6 in the training"):
        Training(network, lessons, tmp_path, NUM_STEPS + 1, SEED)
    with pytest.raises(ConfigError, match="--seed is 4, but 3 in the training"):
        Training(network, lessons, tmp_path, NUM_STEPS, SEED + 1)


def test_training_with_other_data_is_not_gone_on_with(
    lessons: Lessons, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin(lessons, network, tmp_path, monkeypatch)
    monkeypatch.setattr(lessons, "digest", lambda: "0" * 64)
    with pytest.raises(ConfigError, match=r"--lists, --changelogs or --tokenizer hold other data"):
        Training(network, lessons, tmp_path, NUM_STEPS, SEED)


def begin(
    lessons: Lessons, network: Network, work_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Take and save one step."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "STEPS_A_SAVE", 1)
        patch.setattr(lessons, "step", interrupt_at(1, lessons))
        with pytest.raises(KeyboardInterrupt):
            Training(network, lessons, work_path, NUM_STEPS, SEED).run({})


# exam and card ───────────────────────────────────────────────────────────────────────────────────


def test_exam_finds_a_network_that_knows_nothing_at_the_loss_of_chance(
    data: Data, tokenizer: Tokenizer
):
    network = small_network(tokenizer)
    with torch.no_grad():
        network.embedding *= 1e-4
    told = examine(network, make_exam(data, tokenizer, num_groups=ONE_EACH))
    chance = float(torch.tensor(tokenizer.vocab_size).log())
    for kind in card.KINDS:
        assert told[f"{kind} loss"] == pytest.approx(chance, abs=0.05)
        assert told[f"{kind} exact"] == 0


def test_card_tells_the_figures_of_training_and_jobs(
    data: Data, lessons: Lessons, network: Network, tokenizer: Tokenizer, tmp_path: Path
):
    work, out = tmp_path / "work", tmp_path / "out"
    training = Training(network, lessons, work, 1, SEED)
    training.run(make_exam(data, tokenizer, num_groups=ONE_EACH))
    write_summary(summarize_training(training, network, data), work)
    write_checkpoint(network, tokenizer, out)
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps(EVALUATION))
    arguments = ["--work", str(work), "--out", str(out), "--evaluations", str(evaluation)]
    card.main(arguments)
    text = (out / card.CARD_FILE).read_text()
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert f"| {len(data.packages)} | {len(data.held_out_packages)} |" in text
    assert "accuracy: rows whose label is right | 0.500 [0.400, 0.600] |" in text
    assert "not defined" not in text
    [line] = [
        json.loads(line)
        for line in (work / run.LOG_FILE).read_text().splitlines()
        if "held out" in line
    ]
    assert f"{line['held out']['entry loss']:.2f}" in text
    assert "\n\n\n" not in text
    summary = json.loads((work / "summary.json").read_text())
    shape = network.config
    expert = 3 * shape.hidden_size * shape.intermediate_size
    idle = shape.num_local_experts - shape.num_experts_per_tok
    assert summary["num_parameters"] == weights_of(network).numel()
    assert summary["num_active"] == (
        summary["num_parameters"] - shape.num_hidden_layers * idle * expert
    )


def test_card_refuses_a_file_that_is_no_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match=r"--evaluations .*other\.json is no evaluation"):
        list(card.figures_of(other))
    with pytest.raises(SystemExit) as ended:
        card.main(["--work", str(tmp_path), "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "summary.json" in capsys.readouterr().err


def test_curve_keeps_the_last_word_on_a_step_and_both_ends(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": step, "held out": {"loss": step}} for step in range(1, 31)]
    lines.insert(20, {"step": 3, "held out": {"loss": -1}})
    lines.append({"step": 30, "losses": {}})
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curve = card.learning_curve(log)
    assert [line["step"] for line in curve] == [2, 6, 10, 14, 18, 22, 26, 30]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:6] + lines[20:21]))
    assert [line["held out"]["loss"] for line in card.learning_curve(log)] == [1, 2, -1, 4, 5, 6]


def test_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "changelogs").mkdir()
    with pytest.raises(SystemExit) as ended:
        command.main(
            [
                *("--lists", str(tmp_path), "--work", str(tmp_path)),
                *("--changelogs", str(tmp_path / "changelogs")),
            ]
        )
    assert ended.value.code == 2
    assert "has no changelog" in capsys.readouterr().err
