"""
Real processes on a real database, under real faults; then a judgement of what they were promised.

Workers, a client that misbehaves and a producer use one store, and write down every verb before they call it and after
it has answered. Meanwhile something is done to them, to their network or to their server. In the end what they wrote
down and what stands in the store are compared, promise by promise. By hand, and for longer than the tests do:

    python -m tests.faults.nemeses --nemesis blackhole silent --seconds 60
    python -m tests.faults.nemeses --backend sqlite --nemesis mixed

What lives where: `workload` is what the processes do, `history` what they write down, `network` stands between them and
PostgreSQL, `stage` holds all of it, `faults` is what is done to them, `play` is one run from its beginning to its end,
and `judge` names the promises.
"""
