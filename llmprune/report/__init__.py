"""What does a reader see of a result?

Words: report (the outcome as a value, and as llmprune.json), page (report.html), section, cell, frontier (perplexity against sparsity).
Imports: benchmark, checkpoint, evaluation, model, stream.
"""
