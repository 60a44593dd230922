"""The daemon's state as others see it: the report, readiness, metrics, the HTTP server, systemd."""
