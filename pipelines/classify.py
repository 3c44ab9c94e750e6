"""Give every document of a corpus its label, or its labels.

    python pipelines/classify.py --config configs/classify.yaml

alone or behind `ray job submit --working-dir . --`. It ends with the job's own exit code, and
run again it resumes.
"""

from granite_ray.cli import leave, run_pipeline

if __name__ == "__main__":
    leave(run_pipeline("classify", __doc__))
