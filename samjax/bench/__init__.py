"""The work of `samjax bench`: what is timed side by side, in rounds, and how that is shown.

Each thing that is measured is a module with `measure(...)`, whose result is JSON-able, and with
`caption(result)` and `rows(result)`, the table of it. What `programs`, `inputs` and `machine` have
needs neither the data loader nor the command line.
"""
