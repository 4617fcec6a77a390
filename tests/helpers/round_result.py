"""The result of a round, whose events nobody looks at."""

from fedray.federation.rounds import Federation, Round, RoundResult


def result_of(round: Round) -> RoundResult:
    """Run a round to its end and return its result."""
    while True:
        try:
            next(round)
        except StopIteration as end:
            result: RoundResult = end.value
            return result


def all_results(federation: Federation) -> list[RoundResult]:
    """Run the remaining rounds and the final pass and return their results."""
    results = []
    while federation.server_round < federation.config.rounds:
        results.append(result_of(federation.round()))
    return [*results, result_of(federation.final_pass())]
