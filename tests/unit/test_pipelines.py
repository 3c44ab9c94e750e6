import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("pipeline", "config"),
    [("summarize", "classify"), ("classify", "extract"), ("extract", "summarize")],
)
def test_pipeline_refuses_a_job_of_another_kind(pipeline: str, config: str):
    command = [sys.executable, f"pipelines/{pipeline}.py", "--config", f"configs/{config}.yaml"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"task.kind is {config}, but this pipeline runs {pipeline}." in ended.stderr
