"""How does a masked model become a smaller one that plain transformers loads?

Words: keeps (the units that stay, by space), cutter (masked tensors to smaller ones), reload (the saved result, loaded in a process of its own).
Imports: checkpoint, evaluation, model, model/families, stream, structured.
"""
