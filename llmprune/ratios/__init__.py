"""Which ratios does a plan's allocation give this model, and which sparsity does its budget mean?

Words: survey (one dense pass that measures for allocations), trial (pruning the whole model and forgetting it again),
latency (of blocks cut to size).
Imports: data, engine, evaluation, maths, model, pruners, statistics, stream, structured.
"""
