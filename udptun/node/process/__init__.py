"""The forwarder's process: starts, adopts or replaces it, and keeps its routes up to date."""
