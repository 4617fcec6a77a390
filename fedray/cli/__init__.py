"""The command line: fedray quickstart, run, sweep, compare, lm-eval, submit, jobs, validate, params, plan, methods.

Uses: api, config, evaluation, experiment, models, planning, results, runtime, storage, sweeps.
"""
