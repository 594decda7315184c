"""What an update did to a model: read two or more versions, measure each weight, show it.

    stored.py   versions, wherever they lie     measure.py   one pass over them: rows, and what updates share
    adapter.py  one of them: base and LoRA      mask.py      the entries that an update changed, as a file
    tables.py   for a terminal                  figures.py   for a page or a paper, in one style.py
    report.py   a page of HTML                  output.py    which file gets what
    live.py     a run watched while it trains   dampen.py    a tuned model without its intruders

`core.sparsity`, `core.rank`, `core.spectrum`, `core.overlap` and `core.agreement` have the measures themselves.
"""
