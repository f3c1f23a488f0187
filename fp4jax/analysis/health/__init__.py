"""The health of a run by layer and step: `python -m fp4jax.analyze health`.

numbers    health.jsonl as arrays, and the table of its last step
plots      a heat map for every ratio and operand
command    the subcommand
"""
