"""The dashboard: a process of its own that shows the line in a browser and speaks only the wire protocol.

    command.py   `inspectd dashboard`, `inspectd dashboard-user`      settings.py  dashboard.yaml
    live.py      what the results socket says: the newest of each     books.py     ledger and rejects, read only
    engines.py   bundles on disk, calibration scores                  users.py     password hashes, roles
    gate.py      cookies, tokens, origins, how often one may try      app.py       the routes
    watchers.py  one browser's WebSocket                              static/      page, style, modules; no build step

Nothing here can slow the daemon: queues are bounded, the newest wins, and what is read from disk is read with a limit.
"""
