"""How are checkpoints read and written, so that a crash at any moment loses nothing?

Words: source (an opened checkpoint), entry (where one tensor lies in it), loader (source to modules and back), sink (the output in the making),
shard (one weight file), journal (the records of what a run has finished), manifest (hashes of an output).
Imports: maths.
"""
