"""Which token windows is a model calibrated and evaluated on?

Words: data source (a data set or a file of text), window (a run of tokens of fixed length), calibration, evaluation, held-back windows (for trials).
Imports: checkpoint, model.
"""
