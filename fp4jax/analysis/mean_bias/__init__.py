"""The mean of activations over tokens: its energy, its origin and its share in outliers (arXiv 2603.10444).

Numbers are in `spectrum`, `attribution`, `regeneration`, `optimizer` and `theorems`, on float64 arrays; `capture` and
`measure` take them from a model; `figures` and `tables` show them. A formula that is marked "derived reading" follows
the paper's description of a quantity and is not quoted from it.
"""
