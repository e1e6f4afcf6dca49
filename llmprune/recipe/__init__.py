"""What was asked for, and is it consistent?

Words: recipe (the request: TOML and flags), method (a paper's recipe), quality (one of ours), resolved (with every default filled in), refusal.
Imports: data, maths, pruners.
"""
