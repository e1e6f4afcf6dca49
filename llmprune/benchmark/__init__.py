"""How fast is a model, and how much memory does it take?

Words: lap (one prefill and some decoded tokens), workload (what every lap does), worker (a process with one model in it), kernel (a 2:4 product
on CUDA).
Imports: checkpoint, model, stream.
"""
