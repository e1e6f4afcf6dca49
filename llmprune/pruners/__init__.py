"""What is done to a block, or to whole layers, experts and residual channels?

Words: block pruner (what the loop calls for each block), row (what happened to one matrix), variant (a matrix at another ratio),
reconstruction (training one block against the dense one), distillation (training the whole pruned model), rotation (of the residual stream).
Imports: checkpoint, criteria, evaluation, maths, model, model/families, patterns, solvers, statistics, stream, structured.
"""
