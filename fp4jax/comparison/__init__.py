"""Comparison of precision modes: the same training under several recipes and seeds, and what came of it.

plan.py        which runs, and what was declared before them
execute.py     the runs that are missing, one process each (run.py)
records.py     finished runs as numbers
statistics.py  loss gaps, intervals, paired tests
published.py   other people's gaps
figures.py     numbers → figures; report.py: numbers → Markdown, HTML, JSON
"""
