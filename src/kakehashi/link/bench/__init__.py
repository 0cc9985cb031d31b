"""What the link of one session carries, measured inside of that session.

``kakehashi bench link`` runs it (:mod:`kakehashi.link.bench.run`), and so does ``python -m
kakehashi.link.bench``, by which an operator's command starts it in a session of its own. What
it reads stays in memory without a name; only figures leave.
"""
