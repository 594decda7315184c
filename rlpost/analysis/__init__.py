"""What an update did to a model: read two or more versions, measure each weight, show it.

    stored.py   versions, wherever they lie     measure.py   one pass over them: rows, and what updates share
    tables.py   for a terminal                  figures.py   for a page or a paper, in one style.py
    report.py   a page of HTML                  output.py    which file gets what

`core.sparsity`, `core.spectrum` and `core.overlap` have the measures themselves.
"""
