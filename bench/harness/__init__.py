"""How every benchmark runs: it checks results first, lets contenders take turns, prints tables and makes a record.

`contest` has the classes with which a benchmark defines its cases; `suite` runs them and makes the record.
"""
