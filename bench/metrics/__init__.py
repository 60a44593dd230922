"""What is asked of the contenders: a module a metric, each with ``run(session, plan)``.

Owns: what one slot does, and the check that what it timed happened. The order of the slots, the
proof on the wire and the judgement are the package's around it.
"""
