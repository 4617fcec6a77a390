"""The command line: fedray run, sweep, compare, lm-eval, export, personalise, submit, jobs, validate, params, plan,
methods.

Uses: api, config, evaluation, experiment, exports, models, planning, results, runtime, storage, sweeps.
"""
