"""``udptun doctor`` and ``udptun report``: look for everything that is known to break a tunnel.

``check`` has the contract of a check, ``checks`` has the checks, ``facts`` has what the checks look
at, ``run`` runs them. ``bundle`` collects the files of a report, ``redact`` removes secrets and
addresses from them. The package changes nothing on the host.
"""
