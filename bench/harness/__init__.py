"""How every benchmark runs: one way to take turns, to check first, to record and to print.

`contest` has what a benchmark writes down, its cases; `suite` runs them and makes the record.
"""
