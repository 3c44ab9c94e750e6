"""Extract one typed record from every document of a corpus.

    python pipelines/extract.py --config configs/extract.yaml

alone or behind `ray job submit --working-dir . --`. It ends with the job's own exit code, and
run again it resumes.
"""

from granite_ray.cli import leave, run_pipeline

if __name__ == "__main__":
    leave(run_pipeline("extract", __doc__))
