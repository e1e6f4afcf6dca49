"""How good is a model, and how far is it from the dense one?

Words: perplexity, divergence (mean KL of the next-token distributions), task (of lm-eval), sample (a continuation of a prompt).
Imports: checkpoint, data, maths, model, stream.
"""
