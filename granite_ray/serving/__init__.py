"""The tasks and the engine behind HTTP: one Ray Serve application, safe inside a company.

One gateway process takes requests (`gateway`): keys, limits, shapes, files and batches. Replicas
hold the engine (`deployment`). Between them travel the records of `calls`. What answers
(`answerer`) knows nothing of HTTP or Ray.
"""
