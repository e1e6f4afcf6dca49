"""How does a masked model become a smaller one that plain transformers loads?

Words: keeps (the kept units, by space), cutter (masked tensors to smaller ones), reload (the saved result, loaded in a separate process).
Imports: checkpoint, evaluation, model, model/families, stream, structured.
"""
