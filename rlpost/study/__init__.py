"""Studies: runs that differ in one thing each, over seeds, from one start; what their updates have in common and what not.

plan.py   the table of arms     runs.py   its runs, one after another     results.py   figures over seeds     page.py   shown
"""
