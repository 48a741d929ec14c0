"""Divides the documents of a step among ranks by their cost, so that no rank waits long for another."""

from __future__ import annotations

CLOSE = 0.005  # of the mean cost: the most expensive share may be above the mean by this much


def spread(costs: list[int], count: int) -> list[list[int]]:
    """The indices of `costs` in `count` shares of about equal cost, each share in ascending order.

    Documents are assigned from the most expensive to the cheapest, each to the share with the lowest cost so
    far. Then documents are exchanged as long as that makes the most expensive share cheaper. Costs are
    integers, so all ranks compute the same shares.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cheapest = loads.index(min(loads))
        shares[cheapest].append(index)
        loads[cheapest] += costs[index]
    for _ in costs:
        if not _exchange(shares, loads, costs):
            break
    return [sorted(share) for share in shares]


def _exchange(shares: list[list[int]], loads: list[int], costs: list[int]) -> bool:
    """Exchanges a document of the most expensive share for one of another share. False if no exchange makes
    it cheaper.

    It takes the exchange after which the more expensive of the two shares costs least. Moving a document
    without an exchange would gain almost nothing, because `spread` has given each document to the cheapest
    share.
    """
    heaviest = loads.index(max(loads))
    if loads[heaviest] * len(loads) <= (1 + CLOSE) * sum(loads):
        return False
    lowest_load, best = loads[heaviest], None
    for partner in range(len(shares)):
        if partner == heaviest:
            continue
        for outgoing in shares[heaviest]:
            for incoming in shares[partner]:
                moved = costs[outgoing] - costs[incoming]
                after = max(loads[heaviest] - moved, loads[partner] + moved)
                if after < lowest_load:
                    lowest_load, best = after, (partner, outgoing, incoming)
    if best is None:
        return False
    partner, outgoing, incoming = best
    for index, source, target in ((outgoing, heaviest, partner), (incoming, partner, heaviest)):
        shares[source].remove(index)
        shares[target].append(index)
        loads[source] -= costs[index]
        loads[target] += costs[index]
    return True
