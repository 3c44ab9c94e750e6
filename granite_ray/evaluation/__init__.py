"""How good a job's answers are: its results against a column that holds the truth.

read the rows → measure them against the truth → tell it as a table, JSON and a page
"""

from granite_ray.evaluation.findings import Evaluation, Metric, RowCounts, Table
from granite_ray.evaluation.measuring import evaluate

__all__ = ["Evaluation", "Metric", "RowCounts", "Table", "evaluate"]
