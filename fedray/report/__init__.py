"""The report of runs: figures described once as data, drawn by plotly in one page and by matplotlib into files.

Uses: config, evaluation, results, storage.
"""
