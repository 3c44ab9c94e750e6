"""The image: its Dockerfile is linted, and its install steps run for real in an environment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployments import DEPLOY

REPOSITORY = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def steps() -> list[str]:
    """The RUN commands of the build stage, in order."""
    build = DOCKERFILE[DOCKERFILE.index(" AS build") : DOCKERFILE.rindex("FROM ")]
    joined = build.replace("\\\n", " ")
    return [line.removeprefix("RUN ") for line in joined.splitlines() if line.startswith("RUN ")]


def test_the_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter, "hadolint comes with the dev dependencies"
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_a_number_and_holds_no_secret_and_no_late_install() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert re.search(r"^USER 10001:10001$", final, re.M)
    assert not re.search(r"\b(pip|gcc|curl|wget)\b", final)
    assert not re.search(r"(SECRET|TOKEN|PASSWORD|KEY)=", DOCKERFILE)
    assert "--require-hashes" in DOCKERFILE


def test_every_file_that_is_copied_is_there() -> None:
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M):
        for source in sources.split():
            assert (REPOSITORY / source).exists(), source


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_install_steps_make_a_working_environment(tmp_path: Path) -> None:
    home, place = tmp_path / "opt", tmp_path / "build"
    place.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, place)
    shutil.copy(DEPLOY / "requirements.lock", place)
    shutil.copytree(REPOSITORY / "granite_ray", place / "granite_ray")
    version = re.search(r"^ARG TORCH_VERSION=(\S+)", DOCKERFILE, re.M)
    assert version
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "TORCH_VERSION": version[1],
    }
    for step in steps():
        if step.startswith("apt-get"):
            continue  # this machine's own compiler will do
        # Which index torch comes from is a build argument; here it is pip's own.
        command = step.replace("/opt/granite", str(home))
        command = command.replace('--index-url "${TORCH_INDEX}/${VARIANT}"', "")
        command = command.replace("python -m venv", f"{sys.executable} -m venv")
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    told = subprocess.run(
        [home / "bin" / "granite-ray", "submit", "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--logical-date" in told.stdout
    assert list(home.glob("lib/python*/site-packages/granite_ray/model/kernels/kernels-*.so"))
