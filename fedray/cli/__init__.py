"""The command line: fedray run, sweep, compare, submit, jobs, validate, params, plan, methods.

Uses: api, config, evaluation, experiment, models, planning, report, results, runtime, storage, sweeps.
"""
