"""The command line: fedray run, sweep, submit, jobs, validate, params, plan.

Uses: api, config, evaluation, experiment, models, planning, results, runtime, storage, sweeps.
"""
