"""The command line: fedray quickstart, run, sweep, compare, report, lm-eval, export, personalise, submit, jobs,
validate, params, plan, methods.

Uses: api, config, evaluation, experiment, exports, models, planning, report, results, runtime, storage, sweeps.
"""
