"""Publishes the daemon's state: the report, readiness, metrics, the HTTP server, systemd."""
