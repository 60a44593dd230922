"""Start, adopt or replace the forwarder's process, and keep the forwarder's routes up to date."""
