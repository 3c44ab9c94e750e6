"""An Airflow DAG that runs a night on a standing Ray cluster, and knows how the run itself ended.

It speaks to the Jobs API through granite-ray: the same id for the same date (a task that Airflow
starts again joins the job that is on), and the run's own exit code. Only 75 is tried again.
Put the configs beside it; the connection is two variables of the worker's environment:
RAY_API_SERVER_ADDRESS and RAY_AUTH_TOKEN_PATH (with RAY_AUTH_MODE=token).
"""

import subprocess
from datetime import datetime, timedelta

from airflow.exceptions import AirflowException, AirflowFailException
from airflow.sdk import dag, task

JOBS = "/opt/airflow/dags/granite"
TRY_AGAIN = 75
SOME_FAILED = 3


@dag(
    schedule="0 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=True,
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=10)},
)
def granite_night() -> None:
    """Summaries, then classes, of the documents of each day."""

    @task
    def submit(config: str, ds: str | None = None) -> int:
        command = ["granite-ray", "submit", f"{JOBS}/{config}", "--follow"]
        code = subprocess.run([*command, "--logical-date", str(ds)], check=False).returncode
        if code == TRY_AGAIN:
            raise AirflowException(f"{config} can be tried again: the log says why")
        if code not in (0, SOME_FAILED):
            raise AirflowFailException(f"{config} ended with exit code {code}")
        return code

    submit.override(task_id="summaries")("summaries.yaml") >> submit.override(task_id="classes")(
        "classes.yaml"
    )


granite_night()
