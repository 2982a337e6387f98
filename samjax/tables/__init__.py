"""The work of `samjax table`: tables of papers as data, and what was measured beside them."""
