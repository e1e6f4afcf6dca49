"""How does a masked model become a smaller one, and is a saved result, as plain transformers loads it, the model as pruned?

Words: keeps (the kept units, by space), cutter (masked tensors to smaller ones), reload (the saved result, loaded in a fresh process), check (of
that against the model as pruned).
Imports: checkpoint, data, evaluation, maths, model, model/families, stream, structured.
"""
