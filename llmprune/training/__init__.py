"""How is a pruned model trained so that its zeros stay?

Words: masks (which weights of which parameters are kept, by parameter name), record (the zeros of a result that no mask holds), hold (masks that
every step of an optimizer obeys).
Imports: maths, model, report, stream.
"""
