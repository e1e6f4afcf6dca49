"""How do the windows pass through a model that has one block in memory at a time?

Words: stream (a model whose blocks come one at a time), flow (windows on their way through the blocks), hidden (where hidden states wait),
micro-batch (windows that run together), reshaped (blocks as structured pruning leaves them).
Imports: checkpoint, model, structured.
"""
