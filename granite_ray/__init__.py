"""IBM Granite language models over whole document corpora on Ray.

plan shards → read documents → prepare chunks → generate answers → merge results → commit shards
"""

from granite_ray.config import JobConfig, load_config
from granite_ray.errors import GraniteRayError
from granite_ray.evaluation import Evaluation, evaluate
from granite_ray.io.results import read_results
from granite_ray.job import EndedJob, RunOptions, redrive_job, run_job, run_jobs
from granite_ray.report import RunReport

__all__ = [
    "EndedJob",
    "Evaluation",
    "GraniteRayError",
    "JobConfig",
    "RunOptions",
    "RunReport",
    "evaluate",
    "load_config",
    "read_results",
    "redrive_job",
    "run_job",
    "run_jobs",
]
