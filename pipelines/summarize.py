"""Summarize every document of a corpus.

    python pipelines/summarize.py --config configs/summarize.yaml

alone or behind `ray job submit --working-dir . --`. It ends with the job's own exit code, and
run again it resumes.
"""

from granite_ray.cli import leave, run_pipeline

if __name__ == "__main__":
    leave(run_pipeline("summarize", __doc__))
