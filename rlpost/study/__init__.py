"""Studies: runs that differ in one thing each, over seeds, from one start: what became of the weights, or what was learned.

plan.py      the table of arms                          runs.py            its runs, one after another
results.py   updates: figures over seeds                page.py            ... shown
learning.py  learning: figures over seeds, and curves   learning_page.py   ... shown
"""
