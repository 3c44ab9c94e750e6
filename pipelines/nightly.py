"""Run several jobs over one corpus for one date, each document read and prefilled once.

    python pipelines/nightly.py --config summaries.yaml --config classes.yaml --date 2026-11-21

alone or behind `ray job submit --working-dir . --`. `{date}` in the paths of a config is that
date; `--catch-up 3` runs those of the three dates before it that are not complete, too. Jobs with
the same source, chunks, model and engine share one pass; with `task.prompt_order: document_first`
the model computes a document once for all of them. It ends with the worst exit code of its jobs,
and run again it resumes.
"""

from granite_ray.cli import leave, run_nightly

if __name__ == "__main__":
    leave(run_nightly(__doc__))
