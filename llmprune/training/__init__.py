"""How is a pruned model trained so that its zeros stay, and how is one pruned while it is trained?

Words: masks (which weights of which parameters are kept, by parameter name), record (the zeros of a result that no mask holds), hold (masks that
every step of an optimizer obeys), schedule (after which steps masks change), state (what a later process needs to go on), recovery (training of the
kept weights), objective (what it aims at), judge (the texts that choose its best step).
Imports: allocation, checkpoint, data, evaluation, maths, model, recipe, report, statistics, stream.
"""
