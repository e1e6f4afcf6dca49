"""How does a request become a finished output folder?

Words: job (a checked run, ready to start), preflight (all that is refused before the first forward), footprint (the memory that a run will hold),
resume (what an interrupted run has finished), sweep (many prunings under one calibration), trained (a model that was pruned while it was trained).
Imports: benchmark, checkpoint, data, engine, evaluation, export, maths, model, pruners, publish, ratios, recipe, report, statistics, stream,
structured, training.
"""
